"""Activations below the sampled parameters: the same losses with and without, and nothing is left on the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from language_models import VOCABULARY, gpt2, gpt_neox
from torch import Tensor, nn
from torch.nn import functional as F

import llc_fast
from llc_fast import Samples, sampling
from llc_fast.objective.prefix import PrefixCache

pytest.importorskip("zarr")
pytest.importorskip("xarray")
pytestmark = pytest.mark.filterwarnings("ignore::llc_fast.LLCWarning")
OPTIONS: dict[str, Any] = {
    **{"num_chains": 2, "num_draws": 4, "num_burnin": 1, "lr": 1e-3, "nbeta": 10.0, "localization": 1.0},
    **{"batch_size": 4, "progress": False},
}


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PrefixCache]]:
    """Those of all runs of a test."""
    found: list[PrefixCache] = []
    look = sampling._Recorder.look

    def seen(self: Any, prepared: Any) -> None:
        look(self, prepared)
        if self.cache is not None:
            found.append(self.cache)

    monkeypatch.setattr(sampling._Recorder, "look", seen)
    yield found


def tokens(count: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(1))


def both(model: nn.Module, data: Any, loss_fn: Any, params: Any, **options: Any) -> tuple[Samples, Samples]:
    """With kept activations, and without."""
    given = OPTIONS | {"probes": {"probe": data}, "params": params} | options
    cached = llc_fast.sample(model, data, loss_fn, **given)
    return cached, llc_fast.sample(model, data, loss_fn, **given, cache_bytes=0)


def assert_equal(found: tuple[Samples, Samples], name: str = "probe") -> None:
    cached, plain = (each.losses(name).values for each in found)
    assert np.ptp(plain, axis=1).max() > 1e-3, "nothing moved"
    np.testing.assert_allclose(cached, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [gpt_neox, gpt2], ids=["gpt-neox", "gpt2"])
@pytest.mark.parametrize("component", ["l1 mlp", "l1 h1", "l0 mlp"])
def test_language_models(make: Callable[[], nn.Module], component: str, caches: list[PrefixCache]) -> None:
    model = make().eval()
    assert_equal(both(model, tokens(), "next-token", component, per="token"))
    assert len(caches) == 1 and caches[0].num_bytes > 0 and not caches[0].reason
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_first_layers_do_not_run(caches: list[PrefixCache]) -> None:
    """For a component in the last of four blocks, three and the embedding run as often as probes are looked at once."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), *(Block() for _ in range(4)), nn.Linear(6, 1))
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    batches: dict[str, list[int]] = {"first": [], "last": []}

    def counted(which: str, given: Tensor) -> Tensor:
        batches[which].append(len(given))
        return given

    functional = F.linear

    class Counting(nn.Linear):
        which = ""

        def forward(self, x: Tensor) -> Tensor:
            return functional(counted(self.which, x), self.weight, self.bias)

    for place, which in ((1, "first"), (4, "last")):
        linear = Counting(6, 6)
        linear.which = which
        model[place].linear = linear
    options = {"num_chains": 1, "num_draws": 50, "num_burnin": 0, "strategy": "sequential"}
    given = OPTIONS | options | {"probes": {"a": (x[:5], y[:5])}, "params": "4.*"}
    given["execution"] = llc_fast.Execution(strategy=given.pop("strategy"))
    llc_fast.sample(model, (x, y), F.mse_loss, **given)
    (cache,) = caches
    # One tensor of 5 × 6 floats: what the fourth block is given.
    assert cache.num_bytes == 5 * 6 * 4
    of_probe = {which: sum(size == 5 for size in sizes) for which, sizes in batches.items()}
    # At each draw; the first, which is evaluated both ways, has the first block once.
    assert of_probe["last"] - of_probe["first"] == 50


def test_as_much_as_fits(caches: list[PrefixCache]) -> None:
    """Batches beyond the limit are evaluated as a whole."""
    model = gpt_neox().eval()
    most = both(model, tokens(40), "next-token", "l1 mlp", per="token")
    all_of_it = caches[0].num_bytes
    given = OPTIONS | {"probes": {"probe": tokens(40)}, "params": "l1 mlp", "per": "token"}
    some = llc_fast.sample(model, tokens(40), "next-token", cache_bytes=all_of_it // 2, **given)
    assert 0 < caches[1].num_bytes <= all_of_it // 2
    assert_equal((some, most[1]))


class InPlace(nn.Module):
    """It writes to what a module returned, and calls one module before and after the sampled one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.shared = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.shared(self.first(x))
        hidden.add_(1.0)
        return self.last(torch.tanh(self.shared(self.second(hidden))))


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 3, generator=generator), torch.randn(12, 1, generator=generator)


def test_writes_in_place(caches: list[PrefixCache]) -> None:
    assert_equal(both(InPlace(), regression(), F.mse_loss, "second.*"))
    assert caches[0].num_bytes and not caches[0].reason


class Opaque(nn.Module):
    """What its first layer returns is no tensor."""

    class Held:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class First(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Opaque.Held(super().forward(x))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = self.First(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x).value))


def test_falls_back(caches: list[PrefixCache]) -> None:
    """It says so once, and losses are right."""
    model, data = Opaque(), regression()
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        found = both(model, data, F.mse_loss, "last.*")
    assert_equal(found)
    (said,) = [w.message for w in issued if getattr(w.message, "code", "") == "uncached"]
    assert "could not be kept" in str(said) and "cache_bytes=0" in str(said)
    assert caches[0].reason and not caches[0]


def test_other_losses_are_noticed(caches: list[PrefixCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """By their numbers, at the first draw of a chain."""
    evaluate = PrefixCache.evaluate
    monkeypatch.setattr(PrefixCache, "evaluate", lambda self, *given: evaluate(self, *given) * 1.001)
    found = both(InPlace(), regression(), F.mse_loss, "second.*", num_draws=1, num_chains=1)
    cached, plain = (each.losses("probe").values for each in found)
    np.testing.assert_array_equal(cached, plain)
    assert "losses of chain 0 differ by 0.001" in caches[0].reason


@pytest.mark.parametrize(
    ("params", "reason"),
    [(None, "all parameters are sampled"), ("first.*", ""), ("shared.*", "")],
)
def test_nothing_to_keep(params: Any, reason: str, caches: list[PrefixCache]) -> None:
    assert_equal(both(InPlace(), regression(), F.mse_loss, params))
    # Below the shared layer there is only the first one.
    assert caches[0].reason == reason and (caches[0].num_bytes > 0) is (params == "shared.*")


def test_models_that_draw_are_left_alone(caches: list[PrefixCache]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 1))
    found = both(model, regression(), F.mse_loss, "2.*")
    np.testing.assert_array_equal(found[0].losses("probe").values, found[1].losses("probe").values)
    assert "random" in caches[0].reason


def test_the_users_forward_is_put_back(caches: list[PrefixCache]) -> None:
    model = InPlace()
    own = model.first.forward
    model.first.forward = lambda x: own(x) * 2  # type: ignore[method-assign]
    mine = model.first.forward
    assert_equal(both(model, regression(), F.mse_loss, "second.*"))
    assert caches[0].num_bytes and model.first.forward is mine
    assert [name for name, m in model.named_modules() if "forward" in vars(m)] == ["first"]
