"""A language model of Pythia's shape in bfloat16: seconds a step and memory, against devinterp 2.0.1 and a plain loop.

    python benchmarks/gpu/bench_language.py [--size 1.4b] [--contenders llc_fast devinterp loop …] [--device cuda]
                                            [--context 512] [--batch 4] [--steps 40] [--seconds S] [--json PATH]
    python benchmarks/gpu/bench_language.py --device cpu --size tiny --steps 6    to see whether it runs

The model is transformers' GPTNeoXForCausalLM with the widths, layers and heads that Pythia's authors published (70m,
1.4b, 6.9b), and random weights. The data are random tokens: speed and memory do not depend on what they say. All
contenders do the same: SGLD from w* over all parameters, one chain, minibatches of `--batch` sequences of `--context`
tokens, the cross-entropy of the next token, ε, nβ and γ as given, L(w*) over all sequences first (not the loop).

    llc_fast        estimate_llc with "next-token" as its loss. A bfloat16 model has a chain in float32, the copy of it
                    that the model computes with, and w*. Gradients are consumed as they come. `llc_fast:STRATEGY`
                    names a strategy; `llc_fast:kept` keeps all gradients until the step.
    devinterp       devinterp.slt.llc.llc of version 2, as its documentation calls it, without observables. Its chain is
                    a deep copy of the model, so it is in bfloat16 too, and what a step adds is rounded to 8 bits; it
                    keeps w* and all gradients. It writes its losses and tokens to a zarr store, here in a temporary
                    folder. With version 1 it is left out: that has no loop for language models.
    loop            what anybody would write: forward, backward, then for each parameter torch's operations in place, in
                    bfloat16, with w* kept. It draws minibatches, and computes no L(w*).

`llc_fast:float32`, `devinterp:float32` and `loop:float32` do it with a float32 model; there products are in TF32.

Each contender has a process of its own. It takes one run of `--steps` steps; seconds a step are from the end of the
first fifth of them to the end, so that neither set-up nor what first steps allocate counts. Set-up is from the call to
the end of the first step. Memory is what torch has allocated on the GPU at most, the model included: in the set-up, and
in all; on a CPU it is the process's resident set, with what was loaded before taken off. "said" is what llc_fast's own
estimate was before it allocated anything for the chain, with the model.

`--seconds` ends a contender that takes longer, with the steps that it has made; if it makes none, its row says so.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))
from contenders import installed
from harness import in_fresh_process, parse, peak_memory, print_table, write_json


class Shape(NamedTuple):
    """Of a GPT-NeoX model."""

    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int


SIZES = {
    "tiny": Shape(64, 2, 4, 256, 512),
    "70m": Shape(512, 6, 8, 2048, 50304),
    "1.4b": Shape(2048, 24, 16, 8192, 50304),
    "2.8b": Shape(2560, 32, 32, 10240, 50304),
    "6.9b": Shape(4096, 32, 32, 16384, 50432),
}
DEFAULT = ["llc_fast", "devinterp", "loop"]
GRACE = 45.0
"""Seconds after `--seconds` after which a contender that is in the middle of something is ended from outside."""


def make_model(size: str, context: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A model with random weights, made where it is to be."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = SIZES[size]
    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=max(2048, context),
        rotary_pct=0.25,
        use_parallel_residual=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = GPTNeoXForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class EnoughError(Exception):
    """The time is up, and there are steps to tell of."""


class Marks:
    """When steps ended, awaited on a GPU only where it is read.

    Args:
        steps: to come.
        device: where.
        seconds: after which :meth:`step` raises, from now on; None: never.
    """

    def __init__(self, steps: int, device: str, seconds: float | None) -> None:
        self.warm, self.last = max(1, steps // 5), steps
        self._device, self._on_gpu = device, torch.device(device).type == "cuda"
        self._began, self._seconds = time.perf_counter(), seconds
        self.done, self.times = 0, dict[int, float]()
        self.setup_peak = 0

    def step(self) -> None:
        """One more step has been taken."""
        self.done += 1
        is_late = self._seconds is not None and time.perf_counter() - self._began > self._seconds
        if self.done in (1, self.warm, self.last) or is_late:
            self._note()
        if self.done == 1:
            self.setup_peak = peak_memory(self._device)
        if is_late and self.done > 1:
            raise EnoughError

    def _note(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        self.times[self.done] = time.perf_counter() - self._began

    def found(self) -> dict[str, Any]:
        last, per_step = max(self.times, default=0), None
        first = self.warm if self.warm in self.times and self.warm < last else 1
        if last > first:
            per_step = (self.times[last] - self.times[first]) / (last - first)
        return {
            "done": self.done,
            "set-up, s": self.times.get(1),
            "s per step": per_step,
            "set-up peak": self.setup_peak,
        }


Run = Callable[[nn.Module, Tensor, dict[str, Any], Marks], dict[str, Any]]
"""Takes the steps, tells of each, and returns what else is to be known."""


def with_llc_fast(how: str) -> Run:
    from llc_fast import Execution, estimate_llc
    from llc_fast.chains.run import after_each_step
    from llc_fast.gradients.memory import available_bytes, needed_bytes

    module = importlib.import_module("llc_fast.estimate")
    options: dict[str, Any] = {"kept": {"release_gradients": False}, "": {}}.get(how, {"strategy": how})

    def run(model: nn.Module, tokens: Tensor, spec: dict[str, Any], marks: Marks) -> dict[str, Any]:
        found: dict[str, Any] = {}
        check = module.check_memory

        def noted(objective: Any, sampler: Any, plan: Any) -> None:
            found["said"] = needed_bytes(objective, sampler, plan)
            found["available"] = available_bytes(objective.device)
            found["strategy"] = plan.strategy + (", gradients released" if plan.release else "")
            found["before the chain, s"] = time.perf_counter() - began
            check(objective, sampler, plan)

        module.check_memory = noted
        began = time.perf_counter()
        try:
            with after_each_step(lambda taken: marks.step()):
                result = estimate_llc(
                    model,
                    tokens,
                    "next-token",
                    lr=spec["lr"],
                    nbeta=spec["nbeta"],
                    localization=spec["localization"],
                    num_chains=1,
                    num_burnin=spec["steps"] // 2,
                    num_draws=spec["steps"] - spec["steps"] // 2,
                    batch_size=spec["batch"],
                    seed=0,
                    device=spec["device"],
                    progress=False,
                    execution=Execution(**options),
                )
            found |= {"L(w*)": result.init_loss, "loss": float(result.loss_trace[0, -1])}
            found["warnings"] = [str(warning) for warning in result.warnings]
        except EnoughError:
            pass
        finally:
            module.check_memory = check
        return found

    return run


def with_devinterp() -> Run:
    from datasets import Dataset
    from devinterp.slt.llc import llc
    from devinterp.slt.lm_loss import compute_per_token_loss

    def run(model: nn.Module, tokens: Tensor, spec: dict[str, Any], marks: Marks) -> dict[str, Any]:
        dataset = Dataset.from_dict({"input_ids": tokens.numpy()}).with_format("torch")
        first = len(tokens) // spec["batch"]
        calls, marks.last = 0, spec["steps"] - 1  # the end of the last step can't be seen

        def loss_fn(model: nn.Module, input_ids: Tensor) -> Tensor:
            """devinterp's own; where a step's begins, the one before has ended."""
            nonlocal calls
            calls += 1
            if calls > first + 1:
                marks.step()
            loss: Tensor = compute_per_token_loss(model, input_ids)
            return loss

        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = llc(
                    model,
                    dataset,
                    observables={},
                    lr=spec["lr"],
                    n_beta=spec["nbeta"],
                    localization=spec["localization"],
                    num_chains=1,
                    num_burnin_steps=spec["steps"] // 2,
                    num_draws=spec["steps"] - spec["steps"] // 2,
                    num_init_loss_batches=first,
                    batch_size=spec["batch"],
                    device=spec["device"],
                    output_path=Path(folder, "samples.zarr"),
                    loss_fn=loss_fn,
                )
                found = {"L(w*)": float(result.init_loss), "loss": float(result.loss_trace[0, -1])}
            except EnoughError:
                pass
        return found

    return run


def with_loop() -> Run:
    def run(model: nn.Module, tokens: Tensor, spec: dict[str, Any], marks: Marks) -> dict[str, Any]:
        lr, nbeta, localization = spec["lr"], spec["nbeta"], spec["localization"]
        params = list(model.parameters())
        reference = [p.detach().clone() for p in params]
        generator = torch.Generator().manual_seed(0)
        value = 0.0
        try:
            for _ in range(spec["steps"]):
                ids = tokens[torch.randint(len(tokens), (spec["batch"],), generator=generator)].to(spec["device"])
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()  # type: ignore[no-untyped-call]
                del logits
                value = float(loss)
                with torch.no_grad():
                    for p, start in zip(params, reference, strict=True):
                        assert p.grad is not None
                        drift = p.grad.mul_(nbeta).add_(p - start, alpha=localization)
                        p.add_(drift, alpha=-0.5 * lr).add_(torch.randn_like(p), alpha=lr**0.5)
                        p.grad = None
                marks.step()
        except EnoughError:
            pass
        return {"loss": value}

    return run


def runner(library: str, how: str) -> Run:
    if library == "llc_fast":
        return with_llc_fast("" if how == "float32" else how)
    return with_devinterp() if library == "devinterp" else with_loop()


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")
    library, how = (*spec["contender"].split(":"), "")[:2]
    dtype, device = torch.float32 if how == "float32" else torch.bfloat16, spec["device"]
    run = runner(library, how)  # imports, before memory is measured
    import transformers  # noqa: F401

    base = peak_memory(device, reset=True)
    model = make_model(spec["size"], spec["context"], dtype, device)
    shape = spec["sequences"], spec["context"]
    tokens = torch.randint(SIZES[spec["size"]].vocabulary, shape, generator=torch.Generator().manual_seed(1))
    count, held = sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    marks = Marks(spec["steps"], device, spec["seconds"])
    found: dict[str, Any] = {"parameters": count, "model": held}
    try:
        found |= run(model, tokens, spec, marks)
        if marks.done:
            found |= marks.found()
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        found["out of memory"] = (str(error).strip().splitlines() or [""])[0]
    return found | {"peak": peak_memory(device) - base, "base": base}


def row_of(contender: str, options: argparse.Namespace, versions: dict[str, str | None]) -> dict[str, Any]:
    """What came out for a contender, as a row; also what is not in the table."""
    library, how = (*contender.split(":"), "")[:2]
    row: dict[str, Any] = {"contender": contender, "weights": "float32" if how == "float32" else "bfloat16"}
    if library in versions:
        if (version := versions[library]) is None or version.startswith("1."):
            return row | {"s per step": "not installed" if version is None else f"version {version} has no such loop"}
        row["contender"] = contender.replace(library, f"{library} {version}")
    print(f"… {contender}", file=sys.stderr, flush=True)
    names = ("size", "context", "batch", "sequences", "steps", "seconds", "device", "lr", "nbeta", "localization")
    spec = {"contender": contender} | {name: getattr(options, name) for name in names}
    limit = None if options.seconds is None else options.seconds + GRACE
    found = in_fresh_process(__file__, spec, seconds=limit)
    if "error" in found:
        print(f"{contender}: {found['error']}", file=sys.stderr)
        return row | {"s per step": found.get("short", "failed"), "error": found["error"]}
    count = found["parameters"]
    row |= {"parameters": count, "peak, bytes a parameter": found["peak"] / count, "peak, GiB": gib(found["peak"])}
    if "said" in found:
        row |= {"said, bytes a parameter": (found["said"] + found["model"]) / count}
        row |= {"said, GiB": gib(found["said"] + found["model"]), "available, GiB": gib(found["available"] or 0)}
    row |= {name: found.get(name) for name in ("strategy", "before the chain, s", "L(w*)", "loss", "warnings")}
    if "out of memory" in found:
        print(f"{contender}: {found['out of memory']}", file=sys.stderr)
        return row | {"s per step": "out of memory", "error": found["out of memory"]}
    row |= {"s per step": found.get("s per step"), "steps": found.get("done", 0), "set-up, s": found.get("set-up, s")}
    row["set-up peak, GiB"] = gib(max(0, found.get("set-up peak", 0) - found["base"]))
    if isinstance(row["s per step"], float):
        row["tokens/s"] = options.batch * options.context / row["s per step"]
    elif row["steps"] < options.steps:
        row["s per step"] = "too few steps"
    return row


def gib(size: float) -> float:
    return size / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=DEFAULT)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="1.4b", choices=SIZES)
    parser.add_argument("--context", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a minibatch")
    parser.add_argument("--sequences", type=int, default=32, help="in the data")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, help="of each contender at most, from the call on")
    parser.add_argument("--lr", type=float, default=1e-7, help="ε")
    parser.add_argument("--nbeta", type=float, default=30.0)
    parser.add_argument("--localization", type=float, default=300.0, help="γ")
    options = parse(parser, work_in_this_process)
    from llc_fast.gradients.plan import STRATEGIES

    for contender in options.contenders:
        library, how = (*contender.split(":"), "")[:2]
        known = ("", "float32", *(("kept", *STRATEGIES) if library == "llc_fast" else ()))
        if library not in DEFAULT or how not in known or contender.count(":") > 1:
            parser.error(f"unknown contender {contender!r}")
    if options.steps < 4 or options.context < 2 or not 1 <= options.batch <= options.sequences:
        parser.error("--steps must be at least 4, --context 2, and --batch from 1 to --sequences")
    versions = installed(["devinterp"]) if any(c.startswith("devinterp") for c in options.contenders) else {}
    names = ("device", "size", "context", "batch", "sequences", "steps", "lr", "nbeta", "localization")
    tables: dict[str, Any] = {name: getattr(options, name) for name in names} | {"parameters": None, "rows": []}
    for contender in options.contenders:
        row = row_of(contender, options, versions)
        tables["parameters"] = tables["parameters"] or row.get("parameters")
        tables["rows"].append(row)
        write_json(options.json, tables)  # each is minutes of work
    columns = ["contender", "weights", "s per step", "tokens/s", "steps", "set-up, s", "peak, GiB", "set-up peak, GiB"]
    columns += ["peak, bytes a parameter", "said, bytes a parameter", "said, GiB", "strategy", "L(w*)", "loss"]
    print_table(
        f"GPT-NeoX {options.size}, {tables['parameters'] or 0:,} parameters; "
        f"{options.batch} × {options.context} tokens a step, one chain",
        [{column: row.get(column) for column in columns} for row in tables["rows"]],
    )


if __name__ == "__main__":
    main()
