# %% [markdown]
# # Influence: what a language model knows of three kinds of text
#
# Draws around w\* say more than λ̂. Two losses that rise and fall together over the draws belong to samples that the
# weights treat alike. Their covariance is even a derivative: how the loss of one sample would change if there were a
# little more of the other.
#
# A small transformer learns the characters of Python's manual, its grammar and the source code of its library: text
# that comes with Python, so nothing is downloaded. `llc_fast.sample` then runs chains around the trained weights and
# keeps the loss of every token of a few sequences at every draw. From this one run come λ̂, which sequences the model
# treats alike, and which ones help to predict other text. At the end `susceptibilities` asks which part of the model
# answers to what.

# %%
from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import llc_fast
from llc_fast.problems.text import python_manual
from llc_fast.problems.transformer import Transformer

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # short runs, to see that everything works
FOLDER = Path(sys.argv[1]) if len(sys.argv) == 2 else None  # python influence.py FOLDER
LENGTH = 32 if SMALL else 48


def show(figure, name):
    """A notebook shows what this returns; a script writes it to FOLDER."""
    plt.close(figure)
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png")
    return figure


# %% [markdown]
# ## The text
#
# Three kinds, cut into sequences of characters. What is rare is read as �.

# %%
manual = python_manual()
modules = ("argparse", "ast", "difflib", "doctest", "inspect", "textwrap", "tokenize", "typing")
texts = {
    "prose": " ".join(part for part in manual if "::=" not in part and ">>>" not in part),
    "grammar": " ".join(part for part in manual if "::=" in part),
    "source": " ".join(" ".join(inspect.getsource(__import__(name)).split()) for name in modules),
}
counts = np.unique(list("".join(texts.values())), return_counts=True)
VOCABULARY = "".join(c for c, count in zip(*counts, strict=True) if count >= 100) + "�"
NUMBER = {c: k for k, c in enumerate(VOCABULARY)}


def sequences(text):
    """Tokens [sequence, LENGTH], in random order."""
    tokens = torch.tensor([NUMBER.get(c, len(VOCABULARY) - 1) for c in text])
    cut = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]


EACH, HELD_OUT = (3, 4) if SMALL else (8, 24)  # sequences of a kind to look at, and to ask about
pieces = {kind: sequences(text) for kind, text in texts.items()}
held_out = {kind: piece[:HELD_OUT] for kind, piece in pieces.items()}
train = torch.cat([piece[HELD_OUT:3000] for piece in pieces.values()])
chosen = torch.cat([piece[HELD_OUT : HELD_OUT + EACH] for piece in pieces.values()])  # all of them in `train`
kinds = [kind for kind in pieces for _ in range(EACH)]


def decode(tokens):
    """The characters of tokens."""
    return "".join(VOCABULARY[k] for k in tokens)


print(f"{len(VOCABULARY)} characters; sequences:", {kind: len(piece) for kind, piece in pieces.items()})
for kind, row in zip(pieces, chosen[::EACH], strict=True):
    print(f"{kind:<8} {decode(row.tolist())!r}")

# %% [markdown]
# ## The model

# %%
model = Transformer(len(VOCABULARY), LENGTH, **({"width": 16, "layers": 1} if SMALL else {"width": 48}))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
generator, steps = torch.Generator().manual_seed(1), 40 if SMALL else 1000
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
    batch = train[torch.randint(len(train), (32,), generator=generator)]
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{model.num_parameters} parameters, loss {loss:.2f}")

# %% [markdown]
# ## The chains
#
# `sample` is an estimate that also evaluates *probes* at every draw: 24 sequences of the training text (`chosen`,
# eight of each kind) and held-out text of each kind. `per="token"` keeps the loss of each token. With
# `store="run.zarr"` all of it is on disk and survives an interruption.

# %%
chains = {
    "nbeta": 30.0,
    "localization": 300.0,
    "num_chains": 2 if SMALL else 4,
    "num_draws": 60 if SMALL else 200,
    "num_burnin": 20 if SMALL else 100,
    "num_steps_bw_draws": 1 if SMALL else 2,
    "batch_size": 32,
    "seed": 0,
}
samples = llc_fast.sample(
    model,
    train,
    "next-token",
    probes={"chosen": chosen, **held_out},
    per="token",
    sketch=256,  # where the chains went, for samples.pca()
    **chains,
)
print(samples)

# %% [markdown]
# λ̂ comes with it, examined as always:

# %%
result = samples.llc()
print(f"λ̂ = {result.llc_mean:.2f} ± {result.llc_stderr:.2f}, R̂ = {result.diagnostics['r_hat']:.3f}")
print("warnings:", [warning.code for warning in result.warnings])
show(result.plot(), "llc")

# %% [markdown]
# ## Which sequences does the model treat alike?
#
# The loss kernel: correlations of the losses of two sequences over the draws. Gray entries do not differ from 0 at a
# false discovery rate of 5 %.

# %%
kernel = samples.loss_kernel("chosen")
print(kernel.summary())
show(kernel.plot(decode=decode, title="correlation of losses: " + ", ".join(pieces)), "kernel")

# %% [markdown]
# Sequences 0 to 7 are prose, 8 to 15 grammar, 16 to 23 source code. In the full run the strongest correlations are in
# the middle, between pieces of grammar: the definitions of patterns repeat each other, and the same weights predict
# them.
#
# ## What would more of a sequence do?
#
# The influence of i on j is −β·Cov(loss of i, loss of j): by how much the loss of j would change if i had twice its
# weight in the data, to first order. Negative: the loss would fall. Here is the mean over the sequences of a kind, on
# the mean loss of held-out text of each kind:

# %%
table = np.empty((len(pieces), len(pieces)))
for column, kind in enumerate(pieces):
    found = samples.influence("chosen", kind, per=("sample", "probe"))
    for row, own in enumerate(pieces):
        table[row, column] = found.value[[k for k, other in enumerate(kinds) if other == own], 0].mean()
print("more of one sequence of (row) on the mean loss of held-out (column), in 1e-6:")
print(" " * 10 + "".join(f"{kind:>10}" for kind in pieces))
for kind, row in zip(pieces, table, strict=True):
    print(f"{kind:<10}" + "".join(f"{1e6 * value:>10.2f}" for value in row))

# %% [markdown]
# In the full run all numbers are negative: more text of any kind helps to predict every kind, as all of it is English
# with code in it. Held-out grammar is helped most by grammar, and by more than any other pair of kinds.
#
# Single pairs, with standard errors:

# %%
pairs = samples.influence("chosen", "grammar")
for pair in pairs.top(5, decode):
    print(f"{pair.value:+.2e} ± {pair.stderr:.1e}  {pair.train}  on  {pair.query}")
show(pairs.plot(title="influence of sequences on held-out grammar"), "influence")

# %% [markdown]
# ## Which tokens matter?
#
# The influence of single tokens on the mean loss of held-out text, as a color behind each: red raises the loss, blue
# lowers it.


# %%
class Page(str):
    """HTML, which a notebook shows."""

    def _repr_html_(self):
        return str(self)


def show_page(page, name):
    if FOLDER is not None:
        head = f'<!doctype html><meta charset="utf-8"><title>{name}</title>'
        (FOLDER / f"{name}.html").write_text(head + page, encoding="utf-8")
    return Page(page)


parts = []
for kind in pieces:
    tokens = samples.influence("chosen", kind, per=("token", "probe"))
    parts.append(tokens.html(decode, top=3, title=f"influence of tokens on the mean loss of held-out {kind}"))
show_page("\n".join(parts), "tokens")

# %% [markdown]
# ## Where did the chains go?
#
# Principal components of w − w\*. Chains should wander around the same place.

# %%
show(samples.pca().plot(), "pca")

# %% [markdown]
# ## Which part of the model answers to what?
#
# The susceptibility χ of a component C for a sequence says how much the mean loss of chains in which only C moves
# would rise if there were a little more of this sequence in the data. It is negative where the sequence loses more
# than the average when the component's chains lose more: the sequence depends on this component. There is a run for
# each component, and one of all weights.

# %%
components = [f"l{layer} {part}" for layer in range(model.layers) for part in ("attn", "mlp")]
short = chains | {"num_draws": 40 if SMALL else 100, "num_burnin": 20 if SMALL else 50, "num_steps_bw_draws": 1}
answers = llc_fast.susceptibilities(model, train, "next-token", {"chosen": chosen}, components, control=False, **short)
print(answers.summary())
show(answers.plot(probe="chosen", what="z"), "susceptibilities")

# %% [markdown]
# Each row is a component, each column a sequence in the same order as above. The color is χ over its standard error;
# gray entries can't be told from 0 with chains as short as these. The result examines itself, too: its warnings say
# which runs are short of effective draws.
#
# `control=True`, which takes twice as long, samples everything again at nβ = 0. Without it nobody knows how much of a
# pattern is due to the localization alone (`docs/susceptibilities.md`).
#
# More: `docs/influence.md` has the formulas, the errors, and how well influences predict retraining.
