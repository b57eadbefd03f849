"""The papers' results, and what is said of this package, each from one command: ``llc-fast reproduce NAME``.

An experiment is a module of this folder; its docstring says what is done and why. It holds what it measures, what must
come out and the figures that show it (:class:`llc_fast.reproduce.run.Experiment`). What experiments share is in
``study.py`` (one experiment in one folder), ``claims.py`` (what must come out), ``rows.py`` (what is kept of an
estimate), ``figures.py`` (how it is plotted) and ``run.py`` (one experiment or all of them from end to end).
"""

from __future__ import annotations

EXPERIMENTS = {
    "dln-scaling": "deep linear networks of six sizes: estimated against known λ",
    "rescaling": "a ReLU network rescaled over eight decades: which samplers see the same network",
    "rank-transitions": "λ̂ along saddle-to-saddle training, beside the rank of the product",
    "sgld-vs-mala": "minibatch SGLD against full-gradient MALA, for n from 100 to 100,000",
    "transformer": "a small transformer over its training on text, and each of its attention heads",
    "resnet": "a residual network on digits, trained with several learning rates and batch sizes",
    "sensitivity": "λ̂ over step size, localization, batch size and temperature: where warnings are right",
    "localization": "λ̂ over γ and nβ on eight networks: what the default γ does, and what others would",
    "ladder": "four ways to λ, from the definition by volumes to local minibatch estimates",
    "accuracy": "deep linear networks: nothing tuned, against samplers whose step size was tuned on them",
    "error-bars": "deep linear networks with nothing set: do intervals hold λ, and what a length by need saves",
    "coverage": "how often the 95 % interval covers the exact answer, on five small problems",
    "influence": "influences from draws against leave-half-out retraining, beside EK-FAC",
    "variance": "why λ̂ varies from seed to seed at equal cost, and what reduces that",
}
"""What there is to run, by name. The module of an experiment has underscores in place of hyphens."""
