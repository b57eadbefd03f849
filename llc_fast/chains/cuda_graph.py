"""A whole step as one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llc_fast.chains.step_checks import StepChecks
from llc_fast.gradients.minibatches import Feed, paired
from llc_fast.gradients.replay import NotReplayableError
from llc_fast.gradients.strategies import Gradient, check_replay
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.samplers.state import ChainState
from llc_fast.support.errors import first_line
from llc_fast.traces import LOSS


class CapturedStep:
    """A whole step as one CUDA graph: indices, minibatch, gradient, loss, update, step count.

    Autograd sends a parameter's gradient to the stream in which the parameter was first used, for as long as anybody
    holds a graph of that use. If that is the default stream, no capture survives it. So older graphs are forgotten
    first, and one stream serves from the first use of a parameter to the capture.

    Args:
        state, feed, gradient: of the chains.
        checks: taken between replays.
        control_variate: subtracted from losses; None: nothing.
        traces: the loss and what transitions return, float64 ``[chain, step]`` each, on the device.
        start: the first step.

    Raises:
        NotReplayableError: the step waits for the GPU, or its replay does not do what the step itself does.
    """

    def __init__(
        self,
        state: ChainState,
        feed: Feed,
        gradient: Gradient,
        checks: StepChecks,
        control_variate: ControlVariate | None,
        traces: Mapping[str, Tensor],
        start: int,
    ) -> None:
        self._feed, self._checks, losses = feed, checks, traces[LOSS]
        self._step = torch.full((), start, dtype=torch.int64, device=losses.device)
        grads: list[Tensor] = []

        def body() -> None:
            evaluation = gradient.evaluate(feed(0, self._step))
            values = {LOSS: paired(evaluation.loss, control_variate, feed, 0)}
            grads[:] = gradient.gradients()
            state.move(grads, 0, self._step)
            values |= state.info()
            for name, trace in traces.items():
                trace.index_copy_(1, self._step.reshape(1), values[name].to(trace.dtype).reshape(-1, 1))
            self._step += 1

        def rewind(arrays: Mapping[str, Tensor]) -> None:
            self._step.fill_(start)
            state.restore(arrays)

        def snapshot() -> dict[str, Tensor]:
            return {k: t.clone() for k, t in state.arrays().items()}

        begin = snapshot()
        with state.displaced():  # at w* itself a gradient may be nothing
            elsewhere = snapshot()
        rewind(elsewhere)
        gradient.forget()
        side = torch.cuda.Stream(losses.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(losses.device))
        with torch.cuda.stream(side):
            body()  # libraries allocate their workspaces outside the graph
            rewind(elsewhere)
            with _refusing_to_wait():
                body()
        torch.cuda.current_stream(losses.device).wait_stream(side)
        fresh = [losses[:, start].clone(), *(g.clone() for g in grads)]

        rewind(elsewhere)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):
            body()
        state.send_addresses()
        self._graph.replay()
        check_replay([losses[:, start], *grads], fresh)
        rewind(begin)
        for trace in traces.values():
            trace[:, start:] = torch.nan

    def __call__(self, step: int) -> None:
        if step in self._checks.places:
            self._checks.take(step, self._feed(step))
        self._graph.replay()


@contextlib.contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises NotReplayableError: during a capture it would do harm."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch calls this mode a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotReplayableError(first_line(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
