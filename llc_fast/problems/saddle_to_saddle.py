"""Deep linear networks that learn the singular values of a teacher one by one (Saxe et al. 2014; Jacot et al. 2021).

Trained from small weights, a network f_w(x) = W_L ⋯ W_1 x goes from saddle to saddle: it stays near a product of rank
k, which has the teacher's k largest singular values, while the next one grows unseen, and then steps up to rank k + 1
at once. The smaller the first weights are, the sharper the steps. All layers keep the rank of the product, since
gradient descent keeps W_{l+1}ᵀ W_{l+1} − W_l W_lᵀ as small as it was in the beginning: a singular value s of the
product is s^{1/L} in each layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llc_fast.problems.deep_linear import end_to_end, network


def small_weights(widths: Sequence[int], scale: float, generator: torch.Generator) -> list[Tensor]:
    """Gaussian weights of standard deviation scale/√fan_in in float64, each ``[fan_out, fan_in]``."""
    return [
        torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64) * (scale / fan_in**0.5)
        for fan_in, fan_out in itertools.pairwise(widths)
    ]


def balanced_weights(
    widths: Sequence[int], singular_values: Sequence[float], generator: torch.Generator
) -> list[Tensor]:
    """Weights whose product has these singular values and whose layers have their L-th roots, and no others.

    All layers have the rank of the product, which makes it the most singular point with that product: its local
    learning coefficient is the global one, :func:`llc_fast.theory.deep_linear`. Singular vectors are random; float64.

    Raises:
        ValueError: there are more singular values than a layer can have.
    """
    rank, layers = len(singular_values), len(widths) - 1
    if rank > min(widths):
        raise ValueError(
            f"{rank} singular values do not fit through widths={tuple(widths)}: give {min(widths)} at most"
        )
    roots = torch.tensor(singular_values, dtype=torch.float64) ** (1 / layers)
    frames = [
        torch.linalg.qr(torch.randn(width, max(rank, 1), generator=generator, dtype=torch.float64))[0][:, :rank]
        for width in widths
    ]
    return [(after * roots) @ before.T for before, after in itertools.pairwise(frames)]


@dataclass(frozen=True)
class SaddleToSaddle:
    """A linear teacher y = A x, n inputs, and the loss that a deep linear network has on them.

    L(w) = mean over samples and outputs of (f_w(x) − A x)² depends on the inputs through their second moment
    Σ = mean of x xᵀ alone, L = tr((W − A) Σ (W − A)ᵀ) / outputs with W the product of the weights, so that a step of
    training takes no longer than a few products of small matrices, whatever n.

    Attributes:
        teacher: A, float64 ``[outputs, inputs]``.
        inputs: x, float32 ``[n, inputs]``, standard normal.
        second_moment: Σ of these very inputs, float64.
    """

    teacher: Tensor
    inputs: Tensor
    second_moment: Tensor

    @classmethod
    def make(
        cls, inputs: int, outputs: int, singular_values: Sequence[float], num_samples: int, generator: torch.Generator
    ) -> SaddleToSaddle:
        """A teacher with these singular values and random singular vectors, and standard normal inputs."""
        teacher = end_to_end(balanced_weights((inputs, outputs), singular_values, generator))
        x = torch.randn(num_samples, inputs, generator=generator)
        # In pieces: float64 copies of a million samples are large.
        moment = torch.zeros(inputs, inputs, dtype=torch.float64)
        for piece in torch.split(x, 65536):
            moment += piece.double().T @ piece.double()
        return cls(teacher, x, moment / num_samples)

    def loss(self, weights: Sequence[Tensor]) -> float:
        """The mean squared error of the network with these weights."""
        return self.distance(end_to_end(weights), self.teacher)

    def distance(self, product: Tensor, other: Tensor) -> float:
        """The mean of (product·x − other·x)² over samples and outputs."""
        gap = product - other
        return float(((gap @ self.second_moment) * gap).sum() / len(gap))

    def step(self, weights: Sequence[Tensor], lr: float) -> list[Tensor]:
        """The weights after a step of gradient descent over all samples, w − lr·∇L(w)."""
        below = list(itertools.accumulate(weights[:-1], lambda product, weight: weight @ product))  # W_l ⋯ W_1
        error = (weights[-1] @ below[-1] if below else weights[0]) - self.teacher
        back = (2 / len(error)) * error @ self.second_moment
        gradients: list[Tensor] = []
        for layer in range(len(weights) - 1, -1, -1):
            gradients.append(back @ below[layer - 1].T if layer else back)
            back = weights[layer].T @ back
        return [weight - lr * gradient for weight, gradient in zip(weights, reversed(gradients), strict=True)]


class LinearDeviation(nn.Module):
    """f_w(x) − A x, with A in a buffer: a state dict holds the network and what it is held against.

    With A the product of the network's own weights the mean square of the output is the *behavioural* loss,
    E‖f_w(x) − f_{w*}(x)‖², of which w* is a minimum whatever it is (Bushnaq et al. 2024, arXiv 2405.10927); with A the
    teacher it is the loss of training.

    Args:
        weights: of the layers, each ``[fan_out, fan_in]``; kept in float32.
        reference: A, ``[outputs, inputs]``.
    """

    reference: Tensor

    def __init__(self, weights: Sequence[Tensor], reference: Tensor) -> None:
        super().__init__()
        self.layers = network(list(weights))
        self.register_buffer("reference", reference.to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The deviation, ``[batch, outputs]``."""
        deviation: Tensor = self.layers(x) - x @ self.reference.T
        return deviation


def behavioural(weights: Sequence[Tensor]) -> LinearDeviation:
    """The network with these weights, held against itself as it is now."""
    rounded = [weight.to(torch.float32) for weight in weights]  # as the layers have them
    return LinearDeviation(rounded, end_to_end(rounded))


def mean_square(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The mean square of a model's output, one for each sample: the loss that goes with :class:`LinearDeviation`."""
    output: Tensor = model(batch[0])
    return output.square().mean(dim=1)
