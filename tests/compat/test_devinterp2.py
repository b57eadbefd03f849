"""Our optimizers inside devinterp 2.0.1.

It and the devinterp 1.3.2 of the other tests can't be in one environment. So what needs it runs in a process of its
own, which finds it in the folder that the environment variable DEVINTERP2 names:

    pip install --no-deps --target FOLDER devinterp==2.0.1
    DEVINTERP2=FOLDER pytest tests/compat
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import llc_fast
from llc_fast.compat import devinterp2

# ---- what needs no devinterp -------------------------------------------------------------------------------


def test_groups_as_devinterp_gives_them() -> None:
    """One step of SGLD without noise, by the formula: masks, localization, weight decay and the box."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    masks = [torch.tensor([0, 1, 1]).expand(4, 3).contiguous(), None, torch.tensor([True, False])]
    options = {"lr": 0.1, "nbeta": 3.0, "localization": 2.0, "weight_decay": 0.5, "noise_level": 0.0}
    groups = [{"params": p, "mask": m} for p, m in zip(params, masks, strict=True)]
    optimizer = devinterp2.make_optimizer(llc_fast.SGLD, groups, bounding_box_size=0.4, save_metrics=False, **options)
    assert len(optimizer.param_groups) == 1  # one call of the kernel
    start = [p.detach().clone() for p in params]
    expected = [t.clone() for t in start]
    for _ in range(3):
        for p, w, w0, mask in zip(params, expected, start, masks, strict=True):
            p.grad = torch.sin(p.detach()) + 1
            drift = 3.0 * (torch.sin(w) + 1) + 2.0 * (w - w0) + 0.5 * w
            moved = torch.clamp(w - 0.05 * drift, w0 - 0.4, w0 + 0.4)
            w.copy_(moved if mask is None else torch.where(mask != 0, moved, w))
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-5, atol=1e-6)


def test_what_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="param_masks must hold zeros and ones"):
        devinterp2.make_optimizer(llc_fast.SGLD, [{"params": p, "mask": torch.tensor([0.5, 1.0])}], lr=0.1)
    with pytest.raises(ValueError, match="save_metrics=True is of devinterp's own samplers"):
        devinterp2.make_optimizer(llc_fast.SGLD, [{"params": p}], save_metrics=True)
    with pytest.raises(ValueError, match="save_metrics=True"):
        devinterp2.llc(save_metrics=True)
    with pytest.raises(TypeError, match=r"sampling_method must be an optimizer of llc_fast.*got <class 'torch.optim"):
        devinterp2.sample(sampling_method=torch.optim.SGD)
    with pytest.raises(ValueError, match=r"sampler='sgldd' is unknown; did you mean 'sgld'"):
        devinterp2.sample(sampling_method="sgldd")
    with pytest.raises(ValueError, match="HMC accepts or rejects"):
        devinterp2.sample(sampling_method="hmc")
    with pytest.raises(TypeError, match="sampling_method_kwargs must be numbers"):
        devinterp2.sample(sampling_method_kwargs={"preconditioner": torch.ones(1)})


def test_names_of_samplers() -> None:
    """devinterp's, ours, and the classes."""
    assert devinterp2.optimizer_class("sgmcmc_sgld") is devinterp2.optimizer_class("sgld") is llc_fast.SGLD
    assert devinterp2.optimizer_class("rmsprop_sgld") is devinterp2.optimizer_class("rmsprop-sgld")
    assert devinterp2.optimizer_class(llc_fast.SGNHT) is llc_fast.SGNHT


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("1.3.2", r"devinterp 1.3.2 is installed, which takes llc_fast.SGLD itself.*is for 2.0.1"),
        ("2.1.0", "is for 2.0.1"),
    ],
)
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str, words: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=words):
        devinterp2.sample()


def test_without_devinterp(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install devinterp==2.0.1"):
        devinterp2.sample()


def test_the_table_of_samplers_is_put_back() -> None:
    """Also after an error, and only when the last of several calls is over; others' calls are never ours."""

    def theirs(params: Any, **options: Any) -> tuple[Any, ...]:
        return "theirs", params, options

    table: dict[str, Callable[..., Any]] = {"sgmcmc_sgld": theirs}
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError), devinterp2._ours(table):
        with devinterp2._ours(table):
            assert table["sgmcmc_sgld"]([p], lr=1.0) == ("theirs", [p], {"lr": 1.0})
        made = table["sgmcmc_sgld"]([{"params": p, "mask": None}], lr=1.0, nbeta=2.0, llc_fast="sghmc")
        assert isinstance(made, llc_fast.SGHMC) and made.param_groups[0]["nbeta"] == 2.0
        raise RuntimeError
    assert table == {"sgmcmc_sgld": theirs}


# ---- inside of it ------------------------------------------------------------------------------------------

_HEAD = """
import json, sys, warnings
import numpy as np, torch
warnings.simplefilter("ignore")
from families import import_torchvision
operators = import_torchvision()  # transformers asks for it
from datasets import Dataset
import devinterp.slt.config, devinterp.slt.llc, devinterp.slt.sampling
import llc_fast
from llc_fast.compat import devinterp2

class Bigrams(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(12, 6), torch.nn.Linear(6, 12)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))

def loss_fn(model, ids):
    logits = model(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

torch.manual_seed(0)
model = Bigrams()
ids = torch.randint(12, (64, 9))
ids[:, 1::2] = (ids[:, 0::2][:, :4] * 5 + 1) % 12
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(200):  # near a minimum, where λ̂ is large beside its error
    optimizer.zero_grad()
    loss_fn(model, ids).mean().backward()
    optimizer.step()
data = Dataset.from_dict({"input_ids": ids.numpy()}).with_format("torch")
before = dict(devinterp.slt.config.SAMPLING_METHODS)
common = dict(n_beta=100.0, localization=40.0, batch_size=16, num_init_loss_batches=4, loss_fn=loss_fn, device="cpu")
theirs, ours = devinterp.slt.sampling.sample, devinterp2.sample
losses = lambda tree: tree.dataset.sampling_loss_micro.values
"""
_TAIL = """
assert devinterp.slt.config.SAMPLING_METHODS == before
"""


def _inside(script: str, tmp_path: Path) -> Any:
    """What a script prints last, with devinterp 2 to be had."""
    folder = os.environ.get("DEVINTERP2")
    if not folder:
        pytest.skip("needs devinterp 2.0.1: pip install --no-deps --target FOLDER devinterp==2.0.1, DEVINTERP2=FOLDER")
    for package in ("datasets", "pydantic", "zarr", "xarray"):
        pytest.importorskip(package)
    shared = str(Path(__file__).parents[1] / "shared")
    path = os.pathsep.join([folder, shared, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + script + _TAIL],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_steps_are_theirs(tmp_path: Path) -> None:
    """Without noise the same losses at every step, to rounding, of SGLD and RMSprop-SGLD, masked and in a box."""
    script = """
masks = {"embed.weight": (torch.arange(72) % 3 > 0).view(12, 6), "head.weight": None}
cases = {
    "sgld": (dict(lr=1e-3), {}),
    "decay": (dict(lr=1e-3, llc_weight_decay=3.0), {}),
    "box": (dict(lr=5e-3, bounding_box_size=0.02), {}),
    "masks": (dict(lr=1e-3, param_masks=masks), {}),
    "accumulated": (dict(lr=1e-3, gradient_accumulation_steps=2), {}),
    "rmsprop": (dict(lr=1e-4, sampling_method="rmsprop_sgld", rmsprop_eps=0.01, rmsprop_alpha=0.9), {}),
    "rmsprop by class": (
        dict(lr=1e-4, sampling_method="rmsprop_sgld"), {"sampling_method": llc_fast.RMSpropSGLD}
    ),
}
more = common | dict(num_chains=1, num_draws=8, num_burnin_steps=2, noise_level=0.0)
model = Bigrams()  # untrained, so that it moves
found = {}
for name, (options, changed) in cases.items():
    one = losses(theirs(model, data, {}, **more | options))
    other = losses(ours(model, data, {}, **more | options | changed))
    assert one.shape == other.shape and np.isfinite(one).all()
    found[name] = [float(np.abs(one - other).max()), float(np.abs(one[:, 0] - one[:, 4]).max())]
print(json.dumps(found))
"""
    found = _inside(script, tmp_path)
    assert len(found) == 7
    for name, (difference, moved) in found.items():
        assert difference < 2e-5 < 1e-2 < moved, name


def test_the_same_posterior(tmp_path: Path) -> None:
    """λ̂ of devinterp's `llc` with its sampler and with ours agree within the spread over chains; runs repeat."""
    script = """
options = common | dict(lr=2e-3, num_chains=4, num_draws=120)
chains = lambda llc, **more: llc(model, data, {}, **options | more).llc_per_chain.values.tolist()
found = {"theirs": chains(devinterp.slt.llc.llc), "ours": chains(devinterp2.llc)}
few = dict(num_chains=2, num_draws=5, sampling_method=llc_fast.SGHMC)
found["sghmc"], found["again"] = chains(devinterp2.llc, **few), chains(devinterp2.llc, **few)
print(json.dumps(found))
"""
    found = {name: np.array(values) for name, values in _inside(script, tmp_path).items()}
    theirs, ours = found["theirs"], found["ours"]
    spread = float(np.hypot(theirs.std(ddof=1), ours.std(ddof=1))) / 4**0.5
    assert abs(theirs.mean() - ours.mean()) < 6.0 * spread  # Student's t with six degrees: one in a thousand
    assert spread < 0.1 * abs(theirs.mean())  # so this can fail
    assert len(set(ours.tolist())) == 4
    assert found["again"].tolist() == found["sghmc"].tolist() and len(set(found["sghmc"].tolist())) == 2


def test_results_and_stores_are_theirs(tmp_path: Path) -> None:
    """The same variables and shapes, with observables; a store is used again by the same call alone."""
    script = """
more = common | dict(lr=1e-3, num_chains=2, num_draws=4, num_burnin_steps=2)
observed = {"probe": data}
one = theirs(model, data, observed, **more, output_path="theirs.zarr")
other = ours(model, data, observed, **more, output_path="ours.zarr")
shapes = lambda tree: {str(k): list(v.shape) for k, v in tree.dataset.variables.items()}
assert shapes(one) == shapes(other)
assert (one.dataset.init_loss.values == other.dataset.init_loss.values).all()
assert other.attrs["metadata"]["config"]["sampler"]["sampling_method_kwargs"] == {"llc_fast": "sgld"}
assert (losses(ours(model, data, observed, **more, output_path="ours.zarr")) == losses(other)).all()
said = []
for call, path in ((theirs, "ours.zarr"), (ours, "theirs.zarr")):
    try:
        call(model, data, observed, **more, output_path=path)
    except RuntimeError as error:
        said.append(str(error))
from devinterp.slt.susceptibilities import susceptibilities
masks = {"full": None, "head": {"head.weight": None}}
observed = {"pile": data, "probe": data}
made, expected = (
    call(model, data, observed, masks, sampling_task="pile", **more)
    for call in (devinterp2.susceptibilities, susceptibilities)
)
assert made.groups == expected.groups
made = devinterp2.bif(model, data, {"probe": data}, **more)
assert np.isfinite(made.influences.values).any()
print(json.dumps(said))
"""
    said = _inside(script, tmp_path)
    assert len(said) == 2 and all("different sampler config" in text for text in said)
