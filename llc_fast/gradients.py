"""How the gradients of chains are computed: strategies behind one interface, and the rule that chooses one.

Each strategy gives the same losses and gradients up to rounding. What differs is what lies between the kernels: for a
network of a thousand parameters nearly all of the time, for one of a hundred million nearly all of the memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from llc_fast.data import Batch, IndexedSource, leaves, map_tensors
from llc_fast.posterior import Evaluation, Posterior, backward, leaves_of
from llc_fast.recording import NotReplayableError, Recording
from llc_fast.reference import NoiseKey
from llc_fast.samplers import Sampler
from llc_fast.state import ChainState

STRATEGIES = ("sequential", "batched", "compiled", "cuda-graph")

_BATCHED_FLOPS = 1.5e7
"""Floating-point operations of one chain's gradient below which chains are batched on a CPU: a kernel then takes no
longer than it takes to get to the next."""
_REPLAYED_FLOPS = 1e10
"""Below which a CPU replays recorded kernels; above, what is saved does not show and all intermediates are kept."""
_SINGLE_THREAD_FLOPS = 1.2e8
"""Below which a single chain runs on one thread. A gradient of that size takes about a millisecond; handing work to
other threads costs more than it saves, and on a busy machine it can cost ten times the step."""
_MAX_GROUP = 16
_WORKER_PARAMETERS = 5_000_000
"""Above which chains share one buffer, one after another, instead of running side by side."""
LARGE_MODEL = 10_000_000
"""Parameters above which memory counts more than time: gradients are consumed during the backward pass, so that they
are never all in memory."""


@dataclass(frozen=True)
class Plan:
    """How chains are run.

    Attributes:
        strategy: one of :data:`STRATEGIES`.
        group_size: chains that step together.
        num_workers: groups that run side by side, each in a thread.
        num_threads: threads inside one worker's kernels; None: as many as torch is set to use.
        replay: whether kernels are recorded and replayed.
        release: whether each gradient is consumed and freed during the backward pass.
        asked: whether the user named the strategy, so that no other may take its place.
        reason: why, in words.
    """

    strategy: str
    group_size: int
    num_workers: int
    num_threads: int | None
    replay: bool
    release: bool
    asked: bool
    reason: str


def make_plan(
    posterior: Posterior,
    sampler: Sampler,
    num_chains: int,
    *,
    strategy: str | None = None,
    release_gradients: bool | None = None,
    has_observables: bool = False,
    failed: Mapping[str, str] | None = None,
) -> Plan:
    """Choose a strategy, or complete the one that was asked for.

    The choice is a rule on what a trial gradient was measured to be: its floating-point operations, its memory, what
    it reads and writes. It looks at no clock, so that equal seeds give equal bits on a busy machine and an idle one.
    It does not fall on strategies that `failed`, for the reason given there, which the plan passes on.

    Raises:
        ValueError: the strategy is unknown or can't run this model, these data or this sampler; the message says why.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; choose one of: {', '.join(STRATEGIES)}, or None")
    cuda = posterior.device.type == "cuda"
    apart = _why_apart(posterior, sampler)
    uncaptured = _why_not_captured(posterior, sampler, has_observables)
    asked, failed = strategy is not None, failed or {}
    if strategy is None and release_gradients:
        strategy = "sequential"
    elif strategy is None:
        is_small = posterior.num_parameters <= _WORKER_PARAMETERS
        is_quick = is_small and posterior.flops <= _BATCHED_FLOPS
        if is_small and not apart and not uncaptured and "cuda-graph" not in failed:
            strategy = "cuda-graph"
        elif is_quick and not apart and num_chains > 1 and "batched" not in failed:
            strategy = "batched"
        else:
            strategy = "sequential"
    elif strategy in ("batched", "cuda-graph") and apart:
        raise ValueError(f'strategy={strategy!r} is not possible here: {apart}; use strategy="sequential"')
    elif strategy == "cuda-graph" and uncaptured:
        raise ValueError(f'strategy="cuda-graph" {uncaptured}')
    elif strategy == "compiled" and (posterior.writes_buffers or posterior.microbatch_size is not None):
        why = "the model writes to its buffers" if posterior.writes_buffers else "it takes minibatches as a whole"
        raise ValueError(f'strategy="compiled" is not possible here: {why}; use strategy="sequential"')

    measured = sampler.measures(vars(sampler))
    can_release = not measured and strategy == "sequential"
    if release_gradients and not can_release:
        why = f"{type(sampler).__name__} needs the whole gradient" if measured else f"strategy={strategy!r} keeps it"
        raise ValueError(f"release_gradients=True is not possible: {why}")
    release = can_release and (
        posterior.num_parameters > LARGE_MODEL if release_gradients is None else release_gradients
    )
    group = 1
    if strategy in ("batched", "cuda-graph") or (strategy == "compiled" and not apart):
        group = min(num_chains, _MAX_GROUP if strategy == "batched" and not asked else num_chains)
    replay = (
        not cuda
        and strategy in ("sequential", "batched")
        and not release
        and _can_be_replayed(posterior)
        and posterior.flops * group <= _REPLAYED_FLOPS
    )
    workers, threads = 1, None
    if not cuda:
        # Side by side only without the model: functional_call writes to the module while it runs.
        if replay and posterior.num_parameters <= _WORKER_PARAMETERS:
            workers = min(-(-num_chains // group), torch.get_num_threads())
        idle = torch.get_num_threads() // workers
        threads = 1 if posterior.flops * group < _SINGLE_THREAD_FLOPS else max(1, idle)
    size = f"{posterior.flops / 1e6:.3g} MFLOP a gradient"
    reason = "; ".join(failed.values()) or ("asked for" if asked else f"{size}, {apart}" if apart else size)
    return Plan(strategy, group, workers, threads, replay, release, asked, reason)


def _why_apart(posterior: Posterior, sampler: Sampler) -> str:
    """Why chains can't be batched; empty if they can."""
    if not isinstance(posterior.source, IndexedSource):
        return "a loader gives one minibatch at a time"
    if not posterior.has_tensor_batches:
        return "batches hold more than tensors"
    if posterior.is_random:
        return "the model draws random numbers"
    if posterior.writes_buffers or posterior.writes_batch:
        return "the model writes to its buffers or its input"
    if posterior.microbatch_size is not None:
        return "microbatches are for models that fill the memory"
    if getattr(sampler, "relative_eps", False):
        return "relative_eps follows one chain's gradients"
    return ""


def _why_not_captured(posterior: Posterior, sampler: Sampler, has_observables: bool) -> str:
    """Why a step can't be one CUDA graph, and what to do about it; empty if it may."""
    if posterior.device.type != "cuda":
        return f"needs a CUDA device, got device={str(posterior.device)!r}"
    if sampler.adjusted_by_metropolis:
        return f'is not made for sampler={sampler.name!r}; use strategy="batched"'
    if has_observables:
        return 'can\'t stop for observables; use strategy="batched"'
    if not _can_be_replayed(posterior):
        return "can't read minibatches by the data set's own code; use strategy=\"batched\", or give tensors"
    return ""


def _can_be_replayed(posterior: Posterior) -> bool:
    """Whether minibatches stay in one place and the model is a function of its parameters and its input alone."""
    source = posterior.source
    stays = isinstance(source, IndexedSource) and source.is_thread_safe and posterior.has_tensor_batches
    return stays and not (posterior.is_random or posterior.writes_buffers or posterior.writes_batch)


# ---- minibatches -------------------------------------------------------------------------------------------


class Feed:
    """The minibatches of a group of chains, in memory that stays where it is if the data are addressed by index.

    Batches have a leading dimension for the chains, except for a single chain, and for a batch that is the whole data
    set, which all chains share.
    """

    def __init__(self, posterior: Posterior, seed: int, first_chain: int, num_chains: int, start: int) -> None:
        self._source, self._copies = posterior.source, posterior.writes_batch
        self._key = NoiseKey(seed, chain=first_chain)
        self._iterator: Iterator[Batch] | None = None
        self.is_shared = False
        if not isinstance(self._source, IndexedSource) or not posterior.has_tensor_batches:
            self._iterator = self._source.minibatches(seed, first_chain, start)
            return
        self._indices = self._source.index_buffer(num_chains)
        self.is_shared = self._source.is_full_batch
        if self.is_shared:
            self._batch = self._source.gather(self._indices[0])
            return
        flat = self._source.gather(self._source.draw(self._key._replace(step=start), self._indices))
        self._flat = leaves(flat)
        shape = (num_chains, -1) if num_chains > 1 else (-1,)
        self._batch = map_tensors(lambda t: t.view(*shape, *t.shape[1:]), flat)

    @property
    def is_pure(self) -> bool:
        """Whether minibatches are functions of (seed, chain, step), or come from a user's ``__getitem__``."""
        return not isinstance(self._source, IndexedSource) or self._source.is_thread_safe

    @property
    def indices(self) -> Tensor:
        """Which samples the last minibatch holds, ``[num_chains, batch_size]``, of data addressed by index."""
        return self._indices

    @property
    def is_addressable(self) -> bool:
        """Whether the minibatch of any step can be had at any time, without a trace."""
        return self._iterator is None and self.is_pure

    def __call__(self, step: int, device_step: Tensor | None = None) -> Batch:
        """The minibatch of this step; a new one overwrites the one before."""
        if self._iterator is not None:
            batch = next(self._iterator)
        else:
            batch = self._batch
            if not self.is_shared:
                assert isinstance(self._source, IndexedSource)
                indices = self._source.draw(self._key._replace(step=step), self._indices, device_step)
                self._source.gather(indices, out=self._flat)
        return copy.deepcopy(batch) if self._copies else batch


# ---- strategies --------------------------------------------------------------------------------------------


class Gradient(Protocol):
    """Evaluates a minibatch, then moves the chains by its gradient."""

    def evaluate(self, batch: Batch) -> Evaluation:
        """Losses ``[num_chains]``, and per sample ``[num_chains, batch]`` if the loss function gives them."""
        ...

    def gradients(self) -> list[Tensor]:
        """Of the last evaluation, in the order of the parameters, instead of a move, and only once.

        With several chains they have a leading dimension.
        """
        ...

    def move(self, step: int) -> None:
        """One step of the sampler by the gradient of the last evaluation."""
        ...


class EagerGradient:
    """One chain by ordinary autograd, with a gradient buffer that lives for one step, or less."""

    def __init__(self, posterior: Posterior, state: ChainState, buffers: dict[str, Tensor], release: bool) -> None:
        self._posterior, self._state, self._buffers, self._release = posterior, state, buffers, release
        self._params = leaves_of(state.single())

    def evaluate(self, batch: Batch) -> Evaluation:
        pieces = self._posterior.pieces(batch)
        losses, samples = [], []
        for k, (piece, share) in enumerate(pieces):
            evaluation = self._posterior.evaluate(self._params, piece, self._buffers, share)
            self._last = evaluation.loss
            if k + 1 < len(pieces):
                self._last.backward()  # type: ignore[no-untyped-call]
            losses.append(self._last.detach())
            samples += [] if evaluation.samples is None else [evaluation.samples.detach()]
        self._accumulates = len(pieces) > 1
        loss = torch.stack(losses).sum(dtype=torch.float64) if len(losses) > 1 else losses[0]
        return Evaluation(loss.reshape(1), torch.cat(samples)[None] if samples else None)

    def gradients(self) -> list[Tensor]:
        params = list(self._params.values())
        if not self._accumulates:
            return list(torch.autograd.grad(self._last, params, materialize_grads=True))
        self._last.backward()  # type: ignore[no-untyped-call]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p in params:
            p.grad = None
        return grads

    def move(self, step: int) -> None:
        if not self._release:
            return self._state.move(self.gradients(), step)
        waiting = set(self._params)
        self._state.start_parts()

        def take(name: str, grad: Tensor) -> None:
            waiting.discard(name)
            self._state.move_one(name, grad, step)
            # The step wrote behind autograd's back; what still needs the old value must raise, not go on.
            torch.autograd.graph.increment_version(self._params[name])

        backward(self._last, self._params, take)
        for name in waiting:  # what the loss did not use still feels noise and localization
            self._state.move_one(name, torch.zeros_like(self._params[name]), step)


class BatchedGradient:
    """All chains of a group at once: ``torch.func.vmap`` over the forward pass, ordinary autograd through it.

    The gradient of the sum of the chains' losses is each chain's own gradient, since no loss depends on two chains.
    (``torch.func.grad`` inside vmap would do the same, and import torch's whole compiler to do it.)
    """

    def __init__(
        self, posterior: Posterior, state: ChainState, buffers: dict[str, Tensor], shared_batch: bool, compiled: bool
    ) -> None:
        self._state = state
        self._params = leaves_of(state.params() if state.num_chains > 1 else state.single())
        # On a CPU vmap would run fused attention chain by chain, with a warning; products of matrices it batches.
        batched = state.num_chains > 1 and posterior.device.type == "cpu"

        def value(params: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.MATH) if batched else contextlib.nullcontext():
                loss, samples = posterior.evaluate(params, batch, buffers)
            return loss, loss if samples is None else samples  # vmap returns tensors only

        self._has_samples = posterior.per_sample
        function: Callable[..., tuple[Tensor, Tensor]] = value
        if state.num_chains > 1:
            function = vmap(value, in_dims=(0, None if shared_batch else 0))
        self._function = torch.compile(function, dynamic=False) if compiled else function
        self._ones: Tensor | None = None

    def evaluate(self, batch: Batch) -> Evaluation:
        self._losses, samples = self._function(self._params, batch)
        if self._ones is None:
            self._ones = torch.ones_like(self._losses)
        losses, chains = self._losses.detach(), self._state.num_chains
        return Evaluation(losses.reshape(chains), samples.detach().reshape(chains, -1) if self._has_samples else None)

    def gradients(self) -> list[Tensor]:
        params = list(self._params.values())
        return list(torch.autograd.grad(self._losses, params, self._ones, materialize_grads=True))

    def move(self, step: int) -> None:
        self._state.move(self.gradients(), step)


def check_replay(replayed: Sequence[Tensor], fresh: Sequence[Tensor]) -> None:
    """Raise NotReplayableError unless a replay gave what the model itself does, to rounding."""
    for ours, theirs in zip(replayed, fresh, strict=True):
        rounding = torch.finfo(theirs.dtype).eps
        slack = max(1e-5, rounding) * float(theirs.detach().nan_to_num().abs().max())
        if not torch.allclose(ours, theirs.detach(), rtol=max(1e-3, 4 * rounding), atol=slack, equal_nan=True):
            raise NotReplayableError("a replay differs from the model")


class ReplayedGradient:
    """The kernels of another strategy, recorded once; see :mod:`llc_fast.recording`.

    Raises:
        NotReplayableError: the model can't be recorded, or a replay does not give what it should.
    """

    def __init__(self, inner: EagerGradient | BatchedGradient, state: ChainState, feed: Feed, step: int) -> None:
        batch = feed(step)

        def both() -> tuple[Evaluation, list[Tensor]]:
            return inner.evaluate(batch), inner.gradients()

        self._recording, self._state = Recording(both), state
        self._evaluation: Evaluation = self._recording.result[0]
        self._grads: list[Tensor] = self._recording.result[1]
        self._check(both, feed, step)

    def _check(self, both: Callable[[], tuple[Evaluation, list[Tensor]]], feed: Feed, step: int) -> None:
        """A replay elsewhere must agree with the function itself: the model may not do the same each time."""
        feed(step + 1)
        with self._state.displaced():
            try:
                self._recording.replay()
            except RuntimeError as error:
                raise NotReplayableError(f"a kernel can't be replayed: {error}") from error
            evaluation, grads = both()
        check_replay((self._evaluation.loss, *self._grads), (evaluation.loss, *grads))
        feed(step)

    def evaluate(self, batch: Batch) -> Evaluation:
        self._recording.replay()
        return self._evaluation

    def gradients(self) -> list[Tensor]:
        return self._grads

    def move(self, step: int) -> None:
        self._state.move(self._grads, step)


def make_gradient(
    plan: Plan, posterior: Posterior, state: ChainState, buffers: dict[str, Tensor], feed: Feed, step: int
) -> tuple[Gradient, str]:
    """The strategy of a plan for a group of chains, and why it could not be recorded, if it should have been."""
    inner: EagerGradient | BatchedGradient
    if plan.strategy == "sequential" or (plan.strategy == "batched" and state.num_chains == 1):
        inner = EagerGradient(posterior, state, buffers, plan.release)
    else:
        inner = BatchedGradient(posterior, state, buffers, feed.is_shared, plan.strategy == "compiled")
    note = ""
    if plan.replay:
        try:
            return ReplayedGradient(inner, state, feed, step), ""
        except NotReplayableError as error:
            note = str(error)
    if plan.strategy == "batched" and isinstance(inner, BatchedGradient):
        inner.evaluate(feed(step))  # what can't be batched has to show while there is a way back
    return inner, note
