"""Models whose learning coefficient or symmetry is known."""
