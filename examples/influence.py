"""What a small language model knows of three kinds of text: influence between sequences, with error bars.

    python examples/influence.py FOLDER

A transformer of 70,000 parameters learns the characters of Python's manual, its grammar and the source code of its
library: text that comes with Python, so nothing is downloaded. Then `llc_fast.sample` runs Langevin chains around the
trained weights and keeps the loss of every token of a few sequences at every draw. From these come, for no further
run, λ̂, which sequences the model treats alike, and which tokens help to predict other text. It takes two minutes on
two cores and writes pictures and a page to FOLDER.

The cells (`# %%`) run one by one in editors that know them, or as a notebook (jupytext).
"""

# %% The text: three kinds, cut into sequences of characters
from __future__ import annotations

import inspect
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import llc_fast
from llc_fast.problems.text import python_manual
from llc_fast.problems.transformer import Transformer

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # seconds instead of minutes, to see that everything runs
LENGTH = 32 if SMALL else 48
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "influence")
FOLDER.mkdir(parents=True, exist_ok=True)

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


def sequences(text: str) -> torch.Tensor:
    """Tokens ``[sequence, LENGTH]``, in random order; what is rare is read as �."""
    tokens = torch.tensor([NUMBER.get(c, len(VOCABULARY) - 1) for c in text])
    cut = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]


EACH, HELD_OUT = (3, 4) if SMALL else (8, 24)  # sequences of a kind to look at, and to ask about
pieces = {kind: sequences(text) for kind, text in texts.items()}
held_out = {kind: piece[:HELD_OUT] for kind, piece in pieces.items()}
train = torch.cat([piece[HELD_OUT:3000] for piece in pieces.values()])
chosen = torch.cat([piece[HELD_OUT : HELD_OUT + EACH] for piece in pieces.values()])  # all of them in `train`
kinds = [kind for kind in pieces for _ in range(EACH)]
print(f"{len(VOCABULARY)} characters; sequences:", {kind: len(piece) for kind, piece in pieces.items()})

# %% The model, trained for about a minute
model = Transformer(len(VOCABULARY), LENGTH, **({"width": 16, "layers": 1} if SMALL else {"width": 48}))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
generator, steps, start = torch.Generator().manual_seed(1), 40 if SMALL else 1000, time.perf_counter()
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1.0, 2 * (1 - step / steps))
    batch = train[torch.randint(len(train), (32,), generator=generator)]
    loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{model.num_parameters:,} parameters, loss {loss:.2f} after {time.perf_counter() - start:.0f} s")

# %% The chains: λ̂, and the loss of every token of the probes at every draw
samples = llc_fast.sample(
    model,
    train,
    "next-token",
    probes={"chosen": chosen, **held_out},
    per="token",
    sketch=256,  # where the chains went, for samples.pca()
    store=None,  # or a folder, which survives an interruption
    nbeta=30.0,
    localization=300.0,
    num_chains=2 if SMALL else 4,
    num_draws=60 if SMALL else 200,
    num_burnin=20 if SMALL else 100,
    num_steps_bw_draws=1 if SMALL else 2,
    batch_size=32,
    seed=0,
)
print(samples)
print(samples.llc().summary())
samples.llc().plot(FOLDER / "llc.png")

# %% Which sequences does the model treat alike? The loss kernel: correlations of losses over draws


def decode(tokens: list[int]) -> str:
    """The characters of tokens."""
    return "".join(VOCABULARY[k] for k in tokens)


kernel = samples.loss_kernel("chosen")
print(kernel.summary())
kernel.plot(FOLDER / "kernel.png", decode=decode, title="correlation of losses: " + ", ".join(pieces))

# %% What would more of a sequence do to the loss of each kind of held-out text? Negative: it would fall
rows = []
for kind in pieces:
    found = samples.influence("chosen", kind, per=("sample", "probe"))
    rows.append([found.value[[k for k, own in enumerate(kinds) if own == row], 0].mean() for row in pieces])
table = np.array(rows).T
print("mean influence of a sequence of (row) on the mean loss of held-out (column), in 1e-6:")
print(" " * 10 + "".join(f"{kind:>10}" for kind in pieces))
for kind, row in zip(pieces, table, strict=True):
    print(f"{kind:<10}" + "".join(f"{1e6 * value:>10.2f}" for value in row))

# %% The pairs with the largest influence, with standard errors
pairs = samples.influence("chosen", "grammar")
for pair in pairs.top(5, decode):
    print(f"{pair.value:+.2e} ± {pair.stderr:.1e}  {pair.train}  on  {pair.query}")
pairs.plot(FOLDER / "influence.png", title="influence of sequences on held-out grammar")

# %% Which tokens matter to which kind of text? A color behind each
parts = []
for kind in pieces:
    tokens = samples.influence("chosen", kind, per=("token", "probe"))
    parts.append(tokens.html(decode, top=6, title=f"influence of tokens on the mean loss of held-out {kind}"))
page = '<!doctype html><meta charset="utf-8"><title>influence of tokens</title>' + "\n".join(parts)
(FOLDER / "tokens.html").write_text(page, encoding="utf-8")

# %% Where did the chains go? Around w*, and nowhere in particular: γ holds most directions alike
samples.pca().plot(FOLDER / "pca.png")
print(f"pictures and a page in {FOLDER}")
