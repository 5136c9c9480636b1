"""What the scores can and cannot show: means with intervals, paired differences, areas under curves.

Pure functions on arrays. Scores of one metric are shares in [0, 1], most of them 0 or 1; `n` is always items.

- Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
- McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 1947.
- Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
- Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
  Statistics in Medicine 1998.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval and test
DELTA = 0.02  # the loss that still counts as none: 2 points
RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` items with its standard error and its 95 % interval."""

    mean: float
    error: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """Mean of now - base over the same `n` items, its bootstrapped 95 % interval, and who moved.

    `gained` and `lost` count items whose score rose and fell; `p` is McNemar's exact two-sided p-value.
    """

    mean: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    n: int


def standard_error(values: Array) -> float:
    """Sample standard deviation (n - 1) over the root of n, as lm-evaluation-harness; nan for a single item."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def pooled_error(errors: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of a group's size-weighted mean, pooled over its leaf tasks as lm-evaluation-harness does:
    sqrt(sum (n_i - 1) n_i e_i^2 / (N - k) / N) for k tasks of n_i items, N in all; nan where a task has one item."""
    assert len(errors) == len(sizes) > 0, (len(errors), len(sizes))
    total = sum(sizes)
    squares = sum((n - 1) * n * e * e for e, n in zip(errors, sizes, strict=True))
    return math.sqrt(squares / (total - len(sizes)) / total) if total > len(sizes) else math.nan


def area_weights(edits: Sequence[int]) -> Array:
    """What each snapshot counts in the normalised area under a curve: trapezoids over log(1 + edits), summing to 1.

    The logarithm, because snapshots are laid out so and the first edits decide as much as the last hundreds; the area
    is then the mean height of the curve as the report draws it, and linear in the scores: it can be worked out item by
    item and treated like any other score. `edits`: ascending, two or more.
    """
    assert len(edits) > 1, "one snapshot has no area"
    x = np.log1p(np.asarray(edits, float))
    steps = np.diff(x) / (x[-1] - x[0]) / 2
    weights: Array = np.append(steps, 0.0) + np.insert(steps, 0, 0.0)
    return weights


def wilson(successes: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share: never outside [0, 1], never empty at 0 or at 1."""
    assert 0 <= successes <= n > 0, (successes, n)
    z = float(special.ndtri((1 + level) / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (0.0 if not successes else centre - half), (1.0 if successes == n else centre + half)


def estimate(values: Array, level: float = LEVEL) -> Estimate:
    """Mean and interval: Wilson's for zeros and ones, Student's otherwise (cut at 0 and 1 where all values lie)."""
    n = len(values)
    assert n > 0, "no values to average"
    mean, error = float(np.mean(values)), standard_error(values)
    if np.isin(values, (0.0, 1.0)).all():
        return Estimate(mean, error, *wilson(float(np.sum(values)), n, level), n)
    half = float(special.stdtrit(n - 1, (1 + level) / 2)) * error if n > 1 else math.nan
    low, high = mean - half, mean + half
    if ((values >= 0) & (values <= 1)).all():
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, error, low, high, n)


def drawn_again(rng: np.random.Generator, kinds: Array, counts: NDArray[np.int64], times: int) -> Array:
    """Means over as many items as there are, drawn with replacement, `times` times: (times, width).

    `kinds`: (kinds, width), the distinct items; `counts`: how many there are of each.
    """
    n = int(counts.sum())
    if len(counts) <= 64:  # a binomial number each; beyond, drawing the items themselves is quicker
        few: Array = rng.multinomial(n, counts / n, size=times) @ kinds / n
        return few
    found = np.empty((times, kinds.shape[1]))
    own = np.repeat(np.arange(len(counts)), counts)
    for start in range(0, times, 50):  # 50 at a time: of ten thousand items, a few megabytes
        some = found[start : start + 50]
        places = own[rng.integers(n, size=(len(some), n))] + np.arange(len(some))[:, None] * len(counts)
        drawn = np.bincount(places.ravel(), minlength=len(some) * len(counts)).reshape(len(some), -1)
        some[:] = drawn @ kinds / n
    return found


def bootstrap(values: Array, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the mean. Draws how often each distinct value appears: the same law, and quick."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    distinct, counts = np.unique(values, return_counts=True)
    means = drawn_again(np.random.default_rng(seed), distinct[:, None], counts, resamples)[:, 0]
    means.sort()
    outside = round(resamples * (1 - level) / 2)
    return float(means[outside]), float(means[-1 - outside])


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that as many items rise as fall; 1 when none moved."""
    return min(1.0, 2 * float(special.bdtr(min(gained, lost), gained + lost, 0.5)))


def paired(now: Array, base: Array, seed: int = 0) -> Difference:
    """The change of the mean on the same items, in the same order."""
    assert len(now) == len(base) > 0, (len(now), len(base))
    change = now - base
    gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
    return Difference(float(np.mean(change)), *bootstrap(change, seed), gained, lost, mcnemar(gained, lost), len(now))


def no_worse(now: Array, base: Array, delta: float = DELTA) -> float:
    """One-sided p-value of "the true loss is delta or more": small means that less than delta was lost.

    Zeros and ones: Tango's score test for paired shares, never below the exact binomial tail of the least favourable
    case (items only lost, at rate delta), so that few items show nothing even when none of them moved. Where some
    items rose, as if one more had been lost: that keeps the exact error below the nominal one from 100 items on. Other
    scores: Student's test on the differences, as if one item more had lost two standard deviations (means of few skewed
    scores are not quite normal), never below the chance (1 - delta) ** n of not seeing a rare total loss.
    """
    change = now - base
    n = len(change)
    if n < 2 or not np.isfinite(change).all():
        return 1.0
    if np.isin(now, (0.0, 1.0)).all() and np.isin(base, (0.0, 1.0)).all():
        gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
        more = lost + 1 if gained else lost
        return max(_tango(gained, more, n, delta), _tail(lost - gained, n, delta))
    floor = (1 - delta) ** n
    spread = standard_error(change)
    loss = -float(np.mean(change))
    if spread == 0:
        return floor if loss < delta else 1.0
    return max(float(special.stdtr(n - 1, (loss - delta) / spread + 2 / math.sqrt(n))), floor)


def _tango(gained: int, lost: int, n: int, delta: float) -> float:
    """One-sided p-value of Tango's score test of "P(lost) - P(gained) >= delta".

    Under the boundary P(lost) = q + delta, P(gained) = q, the likelihood is largest at the root q of
    2n q^2 - (g + l - delta (2n + g - l)) q - g delta (1 - delta) = 0.
    """
    b = delta * (2 * n + gained - lost) - gained - lost
    c = -gained * delta * (1 - delta)
    q = (-b + math.sqrt(b * b - 8 * n * c)) / (4 * n)
    return float(special.ndtr((lost - gained - n * delta) / math.sqrt(n * (2 * q + delta - delta * delta))))


def _tail(k: int, n: int, p: float) -> float:
    """P(at most k of n) under the binomial law."""
    return float(special.bdtr(k, n, p)) if k >= 0 else 0.0


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: rejecting those below alpha keeps the chance of any false rejection below alpha."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted = [1.0] * len(p)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = largest
    return adjusted


def items_needed(now: Array, base: Array, delta: float = DELTA, tests: int = 1, power: float = 0.8) -> int | None:
    """About how many items would decide, with this power, whether delta was lost, were the loss the observed one.

    `tests`: among how many comparisons (Bonferroni). None when the observed loss is delta: no number would.
    """
    change = now - base
    room = delta + float(np.mean(change))
    if not abs(room) > 1e-12:
        return None
    variance = max(float(np.var(change)), delta * (1 - delta))
    z = float(special.ndtri(1 - (1 - LEVEL) / tests) + special.ndtri(power))
    return math.ceil(z * z * variance / room**2)
