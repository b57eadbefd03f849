"""Recorded kernels: a replay is a fresh call on whatever the memory then holds, or recording refuses and says why."""

from __future__ import annotations

import gc
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from llc_fast.gradients.replay import NotReplayableError, OtherPathError, Recording

pytestmark = pytest.mark.usefixtures("seeded")

DTYPES = [torch.float32, torch.float64]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for entry in value for t in _tensors(entry)] if isinstance(value, (tuple, list)) else []


def _randomize(inputs: list[Tensor]) -> None:
    """Other values in the same memory; integers stay within what they were."""
    with torch.no_grad():
        for t in inputs:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, dtype=t.dtype))
            else:
                t.copy_(t.flatten()[torch.randperm(t.numel())].view(t.shape))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


def _assert_replays(function: Callable[[], Any], inputs: list[Tensor], *, replays: int = 4) -> Recording[Any]:
    """Every replay gives what a call would give, in the memory of the first result; inputs keep what they hold.

    Kernels, values and order are the same; only an output that is written where it was, not into new memory, could
    take another path through a kernel, so that bits may differ by a rounding of each of a few dozen terms.
    """
    recording = Recording(function)
    addresses = [t.data_ptr() for t in _tensors(recording.result)]
    previous = [t.detach().clone() for t in _tensors(recording.result)]
    moved = False
    for _ in range(replays):
        _randomize(inputs)
        held = [t.detach().clone() for t in inputs]
        recording.replay()
        assert all(torch.equal(t, kept) for t, kept in zip(inputs, held, strict=True))
        replayed = _tensors(recording.result)
        by_native = [t.detach().clone() for t in replayed]
        with torch.no_grad():
            for call in recording.calls:
                call()
        assert all(_same_bits(t, kept) for t, kept in zip(replayed, by_native, strict=True)), "Python's has other bits"
        fresh = _tensors(function())
        assert len(replayed) == len(fresh) > 0
        for old, new in zip(replayed, fresh, strict=True):
            assert old.shape == new.shape and old.dtype == new.dtype and old.stride() == new.stride()
            tolerance = 64 * torch.finfo(new.dtype).eps if new.is_floating_point() else 0.0
            size = max(1.0, float(new.detach().abs().max())) if new.numel() else 1.0  # terms may cancel
            torch.testing.assert_close(old.detach(), new.detach(), rtol=tolerance, atol=tolerance * size)
        moved |= any(not torch.equal(t, p) for t, p in zip(replayed, previous, strict=True))
        previous = [t.detach().clone() for t in replayed]
    assert [t.data_ptr() for t in _tensors(recording.result)] == addresses
    assert moved, "the function does not depend on its inputs: nothing was tested"
    return recording


# --- Functions of one tensor --------------------------------------------------------------------------------


def _scatter(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1]).flip(0).expand(x.shape)
    return torch.zeros_like(x).scatter(1, index, x)


def _own_memory(x: Tensor) -> Tensor:
    """Writes to a tensor that starts as a constant, through views and in steps."""
    room = torch.zeros(x.shape[0] + 2, x.shape[1], dtype=x.dtype)
    room[1:-1] = x
    room[0].add_(x[0])
    room.view(-1)[-1].fill_(3.0)
    return room.mul_(2).relu_()


def _loop(x: Tensor) -> Tensor:
    """A recurrence that rewrites one tensor: every kernel has to run again, in order."""
    hidden = torch.ones(x.shape[1], dtype=x.dtype)
    for row in x:
        hidden.mul_(0.5).add_(row.sin())
    return hidden


def _out_argument(x: Tensor) -> Tensor:
    room = torch.empty(x.shape, dtype=x.dtype)
    torch.mul(x, 2, out=room)
    torch.add(room, x, out=room)
    return room


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x + 1) * x - x / 3,
    "power": lambda x: x**2 + x.abs() ** 0.5 + 2**x,
    "matrix product": lambda x: x @ x.T,
    "addmm": lambda x: torch.addmm(x[0], x, x.T @ x),
    "einsum": lambda x: torch.einsum("ij,kj,lj->ikl", x, x, x),
    "outer": lambda x: torch.outer(x[0], x[:, 0]),
    "sum of all": lambda x: x.sum(),
    "sums": lambda x: (x.sum(0), x.sum(1, keepdim=True), x.sum((0, 1))),
    "mean and variance": lambda x: (x.mean(), x.var(1), x.std(0), torch.var_mean(x, dim=0)),
    "norms": lambda x: (x.norm(), torch.linalg.vector_norm(x, dim=1), x.norm(p=1)),
    "product": lambda x: (x.prod(), x.cumprod(1), x.cumsum(0)),
    "logsumexp": lambda x: (x.logsumexp(1), x.softmax(1), x.log_softmax(0)),
    "gelu": lambda x: (F.gelu(x), F.gelu(x, approximate="tanh"), F.silu(x), F.softplus(x), F.elu(x)),
    "relu": lambda x: (F.relu(x), F.leaky_relu(x), F.hardtanh(x), x.clamp(-0.5, 0.5), x.sigmoid(), x.tanh()),
    "maximum": lambda x: (x.max(), x.max(1), x.amax(0), torch.maximum(x, -x), x.argmax(1)),
    "order": lambda x: (x.sort(1), x.topk(2, dim=1), x.median(1), x.kthvalue(2)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "comparison": lambda x: ((x > 0).sum(), (x > x.mean()).to(x.dtype)),
    "cat and stack": lambda x: torch.cat([torch.stack([x, 2 * x]), x[None]]),
    "empty parts": lambda x: torch.cat([x[:0], x, x[:, :0].sum(1, keepdim=True).expand_as(x)]),
    "split and chunk": lambda x: [part.exp() for part in (*x.split(2), *x.chunk(2, dim=1))],
    "transposed result": lambda x: (x.exp().T, (x.T + 1), x.T.contiguous()),
    "views": lambda x: (2 * x).view(-1)[1:].unfold(0, 3, 2).T,
    "as strided": lambda x: (x + 1).as_strided((3, 2), (1, 2)),
    "expand": lambda x: x.sum(1, keepdim=True).expand(-1, 3) + torch.arange(3, dtype=x.dtype),
    "index": lambda x: x[torch.tensor([2, 0, 2]), 1:],
    "gather": lambda x: x.gather(1, torch.tensor([[0, 1], [2, 0], [1, 1], [0, 0]])),
    "scatter": _scatter,
    "index add": lambda x: torch.zeros(2, x.shape[1], dtype=x.dtype).index_add(0, torch.tensor([0, 1, 1, 0]), x),
    "masked fill": lambda x: x.masked_fill(torch.ones(4, 6).tril().bool(), -1.0),
    "triangle": lambda x: (x.tril(), x.triu(1), x.diagonal(), torch.diag_embed(x)),
    "roll and flip": lambda x: (x.roll(1, 0), x.flip(1), F.pad(x, (1, 2)), x.repeat(2, 1), x.repeat_interleave(2)),
    "type": lambda x: (x.double() + 1, x.half(), (x * 10).long()),
    "own memory": _own_memory,
    "recurrence": _loop,
    "out argument": _out_argument,
    "clone then write": lambda x: x.clone().mul_(3).add_(x).t_(),
    "multiple outputs": lambda x: torch.linalg.svd(x.T @ x + 10 * torch.eye(6, dtype=x.dtype)).S,
    "solve": lambda x: torch.linalg.solve(x.T @ x + 10 * torch.eye(6, dtype=x.dtype), x.T),
    "fourier": lambda x: torch.fft.rfft(x).abs(),
    "interpolation": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
    "distances": lambda x: (torch.cdist(x, x + 1), F.cosine_similarity(x, x.flip(0))),
    "tensor made of numbers": lambda x: x * torch.tensor([1.0, 2, 3, 4, 5, 6]).to(x.dtype),
    "nested result": lambda x: {"a": x + 1, "b": [(x * 2, x.sum())], "c": None},
    "its own input": lambda x: (x, x + 1),
    "layer norm": lambda x: F.layer_norm(x, (6,), x[0], x[1]),
    "group norm": lambda x: F.group_norm(x[None, :, :], 2),
    "rms norm": lambda x: F.rms_norm(x, (6,)),
    "batch norm in eval": lambda x: F.batch_norm(x, x[0].detach(), x[1].detach().abs() + 1),
    "batch norm on the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False) * 2,
    "embedding": lambda x: F.embedding(torch.tensor([[0, 3, 3], [1, 1, 2]]), x),
    "embedding bag": lambda x: F.embedding_bag(torch.tensor([[0, 3, 3], [1, 1, 2]]), x, mode="mean"),
    "attention": lambda x: F.scaled_dot_product_attention(x.view(1, 2, 4, 3), x.view(1, 2, 4, 3), x.view(1, 2, 4, 3)),
    "causal attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "masked attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=x @ x.T),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :3].reshape(3, 4, 1)),
    "conv2d": lambda x: F.conv2d(x.view(1, 1, 4, 6), x[:3, :3].reshape(1, 1, 3, 3), x[0, :1], padding=1),
    "transposed convolution": lambda x: F.conv_transpose2d(x.view(1, 1, 4, 6), x[:2, :2].reshape(1, 1, 2, 2)),
    "max pool": lambda x: F.max_pool2d(x.view(1, 1, 4, 6), 2, return_indices=True),
    "average pool": lambda x: (F.avg_pool2d(x[None], 2), F.adaptive_avg_pool2d(x[None], (2, 3))),
    "cross entropy": lambda x: [F.cross_entropy(x, torch.tensor([0, 5, 2, 2]), reduction=r) for r in REDUCTIONS],
    "soft cross entropy": lambda x: F.cross_entropy(x, x.softmax(1), label_smoothing=0.1),
    "losses": lambda x: [
        loss(x, x.flip(0), reduction=r) for r in REDUCTIONS for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss)
    ],
    "more losses": lambda x: [
        loss(x, x.detach().flip(0).sigmoid(), reduction=r)
        for r in REDUCTIONS
        for loss in (F.huber_loss, F.binary_cross_entropy_with_logits, F.kl_div, F.soft_margin_loss)
    ],
    "negative log likelihood": lambda x: F.nll_loss(x.log_softmax(1), torch.tensor([1, 0, 3, -100])),
    "triplet loss": lambda x: F.triplet_margin_loss(x, x.flip(0), x.roll(1, 0)),
}
REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_replays_are_calls(name: str, dtype: torch.dtype) -> None:
    """Kernels of all kinds: one output, several, views, in-place ones, out=, reductions."""
    x = torch.randn(4, 6, dtype=dtype)
    _assert_replays(lambda: FUNCTIONS[name](x), [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("out argument", "comparison")])
def test_replayed_gradients_are_gradients(name: str, dtype: torch.dtype) -> None:
    """The same functions through autograd: squares weighted with fixed numbers, so that nothing cancels or is lost."""
    x = torch.randn(4, 6, dtype=dtype).requires_grad_()

    def function() -> tuple[Tensor, ...]:
        tensors = [t for t in _tensors(FUNCTIONS[name](x)) if t.requires_grad]
        weighted = [(t.to(dtype) ** 2 * torch.arange(1, t.numel() + 1).view(t.shape)).sum() for t in tensors]
        return torch.autograd.grad(torch.stack(weighted).sum() / 100, [x])

    _assert_replays(function, [x])


# --- Networks, as chains evaluate them ----------------------------------------------------------------------


class _Block(nn.Module):
    """A small transformer: embedding, LayerNorm, attention, GELU, tied unembedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.qkv, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(hidden)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + mixed.transpose(1, 2).flatten(2)
        hidden = hidden + self.dropout(self.down(F.gelu(self.up(hidden))))
        return (hidden @ self.embedding.weight.T).transpose(1, 2)


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, groups=1, stride=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def _images() -> list[Tensor]:
    return [torch.randn(6, 1, 8, 8), torch.randint(0, 5, (6,))]


def _tokens() -> list[Tensor]:
    return [torch.randint(0, 7, (3, 5)), torch.randint(0, 7, (3, 5))]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3), nn.LogSoftmax(1)),
        lambda: [torch.randn(8, 5), torch.randint(0, 3, (8,))],
    ),
    "convolutional": (_convolutional, _images),
    "transformer": (_Block, _tokens),
    "recurrent": (_Recurrent, lambda: [torch.randn(4, 5, 3), torch.randint(0, 2, (4,))]),
}


def _network(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    make, data = NETWORKS[name]
    model = make().to(dtype).eval()
    return model, [t.to(dtype) if t.is_floating_point() else t for t in data()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_by_autograd(name: str, dtype: torch.dtype) -> None:
    """Loss and gradients of a network with other parameters and another batch in the same memory."""
    model, (x, y) = _network(name, dtype)
    params = dict(model.named_parameters())

    def function() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(functional_call(model, params, (x,)), y)
        return loss.detach(), *torch.autograd.grad(loss, list(params.values()))

    _assert_replays(function, [*params.values(), x, y])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mlp", "convolutional", "transformer"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_networks_by_vmap(name: str, dtype: torch.dtype) -> None:
    """Three sets of parameters at once, each on its own batch."""
    model, (x, y) = _network(name, dtype)
    params = {k: torch.stack([p.detach()] * 3) for k, p in model.named_parameters()}
    batches = torch.stack([x] * 3), torch.stack([y] * 3)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    function = vmap(grad_and_value(loss))
    _assert_replays(lambda: function(params, *batches), [*params.values(), *batches])


def test_autocast() -> None:
    """Under torch.autocast the casts are kernels like others."""
    model, (x, y) = _network("mlp", torch.float32)
    params = list(model.parameters())

    def function() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.nll_loss(model(x), y)
        return torch.autograd.grad(loss, params)

    _assert_replays(function, [*params, x, y])


# --- Memory -------------------------------------------------------------------------------------------------


def test_replay_allocates_nothing_that_stays() -> None:
    """A thousand replays leave result and inputs where they are, and no tensor behind."""
    x = torch.randn(10, 10)
    recording = Recording(lambda: [x @ x, F.mse_loss(x, 2 * x), x.sort(1)])
    for _ in range(3):
        recording.replay()
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    for _ in range(1000):
        recording.replay()
    gc.collect()
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) <= before


def test_memory_is_not_given_to_others() -> None:
    """Intermediate results keep their memory while the recording lives, whatever is allocated in between."""
    x = torch.randn(50, 50)
    recording = Recording(lambda: ((x + 1) * 2 - 3).exp().log().sum(0))
    others = []
    for k in range(50):
        others.append(torch.full((50, 50), float(k)))
        x.copy_(torch.rand(50, 50))
        recording.replay()
        torch.testing.assert_close(recording.result, (2 * x - 1).sum(0), rtol=1e-5, atol=1e-4)
    assert all((t == k).all() for k, t in enumerate(others))


def test_memory_is_used_again() -> None:
    """A chain of kernels needs the memory of two links, whatever its length, and what is returned keeps its own."""
    x = torch.randn(1000)

    def function() -> tuple[Tensor, Tensor]:
        early = t = x * 2
        for k in range(20):
            t = (t + k).sin()
        return early, t

    recording = _assert_replays(function, [x])
    places = {t.untyped_storage().data_ptr() for call in recording._kept for t in _tensors(call[3])}
    assert recording.num_kernels == 41
    assert len(places) <= 4


def test_memory_of_views_and_of_what_is_written_later_is_kept() -> None:
    """A view keeps all of its memory, in-place writes count as uses, and matrices of other sizes find no room."""
    x = torch.randn(40, 30)

    def function() -> tuple[Tensor, ...]:
        a = x.exp()
        corner = a[:2, :2]
        b = x.cos().T.contiguous()
        c = b @ a
        room = torch.zeros(40, 30)
        d = (x - 1).sin() + b.T
        room[:2, :2] += corner
        e = d.sigmoid() * a.sum()
        room += e
        return room.sum(0), c.tanh(), corner + 1, (e * 2)[3:5]

    _assert_replays(function, [x])


def test_the_first_result_is_that_of_the_call() -> None:
    """The result is there before any replay."""
    x = torch.arange(4.0)
    recording = Recording(lambda: {"double": 2 * x})
    assert torch.equal(recording.result["double"], 2 * x)


def test_input_memory_read_through_numpy() -> None:
    """Whoever writes to the memory, by whatever way: a replay reads what it holds."""
    array = np.ones(5)
    x = torch.from_numpy(array)
    recording = Recording(lambda: x.square().sum())
    array[:] = [0, 1, 2, 3, 4]
    recording.replay()
    assert float(recording.result) == 30.0


def test_replay_works_in_any_gradient_mode_and_leaves_it() -> None:
    """Replays record no graph, under enable_grad as under no_grad, though parameters require gradients."""
    w, x = torch.randn(3, requires_grad=True), torch.randn(3)
    recording = Recording(lambda: torch.autograd.grad((w * x).sum().square(), [w])[0])
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            recording.replay()
            assert torch.is_grad_enabled() is enabled and recording.result.grad_fn is None
    torch.testing.assert_close(recording.result, (2 * (w * x).sum() * x).detach())


# --- Constants ----------------------------------------------------------------------------------------------


def test_constants_are_folded() -> None:
    """What depends on no memory that was given is not computed again."""
    x = torch.randn(5, 5)

    def function() -> Tensor:
        mask = torch.ones(5, 5).tril().bool() & torch.eye(5).logical_not()
        scale = torch.full((5,), 3.0).sqrt().exp()
        return torch.where(mask, x, torch.zeros(())) * scale

    recording = _assert_replays(function, [x])
    assert recording.num_kernels == 2  # where, mul
    assert Recording(lambda: (torch.ones(3) * 2).sum()).num_kernels == 0


@pytest.mark.parametrize("make", [torch.zeros_like, torch.ones_like, torch.empty_like], ids=lambda f: f.__name__)
def test_constants_that_are_written_to_are_made_again(make: Callable[[Tensor], Tensor]) -> None:
    """An accumulator starts anew at each replay: it does not go on from the last."""
    x = torch.randn(4)

    def function() -> tuple[Tensor, Tensor]:
        room = make(x)
        if make is torch.empty_like:
            room.zero_()
        early = room + x  # before the write: must see the fresh value, not the last one
        room[1:].add_(x[1:])
        return early, room

    _assert_replays(function, [x])


def test_what_hangs_on_a_written_constant_is_not_folded() -> None:
    """A view that was taken before the write, and results computed after it."""
    x = torch.randn(3)

    def function() -> Tensor:
        room = torch.zeros(3)
        view, other = room[:2], torch.ones(2)
        room.copy_(x)
        return view * other + torch.arange(2)

    _assert_replays(function, [x])


def test_views_cost_nothing() -> None:
    """Reshaping, transposing, slicing: no kernel."""
    x = torch.randn(4, 6)
    recording = Recording(lambda: x.view(2, 12).T[1:].unsqueeze(0).expand(3, -1, -1).detach().split(5, dim=1))
    assert recording.num_kernels == 0
    x.fill_(7.0)
    recording.replay()
    assert all((t == 7).all() for t in recording.result)


# --- Refusals -----------------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "randn": lambda x: x + torch.randn(3),
    "rand_like": lambda x: x + torch.rand_like(x),
    "normal_": lambda x: x + torch.empty(3).normal_(),
    "randperm": lambda x: x[torch.randperm(3)],
    "dropout": lambda x: F.dropout(x, 0.5),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "multinomial": lambda x: torch.multinomial(x.exp(), 2),
    "a generator of its own": lambda x: x + torch.rand(3, generator=torch.Generator().manual_seed(1)),
    "attention with dropout": lambda x: F.scaled_dot_product_attention(*[x.view(1, 3, 1)] * 3, dropout_p=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_refused(name: str) -> None:
    """A replay would need other numbers each time."""
    x = torch.ones(3)
    with pytest.raises(NotReplayableError, match="draws random numbers"):
        Recording(lambda: RANDOM[name](x))


READERS: dict[str, Callable[[Tensor], Any]] = {
    "format": lambda x: x * len(f"{x.sum():.3f}"),
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * x.numpy().max(),
    "numpy of a detached tensor": lambda x: x * float(x.detach().numpy()[0]),
    "array": lambda x: x * np.asarray(x).sum(),
}


@pytest.mark.parametrize("name", READERS)
def test_looking_at_values_past_torch_is_refused(name: str) -> None:
    """What Python makes of a value would be recorded as a constant."""
    x = torch.ones(3)
    with pytest.raises(NotReplayableError, match="Python looks at a tensor's values"):
        Recording(lambda: READERS[name](x))


# --- Values that Python reads by operations of torch ---------------------------------------------------------

GUARDED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x[0]),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "all": lambda x: x if (x > 0).all() else -x,
    "comparison of tensors": lambda x: x * 1 if torch.equal(x, x.abs()) else -x,
    "allclose": lambda x: x * 1 if torch.allclose(x, x.abs()) else -x,
    "slice": lambda x: torch.arange(10)[: x[0].abs().long()] * x.sum(),
    "branch late": lambda x: (x * 2).relu().sum() * 3 if (x.sum() * 2 > 1) else x.exp(),
    "nonzero": lambda x: (x > 0).nonzero().sum() * x,
    "mask": lambda x: x[x > 0].sum() * x,
    "masked select": lambda x: x.masked_select(x > 0).exp() if (x > 0).any() else x,
    "unique": lambda x: x.sign().unique() * x.sum(),
    "where with one argument": lambda x: torch.where(x > 0)[0] * x.sum(),
    "bincount": lambda x: x.abs().long().bincount() * x.sum(),
}


@pytest.mark.parametrize("name", GUARDED)
def test_values_that_python_reads_are_compared(name: str) -> None:
    """A replay is a call, or says that Python would have gone another way; where nothing has changed, it is a call."""
    function = GUARDED[name]
    x = torch.tensor([1.0, 2.0, 0.5])
    recording = Recording(lambda: function(x))
    assert recording.num_guards > 0
    recording.replay()
    seen = {False: 0, True: 0}
    generator = torch.Generator().manual_seed(0)
    for k in range(40):
        x.copy_(torch.tensor([1.0, 2.0, 0.5]) * (1 + k / 100) if k < 5 else torch.randn(3, generator=generator) * 2)
        expected = _tensors(function(x))
        try:
            recording.replay()
        except OtherPathError:
            seen[False] += 1
            continue
        seen[True] += 1
        for old, new in zip(_tensors(recording.result), expected, strict=True):
            torch.testing.assert_close(old, new)
    assert seen[False] > 0
    assert seen[True] > (0 if name in ("item", "float") else 4)


@pytest.mark.parametrize("read", [lambda t: t.all(), lambda t: t.sum().item(), lambda t: len(t.nonzero())])
def test_values_that_come_from_constants_are_not_read_again(read: Callable[[Tensor], Any]) -> None:
    """As in the masks of language models: positions depend on nothing that was given."""
    x = torch.randn(4, 4)

    def function() -> Tensor:
        positions = torch.arange(4).expand(4, -1)
        return x * 2 if read(positions.diff(dim=1) == 1) else x

    recording = _assert_replays(function, [x])
    assert (recording.num_guards, recording.num_kernels) == (0, 1)


def test_a_replay_that_ends_early_leaves_the_next_one_right() -> None:
    """Memory that is used again holds halves of it meanwhile."""
    x = torch.ones(5)

    def function() -> Tensor:
        total = torch.zeros(5)
        for k in range(4):
            total = (total + k * x).tanh()
            if total.sum() > 100:
                return x
        room = torch.zeros(5)
        room += total
        return room if (x < 2).all() else total * 0

    recording = Recording(function)
    for value in (0.5, 3.0, 1.5, 7.0, 0.1):
        x.fill_(value)
        if value < 2:
            recording.replay()
            torch.testing.assert_close(recording.result, function())
        else:
            with pytest.raises(OtherPathError):
                recording.replay()


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "through a view": lambda x: x.view(-1)[1:].mul_(2),
    "through detach": lambda x: x.detach().zero_(),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "setitem": lambda x: x.__setitem__(0, 5.0),
    "out": lambda x: torch.add(x, 1, out=x),
    "relu in place": lambda x: F.relu(x, inplace=True),
    "resize_": lambda x: x.resize_(2),
    "foreach": lambda x: torch._foreach_add_([torch.ones(3), x], 1.0),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writing_to_given_memory_is_refused(name: str) -> None:
    """A function that moves what it is given does not do the same twice."""
    x = torch.ones(3)
    with pytest.raises(NotReplayableError, match="writes to memory that it was given"):
        Recording(lambda: WRITERS[name](x))


def test_batch_statistics_are_refused() -> None:
    """A batch norm in training mode moves its buffers."""
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with pytest.raises(NotReplayableError, match="writes to memory"):
        Recording(lambda: norm(x))


def test_tensors_without_a_plain_memory_are_refused() -> None:
    """Sparse matrices, given or made on the way."""
    x, matrix = torch.randn(3, 3), torch.eye(3).to_sparse()
    for function in (lambda: torch.sparse.mm(matrix, x), lambda: x.to_sparse().to_dense() + 1):
        with pytest.raises(NotReplayableError, match="not dense"):
            Recording(function)


def test_the_functions_own_errors_come_out() -> None:
    """An error of the function is its own, not a refusal, and leaves no mode behind."""

    def function() -> Tensor:
        raise ValueError("the function's own")

    with pytest.raises(ValueError, match="the function's own"):
        Recording(function)
    assert float(torch.ones(3).sum().item()) == 3.0  # .item() would be refused were a mode left on


def test_refusals_leave_the_generator_usable() -> None:
    """After a refusal modes are off: random numbers and .item() work."""
    with pytest.raises(NotReplayableError):
        Recording(lambda: torch.randn(3))
    assert torch.rand(3).tolist() != torch.rand(3).tolist()


def test_random_numbers_of_python_are_constants() -> None:
    """What torch does not see is recorded as it was: documented, and why chains compare a replay with a call."""
    x = torch.ones(3)
    random.seed(1)
    recording = Recording(lambda: x * random.random())
    first = recording.result.clone()
    recording.replay()
    assert torch.equal(recording.result, first)


class _Reading(nn.Module):
    """A factor that Python reads from the input, past the operations of torch."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.a, self.read = nn.Linear(3, 1), read

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (1 + self.read(x.detach()))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(np.from_dlpack(x).sum()),
        lambda x: float(np.asarray(x).sum()),
        lambda x: float(torch.from_dlpack(x.__dlpack__()).sum()),
        lambda x: len(str(x)),
        lambda x: len(repr(x)),
        lambda x: len(f"{x}"),
        lambda x: float(f"{x.sum():.3f}"),
        lambda x: x.data_ptr() % 7,
        lambda x: sum(x.flatten().tolist()),
        lambda x: sum(map(sum, x.numpy())),
        lambda x: len(pickle.dumps(x)),
    ],
)
def test_what_python_reads_is_not_recorded(read: Callable[[Tensor], float]) -> None:
    model, x = _Reading(read), torch.randn(4, 3)
    with pytest.raises(NotReplayableError):
        Recording(lambda: model(x).sum())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_tensors_that_are_turned_in_place_are_recorded_as_they_were(kind: type[nn.RNNBase], batch_first: bool) -> None:
    """Recurrent networks transpose their output in place."""
    network, x = kind(3, 4, batch_first=batch_first).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    params = list(network.parameters())

    def function() -> tuple[Tensor, ...]:
        loss = network(x)[0].square().mean()
        return (loss, *torch.autograd.grad(loss, params))

    _assert_replays(function, [x, *params])


def test_an_input_that_is_turned_in_place_is_refused() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotReplayableError, match="writes to memory that it was given"):
        Recording(lambda: x.t_().sum())


def test_memory_that_stands_in_is_read_in_a_replay() -> None:
    """A parameter holds the chain's data while it is recorded, and its own again in a replay."""
    p, chain, x = nn.Parameter(torch.zeros(3)), torch.ones(3), torch.randn(4, 3)
    own, p.data = p.data, chain
    recording = Recording(lambda: (x @ p).sum(), {id(p): chain})
    p.data = own
    chain.mul_(2)
    recording.replay()
    torch.testing.assert_close(recording.result.detach(), 2 * x.sum())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str)
def test_fused_recurrent_layers(options: dict[str, Any], mode: Callable[[], Any]) -> None:
    """In float32 a layer is one kernel, which keeps something for its backward pass if gradients are recorded."""
    network, x = nn.LSTM(3, 4, **options), torch.randn(5, 2, 3)
    params = list(network.parameters())

    def function() -> tuple[Tensor, ...]:
        with mode():
            out, (h, c) = network(x)
            loss = out.square().mean() + h.sum() / 10 + c.mean()
        return (loss, *torch.autograd.grad(loss, params)) if loss.requires_grad else (loss,)

    _assert_replays(function, [x, *params])


def test_memory_that_may_be_written_to() -> None:
    """Every replay writes to it, as every call does; anything else that was given is refused still."""
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    other = nn.BatchNorm1d(3)
    recording = Recording(lambda: norm(x), writable=list(norm.buffers()))
    other(x)
    for _ in range(3):
        x.normal_()
        recording.replay()
        torch.testing.assert_close(recording.result, other(x))
        for name, b in norm.named_buffers():
            torch.testing.assert_close(b, other.get_buffer(name))
    with pytest.raises(NotReplayableError, match="writes to memory that it was given"):
        Recording(lambda: norm(x), writable=[x])
