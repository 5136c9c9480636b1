"""What a study has found so far, on disk: valid at every moment, continued by the next run of the same study.

    runs/<name>-<hash>/              on a disk that all machines see, or in object storage (raysys/files.py)
      spec.json, manifest.json       the study and what it ran on
      cells/<cell>/cell.json         model, method, order, requests, dropped records, snapshots made
      cells/<cell>/journal/          every edit (raysys/journal.py)
      units/<unit>.parquet           scores of one (snapshot, block), whole or absent
      scores.parquet, units.parquet  the same, compacted when the study ends
      collapsed.json                 snapshots whose answers are worth nothing, and why, as of then
      failures/<unit>.json           units given up, with the reason
      events.jsonl                   what else happened (restarts, lost actors)
      .lock                          held by the driver (raysys/locks.py)

A folder may come from anywhere: what is read from it is data alone, and no name or link in it leads outside.
A unit belongs to a snapshot, not to a cell: the untouched base is scored once for all methods.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys import locks
from raysys.files import (
    Location,
    append_line,
    each,
    found,
    lines,
    place,
    read_json,
    within,
    write_bytes,
    write_json,
)
from raysys.spec import SpecError, StudySpec
from raysys.stored import SCORES, UNITS, read_table, read_unit, unit_table, write_table
from raysys.stores import Remote, StorageError
from raysys.types import EditRequest


@dataclass(frozen=True)
class Cell:
    """One edit stream of the grid."""

    id: str
    model: str
    method: str
    order: int
    settings: Mapping[str, Any]
    about: Mapping[str, Any]  # all of cell.json


class Results:
    """The run folder of one study."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._still_mine: Callable[[], None] = lambda: None  # raises once another driver has taken over

    @classmethod
    def open(cls, folder: str | Location) -> Results:
        """An existing run folder. Raises ValueError when it isn't one."""
        folder = place(folder)
        if not within(folder, "spec.json").is_file():
            raise ValueError(f"{folder}: not a run folder (it has no spec.json); `raysys list` names the runs")
        return cls(folder)

    @classmethod
    def create(cls, spec: StudySpec, folder: Location | None = None) -> Results:
        """The run folder of `spec`, made or continued. Raises SpecError when it holds another study, StorageError."""
        results = cls(folder or spec.folder)
        path = within(results.folder, "spec.json")
        try:
            if isinstance(path, Remote):
                path.hasty().exists()  # a wrong address is told at once
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                there = results.spec
                if there.identity != spec.identity:
                    raise SpecError(
                        f"{results.folder} holds the results of another study: {_difference(there, spec)}. "
                        f"Nothing was touched. Give this study another name or root, or move that folder away."
                    )
            else:
                write_json(path, spec.model_dump(mode="json"))
            probe = results.folder / f".write-{os.getpid()}"
            write_bytes(probe, b"")
            probe.unlink()
        except StorageError:
            raise
        except OSError as error:
            raise SpecError(f"{results.folder}: can't write there ({error.strerror}); choose another root") from error
        return results

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one driver at a time writes a run folder. Raises SpecError when another one does."""
        try:
            with locks.lock(self.folder) as self._still_mine:
                yield
        except locks.Locked as error:
            raise SpecError(str(error)) from error

    # --- the study ---------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> StudySpec:
        """The study as it was first started."""
        path = within(self.folder, "spec.json")
        return StudySpec.read(read_json(path), str(path))

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, machine, times; empty before the first run has started."""
        path = within(self.folder, "manifest.json")
        return _tree(read_json(path), path) if path.exists() else {}

    def write_manifest(self, more: Mapping[str, Any]) -> None:
        """Add to the manifest."""
        self._still_mine()
        write_json(within(self.folder, "manifest.json"), self.manifest | dict(more))

    def note(self, what: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        append_line(within(self.folder, "events.jsonl"), json.dumps({"time": time.time(), "what": what} | details))

    def events(self) -> list[dict[str, Any]]:
        """What was noted, oldest first; a line that was cut short is left out."""
        events = []
        for line in lines(within(self.folder, "events.jsonl")):
            try:
                events.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError):
                continue
        return events

    # --- cells -------------------------------------------------------------------------------------------------------

    def cell_folder(self, cell: str) -> Location:
        """Where a cell keeps its journal and description."""
        return within(self.folder, "cells", cell)

    def journal_folder(self, cell: str) -> Location:
        """Where a cell keeps its edits."""
        return within(self.cell_folder(cell), "journal")

    def write_cell(self, cell: str, about: Mapping[str, Any]) -> None:
        """Describe a cell: model, method, order, settings, requests, dropped, snapshots {edits: id} ..."""
        write_json(within(self.cell_folder(cell), "cell.json"), dict(about))

    def cell_about(self, cell: str) -> dict[str, Any]:
        """What `write_cell` wrote; empty when it has not started."""
        path = within(self.cell_folder(cell), "cell.json")
        return _tree(read_json(path), path) if path.exists() else {}

    def cells(self) -> list[Cell]:
        """Every cell that has started, in the order of the grid."""
        paths = found(within(self.folder, "cells"), "*/cell.json")
        return sorted(map(_cell, paths, each(read_json, paths)), key=lambda c: c.about["number"])

    def snapshot(self, cell: str, edits: int) -> Any:
        """The snapshot of a cell after `edits` edits, rebuilt from its journal."""
        from raysys.journal import Journal, Stream

        about = self.cell_about(cell)
        if not about.get("stream"):
            raise ValueError(f"{self.folder}: no cell {cell!r} has started; there are: {[c.id for c in self.cells()]}")
        try:
            requests = tuple(EditRequest(**r) for r in about["requests"])
            stream = Stream(**(about["stream"] | {"requests": requests}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.cell_folder(cell)}: cell.json is damaged ({error})") from error
        return Journal(self.journal_folder(cell), stream).snapshot(edits)

    def edits(self) -> pa.Table:
        """Every edit of every cell so far.

        Columns: cell, edit, id, subject, prompt, target, was, seconds, started, ended, refused, log (JSON).
        """
        from raysys.journal import load_all

        rows = []
        for cell in self.cells():
            for entry in load_all(self.journal_folder(cell.id), tensors=False):
                for number, request in enumerate(entry.requests, entry.first + 1):
                    rows.append(
                        {
                            "cell": cell.id,
                            "edit": number,
                            "id": request.id,
                            "subject": request.subject,
                            "prompt": request.prompt,
                            "target": request.target,
                            "was": request.was,
                            "seconds": (entry.ended - entry.started) / len(entry.requests),
                            "started": entry.started,
                            "ended": entry.ended,
                            "refused": entry.refused.get(request.id, ""),
                            "log": json.dumps(dict(entry.log)),
                        }
                    )
        names = ("cell", "id", "subject", "prompt", "target", "was", "refused", "log")
        schema = pa.schema([(n, pa.string()) for n in names] + [("edit", pa.int32())])
        schema = pa.unify_schemas([schema, pa.schema([(n, pa.float64()) for n in ("seconds", "started", "ended")])])
        return pa.Table.from_pylist(rows, schema=schema)

    # --- units -------------------------------------------------------------------------------------------------------

    def done(self) -> set[str]:
        """Ids of the units whose scores are on disk."""
        return {p.stem for p in self._files("units", "*.parquet")} | self._compacted()

    def add(self, unit: Mapping[str, Any], scores: Iterable[Mapping[str, Any]]) -> None:
        """Make the scores of one unit durable: the whole file or none. `unit` has the fields of UNITS.

        Raises StorageError when there is no space, or another driver has taken over.
        """
        self._still_mine()
        rows = [{"unit": unit["unit"]} | dict(s) for s in scores]
        columns = {name: [row.get(name) for row in rows] for name in SCORES.names}  # 20 times faster than row by row
        table = pa.Table.from_pydict(columns, SCORES).replace_schema_metadata({"unit": json.dumps(dict(unit))})
        write_table(table, within(self.folder, "units", f"{unit['unit']}.parquet"))
        within(self.folder, "failures", f"{unit['unit']}.json").unlink(missing_ok=True)

    def compact(self) -> None:
        """Join the files of all units into scores.parquet and units.parquet. Safe to interrupt at any point."""
        self._still_mine()
        files = self._files("units", "*.parquet")
        if not files:
            return
        units, scores = self._unit_rows(), self._score_rows()
        self._still_mine()  # reading takes long where there is much
        write_table(scores, within(self.folder, "scores.parquet"))
        write_table(units, within(self.folder, "units.parquet"))  # last: `done` believes it
        each(lambda file: file.unlink(), files)

    def mark(self) -> None:
        """Write collapsed.json: every snapshot and metric whose answers are worth nothing, with the reason."""
        from raysys.summary import collapsed

        write_json(within(self.folder, "collapsed.json"), collapsed(self))

    def collapsed(self) -> list[dict[str, Any]]:
        """What `mark` wrote: cell, edits, benchmark, metric, reason; empty before the study has ended once."""
        path = within(self.folder, "collapsed.json")
        return read_json(path) if path.exists() else []

    def fail(self, unit: str, about: Mapping[str, Any]) -> None:
        """Record that a unit was given up: cell, edits, benchmark, tries, reason."""
        self._still_mine()
        write_json(within(self.folder, "failures", f"{unit}.json"), {"unit": unit} | dict(about))

    def failures(self) -> list[dict[str, Any]]:
        """Units (and cells) given up, with the reason."""
        return each(read_json, self._files("failures", "*.json"))

    def forget_failures(self) -> None:
        """A new run tries everything again."""
        each(lambda file: file.unlink(), self._files("failures", "*.json"))

    def units(self) -> pa.Table:
        """Every unit with its timings, one row for each (cell, edits) that it serves."""
        return self._with_cells(self._unit_rows())

    def scores(self) -> pa.Table:
        """Every score, with its cell, model, method, order, edits (of the snapshot) and benchmark beside SCORES.

        `collapsed` says why the answers of the snapshot are worth nothing, "" where they are sound (see `mark`).
        """
        units = self._with_cells(self._unit_rows().select(["unit", "snapshot", "block", "benchmark"]))
        table = self._score_rows().join(units, "unit", join_type="inner").combine_chunks()
        marks: Any = np.full(len(table), "", object)
        for mark in self.collapsed():
            same = [pc.equal(table[name], mark[name]) for name in ("cell", "edits", "benchmark", "metric")]
            marks[reduce(pc.and_, same).to_numpy()] = mark["reason"]
        return table.append_column("collapsed", pa.array(marks, pa.string()))

    def _score_rows(self) -> pa.Table:
        compacted = within(self.folder, "scores.parquet")
        tables = each(read_table, self._loose())
        if compacted.exists():
            known = pc.is_in(pc.field("unit"), pa.array(sorted(self._compacted()), pa.string()))
            tables.insert(0, read_table(compacted).filter(known))
        return pa.concat_tables([t.replace_schema_metadata(None) for t in tables] or [SCORES.empty_table()])

    def _unit_rows(self) -> pa.Table:
        compacted = within(self.folder, "units.parquet")
        table = unit_table(each(read_unit, self._loose()))
        return pa.concat_tables([read_table(compacted, UNITS), table]) if compacted.exists() else table

    def _compacted(self) -> set[str]:
        """Units whose scores are in the compacted tables; units.parquet, written last, decides."""
        compacted = within(self.folder, "units.parquet")
        return set(read_table(compacted, UNITS)["unit"].to_pylist()) if compacted.exists() else set()

    def _loose(self) -> list[Location]:
        """Files of units that are not in the compacted tables."""
        known = self._compacted()
        return [p for p in self._files("units", "*.parquet") if p.stem not in known]

    def _files(self, folder: str, pattern: str) -> list[Location]:
        return found(within(self.folder, folder), pattern)

    def _with_cells(self, units: pa.Table) -> pa.Table:
        rows = []
        for cell in self.cells():
            blocks = set(cell.about.get("blocks", ()))
            for edits, snapshot in cell.about.get("snapshots", {}).items():
                rows.append((snapshot, cell.id, cell.model, cell.method, cell.order, int(edits), blocks))
        by_snapshot: dict[str, list[Any]] = {}
        for row in rows:
            by_snapshot.setdefault(row[0], []).append(row)
        picked: list[int] = []
        columns: dict[str, list[Any]] = {k: [] for k in ("cell", "model", "method", "order", "edits")}
        pairs = zip(units["snapshot"].to_pylist(), units["block"].to_pylist(), strict=True)
        for index, (snapshot, block) in enumerate(pairs):
            for _, *values, blocks in by_snapshot.get(snapshot, ()):
                if block not in blocks:  # probes of another order of the edits
                    continue
                picked.append(index)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
        table = units.take(pa.array(picked, pa.int64()))
        types = {"order": pa.int32(), "edits": pa.int32()}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, types.get(name, pa.string())))
        return table


def _tree(tree: Any, path: Location) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: wants a JSON object, got {type(tree).__name__}; the file is damaged")
    return tree


def _cell(path: Location, tree: Any) -> Cell:
    about = _tree(tree, path)
    kinds = {"number": int, "model": str, "method": str, "order": int, "settings": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)}: absent or of the wrong kind; the file is damaged")
    return Cell(path.parent.name, about["model"], about["method"], about["order"], about["settings"], about)


def _difference(there: StudySpec, here: StudySpec) -> str:
    a, b = there.identity, here.identity
    return "; ".join(f"{k} is {a.get(k)!r} there and {b.get(k)!r} here" for k in sorted(a) if a.get(k) != b.get(k))
