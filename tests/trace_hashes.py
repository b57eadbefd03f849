"""Fingerprints of a few dozen traces, to show that a change of structure changes no bit.

Every sampler × strategy × odd option:

    python tests/trace_hashes.py write before.json     with the package as it was
    python tests/trace_hashes.py check before.json     with the package as it is, on the same machine

Bits depend on the machine (instruction set, libraries), so the file is not kept in the repository.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import llc_fast

mse = nn.functional.mse_loss


def _data(n: int, width: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :1].sin() + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)).to(dtype)


def _initialized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def _mlp(*extra: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    return _initialized(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *extra, nn.Linear(8, 1)).to(dtype))


def _estimate(model: nn.Module, data: Any, loss_fn: Any = mse, **options: Any) -> Any:
    chosen = {"lr": 1e-3, "num_chains": 3, "num_draws": 30, "num_burnin": 10, "batch_size": 16, "progress": False}
    for name, value in options.items():
        chosen[name] = value
    if chosen["batch_size"] is None:
        del chosen["batch_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return llc_fast.estimate_llc(model, data, loss_fn, **chosen)


def _per_sample(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(1)


def cases() -> Iterator[tuple[str, Any]]:
    data = _data(100)
    samplers = ["sgld", "preconditioned-sgld", "rmsprop-sgld", "adam-sgld", "sghmc", "sgnht", "mala", "hmc"]
    for sampler in samplers:
        for strategy in ("sequential", "batched", None):
            size = None if sampler in ("mala", "hmc") else 16
            yield (
                f"{sampler}/{strategy}",
                lambda s=sampler, t=strategy, b=size: _estimate(_mlp(), data, sampler=s, strategy=t, batch_size=b),
            )
        size = None if sampler in ("mala", "hmc") else 16
        yield (
            f"{sampler}/calibrated",
            lambda s=sampler, b=size: _estimate(_mlp(), data, sampler=s, lr=None, batch_size=b),
        )
    odd = {
        "default": {"lr": None, "num_draws": 100, "num_burnin": 100},
        "all default": {"lr": None, "num_draws": None, "num_burnin": None, "num_chains": 2},
        "correction by hand": {"heat_correction": True},
        "release": {"release_gradients": True, "strategy": "sequential"},
        "microbatch": {"microbatch_size": 5},
        "autocast": {"autocast": torch.bfloat16},
        "thinned": {"num_steps_bw_draws": 3},
        "box": {"sampler_options": {"bounding_box_size": 0.05}},
        "noise level": {"sampler_options": {"noise_level": 0.5}},
        "weight decay": {"sampler_options": {"weight_decay": 2.0}, "localization": 100.0},
        "mask": {"params": {"0.weight": torch.arange(24).view(8, 3) % 3 == 0, "2.*": True}},
        "one chain": {"num_chains": 1},
        "17 chains": {"num_chains": 17},
        "full batch": {"batch_size": 100},
        "seed": {"seed": 2**63 + 5},
    }
    for name, options in odd.items():
        yield name, lambda o=options: _estimate(_mlp(), data, **o)
    relative = {"sampler": "rmsprop-sgld", "sampler_options": {"relative_eps": True, "eps": 0.1}}
    yield "relative eps", lambda: _estimate(_mlp(), data, **relative)
    metric = {"preconditioner": {n: p.detach().abs() + 0.1 for n, p in _mlp().named_parameters()}}
    for sampler in ("preconditioned-sgld", "mala"):
        size = 16 if sampler != "mala" else None
        yield (
            f"metric/{sampler}",
            lambda s=sampler, b=size: _estimate(_mlp(), data, sampler=s, sampler_options=metric, batch_size=b),
        )
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield str(dtype), lambda d=dtype: _estimate(_mlp(dtype=d), _data(100, dtype=d))
    for name, model in {
        "dropout": lambda: _mlp(nn.Dropout(0.2)),
        "batch norm, train": lambda: _mlp(nn.BatchNorm1d(8)),
        "batch norm, eval": lambda: _mlp(nn.BatchNorm1d(8)).eval(),
    }.items():
        yield name, lambda m=model: _estimate(m(), data)
    yield "per-sample loss", lambda: _estimate(_mlp(), data, _per_sample)
    yield (
        "loader",
        lambda: _estimate(
            _mlp(),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=16, shuffle=True),
            batch_size=None,
        ),
    )
    norm = {"norm": lambda draw: sum(p.square().sum() for p in draw.params.values()), "loss": lambda draw: draw.loss}
    yield "observables", lambda: _estimate(_mlp(), data, observables=norm)
    yield "compiled", lambda: _estimate(_mlp(), data, strategy="compiled")

    def resumed() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run.npz")
            _estimate(_mlp(), data, checkpoint=path, checkpoint_interval=0.0)
            return _estimate(_mlp(), data, checkpoint=path)

    yield "checkpoint", resumed

    def warm() -> Any:
        return _estimate(_mlp(), data, warm_start=_estimate(_mlp(), data, keep_ends=True), keep_ends=True)

    yield "warm start", warm


def fingerprint(result: Any) -> str:
    """Of the losses, the bias trace, what observables gave, L(w*) and the step size."""
    bias = result.bias_trace if hasattr(result, "bias_trace") else result.heat_trace
    total = hashlib.blake2b(digest_size=12)
    arrays = [result.loss_trace, np.full_like(result.loss_trace, np.nan) if bias is None else bias]
    arrays += [values for name, values in sorted(result.observables.items()) if name not in ("acceptance", "lr")]
    for array in [*arrays, np.array([result.init_loss, result.nbeta, result.settings["lr"]])]:
        total.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
    return total.hexdigest()


def main() -> None:
    mode, path = sys.argv[1], Path(sys.argv[2])
    before = json.loads(path.read_text()) if mode == "check" else {}
    found = {}
    for name, make in cases():
        found[name] = fingerprint(make())
        if before and before.get(name) != found[name]:
            print("changed:", name, flush=True)
    if mode == "write":
        path.write_text(json.dumps(found, indent=1))
    changed = [name for name in before if before[name] != found.get(name)]
    print(f"{len(found)} traces, {len(changed)} changed")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
