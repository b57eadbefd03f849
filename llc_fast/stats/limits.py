"""What statistics of an estimate may be: the thresholds of :mod:`llc_fast.checks`, which says what exceeds them.

They are apart from the checks so that pictures and reports show the same numbers, without torch.
"""

MIN_ESS = 100
"""Effective draws over all chains below which the standard error itself is a guess (Vehtari et al. 2021: 400)."""
MAX_DESCENT = 0.1
"""Of λ̂: twice as much may be missing from it."""
MAX_GRADIENT_ERROR = 0.5
"""Of the change of the loss along a step, what gradients at both ends may leave unexplained: anharmonic wells and kinks
leave up to a fifth at the largest step sizes, a gradient of another place or of a part of the loss leaves all of it."""
MIN_METROPOLIS_ACCEPTANCE, MAX_OFF_TARGET = 0.2, 0.15
"""Mean acceptance of each chain, and its distance from the one that step sizes were adapted to."""
MAX_SUBTRACTED_BIAS = 0.5
"""Share of bias in nβ·(L − L(w*)) up to which it can be subtracted: pilot chains aim at a tenth, and on deep linear
networks with a known λ half of it has left no visible error (docs/calibration.md)."""
MAX_BIAS, TARGET_BIAS = 0.10, 0.05
"""The same where it is not subtracted. The default step size leaves 5 % if all directions are equally stiff, the worst
case, and the gradient noise of minibatches comes on top."""
MIN_ACCEPTANCE, ACCEPTABLE_BIAS = 0.9, 0.07
"""The mean MALA acceptance that Furman & Lau (2024, arXiv 2402.03698) ask for. At a given bias of each direction,
acceptance goes to 0 as their number grows (0.8 for a thousand directions and the default step size), so it is no
reason for a warning where the bias of λ̂ is known to be small."""
MIN_RELAXATIONS = 10
"""Relaxation times of the stiff directions among the draws of one chain. The loss forgets twice as fast as w, so that
four chains then hold about MIN_ESS independent values of it, which the noise of minibatches may hide from the ESS."""
MAX_R_HAT = 1.05
"""1.01 is asked of posteriors that are published (Vehtari et al. 2021). With the 400 effective draws that they ask for,
chance gives 1.03 to four chains once in a thousand runs; with 200, 1.05 once in a hundred."""
MAX_SPREAD = 0.05
"""Standard deviation of λ̂ between chains, relative to it, up to which disagreement is of no consequence."""
MIN_SLOW_TIMES = 5
"""Autocorrelation times of the slow part of λ̂ that a chain spans at least, if that part is more than `MAX_SPREAD` of λ̂.
Chains start at w*, where λ̂ is 0: those that span three were still 15 to 35 % too low (``llc-fast reproduce
sensitivity``), those that mix span nine or more."""
TREND_ERRORS, TREND_SIZE = 4.0, 0.05
"""A trend counts from four of its standard errors on (batch means of slow chains are still a little correlated, so that
four of them are as good as three), if λ̂ changes by more than 5 % over the run: its mean is then off by half of that."""
BURNIN_EFFECT = 0.02
"""Change of λ̂, relative, by burn-in left among the draws; and more than twice its own error."""
UNRESOLVED_ERRORS, UNRESOLVED_SIZE = 4.0, 0.05
"""Growth per doubling of the length counts from four of its standard errors on, if λ̂ may lack more than 5 %. What the
curvature at w* says it lacks counts from 5 % on, too."""
MAX_SPIKES = 0.01
"""Share of λ̂ that comes from spikes."""
MAX_INIT_LOSS_SENSITIVITY = 0.1
"""Change of λ̂, relative, by one standard error of L(w*)."""
VALUE_ERRORS, REGULAR_SLACK = 3.0, 1.1
"""λ̂ is negative, or above the bound λ ≤ P/2, by more than this many standard errors; a step size within its limits
may add 10 % to the bound."""
MAX_RELATIVE_ERROR = 0.25
"""Standard error over λ̂ above which not even the first digit is known."""
