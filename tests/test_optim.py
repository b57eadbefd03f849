"""llc_fast.SGLD as a torch optimizer: its steps against the specification, and what torch users expect."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llc_fast
from llc_fast.kernels import reference
from llc_fast.kernels.step import NoiseKey, StepScalars

SEED = 20240517
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "localized": {"lr": 1e-3, "nbeta": 30.0, "localization": 5.0},
    "weight decay": {"lr": 1e-3, "nbeta": 30.0, "weight_decay": 4.0},
    "box": {"lr": 1e-2, "nbeta": 3.0, "bounding_box_size": 0.05},
    "noise-free": {"lr": 1e-3, "nbeta": 30.0, "localization": 5.0, "noise_level": 0.0},
    "everything": {
        "lr": 1e-2,
        "nbeta": 20.0,
        "localization": 2.0,
        "weight_decay": 1.0,
        "noise_level": 0.7,
        "bounding_box_size": 0.2,
    },
}
SHAPES = [(3, 5), (7,), (1,), (2, 3, 4)]


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> list[nn.Parameter]:
    return [nn.Parameter(_random(*shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]


def _give_gradients(params: Sequence[Tensor], step: int = 0) -> None:
    for k, p in enumerate(params):
        p.grad = _random(*p.shape, seed=1000 + 97 * step + k, dtype=p.dtype)


def _expected(
    w: Tensor, grad: Tensor, w0: Tensor, offset: int, step: int, seed: int, options: dict[str, Any]
) -> Tensor:
    """One step of the specification for a tensor that begins at `offset` of the flat parameter vector."""
    known = {"lr": 0.01, "nbeta": 1.0} | options
    box = known.pop("bounding_box_size", None)
    scalars = StepScalars(**known, bounding_box=math.inf if box is None else box)
    noise = reference.normals(offset, w.numel(), NoiseKey(seed, step=step)).reshape(w.shape)
    x = reference.Coordinates(w=w.double(), grad=grad.double(), reference=w0.double(), noise=noise)
    reference.sgld(x, scalars, step)
    return x.w


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def _assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e, rtol=1e-13, atol=1e-13)


def _assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {k} differs by up to {float((a - e).detach().abs().max()):g}"


def _offsets(params: Sequence[Tensor]) -> list[int]:
    return list(itertools.accumulate([0, *(p.numel() for p in params[:-1])]))


# --- The rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_equal_the_specification(name: str) -> None:
    """Three steps; element i of the concatenated parameters takes noise i, step k takes noise k, w0 stays."""
    options, params = OPTIONS[name], _parameters()
    w0 = _copies(params)
    optimizer = llc_fast.SGLD(params, **options, seed=SEED)
    for step in range(3):
        before = _copies(params)
        _give_gradients(params, step)
        optimizer.step()
        _assert_close(
            params,
            [
                _expected(w, p.grad, start, offset, step, SEED, options)  # type: ignore[arg-type]
                for w, p, start, offset in zip(before, params, w0, _offsets(params), strict=True)
            ],
        )


def test_default_options_are_those_of_the_documentation() -> None:
    """Given nothing but parameters: lr 0.01, nbeta 1, noise 1, no pull and no box."""
    (group,) = llc_fast.SGLD(_parameters()).param_groups
    assert {k: group[k] for k in ("lr", "nbeta", "noise_level", "localization", "weight_decay")} == {
        "lr": 0.01,
        "nbeta": 1.0,
        "noise_level": 1.0,
        "localization": 0.0,
        "weight_decay": 0.0,
    }
    assert group["bounding_box_size"] is None and group["optimize_over"] is None


def test_groups_have_their_own_hyperparameters() -> None:
    """Each group follows its own options and seed; noise offsets run on over groups, in their order."""
    params = _parameters()
    w0 = _copies(params)
    own = [OPTIONS["everything"], {"lr": 0.02, "localization": 3.0}]
    optimizer = llc_fast.SGLD(
        [{"params": params[:2], **own[0]}, {"params": params[2:], **own[1], "seed": 11}],
        seed=SEED,
        nbeta=20.0,
    )
    own[1]["nbeta"] = 20.0  # the optimizer's default, where a group says nothing
    _give_gradients(params)
    optimizer.step()
    settings = [(own[0], SEED), (own[0], SEED), (own[1], 11), (own[1], 11)]
    _assert_close(
        params,
        [
            _expected(w, p.grad, w, offset, 0, seed, options)  # type: ignore[arg-type]
            for w, p, offset, (options, seed) in zip(w0, params, _offsets(params), settings, strict=True)
        ],
    )


def test_added_group() -> None:
    """A group added after some steps goes on behind the others' noise and starts at its own first step."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params[:2], lr=0.01, seed=SEED)
    for step in range(2):
        _give_gradients(params[:2], step)
        optimizer.step()
    late = {"lr": 0.03, "localization": 4.0}
    optimizer.add_param_group({"params": params[2:], **late})
    before = _copies(params)
    _give_gradients(params, 2)
    optimizer.step()
    expected = [
        _expected(w, p.grad, w, offset, step, SEED, options)  # type: ignore[arg-type]
        for w, p, offset, step, options in zip(
            before,
            params,
            _offsets(params),
            (2, 2, 0, 0),
            ({"lr": 0.01}, {"lr": 0.01}, late, late),
            strict=True,
        )
    ]
    _assert_close(params, expected)


@pytest.mark.parametrize(
    "group",
    [
        {"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0},
        {"params": [nn.Parameter(torch.zeros(3))], "momentum": 0.9},
        {"params": [nn.Parameter(torch.zeros(3)), torch.zeros(3, dtype=torch.int64)], "localization": 1.0},
        {"params": [nn.Parameter(torch.zeros(3, device="meta"))], "localization": 1.0},
    ],
    ids=["bad value", "unknown option", "integer parameter", "meta parameter"],
)
def test_rejected_group_leaves_no_trace(group: dict[str, Any]) -> None:
    """After the error the optimizer is what it was, and takes the step that it would have taken."""
    params, others = _parameters(), _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.01, localization=1.0, seed=SEED)
    before = len(optimizer.param_groups), set(map(id, optimizer.state))
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group)
    assert (len(optimizer.param_groups), set(map(id, optimizer.state))) == before
    untouched = llc_fast.SGLD(others, lr=0.01, localization=1.0, seed=SEED)
    more, same = nn.Parameter(torch.zeros(9).double()), nn.Parameter(torch.zeros(9).double())
    optimizer.add_param_group({"params": [more]})
    untouched.add_param_group({"params": [same]})
    for ps, opt in (([*params, more], optimizer), ([*others, same], untouched)):
        _give_gradients(ps)
        opt.step()
    _assert_same_bits([*params, more], [*others, same])


def test_samples_the_stationary_law() -> None:
    """On ½w² the chain is an AR(1) process: its variance after k steps, to five standard errors."""
    size, lr, nbeta, gamma, steps = 40_000, 0.1, 8.0, 2.0, 25
    w = nn.Parameter(torch.zeros(size))
    optimizer = llc_fast.SGLD([w], lr=lr, nbeta=nbeta, localization=gamma, seed=SEED)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * w.square().sum()).backward()
        optimizer.step()
    decay = 1 - lr * (nbeta + gamma) / 2
    exact = lr * sum(decay ** (2 * k) for k in range(steps))
    assert float(w.detach().double().square().mean()) == pytest.approx(exact, rel=5 * math.sqrt(2 / size))
    assert abs(float(w.detach().double().mean())) < 5 * math.sqrt(exact / size)


def test_bounding_box() -> None:
    """However large the step, no element leaves the box around its first value, and some reach its faces."""
    (w,) = params = _parameters([(500,)])
    w0 = w.detach().clone()
    optimizer = llc_fast.SGLD(params, lr=1.0, bounding_box_size=0.3, seed=SEED)
    for step in range(5):
        _give_gradients(params, step)
        optimizer.step()
        distance = (w.detach() - w0).abs()
        assert distance.max() <= 0.3 * (1 + 1e-12)
    assert (distance > 0.3 * (1 - 1e-12)).sum() > 50


# --- Which parameters and elements move ---------------------------------------------------------------------


@pytest.mark.parametrize("localization", [0.0, 2.0])
def test_parameters_without_gradient(localization: float) -> None:
    """They stay bit for bit and keep their place in the noise, also when a gradient comes and goes."""
    params, full = _parameters(), _parameters()
    optimizers = [llc_fast.SGLD(ps, lr=0.01, localization=localization, seed=SEED) for ps in (params, full)]
    for step, frozen in enumerate([(1, 3), (0,), (0, 1, 2, 3), (), (2,)]):
        before = _copies(params)
        with torch.no_grad():
            for w, p in zip(before, full, strict=True):
                p.copy_(w)
        for ps in (params, full):
            _give_gradients(ps, step)
        for k in frozen:
            params[k].grad = None
        for optimizer in optimizers:
            optimizer.step()
        _assert_same_bits(params, [before[k] if k in frozen else p for k, p in enumerate(full)])


def _step_with_mask(
    masks: Any,
    shapes: Sequence[tuple[int, ...]],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters before, after a masked step and after a free one."""
    masked, free = _parameters(shapes), _parameters(shapes)
    before = _copies(masked)
    for params, mask in ((masked, masks), (free, None)):
        optimizer = llc_fast.SGLD(params, lr=0.1, localization=1.0, optimize_over=mask, seed=SEED)
        for step in range(2):
            _give_gradients(params, step)
            optimizer.step()
    return before, _copies(masked), _copies(free)


def test_mask_of_one_tensor() -> None:
    """It broadcasts to every parameter; masked elements keep their bits, the others' steps don't change."""
    mask = torch.tensor([True, False, True, True, False])
    before, masked, free = _step_with_mask(mask, [(5,), (3, 5), (2, 4, 5)])
    _assert_same_bits(masked, [torch.where(mask, f, b) for f, b in zip(free, before, strict=True)])


def test_mask_of_each_parameter() -> None:
    """A list holds one mask for each parameter; None leaves that parameter free."""
    masks = [_random(*shape, seed=50 + k) > 0 for k, shape in enumerate(SHAPES)]
    given: list[Tensor | None] = [masks[0], None, torch.zeros(1, dtype=torch.bool), masks[3]]
    before, masked, free = _step_with_mask(given, SHAPES)
    expected = [f if m is None else torch.where(m, f, b) for f, b, m in zip(free, before, given, strict=True)]
    _assert_same_bits(masked, expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3),
        torch.ones(4, dtype=torch.bool),
        "all",
        [torch.ones(3, dtype=torch.bool)],
        [None, None, None],
    ],
    ids=["not boolean", "wrong shape", "not a tensor", "list too short", "list too long"],
)
def test_wrong_masks(mask: Any) -> None:
    """A mask that does not fit is an error, at construction or at the first step, and nothing moves."""
    params = _parameters([(3,), (3,)])
    before = _copies(params)
    _give_gradients(params)
    with pytest.raises((TypeError, ValueError)):
        llc_fast.SGLD(params, optimize_over=mask, seed=SEED).step()
    _assert_same_bits(params, before)


def test_non_contiguous_parameter() -> None:
    """A channels_last weight keeps its layout and moves exactly as the same values in the usual layout do."""
    weights = [nn.Conv2d(3, 8, 3).weight for _ in range(2)]
    with torch.no_grad():
        weights[1].copy_(weights[0])
        weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    strides = weights[0].stride()
    assert not weights[0].is_contiguous()
    optimizers = [llc_fast.SGLD([w], lr=0.01, localization=2.0, weight_decay=1.0, seed=SEED) for w in weights]
    for step in range(3):
        for w, optimizer in zip(weights, optimizers, strict=True):
            _give_gradients([w], step)
            optimizer.step()
    assert weights[0].stride() == strides
    _assert_same_bits(weights[:1], weights[1:])


def test_replaced_storage() -> None:
    """After ``p.data = …`` (as Module.to does) steps go to the new storage, not to the old one."""
    params, others = _parameters(), _parameters()
    optimizers = [llc_fast.SGLD(ps, lr=0.01, localization=2.0, seed=SEED) for ps in (params, others)]
    for step in range(4):
        if step == 2:
            old = [p.data for p in params]
            kept = _copies(old)
            for p in params:
                p.data = p.data.clone()
        for ps, optimizer in zip((params, others), optimizers, strict=True):
            _give_gradients(ps, step)
            optimizer.step()
    _assert_same_bits(params, others)
    _assert_same_bits(old, kept)


# --- Repeatable bits ----------------------------------------------------------------------------------------


def _run(seed: int | None) -> list[Tensor]:
    params = _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.01, seed=seed)
    for step in range(3):
        _give_gradients(params, step)
        optimizer.step()
    return _copies(params)


def test_equal_seeds_equal_bits() -> None:
    """A run is a function of its seed, all 64 bits of it, whatever torch's generator has been doing."""
    first = _run(SEED)
    torch.rand(3)
    _assert_same_bits(_run(SEED), first)
    for other in (SEED + 1, SEED + 2**63, 0, 2**64 - 1):
        assert not torch.equal(_run(other)[0], first[0])


def test_no_seed_follows_torch() -> None:
    """seed=None: torch.manual_seed decides, the next optimizer differs, steps draw nothing from torch."""
    torch.manual_seed(5)
    first, second = _run(None), _run(None)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    _assert_same_bits(_run(None), first)
    _assert_same_bits(_run(None), second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(6)
    assert not torch.equal(_run(None)[0], first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["everything", "defaults"])
def test_any_split_and_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """One tensor or its data in a hundred parameters, in two groups, on 1 or 2 threads: the same bits."""
    size = 40_961
    start = _random(size, seed=1, dtype=dtype)
    cuts = [0, 0, 1, 2, 5, *(size * k // 95 for k in range(1, 96))]
    results, threads = [], torch.get_num_threads()
    try:
        for count, bounds, groups in ((1, [0, size], 1), (2, [0, size], 1), (2, cuts, 1), (1, cuts, 2)):
            torch.set_num_threads(count)
            parts = [nn.Parameter(start[a:b].clone()) for a, b in itertools.pairwise(bounds)]
            half = len(parts) // groups
            split: list[dict[str, Any]] = [{"params": parts[:half]}, {"params": parts[half:]}][:groups]
            optimizer = llc_fast.SGLD(split, **OPTIONS[name], seed=SEED)
            for step in range(3):
                grad = _random(size, seed=100 + step, dtype=dtype)
                for p, (a, b) in zip(parts, itertools.pairwise(bounds), strict=True):
                    p.grad = grad[a:b].clone()
                optimizer.step()
            results.append(torch.cat(_copies(parts)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


# --- What torch's tools expect ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "factors"),
    [
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5), (1.0, 0.5, 0.25)),
        (lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.1), (1.0, 1.0, 0.1)),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: float(k != 1)), (1.0, 0.0, 1.0)),
    ],
    ids=["exponential", "steps", "to zero and back"],
)
def test_schedulers(make: Callable[[Any], Any], factors: tuple[float, ...]) -> None:
    """The step size is the one that the scheduler set last; lr = 0 leaves the parameters where they are."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.04, nbeta=5.0, seed=SEED)
    scheduler = make(optimizer)
    for step, factor in enumerate(factors):
        before = _copies(params)
        _give_gradients(params, step)
        optimizer.step()
        scheduler.step()
        options = {"lr": 0.04 * factor, "nbeta": 5.0}
        _assert_close(
            params,
            [
                _expected(w, p.grad, w, offset, step, SEED, options)  # type: ignore[arg-type]
                for w, p, offset in zip(before, params, _offsets(params), strict=True)
            ],
        )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.002),
        ("nbeta", 7.0),
        ("localization", 9.0),
        ("weight_decay", 3.0),
        ("noise_level", 0.1),
        ("bounding_box_size", 0.01),
        ("seed", 3),
    ],
)
def test_every_option_can_be_changed_between_steps(option: str, value: float) -> None:
    """A step depends on what its group says now (w0 having been kept from the start)."""
    options = OPTIONS["everything"] | {"seed": SEED}
    params = _parameters()
    w0 = _copies(params)
    optimizer = llc_fast.SGLD(params, **options)
    for step, now in enumerate([options, options | {option: value}]):
        optimizer.param_groups[0].update(now)
        before = _copies(params)
        _give_gradients(params, step)
        optimizer.step()
    rule = {k: v for k, v in now.items() if k != "seed"}
    _assert_close(
        params,
        [
            _expected(w, p.grad, start, offset, 1, now["seed"], rule)  # type: ignore[arg-type]
            for w, p, start, offset in zip(before, params, w0, _offsets(params), strict=True)
        ],
    )


def test_options_that_change_in_place() -> None:
    """A step size kept in a tensor, decays kept in a list: what they hold now is what counts."""
    ends = []
    for in_place in (False, True):
        (w,) = _parameters([(6,)])
        lr, betas = torch.tensor(0.01), [0.9, 0.99]
        optimizer = llc_fast.AdamSGLD([w], lr=lr, betas=betas, seed=SEED)
        for step in range(2):
            _give_gradients([w], step)
            optimizer.step()
            if in_place:
                lr.mul_(3.0)
                betas[0] = 0.5
            else:
                optimizer.param_groups[0].update(lr=torch.tensor(0.03), betas=(0.5, 0.99))
        ends.append(w.detach())
    _assert_same_bits(ends[:1], ends[1:])


def test_mask_can_be_changed_between_steps() -> None:
    """A step depends on what its group says now, the mask included."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.01, seed=SEED)
    _give_gradients(params)
    optimizer.step()
    before = _copies(params)
    optimizer.param_groups[0]["optimize_over"] = torch.zeros(1, dtype=torch.bool)
    _give_gradients(params, 1)
    optimizer.step()
    _assert_same_bits(params, before)


@pytest.mark.parametrize("what", ["preconditioner", "initial_param"])
def test_tensors_can_be_replaced_between_steps(what: str) -> None:
    """Nothing is used again that was laid out for the tensor of before."""
    ends = []
    for steps_before in (0, 1):
        (w,) = _parameters([(6,)])
        start = w.detach().clone()
        optimizer = llc_fast.PreconditionedSGLD([w], lr=0.01, localization=9.0, seed=SEED)
        (group,) = optimizer.param_groups
        if steps_before:
            _give_gradients([w])
            optimizer.step()
            with torch.no_grad():
                w.copy_(start)
            group["step"] = torch.tensor(0)
        (group if what == "preconditioner" else optimizer.state[w])[what] = torch.linspace(1, 2, 6).double()
        _give_gradients([w], 1)
        optimizer.step()
        ends.append(w.detach())
    _assert_same_bits(ends[:1], ends[1:])


def test_what_the_rule_keeps_can_be_replaced_between_steps() -> None:
    """A step reads and writes the state that is there now, not the one that its table was built with."""
    (w,) = _parameters([(6,)])
    optimizer = llc_fast.RMSpropSGLD([w], lr=0.01, alpha=0.5, seed=SEED)
    _give_gradients([w])
    optimizer.step()
    old, new = optimizer.state[w]["state0"], torch.ones(6, dtype=torch.float64)
    kept = old.clone()
    optimizer.state[w]["state0"] = new
    _give_gradients([w], 1)
    optimizer.step()
    assert torch.equal(old, kept)
    torch.testing.assert_close(new, 0.5 + 0.5 * w.grad.square())


def test_zero_grad() -> None:
    """zero_grad forgets gradients (then nothing moves) or, asked to, zeroes them (then noise alone moves)."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.01, seed=SEED)
    before = _copies(params)
    _give_gradients(params)
    optimizer.zero_grad()
    optimizer.step()
    assert all(p.grad is None for p in params)
    _assert_same_bits(params, before)
    _give_gradients(params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    zero = [torch.zeros_like(w) for w in before]
    _assert_close(
        params,
        [
            _expected(w, z, w, offset, 1, SEED, {"lr": 0.01})
            for w, z, offset in zip(before, zero, _offsets(params), strict=True)
        ],
    )


def test_closure() -> None:
    """step(closure) evaluates it once, with gradients on, uses what it made and returns its value."""
    (w,), (v,) = _parameters([(6,)]), _parameters([(6,)])
    optimizer = llc_fast.SGLD([w], lr=0.01, nbeta=3.0, seed=SEED)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    expected = float(w.detach().square().sum())
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == expected
    other = llc_fast.SGLD([v], lr=0.01, nbeta=3.0, seed=SEED)
    v.square().sum().backward()
    assert other.step() is None
    _assert_same_bits([w], [v])


def test_gradients_are_left_alone() -> None:
    """A step reads gradients and does not write them; parameters still require a gradient."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, **OPTIONS["everything"], seed=SEED)
    _give_gradients(params)
    grads = _copies([p.grad for p in params])  # type: ignore[misc]
    optimizer.step()
    _assert_same_bits([p.grad for p in params], grads)  # type: ignore[misc]
    assert all(p.requires_grad and p.is_leaf for p in params)


@pytest.mark.filterwarnings("ignore:Using backward")  # of the cycle that is broken at the end
def test_gradients_with_a_graph_of_their_own() -> None:
    """backward(create_graph=True) changes nothing, and nothing that the optimizer keeps holds on to the graph."""
    ends = []
    for create_graph in (False, True):
        w = nn.Parameter(_random(20, seed=1))
        optimizer = llc_fast.RMSpropSGLD(
            [w], lr=0.01, localization=1.0, seed=SEED, relative_eps=True, metrics=["dws", "grad_norm"]
        )
        for _ in range(3):
            w.grad = None
            (w**4).sum().backward(create_graph=create_graph)
            optimizer.step()
        kept = [*optimizer.dws, optimizer.grad_norm, *optimizer.state[w].values()]
        assert not any(t.requires_grad for t in kept)
        ends.append(w.detach())
        w.grad = None
    _assert_same_bits(ends[:1], ends[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_through_parameters_that_moved_is_an_error(dtype: torch.dtype) -> None:
    """A graph that saved the old values refuses, as after a step of torch's own optimizers."""
    w, x = nn.Parameter(torch.ones(3, dtype=dtype)), torch.ones(3, dtype=dtype, requires_grad=True)
    loss = (w * x).sum()
    w.grad = torch.ones_like(w)
    llc_fast.SGLD([w], seed=SEED).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_released_gradient_under_a_running_backward_pass() -> None:
    """A parameter that moves before the rest of the backward pass has read it: an error, not a wrong gradient."""
    w, x = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = llc_fast.SGLD([w], seed=SEED, release_gradients=True)
    reads_w_late = (w.detach() * x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (reads_w_late + w.sum()).backward()
    assert optimizer.state_dict() and x.grad is None


def test_step_hooks_run() -> None:
    """torch's hooks around a step see this optimizer as any other."""
    params, seen = _parameters(), []
    optimizer = llc_fast.SGLD(params, seed=SEED)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    _give_gradients(params)
    optimizer.step()
    assert seen == ["before", "after"]


# --- Checkpoints and copies ---------------------------------------------------------------------------------


def _model(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(0.5 * _random(*p.shape, seed=100 * seed + k))
    return model


def _optimizer(model: nn.Module, **options: Any) -> llc_fast.SGLD:
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.003}, {"params": rest, "localization": 7.0}]
    chosen: dict[str, Any] = {
        "lr": 0.002,
        "nbeta": 40.0,
        "localization": 3.0,
        "bounding_box_size": 0.3,
        "seed": SEED,
    }
    return llc_fast.SGLD(groups, **chosen | options)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    for step in range(begin, end):
        x = _random(16, 4, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        (model(x) - x.prod(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def straight() -> list[Tensor]:
    """The parameters after ten steps without interruption."""
    model = _model(1)
    _train(model, _optimizer(model), 0, 10)
    return _copies(list(model.parameters()))


@pytest.mark.parametrize("route", ["plain", "file"])
@pytest.mark.parametrize("fresh_options", [{}, {"seed": 1, "localization": 0.0, "bounding_box_size": None}])
def test_checkpoint_continues_bit_for_bit(
    route: str,
    fresh_options: dict[str, Any],
    straight: list[Tensor],
) -> None:
    """Saved after five steps, loaded into a new optimizer over a copied model, whatever it was built with.

    The run is localized: the pull must be to where the first optimizer began, not to where it was saved.
    """
    model = _model(1)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, 5)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if route == "file":
        file = io.BytesIO()
        torch.save(states, file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
    other = _model(2)
    other.load_state_dict(states["model"])
    fresh = _optimizer(other, **fresh_options)
    fresh.load_state_dict(states["optimizer"])
    _train(other, fresh, 5, 10)
    _assert_same_bits(list(other.parameters()), straight)


def test_loading_a_checkpoint_goes_back(straight: list[Tensor]) -> None:
    """Loading an earlier state into the very optimizer that went on repeats what it did."""
    model = _model(1)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, 5)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    _train(model, optimizer, 5, 10)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    _train(model, optimizer, 5, 10)
    _assert_same_bits(list(model.parameters()), straight)


def test_earlier_state_dict_stays_behind() -> None:
    """Its step count is that of the moment it was taken, without a copy; groups count on their own."""
    first, second = _parameters([(3,), (4,)])
    optimizer = llc_fast.SGLD([{"params": [first]}, {"params": [second]}], seed=SEED)
    counts = []
    for step in range(3):
        saved = optimizer.state_dict()
        counts.append([group["step"] for group in saved["param_groups"]])
        _give_gradients([first, second], step)
        optimizer.step()
    assert [[int(c) for c in pair] for pair in counts] == [[0, 0], [1, 1], [2, 2]]
    assert all(isinstance(c, Tensor) and c.dtype == torch.int64 for pair in counts for c in pair)


def test_checkpoint_holds_masks(tmp_path: Any) -> None:
    """Masks are part of the state: a restored optimizer leaves the same elements alone."""
    params, others = _parameters(), _parameters()
    masks = [None, torch.tensor([True, False] * 3 + [True]), None, torch.zeros(1, 1, 4, dtype=torch.bool)]
    optimizer = llc_fast.SGLD(params, optimize_over=masks, localization=1.0, seed=SEED)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = llc_fast.SGLD(others, seed=1)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    start = _copies(others)
    for ps, opt in ((params, optimizer), (others, fresh)):
        _give_gradients(ps)
        opt.step()
    _assert_same_bits(others, params)
    assert torch.equal(others[3], start[3]) and not torch.equal(others[0], start[0])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_on_their_own(duplicate: Callable[[Any], Any], straight: list[Tensor]) -> None:
    """A copy of (model, optimizer) continues bit for bit, and neither's steps move the other's parameters."""
    model = _model(1)
    optimizer = _optimizer(model)
    _train(model, optimizer, 0, 5)
    other, fresh = duplicate((model, optimizer))
    here = _copies(list(model.parameters()))
    _train(other, fresh, 5, 10)
    _assert_same_bits(list(model.parameters()), here)
    _assert_same_bits(list(other.parameters()), straight)
    _train(model, optimizer, 5, 10)
    _assert_same_bits(list(model.parameters()), straight)


def test_training_loop() -> None:
    """Without noise it is gradient descent and fits a regression; with noise it stays near the fit."""
    x = _random(64, 4, seed=1, dtype=torch.float32)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 1.0
    model = nn.Linear(4, 1)

    def run(steps: int, **options: float) -> float:
        optimizer = llc_fast.SGLD(model.parameters(), seed=SEED, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return float(nn.functional.mse_loss(model(x), y).detach())

    assert run(200, lr=0.3, noise_level=0.0) < 1e-6
    fitted = _copies(list(model.parameters()))
    # nβ·L is half a χ² variable with five degrees of freedom: 2.5 on average.
    assert 0.05 < 1000 * run(300, lr=2e-4, nbeta=1000.0) < 15
    assert not torch.equal(model.weight, fitted[0])


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("lr", 0.0, ValueError, r"lr must be greater than 0, got 0"),
        ("lr", -0.5, ValueError, r"lr must be greater than 0, got -0\.5"),
        ("lr", math.nan, ValueError, r"lr must be finite, got nan"),
        ("lr", math.inf, ValueError, r"lr must be finite, got inf"),
        ("lr", "0.1", TypeError, r"lr must be a number, got '0\.1'"),
        ("lr", True, TypeError, r"lr must be a number, got True"),
        ("nbeta", -1, ValueError, r"nbeta must be at least 0, got -1"),
        ("nbeta", math.inf, ValueError, r"nbeta must be finite, got inf"),
        ("nbeta", None, TypeError, r"nbeta must be a number, got None"),
        ("localization", -2.0, ValueError, r"localization must be at least 0, got -2"),
        ("localization", math.nan, ValueError, r"localization must be finite, got nan"),
        ("weight_decay", -2.0, ValueError, r"weight_decay must be at least 0, got -2"),
        ("noise_level", -1.0, ValueError, r"noise_level must be at least 0, got -1"),
        ("noise_level", [1.0], TypeError, r"noise_level must be a number, got \[1\.0\]"),
        ("bounding_box_size", 0.0, ValueError, r"bounding_box_size must be greater than 0, got 0"),
        ("bounding_box_size", -1.0, ValueError, r"bounding_box_size must be greater than 0, got -1"),
        ("bounding_box_size", math.nan, ValueError, r"bounding_box_size must be finite, got nan"),
        ("seed", -1, ValueError, r"seed .*got -1"),
        ("seed", 2**64, ValueError, rf"seed .*got {2**64}"),
        ("seed", 1.5, TypeError, r"seed .*got 1\.5"),
        ("seed", True, TypeError, r"seed .*got True"),
        ("momentum", 0.9, TypeError, r"momentum"),
    ],
)
@pytest.mark.parametrize("where", ["everywhere", "in a group"])
def test_wrong_options(option: str, value: Any, error: type[Exception], message: str, where: str) -> None:
    """An option that is unknown, not finite or out of range: the message names it and the value."""
    params = _parameters()
    if where == "everywhere":
        with pytest.raises(error, match=message):
            llc_fast.SGLD(params, **{option: value})
    else:
        with pytest.raises(ValueError if option == "momentum" else error, match=message):
            llc_fast.SGLD([{"params": params, option: value}])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("nbeta", math.inf),
        ("localization", -0.5),
        ("weight_decay", -0.5),
        ("noise_level", -0.5),
        ("noise_level", math.nan),
        ("bounding_box_size", -0.5),
        ("bounding_box_size", math.nan),
    ],
)
def test_options_spoiled_between_steps(option: str, value: float) -> None:
    """A scheduler (or a person) that writes nonsense into a group gets an error, and nothing moves."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, **OPTIONS["everything"], seed=SEED)
    _give_gradients(params)
    optimizer.step()
    before = _copies(params)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option.removesuffix("_size")):
        optimizer.step()
    _assert_same_bits(params, before)


@pytest.mark.parametrize("option", ["localization", "bounding_box_size"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_switching_localization_on_later(option: str, steps_before: int) -> None:
    """w0 was not kept, so it is an error that says what to do, rather than a pull to somewhere else."""
    params = _parameters()
    optimizer = llc_fast.SGLD(params, lr=0.01, seed=SEED)
    for step in range(steps_before):
        _give_gradients(params, step)
        optimizer.step()
    before = _copies(params)
    optimizer.param_groups[0][option] = 0.5
    _give_gradients(params, 9)
    with pytest.raises(ValueError, match=f"{option}.*construct the optimizer with it"):
        optimizer.step()
    _assert_same_bits(params, before)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.zeros(3, dtype=torch.int64)], TypeError, "int64"),
        ([torch.zeros(3, dtype=torch.complex64)], TypeError, "complex64"),
        ([torch.zeros(3).to_sparse()], TypeError, "dense"),
        ([torch.zeros(3, device="meta")], ValueError, "meta"),
        ([torch.zeros(3), torch.zeros(3, device="meta")], ValueError, "meta"),
        (["weight"], TypeError, "str"),
        (torch.zeros(3), TypeError, "Tensor"),
    ],
    ids=[
        "none",
        "integer",
        "complex",
        "sparse",
        "meta",
        "mixed devices",
        "not a tensor",
        "not a list",
    ],
)
def test_wrong_parameters(params: Any, error: type[Exception], message: str) -> None:
    """Parameters that cannot be sampled are refused when the optimizer is built."""
    with pytest.raises(error, match=message):
        llc_fast.SGLD(params)


def test_mixed_dtypes_in_one_group() -> None:
    """A group may mix precisions; each tensor moves as it would in a group of its own."""
    values = [torch.zeros(3), torch.zeros(4).double(), torch.zeros(5).bfloat16(), torch.zeros(2)]
    together = [nn.Parameter(v.clone()) for v in values]
    apart = [nn.Parameter(v.clone()) for v in values]
    for params, groups in ((together, together), (apart, [{"params": [p]} for p in apart])):
        _give_gradients(params)
        optimizer = llc_fast.SGLD(groups, lr=0.01, localization=1.0, seed=SEED)
        optimizer.step()
        optimizer.step()
    _assert_same_bits(together, apart)
    assert all((p != 0).all() for p in together)


def test_sparse_gradient() -> None:
    """A sparse gradient is refused with the remedy, and nothing moves."""
    embedding = nn.Embedding(10, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = llc_fast.SGLD(embedding.parameters(), seed=SEED)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_unknown_option_lists_the_known_ones() -> None:
    """The message of a group's unknown option names every option there is."""
    with pytest.raises(ValueError, match="momentum") as caught:
        llc_fast.SGLD([{"params": _parameters(), "momentum": 0.9}])
    for option in (
        "lr",
        "nbeta",
        "localization",
        "weight_decay",
        "noise_level",
        "bounding_box_size",
        "optimize_over",
    ):
        assert option in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_equals_cpu(name: str) -> None:
    """The same run on a GPU gives the same parameters to rounding, checkpointed half-way."""
    cpu = _parameters()
    gpu = [nn.Parameter(p.detach().cuda()) for p in cpu]
    optimizers = [llc_fast.SGLD(ps, **OPTIONS[name], seed=SEED) for ps in (cpu, gpu)]
    for step in range(4):
        if step == 2:
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        for ps, optimizer in zip((cpu, gpu), optimizers, strict=True):
            for k, p in enumerate(ps):
                p.grad = _random(*p.shape, seed=1000 + 97 * step + k).to(p.device)
            optimizer.step()
    _assert_close([p.cpu() for p in gpu], _copies(cpu))


# ---- localization in the metric --------------------------------------------------------------------------------


def _moved_pair(**options: Any) -> tuple[Tensor, Tensor, Tensor, llc_fast.PreconditionedSGLD]:
    """w*, w and A, and an optimizer whose parameter is at w."""
    generator = torch.Generator().manual_seed(1)
    w0, away = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    metric = torch.rand(5, 3, dtype=torch.float64, generator=generator) + 0.1
    p = nn.Parameter(w0.clone())
    optimizer = llc_fast.PreconditionedSGLD(
        [p], lr=0.01, nbeta=7.0, localization=3.0, weight_decay=0.5, preconditioner=metric, seed=4, **options
    )
    with torch.no_grad():
        p.add_(away)
    p.grad = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return w0, p.detach().clone(), metric, optimizer


def test_localization_in_the_metric_pulls_outside_of_it() -> None:
    """w ← w − (ε/2)·{A·[nβ·g + μ·w] + γ(w − w*)} + √(εA)·ξ, and distances are in the metric."""
    w0, w, metric, optimizer = _moved_pair(
        localization_metric="sampler", metrics=["distance", "localization_loss", "dws", "noise"]
    )
    (p,) = optimizer.param_groups[0]["params"]
    grad = p.grad.clone()
    optimizer.step()
    noise = reference.normals(0, 15, NoiseKey(4, step=0)).reshape(5, 3)
    drift = metric * (7.0 * grad + 0.5 * w) + 3.0 * (w - w0)
    torch.testing.assert_close(p.detach(), w - 0.005 * drift + (0.01 * metric).sqrt() * noise, rtol=1e-13, atol=1e-13)
    found, squared = optimizer.metrics, float(((w - w0).square() / metric).sum())
    assert float(found["distance"]) == pytest.approx(math.sqrt(squared))
    assert float(found["localization_loss"]) == pytest.approx(1.5 * squared)
    torch.testing.assert_close(found["dws"][0], drift / metric)


def test_a_state_dict_from_before_localization_had_a_metric() -> None:
    w0, w, metric, optimizer = _moved_pair()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0].pop("localization_metric") is None
    optimizer.load_state_dict(saved)
    (p,) = optimizer.param_groups[0]["params"]
    grad = p.grad.clone()
    optimizer.step()
    noise = reference.normals(0, 15, NoiseKey(4, step=0)).reshape(5, 3)
    drift = metric * (7.0 * grad + 0.5 * w + 3.0 * (w - w0))
    torch.testing.assert_close(p.detach(), w - 0.005 * drift + (0.01 * metric).sqrt() * noise, rtol=1e-13, atol=1e-13)


def test_the_curvature_is_no_preconditioner_of_an_optimizer() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="preconditioner='curvature' is not possible in an optimizer"):
        llc_fast.PreconditionedSGLD([p], preconditioner="curvature")
    optimizer = llc_fast.PreconditionedSGLD([p], preconditioner=2.0)
    with pytest.raises(ValueError, match="localization_metric='round' is unknown"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "localization_metric": "round"})
    assert len(optimizer.param_groups) == 1
