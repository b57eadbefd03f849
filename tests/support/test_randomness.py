"""Generators are found wherever model, loss and data hold them, follow the seed, and are left as they were."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

from llc_fast.support.randomness import Generators, decode, encode, same_states

CPU = torch.device("cpu")
_GLOBAL = np.random.default_rng(7)


def draw_everywhere() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def test_global_generators_are_seen_seeded_and_restored() -> None:
    generators = Generators(CPU)
    assert generators.held == []
    before = generators.states()
    assert same_states(before, generators.states())
    first = draw_everywhere()
    generators.seed(3)
    seeded = draw_everywhere()
    generators.seed(3)
    assert draw_everywhere() == seeded
    generators.restore(before)
    assert draw_everywhere() == first


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand])
def test_a_single_number_shows(draw: object) -> None:
    generators = Generators(CPU)
    before = generators.states()
    draw()  # type: ignore[operator]
    assert not same_states(before, generators.states())
    generators.restore(before)
    assert same_states(before, generators.states())


class _Slotted:
    __slots__ = ("dice",)

    def __init__(self) -> None:
        self.dice = random.Random(1)


def _uses_global(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean() + _GLOBAL.normal()


def _holders() -> dict[str, tuple[object, object]]:
    """An object that holds a generator, and the generator."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].dice = mine = random.Random(0)  # type: ignore[assignment]
    rng, legacy, mine_too = np.random.default_rng(0), np.random.RandomState(0), torch.Generator()
    loss = functools.partial(lambda output, target, noise: output, noise=rng)
    dataset = TensorDataset(torch.zeros(4, 1))
    dataset.transforms = [legacy]  # type: ignore[attr-defined]
    plain, slotted = TensorDataset(torch.zeros(4, 1)), _Slotted()
    return {
        "module attribute": (model, mine),
        "partial": (loss, rng),
        "closure": (lambda output, target: rng.normal(), rng),
        "global of the function": (_uses_global, _GLOBAL),
        "data set inside a subset": (DataLoader(Subset(dataset, [0, 1])), legacy),
        "loader's sampler": (DataLoader(plain, sampler=RandomSampler(plain, generator=mine_too)), mine_too),
        "loader": (DataLoader(plain, shuffle=True, generator=mine_too), mine_too),
        "slots": (slotted, slotted.dice),
        "bit generator": ([rng.bit_generator], rng.bit_generator),
    }


@pytest.mark.parametrize("name", list(_holders()))
def test_held_generators_are_found_seeded_and_restored(name: str) -> None:
    holder, generator = _holders()[name]
    generators = Generators(CPU, [holder])
    assert [id(g) for g in generators.held] == [id(generator)]
    before = generators.states()
    generators.seed(1)
    seeded = generators.states()
    assert not same_states(before, seeded)
    generators.seed(1)
    assert same_states(seeded, generators.states())
    with generators.kept():
        generators.seed(2)
    assert same_states(seeded, generators.states())
    generators.restore(decode(encode(before)))
    assert same_states(before, generators.states())


def test_the_search_ends_on_circles_and_large_containers() -> None:
    circle: list[object] = []
    circle.append(circle)
    assert Generators(CPU, [circle, [random.Random(k) for k in range(5000)]]).held == []


@pytest.mark.parametrize("normals", range(4))
@pytest.mark.parametrize("between", ["nothing", "uniform", "normal", "seed", "other generator"])
def test_numpys_state_is_that_which_numpy_tells(normals: int, between: str) -> None:
    """Copied or asked for, with a normal number that waits for its turn or without: the same numbers follow."""
    before, generators = np.random.get_state(legacy=False), Generators(CPU)
    own = np.random.get_bit_generator()
    try:
        np.random.seed(normals)
        np.random.randn(normals)
        told, seen = np.random.get_state(legacy=False), generators.states()
        assert same_states(seen[2], told)
        follow = [np.random.randn(3), np.random.rand(2)]
        np.random.set_state(told)
        for _ in range(3):  # the same memory again, and states that were seen before
            kept = generators.states()
            assert same_states(kept[2], told)
            if between == "uniform":
                np.random.rand(1000)
            elif between == "normal":
                np.random.randn(3)
            elif between == "seed":
                generators.seed(5)
                generators.states()
            elif between == "other generator":
                np.random.set_bit_generator(np.random.MT19937(3))
            generators.restore(kept)
            if between != "other generator":
                assert same_states(np.random.get_state(legacy=False), told)
            again = [np.random.randn(3), np.random.rand(2)]
            assert all(np.array_equal(a, b) for a, b in zip(again, follow, strict=True))
            generators.restore(kept)
    finally:
        np.random.set_bit_generator(own)
        np.random.set_state(before)


def test_states_that_were_written_down_are_restored() -> None:
    """A decoded state is another object than any that was seen."""
    generators = Generators(CPU)
    before = generators.states()
    first = draw_everywhere()
    generators.restore(decode(encode(before)))
    assert draw_everywhere() == first
    generators.restore(before)
    assert draw_everywhere() == first
    generators.restore(before)


def test_what_is_kept_inside_ends_with_what_is_around_it() -> None:
    """A generator function that was left suspended inside of a run ends after it: nothing is put back then."""
    generators = Generators(torch.device("cpu"))

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with generators.kept():
            yield

    before = generators.states()
    with generators.kept():
        generators.seed(1)
        left, ended = inside(), inside()
        left.__enter__()
        generators.seed(2)
        with ended:
            generators.seed(3)
        seeded = generators.states()
    assert not same_states(seeded, before)
    del left  # GeneratorExit
    assert same_states(generators.states(), before)


def test_threads_keep_their_own() -> None:
    """One that ends does not end another one's."""
    generators = Generators(torch.device("cpu"))
    with generators.kept():
        entered, done = threading.Event(), threading.Event()

        def work() -> None:
            with generators.kept():
                entered.set()
                done.wait(10)

        with generators.kept():
            thread = threading.Thread(target=work)
            thread.start()
            assert entered.wait(10)
            outside = generators.states()
        generators.seed(5)
        done.set()
        thread.join()
        assert same_states(generators.states(), outside)
