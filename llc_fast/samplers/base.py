"""What all samplers have in common, and what a sampler says of itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from llc_fast.kernels.native import NUM_STATES
from llc_fast.kernels.step import SUMS, StepScalars
from llc_fast.support.arguments import check_number

Kind = Literal["langevin", "momentum", "thermostat", "metropolis", "unknown"]
Metric = Literal["identity", "given", "adaptive", "kronecker", "unknown"]


@dataclass(frozen=True)
class Sampler:
    r"""What all samplers have in common: the localized tempered potential nβ·L(w) + γ/2·‖w − w*‖² + μ/2·‖w‖².

    Attributes:
        lr: step size ε > 0; None: chosen later.
        nbeta: inverse temperature nβ > 0 of the mean loss, n / log n is Watanabe's choice; None: chosen later.
        localization: γ ≥ 0; None: left open, which is 0 in a sampler that stands alone, and
            :func:`llc_fast.default_localization` in `estimate_llc`.
        weight_decay: μ ≥ 0, a Gaussian prior around zero.
        noise_level: σ ≥ 0; anything but 1 no longer samples the posterior.
        bounding_box_size: b > 0, the elementwise bound on \|w − w*\|, or None for no box.

    Raises:
        TypeError, ValueError: a value that is not a number, not finite or out of range.
    """

    # What a sampler can do. Whoever needs a capability asks for it here; nothing else in the package knows samplers by
    # name. Each default is the careful answer: a new rule that says nothing is sampled as it is, with the step size
    # that the user gives, and nothing is corrected, measured or chosen for it.

    name: ClassVar[str]
    kind: ClassVar[Kind] = "unknown"
    """``"langevin"``: w' = w − (ε/2)·p·∇U(w) + √(εp)·ξ in a metric 1/p, the proposal of MALA;
    ``"momentum"``: the drift is averaged over steps; ``"thermostat"``: so it is, with a friction that follows the
    kinetic energy; ``"metropolis"``: proposals are accepted or rejected by the loss over the whole data set, which
    an optimizer does not see."""
    metric: ClassVar[Metric] = "unknown"
    """p is 1, the option ``preconditioner``, or learned from gradients and frozen before the draws; ``"kronecker"``: a
    matrix for each weight matrix, learned from the Gauss–Newton matrix and frozen before the draws."""
    supports_bias_correction: ClassVar[bool] = False
    """Whether :meth:`bias` holds."""
    has_optimizer: ClassVar[bool] = True
    """Whether its transition is one fused step with a given gradient, which an optimizer can make."""
    target_bias_share: ClassVar[float] = 0.1
    """The share of bias in nβ·(L − L(w*)) that pilot chains aim at, and which may double to the end of the run: small
    enough that subtracting it is right in wells that are not quite quadratic."""
    momentum_variant: ClassVar[str | None] = None
    """The name of the sampler that is this one where its option ``momentum_decay`` is 1."""
    structured_variant: ClassVar[str | None] = None
    """The name of the sampler of the same posterior in a metric that is no diagonal, which pilots may change to."""
    traces: ClassVar[tuple[str, ...]] = ("squared_distance",)
    """The names of what its transitions report of every step, as :meth:`info` does for those of one fused step."""

    lr: float | None = None
    nbeta: float | None = None
    localization: float | None = None
    weight_decay: float = 0.0
    noise_level: float = 1.0
    bounding_box_size: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "bounding_box_size"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), minimum=0, exclusive=True)
        for name in ("nbeta", "localization"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), minimum=0)
        for name in ("weight_decay", "noise_level"):
            check_number(name, getattr(self, name), minimum=0)

    @property
    def localizes_in_metric(self) -> bool:
        """Whether γ pulls in the sampler's own metric: γ/2·(w − w*)ᵀA⁻¹(w − w*)."""
        return getattr(self, "localization_metric", None) == "sampler"

    # ---- capabilities that depend on options; `options` are ``vars(sampler)`` or an optimizer's group -------

    @classmethod
    def drift_lag(cls, options: Mapping[str, Any]) -> float:
        """Steps by which the drift lags behind w; NaN: unknown."""
        return math.nan

    @classmethod
    def injected_noise(cls, options: Mapping[str, Any]) -> float:
        """The variance of the noise that a step adds, over ε·p, to compare gradient noise with; NaN: unknown."""
        return math.nan

    @classmethod
    def feedback_sums(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The sums of a step that :meth:`follow` reads, names of ``llc_fast.kernels.step``."""
        return ()

    @classmethod
    def sums_needed(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The sums that a chain needs of each step: those that are fed back, ‖w − w*‖², and the bias."""
        return (*cls.feedback_sums(options), "distance", *(("bias",) if cls.supports_bias_correction else ()))

    @classmethod
    def needs_whole_step(cls, options: Mapping[str, Any]) -> bool:
        """Whether parameters can't be moved one by one, each as soon as its gradient is there."""
        return cls.kind == "metropolis" or bool(cls.feedback_sums(options))

    @classmethod
    def adapts_on_host(cls, options: Mapping[str, Any]) -> bool:
        """Whether what is fed back are numbers of one chain, read from its device at every step, not tensors there."""
        return bool(cls.feedback_sums(options))

    @classmethod
    def needs_reference(cls, options: Mapping[str, Any]) -> bool:
        """Whether the rule reads w*."""
        return bool(options["localization"]) or options["bounding_box_size"] is not None

    # ---- the step ------------------------------------------------------------------------------------------

    @classmethod
    def rule(cls) -> str:
        """The native module's update rule."""
        return cls.name

    @classmethod
    def bytes_moved(cls, low: bool = False, chains: int = 1) -> float:
        """What a step can't avoid moving, in bytes per float32 parameter of each chain.

        w, gradient and w* are read and w is written; a given metric is read; each state is read and written.

        Args:
            low: the gradient is bfloat16, and a bfloat16 copy of w is written.
            chains: that step together: they share w* and metric, which are read once.
        """
        gradient, copy = (2, 2) if low else (4, 0)
        shared = 8 if cls.metric == "given" else 4
        return 8 + gradient + copy + 8 * NUM_STATES[cls.rule()] + shared / chains

    @classmethod
    def extra_work(cls, shapes: Sequence[Sequence[int]], gradient: float, num_steps: int) -> tuple[float, float]:
        """What a step computes beside the gradient and the pass over all parameters, on the mean over a run.

        Args:
            shapes: of the parameters.
            gradient: floating-point operations of a gradient.
            num_steps: of the run.

        Returns:
            Floating-point operations, and calls of torch's operations.
        """
        return 0.0, 0.0

    @classmethod
    def extra_bytes(cls, shapes: Sequence[Sequence[int]], width: int) -> int:
        """What a chain keeps beside w and the rule's states, with parameters of these shapes and elements so wide."""
        return 0

    @classmethod
    def scalars(cls, options: Mapping[str, Any]) -> StepScalars:
        """One step's scalars from a mapping of hyperparameters: ``vars(sampler)``, an optimizer's group.

        Schedulers change these between steps, so what could make a step silently wrong is checked again here.

        Raises:
            TypeError: lr or nbeta is still open.
            ValueError: a number that is negative or not finite.
        """
        if options["lr"] is None or options["nbeta"] is None:
            name = "lr" if options["lr"] is None else "nbeta"
            raise TypeError(f"{name} must be a number, got None: give it, as in dataclasses.replace(sampler, {name}=…)")
        lr, nbeta = float(options["lr"]), float(options["nbeta"])
        localization, decay = float(options["localization"] or 0.0), float(options["weight_decay"])
        noise, box = float(options["noise_level"]), options["bounding_box_size"]
        scalars = StepScalars(lr, nbeta, localization, decay, noise, math.inf if box is None else float(box))
        # Sums carry NaN and infinity along: two comparisons see all values. This runs at every step.
        if not (min(scalars[:5]) >= 0 and sum(scalars[:5]) < math.inf and scalars.bounding_box > 0):
            raise ValueError(
                f"hyperparameters must be finite and not negative, got lr={lr}, nbeta={nbeta}, "
                f"localization={localization}, weight_decay={decay}, noise_level={noise}, bounding_box_size={box}"
            )
        return scalars

    @classmethod
    def initial_state(
        cls, w: Tensor, offset: int, options: Mapping[str, Any], seed: int, chain: int = 0
    ) -> list[Tensor]:
        """What the rule keeps for parameter `w`, whose first element is `offset` in the noise: zeros to begin with."""
        return [torch.zeros_like(w, memory_format=torch.contiguous_format) for _ in range(NUM_STATES[cls.rule()])]

    # ---- adaptation: what a sampler feeds back from a step's sums to the next step ---------------------------
    # `adaptation` is where these variables live: a tensor with a row for each chain, or a number. An optimizer's group
    # serves as options and adaptation in one.

    @classmethod
    def initial_adaptation(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """The variables of one chain, before its first step."""
        return {}

    @classmethod
    def adapted(
        cls,
        scalars: StepScalars,
        options: Mapping[str, Any],
        adaptation: MutableMapping[str, Any],
        step: int,
        grads: Sequence[Tensor],
        masks: Sequence[Tensor | None],
    ) -> StepScalars:
        """The scalars of a step, by what earlier steps have left in `adaptation`."""
        return scalars

    @classmethod
    def follow(
        cls, scalars: StepScalars, adaptation: MutableMapping[str, Any], step: int, sums: Tensor, count: int
    ) -> None:
        """Move `adaptation` after a step with these `sums` over `count` elements."""

    @classmethod
    def frozen_metric(cls, scalars: StepScalars, states: Sequence[Tensor]) -> Tensor | float:
        """p of a step whose metric no longer adapts, without the option ``preconditioner``; NaN: unknown.

        Args:
            scalars: of the step, as :meth:`adapted` gives them.
            states: what the rule keeps.
        """
        return 1.0 if cls.metric in ("identity", "given") else math.nan

    # ---- what a step says of itself --------------------------------------------------------------------------

    @classmethod
    def bias(cls, scalars: StepScalars, sums: Any) -> Any:
        r"""The bias of a step: (ε/8)·Σ p·G·nβg, what step size and gradient noise add to nβ·(L − L(w*)).

        G is the drift that the step used. In a stationary chain ‖w − w*‖² does not grow. In a direction of a quadratic
        well where U has curvature a = nβh + γ, w' = w − (ε/2)pG + √(εp)ξ then gives a·E[(w − w*)²] = 1 + (ε/4)·E[pG²].
        The posterior has 1 there. Half of the rest is in U, and the loss has the share nβh/a of it, which is the share
        that nβg has in G. So the bias is exact for any step size. Minibatch noise is counted whole in directions where
        γ is larger than nβh. Directions in which the loss is flat count nothing, wherever the chain is in them.

        Args:
            scalars: of the step.
            sums: of the step, float64 ``[num_chains, sum]``, a tensor or an array.

        Returns:
            One number for each chain, in units of λ.
        """
        return scalars.nbeta * sums[:, SUMS.index("bias")]

    @classmethod
    def info(cls, scalars: StepScalars, sums: Any, adaptation: Mapping[str, Any]) -> dict[str, Any]:
        """The quantities named in :attr:`traces` after a step, ``[num_chains]`` each."""
        found = {"squared_distance": sums[:, SUMS.index("distance")]}
        return found | ({"bias": cls.bias(scalars, sums)} if cls.supports_bias_correction else {})
