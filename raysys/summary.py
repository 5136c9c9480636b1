"""What a study says: its scores as curves, budgets and counts. Terminal and HTML report both draw from here.

A *curve* is one metric of one benchmark over the number of edits, for one method on one model. Where a study has
several edit orders, a curve averages every item over them first, so that n stays the number of items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raysys import budget, stats
from raysys.budget import Budget, Changes, Interval
from raysys.collapse import Told, collapse
from raysys.frame import Frame, Items, Metric
from raysys.meaning import Meaning
from raysys.stats import Difference, Estimate

if TYPE_CHECKING:
    from raysys.results import Cell, Results
    from raysys.spec import StudySpec

KINDS = ("efficacy", "paraphrase", "neighbourhood", "portability", "multi_hop")
AGED = ("efficacy", "multi_hop")  # kinds whose retention by age is told
PROTOCOLS = {"probability": "P(right) > P(wrong)", "forced": "teacher-forced", "free": "free generation"}
KNOWN = "known"  # metrics of facts that were never edited

AGES = (0, 1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # edits made since, lower edges


@dataclass(frozen=True)
class Point:
    """One metric at one snapshot; `change` against the base model on the same items where it was asked them.
    `collapse` says why the answers are worth nothing, "" when they are sound. `void`: the value must not be shown at
    all: the answers of a safety benchmark have collapsed, and what it would say is not safety. `unit`: of the value,
    "" for a share; `falling`: less of it is better."""

    edits: int
    estimate: Estimate
    change: Difference | None = None
    collapse: str = ""
    void: bool = False
    unit: str = ""
    falling: bool = False


@dataclass(frozen=True)
class Area:
    """Normalised area under a curve from the base to the last snapshot: its mean height over log(1 + edits)
    (`stats.area_weights`), and what that is more than the base model's score."""

    estimate: Estimate
    change: Difference
    last: int
    unit: str = ""


@dataclass(frozen=True)
class Age:
    """Edits made `first` to `last` edits ago, at the last snapshot, and how many of them still hold."""

    first: int
    last: int
    estimate: Estimate

    @property
    def label(self) -> str:
        """Short: "0", "1–4"."""
        return str(self.first) if self.first == self.last else f"{self.first}–{self.last}"


Curves = dict[Metric, list[Point]]


@dataclass(frozen=True)
class CellView:
    """One edit stream."""

    id: str
    model: str
    method: str
    order: int
    curves: Curves
    budget: Budget
    areas: Mapping[Metric, Area] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodView:
    """One method on one model, over its edit orders. `ages`: protocol -> retention of edits at the last snapshot, for
    multi-hop questions "multi_hop/protocol". `interval`: of the edit budget, over items and edit orders."""

    model: str
    method: str
    cells: list[CellView]
    curves: Curves
    ages: Mapping[str, list[Age]] = field(default_factory=dict)
    interval: Interval = budget.UNKNOWN

    @property
    def budget(self) -> Budget:
        """The smallest over the edit orders."""
        return min((c.budget for c in self.cells), key=lambda b: (b.shown, b.observed))


@dataclass(frozen=True)
class Summary:
    """Everything the report shows of the scores. `ability`: the chosen metric of each general-ability benchmark."""

    methods: list[MethodView]
    ability: list[Metric]
    locality: list[Metric]
    probes: list[Metric]
    others: list[Metric]
    delta: float

    @property
    def models(self) -> list[str]:
        """In the order of the study."""
        return list(dict.fromkeys(m.model for m in self.methods))

    @property
    def cells(self) -> list[CellView]:
        """All edit streams."""
        return [c for m in self.methods for c in m.cells]

    def of(self, model: str) -> list[MethodView]:
        """The methods tried on one model."""
        return [m for m in self.methods if m.model == model]


def summarise(results: Results, delta: float = stats.DELTA) -> Summary:
    """Read the scores of a study, finished or not, and work everything out."""
    frame = _frame(results)
    means = Meaning.read(results)
    ability, probes, locality, others = _sort(frame, results.spec, means)
    methods: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in results.cells():
        methods[cell.model, cell.method].append(cell)
    views = []
    for (model, method), cells in methods.items():
        made = [_cell(frame, c, ability, others, means, delta) for c in cells]
        ids = [c.id for c in cells]
        merged = made[0].curves if len(made) == 1 else _curves(frame, ids, [*ability, *others], means)
        aged = {p if k == "efficacy" else f"{k}/{p}": f"{k}/{p}" for k in AGED for p in PROTOCOLS}
        ages = {title: found for title, name in aged.items() if (found := _ages(frame, ids, name))}
        between = made[0].budget.interval if len(made) == 1 else _interval(frame, made, ability, delta)
        views.append(MethodView(model, method, made, merged, ages, between))
    return Summary(views, ability, locality, probes, others, delta)


def collapsed(results: Results) -> list[dict[str, str | int]]:
    """Every snapshot and metric whose answers are worth nothing: cell, edits, benchmark, metric, reason."""
    frame, means = _frame(results), Meaning.read(results)
    ability, _, _, others = _sort(frame, results.spec, means)
    found: list[dict[str, str | int]] = []
    for cell in results.cells():
        for metric in (*ability, *others):
            for edits in frame.snapshots([cell.id], metric):
                if reason := _broken(frame, [cell.id], edits, metric, means.safety):
                    where: dict[str, str | int] = {
                        "cell": cell.id,
                        "edits": edits,
                        "benchmark": metric[0],
                        "metric": metric[1],
                    }
                    found.append(where | {"reason": reason})
    return found


def _frame(results: Results) -> Frame:
    return Frame(results.scores(), {c.id: [r["id"] for r in c.about["requests"]] for c in results.cells()})


def _cell(
    frame: Frame, cell: Cell, ability: list[Metric], others: list[Metric], means: Meaning, delta: float
) -> CellView:
    curves = _curves(frame, [cell.id], [*ability, *others], means)
    pairs, broken = {}, set()
    for metric in ability:
        for point in curves.get(metric, []):
            if point.edits and point.change:
                pairs[metric[0], point.edits] = _same(*(frame.items([cell.id], n, metric) for n in (point.edits, 0)))
                if point.collapse:
                    broken.add((metric[0], point.edits))
    found = budget.edit_budget(pairs, delta, frozenset(broken))
    areas = {m: area for m in (*ability, *others) if (area := _area(frame, cell.id, m, curves.get(m, [])))}
    return CellView(cell.id, cell.model, cell.method, cell.order, curves, found, areas)


def _curves(frame: Frame, cells: Sequence[str], watched: list[Metric], means: Meaning) -> Curves:
    """`watched`: the metrics whose answers may collapse."""
    curves: Curves = {}
    for metric in frame.metrics:
        base = frame.items(cells, 0, metric)
        points = []
        for edits in frame.snapshots(cells, metric):
            items = frame.items(cells, edits, metric)
            change, broken, found = None, "", stats.estimate(items[1])
            now, then = _same(items, base)
            if edits and len(now):
                change = stats.paired(now, then)
            if metric in watched:
                broken = _broken(frame, cells, edits, metric, means.safety)
                error = frame.pooled_error(cells, edits, metric)
                found = found if error is None else replace(found, error=error)
            void = bool(broken) and metric[0] in means.safety
            points.append(
                Point(edits, found, change, broken, void, means.units.get(metric, ""), metric in means.falling)
            )
        if points:
            curves[metric] = points
    return curves


def _broken(frame: Frame, cells: Sequence[str], edits: int, metric: Metric, safety: frozenset[str]) -> str:
    """Why the answers of any of `cells` are worth nothing, or ""; of the base model too, where they are on safety."""
    if not edits and metric[0] not in safety:
        return ""
    for cell in cells:
        now, base = frame.told(cell, edits, metric), frame.told(cell, 0, metric)
        if not now:
            continue
        both = [q for q in now if q in base] if base else list(now)
        scores = frame.values(cell, edits, metric) if metric[0] in safety else {}
        before: list[Told] = [base[q] for q in both if q in base]
        reason = collapse([now[q] for q in both], before, [scores[q] for q in both if scores])
        if reason:
            return reason
    return ""


def _area(frame: Frame, cell: str, metric: Metric, points: Sequence[Point]) -> Area | None:
    """None where there is no base, no later snapshot, or a value that must not be shown."""
    edits = [p.edits for p in points]
    if (
        len(edits) < 2
        or edits[0]
        or any(p.void for p in points)
        or not all(np.isfinite(p.estimate.mean) for p in points)
    ):
        return None
    numbers, values = _aligned([frame.items([cell], n, metric) for n in edits])
    if not len(numbers):
        return None
    height = stats.area_weights(edits) @ values
    return Area(stats.estimate(height), stats.paired(height, values[0]), edits[-1], points[0].unit)


def _interval(frame: Frame, cells: Sequence[CellView], ability: Sequence[Metric], delta: float) -> Interval:
    """Of the edit budget, over items and over the edit orders in `cells`."""
    changes, broken = {}, set()
    for metric in ability:
        measured = [{p.edits for p in c.curves.get(metric, ()) if p.change} for c in cells]
        edits = sorted(set.intersection(*measured))
        wanted = [(c.id, n) for c in cells for n in (0, *edits)]
        numbers, values = _aligned([frame.items([c], n, metric) for c, n in wanted])
        if not edits or not len(numbers) or not np.isfinite(values).all():
            continue
        tall = values.reshape(len(cells), 1 + len(edits), -1)
        changes[metric[0]] = Changes(tuple(edits), tall[:, 1:] - tall[:, :1])
        broken |= {(metric[0], p.edits) for c in cells for p in c.curves.get(metric, ()) if p.edits and p.collapse}
    return budget.interval(changes, delta, frozenset(broken))


def _aligned(found: Sequence[Items]) -> tuple[NDArray[np.int64], stats.Array]:
    """The items that all have, and their values, (which, items)."""
    common = reduce(lambda a, b: np.intersect1d(a, b, assume_unique=True), [numbers for numbers, _ in found])
    return common, np.array([values[np.isin(numbers, common)] for numbers, values in found])


def _same(now: Items, base: Items) -> tuple[stats.Array, stats.Array]:
    _, a, b = np.intersect1d(now[0], base[0], assume_unique=True, return_indices=True)
    return now[1][a], base[1][b]


def _ages(frame: Frame, cells: Sequence[str], name: str) -> list[Age]:
    """Retention at the last snapshot by how many edits came after an edit; newest first."""
    for metric in frame.metrics:
        if metric[1] == name:
            break
    else:
        return []
    last = max(frame.snapshots(cells, metric), default=0)
    held: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        for edit, value in frame.by_edit(cell, last, metric):
            if edit > last:
                continue  # the base, asked about edits that its stream never came to
            held[max(a for a in AGES if a <= last - edit)].append(value)
    found = []
    for first in sorted(held):
        end = next((a for a in AGES if a > first), math.inf) - 1
        found.append(Age(first, int(min(end, last - 1)), stats.estimate(np.array(held[first]))))
    return found


def _sort(frame: Frame, spec: StudySpec, means: Meaning) -> tuple[list[Metric], ...]:
    """(the chosen metric of each general-ability benchmark, probes of edits, locality, all others), as the study lists
    them. A benchmark's choice is its "accuracy", else the first by name of those whose values are shares: a loss of
    anything else can't be told in points. One that says `ability = False` of itself, like perplexity, has none."""
    metrics, benchmarks = frame.metrics, [b.title for b in spec.benchmarks]
    ability: dict[str, Metric] = {}
    probes, locality, others = [], [], []
    rank = {name: i for i, name in enumerate(benchmarks)}
    for benchmark, metric in sorted(metrics, key=lambda m: (rank.get(m[0], len(rank)), m[1] != "accuracy", m)):
        kind = metric.split("/")[0]
        if kind in KINDS:
            probes.append((benchmark, metric))
        elif kind == KNOWN:
            locality.append((benchmark, metric))
        elif benchmark not in ability and means.able(benchmark) and frame.shares((benchmark, metric)):
            ability[benchmark] = (benchmark, metric)
        else:
            others.append((benchmark, metric))
    return list(ability.values()), probes, locality, others
