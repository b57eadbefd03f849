"""Residual networks of basic blocks (He et al. 2016, arXiv 1512.03385) of any width, for small images.

They are normalized by groups of channels (Wu & He 2018, arXiv 1803.08494) and not by batches, for the sake of the
learning coefficient. λ belongs to a loss L(w) = (1/n)·Σ ℓ(w, sample) that is the same function of w in training and in
sampling. With batch norm in training mode a sample's loss depends on the company it is in, so that there is no such
function; in evaluation mode there is one, but with statistics of the past: they lag behind w* in training, which makes
w* no minimum of it, and do not follow chains that leave w*. Group norm has no statistics to keep.

Like batch norm it makes the scale of the filters before it free: w → c·w for all filters of a group, c > 0, changes
nothing (up to the norm's ε). These directions are exactly flat, and L is the steeper the shorter w is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP = 16
"""Channels of a group in wide networks, as in Wu & He; networks that are narrower than that have groups of `width`."""
_STAGES = 4


class BasicBlock(nn.Module):
    """Two convolutions and a way around them: relu(x' + f(x)), x' = x or, where the shape changes, a 1 × 1 convolution.

    Args:
        channels_in, channels_out: before and after.
        stride: of the first convolution.
        group: channels that are normalized together.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int, group: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels_in, channels_out, 3, stride, group),
            nn.ReLU(),
            *_convolution(channels_out, channels_out, 3, 1, group),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.around = nn.Sequential(*_convolution(channels_in, channels_out, 1, stride, group))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.around(x) + self.body(x))


def resnet(
    width: int = 64,
    *,
    blocks: int = 2,
    size: int = 32,
    channels: int = 1,
    classes: int = 10,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A network of four stages with `width`, 2, 4 and 8 times `width` channels; two blocks each make ResNet-18.

    The stem is the one for small images, a 3 × 3 convolution without pooling. The second, third and fourth stage
    halve the image as long as 2 × 2 pixels are left: at 1 × 1 eight of nine weights of a filter would meet nothing
    but padding, and be degenerate for no reason that lies in the data.

    Args:
        width: channels of the first stage.
        blocks: of a stage.
        size: pixels of an edge of the image.
        channels: of the image.
        classes: logits.
        generator: of the initialization, He et al. 2015 (fan-out) for convolutions; None: torch's own.

    Raises:
        ValueError: `width` is neither below 16 nor a multiple of it, or a number is below 1.
    """
    for name, value in {"width": width, "blocks": blocks, "channels": channels, "classes": classes}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if size < 2:
        raise ValueError(f"size must be at least 2, got {size}")
    group = min(width, GROUP)
    if width % group:
        raise ValueError(f"width must be below {GROUP}, or a multiple of it, got {width}")
    layers: list[nn.Module] = [*_convolution(channels, width, 3, 1, group), nn.ReLU()]
    before = width
    for stage in range(_STAGES):
        after, stride = width << stage, 2 if stage and size >= 4 else 1
        size = -(-size // stride)
        for block in range(blocks):
            layers.append(BasicBlock(before, after, stride=stride if block == 0 else 1, group=group))
            before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.zeros_(module.bias)
    return model


def _convolution(channels_in: int, channels_out: int, size: int, stride: int, group: int) -> tuple[nn.Module, ...]:
    """A convolution without bias, which the norm after it would take away."""
    return (
        nn.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=False),
        nn.GroupNorm(channels_out // group, channels_out),
    )
