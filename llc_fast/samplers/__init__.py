"""Samplers: a sampler is its hyperparameters, its state and its rule; ``SAMPLERS`` has them by name."""

from llc_fast.samplers.adaptive import AdamSGLD, RMSpropSGLD
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.langevin import SGLD, PreconditionedSGLD
from llc_fast.samplers.metropolis import HMC, MALA, MetropolisSampler
from llc_fast.samplers.momentum import SGHMC, SGNHT
from llc_fast.samplers.registry import ADJUSTED, SAMPLERS, make_sampler

__all__ = [
    "ADJUSTED",
    "HMC",
    "MALA",
    "SAMPLERS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamSGLD",
    "MetropolisSampler",
    "PreconditionedSGLD",
    "RMSpropSGLD",
    "Sampler",
    "make_sampler",
]
