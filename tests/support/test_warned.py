"""Python warnings of what results say."""

from __future__ import annotations

import pickle
import threading
import warnings

import pytest
from runs import codes, estimate

import llc_fast
from llc_fast.result import LLCResult
from llc_fast.support.warned import LLCWarning, issue, shown_otherwise


def _short(**options: object) -> LLCResult:
    return estimate(num_draws=20, num_burnin=20, **options)


@pytest.mark.parametrize("progress", [False, True])
def test_each_warning_of_a_result_is_issued_once(progress: bool) -> None:
    """As an LLCWarning with the same words, the command that explains it, and the code, at the line that called,
    whatever is shown of the progress."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = _short(progress=progress)
    assert len(result.warnings) > 0
    assert [str(w.message) for w in seen] == [f"{w} [llc-fast explain {w.code}]" for w in result.warnings]
    assert [w.message.code for w in seen] == codes(result)  # type: ignore[union-attr]
    assert all(w.category is llc_fast.LLCWarning for w in seen)
    assert {w.filename.rpartition("/")[2] for w in seen} == {"runs.py"}  # where `estimate` calls estimate_llc
    assert issubclass(llc_fast.LLCWarning, UserWarning)


def test_they_can_be_filtered() -> None:
    """Silenced, or made errors, by their class; or one kind of them by its words."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", llc_fast.LLCWarning)
        _short()
    with warnings.catch_warnings():
        warnings.simplefilter("error", llc_fast.LLCWarning)
        with pytest.raises(llc_fast.LLCWarning, match="Effective sample size"):
            _short()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Effective sample size")
        issue(_short().warnings)
    assert "ess" not in [w.message.code for w in seen]  # type: ignore[union-attr]


def test_whoever_shows_them_anyway() -> None:
    """Gets none of them, in this thread, and in no other."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with shown_otherwise():
            _short()
            assert seen == []
            thread = threading.Thread(target=issue, args=(["said"],))
            thread.start()
            thread.join()
            assert [str(w.message) for w in seen] == ["said"]
        issue(["again"])
    assert [str(w.message) for w in seen] == ["said", "again"]


def test_a_warning_is_an_exception_like_any_other() -> None:
    warning = pickle.loads(pickle.dumps(LLCWarning("Too short.", "ess")))
    assert (str(warning), warning.code) == ("Too short.", "ess") and LLCWarning("Too short.").code == ""
    assert warning.url.endswith("/warnings.html#ess")
