"""Our optimizers inside devinterp 2.0.1: its own functions, with its own arguments and results::

    from llc_fast.compat import devinterp2

    samples = devinterp2.sample(model, dataset, {}, lr=1e-3, n_beta=30.0, localization=300.0)
    samples = devinterp2.sample(…, sampling_method=llc_fast.SGHMC, sampling_method_kwargs={"momentum_decay": 0.1})

``sample``, ``llc``, ``susceptibilities`` and ``bif`` call devinterp's function of that name, where each step is one
pass of our fused kernel. All else is devinterp's: batches, losses, observables, the store on disk. Calls of its own
functions are as ever, even in another thread meanwhile, and nothing of it is changed when the call is over.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from llc_fast import optim
from llc_fast.samplers.registry import sampler_class

SUPPORTED = ("2.0.1",)
"""Versions of devinterp that this was tested with; others are refused, as their samplers may mean something else."""
THEIRS: Mapping[str, type[optim.LangevinOptimizer]] = {
    "sgmcmc_sgld": optim.SGLD,
    "rmsprop_sgld": optim.RMSpropSGLD,
}
"""Our optimizers by devinterp's names of the same samplers."""
_MARK = "llc_fast"
"""The option that says in devinterp's arguments, and in the store that it writes, which optimizer of ours made it."""
_lock = threading.Lock()
_users = 0
_before: dict[str, Callable[..., Any]] = {}


def sample(*args: Any, **arguments: Any) -> Any:
    """``devinterp.slt.sampling.sample`` with an optimizer of ours.

    Args:
        args, arguments: devinterp's, but for ``sampling_method``: an optimizer (``llc_fast.SGHMC``), the name of a
            sampler (``"sghmc"``), or devinterp's name of one (``"rmsprop_sgld"``). Default: :class:`llc_fast.SGLD`,
            which takes the steps of devinterp's default. ``sampling_method_kwargs`` are its further options.

    Returns:
        devinterp's ``DataTree``. Its metadata name the optimizer, so that a store of devinterp's own sampler is not
        taken for one of ours, nor the other way round.

    Raises:
        ModuleNotFoundError: devinterp is not installed.
        ImportError: it is of another version than :data:`SUPPORTED`.
        TypeError, ValueError: `sampling_method` is none of ours, its options are not, or ``save_metrics`` is asked for.
    """
    return _call("sampling", "sample", args, arguments)


def llc(*args: Any, **arguments: Any) -> Any:
    """``devinterp.slt.llc.llc`` with an optimizer of ours, chosen as for :func:`sample`; returns its ``Dataset``."""
    return _call("llc", "llc", args, arguments)


def susceptibilities(*args: Any, **arguments: Any) -> Any:
    """``devinterp.slt.susceptibilities.susceptibilities`` with an optimizer of ours, chosen as for :func:`sample`."""
    return _call("susceptibilities", "susceptibilities", args, arguments)


def bif(*args: Any, **arguments: Any) -> Any:
    """``devinterp.slt.bif.bif`` with an optimizer of ours, chosen as for :func:`sample`."""
    return _call("bif", "bif", args, arguments)


def _call(module: str, name: str, args: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
    cls = optimizer_class(arguments.get("sampling_method", "sgmcmc_sgld"))
    options = dict(arguments.get("sampling_method_kwargs") or {})
    if arguments.get("save_metrics"):
        raise ValueError("save_metrics=True is of devinterp's own samplers: leave it out, or call devinterp itself")
    try:
        json.dumps(options)
    except TypeError as error:
        raise TypeError(
            f"sampling_method_kwargs must be numbers, as devinterp writes them into its store: {error}"
        ) from None
    methods = _methods()
    theirs = next((key for key, ours in THEIRS.items() if ours is cls), "sgmcmc_sgld")  # which options it may have
    with _ours(methods):
        function = getattr(importlib.import_module(f"devinterp.slt.{module}"), name)
        return function(
            *args,
            **arguments | {"sampling_method": theirs, "sampling_method_kwargs": {**options, _MARK: cls.sampler.name}},
        )


def optimizer_class(method: Any) -> type[optim.LangevinOptimizer]:
    """The optimizer that ``sampling_method`` means.

    Raises:
        TypeError, ValueError: none of ours.
    """
    if isinstance(method, str):
        return THEIRS[method] if method in THEIRS else optim.optimizer_for(sampler_class(method))
    if isinstance(method, type) and issubclass(method, optim.LangevinOptimizer):
        return method
    raise TypeError(
        "sampling_method must be an optimizer of llc_fast, such as llc_fast.SGLD, or the name of a sampler, got "
        f"{method!r}"
    )


def make_optimizer(
    cls: type[optim.LangevinOptimizer],
    groups: Iterable[Mapping[str, Any]],
    *,
    save_metrics: bool = False,
    **options: Any,
) -> optim.LangevinOptimizer:
    """An optimizer of ours from what devinterp gives to its samplers.

    Args:
        cls: which.
        groups: ``{"params": parameter, "mask": tensor of zeros and ones, or None}``.
        save_metrics: must be False.
        options: ``lr``, ``nbeta``, ``localization``, ``noise_level``, ``weight_decay`` and ``bounding_box_size``, which
            mean the same; and more of its own.

    Raises:
        ValueError: a mask has other values, or `save_metrics` is True.
    """
    if save_metrics:
        raise ValueError("save_metrics=True is of devinterp's own samplers: leave it out")
    if not options.get("add_grad_correction", True):  # devinterp's RMSprop can't do it either
        del options["add_grad_correction"]
    given = list(groups)  # one for each parameter; a group of ours is one call of the kernel, so they become one
    masks = [_mask(group.get("mask")) for group in given]
    return cls([{"params": [group["params"] for group in given], "optimize_over": masks}], **options)


def _mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("param_masks must hold zeros and ones: an element moves or it does not")
    return mask != 0


def _methods() -> dict[str, Callable[..., Any]]:
    """devinterp's table of samplers, after a look at its version."""
    try:
        version = importlib.metadata.version("devinterp")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"devinterp is not installed: pip install devinterp=={SUPPORTED[-1]}") from None
    if version not in SUPPORTED:
        more = ", which takes llc_fast.SGLD itself as sampling_method" if version.startswith("1.") else ""
        raise ImportError(f"devinterp {version} is installed{more}; this is for {' and '.join(SUPPORTED)}")
    found: dict[str, Callable[..., Any]] = importlib.import_module("devinterp.slt.config").SAMPLING_METHODS
    return found


@contextlib.contextmanager
def _ours(methods: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Meanwhile devinterp's samplers are ours where somebody asks for them by the option; then all is as before."""
    global _users
    with _lock:
        if not _users:
            _before.update(methods)
            methods.update({name: _either(made) for name, made in _before.items()})
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                methods.update(_before)
                _before.clear()


def _either(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def make(params: Any, *args: Any, **options: Any) -> Any:
        name = options.pop(_MARK, None)
        return (
            theirs(params, *args, **options)
            if name is None
            else make_optimizer(optimizer_class(name), params, **options)
        )

    return make
