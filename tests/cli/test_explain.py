"""llc-fast explain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import invoke, printed

import llc_fast
from llc_fast.support.entries import entries, url


def test_the_list() -> None:
    """Each code with the first sentence of its entry, a line each."""
    lines = invoke("explain").output.splitlines()
    assert [line.split()[0] for line in lines] == list(entries())
    assert lines[0].endswith("The model is in training mode, and dropout or batch statistics enter its loss.")
    assert any("w* is no minimum" in line for line in lines)


@pytest.mark.parametrize("code", list(entries()))
def test_each_entry(code: str) -> None:
    """All of its words, without marks, and where to read it."""
    text = printed(invoke("explain", code))
    words = " ".join(text.split())
    assert words.startswith(f"{code} ") and words.endswith(url(code))
    for part in ("Found by:", "Effect on λ̂:", "Do:"):
        assert f"• {part}" in words
    assert "**" not in text and "](" not in text and "`" not in text


def test_several() -> None:
    text = printed(invoke("explain", "ess", "rhat"))
    assert text.index(url("ess")) < text.index(url("rhat"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("rhatt", "did you mean rhat or r-hat?"), ("burn-in", "did you mean burnin?"), ("zzz", "explain` lists all")],
)
def test_wrong_codes(wrong: str, said: str) -> None:
    """Near ones are named, and nothing is printed of those that are right."""
    result = invoke("explain", "ess", wrong)
    words = " ".join(printed(result).replace("│", " ").split())
    assert result.exit_code == 2 and f"no warning has the code '{wrong}'" in words and said in words
    assert "Effective" not in words and "Found by" not in words


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = "from llc_fast.cli.explain import explain; explain(['ess']); import sys; assert 'torch' not in sys.modules"
    beside = Path(llc_fast.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=beside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert url("ess") in done.stdout
