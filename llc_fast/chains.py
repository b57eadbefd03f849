"""Runs chains: batches, gradients, fused updates, loss traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llc_fast.posterior import Posterior
from llc_fast.reference import NoiseKey
from llc_fast.samplers import SGLD
from llc_fast.update import SegmentTable

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
    """The parameters of one chain: a flat buffer, and the tensors the model sees as views of it."""

    def __init__(self, anchor: dict[str, Tensor]) -> None:
        starts, size = [], 0
        for p in anchor.values():
            starts.append(size)
            size += -(-p.numel() // _ALIGN) * _ALIGN
        first = next(iter(anchor.values()))
        self._anchor = anchor
        flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        self._views = [flat[s : s + p.numel()].view(p.shape) for s, p in zip(starts, anchor.values(), strict=True)]
        # Leaves share the buffer, so the update moves what autograd differentiates.
        self.params = {name: v.detach().requires_grad_() for name, v in zip(anchor, self._views, strict=True)}

    def reset(self) -> None:
        """Back to w*."""
        for view, p in zip(self._views, self._anchor.values(), strict=True):
            view.copy_(p)

    def table(self) -> SegmentTable:
        """The segments of one fused step; noise is indexed by position in the concatenated parameters."""
        offsets, total = [], 0
        for p in self._anchor.values():
            offsets.append(total)
            total += p.numel()
        return SegmentTable(self._views, offsets, list(self._anchor.values()))


def run_chains(
    posterior: Posterior,
    sampler: SGLD,
    schedule: Schedule,
    *,
    num_chains: int,
    seed: int,
    report: Callable[[int, int, Tensor], None] = lambda chain, step, losses: None,
) -> Tensor:
    """Run chains from w*, one after another, and return the minibatch loss of every step.

    A step evaluates loss and gradient on a minibatch, records the loss, then moves the parameters. Chains share
    one parameter buffer; memory beyond the model is one copy of the parameters and one of the gradients.

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
    state = ChainState(posterior.anchor)
    table, scalars = state.table(), sampler.scalars()
    leaves = list(state.params.values())
    traces = torch.full((num_chains, schedule.num_steps), torch.nan, dtype=torch.float64)
    cuda = [posterior.device] if posterior.device.type == "cuda" else []
    work = posterior.num_parameters * (posterior.source.batch_size or 1)
    with (
        torch.random.fork_rng(devices=cuda),
        torch.enable_grad(),
        _threads(1 if work < _SINGLE_THREAD_WORK else None),
    ):
        for chain in range(num_chains):
            chain_seed = _mix(seed, chain)
            torch.manual_seed(chain_seed)
            state.reset()
            buffers = posterior.fresh_buffers()
            losses = torch.full((schedule.num_steps,), torch.nan, dtype=torch.float64, device=posterior.device)
            batches = posterior.source.minibatches(chain_seed)
            for step in range(schedule.num_steps):
                batch = next(batches)
                loss = posterior.loss(state.params, batch, buffers)
                losses[step] = loss.detach()
                grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
                table.step(grads, scalars, NoiseKey(seed, step=step, chain=chain))
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
