"""The streams of noise: kinds of random numbers that one (seed, step, chain) keeps apart, see ``NoiseKey.stream``."""

NOISE_STREAM = 0
"""Langevin noise ξ of the parameters."""
MOMENTUM_STREAM = 1
"""Initial momenta."""
MINIBATCH_STREAM = 2
"""The order in which a chain sees the samples; ``csrc/minibatch.h`` has the same number."""
ACCEPT_STREAM = 3
"""A Metropolis test and a trajectory's jitter."""
TRIAL_STREAM = 5
"""Directions in which a large model's loss is tried out."""
PROPOSAL_STREAM = 7
"""Proposals that step checks make and do not follow."""
METRIC_STREAM = 8
"""Directions in which curvature at w* is measured."""
