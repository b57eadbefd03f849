"""Token-level influence (correlations of losses over draws) of 32 × 32 sequences of 256 tokens: time and peak memory.

    python benchmarks/speed/bench_influence.py [--contenders llc_fast errors two-sets devinterp] [--sequences 32]
                                               [--tokens 256] [--chains 4] [--draws 250] [--rounds 3] [--json PATH]

Each contender has processes of its own, one for each round. "MB" is the peak resident set less that after a tiny
computation of the same kind, which has loaded what it needs; the losses and the result are in it for all alike.

llc_fast: ``influence(losses, kind="correlation", stderr=False)``. errors: with standard errors of all entries.
two-sets: the sequences as train and as query, so that no product is saved by symmetry. devinterp: ``compute_bif`` of
2.0.1 with its defaults; it is left out, with a note, where it is not installed (pip install devinterp==2.0.1). All
centre at the mean of all chains, as devinterp does, and 64 entries of each are compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import median, parse, peak_memory, print_table, rounds_in_turn, write_json

OURS = ("llc_fast", "errors", "two-sets")
ASKED = "at least 4 times as fast as devinterp, in at most a quarter of the memory"
Losses = np.ndarray[Any, np.dtype[np.float32]]


def make_losses(chains: int, draws: int, sequences: int, tokens: int) -> Losses:
    """``[chain, draw, sequence, token]``: a few directions that all losses share, and noise."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((chains, draws, 8)).astype(np.float32)
    losses = directions @ rng.standard_normal((8, sequences * tokens)).astype(np.float32) * np.float32(0.1)
    losses += np.float32(0.1) * rng.standard_normal(losses.shape, dtype=np.float32)
    losses += np.float32(3)
    return losses.reshape(chains, draws, sequences, tokens)


def with_llc_fast(contender: str) -> Callable[[Losses], Any]:
    from llc_fast.stats.influence import influence

    def run(losses: Losses) -> Any:
        sequences, tokens = losses.shape[2:]
        flat = losses.reshape(*losses.shape[:2], -1)
        query = flat if contender == "two-sets" else None
        found = influence(flat, query, kind="correlation", centred="pooled", stderr=contender == "errors")
        return found.value.reshape(sequences, tokens, sequences, tokens).transpose(0, 2, 1, 3)

    return run


def with_devinterp() -> Callable[[Losses], Any]:
    let_torchvision_be_imported()
    import xarray as xr
    from devinterp.slt.bif import compute_bif

    def run(losses: Losses) -> Any:
        ids = np.zeros((losses.shape[2], losses.shape[3] + 1), np.int64)
        variables = {
            "loss_probe": (("chain", "draw", "batch_probe", "token_pos"), losses),
            "input_ids_probe": (("batch_probe", "token"), ids),
        }
        return compute_bif(xr.DataTree(dataset=xr.Dataset(variables)))["influences"].values

    return run


def let_torchvision_be_imported() -> None:
    """devinterp imports it by way of transformers, which fails where its operators were built for another torch."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        names = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for name in ("nms", "qnms", *names, *(f"_{name}_backward" for name in names)):
            library.define(f"{name}(Tensor x) -> Tensor")
        _kept.append(library)


_kept: list[Any] = []


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    run = with_devinterp() if spec["contender"] == "devinterp" else with_llc_fast(spec["contender"])
    run(make_losses(2, 8, 2, 4))
    imports = peak_memory()
    losses = make_losses(*(spec[name] for name in ("chains", "draws", "sequences", "tokens")))
    peak_memory(reset=True)
    started = time.perf_counter()
    found = run(losses)
    seconds = time.perf_counter() - started
    rng = np.random.default_rng(1)
    places = tuple(rng.integers(size, size=64) for size in found.shape)
    values = [float(x) for x in found[places]]
    return {"seconds": seconds, "bytes": peak_memory() - imports, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=[*OURS, "devinterp"], default=[*OURS, "devinterp"])
    for name, default in {"sequences": 32, "tokens": 256, "chains": 4, "draws": 250, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parse(parser, work_in_this_process)
    if min(options.sequences, options.tokens, options.chains, options.rounds) < 1 or options.draws < 8:
        parser.error("--draws must be at least 8, and the other numbers at least 1")
    contenders = list(options.contenders)
    if "devinterp" in contenders and not is_installed("2.0.1"):
        print("devinterp 2.0.1 is not installed and is left out: pip install devinterp==2.0.1")
        contenders.remove("devinterp")
    spec = {name: getattr(options, name) for name in ("sequences", "tokens", "chains", "draws")}
    found = rounds_in_turn(__file__, spec, contenders, options.rounds)
    first = next(iter(found.values()))[0]["values"]
    rows = []
    for name, rounds in found.items():
        seconds, size = median([r["seconds"] for r in rounds]), median([r["bytes"] for r in rounds])
        row: dict[str, Any] = {"contender": name, "s": seconds, "MB": size / 1e6}
        if "devinterp" in found:
            rival = found["devinterp"]
            row["times as fast"] = median([r["seconds"] for r in rival]) / seconds
            row["share of memory"] = size / median([r["bytes"] for r in rival])
        row["largest difference"] = float(np.abs(np.subtract(rounds[0]["values"], first)).max())
        rows.append(row)
    print_table(
        f"Token-level influence, {options.sequences} × {options.sequences} sequences of {options.tokens} tokens, "
        f"{options.chains} chains × {options.draws} draws; asked: {ASKED}",
        rows,
    )
    write_json(options.json, {"asked": ASKED, "rounds": options.rounds, **spec, "rows": rows})


def is_installed(version: str) -> bool:
    try:
        return importlib.metadata.version("devinterp") == version
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
