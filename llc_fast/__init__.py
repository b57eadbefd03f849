"""llc_fast: fast, honest estimates of the local learning coefficient (LLC) of PyTorch models.

    result = llc_fast.estimate_llc(model, (x, y), loss_fn)

Start with :func:`estimate_llc`. :class:`SGLD` is an optimizer for a sampling loop of your own, and
:mod:`llc_fast.theory` has learning coefficients known in closed form.

Names are imported when they are first used (PEP 562), so ``import llc_fast`` and ``llc-fast --help`` do not wait for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llc_fast import language, samplers, theory
    from llc_fast.behavioral import behavioral_loss
    from llc_fast.chains.draw import Draw
    from llc_fast.estimate import calibrate, estimate_llc
    from llc_fast.grid import ScanResult, scan
    from llc_fast.monitor import LLCMonitor
    from llc_fast.objective.components import components
    from llc_fast.optim import SGHMC, SGLD, SGNHT, AdamSGLD, PreconditionedSGLD, RMSpropSGLD
    from llc_fast.result import LLCResult
    from llc_fast.samples import Samples
    from llc_fast.sampling import sample
    from llc_fast.settings import Execution, default_localization, default_nbeta
    from llc_fast.support.warned import LLCWarning
    from llc_fast.susceptibility import SusceptibilityResult, susceptibilities
    from llc_fast.sweep import sweep_checkpoints

__version__ = "0.2.0"
__all__ = [
    "SGHMC",
    "SGLD",
    "SGNHT",
    "AdamSGLD",
    "Draw",
    "Execution",
    "LLCMonitor",
    "LLCResult",
    "LLCWarning",
    "PreconditionedSGLD",
    "RMSpropSGLD",
    "Samples",
    "ScanResult",
    "SusceptibilityResult",
    "__version__",
    "behavioral_loss",
    "calibrate",
    "components",
    "default_localization",
    "default_nbeta",
    "estimate_llc",
    "language",
    "sample",
    "samplers",
    "scan",
    "susceptibilities",
    "sweep_checkpoints",
    "theory",
]
_HOME = {
    name: module
    for module, names in {
        "behavioral": ("behavioral_loss",),
        "chains.draw": ("Draw",),
        "estimate": ("calibrate", "estimate_llc"),
        "grid": ("ScanResult", "scan"),
        "monitor": ("LLCMonitor",),
        "objective.components": ("components",),
        "optim": ("SGHMC", "SGLD", "SGNHT", "AdamSGLD", "PreconditionedSGLD", "RMSpropSGLD"),
        "result": ("LLCResult",),
        "samples": ("Samples",),
        "sampling": ("sample",),
        "settings": ("Execution", "default_localization", "default_nbeta"),
        "support.warned": ("LLCWarning",),
        "susceptibility": ("SusceptibilityResult", "susceptibilities"),
        "sweep": ("sweep_checkpoints",),
    }.items()
    for name in names
}
"""The module of each public name; what is in none of them is a module itself."""


def _why_not_built() -> str:
    """What is wrong where the native module is not, and what to do."""
    from pathlib import Path

    folder = Path(__path__[0]).resolve()
    if others := sorted(path.name for path in folder.glob("_native.*") if path.suffix in (".so", ".pyd")):
        return (
            f"the native module in {folder} is built for another Python ({', '.join(others)}). Install llc_fast again"
        )
    if (folder.parent / "setup.py").exists():
        return (
            f"llc_fast was imported from its source folder, {folder.parent}, where its native module is not built. "
            "Start Python in another folder, or build it there: pip install -e . (or python setup.py build_ext "
            "--inplace)"
        )
    return f"{folder} lacks its native module. Install llc_fast again"


if not TYPE_CHECKING:  # type checkers would believe that every name exists

    def __getattr__(name):
        """A public name or a submodule, imported at its first use."""
        if name in _HOME:
            value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        if not name.startswith("__"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise  # the module exists, and something that it imports does not
                if name == "_native":
                    raise ModuleNotFoundError(f"{error}: {_why_not_built()}", name=error.name) from None
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from pkgutil import iter_modules

    return sorted({*__all__, *(m.name for m in iter_modules(__path__) if not m.name.startswith("_"))})
