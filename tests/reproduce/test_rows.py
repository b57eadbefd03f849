"""Numbers and words made of rows."""

from __future__ import annotations

import numpy as np
import pytest

from llc_fast.reproduce.rows import column, is_warned, plus_minus, quantile, relative_error, sizes


def test_numbers_of_rows() -> None:
    rows = [{"llc": 1.0, "warnings": []}, {"llc": None, "warnings": ["diverged"]}]
    np.testing.assert_array_equal(column(rows, "llc"), [1.0, np.nan])
    np.testing.assert_array_equal(sizes([-0.5, None, 0.25]), [0.5, np.inf, 0.25])
    assert quantile(sizes([0.1, 0.3, None]), 0.5) == 0.3 and quantile(sizes([None, None]), 0.9) == np.inf
    assert [is_warned(row) for row in rows] == [False, True]
    assert np.isnan(relative_error(rows[1], 2.0)) and relative_error(rows[0], 2.0) == -0.5


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (40.8123, 0.2345, "40.81 ± 0.23"),
        (418.9, 12.3, "419 ± 12"),
        (0.2491, 0.0021, "0.2491 ± 0.0021"),
        (5.0, None, "5 ± ?"),
        (5.0, 0.0, "5 ± ?"),
        (None, None, "none"),
    ],
)
def test_values_with_their_errors(value: float | None, error: float | None, words: str) -> None:
    assert plus_minus(value, error) == words
