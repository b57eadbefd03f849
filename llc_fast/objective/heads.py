"""Attention heads: which elements of which tensors are theirs, and whether that is so.

How a tensor that holds queries, keys and values is laid out can be read neither from its shape nor from its name. So
every head is verified before it is given out: the attention module runs with made-up weights, and when the head's
elements change, its slice at the input of the output projection must change, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from llc_fast.objective.borrowed import BorrowedModel, ModelSnapshot
from llc_fast.support.randomness import Generators
from llc_fast.support.torch_private import can_set_compiling_aside, compiling_set_aside, has_compiled_parts

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of indices."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


class ComponentError(ValueError, KeyError):
    """A component that the model does not have, or that can't be told from the rest of it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class Part:
    """The elements of a parameter whose index along `dim` is in `ranges`."""

    dim: int
    ranges: Ranges

    def __or__(self, other: Part | None) -> Part | None:
        if other is None:
            return None
        if self.dim != other.dim:
            raise AssertionError("parts of one parameter run along different dimensions")
        return Part(self.dim, _merged(self.ranges + other.ranges))

    def count(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def mask(self, shape: torch.Size, device: torch.device) -> Tensor:
        line = torch.zeros(shape[self.dim], dtype=torch.bool, device=device)
        for start, stop in self.ranges:
            line[start:stop] = True
        return line.view([-1 if k == self.dim else 1 for k in range(len(shape))]).expand(shape)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def own_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's parameters by their names in it, without those of its children."""
    return [(name, p) for name, p in module._parameters.items() if p is not None]


@dataclass(frozen=True)
class Projection:
    """A linear map of attention.

    Attributes:
        role: q, k, v, kv, qkv or o.
        weight, bias: the model's names of its parameters.
        bias_start: the first of its elements in the bias.
        shape: of the weight.
        out_dim: the dimension of the weight that runs over outputs; None: unknown; 0 of a `headed` one is its heads.
        headed: whether the weight is [heads, …, …].
        module: the path of the module that applies it; None: the attention module does.
    """

    role: str
    weight: str
    bias: str | None
    shape: torch.Size
    out_dim: int | None
    headed: bool
    module: str | None
    bias_start: int = 0


@dataclass(frozen=True)
class Layout:
    """What shapes leave open.

    Attributes:
        blocks: of how many blocks [queries, keys, values] a joint tensor consists.
        transposed: whether weights that are no module's are [inputs, outputs].
        reads: the dimension of an output weight [heads, …, …] that runs over its outputs.
    """

    blocks: int = 1
    transposed: bool = False
    reads: int = 2


@dataclass
class Unit:
    """One attention of one layer.

    Attributes:
        root: path of the smallest module with all projections.
        projections: by role.
        own: parameters that belong to it, without norms.
        heads, groups: of queries; of keys and values.
        extras: parameters of `own` that are no projection's and have as many entries as heads, with the dimension.
        problem: why its heads can't be told, if they can't.
        layouts: those that shapes allow, in the order in which they are tried.
        believed: what is taken without verification, or None.
    """

    root: str
    projections: dict[str, Projection]
    own: tuple[str, ...]
    heads: int = 0
    groups: int = 0
    extras: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    layouts: list[Layout] = field(default_factory=list)
    believed: Layout | None = None

    @property
    def tensor(self) -> str:
        """The parameter that messages name."""
        known = next((self.projections[role] for role in ("qkv", "kv", "q") if role in self.projections), None)
        return known.weight if known else next(iter(self.own))

    def parts(self, head: int, layout: Layout) -> list[tuple[str, str, Part]]:
        """The elements of a head as (q, k, v or o; parameter; part)."""
        found, shared = list[tuple[str, str, Part]](), head * self.groups // self.heads
        for role, p in self.projections.items():
            dim = self.out_dim(p, layout)
            if role == "o":
                dim = 0 if p.headed else 1 - dim
                size = p.shape[dim] // self.heads
                found.append(("o", p.weight, Part(dim, ((head * size, (head + 1) * size),))))
                continue
            for which, ranges in self._ranges(role, p.shape[dim], head, shared, layout).items():
                found.append((which, p.weight, Part(dim, ranges)))
                if p.bias is not None:
                    moved = tuple((start + p.bias_start, stop + p.bias_start) for start, stop in ranges)
                    found.append((which, p.bias, Part(0, moved)))
        return found

    def out_dim(self, p: Projection, layout: Layout) -> int:
        return (1 if layout.transposed else 0) if p.out_dim is None else p.out_dim

    def _ranges(self, role: str, size: int, head: int, shared: int, layout: Layout) -> dict[str, Ranges]:
        if role in ("q", "k", "v"):
            number, of = (head, self.heads) if role == "q" else (shared, self.groups)
            step = size // of
            return {role: ((number * step, (number + 1) * step),)}
        counts = {"q": self.heads if role == "qkv" else 0, "k": self.groups, "v": self.groups}
        step, found, before = size // sum(counts.values()), dict[str, Ranges](), 0
        for which, count in counts.items():
            if count:
                number, inside = head if which == "q" else shared, count // layout.blocks
                start = number // inside * (size // layout.blocks) + (before + number % inside) * step
                found[which] = ((start, start + step),)
                before += inside
        return found


# ---- whether it is so -------------------------------------------------------------------------------------------

_BATCH, _LENGTH = 3, 6
"""Made-up sequences; either may be the dimension over which attention goes."""


class _Seen(Exception):  # noqa: N818 - no error
    """Everything that was asked for has been seen."""


class _UnverifiedError(Exception):
    """Why a layout is not what was supposed."""


class Verifier:
    """Runs attention with made-up weights. The model's own are never written to.

    Args:
        model: the user's.
        units: its attention.
        modules, parameters: its modules by path, its parameters by name.
        inputs: its arguments, if none can be made up.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, Tensor],
        inputs: Any,
    ) -> None:
        self._model, self._inputs = model, inputs
        self._units = [unit for unit in units if not unit.problem]
        self.modules, self.parameters = modules, parameters
        self._calls: dict[str, Call] | None = None
        self._why_not_called = ""
        self._known: dict[int, Layout] = {}
        self._extras: dict[int, dict[str, int]] = {}

    def layout(self, unit: Unit, name: str) -> Layout:
        """The layout in which the elements of each head of an attention are its elements.

        Args:
            unit: the attention.
            name: of the component that is asked for, for messages.

        Raises:
            ComponentError: there is none.
        """
        if id(unit) not in self._known:
            before = list(self._known.values())
            why = ""
            with _left_as_it_was(self._model), torch.no_grad():
                for layout in sorted(unit.layouts, key=lambda known: known not in before):
                    try:
                        self._verify(unit, layout)
                    except _UnverifiedError as reason:
                        why = why or str(reason)
                    else:
                        self._known[id(unit)] = layout
                        break
                else:
                    raise ComponentError(
                        f"{name!r}: which elements of {unit.tensor!r} belong to a head can't be verified: {why}. "
                        f"Give masks of your own, params={{{unit.tensor!r}: mask}}, or trust the shapes: "
                        f"params=components(model, verify=False)[{name!r}]"
                    )
        return self._known[id(unit)]

    def extras(self, unit: Unit, name: str) -> dict[str, int]:
        """Those parameters beside the projections of which each head has its own entry."""
        if id(unit) not in self._extras:
            layout = self.layout(unit, name)
            found = {}
            with _left_as_it_was(self._model), torch.no_grad():
                run = _Run(self, unit, layout)
                for parameter, dim in unit.extras.items():
                    if run.affected([(parameter, Part(dim, ((0, 1),)))]) == {0}:
                        found[parameter] = dim
            self._extras[id(unit)] = found
        return self._extras[id(unit)]

    def _verify(self, unit: Unit, layout: Layout) -> None:
        """Change the elements of some heads, and see that their slices change and no others.

        The heads are those whose number has a certain bit, and those that lack it. If each of these sets changes itself
        alone, so does each head, since only it is in all of its sets; and no head depends on another's elements.

        Raises:
            _UnverifiedError: other heads change.
        """
        run = _Run(self, unit, layout)
        parts = [unit.parts(head, layout) for head in range(unit.heads)]
        share = unit.heads // unit.groups
        for which, count in (("q", unit.heads), ("k", unit.groups), ("v", unit.groups)):
            width = 1 if which == "q" else share
            for chosen in _sets(count):
                heads = {number * width + k for number in chosen for k in range(width)}
                mine = {(name, part) for head in heads for kind, name, part in parts[head] if kind == which}
                if (found := run.affected(mine)) != heads:
                    names = " and ".join(sorted({repr(name) for name, _ in mine}, reverse=True))
                    raise _UnverifiedError(
                        f"the elements of {_heads(heads)} in {names} should change these heads' slices at the input of "
                        f"the output projection {unit.projections['o'].weight!r}, and change {_heads(found)}"
                    )

    def calls_of(self, unit: Unit, layout: Layout) -> Iterator[Call]:
        """Arguments with which a unit might be called: seen in a forward pass of the model, or made up for it alone."""
        if unit.root == "":
            yield from _made_up(_itself(self._model), self._inputs)
        else:
            if self._calls is None:
                self._calls = self._captured()
            if unit.root in self._calls:
                yield self._calls[unit.root]
        first = next(iter(unit.projections.values()))
        p = self.parameters[first.weight]
        maps = [unit.projections[role] for role in "qkv"] if "k" in unit.projections else [first] * 3
        widths = [m.shape[-1] if m.headed else m.shape[1 - unit.out_dim(m, layout)] for m in maps]
        made = tuple(torch.zeros(_BATCH, _LENGTH, width, device=p.device, dtype=p.dtype) for width in widths)
        if isinstance(self.modules[unit.root], nn.MultiheadAttention):
            yield made, {}
        yield made[:1], {}

    def _captured(self) -> dict[str, Call]:
        """The arguments of the first call of each unit, in a forward pass of the model on made-up input."""
        found: dict[str, Call] = {}
        modules = {unit.root: self.modules[unit.root] for unit in self._units}

        def hook(root: str) -> Any:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                found.setdefault(root, (args, kwargs))
                if len(found) == len(modules):
                    raise _Seen

            return keep

        handles = [m.register_forward_pre_hook(hook(root), with_kwargs=True) for root, m in modules.items()]
        why, model = list[str](), _itself(self._model)
        try:
            for args, kwargs in _made_up(model, self._inputs):
                try:
                    model(*args, **kwargs)
                except _Seen:
                    break
                except Exception as error:  # whatever a model says to input that it was not made for
                    why.append(f"{type(error).__name__}: {error}")
                if found:
                    break
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            reason = why[0].splitlines()[0] if why else "no input could be made up for it"
            self._why_not_called = f"the model did not run ({reason}); give inputs= to components()"
        return found

    @property
    def why_not_called(self) -> str:
        return self._why_not_called


class _Run:
    """One attention module with made-up weights, run again and again."""

    def __init__(self, verifier: Verifier, unit: Unit, layout: Layout) -> None:
        self._verifier, self._unit, self._layout = verifier, unit, layout
        self._parameters = verifier.parameters
        self._module = verifier.modules[unit.root]
        self._generator = torch.Generator().manual_seed(0)
        names = {id(p): name for name, p in self._parameters.items()}
        self._local: dict[str, str] = {}
        for path, module in self._module.named_modules():
            for key, p in own_parameters(module):
                self._local.setdefault(names.get(id(p), ""), f"{path}.{key}" if path else key)
        self._values: dict[str, Tensor] = {}
        for role, projection in unit.projections.items():
            if role != "o":
                shape = projection.shape
                fan = shape[-1] if projection.headed else shape[1 - self._dim(projection)]
                self._values[projection.weight] = self._random(projection.weight, fan**-0.5)
                if projection.bias is not None:
                    self._values[projection.bias] = self._random(projection.bias, 0.5)
        for name in unit.extras:
            self._values[name] = self._random(name, 0.5)
        for name in self._values:
            if name not in self._local:
                raise _UnverifiedError(f"{name!r} is not below {unit.root!r}")
        out = unit.projections["o"]
        self._widths = {size for p in unit.projections.values() for size in p.shape if p.role != "o"}
        self._tap = None if out.module is None else verifier.modules[out.module]
        self._reader = None if self._tap is not None else self._reading(out)
        why: _UnverifiedError | None = None
        for args, kwargs in verifier.calls_of(unit, layout):
            self._args, self._kwargs = self._filled(args), {k: self._filled_as(k, v) for k, v in kwargs.items()}
            try:
                self._base = self._seen(self._values)
            except _UnverifiedError as error:
                why = why or error
            else:
                return
        raise why or _UnverifiedError("nothing is known to call it with")

    def _dim(self, p: Projection) -> int:
        return self._unit.out_dim(p, self._layout)

    def _random(self, name: str, scale: float) -> Tensor:
        p = self._parameters[name]
        return (torch.randn(p.shape, generator=self._generator) * scale).to(p.device, p.dtype)

    def _filled_as(self, key: str, value: Any) -> Any:
        is_cache = "past" in key or "cache" in key or "Cache" in type(value).__name__
        return (
            (False if isinstance(value, bool) else None)
            if is_cache and key != "cache_position"
            else self._filled(value)
        )

    def _filled(self, value: Any) -> Any:
        """Arguments with random numbers where the stream of the model is, whatever the model's own was."""

        def fill(leaf: Any) -> Any:
            if (
                isinstance(leaf, Tensor)
                and leaf.is_floating_point()
                and leaf.ndim > 1
                and leaf.shape[-1] in self._widths
            ):
                return torch.randn(leaf.shape, generator=self._generator).to(leaf.device, leaf.dtype)
            return leaf

        return tree_map(fill, value)

    def _reading(self, out: Projection) -> dict[str, Tensor]:
        """Output weights by which output number j sees head j modulo their number, and no other."""
        p, heads = self._parameters[out.weight], self._unit.heads
        dim = self._layout.reads if out.headed else self._dim(out)
        if p.shape[dim] < heads:
            raise _UnverifiedError(f"{out.weight!r} has fewer outputs than heads")
        weight = self._random(out.weight, 1.0)
        rows = torch.arange(p.shape[dim], device=p.device) % heads
        ins = torch.arange(p.shape[0 if out.headed else 1 - dim], device=p.device)
        owner = ins if out.headed else ins // (len(ins) // heads)
        over = 0 if out.headed else 1 - dim
        sees = rows.view([-1 if k == dim else 1 for k in range(p.ndim)]) == owner.view(
            [-1 if k == over else 1 for k in range(p.ndim)]
        )
        return {out.weight: weight * sees}

    def _seen(self, values: Mapping[str, Tensor]) -> Tensor:
        """What reaches the output projection, or, if it is no module, what it makes of that."""
        given = {self._local[name]: value for name, value in {**values, **(self._reader or {})}.items()}
        seen = list[Tensor]()

        def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args or tuple(kwargs.values()))[0])
            raise _Seen

        handle = None if self._tap is None else self._tap.register_forward_pre_hook(tap, with_kwargs=True)
        try:
            found = functional_call(self._module, given, self._args, self._kwargs)
            if self._tap is None:
                seen.append(next(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)))
        except _Seen:
            pass
        except Exception as error:  # whatever a module says to arguments that it was not made for
            why = self._verifier.why_not_called or (
                f"its attention did not run ({type(error).__name__}: {error}); give inputs= to components()"
            )
            raise _UnverifiedError(why) from error
        finally:
            if handle is not None:
                handle.remove()
        out = self._unit.projections["o"]
        if not seen:
            raise _UnverifiedError(f"the module of {out.weight!r} is not called")
        if not seen[0].isfinite().all():
            raise _UnverifiedError(f"what reaches {out.weight!r} is not finite")
        return seen[0]

    def affected(self, parts: Iterable[tuple[str, Part]]) -> set[int]:
        """The heads whose slices change when elements of parameters do."""
        values = dict(self._values)
        for name, part in parts:
            if values[name] is self._values[name]:
                values[name] = values[name].clone()
            for start, stop in part.ranges:
                values[name].narrow(part.dim, start, stop - start).mul_(-0.7)
        after = self._seen(values)
        if after.shape != self._base.shape:
            raise _UnverifiedError("its output changes shape")
        change = (after - self._base).abs().float().reshape(-1, after.shape[-1]).amax(0)
        size = max(float(self._base.abs().max()), float(after.abs().max()))
        moved, heads = change > 8 * torch.finfo(after.dtype).eps * size, self._unit.heads
        where = moved.nonzero().flatten().tolist()
        if self._tap is None:
            return {k % heads for k in where}
        if len(moved) % heads:
            raise _UnverifiedError(f"what reaches the output projection has {len(moved)} columns for {heads} heads")
        return {k // (len(moved) // heads) for k in where}


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and everything about the model and the generators as before outside.

    Raises:
        ComponentError: the model is on the meta device.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ComponentError("the model is on the meta device, where nothing can be verified: use verify=False")
    snapshot, modes = ModelSnapshot(model), [(module, module.training) for module in model.modules()]

    def put_modes_back() -> None:
        for module, mode in modes:  # of scripted modules the snapshot knows nothing
            if module.training is not mode:
                module.training = mode

    with contextlib.ExitStack() as stack:
        stack.enter_context(Generators(device, [model]).kept())
        stack.callback(put_modes_back)
        stack.callback(snapshot.restore)
        snapshot.silence()
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        stack.enter_context(BorrowedModel(model).holding({}, {}, buffers))
        if has_compiled_parts(model, None) and can_set_compiling_aside():
            stack.enter_context(compiling_set_aside())
        for module in model.modules():
            module.training = False
        yield


def _itself(model: nn.Module) -> nn.Module:
    """A model without what runs it on several devices, which could wait for other processes."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def _sets(count: int) -> Iterator[set[int]]:
    """Sets of numbers below `count` that tell them apart: those with a certain bit, and those without."""
    if count == 1:
        yield {0}
    for bit in range((count - 1).bit_length()):
        for wanted in (0, 1):
            yield {k for k in range(count) if k >> bit & 1 == wanted}


def _heads(found: set[int]) -> str:
    if not found:
        return "no head"
    return (
        f"head{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)[:8]))}{', …' if len(found) > 8 else ''}"
    )


def _made_up(model: nn.Module, given: Any) -> Iterator[Call]:
    """Arguments with which the model might run: token indices, images, or vectors."""
    if given is not None:
        if isinstance(given, Mapping):
            yield (), dict(given)
        else:
            yield (tuple(given) if isinstance(given, (tuple, list)) else (given,)), {}
        return
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    device, dtype = first.device, next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(model, "config", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = getattr(getattr(model, "cfg", None), "d_vocab", None) or getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        vocabulary = tables[0].num_embeddings if tables else 0
    if vocabulary:
        length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
        tokens = torch.randint(vocabulary, (_BATCH, length), generator=generator).to(device)
        if config is not None:
            named: dict[str, Any] = {"input_ids": tokens}
            if getattr(config, "is_encoder_decoder", False):
                named["decoder_input_ids"] = tokens
            yield (), named | {"use_cache": False}
            yield (), named
        yield (tokens,), {}
    images = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if images:
        for size in _image_sizes(model):
            image = torch.randn(1, images[0].in_channels, *size, generator=generator).to(device, dtype)
            if config is not None:
                yield (), {"pixel_values": image}
            yield (image,), {}
    widths = next((p.shape for p in model.parameters() if p.ndim == 2), ())
    for width in reversed(widths):
        yield (torch.randn(_BATCH, _LENGTH, width, generator=generator).to(device, dtype),), {}


def _image_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    for holder in (getattr(model, "config", None), *model.modules()):
        for key in ("image_size", "img_size"):
            size = getattr(holder, key, None)
            if isinstance(size, int):
                yield size, size
            elif isinstance(size, (tuple, list)) and len(size) == 2:
                yield int(size[0]), int(size[1])
    yield 224, 224
    yield 32, 32
