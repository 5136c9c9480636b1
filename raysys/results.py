"""What a study has found so far, on disk: valid at every moment, continued by the next run of the same study.

    runs/<name>-<hash>/
      spec.json, manifest.json       the study and what it ran on
      cells/<cell>/cell.json         model, method, order, requests, dropped records, snapshots made
      cells/<cell>/journal/          every edit (raysys/journal.py)
      units/<unit>.parquet           scores of one (snapshot, block), whole or absent
      scores.parquet, units.parquet  the same, compacted when the study ends
  collapsed.json                 snapshots whose answers are worth nothing, and why, as of then
      failures/<unit>.json           units given up, with the reason
      events.jsonl                   what else happened (restarts, lost actors)

A unit belongs to a snapshot, not to a cell: the untouched base is scored once for all methods.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysys.files import read_json, write_bytes, write_json
from raysys.spec import SpecError, StudySpec
from raysys.types import EditRequest

SCORES = pa.schema(
    [
        ("unit", pa.string()),
        ("query", pa.string()),
        ("group", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("edit", pa.int32()),  # position of the edit that the query belongs to, 0 for none
        ("answer", pa.string()),  # JSON
    ]
)
UNITS = pa.schema(
    [
        ("unit", pa.string()),
        ("snapshot", pa.string()),
        ("block", pa.string()),
        ("benchmark", pa.string()),
        ("items", pa.int32()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("switch_seconds", pa.float64()),
        ("started", pa.float64()),
        ("ended", pa.float64()),
        ("evaluator", pa.string()),
        ("hardware", pa.string()),
    ]
)


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

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> Results:
        """An existing run folder. Raises ValueError when it isn't one."""
        folder = Path(folder)
        if not (folder / "spec.json").is_file():
            raise ValueError(f"{folder}: not a run folder (it has no spec.json); `raysys list` names the runs")
        return cls(folder)

    @classmethod
    def create(cls, spec: StudySpec, folder: Path | None = None) -> Results:
        """The run folder of `spec`, made or continued. Raises SpecError when it holds another study."""
        results = cls(folder or spec.folder)
        path = results.folder / "spec.json"
        try:
            results.folder.mkdir(parents=True, exist_ok=True)
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
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise SpecError(f"{results.folder}: can't write there ({error.strerror}); choose another root") from error
        return results

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one driver at a time writes a run folder. Raises SpecError when another one does."""
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SpecError(f"{self.folder}: another process is running this study (`raysys status`)") from error
            yield

    # --- the study ---------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> StudySpec:
        """The study as it was first started."""
        path = self.folder / "spec.json"
        return StudySpec.check(read_json(path), str(path))

    @property
    def manifest(self) -> dict[str, Any]:
        """Versions, machine, times; empty before the first run has started."""
        path = self.folder / "manifest.json"
        return read_json(path) if path.exists() else {}

    def write_manifest(self, more: Mapping[str, Any]) -> None:
        """Add to the manifest."""
        write_json(self.folder / "manifest.json", self.manifest | dict(more))

    def note(self, what: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "what": what} | details) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """What was noted, oldest first; a line that was cut short is left out."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    # --- cells -------------------------------------------------------------------------------------------------------

    def cell_folder(self, cell: str) -> Path:
        """Where a cell keeps its journal and description."""
        return self.folder / "cells" / cell

    def write_cell(self, cell: str, about: Mapping[str, Any]) -> None:
        """Describe a cell: model, method, order, settings, requests, dropped, snapshots {edits: id} ..."""
        write_json(self.cell_folder(cell) / "cell.json", dict(about))

    def cell_about(self, cell: str) -> dict[str, Any]:
        """What `write_cell` wrote; empty when it has not started."""
        path = self.cell_folder(cell) / "cell.json"
        return read_json(path) if path.exists() else {}

    def cells(self) -> list[Cell]:
        """Every cell that has started, in the order of the grid."""
        found = [(p.parent.name, read_json(p)) for p in sorted((self.folder / "cells").glob("*/cell.json"))]
        cells = [Cell(n, a["model"], a["method"], a["order"], a["settings"], a) for n, a in found]
        return sorted(cells, key=lambda c: c.about["number"])

    def snapshot(self, cell: str, edits: int) -> Any:
        """The snapshot of a cell after `edits` edits, rebuilt from its journal."""
        from raysys.journal import Journal, Stream

        about = self.cell_about(cell)
        if not about.get("stream"):
            raise ValueError(f"{self.folder}: no cell {cell!r} has started; there are: {[c.id for c in self.cells()]}")
        stream = about["stream"]
        requests = tuple(EditRequest(**r) for r in about["requests"])
        journal = Journal(self.cell_folder(cell) / "journal", Stream(**(stream | {"requests": requests})))
        return journal.snapshot(edits)

    def edits(self) -> pa.Table:
        """Every edit of every cell so far.

        Columns: cell, edit, id, subject, prompt, target, was, seconds, started, ended, refused, log (JSON).
        """
        from raysys.journal import load_all

        rows = []
        for cell in self.cells():
            for entry in load_all(self.cell_folder(cell.id) / "journal", tensors=False):
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
        return {p.stem for p in (self.folder / "units").glob("*.parquet")} | self._compacted()

    def add(self, unit: Mapping[str, Any], scores: Iterable[Mapping[str, Any]]) -> None:
        """Make the scores of one unit durable: the whole file or none. `unit` has the fields of UNITS."""
        table = pa.Table.from_pylist([{"unit": unit["unit"]} | dict(s) for s in scores], schema=SCORES)
        table = table.replace_schema_metadata({"unit": json.dumps(dict(unit))})
        _write_table(table, self.folder / "units" / f"{unit['unit']}.parquet")
        (self.folder / "failures" / f"{unit['unit']}.json").unlink(missing_ok=True)

    def compact(self) -> None:
        """Join the files of all units into scores.parquet and units.parquet. Safe to interrupt at any point."""
        files = sorted((self.folder / "units").glob("*.parquet"))
        if not files:
            return
        units, scores = self._unit_rows(), self._score_rows()
        _write_table(scores, self.folder / "scores.parquet")
        _write_table(units, self.folder / "units.parquet")  # last: `done` believes it
        for file in files:
            file.unlink()

    def mark(self) -> None:
        """Write collapsed.json: every snapshot and metric whose answers are worth nothing, with the reason."""
        from raysys.summary import collapsed

        write_json(self.folder / "collapsed.json", collapsed(self))

    def collapsed(self) -> list[dict[str, Any]]:
        """What `mark` wrote: cell, edits, benchmark, metric, reason; empty before the study has ended once."""
        path = self.folder / "collapsed.json"
        return read_json(path) if path.exists() else []

    def fail(self, unit: str, about: Mapping[str, Any]) -> None:
        """Record that a unit was given up: cell, edits, benchmark, tries, reason."""
        write_json(self.folder / "failures" / f"{unit}.json", {"unit": unit} | dict(about))

    def failures(self) -> list[dict[str, Any]]:
        """Units (and cells) given up, with the reason."""
        return [read_json(p) for p in sorted((self.folder / "failures").glob("*.json"))]

    def forget_failures(self) -> None:
        """A new run tries everything again."""
        for path in (self.folder / "failures").glob("*.json"):
            path.unlink()

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
        for found in self.collapsed():
            same = [pc.equal(table[name], found[name]) for name in ("cell", "edits", "benchmark", "metric")]
            marks[reduce(pc.and_, same).to_numpy()] = found["reason"]
        return table.append_column("collapsed", pa.array(marks, pa.string()))

    def _score_rows(self) -> pa.Table:
        compacted = self.folder / "scores.parquet"
        tables = [pq.read_table(p, schema=SCORES) for p in self._loose()]
        if compacted.exists():
            known = pc.is_in(pc.field("unit"), pa.array(sorted(self._compacted()), pa.string()))
            tables.insert(0, pq.read_table(compacted).filter(known))
        return pa.concat_tables([t.replace_schema_metadata(None) for t in tables] or [SCORES.empty_table()])

    def _unit_rows(self) -> pa.Table:
        compacted = self.folder / "units.parquet"
        rows = [json.loads((pq.read_metadata(p).metadata or {})[b"unit"]) for p in self._loose()]
        table = pa.Table.from_pylist(rows, schema=UNITS)
        return pa.concat_tables([pq.read_table(compacted), table]) if compacted.exists() else table

    def _compacted(self) -> set[str]:
        """Units whose scores are in the compacted tables; units.parquet, written last, decides."""
        compacted = self.folder / "units.parquet"
        return set(pq.read_table(compacted, columns=["unit"])["unit"].to_pylist()) if compacted.exists() else set()

    def _loose(self) -> list[Path]:
        """Files of units that are not in the compacted tables."""
        known = self._compacted()
        return [p for p in sorted((self.folder / "units").glob("*.parquet")) if p.stem not in known]

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


def _write_table(table: pa.Table, path: Path) -> None:
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def _difference(there: StudySpec, here: StudySpec) -> str:
    a, b = there.identity, here.identity
    return "; ".join(f"{k} is {a.get(k)!r} there and {b.get(k)!r} here" for k in sorted(a) if a.get(k) != b.get(k))
