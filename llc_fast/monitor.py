"""λ̂ while a model is trained: in a loop of your own, in the Trainer of transformers, in Lightning."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure
from llc_fast.behavioral import Behavioral, named_loss
from llc_fast.chains.processes import telling_early_failures
from llc_fast.estimate import ARGUMENTS, Surroundings, estimate_llc, prepare
from llc_fast.kernels.sharding import is_dtensor
from llc_fast.language import NextToken
from llc_fast.logs import LightningLog, Log, TensorBoardLog, WandBLog, as_logs
from llc_fast.objective.objective import LossFunction
from llc_fast.progress import ProgressFunction, announce
from llc_fast.result import LLCResult, Warning
from llc_fast.settings import LIMITS, PRESETS, with_old_keywords
from llc_fast.support.arguments import check_integer
from llc_fast.support.optional import require
from llc_fast.support.warned import issue, shown_otherwise
from llc_fast.sweep import dataset_of, scale_warnings
from llc_fast.weights import inner_model

DEFAULT_MAX_GRADIENTS = 4000
"""Of an estimate, where nobody says how long it may be: a tenth of what :func:`llc_fast.estimate_llc` may take."""
EVENTS = ("save", "evaluate", "epoch")
"""What trainers do that an estimate may follow."""
_NOTICEABLE_SHARE, _NOTICEABLE_SECONDS = 0.5, 60.0
"""Share of the time since training began, and seconds, above which a line says what estimates have taken."""
_OURS = {
    "checkpoint": "give folder=, which keeps the results",
    "warm_start": "chains start at w*",
    "keep_ends": "chains start at w*",
    "device": "the model is evaluated where it is trained",
    "settings": "each estimate chooses its step size anew; pass lr=, nbeta= or localization= to fix one",
}
"""Arguments of an estimate that a monitor has no use for, and what to do."""
_FILE = re.compile(r"step-(\d+)\.npz")


class LLCMonitor:
    """Estimates λ at moments of a training run, and leaves training as it would have been, bit for bit.

    In a loop of your own, in the Trainer of transformers, and in Lightning::

        monitor = llc_fast.LLCMonitor(data, loss_fn, every=100)
        for step, batch in enumerate(loader, start=1):
            …
            monitor(model, step)

        transformers.Trainer(…, callbacks=[llc_fast.LLCMonitor(data, "next-token")])
        lightning.Trainer(…, callbacks=[llc_fast.LLCMonitor(data, loss_fn)])

    Weights, optimizer, gradients, buffers, modes and random numbers are afterwards what they were before. The first
    time that the monitor sees the model, it evaluates the loss and looks at all arguments: what is wrong is an error
    before training begins, and what takes longer than ten seconds is said. Each estimate is
    :func:`llc_fast.estimate_llc`'s, with a step size and, unless you give one, a γ of its own.

    In a run of several processes (DDP) all of them must come by: they share the chains, and each has all results. Rank
    0 logs them. DataParallel, DDP and ``torch.compile`` are unwrapped. Models that are sharded over processes (FSDP,
    ZeRO 3) are refused: use :func:`llc_fast.sweep_checkpoints` on what they save.

    Ctrl-C in an estimate ends it; what there is is kept and logged, and then ``KeyboardInterrupt`` ends the training.

    Args:
        data, loss_fn: as for :func:`llc_fast.estimate_llc`; the same data at every step, and in every process. In
            Lightning, the model that ``loss_fn(model, batch)`` is called with is the ``LightningModule``.
        every: estimate every so many steps; or after each ``"save"`` (of a checkpoint), ``"evaluate"`` or ``"epoch"``
            of a trainer. None: after each save, unless `steps` are given. In a loop of your own, where nobody says
            what is saved, None and these names mean at each call.
        steps: estimate at these steps instead, such as ``[0, 10, 30, 100, 300]``. 0 is before the first one.
        mode: ``"eval"``: the model is evaluated in eval mode, without dropout, and then put back. ``"unchanged"``: in
            the mode that it is in, as losses need it that exist in training alone.
        log: where to write beside what is found: the name of a ``.csv`` file, which is continued; a ``SummaryWriter``
            of TensorBoard; a run of wandb; a function of (metrics, step); or a list of these. Found are the loggers of
            Lightning's Trainer; of transformers' its history of logs, and TensorBoard where it reports to it; an active
            run of wandb. False: nowhere.
        folder: keeps every result, in files ``step-100.npz``, and begins with those that it has. Made if need be.
        name: what the metrics' names begin with.
        on_error: what to do when an estimate or a log fails after training has begun: ``"warn"`` and go on, or
            ``"raise"``.
        progress: print a line for each estimate on stderr, and before the first how long they may take. A function is
            called as by :func:`llc_fast.estimate_llc`.
        settings: further arguments of :func:`llc_fast.estimate_llc`. Where none of them says how long an estimate may
            be, ``max_gradients`` is 4000.

    Attributes:
        results: the results by step.
        errors: why there is none, by step.

    Raises:
        TypeError, ValueError, PermissionError: an argument of the wrong kind or out of range.
    """

    def __init__(
        self,
        data: Any,
        loss_fn: LossFunction | NextToken | Behavioral | str | None,
        *,
        every: int | str | None = None,
        steps: Iterable[int] | None = None,
        mode: str = "eval",
        log: Any = None,
        folder: str | os.PathLike[str] | None = None,
        name: str = "llc",
        on_error: str = "warn",
        progress: bool | ProgressFunction = True,
        **settings: Any,
    ) -> None:
        self._steps = None if steps is None else frozenset(check_integer("steps", step, 0) for step in steps)
        self._every = _checked_every(every, self._steps)
        _one_of("mode", mode, ("eval", "unchanged"))
        _one_of("on_error", on_error, ("warn", "raise"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"name={name!r} must be a text, which the metrics' names begin with")
        for ours, remedy in _OURS.items():
            if ours in settings:
                raise TypeError(f"{ours} is not for monitors: {remedy}")
        if unknown := sorted(set(settings) - ARGUMENTS):
            raise TypeError(f"LLCMonitor() got an unexpected keyword argument {unknown[0]!r}")
        if not _says_how_long(settings):
            settings = {**settings, "max_gradients": DEFAULT_MAX_GRADIENTS}
        with_old_keywords(dict(settings), {}, "LLCMonitor")  # what is wrong by itself
        named_loss(loss_fn)
        self.results: dict[int, LLCResult] = {}
        self.errors: dict[int, str] = {}
        self._data, self._loss_fn, self._settings = data, loss_fn, settings
        self._mode, self._name, self._on_error, self._progress = mode, name, on_error, progress
        self._logs, self._finds_logs = as_logs(log), log is not False
        self._folder = None if folder is None else _opened(folder, self.results)
        self._found: list[Log] = []
        self._begun: float | None = None
        self._spent = 0.0
        self._is_noticed = False
        self._said: set[str] = set()
        self._last: int | None = None
        self._is_pending = False
        self._is_partial = False

    def __call__(self, model: nn.Module, step: int) -> LLCResult | None:
        """In a loop of your own: an estimate, if one is due at this step. All processes of a DDP run must call it.

        Args:
            model: as it is trained; in the wrapper of DDP or ``torch.compile``, too.
            step: what the estimate is called.

        Returns:
            The result; None where none is due, or where an error was turned into a warning.

        Raises:
            TypeError, ValueError: the first time: something is wrong with model, data, loss or settings.
            KeyboardInterrupt: Ctrl-C.
        """
        step = check_integer("step", step, 0)
        if self._begun is None:
            self._begin(model, [WandBLog()])
        return self._estimate(model, step) if self._is_due(step, at_each_event=True) else None

    def to_dataset(self) -> xarray.Dataset:
        """All results over ``step``, as :func:`llc_fast.sweep_checkpoints` returns them.

        Raises:
            ModuleNotFoundError: xarray is not installed (``pip install "llc_fast[xarray]"``).
        """
        steps = sorted(self.results)
        return dataset_of([self.results[step] for step in steps], steps, "step", self._is_partial)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """λ̂ with its 95 % interval over the steps, and L(w*) below; hollow where there is a warning.

        Args:
            path: of a picture to write; the ending says the format.

        Raises:
            ValueError: there are no results.
            ModuleNotFoundError: matplotlib is not installed (``pip install "llc_fast[plot]"``).
        """
        if not self.results:
            raise ValueError("there are no results to plot: no estimate has been due so far")
        from llc_fast.plots import plot_training, write_figure

        steps = sorted(self.results)
        figure = plot_training(steps, [self.results[step] for step in steps])
        if path is not None:
            write_figure(figure, path)
        return figure

    # ---- what is due ---------------------------------------------------------------------------------------

    def _is_due(self, step: int, *, at_each_event: bool = False) -> bool:
        """Whether an estimate is due because of the step alone."""
        if self._steps is not None:
            return step in self._steps
        return step % self._every == 0 if isinstance(self._every, int) else at_each_event

    def _follows(self, event: str) -> bool:
        return self._every == event

    # ---- the work ------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, found: list[Log]) -> None:
        """Training begins: try everything once, and say what estimates will take."""
        self._found = found if self._finds_logs else []
        self._last, self._is_pending, self._is_partial = None, False, False
        with telling_early_failures(getattr(self._settings.get("execution"), "distributed", None)):
            asked = with_old_keywords({**self._settings, "progress": self._progress is True}, {}, "LLCMonitor")
            asked, loss = dataclasses.replace(asked, refine=False), named_loss(self._loss_fn)
            model = unwrapped(model)
        with self._evaluated(model):
            with telling_early_failures(asked.execution.distributed):
                surroundings = Surroundings(asked, model, self._data, loss)
            with surroundings:
                prepare(asked, model, self._data, loss, surroundings)
        self._begun, self._spent = time.perf_counter(), 0.0

    def _estimate(self, model: nn.Module, step: int) -> LLCResult | None:
        self._last, self._is_pending = step, False
        began = time.perf_counter()
        self._is_partial = False
        try:
            model = unwrapped(model)
            with self._evaluated(model), shown_otherwise():
                result = estimate_llc(
                    model,
                    self._data,
                    self._loss_fn,
                    **{"progress": self._progress if callable(self._progress) else False, **self._settings},
                )
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._give_up(step, "there is no estimate", error)
            return None
        finally:
            self._spent += time.perf_counter() - began
        result.diagnostics.setdefault("is_warm", False)
        self.results[step] = result
        self.errors.pop(step, None)
        self._is_partial = result.is_partial
        if _rank() == 0:
            self._report(step, result)
        if result.is_partial:
            raise KeyboardInterrupt
        return result

    def _report(self, step: int, result: LLCResult) -> None:
        """Keep the result, write it to all logs, and say what is new."""
        self._guarded(step, "the result was not saved", lambda: self._save(step, result))
        metrics = metrics_of(result, self._name)
        for log in (*self._logs, *self._found):
            self._guarded(step, f"{type(log).__name__} failed", lambda log=log: log.write(step, metrics))  # type: ignore[misc]
        if self._progress is True:
            announce(f"step {step}: {_in_words(result)}")
            share = self._spent / max(time.perf_counter() - (self._begun or 0.0), 1e-9)
            if share > _NOTICEABLE_SHARE and self._spent > _NOTICEABLE_SECONDS and not self._is_noticed:
                self._is_noticed = True
                announce(
                    f"estimates have taken {share:.0%} of the time since training began. max_gradients= or num_draws= "
                    "makes them shorter, every= makes them fewer"
                )
        new = [warning for warning in result.warnings if warning.code not in self._said]
        new = [Warning(f"Step {step}: {warning}", warning.code) for warning in new]
        new += [] if "scale" in self._said else scale_warnings(list(self.results.values()))
        self._said |= {warning.code for warning in new}
        issue(new, stacklevel=4)

    def _save(self, step: int, result: LLCResult) -> None:
        if self._folder is not None:
            result.save(self._folder / f"step-{step}.npz")

    def _guarded(self, step: int, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._give_up(step, what, error)

    def _give_up(self, step: int, what: str, error: Exception) -> None:
        """Text alone is kept: an exception would keep the memory of all that it passed through."""
        self.errors[step] = f"{what}: {type(error).__name__}: {error}"
        warnings.warn(f"LLCMonitor, step {step}: {self.errors[step]}. Training goes on", RuntimeWarning, stacklevel=5)

    @contextlib.contextmanager
    def _evaluated(self, model: nn.Module) -> Iterator[None]:
        """Gradients can be taken, precision is the model's, and modules are in the mode asked for."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {p.device.type for p in model.parameters()}:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if self._mode == "eval":
                stack.enter_context(_in_eval_mode(model))
            if getattr(self._settings.get("execution"), "distributed", None) is not False:
                stack.enter_context(_same_buffers(model))
            try:
                yield
            finally:
                if any(p.is_cuda for p in model.parameters()):  # blocks of sizes that training has no use for
                    torch.cuda.empty_cache()

    # ---- transformers --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Of transformers' Trainer."""
        self._begin(given["model"], _logs_of_transformers(args, state))
        self._at_start(given["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Of transformers' Trainer."""
        if self._is_due(state.global_step):
            self._once(given["model"], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Of transformers' Trainer."""
        self._after("save", given["model"], state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Of transformers' Trainer."""
        self._after("evaluate", given["model"], state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Of transformers' Trainer."""
        self._after("epoch", given["model"], state)

    def _after(self, event: str, model: nn.Module, state: Any) -> None:
        if self._follows(event) and self._begun is not None:
            self._once(model, state.global_step)

    def _at_start(self, model: nn.Module, step: int) -> None:
        """Before the first step, if that was asked for; where training is resumed, its step has been seen to."""
        if step == 0 and self._steps is not None and 0 in self._steps:
            self._estimate(model, 0)
        self._last = step

    def _once(self, model: nn.Module, step: int) -> None:
        """A trainer may come by several times after one step."""
        if step != self._last:
            self._estimate(model, step)

    # ---- Lightning -----------------------------------------------------------------------------------------
    # A checkpoint is not written yet when its hook is called, and validation has its own modes: what is due then is
    # done before the next batch, or at the end of training. The weights are the same.

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Of Lightning's Trainer."""
        self._begin(module, [LightningLog(logger) for logger in trainer.loggers] or [WandBLog()])
        self._at_start(module, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        """Of Lightning's Trainer."""
        self._if_pending(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        """Of Lightning's Trainer."""
        if self._is_due(trainer.global_step):
            self._once(module, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Of Lightning's Trainer."""
        self._is_pending |= self._follows("epoch")

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Of Lightning's Trainer."""
        self._is_pending |= self._follows("evaluate") and not trainer.sanity_checking

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        """Of Lightning's Trainer."""
        self._is_pending |= self._follows("save")

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Of Lightning's Trainer."""
        self._if_pending(trainer, module)

    def _if_pending(self, trainer: Any, module: Any) -> None:
        if self._is_pending:
            self._is_pending = False
            self._once(module, trainer.global_step)

    @property
    def state_key(self) -> str:
        """Of Lightning's callbacks: another one for each monitor of a Trainer."""
        return f"LLCMonitor({self._name})"

    _legacy_state_key = state_key

    def state_dict(self) -> dict[str, Any]:
        """Of Lightning's callbacks: nothing is kept in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of Lightning's callbacks."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Of Lightning's callbacks."""

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Of Lightning's callbacks."""

    def __getattr__(self, name: str) -> Any:
        """Trainers call whatever events they have, in this version or a later one: all others do nothing."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def metrics_of(result: LLCResult, name: str = "llc") -> dict[str, float | int | str]:
    """What is logged of a result: λ̂ with its error and interval, L(w*), the scale, warnings, and the time it took."""
    low, high = result.interval()
    found = {
        "mean": result.llc_mean,
        "stderr": result.llc_stderr,
        "low": low,
        "high": high,
        "init_loss": result.init_loss,
        "nbeta": result.nbeta,
        "localization": result.settings["localization"],
        "seconds": result.settings["seconds"],
        "num_warnings": len(result.warnings),
        "warnings": " ".join(warning.code for warning in result.warnings),
    }
    return {f"{name}/{key}": value for key, value in found.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of the wrappers of DataParallel, DDP, ``torch.compile``, DeepSpeed and Fabric.

    Raises:
        TypeError: it is no module.
        ValueError: this process has but a part of each parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = inner_model(model)
    fsdp = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if fsdp or any(is_dtensor(p) or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "model is sharded over processes (FSDP, tensor parallelism or ZeRO 3), so that none has it whole: use "
            "sweep_checkpoints on the checkpoints that training saves"
        )
    return model


def _ignore(*args: object, **given: object) -> None:
    """An event that a monitor has no use for."""


def _rank() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def _logs_of_transformers(args: Any, state: Any) -> list[Log]:
    """The history of the Trainer, which it saves, and what it reports to; it lets no callback log."""
    found: list[Log] = [_History(state)]
    reports = args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]
    found.append(WandBLog(axis="train/global_step" if "wandb" in reports else None))
    if "tensorboard" in reports and _rank() == 0:
        # The Trainer's own writer is out of reach: another run in the folder that its runs are in.
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs")
        writer = require("torch.utils.tensorboard", "test").SummaryWriter(os.path.join(folder, "llc"))
        found.append(TensorBoardLog(writer))
    return found


class _History:
    """``log_history`` of transformers' Trainer, which ``trainer_state.json`` has."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def write(self, step: int, metrics: Any) -> None:
        # JSON has no NaN.
        numbers = {k: v for k, v in metrics.items() if isinstance(v, str) or math.isfinite(v)}
        self._state.log_history.append({**numbers, "epoch": self._state.epoch, "step": step})


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """By the flags alone: some modules merge weights, or worse, when ``train()`` or ``eval()`` is called."""
    training = [m for m in model.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """The buffers of rank 0 in all processes: with DDP each has its own running averages, and rank 0's are saved."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield
        return
    buffers = [b for b in model.buffers() if b.layout is torch.strided]
    mine = [b.detach().clone() for b in buffers]
    on_gpu = dist.get_backend() == "nccl"
    with torch.no_grad():
        for b in buffers:
            sent: Tensor = b.detach().clone().contiguous()
            sent = sent.cuda() if on_gpu else sent.cpu()
            dist.broadcast(sent, src=0)
            b.data.copy_(sent)
    try:
        yield
    finally:
        for b, values in zip(buffers, mine, strict=True):
            b.data.copy_(values)


def _checked_every(every: Any, steps: frozenset[int] | None) -> int | str | None:
    if every is None:
        return None if steps is not None else "save"
    if steps is not None:
        raise ValueError("every and steps are both given, and each says when: give one of them")
    if isinstance(every, str):
        _one_of("every", every, EVENTS)
        return every
    return check_integer("every", every, 1)


def _one_of(argument: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument}={value!r} is unknown; choose one of: {', '.join(map(repr, known))}")


def _says_how_long(settings: dict[str, Any]) -> bool:
    given = {*PRESETS.get(settings.get("preset") or "", {}), *(k for k, v in settings.items() if v is not None)}
    return not given.isdisjoint((*LIMITS, "num_draws", "num_burnin"))


def _opened(folder: str | os.PathLike[str], results: dict[int, LLCResult]) -> Path:
    """The absolute path of the folder, with what it has among the results."""
    path = Path(os.fsdecode(folder)).absolute()
    path.mkdir(parents=True, exist_ok=True)
    found = sorted((int(m[1]), file) for file in path.iterdir() if (m := _FILE.fullmatch(file.name)))
    for step, file in found:
        try:
            results[step] = LLCResult.load(file)
        except Exception as error:
            raise ValueError(f"folder={os.fspath(folder)!r}: {file.name} is no result: {error}") from error
    return path


def _in_words(result: LLCResult) -> str:
    codes = ", ".join(warning.code for warning in result.warnings)
    seconds = result.settings["seconds"]
    return f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g} in {seconds:.1f} s" + (f" ({codes})" if codes else "")
