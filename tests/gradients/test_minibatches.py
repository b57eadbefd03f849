"""The minibatches that chains see."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import random
from typing import Any

import pytest
import torch
from regression import NUM_SAMPLES, estimate, mlp, samples
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from llc_fast import Draw


class _Augmented(Dataset[Any]):
    """Moves every sample as it is read."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = samples()
        return x[index] + random.gauss(0, 0.1), y[index]


@pytest.mark.parametrize("strategy", ["sequential", "batched"])
def test_the_whole_of_augmented_data_is_read_anew_at_every_step(strategy: str) -> None:
    """A minibatch of all samples is another one in each step and chain; equal seeds give the same ones."""

    def first(draw: Draw) -> Tensor:
        return draw.batch[0][:, 0]

    options: dict[str, Any] = {"num_draws": 4, "num_burnin": 2, "observables": {"x": first}, "strategy": strategy}
    result = estimate(mlp(), _Augmented(), batch_size=NUM_SAMPLES, **options)
    seen = torch.from_numpy(result.observables["x"]).reshape(-1)
    assert len(seen.unique()) == len(seen) == 2 * 4 * NUM_SAMPLES
    again = estimate(mlp(), _Augmented(), batch_size=NUM_SAMPLES, **options)
    assert (again.observables["x"] == result.observables["x"]).all()
    assert (again.loss_trace == result.loss_trace).all()


class _StopError(Exception):
    pass


@pytest.mark.parametrize("last", [1, 100])
def test_workers_end_with_the_run(last: int) -> None:
    """At once, whether it ends well or with an error, though chains and observables know each other."""

    def observe(draw: Draw) -> float:
        if draw.draw == last:
            raise _StopError
        return 0.0

    loader = DataLoader(TensorDataset(*samples()), batch_size=8, num_workers=1, multiprocessing_context="fork")
    gc.disable()
    try:
        with contextlib.suppress(_StopError):
            estimate(mlp(), loader, observables={"none": observe}, num_draws=3, num_chains=1)
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
