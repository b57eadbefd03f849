"""What a CUDA graph of a small network's step costs: kernels one after another, and in branches. Needs torch alone.

    python benchmarks/gpu/bench_graph.py [--device cuda] [--json PATH]

A deep linear network of 1,024 parameters (four 16 × 16 layers), 4 chains, minibatches of 500: indices, minibatch, loss,
gradients, an update by one kernel, and a trace. "autograd" is captured as autograd launches it; "in a row" has the same
products by hand, each written to where it belongs; "in branches" lets go of whatever the next layer does not wait for:
weights' gradients, the loss, the targets. The difference of the last two is what llc_fast.gradients.branches is for.
"Busy" is the time of all kernels together. Nothing of llc_fast runs here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from harness import print_table, write_json

CHAINS, SAMPLES, BATCH, WIDTH, LAYERS, STEPS = 4, 10000, 500, 16, 4, 3000


class Step:
    """The memory of a step, and three ways to take it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        on_gpu: dict[str, Any] = {"device": "cuda"}
        self.x, self.y = torch.randn(SAMPLES, WIDTH, **on_gpu), torch.randn(SAMPLES, WIDTH, **on_gpu)
        self.w = torch.randn(CHAINS, LAYERS, WIDTH, WIDTH, **on_gpu) / 4
        self.weights = [self.w[:, k] for k in range(LAYERS)]
        self.leaves = [w.clone().requires_grad_() for w in self.weights]
        self.grads = torch.empty_like(self.w)
        self.outputs = [torch.empty(CHAINS, BATCH, WIDTH, **on_gpu) for _ in range(LAYERS)]
        self.backwards = [torch.empty(CHAINS, BATCH, WIDTH, **on_gpu) for _ in range(LAYERS)]
        self.trace = torch.zeros(CHAINS, 100, dtype=torch.float64, **on_gpu)
        self.count = torch.zeros((), dtype=torch.int64, **on_gpu)
        self.streams = [torch.cuda.Stream() for _ in range(5)]  # type: ignore[no-untyped-call]

    def indices(self) -> Tensor:
        return torch.randint(SAMPLES, (CHAINS, BATCH), device="cuda")

    def write(self, losses: Tensor) -> None:
        self.trace.index_copy_(1, self.count.reshape(1), losses.double().reshape(-1, 1))
        self.count.add_(1).remainder_(100)

    def move(self) -> None:
        self.w.add_(self.grads, alpha=-1e-9)

    def autograd(self) -> object:
        def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            for w in weights:
                x = x @ w.T
            return nn.functional.mse_loss(x, y)

        chosen = self.indices()
        losses = vmap(loss)(self.leaves, self.x[chosen], self.y[chosen])
        grads = torch.autograd.grad(losses, self.leaves, torch.ones_like(losses))
        for k, grad in enumerate(grads):
            self.grads[:, k].copy_(grad)
        self.write(losses.detach())
        self.move()
        return grads

    def in_a_row(self) -> object:
        chosen = self.indices()
        inputs = self._forward(self.x[chosen])
        away = inputs[-1] - self.y[chosen]
        self.write(away.square().mean((1, 2)))
        grad = away * (2 / (BATCH * WIDTH))
        for k in reversed(range(LAYERS)):
            torch.bmm(grad.mT, inputs[k], out=self.grads[:, k])
            if k:
                grad = torch.bmm(grad, self.weights[k], out=self.backwards[k])
        self.move()
        return inputs, away

    def in_branches(self) -> object:
        main, (targets, loss, *others) = torch.cuda.current_stream(), self.streams
        chosen = self.indices()
        targets.wait_stream(main)
        with torch.cuda.stream(targets):
            y = self.y[chosen]
        inputs = self._forward(self.x[chosen])
        main.wait_stream(targets)
        away = inputs[-1] - y
        loss.wait_stream(main)
        with torch.cuda.stream(loss):
            self.write(away.square().mean((1, 2)))
        grad = away * (2 / (BATCH * WIDTH))
        for k in reversed(range(LAYERS)):
            beside = others[k % len(others)]
            beside.wait_stream(main)
            with torch.cuda.stream(beside):
                torch.bmm(grad.mT, inputs[k], out=self.grads[:, k])
            if k:
                grad = torch.bmm(grad, self.weights[k], out=self.backwards[k])
        for stream in (loss, *others):
            main.wait_stream(stream)
        self.move()
        return inputs, away, y

    def _forward(self, x: Tensor) -> list[Tensor]:
        inputs = [x]
        for w, out in zip(self.weights, self.outputs, strict=True):
            torch.bmm(inputs[-1], w.mT, out=out)
            inputs.append(out)
        return inputs


def measured(name: str, body: Callable[[], object]) -> dict[str, Any]:
    """A step captured and replayed."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = body()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        graph.replay()
    torch.cuda.synchronize()
    taken = 1e6 * (time.perf_counter() - began) / STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
    del kept
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    return {
        "step": name,
        "µs": taken,
        "kernels": sum(e.count for e in events) / 20,
        "busy, µs": sum(e.self_device_time_total for e in events) / 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device != "cuda":
        print("there are no graphs without a GPU")
        return
    rows = []
    for precision, name in (("highest", "float32"), ("high", "TF32")):
        torch.set_float32_matmul_precision(precision)
        for how in ("autograd", "in_a_row", "in_branches"):
            rows.append({"products": name} | measured(how.replace("_", " "), getattr(Step(), how)))
    print_table(f"one step of {CHAINS} chains, {LAYERS * WIDTH**2:,} parameters each", rows)
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
