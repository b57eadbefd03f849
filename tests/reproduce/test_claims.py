"""Verdicts on claims."""

from __future__ import annotations

from llc_fast.reproduce.claims import Claim, Kind

KINDS: tuple[Kind, ...] = ("ours", "published")


def test_verdicts() -> None:
    verdicts = [Claim("c", "f", holds, kind).verdict for holds in (True, False) for kind in KINDS]
    assert verdicts == ["holds", "holds", "FAILS", "finding"]
