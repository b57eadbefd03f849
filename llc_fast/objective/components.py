"""Parts of a model by name: embedding, layers, attention heads, perceptrons, convolution channels.

    components(model)["l3 h5"]        # {parameter name: mask of its elements, or None for all of them}

Where the projections of attention are is read from what their modules are called; how large heads are, from shapes and
the number of heads in attributes or configuration. :mod:`llc_fast.objective.heads` verifies the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from llc_fast.objective.heads import ComponentError, Layout, Part, Projection, Unit, Verifier, own_parameters


class Component(Mapping[str, "Tensor | None"]):
    """A part of a model: ``{parameter name: boolean mask, or None for the whole parameter}``.

    Masks have the shape of the parameter, are on its device, and are made each time they are asked for; they take the
    memory of one of its dimensions alone.

    Attributes:
        name: what it is called.
        layer: the layer that it is in, or None: embeddings, what follows the layers, and models without layers.
        modules: names of the modules that own its parameters, in the model's order. The restriction enters the model at
            the first of them that is called.
    """

    def __init__(self, name: str, parts: Mapping[str, Part | None], structure: _Structure, layer: int | None) -> None:
        self.name, self.layer = name, layer
        self._parts = {known: parts[known] for known in structure.parameters if known in parts}
        self._parameters = {known: structure.parameters[known] for known in self._parts}
        self.modules = tuple(dict.fromkeys(structure.owners[known] for known in self._parts))

    def __getitem__(self, name: str) -> Tensor | None:
        part, p = self._parts[name], self._parameters[name]
        return None if part is None else part.mask(p.shape, p.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def count(self, name: str) -> int:
        """How many elements of a parameter belong to the component, without a mask."""
        part, p = self._parts[name], self._parameters[name]
        return p.numel() if part is None else p.numel() // max(p.shape[part.dim], 1) * part.count()

    @property
    def num_parameters(self) -> int:
        """How many elements it has in all."""
        return sum(map(self.count, self._parts))

    def __repr__(self) -> str:
        return f"Component({self.name!r}: {self.num_parameters} elements of {len(self)} parameters)"


class Components(Mapping[str, Component]):
    """The components of a model by name, see :func:`llc_fast.components`. Each is computed when it is asked for."""

    def __init__(self, model: nn.Module, verify: bool, inputs: Any) -> None:
        self._structure = _Structure(model)
        found = self._structure
        self._verifier = Verifier(model, found.units, found.modules, found.parameters, inputs) if verify else None

    def __iter__(self) -> Iterator[str]:
        return self._structure.names()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(self._structure.normalized(name) == known for known in self)

    def __getitem__(self, name: str) -> Component:
        structure = self._structure
        known = structure.normalized(name)
        parts = structure.parts_of(known, self._verifier)
        if parts is None:
            raise ComponentError(self._unknown(name))
        return Component(known, parts, structure, structure.layer_of(known, parts))

    def _unknown(self, name: str) -> str:
        known = list(self)
        close = difflib.get_close_matches(self._structure.normalized(name), known, n=5, cutoff=0.5)
        if close:
            return f"component {name!r} is none of the model's; close to it: {', '.join(map(repr, close))}"
        return f"component {name!r} is none of the model's; it has {', '.join(map(repr, known[:20]))}, …"

    def has(self, name: str) -> bool:
        """Whether a name is of this model, even if its elements are unknown: a head of attention of another layout."""
        return self._structure.has(self._structure.normalized(name))

    def close_to(self, name: str) -> list[str]:
        """Names of components that look like this one."""
        return difflib.get_close_matches(self._structure.normalized(name), list(self), n=5, cutoff=0.5)

    def __repr__(self) -> str:
        return f"Components of {type(self._structure.model).__name__}: {len(self)} names"


def components(model: nn.Module, *, verify: bool = True, inputs: Any = None) -> Components:
    """The parts of a model by name, as ``params=`` takes them: what the model has of

    - ``"embed"``, ``"unembed"``: the weights of the token or patch embedding; weight and bias of the last linear map.
      If they are tied, both name the same parameter.
    - ``"l0"``: all of layer 0, norms included; ``"l0 attn"``, ``"l0 mlp"``: its projections, without norms.
      ``"l0 cross"``: its cross-attention.
    - ``"l3 h5"``: head 5 of layer 3: its elements of queries, keys and values, biases too, and its slice of the output
      projection. Where several heads share keys and values, each of them has these.
    - ``"l3 g1"``: the heads that share the keys and values number 1 (grouped-query attention).
    - ``"l3 attn shared"``: what of the attention belongs to no head, such as the output bias.
    - ``"layer1.0"``: a block of a convolutional network; ``"layer1.0.conv1 c5"``: filter 5 of a convolution.
    - the name of any parameter.

    Attention that is in no numbered layer goes by its path: ``"block.attention attn"``, ``"block.attention h0"``.
    A model with several stacks of layers has their names in front: ``"encoder l0 h1"``, ``"decoder l0 cross h1"``.

    Args:
        model: any module. It is left as it was.
        verify: whether to verify the heads of an attention by changing their elements, when one of them is asked for.
            That takes one forward pass of the model with made-up input, as far as its last attention, and some of the
            attention module with made-up weights. If False, layouts that can't be read from shapes are believed to be
            those of the architecture's name.
        inputs: arguments of the model for that forward pass, if none can be made up for it: a tensor, a tuple of
            positional or a mapping of named arguments.

    Returns:
        A mapping of names to :class:`llc_fast.objective.components.Component`. To list names allocates nothing;
        ``[name]`` raises ComponentError (a ValueError and a KeyError) if there is no such component, or if the layout
        of its tensors is unknown.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return Components(model, verify, inputs)


# ---- what there is ----------------------------------------------------------------------------------------------

_ROLES = {
    "q": "q query queries qproj queryproj qlin linearq toq wq qlinear querylinear fcq qmap",
    "k": "k key keys kproj keyproj klin lineark tok wk klinear keylinear fck kmap",
    "v": "v value values vproj valueproj vlin linearv tov wv vlinear valuelinear fcv vmap",
    "kv": "kv kvproj keyvalue tokv wkv kvlinear",
    "qkv": "qkv qkvproj cattn querykeyvalue wqkv toqkv attproj inprojweight qkvlinear packedqkv",
    "o": "oproj outproj wo o dense cproj proj projection toout out outlin linearo outlinear fcout output outputproj",
}
_ROLE_OF = {word: role for role, words in _ROLES.items() for word in words.split()}
_ROLE_OF |= {f"{word}weight": role for word, role in list(_ROLE_OF.items()) if not word.endswith("weight")}
_BIASES = {"bq": "q", "bk": "k", "bv": "v", "bo": "o", "inprojbias": "qkv"}
_BIASES |= {f"{word}bias": role for word, role in _ROLE_OF.items() if not word.endswith("weight")}
_HEADS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_head", "n_local_heads", "h"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"),
)
"""What modules and configurations call the number of heads."""
_CROSS = re.compile(r"cross|encoder_?attn|encdec|enc_dec|encoder_?attention", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NO_TOKENS = re.compile(r"pos|type|segment|bias|distance|relative", re.IGNORECASE)
_LAYOUT_OF_TYPE = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "openai-gpt", "mpt", "phi3", "hooked_transformer"), "one"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon", "falcon", "gpt_bigcode"), "groups"),
    "codegen": "four",
}
"""How architectures lay out a tensor of queries, keys and values: "one" block [q, k, v], or a block for each of the
"groups" that share keys. It is the order in which layouts are tried, and what is believed where nothing is verified."""


def _word(name: str) -> str:
    return name.lower().replace("_", "")


class _Structure:
    """What is found in a model by looking at it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._once = dict(model.named_modules())
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        by_id = {id(p): name for name, p in self.parameters.items()}
        self.aliases: dict[str, str] = {}
        """The model's name of a parameter by each of its paths; some models call them otherwise than their modules."""
        self.owners: dict[str, str] = {}
        """The path of the module that has a parameter, by the parameter's name."""
        for path, m in self.modules.items():
            for name, p in own_parameters(m):
                if id(p) in by_id:
                    self.aliases[f"{path}.{name}" if path else name] = by_id[id(p)]
                    self.owners.setdefault(by_id[id(p)], path)
        self.norms = {path for path, m in self.modules.items() if _is_norm(path, m)}
        self.units = self._find_units()
        self._attention = {name for unit in self.units for name in unit.own}
        self._layers: dict[str, str] = {}
        """Paths of layers by name, such as l0."""
        self._unit_names: dict[str, Unit] = {}
        """Attention by name, such as l0 attn."""
        self._number: dict[str, int] = {}
        self._find_layers()
        self._channels = {path: m for path, m in self._once.items() if isinstance(m, _CONVOLUTIONS)}
        self._blocks = [path for path in self._once if self._is_block(path)]
        self._ends = self._find_ends()

    # -- attention

    def _find_units(self) -> list[Unit]:
        units, taken = list[Unit](), set[str]()
        for path, module in self._once.items():
            if any(path.startswith(f"{root}.") for root in taken if root):
                continue
            found = self._projections(path, module)
            if "qkv" in found:
                chosen = ["qkv"]
            elif {"q", "k", "v"} <= found.keys():
                chosen = ["q", "k", "v"]
            elif {"q", "kv"} <= found.keys():
                chosen = ["q", "kv"]
            else:
                continue
            root, out = path, found.get("o")
            for _ in range(2):
                if out is not None or not root:
                    break
                below, root = root, root.rpartition(".")[0]
                out = self._projections(root, self.modules[root], without=below).get("o")
            if out is None:
                continue
            projections = {role: found[role] for role in chosen} | {"o": out}
            units.append(self._unit(path, root, projections))
            taken.add(root)
        return units + list(self._unknown_units(units))

    def _projections(self, path: str, module: nn.Module, without: str | None = None) -> dict[str, Projection]:
        """The linear maps that a module has as parameters or children, by role."""
        found: dict[str, Projection] = {}
        prefix = f"{path}." if path else ""
        biases = {_BIASES[_word(n)]: n for n, p in module._parameters.items() if p is not None and _word(n) in _BIASES}
        for name, p in module._parameters.items():
            role = _ROLE_OF.get(_word(name))
            if role is None or p is None or p.ndim not in (2, 3) or role in found:
                continue
            bias = biases.get(role)
            found[role] = Projection(
                role,
                self.aliases[prefix + name],
                None if bias is None or role == "o" else self.aliases[prefix + bias],
                p.shape,
                0 if isinstance(module, nn.MultiheadAttention) or p.ndim == 3 else None,
                p.ndim == 3,
                None,
            )
        if isinstance(module, nn.MultiheadAttention) and "qkv" not in found and "qkv" in biases:
            bias = self.aliases[prefix + biases["qkv"]]
            for k, role in enumerate("qkv"):
                if role in found:
                    found[role] = dataclasses.replace(found[role], bias=bias, bias_start=k * module.embed_dim)
        outs = list(_ROLES["o"].split())
        best = len(outs)
        for name, child in module._modules.items():
            role = _ROLE_OF.get(_word(name))
            if role is None or child is None or prefix + name == without:
                continue
            if role == "o" and (outs.index(_word(name)) >= best or (found.get("o") and best == len(outs))):
                continue
            linear = self._linear(prefix + name)
            if linear is None or (role != "o" and role in found):
                continue
            if role == "o":
                best = outs.index(_word(name))
            found[role] = self._projection(role, linear, isinstance(module, nn.MultiheadAttention))
        return found

    def _linear(self, path: str) -> str | None:
        """The only module at or below a path that has a matrix."""
        inside = [
            known
            for known, m in self._once.items()
            if (known == path or known.startswith(f"{path}."))
            and any(p is not None and p.ndim >= 2 for p in m._parameters.values())
        ]
        return inside[0] if len(inside) == 1 and "weight" in self.modules[inside[0]]._parameters else None

    def _projection(self, role: str, path: str, is_applied_outside: bool) -> Projection:
        module = self.modules[path]
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        assert weight is not None
        return Projection(
            role,
            self.aliases[f"{path}.weight"],
            None if bias is None or role == "o" else self.aliases[f"{path}.bias"],
            weight.shape,
            1 if _is_transposed(module) else 0,
            False,
            None if is_applied_outside else path,
        )

    def _unit(self, path: str, root: str, projections: dict[str, Projection]) -> Unit:
        """Attention whose queries are made by the module at `path`, below or at `root`."""
        out = projections["o"]
        mine = {name for p in projections.values() for name in (p.weight, p.bias) if name is not None}
        if out.module is not None:
            mine |= {self.aliases[f"{out.module}.{n}"] for n, _ in own_parameters(self.modules[out.module])}
        inside: Iterable[str] = self._below(root)
        if self._has_others(path, projections):  # a layer that has its projections and its perceptron side by side
            inside = [f"{path}.{n}" if path else n for n, _ in own_parameters(self.modules[path])]
        elif self._has_others(root, projections):
            inside = self._below(path)
        own = {self.aliases[name] for name in inside if name.rpartition(".")[0] not in self.norms} | mine
        unit = Unit(root, projections, tuple(name for name in self.parameters if name in own))
        self._measure(unit, path)
        for name in unit.own if not unit.problem else ():
            shape = self.parameters[name].shape
            if name not in mine and unit.heads in shape:
                unit.extras[name] = max(k for k, size in enumerate(shape) if size == unit.heads)
        return unit

    def _unknown_units(self, known: list[Unit]) -> Iterator[Unit]:
        """Modules that are called attention, whose projections are called by no known names."""
        found: list[str] = []
        for path, module in self._once.items():
            if not _ATTENTION.search(f"{type(module).__name__} {path.rpartition('.')[2]}") or path in self.norms:
                continue
            if any(f"{path}.".startswith(f"{other}.") for other in found):
                continue
            if any(f"{u.root}.".startswith(f"{path}.") or f"{path}.".startswith(f"{u.root}.") for u in known):
                continue
            own = dict.fromkeys(self._matrices(path))
            if own and not any(p.rpartition(".")[2].isdigit() and f"{p}.".startswith(f"{path}.") for p in self._once):
                found.append(path)
                problem = "its module is called attention, but its projections have no known names"
                yield Unit(path, {}, tuple(own), problem=problem)

    def _has_others(self, root: str, projections: Mapping[str, Projection]) -> bool:
        """Whether there are linear maps below a module that are no projections of its attention."""
        known = {p.weight for p in projections.values()}
        for name in self._below(root):
            owner = name.rpartition(".")[0]
            if self.parameters[self.aliases[name]].ndim < 2 or self.aliases[name] in known or owner in self.norms:
                continue
            if isinstance(self.modules[owner], _LINEAR) or _is_transposed(self.modules[owner]):
                return True
        return False

    def _measure(self, unit: Unit, path: str) -> None:
        """How many heads a unit has, or why this is unknown; what layouts its tensors may have."""
        projections = unit.projections
        out, first = projections["o"], next(iter(projections.values()))
        raw = [p for p in projections.values() if p.out_dim is None]
        size = out.shape[0] if out.headed else out.shape[1 - (out.out_dim or 0)]
        candidates = list(dict.fromkeys(self._numbers_of_heads(path, unit.root)))
        if first.headed:
            unit.heads, unit.groups = first.shape[0], projections.get("k", first).shape[0]
            headed = [p.shape[0] for p in projections.values() if p.headed]
            is_known = not candidates or unit.heads in candidates
            if len(headed) < len(projections) or out.shape[0] != unit.heads or unit.heads % unit.groups or not is_known:
                unit.problem = f"the shapes {[tuple(p.shape) for p in projections.values()]} are of no known layout"
            unit.layouts = [Layout(reads=2), Layout(reads=1)]
            unit.believed = unit.layouts[0]
            return
        if not candidates:
            unit.problem = "its number of heads is in no attribute of the module and not in the configuration"
            return
        why = ""
        for heads in candidates:
            groups, why = _groups(projections, heads, size)
            if not why:
                unit.heads, unit.groups = heads, groups
                break
        else:
            unit.problem = why
            return
        blocks = [k for k in range(1, unit.groups + 1) if unit.groups % k == 0]
        joint = any(role in projections for role in ("qkv", "kv"))
        blocks.sort(key=lambda k: (k != 1, k != unit.groups, k))
        usual = _LAYOUT_OF_TYPE.get(str(getattr(self._config(path), "model_type", "")), "")
        if type(self.modules[path]).__module__.startswith(("timm.", "torch.nn.")):
            usual = "one"
        preferred = {"one": 1, "groups": unit.groups, "four": 4}.get(usual)
        blocks.sort(key=lambda k: k != preferred)
        unit.layouts = [Layout(b, t) for t in ((False, True) if raw else (False,)) for b in (blocks if joint else [1])]
        if not raw and (not joint or preferred in blocks or unit.groups == 1):
            unit.believed = unit.layouts[0]

    def _numbers_of_heads(self, path: str, root: str) -> Iterator[int]:
        holders: list[Any] = [self.modules[path], self.modules[root]]
        parent = root
        while parent:  # the module, and those around it
            parent = parent.rpartition(".")[0]
            holders.append(self.modules[parent])
        holders.insert(2, self._config(path))
        for holder in holders:
            yield from _integers(holder)
            for key in ("cfg", "args", "config"):
                yield from _integers(getattr(holder, key, None))

    def _config(self, path: str) -> Any:
        while True:
            config = getattr(self.modules[path], "config", None)
            if config is not None:
                return config
            if not path:
                return next((m.config for m in self.modules.values() if hasattr(m, "config")), None)
            path = path.rpartition(".")[0]

    # -- layers

    def _find_layers(self) -> None:
        layer_of = {k: path for k, unit in enumerate(self.units) if (path := self._layer_path(unit)) is not None}
        stacks: dict[str, list[str]] = {}
        for path in dict.fromkeys(layer_of.values()):
            stack = path.rpartition(".")[0]
            kind = re.sub(r"\d+", "#", stack)
            for name, child in self.modules[stack].named_children():
                full = f"{stack}.{name}" if stack else name
                if name.isdigit() and full not in stacks.setdefault(kind, []) and any(True for _ in child.parameters()):
                    stacks[kind].append(full)
        prefixes = _prefixes(list(stacks))
        for kind, paths in stacks.items():
            for number, path in enumerate(paths):
                name = f"{prefixes[kind]}l{number}"
                self._layers[name] = path
                self._number[path] = number
                mine = [self.units[k] for k, found in layer_of.items() if found == path]
                for k, unit in enumerate(mine):
                    kinds = "attn" if not k else ("cross" if _CROSS.search(unit.root) else f"attn{k + 1}")
                    self._unit_names[f"{name} {kinds}"] = unit
        for k, unit in enumerate(self.units):
            if k not in layer_of:
                self._unit_names[f"{unit.root} attn".strip()] = unit

    def _layer_path(self, unit: Unit) -> str | None:
        """The innermost numbered module around an attention that has a perceptron too; else the innermost one."""
        pieces = unit.root.split(".")
        numbered = [".".join(pieces[:k]) for k in range(len(pieces), 0, -1) if pieces[k - 1].isdigit()]
        for path in numbered:
            if any(
                self.parameters[self.aliases[n]].ndim >= 2
                and n.rpartition(".")[0] not in self.norms
                and self.aliases[n] not in self._attention
                for n in self._below(path)
            ):
                return path
        return numbered[0] if numbered else None

    def _mlp(self, layer: str) -> list[str]:
        inside = [unit.root for unit in self.units if unit.root.startswith(f"{layer}.")]
        attention = {name for root in inside for name in self._below(root)}
        found = []
        for name in self._below(layer):
            owner = name.rpartition(".")[0]
            if owner in self.norms or name in attention or self.aliases[name] in self._attention:
                continue
            if any(p.ndim >= 2 for _, p in own_parameters(self.modules[owner])):
                found.append(self.aliases[name])
        return list(dict.fromkeys(found))

    def _below(self, path: str) -> Iterator[str]:
        prefix = f"{path}." if path else ""
        return (name for name in self.aliases if name.startswith(prefix))

    # -- both ends

    def _find_ends(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        if not self._layers and not any(isinstance(m, nn.Embedding) for m in self.modules.values()):
            return found
        paths = {id(m): path for path, m in reversed(self.modules.items())}
        layers = list(self._layers.values())

        def is_outside(path: str) -> bool:
            return not any(path == layer or path.startswith(f"{layer}.") for layer in layers)

        ends = {
            "embed": _asked(self.model, "get_input_embeddings"),
            "unembed": _asked(self.model, "get_output_embeddings"),
        }
        for name, module in ends.items():
            if module is None or id(module) not in paths:
                continue
            if weights := self._matrices(paths[id(module)]):
                found[name] = weights
        outside = [path for path in self._once if is_outside(path)]
        if "embed" not in found:
            tables = [
                p
                for p in outside
                if isinstance(self.modules[p], nn.Embedding) and not _NO_TOKENS.search(p.rpartition(".")[2])
            ] or [p for p in outside if any(n.endswith("W_E") for n, _ in own_parameters(self.modules[p]))]
            patches = [p for p in outside if isinstance(self.modules[p], _CONVOLUTIONS)] if self._layers else []
            for path in (tables or patches)[:1]:
                found["embed"] = self._matrices(path)
        if "unembed" not in found:
            order = {path: k for k, path in enumerate(self._once)}
            after = max((order.get(path, 0) for path in layers), default=0)
            last = [p for p in outside if order[p] > after and isinstance(self.modules[p], _LINEAR)]
            named = [p for p in outside if any(n == "W_U" for n, _ in own_parameters(self.modules[p]))]
            for path in (named or last)[-1:]:
                found["unembed"] = self._matrices(path)
        return found

    def _matrices(self, path: str) -> list[str]:
        """Parameters below a path, without norms, of modules with matrices."""
        found = []
        for name in self._below(path):
            owner = name.rpartition(".")[0]
            if owner not in self.norms and any(p.ndim >= 2 for _, p in own_parameters(self.modules[owner])):
                found.append(self.aliases[name])
        return list(dict.fromkeys(found))

    def _is_block(self, path: str) -> bool:
        module = self.modules[path]
        if not path.rpartition(".")[2].isdigit() or isinstance(module, (nn.Sequential, nn.ModuleList)):
            return False
        inside = [m for m in module.modules() if m is not module and isinstance(m, (*_CONVOLUTIONS, *_LINEAR))]
        return len(inside) > 1 and any(isinstance(m, _CONVOLUTIONS) for m in inside)

    # -- names

    def names(self) -> Iterator[str]:
        """All names, in the model's order; without the heads of attention that is not understood."""
        if "embed" in self._ends:
            yield "embed"
        for name, path in self._layers.items():
            yield name
            for known, unit in self._unit_names.items():
                if known.rpartition(" ")[0] == name:
                    yield from self._names_of(known, unit)
            if self._mlp(path):
                yield f"{name} mlp"
        for known, unit in self._unit_names.items():
            if known.rpartition(" ")[0] not in self._layers:
                yield from self._names_of(known, unit)
        if "unembed" in self._ends:
            yield "unembed"
        yield from self._blocks
        for path, module in self._channels.items():
            if _channel_dim(module) is not None:
                yield from (f"{path} c{k}" for k in range(module.out_channels))
        yield from self.parameters

    def _names_of(self, name: str, unit: Unit) -> Iterator[str]:
        yield name
        if not unit.problem:
            before = self._heads_of(name)
            yield from (f"{before} h{k}" for k in range(unit.heads))
            if unit.groups < unit.heads:
                yield from (f"{before} g{k}" for k in range(unit.groups))
            if self._without_heads(unit):
                yield f"{name} shared"

    @staticmethod
    def _heads_of(name: str) -> str:
        return name.removesuffix(" attn")

    def _without_heads(self, unit: Unit) -> list[str]:
        known = {n for p in unit.projections.values() for n in (p.weight, p.bias)} | unit.extras.keys()
        return [n for n in unit.own if n not in known]

    def normalized(self, name: str) -> str:
        """A name with single spaces; "L0H1" and "l0h1" are "l0 h1"."""
        if name in self.aliases or name in self.modules:
            return self.aliases.get(name, name)
        name = " ".join(name.split())
        if found := re.fullmatch(r"(.*\s)?l(\d+)(?:\s+(cross|attn\d+))?\s*([hg])(\d+)", name, re.IGNORECASE):
            before, layer, kind, letter, number = found.groups()
            name = f"{(before or '').strip()} l{int(layer)} {(kind or '').lower()} {letter.lower()}{int(number)}"
            unit = self._unit_names.get(" ".join(f"{name.rpartition(' ')[0]} {'' if kind else 'attn'}".split()))
            if letter.lower() == "g" and unit is not None and unit.groups == unit.heads:
                name = f"{name.rpartition(' ')[0]} h{int(number)}"
            return " ".join(name.split())
        if re.fullmatch(r"(.*\s)?l\d+(\s+(attn\d*|mlp|cross)(\s+shared)?)?|embed|unembed", name, re.IGNORECASE):
            before, _, rest = name.rpartition(" l") if re.search(r"\sl\d", name) else ("", "", name)
            return f"{before} l{rest.lower()}".strip() if before else name.lower()
        return name

    def parts_of(self, name: str, verifier: Verifier | None) -> dict[str, Part | None] | None:
        """The parameters of a component, and which part of each; None if there is no such component.

        Raises:
            ComponentError: it is there, and its elements are not known.
        """
        if name in self._ends:
            return dict.fromkeys(self._ends[name])
        if name in self._layers:
            return {self.aliases[n]: None for n in self._below(self._layers[name])}
        if name in self._unit_names:
            return dict.fromkeys(self._unit_names[name].own)
        if name in self.parameters:
            return {name: None}
        if name in self._blocks:
            return {self.aliases[n]: None for n in self._below(name)}
        before, _, last = name.rpartition(" ")
        if last == "mlp" and before in self._layers:
            return dict.fromkeys(self._mlp(self._layers[before])) or None
        if last == "shared" and before in self._unit_names:
            unit = self._unit_names[before]
            self._check(unit, name)
            mine = self._own_extras(unit, name, verifier)
            return dict.fromkeys(self._without_heads(unit) + [n for n in unit.extras if n not in mine]) or None
        if re.fullmatch(r"c\d+", last) and before in self._channels:
            return self._channel(before, int(last[1:]))
        attention = self._unit_names.get(before) or self._unit_names.get(f"{before} attn")
        if attention is not None and re.fullmatch(r"[hg]\d+", last):
            return self._heads(attention, name, last[0], int(last[1:]), verifier)
        return None

    def has(self, name: str) -> bool:
        """Whether there is such a component, known or not."""
        before, _, last = name.rpartition(" ")
        attention = self._unit_names.get(before) or self._unit_names.get(f"{before} attn")
        is_unknown = attention is not None and attention.problem and re.fullmatch(r"[hg]\d+|shared", last)
        return bool(is_unknown) or name in set(self.names())

    def _check(self, unit: Unit, name: str) -> None:
        if unit.problem:
            raise ComponentError(
                f"{name!r}: the layout of {unit.tensor!r} is unknown: {unit.problem}. Give masks of your own: "
                f"params={{{unit.tensor!r}: mask}}"
            )

    def _heads(
        self, unit: Unit, name: str, letter: str, number: int, verifier: Verifier | None
    ) -> dict[str, Part | None] | None:
        self._check(unit, name)
        if number >= (unit.heads if letter == "h" else unit.groups):
            return None
        share = unit.heads // unit.groups
        heads = [number] if letter == "h" else range(number * share, (number + 1) * share)
        found: dict[str, Part | None] = {}
        layout = self._believed(unit, name) if verifier is None else verifier.layout(unit, name)
        for head in heads:
            for _, parameter, part in unit.parts(head, layout):
                found[parameter] = part if parameter not in found else part | found[parameter]
            for parameter, dim in self._own_extras(unit, name, verifier).items():
                part = Part(dim, ((head, head + 1),))
                found[parameter] = part if parameter not in found else part | found[parameter]
        return found

    def _own_extras(self, unit: Unit, name: str, verifier: Verifier | None) -> dict[str, int]:
        return unit.extras if verifier is None or not unit.extras else verifier.extras(unit, name)

    def _believed(self, unit: Unit, name: str) -> Layout:
        if unit.believed is None:
            raise ComponentError(
                f"{name!r}: the layout of {unit.tensor!r} can't be read from its shape. Use verify=True, or masks of "
                f"your own: params={{{unit.tensor!r}: mask}}"
            )
        return unit.believed

    def _channel(self, path: str, number: int) -> dict[str, Part | None] | None:
        module = self._channels[path]
        dim = _channel_dim(module)
        if dim is None or number >= module.out_channels:
            return None
        parts = {"weight": Part(dim, ((number, number + 1),)), "bias": Part(0, ((number, number + 1),))}
        return {self.aliases[f"{path}.{n}" if path else n]: parts[n] for n, _ in own_parameters(module)}

    def layer_of(self, name: str, parts: Iterable[str]) -> int | None:
        """The number of the layer that all parameters are in."""
        if name in ("embed", "unembed"):
            return None
        owners = {self.owners[parameter] for parameter in parts}
        found = {
            next((k for path, k in self._number.items() if f"{owner}.".startswith(f"{path}.")), None)
            for owner in owners
        }
        return found.pop() if len(found) == 1 else None


_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_LINEAR = (nn.Linear,)


def _is_norm(path: str, module: nn.Module) -> bool:
    """A normalization: by its class, or by its name if it has nothing but vectors."""
    if "norm" in type(module).__name__.lower():
        return True
    name, own = path.rpartition(".")[2].lower(), own_parameters(module)
    return bool(own) and all(p.ndim <= 1 for _, p in own) and bool(re.match(r"(ln|norm|layer_?norm)|.*norm$", name))


def _is_transposed(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, a linear map whose weight is [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.modules.conv._ConvNd)


def _channel_dim(module: nn.modules.conv._ConvNd) -> int | None:
    """The dimension of a convolution's weight that runs over its output channels; None if it is split into groups."""
    if not getattr(module, "transposed", False):
        return 0
    return 1 if module.groups == 1 else None


def _integers(holder: Any) -> Iterator[int]:
    for key in _HEADS:
        value = holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)
        if type(value) is int and value > 0:
            yield value


def _groups(projections: Mapping[str, Projection], heads: int, out_size: int) -> tuple[int, str]:
    """How many heads of keys and values there are, from shapes, or why they fit no number of heads of queries."""
    shapes = ", ".join(f"{p.weight!r} {tuple(p.shape)}" for p in projections.values())
    problem = f"{heads} heads do not fit the shapes of {shapes}"
    if out_size % heads:
        return 0, problem
    size = out_size // heads

    def outputs(role: str) -> int:
        p = projections[role]
        return p.shape[p.out_dim or 0]

    if "qkv" in projections:
        p = projections["qkv"]
        total = max(p.shape) if p.out_dim is None else p.shape[p.out_dim]
        rest, left = total - heads * size, (total - heads * size) % (2 * size)
        groups = 0 if left else rest // (2 * size)
    elif "kv" in projections:
        groups = 0 if outputs("kv") % (2 * size) else outputs("kv") // (2 * size)
    else:
        groups = 0 if outputs("v") % size else outputs("v") // size
        if groups and outputs("k") % groups:
            groups = 0
    if groups < 1 or heads % groups or ("q" in projections and outputs("q") % heads):
        return 0, problem
    return groups, ""


def _prefixes(stacks: list[str]) -> dict[str, str]:
    """What goes before the names of layers, for each of several stacks: the pieces of its path that differ."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    split = [stack.split(".") for stack in stacks]
    found = {}
    for stack, pieces in zip(stacks, split, strict=True):
        own = [p for k, p in enumerate(pieces) if any(k >= len(o) or o[k] != p for o in split) and p != "#"]
        found[stack] = f"{own[0] if own else stack} "
    if len(set(found.values())) < len(stacks):
        found = {stack: f"{stack} " for stack in stacks}
    return found


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    """What one of Hugging Face's methods returns, of a model or one that it wraps."""
    for holder in (model, getattr(model, "module", None), getattr(model, "_orig_mod", None)):
        ask = getattr(holder, method, None)
        if callable(ask):
            try:
                found = ask()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(found, nn.Module):
                return found
    return None
