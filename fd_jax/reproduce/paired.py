"""Mean, spread and paired differences over seeds."""

from collections.abc import Sequence
import math
import statistics
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. Beyond the last one, it
# is used as it is, which makes intervals a little too wide.
T_95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


class Difference(NamedTuple):
    """A mean difference with its 95 % interval; the ends are None for a single pair."""

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Mean of the paired differences, with its 95 % t interval.

    The interval assumes that differences are drawn from a normal distribution.

    Args:
      values: one figure for each seed, at least one.
      reference: figures of the same seeds, in the same order.
    """
    each = [value - other for value, other in zip(values, reference, strict=True)]
    mean, deviation = statistics.fmean(each), spread(each)
    if deviation is None:
        return Difference(mean, None, None)
    quantile = T_95[min(len(each) - 1, len(T_95)) - 1]
    half = quantile * deviation / math.sqrt(len(each))
    return Difference(mean, mean - half, mean + half)
