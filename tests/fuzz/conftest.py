from __future__ import annotations

from typing import Any

from fuzz import CALLS, EXAMPLES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What ``make fuzz`` has tried."""
    if not EXAMPLES or not CALLS:
        return
    failed = len(terminalreporter.stats.get("failed", []))
    terminalreporter.section("fuzz")
    for name, count in sorted(CALLS.items()):
        terminalreporter.write_line(f"{count:9,} {name}")
    outcome = "no crash and no unexplained difference" if not failed else f"{failed} tests failed: see above"
    terminalreporter.write_line(f"{sum(CALLS.values()):9,} calls in all; {outcome}")
