"""Whole estimates drawn at random, each checked against what is known without the package.

A case follows from its seed. A failure names it, and this shows it again, with what was drawn:

    python tests/fuzz/fuzz_cases.py 1234

Many in a row, in processes of their own, so that a crash or a hang costs one case:

    python tests/fuzz/fuzz_cases.py 0:2000

What is checked, wherever it applies:

- a finite result, or a TypeError, ValueError or MemoryError that was to be expected; no warning that the model does not
  give by itself;
- nothing of the user's is changed: model, loss, data, random generators, the process;
- chains that stand still have λ̂ = 0 within their error;
- equal seeds give equal bits, whatever the generators' states; a run that is interrupted and resumed does, too;
- each step of a chain: loss, gradient and move by plain autograd in float64; λ̂ by the losses of its draws and w*;
- λ̂ of quadratic losses in closed form.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).parents[1] / "shared"))

from fuzz_problems import Built, Choices, Given, Problem, draw_data, draw_problem
from runs import interrupted_after

from llc_fast import Execution, LLCResult, LLCWarning, estimate_llc
from llc_fast.chains.draw import Draw
from llc_fast.kernels.reference import normals
from llc_fast.kernels.step import NoiseKey

TIME_LIMIT = 60.0
"""Seconds after which a case hangs."""
SIGMAS = 6.0
_ONE_PASS_ONLY = "exhausted"
_MODES = {"steps": 5, "still": 2.5, "repeat": 1.5, "resume": 1, "free": 1.2, "closed": 0.8}
_STILL = 1e-14


_ERRORS = os.dup(2)
"""Standard error, whatever takes its place for a while."""


KNOWN: dict[str, str] = {}
"""Failures that wait to be mended: patterns of case and failure, and what is wrong."""


class FuzzError(AssertionError):
    """What is not as it should be."""


def _fail_unless(condition: object, message: str) -> None:
    if not condition:
        raise FuzzError(message)


# ---- what a case is ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One estimate, or two that have to agree.

    Attributes:
        seed: everything follows from it.
        mode: what is compared: "steps", "still", "repeat", "resume", "free" or "closed".
        problem: model, loss and samples.
        dtype: of the model.
        given: the data.
        options: arguments of `estimate_llc`.
        surroundings: in which it is called: "plain", "no_grad", "thread", "default dtype".
        expected: a pattern of the error that must come; empty: none.
        tolerated: patterns of errors that may come.
    """

    seed: int
    mode: str
    problem: Problem
    dtype: torch.dtype
    given: Given
    options: dict[str, Any]
    surroundings: str = "plain"
    expected: str = ""
    tolerated: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value!r:.80}" for name, value in self.options.items())
        where = "" if self.surroundings == "plain" else f" in {self.surroundings}"
        return (
            f"case {self.seed} ({self.mode}{where}): {self.problem.name}, {str(self.dtype).removeprefix('torch.')}; "
            f"{self.given.name}; {options}"
        )


def draw_case(seed: int) -> Case:
    """The case of a seed."""
    c = Choices(seed, 0)
    mode = c.weighted(_MODES)
    problem = draw_problem(seed)
    dtype = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[
        c.weighted({"float32": 6, "float64": 3, "bfloat16": 0.7 if mode != "closed" else 0})
    ]
    sampler = (
        None if mode == "steps" else c.weighted({"": 5, "sghmc": 1, "rmsprop-sgld": 1, "adam-sgld": 1, "sgnht": 1})
    )
    if mode in ("repeat", "free", "resume") and c.chance(0.1):
        sampler = c.among(["mala", "hmc"])
    is_exact = sampler in ("mala", "hmc")
    given = draw_data(seed, problem, dtype, is_whole=is_exact and c.chance(0.8))
    options: dict[str, Any] = {
        "num_chains": c.among([1, 2, 2, 3, 4]),
        "seed": c.among([0, c.integer(0, 2**40)]),
        "progress": False,
    }
    if given.batch_size is not None:
        options["batch_size"] = given.batch_size
    if sampler:
        options["sampler"] = sampler
    if given.num_samples is None or c.chance(0.3):
        options["nbeta"] = c.logarithmic(2, 30)
    if c.chance(0.3):
        options["localization"] = c.among([0.0, 0.5, 10.0])
    case = Case(seed, mode, problem, dtype, given, options)
    lengths = {"steps": (8, 16), "still": (60, 100), "free": (30, 80)}
    draws = c.integer(*lengths.get(mode, (5, 15)))
    options |= {"num_draws": draws, "num_burnin": 0}
    if given.has_workers:
        options |= {"num_draws": 6, "num_chains": 1}
    elif mode != "still" and c.chance(0.3):
        options["num_burnin"] = c.integer(1, 6)
    if c.chance(0.15):
        options["num_steps_bw_draws"] = 2
    options["lr"] = {"still": _STILL}.get(mode, c.logarithmic(3e-5, 1e-3))
    if mode == "free":
        if c.chance(0.8):
            del options["lr"]
            options["num_burnin"] = options["num_draws"]
        elif c.chance(0.5):
            options["bias_correction"] = c.among([True, False])
    if mode in ("repeat", "resume") and c.chance(0.25):
        options["lr"] = None
    execution: dict[str, Any] = {}
    if c.chance(0.35):
        execution["strategy"] = c.among(["sequential", "batched"])
    if c.chance(0.1):
        execution["microbatch_size"] = c.integer(1, 4)
    if c.chance(0.08):
        execution["release_gradients"] = True
    if c.chance(0.04) and dtype == torch.float32 and "custom" not in str(problem):  # which knows one dtype
        execution["autocast"] = torch.bfloat16
    if execution.get("microbatch_size") == 1 and "batch" in problem.traits:
        execution["microbatch_size"] = 2
    if "batch" in problem.traits and execution.get("microbatch_size"):
        size, micro = given.least, execution["microbatch_size"]
        if size % micro == 1 or not given.is_indexed:
            del execution["microbatch_size"]  # the model itself would refuse a piece of one sample
    if execution:
        options["execution"] = Execution(**execution)
    if c.chance(0.12):
        options["keep_ends"] = True
    case.surroundings = c.weighted({"plain": 8, "no_grad": 1, "thread": 1, "default dtype": 1})
    if mode == "resume":
        case.surroundings = "plain"
    if c.chance(0.1):
        options["progress"] = _Progress()
    if c.chance(0.12):
        options["params"] = _drawn_params(c, problem)
    _expect(case, execution)
    return case


class _Progress:
    """A function that is told of progress."""

    def __call__(self, *numbers: float) -> None:
        assert len(numbers) == 3


def _drawn_params(c: Choices, problem: Problem) -> Any:
    """A part of the parameters: by name, by pattern, or by masks."""
    named = dict(problem.make(torch.float64).model.named_parameters())
    names = [name for name, p in named.items() if p.numel()]
    form = c.among(["name", "names", "pattern", "mask"])
    if form == "name":
        return c.among(names)
    if form == "names":
        return names[c.integer(0, len(names) - 1) :]
    if form == "pattern":
        return c.among(names)[:4] + "*"
    masks = {}
    for name in names[: c.integer(1, len(names))]:
        mask = torch.rand(named[name].shape, generator=torch.Generator().manual_seed(c.integer(0, 99))) < 0.6
        masks[name] = mask if mask.any() else True
    return masks


def _expect(case: Case, execution: Mapping[str, Any]) -> None:
    """Which errors must come, and which may."""
    traits, given, options = case.problem.traits, case.given, case.options
    may = case.tolerated
    if execution.get("strategy") == "batched":
        may.append(r"^strategy='batched' is not possible here")
    if execution.get("release_gradients"):
        may.append(r"^release_gradients=True is not possible")
    if options.get("sampler") in ("mala", "hmc"):
        may += [r"^sampler='\w+' (needs a loss that is a function|compares losses times)"]
        if not given.is_indexed or given.is_augmented:
            may += ["needed at every step|function of the parameters|pass tensors"]
        elif given.batch_size is not None and given.batch_size < len(case.problem.columns["y"]):
            may.append("all needed at every step")
    if options.get("bias_correction") and options.get("sampler"):
        may.append("^bias_correction=True is not possible")
    if given.is_once:
        may.append(_ONE_PASS_ONLY)
    if "params" in options:
        may.append("does not depend on the parameters to sample|none of them has a gradient")
    if "sum" in traits and given.least > 1 and execution.get("microbatch_size") != 1:
        case.expected = "sums over the batch"
    elif "sum" in traits:  # of one sample a sum is a mean
        may.append("sums over the batch")
    if execution.get("microbatch_size") and "sum" in traits:
        case.expected = ""
        may.append("sums over the batch")


# ---- running a case ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a case has shown.

    Attributes:
        seed: of the case.
        failure: what went wrong; empty: nothing.
        known: what it is, if it waits to be mended.
        calls: estimates that were made.
        refusal: the error that was expected, or tolerated.
        score: (λ̂ − exact) / stderr, where the exact value is known.
        seconds: of the whole.
    """

    seed: int
    failure: str = ""
    known: str = ""
    calls: int = 0
    refusal: str = ""
    score: float | None = None
    seconds: float = 0.0


def run_case(seed: int) -> Outcome:
    """Draw and run a case; nothing is raised but KeyboardInterrupt."""
    started, outcome = time.perf_counter(), Outcome(seed)
    case: Case | None = None
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=_ERRORS)
    try:
        case = draw_case(seed)
        _Run(case, outcome).run()
    except FuzzError as failure:
        outcome.failure = f"{case}\n    {failure}"
    except Exception:
        outcome.failure = f"{case or seed}\n{traceback.format_exc()}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    outcome.known = next((what for pattern, what in KNOWN.items() if re.search(pattern, outcome.failure)), "")
    outcome.seconds = time.perf_counter() - started
    return outcome


class _Run:
    def __init__(self, case: Case, outcome: Outcome) -> None:
        self._case, self._outcome = case, outcome
        self._built = case.problem.make(case.dtype)
        self._choices = Choices(case.seed, 3)
        if self._choices.chance(0.2):
            for p in self._built.model.parameters():
                if p.requires_grad:
                    p.grad = torch.ones_like(p)

    def run(self) -> None:
        case = self._case
        if case.mode == "closed":
            _closed(case, self._outcome)
            return
        recorder = _Recorder()
        options = dict(case.options)
        if case.mode == "steps":
            options["observables"] = {"seen": recorder}
        usual = self._usual_warnings()
        result = self._estimate(options, usual)
        if result is None:
            return
        _check_sensible(case, result)
        if case.mode == "steps":
            _Twin(case, self._built, recorder, result).check()
        elif case.mode == "still":
            _check_still(case, result)
        elif case.mode == "repeat":
            torch.manual_seed(99), np.random.seed(98), random.seed(97)
            for generator in case.given.generators:
                _advance(generator)
            again = self._estimate(options, usual)
            assert again is not None
            _check_same(result, again)
        elif case.mode == "resume":
            self._resume(options, usual, result)

    def _resume(self, options: dict[str, Any], usual: set[str], whole: LLCResult) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            stored = options | {"checkpoint": path, "checkpoint_interval": 0.0}
            steps = whole.loss_trace.size
            with interrupted_after(self._choices.integer(1, max(1, steps - 1))):
                part = self._estimate(stored, usual)
            assert part is not None
            resumed = self._estimate(stored, usual)
            assert resumed is not None
            _fail_unless(not resumed.is_partial, "the resumed run is partial")
            _check_same(whole, resumed)
            done = self._estimate(stored, usual)
            assert done is not None
            _check_same(whole, done)

    def _usual_warnings(self) -> set[str]:
        """What model, loss and data warn of by themselves."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with _everything_kept(self._case.given), contextlib.suppress(Exception):
                built = self._case.problem.make(self._case.dtype)
                data = self._case.given.data
                batch = _cut(data, slice(0, 4)) if isinstance(data, (tuple, dict)) else None
                if batch is None and self._case.given.has_workers:
                    data = data.dataset
                if batch is None and not self._case.given.is_once:
                    batch = next(iter(torch.utils.data.DataLoader(data, 4) if hasattr(data, "__getitem__") else data))
                built.value(_map(torch.clone, batch)).backward()  # type: ignore[no-untyped-call]
        return {str(w.message)[:60] for w in caught}

    def _estimate(self, options: dict[str, Any], usual: set[str]) -> LLCResult | None:
        """One call, with all that is to be as before compared; None if it was refused as expected."""
        case, built = self._case, self._built
        before = _Everything(built, case.given)
        result: LLCResult | None = None
        error: BaseException | None = None
        self._outcome.calls += 1
        with warnings.catch_warnings(record=True) as caught, _errors_of_libraries() as written:
            warnings.simplefilter("always")
            filters = list(warnings.filters)
            try:
                result = _called(
                    case.surroundings, lambda: estimate_llc(built.model, case.given.data, built.loss_fn, **options)
                )
            except (TypeError, ValueError, MemoryError) as refusal:
                error = refusal
            except RuntimeError as refusal:  # of vmap, which was asked for
                if not _is_batched(case) or not re.search("vmap|functorch|derivative for aten|atching", str(refusal)):
                    raise
                self._outcome.refusal = str(refusal)
            # A module that is imported for the first time may add some in front.
            _fail_unless(list(warnings.filters)[-len(filters) :] == filters, "warnings.filters was changed")
        _fail_unless("arning" not in written[0], f"written to standard error: {written[0][:500]}")
        before.check()
        if self._outcome.refusal:
            return None
        said = [
            str(w.message).rpartition(" [llc-fast explain ")[0] for w in caught if issubclass(w.category, LLCWarning)
        ]
        _fail_unless(result is None or said == result.warnings, f"said {said}, not {result and result.warnings}")
        caught = [w for w in caught if not issubclass(w.category, LLCWarning)]
        unusual = [str(w.message) for w in caught if str(w.message)[:60] not in usual]
        unusual = [text for text in unusual if "hooks" not in case.problem.traits or "backward hook" not in text]
        if _is_batched(case):
            unusual = [text for text in unusual if "performance drop" not in text]
        _fail_unless(not unusual, f"warnings that the model does not give by itself: {unusual}")
        if error is not None:
            self._outcome.refusal = str(error)
            allowed = [*case.tolerated, *[case.expected] * bool(case.expected)]
            _fail_unless(
                any(re.search(pattern, str(error)) for pattern in allowed),
                f"refused: {type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-9:])}",
            )
            return None
        _fail_unless(not case.expected, f"not refused, though {case.expected!r} was expected")
        return result


def _is_batched(case: Case) -> bool:
    execution = case.options.get("execution")
    return execution is not None and execution.strategy == "batched"


@contextlib.contextmanager
def _errors_of_libraries() -> Iterator[list[str]]:
    """What is written to standard error, past Python too, where torch warns in threads."""
    found = [""]
    with tempfile.TemporaryFile() as file, contextlib.redirect_stderr(io.StringIO()):
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            found[0] = file.read().decode(errors="replace")


def _called(surroundings: str, call: Callable[[], LLCResult]) -> LLCResult:
    if surroundings == "no_grad":
        with torch.no_grad():
            return call()
    if surroundings == "default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            result = call()
            _fail_unless(torch.get_default_dtype() == torch.float64, "the default dtype was changed")
            return result
        finally:
            torch.set_default_dtype(before)
    if surroundings == "thread":
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(call())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]  # type: ignore[no-any-return]
    return call()


# ---- nothing of the user's is changed ------------------------------------------------------------------------------


def _bits(t: Tensor | None) -> Any:
    if t is None:
        return None
    return tuple(t.shape), t.dtype, t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _of_tensor(t: Tensor) -> Any:
    grad = t.grad if t.is_leaf else None
    return id(t), t.data_ptr(), _bits(t), t.requires_grad, id(grad), _bits(grad), t.stride()


def _plain(value: Any, depth: int = 0) -> Any:
    """A module's attribute as something that can be compared."""
    if isinstance(value, Tensor):
        return id(value), _bits(value)
    if isinstance(value, dict) and depth < 4:
        return {k: _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)) and depth < 4:
        return [_plain(v, depth + 1) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else id(value)


def _of_module(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = _of_tensor(p)
        if isinstance(p, nn.Parameter):
            found[f"hooks of {name}"] = dict(p._backward_hooks or {}), dict(p._post_accumulate_grad_hooks or {})
    for name, module in model.named_modules():
        found[f"module {name}"] = id(module), module.training
        found[f"hooks of module {name}"] = [dict(getattr(module, hooks)) for hooks in _HOOKS]
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules", *_HOOKS):
                found[f"attribute {name}.{key}"] = _plain(value)
    return found


def _of_generator(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state)
    return generator.getstate()


def _advance(generator: Any) -> None:
    if isinstance(generator, torch.Generator):
        torch.rand(3, generator=generator)
    else:
        generator.random()


def _of_process() -> dict[str, Any]:
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy's generator": repr(np.random.get_state(legacy=False)),
        "Python's generator": random.getstate(),
        "signal handler": signal.getsignal(signal.SIGINT),
        "threads": threading.active_count(),
        "torch's threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "NumPy's errors": np.geterr(),
        "children": len(multiprocessing.active_children()),
    }


class _Everything:
    """All that a call must leave as it is."""

    def __init__(self, built: Built, given: Given) -> None:
        self._built, self._given = built, given
        self._deepcopies = _can_be_copied(built.model)
        self._before = self._now()

    def _now(self) -> dict[str, Any]:
        found = _of_process()
        for k, module in enumerate([self._built.model, *self._built.others]):
            found |= {f"model {k}, {name}": value for name, value in _of_module(module).items()}
        held = [g for m in self._built.model.modules() if (g := getattr(m, "generator", None)) is not None]
        for k, generator in enumerate([*held, *self._given.generators]):
            found[f"generator {k}"] = _of_generator(generator)
        for k, t in enumerate(_tensors_of(self._given.data)):
            found[f"data {k}"] = _bits(t)
        return found

    def check(self) -> None:
        # The thread that writes to a worker's queue ends a moment after the worker.
        until = time.monotonic() + 3
        while threading.active_count() > self._before["threads"] and time.monotonic() < until:
            time.sleep(0.01)
        now = self._now()
        changed = [name for name in self._before.keys() | now.keys() if self._before.get(name) != now.get(name)]
        shown = {name: (repr(self._before.get(name))[:100], repr(now.get(name))[:100]) for name in sorted(changed)[:4]}
        _fail_unless(not changed, f"changed: {shown}")
        if self._deepcopies:
            _fail_unless(_can_be_copied(self._built.model), "copy.deepcopy(model) no longer works")


def _can_be_copied(model: nn.Module) -> bool:
    try:
        copy.deepcopy(model)
    except Exception:
        return False
    return True


@contextlib.contextmanager
def _everything_kept(given: Given) -> Iterator[None]:
    """Global generators, and those of the data, are as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    held = [copy.deepcopy(_state(g)) for g in given.generators]
    try:
        yield
    finally:
        torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
        for generator, state in zip(given.generators, held, strict=True):
            _set_state(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _tensors_of(data: Any) -> list[Tensor]:
    """Tensors that data hold, as far as they can be reached."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, Mapping):
        return [t for value in data.values() for t in _tensors_of(value)]
    if isinstance(data, (tuple, list)):
        return [t for value in data for t in _tensors_of(value)]
    if isinstance(data, torch.utils.data.TensorDataset):
        return list(data.tensors)
    found = getattr(data, "_columns", None) or getattr(data, "_batches", None) or getattr(data, "_rows", None)
    if found is None and isinstance(data, torch.utils.data.DataLoader):
        found = data.dataset
    return [] if found is None else _tensors_of(found)


# ---- a sensible result ---------------------------------------------------------------------------------------------


def _codes(result: LLCResult) -> list[str]:
    return [w.code for w in result.warnings]


def _check_sensible(case: Case, result: LLCResult) -> None:
    options, given = case.options, case.given
    chains, schedule = options["num_chains"], result.schedule
    _fail_unless(result.loss_trace.shape == (chains, schedule.num_steps), f"loss_trace {result.loss_trace.shape}")
    if not math.isfinite(result.llc_mean):
        _fail_unless("diverged" in _codes(result), f"λ̂ = {result.llc_mean}, warnings {_codes(result)}")
    str(result), result.summary()
    _fail_unless(math.isfinite(result.init_loss), f"L(w*) = {result.init_loss}")
    if "nbeta" in options:
        _fail_unless(result.nbeta == options["nbeta"], f"nβ = {result.nbeta}")
    if given.num_samples is not None:
        n = given.num_samples
        _fail_unless(result.settings["num_samples"] == n, f"n = {result.settings['num_samples']}, is {n}")
        if "nbeta" not in options:
            _fail_unless(math.isclose(result.nbeta, n / math.log(n)), f"nβ = {result.nbeta} with n = {n}")
    codes = _codes(result)
    if given.is_once:
        _fail_unless("irreproducible" in codes, "an iterator, and no word of irreproducibility")
    elif "irreproducible" in codes:
        raise FuzzError("said to be irreproducible")
    if "stuck" in case.problem.traits and "params" not in options:
        _fail_unless("no-gradient" in codes, "padding_idx is sampled, or nobody says that it is not")
    if "projects" in case.problem.traits and "writes-parameters" not in codes and "params" not in options:
        norms = dict(case.problem.make(torch.float64).model.named_parameters())
        if any(name.endswith("embedding.weight") and bool((p.norm(dim=1) > 1).all()) for name, p in norms.items()):
            raise FuzzError("max_norm, and no word of it")
    if given.is_indexed and "standing-still" in codes:
        raise FuzzError(f"standing-still: {[str(w) for w in result.warnings if w.code == 'standing-still']}")


def _check_same(one: LLCResult, other: LLCResult) -> None:
    """The same bits, or a word that they need not be."""
    if "irreproducible" in _codes(one):
        return
    for name in ("loss_trace", "nbeta", "init_loss"):
        a, b = np.asarray(getattr(one, name)), np.asarray(getattr(other, name))
        same = a.shape == b.shape and np.array_equal(a, b, equal_nan=True)
        if not same:
            first = np.argwhere(~((a == b) | (np.isnan(a) & np.isnan(b))))[:1] if a.shape == b.shape else ""
            raise FuzzError(f"{name} differs from run to run, first at {first}: {a.ravel()[:3]}, {b.ravel()[:3]}")
    for name, values in one.traces.items():
        _fail_unless(np.array_equal(values, other.traces[name], equal_nan=True), f"trace {name} differs")
    _fail_unless(_codes(one) == _codes(other), f"other warnings: {_codes(one)}, {_codes(other)}")
    if one.ends is not None and other.ends is not None:
        for name, values in one.ends.items():
            _fail_unless(np.array_equal(values, other.ends[name], equal_nan=True), f"ends of {name} differ")


def _check_still(case: Case, result: LLCResult) -> None:
    """Chains that hardly move have λ̂ = 0 within their error."""
    if "diverged" in _codes(result) or "standing-still" in _codes(result):
        return
    size = float(np.abs(result.loss_trace).max()) + abs(result.init_loss)
    autocast = case.options.get("execution") and case.options["execution"].autocast
    eps = torch.finfo(torch.bfloat16 if autocast else case.dtype).eps
    stderr = result.llc_stderr if math.isfinite(result.llc_stderr) else 0.0
    allowed = SIGMAS * stderr + 2e-3 + result.nbeta * size * 16 * min(eps, 1e-6)
    _fail_unless(
        abs(result.llc_mean) <= allowed,
        f"standing still λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g} (allowed {allowed:.2g}), "
        f"{result.diagnostics['paired_with']}, {result.diagnostics['unpaired_reason']}",
    )


# ---- step by step --------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    chain: int
    step: int
    loss: float
    params: dict[str, Tensor]
    batch: Any


class _Recorder:
    """An observable that keeps what it sees."""

    def __init__(self) -> None:
        self.draws: dict[int, list[_Seen]] = {}
        self._lock = threading.Lock()

    def __call__(self, draw: Draw) -> float:
        params = {name: p.clone() for name, p in draw.params.items()}
        batch = _map(torch.clone, draw.batch)
        with self._lock:
            self.draws.setdefault(draw.chain, []).append(_Seen(draw.chain, draw.step, float(draw.loss), params, batch))
        return float(draw.loss)


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: _map(function, v) for k, v in batch.items()}
    return [_map(function, v) for v in batch]


def _cut(batch: Any, piece: slice) -> Any:
    return _map(lambda t: t[piece], batch)


def _length(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


class _Twin:
    """The same model once more, evaluated by plain autograd in float64."""

    def __init__(self, case: Case, built: Built, recorder: _Recorder, result: LLCResult) -> None:
        self._case, self._recorder, self._result = case, recorder, result
        self._execution = case.options.get("execution") or Execution()
        self._is_low = case.dtype == torch.bfloat16
        is_rounded = self._is_low or self._execution.autocast is not None
        self._dtype = case.dtype if is_rounded else torch.float64
        self._twin = case.problem.make(self._dtype)
        self._user = built
        for mine, theirs in zip([self._twin.model, *self._twin.others], [built.model, *built.others], strict=True):
            values = {k: v.to(self._dtype) if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
            mine.load_state_dict(values)
        self._start = copy.deepcopy(self._twin.model.state_dict())
        self._sampled = list(next(iter(recorder.draws.values()))[0].params) if recorder.draws else []
        coarse = self._is_low or self._execution.autocast is not None
        self._relative, self._absolute = (4e-2, 2e-2) if coarse else (2e-4, 2e-5)
        if case.dtype == torch.float64:
            self._relative, self._absolute = 1e-9, 1e-10

    def check(self) -> None:
        case, result = self._case, self._result
        for chain in range(case.options["num_chains"]):
            _fail_unless(
                len(self._recorder.draws.get(chain, [])) == case.options["num_draws"] or "diverged" in _codes(result),
                f"{len(self._recorder.draws.get(chain, []))} draws of chain {chain} were seen",
            )
        if "diverged" in _codes(result) or not self._sampled:
            return
        self._check_batches()
        traits = case.problem.traits
        if "random" in traits:
            return
        is_every = case.options["num_burnin"] == 0 and case.options.get("num_steps_bw_draws", 1) == 1
        if "state" in traits and not is_every:
            return
        differences = []
        for draws in self._recorder.draws.values():
            self._load_buffers()
            for k, seen in enumerate(draws):
                after = draws[k + 1] if k + 1 < len(draws) and draws[k + 1].step == seen.step + 1 else None
                loss, grads = self._evaluate(seen.params, seen.batch)
                self._close(seen.loss, loss, f"the loss of chain {seen.chain} at step {seen.step}")
                if after is not None and not self._is_low:
                    self._check_move(seen, after, grads)
                buffers = {k: v.clone() for k, v in self._twin.model.state_dict().items()}
                self._load_buffers()
                differences.append(seen.loss - self._evaluate(None, seen.batch)[0])
                self._load_buffers(buffers)
        self._check_mean(np.array(differences))

    def _close(self, found: float, expected: float, what: str) -> None:
        slack = self._relative * abs(expected) + self._absolute
        _fail_unless(
            abs(found - expected) <= slack or (math.isnan(found) and math.isnan(expected)),
            f"{what} is {found:.9g}, should be {expected:.9g}",
        )

    # ---- minibatches ---------------------------------------------------------------------------------------------

    def _check_batches(self) -> None:
        """Every row is a sample with its own target; none comes twice, unless there is replacement."""
        given, columns = self._case.given, self._case.problem.columns
        if given.is_augmented:
            self._check_augmentation()
            return
        known: dict[Any, int] = {}
        for k in range(len(columns["y"])):
            known[self._row(columns["x"][k], columns["y"][k])] = k
        for seen in itertools.chain.from_iterable(self._recorder.draws.values()):
            x, y = (
                (seen.batch["x"], seen.batch["y"]) if isinstance(seen.batch, dict) else (seen.batch[0], seen.batch[1])
            )
            indices = [known.get(self._row(a, b)) for a, b in zip(x, y, strict=True)]
            _fail_unless(None not in indices, f"step {seen.step}: a row of the minibatch is no sample")
            if len(known) < len(columns["y"]):
                continue  # equal samples can't be told apart
            if given.order != "drawn":
                _fail_unless(len(set(indices)) == len(indices), f"step {seen.step}: a sample comes twice: {indices}")
            if given.weights is not None:
                _fail_unless(all(given.weights[k] > 0 for k in indices), f"step {seen.step}: left out: {indices}")
            if given.batch_size is not None:
                n = len(columns["y"])
                _fail_unless(len(indices) == min(given.batch_size, n), f"a minibatch of {len(indices)}")

    def _check_augmentation(self) -> None:
        """No row comes twice: in no step, and in no chain."""
        seen = [
            s.batch["x"] if isinstance(s.batch, dict) else s.batch[0]
            for s in itertools.chain.from_iterable(self._recorder.draws.values())
        ]
        rows = [_bits(row) for x in seen for row in x]
        if self._case.dtype != torch.bfloat16:
            _fail_unless(
                len(set(rows)) == len(rows), f"of {len(rows)} augmented samples {len(set(rows))} are different"
            )

    def _row(self, x: Tensor, y: Tensor) -> Any:
        return tuple(_bits(t.to(self._case.dtype) if t.is_floating_point() else t) for t in (x, y))

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _load_buffers(self, values: Mapping[str, Tensor] | None = None) -> None:
        self._twin.model.load_state_dict(self._start if values is None else values)

    def _evaluate(self, params: Mapping[str, Tensor] | None, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient at `params`; None: at w*."""
        model = self._twin.model
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(params[name] if params is not None and name in params else self._start[name])
        flags = {name: p.requires_grad for name, p in named.items()}
        for name, p in named.items():
            p.requires_grad_(name in self._sampled)
            p.grad = None
        batch = _map(lambda t: t.to(self._dtype) if t.is_floating_point() else t.clone(), batch)
        length, micro = _length(batch), self._execution.microbatch_size
        size = length if micro is None else min(micro, length)
        total = 0.0
        for start in range(0, length, size):
            piece = _map(torch.clone, _cut(batch, slice(start, start + size)))
            with torch.autocast("cpu", self._execution.autocast, enabled=self._execution.autocast is not None):
                loss = self._twin.value(piece) * (_length(piece) / length)
            if loss.requires_grad:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named.items()}
        for name, p in named.items():
            p.requires_grad_(flags[name])
        return total, grads

    # ---- the move ------------------------------------------------------------------------------------------------

    def _check_move(self, seen: _Seen, after: _Seen, grads: Mapping[str, Tensor]) -> None:
        """w' − w against −(ε/2)(nβ·g + γ(w − w*)) + √ε·ξ."""
        case, result = self._case, self._result
        lr, nbeta, localization = case.options["lr"], result.nbeta, result.settings["localization"]
        key = NoiseKey(case.options["seed"], step=seen.step, chain=seen.chain)
        masks = case.options.get("params") if isinstance(case.options.get("params"), dict) else {}
        eps = torch.finfo(case.dtype).eps
        place = 0
        wrong, total = {}, math.sqrt(sum(float(grads[name].square().sum()) for name in self._sampled))
        for name in self._sampled:
            w, moved = seen.params[name].double(), after.params[name].double()
            reference = self._start[name].double()
            noise = normals(place, w.numel(), key).reshape(w.shape)
            place += w.numel()
            mask = masks.get(name, True) if masks else True
            free = torch.ones_like(w, dtype=torch.bool) if mask is True else mask.expand(w.shape)
            _fail_unless(torch.equal(moved[~free], reference[~free]), f"{name} moved where its mask is False")
            expected = -lr / 2 * (nbeta * grads[name] + localization * (w - reference)) + math.sqrt(lr) * noise
            error = ((moved - w) - expected)[free].abs()
            if "projects" in case.problem.traits:
                continue
            stuck = (moved == reference) & (grads[name] == 0)
            if "no-gradient" in _codes(result):
                error = ((moved - w) - expected)[free & ~stuck].abs()
            coarse = 6e-2 if self._execution.autocast is not None else 1e-3 if case.dtype == torch.float32 else 1e-6
            # Rounding of w, of the noise, and of the gradient, in units of a move.
            slack = 4 * eps * (w.abs().max() if w.numel() else 0) + 4e-6 * math.sqrt(lr) * (eps > 1e-9)
            slack = float(slack) + 1e-6 * math.sqrt(lr) + lr / 2 * nbeta * coarse * total
            if error.numel() and float(error.max()) > slack:
                wrong[name] = float(error.max()), slack
        _fail_unless(not wrong, f"the move of chain {seen.chain} after step {seen.step} is off, by (allowed): {wrong}")

    # ---- λ̂ -------------------------------------------------------------------------------------------------------

    def _check_mean(self, differences: np.ndarray) -> None:
        """λ̂ by the losses of draws and of w*."""
        case, result = self._case, self._result
        pairing = result.diagnostics["paired_with"]
        losses = np.array([s.loss for draws in self._recorder.draws.values() for s in draws])
        nbeta = result.nbeta
        if case.options.get("bias_correction"):
            return
        slack = nbeta * (self._relative * float(np.abs(losses).max()) + self._absolute) + 2e-3
        if self._is_low or self._execution.autocast is not None:
            slack *= 4
        if pairing != "none":
            expected = nbeta * float(differences.mean())
            _fail_unless(
                abs(result.llc_mean - expected) <= slack,
                f"λ̂ = {result.llc_mean:.6g}, should be {expected:.6g} (paired with {pairing})",
            )
            return
        expected = nbeta * (float(losses.mean()) - result.init_loss)
        _fail_unless(abs(result.llc_mean - expected) <= slack, f"λ̂ = {result.llc_mean:.6g}, should be {expected:.6g}")
        at_reference = self._at_reference()
        if at_reference is not None:
            _fail_unless(
                nbeta * abs(result.init_loss - at_reference) <= slack,
                f"L(w*) = {result.init_loss:.7g}, should be {at_reference:.7g}: λ̂ is off by "
                f"{nbeta * (result.init_loss - at_reference):.3g}; {result.diagnostics['unpaired_reason']}",
            )

    def _at_reference(self) -> float | None:
        """The expectation of what minibatches lose at w*; None if it can't be known by single samples."""
        case, given = self._case, self._case.given
        columns = case.problem.columns
        n = len(columns["y"])
        if given.is_augmented or given.is_once:
            return None
        whole: Any = dict(columns) if case.problem.form == "dictionary" else [columns["x"], columns["y"]]
        whole = _map(lambda t: t.to(case.dtype) if t.is_floating_point() else t, whole)
        if given.is_indexed and given.least >= n:
            self._load_buffers()
            return self._evaluate(None, whole)[0]
        if case.problem.traits & {"whole", "batch", "state"}:
            return None
        losses = []
        for k in range(n):
            self._load_buffers()
            losses.append(self._evaluate(None, _cut(whole, slice(k, k + 1)))[0])
        if given.order == "fixed" and given.weights is None and given.num_samples != n:
            losses = losses[: given.num_samples]
        values = np.array(losses)
        weights = np.ones(len(values)) if given.weights is None else given.weights.numpy()
        if given.order == "fixed" and given.weights is None:
            return None  # minibatches of unequal sizes
        return float((values * weights).sum() / weights.sum())


# ---- in closed form ------------------------------------------------------------------------------------------------


def _closed(case: Case, outcome: Outcome) -> None:
    """λ̂ of a linear regression at its minimum: ½ Σ nβh/(nβh + γ), with h the eigenvalues of the Hessian."""
    c = Choices(case.seed, 4)
    n, d, k, bias = c.among([40, 100, 300]), c.integer(1, 4), c.integer(1, 3), c.chance(0.5)
    x, localization = c.normal(n, d), c.among([0.1, 1.0, 5.0])
    y = x @ c.normal(d, k) + 0.5 * c.normal(n, k)
    design = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1) if bias else x
    solution = torch.linalg.lstsq(design, y).solution
    model = nn.Linear(d, k, bias=bias).double()
    with torch.no_grad():
        model.weight.copy_(solution[:d].T)
        if bias:
            model.bias.copy_(solution[d])
    dtype = case.dtype
    model.to(dtype)
    x, y = x.to(dtype), y.to(dtype)
    eigenvalues = torch.linalg.eigvalsh(2 / k * design.T @ design / n).repeat(k)
    nbeta = n / math.log(n)
    stiffness = nbeta * eigenvalues + localization
    exact = float((0.5 * nbeta * eigenvalues / stiffness).sum())
    options: dict[str, Any] = {"num_draws": 1500, "num_burnin": 500, "num_chains": 4, "localization": localization}
    form = c.among(["chosen", "whole batch", "mala", "loader"])
    data: Any = (x, y)
    if form == "chosen":
        options["batch_size"] = c.among([n // 4, n // 2, n])
    elif form == "whole batch":
        lr = 0.5 / float(stiffness.max())
        options |= {"lr": lr, "batch_size": n}
        exact = float((0.5 * nbeta * eigenvalues / (stiffness * (1 - lr * stiffness / 4))).sum())
    elif form == "mala":
        options["sampler"] = c.among(["mala", "hmc"])
    else:
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=n // 2, shuffle=True)
    if c.chance(0.3):
        options["execution"] = Execution(strategy=c.among(["sequential", "batched"]) if form != "loader" else None)
    outcome.calls += 1
    loss_fn = torch.nn.functional.mse_loss
    result = estimate_llc(model, data, loss_fn, seed=case.seed, progress=False, **options)
    outcome.score = (result.llc_mean - exact) / result.llc_stderr
    case.options, case.given.name = options, f"linear regression, n = {n}, d = {d}, k = {k}, bias {bias}; {form}"
    error = result.llc_mean - exact
    _fail_unless(
        abs(error) <= SIGMAS * result.llc_stderr + 0.02 * exact,
        f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g}, exact {exact:.4g}; warnings {_codes(result)}",
    )


# ---- many cases ----------------------------------------------------------------------------------------------------


def _work(seeds: range, pipe: Any) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of a loader's workers, as usual on Linux
    for seed in seeds:
        pipe.send(seed)
        pipe.send(run_case(seed))
    pipe.send(None)


def run_cases(seeds: range, report: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Run cases in a process of their own; one that dies, or hangs, is a failure of the case that it was at."""
    found: list[Outcome] = []
    start = seeds.start
    context = multiprocessing.get_context("spawn")
    while start < seeds.stop:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(range(start, seeds.stop), there))
        process.start()
        there.close()
        current: int | None = None
        try:
            while True:
                if not here.poll(TIME_LIMIT + 30):
                    raise EOFError
                message = here.recv()
                if message is None:
                    start = seeds.stop
                    break
                if isinstance(message, int):
                    current = message
                    continue
                found.append(message)
                report(message)
                start, current = message.seed + 1, None
        except EOFError:
            process.kill()
            process.join()
            if current is None:
                current = start
            text = f"case {current}: the process died (exit code {process.exitcode}) or hung"
            found.append(Outcome(current, text, calls=1))
            report(found[-1])
            start = current + 1
        process.join()
    return found


def score_problem(outcomes: list[Outcome]) -> str:
    """Whether errors of λ̂, over stated standard errors, have mean 0 and root mean square 1; empty: they have.

    Up to what four of five thousand sets of so many would exceed by chance.
    """
    scores = np.array([o.score for o in outcomes if o.score is not None])
    if len(scores) < 10:
        return ""
    mean, rms = float(scores.mean()), math.sqrt(float((scores**2).mean()))
    if abs(mean) > 3.5 * max(rms, 1) / math.sqrt(len(scores)):
        return f"λ̂ is off: z is {mean:+.2f} on average over {len(scores)} cases"
    if rms > 1 + 0.5 + 2 / math.sqrt(len(scores)):
        return f"standard errors are too small: the root mean square of z is {rms:.2f} over {len(scores)} cases"
    return ""


def summary(outcomes: list[Outcome]) -> str:
    """A line of numbers."""
    calls, failures = sum(o.calls for o in outcomes), sum(bool(o.failure and not o.known) for o in outcomes)
    refusals = sum(bool(o.refusal) for o in outcomes)
    known = Counter(o.known for o in outcomes if o.known)
    scores = np.array([o.score for o in outcomes if o.score is not None])
    text = f"{len(outcomes)} cases, {calls} estimates, {failures} failures, {refusals} refused as expected"
    if len(scores) > 1:
        text += f"; {len(scores)} in closed form: z {scores.mean():+.2f} on average, root mean square "
        text += f"{math.sqrt(float((scores**2).mean())):.2f}"
    return text + "".join(f"\n  waits to be mended, {count} times: {what}" for what, count in known.items())


def main(arguments: list[str]) -> int:
    first, _, last = arguments[0].partition(":")
    if not last:
        torch.set_num_threads(1)
        print(draw_case(int(first)))
        outcome = run_case(int(first))
        print(outcome.failure or f"nothing wrong, {outcome}")
        return bool(outcome.failure)

    def show(outcome: Outcome) -> None:
        if outcome.failure and not outcome.known:
            print(outcome.failure, flush=True)

    outcomes = run_cases(range(int(first), int(last)), show)
    slowest = sorted(outcomes, key=lambda o: -o.seconds)[:3]
    print(summary(outcomes), "; slowest:", [(o.seed, round(o.seconds, 1)) for o in slowest])
    return any(o.failure and not o.known for o in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
