"""The edit budget: how many edits a model takes before a benchmark has lost more than delta, and how sure that is.

Four numbers of edits, never out of order: the low end of the interval <= *shown* <= *observed* <= the high end.

- *shown*: up to it, every snapshot is shown at 95 % to have lost less than delta on every benchmark.
- *observed*: the same of the bare means.
- the interval covers the true budget in at least 95 % of studies. Its low end is *shown* at 97.5 %. Its high end is
  the last snapshot before the first one that is shown, at 97.5 % and among all snapshots and benchmarks at once, to
  have lost more than delta. Percentiles of a bootstrapped budget would not do: the smallest over many benchmarks is
  biased downwards, and resampling doubles the bias.

"Among all at once" is by the largest studentised deviation over the snapshots and benchmarks of a bootstrap, which
draws items (the same for all snapshots: neighbours err together) and, where there are several, edit orders.
- Holm, Scandinavian Journal of Statistics 1979 (steps); Romano and Wolf, "Exact and approximate stepdown methods for
  multiple hypothesis testing", JASA 2005 (bootstrapped maxima); Satterthwaite, Biometrics 1946 (degrees of freedom).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from raysys.stats import (
    DELTA,
    LEVEL,
    Array,
    Difference,
    drawn_again,
    holm,
    items_needed,
    no_worse,
    paired,
)

DRAWS = 1000  # of the bootstrap behind the interval
State = Literal["kept", "open", "lost", "collapsed"]
Pairs = Mapping[tuple[str, int], tuple[Array, Array]]  # (benchmark, edits) -> scores now and of the base, same items
Collapsed = frozenset[tuple[str, int]]  # (benchmark, edits)


@dataclass(frozen=True)
class Verdict:
    """One benchmark at one snapshot. kept: shown to have lost less than delta. lost: shown to have lost more.
    open: neither; `needed` says about how many items would decide. collapsed: its answers are worth nothing.
    `p` is Holm-adjusted over the benchmarks of the snapshot."""

    benchmark: str
    edits: int
    change: Difference
    p: float
    state: State
    needed: int | None


@dataclass(frozen=True)
class Interval:
    """The true budget lies between two measured numbers of edits, with 95 % confidence.

    `orders`: how many edit orders it was worked out over. Of one, it holds for that order of the edits; of several,
    for the mean over all orders that there could be."""

    low: int
    high: int
    orders: int = 1


UNKNOWN = Interval(0, 0)


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
    interval: Interval = UNKNOWN


@dataclass(frozen=True)
class Changes:
    """What one benchmark lost or won. `values`: (orders, snapshots, items), now - base; `edits` names its snapshots."""

    edits: tuple[int, ...]
    values: Array


def edit_budget(pairs: Pairs, delta: float = DELTA, collapsed: Collapsed = frozenset(), seed: int = 0) -> Budget:
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
    bad = [v.edits for v in verdicts if v.state != "kept"]
    seen_bad = [v.edits for v in verdicts if v.state == "collapsed" or not v.change.mean >= -delta - 1e-12]
    shown, observed = _last_before(snapshots, bad), _last_before(snapshots, seen_bad)
    next_up = min((n for n in snapshots if n > shown), default=0)
    stops = tuple(v for v in verdicts if v.state != "kept" and v.edits == next_up)
    found = Budget(shown, observed, max(snapshots, default=0), delta, tuple(verdicts), stops)
    changes = {b: _changes(pairs, b) for b in dict.fromkeys(b for b, _ in pairs)}
    between = interval({b: c for b, c in changes.items() if c.edits}, delta, collapsed, seed)
    # A snapshot whose scores can't be compared with all the others' is tested alone, and may fall outside.
    between = replace(between, low=min(between.low, shown), high=max(between.high, observed))
    return replace(found, interval=between)


def _changes(pairs: Pairs, benchmark: str) -> Changes:
    """The snapshots at which the benchmark was asked the same number of items as mostly."""
    found = {n: now - base for (b, n), (now, base) in sorted(pairs.items(), key=lambda p: p[0][1]) if b == benchmark}
    sizes = [len(v) for v in found.values()]
    whole = {n: v for n, v in found.items() if len(v) == max(sizes) and np.isfinite(v).all()}
    return Changes(tuple(whole), np.array([list(whole.values())], float))


def _last_before(snapshots: Sequence[int], bad: Sequence[int]) -> int:
    """The last snapshot before the first bad one; 0 (the base) when there is none."""
    first = min(bad, default=math.inf)
    return max((n for n in snapshots if n < first), default=0)


# --- the interval ----------------------------------------------------------------------------------------------------


def interval(
    changes: Mapping[str, Changes],
    delta: float = DELTA,
    collapsed: Collapsed = frozenset(),
    seed: int = 0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Interval:
    """Between which numbers of edits the true budget lies. All benchmarks were measured over the same edit orders."""
    snapshots = sorted({n for c in changes.values() for n in c.edits} | {n for _, n in collapsed})
    if not snapshots:
        return UNKNOWN
    alpha = (1 - level) / 2
    orders = {len(c.values) for c in changes.values()} or {1}
    assert len(orders) == 1, orders
    [k] = orders
    means = {b: _Mean.of(c.values, delta) for b, c in changes.items()}
    unsafe, lost = {n for _, n in collapsed}, {n for _, n in collapsed}
    for edits in snapshots:
        raw = [
            _kept(c.values[:, c.edits.index(edits)], delta, means[b], c.edits.index(edits))
            for b, c in changes.items()
            if edits in c.edits
        ]
        if not raw or max(holm(raw)) > alpha:
            unsafe.add(edits)
    critical = _critical(list(changes.values()), list(means.values()), alpha, seed, draws)
    for benchmark, c in changes.items():
        mean = means[benchmark]
        reach = critical * special.stdtrit(mean.freedom, 1 - alpha) / special.ndtri(1 - alpha) * mean.error
        lost |= {n for n, worse in zip(c.edits, -mean.value - delta > reach, strict=True) if worse}
    return Interval(_last_before(snapshots, list(unsafe)), _last_before(snapshots, list(lost)), k)


@dataclass(frozen=True)
class _Mean:
    """Mean change at each snapshot, its standard error over items and orders, and that error's degrees of freedom."""

    value: Array  # (snapshots,)
    error: Array  # (snapshots,)
    freedom: Array  # (snapshots,)

    @classmethod
    def of(cls, values: Array, delta: float) -> _Mean:
        k, _, n = values.shape
        over_orders = values.mean(0)  # (snapshots, items)
        # never below what a loss of delta by a few items would have: no spread seen is not no spread
        items = np.maximum(over_orders.var(-1), delta * (1 - delta)) / max(n - 1, 1)
        orders = values.mean(-1).var(0, ddof=1) / k if k > 1 else np.zeros_like(items)
        both = items + orders
        freedom = both**2 / (items**2 / max(n - 1, 1) + (orders**2 / (k - 1) if k > 1 else 0.0))
        return cls(over_orders.mean(-1), np.sqrt(both), freedom)


def _kept(values: Array, delta: float, mean: _Mean, place: int) -> float:
    """One-sided p-value of "delta or more was lost" at one snapshot; `values` (orders, items)."""
    k, n = values.shape
    if k == 1:
        # the test of the differences sees nothing but them; zeros and ones on both sides are told by their steps
        base = np.where(values[0] < 0, 1.0, 0.0)
        whole = np.isin(values[0], (-1.0, 0.0, 1.0)).all()
        return no_worse(base + values[0], base, delta) if whole else no_worse(values[0], np.zeros(n), delta)
    student = special.stdtr(mean.freedom[place], (-mean.value[place] - delta) / mean.error[place])
    return max(float(student), float((1 - delta) ** n))


def _critical(changes: Sequence[Changes], means: Sequence[_Mean], alpha: float, seed: int, draws: int) -> float:
    """The value that the largest studentised deviation over all snapshots and benchmarks exceeds with chance alpha."""
    least = float(special.ndtri(1 - alpha))
    if not changes:
        return least
    rng = np.random.default_rng(seed)
    k = len(changes[0].values)
    picked = rng.multinomial(k, np.full(k, 1 / k), size=draws) / k  # (draws, orders): the same for all benchmarks
    largest = np.full(draws, -math.inf)
    for c, mean in zip(changes, means, strict=True):
        patterns, counts = np.unique(c.values.mean(0).T, axis=0, return_counts=True)
        moved = drawn_again(rng, patterns, counts, draws) - mean.value  # (draws, snapshots)
        if k > 1:  # k orders drawn from k spread less than they should
            moved = moved + (picked @ c.values.mean(-1) - mean.value) * math.sqrt(k / (k - 1))
        largest = np.maximum(largest, (-moved / mean.error).max(-1))
    return max(float(np.quantile(largest, 1 - alpha)), least)
