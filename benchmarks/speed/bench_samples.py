"""A whole run against devinterp 2.0.1: chains of a language model, losses of two probes at every draw in a store, BIF.

    python benchmarks/speed/bench_samples.py [--contenders llc_fast devinterp] [--sizes 133k 1m] [--chains 4]
        [--draws 200] [--burnin 100] [--batch 16] [--tokens 64] [--probe 32] [--threads 2] [--rounds 3] [--json PATH]

A GPT-NeoX that was trained for a short time on the bytes of a text that ships with Python. Both contenders get the
same weights and tokens, ε, nβ, γ, burn-in and dtype, and each works in a process of its own, in turn. A round is

set-up   everything before the first step: checks, L(w*), the store; of llc_fast the search for losses of tokens, too
chains   burn-in, draws, forward passes of both probes at every draw, and all that is written
BIF      correlations over draws of all pairs of tokens, and of sequences, of both probes, read from the store

Imports, training and making the data are not counted. "CPU s" is the processor time of all threads for the same: on a
busy machine it says more than the clock. "MB" is the peak resident set less that after the imports. λ̂ is
nβ·(mean loss − L(w*)): "all steps" with burn-in, as devinterp's ``compute_llc`` has it, "draws" without; each ± its
standard error from the spread of its chains' means. L(w*) is of all data for llc_fast, of 32 minibatches for devinterp.

"errors" is llc_fast's token-level BIF with a standard error for each entry, which devinterp does not have; it is in no
sum. "steps alone" (``--parts``) are the same chains without probes, and "forward passes" a plain loop over the probes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_influence import is_installed, let_torchvision_be_imported
from harness import median, parse, peak_memory, print_table, ratio, rounds_in_turn, write_json
from torch import Tensor, nn

CONTENDERS = ("llc_fast", "devinterp")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "133k": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1m": {"hidden_size": 160, "num_hidden_layers": 3, "num_attention_heads": 5},
}
VOCABULARY, SEQUENCES = 256, 2000
SETTINGS = {"lr": 1e-4, "nbeta": 30.0, "localization": 300.0}
ASKED = "the whole run at least 3 times as fast as devinterp"
PARTS = ("set-up", "chains", "token BIF", "sequence BIF")


def network(size: str) -> nn.Module:
    let_torchvision_be_imported()
    import transformers

    hidden = SIZES[size]["hidden_size"]
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, **SIZES[size], intermediate_size=4 * hidden, max_position_embeddings=256,
        use_cache=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.GPTNeoXForCausalLM(config)
    return model


def text(tokens: int, count: int) -> Tensor:
    """Bytes of the documentation of Python's language, ``[count, tokens]``, in random order."""
    from pydoc_data.topics import topics

    found = np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
    rows = found[: len(found) // tokens * tokens].reshape(-1, tokens)
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    if len(order) < count:
        raise ValueError(f"--tokens {tokens} leaves {len(order)} sequences, fewer than {count}: give fewer")
    return torch.as_tensor(rows[order].astype(np.int64))


def prepare(size: str, tokens: int, probe: int, steps: int, folder: Path) -> int:
    """Write the weights of a trained network, the data and the probes; return its number of parameters."""
    model, ids = network(size), text(tokens, SEQUENCES + 2 * probe)
    data, probes = ids[:SEQUENCES], ids[SEQUENCES:].split(probe)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (32,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.state_dict(), data, {"one": probes[0], "two": probes[1]}), folder / "network.pt")
    return sum(p.numel() for p in model.parameters())


@dataclasses.dataclass
class Clock:
    """Seconds, by the clock and of the processor, of the parts of a run."""

    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    _last: tuple[float, float] = dataclasses.field(default_factory=lambda: (time.perf_counter(), time.process_time()))
    cpu: dict[str, float] = dataclasses.field(default_factory=dict)

    def lap(self, name: str) -> None:
        now = (time.perf_counter(), time.process_time())
        self.parts[name] = now[0] - self._last[0]
        self.cpu[name] = now[1] - self._last[1]
        self._last = now


def with_llc_fast(spec: dict[str, Any], model: nn.Module, data: Tensor, probes: dict[str, Tensor]) -> dict[str, Any]:
    import xarray  # noqa: F401 -- as devinterp's import does
    import zarr  # noqa: F401

    import llc_fast
    from llc_fast.stats.influence import influence

    llc_fast.sample  # noqa: B018 -- names are imported when they are first used
    peak_memory(reset=True)
    before = peak_memory()
    clock = Clock()
    samples = llc_fast.sample(
        model, data, "next-token", probes=probes, per="token", store=spec["store"], num_chains=spec["chains"],
        num_draws=spec["draws"], num_burnin=spec["burnin"], batch_size=spec["batch"], progress=False, **SETTINGS,
    )  # fmt: skip
    clock.lap("chains")
    result = samples.llc()
    clock.parts["set-up"] = result.diagnostics["seconds_of_setup"]
    clock.parts["chains"] -= clock.parts["set-up"]
    names = list(probes)
    flat = np.concatenate([samples.losses(name).values for name in names], axis=2)
    tokens = influence(flat.reshape(*flat.shape[:2], -1), kind="correlation", centred="pooled", stderr=False)
    count, length = flat.shape[2:]
    found = tokens.value.reshape(count, length, count, length).transpose(0, 2, 1, 3)
    clock.lap("token BIF")
    means = np.concatenate([samples.losses(name, per="sample").values for name in names], axis=2)
    sequences = influence(means, kind="correlation", centred="pooled", stderr=False).value
    clock.lap("sequence BIF")
    memory = peak_memory() - before
    clock_of_errors = Clock()
    influence(flat.reshape(*flat.shape[:2], -1), kind="correlation")
    clock_of_errors.lap("errors")
    trace = result.loss_trace
    return summary(clock, memory, spec, trace, result.init_loss, found, sequences) | {
        "errors": clock_of_errors.parts["errors"],
        "strategy": result.settings["strategy"],
        "strategy_reason": result.diagnostics["strategy_reason"],
        "workers": result.diagnostics["workers"],
    }


def with_devinterp(spec: dict[str, Any], model: nn.Module, data: Tensor, probes: dict[str, Tensor]) -> dict[str, Any]:
    import datasets
    import devinterp.slt.sampling as its
    import zarr  # noqa: F401
    from devinterp.slt.bif import compute_bif
    from devinterp.slt.llc import compute_llc

    def dataset(ids: Tensor) -> Any:
        return datasets.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")

    first_step: list[float] = []
    of_one_chain = its.sample_single_chain

    def noting(**options: Any) -> None:
        first_step.append(time.perf_counter())
        of_one_chain(**options)

    its.sample_single_chain = noting
    rows = dataset(data)
    batches = spec["probe"] // spec["batch"]
    observables = {name: (dataset(ids), batches) for name, ids in probes.items()}
    peak_memory(reset=True)
    before = peak_memory()
    clock, began = Clock(), time.perf_counter()
    samples = its.sample(
        model, rows, observables, lr=SETTINGS["lr"], n_beta=SETTINGS["nbeta"], localization=SETTINGS["localization"],
        num_chains=spec["chains"], num_draws=spec["draws"], num_burnin_steps=spec["burnin"], batch_size=spec["batch"],
        device="cpu", match_sampling_input_ids_across_chains=False, output_path=spec["store"],
    )  # fmt: skip
    clock.lap("chains")
    clock.parts["set-up"] = first_step[0] - began
    clock.parts["chains"] -= clock.parts["set-up"]
    tokens = compute_bif(samples, correlation_method="token")["influences"].values
    clock.lap("token BIF")
    sequences = compute_bif(samples, correlation_method="sequence")["influences"].values
    clock.lap("sequence BIF")
    memory = peak_memory() - before
    llc = compute_llc(samples)
    trace, init_loss = llc.loss_trace.values.astype(np.float64), float(llc.init_loss)
    return summary(clock, memory, spec, trace, init_loss, tokens, sequences)


def summary(
    clock: Clock, memory: int, spec: dict[str, Any], trace: Any, init_loss: float, tokens: Any, sequences: Any
) -> dict[str, Any]:
    """What a process found; `trace` has the loss of every step, ``[chain, step]``."""
    found: dict[str, Any] = {"parts": clock.parts, "seconds": sum(clock.parts.values()), "cpu": sum(clock.cpu.values())}
    found["cpu of sampling"] = clock.cpu["chains"]
    found |= {"bytes": memory, "store": folder_bytes(Path(spec["store"])), "init_loss": init_loss}
    for name, losses in (("all steps", trace), ("draws", trace[:, spec["burnin"] :])):
        chains = SETTINGS["nbeta"] * (losses.mean(axis=1) - init_loss)
        found[name] = [float(chains.mean()), float(chains.std(ddof=1) / math.sqrt(len(chains)))]
    # Independent runs have other numbers: their spread must be alike.
    found["spread of correlations"] = [float(np.std(tokens)), float(np.std(sequences))]
    return found


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forward_passes(spec: dict[str, Any], model: nn.Module, data: Tensor, probes: dict[str, Tensor]) -> dict[str, Any]:
    """The probes through the model as often as a run does it, in minibatches of the run; nothing else."""
    clock = Clock()
    with torch.no_grad():
        for _ in range(spec["chains"] * spec["draws"]):
            for ids in probes.values():
                for part in ids.split(spec["batch"]):
                    logits = model(input_ids=part, return_dict=False, use_cache=False)[0]
                    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none")
    clock.lap("forward passes")
    return {"seconds": clock.parts["forward passes"], "cpu": sum(clock.cpu.values())}


def steps_alone(spec: dict[str, Any], model: nn.Module, data: Tensor, probes: dict[str, Tensor]) -> dict[str, Any]:
    import llc_fast

    clock = Clock()
    llc_fast.estimate_llc(
        model, data, "next-token", num_chains=spec["chains"], num_draws=spec["draws"], num_burnin=spec["burnin"],
        batch_size=spec["batch"], progress=False, **SETTINGS,
    )  # fmt: skip
    clock.lap("steps alone")
    return {"seconds": clock.parts["steps alone"], "cpu": sum(clock.cpu.values())}


WORK = {
    "llc_fast": with_llc_fast,
    "devinterp": with_devinterp,
    "steps alone": steps_alone,
    "forward passes": forward_passes,
}


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["threads"])
    state, data, probes = torch.load(Path(spec["folder"]) / "network.pt")
    model = network(spec["size"])
    model.load_state_dict(state)
    model.train()  # devinterp samples so; there is no dropout
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as folder:
        return WORK[spec["contender"]](spec | {"store": f"{folder}/run.zarr"}, model, data, probes)


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each contender: medians over rounds, and ratios within a round."""
    rows = []
    for name, rounds in found.items():
        row: dict[str, Any] = {"contender": name}
        for part in PARTS:
            row[f"{part}, s"] = median([r["parts"][part] for r in rounds]) if "parts" in rounds[0] else None
        row["s"], row["CPU s"] = median([r["seconds"] for r in rounds]), median([r["cpu"] for r in rounds])
        if "devinterp" in found:
            for column, key in (("times as fast", "seconds"), ("times, CPU", "cpu")):
                row[column] = ratio([r[key] for r in found["devinterp"]], [r[key] for r in rounds])
        if "parts" in rounds[0]:
            row["MB"] = median([r["bytes"] for r in rounds]) / 1e6
            row["store, MB"] = rounds[0]["store"] / 1e6
            for column in ("all steps", "draws"):
                row[f"λ̂, {column}"] = "{:.2f} ± {:.2f}".format(*rounds[0][column])
            row["errors, s"] = median([r["errors"] for r in rounds]) if "errors" in rounds[0] else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["133k", "1m"])
    numbers = {"chains": 4, "draws": 200, "burnin": 100, "batch": 16, "tokens": 64, "probe": 32, "threads": 2}
    for name, default in {**numbers, "training": 200, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parts", action="store_true", help="also the chains without probes, and the forward passes")
    options = parse(parser, work_in_this_process)
    if options.chains < 2 or options.draws < 8 or options.probe % options.batch:
        parser.error("--chains must be at least 2, --draws at least 8, and --probe a multiple of --batch")
    contenders = list(options.contenders)
    if "devinterp" in contenders and not is_installed("2.0.1"):
        print("devinterp 2.0.1 is not installed and is left out: pip install devinterp==2.0.1")
        contenders.remove("devinterp")
    if options.parts:
        contenders += ["steps alone", "forward passes"]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(options.threads)}
    tables: dict[str, Any] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            count = prepare(size, options.tokens, options.probe, options.training, Path(folder))
            spec = {name: getattr(options, name) for name in numbers} | {"size": size, "folder": folder}
            found = rounds_in_turn(__file__, spec, contenders, options.rounds)
        rows = rows_of(found)
        print_table(
            f"GPT-NeoX of {count:,} parameters, {options.chains} chains × ({options.burnin} + {options.draws}) steps "
            f"of {options.batch} × {options.tokens} tokens, two probes of {options.probe}; asked: {ASKED}",
            rows,
        )
        table: dict[str, Any] = {"parameters": count, "rows": rows, "rounds": found}
        if options.parts and "llc_fast" in found:
            table["with probes over steps and forward passes"] = _share(found)
            print(f"llc_fast's run over steps alone + forward passes, processor time: {_share(found):.3f}")
        tables[size] = table
    asked = {name: getattr(options, name) for name in (*numbers, "training")}
    write_json(options.json, {"asked": ASKED, "settings": SETTINGS, **asked, "tables": tables})


def _share(found: dict[str, list[dict[str, Any]]]) -> float:
    """Of the run with probes, before the BIF."""
    both = [a["cpu"] + b["cpu"] for a, b in zip(found["steps alone"], found["forward passes"], strict=True)]
    return ratio([r["cpu of sampling"] for r in found["llc_fast"]], both)


if __name__ == "__main__":
    main()
