"""One fused step against the float64 specification: every option, odd sizes, any split, any number of threads."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llc_fast
from llc_fast import _native
from llc_fast.kernels import native, reference
from llc_fast.kernels.native import NUM_STATES, NUM_SUMS, Segment, SegmentTable, check_interface, native_info, normals
from llc_fast.kernels.step import SUMS, NoiseKey, StepScalars

KEY = NoiseKey(seed=987654321, step=3, chain=2)
RULE_SCALARS: dict[str, dict[str, float]] = {
    "sgld": {},
    "preconditioned-sgld": {},
    "rmsprop-sgld": {"decay": 0.9, "eps": 0.1},
    "adam-sgld": {"decay": 0.9, "momentum_decay": 0.8, "eps": 0.1},
    "sghmc": {"friction": 0.2},
    "sgnht": {"friction": 0.3},
}
RULES = list(RULE_SCALARS)
OPTIONS = {
    "plain": StepScalars(lr=1e-3, nbeta=50.0),
    "localized": StepScalars(lr=1e-3, nbeta=50.0, localization=7.0),
    "weight decay": StepScalars(lr=1e-3, nbeta=50.0, weight_decay=3.0),
    "in the metric": StepScalars(lr=1e-3, nbeta=50.0, localization=7.0, weight_decay=3.0, in_metric=1.0),
    "box": StepScalars(lr=1e-2, nbeta=5.0, localization=1.0, bounding_box=0.05),
    "noise-free": StepScalars(lr=1e-3, nbeta=50.0, localization=7.0, noise_level=0.0),
    "half noise": StepScalars(lr=1e-3, nbeta=50.0, noise_level=0.5),
    "frozen": StepScalars(lr=1e-3, nbeta=50.0, adapt_steps=2.0),
    "everything": StepScalars(
        lr=1e-2, nbeta=20.0, localization=2.0, weight_decay=1.0, noise_level=0.7, bounding_box=0.2
    ),
}
THERMOSTAT = 0.15


def _scalars(rule: str, option: str) -> StepScalars:
    return OPTIONS[option]._replace(**RULE_SCALARS[rule])


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def _segment(rule: str, w: Tensor, offset: int, *, seed: int = 50, **fields: object) -> Segment:
    """A segment with everything its rule keeps or is given, made from `seed`."""
    state = [_random(*w.shape, dtype=w.dtype, seed=seed + k).abs() * 0.1 for k in range(NUM_STATES[rule])]
    if rule == "preconditioned-sgld":
        fields.setdefault("preconditioner", 0.5 + _random(*w.shape, dtype=w.dtype, seed=seed + 9).abs())
    return Segment(w, offset, state=state, **fields)  # type: ignore[arg-type]


def _step(
    rule: str, segments: list[Segment], grads: list[Tensor], s: StepScalars, key: NoiseKey = KEY, **table: int
) -> Tensor:
    """One step, thermostat and sums included; returns the sums."""
    chains = table.get("num_chains", 1)
    sums = torch.full((chains, NUM_SUMS), math.nan, dtype=torch.float64, device=grads[0].device)
    thermostat = torch.full((chains,), THERMOSTAT, dtype=torch.float64, device=grads[0].device)
    SegmentTable(rule, segments, **table).step(grads, s, key, thermostat=thermostat, sums=sums)
    return sums


def _reference(rule: str, segment: Segment, grad: Tensor, s: StepScalars, key: NoiseKey = KEY) -> reference.Coordinates:
    """The same step in float64; `sums` of the result are its sums."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().cpu().flatten().clone()

    given = segment.preconditioner
    x = reference.Coordinates(
        w=wide(segment.w),
        grad=wide(grad),
        reference=wide(segment.w if segment.reference is None else segment.reference),
        noise=reference.normals(segment.offset, segment.w.numel(), key) * (s.noise_level != 0),
        state=[wide(t) for t in segment.state],
        preconditioner=wide(given) if isinstance(given, Tensor) else given,
        thermostat=THERMOSTAT,
    )
    x.sums = reference.apply(rule, x, s, key.step)  # type: ignore[attr-defined]
    return x


def _assert_close(actual: Tensor, expected: Tensor, terms: Tensor | float) -> None:
    """To rounding: a few units in the last place of every term that enters the sum."""
    bound = 8 * torch.finfo(actual.dtype).eps * (terms + torch.zeros_like(expected))
    error = (actual.double().flatten() - expected).abs()
    assert (error <= bound).all(), f"{float((error / bound).max())} times the rounding bound"


def _check(rule: str, w: Tensor, grad: Tensor, s: StepScalars, *, offset: int = 0, **fields: object) -> None:
    """Step `w` natively and in the reference; compare parameters, states and sums."""
    segment = _segment(rule, w, offset, **fields)
    before = wide_terms = w.double().flatten().abs()
    x = _reference(rule, segment, grad, s)
    sums = _step(rule, [segment], [grad], s)
    p = torch.as_tensor(x.preconditioner).double()
    force = s.nbeta * (x.grad.abs() + 0.1) + (s.localization + s.weight_decay) * (before + 5)
    moved = s.lr * p * force + 7 * s.noise_level * (s.lr * p).sqrt() + (before * 0 + 1 if rule.startswith("sg") else 0)
    wide_terms = before + moved
    _assert_close(w, x.w, wide_terms)
    for actual, expected in zip(segment.state, x.state, strict=True):
        _assert_close(actual, expected, expected.abs() + x.grad.square() + x.grad.abs() + moved)
    # Sums of up to a block in the working precision.
    expected = x.sums  # type: ignore[attr-defined]
    scale = expected.abs() + wide_terms.square().sum() * torch.finfo(w.dtype).eps * 64
    scale[SUMS.index("bias")] += float((x.grad * torch.as_tensor(x.bias)).abs().sum())
    assert ((sums[0] - expected).abs() <= 600 * torch.finfo(w.dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_of_every_size(rule: str, option: str, dtype: torch.dtype) -> None:
    """Sizes 1 to 200, unaligned in memory and in the noise."""
    every = rule == "sgld" and option == "everything"
    for size in range(1, 201) if every else [*range(1, 34), *range(34, 201, 7)]:
        buffer = _random(size + 3, dtype=dtype, seed=size)
        w = buffer[size % 4 : size % 4 + size]  # starts at every alignment
        grad = _random(size, dtype=dtype, seed=size + 1000)
        reference = w + 0.1 * _random(size, dtype=dtype, seed=size + 2000)
        _check(rule, w, grad, _scalars(rule, option), offset=37 * size, reference=reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_large_tensor(rule: str, dtype: torch.dtype) -> None:
    size = 300_003
    w, grad = _random(size, dtype=dtype, seed=1), _random(size, dtype=dtype, seed=2)
    _check(rule, w, grad, _scalars(rule, "everything"), reference=w + 0.1)


def test_without_a_reference_point_the_weights_serve() -> None:
    w, grad = _random(1000, dtype=torch.float32, seed=1), _random(1000, dtype=torch.float32, seed=2)
    _check("sgld", w, grad, OPTIONS["weight decay"])


def test_one_preconditioner_for_a_tensor_equals_one_for_each_element() -> None:
    s, grad = OPTIONS["localized"], _random(700, dtype=torch.float32, seed=2)
    w = _random(700, dtype=torch.float32, seed=1)
    results = []
    for given in (0.25, torch.tensor(0.25), torch.full((700,), 0.25)):
        moved = w.clone()
        SegmentTable("preconditioned-sgld", [Segment(moved, 0, w, preconditioner=given)]).step([grad], s, KEY)
        results.append(moved)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rule", RULES)
def test_mask_leaves_elements_bit_for_bit(rule: str) -> None:
    s = _scalars(rule, "everything")
    start, grad = _random(30, 40, dtype=torch.float32, seed=1), _random(30, 40, dtype=torch.float32, seed=2)
    mask = _random(30, 40, dtype=torch.float32, seed=3) > 0
    rows = torch.zeros(30, 1, dtype=torch.bool)  # broadcasts over columns
    free, w, still = start.clone(), start.clone(), start.clone()
    _step(rule, [_segment(rule, free, 5, reference=start)], [grad], s)
    sums = _step(rule, [_segment(rule, w, 5, reference=start, mask=mask)], [grad], s)
    _step(rule, [_segment(rule, still, 5, reference=start, mask=rows)], [grad], s)
    assert torch.equal(w, torch.where(mask, free, start))
    assert torch.equal(still, start)
    expected = float(grad.double()[mask].square().sum())
    assert float(sums[0, 0]) == pytest.approx(expected, rel=1e-5), "masked elements must not be measured"


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
    before = w.clone(memory_format=torch.contiguous_format)
    grad = _random(*w.shape[::-1], dtype=torch.float32, seed=2).t()
    dense = before.clone()
    _step("sgld", [Segment(w, 9, before.clone())], [grad], s)
    _step("sgld", [Segment(dense, 9, before.clone())], [grad.contiguous()], s)
    assert torch.equal(w, dense)


def test_empty_and_tiny_tensors() -> None:
    """Three hundred tensors of 0 to 4 elements equal one tensor of their concatenation."""
    s = OPTIONS["everything"]
    sizes = [k % 5 for k in range(300)]
    total = sum(sizes)
    whole, grad = _random(total, dtype=torch.float32, seed=1), _random(total, dtype=torch.float32, seed=2)
    parts = [p.clone() for p in whole.split(sizes)]
    offsets = itertools.accumulate([0, *sizes[:-1]])
    _step("sgld", [Segment(p, o, p.clone()) for p, o in zip(parts, offsets, strict=True)], list(grad.split(sizes)), s)
    _step("sgld", [Segment(whole, 0, whole.clone())], [grad], s)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_any_split_and_thread_count_gives_the_same_bits(rule: str, dtype: torch.dtype) -> None:
    s, size = _scalars(rule, "everything"), 123_457
    start, grad = _random(size, dtype=dtype, seed=1), _random(size, dtype=dtype, seed=2)
    template = _segment(rule, start, 0)
    threads, results, sums = torch.get_num_threads(), [], []
    try:
        for count, pieces in ((1, 1), (2, 1), (5, 1), (2, 100)):
            torch.set_num_threads(count)
            cuts = [slice(size * k // pieces, size * (k + 1) // pieces) for k in range(pieces)]
            given = template.preconditioner
            segments = [
                Segment(
                    start[c].clone(),
                    c.start,
                    start[c].clone(),
                    state=[t[c].clone() for t in template.state],
                    preconditioner=given[c] if isinstance(given, Tensor) else given,
                )
                for c in cuts
            ]
            for step in range(3):
                last = _step(rule, segments, [grad[c] for c in cuts], s, KEY._replace(step=step))
            results.append(torch.cat([p.w for p in segments]))
            sums.append(last)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results[1:])
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_measuring_does_not_change_the_step() -> None:
    for rule in RULES:
        s, grad = _scalars(rule, "everything"), _random(5000, dtype=torch.float32, seed=2)
        a, b = (_random(5000, dtype=torch.float32, seed=1) for _ in range(2))
        _step(rule, [_segment(rule, a, 0)], [grad], s)
        thermostat = torch.full((1,), THERMOSTAT, dtype=torch.float64)
        SegmentTable(rule, [_segment(rule, b, 0)]).step([grad], s, KEY, thermostat=thermostat)
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [700, 40_000])
@pytest.mark.parametrize("rule", RULES)
def test_a_sum_does_not_depend_on_the_others(rule: str, size: int, device: str) -> None:
    """Every set of sums moves the chains alike, gives the bits of each sum that it holds and 0 for the rest."""
    s, chains = _scalars(rule, "everything"), 2
    rows = _random(chains, size, dtype=torch.float32, seed=1).to(device)
    grads = [_random(chains, size, dtype=torch.float32, seed=2).to(device)]
    mask = (_random(size, dtype=torch.float32, seed=3) > 0).to(device)
    state = rows.abs() * 0.1
    thermostat = torch.full((chains,), THERMOSTAT, dtype=torch.float64, device=device)

    def run(wanted: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        w, kept = rows.clone(), [state.clone() for _ in range(NUM_STATES[rule])]
        segment = Segment(w[0], 5, rows[1], mask, [t[0] for t in kept], preconditioner=0.7)
        sums = torch.full((chains, NUM_SUMS), math.nan, dtype=torch.float64, device=device)
        table = SegmentTable(rule, [segment], num_chains=chains, chain_stride=size)
        table.step(grads, s, KEY, thermostat=thermostat, sums=sums, wanted=wanted)
        return w.cpu(), sums.cpu()

    expected, every = run(None)
    assert every.isfinite().all()
    for count in range(len(SUMS) + 1):
        for wanted in itertools.combinations(SUMS, count):
            w, sums = run(wanted)
            columns = torch.tensor([name in wanted for name in SUMS])
            assert torch.equal(w, expected), wanted
            assert torch.equal(sums, torch.where(columns, every, 0.0)), wanted


def test_an_unknown_sum_is_refused() -> None:
    table, sums = SegmentTable("sgld", [Segment(torch.zeros(3), 0)]), torch.zeros(1, NUM_SUMS, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"unknown sums: heat; choose from: grad, .* bias"):
        table.step([torch.zeros(3)], OPTIONS["plain"], KEY, sums=sums, wanted=["heat"])


@pytest.mark.parametrize("rule", RULES)
def test_chains_share_a_reference_point_and_draw_their_own_noise(rule: str) -> None:
    """Rows of a [chains, P] buffer, with a gradient each or one for all, equal chains stepped by themselves."""
    s, chains, size = _scalars(rule, "everything"), 5, 700
    rows = _random(chains, size, dtype=torch.float32, seed=1)
    states = [_random(chains, size, dtype=torch.float32, seed=7 + k).abs() for k in range(NUM_STATES[rule])]
    w_star = rows[0].clone()
    for grads in (_random(chains, size, dtype=torch.float32, seed=2), _random(size, dtype=torch.float32, seed=2)):
        together, alone = rows.clone(), rows.clone()
        kept = [t.clone() for t in states]
        segment = Segment(together[0], 11, w_star, state=[t[0] for t in kept], preconditioner=0.7)
        sums = _step(rule, [segment], [grads], s, num_chains=chains, chain_stride=size)
        for c in range(chains):
            grad = grads[c] if grads.ndim == 2 else grads
            single = Segment(alone[c], 11, w_star, state=[t[c].clone() for t in states], preconditioner=0.7)
            sum_ = _step(rule, [single], [grad], s, KEY._replace(chain=KEY.chain + c))
            assert torch.equal(sum_[0], sums[c])
            assert all(torch.equal(a[c], b) for a, b in zip(kept, single.state, strict=True))
        assert torch.equal(together, alone)


def test_gaps_between_segments() -> None:
    s = OPTIONS["plain"]
    a, b = torch.zeros(10), torch.zeros(10)
    _step("sgld", [Segment(b, 10**9), Segment(a, 3)], [torch.zeros(10)] * 2, s)
    for w, offset in ((a, 3), (b, 10**9)):
        exact = math.sqrt(s.lr) * reference.normals(offset, 10, KEY)
        assert torch.allclose(w.double(), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_models(rule: str, low: torch.dtype) -> None:
    """Gradients come in and copies go out in the model's precision; the chain is the float32 one, bit for bit."""
    s, size = _scalars(rule, "everything"), 1500
    w = _random(size, dtype=torch.float32, seed=1)
    grad, copy, plain = _random(size, dtype=low, seed=2), torch.zeros(size, dtype=low), w.clone()
    _step(rule, [_segment(rule, w, 3, reference=w.clone(), copy=copy)], [grad], s)
    _step(rule, [_segment(rule, plain, 3, reference=plain.clone())], [grad.float()], s)
    assert torch.equal(w, plain)
    assert torch.equal(copy, w.to(low))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_low_precision_reference(rule: str, low: torch.dtype) -> None:
    """w* may be the model's own: the step is that of the widened one, bit for bit, sums too."""
    s, size = _scalars(rule, "everything"), 1500
    w, grad = _random(size, dtype=torch.float32, seed=1), _random(size, dtype=low, seed=2)
    reference = (w + 0.1 * _random(size, dtype=torch.float32, seed=3)).to(low)
    ends, sums = [], []
    for given in (reference, reference.float()):
        mine, copy = w.clone(), torch.zeros(size, dtype=low)
        # Rows of a sharded tensor, too, whose runs lie apart in the parameter vector.
        for offset in (3, (3, 5000, 9000)):
            segment = _segment(rule, mine, offset, reference=given, copy=copy)  # type: ignore[arg-type]
            sums.append(_step(rule, [segment], [grad], s))
        ends.append(mine)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(sums[0], sums[2]) and torch.equal(sums[1], sums[3])


def test_references_of_one_precision() -> None:
    w, low = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)
    one = Segment(w, 0, reference=low.clone(), copy=low.clone())
    other = Segment(w.clone(), 8, reference=w.clone(), copy=low.clone())
    with pytest.raises(ValueError, match="the reference point of parameter 1 is in another precision"):
        SegmentTable("sgld", [one, other])
    with pytest.raises(ValueError, match=r"the reference point of parameter 0 is torch\.bfloat16"):
        SegmentTable("sgld", [Segment(w, 0, reference=low)])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_rounding(low: torch.dtype) -> None:
    """Conversion both ways equals torch's on every bit pattern, subnormals, infinities and NaN included."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(low)
    s = StepScalars(lr=0.0, nbeta=1.0, noise_level=0.0)  # w stays where it is; only the copy is made
    boundaries = torch.cat([every.float(), torch.nextafter(every.float(), torch.tensor(math.inf)), _halfway(every)])
    copy = torch.zeros(len(boundaries), dtype=low)
    SegmentTable("sgld", [Segment(boundaries.clone(), 0, copy=copy)]).step([copy.clone()], s, KEY)
    expected = boundaries.to(low)
    finite = boundaries.isfinite()  # 0 · inf in the drift makes a NaN of an infinite w: compare what can be compared
    assert torch.equal(copy[finite], expected[finite])
    assert copy[boundaries.isnan()].isnan().all()
    finite_grads = every[every.isfinite()]
    w = torch.zeros(len(finite_grads))
    s = StepScalars(lr=2.0, nbeta=1.0, noise_level=0.0)  # w = -g
    SegmentTable("sgld", [Segment(w, 0, copy=torch.zeros_like(finite_grads))]).step([finite_grads], s, KEY)
    assert torch.equal(w, -finite_grads.float())


def _halfway(every: Tensor) -> Tensor:
    """Midpoints between neighbours: ties."""
    wide = every.float()
    return (wide + torch.nextafter(every, torch.tensor(math.inf, dtype=every.dtype)).float()) / 2


def test_nan_stays_nan_in_the_box() -> None:
    w = torch.tensor([math.nan, 1.0])
    _step("sgld", [Segment(w, 0, torch.zeros(2))], [torch.zeros(2)], OPTIONS["box"])
    assert torch.isnan(w[0]) and w[1] == pytest.approx(0.05)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("low", [False, True])
def test_fallback_is_the_reference(rule: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices without a native backend run the specification; here that is said of the CPU."""
    s = _scalars(rule, "everything")
    rows, grad = _random(3, 333, dtype=torch.float32, seed=1), _random(3, 333, dtype=torch.float32, seed=2)
    if low:
        grad = grad.bfloat16()
    w_star, mask = rows[0] + 0.01, rows[0] > 0

    def run() -> tuple[list[Tensor], Tensor]:
        w, copy = rows.clone(), torch.zeros(3, 333, dtype=torch.bfloat16) if low else None
        states = [rows.abs().clone() for _ in range(NUM_STATES[rule])]
        segment = Segment(
            w[0],
            0,
            w_star,
            mask,
            state=[t[0] for t in states],
            preconditioner=w_star.abs() + 0.1,
            copy=None if copy is None else copy[0],
        )
        sums = _step(rule, [segment], [grad], s, num_chains=3, chain_stride=333)
        moved = [torch.where(mask, t, 0) for t in states]  # what is kept for elements that never move is not used
        return [w, *moved, *([] if copy is None else [copy])], sums

    compiled, compiled_sums = run()
    monkeypatch.setattr("llc_fast.kernels.native.has_native_backend", lambda device: False)
    fallback, fallback_sums = run()
    for a, b in zip(compiled, fallback, strict=True):
        assert torch.allclose(a, b, rtol=0.01 if a.dtype == torch.bfloat16 else 1e-6, atol=4e-6)
    assert torch.allclose(compiled_sums, fallback_sums, rtol=1e-4, atol=1e-4)


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
        (["w"], TypeError, r"torch\.Tensor"),
    ],
)
def test_rejects_tensors(params: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SegmentTable("sgld", [Segment(p, k) for k, p in enumerate(params)])


def test_rejects_gradients_reference_points_states_and_masks() -> None:
    s, w = OPTIONS["plain"], torch.zeros(4)
    table = SegmentTable("sgld", [Segment(w, 0)])
    sparse = torch.eye(4)[0].to_sparse()
    for grad, message in ((torch.zeros(3), "shape"), (torch.zeros(4).double(), "float64"), (sparse, "dense")):
        with pytest.raises((TypeError, ValueError), match=message):
            table.step([grad], s, KEY)
    assert torch.equal(w, torch.zeros(4))
    for segment, error, message in (
        (Segment(w, 0, torch.zeros(5)), ValueError, "reference"),
        (Segment(w, 0, mask=torch.ones(5, dtype=torch.bool)), ValueError, "does not fit"),
        (Segment(w, 0, mask=torch.ones(4)), TypeError, r"torch\.bool"),
        (Segment(w, 0, preconditioner=torch.ones(3)), ValueError, "does not fit"),
        (Segment(w, 0, state=[torch.zeros(4)]), ValueError, "keeps 0 states"),
    ):
        with pytest.raises(error, match=message):
            SegmentTable("sgld", [segment])
    with pytest.raises(ValueError, match="unknown"):
        SegmentTable("newton", [Segment(w, 0)])


def test_native_rules_are_the_reference_rules() -> None:
    assert list(reference.RULES) == list(NUM_STATES) == RULES
    assert native_info()["rules"] == NUM_STATES


def _reorder_sums(interface: dict[str, Any]) -> None:
    interface["sums"].reverse()


def _rename_a_field(interface: dict[str, Any]) -> None:
    interface["Segment"]["names"][6] = "anchor"


def _swap_two_fields(interface: dict[str, Any]) -> None:
    offsets = interface["Segment"]["offsets"]
    offsets[2], offsets[4] = offsets[4], offsets[2]


def _change_a_type(interface: dict[str, Any]) -> None:
    interface["Segment"]["formats"][-2] = "i8"


def _add_a_scalar(interface: dict[str, Any]) -> None:
    interface["Scalars"]["itemsize"] += 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_reorder_sums, "sums differ"),
        (_rename_a_field, "Segment differ"),
        (_swap_two_fields, "Segment differ"),
        (_change_a_type, "Segment differ"),
        (_add_a_scalar, "Scalars differ"),
        (lambda interface: interface["rules"].pop(), "rules differ"),
        (lambda interface: interface.update(step_arguments=20), "step_arguments differ"),
        (
            dict.clear,
            "Segment, Scalars, sums, rules, dtypes, low, step_arguments differ",
        ),  # a module from before there was such a check
    ],
)
def test_a_module_of_another_version_is_refused(change: Callable[[dict[str, Any]], None], named: str) -> None:
    exported = copy.deepcopy(_native.interface())
    check_interface(exported)
    change(exported)
    with pytest.raises(ImportError, match=rf"another version than this package \({named}\): reinstall llc_fast"):
        check_interface(exported)


def test_import_compares_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = _native.interface()
    exported["Segment"]["names"][0] = "start"
    monkeypatch.setattr(_native, "interface", lambda: exported)
    spec = importlib.util.spec_from_file_location("imported_again", native.__file__)
    assert spec and spec.loader
    with pytest.raises(ImportError, match="another version"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_STEP = """
import torch
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.kernels.native import Segment, SegmentTable, native_info
torch.manual_seed(0)
w, g = torch.randn(5000), torch.randn(5000)
table = SegmentTable("rmsprop-sgld", [Segment(w, 0, w.clone(), state=[torch.rand(5000)])])
table.step([g], StepScalars(1e-2, 20.0, 2.0, 1.0, 0.7, 0.2, decay=0.9, eps=0.1), NoiseKey(1))
print(native_info()["instruction_set"], w.double().sum().item(), (w.double() * g.double()).sum().item())
"""


def _run_step(folder: Path, isa: str | None) -> subprocess.CompletedProcess[str]:
    """`_STEP` in a process of its own, in a folder without a package of ours in it."""
    env = {k: v for k, v in os.environ.items() if k != "LLC_FAST_ISA"} | ({} if isa is None else {"LLC_FAST_ISA": isa})
    return subprocess.run(
        [sys.executable, "-c", _STEP], capture_output=True, text=True, check=False, cwd=folder, env=env
    )


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the copy that is chosen here says of its step."""
    return _run_step(tmp_path_factory.mktemp("best"), None).stdout.split()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa: str, tmp_path: Path, best: list[str]) -> None:
    """The copies that this machine can run give the same step, to rounding where they lack a fused multiply-add."""
    done = _run_step(tmp_path, isa)
    if done.returncode and ("lacks these instructions" in done.stderr or "is not one of" in done.stderr):
        pytest.skip(f"no {isa} here")
    name, *values = done.stdout.split()
    assert name == isa
    tolerance = 1e-4 if isa == "baseline" else 0.0
    for value, reference_value in zip(values, best[1:], strict=True):
        assert float(value) == pytest.approx(float(reference_value), abs=tolerance, rel=0)


def test_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    done = _run_step(tmp_path, "sse9")
    assert done.returncode != 0 and "LLC_FAST_ISA=sse9 is not one of" in done.stderr


def test_info_names_what_was_built() -> None:
    info = native_info()
    assert info["instruction_set"] in ("baseline", "avx2", "avx512")
    assert info["cuda"] is not None or info["no_cuda_reason"]


# --- on a GPU: the CPU's step is the expectation ------------------------------------------------------------


def _gpu_case(rule: str, dtype: torch.dtype, device: str, chains: int = 1) -> tuple[list[Segment], list[Tensor]]:
    sizes = [1, 2, 3, 5, 64, 100, 513, 4096, 70_001]
    offsets = list(itertools.accumulate([0, *sizes[:-1]]))
    segments, grads, total = [], [], sum(sizes)
    rows = _random(chains, total, dtype=dtype, seed=1).to(device)
    states = [_random(chains, total, dtype=dtype, seed=5 + k).abs().to(device) for k in range(NUM_STATES[rule])]
    for k, (n, o) in enumerate(zip(sizes, offsets, strict=True)):
        w_star = rows[0, o : o + n].clone() + 0.01
        mask = (_random(n, dtype=dtype, seed=n + 3) > 0).to(device) if k % 3 == 2 else None
        given = (_random(n, dtype=dtype, seed=n + 4).abs() + 0.1).to(device) if k % 2 else 0.7
        kept = [t[0, o : o + n] for t in states]
        segments.append(Segment(rows[0, o : o + n], o, w_star, mask, state=kept, preconditioner=given))
        grads.append(_random(chains, n, dtype=dtype, seed=n + 1).to(device))
    return segments, grads


@pytest.mark.gpu
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_gpu_equals_cpu(rule: str, dtype: torch.dtype, chains: int) -> None:
    """Steps, states and sums; and two launches give the same bits."""
    s, results = _scalars(rule, "everything"), []
    for device in ("cpu", "cuda", "cuda"):
        segments, grads = _gpu_case(rule, dtype, device, chains)
        sums = _step(rule, segments, grads, s, num_chains=chains, chain_stride=74_785)
        rows = segments[0].w.as_strided((chains, 74_785), (74_785, 1), 0)
        results.append((rows.cpu(), [t.cpu() for p in segments for t in p.state], sums.cpu()))
    eps = torch.finfo(dtype).eps
    (cpu, cpu_states, cpu_sums), (gpu, gpu_states, gpu_sums), again = results
    assert torch.allclose(cpu, gpu, rtol=4 * eps, atol=4 * eps)
    assert all(torch.allclose(a, b, rtol=4 * eps, atol=4 * eps) for a, b in zip(cpu_states, gpu_states, strict=True))
    assert torch.allclose(cpu_sums, gpu_sums, rtol=1000 * eps, atol=1000 * eps)
    assert torch.equal(gpu, again[0]) and torch.equal(gpu_sums, again[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpu_noise_equals_cpu(dtype: torch.dtype) -> None:
    """To two units in the last place of the radius."""
    for begin in (0, 5, 2**34 + 1):
        cpu = normals(begin, 1_000_001, KEY, dtype=dtype)
        gpu = normals(begin, 1_000_001, KEY, dtype=dtype, device="cuda").cpu()
        assert ((cpu - gpu).abs() <= 2 * torch.finfo(dtype).eps * cpu.abs().clamp_min(1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_gpu_trajectory(rule: str) -> None:
    """A thousand steps on a quadratic, float64: rounding grows no faster than the dynamics lets it."""
    s = StepScalars(lr=1e-3, nbeta=10.0, localization=1.0, **RULE_SCALARS[rule])
    ends = []
    for device in ("cpu", "cuda"):
        w = _random(1000, dtype=torch.float64, seed=1).to(device)
        segment = Segment(w, 0, torch.zeros_like(w), state=[torch.zeros_like(w) for _ in range(NUM_STATES[rule])])
        table = SegmentTable(rule, [segment])
        for step in range(1000):
            table.step(
                [w.clone()],
                s,
                KEY._replace(step=step),
                thermostat=torch.full((1,), 0.1, dtype=torch.float64, device=device),
            )
        ends.append(w.cpu())
    assert torch.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_gpu_low_precision(low: torch.dtype) -> None:
    w = _random(5001, dtype=torch.float32, seed=1).cuda()
    copy, grad = torch.zeros(5001, dtype=low, device="cuda"), _random(5001, dtype=low, seed=2).cuda()
    plain = w.clone()
    _step("sgld", [Segment(w, 3, copy=copy)], [grad], OPTIONS["weight decay"])
    _step("sgld", [Segment(plain, 3)], [grad.float()], OPTIONS["weight decay"])
    assert torch.equal(w, plain) and torch.equal(copy, w.to(low))
    # w* that is the model's own, at aligned addresses and at others.
    reference, s = _random(5001, dtype=low, seed=3).cuda(), _scalars("sgld", "everything")
    for part in (slice(0, None), slice(1, None)):
        w, plain, wide = (t[part] for t in (w, plain, reference.float()))
        reference, copy, grad = reference[part], copy[part], grad[part]
        _step("sgld", [Segment(w, 3, reference, copy=copy)], [grad], s)
        _step("sgld", [Segment(plain, 3, wide)], [grad.float()], s)
        assert torch.equal(w, plain) and torch.equal(copy, w.to(low))


@pytest.mark.gpu
def test_gpu_streams_and_graphs() -> None:
    """The current stream is used, and a captured step replays with the step count and scalars of the moment."""
    start = _random(100_000, dtype=torch.float32, seed=1).cuda()

    def optimizer_for(w: torch.nn.Parameter, **options: bool) -> torch.optim.Optimizer:
        return llc_fast.SGLD([w], lr=1e-3, nbeta=10.0, localization=1.0, seed=4, **options)

    plain = torch.nn.Parameter(start.clone())
    plain.grad = torch.ones_like(plain)
    eager = optimizer_for(plain)
    for k in range(4):
        eager.param_groups[0]["lr"] = 1e-3 / (1 + k)
        with torch.cuda.stream(torch.cuda.Stream()):
            eager.step()
        torch.cuda.synchronize()

    captured = torch.nn.Parameter(start.clone())
    captured.grad = torch.ones_like(captured)
    replayed = optimizer_for(captured, capturable=True)
    replayed.step()  # builds tables outside the graph
    graph = torch.cuda.CUDAGraph()
    before = captured.detach().clone()
    with torch.cuda.graph(graph):
        replayed.step()
    captured.data.copy_(before)
    replayed.param_groups[0]["step"].fill_(1)
    for k in range(1, 4):
        replayed.param_groups[0]["lr"] = 1e-3 / (1 + k)
        replayed.refresh_scalars()
        graph.replay()
    assert torch.equal(plain, captured)
