"""An interval that stays right however often it is looked at, so that a measurement may stop when it has decided.

Each value is one unit of evidence, such as the log of a ratio of latencies in one round, and is assumed to be as
likely above the true centre by some amount as below it by the same, given all values before it; nothing is assumed of
the shape, the size or the constancy of the noise. For a candidate centre ``m`` and a scale ``c`` the product of
``2 / (1 + exp(-c (value - m)))`` then has expectation 1 at every time, however it is stopped; a mean over scales has
it too. A product above ``1 / alpha`` is therefore seen with a probability of at most ``alpha``, once and for all
looks together (Ville's inequality).

Paper: Ramdas, Ruf, Larsson, Koolen, Admissible anytime-valid sequential inference must rely on nonnegative
martingales (2020), section 4 on symmetric distributions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

SCALES = 10.0 * 2.0 ** np.arange(11)
"""Inverse sizes of noise that are looked for: from a tenth of the value's unit down to a ten thousandth."""


def log_evidence(values: Values, centre: float) -> float:
    """Log of the evidence that the values lie above ``centre``; falls as ``centre`` rises."""
    terms = math.log(2) - np.logaddexp(0.0, -SCALES[:, None] * (values - centre)[None, :])
    return float(np.logaddexp.reduce(terms.sum(1)) - math.log(len(SCALES)))


def interval(values: Values, alpha: float) -> tuple[float, float]:
    """Where the centre lies, each end wrong with a probability of at most ``alpha`` over all looks.

    Infinite ends while there are too few values to exclude anything: less than 8 at ``alpha`` 0.005.
    """
    return _lowest(values, alpha), -_lowest(-values, alpha)


def _lowest(values: Values, alpha: float) -> float:
    enough = -math.log(alpha)
    if not len(values):
        return -math.inf
    low, high = float(values.min()) - 1.0, float(values.max())
    if log_evidence(values, low) < enough:
        return -math.inf
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if log_evidence(values, middle) >= enough else (low, middle)
    return low
