"""llc-fast components."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import invoke, printed

PROBLEM = """
import torch
from llc_fast.problems.transformer import Transformer, sequence_losses

def problem():
    tokens = torch.randint(12, (16, 9))
    return Transformer(12, 8, width=16, heads=4, layers=1), (tokens[:, :-1], tokens[:, 1:]), sequence_losses

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = torch.nn.Linear(4, 12), torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(torch.nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))

def one_head():
    return Attention(), (torch.randn(8, 3, 4), torch.randn(8, 3, 4)), torch.nn.functional.mse_loss
"""


@pytest.fixture
def problem_file(tmp_path: Path) -> str:
    path = tmp_path / f"components_{tmp_path.name}.py"
    path.write_text(PROBLEM)
    return str(path)


def test_names_with_numbers_of_parameters(problem_file: str) -> None:
    """A line each, heads of one size together."""
    result = invoke("components", f"{problem_file}:problem")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in printed(result).splitlines()]
    assert lines[0] == ["embed", str(12 * 16)]
    assert ["l0", "h0", "…", "h3,", "each", "256"] in lines
    assert ["l0", "attn", "1,024"] in lines and ["l0", "mlp", "2,128"] in lines
    assert ["blocks.0.attention.query", "256"] in lines
    listed = invoke("components", f"{problem_file}:problem", "--json")
    sizes = json.loads(listed.stdout)
    assert sizes["l0 h3"] == 256 and sizes["unembed"] == 192
    assert sizes["l0"] == sizes["l0 attn"] + sizes["l0 mlp"] + 4 * 16


def test_parameters_of_a_component(problem_file: str) -> None:
    result = invoke("components", f"{problem_file}:problem", "l0 h1", "embed")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in printed(result).splitlines()]
    assert lines[0] == ["l0", "h1:", "256", "parameters"]
    assert ["blocks.0.attention.output", "64", "of", "256"] in lines
    assert ["tokens.weight", "192", "of", "192"] in lines
    assert "'l0 h1'" in str(invoke("components", f"{problem_file}:problem", "l0 h9").exception)


def test_unknown_layouts_are_said(problem_file: str) -> None:
    """What can't be verified: one line for each reason on stderr, null in JSON, and the rest is there."""
    result = invoke("components", f"{problem_file}:one_head", "--json")
    assert result.exit_code == 0
    assert "'qkv.weight'" in result.stderr and "can't be verified" in result.stderr
    sizes = json.loads(result.stdout)
    assert sizes["attn"] == 80 and sizes["attn h0"] is None


def test_estimates_take_them(problem_file: str) -> None:
    """--params with the name of a component."""
    options = ["--chains", "2", "--draws", "4", "--burnin", "2", "--lr", "1e-4", "--no-progress", "--json"]
    result = invoke("estimate", f"{problem_file}:problem", "--params", "l0 h1", "--params", "embed", *options)
    settings = json.loads(result.stdout)["settings"]
    assert settings["params"] == "l0 h1, embed" and settings["num_parameters"] == 256 + 192
