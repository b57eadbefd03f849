"""llc-fast info."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from commands import invoke

import llc_fast


def test_info() -> None:
    """Versions and the code that will run, one fact a line."""
    result = invoke("info")
    assert result.exit_code == 0
    for words in (llc_fast.__version__, torch.__version__, "instruction_set", "threads", "backend"):
        assert words in result.output


def test_info_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that can't be imported is what the report is about: the rest is printed, and the exit status is 1."""
    monkeypatch.setitem(sys.modules, "torch", None)
    result = invoke("info")
    assert result.exit_code == 1
    for words in (llc_fast.__version__, "instruction_set", "torch_error", "import of torch halted"):
        assert words in result.output


def test_info_as_json() -> None:
    """Valid JSON and nothing else, with the facts that a bug report needs."""
    result = invoke("info", "--json")
    facts = json.loads(result.output)
    assert result.exit_code == 0
    assert facts["llc_fast"] == llc_fast.__version__ and facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instruction_set"] in facts["backend"]
    assert set(facts) >= {"python", "platform", "cuda", "torch_cuda", "openmp", "philox_rounds", "gpus"}
    assert isinstance(facts["gpus"], list)
