"""λ̂ of devinterp 2.0.1 for a small language model at its minimum, chain by chain: a script.

It runs where devinterp 2.0.1 is installed:

    PYTHONPATH=FOLDER:. python tests/shared/devinterp_llc.py > tests/data/devinterp_llc.json

FOLDER is where that is installed apart from version 1, if it is. What is kept has the weights and the tokens,
so that llc_fast samples the same posterior. L(w*) is that of all data: as many minibatches as they have.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, LENGTH, SEQUENCES = 8, 9, 64
SEED = 5000
SETTINGS = {
    "lr": 2e-3,
    "nbeta": 20.0,
    "localization": 5.0,
    "num_chains": 256,
    "num_draws": 300,
    "num_burnin": 150,
    "batch_size": 16,
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Tanh(), nn.Linear(4, VOCABULARY))


def tokens() -> torch.Tensor:
    """Each token is mostly followed by the next one of the alphabet, or the one after it."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 3, (SEQUENCES, LENGTH), generator=generator)
    steps[:, 0] = torch.randint(VOCABULARY, (SEQUENCES,), generator=generator)
    return steps.cumsum(1) % VOCABULARY


def trained(ids: torch.Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(1000):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> dict[str, Any]:
    from datasets import Dataset
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.sampling import sample

    torch.set_num_threads(1)
    ids = tokens()
    model = trained(ids)
    data = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    chosen = SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        samples = sample(
            model, data, {"all": (data, 1)}, lr=chosen["lr"], n_beta=chosen["nbeta"],
            localization=chosen["localization"], num_chains=int(chosen["num_chains"]),
            num_draws=int(chosen["num_draws"]), num_burnin_steps=int(chosen["num_burnin"]),
            batch_size=int(chosen["batch_size"]), num_init_loss_batches=SEQUENCES // int(chosen["batch_size"]),
            match_sampling_input_ids_across_chains=False, init_seed=SEED, device="cpu",
            output_path=f"{folder}/run.zarr",
        )  # fmt: skip
        found = compute_llc(samples)
        init_loss = float(found.init_loss)
        draws = samples.dataset.sampling_loss.mean(dim=["batch", "token_pos", "draw"]).values
        return {
            "settings": chosen,
            "input_ids": ids.tolist(),
            "weights": {name: w.tolist() for name, w in model.state_dict().items()},
            "init_loss": init_loss,
            "all steps": [round(float(x), 6) for x in found.llc_per_chain.values],
            "draws": [round(float(x), 6) for x in chosen["nbeta"] * (draws.astype(float) - init_loss)],
        }


if __name__ == "__main__":
    from families import import_torchvision

    kept = import_torchvision()
    print(json.dumps(main()))
