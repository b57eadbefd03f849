# %% [markdown]
# # Quickstart: how complex is what a network has learned?
#
# A trained network is a point w\* in the space of its weights. The local learning coefficient λ says how fast the
# volume of weights that are almost as good grows around w\*. A regular model with d parameters has λ = d/2. A neural
# network has directions in which hardly anything changes, and its λ is smaller: it is as complex as a regular model
# with 2λ parameters.
#
# `llc_fast` estimates λ and its error. It runs Markov chains around w\* and measures how much worse the weights are
# that they visit:
#
# $$\hat\lambda = n\beta\,\bigl(\overline{L(w)} - L(w^*)\bigr).$$
#
# This notebook trains a small network, estimates its λ, reads the result, meets a warning, checks a case whose λ is
# known exactly, and shows what the two numbers nβ and γ do.

# %%
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import llc_fast

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # short runs, to see that everything works
FOLDER = Path(sys.argv[1]) if len(sys.argv) == 2 else None  # python quickstart.py FOLDER


def show(figure, name):
    """A notebook shows what this returns; a script writes it to FOLDER."""
    plt.close(figure)
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png")
    return figure


# %% [markdown]
# ## Train a network
#
# 2,000 samples of a sine with noise. Only the first of ten inputs matters. The network has 385 parameters.

# %%
torch.manual_seed(0)
x = torch.randn(2000, 10)
y = torch.sin(x[:, :1]) + 0.1 * torch.randn(2000, 1)
model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(500):
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.step()
print(f"{sum(p.numel() for p in model.parameters())} parameters, loss {F.mse_loss(model(x), y).item():.4f}")

# %% [markdown]
# ## Estimate λ
#
# One call: the model, its data and its loss. Short pilot chains choose the step size, and the chains go on until the
# error is small enough. The model is left exactly as it was.

# %%
result = llc_fast.estimate_llc(model, (x, y), F.mse_loss)
print(result)

# %% [markdown]
# ## Read the result
#
# - **First line.** λ̂, its standard error, and the interval that has λ with 95 % probability. About 10.7: near w\*
#   the network is as complex as a regular model with 21 parameters, though it has 385.
# - **Second line.** How long the chains were, L(w\*), and how much more the draws lose than w\* does. λ̂ is nβ times
#   that.
# - **Third line.** Whether to trust it. R̂ near 1: the chains agree. ESS: what the draws are worth as independent
#   ones. The bias of finite steps was measured, and subtracted.
# - **Fourth line.** λ̂ is at the scale of γ. More of that below.
# - **Last line.** All settings, those that were chosen included. `result.settings` has them.
#
# Each of these numbers has a name in Python:

# %%
low, high = result.interval()
print(f"{result.llc_mean:.2f} ± {result.llc_stderr:.2f}, between {low:.2f} and {high:.2f}")
print(f"R̂ = {result.diagnostics['r_hat']:.3f}, chains: {[round(value, 1) for value in result.llc_per_chain.tolist()]}")
print("warnings:", [warning.code for warning in result.warnings])

# %% [markdown]
# The picture has the chains from six sides. Look at the first panel first: nβ·(L − L(w\*)) along each chain. Chains
# start at w\*, where it is 0. It rises, and must be flat before the draws begin, where the gray area ends. The
# running estimate has settled, and the λ̂ of single chains agree within their intervals. Below are how much the draws
# lose, how fast the chains forget where they were, and whether all chains have the same draws. `docs/results.md`
# explains each panel.

# %%
show(result.plot(), "result")

# %% [markdown]
# ## A warning, and what to do
#
# Let us choose a step size that is too large. Steps of finite size add to the loss, and λ̂ comes out too high. With a
# step size of your own nothing is subtracted, unless you ask for it with `bias_correction=True`.

# %%
coarse = llc_fast.estimate_llc(model, (x, y), F.mse_loss, lr=1e-3)
print(f"λ̂ = {coarse.llc_mean:.2f} ± {coarse.llc_stderr:.2f}")
for warning in coarse.warnings:
    print(f"[{warning.code}] {warning}")

# %% [markdown]
# The small standard error does not help: it knows nothing of the bias. The warning does. It has a code (`step-size`),
# says what is wrong in numbers, and which argument to change. We do what it says:

# %%
mended = llc_fast.estimate_llc(model, (x, y), F.mse_loss, lr=2.1e-4)
print(f"λ̂ = {mended.llc_mean:.2f} ± {mended.llc_stderr:.2f}, bias {mended.diagnostics['bias_share']:.0%}")
print("warnings:", [warning.code for warning in mended.warnings])

# %% [markdown]
# This agrees with the first estimate, but for the few percent of bias that remain. `LLCWarning` is also issued as a
# Python warning, so that a script can turn it into an error.
#
# ## A known answer
#
# Is λ̂ right? For deep linear networks, y = W₂W₁x, the exact λ is known (Aoyagi 2024), and `llc_fast.theory` has it.
# Take 6 inputs, 4 hidden units and 6 outputs: 48 parameters. Any invertible 4×4 matrix A may be put between the
# layers, W₂A⁻¹·AW₁, and nothing changes. These are 16 directions, and 32 that matter: λ = 32/2 = 16.
#
# The targets are the network's own outputs, so that w\* is a minimum with L(w\*) = 0. γ = 1, as the exact λ is about
# all weights that are equally good, not only those close by.

# %%
torch.manual_seed(0)
for widths in [(6, 4, 6), (8, 5, 8), (12, 8, 12)]:
    num_inputs, hidden, num_outputs = widths
    linear = nn.Sequential(nn.Linear(num_inputs, hidden, bias=False), nn.Linear(hidden, num_outputs, bias=False))
    inputs = 20 * torch.rand(20_000, num_inputs) - 10
    data = inputs, linear(inputs).detach()
    exact = llc_fast.theory.deep_linear(widths, rank=hidden).value
    known = llc_fast.estimate_llc(linear, data, F.mse_loss, localization=1.0)
    low, high = known.interval()
    print(
        f"{widths}: exact λ = {exact:g} of {known.settings['num_parameters']} parameters, "
        f"λ̂ = {known.llc_mean:.2f} ± {known.llc_stderr:.2f}, between {low:.2f} and {high:.2f}"
    )

# %% [markdown]
# In the full run each interval has the exact λ in it. `llc-fast demo` does this for nine networks, and `llc-fast
# reproduce dln-scaling` for many more, up to a million parameters.
#
# ## The scale: nβ and γ
#
# Chains sample the density exp(−nβ·L(w) − γ/2·‖w − w\*‖²). So λ̂ depends on two numbers.
#
# - **nβ**, the inverse temperature, says which differences of the loss count. The default is n / log n.
# - **γ**, the localization, says how far from w\* the chains may go. By default each weight may move by half of the
#   root mean square weight.
#
# A direction of curvature h counts as ½·nβh/(nβh + γ). Steep directions count as a half, those with h far below γ/nβ
# hardly at all. `scan` estimates a whole grid.

# %%
nbeta, gamma = result.settings["nbeta"], result.settings["localization"]
grid = llc_fast.scan(
    model,
    (x, y),
    F.mse_loss,
    nbeta=[nbeta / 4, nbeta] if SMALL else [nbeta / 4, nbeta, 4 * nbeta],
    localization=[gamma, 4 * gamma] if SMALL else [gamma / 4, gamma, 4 * gamma],
)
print(grid)

# %%
show(grid.plot(), "scale")

# %% [markdown]
# λ̂ grows with nβ and falls with γ, and there is no plateau: this is usual for trained networks. On a diagonal of the
# picture, where γ/nβ is the same, λ̂ hardly changes. That ratio is the curvature below which a direction no longer
# counts.
#
# So a λ̂ is a number *at a scale*. **Compare λ̂ only at equal nβ and γ**, say which they were, and give both to
# `estimate_llc` where you compare models: `nbeta=…, localization=…`.
#
# Next: `checkpoints` follows λ̂ through a training run, `heads` asks which part of a transformer is how complex, and
# `influence` which samples matter to which.
