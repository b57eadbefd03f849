"""What devinterp 2.0.1 makes, and what its functions find in a store: run as a script, where it is installed.

    python tests/shared/devinterp2.py make STORE      # a small store of its own
    python tests/shared/devinterp2.py read STORE      # its numbers, as JSON

devinterp 1.3.2, which other tests use, has the same name, so this runs in a process of its own, with the folder of
version 2 first on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from typing import Any

LENGTH, VOCABULARY = 5, 4
SAMPLER = {"num_chains": 2, "num_draws": 12, "num_burnin_steps": 5, "batch_size": 4, "num_init_loss_batches": 4}


def make(path: str) -> None:
    import torch
    from datasets import Dataset
    from devinterp.slt.sampling import sample

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 4), torch.nn.Tanh(), torch.nn.Linear(4, VOCABULARY))
    rows = torch.randint(0, VOCABULARY, (40, LENGTH)).tolist()
    data = Dataset.from_dict({"input_ids": rows}).with_format("torch")
    probe = Dataset.from_dict({"input_ids": [row[::-1] for row in rows[:20]]}).with_format("torch")
    observables = {"pile": (data, 2), "back wards": (probe, 1)}
    sample(
        model, data, observables, lr=1e-3, n_beta=10.0, localization=5.0, init_seed=3, device="cpu",
        output_path=path, **SAMPLER,
    )  # fmt: skip


def read(path: str) -> dict[str, Any]:
    import xarray
    from devinterp.slt.bif import compute_bif
    from devinterp.slt.llc import compute_llc
    from devinterp.slt.susceptibilities import compute_susceptibilities

    samples = xarray.open_datatree(path, engine="zarr", consolidated=False)
    llc = compute_llc(samples)
    names = [name.removeprefix("loss_") for name in samples.dataset.data_vars if str(name).startswith("loss_")]
    found: dict[str, Any] = {
        "llc_per_chain": _rounded(llc.llc_per_chain.values),
        "init_loss": float(llc.init_loss),
        "loss_trace": _rounded(llc.loss_trace.values),
        "names": names,
        "means": {name: _rounded(samples.dataset[f"loss_{name}"].values.mean(axis=(0, 1))) for name in names},
    }
    smallest = min(names, key=lambda name: samples.dataset[f"loss_{name}"].shape[2])
    for name in names:
        for method in ("sequence", "token") if name == smallest else ("sequence",):
            for covariance in (False, True):
                bif = compute_bif(
                    samples, loss_keys=[name], correlation_method=method, compute_covariance=covariance, device="cpu"
                )
                kind = "covariance" if covariance else "correlation"
                found[f"{method} {kind} {name}"] = _rounded(bif.influences.values)
    # The same chains in the place of restricted ones: the definition holds for any.
    chi = compute_susceptibilities({"full": samples, "same": samples}, sampling_task=names[0])
    found["susceptibilities"] = _rounded(chi["susceptibilities"].sus.values)
    return found


def _rounded(values: Any) -> Any:
    """Lists, with the digits that float32 has."""
    return [_rounded(v) for v in values] if values.ndim else float(f"{float(values):.8g}")


if __name__ == "__main__":
    from families import import_torchvision

    kept = import_torchvision()
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        print(json.dumps(read(sys.argv[2])))
