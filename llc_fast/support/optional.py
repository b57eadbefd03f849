"""Packages that only some jobs need."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import a module, or say which of this package's extras brings it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # it is there, and something that it needs is not
        raise ModuleNotFoundError(f'{package} is not installed: pip install "llc_fast[{extra}]"') from error
