"""How long fuzz tests run, and what they tried: few examples, always the same, unless LLC_FAST_FUZZ says how many."""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("LLC_FAST_FUZZ") or 0)
"""Examples of each test of ``make fuzz``; 0: the few of the normal tests."""
CALLS: Counter[str] = Counter()
"""What was tried, by name; printed at the end of ``make fuzz``."""


def fuzz_settings(few: int, steps: int = 50) -> settings:
    """Settings of a test.

    Args:
        few: examples in the normal tests.
        steps: of a state machine, at most.
    """
    return settings(
        max_examples=EXAMPLES or few,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=not EXAMPLES,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.target, Phase.shrink],
    )
