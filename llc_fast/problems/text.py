"""Real text that comes with Python: the language reference's help topics, as sequences of characters."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

RAREST = 100
"""Characters found less often than this are all read as `OTHER`."""
OTHER = "�"
HELD_OUT = 5
"""Every fifth paragraph is for testing."""


@dataclass(frozen=True)
class Text:
    """Sequences of tokens, each a character.

    Attributes:
        vocabulary: the characters; a token is a position in it.
        train: int64 ``[sequence, length]``.
        test: the same of other paragraphs.
    """

    vocabulary: str
    train: Tensor
    test: Tensor

    def decode(self, tokens: Tensor) -> str:
        """The characters of one sequence."""
        return "".join(self.vocabulary[k] for k in tokens.tolist())


def python_manual() -> list[str]:
    """The paragraphs of ``help("…")``, some 350,000 characters, with single spaces for all white space.

    Topics repeat each other at length; here each paragraph comes once. They are those of the running Python: other
    versions say it in other words.

    Raises:
        ModuleNotFoundError: this Python was installed without its help texts.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this Python lacks its help texts (module pydoc_data.topics): install its whole standard library"
        ) from error
    parts = (part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    return [part for part in dict.fromkeys(" ".join(part.split()) for part in parts) if part]


def load_text(length: int, num_train: int | None = None, num_test: int | None = None) -> Text:
    """The manual of Python cut into sequences of `length` characters that do not overlap, in no order.

    Nothing is random that a caller could seed: equal Pythons give equal sequences.

    Args:
        length: of each sequence.
        num_train, num_test: how many are wanted; None: all there are.

    Raises:
        ValueError: the manual has not as many.
    """
    paragraphs = python_manual()
    counts = Counter("".join(paragraphs))
    vocabulary = "".join(sorted(c for c, count in counts.items() if count >= RAREST)) + OTHER
    found = {c: k for k, c in enumerate(vocabulary)}

    def sequences(texts: list[str], wanted: int | None, what: str) -> Tensor:
        tokens = torch.tensor([found.get(c, len(vocabulary) - 1) for c in " ".join(texts)])
        cut = tokens[: len(tokens) // length * length].reshape(-1, length)
        if wanted is not None and wanted > len(cut):
            raise ValueError(f"{what}={wanted} sequences of {length} characters: the manual has {len(cut)}")
        order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
        return cut[order[:wanted]]

    train = [text for k, text in enumerate(paragraphs) if k % HELD_OUT]
    return Text(
        vocabulary, sequences(train, num_train, "num_train"), sequences(paragraphs[::HELD_OUT], num_test, "num_test")
    )
