"""``llc-fast estimate``: a model of the user's own, from a function that returns it."""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from llc_fast.samplers import Sampler

from llc_fast.cli.options import (
    Autocast,
    BatchSize,
    Burnin,
    Chains,
    Device,
    Draws,
    JsonPath,
    Localization,
    LocalizationMetric,
    Loss,
    MaxGradients,
    MaxSeconds,
    MicrobatchSize,
    Nbeta,
    Params,
    PlotPath,
    Preconditioner,
    Preset,
    Progress,
    Refine,
    ReportPath,
    SamplerName,
    SamplerOptions,
    Seed,
    StepSize,
    Strategy,
    TargetError,
    check_different,
    deliver,
    writable,
)

Problem = Annotated[
    str, typer.Argument(help="FILE.py:FUNCTION or module:FUNCTION; the function returns (model, data, loss_fn).")
]


def estimate(
    problem: Problem,
    sampler: SamplerName = None,
    sampler_option: SamplerOptions = None,
    lr: StepSize = None,
    nbeta: Nbeta = None,
    localization: Localization = None,
    preconditioner: Preconditioner = None,
    localization_metric: LocalizationMetric = None,
    preset: Preset = None,
    loss: Loss = None,
    refine: Refine = False,
    chains: Chains = 4,
    draws: Draws = None,
    burnin: Burnin = None,
    target_error: TargetError = None,
    max_seconds: MaxSeconds = None,
    max_gradients: MaxGradients = None,
    batch_size: BatchSize = None,
    params: Params = None,
    seed: Seed = 0,
    device: Device = None,
    strategy: Strategy = None,
    autocast: Autocast = None,
    microbatch_size: MicrobatchSize = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to resume from.", dir_okay=False, callback=writable)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the result, for LLCResult.load.", dir_okay=False, callback=writable)
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    report_path: ReportPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient of a model of your own.

    Write a file with a function that returns the trained model, its data and the loss:

        def problem():
            return model, (x, y), torch.nn.functional.mse_loss
    """
    settings = settings_of(locals())
    paths = {"--checkpoint": checkpoint, "--save": save, "--json": json_path, "--plot": plot_path}
    check_different({"PROBLEM": file_of(problem)} | paths | {"--report": report_path})
    from llc_fast.estimate import estimate_llc

    model, data, loss_fn = problem_of(problem)
    result = estimate_llc(
        model, data, loss_fn if loss is None else loss, checkpoint=checkpoint, progress=progress, **settings
    )
    deliver(result, save, json_path, plot_path, report_path, problem)


COMMANDS = (estimate,)


_SAME = (
    *("lr", "nbeta", "localization", "preconditioner", "localization_metric", "preset", "refine", "target_error"),
    *("max_seconds", "max_gradients", "batch_size", "seed", "device"),
)
_SETTINGS = {name: name for name in _SAME} | {name: f"num_{name}" for name in ("chains", "draws", "burnin")}
"""Arguments of an estimate by the options that they are as they stand."""


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``estimate_llc`` that a command's options say, by the names of its parameters.

    Raises:
        typer.BadParameter: a sampler or a type that there is none of.
    """
    from llc_fast.settings import Execution

    return {
        **{name: options[option] for option, name in _SETTINGS.items() if option in options},
        "sampler": sampler_of(options["sampler"], options["sampler_option"] or []),
        "params": options["params"] or None,
        "execution": Execution(
            strategy=options["strategy"],
            autocast=dtype_of(options["autocast"]),
            microbatch_size=options["microbatch_size"],
        ),
    }


def file_of(problem: str) -> Path | None:
    """The file of FILE.py:FUNCTION; None if it is a module's."""
    place = Path(problem.rpartition(":")[0])
    return place if place.is_file() else None


def sampler_of(name: str | None, options: Sequence[str]) -> Sampler | str | None:
    """The sampler of that name with options, ``["eps=1e-3"]``; None if there is no name.

    Raises:
        typer.BadParameter: it has no such name, option or value.
    """
    from llc_fast.samplers import make_sampler
    from llc_fast.samplers.registry import sampler_class

    if name is None:
        if options:
            raise typer.BadParameter("needs --sampler, whose option it is", param_hint="--sampler-option")
        return None
    try:
        known = sampler_class(name).name
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--sampler") from None
    if not options:
        return known
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{option!r} is not NAME=VALUE", param_hint="--sampler-option")
        values[key.strip().replace("-", "_")] = _value(text.strip())
    try:
        return make_sampler(known, **values)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--sampler-option") from None


def _value(text: str) -> Any:
    """A number, a truth value, None, a tuple of these, or else the text."""
    words = {"true": True, "false": False, "none": None, "inf": math.inf}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def dtype_of(name: str | None) -> torch.dtype | None:
    """The floating-point type of that name.

    Raises:
        typer.BadParameter: there is none.
    """
    import torch

    if name is None:
        return None
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"{name!r} is not bfloat16 or float16", param_hint="--autocast")
    return found


def problem_of(where: str, wanted: Sequence[str] = ("model", "data", "loss_fn")) -> Any:
    """(model, data, loss_fn), or what else is wanted, from FILE.py:FUNCTION or package.module:FUNCTION.

    The file sees what it would see if it were run as ``python FILE.py``, but for its ``__name__``: its folder comes
    first in ``sys.path``, and ``sys.argv`` is its own path alone. `sys.argv` is put back; `sys.path` is not, since a
    model may import something late.
    """
    place, colon, name = where.rpartition(":")
    if not colon or not place or not name:
        raise typer.BadParameter(f"{where!r} is not FILE.py:FUNCTION", param_hint="PROBLEM")
    path = Path(place)
    is_file = place.endswith(".py") or path.is_file()
    if is_file and not path.is_file():
        raise typer.BadParameter(f"there is no file {place}", param_hint="PROBLEM")
    before = sys.argv
    sys.argv = [place]
    try:
        module = _imported_file(path) if is_file else _imported(place)
        function = getattr(module, name, None)
        if not callable(function):
            raise typer.BadParameter(f"{place} has no function {name!r}", param_hint="PROBLEM")
        found = function()
    finally:
        sys.argv = before
    if not isinstance(found, tuple) or len(found) != len(wanted):
        raise typer.BadParameter(
            f"{name}() must return ({', '.join(wanted)}), got {_described(found)}", param_hint="PROBLEM"
        )
    return found


def _described(found: Any) -> str:
    return f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__


def _imported_file(path: Path) -> ModuleType:
    # Under a name that nobody else has: a file may be called random.py, and others go on to need the module `random`,
    # also those that import it late, which would find the file once its folder comes first.
    with contextlib.suppress(Exception):
        found = importlib.util.find_spec(path.stem)
        if found is not None and found.origin is not None and not _is_same(found.origin, path):
            importlib.import_module(path.stem)
    name = "llc_fast_problem_" + re.sub(r"\W", "_", path.stem)
    sys.path.insert(0, str(path.resolve().parent))
    loader = importlib.machinery.SourceFileLoader(name, str(path.absolute()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes and pickles look there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_same(origin: str, path: Path) -> bool:
    try:
        return os.path.samefile(origin, path)
    except OSError:  # "built-in"
        return False


def _imported(place: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
            raise typer.BadParameter(f"there is no module {error.name}", param_hint="PROBLEM") from None
        raise
