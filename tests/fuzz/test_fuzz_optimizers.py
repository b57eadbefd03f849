"""Optimizers under any sequence of steps and of what users do to tensors between them, against the specification.

A twin of each parameter holds what its chain, w* and states should be, in float64. Before a step all tensors must equal
the twin exactly. The step is then compared with the float64 rule to rounding, and the twin takes over the outcome.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fuzz import CALLS, fuzz_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from optimizers import OPTIMIZERS
from torch import Tensor, nn

from llc_fast.kernels import reference
from llc_fast.kernels.native import NUM_STATES
from llc_fast.kernels.step import NoiseKey, StepScalars

SAMPLERS = list(OPTIMIZERS)
OWN: dict[str, dict[str, Any]] = {
    "sgld": {},
    "preconditioned-sgld": {"preconditioner": 0.5},
    "rmsprop-sgld": {"alpha": 0.5, "eps": 1.0, "adapt_steps": 6},
    "adam-sgld": {"betas": (0.5, 0.75), "eps": 1.0, "adapt_steps": 6},
    "sghmc": {"momentum_decay": 0.25},
    "sgnht": {"diffusion_factor": 0.25},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = (torch.bfloat16, torch.float16)
SHAPES = [(), (1,), (7,), (0,), (3, 0), (4, 4), (2, 5), (3, 1, 4), (600,)]
SEEDS = st.integers(0, 2**20)


def _numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _double(t: Tensor) -> Tensor:
    """A copy: the twin must not share memory with what it is compared with."""
    return t.detach().resolve_neg().to(torch.float64, copy=True)


# ---- other memory, same values -------------------------------------------------------------------------------------


def _clone(t: Tensor) -> Tensor:
    return t.clone()


def _strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.permute(tuple(reversed(range(t.ndim)))).contiguous().permute(tuple(reversed(range(t.ndim))))


def _offset(t: Tensor) -> Tensor:
    return torch.cat([torch.full((3,), math.nan, dtype=t.dtype), t.reshape(-1)])[3:].view(t.shape)


def _negative(t: Tensor) -> Tensor:
    if t.dtype in LOW:
        return t.clone()
    return torch.complex(torch.zeros_like(t), -t).conj().imag


LAYOUTS = [_clone, _strided, _transposed, _offset, _negative]


def _share(t: Tensor) -> None:
    t.share_memory_()


def _can_be_resized(t: Tensor) -> bool:
    """Not memory that is mapped: torch 2.13 itself crashes when it resizes that of share_memory_()."""
    return t.untyped_storage().resizable() and not t.is_shared()


def _free_and_return(t: Tensor) -> None:
    if not _can_be_resized(t):
        return
    values, size = t.detach().clone(), t.untyped_storage().nbytes()
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(size)
    t.data.copy_(values)


def _relay(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def change(t: Tensor) -> None:
        t.data = layout(t.detach())

    change.__name__ = f"data = {layout.__name__}"
    return change


CHANGES = [_share, _free_and_return, *map(_relay, LAYOUTS)]


# ---- the twin ------------------------------------------------------------------------------------------------------


@dataclass
class Twin:
    """What a parameter's chain, w* and states should be: float64, the parameter's shape; and its mask."""

    w: Tensor
    start: Tensor
    states: list[Tensor]
    mask: Tensor | None

    def clone(self) -> Twin:
        return replace(self, w=self.w.clone(), start=self.start.clone(), states=[t.clone() for t in self.states])


def _chain_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in LOW else p.dtype


class OptimizerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[bytes, list[Tensor], list[Twin], list[dict[str, Any]]]] = []

    # ---- set up ----------------------------------------------------------------------------------------------------

    @initialize(
        sampler=st.sampled_from(SAMPLERS),
        localization=st.sampled_from([0.0, 2.0]),
        box=st.sampled_from([None, 0.5]),
        seed=SEEDS,
        parameters=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=4),
    )
    def construct(
        self,
        sampler: str,
        localization: float,
        box: float | None,
        seed: int,
        parameters: list[tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        CALLS[f"construct {sampler}"] += 1
        self.sampler, self.twins = sampler, []
        self.options = {"lr": 0.05, "nbeta": 3.0, "localization": localization, "bounding_box_size": box, "seed": seed}
        params = self._new_parameters(parameters, seed)
        self.optimizer = OPTIMIZERS[sampler](params, **self.options, **OWN[sampler])
        self._add_twins(self.optimizer.param_groups[0])

    def _new_parameters(self, parameters: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> list[nn.Parameter]:
        return [nn.Parameter(_numbers(shape, seed + k, dtype)) for k, (shape, dtype) in enumerate(parameters)]

    def _add_twins(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            states = [_double(self.optimizer.state[p][f"state{j}"]) for j in range(NUM_STATES[self.sampler])]
            self.twins.append(Twin(_double(p), _double(p), states, None))

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _kept(self, p: Tensor) -> dict[str, Tensor]:
        return self.optimizer.state[p]

    # ---- a step ----------------------------------------------------------------------------------------------------

    @rule(seed=SEEDS, layouts=st.lists(st.sampled_from([*LAYOUTS, None]), min_size=1, max_size=5), twice=st.booleans())
    def step(self, seed: int, layouts: list[Any], twice: bool) -> None:
        for attempt in range(1 + twice):  # the second finds everything as it was
            self._give_gradients(seed + 100 * attempt, layouts)
            self._take_step()

    def _give_gradients(self, seed: int, layouts: list[Any]) -> None:
        for k, p in enumerate(self.params):
            layout = layouts[k % len(layouts)]
            p.grad = None if layout is None else layout(_numbers(tuple(p.shape), seed + 7 * k, p.dtype))

    def _take_step(self) -> None:
        CALLS["step"] += 1
        groups = self.optimizer.param_groups
        expected = []
        twins = iter(self.twins)
        for group in groups:
            offset = group["offset"]
            for p in group["params"]:
                expected.append(None if p.grad is None else self._expected(group, p, next(twins), offset))
                if p.grad is None:
                    next(twins)
                offset += p.numel()
        thermostats = [group.get("thermostat", torch.zeros(1)).clone() for group in groups]
        counts = [int(group["step"]) for group in groups]
        self.optimizer.step()
        assert [int(group["step"]) for group in groups] == [c + 1 for c in counts]
        for k, (p, twin, outcome) in enumerate(zip(self.params, self.twins, expected, strict=True)):
            if outcome is not None:
                self._compare(f"parameter {k}", p, twin, *outcome)
        if self.sampler == "sgnht":
            self._compare_thermostats(thermostats)

    def _expected(self, group: dict[str, Any], p: Tensor, twin: Twin, offset: int) -> tuple[Any, Tensor]:
        """The coordinates after the step, and the size of the terms that are added up."""
        box = group["bounding_box_size"]
        scalars = StepScalars(
            group["lr"], group["nbeta"], group["localization"], group["weight_decay"], group["noise_level"],
            math.inf if box is None else box,
        )  # fmt: skip
        adapt = group.get("adapt_steps")
        scalars = scalars._replace(
            decay=group.get("alpha", group.get("betas", (0, 0))[1]),
            momentum_decay=group.get("betas", (0, 0))[0],
            eps=group.get("eps", 0.0),
            friction=group.get("momentum_decay", group.get("diffusion_factor", 0.0)),
            adapt_steps=math.inf if adapt is None else adapt,
        )
        key, n = NoiseKey(group["seed"], int(group["step"])), p.numel()
        assert p.grad is not None
        x = reference.Coordinates(
            grad=p.grad.detach().resolve_neg().double().reshape(-1),
            reference=twin.start.reshape(-1),
            noise=reference.normals(offset, n, key),
            w=twin.w.reshape(-1),
            thermostat=float(group.get("thermostat", 0.0)),
            preconditioner=group.get("preconditioner", 1.0),
            state=[t.reshape(-1) for t in twin.states],
        )
        away = (x.w - x.reference).abs()
        reference.RULES[self.sampler](x, scalars, key.step)
        force = (
            scalars.nbeta * (x.grad.abs() + 1)
            + scalars.localization * away
            + scalars.weight_decay * twin.w.abs().reshape(-1)
        )
        momentum = twin.states[0].abs().reshape(-1) if self.sampler.startswith("sg") and twin.states else 0
        return x, twin.w.abs().reshape(-1) + x.reference.abs() + 2 * scalars.lr * force + 8 * math.sqrt(
            scalars.lr
        ) + momentum

    def _compare(self, name: str, p: Tensor, twin: Twin, x: Any, terms: Tensor) -> None:
        """The outcome with the expected one; the twin takes it over."""
        kept, eps = self._kept(p), torch.finfo(_chain_dtype(p)).eps
        chain = kept["master"] if p.dtype in LOW else p.detach()
        assert chain.dtype == _chain_dtype(p)
        moved = torch.ones(p.shape, dtype=torch.bool) if twin.mask is None else twin.mask.expand(p.shape)
        flat = moved.reshape(-1)
        pairs = [("w", chain, x.w, twin.w)]
        pairs += [(f"state{j}", kept[f"state{j}"], x.state[j], twin.states[j]) for j in range(len(twin.states))]
        for what, found, wanted, before in pairs:
            got = found.resolve_neg().double().reshape(-1)
            bound = 64 * eps * (terms + x.grad.square() + wanted.abs() + 1)
            error = (got - wanted).abs()[flat]
            assert (error <= bound[flat]).all(), (
                f"{what} of {name} is off by {float((error / bound[flat]).max()):g} bounds"
            )
            if what == "w":
                assert torch.equal(got[~flat], before.reshape(-1)[~flat]), f"masked elements of {name} moved"
        if p.dtype in LOW:
            assert torch.equal(p.detach(), chain.to(p.dtype))
        twin.w = _double(chain)
        twin.states = [_double(kept[f"state{j}"]) for j in range(len(twin.states))]

    def _compare_thermostats(self, before: list[Tensor]) -> None:
        twins = iter(self.twins)
        for group, old in zip(self.optimizer.param_groups, before, strict=True):
            live = [(p, next(twins)) for p in group["params"]]
            live = [(p, twin) for p, twin in live if p.grad is not None]
            if not live:
                assert torch.equal(group["thermostat"], old)
                continue
            masks = [torch.ones(p.shape) if t.mask is None else t.mask.expand(p.shape).double() for p, t in live]
            count = max(1, sum(int(m.sum()) for m in masks))
            square = sum(float((t.states[0].square() * m).sum()) for (_, t), m in zip(live, masks, strict=True)) / count
            assert float(group["thermostat"]) == pytest.approx(float(old) + square - group["lr"], rel=1e-4, abs=1e-4)

    # ---- what users do -----------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(["lr", "nbeta", "noise_level", "weight_decay"]),
        value=st.floats(0.01, 0.1),
        place=st.integers(0, 9),
    )
    def change_option(self, name: str, value: float, place: int) -> None:
        CALLS["change an option"] += 1
        groups = self.optimizer.param_groups
        groups[place % len(groups)][name] = value

    @rule(place=st.integers(0, 9), what=st.integers(0, 9), change=st.sampled_from(CHANGES))
    def move_memory(self, place: int, what: int, change: Callable[[Tensor], None]) -> None:
        CALLS[f"memory: {change.__name__.strip('_')}"] += 1
        p = self.params[place % len(self.params)]
        tensors = [p, *self._kept(p).values()]
        change(tensors[what % len(tensors)])

    @rule(place=st.integers(0, 9), layout=st.sampled_from(LAYOUTS), wide=st.booleans())
    def replace_state(self, place: int, layout: Callable[[Tensor], Tensor], wide: bool) -> None:
        CALLS["replace the state"] += 1
        p = self.params[place % len(self.params)]
        self.optimizer.state[p] = {
            k: layout(v.double() if wide and k != "master" else v) for k, v in self._kept(p).items()
        }

    @rule(place=st.integers(0, 9))
    def transpose_in_place(self, place: int) -> None:
        p = self.params[place % len(self.params)]
        if p.shape != (4, 4) or p.dtype in LOW:  # there the float32 chain would undo it
            return
        CALLS["transpose in place"] += 1
        twin = self.twins[place % len(self.params)]
        p.data, twin.w = p.data.t(), twin.w.t()

    @rule(place=st.integers(0, 9), dtype=st.sampled_from(DTYPES), through=st.booleans())
    def convert(self, place: int, dtype: torch.dtype, through: bool) -> None:
        """As model.float() does; what is kept follows at the next step."""
        CALLS["convert a parameter"] += 1
        k = place % len(self.params)
        p, twin = self.params[k], self.twins[k]
        before, kept = p.dtype, self._kept(p)
        p.grad = None
        p.data = p.data.resolve_neg().to(dtype)
        if through and before in LOW and dtype in LOW:
            return  # the chain is float32 all along
        chain = torch.float32 if dtype in LOW else dtype
        if before in LOW and dtype in LOW:
            pass
        elif before in LOW:  # at the next step it gets the unrounded values
            rounded = [kept["master"].to(low).double() for low in LOW]
            is_copy = (_double(p) == rounded[0]) | (_double(p) == rounded[1])
            twin.w = torch.where(is_copy, twin.w.to(chain).double(), _double(p))
        else:
            twin.w = _double(p)
        twin.start, twin.states = twin.start.to(chain).double(), [t.to(chain).double() for t in twin.states]
        p.grad = torch.zeros_like(p, memory_format=torch.contiguous_format)
        others = [(q, q.grad) for q in self.params if q is not p]
        for q, _ in others:
            q.grad = None
        self._take_step()
        for q, grad in others:
            q.grad = grad

    @rule(place=st.integers(0, 9), seed=SEEDS, kind=st.sampled_from(["none", "full", "broadcast", "in place"]))
    def change_masks(self, place: int, seed: int, kind: str) -> None:
        CALLS["change masks"] += 1
        groups = self.optimizer.param_groups
        index = place % len(groups)
        group, first = groups[index], sum(len(g["params"]) for g in groups[:index])
        masks: Any = group["optimize_over"]
        if kind == "in place" and isinstance(masks, list):
            for mask in masks:
                mask.logical_not_()
        else:
            masks = None if kind == "none" else [
                _numbers(tuple(p.shape) if kind == "full" else tuple(1 for _ in p.shape), seed + k) > 0
                for k, p in enumerate(group["params"])
            ]  # fmt: skip
            group["optimize_over"] = masks
        for k in range(len(group["params"])):
            self.twins[first + k].mask = None if masks is None else masks[k]

    @precondition(lambda self: len(self.twins) < 8)
    @rule(
        seed=SEEDS,
        parameters=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=2),
    )
    def add_group(self, seed: int, parameters: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        CALLS["add a group"] += 1
        self.optimizer.add_param_group({"params": self._new_parameters(parameters, seed), "lr": 0.02})
        self._add_twins(self.optimizer.param_groups[-1])

    # ---- copies and files --------------------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        CALLS["save"] += 1
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        values = [p.detach().clone() for p in self.params]
        self.saved.append((file.getvalue(), values, [twin.clone() for twin in self.twins], []))

    @precondition(lambda self: self.saved)
    @rule(place=st.integers(0, 9))
    def load(self, place: int) -> None:
        CALLS["load"] += 1
        data, values, twins, _ = self.saved[place % len(self.saved)]
        state_dict = torch.load(io.BytesIO(data), weights_only=True)
        if len(state_dict["param_groups"]) != len(self.optimizer.param_groups):
            before = self._snapshot()
            with pytest.raises(ValueError):
                self.optimizer.load_state_dict(state_dict)
            self._assert_unchanged(before)
            return
        for p, value in zip(self.params, values, strict=True):
            p.grad = None
            p.data = value.clone()
        self.optimizer.load_state_dict(state_dict)
        self.twins = [twin.clone() for twin in twins]
        position = iter(self.twins)
        for group in self.optimizer.param_groups:  # the file has its own copies of masks
            for k in range(len(group["params"])):
                masks = group["optimize_over"]
                next(position).mask = None if masks is None else masks[k]

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        CALLS[f"go on with a {how}"] += 1
        for p in self.params:
            p.grad = None
        old = self.optimizer
        if how == "pickle" and any(t.is_neg() for p in self.params for t in [p, *self._kept(p).values()]):
            how = "deepcopy"
        self.optimizer = copy.deepcopy(old) if how == "deepcopy" else pickle.loads(pickle.dumps(old))
        masks = [m for g in self.optimizer.param_groups for m in (g["optimize_over"] or [None] * len(g["params"]))]
        for twin, mask in zip(self.twins, masks, strict=True):
            twin.mask = mask

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _snapshot(self) -> list[Tensor]:
        return [t.detach().clone() for p in self.params for t in [p, *self._kept(p).values()]]

    def _assert_unchanged(self, before: list[Tensor]) -> None:
        after = [t.detach() for p in self.params for t in [p, *self._kept(p).values()]]
        assert len(after) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    @rule(
        place=st.integers(0, 9),
        what=st.sampled_from(["step", "seed", "offset", "lr", "nbeta", "thermostat", "optimize_over"]),
        value=st.sampled_from([-1, 1.5, math.nan, "x", None, 2**70, 10**400, [1], torch.ones(2)]),
        seed=SEEDS,
    )
    def spoil_group(self, place: int, what: str, value: Any, seed: int) -> None:
        groups = self.optimizer.param_groups
        group = groups[place % len(groups)]
        fine = {"optimize_over": [None], "lr": [1.5, 2**70], "nbeta": [1.5, 2**70]}.get(what, [])
        if what not in group or any(value is v or value == v for v in fine if not isinstance(value, Tensor)):
            return
        self._give_gradients(seed, [_clone])
        self._refused(
            f"group: {what}", lambda: group.update({what: value}), group[what], lambda v: group.update({what: v})
        )

    def _refused(self, name: str, spoil: Callable[[], Any], good: Any, mend: Callable[[Any], Any]) -> None:
        CALLS[f"refused {name}"] += 1
        before = self._snapshot()
        spoil()
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            self.optimizer.step()
        assert len(str(caught.value)) > 20
        mend(good)
        self._assert_unchanged(before)

    @rule(
        place=st.integers(0, 9),
        what=st.integers(0, 9),
        kind=st.sampled_from(["missing", "shape", "int", "list", "meta"]),
        seed=SEEDS,
    )
    def spoil_state(self, place: int, what: int, kind: str, seed: int) -> None:
        p = self.params[place % len(self.params)]
        kept = self._kept(p)
        names = [name for name in kept if name != "master" or kind != "missing"]
        if not names or not p.numel():
            return
        name = names[what % len(names)]
        group = next(g for g in self.optimizer.param_groups if any(q is p for q in g["params"]))
        if kind == "missing" and name == "initial_param" and not (group["localization"] or group["bounding_box_size"]):
            return
        good = dict(kept)
        bad: Any = {
            "shape": torch.zeros(p.numel() + 1),
            "int": torch.zeros(p.shape, dtype=torch.int64),
            "list": [0.0],
            "meta": torch.zeros(p.shape, device="meta"),
        }.get(kind)
        self._give_gradients(seed, [_clone])
        before = self._snapshot()
        CALLS[f"refused state: {kind}"] += 1
        if kind == "missing":
            del kept[name]
        else:
            kept[name] = bad
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            self.optimizer.step()
        assert "parameter" in str(caught.value) or "construct the optimizer with it" in str(caught.value)
        self.optimizer.state[p] = good
        self._assert_unchanged(before)

    @rule(place=st.integers(0, 9), what=st.integers(0, 9), left=st.sampled_from([0, 1]), seed=SEEDS)
    def free_memory(self, place: int, what: int, left: int, seed: int) -> None:
        p = self.params[place % len(self.params)]
        self._give_gradients(seed, [_clone])
        assert p.grad is not None
        tensors = [p, p.grad, *self._kept(p).values()]
        lost = tensors[what % len(tensors)]
        size = lost.untyped_storage().nbytes()
        if not lost.numel() or size <= left or not _can_be_resized(lost):
            return
        CALLS["refused freed memory"] += 1
        before, values = self._snapshot(), lost.detach().clone()
        lost.untyped_storage().resize_(left)
        with pytest.raises(RuntimeError, match="it was freed or resized"):
            self.optimizer.step()
        lost.untyped_storage().resize_(size)
        lost.data.copy_(values)
        self._assert_unchanged(before)

    # ---- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def everything_is_where_the_twins_are(self) -> None:
        for p, twin in zip(self.params, self.twins, strict=True):
            kept = self._kept(p)
            if "initial_param" in kept and (p.dtype not in LOW):
                chain = kept["initial_param"].dtype
                assert torch.equal(kept["initial_param"].resolve_neg().double(), twin.start.to(chain).double()), (
                    "w* moved"
                )
            if p.dtype not in LOW and "master" not in kept:
                assert torch.equal(p.detach().resolve_neg().double(), twin.w)


TestOptimizers = OptimizerMachine.TestCase
TestOptimizers.settings = fuzz_settings(few=25, steps=30)
