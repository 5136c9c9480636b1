"""What a study says: its scores as curves, budgets and counts. Terminal and HTML report both draw from here.

A *curve* is one metric of one benchmark over the number of edits, for one method on one model. Where a study has
several edit orders, a curve averages every item over them first, so that n stays the number of items.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raysys import stats
from raysys.stats import Budget, Difference, Estimate, Told

if TYPE_CHECKING:
    from raysys.results import Cell, Results

KINDS = ("efficacy", "paraphrase", "neighbourhood", "portability")
PROTOCOLS = {"probability": "P(right) > P(wrong)", "forced": "teacher-forced", "free": "free generation"}
KNOWN = "known"  # metrics of facts that were never edited

Metric = tuple[str, str]  # benchmark, metric
Items = tuple[NDArray[np.int64], stats.Array]  # numbers of items, ascending, and their values
AGES = (0, 1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # edits made since, lower edges


@dataclass(frozen=True)
class Point:
    """One metric at one snapshot; `change` against the base model on the same items where it was asked them.
    `collapse` says why the answers are worth nothing, "" when they are sound."""

    edits: int
    estimate: Estimate
    change: Difference | None = None
    collapse: str = ""


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


@dataclass(frozen=True)
class MethodView:
    """One method on one model, over its edit orders. `ages`: protocol -> retention at the last snapshot."""

    model: str
    method: str
    cells: list[CellView]
    curves: Curves
    ages: Mapping[str, list[Age]] = field(default_factory=dict)

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
    frame = Frame(results.scores(), {c.id: [r["id"] for r in c.about["requests"]] for c in results.cells()})
    ability, probes, locality, others = _sort(frame.metrics, [b.title for b in results.spec.benchmarks])
    methods: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in results.cells():
        methods[cell.model, cell.method].append(cell)
    views = []
    for (model, method), cells in methods.items():
        made = [_cell(frame, c, ability, delta) for c in cells]
        ids = [c.id for c in cells]
        merged = made[0].curves if len(made) == 1 else _curves(frame, ids, ability)
        ages = {p: found for p in PROTOCOLS if (found := _ages(frame, ids, f"efficacy/{p}"))}
        views.append(MethodView(model, method, made, merged, ages))
    return Summary(views, ability, locality, probes, others, delta)


def _cell(frame: Frame, cell: Cell, ability: list[Metric], delta: float) -> CellView:
    curves = _curves(frame, [cell.id], ability)
    pairs, collapsed = {}, set()
    for metric in ability:
        for point in curves.get(metric, []):
            if point.edits and point.change:
                pairs[metric[0], point.edits] = _same(*(frame.items([cell.id], n, metric) for n in (point.edits, 0)))
                if point.collapse:
                    collapsed.add((metric[0], point.edits))
    budget = stats.edit_budget(pairs, delta, frozenset(collapsed))
    return CellView(cell.id, cell.model, cell.method, cell.order, curves, budget)


def _curves(frame: Frame, cells: Sequence[str], ability: list[Metric]) -> Curves:
    curves: Curves = {}
    for metric in frame.metrics:
        base = frame.items(cells, 0, metric)
        told_base = frame.told(cells[0], 0, metric) if metric in ability else {}
        points = []
        for edits in frame.snapshots(cells, metric):
            items = frame.items(cells, edits, metric)
            change, broken = None, ""
            now, then = _same(items, base)
            if edits and len(now):
                change = stats.paired(now, then)
            if edits and metric in ability:
                broken = next(filter(None, (_collapse(frame.told(c, edits, metric), told_base) for c in cells)), "")
            points.append(Point(edits, stats.estimate(items[1]), change, broken))
        if points:
            curves[metric] = points
    return curves


def _collapse(now: Mapping[int, Told], base: Mapping[int, Told]) -> str:
    return stats.collapse(list(now.values()), [base[q] for q in now if q in base]) if now else ""


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


def _sort(metrics: Iterable[Metric], benchmarks: list[str]) -> tuple[list[Metric], ...]:
    """(the chosen metric of each general-ability benchmark, probes of edits, locality, all others), as the study lists
    them. A benchmark's choice is its "accuracy", else the first of its metrics by name."""
    ability: dict[str, Metric] = {}
    probes, locality, others = [], [], []
    rank = {name: i for i, name in enumerate(benchmarks)}
    for benchmark, metric in sorted(metrics, key=lambda m: (rank.get(m[0], len(rank)), m[1] != "accuracy", m)):
        kind = metric.split("/")[0]
        if kind in KINDS:
            probes.append((benchmark, metric))
        elif kind == KNOWN:
            locality.append((benchmark, metric))
        elif benchmark not in ability:
            ability[benchmark] = (benchmark, metric)
        else:
            others.append((benchmark, metric))
    return list(ability.values()), probes, locality, others


class Frame:
    """The table of scores, cut by (cell, edits, benchmark, metric).

    Its *items* are what statistics count: queries, known by number; but all questions of one metric about one edit
    are one item, since they stand or fall together. `requests`: cell -> ids of its edits, in their order.
    """

    def __init__(self, table: Any, requests: Mapping[str, Sequence[str]]) -> None:
        self._query, queries = _codes(table["query"])
        self._value: stats.Array = table["value"].to_numpy().astype(float)
        self._edit = table["edit"].to_numpy()
        self._answer, self._answers = _codes(table["answer"])
        self._read: dict[int, Told] = {}
        codes, names = zip(*(_codes(table[c]) for c in ("cell", "benchmark", "metric")), strict=True)
        keys = np.stack([codes[0], table["edits"].to_numpy(), codes[1], codes[2]], axis=1)
        self._item = self._query.copy()
        known = {r: len(queries) + i for i, r in enumerate(dict.fromkeys(r for ids in requests.values() for r in ids))}
        for code, cell in enumerate(names[0]):
            rows = (codes[0] == code) & (self._edit > 0)
            numbers = np.array([known[r] for r in requests[cell]])
            self._item[rows] = numbers[self._edit[rows] - 1]
        order = np.lexsort(keys.T[::-1])
        cuts = np.flatnonzero(np.any(np.diff(keys[order], axis=0) != 0, axis=1)) + 1
        self._rows: dict[tuple[str, int, Metric], NDArray[np.intp]] = {}
        for rows in np.split(order, cuts) if len(keys) else []:
            cell, edits, benchmark, metric = keys[rows[0]]
            self._rows[names[0][cell], int(edits), (names[1][benchmark], names[2][metric])] = np.sort(rows)
        self._edits: dict[tuple[str, Metric], set[int]] = defaultdict(set)
        for cell, edits, metric in self._rows:
            self._edits[cell, metric].add(edits)
        self.metrics: list[Metric] = sorted({metric for _, _, metric in self._rows})

    def snapshots(self, cells: Sequence[str], metric: Metric) -> list[int]:
        """Numbers of edits at which the metric was measured."""
        return sorted(set().union(*(self._edits[c, metric] for c in cells if (c, metric) in self._edits)))

    def items(self, cells: Sequence[str], edits: int, metric: Metric) -> Items:
        """Values of all items, averaged over their questions and over `cells`."""
        found = [self._rows[c, edits, metric] for c in cells if (c, edits, metric) in self._rows]
        rows = np.concatenate(found) if found else np.zeros(0, np.intp)
        items, place = np.unique(self._item[rows], return_inverse=True)
        return items, np.bincount(place, self._value[rows], len(items)) / np.bincount(place, minlength=len(items))

    def by_edit(self, cell: str, edits: int, metric: Metric) -> list[tuple[int, float]]:
        """(position of the probe's edit, value) of every row."""
        rows = self._rows.get((cell, edits, metric))
        return [] if rows is None else list(zip(self._edit[rows].tolist(), self._value[rows].tolist(), strict=True))

    def told(self, cell: str, edits: int, metric: Metric) -> dict[int, Told]:
        """Query -> what was answered, where answers were kept."""
        rows = self._rows.get((cell, edits, metric))
        if rows is None:
            return {}
        told = {}
        for query, code in zip(self._query[rows].tolist(), self._answer[rows].tolist(), strict=True):
            if self._answers[code]:
                if code not in self._read:
                    self._read[code] = read_answer(self._answers[code])
                told[query] = self._read[code]
        return told


def _codes(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    coded = column.combine_chunks().dictionary_encode()
    if hasattr(coded, "chunks"):
        coded = coded.combine_chunks()
    return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), coded.dictionary.to_pylist()


def read_answer(text: str) -> Told:
    """What a stored answer says: {"text": …} or {"chosen": index, "logprob": [one per choice], …}."""
    answer = json.loads(text)
    if "text" in answer:
        return Told(str(answer["text"]))
    return Told(int(answer["chosen"]), all(v is not None and math.isfinite(v) for v in answer["logprob"]))
