"""devinterp is another package at version 2 than at version 1: tests of one skip where the other is installed."""

from __future__ import annotations

import importlib.metadata

import pytest


def devinterp_2() -> None:
    """Skip the test where devinterp 2.0.1 is not installed; else make it importable."""
    try:
        version = importlib.metadata.version("devinterp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("devinterp is not installed: pip install devinterp==2.0.1")
    if version != "2.0.1":
        pytest.skip(f"devinterp is installed as {version}, not 2.0.1")
    from families import import_torchvision

    import_torchvision()
