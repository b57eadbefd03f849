# %% [markdown]
# # Coming from devinterp
#
# The same estimate by devinterp 1.3.2 and by `llc_fast`, side by side: the names, the numbers, and the time. Then our
# sampler inside devinterp's loop, and what `llc_fast` says in addition.
#
# The network is a deep linear one, y = W₂W₁x, whose λ is known exactly, so that all can be compared with the truth.

# %%
import importlib.util
import os
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import llc_fast

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # short runs, to see that everything works
FOLDER = Path(sys.argv[1]) if len(sys.argv) == 2 else None  # python coming_from_devinterp.py FOLDER

estimate_theirs = None
if importlib.util.find_spec("devinterp") is None:
    print("devinterp is not installed (pip install devinterp==1.3.2): its rows are left out")
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        from devinterp.optim.sgld import SGLD as TheirSGLD
        from devinterp.slt.sampler import estimate_learning_coeff_with_summary as estimate_theirs


def show(figure, name):
    """A notebook shows what this returns; a script writes it to FOLDER."""
    plt.close(figure)
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png")
    return figure


# %% [markdown]
# ## The problem
#
# 8 inputs, 5 hidden units, 8 outputs. The targets are the network's own outputs: w\* is a minimum.

# %%
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 8, bias=False))
x = 20 * torch.rand(20_000, 8) - 10
y = model(x).detach()
loader = DataLoader(TensorDataset(x, y), batch_size=500, shuffle=True)
exact = llc_fast.theory.deep_linear((8, 5, 8), rank=5).value
nbeta, gamma = llc_fast.default_nbeta(len(x)), 1.0
print(f"exact λ = {exact:g}, nβ = {nbeta:.1f}, γ = {gamma:g}")

# %% [markdown]
# ## Names
#
# | devinterp 1.3.2 | `llc_fast` |
# | --- | --- |
# | `estimate_learning_coeff_with_summary(model, loader, …)` | `estimate_llc(model, data, loss_fn, …)` |
# | `loader` | `data`: tensors, a data set, or the same loader |
# | `evaluate(model, batch)` | `loss_fn(model, batch)`, or `loss_fn(output, target)` |
# | `sampling_method=SGLD` | `sampler="sgld"` |
# | `optimizer_kwargs=dict(lr=, nbeta=, localization=)` | `lr=, nbeta=, localization=` |
# | `num_chains`, `num_draws`, `num_burnin_steps` | `num_chains`, `num_draws`, `num_burnin` |
# | `optimize_over_per_model_param` | `params`: masks, names, globs, components |
# | `init_loss`, by default of as many minibatches as chains | L(w\*) of all data |
# | `["llc/mean"]`, `["llc/std"]` | `llc_mean`, `llc_std` (and `llc_stderr`, `interval()`) |
# | `["llc-chain/0"]`, `["loss/trace"]` | `llc_per_chain`, `loss_trace` |
#
# nβ, γ and the step size ε have the same meaning, and the same formula of a step. `llc/std` is the standard deviation
# of chains, which does not shrink with more of them; `llc_stderr` is the standard error of λ̂.
#
# ## Numbers
#
# One set of settings for all.

# %%
CHAINS, DRAWS, BURNIN = (2, 100, 100) if SMALL else (4, 500, 500)
LR = 1e-5
rows = []


def add(name, mean, spread, start, note=""):
    rows.append((name, float(mean), float(spread)))
    seconds = time.perf_counter() - start
    print(f"{name:<42} λ̂ = {float(mean):6.2f}, standard deviation of chains {float(spread):.2f}; {seconds:.1f} s{note}")


def evaluate(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def theirs(name, sampling_method, lr=LR):
    """devinterp's estimate, with a sampler of theirs or of ours."""
    if estimate_theirs is None:
        return
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimate_theirs(
            model,
            loader,
            evaluate=evaluate,
            sampling_method=sampling_method,
            optimizer_kwargs={"lr": lr, "nbeta": nbeta, "localization": gamma},
            num_chains=CHAINS,
            num_draws=DRAWS,
            num_burnin_steps=BURNIN,
            seed=0,
            verbose=False,
        )
    add(name, found["llc/mean"], found["llc/std"], start)


def ours(name, data=(x, y), **settings):
    start = time.perf_counter()
    result = llc_fast.estimate_llc(model, data, F.mse_loss, nbeta=nbeta, localization=gamma, **settings)
    add(name, result.llc_mean, result.llc_std, start)
    return result


# %%
same = {"lr": LR, "num_chains": CHAINS, "num_draws": DRAWS, "num_burnin": BURNIN}
if estimate_theirs is not None:
    theirs("devinterp", TheirSGLD)
    theirs("devinterp with llc_fast.SGLD in it", llc_fast.SGLD)
loaded = ours("llc_fast, the same loader", loader, **same)
tensors = ours("llc_fast, tensors", batch_size=500, **same)

# %% [markdown]
# These sample the same density with the same steps, so their λ̂ differ by chance alone. In the second line
# devinterp's own loop runs with `sampling_method=llc_fast.SGLD`: nothing else of its call has changed, and its
# callbacks work as before.
#
# Data that are given as tensors are faster than a loader, which collates each minibatch in Python. The seconds are
# those of the machine that ran this, two cores of a virtual machine that had other work at the same time: take the
# order of magnitude. `docs/performance.md` has careful measurements.
#
# ## What is said in addition
#
# All four have one thing in common: a step size chosen by hand. What if it is too large?

# %%
too_large = 8 * LR
if estimate_theirs is not None:
    theirs("devinterp, ε eight times as large", TheirSGLD, too_large)
coarse = ours("llc_fast, ε eight times as large", batch_size=500, **same | {"lr": too_large})
for warning in coarse.warnings:
    print(f"    [{warning.code}] {warning}")

# %% [markdown]
# The estimate is too high, and the spread of its chains does not show it. `llc_fast` says so: it measures at every
# step what finite steps add to the loss. With `bias_correction=True` it also subtracts that:

# %%
corrected = ours(
    "llc_fast, ε eight times as large, corrected", batch_size=500, bias_correction=True, **same | {"lr": too_large}
)
print(
    f"    bias {corrected.diagnostics['bias_share']:.0%}, subtracted; warnings: {[w.code for w in corrected.warnings]}"
)

# %% [markdown]
# Left alone, `llc_fast` chooses the step size by pilot chains, corrects its bias, and goes on until the error is 2 %
# of λ̂:

# %%
alone = ours("llc_fast, nothing chosen by hand", **({"num_draws": 150, "num_burnin": 150} if SMALL else {}))
print(alone)

# %%
figure, axes = plt.subplots(figsize=(8, 0.6 + 0.45 * len(rows)), layout="constrained")
for place, (name, mean, spread) in enumerate(reversed(rows)):
    axes.errorbar(mean, place, xerr=spread, fmt="o", color="C0" if "llc_fast" in name else "C1", capsize=3)
axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
axes.axvline(exact, color="k", ls="--", lw=1)
axes.set(
    xlabel="λ̂ and the standard deviation of chains", title=f"exact λ = {exact:g} (dashed)", ylim=(-0.6, len(rows) - 0.4)
)
show(figure, "side_by_side")

# %% [markdown]
# ## What to take along
#
# - Keep your settings: `lr`, `nbeta`, `localization`, `num_chains`, `num_draws` mean the same, and give the same λ̂.
# - Or keep devinterp's loop, and pass `sampling_method=llc_fast.SGLD`.
# - Or leave `lr` and the length out. Then each result has an error bar of λ̂ itself, R̂ and effective sample size,
#   the bias of its steps, and a warning with a remedy where one of these says that it can't be trusted.
# - L(w\*) is that of all data here. devinterp's is that of a few minibatches by default, and where w\* has a loss,
#   its noise goes into λ̂ times nβ.
