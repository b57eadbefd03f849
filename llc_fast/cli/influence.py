"""``llc-fast influence``: what the samples of a store say about each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llc_fast.cli.options import JsonPath, PlotPath, check_different, writable, write_all, write_json

if TYPE_CHECKING:
    from llc_fast.influence import Pair, SampleInfluence

HtmlPath = Annotated[
    Path | None,
    typer.Option(
        "--html",
        help="Write the train sequences that matter most to the mean loss of the query probe to this file, a color "
        "behind each token; the run was sampled with --per token.",
        dir_okay=False,
        callback=writable,
    ),
]


def influence(
    store: Annotated[Path, typer.Argument(help="Store of llc-fast sample, or of devinterp 2.", show_default=False)],
    train: Annotated[str | None, typer.Option(help="Probe of the rows; default: the first.")] = None,
    query: Annotated[str | None, typer.Option(help="Probe of the columns; default: that of the rows.")] = None,
    kind: Annotated[str, typer.Option(help="influence, correlation or covariance.")] = "influence",
    per: Annotated[
        str, typer.Option(help="sample, token or probe: rows and columns; or a pair, such as token,probe.")
    ] = "sample",
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Samples of the data; default: as the store says.")
    ] = None,
    first_draw: Annotated[int, typer.Option(min=0, help="Leave out so many draws of each chain.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="How many entries, and sequences, to show.")] = 10,
    q: Annotated[float, typer.Option(help="False discovery rate of what is significant.")] = 0.05,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            help="JSON with the text of each token, as a list or as {text: token}.", exists=True, dir_okay=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New Zarr store for the whole matrix, which then is not kept in memory.")
    ] = None,
    json_path: JsonPath = None,
    plot_path: PlotPath = None,
    html_path: HtmlPath = None,
) -> None:
    """Show how samples of a store influence each other, with standard errors.

    The influence of i on j is −β·Cov(ℓ_i, ℓ_j) over draws of the posterior, the derivative of the loss of j with
    respect to the weight of i: negative where more of i lowers the loss of j.
    """
    files = {"--vocabulary": vocabulary, "--json": json_path, "--plot": plot_path, "--html": html_path}
    check_different({"STORE": store, "--out": out} | files)
    decode = None if vocabulary is None else read_vocabulary(vocabulary)
    if not 0 < q < 1:
        raise typer.BadParameter(f"must be between 0 and 1, got {q}", param_hint="--q")
    from llc_fast.samples import Samples

    with Samples.open(store) as samples:
        if not samples.probes:
            raise typer.BadParameter(f"{store} has no probes: sample with probes", param_hint="STORE")
        rows = samples.probes[0] if train is None else train
        draws = slice(first_draw, None)
        given = tuple(part.strip() for part in per.split(","))
        wanted: Any = given[0] if len(given) == 1 else given
        found = samples.influence(rows, query, kind=kind, per=wanted, n=n, draws=draws, out=out)  # type: ignore[arg-type]
        typer.echo(found.summary(q))
        best = found.top(top, decode)
        typer.echo(_table(best))
        text = ""
        if html_path is not None:
            whole: Any = ("token", "probe")
            options: dict[str, Any] = {"kind": kind, "per": whole, "n": n, "draws": draws}
            tokens = found if wanted == whole else samples.influence(rows, query, **options)
            text = _page(tokens.html(decode, top=top, q=q), f"{kind}: {store.name}")

        def draw(path: Path) -> None:
            found.plot(path, q=q, decode=decode)

        write_all(
            [
                ("numbers", json_path, lambda path: write_json(path, numbers_of(found, best, q))),
                ("picture", plot_path, draw),
                ("page", html_path, lambda path: _write_text(path, text)),
            ]
        )
        if out is not None:
            typer.echo(f"matrix written to {out}")


COMMANDS = (influence,)


def read_vocabulary(path: Path) -> list[str]:
    """The text of each token, of a JSON file with a list, or with an object from texts to tokens.

    Raises:
        typer.BadParameter: it is neither.
    """
    try:
        given = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(f"{path} is no JSON: {error}", param_hint="--vocabulary") from None
    if isinstance(given, list):
        return [str(text) for text in given]
    if isinstance(given, dict) and given and all(type(k) is int and k >= 0 for k in given.values()):
        found = [""] * (max(given.values()) + 1)
        for text, token in given.items():
            found[token] = text
        return found
    raise typer.BadParameter(
        f"{path} must have a list of texts, or an object from texts to numbers of tokens", param_hint="--vocabulary"
    )


def numbers_of(found: SampleInfluence, best: list[Pair], q: float) -> dict[str, Any]:
    """What is written of a matrix; one of more than a million entries is left to ``--out``."""
    import numpy as np

    numbers: dict[str, Any] = found.attributes() | {
        "top": [
            {"train": pair.train, "query": pair.query, "value": pair.value, "stderr": pair.stderr} for pair in best
        ],
        **{name: values.tolist() for name, (_, values) in found.coordinates().items()},
    }
    if found.value.size <= 1_000_000:
        numbers |= {
            "value": np.asarray(found.value[:]).tolist(),
            "stderr": np.asarray(found.stderr[:]).tolist(),
            "significant": found.significant(q).tolist(),
        }
    return numbers


def _table(best: list[Pair]) -> str:
    if not best:
        return "  (no entries)"
    left, right = (max(len(name) for name in names) for names in zip(*((p.train, p.query) for p in best), strict=True))
    rows = [f"  {'train':<{left}}  {'query':<{right}}      value ± stderr"]
    rows += [f"  {p.train:<{left}}  {p.query:<{right}}  {p.value:+9.4g} ± {p.stderr:.2g}" for p in best]
    return "\n".join(rows)


def _page(body: str, title: str) -> str:
    from html import escape

    head = f'<!doctype html><html><head><meta charset="utf-8"><title>{escape(title)}</title></head>'
    return f"{head}<body>{body}</body></html>\n"


def _write_text(path: Path, text: str) -> None:
    from llc_fast.support.files import atomic_write

    with atomic_write(path) as file:
        file.write(text.encode())
