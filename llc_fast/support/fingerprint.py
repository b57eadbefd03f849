"""Fingerprints of tensors, arrays and options: what names a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A fingerprint of names, shapes, dtypes and values."""
    total = hashlib.blake2b(digest_size=12)
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        flat = tensor.detach().reshape(-1)
        for piece in torch.split(flat, 2**22):  # a GPU's tensors come over in pieces
            total.update(piece.contiguous().view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def arrays_identity(arrays: Mapping[str, Any]) -> str:
    """A fingerprint of NumPy arrays by name."""
    return digest((name, torch.from_numpy(a)) for name, a in arrays.items())


def option_identity(value: Any) -> Any:
    """What names a hyperparameter: its value as JSON would give it back; of a tensor, a fingerprint."""
    if isinstance(value, Mapping):
        return {str(name): option_identity(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [option_identity(entry) for entry in value]
    if isinstance(value, Tensor) and value.ndim:
        return digest([("", value)])
    return value.item() if hasattr(value, "item") else value
