"""Influences of named samples, through `llc_fast.sample`: against the closed form of a Gaussian posterior, and others.

What the numbers are made of is tested in tests/stats/test_influence.py.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llc_fast
from llc_fast import LLCWarning, Samples
from llc_fast.influence import Items, SampleInfluence
from llc_fast.samples import Probe, attributes, layout
from llc_fast.schedule import Schedule
from llc_fast.stats.influence import influence
from llc_fast.store import SampleStore

pytest.importorskip("zarr", minversion="3", reason="zarr 3 needs Python 3.11")
xarray = pytest.importorskip("xarray")
HERE = Path(__file__).parent
Array = np.ndarray[Any, np.dtype[np.float64]]


# ---- a Gaussian posterior ------------------------------------------------------------------------------------


class _Regressions(NamedTuple):
    """Linear regressions side by side, independent of each other: sample i is of regression i // size."""

    samples: Samples
    covariance: Array
    beta: float
    count: int

    def blocks(self, kind: Any) -> list[tuple[SampleInfluence, Array]]:
        """Half of the samples of each on the other half, and what these should be."""
        size = len(self.covariance) // self.count
        found = []
        for first in range(0, len(self.covariance), size):
            rows, columns = slice(first, first + size // 2), slice(first + size // 2, first + size)
            exact = self.covariance[rows, columns]
            scale = np.sqrt(np.diag(self.covariance))
            exact = {
                "covariance": exact,
                "influence": -self.beta * exact,
                "correlation": exact / np.outer(scale[rows], scale[columns]),
            }[kind]
            found.append((self.samples.influence(("data", rows), ("data", columns), kind=kind), exact))
        return found


def _regressions(
    draws: int, count: int, *, size: int = 50, width: int = 4, step: float = 0.7, between: int = 5
) -> _Regressions:
    """Sampled by MALA, which is exact at any step size, with gradients over all data.

    Σ = (nβH + γ)⁻¹ about w*, and with g_i and H_i the gradient and Hessian of ℓ_i = (y_i − x_i·w)² at w*:
    Cov(ℓ_i, ℓ_j) = g_i·Σg_j + ½tr(H_iΣH_jΣ).
    """
    n, gamma = count * size, 5.0
    nbeta = n / 2
    rng = np.random.default_rng(0)
    x = np.kron(np.eye(count), np.ones((size, width))) * rng.standard_normal((n, count * width))
    y = x @ rng.standard_normal(count * width) + 0.7 * rng.standard_normal(n)
    hessian = 2 * x.T @ x / n
    best = np.linalg.solve(hessian, 2 * x.T @ y / n)
    sigma = np.linalg.inv(nbeta * hessian + gamma * np.eye(count * width))
    gradients = 2 * x * (x @ best - y)[:, None]
    exact = gradients @ sigma @ gradients.T + 0.5 * (2 * x @ sigma @ x.T) ** 2
    model = nn.Linear(count * width, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(best)[None])
    data = torch.from_numpy(x).float(), torch.from_numpy(y).float()[:, None]
    samples = llc_fast.sample(
        model, data, F.mse_loss, probes={"data": data}, sampler="mala", lr=step * np.trace(sigma) / len(sigma),
        batch_size=None, nbeta=nbeta, localization=gamma, num_chains=4, num_draws=draws, num_burnin=100,
        num_steps_bw_draws=between, progress=False,
    )  # fmt: skip
    return _Regressions(samples, exact, nbeta / n, count)


def _check(case: _Regressions, error: float, low: float, high: float) -> None:
    for kind in ("influence", "covariance", "correlation"):
        inside = []
        for found, exact in case.blocks(kind):
            assert np.linalg.norm(found.value - exact) < error * np.linalg.norm(exact), kind
            below, above = found.interval()
            inside.append(((below <= exact) & (exact <= above)).mean())
        assert low < np.mean(inside) < high, (kind, inside)


def test_closed_form_of_a_gaussian_posterior() -> None:
    """4 × 700 draws of two regressions of four parameters, whose Monte Carlo error is 4 to 5 %."""
    _check(_regressions(700, 2), 0.09, 0.85, 1.0)


@pytest.mark.slow
def test_closed_form_with_many_draws() -> None:
    """4 × 5,000 draws of 24: 3 % in Frobenius norm of each, and 95 % intervals hold 93 to 97 % of entries.

    Entries of one regression share three parameters, so that the share inside varies by 4 % from one to the next.
    """
    _check(_regressions(5000, 24, width=3, step=0.5, between=8), 0.03, 0.93, 0.97)


# ---- rows and columns ----------------------------------------------------------------------------------------

CHAINS, DRAWS, NBETA, N = 3, 80, 12.0, 48
MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 1]], bool)


def _store(
    path: Path | None = None,
    *,
    done: tuple[int, ...] = (DRAWS,) * CHAINS,
    completed: bool = True,
    mask: np.ndarray[Any, Any] | None = MASK,
    nbeta: float = NBETA,
    **settings: Any,
) -> tuple[Samples, dict[str, Array]]:
    """A store with losses of tokens ("text", five samples of three) and of samples ("points", seven), and these."""
    rng = np.random.default_rng(5)
    shared = rng.standard_normal((CHAINS, DRAWS, 4))
    tokens = shared @ rng.standard_normal((4, 15)) + rng.standard_normal((CHAINS, 1, 15)) + 3
    tokens = tokens.reshape(CHAINS, DRAWS, 5, 3).astype(np.float32)
    points = (shared @ rng.standard_normal((4, 7)) + 0.5 * rng.standard_normal((CHAINS, DRAWS, 7))).astype(np.float32)
    if mask is not None:
        tokens[:, :, ~mask] = np.nan
    mean = None if mask is None else float(mask.sum(axis=1).mean())
    probes = [Probe("text", 5, 3, mean), Probe("points", 7)]
    schedule = Schedule(DRAWS, 0)
    said = attributes(
        probes, nbeta=nbeta, init_loss=1.0, schedule=schedule, settings={"num_samples": N, "num_chains": 3} | settings
    )
    store = SampleStore.create(path, layout(probes, num_chains=CHAINS, num_draws=DRAWS), said, resume=False)
    store.write_fixed("input_ids_text", np.arange(20).reshape(5, 4))
    store.write_fixed("init_loss_text", tokens[0, 0])
    store.write_fixed("init_loss_points", points[0, 0])
    if mask is not None:
        store.write_fixed("token_mask_text", mask)
    for chain, count in enumerate(done):
        for draw in range(count):
            store.write("loss_text", chain, draw, tokens[chain, draw])
            store.write("loss_points", chain, draw, points[chain, draw])
            store.write("draw_loss", chain, draw, 1.0)
    if completed:
        store.complete()
    store.close()
    return Samples.of(store), {"text": tokens.astype(float), "points": points.astype(float)}


def _covariance(left: Array, right: Array) -> Array:
    """Within chains, of ``[chain, draw, item]``."""
    a, b = (side - side.mean(axis=1, keepdims=True) for side in (left, right))
    found: Array = np.einsum("cdi,cdj->ij", a, b) / (a.shape[0] * (a.shape[1] - 1))
    return found


def test_samples_by_name() -> None:
    """Numbers in any order, a mask, a slice; errors and diagnostics are those of the function of arrays."""
    samples, losses = _store()
    points = losses["points"]
    found = samples.influence(("points", [5, 0, -1]), ("points", points[0, 0] > 0))
    chosen = np.flatnonzero(points[0, 0] > 0)
    np.testing.assert_allclose(found.value, -NBETA / N * _covariance(points, points)[[5, 0, 6]][:, chosen], rtol=1e-4)
    assert found.train.sample.tolist() == [5, 0, 6] and found.query.sample.tolist() == chosen.tolist()
    assert found.beta == NBETA / N and not found.is_symmetric and found.chains == (0, 1, 2)
    array = np.asarray(points[:, :, [5, 0, 6]], np.float32), np.asarray(points[:, :, chosen], np.float32)
    plain = influence(*array, beta=NBETA / N)
    for name in ("value", "stderr", "train_means", "query_means"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    assert (found.ess, found.r_hat, found.between_share) == (plain.ess, plain.r_hat, plain.between_share)
    later = samples.influence("points", draws=slice(20, None, 2), kind="covariance")
    np.testing.assert_allclose(later.value, _covariance(points[:, 20::2], points[:, 20::2]), rtol=1e-4, atol=1e-6)
    assert later.num_draws == 30 and later.is_symmetric and later.beta is None


def test_the_loss_kernel() -> None:
    """With itself in either way of saying so, though not of other samples."""
    samples, losses = _store()
    kernel = samples.loss_kernel("points")
    expected = _covariance(losses["points"], losses["points"])
    scale = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(kernel.value, expected / np.outer(scale, scale), rtol=1e-4, atol=1e-6)
    assert kernel.is_symmetric and kernel.kind == "correlation" and (np.diag(kernel.stderr) == 0).all()
    same = samples.influence("points", ("points", slice(None)), kind="correlation")
    np.testing.assert_array_equal(same.value, kernel.value)
    assert same.is_symmetric
    assert not samples.influence("points", ("points", [1, 0, 2, 3, 4, 5, 6]), kind="correlation").is_symmetric


def test_tokens_that_do_not_count_are_left_out() -> None:
    """And a sample that has none."""
    samples, losses = _store()
    tokens = samples.influence("text", "points", kind="covariance", per=("token", "sample"))
    expected = _covariance(losses["text"][:, :, MASK], losses["points"])
    np.testing.assert_allclose(tokens.value, expected, rtol=1e-4, atol=1e-6)
    # Position t of the losses is that of token t + 1.
    assert tokens.train.token is not None
    assert [*zip(tokens.train.sample.tolist(), tokens.train.token.tolist(), strict=True)] == [
        (i, t + 1) for i, t in np.argwhere(MASK).tolist()
    ]
    by_sample = samples.influence("text", kind="covariance")
    assert by_sample.train.sample.tolist() == [0, 1, 3, 4]
    means = np.nansum(losses["text"], axis=3)[:, :, [0, 1, 3, 4]] / MASK.sum(axis=1).mean()
    np.testing.assert_allclose(by_sample.value, _covariance(means, means), rtol=1e-4, atol=1e-6)
    assert samples.influence(("text", [3, 1]), kind="covariance").train.sample.tolist() == [3, 1]


@pytest.mark.parametrize("combination", ["elements", "samples", "sums", None])
def test_influence_is_of_the_weight_in_the_loss(combination: str | None) -> None:
    """nβ·L = nβ/n·Σ_i w_i·x_i, whatever x_i are: tokens, samples or all of the probe.

    With L the mean over all tokens, over samples of means, or of sums. So influences of tokens add up to those of
    their samples, and these to that of the probe.
    """
    samples, losses = _store(combination=combination)
    per_sample, phi = MASK.sum(axis=1), losses["points"]
    weight = {"sums": np.ones(5), "samples": 1 / np.maximum(per_sample, 1)}.get(
        str(combination), np.full(5, 1 / per_sample.mean())
    )
    parts = losses["text"] * weight[:, None]
    expected = -NBETA / N * _covariance(parts[:, :, MASK], phi)
    tokens = samples.influence("text", "points", per=("token", "sample"))
    np.testing.assert_allclose(tokens.value, expected, rtol=1e-4, atol=1e-6)
    by_sample = samples.influence("text", "points")
    rows = np.argwhere(MASK)[:, 0]
    summed = np.stack([expected[rows == i].sum(axis=0) for i in (0, 1, 3, 4)])
    np.testing.assert_allclose(by_sample.value, summed, rtol=1e-4, atol=1e-6)
    whole = samples.influence("text", "points", per=("probe", "sample"))
    np.testing.assert_allclose(whole.value, summed.sum(axis=0, keepdims=True), rtol=1e-4, atol=1e-6)
    of_mean = samples.influence("text", "points", per=("token", "probe"))
    np.testing.assert_allclose(of_mean.value[:, 0], expected.mean(axis=1), rtol=1e-4, atol=1e-6)
    # What depends on no weight.
    covariance = samples.influence("text", per="token", kind="covariance")
    np.testing.assert_allclose(covariance.between(), tokens_between(losses), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(samples.influence("text", per="token").between(), tokens_between(losses), rtol=1e-4)


def tokens_between(losses: dict[str, Array]) -> Array:
    found: Array = np.cov(losses["text"][:, :, MASK].mean(axis=1).T)
    return found


# ---- chains that are not whole -------------------------------------------------------------------------------


def test_a_chain_that_diverged_is_left_out() -> None:
    samples, losses = _store(done=(DRAWS, 11, DRAWS))
    with pytest.warns(LLCWarning, match=r"The loss of chain 1 became non-finite: influence\(\) uses the other 2 of 3"):
        found = samples.influence("text", "points", kind="covariance", per=("token", "sample"))
    assert found.chains == (0, 2) and found.train_means.shape == (2, 8)
    kept = {name: values[[0, 2]] for name, values in losses.items()}
    np.testing.assert_allclose(found.value, _covariance(kept["text"][:, :, MASK], kept["points"]), rtol=1e-4, atol=1e-6)
    with pytest.warns(LLCWarning) as record:
        by_sample = samples.influence("text", kind="covariance")
    assert [getattr(w.message, "code", "") for w in record] == ["diverged"] and record[0].filename == __file__
    means = np.nansum(kept["text"], axis=3)[:, :, [0, 1, 3, 4]] / MASK.sum(axis=1).mean()
    np.testing.assert_allclose(by_sample.value, _covariance(means, means), rtol=1e-4, atol=1e-6)
    samples, _ = _store(done=(0, 1, 1))
    with pytest.raises(ValueError, match=r"influence\(\) needs a chain with 2 draws or more.*smaller lr"):
        samples.influence("points")


@pytest.mark.parametrize(
    ("done", "chains", "draws"), [((60, 70, 50), (0, 1, 2), 50), ((80, 75, 3), (0, 1), 75), ((60, 0, 0), (0,), 60)]
)
def test_an_interrupted_run(tmp_path: Path, done: tuple[int, ...], chains: tuple[int, ...], draws: int) -> None:
    """Cut to what leaves the most draws."""
    _store(tmp_path / "run.zarr", done=done, completed=False)
    losses = _store()[1]["points"][list(chains), :draws]
    with pytest.warns(
        LLCWarning, match=rf"have made {done[0]}, .* of 80 draws. influence\(\) uses the first {draws} of"
    ):
        found = Samples.open(tmp_path / "run.zarr").influence("points", kind="covariance")
    assert found.chains == chains and found.num_draws == draws
    np.testing.assert_allclose(found.value, _covariance(losses, losses), rtol=1e-4, atol=1e-6)


def test_too_few_draws_for_errors() -> None:
    samples, _ = _store()
    with pytest.warns(LLCWarning, match="There are 3 blocks .* standard errors of influence are not known") as record:
        found = samples.influence("points", block_length=70)
    assert record[0].message.code == "short" and np.isnan(found.stderr).all()  # type: ignore[union-attr]
    with pytest.warns(LLCWarning, match="standard errors of correlation") as kernel:
        samples.loss_kernel("points", block_length=70)
    assert record[0].filename == kernel[0].filename == __file__
    assert "standard errors are not known: 3 blocks of draws, 8 are needed" in found.summary()
    (warning,) = found.warnings
    assert (
        str(record[0].message) == f"{warning} [llc-fast explain short]" and f"  warning: {warning}" in found.summary()
    )


# ---- devinterp's stores --------------------------------------------------------------------------------------


def test_a_store_of_devinterp(tmp_path: Path) -> None:
    """The same correlations and covariances as its own compute_bif; β needs n, which its stores lack."""
    with zipfile.ZipFile(HERE / "data" / "devinterp2.zip") as archive:
        archive.extractall(tmp_path)
    expected = json.loads((HERE / "data" / "devinterp2.json").read_text())
    samples = Samples.open(tmp_path / "devinterp2.zarr")
    for kind in ("correlation", "covariance"):
        for name in samples.probes:
            found = samples.influence(name, kind=kind, centred="pooled", stderr=False)  # type: ignore[arg-type]
            np.testing.assert_allclose(found.value, expected[f"sequence {kind} {name}"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"n=None: this store does not say how many samples .* give n=…"):
        samples.influence("pile")
    found = samples.influence("pile", n=40, stderr=False)
    covariance = samples.influence("pile", kind="covariance", stderr=False)
    assert found.beta == 10 / 40
    np.testing.assert_allclose(found.value, -0.25 * covariance.value, rtol=1e-5)


# ---- files and pictures --------------------------------------------------------------------------------------


def test_out_is_a_store(tmp_path: Path) -> None:
    """The same numbers, which xarray reads, and one that fails leaves nothing."""
    samples, _ = _store()
    found = samples.influence("text", "points", per=("token", "sample"), out=tmp_path / "a.zarr")
    expected = samples.influence("text", "points", per=("token", "sample"))
    assert not isinstance(found.value, np.ndarray) and found.path == str(tmp_path / "a.zarr")
    with xarray.open_zarr(tmp_path / "a.zarr", consolidated=False) as opened:
        wanted = expected.to_xarray()
        assert opened.attrs["beta"] == NBETA / N / 1.6 and opened.attrs["kind"] == "influence"
        for name in ("value", "stderr", "train_sample", "train_token", "query_sample"):
            np.testing.assert_array_equal(opened[name].values, wanted[name].values)
            assert opened[name].dims == wanted[name].dims
    assert found.top(3) == expected.top(3) and (found.significant() == expected.significant()).all()
    with pytest.raises(ValueError, match=r"out='.*a.zarr' exists: give another path, or delete it"):
        samples.influence("points", out=tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="block_length=1000"):
        samples.influence("points", out=tmp_path / "b.zarr", block_length=1000)
    assert not (tmp_path / "b.zarr").exists()


def test_the_largest_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = _store()
    found = samples.influence("points", ("points", [2, 4, 6]))
    order = np.argsort(-np.abs(found.value), axis=None)[:5]
    rows, columns = np.unravel_index(order, found.value.shape)
    for size in (1 << 22, 6):
        monkeypatch.setattr("llc_fast.influence._ROWS", size)
        top = found.top(5)
        assert [(pair.row, pair.column) for pair in top] == [*zip(rows.tolist(), columns.tolist(), strict=True)]
        assert [pair.value for pair in top] == [found.value[i, j] for i, j in zip(rows, columns, strict=True)]
        assert top[0].train == f"points[{rows[0]}]" and top[0].query == f"points[{[2, 4, 6][columns[0]]}]"
        assert top[0].stderr == found.stderr[rows[0], columns[0]]
        pairs = samples.loss_kernel("points").top(100)
        assert len(pairs) == 21 and all(pair.row < pair.column for pair in pairs)
    assert samples.influence("points", stderr=False).top(1)[0].stderr is None
    assert len(found.top(100)) == 21
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        found.top(0)


def test_names_of_tokens() -> None:
    """With a function, and with the text of each token."""
    samples, _ = _store()
    found = samples.influence("text", "text", per=("token", "sample"), kind="covariance")
    letters = "abcdefghijklmnopqrst"
    assert found.train.name(3) == "text[1, 1]" and found.train.name(3, letters) == "text[1, 1] 'f'"
    assert found.query.name(2, lambda ids: "-".join(map(str, ids))) == "text[3] '12-13-14-15'"
    assert Items("a", "probe", np.arange(3)).name(0, letters) == "a"
    with pytest.raises(ValueError, match="decode has the text of 3 tokens, but there is a token 5"):
        found.train.name(3, "abc")


def test_pictures(tmp_path: Path) -> None:
    """Gray where nothing is significant; a color behind tokens, of those that have a loss."""
    samples, _ = _store()
    found = samples.influence("text", "points", per=("token", "probe"))
    text = found.html("abcdefghijklmnopqrst", top=4)
    # Sample 2 has no token that counts, and the first token of a sequence no loss.
    assert text.count('<div style="display:flex') == 4 and "text[2]" not in text
    assert (
        "influence of tokens of text on points" in text
        and '<span title="nan" style="border-radius:2px;">a</span>' in text
    )
    value = found.value[0, 0]
    assert f'<span title="{value:.4g}"' in text
    assert ">5 </span>" in found.html()
    with pytest.raises(
        ValueError, match=r"per of the rows is 'sample': html\(\) needs tokens, as per=\('token', 'prob"
    ):
        samples.influence("points").html()
    with pytest.raises(ValueError, match="query=1 is no column: there are 1"):
        found.html(query=1)
    pytest.importorskip("matplotlib")
    figure = samples.influence("text", "points").plot(tmp_path / "a.png", decode="abcdefghijklmnopqrst", title="what")
    axes = figure.axes[0]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["abcd", "efgh", "mnop", "qrst"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("samples of 'text'", "samples of 'points'")


def test_in_words() -> None:
    samples, _ = _store()
    lines = samples.influence("text", "points", per=("token", "sample")).summary().splitlines()
    assert lines[0] == "influence of 8 tokens of 'text' on 7 samples of 'points'"
    assert lines[1] == "  3 chains × 80 draws, β = 0.1562"
    assert lines[2].startswith("  significant: ") and " of 56 (false discovery rate 0.05)" in lines[2]
    kernel = samples.loss_kernel("points", stderr=False)
    assert kernel.summary().startswith(
        "correlation of 7 samples of 'points' with each other\n  3 chains × 80 draws\n  eff"
    )
    one = samples.influence("points", per="probe", kind="covariance")
    assert one.summary().startswith("covariance of the mean loss of 'points' and the mean loss of 'points'")
    assert one.top()[0].train == "points"


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (["tests"], {}, "train: probe must be one of 'text', 'points', got 'tests'"),
        (["points", "tests"], {}, "query: probe must be one of"),
        ([7], {}, "train must be the name of a probe, or .name, which samples., got 7"),
        ([("points", [7])], {}, "train: the probe has 7 samples, but 7 is asked for"),
        ([("points", [])], {}, "train: .* leaves no sample of 7"),
        ([("points", [True])], {}, r"train: a mask of samples must have shape \(7,\), got \(1,\)"),
        ([("points", [0.5])], {}, "train: samples must be numbers, a mask or a slice"),
        ([("text", [2])], {}, "train: no sample of 'text' has a loss"),
        (["points"], {"per": "token"}, "per='token': losses of 'points' are per sample"),
        (["points"], {"per": "word"}, "per must be 'sample', 'token' or 'probe', or a pair of them, got 'word'"),
        (["points"], {"kind": "cov"}, "kind must be one of 'influence', .* got 'cov'"),
        (["points"], {"n": 0}, "n must be the number of samples of the data, got 0"),
        (["points"], {"draws": 5}, "draws must be a slice"),
        (["points"], {"draws": slice(79, None)}, "leaves fewer than 2 draws of 80"),
    ],
)
def test_arguments(arguments: list[Any], options: dict[str, Any], error: str) -> None:
    samples, _ = _store()
    with pytest.raises((ValueError, TypeError), match=error):
        samples.influence(*arguments, **options)


def test_localization_alone() -> None:
    samples, _ = _store(nbeta=0.0)
    with pytest.raises(ValueError, match=r"kind='influence' at nβ = 0 is 0.*Use kind='covariance'"):
        samples.influence("points")
    assert np.isfinite(samples.influence("points", kind="covariance").value).all()


# ---- where chains went ---------------------------------------------------------------------------------------


def _sampled(**options: Any) -> Samples:
    """A posterior with one soft direction: 200 weights, of which the loss sees the first but little."""
    torch.manual_seed(0)
    model = nn.Linear(200, 1, bias=False)
    scale = torch.ones(200)
    scale[7] = 0.05
    x = torch.randn(2000, 200) * scale
    data = x, model(x).detach()
    settings = {"num_chains": 2, "num_draws": 300, "num_burnin": 50, "nbeta": 400.0, "localization": 20.0, "lr": 1e-3}
    return llc_fast.sample(model, data, F.mse_loss, batch_size=None, progress=False, **settings | options)


def test_the_soft_direction_is_found() -> None:
    """By the sketch of that weight alone; sketches are of w − w*, and w* is where its own is 0."""
    from llc_fast.stats.projection import CountSketch

    samples = _sampled(sketch=128, observables={"w": lambda draw: draw.params["weight"].clone()}, num_steps_bw_draws=8)
    w = samples.llc().observables["w"]
    sketch = CountSketch(128)
    moved = w[1, 3] - _reference()
    np.testing.assert_allclose(samples.dataset["sketch"].values[1, 3], sketch(moved), rtol=1e-4, atol=1e-5)
    found = samples.pca(4)
    unit = np.zeros(200)
    unit[7] = 1
    assert abs(found.components[0] @ sketch(unit)) > 0.95
    assert found.share[0] > 3 * found.share[1] and found.chains == (0, 1) and found.sketch_size == 128
    # From w* to a draw it is as far as its sketch says.
    at = samples.dataset["sketch"].values[0, 5].astype(float)
    np.testing.assert_allclose(found.coordinates[0, 5] - found.reference, found.components @ at, atol=1e-6)
    along = (w - _reference())[..., 0, 7]
    assert abs(np.corrcoef(found.coordinates[..., 0].ravel(), along.ravel())[0, 1]) > 0.9
    assert samples.pca(2, draws=slice(100, None)).coordinates.shape == (2, 200, 2)
    pytest.importorskip("matplotlib")
    assert len(found.plot().axes) == 2


def _reference() -> Array:
    torch.manual_seed(0)
    return nn.Linear(200, 1, bias=False).weight.detach().numpy().astype(float)


def test_sketches_in_a_store(tmp_path: Path) -> None:
    """They name the run, and probes are not needed."""
    short = {"num_draws": 12, "num_burnin": 4, "store": tmp_path / "run.zarr"}
    kept = _sampled(sketch=16, **short).dataset["sketch"].values
    assert kept.shape == (2, 12, 16) and np.isfinite(kept).all()
    np.testing.assert_array_equal(Samples.open(tmp_path / "run.zarr").dataset["sketch"].values, kept)
    with pytest.raises(ValueError, match="belongs to another run: sketch was 16, is 8"):
        _sampled(sketch=8, **short)
    with pytest.raises(ValueError, match=r"pca\(\) needs sketches .* sample with sketch=512"):
        _store()[0].pca()
    with pytest.raises(ValueError, match=r"sketch must be a number of dimensions, 2 at least .* got 1"):
        _sampled(sketch=1)
