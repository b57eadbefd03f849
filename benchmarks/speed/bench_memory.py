"""Peak memory of whole estimates on a network of 10⁸ float32 parameters, in bytes per parameter (Linux).

    python benchmarks/speed/bench_memory.py [--contenders sgld sgld-released rmsprop-sgld …] [--width 2000]
                                            [--layers 25] [--chains 2] [--steps 3] [--device cpu|cuda] [--json PATH]

The network: 25 bias-free linear layers of 2000×2000, built without a second copy. Each contender has a process of its
own, and its peak resident set is read when torch and the contender are imported and have made an estimate of 128
parameters, so that what they load at first use is loaded ("imports"), and when the estimate is done ("peak").
"activations" are reckoned, not measured: the layers' outputs that the backward pass needs,
batch × width × layers × 4 bytes, and so are "data", the 1,000 samples. "besides" is the peak without these three, so
parameters, chains, gradients and the sampler's state; the asked figures are for it. With gradient release the largest
layer is allowed on top.

Part of a rival's peak is the C library's: glibc does not give freed tensors of this size back at once. llc_fast makes
it while it runs; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it does for every contender alike.

On a GPU the peak is what torch had allocated there at most; "imports" are then what its libraries keep for themselves.

λ̂ means nothing after three steps; the step size is so small that no chain diverges. For a quick try: --width 500.
Rivals (contenders.py says how they are called, rivals.py where they are) that are not there are left out, with a note.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from contenders import (
    Estimate,
    Work,
    make_problem,
    rival_title,
    with_canonical,
    with_devinterp,
    with_llc_fast,
)
from harness import in_fresh_process, parse, peak_memory, print_table, write_json
from rivals import FOLDER, paths_of, rival_of

SAMPLES, BATCH, LR, LOCALIZATION = 1000, 500, 1e-12, 1.0
OURS: dict[str, dict[str, Any]] = {
    "sgld": {"sampler": "sgld", "release_gradients": False},
    "sgld-released": {"sampler": "sgld", "release_gradients": True},
    "rmsprop-sgld": {"sampler": "rmsprop-sgld", "release_gradients": False},
    "rmsprop-sgld-released": {"sampler": "rmsprop-sgld", "release_gradients": True},
    "sgld-batched": {"sampler": "sgld", "strategy": "batched"},
}
"""What estimate_llc is given."""

RIVALS = ["devinterp", "devinterp-rmsprop", "canonical"]

DEFAULT = ["sgld", "sgld-released", "rmsprop-sgld", "sgld-batched", "devinterp"]
ASKED = {"sgld": 12.5, "sgld-released": 8.5, "rmsprop-sgld": 16.5}
"""Bytes per parameter at most, besides imports and activations."""


def make_estimate(contender: str) -> Estimate:
    """The contender's estimate, its library imported."""
    if contender in OURS:
        return with_llc_fast(**OURS[contender])
    if contender == "canonical":
        return with_canonical()
    return with_devinterp("rmsprop-sgld" if contender == "devinterp-rmsprop" else "sgld")


def work_in_this_process(spec: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    estimate = make_estimate(spec["contender"])
    nbeta, draws, device = SAMPLES / math.log(SAMPLES), max(1, spec["steps"] - 1), spec["device"]
    length = {"chains": spec["chains"], "burnin": spec["steps"] - draws, "draws": draws}
    work = Work(LR, nbeta, LOCALIZATION, BATCH, **length, device=device)
    estimate(*make_problem(8, 2, BATCH), work)
    imports = peak_memory(device)
    model, data = make_problem(spec["width"], spec["layers"], SAMPLES)
    started = time.perf_counter()
    found = estimate(model, data, work)
    if not all(map(math.isfinite, found["llc"])):
        raise RuntimeError(f"a chain diverged, so not all steps were made: {found['llc']}")
    seconds = time.perf_counter() - started
    return {"imports": imports, "peak": peak_memory(device), "seconds": seconds, **found}


def row_of(contender: str, options: argparse.Namespace, paths: list[str] | None) -> dict[str, Any]:
    rival, ours = rival_of(contender), contender in OURS
    name = rival_title(contender, rival.distribution, rival.version) if rival else f"llc_fast {contender}"
    row: dict[str, Any] = {"contender": name}
    if not ours and paths is None:
        return row | {"peak": "not installed"}
    print(f"… {contender}", file=sys.stderr, flush=True)
    spec = {"contender": contender} | {k: getattr(options, k) for k in ("width", "layers", "chains", "steps", "device")}
    found = in_fresh_process(__file__, spec, paths=paths or ())
    if "error" in found:
        print(f"{contender}: {found['error']}", file=sys.stderr)
        return row | {"peak": "failed"}
    parameters = options.width**2 * options.layers
    peak, imports = found["peak"] / parameters, found["imports"] / parameters
    activations = 4 * BATCH * options.width * options.layers / parameters
    data = 4 * 2 * SAMPLES * options.width / parameters
    asked = ASKED.get(contender)
    if asked and contender.endswith("-released"):
        asked += 4 / options.layers
    row |= {"peak": peak, "imports": imports, "activations": activations, "data": data}
    row |= {"besides": peak - imports - activations - data}
    return row | {"asked": asked and f"≤ {asked:.2f}", "seconds": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=[*OURS, *RIVALS], default=DEFAULT)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rivals", type=Path, default=FOLDER, help="where rivals.py has put them")
    options = parse(parser, work_in_this_process)
    if min(options.width, options.layers, options.chains, options.steps) < 1:
        parser.error("--width, --layers, --chains and --steps must be at least 1")
    paths = paths_of(options.contenders, options.rivals)
    rows = [row_of(c, options, paths.get(c)) for c in options.contenders]
    parameters = options.width**2 * options.layers
    columns = ["contender", "peak", "imports", "activations", "data", "besides", "asked", "seconds"]
    print_table(
        f"Bytes per parameter: {parameters:.3g} parameters in {options.layers} layers, {options.chains} chains × "
        f"{options.steps} steps, batch {BATCH}",
        [{column: row.get(column) for column in columns} for row in rows],
    )
    write_json(
        options.json, {"parameters": parameters, "device": options.device, "chains": options.chains, "rows": rows}
    )


if __name__ == "__main__":
    main()
