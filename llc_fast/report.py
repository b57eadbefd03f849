"""A result as one page: an HTML file that needs nothing else, neither a network nor scripts."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from llc_fast.plots import PANELS, panel_svg
from llc_fast.stats.limits import (
    BURNIN_EFFECT,
    MAX_BIAS,
    MAX_DESCENT,
    MAX_GRADIENT_ERROR,
    MAX_INIT_LOSS_SENSITIVITY,
    MAX_R_HAT,
    MAX_RELATIVE_ERROR,
    MAX_SPIKES,
    MAX_SPREAD,
    MAX_SUBTRACTED_BIAS,
    MIN_ESS,
    MIN_METROPOLIS_ACCEPTANCE,
    MIN_RELAXATIONS,
    MIN_SLOW_TIMES,
    TREND_ERRORS,
    TREND_SIZE,
    UNRESOLVED_SIZE,
)
from llc_fast.support.entries import entries
from llc_fast.support.environment import installed, runs
from llc_fast.support.files import atomic_write

if TYPE_CHECKING:
    from llc_fast.result import LLCResult

ARGUMENTS = (
    *("sampler", "lr", "nbeta", "localization", "localization_metric", "preconditioner", "bias_correction"),
    *("num_chains", "num_draws", "num_burnin", "num_steps_bw_draws", "batch_size", "params", "preset", "refine"),
    *("seed", "device"),
)
"""Settings that are arguments of :func:`llc_fast.estimate_llc` by these names."""
FACTS = (
    *("num_samples", "num_parameters", "control_variate", "training_mode", "strategy", "seconds", "curvature"),
    *("loss_fn", "num_tokens", "num_left_out"),
)
"""Settings that say what was found. All others are options of the sampler."""
_PAPER = "https://arxiv.org/abs/2308.12108"


def write_report(result: LLCResult, path: str | os.PathLike[str], *, head: Sequence[str] = (), title: str = "") -> None:
    """Write :func:`report_html` to a file; a crash leaves the old file or the new one.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        OSError: the file can't be written.
    """
    page = report_html(result, head=head, title=title).encode("utf-8", errors="replace")
    with atomic_write(path) as file:
        file.write(page)


def report_html(result: LLCResult, *, head: Sequence[str] = (), title: str = "") -> str:
    """The page: estimate, warnings, pictures, diagnostics, settings, versions, how to cite.

    Args:
        result: of an estimate.
        head: lines that say what was estimated, and how.
        title: of the page; empty: a general one.
    """
    title = title or "Local learning coefficient"
    sections = [
        ("estimate", "Estimate", _estimate(result, head)),
        ("warnings", "Warnings", _warnings(result)),
        ("pictures", "Pictures", _pictures(result)),
        ("diagnostics", "Diagnostics", _diagnostics(result)),
        ("settings", "Settings", _settings(result)),
        ("software", "Software and hardware", _software()),
        ("cite", "How to cite", _citation()),
    ]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{content}</section>'
        for name, heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><header><h1>{escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>{body}</main></body></html>\n"
    )


# ---- sections ----------------------------------------------------------------------------------------------


def _estimate(result: LLCResult, head: Sequence[str]) -> str:
    low, high = result.interval()
    if not result.nbeta:
        number, beside = "λ̂ = 0", "by definition, since nβ = 0"
    elif not math.isfinite(result.llc_mean):
        number, beside = "no estimate", "the warnings below say why"
    elif not math.isfinite(result.llc_stderr):
        number, beside = f"λ̂ = {result.llc_mean:.4g}", "its error is not known"
    else:
        number = f"λ̂ = {result.llc_mean:.4g} ± {result.llc_stderr:.2g}"
        beside = f"standard error; 95 % interval {low:.4g} to {high:.4g}"
    count = len(result.warnings)
    trust = "No check found a reason to doubt it." if math.isfinite(result.llc_mean) else ""
    if count:
        one = "There is a reason" if count == 1 else f"There are {count} reasons"
        trust = f'{one} to doubt it: see <a href="#warnings">warnings</a>.'
    lines = "".join(f"<li>{escape(line)}</li>" for line in head)
    return (
        f'<p class="number">{escape(number)}</p><p class="beside">{escape(beside)}</p>'
        f"<p>{escape(_meaning(result))} {trust}</p>{f'<ul>{lines}</ul>' if lines else ''}"
    )


def _meaning(result: LLCResult) -> str:
    """What the number says, in a sentence or two."""
    llc, parameters = result.llc_mean, result.settings.get("num_parameters")
    if not result.nbeta:
        return "The loss had no weight: chains sampled the localization around w* alone, as a control."
    if not math.isfinite(llc):
        return "The chains have no draws from which λ could be estimated."
    if llc <= 0:
        return "λ is never negative: the chains found lower loss than at w*, so w* is no minimum of this loss."
    size = f"it has {parameters} that were sampled. " if isinstance(parameters, int) else ""
    gamma = result.settings.get("localization")
    at = f"nβ = {result.nbeta:.4g}" + (f" and γ = {gamma:.4g}" if isinstance(gamma, (int, float)) else "")
    return (
        f"Near w*, the model is as complex as a regular statistical model with 2λ̂ ≈ {2 * llc:.3g} parameters; {size}"
        f"This is at the scale of {at}: compare λ̂ only at equal ones."
    )


def _warnings(result: LLCResult) -> str:
    if not result.warnings:
        return "<p>None.</p>"
    items = []
    for warning in result.warnings:
        more = entries().get(warning.code)
        explained = f"<details><summary>What this means</summary>{markdown_html(more)}</details>" if more else ""
        items.append(f"<li><p><b>{escape(warning.code)}</b>: {escape(warning)}</p>{explained}</li>")
    return f'<ul class="warnings">{"".join(items)}</ul>'


def _pictures(result: LLCResult) -> str:
    low, high = result.interval()
    said = f"λ̂ = {result.llc_mean:.4g}" if math.isfinite(result.llc_mean) else "no estimate"
    said += f", 95 % interval {low:.4g} to {high:.4g}" if math.isfinite(high - low) else ""
    figures = []
    for name, panel in PANELS.items():
        picture = base64.b64encode(panel_svg(result, name)).decode()
        alt = escape(f"{panel.title.capitalize()}, {len(result.loss_trace)} chains; {said}")
        figures.append(
            f'<figure id="{name}"><h3>{escape(panel.title.capitalize())}</h3><img alt="{alt}" '
            f'src="data:image/svg+xml;base64,{picture}"><figcaption>{escape(panel.reading)}</figcaption></figure>'
        )
    return f'<div class="pictures">{"".join(figures)}</div>'


class _Row(NamedTuple):
    """Of the table of diagnostics."""

    name: str
    value: str | None
    limit: str = ""
    is_inside: bool | None = None
    codes: tuple[str, ...] = ()


def _rows(result: LLCResult) -> list[_Row]:
    found, llc = result.diagnostics, abs(result.llc_mean)

    def known(name: str) -> float:
        value = found.get(name)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def row(
        title: str,
        pattern: str,
        value: float,
        *codes: str,
        least: float = -math.inf,
        most: float = math.inf,
        unless: str = "",
        beside: float = 0.0,
    ) -> _Row:
        """A number and its limit, both shown by the same pattern; `beside` is its error."""
        limit = f"at least {pattern.format(least)}" if math.isfinite(least) else ""
        limit = f"at most {pattern.format(most)}" if math.isfinite(most) else limit
        if not math.isfinite(value):
            return _Row(title, None, limit + unless, None, codes)
        text = pattern.format(value) + (f" ± {pattern.format(beside)}" if beside else "")
        return _Row(title, text, limit + unless, least <= value <= most if limit else None, codes)

    def share(value: float) -> float:
        return value / llc if 0 < llc < math.inf else math.nan

    is_corrected, rates = bool(result.settings.get("bias_correction")), found.get("acceptance_per_chain") or ()
    percent, number = "{:.3g} %", "{:.3g}"
    trend, error = known("trend"), known("trend_stderr")
    return [
        row("chains that diverged", "{:.0f}", len(result.diverged_chains), "diverged", most=0),
        row(
            "standard error, of λ̂", percent, 100 * share(result.llc_stderr), "imprecise", most=100 * MAX_RELATIVE_ERROR
        ),
        row("R̂: whether chains have the same distribution", "{:.3f}", known("r_hat"), "rhat", most=MAX_R_HAT),
        row(
            "variance between chains, over the largest that chance gives",
            number,
            known("chain_spread"),
            "rhat",
            most=1,
            unless=f", unless they differ by less than {MAX_SPREAD:.0%}",
        ),
        row("effective sample size, bulk", "{:.0f}", known("ess_bulk"), "ess", least=MIN_ESS),
        row("effective sample size, tail", "{:.0f}", known("ess_tail")),
        row(
            "relaxation times of the stiffest directions in a chain's draws",
            number,
            known("relaxations"),
            "short",
            least=MIN_RELAXATIONS,
        ),
        row(
            "autocorrelation times of slow fluctuations in a chain",
            number,
            known("slow_times"),
            "slow",
            least=MIN_SLOW_TIMES,
            unless=f", unless they are below {MAX_SPREAD:.0%} of λ̂",
        ),
        _Row(
            "trend: change of λ̂ from the first draw to the last",
            f"{trend:+.2g} ± {error:.2g}" if math.isfinite(trend) else None,
            f"at most {TREND_ERRORS:g} errors, or {TREND_SIZE:.0%} of λ̂",
            abs(trend) <= max(TREND_ERRORS * error, TREND_SIZE * llc),
            ("trend",),
        ),
        row(
            "burn-in left among the draws, in λ̂",
            percent,
            100 * abs(share(known("burnin_effect"))),
            "burnin",
            most=100 * BURNIN_EFFECT,
            unless=", or twice its error",
        ),
        row(
            "what λ̂ still gains with the length of the chains",
            percent,
            100 * abs(share(known("unresolved"))),
            "unresolved",
            most=100 * UNRESOLVED_SIZE,
        ),
        row(
            "step-size and gradient-noise bias" + ", which is subtracted" * is_corrected,
            percent,
            100 * known("bias_share"),
            *("bias", "step-size"),
            most=100 * (MAX_SUBTRACTED_BIAS if is_corrected else MAX_BIAS),
        ),
        row("acceptance of a Metropolis test of the steps", "{:.2f}", known("acceptance"), "adaptation"),
        row(
            "the same, in the chain where it is lowest",
            "{:.2f}",
            min((float(r) for r in rates if r is not None), default=math.nan),
            "acceptance",
            least=MIN_METROPOLIS_ACCEPTANCE,
        ),
        row("gradient noise, of all noise", percent, 100 * known("gradient_noise_share")),
        row(
            "change of the loss that gradients do not explain",
            percent,
            100 * known("gradient_error"),
            "gradient",
            most=100 * MAX_GRADIENT_ERROR,
        ),
        row(
            "distance of the draws from w*, over ‖w*‖", number, known("distance_over_reference"), "far", "left", most=1
        ),
        row("λ̂ from spikes of the loss", percent, 100 * known("spike_share"), "spikes", most=100 * MAX_SPIKES),
        row(
            "change of λ̂ by one standard error of L(w*)",
            percent,
            100 * known("init_loss_sensitivity"),
            "init-loss",
            most=100 * MAX_INIT_LOSS_SENSITIVITY,
        ),
        row(
            "how far nβ·L + γ/2·‖w − w*‖² falls from w*",
            number,
            known("descent"),
            "no-minimum",
            most=MAX_DESCENT * max(llc, 1.0),
        ),
        row("dλ̂/dlog γ", "{:+.2g}", known("localization_slope"), beside=known("localization_slope_stderr")),
    ]


def _diagnostics(result: LLCResult) -> str:
    codes = {warning.code for warning in result.warnings}
    rows = []
    for row in _rows(result):
        warned = sorted(codes.intersection(row.codes))
        if row.value is None and not warned:
            continue
        if warned:
            state = f'<td class="warned">warning: {", ".join(warned)}</td>'
        elif row.is_inside is None:
            state = "<td>–</td>"
        else:
            state = '<td class="fine">fine</td>' if row.is_inside else "<td>outside</td>"
        cells = f"<td>{escape(row.value or '–')}</td><td>{escape(row.limit or '–')}</td>"
        rows.append(f'<tr><th scope="row">{escape(row.name)}</th>{cells}{state}</tr>')
    chains = "".join(
        f'<tr><th scope="row">{chain}</th><td>{"–" if math.isnan(value) else f"{value:.5g}"}</td></tr>'
        for chain, value in enumerate(result.llc_per_chain)
    )
    return (
        '<div class="wide"><table><caption>Statistics and their limits. What is outside without a warning of its own '
        "is said by another warning, or makes no difference.</caption>"
        '<thead><tr><th scope="col">statistic</th><th scope="col">value</th><th scope="col">limit</th>'
        f'<th scope="col">verdict</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<details><summary>λ̂ of each chain</summary><table><thead><tr><th scope="col">chain</th><th scope="col">λ̂</th>'
        f"</tr></thead><tbody>{chains}</tbody></table></details>"
        f"<details><summary>All numbers</summary>{_table(result.diagnostics.items())}</details>"
    )


def _settings(result: LLCResult) -> str:
    facts = [(name, value) for name, value in result.settings.items() if name in FACTS]
    more = f"<h3>What was found</h3>{_table(facts)}" if facts else ""
    return (
        "<p>What was used, as a call that uses it again:</p>"
        f'<pre tabindex="0"><code>{escape(python_call(result.settings))}</code></pre>{more}'
    )


def python_call(settings: dict[str, Any]) -> str:
    """A call of ``estimate_llc`` with these settings; what they do not hold is an open name, or said in a comment."""
    options = {k: v for k, v in settings.items() if k not in ARGUMENTS and k not in FACTS}
    given = {name: settings[name] for name in ARGUMENTS if name in settings}
    lines, comments = [], {}
    for name, value in given.items():
        text = repr(value)
        if isinstance(value, float) and not math.isfinite(value):
            text = f'float("{value}")'
        if name == "sampler" and options:
            inside = ", ".join(f"{k}={v!r}" for k, v in options.items())
            text = f"llc_fast.samplers.make_sampler({value!r}, {inside})"
        elif name == "params" and isinstance(value, str):
            text, comments[name] = repr(value.split(", ")), "names alone: masks are not kept"
        elif name == "preconditioner" and value == "given":
            text, comments[name] = "preconditioner", "tensors, which are not kept"
        elif name == "batch_size" and value is None:
            continue
        lines.append(f"    {name}={text}," + (f"  # {comments[name]}" if name in comments else ""))
    loss = settings.get("loss_fn")
    first = f"    model,\n    data,\n    {repr(loss) if isinstance(loss, str) else 'loss_fn'},"
    return "\n".join(["result = llc_fast.estimate_llc(", first, *lines, ")"])


def _software() -> str:
    """Of the computer that writes the report; without importing torch for it."""
    try:
        facts = installed()
        if "torch" in sys.modules:
            facts |= runs(facts)
    except ImportError:  # a copy without the native module can read results
        from llc_fast import __version__

        facts = {"llc_fast": __version__}
    return f"<p>Of the computer that wrote this page:</p>{_table(facts.items())}"


def _citation() -> str:
    from llc_fast import __version__

    bibtex = (
        "@software{llc_fast,\n  title = {llc_fast: fast local learning coefficient estimation},\n"
        "  author = {{The llc_fast developers}},\n"
        f"  version = {{{__version__}}},\n  year = {{2026}}\n}}\n\n"
        "@misc{lau2023local,\n  title = {The Local Learning Coefficient: A Singularity-Aware Complexity Measure},\n"
        "  author = {Lau, Edmund and Furman, Zach and Wang, George and Murfet, Daniel and Wei, Susan},\n"
        "  year = {2023},\n  eprint = {2308.12108},\n  archivePrefix = {arXiv}\n}"
    )
    return (
        f'<p>This software, with its version ({escape(__version__)}), and the <a href="{_PAPER}">paper that introduced '
        f'the estimator</a>.</p><pre tabindex="0"><code>{escape(bibtex)}</code></pre>'
    )


# ---- pieces ------------------------------------------------------------------------------------------------


def _table(items: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(_text(v))}</td></tr>' for k, v in items)
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "–"
    if isinstance(value, dict):
        return json.dumps(value, default=str, ensure_ascii=False)
    return "–" if value is None or value == "" else str(value)


_INLINE: Sequence[tuple[str, Callable[[re.Match[str]], str]]] = (
    (r"`([^`]+)`", lambda found: f"<code>{found[1]}</code>"),
    (r"\*\*([^*]+)\*\*", lambda found: f"<b>{found[1]}</b>"),
    (r"\[([^]]+)\]\((https?://[^)\s]+)\)", lambda found: f'<a href="{found[2]}">{found[1]}</a>'),
    (r"\[([^]]+)\]\([^)]*\)", lambda found: found[1]),
)


def markdown_html(text: str) -> str:
    """The little Markdown that explanations of warnings have: paragraphs, lists, code, bold, links to the web."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    "):
            code = "\n".join(line.removeprefix("    ") for line in block.splitlines())
            blocks.append(f"<pre><code>{escape(code)}</code></pre>")
        elif block.startswith("- "):
            items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
            blocks.append(f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>")
        else:
            blocks.append(f"<p>{_inline(block)}</p>")
    return "".join(blocks)


def _inline(text: str) -> str:
    text = escape(" ".join(text.split()))
    for pattern, change in _INLINE:
        text = re.sub(pattern, change, text)
    return text


_STYLE = """
:root{--ink:#1b1f24;--soft:#57606a;--page:#fff;--card:#f6f8fa;--line:#d0d7de;--link:#0059a3;--warn:#a33c00;--fine:#00694d}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--page:#0d1117;--card:#161b22;--line:#30363d;
--link:#6cb6ff;--warn:#ffa657;--fine:#56d4a4}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem 1.25rem 3rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.5rem;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .4rem}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;list-style:none;padding:0;margin:0;font-size:.9rem}
.number{font-size:2.2rem;font-weight:650;line-height:1.15;margin:.5rem 0 0}
.beside{color:var(--soft);margin:.1rem 0 1rem}
section>p{max-width:52rem}
.warnings{list-style:none;padding:0}
.warnings>li{border-left:4px solid var(--warn);background:var(--card);padding:.5rem .9rem;margin:.6rem 0}
.warnings p{margin:.2rem 0}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr));gap:1rem}
figure{margin:0;max-width:42rem;padding:.75rem;
background:var(--card);border:1px solid var(--line);border-radius:6px;break-inside:avoid}
figure img{display:block;width:100%;height:auto;background:#fff;border-radius:4px}
figcaption{font-size:.88rem;color:var(--soft);margin-top:.5rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem;margin:.5rem 0}
caption{text-align:left;color:var(--soft);padding-bottom:.4rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line)}
th{font-weight:400}
thead th{font-weight:650}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.warned{color:var(--warn);font-weight:650}
.fine{color:var(--fine)}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;overflow-x:auto}
code{font:.88em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;color:var(--link);margin:.3rem 0}
@media print{:root{--ink:#000;--soft:#333;--page:#fff;--card:#fff;--line:#bbb;--link:#000;--warn:#7a2d00;--fine:#004d38}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}h2{break-after:avoid}
.pictures{grid-template-columns:1fr 1fr}pre{white-space:pre-wrap}tr{break-inside:avoid}
.warnings details::details-content{content-visibility:visible;display:block}}
"""
