from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# Before torch is loaded, and for every process that a test starts. Threads of OpenMP otherwise spin while they wait
# for each other: where other processes keep the cores busy, a model of a thousand parameters then takes thirty times
# as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Thousands of tests and all modules stay to the end: the garbage collector, a tenth of the time, skips them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def sigint_as_usual() -> Iterator[None]:
    """Ctrl-C raises: also where tests run in the background, and whatever the test before did."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def seeded() -> Iterator[None]:
    """Tests with random numbers see the same ones whatever ran before them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def two_threads(seeded: None) -> Iterator[None]:
    """Every test has two torch threads to share out, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
