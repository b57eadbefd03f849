"""Text of the Python manual."""

from __future__ import annotations

import pytest
import torch

from llc_fast.problems.text import HELD_OUT, OTHER, load_text, python_manual


def test_sequences_are_pieces_of_the_manual() -> None:
    """Every fifth paragraph cut into the sequences for testing, the others into those for training; always the same."""
    text, paragraphs = load_text(20), python_manual()
    assert len(set(paragraphs)) == len(paragraphs) and sum(map(len, paragraphs)) > 300_000
    train = [part for k, part in enumerate(paragraphs) if k % HELD_OUT]
    for tokens, parts in ((text.test, paragraphs[::HELD_OUT]), (text.train, train)):
        whole = "".join(c if c in text.vocabulary else OTHER for c in " ".join(parts))
        pieces = [whole[k : k + 20] for k in range(0, len(whole) - 19, 20)]
        found = [text.decode(sequence) for sequence in tokens]
        assert sorted(found) == sorted(pieces) and found[:100] != pieces[:100]  # in no order
    again = load_text(20, num_train=100, num_test=10)
    torch.testing.assert_close(again.train, text.train[:100])
    torch.testing.assert_close(again.test, text.test[:10])


def test_too_many_sequences() -> None:
    with pytest.raises(ValueError, match=r"num_train=10000000 sequences of 33 characters: the manual has \d+"):
        load_text(33, num_train=10**7)
