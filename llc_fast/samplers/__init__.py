"""Samplers: a sampler is its hyperparameters, its state and its rule; ``SAMPLERS`` has them by name."""

# SAMPLERS has them in the order of these imports.
# isort: off
from llc_fast.samplers.base import Sampler
from llc_fast.samplers.langevin import LangevinSampler, PreconditionedSGLDSampler, SGLDSampler
from llc_fast.samplers.adaptive import AdamSGLDSampler, RMSpropSGLDSampler
from llc_fast.samplers.momentum import SGHMCSampler, SGNHTSampler
from llc_fast.samplers.kronecker import KFACSGLDSampler
from llc_fast.samplers.metropolis import HMCSampler, MALASampler, MetropolisSampler
from llc_fast.samplers.registry import SAMPLERS, make_sampler, register, samplers_with_optimizer
# isort: on

__all__ = [
    "SAMPLERS",
    "AdamSGLDSampler",
    "HMCSampler",
    "KFACSGLDSampler",
    "LangevinSampler",
    "MALASampler",
    "MetropolisSampler",
    "PreconditionedSGLDSampler",
    "RMSpropSGLDSampler",
    "SGHMCSampler",
    "SGLDSampler",
    "SGNHTSampler",
    "Sampler",
    "make_sampler",
    "register",
    "samplers_with_optimizer",
]
