"""Runs chains: batches, gradients, fused updates, loss traces."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llc_fast.posterior import Posterior
from llc_fast.reference import NoiseKey
from llc_fast.samplers import Sampler
from llc_fast.update import NUM_METRICS, NUM_STATES, Segment, SegmentTable, is_low_precision

_ALIGN = 16  # elements: each tensor of a chain starts on a cache line

_SINGLE_THREAD_WORK = 2e7
"""Parameters × batch size below which one thread is used on a CPU.

A gradient of that size takes about a millisecond. Below, handing work to other threads costs more than it saves,
and on a busy machine it can cost ten times the step. A fixed rule, not a measurement, so that equal seeds give
equal bits: matrix products round differently with another number of threads.
"""


@dataclass(frozen=True)
class Schedule:
    """How long a chain runs and which of its steps are draws.

    Attributes:
        num_draws: losses that enter λ̂.
        num_burnin: steps before the first draw.
        num_steps_bw_draws: steps from a draw to the next.
    """

    num_draws: int
    num_burnin: int
    num_steps_bw_draws: int = 1

    @property
    def num_steps(self) -> int:
        return self.num_burnin + self.num_draws * self.num_steps_bw_draws

    @property
    def draws(self) -> slice:
        """The steps that are draws: the last of each stretch of `num_steps_bw_draws`."""
        return slice(self.num_burnin + self.num_steps_bw_draws - 1, self.num_steps, self.num_steps_bw_draws)


class ChainState:
    """One chain: its parameters in a flat buffer, what the model sees of them, and the sampler's state.

    A bfloat16 or float16 model sees copies in its own precision, which the step writes; the chain itself is float32.
    """

    def __init__(self, anchor: dict[str, Tensor], sampler: Sampler) -> None:
        self._sampler, self._options = sampler, dict(vars(sampler))
        self._scalars = sampler.scalars(self._options)
        first = next(iter(anchor.values()))
        self._device = first.device
        low = is_low_precision(first)
        self._anchor = [p.float() if low else p for p in anchor.values()]
        self._offsets = list(itertools.accumulate([0, *(p.numel() for p in self._anchor)]))[:-1]
        self._views = self._flat(self._anchor)
        seen = [v.to(first.dtype) for v in self._views] if low else self._views
        # Leaves share memory with the buffer (or the copies), so the step moves what autograd differentiates.
        self.params = {name: v.detach().requires_grad_() for name, v in zip(anchor, seen, strict=True)}
        self.leaves = list(self.params.values())
        self._states = [self._flat(self._anchor) for _ in range(NUM_STATES[sampler.name])]
        given = getattr(sampler, "preconditioner", 1.0)
        self._table = SegmentTable(
            sampler.name,
            [
                Segment(
                    w=view,
                    offset=self._offsets[k],
                    anchor=self._anchor[k],
                    state=[state[k] for state in self._states],
                    preconditioner=given[name] if isinstance(given, Mapping) else given,
                    copy=seen[k] if low else None,
                )
                for k, (name, view) in enumerate(zip(anchor, self._views, strict=True))
            ],
        )
        self._metrics = None
        if sampler.measures(self._options):
            self._metrics = torch.zeros(1, NUM_METRICS, dtype=torch.float64, device=self._device)

    @staticmethod
    def _flat(like: list[Tensor]) -> list[Tensor]:
        """Views into one new buffer, each of the shape of a tensor in `like` and starting on a cache line."""
        sizes = [-(-p.numel() // _ALIGN) * _ALIGN for p in like]
        flat = torch.zeros(sum(sizes), dtype=like[0].dtype, device=like[0].device)
        return [part[: p.numel()].view(p.shape) for part, p in zip(torch.split(flat, sizes), like, strict=True)]

    def start(self, chain: int, seed: int) -> None:
        """Put the chain at w*, with the sampler's initial state."""
        self._chain, self._seed = chain, seed
        self._memory = self._sampler.initial_memory(self._options, self._device)
        for k, (view, p) in enumerate(zip(self._views, self._anchor, strict=True)):
            view.copy_(p)
            initial = self._sampler.initial_state(p, self._offsets[k], self._options, seed, chain)
            for state, value in zip(self._states, initial, strict=True):
                state[k].copy_(value)
        with torch.no_grad():
            for leaf, view in zip(self.leaves, self._views, strict=True):
                leaf.copy_(view)

    def move(self, grads: Sequence[Tensor], step: int) -> None:
        """One step of the sampler."""
        scalars = self._sampler.adjusted(self._scalars, self._options, self._memory, step, grads)
        self._table.step(
            grads,
            scalars,
            NoiseKey(self._seed, step=step, chain=self._chain),
            thermostat=self._memory.get("thermostat"),
            metrics=self._metrics,
        )
        if self._metrics is not None:
            count = sum(p.numel() for p in self._anchor)
            self._sampler.follow(scalars, self._memory, step, self._metrics, count)


def run_chains(
    posterior: Posterior,
    sampler: Sampler,
    schedule: Schedule,
    *,
    num_chains: int,
    seed: int,
    report: Callable[[int, int, Tensor], None] = lambda chain, step, losses: None,
) -> Tensor:
    """Run chains from w*, one after another, and return the minibatch loss of every step.

    A step evaluates loss and gradient on a minibatch, records the loss, then moves the parameters. Chains share
    one parameter buffer; memory beyond the model is one copy of the parameters, one of the gradients, and what the
    sampler keeps.

    Args:
        posterior: what is sampled.
        sampler: how.
        schedule: how long.
        num_chains: independent chains; chain c's noise and batches are functions of (seed, c) alone.
        seed: of noise, batch order and whatever the model itself draws.
        report: called after every step with the chain, the number of its finished steps, and its losses.

    Returns:
        Losses, float64 on the CPU, shape ``[num_chains, num_steps]``. A chain whose loss turns non-finite stops;
        the rest of its row is NaN.
    """
    state = ChainState(posterior.anchor, sampler)
    traces = torch.full((num_chains, schedule.num_steps), torch.nan, dtype=torch.float64)
    cuda = [posterior.device] if posterior.device.type == "cuda" else []
    work = posterior.num_parameters * (posterior.source.batch_size or 1)
    threads = 1 if work < _SINGLE_THREAD_WORK else None
    with torch.random.fork_rng(devices=cuda), torch.enable_grad(), _threads(threads):
        for chain in range(num_chains):
            chain_seed = _mix(seed, chain)
            torch.manual_seed(chain_seed)
            state.start(chain, seed)
            buffers = posterior.fresh_buffers()
            losses = torch.full((schedule.num_steps,), torch.nan, dtype=torch.float64, device=posterior.device)
            batches = posterior.source.minibatches(chain_seed)
            for step in range(schedule.num_steps):
                loss = posterior.loss(state.params, next(batches), buffers)
                losses[step] = loss.detach()
                state.move(torch.autograd.grad(loss, state.leaves, materialize_grads=True), step)
                report(chain, step + 1, losses)
                # Reading the loss waits for a GPU, so look only now and then; a lost chain stays lost.
                if (step % 64 == 63 or not cuda) and not torch.isfinite(losses[step]):
                    break
            traces[chain] = losses.cpu()
    lost = (~torch.isfinite(traces)).cumsum(dim=1) > 0
    return traces.masked_fill(lost, torch.nan)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with `count` intra-op threads; None: as many as torch is set to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mix(seed: int, chain: int) -> int:
    """A 63-bit seed for (seed, chain): SplitMix64's finalizer, so that neighbours are unrelated."""
    z = (seed + (chain + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1
