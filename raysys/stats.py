"""What the scores can and cannot show: means with intervals, paired differences, the edit budget, collapsed answers.

Pure functions on arrays. Scores of one metric are shares in [0, 1], most of them 0 or 1; `n` is always items.

- Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
- McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 1947.
- Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
- Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
  Statistics in Medicine 1998.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval and test
DELTA = 0.02  # the loss that still counts as none: 2 points
RESAMPLES = 2000  # of a bootstrap
CONSTANT = 0.97  # share of one answer from which answers are constant
SPREAD = 0.9  # share of one answer below which the base model's answers spread
EMPTY = 0.5  # share of empty generations from which a model is mute


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


def bootstrap(values: Array, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the mean. Draws how often each distinct value appears: the same law, and quick."""
    if not np.isfinite(values).all():
        return math.nan, math.nan
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    means = drawn @ distinct / len(values)
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
    case (items only lost, at rate delta), so that few items show nothing even when none of them moved. Other scores:
    Student's test on the differences, never below the chance (1 - delta) ** n of not seeing a rare total loss.
    """
    change = now - base
    n = len(change)
    if n < 2 or not np.isfinite(change).all():
        return 1.0
    if np.isin(now, (0.0, 1.0)).all() and np.isin(base, (0.0, 1.0)).all():
        gained, lost = int(np.sum(change > 0)), int(np.sum(change < 0))
        return max(_tango(gained, lost, n, delta), _tail(lost - gained, n, delta))
    floor = (1 - delta) ** n
    spread = standard_error(change)
    loss = -float(np.mean(change))
    if spread == 0:
        return floor if loss < delta else 1.0
    return max(float(special.stdtr(n - 1, (loss - delta) / spread)), floor)


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
    """About how many items would show a loss below delta with this power, were the loss the observed one.

    `tests`: among how many comparisons (Bonferroni). None when the observed loss is delta or more: no number would.
    """
    change = now - base
    room = delta + float(np.mean(change))
    if not room > 0:
        return None
    variance = max(float(np.var(change)), delta * (1 - delta))
    z = float(special.ndtri(1 - (1 - LEVEL) / tests) + special.ndtri(power))
    return math.ceil(z * z * variance / room**2)


# --- the edit budget -------------------------------------------------------------------------------------------------

State = Literal["kept", "open", "lost", "collapsed"]


@dataclass(frozen=True)
class Verdict:
    """One benchmark at one snapshot. kept: shown to have lost less than delta. lost: shown to have lost more.
    open: neither; `needed` says about how many items would show it. collapsed: its answers are worth nothing.
    `p` is Holm-adjusted over the benchmarks of the snapshot."""

    benchmark: str
    edits: int
    change: Difference
    p: float
    state: State
    needed: int | None


@dataclass(frozen=True)
class Budget:
    """How many edits a cell takes. `shown`: every snapshot up to it kept every benchmark. `observed`: the largest
    number without an observed loss above delta. `stops`: what ended `shown`, empty when the last snapshot passed."""

    shown: int
    observed: int
    measured: int
    delta: float
    verdicts: tuple[Verdict, ...]
    stops: tuple[Verdict, ...]


Pairs = Mapping[tuple[str, int], tuple[Array, Array]]  # (benchmark, edits) -> scores now and of the base, same items


def edit_budget(
    pairs: Pairs, delta: float = DELTA, collapsed: frozenset[tuple[str, int]] = frozenset(), seed: int = 0
) -> Budget:
    """The budget of one cell from its scores at every snapshot after the base.

    Snapshots are tested in their order and testing stops at the first that fails, so that they need no correction
    among each other, and measuring more of them costs nothing; the benchmarks of a snapshot are corrected by Holm's.
    """
    verdicts: list[Verdict] = []
    snapshots = sorted({edits for _, edits in pairs})
    for edits in snapshots:
        benchmarks = [b for b, n in pairs if n == edits]
        raw = [1.0 if (b, edits) in collapsed else no_worse(*pairs[b, edits], delta) for b in benchmarks]
        for benchmark, p in zip(benchmarks, holm(raw), strict=True):
            now, base = pairs[benchmark, edits]
            change = paired(now, base, seed)
            state: State = "open"
            if (benchmark, edits) in collapsed:
                state = "collapsed"
            elif p <= 1 - LEVEL:
                state = "kept"
            elif change.high < -delta:
                state = "lost"
            needed = items_needed(now, base, delta, len(benchmarks)) if state == "open" else None
            verdicts.append(Verdict(benchmark, edits, change, p, state, needed))
    bad = [v for v in verdicts if v.state != "kept"]
    seen_bad = [v for v in verdicts if v.state == "collapsed" or not v.change.mean >= -delta - 1e-12]
    shown, observed = _last_before(snapshots, bad), _last_before(snapshots, seen_bad)
    next_up = min((n for n in snapshots if n > shown), default=0)
    stops = tuple(v for v in bad if v.edits == next_up)
    return Budget(shown, observed, max(snapshots, default=0), delta, tuple(verdicts), stops)


def _last_before(snapshots: Sequence[int], bad: Sequence[Verdict]) -> int:
    """The last snapshot before the first bad verdict; 0 (the base) when there is none."""
    first = min((v.edits for v in bad), default=math.inf)
    return max((n for n in snapshots if n < first), default=0)


# --- collapse --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What a collapse detector needs of one answer: what was answered, and whether its numbers are sound.

    `said` is the index of the choice, or the generated text.
    """

    said: int | str
    finite: bool = True


def collapse(now: Sequence[Told], base: Sequence[Told], least: int = 10) -> str:
    """Why the answers of a snapshot are worth nothing, or "". `base` holds the base model's answers to the same items.

    NaN or infinite log-probabilities count from the first; empty text or a constant answer is a collapse only when
    the base model does otherwise, and from `least` items on.
    """
    broken = sum(not t.finite for t in now)
    if broken:
        return f"log-probabilities not finite on {broken} of {len(now)} items"
    if len(now) < least:
        return ""
    empty, empty_base = _empty(now), _empty(base)
    if empty >= EMPTY and empty_base < EMPTY / 2:
        return f"empty text on {empty:.0%} of items"
    ((said, count),) = Counter(t.said for t in now).most_common(1)
    if count >= CONSTANT * len(now) and _constant(base) < SPREAD:
        name = f"choice {said + 1}" if isinstance(said, int) else f"the text {said.strip()[:30]!r}"
        return f"{name} on {count / len(now):.0%} of items"
    return ""


def _empty(told: Sequence[Told]) -> float:
    return sum(isinstance(t.said, str) and not t.said.strip() for t in told) / len(told) if told else 0.0


def _constant(told: Sequence[Told]) -> float:
    """Share of the commonest answer; 0 without answers."""
    return Counter(t.said for t in told).most_common(1)[0][1] / len(told) if told else 0.0
