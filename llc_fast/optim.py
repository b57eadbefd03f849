"""The samplers as ``torch.optim`` optimizers: drop-in replacements for a sampling loop of your own."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

import llc_fast.kernels.operator  # noqa: F401  registers torch.ops.llc_fast.step
from llc_fast import samplers
from llc_fast.kernels.memory import check_memory
from llc_fast.kernels.native import (
    NUM_STATES,
    NUM_SUMS,
    Gradients,
    Segment,
    SegmentTable,
    check_mask,
    check_tensor,
    is_low_precision,
    mark_written,
)
from llc_fast.kernels.sharding import (
    Axes,
    block_of,
    dtensor_like,
    is_dtensor,
    laid_out_like,
    local_gradient,
    local_part,
    local_segment,
    noise_like,
    sharded_axes,
    whole_of,
)
from llc_fast.kernels.step import SUMS, NoiseKey, StepScalars
from llc_fast.support.arguments import check_number
from llc_fast.support.torch_private import accumulation_hooks, is_observed

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Group = dict[str, Any]
State = MutableMapping[Tensor, dict[str, Any]]
_REPORTED_SUMS = ("grad", "distance", "weight", "noise")
"""The kernel sums that the norms in `_SUMMED` are made of."""
_SUMMED = ("noise_norm", "grad_norm", "weight_norm", "distance", "localization_loss")
_TENSORS = ("noise", "dws")
_NEED_REFERENCE = frozenset({"distance", "localization_loss"})
METRICS = (*_TENSORS, *_SUMMED)
"""What an optimizer can report of its last step, by devinterp's names."""
_DOC = """
{summary}

Names, defaults and meaning follow devinterp 1.3.2 where it has the sampler; the noise is a function of (seed, step,
element), so a run repeats bit for bit for any number of threads and any split into tensors.

{sampler}

Other parameters:
    params: parameters or parameter groups: float32 or float64; or bfloat16 or float16, whose chains are then kept in
        float32 beside the model (and written over whatever else changes the model in between). Groups may override
        every option. DTensors (``fully_shard``, ``distribute_tensor``) in Shard and Replicate placements make the same
        steps as the whole model; masks and preconditioners may then be whole.
    optimize_over: boolean mask, True where a parameter may move: one tensor that broadcasts to every parameter of the
        group, or a list with one tensor or None for each.
    metrics: what to measure on the way, see :attr:`metrics`; norms are summed in the same pass.
    seed: of the noise; None takes it from torch's global generator, which DTensors refuse: ranks must agree.
    release_gradients: move each parameter during the backward pass, as soon as its gradient is complete, and free the
        gradient: the same bits, without memory for all gradients at once. One backward pass a step.
    capturable: keep step count and scalars on the GPU, so that a step captured in a CUDA graph can be replayed.

Raises:
    TypeError, ValueError: an option that is unknown, not finite or out of range; parameters that are not dense
        floating-point tensors with data.
"""


# ---- one parameter group ---------------------------------------------------------------------------------------


_key_of = functools.partial(tuple.__new__, NoiseKey)  # in half the time of NoiseKey(…)
_Prepared: TypeAlias = tuple[
    Sequence[int], list[Tensor], int, list[Tensor], StepScalars, "list[_Table]", list[Gradients]
]
"""A step that is checked and can be taken: the numbers of the parameters that have a gradient, themselves, the step
count, their gradients, the scalars, the tables, and the gradients of each table."""


class _Stepper:
    """Steps one parameter group, and keeps what need not be made again at every step.

    It is given group and state each time, because torch replaces both when it loads a state_dict, and compares what it
    kept with what they hold now.

    Args:
        sampler: the rule.
        index: of the group.
        is_sharded: whether parameters are DTensors.
        is_capturable: whether step count and scalars are on the GPU, where a captured graph reads them.
        has_thermostat: whether the rule reads one, which the group keeps.
    """

    def __init__(
        self,
        sampler: type[samplers.Sampler],
        index: int,
        *,
        is_sharded: bool,
        is_capturable: bool,
        has_thermostat: bool,
    ) -> None:
        self._sampler, self._index = sampler, index
        self._is_sharded, self._is_capturable = is_sharded, is_capturable
        self._has_thermostat = has_thermostat
        self._numbers = operator.itemgetter(*(f.name for f in fields(sampler) if f.name != "preconditioner"))
        self._scalars: tuple[tuple[Any, ...], StepScalars] | None = None
        self._device_scalars: tuple[StepScalars, Tensor] | None = None
        self._seed: object = None  # the last one that was checked
        self._step: tuple[Tensor | None, np.ndarray] = (None, np.array(0))  # the count's tensor, and its memory
        self._layouts: dict[int | None, _Layout] = {}  # of the whole group, and of parameters that are moved alone

    def step(self, group: Group, state: State, report: _Report) -> Tensor | None:
        """One step; the sums that it leaves behind, if anybody wants them."""
        return self.take(group, state, report, self.prepare(group, state))

    def prepare(self, group: Group, state: State) -> _Prepared:
        """Check all that a step reads and writes; nothing moves.

        Raises:
            TypeError, ValueError, RuntimeError: it can't be taken.
        """
        step = 0 if self._is_capturable else self._count(group)
        live, params, grads = _gradients(group["params"])
        scalars = self.scalars(group)
        if not live:
            return live, params, step, grads, scalars, [], []
        if self._is_sharded:
            grads = [local_gradient(p, grad) for p, grad in zip(params, grads, strict=True)]
        tables, gradients = self._tables(None, group, state, live, params, grads)
        return live, params, step, grads, scalars, tables, gradients

    def take(self, group: Group, state: State, report: _Report, prepared: _Prepared) -> Tensor | None:
        """Take a step that was prepared; the sums that it leaves behind, if anybody wants them."""
        live, params, step, grads, scalars, tables, gradients = prepared
        sums = None
        if not live:
            self._end(group, step)
            return None
        if feedback := self._sampler.feedback_sums(group):
            masks = [_entry(group["optimize_over"], k) for k in live]
            with torch.no_grad():  # of gradients that have a graph themselves
                scalars = self._sampler.adapted(scalars, group, group, step, grads, masks)
        if report.wanted:
            report.keep_tensors(self._index, group, state, live)
        thermostat, part, device_scalars, device_step = group.get("thermostat"), None, None, None
        if self._is_capturable:
            device_scalars, device_step = self._scalars_on_device(scalars, params[0].device), group["step"]
        wanted, key = feedback + report.sums, _key_of((group["seed"], step, 0, 0))
        mark_written(params)
        for (_, table, axes), dense in zip(tables, gradients):  # noqa: B905  one for each; this runs at every step
            if wanted:
                part = torch.zeros(1, NUM_SUMS, dtype=torch.float64, device=params[0].device)
            table.run(dense, scalars, key, thermostat, part, wanted, device_scalars, device_step)
            if not table.is_sent:
                raise RuntimeError(
                    "gradients were moved since the last step, and their addresses can't be sent to the GPU while a "
                    "CUDA graph is captured: take a step before, and keep them in place (zero_grad(set_to_none=False))"
                )
            if part is not None:
                for mesh, axis in axes:
                    torch.distributed.all_reduce(part, group=mesh.get_group(axis))
                sums = part if sums is None else sums + part
        if feedback:
            assert sums is not None
            self._sampler.follow(scalars, group, step, sums, _count(group, live))
        self._end(group, step)
        return sums

    def _end(self, group: Group, step: int) -> None:
        if self._is_capturable:
            group["step"] += 1
            return
        # Written in place if the tensor is ours: its memory is NumPy's, where a number is written fast.
        tensor, number = self._step
        if group["step"] is not tensor:  # loaded, given by the user, or taken by a state_dict
            number = np.array(step)
            group["step"] = tensor = torch.from_numpy(number)
            self._step = tensor, number
        number[()] = step + 1

    def step_one(self, group: Group, state: State, k: int) -> None:
        """Move one parameter, whose gradient is complete, and free the gradient."""
        p: Tensor = group["params"][k]
        if p.grad is None:
            raise RuntimeError(
                f"the gradient of parameter {k} was freed before this optimizer could move the parameter: another one "
                "with release_gradients, or a hook, did so. Delete that one"
            )
        scalars, key = self.scalars(group), NoiseKey(group["seed"], self._count(group))
        [(_, table, _)], [gradients] = self._tables(k, group, state, [k], [p], [local_gradient(p, p.grad)])
        mark_written([p])  # the backward pass still runs: whoever needs the old values must hear of it
        table.run(gradients, scalars, key)
        p.grad = None

    def can_be_compiled(self, group: Group) -> bool:
        """Whether the step is one operation that torch.compile can keep in its graph."""
        return not (self._is_capturable or self._is_sharded or self._sampler.adapts_on_host(group))

    # ---- what is kept between steps ------------------------------------------------------------------------

    def scalars(self, group: Group) -> StepScalars:
        """The group's scalars, made and checked again only when one of its numbers has changed."""
        numbers = self._numbers(group)
        cached = self._scalars
        if cached is None or _differ(cached[0], numbers):
            cached = (numbers, _checked_scalars(self._sampler, group))
            if _is_constant(numbers):
                self._scalars = cached
        return cached[1]

    def _count(self, group: Group) -> int:
        """The group's step count, which is checked with its seed.

        Raises:
            TypeError, ValueError: not integers in their range.
        """
        if group["seed"] is not self._seed:
            _check_seed(group["seed"])
            self._seed = group["seed"]
        try:
            step = group["step"].item()
        except (AttributeError, RuntimeError, ValueError):  # not one number in a tensor or an array
            return _step_count(group["step"])
        return step if type(step) is int and 0 <= step < _MOST_STEPS else _step_count(step)

    def refresh_scalars(self, group: Group) -> None:
        """Hand the group's present hyperparameters to the next replay of a captured graph."""
        self._scalars_on_device(self._sampler.scalars(group), group["params"][0].device)

    def _scalars_on_device(self, scalars: StepScalars, device: torch.device) -> Tensor:
        """The scalars where a captured graph reads them; written again only when they change."""
        cached = self._device_scalars
        if cached is None:
            cached = (scalars, torch.tensor(scalars, dtype=torch.float64, device=device))
        elif cached[0] != scalars:
            cached[1].copy_(torch.tensor(scalars, dtype=torch.float64))
            cached = (scalars, cached[1])
        self._device_scalars = cached
        return cached[1]

    def _tables(
        self,
        slot: int | None,
        group: Group,
        state: State,
        live: Sequence[int],
        params: list[Tensor],
        grads: list[Tensor],
    ) -> tuple[list[_Table], list[Gradients]]:
        """Tables of `params`, numbers `live` of the group, and the gradients of each, checked.

        The tables are new ones if anything that they are built from is new or has changed.
        """
        facts, objects = _built_from(self._sampler, group, state, params, self._is_sharded)
        kept = self._layouts.get(slot)
        if (
            kept is not None
            and facts == kept.facts
            and len(objects) == len(kept.objects)
            and all(map(operator.is_, objects, kept.objects))
            and (checked := self._checked(kept.tables, group, grads)) is not None
        ):
            return kept.tables, checked
        _check_offset(group["offset"])
        _check_entries(group)
        for k, p in zip(live, params, strict=True):
            check_tensor(f"parameter {k}", p)
            _check_kept(self._sampler, f"parameter {k}", p, state[p])
            _follow_dtype(p, state[p])
        _, objects = _built_from(self._sampler, group, state, params, self._is_sharded)  # some may be new
        segments = _segments(self._sampler, group, state, live, self._is_sharded)
        buckets: dict[tuple[torch.dtype, Axes], list[int]] = defaultdict(list)
        for j, p in enumerate(params):
            buckets[p.dtype, sharded_axes(p)].append(j)
        tables = [
            _Table(position, SegmentTable(self._sampler.rule(), [segments[j] for j in position]), axes)
            for (_, axes), position in buckets.items()
        ]
        self._layouts[slot] = _Layout(facts, objects, tables)
        checked = self._checked(tables, group, grads)
        assert checked is not None  # nothing has run since
        return tables, checked

    def _checked(self, tables: list[_Table], group: Group, grads: list[Tensor]) -> list[Gradients] | None:
        """The gradients of each table, checked; None if a table's tensors have changed."""
        found = []
        for position, table, _ in tables:
            if self._has_thermostat or self._is_capturable:
                thermostat = group.get("thermostat")
                if self._has_thermostat and thermostat is None:
                    raise ValueError("the group has no thermostat: load a state_dict of this optimizer")
                table.check_cells(thermostat, None, None, group["step"] if self._is_capturable else None)
            gradients = table.checked(grads if len(tables) == 1 else [grads[j] for j in position])
            if gradients is None:
                return None
            found.append(gradients)
        return found


class _Table(NamedTuple):
    """Parameters of a group that one native call steps.

    Attributes:
        position: of its parameters, among those that have a gradient.
        table: their segments.
        axes: the mesh dimensions over which they are sharded, and sums have to be added up.
    """

    position: list[int]
    table: SegmentTable
    axes: Axes


class _Layout(NamedTuple):
    """A table for each dtype and way to shard, and what they were built from.

    The objects are compared by identity. Whether they still are what they were, the tables know.
    """

    facts: tuple[object, ...]
    objects: list[Any]
    tables: list[_Table]


def _built_from(
    sampler: type[samplers.Sampler], group: Group, state: State, params: list[Tensor], is_sharded: bool
) -> tuple[tuple[object, ...], list[Any]]:
    """What a table of `params` is built from: facts, and the objects that belong to them.

    This runs at every step, and is a good part of what an optimizer does in a small one.
    """
    masks, metric = group["optimize_over"], group.get("preconditioner")
    objects = [masks, metric, *params]
    if masks is not None and isinstance(masks, (list, tuple)):
        objects += masks
    if metric is not None and isinstance(metric, (list, tuple)):
        objects += metric
    for p in params:
        objects += state[p].values()
    if is_sharded:
        objects += list(map(local_part, filter(is_dtensor, objects)))
    return (sampler.needs_reference(group), group["offset"]), objects


def _check_kept(
    sampler: type[samplers.Sampler], name: str, p: Tensor, kept: dict[str, Any], needs_reference: bool = False
) -> None:
    """Check what is kept for a parameter: all that the rule needs, each like the parameter but for its precision.

    Raises:
        ValueError: something is missing or of another shape or device.
        TypeError: something is not a floating-point tensor.
    """
    states = [f"state{j}" for j in range(NUM_STATES[sampler.rule()])]
    if missing := [key for key in (*states, *(["initial_param"] if needs_reference else [])) if key not in kept]:
        raise ValueError(
            f"the optimizer's state of {name} has no {', '.join(missing)}: it is of another sampler or was changed. "
            "Load a state_dict of this optimizer"
        )
    for key in ("master", "initial_param", *states):
        if key not in kept:
            continue
        found = kept[key]
        if not isinstance(found, Tensor) or not found.is_floating_point():
            what = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"{key} of {name} must be a floating-point tensor, got {what}")
        if found.shape != p.shape or found.device != p.device:
            raise ValueError(
                f"{key} of {name} has shape {tuple(found.shape)} on {found.device}, the parameter {tuple(p.shape)} on "
                f"{p.device}: construct the optimizer when the model has its shape and device, or load a state_dict "
                "that fits"
            )
        if not is_dtensor(found):
            check_memory(f"{key} of {name}", found)


@torch.no_grad()
def _follow_dtype(p: Tensor, kept: dict[str, Any]) -> None:
    """Bring what is kept for a parameter to the precision that it has now: its model may have been converted.

    A bfloat16 or float16 parameter gets its float32 chain, which goes on from its values. A parameter that was one is
    the chain itself now: where it still is the rounded copy, it gets the chain's unrounded value.
    """
    if is_low_precision(p):
        if "master" not in kept:
            kept["master"] = p.detach().float().contiguous()
        wide = torch.float32
    else:
        wide = p.dtype
        if (master := kept.pop("master", None)) is not None:
            master = master.to(wide)
            is_copy = (p == master.bfloat16().to(wide)) | (p == master.half().to(wide))
            p.copy_(torch.where(is_copy, master, p))
    for name, value in kept.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != wide:
            kept[name] = value.to(wide)


def _segments(
    sampler: type[samplers.Sampler], group: Group, state: State, live: Sequence[int], is_sharded: bool = False
) -> list[Segment]:
    """The parameters `live` with all that belongs to them.

    Raises:
        ValueError: the step needs w*, which was not kept.
    """
    needs_reference, offsets, segments = sampler.needs_reference(group), _offsets(group), []
    for k in live:
        p = group["params"][k]
        kept = state[p]
        if needs_reference and "initial_param" not in kept:
            raise ValueError(
                "localization or bounding_box_size was switched on after construction, when w* was not kept: "
                "construct the optimizer with it"
            )
        segment = Segment(
            w=kept.get("master", p),  # the very tensors, not detached: tables look at them at every step
            offset=offsets[k],
            reference=kept.get("initial_param"),
            mask=_entry(group["optimize_over"], k),
            state=[kept[f"state{j}"] for j in range(NUM_STATES[sampler.rule()])],
            preconditioner=_entry(group.get("preconditioner", 1.0), k),
            copy=p if "master" in kept else None,
        )
        segments.append(local_segment(f"parameter {k}", p, segment) if is_sharded else segment)
    return segments


@torch.no_grad()
def _step_compiled(sampler: type[samplers.Sampler], group: Group, state: State) -> None:
    """The step of a group as one opaque operation that torch.compile can keep in its graph."""
    live, _, grads = _gradients(group["params"])
    if live:
        scalars, sums = sampler.scalars(group), None
        if sampler.feedback_sums(group):
            sums = torch.zeros(1, NUM_SUMS, dtype=torch.float64, device=group["params"][0].device)
        segments = _segments(sampler, group, state, live)
        torch.ops.llc_fast.step(
            [s.w for s in segments],
            grads,
            [s.reference for s in segments],
            [s.mask for s in segments],
            [t for s in segments for t in s.state],
            [s.preconditioner if isinstance(s.preconditioner, Tensor) else None for s in segments],
            [1.0 if isinstance(s.preconditioner, Tensor) else float(s.preconditioner) for s in segments],
            [s.copy for s in segments if s.copy is not None],
            sampler.rule(),
            [s.offset for s in segments],
            list(scalars),
            group["seed"],
            group["step"],
            group.get("thermostat"),
            sums,
            sampler.feedback_sums(group),
        )
        if sums is not None:
            sampler.follow(scalars, group, 0, sums, _count(group, live))
    # One graph for all steps: the count is a tensor for its sake, and computed in it.
    group["step"] = group["step"] + 1


def _gradients(params: list[Tensor]) -> tuple[Sequence[int], list[Tensor], list[Tensor]]:
    """The parameters that have a gradient: by number, themselves, and those gradients."""
    grads = [p.grad for p in params]
    live = [k for k, grad in enumerate(grads) if grad is not None]
    if len(live) == len(params):
        return live, params, grads  # type: ignore[return-value]
    return live, [params[k] for k in live], [grads[k] for k in live]  # type: ignore[misc]


_MOST_STEPS = 2**40  # as many as a NoiseKey can name


def _step_count(value: Any) -> int:
    """A step count that is not an int: as loaded from a state_dict, perhaps with every tensor cast to another dtype.

    Raises:
        TypeError, ValueError: not an integer in its range.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer)) or value != value // 1:
        raise TypeError(
            f"step must be an integer, or a tensor that holds one, got {value!r}: it counts the steps taken"
        )
    if not 0 <= value < _MOST_STEPS:
        raise ValueError(f"step must be between 0 and 2**40 - 1, got {value}: it counts the steps taken")
    return int(value)


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or None, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")


def _check_offset(offset: object) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {offset!r}: it says where in the noise the group's elements begin")
    if not 0 <= offset < 2**48:
        raise ValueError(
            f"offset must be between 0 and 2**48 - 1, got {offset}: it says where in the noise the group's elements "
            "begin"
        )


def _checked_scalars(sampler: type[samplers.Sampler], group: Group) -> StepScalars:
    """A group's scalars.

    Raises:
        TypeError, ValueError: a number is none, not finite or out of range; the message names it.
    """
    # A scheduler may set lr to 0, which is no step size to construct a sampler with.
    options = {f.name: group[f.name] for f in fields(sampler) if f.name != "preconditioner"}  # no number
    for name in ("lr", "nbeta"):
        if options[name] is not None and check_number(name, options[name], minimum=0) == 0:
            options[name] = 1.0
    sampler(**options)
    return sampler.scalars(group)


def _offsets(group: Group) -> list[int]:
    """Where in the noise each parameter begins."""
    offsets, total = [], group["offset"]
    for p in group["params"]:
        offsets.append(total)
        total += p.numel()
    return offsets


def _count(group: Group, live: Sequence[int]) -> int:
    """Elements that may move, on all ranks."""
    masks = ((group["params"][k], _entry(group["optimize_over"], k)) for k in live)
    return sum(p.numel() if m is None else int(whole_of(m.expand(p.shape).sum())) for p, m in masks)


def _differ(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    """Whether numbers have changed; whatever is no number counts as a change."""
    try:
        return before != now
    except RuntimeError:  # a tensor of several elements
        return True


def _is_constant(value: Any) -> bool:
    """Whether it can't change in place, as a tensor or a list could."""
    return all(map(_is_constant, value)) if isinstance(value, tuple) else isinstance(value, _CONSTANT)


_CONSTANT = (int, float, str, type(None))


def _check_entries(group: Group) -> None:
    """Raise TypeError or ValueError unless masks and preconditioners suit a group's parameters."""
    params: list[Tensor] = group["params"]
    if isinstance(given := group.get("preconditioner"), str):
        raise ValueError(
            f"preconditioner={given!r} is not possible in an optimizer, which has no data to estimate it with: pass "
            "tensors, or call estimate_llc"
        )
    for name in ("optimize_over", "preconditioner"):
        given = group.get(name)
        if isinstance(given, (list, tuple)) and len(given) != len(params):
            raise ValueError(f"{name} holds {len(given)} entries for {len(params)} parameters: give one for each")
        for entry in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(entry, Tensor) and not is_dtensor(entry):
                check_memory(name, entry)  # before anybody looks at values
    for k in range(len(params)):
        if (mask := _entry(group["optimize_over"], k)) is not None:
            check_mask("optimize_over", mask)


def _entry(value: Any, k: int) -> Any:
    """Options that may be given once for a group or once for each of its parameters."""
    return value[k] if isinstance(value, (list, tuple)) else value


# ---- metrics ---------------------------------------------------------------------------------------------------


class _Report:
    """What was asked for with ``metrics=``, of the last step."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.wanted = wanted
        self.sums = () if wanted.isdisjoint(_SUMMED) else _REPORTED_SUMS
        self.values: dict[str, Any] = {}

    def begin(self) -> None:
        self.values = {"noise": defaultdict(list), "dws": []}

    @torch.no_grad()
    def keep_tensors(self, index: int, group: Group, state: State, live: Sequence[int]) -> None:
        """The noise and the drift of the step to come, remade outside the kernel for callbacks that want tensors."""
        if self.wanted.isdisjoint(_TENSORS):
            return
        offsets = _offsets(group)
        for k in live:
            p = group["params"][k]
            kept = state[p]
            w = kept.get("master", p.detach())
            if "noise" in self.wanted:
                key = NoiseKey(seed=group["seed"], step=int(group["step"]))
                self.values["noise"][index].append(group["noise_level"] * noise_like(w, offsets[k], key))
            if "dws" in self.wanted:
                drift = group["nbeta"] * p.grad.to(w.dtype) + group["weight_decay"] * w
                if group["localization"]:
                    pull = group["localization"] * (w - kept["initial_param"])
                    if group.get("localization_metric") == "sampler":
                        pull = pull / laid_out_like(w, _entry(group["preconditioner"], k))
                    drift = drift + pull
                self.values["dws"].append(drift)

    def finish(self, sums: list[tuple[Group, Tensor | None]]) -> None:
        """The norms over all groups, as devinterp defines them."""
        columns = {name: k for k, name in enumerate(SUMS)}

        def total(name: str, factor: Callable[[Group], float] = lambda group: 1.0) -> Tensor:
            zero = torch.zeros((), dtype=torch.float64)
            return sum((factor(g) * m[0, columns[name]] for g, m in sums if m is not None), zero)

        self.values |= {
            "noise_norm": total("noise", lambda g: g["noise_level"] ** 2).sqrt(),
            "grad_norm": total("grad", lambda g: (0.5 * g["lr"] * g["nbeta"]) ** 2).sqrt(),
            "weight_norm": total("weight").sqrt(),
            "distance": total("distance").sqrt(),
            "localization_loss": total("distance", lambda g: 0.5 * g["localization"]),
        }


# ---- the optimizers --------------------------------------------------------------------------------------------


class LangevinOptimizer(torch.optim.Optimizer):
    """What the sampling optimizers share: w*, noise bookkeeping, the fused step, metrics.

    Everything that a step depends on lives in ``param_groups`` and ``state``, so that ``load_state_dict``
    continues a run bit for bit: each group carries its ``seed``, its ``step`` count and the ``offset`` of its
    first element in the noise; each parameter's state carries ``initial_param``, its w*, where the rule needs it, what
    the rule keeps (``state0``, ``state1``), and ``master``, the float32 parameters of a bfloat16 or float16 model.

    A subclass names its sampler; options, defaults, signature and documentation come from there.
    """

    sampler: ClassVar[type[samplers.Sampler]]

    def __init_subclass__(cls, sampler: type[samplers.Sampler], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.sampler = sampler
        rule = inspect.cleandoc(sampler.__doc__ or "").replace("Attributes:", "Args:")  # here they are arguments
        cls.__doc__ = _DOC.format(summary=cls.__doc__, sampler=rule)
        shared = list(inspect.signature(LangevinOptimizer.__init__).parameters.values())[1:-1]
        named = {p.name for p in shared}
        own = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default)
            for f in fields(sampler)
            if f.name not in named
        ]
        cls.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        nbeta: float = 1.0,
        localization: float = 0.0,
        weight_decay: float = 0.0,
        noise_level: float = 1.0,
        bounding_box_size: float | None = None,
        optimize_over: Tensor | Sequence[Tensor | None] | None = None,
        metrics: Sequence[str] | None = None,
        *,
        seed: int | None = None,
        release_gradients: bool = False,
        capturable: bool = False,
        **options: Any,
    ) -> None:
        self._seed_drawn = seed is None
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))  # follows torch.manual_seed
        if unknown := sorted(set(metrics or ()) - set(METRICS)):
            raise ValueError(f"metrics has no {', '.join(unknown)}; choose from: {', '.join(METRICS)}")
        if release_gradients and metrics:
            raise ValueError("release_gradients frees each gradient before a whole step exists: leave metrics out")
        given = dict(
            lr=lr,
            nbeta=nbeta,
            localization=localization,
            weight_decay=weight_decay,
            noise_level=noise_level,
            bounding_box_size=bounding_box_size,
            **options,
        )
        defaults = {f.name: f.default for f in fields(self.sampler)}
        if unknown := sorted(set(given) - set(defaults)):
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}; see help({type(self).__name__})"
            )
        self._wanted = frozenset(metrics or ())
        self._release, self._capturable = release_gradients, capturable
        self._report = _Report(self._wanted)
        self._steppers: list[_Stepper] = []
        self._hooks: list[Any] = []
        # A tensor, as in torch's own optimizers: torch.compile would build a new graph for each value of an int.
        bookkeeping = {"optimize_over": optimize_over, "seed": seed, "step": torch.tensor(0), "offset": 0}
        super().__init__(params, defaults | given | bookkeeping)

    # ---- groups and state ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = ("_wanted", "_release", "_capturable", "_seed_drawn")
        return super().__getstate__() | {k: self.__dict__[k] for k in own}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy, and whenever a state_dict is loaded
        super().__setstate__(state)
        self._report = _Report(self._wanted)
        self._steppers = [self._stepper(k, group) for k, group in enumerate(self.param_groups)]
        if "_hooks" not in self.__dict__:
            self._hooks = []
            if self._release:
                self._register_release()

    def _stepper(self, index: int, group: Group) -> _Stepper:
        is_sharded = any(map(is_dtensor, group["params"]))
        adaptation = self.sampler.initial_adaptation(self.defaults, torch.device("cpu"))
        return _Stepper(
            self.sampler,
            index,
            is_sharded=is_sharded,
            is_capturable=self._capturable,
            has_thermostat="thermostat" in adaptation,
        )

    def state_dict(self) -> dict[str, Any]:
        """As of torch's optimizers, but with step counts that do not move on with the optimizer."""
        saved = super().state_dict()
        for group in self.param_groups:
            if not self._capturable:
                group["step"] = torch.tensor(_step_count(group["step"]))
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict of this sampler's optimizer, in the precision and on the device of the parameters.

        Raises:
            TypeError, ValueError: it is of another sampler, or does not fit the parameters; nothing has changed then.
        """
        before = {"state": self.state, "param_groups": self.param_groups}  # torch replaces both
        super().load_state_dict(state_dict)
        try:
            self._adopt(state_dict)
        except BaseException:
            self.__setstate__(before)
            raise

    @torch.inference_mode(False)
    def _adopt(self, state_dict: dict[str, Any]) -> None:
        """Check what torch has loaded, and restore what it took for something else."""
        # torch casts floating-point state to the parameter's dtype; a float32 chain must not go through bfloat16.
        saved = state_dict["state"]
        ids = (k for group in state_dict["param_groups"] for k in group["params"])
        for k, p in zip(ids, (p for g in self.param_groups for p in g["params"]), strict=True):
            if is_low_precision(p):
                for name, value in saved.get(k, {}).items():
                    self.state[p][name] = value.to(p.device) if isinstance(value, Tensor) else value
        for index, group in enumerate(self.param_groups):
            expected = {f.name for f in fields(self.sampler)} | {"optimize_over", "seed", "step", "offset"}
            if "localization_metric" in expected:  # of a state_dict from before there was a choice
                group.setdefault("localization_metric", None)
            if missing := sorted(expected - group.keys()):
                raise ValueError(
                    f"state_dict's group {index} has no {', '.join(missing)}: it is of another optimizer than "
                    f"{type(self).__name__}"
                )
            _checked_scalars(self.sampler, group)
            _check_seed(group["seed"])
            _check_offset(group["offset"])
            _check_entries(group)
            # Tensors of groups stay as they were saved: on another device, or cast with all others.
            device = next((p.device for p in group["params"]), None)
            step = torch.tensor(_step_count(group["step"]))
            group["step"] = step.to(device) if self._capturable else step
            for name in self.sampler.initial_adaptation(group, torch.device("cpu")):
                if name not in group:
                    raise ValueError(f"state_dict's group {index} has no {name}: it is of another optimizer than "
                                     f"{type(self).__name__}")  # fmt: skip
                if isinstance(group[name], Tensor):
                    group[name] = group[name].to(device, torch.float64).clone().contiguous()
            needs = bool(self.sampler.needs_reference(group) or self._wanted & _NEED_REFERENCE)
            for k, p in enumerate(group["params"]):
                _check_kept(self.sampler, f"parameter {k} of group {index}", p, self.state[p], needs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; a group that is refused leaves no trace.

        Raises:
            TypeError, ValueError: as for the constructor.
        """
        unknown = sorted(set(param_group) - set(self.defaults) - {"params", "param_names"})
        if unknown:
            known = ", ".join(k for k in self.defaults if k not in ("step", "offset"))
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}; it takes: {known}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            states = self._prepare(group)
        except BaseException:
            self.param_groups.pop()
            raise
        for p, state in states.items():  # only now: nothing above may fail half-way
            self.state[p].update(state)
        self._steppers.append(self._stepper(len(self._steppers), group))
        if self._release:
            self._register_release()

    def _check(self, group: Group) -> None:
        """Raise TypeError or ValueError unless a step can be taken with these options and parameters."""
        _check_entries(group)
        self.sampler(**{k: v for k, v in group.items() if k in self.sampler.__dataclass_fields__})
        self.sampler.scalars(group)
        params: list[Tensor] = group["params"]
        seed, adapts_on_host = group["seed"], self.sampler.adapts_on_host(group)
        _check_seed(seed)
        for k, p in enumerate(params):
            check_tensor(f"parameter {k}", p)
            if p.is_inference():
                raise ValueError(
                    f"parameter {k} is an inference tensor, which can't be moved: clone() it outside of inference_mode"
                )
            if p.device != params[0].device:
                raise ValueError(
                    f"parameter {k} is on {p.device}, parameter 0 on {params[0].device}: use a group for each device"
                )
            if is_dtensor(p):
                block_of(f"parameter {k}", p)
                if self._seed_drawn and seed == self.defaults["seed"]:
                    raise ValueError(f"parameter {k} is a DTensor: pass seed=, the same number on every rank")
                if adapts_on_host:
                    raise ValueError(f"parameter {k} is a DTensor, whose scale no rank knows: leave relative_eps out")
        if self._release and self.sampler.needs_whole_step(group):
            raise ValueError("release_gradients frees each gradient early: no thermostat and no relative_eps with it")
        if self._capturable and params and params[0].device.type != "cuda":
            raise ValueError(f"capturable=True is for CUDA graphs; the parameters are on {params[0].device}")
        if self._capturable and adapts_on_host:
            raise ValueError("relative_eps=True reads a sum back to the host at every step: it can't be capturable")

    @torch.inference_mode(False)  # what is kept will be written to outside of it
    def _prepare(self, group: Group) -> dict[Tensor, dict[str, Any]]:
        """Complete a group by what its steps count and adapt; what is to be kept for each of its parameters."""
        params: list[Tensor] = group["params"]
        group["offset"] = sum(p.numel() for g in self.param_groups[:-1] for p in g["params"])
        if params and self._capturable:
            group["step"] = torch.zeros((), dtype=torch.int64, device=params[0].device)
        if params:
            group |= self.sampler.initial_adaptation(group, params[0].device)
        keeps_reference = self.sampler.needs_reference(group) or self._wanted & _NEED_REFERENCE
        states = {}
        for p, offset in zip(params, _offsets(group), strict=True):
            state = {}
            w = p.detach()
            if is_low_precision(p):
                state["master"] = w = w.float().contiguous()
            if keeps_reference:
                state["initial_param"] = w.clone(memory_format=torch.contiguous_format)
            for j, kept in enumerate(self._initial_state(w, offset, group)):
                state[f"state{j}"] = kept
            states[p] = state
        return states

    def _initial_state(self, w: Tensor, offset: int, group: Group) -> list[Tensor]:
        """What the rule keeps for a parameter whose first element is `offset` in the flat parameter vector."""
        if not is_dtensor(w):
            return self.sampler.initial_state(w, offset, group, group["seed"])
        starts = block_of("a parameter", w).starts
        runs = [
            self.sampler.initial_state(run, offset + start, group, group["seed"])
            for run, start in zip(local_part(w).reshape(len(starts), -1), starts, strict=True)
        ]
        return [dtensor_like(w, torch.cat(kept)) for kept in zip(*runs, strict=True)]

    # ---- the step ------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in one fused pass per group.

        With ``release_gradients`` the parameters were already moved during the backward pass; the call then ends
        the step.

        Args:
            closure: evaluates the loss and its gradients first, as for any torch optimizer.

        Returns:
            The closure's value, or None.
        """
        # torch wraps every optimizer's step for hooks and profiler, at more than this step's own cost: enter the
        # wrapper only when somebody is listening.
        if is_observed(self):
            return _HOOKED_STEP(self, closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]

    # Grad mode stays as it is: the native step takes addresses, and the rare arithmetic on gradients turns it off.
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._wanted and torch.compiler.is_compiling():  # what reports to the host breaks the graph
            outside: Callable[..., Any] = torch.compiler.disable(self._step)  # type: ignore[no-untyped-call]
            return outside(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._wanted:
            self._report.begin()
        groups, steppers, state, report, sums = self.param_groups, self._steppers, self.state, self._report, []
        if torch.compiler.is_compiling():
            for group, stepper in zip(groups, steppers):  # noqa: B905  as many of each; this runs at every step
                self._step_in_graph(group, stepper)  # without metrics
        else:
            prepared = []  # all groups, before one moves: an error leaves the parameters as they are
            for group, stepper in zip(groups, steppers):  # noqa: B905
                prepared.append(stepper.prepare(group, state))
            for group, stepper, ready in zip(groups, steppers, prepared):  # noqa: B905
                taken = stepper.take(group, state, report, ready)
                if report.sums:
                    sums.append((group, taken))
        if self._report.sums:
            self._report.finish(sums)
        return loss

    def _step_in_graph(self, group: Group, stepper: _Stepper) -> Tensor | None:
        """One step of a group while torch.compile looks on."""
        if stepper.can_be_compiled(group):
            _step_compiled(self.sampler, group, self.state)
            return None
        # What reads back to the host breaks the graph, and so does what talks to other ranks.
        outside: Callable[..., Tensor | None] = torch.compiler.disable(stepper.step)  # type: ignore[no-untyped-call]
        return outside(group, self.state, self._report)

    def refresh_scalars(self) -> None:
        """With ``capturable``: hand the groups' present hyperparameters to the next replay of a captured graph."""
        for group, stepper in zip(self.param_groups, self._steppers, strict=True):
            stepper.refresh_scalars(group)

    # ---- gradient release ----------------------------------------------------------------------------------

    def _register_release(self) -> None:
        """Step each parameter as soon as its gradient is complete, and free the gradient at once."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            p.register_post_accumulate_grad_hook(_Released(self, index, k))
            for index, group in enumerate(self.param_groups)
            for k, p in enumerate(group["params"])
            if p.requires_grad
        ]

    # ---- freezing, metrics ---------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop adapting the metric: from the next step on, draws come from a fixed one.

        Raises:
            TypeError: the sampler's metric does not adapt.
            RuntimeError: there was no step yet from whose gradients it could have been learned.
        """
        if self.sampler.metric != "adaptive":
            raise TypeError(f"{type(self).__name__} has no metric that adapts")
        if any(int(group["step"]) == 0 for group in self.param_groups):
            raise RuntimeError("freeze() before the first step: the metric has seen no gradient yet; take steps before")
        for group in self.param_groups:
            group["adapt_steps"] = int(group["step"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What was asked for with ``metrics=``, of the last step.

        ``noise_norm`` ‖σξ‖; ``grad_norm`` ‖(ε/2)·nβ·g‖; ``weight_norm`` ‖w‖ after the step; ``distance`` ‖w − w*‖ and
        ``localization_loss`` γ/2·‖w − w*‖² before it; ``noise`` σξ as tensors, by group; ``dws`` the drift nβ·g +
        γ(w − w*) + μw as a list of tensors. Each can also be read as an attribute of that name.
        """
        values = self._report.values
        return {name: values[name] for name in METRICS if name in self._wanted and name in values}

    def __getattr__(self, name: str) -> Any:
        if name in METRICS:
            report = self.__dict__.get("_report")
            if report is not None and name in report.wanted and name in report.values:
                return report.values[name]
            raise AttributeError(f"{name} was not measured: pass metrics=[{name!r}] and take a step first")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _Released:
    """The hook that moves a parameter in the backward pass, as long as its optimizer is there."""

    def __init__(self, optimizer: LangevinOptimizer, index: int, k: int) -> None:
        # A parameter would otherwise keep alive, and be moved by, an optimizer that nobody has any more.
        self._optimizer, self._index, self._k = weakref.ref(optimizer), index, k

    def __call__(self, p: Tensor) -> None:
        if (optimizer := self._optimizer()) is not None:
            for hook in list((accumulation_hooks(p) or {}).values()):
                if isinstance(hook, _Released) and hook._optimizer() not in (None, optimizer):
                    raise RuntimeError(
                        f"parameter {self._k} is moved by two optimizers with release_gradients, and one would free "
                        "the gradient before the other has read it: delete one of them"
                    )
            optimizer._steppers[self._index].step_one(optimizer.param_groups[self._index], optimizer.state, self._k)


_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(LangevinOptimizer._step)


def optimizer_for(sampler: type[samplers.Sampler]) -> type[LangevinOptimizer]:
    """The optimizer of a sampler: one of those below, or, for a sampler that has none there, a new class.

    Raises:
        ValueError: the sampler is Metropolis-adjusted, and needs to evaluate the loss itself.
    """
    name = sampler.__name__.removesuffix("Sampler")
    if sampler.kind == "metropolis":
        raise ValueError(
            f"{name} accepts or rejects by the loss over all data, which an optimizer does not see: use "
            f"estimate_llc(sampler={sampler.name!r})"
        )
    if not sampler.has_optimizer:
        raise ValueError(
            f"{name} needs the model's inputs and outputs, which an optimizer does not see: use "
            f"estimate_llc(sampler={sampler.name!r})"
        )
    for cls in LangevinOptimizer.__subclasses__():
        if cls.sampler is sampler:
            return cls
    namespace = {"__doc__": f"{name} as an optimizer, one fused pass per step.", "__module__": __name__}
    return types.new_class(name, (LangevinOptimizer,), {"sampler": sampler}, lambda ns: ns.update(namespace))


class SGLD(LangevinOptimizer, sampler=samplers.SGLDSampler):
    """SGLD as an optimizer, one fused pass per step."""


class PreconditionedSGLD(LangevinOptimizer, sampler=samplers.PreconditionedSGLDSampler):
    """SGLD in a fixed diagonal metric as an optimizer, one fused pass per step."""


class RMSpropSGLD(LangevinOptimizer, sampler=samplers.RMSpropSGLDSampler):
    """RMSprop-SGLD as an optimizer, one fused pass per step; :meth:`freeze` fixes its metric."""


class AdamSGLD(LangevinOptimizer, sampler=samplers.AdamSGLDSampler):
    """Adam-SGLD as an optimizer, one fused pass per step; :meth:`freeze` fixes its metric."""


class SGHMC(LangevinOptimizer, sampler=samplers.SGHMCSampler):
    """SGHMC as an optimizer, one fused pass per step."""


class SGNHT(LangevinOptimizer, sampler=samplers.SGNHTSampler):
    """SGNHT as an optimizer, one fused pass per step and one sum for the thermostat."""
