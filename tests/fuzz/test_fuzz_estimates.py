"""Estimates drawn at random; `fuzz_cases.py` says what each is checked for, and shows single ones again."""

from __future__ import annotations

import os

from fuzz_cases import run_cases, score_problem, summary

SMALL = 40
"""Cases in the usual tests; LLC_FAST_FUZZ=10000 makes it a fifth of that."""


def test_estimates_of_random_models_losses_and_data() -> None:
    count = int(os.environ.get("LLC_FAST_FUZZ") or 5 * SMALL) // 5
    outcomes = run_cases(range(count))
    print(summary(outcomes))
    failures = [o.failure for o in outcomes if o.failure and not o.known]
    assert not failures, "\n\n".join(failures[:20]) + f"\n\n{summary(outcomes)}"
    assert not score_problem(outcomes), summary(outcomes)
