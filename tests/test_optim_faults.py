"""What happens to tensors between two steps of an optimizer: the step is right, or an error says why there is none."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import OPTIMIZERS, OPTIONS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import llc_fast
from llc_fast.kernels.native import Segment, SegmentTable, minibatch_indices, normals
from llc_fast.kernels.step import NoiseKey, StepScalars
from llc_fast.support import torch_private

PLAIN: dict[str, Any] = {"lr": 0.1, "nbeta": 3.0, "localization": 2.0, "seed": 5}
RULES = list(OPTIMIZERS)


def _numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _optimizer(rule: str, p: nn.Parameter, **options: Any) -> Any:
    own = {k: v for k, v in OPTIONS[rule].items() if k != "preconditioner"}
    return OPTIMIZERS[rule]([p], **PLAIN | own | options)


def _step(optimizer: Any, p: Tensor, seed: int) -> None:
    p.grad = _numbers(*p.shape, seed=seed).to(p.dtype)
    optimizer.step()


def _all_tensors(optimizer: Any, p: Tensor) -> list[Tensor]:
    return [p.detach(), *(t for t in optimizer.state[p].values() if isinstance(t, Tensor))]


# --- The same values in other memory: the step goes on as if nothing had happened -----------------------------------


def _share(t: Tensor) -> None:
    t.share_memory_()


def _move(t: Tensor) -> None:
    t.data = t.data.clone()


def _stride(t: Tensor) -> None:
    t.data = torch.stack([t.data, t.data], dim=-1)[..., 0]


def _lay_out_transposed(t: Tensor) -> None:
    t.data = t.data.t().contiguous().t()


def _negate_twice(t: Tensor) -> None:
    t.data = torch.complex(torch.zeros_like(t), -t.data).conj().imag
    assert t.is_neg()


def _resize_twice(t: Tensor) -> None:
    values = t.detach().clone()
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(values.nbytes)
    t.data.copy_(values)


@pytest.mark.parametrize("change", [_share, _move, _stride, _lay_out_transposed, _negate_twice, _resize_twice])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_moves_between_steps(rule: str, change: Callable[[Tensor], None], dtype: torch.dtype) -> None:
    """Parameter, w*, states and float32 chain in other memory or strides: the bits are those of undisturbed ones."""
    ends = []
    for disturbed in (False, True):
        p = nn.Parameter(_numbers(4, 6, seed=1, dtype=dtype))
        optimizer = _optimizer(rule, p)
        for step in range(4):
            if disturbed and step in (1, 2):
                for t in [p, *(v for v in optimizer.state[p].values())]:
                    if t.dtype != torch.bfloat16 or change is not _negate_twice:
                        change(t)
            _step(optimizer, p, step)
        ends.append([t.clone() for t in _all_tensors(optimizer, p)])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_can_be_replaced_by_copies(rule: str) -> None:
    ends = []
    for disturbed in (False, True):
        p = nn.Parameter(_numbers(4, 6, seed=1))
        optimizer = _optimizer(rule, p)
        for step in range(3):
            if disturbed:
                optimizer.state[p] = {k: v.t().contiguous().t() for k, v in optimizer.state[p].items()}
            _step(optimizer, p, step)
        ends.append([t.clone() for t in _all_tensors(optimizer, p)])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_transposed_in_place() -> None:
    """Same address, other strides: the gradient's elements go where the parameter has them now."""
    p, q = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    ours, theirs = llc_fast.SGLD([p], lr=1.0, noise_level=0.0, seed=0), torch.optim.SGD([q], lr=0.5)
    for grad in (torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [0.0, 0.0]])):
        for w, optimizer in ((p, ours), (q, theirs)):
            w.grad = grad.clone()
            optimizer.step()
            w.data = w.data.t()
    assert torch.equal(p, q) and p[1, 0] == -0.5


def test_masks_and_preconditioners_that_are_written_to() -> None:
    """Also where the table holds a copy that was broadcast or is of another dtype."""
    for mask in (
        torch.ones(3, dtype=torch.bool),
        torch.ones(1, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool)[::2],
    ):
        p = nn.Parameter(torch.zeros(3))
        optimizer = llc_fast.SGLD([p], lr=1.0, seed=0, optimize_over=mask)
        _step(optimizer, p, 0)
        before = p.detach().clone()
        mask.zero_()
        _step(optimizer, p, 1)
        assert torch.equal(p, before)
    for metric in (torch.ones(3), torch.ones(1), torch.ones(3, dtype=torch.float64)):
        p = nn.Parameter(torch.zeros(3))
        optimizer = llc_fast.PreconditionedSGLD([p], lr=1.0, noise_level=0.0, seed=0, preconditioner=metric)
        for factor in (1.0, 4.0):
            before = p.detach().clone()
            metric.fill_(factor)
            p.grad = torch.ones(3)
            optimizer.step()
            assert torch.equal(p, before - factor / 2)


def test_shared_mask() -> None:
    """share_memory_() moves a mask; it goes on to hold."""
    p, mask = nn.Parameter(torch.zeros(2000)), torch.arange(2000) % 2 == 0
    optimizer = llc_fast.SGLD([p], lr=1.0, seed=0, optimize_over=mask)
    for step in range(3):
        _step(optimizer, p, step)
        mask.share_memory_()
    assert (p[1::2] == 0).all() and (p[::2] != 0).all()


# --- Other dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_low_precision_model_made_float32_goes_on_from_its_unrounded_values(low: torch.dtype) -> None:
    p = nn.Parameter(_numbers(50, seed=1, dtype=low))
    optimizer = llc_fast.SGLD([p], **PLAIN)
    _step(optimizer, p, 0)
    chain = optimizer.state[p]["master"].clone()
    q = nn.Parameter(chain.clone())
    expected = llc_fast.SGLD([q], **PLAIN)
    expected.state[q]["initial_param"] = optimizer.state[p]["initial_param"].clone()
    expected.param_groups[0]["step"] = torch.tensor(1)
    p.data = p.data.float()
    p.grad = None
    _step(optimizer, p, 1)
    _step(expected, q, 1)
    assert torch.equal(p, q) and "master" not in optimizer.state[p]


def test_a_low_precision_model_made_float32_and_changed_goes_on_from_where_it_was_put() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = llc_fast.SGLD([p], lr=1e-9, noise_level=0.0, seed=0)
    p.data = torch.tensor([1.0, 2.0, 3.1, 4.0])
    p.grad = torch.zeros(4)
    optimizer.step()
    assert torch.equal(p, torch.tensor([1.0, 2.0, 3.1, 4.0]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.bfloat16, torch.float16),
    ],
)
def test_converted_models(rule: str, first: torch.dtype, then: torch.dtype) -> None:
    """What is kept follows the parameters' precision: the steps are those of a model that always had the second one."""
    ends = []
    for dtypes in ((first, then), (then, then)):
        model = nn.Linear(6, 4, bias=False)
        model.weight.data = _numbers(4, 6, seed=1).bfloat16().float()  # which all of the dtypes hold
        model.to(dtypes[0])
        optimizer = _optimizer(rule, model.weight, lr=1e-3)
        for step in range(2):
            _step(optimizer, model.weight, step)
        model.weight.grad = None
        model.to(dtypes[1])
        for step in range(2, 4):
            _step(optimizer, model.weight, step)
        ends.append(model.weight.detach().double())
    eps = max(torch.finfo(d).eps for d in (first, then))
    torch.testing.assert_close(ends[0], ends[1], rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32, torch.float64])
def test_a_state_dict_of_another_precision(rule: str, saved: torch.dtype, loaded: torch.dtype) -> None:
    """The steps after it are those of one precision throughout, to rounding."""
    p, q = (nn.Parameter(_numbers(4, 6, seed=1).bfloat16().to(d)) for d in (saved, loaded))
    first = _optimizer(rule, p, lr=1e-3)
    _step(first, p, 0)
    second = _optimizer(rule, q, lr=1e-3)
    with torch.no_grad():
        q.copy_(p)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (1, 2):
        for w, optimizer in ((p, first), (q, second)):
            _step(optimizer, w, step)
    eps = max(torch.finfo(d).eps for d in (saved, loaded))
    torch.testing.assert_close(q.detach().double(), p.detach().double(), rtol=4 * eps, atol=4 * eps)


def test_a_state_dict_with_every_tensor_cast() -> None:
    """Thermostat and step count, as floats of the wrong size, are converted back."""
    ends = []
    for cast in (lambda t: t, torch.Tensor.float, torch.Tensor.half):
        p = nn.Parameter(torch.zeros(8))
        optimizer = llc_fast.SGNHT([p], lr=0.25, diffusion_factor=0.5, seed=0)
        _step(optimizer, p, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["thermostat"].fill_(0.5)  # which all dtypes hold
        saved["param_groups"][0] = {
            k: cast(v) if isinstance(v, Tensor) else v for k, v in saved["param_groups"][0].items()
        }
        optimizer.load_state_dict(saved)
        (group,) = optimizer.param_groups
        assert (group["thermostat"].dtype, group["step"].dtype) == (torch.float64, torch.int64)
        _step(optimizer, p, 1)
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# --- Gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_gradients_with_the_negative_bit(shape: tuple[int, ...]) -> None:
    """As torch's SGD reads them, which resolves the bit."""
    grad = torch.complex(_numbers(*shape, seed=1), _numbers(*shape, seed=2)).conj().imag
    assert grad.is_neg()
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    for w, optimizer in ((p, llc_fast.SGLD([p], lr=0.5, noise_level=0.0, seed=0)), (q, torch.optim.SGD([q], lr=0.25))):
        for g in (torch.ones(shape), grad, torch.ones(shape), grad):  # each in turn, so that neither is remembered
            w.grad = g
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert grad.is_neg()


def test_negative_bit_behind_a_backward_pass() -> None:
    x, ends = torch.tensor([0.5 + 0.25j]), []
    for cls, options in ((llc_fast.SGLD, {"lr": 0.2, "noise_level": 0.0, "seed": 0}), (torch.optim.SGD, {"lr": 0.1})):
        p, q = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
        (torch.complex(p, q).conj() * x - 3).abs().square().sum().backward()
        cls([p, q], **options).step()
        ends.append([p.item(), q.item()])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.parametrize("nbytes", [0, 40])
@pytest.mark.parametrize(
    "what", ["parameter", "gradient", "initial_param", "state0", "mask", "preconditioner", "master"]
)
@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_freed_memory_is_an_error(what: str, when: str, nbytes: int) -> None:
    """Naming the tensor; nothing else moves. Once it has its memory back, steps go on."""
    mask, metric = torch.ones(1000, dtype=torch.bool), torch.ones(1000)
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16 if what == "master" else torch.float32))
    other = nn.Parameter(torch.ones(5))
    if what == "preconditioner":
        optimizer: Any = llc_fast.PreconditionedSGLD([p], **PLAIN, preconditioner=metric)
    else:
        optimizer = llc_fast.SGHMC([other], **PLAIN)
        optimizer.add_param_group({"params": [p], "optimize_over": mask})
    for w in (p, other):
        w.grad = torch.ones_like(w)
    if when == "between steps":
        optimizer.step()
    lost = {"parameter": p, "gradient": p.grad, "mask": mask, "preconditioner": metric, **optimizer.state[p]}[what]
    assert lost is not None
    before, storage = other.detach().clone(), lost.untyped_storage()
    full = storage.nbytes()
    storage.resize_(nbytes)
    with pytest.raises(
        RuntimeError, match=f"needs {full} bytes, but its storage has {nbytes}: it was freed or resized"
    ):
        optimizer.step()
    assert torch.equal(other, before)
    storage.resize_(full)
    lost.data.fill_(1)
    optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.zeros(6), ValueError, r"shape \(6,\), the parameter \(2, 3\)"),
        (torch.zeros(3, 2), ValueError, r"shape \(3, 2\), the parameter \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(2, 3).to_sparse(), TypeError, "sparse=False"),
        (torch.zeros(2, 3, device="meta"), TypeError, "meta"),
    ],
)
def test_gradients_that_do_not_fit(grad: Tensor, error: type[Exception], message: str) -> None:
    """The parameter is replaced under its gradient; nothing moves, in this group or another one."""
    p, other = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    optimizer = llc_fast.SGLD([{"params": [other]}, {"params": [p]}], lr=0.1, seed=0)
    for w in (p, other):
        w.grad = torch.ones_like(w)
    optimizer.step()
    before = [w.detach().clone() for w in (p, other)]
    table = SegmentTable("sgld", [Segment(p.detach(), 0)])
    with pytest.raises(error, match=message):
        table.step([grad], StepScalars(0.1, 1.0), NoiseKey(1))
    if grad.shape == (3, 2):  # as torch lets it come about
        p.data = torch.zeros(3, 2)
        p.grad = None
        p.grad = grad
        p.data = before[0].clone()
        with pytest.raises(error, match=message):
            optimizer.step()
    assert torch.equal(p, before[0]) and torch.equal(other, before[1])


# --- Tensors without memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_fake_tensors_are_refused(rule: str) -> None:
    with (
        FakeTensorMode(),
        pytest.raises(TypeError, match="parameter 0 is a FakeTensor, which keeps its data elsewhere"),
    ):
        _optimizer(rule, nn.Parameter(torch.zeros(5)))
    with FakeTensorMode(), pytest.raises(TypeError, match="FakeTensor"):
        normals(0, 5, NoiseKey(1))
    with FakeTensorMode():
        out = torch.empty(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="FakeTensor"):
        minibatch_indices(10, NoiseKey(1), out)


def test_tensors_inside_torch_func_are_refused() -> None:
    def construct(w: Tensor) -> Tensor:
        llc_fast.SGLD([w.detach()], seed=0)
        return w.sum()

    with pytest.raises(TypeError, match=r"parameter 0 is a .*, which keeps its data elsewhere"):
        torch.func.grad(construct)(torch.ones(3))
    with pytest.raises(TypeError, match=r"parameter 0 is a .*, which keeps its data elsewhere"):
        torch.vmap(construct)(torch.ones(2, 3))


def test_inference_tensors() -> None:
    """As parameters they are refused; an optimizer may be built, and stepped, in inference mode."""
    with torch.inference_mode():
        w = torch.ones(3)
    with pytest.raises(ValueError, match="parameter 0 is an inference tensor"):
        llc_fast.SGLD([w], seed=0)
    ends = []
    for inside in (False, True):
        p = nn.Parameter(torch.ones(3))
        with torch.inference_mode(inside):
            optimizer = llc_fast.SGNHT([p], **PLAIN)
        for step in range(4):
            p.grad = _numbers(3, seed=step)
            with torch.inference_mode(inside and step % 2 == 1):
                optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_parameters_that_overlap_are_refused() -> None:
    """Expanded ones, and two that share memory; pieces of one tensor side by side are not."""
    p = nn.Parameter(torch.zeros(5))
    optimizer = llc_fast.SGHMC([p], **PLAIN)
    _step(optimizer, p, 0)
    p.data = torch.zeros(1).expand(5)
    p.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"parameter 0.* elements that share memory"):
        optimizer.step()
    memory = torch.zeros(10)
    one, two, far = (nn.Parameter(memory[a:b]) for a, b in ((0, 5), (4, 8), (8, 10)))
    for q in (one, two, far):
        q.grad = torch.ones_like(q)
    with pytest.raises(ValueError, match="parameters 0 and 1 shares memory"):
        llc_fast.SGLD([one, two], seed=0).step()
    assert (memory == 0).all()
    llc_fast.SGLD([one, far], lr=0.1, seed=0).step()
    odd, even = (nn.Parameter(memory[k::2]) for k in (0, 1))
    odd.grad, even.grad = torch.ones(5), torch.ones(5)
    llc_fast.SGLD([odd, even], lr=0.1, seed=0).step()
    assert (memory != 0).all()


# --- State by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda kept: kept.pop("state0"), ValueError, "parameter 0 has no state0"),
        (lambda kept: kept.update(state0=torch.zeros(2)), ValueError, r"state0 of parameter 0 has shape \(2,\)"),
        (
            lambda kept: kept.update(state0=torch.zeros(3, device="meta")),
            ValueError,
            "state0 of parameter 0 .* on meta",
        ),
        (lambda kept: kept.update(state0=[0.0, 0.0, 0.0]), TypeError, "state0 of parameter 0 .* got list"),
        (lambda kept: kept.update(state0=torch.zeros(3, dtype=torch.int64)), TypeError, "state0 .* got torch.int64"),
        (lambda kept: kept.update(state0=torch.zeros(1).expand(3)), ValueError, "share memory"),
        (lambda kept: kept.update(initial_param=torch.zeros(3, 1)), ValueError, "initial_param of parameter 0"),
        (lambda kept: kept.pop("initial_param"), ValueError, "when w. was not kept"),
        (lambda kept: kept.clear(), ValueError, "parameter 0 has no state0"),
    ],
)
def test_state_changed_by_hand(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    """An error that names it, and nothing moves; with the state back, steps go on."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = llc_fast.SGHMC([p], **PLAIN)
    _step(optimizer, p, 0)
    before, kept = p.detach().clone(), dict(optimizer.state[p])
    change(optimizer.state[p])
    with pytest.raises(error, match=message):
        _step(optimizer, p, 1)
    assert torch.equal(p, before)
    optimizer.state[p] = kept
    _step(optimizer, p, 1)
    assert not torch.equal(p, before)


def test_state_of_other_names_is_left_alone() -> None:
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    a, b = llc_fast.SGHMC([p], **PLAIN), llc_fast.SGHMC([q], **PLAIN)
    a.state[p].update(mine="a note", count=torch.tensor(3))
    for step in range(2):
        _step(a, p, step)
        _step(b, q, step)
    assert torch.equal(p, q) and a.state[p]["mine"] == "a note"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step", -1, ValueError),
        ("step", torch.tensor(-1), ValueError),
        ("step", torch.tensor(1.5), TypeError),
        ("step", torch.tensor(math.nan), TypeError),
        ("step", torch.tensor([1, 2]), TypeError),
        ("step", None, TypeError),
        ("step", "1", TypeError),
        ("step", True, TypeError),
        ("step", 2**40, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", torch.tensor(1), TypeError),
        ("offset", -1, ValueError),
        ("offset", 2**60, ValueError),
        ("offset", None, TypeError),
        ("thermostat", torch.zeros(1), TypeError),
        ("thermostat", torch.zeros(2, dtype=torch.float64), TypeError),
        ("thermostat", torch.zeros(1, dtype=torch.float64, device="meta"), TypeError),
        ("thermostat", 0.5, TypeError),
        ("thermostat", None, ValueError),
        ("lr", 10**400, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", torch.tensor([0.1, 0.2]), TypeError),
        ("lr", torch.tensor(-1.0), ValueError),
        ("lr", None, TypeError),
        ("nbeta", [1.0], TypeError),
        ("diffusion_factor", -1.0, ValueError),
        ("diffusion_factor", 10**400, ValueError),
        ("optimize_over", np.ones(3, bool), TypeError),
        ("optimize_over", torch.ones(3), TypeError),
        ("optimize_over", torch.ones(2, dtype=torch.bool), ValueError),
        ("optimize_over", [None, None], ValueError),
    ],
)
def test_groups_changed_by_hand(name: str, value: Any, error: type[Exception]) -> None:
    """An error that begins with the name of the option, and nothing moves; corrected, steps go on."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = llc_fast.SGNHT([p], **PLAIN)
    _step(optimizer, p, 0)
    (group,) = optimizer.param_groups
    before, good = [t.clone() for t in _all_tensors(optimizer, p)], group[name]
    group[name] = value
    with pytest.raises(error, match="mask|optimize_over" if name == "optimize_over" else name):
        _step(optimizer, p, 1)
    for a, b in zip(_all_tensors(optimizer, p), before, strict=True):
        assert torch.equal(a, b)
    group[name] = good
    _step(optimizer, p, 1)
    assert not torch.equal(p, before[0])


def test_a_step_count_may_be_any_integer() -> None:
    ends = []
    for count in (
        torch.tensor(7),
        7,
        np.int64(7),
        np.array(7),
        torch.tensor(7.0),
        torch.tensor([7], dtype=torch.int32),
    ):
        p = nn.Parameter(torch.zeros(3))
        optimizer = llc_fast.SGLD([p], seed=0)
        optimizer.param_groups[0]["step"] = count
        _step(optimizer, p, 1)
        ends.append(p.detach().clone())
        assert int(optimizer.param_groups[0]["step"]) == 8 and int(np.asarray(count).reshape(())) == 7
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_an_offset_that_is_changed_names_other_noise() -> None:
    ends = []
    for change in (True, False):
        p = nn.Parameter(torch.zeros(3))
        optimizer = llc_fast.SGLD([p], seed=0)
        p.grad = torch.zeros(3)
        if change:
            optimizer.step()
            p.data.zero_()
        optimizer.param_groups[0].update(offset=100, step=5)
        optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


# --- Loading ----------------------------------------------------------------------------------------------------


def _without(saved: dict[str, Any], key: str) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    saved["state"][0].pop(key, None)
    saved["param_groups"][0].pop(key, None)
    return saved


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda saved: _without(saved, "state0"), "parameter 0 of group 0 has no state0"),
        (lambda saved: _without(saved, "initial_param"), "parameter 0 of group 0 has no initial_param"),
        (lambda saved: _without(saved, "momentum_decay"), "group 0 has no momentum_decay"),
        (lambda saved: _without(saved, "step"), "group 0 has no step"),
        (
            lambda saved: llc_fast.SGLD([nn.Parameter(torch.zeros(3))], **PLAIN).state_dict(),
            "no momentum_decay: .*SGHMC",
        ),
        (lambda saved: llc_fast.SGNHT([nn.Parameter(torch.zeros(3))], **PLAIN).state_dict(), "no momentum_decay"),
        (lambda saved: llc_fast.SGHMC([nn.Parameter(torch.zeros(4))], **PLAIN).state_dict(), r"shape \(4,\)"),
        (lambda saved: torch.optim.SGD([nn.Parameter(torch.zeros(3))]).state_dict(), "group 0 has no"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(other: Callable[[Any], Any], message: str) -> None:
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer, untouched = llc_fast.SGHMC([p], **PLAIN), llc_fast.SGHMC([q], **PLAIN)
    _step(optimizer, p, 0)
    _step(untouched, q, 0)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other(optimizer.state_dict()))
    _step(optimizer, p, 1)
    _step(untouched, q, 1)
    assert torch.equal(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_every_route_of_a_state_dict_continues_bit_for_bit(rule: str) -> None:
    """Through a file, with memory mapped from it, deepcopy and pickle; and what was saved stays as it was."""
    ends = []
    for route in ("none", "file", "mapped", "deepcopy", "pickle"):
        p = nn.Parameter(_numbers(4, 6, seed=1))
        optimizer = _optimizer(rule, p)
        for step in range(2):
            _step(optimizer, p, step)
        saved = optimizer.state_dict()
        if route == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        elif route == "deepcopy":
            saved = copy.deepcopy(saved)
        elif route == "pickle":
            saved = pickle.loads(pickle.dumps(saved))
        if route != "none":
            optimizer.load_state_dict(saved)
        assert int(saved["param_groups"][0]["step"]) == 2
        for step in range(2, 4):
            _step(optimizer, p, step)
        assert int(saved["param_groups"][0]["step"]) == 2
        ends.append(p.detach().clone())
    assert all(torch.equal(end, ends[0]) for end in ends)


# --- Released gradients -----------------------------------------------------------------------------------------


def test_two_optimizers_that_release_gradients() -> None:
    """Of one parameter: an error before anything moves; one that nobody has any more does not count."""
    p = nn.Parameter(torch.ones(3))
    first, second = (llc_fast.SGLD([p], lr=0.1, noise_level=0.0, seed=0, release_gradients=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="parameter 0 is moved by two optimizers with release_gradients"):
        p.sum().backward()
    assert (p == 1).all()
    del second
    p.grad = None
    p.sum().backward()
    assert torch.equal(p, torch.full((3,), 1 - 0.05)) and p.grad is None
    first.step()


def test_released_gradients_of_memory_that_moves() -> None:
    ends = []
    for disturbed in (False, True):
        p = nn.Parameter(torch.ones(2, 2))
        optimizer = llc_fast.SGHMC([p], **PLAIN, release_gradients=True)
        for _ in range(3):
            (p * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
            optimizer.step()
            if disturbed:
                p.data = p.data.t().contiguous().t()
                optimizer.state[p]["state0"].share_memory_()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


# --- The table itself, as chains use it -------------------------------------------------------------------------


def test_rows_of_chains_that_move() -> None:
    """Buffers of chains whose storage moves are found again; rows that end before the last chain are refused."""
    ends, scalars = [], StepScalars(0.1, 1.0, 2.0)
    for disturbed in (False, True):
        rows, sums = _numbers(3, 40, seed=1), torch.zeros(3, 6, dtype=torch.float64)
        segments = [Segment(rows[0, 2:10], 0, torch.zeros(8)), Segment(rows[0, 16:30].view(2, 7), 8, torch.zeros(2, 7))]
        table = SegmentTable("sgld", segments, num_chains=3, chain_stride=40)
        for step in range(3):
            grads = [_numbers(3, 8, seed=step), _numbers(3, 2, 7, seed=step)]
            table.step(grads, scalars, NoiseKey(1, step), sums=sums)
            if disturbed:
                rows.share_memory_()
                sums.share_memory_()
        ends.append((rows.clone(), sums.clone()))
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1])
    with pytest.raises(RuntimeError, match="a row of parameter 0 needs 480 bytes, but its storage has 320"):
        SegmentTable("sgld", [Segment(torch.zeros(2, 40)[0], 0)], num_chains=3, chain_stride=40)
    with pytest.raises(ValueError, match="lay chains out in rows"):
        SegmentTable("sgld", [Segment(torch.zeros(2, 40)[0, ::2], 0)], num_chains=2, chain_stride=40)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"thermostat": torch.zeros(2)}, "thermostat must be 2 numbers of torch.float64"),
        ({"thermostat": torch.zeros(1, dtype=torch.float64)}, "thermostat must be 2 numbers"),
        ({"thermostat": torch.zeros(4, dtype=torch.float64)[::2]}, "thermostat must be contiguous"),
        ({"sums": torch.zeros(1, 6, dtype=torch.float64)}, "sums must be 12 numbers"),
        ({"sums": torch.zeros(2, 6)}, "sums must be 12 numbers of torch.float64"),
        ({"device_step": torch.zeros((), dtype=torch.int32)}, "step must be 1 numbers of torch.int64"),
        ({"device_scalars": torch.zeros(3, dtype=torch.float64)}, "device_scalars must be 12 numbers"),
    ],
)
def test_small_tensors_of_a_step_are_checked(cells: dict[str, Tensor], message: str) -> None:
    rows = torch.zeros(2, 4)
    table = SegmentTable("sgnht", [Segment(rows[0], 0, state=[torch.zeros(2, 4)[0]])], num_chains=2, chain_stride=4)
    with pytest.raises(TypeError, match=message):
        table.step([torch.zeros(4)], StepScalars(0.1, 1.0), NoiseKey(1), **cells)
    assert (rows == 0).all()


def test_layouts_are_compared_without_private_names_of_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in where torch's guards are missing or have changed says the same."""
    base = torch.zeros(2, 3)
    like = [torch.ones(2, 3)]
    unlike = [
        torch.zeros(3, 2),
        torch.zeros(3, 2).t(),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, device="meta"),
        torch.complex(base, base).conj().imag.contiguous(),
        torch.complex(base, base).conj().imag,
        torch.zeros(2, 3).to_sparse(),
        nn.Parameter(torch.zeros(2, 3)),
        None,
    ]
    unlike = [t for t in unlike if not (isinstance(t, Tensor) and t.is_neg() is False and type(t) is Tensor
              and t.shape == base.shape and t.stride() == base.stride() and t.dtype == base.dtype
              and t.device == base.device and t.layout == base.layout)]  # fmt: skip
    for make in (torch_private._layouts_of, torch_private._Layouts):
        check = make([base]).check
        assert all(check(t) for t in like)
        assert not any(check(t) for t in unlike)
    monkeypatch.setattr(torch_private, "_layouts_of", torch_private._Layouts)
    test_a_parameter_transposed_in_place()
    test_gradients_with_the_negative_bit((3, 4))
