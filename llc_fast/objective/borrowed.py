"""The user's model on loan: its parameters hold a chain's values for a while, and everything is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llc_fast.kernels.sharding import is_dtensor
from llc_fast.support.randomness import held_by
from llc_fast.support.torch_private import accumulation_hooks, is_held, swap_contents, version_of

_CONTAINERS = (list, dict, set)


class BorrowedModel:
    """A model whose own ``Parameter`` objects are given the memory of a chain as their data.

    So whatever looks at them sees the chain's values: forward, activations that are recomputed during backward, a
    custom backward that reads ``module.weight``, a list of parameters that the loss function keeps. Autograd, too,
    looks at a parameter again during backward: it must be inside :meth:`holding`, as forward is.

    Args:
        model: the user's.

    Attributes:
        parameters: its parameters by name, tied ones once.
        buffers: its buffers by name.
        wrote_parameters, wrote_buffers: names of those that some forward pass has written to so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self.wrote_parameters: set[str] = set()
        self.wrote_buffers: set[str] = set()
        self._own = {name: p.data for name, p in self.parameters.items() if not is_dtensor(p)}
        self._held = {name for name in self._own if is_held(self.parameters[name])}
        self._stand_ins: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._own_buffers = {name: b.data for name, b in self.buffers.items()}
        names = {id(b): name for name, b in self.buffers.items()}
        self._places = [
            (module, key, names[id(b)])
            for module in model.modules()
            for key, b in module._buffers.items()
            if b is not None and id(b) in names
        ]

    def move_to(self, device: torch.device) -> None:
        """Move what is elsewhere to a device, as long as the model is on loan; :class:`ModelSnapshot` puts it back.

        Not at every evaluation: autograd forgets a leaf whose data move to another device between forward and backward.
        """
        for name, data in self._own.items():
            if data.device != device:
                p = self.parameters[name]
                p.grad = None  # which may be on no other device than the data
                p.data = self._own[name] = data.to(device)
        for name, data in self._own_buffers.items():
            if data.device != device:
                self.buffers[name].data = self._own_buffers[name] = data.to(device)

    def holding(
        self, values: Mapping[str, Tensor], fixed: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Parameters and buffers with the data of these tensors; what forward writes goes to their memory.

        Gradients that the parameters had are out of sight meanwhile.

        Args:
            values: what gradients are taken with respect to; the parameters themselves are the leaves.
            fixed: other parameters that forward must not write to, or that are needed in another precision.
            buffers: a chain's own; those that are left out stay the model's.
        """
        return _Holding(self, values, fixed, buffers)

    def versions(self) -> dict[str, int]:
        """How often each parameter and buffer has been written to in place, by name."""
        return {name: version_of(t) for tensors in (self.parameters, self.buffers) for name, t in tensors.items()}

    def _lend(self, name: str, value: Tensor) -> None:
        """Give a parameter the memory of a value.

        Autograd forgets where the gradients of a leaf go when its data change their type. DistributedDataParallel has
        its hooks there, and would from then on train every process for itself, without a word. So a parameter that
        somebody holds gets another tensor's content for a while instead, the same one in forward and backward.
        """
        p = self.parameters[name]
        if name not in self._held or _is_alike(p, value):
            p.data = value
            return
        key = (name, value.dtype, value.device)
        stand_in = self._stand_ins.setdefault(key, torch.empty(0, dtype=value.dtype, device=value.device))
        stand_in.data = value
        stand_in.requires_grad_(p.requires_grad)
        swap_contents(p, stand_in)

    def _take_back(self, name: str) -> None:
        p, own = self.parameters[name], self._own[name]
        if name in self._held and not _is_alike(p, own):
            swap_contents(p, self._stand_ins[name, p.dtype, p.device])
        p.data = own

    def _put_buffers_back(self, buffers: Mapping[str, Tensor]) -> None:
        for module, key, name in self._places:
            b, found = self.buffers[name], module._buffers.get(key)
            if found is not b:  # forward assigned another tensor
                if found is not None and name in buffers:
                    self._keep(found, buffers[name], self.wrote_buffers, name)
                module._buffers[key] = b
        for name, value in buffers.items():
            b = self.buffers[name]
            if b.layout is torch.strided and b.data_ptr() != value.data_ptr():
                self._keep(b, value, self.wrote_buffers, name)
            b.data = self._own_buffers[name]

    def _keep(self, found: Tensor, value: Tensor, wrote: set[str], name: str) -> None:
        wrote.add(name)
        if found.shape == value.shape:
            value.detach().copy_(found.detach())


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether autograd sees no difference of kind between two tensors."""
    return a.dtype == b.dtype and a.device == b.device


def plain_attributes(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of all modules that say how often they were called: numbers, texts, and how long containers are.

    Hooks and submodules do not count, nor what is no attribute of Python's (a scripted module's).
    """
    return [
        {name: v if isinstance(v, _PLAIN) else len(v) for name, v in vars(m).items() if name[:1] != "_" and _counts(v)}
        for m in model.modules()
    ]


def tensor_attributes(model: nn.Module) -> list[dict[str, Tensor]]:
    """Copies of tensors that are attributes of modules, but neither parameters nor buffers.

    One that a forward pass computes from the parameters, as weight norm does, is the same after another pass; one that
    is not counts or averages, as metrics do.
    """
    return [
        {name: v.detach().clone() for name, v in vars(m).items() if type(v) is Tensor and v.layout is torch.strided}
        for m in model.modules()
    ]


_PLAIN = (bool, int, float, str, bytes, complex)


def _counts(value: object) -> bool:
    return isinstance(value, (*_PLAIN, *_CONTAINERS))


class _Holding:
    """See :meth:`BorrowedModel.holding`."""

    def __init__(
        self,
        borrowed: BorrowedModel,
        values: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._borrowed, self._values, self._fixed, self._buffers = borrowed, values, fixed, buffers
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._hooks: list[tuple[dict[int, Any], dict[int, Any]]] = []

    def __enter__(self) -> None:
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise

    def _begin(self) -> None:
        borrowed, values = self._borrowed, self._values
        parameters = borrowed.parameters
        for name in borrowed._own:
            p = parameters[name]
            if p.requires_grad is not (name in values):
                self._flags.append((p, p.requires_grad))
                p.requires_grad_(name in values)
            if p.grad is not None:
                self._grads.append((p, p.grad))
                p.grad = None
            if found := accumulation_hooks(p):  # an optimizer that steps during backward must not see the chain's
                self._hooks.append((found, dict(found)))
                found.clear()
        torch.clear_autocast_cache()  # of the caller's autocast: it knows a parameter by its identity
        for name, value in (*values.items(), *self._fixed.items()):
            borrowed._lend(name, value)
        for name, value in self._buffers.items():
            borrowed.buffers[name].data = value

    def __exit__(self, *_: object) -> None:
        borrowed = self._borrowed
        parameters, own = borrowed.parameters, borrowed._own
        for given in (self._values, self._fixed):
            for name, value in given.items():
                p = parameters[name]
                if p.data_ptr() != value.data_ptr() and p.data_ptr() != own[name].data_ptr():  # forward set .data
                    borrowed._keep(p, value, borrowed.wrote_parameters, name)
                borrowed._take_back(name)
        torch.clear_autocast_cache()
        if self._buffers:
            borrowed._put_buffers_back(self._buffers)
        for p, flag in self._flags:
            p.requires_grad_(flag)
        for name in self._values:
            p = parameters[name]
            if p.grad is not None:
                p.grad = None
        for p, grad in self._grads:
            p.grad = grad
        for found, content in self._hooks:
            found.update(content)


# ---- what a run may leave behind on modules ---------------------------------------------------------------------


class ModelSnapshot:
    """What a model is made of, apart from the values of its tensors, to be put back after a run.

    Forward passes write attributes (the weight that weight_norm computes, counters, caches), and an interrupt may come
    in the middle of anything. Attributes that are lists, dictionaries or sets are restored with their content, tensors
    that are plain attributes with their values. Of other models, such as a teacher that the loss calls, buffers too.

    Args:
        model: the user's; anything else that is no module, such as nothing, has nothing to be put back.
        loss_fn: searched for modules that it holds or refers to.
    """

    def __init__(self, model: object, loss_fn: object = None) -> None:
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        mine = set(map(id, modules))
        others = [m for m in held_by([loss_fn]) if isinstance(m, nn.Module) and id(m) not in mine]
        modules += others
        self._modules = [(vars(m), dict(vars(m))) for m in modules]
        self._lightning = [vars(m) for m in modules if _is_lightning(m)]
        self._content: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        for m in modules:
            for value in vars(m).values():
                self._remember(value, depth=0)
        for b in (b for m in others for b in m._buffers.values() if b is not None):
            self._tensors.append((b, version_of(b), b.clone()))
        tensors: list[Tensor] = []
        for m in modules:
            tensors += [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        unique = {id(t): t for t in tensors}.values()
        self._held = [(t, t.data, t.requires_grad, t.grad if t.is_leaf else None) for t in unique if not is_dtensor(t)]
        self._hooks = [(t, dict(accumulation_hooks(t) or {})) for t, *_ in self._held if t.is_leaf]

    def _remember(self, value: Any, depth: int) -> None:
        if type(value) is Tensor and not value.requires_grad:
            self._tensors.append((value, version_of(value), value.clone()))
        elif isinstance(value, _CONTAINERS) and depth < 4:
            copied: Any = value.copy()
            self._content.append((value, copied))
            for entry in list(value.values()) if isinstance(value, dict) else list(value):
                if not isinstance(entry, nn.Parameter):
                    self._remember(entry, depth + 1)

    def silence(self) -> None:
        """Until :meth:`restore`, modules of Lightning log nothing.

        A loss may be their ``training_step``. Outside of training its ``self.log`` warns, or raises if the module still
        knows the trainer that it had.
        """
        for attributes in self._lightning:
            attributes["log"] = attributes["log_dict"] = _ignore

    def restore(self) -> None:
        """Put everything back; may be called twice."""
        for attributes, before in self._modules:
            if attributes.keys() != before.keys() or any(attributes[k] is not v for k, v in before.items()):
                attributes.clear()
                attributes.update(before)
        for container, content in self._content:
            if isinstance(container, list):
                if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
                    container[:] = content
            elif isinstance(container, dict):
                if list(container) != list(content) or any(container[k] is not v for k, v in content.items()):
                    container.clear()
                    container.update(content)
            elif container != content:
                container.clear()
                container.update(content)
        for tensor, data, requires_grad, grad in self._held:
            if tensor.layout is not torch.strided:
                continue
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape or tensor.stride() != data.stride():
                tensor.data = data
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
        for tensor, hooks in self._hooks:
            found = accumulation_hooks(tensor)
            if found is not None and found != hooks:
                found.clear()
                found.update(hooks)
        with torch.no_grad():
            for tensor, version, value in self._tensors:
                # Batch normalization writes its statistics without a word to autograd.
                silently = tensor.layout is torch.strided and not torch.equal(tensor, value)
                if silently or version_of(tensor) != version:
                    tensor.copy_(value)


def _is_lightning(module: nn.Module) -> bool:
    """Whether a module is one of Lightning's, under either name of that package, which need not be imported here."""
    return any(
        c.__name__ == "LightningModule" and c.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
        for c in type(module).__mro__
    )


def _ignore(*args: object, **kwargs: object) -> None:
    """A call that does nothing."""
