"""Products of matrices in a recording."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llc_fast import _native
from llc_fast.gradients.matmul import small_product
from llc_fast.gradients.replay import Recording

pytestmark = pytest.mark.usefixtures("seeded")
_aten = torch.ops.aten

needs_products = pytest.mark.skipif(not _native.has_products(), reason="this machine has no fused multiply-adds")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(500, 320, 160), (300, 900, 130), (64, 700, 600)])
def test_large_products_by_either_library(
    sizes: tuple[int, int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever library multiplies large matrices, a replayed gradient is that of autograd, to rounding."""
    batch, fan_in, fan_out = sizes
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(fan_in, fan_out, bias=bias), torch.randn(batch, fan_in).requires_grad_()
    tensors = [x, *layer.parameters()]

    def function() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).square().mean(), tensors)

    for chosen in (True, False):
        monkeypatch.setattr(
            "llc_fast.gradients.matmul._products_by_onednn",
            lambda chosen=chosen: chosen and hasattr(torch.ops.mkldnn, "_linear_pointwise"),
        )
        recording = Recording(function)
        with torch.no_grad():
            x.normal_()
        recording.replay()
        for replayed, fresh in zip(recording.result, function(), strict=True):
            torch.testing.assert_close(replayed, fresh, rtol=1e-4, atol=1e-4 * float(fresh.abs().max()))


# --- Small products -----------------------------------------------------------------------------------------


def _matrix(rows: int, columns: int, layout: str, batch: int | None = None) -> Tensor:
    """Random, in memory of exactly its size: in rows, in columns, or in rows with a gap between."""
    lead = () if batch is None else (batch,)
    if layout == "columns":
        return torch.randn(*lead, columns, rows).transpose(-1, -2)
    if layout == "gaps":
        return torch.randn(*lead, rows, columns + 3)[..., 1 : columns + 1]
    return torch.randn(*lead, rows, columns)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the native module, into memory around which nothing may be written."""
    shape = (*a.shape[:-1], b.shape[-1])
    room = torch.full((torch.Size(shape).numel() + 64,), 7.0)
    out = room[32:-32].view(shape)
    op = {(2, False): _aten.mm, (2, True): _aten.addmm, (3, False): _aten.bmm, (3, True): _aten.baddbmm}
    product = small_product(op[a.ndim, bias is not None].default, (a, b) if bias is None else (bias, a, b), {}, out)
    assert product is not None
    product.run()
    assert torch.equal(torch.cat([room[:32], room[-32:]]), torch.full((64,), 7.0))
    return out


def _assert_close(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """To the bound of rounding: each of the `depth` terms, and the sum with the bias, by half a unit."""
    x, y = a.double(), b.double()
    exact, size = x @ y, x.abs() @ y.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert bool(((out.double() - exact).abs() <= 2.0**-24 * (a.shape[-1] + 2) * size).all())


SIZES = [
    *itertools.product((1, 2, 13, 29), (1, 5, 16, 17, 50, 70), (1, 7, 16, 50)),
    *((rows, columns, 33) for rows in range(1, 32) for columns in (8, 24, 40, 64)),
    *((3, columns, 9) for columns in range(1, 140)),
    *((rows, columns, depth) for rows in (1, 3, 6, 41) for columns in (1, 2, 3, 4, 20, 23) for depth in (45, 48, 77)),
    *[(500, 16, 16), (64, 50, 500), (500, 50, 50), (11, 160, 100), (1, 1, 1024), (257, 3, 129)],
]


@needs_products
@pytest.mark.parametrize("layouts", list(itertools.product(("rows", "columns", "gaps"), repeat=2)), ids="-".join)
def test_every_size_and_layout(layouts: tuple[str, str]) -> None:
    for rows, columns, depth in SIZES:
        a, b = _matrix(rows, depth, layouts[0]), _matrix(depth, columns, layouts[1])
        _assert_close(_product(a, b), a, b)


@needs_products
@pytest.mark.parametrize("layouts", list(itertools.product(("rows", "columns"), repeat=2)), ids="-".join)
def test_batches_and_biases(layouts: tuple[str, str]) -> None:
    for rows, columns, depth in [(1, 1, 1), (5, 50, 7), (29, 17, 16), (60, 4, 50), (13, 70, 3)]:
        a, b = _matrix(rows, depth, layouts[0]), _matrix(depth, columns, layouts[1])
        for bias in (torch.randn(columns), torch.randn(rows, columns), torch.randn(1, columns)):
            _assert_close(_product(a, b, bias), a, b, bias)
        a, b = _matrix(rows, depth, layouts[0], 3), _matrix(depth, columns, layouts[1], 3)
        _assert_close(_product(a, b), a, b)
        for bias in (torch.randn(columns), torch.randn(3, 1, columns), torch.randn(3, rows, columns)):
            _assert_close(_product(a, b, bias), a, b, bias)
        shared = b[:1].expand(3, -1, -1)
        _assert_close(_product(a, shared), a, shared)


@needs_products
def test_what_is_written_transposed() -> None:
    for rows, columns, depth in [(1, 5, 3), (70, 70, 500), (16, 16, 500), (33, 2, 60), (2, 33, 60)]:
        for layouts in itertools.product(("rows", "columns"), repeat=2):
            a, b = _matrix(rows, depth, layouts[0], 3), _matrix(depth, columns, layouts[1], 3)
            out = torch.empty(3, columns, rows).mT
            product = small_product(_aten.bmm.default, (a, b), {}, out)
            assert product is not None
            product.run()
            _assert_close(out, a, b)


def _read_twice(a: Tensor, b: Tensor) -> list[Tensor]:
    product = a @ b
    return [product.mT.contiguous(), product.sum()]


TRANSPOSED: dict[str, tuple[Callable[[Tensor, Tensor], list[Tensor]], int]] = {
    "copied": (lambda a, b: [(a @ b).mT.contiguous()], 1),
    "copied, then read": (lambda a, b: [(a @ b).mT.contiguous().exp() @ a], 3),
    "two of them": (lambda a, b: [(a @ b).mT.contiguous(), (b @ a).mT.contiguous()], 2),
    "copied as it is": (lambda a, b: [(a @ b).clone()], 2),
    "read once more": (_read_twice, 3),
    "a part": (lambda a, b: [(a @ b)[..., :4].mT.contiguous()], 2),
    "with a bias": (lambda a, b: [torch.addmm(a[0, 0], a[0], b[0]).t().contiguous()], 2),
}


@needs_products
@pytest.mark.parametrize("name", TRANSPOSED)
def test_copies_that_transpose_a_product(name: str) -> None:
    """They are left out where nobody else reads the product; results and their layout are the same."""
    function, kernels = TRANSPOSED[name]
    a, b = torch.randn(3, 10, 10), torch.randn(3, 10, 10)
    recording = Recording(lambda: function(a, b))
    assert recording.num_kernels == kernels
    for _ in range(2):
        a.normal_(), b.normal_()
        recording.replay()
        for ours, fresh in zip(recording.result, function(a, b), strict=True):
            assert ours.stride() == fresh.stride()
            torch.testing.assert_close(ours, fresh, rtol=1e-4, atol=1e-4)


@needs_products
def test_infinities_and_nans_are_those_of_the_formula() -> None:
    """In their rows and columns, and in no others: no lane of a vector leaks into another, no zero hides one."""
    a, b = torch.randn(21, 30), torch.randn(30, 37)
    a[3, 4], a[7, 2], b[5, 36], b[11, 0], a[20] = torch.inf, torch.nan, -torch.inf, torch.nan, 0.0
    a[10, 5], a[11, 5] = 0.0, -1.0
    bias = torch.zeros(37)
    bias[17] = torch.inf
    for given in (None, bias):
        exact = a.double() @ b.double() + (0 if given is None else given.double())
        for x, y in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            out = _product(x, y, given).double()
            assert torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.isposinf(), exact.isposinf())
            assert torch.equal(out.isneginf(), exact.isneginf())
            finite = exact.isfinite()
            torch.testing.assert_close(out[finite], exact[finite], rtol=1e-4, atol=1e-4)


@needs_products
def test_threads_do_not_change_bits() -> None:
    before = torch.get_num_threads()
    try:
        for batch, rows, columns, depth in [(1, 1000, 100, 150), (3, 500, 64, 100), (40, 9, 160, 100)]:
            a, b = torch.randn(batch, rows, depth), torch.randn(batch, columns, depth).transpose(1, 2)
            found = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(_product(a, b))
            assert all(torch.equal(found[0], other) for other in found[1:])
            _assert_close(found[0], a, b)
    finally:
        torch.set_num_threads(before)


def _digest() -> str:
    """Of products of many shapes."""
    generator, found = torch.Generator().manual_seed(5), hashlib.sha256()
    for rows, columns, depth in [(500, 16, 16), (77, 50, 500), (500, 50, 50), (9, 3, 77), (40, 19, 160), (5, 100, 8)]:
        a, b = (torch.randn(shape, generator=generator) for shape in ((rows, depth), (depth, columns)))
        for x, y in itertools.product((a, a.t().contiguous().t()), (b, b.t().contiguous().t())):
            found.update(_product(x, y, torch.ones(columns)).numpy().tobytes())
    return found.hexdigest()


@needs_products
@pytest.mark.skipif("sanitized" in _native.info(), reason="a new process would start without the sanitizers")
def test_instruction_sets_do_not_change_bits(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_matmul as t; print(t._digest())"
    )
    for name in ("avx2", "avx512"):
        environment = os.environ | {"LLC_FAST_ISA": name}
        command = [sys.executable, "-c", code]  # which looks into the current folder first: no sources there
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if run.returncode and "lacks these instructions" in run.stderr:
            continue
        assert run.stdout.split()[-1:] == [_digest()], run.stderr


def _rounding(a: Tensor, b: Tensor, out: Tensor) -> float:
    """How far sums of k products in two orders may be apart, as random walks of rounding errors: ε·√k·max Σ|aᵢbᵢ|."""
    if not (out.is_floating_point() and out.numel()):
        return 0.0
    sums = a.detach().double().abs() @ b.detach().double().abs()
    return torch.finfo(out.dtype).eps * a.shape[1] ** 0.5 * float(sums.max())


@pytest.mark.parametrize(
    ("why", "make"),
    [
        ("nothing to multiply", lambda: (torch.randn(3, 0), torch.randn(0, 2))),
        ("no rows", lambda: (torch.randn(0, 3), torch.randn(3, 2))),
        ("no columns", lambda: (torch.randn(3, 2), torch.randn(2, 0))),
        ("float64", lambda: (torch.randn(3, 2).double(), torch.randn(2, 3).double())),
        ("integers", lambda: (torch.ones(3, 2).long(), torch.ones(2, 3).long())),
        ("bfloat16", lambda: (torch.ones(3, 2).bfloat16(), torch.ones(2, 3).bfloat16())),
        ("gaps both ways", lambda: (torch.randn(6, 8)[::2, ::2], torch.randn(4, 3))),
        ("backwards", lambda: (torch.randn(6, 1).expand(6, 4), torch.randn(8, 6)[::2, ::2])),
        ("large", lambda: (torch.randn(400, 400), torch.randn(400, 400))),
        ("deep", lambda: (torch.randn(2, 3000), torch.randn(3000, 2))),
        ("more to turn than to multiply", lambda: (torch.randn(9, 200), torch.randn(200, 200).t())),
        ("imaginary parts with a flag", lambda: (torch.randn(3, 2, dtype=torch.cfloat).conj().imag, torch.randn(2, 3))),
    ],
)
def test_what_is_left_to_torch(why: str, make: Callable[[], tuple[Tensor, Tensor]]) -> None:
    a, b = make()
    out = a @ b
    assert small_product(_aten.mm.default, (a, b), {}, out) is None
    recording = Recording(lambda: a @ b)
    recording.replay()
    torch.testing.assert_close(recording.result, out, rtol=0, atol=_rounding(a, b, out))


def test_factors_and_overlaps_are_left_to_torch() -> None:
    a, b, bias = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
    for factors in ({"beta": 0.5}, {"alpha": 2}, {"beta": 0, "alpha": 1}):
        assert small_product(_aten.addmm.default, (bias, a, b), factors, torch.empty(4, 4)) is None
        recording = Recording(lambda factors=factors: torch.addmm(bias, a, b, **factors))
        a.normal_()
        recording.replay()
        torch.testing.assert_close(recording.result, torch.addmm(bias, a, b, **factors))
    assert small_product(_aten.mm.default, (a, b), {}, a) is None
    assert small_product(_aten.addmm.default, (bias, a, b), {}, torch.empty(4, 4).t()) is None
    assert small_product(_aten.addmm.default, (torch.randn(4, 1), a, b), {}, torch.empty(4, 4)) is None


def test_lower_precision_of_the_users_choice() -> None:
    a, b, out = torch.randn(40, 40), torch.randn(40, 40), torch.empty(40, 40)
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            product = small_product(_aten.mm.default, (a, b), {}, out)
        finally:
            torch.set_float32_matmul_precision(before)
        assert (product is not None) is (_native.has_products() and precision != "medium")


def _gradients(batched: bool) -> tuple[Callable[[], Any], list[Tensor]]:
    """Of a network whose layers have biases, one or three of them at a time, and their parameters."""
    lead = (3,) if batched else ()
    sizes = [(20, 50), (50, 17), (17, 4)]
    weights = [torch.randn(*lead, *reversed(size)).requires_grad_() for size in sizes]
    biases = [torch.randn(*lead, size[1]).requires_grad_() for size in sizes]
    x, y = torch.randn(60, 20), torch.randn(60, 4)

    def loss(ws: list[Tensor], bs: list[Tensor]) -> Tensor:
        h = x
        for w, b in zip(ws, bs, strict=True):
            h = torch.tanh(torch.nn.functional.linear(h, w, b))
        return (h - y).square().mean()

    def function() -> list[Tensor]:
        value = torch.func.vmap(loss)(weights, biases).sum() if batched else loss(weights, biases)
        return [value, *torch.autograd.grad(value, [*weights, *biases])]

    return function, [*weights, *biases]


@needs_products
@pytest.mark.parametrize("batched", [False, True])
def test_gradients_of_a_network(batched: bool) -> None:
    """Its products are native, its bits those of Python's replay, and its values those of autograd in float64."""
    function, params = _gradients(batched)
    recording = Recording(function)
    assert sum(kernel.product is not None for kernel in recording._again) >= 8
    assert recording.program.by_python == {}
    with torch.no_grad():
        for p in params:
            p.normal_().mul_(0.3)
    recording.replay()
    native = [t.detach().clone() for t in recording.result]
    with torch.no_grad():
        for call in recording.calls:
            call()
    assert all(map(torch.equal, native, recording.result))
    for ours, fresh in zip(native, function(), strict=True):
        torch.testing.assert_close(ours, fresh.detach(), rtol=1e-4, atol=1e-5)


@needs_products
def test_where_torch_tells_no_addresses_python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from llc_fast.gradients import program

    functions = program._functions()
    monkeypatch.setattr(program, "_functions", lambda: functions | {"data": 0})
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    recording = Recording(lambda: [(a @ b).exp()])
    assert "does not tell where a tensor is" in recording.program.described
    a.normal_()
    recording.replay()
    torch.testing.assert_close(recording.result[0], (a @ b).exp())


@needs_products
def test_memory_that_moves() -> None:
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    recording = Recording(lambda: [a @ b])
    before = a.data_ptr()
    a.share_memory_()
    a.normal_()
    assert a.data_ptr() != before
    recording.replay()
    torch.testing.assert_close(recording.result[0], a @ b)
