"""llc_fast: fast, honest estimates of the local learning coefficient (LLC) of PyTorch models.

    result = llc_fast.estimate_llc(model, (x, y), loss_fn)

Start with :func:`estimate_llc`; :class:`SGLD` is a drop-in optimizer for a sampling loop of your own;
:mod:`llc_fast.theory` holds learning coefficients known in closed form.
"""

from llc_fast import theory
from llc_fast.chains.draw import Draw
from llc_fast.estimate import calibrate, default_nbeta, estimate_llc
from llc_fast.optim import SGHMC, SGLD, SGNHT, AdamSGLD, PreconditionedSGLD, RMSpropSGLD
from llc_fast.result import LLCResult
from llc_fast.sweep import sweep_checkpoints

__version__ = "0.1.0"
__all__ = [
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamSGLD",
    "Draw",
    "LLCResult",
    "PreconditionedSGLD",
    "RMSpropSGLD",
    "__version__",
    "calibrate",
    "default_nbeta",
    "estimate_llc",
    "sweep_checkpoints",
    "theory",
]
