# %% [markdown]
# # Heads: which part of a transformer is how complex?
#
# λ̂ of a whole network is one number. If only some weights may move and all others stay at w\*, it is the λ̂ of these
# weights (*weight-refined* LLC). This notebook trains a transformer of two layers of attention to copy, and estimates
# λ for each of its eight heads.

# %%
import math
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import llc_fast
from llc_fast.problems.transformer import Attention

SMALL = os.environ.get("LLC_FAST_SMALL") == "1"  # short runs, to see that everything works
FOLDER = Path(sys.argv[1]) if len(sys.argv) == 2 else None  # python heads.py FOLDER


def show(figure, name):
    """A notebook shows what this returns; a script writes it to FOLDER."""
    plt.close(figure)
    if FOLDER is not None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png")
    return figure


# %% [markdown]
# ## The task
#
# A sequence repeats a random pattern of 6 to 12 tokens, and 15 % of all tokens are replaced by random ones: `3 7 1 9
# 4 0 3 7 1 9 4 …`. Who wants to predict the next token must find the earlier place that looks like this one, and copy
# what came after it. Heads that do so are called *induction heads*.

# %%
VOCABULARY, LENGTH = 16, 28


def sequences(count, generator):
    period = torch.randint(6, 13, (count, 1), generator=generator)
    tokens = torch.rand(count, VOCABULARY, generator=generator).argsort(1)
    clean = tokens.gather(1, torch.arange(LENGTH) % period)
    noise = torch.randint(VOCABULARY, clean.shape, generator=generator)
    return torch.where(torch.rand(clean.shape, generator=generator) < 0.15, noise, clean)


def loss_fn(model, batch):
    """Cross-entropy of the second half of each sequence, where the pattern has been seen."""
    tokens = batch[0]
    half = LENGTH // 2
    logits = model(tokens[:, :-1])[:, half - 1 :]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, half:], reduction="none").mean(1)


# %% [markdown]
# ## The model
#
# Attention alone, without perceptrons: two layers of four heads. `Attention` of `llc_fast.problems` is a plain one;
# `llc_fast.components` finds the heads of the usual libraries' models, too.

# %%
WIDTH, HEADS = 32, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(WIDTH, HEADS)
        for p in self.attention.parameters():
            nn.init.normal_(p, std=WIDTH**-0.5)

    def forward(self, x):
        return x + self.attention(self.norm(x))


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.unembed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.unembed(self.norm(x))


torch.manual_seed(0)
model = TwoLayers()
generator = torch.Generator().manual_seed(1)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(150 if SMALL else 1500):
    optimizer.zero_grad()
    loss_fn(model, (sequences(64, generator),)).mean().backward()
    optimizer.step()
data = sequences(2048, generator)
loss = loss_fn(model, (data,)).mean().item()
print(f"{sum(p.numel() for p in model.parameters())} parameters, loss {loss:.2f}; by chance {math.log(VOCABULARY):.2f}")

# %% [markdown]
# ## Parts by name
#
# `components` lists the parts of a model that have names: `l1 h2` is head 2 of layer 1, its queries, keys, values and
# outputs. That these weights are the head's is verified by running the layer.

# %%
parts = llc_fast.components(model)
heads = [name for name in parts if name.partition(" ")[2].startswith("h")]
print(heads)
print({name: parts[name].num_parameters for name in ("embed", "l0 attn", heads[0])})

# %% [markdown]
# ## λ̂ of each head
#
# `params=` takes such names. nβ and γ are the same for all heads: only then can their λ̂ be compared.

# %%
results = {
    head: llc_fast.estimate_llc(
        model,
        (data,),
        loss_fn,
        params=head,
        nbeta=llc_fast.default_nbeta(len(data)),
        localization=100.0,
        batch_size=32,
        num_chains=2 if SMALL else 4,
        num_draws=60 if SMALL else 120,
        num_burnin=30 if SMALL else 60,
    )
    for head in heads
}

# %% [markdown]
# ## What each head does
#
# Two other questions, to compare with. How much does the loss rise without the head? And where does it look, on
# average over the second half: at the token before, or at the one that came after an earlier occurrence of this
# token?


# %%
@torch.no_grad()
def loss_without(head):
    """The loss with the output of a head set to 0."""
    kept = {name: p.clone() for name, p in model.named_parameters() if name in parts[head] and name.endswith("output")}
    for name, p in model.named_parameters():
        if name in kept:
            p[parts[head][name].expand_as(p)] = 0.0
    found = loss_fn(model, (data,)).mean().item()
    model.load_state_dict(kept, strict=False)
    return found


@torch.no_grad()
def attention_scores():
    """For each head its mean attention to the token before, and to what followed the same token earlier."""
    x = model.tokens(data) + model.positions.weight
    before = F.pad(data[:, :-1], (1, 0), value=-1)
    follows = (before[:, None, :] == data[:, :, None]).tril().float()
    previous = torch.diag(torch.ones(LENGTH - 1), -1).expand_as(follows)
    scores = {}
    for number, layer in enumerate(model.layers):
        z, own = layer.norm(x), layer.attention
        query, key = (torch.einsum("hdw,btw->bhtd", weight, z) for weight in (own.query, own.key))
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        seen = (query @ key.mT / math.sqrt(WIDTH // HEADS)).masked_fill(later, -math.inf).softmax(-1)
        for head in range(HEADS):
            weight = seen[:, head, LENGTH // 2 :]
            scores[f"l{number} h{head}"] = [
                (weight * target[:, LENGTH // 2 :]).sum(-1).mean().item() for target in (previous, follows)
            ]
        x = layer(x)
    return scores


scores = attention_scores()
rise = {head: loss_without(head) - loss for head in heads}
print("head     λ̂              loss without   looks at: token before   what followed   warnings")
for head, result in results.items():
    codes = ", ".join(warning.code for warning in result.warnings) or "none"
    print(
        f"{head}   {result.llc_mean:6.2f} ± {result.llc_stderr:4.2f}   {rise[head]:+12.3f}"
        f"{scores[head][0]:26.2f}{scores[head][1]:16.2f}   {codes}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for layer in range(2):
    own = [head for head in heads if head.startswith(f"l{layer}")]
    llc = [results[head].llc_mean for head in own]
    error = [2 * results[head].llc_stderr for head in own]
    left.bar(own, llc, yerr=error, capsize=4, color=f"C{layer}", alpha=0.75, label=f"layer {layer}")
    right.errorbar([rise[head] for head in own], llc, error, fmt="o", color=f"C{layer}", capsize=3)
    for number, (head, value) in enumerate(zip(own, llc, strict=True)):
        place = (-5, 5) if layer == 0 else (5, 5 if number % 2 else -10)
        side = "right" if layer == 0 else "left"
        right.annotate(head, (rise[head], value), place, textcoords="offset points", ha=side, fontsize=8)
left.set(title="λ̂ of each head, ± 2 standard errors", ylabel="λ̂")
left.legend()
right.set(xlabel="rise of the loss without the head", ylabel="λ̂", title="λ̂ and importance")
show(figure, "heads")

# %% [markdown]
# ## What the numbers mean
#
# In the full run:
#
# - **One head of layer 0 has by far the largest λ̂.** It is the one that looks at the token before. Without it the
#   loss rises three times as much as without any other. The heads of layer 1 need what it says: after which token
#   each one comes.
# - **All four heads of layer 1 are induction heads.** Most of their attention is on what followed the same token
#   earlier. They do the same work, so that the loss rises little without one of them, and λ̂ of each is moderate.
# - **The head with the smallest λ̂ is the one that does least.** Without it the loss hardly rises.
# - λ̂ and importance go together, but are not the same: importance is what happens when the head is gone, λ̂ how
#   exactly its weights are determined by the data at this temperature.
# - **The λ̂ of heads do not add up** to that of the network: each is measured with all others held fixed.
#
# Each estimate has its error bar and its own warnings. Where a warning appears, longer chains (`num_draws`) are the
# usual remedy; its text says which.
#
# Parts may be more than heads: `params=["l0 attn", "embed"]`, glob patterns or masks. `docs/components.md` has all
# names, and `sweep_checkpoints(…, params="l0 h3")` follows a head through training.
