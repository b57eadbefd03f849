"""What devinterp 2.0.1 selects by name from the models of architectures.py, as devinterp_components.json keeps it.

The tests need no devinterp 2.0.1. Where it is installed, or its folder is in PYTHONPATH:

    python tests/shared/devinterp_components.py

writes the file again.
"""

from __future__ import annotations

import json
from pathlib import Path

from architectures import ARCHITECTURES, architecture
from families import import_torchvision
from torch import Tensor

STORED = Path(__file__).with_suffix(".json")
NAMES = ("embed", "unembed", "l1", "l1 attn", "l1 mlp", *(f"l1 h{k}" for k in range(8)), "l1 g0", "l1 g1")


def text_of(mask: Tensor | None) -> str:
    """A mask in words: "all", or the dimension and the indices that it selects, such as "0: 8-15, 40-47"."""
    if mask is None:
        return "all"
    for dim in range(mask.ndim):
        line = mask.movedim(dim, 0).flatten(1).any(1) if mask.ndim > 1 else mask
        if bool((line.view([-1 if k == dim else 1 for k in range(mask.ndim)]).expand(mask.shape) == mask).all()):
            chosen = line.nonzero().flatten().tolist()
            starts = [k for k in chosen if k - 1 not in chosen]
            stops = [k for k in chosen if k + 1 not in chosen]
            return f"{dim}: " + ", ".join(f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
    raise ValueError("the mask is no selection along one dimension")


def main() -> None:
    import_torchvision()
    from devinterp.slt.weight_restrictions import create_param_masks

    found: dict[str, dict[str, dict[str, str]]] = {}
    for name in ARCHITECTURES:
        model = architecture(name)
        parts = found[name] = {}
        for component in NAMES:
            try:
                masks = create_param_masks(model, component)
            except (ValueError, RuntimeError) as error:
                if "out of range" not in str(error):
                    print(f"{name}, {component}: {error}")
                continue
            parts[component] = {tensor: text_of(mask) for tensor, mask in sorted(masks.items())}
    STORED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
