"""Recorded kernels that the native module runs: the bits of Python's replay, its errors, and nothing left behind."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llc_fast.gradients import program
from llc_fast.gradients.program import Kernel, Program, why_not_native
from llc_fast.gradients.replay import Recording
from llc_fast.support import torch_private
from llc_fast.support.torch_private import REPLAY_FUNCTIONS, symbol_addresses, unboxed_address

pytestmark = pytest.mark.usefixtures("seeded")
_aten = torch.ops.aten

needs_dispatcher = pytest.mark.skipif(
    not symbol_addresses(REPLAY_FUNCTIONS)["call_dispatcher"], reason="this torch's dispatcher has no stable interface"
)


@pytest.fixture
def only() -> Iterator[Callable[..., None]]:
    """Let torch have these functions alone."""
    with pytest.MonkeyPatch.context() as patch:

        def have(*names: str) -> None:
            found = symbol_addresses(REPLAY_FUNCTIONS)
            kept = {name: address if name in names else 0 for name, address in found.items()}
            patch.setattr(program, "_functions", lambda: kept)
            why_not_native.cache_clear()

        yield have
    why_not_native.cache_clear()


def _network() -> tuple[Callable[[], Any], list[Tensor]]:
    """A gradient with kernels of many kinds, and its inputs."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y, params = torch.randn(8, 5), torch.randint(0, 3, (8,)), list(model.parameters())

    def function() -> list[Tensor]:
        out = torch.cat([model(x), 0.5 * model(x)])
        loss = F.cross_entropy(out, y.repeat(2)) + 0.1 * out.square().sum(0).mean()
        return [loss, *torch.autograd.grad(loss, params)]

    return function, [*params, x]


def _bytes(t: Tensor) -> bytes:
    return t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _moved(inputs: list[Tensor]) -> None:
    with torch.no_grad():
        for t in inputs:
            t.normal_()


def _both(recording: Recording[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the native module and Python make of the same memory."""
    recording.replay()
    native = [t.detach().clone() for t in recording.result]
    with torch.no_grad():
        for call in recording.calls:
            call()
    return native, [t.detach().clone() for t in recording.result]


@needs_dispatcher
def test_this_torch_is_supported() -> None:
    assert why_not_native() == ""


@needs_dispatcher
def test_all_kernels_of_a_network_are_native() -> None:
    function, inputs = _network()
    recording = Recording(function)
    assert recording.program.by_python == {} and recording.program.described == ""
    for _ in range(3):
        _moved(inputs)
        native, python = _both(recording)
        assert all(map(torch.equal, native, python))
        for ours, fresh in zip(native, function(), strict=True):
            torch.testing.assert_close(ours, fresh.detach())


_ALL = tuple(REPLAY_FUNCTIONS)
_BASE = ("grad_mode_is_enabled", "grad_mode_set_enabled", "delete_tensor")


@pytest.mark.parametrize(
    ("names", "some_native", "reason"),
    [
        ((), False, "this torch has no"),
        (_BASE[1:], False, "aoti_torch_grad_mode_is_enabled"),
        (_BASE, True, "no stable interface to its dispatcher"),
        ((*_BASE, "item"), True, "no stable interface to its dispatcher"),
        (tuple(name for name in _ALL if name != "item"), True, "an argument of the type number"),
        (tuple(name for name in _ALL if name not in ("new_list", "push_back")), True, "List"),
        (tuple(name for name in _ALL if name != "new_optional"), True, ""),
    ],
    ids=["none", "no modes", "no dispatcher", "no dispatcher but numbers", "no numbers", "no lists", "no optionals"],
)
def test_what_torch_lacks_is_left_to_python(
    only: Callable[..., None], names: tuple[str, ...], some_native: bool, reason: str
) -> None:
    """Older versions have some of the functions: the result is the same, and it is said why."""
    if "call_dispatcher" in names and not symbol_addresses(REPLAY_FUNCTIONS)["call_dispatcher"]:
        pytest.skip("this torch has none")
    only(*names)
    function, inputs = _network()
    recording = Recording(function)
    native, described = recording.program, recording.program.described
    assert (sum(native.by_python.values()) < recording.num_kernels) is some_native
    assert reason in described and bool(described) is bool(native.by_python)
    if reason:
        assert f"of {recording.num_kernels} kernels" in described
    _moved(inputs)
    ours, python = _both(recording)
    assert all(map(torch.equal, ours, python))


def test_another_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the right name that does something else: what it computes is compared before it is used."""
    other = _aten.sub.out
    real = torch_private.unboxed_address

    def wrong(schema: Any) -> int:
        return real(other._schema if schema.name == "aten::add" else schema)

    monkeypatch.setattr(program, "unboxed_address", wrong)
    why_not_native.cache_clear()
    try:
        assert "gave other values" in why_not_native()
        x = torch.randn(3)
        recording = Recording(lambda: [x + 2 * x])
        assert "gave other values" in recording.program.described
        _moved([x])
        recording.replay()
        torch.testing.assert_close(recording.result[0], 3 * x)
    finally:
        monkeypatch.undo()
        why_not_native.cache_clear()


def test_gpu_kernels_are_left_to_python() -> None:
    """Captured in a graph, Python's time does not count."""
    ran: list[int] = []
    described = Program([Kernel(lambda: ran.append(0))], "they are a GPU's")
    described.run()
    assert ran == [0] and described.described == "Python replays 1 of 1 kernels: they are a GPU's"


# --- Names of functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("relu_.default", "_ZN2at4_ops5relu_4callERNS_6TensorE"),
        ("mm.out", "_ZN2at4_ops6mm_out4callERKNS_6TensorES4_RS2_"),
        ("add.out", "_ZN2at4_ops7add_out4callERKNS_6TensorES4_RKN3c106ScalarERS2_"),
        ("add_.Tensor", "_ZN2at4_ops11add__Tensor4callERNS_6TensorERKS2_RKN3c106ScalarE"),
        ("addmm.out", "_ZN2at4_ops9addmm_out4callERKNS_6TensorES4_S4_RKN3c106ScalarES8_RS2_"),
        ("gelu_.default", "_ZN2at4_ops5gelu_4callERNS_6TensorESt17basic_string_viewIcSt11char_traitsIcEE"),
        (
            "gelu_backward.grad_input",
            "_ZN2at4_ops24gelu_backward_grad_input4callERKNS_6TensorES4_St17basic_string_viewIcSt11char_traitsIcEERS2_",
        ),
        ("mul.Scalar_out", "_ZN2at4_ops14mul_Scalar_out4callERKNS_6TensorERKN3c106ScalarERS2_"),
    ],
)
def test_names_in_torchs_libraries(op: str, name: str) -> None:
    """As `nm -D libtorch_cpu.so` lists them."""
    packet, _, overload = op.partition(".")
    schema = getattr(getattr(_aten, packet), overload)._schema
    assert unboxed_address(schema) == torch_private._address(name) > 0


def test_functions_that_are_not_there() -> None:
    assert torch_private._address("_ZN2at4_ops9no_such_op4callERKNS_6TensorE") == 0
    assert unboxed_address(_aten.sum.IntList_out._schema) == 0  # not of tensors and numbers alone


# --- Numbers ------------------------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "float": lambda x: x * 0.3 + 1e-3,
    "int": lambda x: (x + 2) * 3 - (x.long() + 2**40),
    "bool": lambda x: x * True,
    "negative int": lambda x: torch.full_like(x.long(), -5) + x.long() * -7,
    "alpha": lambda x: (torch.add(x, x, alpha=0.1), torch.sub(x, x[0], alpha=3)),
    # Sums of whole numbers, which are exact in any order: torch's libraries have orders of their own.
    "beta": lambda x: torch.addmm(x, x.round() @ x.round().T, x.round(), beta=0.25, alpha=-1.5),
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "power": lambda x: (x.abs() ** 0.3, 2.0**x, x**3),
    "without dimensions": lambda x: (x.sum() * 0.1, x.sum().double() + 1, x.long().sum() / 3, x.long().sum() + 1),
    "of integers": lambda x: (x.long() * 0.1, x.int() + 1, (x > 0) + 2, (x > 0) * 0.5),
    "zeros with signs": lambda x: (x * 0.0, x * -0.0, x.masked_fill(x > 0, 0.0), x.masked_fill(x > 0, -0.0)),
    "infinite": lambda x: x.masked_fill(x > 0, float("-inf")),
    "not a number": lambda x: torch.where(x > 0, x, float("nan")),
    "large": lambda x: x.double() * 1e300 + 2**62,
    "low precision": lambda x: (x.bfloat16() * 0.1, x.half() / 3, x.half().sum() * 0.1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_keep_bits_and_types(name: str) -> None:
    """As arguments, and in the stead of tensors, where they count less than a tensor in the choice of a type."""
    x = torch.randn(4, 4) * 3

    def function() -> list[Tensor]:
        made = NUMBERS[name](x)
        return list(made) if isinstance(made, tuple) else [made]

    recording = Recording(function)
    for _ in range(3):
        x.normal_().mul_(3)
        native, python = _both(recording)
        for ours, theirs, fresh in zip(native, python, function(), strict=True):
            assert ours.dtype == theirs.dtype == fresh.dtype
            for found in (ours, theirs):
                assert _bytes(found) == _bytes(fresh)


# --- Errors -------------------------------------------------------------------------------------------------


def test_errors_are_those_of_python_and_leave_things_as_they_were() -> None:
    """An index that is out of range in the middle: torch's own IndexError, and the next replay is right."""
    table, index = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 3, 1])
    recording = Recording(lambda: [(table * 2).index_select(0, index).exp() + 1])
    index[1] = 9
    with pytest.raises(IndexError, match="index out of range"):
        recording.replay()
    assert torch.is_grad_enabled()
    index[1] = 2
    recording.replay()
    torch.testing.assert_close(recording.result[0].detach(), (table[index] * 2).exp().detach() + 1)


def test_a_kernel_that_fails_once_is_run_again() -> None:
    """Whatever stopped the native module, Python goes on from there."""
    a, b, total, product = torch.randn(3), torch.randn(3), torch.empty(3), torch.empty(3)
    wrong = torch.randn(4)
    kernels = [
        Kernel(lambda: None, _aten.add.out, (a, b), {"out": total}),
        Kernel(lambda: total.mul_(2), _aten.add.out, (a, wrong), {"out": total}),  # sizes that do not fit
        Kernel(lambda: None, _aten.mul.out, (total, b), {"out": product}),
    ]
    Program(kernels).run()
    torch.testing.assert_close(product, 2 * (a + b) * b)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_mode_of_gradients_is_left(enabled: bool) -> None:
    function, _ = _network()
    recording = Recording(function)
    with torch.set_grad_enabled(enabled):
        recording.replay()
        assert torch.is_grad_enabled() is enabled


def test_autocast_around_a_replay_is_that_around_pythons() -> None:
    function, inputs = _network()
    recording = Recording(function)
    _moved(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native, python = _both(recording)
    assert all(map(torch.equal, native, python))


# --- Memory -------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """Not a reference of a thousand replays, one of which fails, is left: the memory goes with its recording."""
    array, index = np.ones((6, 4), dtype=np.float32), torch.tensor([0, 1, 3, 2, 0, 1])
    gone = weakref.ref(array)

    def recorded(x: Tensor) -> Recording[Any]:
        def function() -> list[Tensor]:
            kept = torch.cat([x, x[index] * 2])
            picked = kept.index_select(0, index)
            return [kept.sum(1), F.layer_norm(x, (4,)), picked, F.nll_loss(x.log_softmax(1), index)]

        return Recording(function)

    recording = recorded(torch.from_numpy(array))
    for _ in range(1000):
        recording.replay()
    index[0] = 77
    with pytest.raises(IndexError):
        recording.replay()
    del array
    gc.collect()
    assert gone() is not None
    del recording
    gc.collect()
    assert gone() is None


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counted by glibc's malloc")
def test_no_memory_is_left_by_any_kind_of_argument() -> None:
    """Lists, what may be missing, text, numbers, results that are copied: what a call makes is freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    x, index = torch.randn(6, 4), torch.tensor([0, 1, 3, 2, 0, 1])
    recording = Recording(
        lambda: [
            torch.cat([x, x[index] * 2]).sum(1),
            F.layer_norm(x, (4,), x[0], x[1]),
            F.nll_loss(x.log_softmax(1), index),
            F.gelu(x, approximate="tanh"),
            x.t().contiguous(),
            (x * 0.5).long(),
            x[:, index[:2]].clamp(0.1, 0.5),
            F.conv1d(x[None], x.t()[:, :, None], x[0]),
        ]
    )
    assert sum(recording.program.by_python.values()) <= 1  # of Python's own replay nothing is said
    counts = []
    for _ in range(3):
        for _ in range(500):
            recording.replay()
        counts.append(mallinfo2().used)
    assert counts[2] - counts[1] < 500 * 8


def test_memory_that_moves_is_followed() -> None:
    """As by Python: the tensors are the recorded ones, wherever they are."""
    x = torch.randn(5)
    recording = Recording(lambda: [x * 3])
    recording.replay()
    before = x.data_ptr()
    x.share_memory_()
    assert x.data_ptr() != before
    x.normal_()
    recording.replay()
    torch.testing.assert_close(recording.result[0], 3 * x)


# --- Threads ------------------------------------------------------------------------------------------------


def test_chains_in_two_threads_have_the_bits_of_one() -> None:
    recordings = []
    for _ in range(2):
        function, inputs = _network()
        recordings.append((Recording(function), inputs))
    alone = []
    for recording, _ in recordings:
        recording.replay()
        alone.append([t.detach().clone() for t in recording.result])
    failed: list[str] = []

    def work(k: int) -> None:
        recording, _ = recordings[k]
        for _ in range(300):
            recording.replay()
            if not all(map(torch.equal, (t.detach() for t in recording.result), alone[k])):
                failed.append(f"thread {k}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


def test_kernels_that_are_written_in_python() -> None:
    """They take the interpreter's lock, which the replay does not hold; their errors are their own."""
    library = torch.library.Library("llc_fast_test_program", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    seen: list[int] = []

    def twice(x: Tensor) -> Tensor:
        seen.append(threading.get_ident())
        if x[0] == 7:
            raise ValueError("seven")
        return x + x

    library.impl("twice", twice, "CPU")
    x = torch.randn(3)
    recording = Recording(lambda: [torch.ops.llc_fast_test_program.twice(x).exp()])
    x.fill_(0.5)
    recording.replay()
    torch.testing.assert_close(recording.result[0], torch.ones(3).exp())
    assert len(seen) == 2 and set(seen) == {threading.get_ident()}
    x.fill_(7)
    with pytest.raises(ValueError, match="seven"):
        recording.replay()
