"""The step benchmark under pytest-benchmark: ``pytest benchmarks/speed --benchmark-only``; see bench_step.py."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench_step

Steps = dict[str, Callable[[], Any]]
TENSORS = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llc_fast")
    group.addoption("--parameters", type=int, nargs="+", default=[10**6, 10**8], help="a group of steps for each")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("parameters", metafunc.config.getoption("--parameters"), scope="module")
        metafunc.parametrize("name", bench_step.NAMES)


@pytest.fixture(scope="module")
def steps(parameters: int, pytestconfig: pytest.Config) -> Iterator[Steps]:
    """All contenders of one size, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield bench_step.contenders(parameters, TENSORS, pytestconfig.getoption("--device"))
    gc.collect()


@pytest.fixture
def step(steps: Steps, name: str, pytestconfig: pytest.Config) -> Callable[[], Any]:
    """One contender's step, awaited where a GPU takes it."""
    if name not in steps:
        pytest.skip(f"{name} can't take a step here")
    if pytestconfig.getoption("--device") == "cpu":
        return steps[name]

    def awaited() -> None:
        steps[name]()
        torch.cuda.synchronize()

    return awaited
