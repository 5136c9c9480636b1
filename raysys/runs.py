"""Run folders: which there are, which one is meant, how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysys import locks
from raysys.files import Location, place, within
from raysys.journal import last_edit
from raysys.names import did_you_mean
from raysys.results import Results
from raysys.spec import StudySpec

ROOT = "runs"


def find(run: str, root: str | Location = ROOT) -> Results:
    """What `run` names: a run folder, a study's TOML file, a folder's name under `root`, or a study's name there (its
    latest run). Raises ValueError when there is none."""
    path = place(run)
    if path.suffix == ".toml":
        spec = StudySpec.load(run)
        folder = spec.folder
        if not (folder / "spec.json").is_file():
            others = ", ".join(str(r.folder) for r in everything(spec.root) if _name(r) == spec.name)
            hint = f" Run with other settings: {others}." if others else ""
            raise ValueError(f"{run} has not been run as it stands ({folder} does not exist).{hint}")
        return Results(folder)
    if path.is_dir() and (path / "spec.json").is_file():
        return Results(path)
    there = everything(root)
    named = [r for r in there if r.folder.name == run] or [r for r in there if _name(r) == run]
    if named:
        return named[0]
    if path.is_dir():
        return Results.open(path)  # says what is wrong with it
    known = {_name(r) for r in there} | {r.folder.name for r in there}
    raise ValueError(f"no run {run!r} under {root}/{did_you_mean(run, known)}")


def everything(root: str | Location = ROOT) -> list[Results]:
    """All runs under `root`, the latest first."""
    specs: list[Any] = sorted(place(root).glob("*/spec.json"), key=lambda p: -p.stat().st_mtime)
    return [Results(p.parent) for p in specs]


def _name(results: Results) -> str:
    """The study's name: the folder's without the hash."""
    return results.folder.name.rpartition("-")[0]


@dataclass(frozen=True)
class Stream:
    """How far one edit stream is."""

    cell: str
    model: str
    method: str
    order: int
    edits: int
    wanted: int


@dataclass(frozen=True)
class Status:
    """How far a run is. `state`: complete, running, failed (ended with failures) or stopped (run it again)."""

    name: str
    folder: str
    state: str
    streams: list[Stream]
    units: int
    failures: int
    started: float | None
    finished: float | None
    report: str | None


def status(results: Results) -> Status:
    """Looks at the folder only; a running study is not disturbed."""
    manifest: dict[str, Any] = results.manifest
    spec = results.spec
    streams = []
    for cell in results.cells():
        done = last_edit(results.journal_folder(cell.id))
        streams.append(Stream(cell.id, cell.model, cell.method, cell.order, done, len(cell.about.get("requests", ()))))
    failures = len(results.failures())
    page = within(results.folder, "report.html")
    if locks.held(results.folder):
        state = "running"
    elif manifest.get("complete"):
        state = "complete"
    else:
        state = "failed" if failures else "stopped"
    return Status(
        spec.name, str(results.folder), state, streams, len(results.done()), failures,
        manifest.get("started"), manifest.get("finished"), str(page) if page.is_file() else None,
    )  # fmt: skip
