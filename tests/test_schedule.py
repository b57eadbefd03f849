"""Schedules: how many steps, and which of them are draws."""

from __future__ import annotations

import numpy as np
from runs import estimate


def test_schedule() -> None:
    """num_burnin + num_draws · num_steps_bw_draws steps; a schedule never changes the steps themselves."""
    short = estimate(num_chains=2, batch_size=None, num_burnin=4, num_draws=3, num_steps_bw_draws=5)
    assert short.loss_trace.shape == (2, 19)
    assert np.array_equal(short.llc_trace, short.nbeta * (short.loss_trace[:, [8, 13, 18]] - short.init_loss))
    long = estimate(num_chains=2, batch_size=None, num_burnin=0, num_draws=30)
    assert np.array_equal(long.loss_trace[:, :19], short.loss_trace)
