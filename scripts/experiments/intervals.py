"""Bootstrap intervals of a mean over few seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Student's t at 0.975 by degrees of freedom, and the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = 1.960
MOST_SEEDS = len(_T) + 1


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> int:
        """1 or -1: the side of zero that the whole interval is on; 0: it contains zero."""
        return int(self.low > 0) - int(self.high < 0)


def bootstrap(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, of 2 to 10 seeds.

    The percentile interval (Efron 1979) over all resamples, or 20,000 of them where there are
    more, its ends moved away from the mean by t(k - 1) / z * sqrt(k / (k - 1)). Without that, of
    normal values, an interval of 3 seeds covers the true mean 75 times in 100 and one of 5 seeds
    84 times; with it, 95 times (Hesterberg 2015, "What teachers should know about the bootstrap",
    section 5.3, names both causes: resamples vary too little, and t is wider than z).
    """
    x = np.asarray(values, dtype=float)
    k = len(x)
    if not 2 <= k <= MOST_SEEDS:
        raise ValueError(f"{k} value(s): expected 2 to {MOST_SEEDS}, one a seed")
    if k <= 5:
        picks = np.array(list(itertools.product(range(k), repeat=k)))
    else:
        picks = np.random.default_rng(0).integers(k, size=(20_000, k))
    means, mean = np.sort(x[picks].mean(1)), float(x.mean())
    tail = int(0.025 * len(means))
    wider = _T[k - 2] / _Z * (k / (k - 1)) ** 0.5
    low, high = (mean + wider * (float(end) - mean) for end in (means[tail], means[-1 - tail]))
    return Interval(mean, low, high)
