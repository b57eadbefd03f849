"""The samplers as ``torch.optim`` optimizers: drop-in replacements for a sampling loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from llc_fast import samplers
from llc_fast.reference import NoiseKey
from llc_fast.samplers import scalars_from
from llc_fast.update import SegmentTable, check_tensor


class LangevinOptimizer(torch.optim.Optimizer):
    """What the sampling optimizers share: anchors, noise bookkeeping, the fused step.

    Everything that a step depends on lives in ``param_groups`` and ``state``, so that ``load_state_dict``
    continues a run bit for bit: each group carries its ``seed``, its ``step`` count and the ``offset`` of its
    first element in the noise; each parameter's state carries ``initial_param``, its w*.
    """

    sampler: type[samplers.SGLD]

    def __init__(self, params: Any, defaults: dict[str, Any], seed: int | None) -> None:
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))  # follows torch.manual_seed
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
        self._tables: dict[int, tuple[object, SegmentTable]] = {}
        super().__init__(params, defaults | {"seed": seed, "step": 0, "offset": 0})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._tables = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unknown = sorted(set(param_group) - set(self.defaults) - {"params", "param_names"})
        if unknown:
            known = ", ".join(k for k in self.defaults if k not in ("step", "offset"))
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}; it takes: {known}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._prepare(group)
        except BaseException:
            self.param_groups.pop()  # a rejected group leaves no trace
            raise

    def _prepare(self, group: dict[str, Any]) -> None:
        hyperparameters = {k: group[k] for k in self._hyperparameters()}
        sampler = self.sampler(**hyperparameters)
        for k, p in enumerate(group["params"]):
            check_tensor(f"parameter {k}", p)
        group["offset"] = sum(p.numel() for g in self.param_groups[:-1] for p in g["params"])
        if sampler.needs_anchor():
            for p in group["params"]:
                self.state[p]["initial_param"] = p.detach().clone(memory_format=torch.contiguous_format)

    def _hyperparameters(self) -> list[str]:
        return [k for k in self.defaults if k in self.sampler.__dataclass_fields__]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in one fused pass per group.

        Args:
            closure: evaluates the loss and its gradients first, as for any torch optimizer.

        Returns:
            The closure's value, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            live = [(k, p) for k, p in enumerate(group["params"]) if p.grad is not None]
            if live:
                table = self._table(index, group, live)
                key = NoiseKey(seed=group["seed"], step=group["step"])
                table.step([p.grad for _, p in live], scalars_from(group), key)
            group["step"] += 1
        return loss

    def _table(self, index: int, group: dict[str, Any], live: list[tuple[int, Tensor]]) -> SegmentTable:
        """The segments of a group's live parameters; rebuilt only when one was moved or replaced."""
        identity = [p.data_ptr() for _, p in live]
        cached = self._tables.get(index)
        if cached is not None and cached[0] == identity:
            return cached[1]
        offsets, total = [], group["offset"]
        for p in group["params"]:
            offsets.append(total)
            total += p.numel()
        anchored = group["localization"] != 0 or group["bounding_box_size"] is not None
        if anchored and any("initial_param" not in self.state[p] for _, p in live):
            raise ValueError(
                "localization or bounding_box_size was switched on after construction, when w* was not kept: "
                "construct the optimizer with it"
            )
        table = SegmentTable(
            [p.detach() for _, p in live],
            [offsets[k] for k, _ in live],
            [self.state[p].get("initial_param") for _, p in live],
            [self._mask(group, k) for k, _ in live],
        )
        self._tables[index] = (identity, table)
        return table

    @staticmethod
    def _mask(group: dict[str, Any], k: int) -> Tensor | None:
        masks: Tensor | Sequence[Tensor | None] | None = group["optimize_over"]
        return masks[k] if isinstance(masks, (list, tuple)) else masks  # type: ignore[return-value]


class SGLD(LangevinOptimizer):
    r"""Stochastic gradient Langevin dynamics as an optimizer, one fused pass per step.

    .. math:: w ← w − \tfrac{ε}{2}\,[nβ\,g + γ(w − w_0) + μ\,w] + σ\sqrt{ε}\,ξ

    with g the gradient of the mean minibatch loss and w₀ the parameters at construction (Welling & Teh 2011;
    Lau et al. 2023). Names, defaults and meaning follow devinterp 1.3.2; the noise is a function of
    (seed, step, element), so a run repeats bit for bit for any number of threads.

    Example:
        >>> sampler = llc_fast.SGLD(model.parameters(), lr=1e-5, nbeta=1000.0, localization=100.0)
        >>> loss_fn(model(x), y).backward(); sampler.step(); sampler.zero_grad()

    Args:
        params: parameters or parameter groups (float32 or float64); groups may override every option.
        lr: step size ε.
        nbeta: inverse temperature nβ.
        localization: γ, the pull towards the parameters at construction.
        weight_decay: μ, the pull towards zero.
        noise_level: σ.
        bounding_box_size: elementwise bound on \|w − w₀\|; None for no box.
        optimize_over: boolean mask, True where a parameter may move: one tensor that broadcasts to every
            parameter of the group, or a list with one tensor or None for each.
        seed: of the noise; None takes it from torch's global generator.

    Raises:
        TypeError, ValueError: an option that is unknown, not finite or out of range; parameters that are not
            dense floating-point tensors with data.
    """

    sampler = samplers.SGLD

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        nbeta: float = 1.0,
        localization: float = 0.0,
        weight_decay: float = 0.0,
        noise_level: float = 1.0,
        bounding_box_size: float | None = None,
        optimize_over: Tensor | list[Tensor | None] | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "nbeta": nbeta,
            "localization": localization,
            "weight_decay": weight_decay,
            "noise_level": noise_level,
            "bounding_box_size": bounding_box_size,
            "optimize_over": optimize_over,
        }
        super().__init__(params, defaults, seed)
