"""The papers' results, each from one command: ``llc-fast reproduce NAME``.

An experiment is a module of this folder: what it measures, what must come out, and the pictures that show it; see
:class:`llc_fast.reproduce.frame.Experiment`. What they share is in ``frame.py``.
"""

from __future__ import annotations

import importlib
from typing import cast

from llc_fast.reproduce.frame import Experiment

EXPERIMENTS = {
    "dln-scaling": "deep linear networks of six sizes: estimated against known λ",
    "rescaling": "a ReLU network rescaled over eight decades: which samplers see the same network",
    "rank-transitions": "λ̂ along saddle-to-saddle training, beside the rank of the product",
    "sgld-vs-mala": "minibatch SGLD against full-gradient MALA, for n from 100 to 100,000",
    "transformer": "a small transformer over its training on text, and each of its attention heads",
    "resnet": "a residual network on digits, trained with several learning rates and batch sizes",
    "sensitivity": "λ̂ over step size, localization, batch size and temperature: where warnings are right",
    "ladder": "four ways to λ, from the definition by volumes to local minibatch estimates",
}


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; choose one of: {', '.join(EXPERIMENTS)}")
    module: object = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return cast(Experiment, module)
