# %% [markdown]
# # Checkpoints: λ̂ while a transformer learns
#
# The loss says how well a model predicts. λ̂ says how complex the solution is by which it does so. This notebook
# trains a small transformer on text, saves checkpoints on the way, and estimates λ at each of them with one call,
# `sweep_checkpoints`. The two curves side by side show what the loss alone does not.
#
# The text comes with Python (its language reference), so that nothing is downloaded.

# %%
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import llc_fast
from llc_fast.problems.text import load_text
from llc_fast.problems.transformer import Transformer

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # short runs, to see that everything works
FOLDER = Path(sys.argv[1]) if len(sys.argv) == 2 else None  # python checkpoints.py FOLDER


def show(figure, name):
    """A notebook shows what this returns; a script writes it to FOLDER."""
    plt.close(figure)
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png")
    return figure


# %% [markdown]
# ## Text and model
#
# Sequences of 32 characters; rare characters are read as �. Each token is a character.

# %%
text = load_text(length=32, num_train=2000 if SMALL else 8000, num_test=256 if SMALL else 1024)
model = Transformer(len(text.vocabulary), context=32, **({"width": 16, "layers": 1} if SMALL else {}))
print(f"{len(text.train)} sequences of {len(text.vocabulary)} characters, {model.num_parameters} parameters")
print("such as:", repr(text.decode(text.train[0])))

# %% [markdown]
# What can be predicted without a network? If characters are drawn by their frequencies, the loss is the entropy of a
# character. If each depends on the one before it, it is that of a character given this one. These two losses help to
# read the curve.

# %%
pairs = np.zeros((len(text.vocabulary),) * 2)
np.add.at(pairs, (text.train[:, :-1].flatten().numpy(), text.train[:, 1:].flatten().numpy()), 1.0)
p = pairs / pairs.sum()
frequencies = -np.sum(p.sum(0) * np.log(p.sum(0), where=p.sum(0) > 0, out=np.zeros(len(p))))
neighbours = -np.sum(p * np.log(p / p.sum(1, keepdims=True).clip(1e-12), where=p > 0, out=np.zeros_like(p)))
print(f"loss by frequencies {frequencies:.2f}, by pairs of neighbours {neighbours:.2f} nats a character")

# %% [markdown]
# ## Train, and save checkpoints
#
# A folder `checkpoint-STEP` with `model.safetensors` for each. Trainers of Hugging Face write the same names; files
# of `torch.save` and of Lightning are read as well.

# %%
SAVED = (0, 20, 60) if SMALL else (0, 30, 100, 200, 400, 800, 1600)
temporary = tempfile.TemporaryDirectory()  # goes when this program ends
run = Path(temporary.name)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)


def loss_of(sequences):
    return F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


test_loss = {}
for step in range(SAVED[-1] + 1):
    if step in SAVED:
        with torch.no_grad():
            test_loss[step] = loss_of(text.test).item()
        (run / f"checkpoint-{step}").mkdir()
        save_file(model.state_dict(), run / f"checkpoint-{step}" / "model.safetensors")
    optimizer.zero_grad()
    loss_of(text.train[torch.randint(len(text.train), (32,), generator=generator)]).backward()
    optimizer.step()
print(*(f"checkpoint-{step}" for step in SAVED))

# %% [markdown]
# ## The sweep
#
# The folder is all that `sweep_checkpoints` needs: it finds the checkpoints in it and their steps. A pattern does as
# well, `"run/checkpoint-*"`, and so do a list of state dicts or files and a generator.
#
# - `"next-token"` is the loss of a language model, averaged over all tokens.
# - nβ and γ are given, and the same for all checkpoints. Left out, each checkpoint would have its own γ, and the
#   curve would mix what was learned with a change of the scale. nβ = 30 and γ = 300 are usual for language models
#   (`preset="language-model"`): chains stay near w\*, so that it matters little that most checkpoints are no minima.
# - Chains of a checkpoint start where those of the one before ended.

# %%
curve = llc_fast.sweep_checkpoints(
    model,
    run,
    text.train,
    "next-token",
    dim="step",
    nbeta=30.0,
    localization=300.0,
    batch_size=32,
    num_draws=60 if SMALL else 150,
    num_burnin=40 if SMALL else 100,
)
print(curve[["llc_mean", "llc_stderr", "init_loss"]].to_dataframe().round(3))
for step, codes in zip(curve.step.values, curve.warning_codes.values, strict=True):
    if codes:
        print(f"step {step} has warnings: {codes}")

# %% [markdown]
# The answer is an xarray dataset over the checkpoints: `curve.llc_mean`, the interval `llc_low` to `llc_high`, the
# diagnostics, and the warnings of each. `curve.to_netcdf(…)` saves it.
#
# ## The curve

# %%
steps, llc = curve.step.values, curve.llc_mean.values
interval = np.abs(np.stack([curve.llc_low.values, curve.llc_high.values]) - llc)
warned = curve.warning_codes.values != ""
train_loss = curve.init_loss.values

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
left.plot(steps, train_loss, "o-", label="training text")
left.plot(steps, list(test_loss.values()), "s--", label="other text")
left.axhline(frequencies, color="0.6", ls=":")
left.axhline(neighbours, color="0.6", ls=":")
left.text(steps[-1], frequencies, "by frequencies", ha="right", va="bottom", color="0.4")
left.text(steps[-1], neighbours, "by pairs", ha="right", va="bottom", color="0.4")
left.set(xlabel="training step", ylabel="loss (nats a character)", title="the loss falls")
left.legend(loc="lower left")
left.margins(y=0.1)
for axes, places in ((middle, steps), (right, train_loss)):
    axes.plot(places, llc, color="C0", lw=1)
    axes.errorbar(places[~warned], llc[~warned], interval[:, ~warned], fmt="o", color="C0", capsize=3)
    axes.errorbar(places[warned], llc[warned], interval[:, warned], fmt="o", color="C0", mfc="white", capsize=3)
    axes.axhline(0, color="0.8", lw=1, zorder=0)
middle.errorbar([], [], [], fmt="o", color="C0", capsize=3, label="95 % interval")
if warned.any():
    middle.plot([], [], "o", color="C0", mfc="white", label="with a warning")
middle.legend(loc="upper left")
middle.set(xlabel="training step", ylabel="λ̂ at nβ = 30, γ = 300", title="λ̂ rises")
right.invert_xaxis()
right.set(xlabel="loss (training goes to the right)", ylabel="λ̂", title="λ̂ for each loss")
for axes in (left, middle):
    axes.set_xscale("symlog", linthresh=max(steps[1], 10))
    axes.set_xticks(steps, steps)
    axes.set_xticks([], minor=True)
    axes.set_xlim(-3, 1.3 * steps[-1])
show(figure, "curve")

# %% [markdown]
# ## What the curve says

# %%
for a, b in zip(range(len(steps)), range(1, len(steps)), strict=False):
    fall, rise = train_loss[a] - train_loss[b], llc[b] - llc[a]
    print(f"steps {steps[a]:>4} to {steps[b]:>4}: the loss falls by {fall:.2f}, λ̂ rises by {rise:5.1f}")

# %% [markdown]
# In the full run:
#
# - **The loss falls early, λ̂ rises late.** At step 30 the model has the loss of frequencies, with λ̂ below 2. At
#   step 200 it has that of pairs, with λ̂ about 8. By then the loss has made two thirds of its way, and λ̂ a fifth.
#   What is learned first is simple.
# - **What comes later is expensive.** From step 200 on, the loss falls by a further 0.9, less than in the first 30
#   steps, and λ̂ rises by about 35. The right picture shows it: the curve becomes steeper and steeper.
# - **The first point is hollow.** It has warnings: the loss hardly depends on the weights yet, chains hardly move it,
#   and the interval has 0 in it. That is all that can be said of an untrained network.
# - **λ̂ is far below P/2**, half of the number of parameters. At this temperature most directions do not matter.
#
# λ̂ of a checkpoint that is no minimum lacks something. A warning (`no-minimum`) says so where it matters.
# `loss_fn="behavioral"` estimates λ of what the checkpoint does rather than of how well it does it, and has no such
# problem (`docs/behavioral.md`).
#
# Next: `heads` asks which attention heads hold the complexity.
