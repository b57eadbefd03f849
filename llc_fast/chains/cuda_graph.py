"""A whole step as one CUDA graph, or as two with observables between them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llc_fast.chains.step_checks import StepChecks
from llc_fast.data import Batch
from llc_fast.gradients.minibatches import Feed, paired
from llc_fast.gradients.replay import NotReplayableError
from llc_fast.gradients.strategies import Gradient, check_replay
from llc_fast.objective.control_variate import ControlVariate
from llc_fast.objective.objective import Evaluation
from llc_fast.samplers.state import ChainState
from llc_fast.support.errors import first_line
from llc_fast.traces import LOSS


class CapturedStep:
    """A whole step as one CUDA graph: indices, minibatch, gradient, loss, update, step count.

    With observables it is two, which are replayed one after the other: the second one is the update. At a draw the
    observables run between them, where the chain is at the parameters of the loss. The kernels are the same.

    Autograd sends a parameter's gradient to the stream in which the parameter was first used, for as long as anybody
    holds a graph of that use. If that is the default stream, no capture survives it. So older graphs are forgotten
    first, and one stream serves from the first use of a parameter to the capture.

    Args:
        state, feed, gradient: of the chains.
        checks: taken between replays.
        control_variate: subtracted from losses; None: nothing.
        traces: the loss and what transitions return, float64 ``[chain, step]`` each, on the device.
        start: the first step.
        observe: called between evaluation and move with step, evaluation and minibatch; None: nobody looks.

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
        observe: Callable[[int, Evaluation, Batch], None] | None = None,
    ) -> None:
        self._feed, self._checks, losses = feed, checks, traces[LOSS]
        self._observe = observe
        self._step = torch.full((), start, dtype=torch.int64, device=losses.device)
        grads: list[Tensor] = []

        def evaluate() -> None:
            self._batch = feed(0, self._step)
            self._evaluation = gradient.evaluate(self._batch)  # kept: observables read it, and it is the graph's memory
            record(LOSS, paired(self._evaluation.loss, control_variate, feed, 0))
            grads[:] = gradient.gradients()

        def move() -> None:
            state.move(grads, 0, self._step)
            for name, value in state.info().items():
                if name in traces:
                    record(name, value)
            self._step += 1

        def record(name: str, value: Tensor) -> None:
            trace = traces[name]
            trace.index_copy_(1, self._step.reshape(1), value.to(trace.dtype).reshape(-1, 1))

        def body() -> None:
            evaluate()
            move()

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
        self._graphs = [torch.cuda.CUDAGraph()]
        with torch.cuda.graph(self._graphs[0], stream=side):
            (body if observe is None else evaluate)()
        if observe is not None:
            self._graphs.append(torch.cuda.CUDAGraph())
            # In the memory of the first one, which is replayed before it each time.
            with torch.cuda.graph(self._graphs[1], pool=self._graphs[0].pool(), stream=side):
                move()
        state.send_addresses()
        for graph in self._graphs:
            graph.replay()
        check_replay([losses[:, start], *grads], fresh)
        rewind(begin)
        for trace in traces.values():
            trace[:, start:] = torch.nan

    def __call__(self, step: int) -> None:
        if step in self._checks.places:
            self._checks.take(step, self._feed(step))
        self._graphs[0].replay()
        if self._observe is not None:
            self._observe(step, self._evaluation, self._batch)
            self._graphs[1].replay()


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
