"""Files that a crash leaves whole, the old one or the new one, and values as JSON has them."""

from __future__ import annotations

import contextlib
import glob
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes the place of `path` when the block ends without an error.

    Raises:
        OSError: it can't be written (no space left, say); what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # not every file system can; the rename itself is atomic
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """A value as JSON would give it back: lists for arrays, tensors and tuples, None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):  # arrays, tensors and NumPy's numbers
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def remove_partial(path: Path) -> None:
    """Delete what writers of `path` left behind when they were killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # Another file's name may begin with this one's.
        if partial.name[len(path.name) + 2 : -len(".partial")].isdigit():
            with contextlib.suppress(OSError):
                partial.unlink()
