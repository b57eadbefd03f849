"""Losses of a probe with kept activations below a component, over those without: time of one draw.

    python benchmarks/speed/bench_prefix.py [--layers 4] [--width 64] [--sequences 64] [--tokens 32] [--rounds 15]
                                            [--json PATH]

GPT-NeoX, GPT-2 and Llama of transformers, built from configurations, with "next-token" losses token by token. Both are
taken in turn at parameters beside w*, and the largest difference between them is in the table.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from harness import median, print_table, ratio, time_in_turn, write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "shared"))
from language_models import VOCABULARY, _seeded, transformers

from llc_fast.estimate import prepared_alone
from llc_fast.objective.per_sample import sample_losses_for
from llc_fast.objective.prefix import PrefixCache
from llc_fast.settings import Settings

COMPONENTS = ("l0 mlp", "l{last} h1", "l{last} mlp", "unembed")


def model_of(name: str, layers: int, width: int, tokens: int) -> torch.nn.Module:
    made = transformers()
    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    if name == "GPT-2":
        config = made.GPT2Config(n_positions=tokens, n_embd=width, n_layer=layers, n_head=4, **ends)
        return _seeded(0, lambda: made.GPT2LMHeadModel(config))
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": tokens, "intermediate_size": 4 * width}
    if name == "GPT-NeoX":
        return _seeded(0, lambda: made.GPTNeoXForCausalLM(made.GPTNeoXConfig(**sizes, **ends)))
    return _seeded(0, lambda: made.LlamaForCausalLM(made.LlamaConfig(**sizes, **ends)))


def measure(name: str, component: str, options: argparse.Namespace) -> dict[str, Any]:
    model = model_of(name, options.layers, options.width, options.tokens).eval()
    data = torch.randint(VOCABULARY, (options.sequences, options.tokens))
    settings = Settings(params=component, batch_size=8, lr=1e-4, nbeta=10.0, localization=1.0, num_draws=10)
    with prepared_alone(settings, model, data, "next-token") as prepared, torch.no_grad():
        objective = prepared.objective
        torch.set_num_threads(1)
        batch = next(iter(objective.source.full()))[0]
        losses = sample_losses_for(objective, "token", [batch])
        cache, here = PrefixCache(objective, 2**30), functools.partial(losses.here, batch)
        with objective.holding(objective.reference, {}):
            cache.record("probe", here)
        beside = {key: w * 1.05 for key, w in objective.reference.items()}
        with objective.holding(beside, {}):
            off = float((cache.evaluate("probe", here) - here()).abs().max())
            both = {"kept": lambda: cache.evaluate("probe", here), "whole": here}
            times = time_in_turn(both, options.rounds)
    return {
        "model": name,
        "component": component,
        "kept ms": 1e3 * median(times["kept"]),
        "whole ms": 1e3 * median(times["whole"]),
        "ratio": ratio(times["kept"], times["whole"]),
        "KiB": cache.num_bytes / 1024,
        "difference": off,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("layers", 4), ("width", 64), ("sequences", 64), ("tokens", 32), ("rounds", 15)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        measure(name, component.format(last=options.layers - 1), options)
        for name in ("GPT-NeoX", "GPT-2", "Llama")
        for component in COMPONENTS
    ]
    print_table("one draw's losses of a probe", rows)
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
