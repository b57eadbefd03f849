"""How the gradients of chains are computed; :mod:`llc_fast.gradients.plan` picks one of these strategies."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from llc_fast.data import Batch, map_tensors
from llc_fast.gradients.branches import Branches
from llc_fast.gradients.memory import held_bytes
from llc_fast.gradients.minibatches import Feed
from llc_fast.gradients.plan import STRATEGIES, Plan
from llc_fast.gradients.replay import NotReplayableError, OtherPathError, Recording
from llc_fast.objective.objective import Evaluation, Objective, batchable_attention, leaves_of
from llc_fast.samplers.state import ChainState

_T = TypeVar("_T")
_NOBODY = contextlib.nullcontext()
Info = Mapping[str, Any]
"""What a transition knows of itself, by the names in ``Sampler.traces``, ``[num_chains]`` each."""


class Transition(Protocol):
    """Evaluates a minibatch, then moves the chains."""

    def evaluate(self, batch: Batch) -> Evaluation:
        """Losses ``[num_chains]``, and per sample ``[num_chains, batch]`` if the loss function gives them."""
        ...

    def move(self, step: int) -> Info:
        """One step of the sampler, after an evaluation."""
        ...


class Gradient(Transition, Protocol):
    """A transition by the gradient of the last evaluation."""

    def gradients(self) -> list[Tensor]:
        """Of the last evaluation, in the order of the parameters, instead of a move, and only once.

        With several chains they have a leading dimension.
        """
        ...

    def at_reference(self, batch: Batch) -> Tensor:
        """What the minibatches lose at w*, evaluated as for the chains, ``[num_chains]``."""
        ...

    def forget(self) -> None:
        """Forget what is kept from call to call: constants, and the last evaluation with its graph."""
        ...


class EagerGradient:
    """One chain by ordinary autograd, with a gradient buffer that lives for one step, or less."""

    def __init__(self, objective: Objective, state: ChainState, buffers: dict[str, Tensor], release: bool) -> None:
        self._objective, self._state, self._buffers, self._release = objective, state, buffers, release
        self._params = state.single()
        self._last = torch.empty(0)
        self._targets = dict(zip(objective.reference, objective.targets, strict=True))
        self._most_held = held_bytes(objective) if release else 0

    @property
    def written(self) -> list[Tensor]:
        """Memory of the chain's own that an evaluation writes to: statistics of batches."""
        return list(self._buffers.values()) if self._objective.trial.writes_buffers else []

    @property
    def aliases(self) -> dict[int, Tensor]:
        """The chain's memory by the identity of the parameter that stands for it."""
        return {id(p): self._params[name] for name, p in self._targets.items()}

    def evaluate(self, batch: Batch) -> Evaluation:
        """Differentiated at once, unless gradients are to be consumed as they come."""
        objective = self._objective
        pieces = objective.pieces(batch)
        losses, samples = [], []
        self._found: list[Tensor] | None = None
        with objective.holding(self._params, self._buffers):
            for k, (piece, share) in enumerate(pieces):
                evaluation = objective.loss(piece, share)
                losses.append(evaluation.loss.detach())
                samples += [] if evaluation.samples is None else [evaluation.samples.detach()]
                self._last = evaluation.loss
                if k + 1 < len(pieces) or not self._release:
                    self._add(objective.gradients(self._last))
                    self._last = losses[-1]  # without its graph
        loss = torch.stack(losses).sum(dtype=torch.float64) if len(losses) > 1 else losses[0]
        return Evaluation(loss.reshape(1), torch.cat(samples)[None] if samples else None)

    @torch.no_grad()
    def _add(self, grads: list[Tensor]) -> None:
        """Gradients of microbatches add up."""
        if self._found is None:
            self._found = grads
        else:
            for total, grad in zip(self._found, grads, strict=True):
                total += grad

    def gradients(self) -> list[Tensor]:
        if self._release:
            with self._objective.holding(self._params, self._buffers):  # backward looks at parameters, too
                self._add(self._objective.gradients(self._last))
        assert self._found is not None
        found, self._found = self._found, None
        return found

    def forget(self) -> None:
        self._last, self._found = torch.empty(0), None

    def at_reference(self, batch: Batch) -> Tensor:
        # The function that chains evaluate, which may depend on what they have written to their buffers.
        objective, buffers = self._objective, self._buffers
        if objective.trial.writes_buffers:
            buffers = {name: b.clone() for name, b in buffers.items()}
        same = objective.trial.is_same_without_grad and not objective.trial.is_random  # of these nobody can say
        with torch.set_grad_enabled(not same):
            return objective.minibatch_loss(objective.reference, batch, buffers).reshape(1)

    def move(self, step: int) -> Info:
        if not self._release or self._found is not None:
            self._state.move(self.gradients(), step)
            return self._state.info()
        waiting = set(self._params)
        self._state.start_parts()
        held: dict[str, Tensor] = {}
        room = self._most_held

        def take(name: str, grad: Tensor) -> None:
            nonlocal room
            waiting.discard(name)
            held[name] = grad
            room -= grad.nbytes
            if room < 0:
                move_held()

        def move_held() -> None:
            nonlocal room
            self._state.move_some(held, step)
            for name in held:
                # The step wrote behind autograd's back; what still needs the old value must raise, not go on.
                torch.autograd.graph.increment_version(self._targets[name])
            held.clear()
            room = self._most_held

        with self._objective.holding(self._params, self._buffers):
            self._objective.consume_gradients(self._last, take)
            if held:
                move_held()
        for name in waiting:  # what the loss did not use still feels noise and localization
            self._state.move_some({name: torch.zeros_like(self._params[name])}, step)
        return self._state.info()


class BatchedGradient:
    """All chains of a group at once: ``torch.func.vmap`` over the forward pass, ordinary autograd through it.

    The gradient of the sum of the chains' losses is each chain's own gradient, since no loss depends on two chains.
    (``torch.func.grad`` inside vmap would do the same, and import torch's whole compiler to do it.)
    """

    def __init__(
        self, objective: Objective, state: ChainState, buffers: dict[str, Tensor], shared_batch: bool, compiled: bool
    ) -> None:
        self._state = state
        self._params = leaves_of(state.params() if state.num_chains > 1 else state.single())
        batched = state.num_chains > 1

        def value(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
            with batchable_attention(objective.device) if batched else contextlib.nullcontext():
                loss, samples = objective.functional(params, batch, buffers)
            return loss, loss if samples is None else samples  # vmap returns tensors only

        self._has_samples = objective.per_sample
        function: Callable[..., tuple[Tensor, Tensor]] = value
        self._at_reference = function
        if state.num_chains > 1:
            batches = None if shared_batch else 0
            function = vmap(value, in_dims=(0, batches))
            self._at_reference = vmap(value, in_dims=(None, batches), out_dims=None if shared_batch else 0)
        self._function = torch.compile(function, dynamic=False) if compiled else function
        self._reference = objective.reference
        self._ones: Tensor | None = None
        self._losses = torch.empty(0)

    @property
    def written(self) -> list[Tensor]:
        """Memory of the chain's own that an evaluation writes to."""
        return []

    def evaluate(self, batch: Batch) -> Evaluation:
        torch.clear_autocast_cache()  # of the caller's autocast: these leaves have moved
        self._losses, samples = self._function(self._params, batch)
        if self._ones is None:
            self._ones = torch.ones_like(self._losses)
        losses, chains = self._losses.detach(), self._state.num_chains
        return Evaluation(losses.reshape(chains), samples.detach().reshape(chains, -1) if self._has_samples else None)

    def forget(self) -> None:
        self._ones = None  # a recording that makes it itself knows that it is constant
        self._losses = torch.empty(0)

    @torch.no_grad()  # what torch.func evaluates is the same function without gradients, or it would not be batched
    def at_reference(self, batch: Batch) -> Tensor:
        return self._at_reference(self._reference, batch)[0].expand(self._state.num_chains)

    def gradients(self) -> list[Tensor]:
        params = list(self._params.values())
        return list(torch.autograd.grad(self._losses, params, self._ones, materialize_grads=True))

    def move(self, step: int) -> Info:
        self._state.move(self.gradients(), step)
        return self._state.info()


def check_replay(
    replayed: Sequence[Tensor], fresh: Sequence[Tensor], rounding: float = 0.0, largest: float = 0.0
) -> None:
    """Raise NotReplayableError unless a replay gave what the model itself does, to rounding: their dtype's, or more.

    Beside the `largest` gradient of a model one that is zero in exact arithmetic is nothing but rounding.
    """
    for ours, theirs in zip(replayed, fresh, strict=True):
        if not theirs.numel():
            continue
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                raise NotReplayableError("a replay differs from the model")
            continue
        rounding = max(rounding, torch.finfo(theirs.dtype).eps)
        slack = max(1e-5, rounding) * _size(theirs) + rounding * largest
        if not torch.allclose(ours, theirs.detach(), rtol=max(1e-3, 4 * rounding), atol=slack, equal_nan=True):
            raise NotReplayableError("a replay differs from the model")


def _size(t: Tensor) -> float:
    """Of its largest element."""
    return float(t.detach().nan_to_num().abs().max()) if t.numel() and t.is_floating_point() else 0.0


_TRIED = 8
"""Minibatches that are tried where Python looks at values: in most of them it has to find what it found before."""
_SAME_WAY = "Python looks at a tensor's values, and goes another way from minibatch to minibatch"


class ReplayedGradient:
    """The kernels of another strategy, recorded once and replayed; see :mod:`llc_fast.gradients.replay`.

    A minibatch on which Python would go another way than it did is left to the other strategy. Recorded are the first
    minibatches of a chain, whatever the step: a run that is resumed has the same bits.

    Args:
        objective, inner, state, feed: of the chains.
        step: whose minibatch is in the feed's memory afterwards.
        model: entered where the user's own code runs, but for here.
        evaluates_reference: whether :meth:`at_reference` is to be recorded, too.

    Raises:
        NotReplayableError: the model can't be recorded, or a replay does not give what it should.
    """

    def __init__(
        self,
        objective: Objective,
        inner: EagerGradient | BatchedGradient,
        state: ChainState,
        feed: Feed,
        step: int,
        model: contextlib.AbstractContextManager[object],
        evaluates_reference: bool,
    ) -> None:
        self._inner, self._state, self._model = inner, state, model
        self._feed, self._tried = feed, 1 if feed.is_shared else _TRIED
        self._written = inner.written
        batch = feed(0)
        self._on_gpu = on_gpu = objective.device.type == "cuda"

        def both() -> tuple[Evaluation, list[Tensor]]:
            evaluation, grads = inner.evaluate(batch), inner.gradients()
            # What the step would copy: on a GPU beside other kernels, on a CPU a product may be written so at once.
            return evaluation, [g.contiguous() for g in grads]

        aliases = inner.aliases if isinstance(inner, EagerGradient) else {}
        self._recording = self._recorded(both, aliases)
        self._evaluation, self._grads = self._recording.result
        self._found = self._grads
        self._replay = Branches(self._recording, objective.device).replay if on_gpu else self._recording.replay
        self._reference: Recording[Tensor] | None = None
        if evaluates_reference:
            reference = zip(objective.targets, objective.reference.values(), strict=True)
            with contextlib.suppress(NotReplayableError, RuntimeError):
                self._reference = self._recorded(lambda: inner.at_reference(batch), {id(p): w for p, w in reference})
        feed(step)

    def _recorded(self, function: Callable[[], _T], aliases: Mapping[int, Tensor]) -> Recording[_T]:
        """A recording, compared with the function itself elsewhere: the model may not do the same each time.

        Raises:
            NotReplayableError: it does not, or Python looks at values that differ from minibatch to minibatch.
        """
        first = 0
        for _ in range(2):
            self._feed(first)
            self._inner.forget()
            with self._as_they_were():
                recording = Recording(function, aliases, self._written, reuses_memory=not self._on_gpu)
            if self._on_gpu and (recording.num_guards or any(d.type == "cpu" for d in recording.devices)):
                raise NotReplayableError("values go to the CPU, which synchronizes with the GPU")
            if not recording.num_guards:
                followed = [first + 1]
                break
            if self._written:
                raise NotReplayableError("Python looks at a tensor's values, and the model writes to its buffers")
            followed = self._followed(recording)
            if 2 * len(followed) >= self._tried:
                break
            first = next((k for k in range(self._tried) if k not in followed), first)  # the other way may be the usual
        else:
            raise NotReplayableError(_SAME_WAY)
        self._feed(next((k for k in followed if k != first), followed[0]))
        with self._state.displaced():
            try:
                with self._as_they_were() as replayed:
                    recording.replay()
            except RuntimeError as error:
                raise NotReplayableError(f"a kernel can't be replayed: {error}") from error
            with self._as_they_were() as fresh:
                result = function()
            largest = max(map(_size, _tensors_of(result)[1:]), default=0.0)
            check_replay([*_tensors_of(recording.result), *replayed], [*_tensors_of(result), *fresh], largest=largest)
        return recording

    @contextlib.contextmanager
    def _as_they_were(self) -> Iterator[list[Tensor]]:
        """Afterwards the chain's buffers are as before; what was written to them is in the list then."""
        before, found = [b.clone() for b in self._written], list[Tensor]()
        try:
            yield found
        finally:
            found += [b.clone() for b in self._written]
            for b, value in zip(self._written, before, strict=True):
                b.copy_(value)

    def _followed(self, recording: Recording[Any]) -> list[int]:
        """The minibatches on which Python finds what it found when it was recorded."""
        found = []
        with self._state.displaced():
            for k in range(self._tried):
                self._feed(k)
                with contextlib.suppress(OtherPathError):
                    recording.replay()
                    found.append(k)
        return found

    def evaluate(self, batch: Batch) -> Evaluation:
        try:
            self._replay()
        except OtherPathError:
            with self._model:
                evaluation = self._inner.evaluate(batch)
                self._found = self._inner.gradients()
            return evaluation
        self._found = self._grads
        return self._evaluation

    @property
    def by_python(self) -> str:
        """Which recorded kernels Python runs, and why; empty: none, or on a GPU."""
        return "" if self._on_gpu else self._recording.program.described

    def gradients(self) -> list[Tensor]:
        return self._found

    def forget(self) -> None:
        self._inner.forget()

    def at_reference(self, batch: Batch) -> Tensor:
        if self._reference is not None:
            with contextlib.suppress(OtherPathError):
                self._reference.replay()
                return self._reference.result
        with self._model:
            return self._inner.at_reference(batch)

    def move(self, step: int) -> Info:
        self._state.move(self._found, step)
        return self._state.info()


def _tensors_of(result: Any) -> list[Tensor]:
    """Loss and gradients of an evaluation, or a loss alone."""
    return [result] if isinstance(result, Tensor) else [result[0].loss, *result[1]]


def make_gradient(
    plan: Plan,
    objective: Objective,
    state: ChainState,
    buffers: dict[str, Tensor],
    feed: Feed,
    step: int,
    *,
    model: contextlib.AbstractContextManager[object] = _NOBODY,
    evaluates_reference: bool = False,
) -> tuple[Gradient, str]:
    """The strategy of a plan for a group of chains, and why it could not be recorded, if it should have been.

    Args:
        plan: which.
        objective, state, buffers, feed: of the chains.
        step: whose minibatch is in the feed's memory afterwards.
        model: entered by a strategy that may call the user's code though it was recorded, but for here.
        evaluates_reference: whether :meth:`Gradient.at_reference` will be needed.
    """
    inner: EagerGradient | BatchedGradient
    if plan.strategy == "sequential" or (plan.strategy == "batched" and state.num_chains == 1):
        inner = EagerGradient(objective, state, buffers, plan.release)
    else:
        inner = BatchedGradient(objective, state, buffers, feed.is_shared, plan.strategy == "compiled")
    # What can't be batched, or goes wrong, has to show while there is a way back.
    if isinstance(inner, BatchedGradient) and feed.is_addressable and not _changes(objective):
        _check_against_the_model(inner, objective, state, feed, step)
    elif isinstance(inner, BatchedGradient) and plan.strategy == "batched":
        inner.evaluate(feed(step))
    note = ""
    if plan.replay:
        try:
            return ReplayedGradient(objective, inner, state, feed, step, model, evaluates_reference), ""
        except NotReplayableError as error:
            note = str(error)
    return inner, note


_DISPLACED, _WRONG, _WRONG_IF_ROUNDED = (0.3, 0.2, 0.5), 2e-3, 0.1
"""Distances from w*, relative to its size, at which gradients are compared, and the relative difference that is too
large at all of them; the latter also where something is computed in less than float32."""


class WrongGradientError(Exception):
    """What a strategy gives is not the gradient of the model."""


@torch.no_grad()
def _check_against_the_model(
    inner: BatchedGradient, objective: Objective, state: ChainState, feed: Feed, step: int
) -> None:
    """The first chain's gradient must be that of ordinary autograd with the chain's parameters in the model.

    A backward pass that looks at the model's own parameters, as a custom one or recomputed activations do, finds w*
    there: chains in one batch are given to the model as arguments, and these are gone by then.

    Raises:
        WrongGradientError: it is another.
    """
    batch, size = feed(step), state.w.square().mean().sqrt()
    alone = batch if feed.is_shared or state.num_chains == 1 else map_tensors(lambda t: t[0], batch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(state.w.shape, generator=generator, dtype=torch.float32).to(state.w) * size
    for distance in _DISPLACED:
        with state.at(state.w + distance * noise), torch.enable_grad():
            losses = inner.evaluate(batch).loss
            found = inner.gradients()
            inner.forget()
            with objective.holding(state.single(), objective.fresh_buffers()):
                loss = objective.loss(alone).loss
                expected = objective.gradients(loss)
        own = [g if state.num_chains == 1 else g[0] for g in found]
        off = max(_difference(own, expected), _difference([losses[0]], [loss]))
        if not off > (_WRONG if objective.is_precise else _WRONG_IF_ROUNDED):  # equal, or not finite
            return
    raise WrongGradientError(
        f"chains get other gradients in a batch than one by one, {off:.0%} off (a custom backward that reads the "
        "module's parameters, or activations that are recomputed?)"
    )


def _changes(objective: Objective) -> bool:
    """Whether one evaluation says nothing of the next."""
    trial = objective.trial
    return trial.is_random or trial.writes_batch or trial.writes_buffers


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a − b‖ / ‖b‖"""
    off = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    size = sum(float(y.double().square().sum()) for y in b)
    return math.sqrt(off / size) if size else math.inf if off else 0.0


_SPEAKS_OF_BATCHING = re.compile(r"vmap|functorch|[Bb]atching rule|BatchedTensor")


def is_refusal(error: Exception, plan: Plan, objective: Objective, state: ChainState, feed: Feed, step: int) -> bool:
    """Whether an error while a strategy was set up is the strategy's fault, so that another one may take its place.

    Only of strategies with ``may_refuse``, and by kind: what can't be replayed; memory that ran out; an operation that
    vmap does not know. A bug of the model is none of these. An operation of torch that fails in a batch without a word
    of vmap is vmap's fault if one chain alone, on its own minibatch, passes it.
    """
    if isinstance(error, WrongGradientError):
        return True
    if not STRATEGIES[plan.strategy].may_refuse:
        return False
    if isinstance(error, (NotReplayableError, torch.cuda.OutOfMemoryError)):
        return True
    if not isinstance(error, (RuntimeError, NotImplementedError, UserWarning)):
        return False
    if _SPEAKS_OF_BATCHING.search(str(error)):
        return True
    batch = feed(step)
    alone = batch if feed.is_shared or state.num_chains == 1 else map_tensors(lambda t: t[0], batch)
    try:
        objective.evaluate(state.single(), alone, objective.fresh_buffers())
    except Exception:
        return False
    return True
