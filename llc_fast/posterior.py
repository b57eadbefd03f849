"""Model + loss + data = the localized, tempered posterior that chains sample."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llc_fast.data import Batch, DataSource
from llc_fast.update import check_tensor

LossFunction = Callable[[Any, Any], Tensor]


class Posterior:
    """p(w) ∝ exp(−nβ·L(w) − γ/2·‖w − w*‖²), with w* the model's parameters, which are never written to.

    Chains evaluate the model with their own parameters through ``torch.func.functional_call``: the model keeps
    w*, so that w* is in memory once.

    Args:
        model: the trained model, in the mode (train or eval) it is to be judged in.
        loss_fn: ``loss_fn(output, target) -> scalar``, the mean loss of a batch.
        source: the data.
        device: where to compute; parameters elsewhere are copied there.
        params: names or glob patterns of the parameters to sample; None: all that require a gradient.

    Raises:
        TypeError, ValueError: nothing to sample, unknown names, unsupported tensors, a loss that is not a finite
            scalar or does not depend on the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        source: DataSource,
        *,
        device: torch.device,
        params: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable as loss_fn(output, target), got {type(loss_fn).__name__}")
        self.model, self.loss_fn, self.source, self.device = model, loss_fn, source, device
        named = dict(model.named_parameters())  # tied parameters once
        sampled = _select(named, params)
        for name, p in named.items():
            if name in sampled:
                check_tensor(f"parameter {name!r}", p)
        if len(dtypes := {named[name].dtype for name in sampled}) > 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"the parameters to sample have several dtypes ({found}): convert the model to one")
        self.anchor = {name: named[name].detach().to(device) for name in sampled}
        self._frozen = {name: p.detach().to(device) for name, p in named.items() if name not in sampled}
        self._buffers = {name: b.to(device) for name, b in model.named_buffers()}
        self.unused = self._check_loss()

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.anchor.values())

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers: a chain may write to its own (batch-norm statistics)."""
        return {name: b.clone() for name, b in self._buffers.items()}

    def loss(self, params: dict[str, Tensor], batch: Batch, buffers: dict[str, Tensor]) -> Tensor:
        """Mean loss of one minibatch at the given parameters."""
        output = functional_call(self.model, (params, self._frozen, buffers), batch[:-1])
        return self.loss_fn(output, batch[-1])

    def full_loss(self) -> float:
        """L(w*), the mean over the whole data set, accumulated in float64.

        Raises:
            ValueError: it is not finite, or the data give no sample.
        """
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        buffers = self.fresh_buffers()
        with torch.no_grad():
            for batch, size in self.source.full():
                total += self.loss(self.anchor, batch, buffers).to(torch.float64) * size
                count += size
        if count == 0:
            raise ValueError("data is empty: it has no samples")
        value = float(total) / count
        if not torch.isfinite(torch.tensor(value)):
            raise ValueError(f"the loss at w* over the whole data set is {value}: check the model and the data")
        return value

    def _check_loss(self) -> list[str]:
        """One forward and backward pass at w*; returns the names of parameters that the loss never uses."""
        batch = next(iter(self.source.minibatches(seed=0)))
        leaves = {name: p.clone().requires_grad_() for name, p in self.anchor.items()}
        with torch.enable_grad():
            loss = self.loss(leaves, copy.deepcopy(batch), self.fresh_buffers())
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
        if loss.numel() != 1 or loss.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}: use reduction='mean'")
        if not torch.isfinite(loss):
            raise ValueError(f"loss_fn returned {loss.item()} at w*: check the model and the data")
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the parameters to sample (it has no gradient): does the model or "
                "loss_fn use .detach(), torch.no_grad() or .item()?"
            )
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        unused = [name for name, g in zip(leaves, grads, strict=True) if g is None]
        if len(unused) == len(leaves):
            raise ValueError("the loss does not depend on the parameters to sample (it has no gradient)")
        self._check_mean(loss, batch)
        return unused

    def _check_mean(self, loss: Tensor, batch: Batch) -> None:
        """A loss that is a sum over the batch would make λ̂ wrong by the batch size; a mean ignores repetition."""
        tensors = all(isinstance(b, Tensor) and b.ndim > 0 for b in batch)
        value = abs(float(loss.detach()))
        if not tensors or value == 0:
            return
        twice = tuple(torch.cat([b, b]) for b in batch)
        with torch.no_grad():
            again = float(self.loss(self.anchor, copy.deepcopy(batch), self.fresh_buffers()))
            if abs(abs(again) - value) > 1e-3 * value:
                return  # a random loss: two values say nothing
            repeated = abs(float(self.loss(self.anchor, twice, self.fresh_buffers())))
        if repeated > 1.8 * value:
            raise ValueError(
                "loss_fn sums over the batch (repeating a batch doubles it); λ̂ = nβ(mean L − L(w*)) needs the mean: "
                "use reduction='mean'"
            )


def _select(named: dict[str, nn.Parameter], params: Iterable[str] | None) -> list[str]:
    if not named:
        raise ValueError("the model has no parameters: nothing to sample")
    if params is None:
        chosen: Sequence[str] = [name for name, p in named.items() if p.requires_grad]
        if not chosen:
            raise ValueError("no parameter requires a gradient: nothing to sample; set requires_grad_(True)")
        return list(chosen)
    if not isinstance(params, Iterable):
        raise TypeError(f"params must hold names or glob patterns, got {type(params).__name__}")
    patterns = [params] if isinstance(params, str) else list(params)
    if not patterns:
        raise ValueError("params is empty: nothing to sample")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"params must hold names or glob patterns, got {type(pattern).__name__}")
        if not fnmatch.filter(named, pattern):
            raise ValueError(f"params={pattern!r} matches no parameter; the model has: {', '.join(list(named)[:20])}")
    return [name for name in named if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
