"""``llc-fast hf``: a language model of Hugging Face, from a folder or the hub, at one or several revisions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.cli.estimate import settings_of
from llc_fast.cli.options import (
    Autocast,
    Burnin,
    Chains,
    Draws,
    JsonPath,
    MaxGradients,
    MaxSeconds,
    Params,
    PlotPath,
    Progress,
    Refine,
    ReportPath,
    SamplerOptions,
    Seed,
    StepSize,
    Strategy,
    TargetError,
    check_different,
    deliver,
    writable,
)
from llc_fast.cli.sweep import deliver_sweep, finished_too
from llc_fast.support.errors import first_line
from llc_fast.support.optional import require

if TYPE_CHECKING:
    from torch import nn

_CONTEXT = 512
"""Tokens of a sequence, if nobody says how many and the model takes more."""
_DTYPES = ("float32", "float64", "bfloat16", "float16")


def hf(
    model: Annotated[str, typer.Argument(help="Folder that save_pretrained wrote, or a name on the hub.")],
    dataset: Annotated[
        Path,
        typer.Option(
            help="What the model was trained on: .txt, .jsonl (text or input_ids), .npy, .pt, .parquet, or a folder "
            "of datasets.save_to_disk.",
            exists=True,
        ),
    ],
    revisions: Annotated[
        str | None,
        typer.Option(help="Several, separated by commas: of the hub, or sub-folders; 'checkpoint-*' is all of a kind."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or name; default: the model's.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence; longer ones are cut. Default: 512, or what fits.")
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=2, help="How many, evenly spread; default: all.")] = None,
    preset: Annotated[str, typer.Option(help="language-model: nβ = 30, γ = 300; paper; or none.")] = "language-model",
    loss: Annotated[
        str, typer.Option(help="next-token, or behavioral: how far outputs are from the model's own.")
    ] = "next-token",
    refine: Refine = False,
    sampler: Annotated[str | None, typer.Option(help="sgld, rmsprop-sgld, sghmc, …; default: chosen.")] = None,
    sampler_option: SamplerOptions = None,
    lr: StepSize = None,
    nbeta: Annotated[float | None, typer.Option(help="nβ; default: the preset's, or n / log n.")] = None,
    localization: Annotated[float | None, typer.Option(help="γ; default: the preset's.")] = None,
    chains: Chains = 4,
    draws: Draws = None,
    burnin: Burnin = None,
    target_error: TargetError = None,
    max_seconds: MaxSeconds = None,
    max_gradients: MaxGradients = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences; default: 16,384 tokens.")] = None,
    params: Params = None,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, float64, bfloat16 or float16.")] = "float32",
    strategy: Strategy = None,
    autocast: Autocast = None,
    microbatch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences that pass the model at a time; default: the batch.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to resume from; with --revisions, a folder for them.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the result: for LLCResult.load; with --revisions netCDF, for xarray.open_dataset.",
            dir_okay=False,
            callback=writable,
        ),
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    report_path: ReportPath = None,
    progress: Progress = True,
) -> None:
    """Estimate the local learning coefficient of a language model of Hugging Face.

    The loss is that of the next token, in eval mode, averaged over all predicted tokens of the data set; or how far the
    predictions are from those of the model itself, of which each revision is a minimum, trained or not.
    """
    paths: dict[str, Path | None] = {
        "--checkpoint": checkpoint,
        "--output": output,
        "--json": json_path,
        "--plot": plot_path,
    }
    check_different(paths | {"--dataset": dataset, "--report": report_path})
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of: {', '.join(_DTYPES)}", param_hint="--dtype")
    if report_path is not None and revisions is not None:
        raise typer.BadParameter("a report is of one revision", param_hint="--report")
    settings = settings_of(locals()) | {"preset": None if preset == "none" else preset, "progress": progress}
    transformers = require("transformers", "hf")
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    places = _places(model, revisions)
    loaded = _loaded(model, places[0], dtype)
    length = _context_of(loaded, context)
    data = read_tokens(dataset, lambda: _tokenizer(tokenizer, model, places[0]), length, split, sequences)
    if revisions is not None:
        _sweep(model, loaded, places, data, loss, settings, dtype, checkpoint, output, json_path, plot_path)
        return
    from llc_fast.estimate import estimate_llc

    result = estimate_llc(loaded, data, loss, checkpoint=checkpoint, **settings)
    deliver(result, output, json_path, plot_path, report_path, model)


COMMANDS = (hf,)


# ---- models ------------------------------------------------------------------------------------------------


def _places(model: str, revisions: str | None) -> list[tuple[str, dict[str, str]]]:
    """For each revision what ``from_pretrained`` is given: a folder, or a name with its revision."""
    folder = Path(model)
    if revisions is None:
        return [(model, {})]
    names = [name.strip() for name in revisions.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("there is none", param_hint="--revisions")
    if not folder.is_dir():
        return [(model, {"revision": name}) for name in names]
    found = list[Path]()
    for name in names:
        matching = sorted(filter(Path.is_dir, folder.glob(name)), key=_in_order) if re.search(r"[*?[]", name) else []
        candidates = (folder / name, folder / f"checkpoint-{name}")
        found += matching or [place for place in candidates if place.is_dir()][:1]
        if not matching and not any(place.is_dir() for place in candidates):
            there = ", ".join(place.name for place in sorted(filter(Path.is_dir, folder.iterdir()), key=_in_order))
            raise typer.BadParameter(
                f"{model} has no folder {name}; it has: {there or 'none'}", param_hint="--revisions"
            )
    return [(str(place), {}) for place in found]


def _in_order(path: Path) -> list[Any]:
    """By name, with numbers by their size: checkpoint-5 before checkpoint-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def _name(place: tuple[str, dict[str, str]]) -> str:
    return place[1].get("revision") or Path(place[0]).name


def _loaded(model: str, place: tuple[str, dict[str, str]], dtype: str) -> nn.Module:
    """The model of a place, in eval mode."""
    import torch

    source, options = place
    try:
        found: nn.Module = require("transformers", "hf").AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        what = f"{source} at revision {options['revision']}" if options else source
        raise typer.BadParameter(f"{what} can't be loaded: {first_line(error)}", param_hint="MODEL") from error
    return found.to(getattr(torch, dtype)).eval()


def _context_of(model: nn.Module, wanted: int | None) -> int:
    """Tokens of a sequence, as many as the model takes at most."""
    takes = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limit = takes if isinstance(takes, int) and takes > 1 else math.inf
    if wanted is not None and wanted > limit:
        raise typer.BadParameter(
            f"{wanted} is more than the {takes} tokens that the model takes", param_hint="--context"
        )
    return int(min(limit, _CONTEXT) if wanted is None else wanted)


def _tokenizer(name: str | None, model: str, place: tuple[str, dict[str, str]]) -> Any:
    """The tokenizer that was asked for, or else of the model, or of its first revision."""
    auto = require("transformers", "hf").AutoTokenizer
    candidates: Sequence[tuple[str, dict[str, str]]] = [(name, {})] if name is not None else [place, (model, {})]
    problem = ""
    for source, options in candidates:
        try:
            found = auto.from_pretrained(source, **options)
        except Exception as error:  # of many kinds: each class of tokenizer misses its files in its own way
            problem = problem or first_line(error)
            continue
        if found("A text.")["input_ids"]:  # some classes make an empty one where there are no files
            return found
    raise _wrong(
        f"{name or model} has no tokenizer for a text{f' ({problem})' if problem else ''}: pass --tokenizer, or token "
        "ids (.npy, .pt, .jsonl with input_ids)"
    )


# ---- several revisions -------------------------------------------------------------------------------------


def _sweep(
    model: str,
    loaded: nn.Module,
    places: Sequence[tuple[str, dict[str, str]]],
    data: Any,
    loss: str,
    settings: dict[str, Any],
    dtype: str,
    folder: Path | None,
    output: Path | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Estimate λ at each revision, print a line for each, and write what was asked for."""
    from llc_fast.sweep import sweep_checkpoints

    def states() -> Iterator[dict[str, Any]]:
        """One at a time: each is as large as the model."""
        for k, place in enumerate(places):
            source = loaded if k == 0 else _loaded(model, place, dtype)
            yield {name: t.detach().clone() for name, t in source.state_dict().items()}

    names = [_name(place) for place in places]
    with finished_too(lambda found: deliver_sweep(found, len(names), output, json_path, plot_path)):
        found = sweep_checkpoints(loaded, states(), data, loss, labels=names, dim="revision", folder=folder, **settings)
    deliver_sweep(found, len(names), output, json_path, plot_path)


# ---- data --------------------------------------------------------------------------------------------------


def read_tokens(
    path: Path, tokenizer: Callable[[], Any], context: int, split: str | None = None, count: int | None = None
) -> dict[str, list[Any]]:
    """Token sequences of at most `context` tokens from a file or folder: ``input_ids``, and the columns beside it.

    A text file, or one stream of token ids, is cut into sequences that do not overlap; texts and sequences of a data
    set stay apart, and are cut where they are too long.

    Args:
        path: .txt; .jsonl, a text, ids or an object with ``text`` or ``input_ids`` in each line; .npy or .pt of ids;
            .parquet; a folder of ``datasets.save_to_disk``.
        tokenizer: gives the tokenizer where there are texts.
        context: tokens of a sequence at most.
        split: of a data set that has several.
        count: sequences, evenly spread over all of them; None: all.

    Raises:
        typer.BadParameter: the file holds none of these.
    """
    try:
        found = _read(path, split)
    except typer.BadParameter:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _wrong(f"{path} can't be read: {first_line(error)}") from error
    if isinstance(found, str):
        found = {"input_ids": [tokenizer()(found, add_special_tokens=False, verbose=False)["input_ids"]]}
    elif "text" in found:
        made = tokenizer()
        found = {"input_ids": [made(text, verbose=False)["input_ids"] for text in found["text"]]}
    ids = found["input_ids"]
    places = [(k, start) for k, row in enumerate(ids) for start in range(0, len(row) - 1, context)]
    if not places:
        raise _wrong(f"{path} has no sequence of two tokens or more")
    if count is not None and count < len(places):
        from llc_fast.data import spread_indices

        places = [places[k] for k in spread_indices(len(places), count).tolist()]
    return {name: [rows[k][start : start + context] for k, start in places] for name, rows in found.items()}


_COLUMNS = ("input_ids", "attention_mask", "labels")


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--dataset")


def _read(path: Path, split: str | None) -> str | dict[str, Any]:
    """A text, or columns: texts, or rows of token ids with masks and labels."""
    ending = path.suffix.lower()
    if path.is_dir():
        return _of_dataset(_split_of(require("datasets", "hf").load_from_disk(str(path)), split))
    if ending == ".parquet":
        datasets = require("datasets", "hf")
        table = require("pyarrow.parquet", "hf").read_table(str(path))  # and not datasets' reader, which keeps a copy
        return _of_dataset(datasets.Dataset(table))
    if ending == ".txt":
        return path.read_text(encoding="utf-8")
    if ending in (".jsonl", ".ndjson"):
        lines = path.read_text(encoding="utf-8").splitlines()
        return _of_entries([json.loads(line) for line in lines if line.strip()])
    if ending == ".npy":
        import numpy as np

        return {"input_ids": _rows_of(np.load(path, allow_pickle=False))}
    if ending in (".pt", ".pth"):
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        columns = found if isinstance(found, dict) else {"input_ids": found}
        return {name: _rows_of(columns[name]) for name in _COLUMNS if name == "input_ids" or name in columns}
    raise _wrong(
        f"{path} is no folder of datasets.save_to_disk, and its ending none of: .txt, .jsonl, .npy, .pt, .parquet"
    )


def _rows_of(found: Any) -> Any:
    """Rows; one stream of ids is one row."""
    dimensions = getattr(found, "ndim", None)
    if dimensions is None:
        return [found] if len(found) and isinstance(found[0], int) else found
    return [found] if dimensions == 1 else found


def _of_entries(entries: list[Any]) -> dict[str, Any]:
    """Lines of JSON: objects, texts or lists of ids."""
    if not entries:
        raise _wrong("it has no lines")
    first = entries[0]
    if isinstance(first, dict):
        return {name: [entry[name] for entry in entries] for name in _names_in(first)}
    return {"text" if isinstance(first, str) else "input_ids": entries}


def _split_of(found: Any, split: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    if len(found) == 1 and split is None:
        return next(iter(found.values()))
    if split not in found:
        raise typer.BadParameter(f"the data set has the splits {', '.join(found)}: choose one", param_hint="--split")
    return found[split]


def _of_dataset(found: Any) -> dict[str, Any]:
    return {name: list(found.with_format(None)[name]) for name in _names_in(found.column_names)}


def _names_in(columns: Any) -> list[str]:
    """The columns that are used: token ids with what belongs to them, or else texts."""
    if "input_ids" in columns:
        return [name for name in _COLUMNS if name in columns]
    if "text" not in columns:
        raise _wrong(f"it has neither input_ids nor text, but {', '.join(columns)}")
    return ["text"]
