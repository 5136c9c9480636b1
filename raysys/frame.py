"""The table of scores, cut into what statistics count: one metric of one benchmark at one snapshot, item by item."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys import stats
from raysys.collapse import Told, read_answer

Metric = tuple[str, str]  # benchmark, metric
Items = tuple[NDArray[np.int64], stats.Array]  # numbers of items, ascending, and their values


class Frame:
    """The table of scores, cut by (cell, edits, benchmark, metric).

    Its *items* are what statistics count: queries, known by number; but all questions of one metric about one edit
    are one item, since they stand or fall together. `requests`: cell -> ids of its edits, in their order.
    """

    def __init__(self, table: Any, requests: Mapping[str, Sequence[str]]) -> None:
        self._query, queries = _codes(table["query"])
        self._value: stats.Array = table["value"].to_numpy().astype(float)
        self._edit = table["edit"].to_numpy()
        self._group, _ = _codes(table["group"])
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
        rows = self._all(cells, edits, metric)
        items, place = np.unique(self._item[rows], return_inverse=True)
        return items, np.bincount(place, self._value[rows], len(items)) / np.bincount(place, minlength=len(items))

    def shares(self, metric: Metric) -> bool:
        """Whether all values that are numbers lie in [0, 1], so that losses of it are points."""
        rows = np.concatenate([r for (_, _, m), r in self._rows.items() if m == metric])
        values = self._value[rows]
        return not ((values < 0) | (values > 1)).any()

    def pooled_error(self, cells: Sequence[str], edits: int, metric: Metric) -> float | None:
        """Standard error of the mean as the harness pools it over the groups of a benchmark; None without groups."""
        rows = self._all(cells, edits, metric)
        items, first = np.unique(self._item[rows], return_index=True)
        groups = self._group[rows][first]
        if len(np.unique(groups)) < 2:
            return None
        values = self.items(cells, edits, metric)[1]
        parts = [values[groups == g] for g in np.unique(groups)]
        assert len(values) == len(items)
        errors = [stats.standard_error(p) if len(p) > 1 else 0.0 for p in parts]
        return stats.pooled_error(errors, [len(p) for p in parts])

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

    def values(self, cell: str, edits: int, metric: Metric) -> dict[int, float]:
        """Query -> its score."""
        rows = self._rows.get((cell, edits, metric))
        return {} if rows is None else dict(zip(self._query[rows].tolist(), self._value[rows].tolist(), strict=True))

    def _all(self, cells: Sequence[str], edits: int, metric: Metric) -> NDArray[np.intp]:
        found = [self._rows[c, edits, metric] for c in cells if (c, edits, metric) in self._rows]
        return np.concatenate(found) if found else np.zeros(0, np.intp)


def _codes(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    coded = column.combine_chunks().dictionary_encode()
    if hasattr(coded, "chunks"):
        coded = coded.combine_chunks()
    return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), coded.dictionary.to_pylist()
