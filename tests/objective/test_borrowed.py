"""What is the user's stays as it was, whatever a run does and however it ends."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import signal
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import llc_fast
from llc_fast.chains.run import StepTaken, after_each_step
from llc_fast.estimate import Surroundings
from llc_fast.gradients import replay
from llc_fast.objective.borrowed import ModelSnapshot
from llc_fast.objective.flops import FlopCounter

mse = nn.functional.mse_loss


class Counting(nn.Module):
    """Writes to everything that it can: buffers, attributes, containers, its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.spectral_norm(nn.Linear(3, 4))
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.calls, self.seen, self.cache = 0, list[Any](), dict[str, Tensor]()
        self.scratch = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(self.inner(x)).tanh()
        self.seen.append(h)
        self.cache["h"] = h
        with torch.no_grad():
            self.scratch.add_(1)
        self.last = h
        return self.out(h)


class Clipping(nn.Linear):
    """Max-norm in forward, in place."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Replacing(nn.Linear):
    """Max-norm in forward, by other data."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)
        return super().forward(x)


def _norm(kind: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(nn.Linear(3, 4), **options), nn.Tanh(), nn.Linear(4, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": runs.mlp,
    "dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)),
    "counting": Counting,
    "clipping": lambda: nn.Sequential(Clipping(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    "replacing": lambda: nn.Sequential(Replacing(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    "max_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), _Lookup()),
    "weight_norm": _norm(nn.utils.weight_norm),
    "parametrized": _norm(nn.utils.parametrizations.weight_norm),
    "spectral, parametrized": _norm(nn.utils.parametrizations.spectral_norm),
    "orthogonal": lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 1)),
    "scripted": lambda: torch.jit.script(runs.mlp()),
}


class _Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0] > 0).long())


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a user could see of a model and its process, by identity where that counts."""
    found: dict[str, Any] = {
        "generators": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "handler": signal.getsignal(signal.SIGINT),
        "threads": torch.get_num_threads(),
        "modes": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    }
    for path, m in model.named_modules():
        attributes = dict(vars(m))
        found[f"{path} attributes"] = {k: id(v) for k, v in attributes.items()}
        found[f"{path} numbers"] = {k: v for k, v in attributes.items() if isinstance(v, (int, float, bool, str))}
        found[f"{path} contents"] = {
            k: [(i, id(e)) for i, e in enumerate(v.values() if isinstance(v, dict) else v)]
            for k, v in attributes.items()
            if isinstance(v, (dict, list))
        }
        found[f"{path} tensors"] = {k: v.detach().tolist() for k, v in attributes.items() if isinstance(v, Tensor)}
        for name, t in (*m._parameters.items(), *m._buffers.items()):
            if t is not None:
                grad = None if not t.is_leaf or t.grad is None else (id(t.grad), t.grad.tolist())
                here = id(t) if not isinstance(m, torch.jit.ScriptModule) else None
                found[f"{path}.{name}"] = (here, t.data_ptr(), t.detach().tolist(), t.requires_grad, grad)
    return found


def _prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    with torch.no_grad():
        model(runs.data()[0])
    return model


def _assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] == value, key


@pytest.mark.parametrize(
    "options", [{}, {"lr": None}, {"strategy": "sequential"}, {"release_gradients": True}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_as_before(name: str, options: dict[str, Any]) -> None:
    model = _prepared(name)
    before = _state(model)
    runs.estimate(model=model, num_draws=20, **options)
    _assert_as_before(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_everything_is_as_before_an_exception(name: str) -> None:
    """Raised at the k-th call of the loss, for k up to the end of the run."""
    model = _prepared(name)
    before = _state(model)
    for last in (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 45, 60, 90):
        calls = iter(range(last))

        def loss_fn(out: Tensor, y: Tensor, calls: Iterator[int] = calls) -> Tensor:
            if next(calls, None) is None:
                raise ZeroDivisionError
            return mse(out, y)

        with contextlib.suppress(ZeroDivisionError, ValueError):
            runs.estimate(model=model, loss_fn=loss_fn, strategy="sequential")
        _assert_as_before(model, before)


@pytest.mark.parametrize("name", ["mlp", "dropout", "parametrized", "spectral, parametrized", "clipping"])
def test_a_model_can_be_copied_and_saved_afterwards(name: str) -> None:
    model = _prepared(name)
    runs.estimate(model=model)
    copy.deepcopy(model)
    if "param" not in name:  # torch does not pickle parametrized modules
        torch.save(model, io.BytesIO())
    model.zero_grad()
    mse(model(runs.data()[0]), runs.data()[1]).backward()


def test_gradients_of_others_stay() -> None:
    """Of a teacher that the loss holds, and of the model's own parameters if it holds a list of them."""
    teacher, model = nn.Linear(1, 1), runs.mlp()
    own = list(model.parameters())

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return mse(out, teacher(y)) + 1e-3 * sum(p.square().sum() for p in own)

    runs.estimate(model=model, loss_fn=loss_fn)
    assert all(p.grad is None for p in (*teacher.parameters(), *own))


@pytest.mark.parametrize("held", ["closure", "default", "bound"])
def test_a_teacher_stays_as_it_was(held: str) -> None:
    """In training mode it writes its own buffers, and gradients that reach it through recomputed activations."""

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(1, 4), nn.BatchNorm1d(4)

        def forward(self, y: Tensor) -> Tensor:
            h = checkpoint(self.a, y.detach().requires_grad_(), use_reentrant=True)
            return self.norm(h).mean(1, keepdim=True)

        def loss(self, out: Tensor, y: Tensor) -> Tensor:
            return mse(out, y + 0.1 * self(y))

    teacher, model = Teacher(), runs.mlp()
    before = _state(teacher)
    losses: dict[str, Any] = {
        "closure": lambda out, y: teacher.loss(out, y),
        "default": lambda out, y, t=teacher: t.loss(out, y),
        "bound": teacher.loss,
    }
    runs.estimate(model=model, loss_fn=losses[held], num_draws=20)
    _assert_as_before(teacher, before)


def test_the_loss_sees_the_chain_in_a_list_of_parameters() -> None:
    """A penalty over parameters that the loss keeps is that of the chain: λ̂ has a closed form without data."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    own = list(model.parameters())
    x, y = torch.zeros(400, 3), torch.zeros(400, 1)
    result = llc_fast.estimate_llc(
        model,
        (x, y),
        lambda out, y: mse(out, y) + 0.5 * sum(p.square().sum() for p in own),
        nbeta=100.0,
        num_draws=3000,
        num_burnin=500,
        localization=0.0,
        progress=False,
    )
    assert abs(result.llc_mean - 1.5) < 5 * result.llc_stderr + 0.02  # nβ·E‖w‖²/2 of a Gaussian with precision nβ


@pytest.mark.parametrize("kind", [Clipping, Replacing])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_projected_chain_has_the_loss_of_its_parameters(kind: type[nn.Linear], is_recorded: bool) -> None:
    """A forward pass that writes to its parameters: what observables see is what the loss was computed from."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model = nn.Sequential(kind(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model.load_state_dict(plain.state_dict())
    before = [p.tolist() for p in model.parameters()]
    off = list[float]()

    def observe(draw: llc_fast.Draw) -> float:
        params = dict(draw.params)
        loss = mse(functional_call(plain, params, (draw.batch[0],)), draw.batch[1])
        off.append(abs(float(draw.loss - loss)))
        return float(params["0.weight"].abs().max())

    loss = mse if is_recorded else lambda out, y: mse(out, y) + 0 * float(out.detach().sum())
    result = runs.estimate(model=model, loss_fn=loss, strategy="sequential", num_draws=100, observables={"n": observe})
    assert max(off) < 1e-6
    assert float(result.observables["n"].max()) <= 0.1 + 1e-7
    assert [p.tolist() for p in model.parameters()] == before


def test_a_nested_estimate_does_not_wait_for_itself() -> None:
    model, inner = runs.mlp(), runs.mlp(seed=3)
    alone = runs.estimate(model=inner).llc_mean

    def observe(draw: llc_fast.Draw) -> float:
        return runs.estimate(model=inner).llc_mean

    for options in ({"strategy": "sequential"}, {}, {"loss_fn": lambda o, y: mse(o, y) + 0 * float(o.detach().sum())}):
        result = runs.estimate(model=model, num_draws=2, observables={"inner": observe}, **options)
        assert np.all(result.observables["inner"] == alone)


@pytest.mark.parametrize("mode", [replay._Recorder, replay._ReadRefuser, FlopCounter])
def test_ctrl_c_when_a_mode_has_just_begun(mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the ``with`` that ends it: torch goes on without it, and knows the modes that the caller had."""

    def enter(self: Any) -> None:
        for base in mode.__mro__[1:]:
            if "__enter__" in vars(base):
                vars(base)["__enter__"](self)
                break
        raise KeyboardInterrupt

    with FlopCounter() as own:
        with monkeypatch.context() as patch:
            patch.setattr(mode, "__enter__", enter, raising=False)
            with pytest.raises(KeyboardInterrupt):
                runs.estimate(num_draws=10, num_burnin=0)
        assert torch._C._len_torch_dispatch_stack() == 1 and torch._C._len_torch_function_stack() == 0
        before = own.flops
        torch.ones(3, 4) @ torch.ones(4, 5)
        assert own.flops == before + 2 * 3 * 4 * 5


def test_ctrl_c_that_breaks_the_end_of_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left half done fails on the way out: still it is Ctrl-C."""

    def stop(self: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    def end(self: Any, *error: Any) -> None:
        torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
        torch.overrides._pop_mode()  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(replay._ReadRefuser, "__torch_function__", stop)
        patch.setattr(replay._ReadRefuser, "__exit__", end, raising=False)
        with pytest.raises(KeyboardInterrupt) as caught:
            runs.estimate(num_draws=10, num_burnin=0)
    assert "empty mode stack" in str(caught.value.__cause__)
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    assert runs.estimate(num_draws=10, num_burnin=0).settings["strategy"]


def test_ctrl_c_when_vmap_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its beginning and the ``with`` that would end it."""

    class Begins:
        def __init__(self, *args: Any) -> None:
            self._args = args

        def __enter__(self) -> None:
            torch._C._functorch._vmap_increment_nesting(*self._args)
            raise KeyboardInterrupt

        def __exit__(self, *_: Any) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(torch._functorch.vmap, "vmap_increment_nesting", Begins)
        with pytest.raises(KeyboardInterrupt):
            runs.estimate(num_draws=10, num_burnin=0)
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
    x = torch.ones(3, requires_grad=True)
    x.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("name", ["mlp", "dropout", "counting", "clipping", "weight_norm"])
def test_ctrl_c_at_random_moments(name: str, times: int) -> None:
    """In preparation, pilot chains or sampling, and again a moment later: everything is as before."""
    moments, model, stopped = random.Random(1), _prepared(name), 0
    # What torch imports when it is first needed, an interrupt would leave half imported.
    runs.estimate(model=model, lr=None, num_draws=200, num_burnin=50)
    with _default_handler():
        before = _state(model)
        for _ in range(100):
            with _alarms(moments.uniform(1e-3, 0.3), times):
                try:
                    stopped += runs.estimate(model=model, lr=None, num_draws=200, num_burnin=50).is_partial
                except KeyboardInterrupt:
                    stopped += 1
            _assert_as_before(model, before)
    assert stopped > 10


def test_ctrl_c_as_soon_as_it_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a run that has not begun does not stay either."""
    install = signal.signal

    def installed(number: int, handler: Any) -> Any:
        before = install(number, handler)
        if handler is not signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)
        return before

    model = _prepared("counting")
    with _default_handler():
        before = _state(model)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(signal, "signal", installed)
            runs.estimate(model=model)
        _assert_as_before(model, before)


def test_a_second_ctrl_c_before_the_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """One while the run begins, and another just before what has begun is ended: it is ended all the same."""
    begin, end, model = ModelSnapshot.silence, Surroundings.__exit__, _prepared("counting")

    def interrupted_again(self: Surroundings, *error: Any) -> bool:
        signal.raise_signal(signal.SIGINT)
        return end(self, *error)

    with _default_handler(), monkeypatch.context() as patched:

        def interrupted(self: ModelSnapshot) -> None:
            begin(self)
            patched.setattr(Surroundings, "__exit__", interrupted_again)  # now, when its code is known
            signal.raise_signal(signal.SIGINT)

        before = _state(model)
        patched.setattr(ModelSnapshot, "silence", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.estimate(model=model)
        patched.undo()
        _assert_as_before(model, before)


@contextlib.contextmanager
def _alarms(seconds: float, times: int) -> Iterator[None]:
    """SIGINT after some seconds, a few times in short succession, as long as the run lasts."""
    left, code = [times], llc_fast.estimate_llc.__code__  # imported here

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if left[0] > 0 and frame is not None:
            left[0] -= 1
            signal.raise_signal(signal.SIGINT)

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5e-4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("name", MODELS)
def test_ctrl_c_in_a_pilot(name: str) -> None:
    model = _prepared(name)
    steps = iter(range(5))

    def interrupt(taken: StepTaken) -> None:
        if taken.is_pilot and next(steps, None) is None:
            signal.raise_signal(signal.SIGINT)

    with _default_handler():
        before = _state(model)
        with after_each_step(interrupt):
            partial = runs.estimate(model=model, lr=None, num_draws=1000, num_burnin=1000, strategy="sequential")
        assert partial.is_partial and partial.steps_done == [0, 0, 0] and partial.settings["lr"] > 0
        _assert_as_before(model, before)


@contextlib.contextmanager
def _default_handler() -> Iterator[None]:
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_gradients_go_is_remembered(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """DistributedDataParallel has its hooks on the nodes that accumulate gradients: after a run they are still used.

    Evaluations in another precision than the parameters' would have autograd make new ones. The user's own hooks on
    parameters are there too, and the chains are those of a model that nobody holds.
    """
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype), torch.randn(20, 3, dtype=dtype)
    y = torch.randn(20, 1, dtype=dtype)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return mse(output.float(), target.float())

    def estimate() -> llc_fast.LLCResult:
        return llc_fast.estimate_llc(model, (x, y), loss_fn, num_chains=2, num_draws=20, num_burnin=10, progress=False)

    free, parameters = estimate(), list(model.parameters())
    monkeypatch.setattr("llc_fast.objective.borrowed.is_held", lambda p: p._use_count() > 1)  # in no group here
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters]  # type: ignore[union-attr]
    reduced, stepped = list[int](), list[int]()
    for k, (node, p) in enumerate(zip(nodes, parameters, strict=True)):
        node.register_hook(lambda *_, k=k: reduced.append(k))
        p.register_post_accumulate_grad_hook(lambda _, k=k: stepped.append(k))
    held = estimate()
    assert stepped == []
    assert [p.dtype for p in parameters] == [dtype] * 4
    np.testing.assert_array_equal(held.loss_trace, free.loss_trace)
    reduced.clear()
    loss_fn(model(x), y).backward()
    assert sorted(reduced) == sorted(stepped) == [0, 1, 2, 3]
