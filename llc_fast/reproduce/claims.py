"""What an experiment claims, with its bound, and whether the measurement agrees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llc_fast.reproduce.rows import Row, is_warned, quantile, sizes

Kind = Literal["ours", "published"]


@dataclass(frozen=True)
class Claim:
    """Something that should come out, and what came out.

    Attributes:
        text: what is claimed, with its bound: "Spearman's ρ of λ̂ and λ is at least 0.99".
        found: what was measured: "0.997".
        holds: whether the measurement agrees with the claim.
        kind: whose claim it is. "ours" is said of this package: if it does not hold, the code or the sentence is wrong.
            "published" is said of the world by others: if it does not hold, that is a finding.
    """

    text: str
    found: str
    holds: bool
    kind: Kind = "ours"

    @property
    def verdict(self) -> str:
        """In a word: "holds", "FAILS" (ours) or "finding" (published, and not so here)."""
        return "holds" if self.holds else "FAILS" if self.kind == "ours" else "finding"

    def __str__(self) -> str:
        return f"{self.verdict:<7}  {self.text}: {self.found}"


def with_verdict(claims: Iterable[Claim], verdict: str) -> list[Claim]:
    """The claims with this verdict."""
    return [claim for claim in claims if claim.verdict == verdict]


def judgement(claims: Iterable[Claim]) -> str:
    """All claims of an experiment in one sentence."""
    claims = list(claims)
    parts = [f"{len(with_verdict(claims, 'holds'))} of {len(claims)} claims hold"]
    if failed := len(with_verdict(claims, "FAILS")):
        parts.append(f"{failed} of ours {'fails' if failed == 1 else 'fail'}")
    if findings := len(with_verdict(claims, "finding")):
        parts.append(f"{findings} published {'does' if findings == 1 else 'do'} not, which is a finding and no failure")
    return "; ".join(parts)


# ---- claims that several experiments make ------------------------------------------------------------------

MEDIAN, PERCENTILE_90, UNWARNED = 0.05, 0.15, 0.30
"""Bounds on |λ̂ − λ|/λ: for half of the estimates, for nine in ten, and for each without a warning."""


def accuracy_claim(what: str, rows: Sequence[Row]) -> Claim:
    """Whether estimates, as a whole, are as close to the known λ as they should be. Rows have an ``error``."""
    errors = sizes(r["error"] for r in rows)
    median, high = quantile(errors, 0.5), quantile(errors, 0.9)
    return Claim(
        f"{what}: |λ̂ − λ|/λ has a median of at most {MEDIAN:.0%} and a 90th percentile of at most {PERCENTILE_90:.0%}",
        f"{median:.1%} and {high:.1%} over {len(errors)}",
        median <= MEDIAN and high <= PERCENTILE_90,
    )


def median_claim(what: str, rows: Sequence[Row], bound: float) -> Claim:
    """Whether half of a few estimates are within `bound` of the known λ. Rows have an ``error``."""
    errors = sizes(r["error"] for r in rows)
    median, listed = quantile(errors, 0.5), ", ".join(f"{error:.1%}" for error in errors)
    text = f"{what}: |λ̂ − λ|/λ has a median of at most {bound:.0%}"
    return Claim(text, f"{median:.1%} ({listed})", median <= bound)


def silence_claim(rows: Mapping[str, Row]) -> Claim:
    """Whether large errors come with a warning. Rows have an ``error``."""
    errors = sizes(r["error"] for r in rows.values())
    silent = [key for (key, r), e in zip(rows.items(), errors, strict=True) if e > UNWARNED and not is_warned(r)]
    warned = sum(map(is_warned, rows.values()))
    return Claim(
        f"no λ̂ is off by more than {UNWARNED:.0%} without a warning",
        f"{', '.join(silent) or 'none'}; {warned} of {len(rows)} have a warning; at worst off by {errors.max():.1%}",
        not silent,
    )
