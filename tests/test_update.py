"""One fused step against the float64 specification: every option, odd sizes, any split, any number of threads."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llc_fast import reference
from llc_fast.reference import NoiseKey, StepScalars
from llc_fast.update import SegmentTable, native_info

KEY = NoiseKey(seed=987654321, step=3, chain=2)
OPTIONS = {
    "plain": StepScalars(lr=1e-3, nbeta=50.0),
    "localized": StepScalars(lr=1e-3, nbeta=50.0, localization=7.0),
    "weight decay": StepScalars(lr=1e-3, nbeta=50.0, weight_decay=3.0),
    "box": StepScalars(lr=1e-2, nbeta=5.0, localization=1.0, bounding_box=0.05),
    "noise-free": StepScalars(lr=1e-3, nbeta=50.0, localization=7.0, noise_level=0.0),
    "half noise": StepScalars(lr=1e-3, nbeta=50.0, noise_level=0.5),
    "everything": StepScalars(
        lr=1e-2, nbeta=20.0, localization=2.0, weight_decay=1.0, noise_level=0.7, bounding_box=0.2
    ),
}


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def _expected(w: Tensor, grad: Tensor, anchor: Tensor, s: StepScalars, offset: int, key: NoiseKey) -> Tensor:
    w, grad, anchor = w.double().flatten(), grad.double().flatten(), anchor.double().flatten()
    return reference.sgld(w, grad, anchor, reference.normals(offset, len(w), key), s)


def _assert_close(actual: Tensor, expected: Tensor, w: Tensor, grad: Tensor, s: StepScalars) -> None:
    """To rounding: a few ulps of every term that enters the sum, none larger than these."""
    terms = w.abs() + s.lr * (s.nbeta * grad.abs() + (s.localization + s.weight_decay) * (w.abs() + 5))
    terms = terms + 7 * s.noise_level * math.sqrt(s.lr)
    bound = 4 * torch.finfo(actual.dtype).eps * terms.double().flatten()
    error = (actual.double().flatten() - expected).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} times the rounding bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_one_step_of_every_size(option: str, dtype: torch.dtype) -> None:
    """Sizes 1 to 200, unaligned in memory and in the noise."""
    s = OPTIONS[option]
    for size in range(1, 201):
        buffer = _random(size + 3, dtype=dtype, seed=size)
        w = buffer[size % 4 : size % 4 + size]  # starts at every alignment
        before, grad = w.clone(), _random(size, dtype=dtype, seed=size + 1000)
        anchor = before + 0.1 * _random(size, dtype=dtype, seed=size + 2000)
        offset = 37 * size
        SegmentTable([w], [offset], [anchor]).step([grad], s, KEY)
        _assert_close(w, _expected(before, grad, anchor, s, offset, KEY), before, grad, s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_tensor(dtype: torch.dtype) -> None:
    s, size = OPTIONS["everything"], 1_000_003
    w, grad = _random(size, dtype=dtype, seed=1), _random(size, dtype=dtype, seed=2)
    before, anchor = w.clone(), w + 0.1
    SegmentTable([w], [0], [anchor]).step([grad], s, KEY)
    _assert_close(w, _expected(before, grad, anchor, s, 0, KEY), before, grad, s)


def test_without_anchor_the_weights_serve() -> None:
    s = OPTIONS["weight decay"]
    w, grad = _random(1000, dtype=torch.float32, seed=1), _random(1000, dtype=torch.float32, seed=2)
    before = w.clone()
    SegmentTable([w], [0], [None]).step([grad], s, KEY)
    _assert_close(w, _expected(before, grad, before, s, 0, KEY), before, grad, s)


def test_mask_leaves_elements_bit_for_bit() -> None:
    s = OPTIONS["everything"]
    w, grad = _random(30, 40, dtype=torch.float32, seed=1), _random(30, 40, dtype=torch.float32, seed=2)
    before, free = w.clone(), w.clone()
    mask = _random(30, 40, dtype=torch.float32, seed=3) > 0
    SegmentTable([w], [5], [before.clone()], [mask]).step([grad], s, KEY)
    SegmentTable([free], [5], [before.clone()]).step([grad], s, KEY)
    assert torch.equal(w, torch.where(mask, free, before))
    rows = torch.zeros(30, 1, dtype=torch.bool)  # broadcasts over columns
    again = before.clone()
    SegmentTable([again], [5], [before.clone()], [rows]).step([grad], s, KEY)
    assert torch.equal(again, before)


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: t[:1].expand(1, 24).clone()[:, ::2],
    ],
    ids=["transposed", "strided", "every other"],
)
def test_non_contiguous_parameters(layout: object) -> None:
    s = OPTIONS["everything"]
    w = layout(_random(16, 24, dtype=torch.float32, seed=1))  # type: ignore[operator]
    assert not w.is_contiguous()
    before, grad = w.clone(memory_format=torch.contiguous_format), torch.randn(w.shape).t().contiguous().t()
    dense = before.clone()
    SegmentTable([w], [9], [before.clone()]).step([grad], s, KEY)
    SegmentTable([dense], [9], [before.clone()]).step([grad.contiguous()], s, KEY)
    assert torch.equal(w, dense)


def test_empty_and_tiny_tensors() -> None:
    """Three hundred tensors of 0 to 4 elements equal one tensor of their concatenation."""
    s = OPTIONS["everything"]
    sizes = [k % 5 for k in range(300)]
    total = sum(sizes)
    whole, grad = _random(total, dtype=torch.float32, seed=1), _random(total, dtype=torch.float32, seed=2)
    parts = [p.clone() for p in whole.split(sizes)]
    grads, anchors = list(grad.split(sizes)), [p.clone() for p in parts]
    offsets = list(itertools.accumulate([0, *sizes[:-1]]))
    SegmentTable(parts, offsets, anchors).step(grads, s, KEY)
    SegmentTable([whole], [0], [whole.clone()]).step([grad], s, KEY)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_split_and_thread_count_gives_the_same_bits(dtype: torch.dtype) -> None:
    s, size = OPTIONS["everything"], 123_457
    start, grad = _random(size, dtype=dtype, seed=1), _random(size, dtype=dtype, seed=2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, pieces in ((1, 1), (2, 1), (5, 1), (2, 100)):
            torch.set_num_threads(count)
            cuts = [size * k // pieces for k in range(pieces + 1)]
            parts = [start[a:b].clone() for a, b in itertools.pairwise(cuts)]
            table = SegmentTable(parts, cuts[:-1], [p.clone() for p in parts])
            for step in range(3):
                table.step([grad[a:b] for a, b in itertools.pairwise(cuts)], s, KEY._replace(step=step))
            results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_chains_share_an_anchor_and_draw_their_own_noise() -> None:
    """Rows of a [chains, P] buffer, with a gradient each or one for all, equal chains stepped by themselves."""
    s, chains, size = OPTIONS["everything"], 5, 700
    rows = _random(chains, size, dtype=torch.float32, seed=1)
    anchor = rows[0].clone()
    for grads in (
        _random(chains, size, dtype=torch.float32, seed=2),
        _random(size, dtype=torch.float32, seed=2),
    ):
        together, alone = rows.clone(), rows.clone()
        SegmentTable([together[0]], [11], [anchor], num_chains=chains, chain_stride=size).step([grads], s, KEY)
        for c in range(chains):
            grad = grads[c] if grads.ndim == 2 else grads
            SegmentTable([alone[c]], [11], [anchor]).step([grad], s, KEY._replace(chain=KEY.chain + c))
        assert torch.equal(together, alone)


def test_gaps_between_segments() -> None:
    s = OPTIONS["plain"]
    a, b = torch.zeros(10), torch.zeros(10)
    SegmentTable([b, a], [10**9, 3], [None, None]).step([torch.zeros(10)] * 2, s, KEY)
    for w, offset in ((a, 3), (b, 10**9)):
        exact = math.sqrt(s.lr) * reference.normals(offset, 10, KEY)
        assert torch.allclose(w.double(), exact, rtol=0, atol=1e-7)


def test_nan_stays_nan_in_the_box() -> None:
    w = torch.tensor([math.nan, 1.0])
    SegmentTable([w], [0], [torch.zeros(2)]).step([torch.zeros(2)], OPTIONS["box"], KEY)
    assert torch.isnan(w[0]) and w[1] == pytest.approx(0.05)


def test_fallback_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without a native backend run the specification; here the CPU plays one."""
    s = OPTIONS["everything"]
    w, grad = _random(3, 333, dtype=torch.float32, seed=1), _random(3, 333, dtype=torch.float32, seed=2)
    anchor, mask, native = w[0] + 0.01, w[0] > 0, w.clone()

    def run(rows: Tensor) -> None:
        table = SegmentTable([rows[0]], [0], [anchor], [mask], num_chains=3, chain_stride=333)
        table.step([grad], s, KEY)

    run(native)
    monkeypatch.setattr("llc_fast.update.has_native_backend", lambda device: False)
    fallback = w.clone()
    run(fallback)
    assert torch.allclose(fallback, native, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.zeros(3, dtype=torch.int64)], TypeError, "int64"),
        ([torch.zeros(3, dtype=torch.complex64)], TypeError, "complex64"),
        ([torch.zeros(3, dtype=torch.bfloat16)], TypeError, "bfloat16"),
        ([torch.zeros(3).to_sparse()], TypeError, "dense"),
        ([torch.zeros(3, device="meta")], ValueError, "meta"),
        ([torch.zeros(3), torch.zeros(3, dtype=torch.float64)], ValueError, "one dtype and one device"),
        (["w"], TypeError, "torch.Tensor"),
    ],
)
def test_rejects_tensors(params: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SegmentTable(params, list(range(len(params))), [None] * len(params))


def test_rejects_gradients_anchors_and_masks() -> None:
    s, w = OPTIONS["plain"], torch.zeros(4)
    table = SegmentTable([w], [0], [None])
    for grad, message in (
        (torch.zeros(3), "shape"),
        (torch.zeros(4).double(), "float64"),
        (torch.eye(4)[0].to_sparse(), "dense"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            table.step([grad], s, KEY)
    assert torch.equal(w, torch.zeros(4))
    with pytest.raises(ValueError, match="anchor"):
        SegmentTable([w], [0], [torch.zeros(5)])
    with pytest.raises(ValueError, match="does not fit"):
        SegmentTable([w], [0], [None], [torch.ones(5, dtype=torch.bool)])
    with pytest.raises(TypeError, match=r"torch\.bool"):
        SegmentTable([w], [0], [None], [torch.ones(4)])


_STEP = """
import torch
from llc_fast.reference import NoiseKey, StepScalars
from llc_fast.update import SegmentTable, native_info
torch.manual_seed(0)
w, g = torch.randn(5000), torch.randn(5000)
SegmentTable([w], [0], [w.clone()]).step([g], StepScalars(1e-2, 20.0, 2.0, 1.0, 0.7, 0.2), NoiseKey(1))
print(native_info()["instruction_set"], w.double().sum().item(), (w.double() * g.double()).sum().item())
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies that this machine can run give the same step, to rounding where they lack a fused multiply-add."""
    monkeypatch.setenv("LLC_FAST_ISA", isa)
    done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=False)
    if done.returncode and ("lacks these instructions" in done.stderr or "is not one of" in done.stderr):
        pytest.skip(f"no {isa} here")
    name, *values = done.stdout.split()
    assert name == isa
    monkeypatch.delenv("LLC_FAST_ISA")
    best = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=True).stdout.split()
    tolerance = 1e-4 if isa == "baseline" else 0.0
    for value, reference_value in zip(values, best[1:], strict=True):
        assert float(value) == pytest.approx(float(reference_value), abs=tolerance, rel=0)


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLC_FAST_ISA", "sse9")
    done = subprocess.run([sys.executable, "-c", _STEP], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "LLC_FAST_ISA=sse9 is not one of" in done.stderr


def test_info_names_what_was_built() -> None:
    info = native_info()
    assert info["instruction_set"] in ("baseline", "avx2", "avx512")
    assert info["cuda"] is not None or info["no_cuda_reason"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_gpu_equals_cpu(option: str, dtype: torch.dtype) -> None:
    s = OPTIONS[option]
    sizes = [1, 2, 3, 5, 64, 100, 513, 4096, 70_001]
    offsets = list(itertools.accumulate([0, *sizes[:-1]]))
    cpu = [_random(n, dtype=dtype, seed=n) for n in sizes]
    grads = [_random(n, dtype=dtype, seed=n + 1) for n in sizes]
    anchors = [p + 0.01 for p in cpu]
    gpu = [p.cuda() for p in cpu]
    SegmentTable(cpu, offsets, anchors).step(grads, s, KEY)
    SegmentTable(gpu, offsets, [a.cuda() for a in anchors]).step([g.cuda() for g in grads], s, KEY)
    eps = torch.finfo(dtype).eps
    for a, b in zip(cpu, gpu, strict=True):
        assert torch.allclose(a, b.cpu(), rtol=2 * eps, atol=2 * eps)
