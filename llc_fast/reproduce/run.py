"""One experiment, or all of them, from end to end: measure, judge, plot, say what came out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from llc_fast.reproduce import EXPERIMENTS
from llc_fast.reproduce.claims import Claim, judgement, with_verdict
from llc_fast.reproduce.rows import Tables
from llc_fast.reproduce.study import Study
from llc_fast.support.warned import shown_otherwise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("small", "paper", "hours")
"""Minutes on two cores; the papers' sizes, on one GPU; and, of those that have it, hours on two cores."""


class Experiment(Protocol):
    """What a module of this folder offers. Its docstring says what is done, and where it comes from."""

    __doc__: str | None
    SCALES: Mapping[str, Any]
    """Settings (a frozen dataclass of the module) for "small" and "paper", and maybe for "hours"; see `SCALES`."""

    def measure(self, study: Study, settings: Any) -> None:
        """Measure row by row, through `study` alone: what is kept already is not measured again."""

    def claims(self, tables: Tables, settings: Any) -> list[Claim]:
        """What is claimed and whether it holds, from the tables alone."""

    def plot(self, tables: Tables, settings: Any) -> dict[str, Figure]:
        """Figures by name, from the tables alone."""


@dataclass(frozen=True)
class Outcome:
    """What came out of an experiment.

    Attributes:
        name: of the experiment.
        folder: that holds its data.json and figures.
        claims: all of them, judged.
    """

    name: str
    folder: Path
    claims: list[Claim]

    @property
    def failed(self) -> list[Claim]:
        """Claims of ours that do not hold."""
        return with_verdict(self.claims, "FAILS")


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"name={name!r} is no experiment; choose one of: {', '.join(EXPERIMENTS)}")
    module: object = importlib.import_module(f"llc_fast.reproduce.{name.replace('-', '_')}")
    return cast(Experiment, module)


def run(experiment: Experiment, study: Study, settings: Any = None) -> list[Claim]:
    """Measure, judge and plot one experiment; data and figures are written to the study's folder.

    Args:
        experiment: what.
        study: where.
        settings: other than those of the study's scale.
    """
    settings = experiment.SCALES[study.scale] if settings is None else settings
    with shown_otherwise():  # the rows have the warnings
        experiment.measure(study, settings)
    claims = experiment.claims(study.tables, settings)
    study.finish(claims, experiment.plot(study.tables, settings))
    return claims


def run_experiments(
    name: str = "all",
    *,
    scale: str = "small",
    output: Path | None = None,
    seed: int = 0,
    device: str | None = None,
    restart: bool = False,
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> list[Outcome]:
    """Run an experiment, or all of them one after another, and say what came out.

    A run that was stopped goes on where it was when it is called again.

    Args:
        name: of `EXPERIMENTS`, or "all".
        scale: of `SCALES`; those that have no such scale are left out if all are run.
        output: folder for data.json and figures, one in it for each experiment if all are run; None: ``reproduced``.
        seed: of everything random.
        device: None: a GPU for the paper's scale if there is one, else the CPU.
        restart: forget what an earlier run has measured.
        progress: say each row as it is measured, and show bars.
        say: takes each line of what came out.

    Returns:
        An outcome for each experiment. Those with :attr:`Outcome.failed` claims are errors of this package; published
        claims that do not hold are findings.

    Raises:
        ValueError: an unknown name, scale or device; a folder that holds something else.
        KeyboardInterrupt: Ctrl-C; the same call goes on from there.
        ModuleNotFoundError: something is not installed that the experiment needs.
    """
    from llc_fast.estimate import check_device
    from llc_fast.plots import new_figure

    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of: {', '.join(SCALES)}")
    if name != "all" and scale not in (known := load(name).SCALES):
        raise ValueError(f"scale={scale!r} is none of {name}'s; choose one of: {', '.join(known)}")
    device = _device(scale) if device is None else device
    check_device(device)
    new_figure(1)  # what is missing for figures is better said now
    outcomes = []
    wanted = [each for each in EXPERIMENTS if scale in load(each).SCALES] if name == "all" else [name]
    for each in wanted:
        folder = (output or Path("reproduced", *(() if name == "all" else (name,)))) / (each if name == "all" else "")
        if restart:
            Study.forget(folder)
        say(f"{each}: {EXPERIMENTS[each]}")
        claims = run(load(each), Study(each, scale, folder, seed=seed, device=device, progress=progress))
        for claim in claims:
            say(f"  {claim}")
        say(f"  {judgement(claims)}. Data and figures are in {folder}\n")
        outcomes.append(Outcome(each, folder, claims))
    return outcomes


def _device(scale: str) -> str:
    import torch

    return "cuda" if scale == "paper" and torch.cuda.is_available() else "cpu"
