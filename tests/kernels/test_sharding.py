"""Sharded models: the optimizers step DTensor parameters as they step the whole ones, whatever the layout.

Each test starts a few processes of this very file, which talk over gloo; `_workers` says how.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast import optim
from llc_fast.kernels import native
from llc_fast.kernels.native import NUM_STATES, Segment, SegmentTable
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.samplers import samplers_with_optimizer

if torch.__version__ < (2, 6) or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs fully_shard, which came with torch 2.6, and gloo", allow_module_level=True)

SEED, STEPS = 20240517, 4
SAMPLERS = samplers_with_optimizer()
OPTIMIZERS = {name: optim.optimizer_for(cls) for name, cls in SAMPLERS.items()}
OPTIONS: dict[str, Any] = {"lr": 1e-2, "nbeta": 20.0, "localization": 2.0, "weight_decay": 1.0, "seed": SEED}
SHAPES = [(7, 3), (5,), (1, 4), (3, 5, 2), (6, 4), (700, 3)]  # uneven over two ranks, or empty on one


def _random(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- in the parent: start workers ----------------------------------------------------------------------------------


def _workers(folder: Path, *cases: Callable[[], None], count: int = 2) -> dict[str, str]:
    """Run cases in turn in `count` processes with a process group; what each said of those that failed, by name.

    A case whose processes would wait for each other ends all, and those after it have not run.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(llc_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    names, logs = [case.__name__ for case in cases], [folder / f"rank{rank}.txt" for rank in range(count)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, __file__, str(folder / "store"), str(rank), str(count), *names]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
    deadline = time.monotonic() + 120
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    said = [log.read_text() for log in logs]
    return {name: "\n".join(said) for name in names if not all(f"{name} has passed" in text for text in said)}


def _run_worker(store: str, rank: str, count: str, *cases: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(count))
    for case in cases:
        globals()[case]()
        torch.distributed.barrier()
        print(f"{case} has passed", flush=True)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the cases of two processes, which all share: starting them takes longer than the cases."""
    return _workers(tmp_path_factory.mktemp("two"), every_placement, fully_sharded, checkpoints, refusals)


def test_every_placement(failed: dict[str, str]) -> None:
    """One mesh dimension, every sampler: Shard(0), Shard(1), Shard(2), Replicate, uneven and empty parts."""
    assert "every_placement" not in failed, failed["every_placement"]


@pytest.mark.slow
def test_two_mesh_dimensions(tmp_path: Path) -> None:
    failed = _workers(tmp_path, two_mesh_dimensions, count=4)
    assert not failed, failed["two_mesh_dimensions"]


def test_fully_shard(failed: dict[str, str]) -> None:
    assert "fully_sharded" not in failed, failed["fully_sharded"]


def test_checkpoints(failed: dict[str, str]) -> None:
    assert "checkpoints" not in failed, failed["checkpoints"]


def test_refusals(failed: dict[str, str]) -> None:
    assert "refusals" not in failed, failed["refusals"]


@pytest.mark.parametrize("where", ["cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_block_of_columns_moves_as_in_the_whole(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment of several runs, without any process group: between two others, with everything a segment can have."""
    if where == "reference":
        monkeypatch.setattr(native, "has_native_backend", lambda _: False)
    device = "cuda" if where == "cuda" else "cpu"
    rows, columns, box = 40, 70, (slice(None), slice(11, 53))
    tensors = {k: _random((rows, columns), seed) for seed, k in enumerate(("w", "grad", "reference"))}
    kept = [_random((rows, columns), 10 + j).abs() for j in range(NUM_STATES[name])]
    mask, scale = _random((rows, columns), 20) > -1, _random((rows, columns), 21).abs() + 0.1
    scalars = StepScalars(1e-2, 20.0, 2.0, 1.0, 0.7, 0.3, 0.9, 0.9, 0.1, 0.1)

    def step(cut: Callable[[Tensor], Tensor], offset: int | list[int]) -> list[Tensor]:
        own = {k: cut(t).clone().to(device) for k, t in tensors.items()}
        state = [cut(t).clone().to(device) for t in kept]
        edges = [torch.zeros(3, device=device), torch.zeros(5, device=device)]
        segments = [
            Segment(edges[1], 3 + rows * columns, state=[torch.zeros_like(edges[1]) for _ in state]),
            Segment(own["w"], offset, own["reference"], cut(mask).to(device), state, cut(scale).to(device)),
            Segment(edges[0], 0, state=[torch.zeros_like(edges[0]) for _ in state]),
        ]
        grads = [torch.ones_like(edges[1]), own["grad"], torch.ones_like(edges[0])]
        thermostat = torch.full((1,), 0.2, dtype=torch.float64, device=device)
        table = SegmentTable(name, segments)
        for count in range(2):
            table.step([g.clone() for g in grads], scalars, NoiseKey(SEED, count), thermostat=thermostat)
        return [own["w"], *state, *edges]

    whole = step(lambda t: t, 3)
    block = step(lambda t: t[box], [3 + columns * row + box[1].start for row in range(rows)])
    for k, (a, b) in enumerate(zip(block, whole, strict=True)):
        assert torch.equal(a, b[box] if b.ndim > 1 else b), k


def test_importing_llc_fast_does_not_import_dtensor() -> None:
    """Its import takes longer than all of llc_fast's."""
    code = "import sys, llc_fast; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(llc_fast.__file__).parents[1])


# ---- in the workers: compare with the whole model ------------------------------------------------------------------


def _mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def _distributed(whole: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    fitting = [p if not isinstance(p, Shard) or p.dim < whole.ndim else Replicate() for p in placements]
    return distribute_tensor(whole, mesh, fitting)


def _full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _same(sharded: Sequence[Any], whole: Sequence[Tensor], what: object, exact: bool = True) -> None:
    for k, (a, b) in enumerate(zip(map(_full, sharded), whole, strict=True)):
        if exact:
            assert torch.equal(a, b), f"{what}: tensor {k} differs by up to {float((a - b).abs().max()):g}"
        else:
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")


def _pair(
    name: str, mesh: Any, placements: Sequence[Any], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Any], list[Tensor], Any, Any]:
    """The same parameters, sharded and whole, after the same steps; and their optimizers."""
    whole = [nn.Parameter(_random(shape, k, dtype)) for k, shape in enumerate(SHAPES)]
    sharded = [nn.Parameter(_distributed(p.detach().clone(), mesh, placements)) for p in whole]
    optimizers = [OPTIMIZERS[name](params, **OPTIONS | options) for params in (sharded, whole)]
    _take_steps(sharded, whole, optimizers, 0, STEPS)
    return sharded, whole, *optimizers


def _take_steps(
    sharded: Sequence[Any], whole: Sequence[Tensor], optimizers: Sequence[Any], begin: int, end: int
) -> None:
    for step in range(begin, end):
        for k, (p, q) in enumerate(zip(sharded, whole, strict=True)):
            grad = _random(q.shape, 1000 + 97 * step + k, q.dtype)
            q.grad, p.grad = grad, _distributed(grad, p.device_mesh, p.placements)
        for optimizer in optimizers:
            optimizer.step()


def _compare(name: str, mesh: Any, placements: Sequence[Any], **options: Any) -> None:
    sharded, whole, ours, theirs = _pair(name, mesh, placements, **options)
    # The thermostat follows a sum, which is as exact as sums in another order are.
    exact = name != "sgnht"
    what = (name, placements, options.keys())
    _same(sharded, whole, what, exact)
    for p, q in zip(sharded, whole, strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        _same(list(ours.state[p].values()), list(theirs.state[q].values()), what, exact)
    for metric, value in theirs.metrics.items():
        if metric in ("noise", "dws"):
            tensors, others = (o.metrics[metric] for o in (ours, theirs))
            tensors, others = (tensors[0], others[0]) if metric == "noise" else (tensors, others)
            _same(tensors, others, metric, exact=metric == "noise")
        else:
            assert abs(float(ours.metrics[metric]) / float(value) - 1) < 1e-6, metric
    if name == "sgnht":
        torch.testing.assert_close(ours.param_groups[0]["thermostat"], theirs.param_groups[0]["thermostat"])


def every_placement() -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh = _mesh(2)
    masks = [None if k == 1 else _random(shape, 50 + k) > -1 for k, shape in enumerate(SHAPES)]
    scales = [_random(shape[-1:], 60 + k).abs() + 0.1 for k, shape in enumerate(SHAPES)]
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        for name in SAMPLERS:
            _compare(name, mesh, [placement])
        _compare("sgld", mesh, [placement], optimize_over=masks, bounding_box_size=0.1)
        _compare("sgnht", mesh, [placement], optimize_over=masks)
        _compare("sgld", mesh, [placement], metrics=optim.METRICS)
        _compare("sghmc", mesh, [placement], dtype=torch.bfloat16)
        _compare("preconditioned-sgld", mesh, [placement], preconditioner=scales)
        _compare(
            "preconditioned-sgld", mesh, [placement], preconditioner=scales, localization_metric="sampler",
            metrics=optim.METRICS,
        )  # fmt: skip
        _compare("adam-sgld", mesh, [placement], optimize_over=masks, metrics=optim.METRICS, adapt_steps=2)
    sharded, whole, ours, theirs = _pair("sgnht", mesh, [Shard(0)], optimize_over=masks)
    ours.param_groups[0]["optimize_over"] = [m if m is None else _distributed(m, mesh, [Shard(0)]) for m in masks]
    _take_steps(sharded, whole, [ours, theirs], STEPS, 2 * STEPS)
    _same(sharded, whole, "sharded masks", exact=False)
    torch.testing.assert_close(ours.param_groups[0]["thermostat"], theirs.param_groups[0]["thermostat"])


def two_mesh_dimensions() -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh = _mesh(2, 2)
    for placements in (
        [Replicate(), Shard(0)],  # hybrid sharding
        [Shard(1), Replicate()],
        [Shard(0), Shard(0)],
        [Shard(0), Shard(1)],
        [Shard(2), Shard(1)],
    ):
        for name in ("sgld", "sgnht"):
            _compare(name, mesh, placements, metrics=("grad_norm", "weight_norm", "distance", "noise"))


# ---- fully_shard ---------------------------------------------------------------------------------------------------


def _models() -> list[nn.Module]:
    """A small network, fully sharded and whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 1))
    sharded = copy.deepcopy(whole)
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer)
    return [sharded, whole]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> None:
    x = _random((8, 6), 1)
    for _ in range(steps):
        (model(x) - x.prod(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def fully_sharded() -> None:
    for name in SAMPLERS:
        models = _models()
        params = [list(model.parameters()) for model in models]
        optimizers = [OPTIMIZERS[name](ps, **OPTIONS) for ps in params]
        _take_steps(*params, optimizers, 0, STEPS)
        _same(*params, name, exact=name != "sgnht")
        ends = []
        options = OPTIONS | {"lr": 1e-3, "metrics": ("distance",)}
        for release in (False, True) if SAMPLERS[name].kind != "thermostat" else (False,):
            if release:
                options = OPTIONS | {"lr": 1e-3, "release_gradients": True}
            models = _models()
            optimizers = [OPTIMIZERS[name](model.parameters(), **options) for model in models]
            for model, optimizer in zip(models, optimizers, strict=True):
                _train(model, optimizer)
            params = [list(model.parameters()) for model in models]
            _same(*params, (name, "training", release), exact=False)
            ends.append([_full(p) for p in params[0]])
            if not release:
                assert abs(float(optimizers[0].distance) / float(optimizers[1].distance) - 1) < 1e-4
        _same(ends[0], ends[-1], (name, "release"))


# ---- state, errors -------------------------------------------------------------------------------------------------


def checkpoints() -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.tensor import Shard

    mesh = _mesh(2)
    for name in SAMPLERS:
        sharded, whole, ours, _ = _pair(name, mesh, [Shard(0)])
        saved = copy.deepcopy(ours.state_dict())
        again = [nn.Parameter(p.detach().clone()) for p in sharded]
        resumed = OPTIMIZERS[name](again, **OPTIONS | {"seed": 1})
        resumed.load_state_dict(saved)
        for params, optimizer in ((sharded, ours), (again, resumed)):
            _take_steps(params, whole, [optimizer], STEPS, 2 * STEPS)
        _same(again, [_full(p) for p in sharded], name)
    # The state is made of DTensors, so torch gathers it as it gathers that of its own optimizers.
    models = _models()
    optimizers = [llc_fast.AdamSGLD(model.parameters(), **OPTIONS) for model in models]
    _take_steps(*([*model.parameters()] for model in models), optimizers, 0, STEPS)
    gathered = get_optimizer_state_dict(models[0], optimizers[0], options=StateDictOptions(full_state_dict=True))
    for key, p in models[1].named_parameters():
        for kind, kept in optimizers[1].state[p].items():
            assert torch.equal(gathered["state"][key][kind], kept), (key, kind)
    fresh = _models()[0]
    fresh.load_state_dict(models[0].state_dict())
    resumed = llc_fast.AdamSGLD(fresh.parameters(), **OPTIONS | {"seed": 1})
    set_optimizer_state_dict(fresh, resumed, gathered, options=StateDictOptions(full_state_dict=True))
    _take_steps([*fresh.parameters()], [*models[1].parameters()], [resumed, optimizers[1]], STEPS, 2 * STEPS)
    _same([*fresh.parameters()], [*models[1].parameters()], "gathered")


def refusals() -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = _mesh(2)
    p = nn.Parameter(_distributed(torch.zeros(5, 3), mesh, [Shard(0)]))
    p.grad = _distributed(torch.ones(5, 3), mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"parameter 0 is a DTensor: pass seed="):
        llc_fast.SGLD([p])
    with pytest.raises(ValueError, match="leave relative_eps out"):
        llc_fast.RMSpropSGLD([p], seed=1, relative_eps=True)
    partial = nn.Parameter(DTensor.from_local(torch.zeros(5, 3), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"parameter 1 is a DTensor with placement P.* redistribute it to Shard"):
        llc_fast.SGLD([p, partial], seed=1)
    strided = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), _mesh(2), [_StridedShard(0, split_factor=1)]))
    with pytest.raises(ValueError, match=r"parameter 0 is a DTensor with placement _S.* redistribute it to Shard"):
        llc_fast.SGLD([strided], seed=1)
    own_sizes = torch.zeros(1 + 3 * torch.distributed.get_rank(), 3)
    uneven = DTensor.from_local(own_sizes, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 3)), stride=(3, 1))
    with pytest.raises(ValueError, match=r"parameter 0 is a DTensor .*but it holds \(\d, 3\)"):
        llc_fast.SGLD([nn.Parameter(uneven)], seed=1)
    with pytest.raises(ValueError, match=r"a mask of shape \(4,\) does not fit parameter 0 of shape \(5, 3\)"):
        llc_fast.SGLD([p], seed=1, optimize_over=torch.ones(4, dtype=torch.bool)).step()
    with pytest.raises(TypeError, match=r"torch\.bool"):
        llc_fast.SGLD([p], seed=1, optimize_over=torch.ones(3)).step()
    with pytest.raises(ValueError, match="mask of parameter 0 must be a DTensor with placements"):
        llc_fast.SGLD([p], seed=1, optimize_over=_distributed(torch.ones(5, 3) > 0, mesh, [Shard(1)])).step()
    with pytest.raises(TypeError, match="mask 0 is a DTensor, which keeps its data elsewhere"):
        plain = nn.Parameter(torch.zeros(5, 3))
        plain.grad = torch.ones(5, 3)
        llc_fast.SGLD([plain], optimize_over=_distributed(torch.ones(5, 3) > 0, mesh, [Shard(0)])).step()
    optimizer = llc_fast.SGLD([p], seed=1, localization=1.0)
    optimizer.state[p]["initial_param"] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"reference point of parameter 0 must be a DTensor .* got a plain tensor"):
        optimizer.step()
    assert not _full(p).any()
    # Gradients that are not summed yet are summed; a backward pass through old values is an error.
    whole, q = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(_distributed(torch.zeros(5, 3), mesh, [Shard(0)]))
    whole.grad = torch.ones(5, 3)
    q.grad = DTensor.from_local(torch.full((5, 3), 0.5), mesh, [Partial()])
    loss = (q * q.detach()).sum()
    for parameter in (whole, q):
        llc_fast.SGLD([parameter], **OPTIONS).step()
    _same([q], [whole], "partial gradients")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


if __name__ == "__main__":
    _run_worker(*sys.argv[1:])
