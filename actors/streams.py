"""Edit streams on editor actors: which cell is edited next, how far ahead of scoring, and what to do when one dies.

Editing runs ahead of scoring by a bounded number of snapshots. A snapshot is *returned* by the editor, so it belongs
to the driver and outlives the actor; should its copy be lost all the same, it is made again from the journal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.editor import Job
from raysys.journal import Journal, Stream

DEATHS = 3  # editors a cell may lose without getting any further, before it is given up


@dataclass
class Streaming:
    """A cell while it is being edited."""

    job: Job
    method: str  # what results call it
    order: int  # of the edits
    snapshots: tuple[int, ...]  # numbers of edits, ascending
    stream: Stream | None = None  # once an editor has opened it
    values: dict[int, Any] = field(default_factory=dict)  # edits -> reference of the Snapshot
    next: int = 0  # index of the snapshot that is asked for next
    deaths: int = 0  # of editors, since the last snapshot

    def restore(self, edits: int) -> None:
        """Put the snapshot after `edits` edits into the object store again, from the journal."""
        assert self.stream is not None
        self.values[edits] = ray.put(Journal(Path(self.job.journal), self.stream).snapshot(edits))


@dataclass(frozen=True)
class Opened:
    """A cell's stream is known: its snapshots have names now."""

    cell: Streaming


@dataclass(frozen=True)
class Made:
    """A snapshot exists."""

    cell: Streaming
    edits: int


@dataclass(frozen=True)
class Lost:
    """A cell can't be edited any further; what it has so far stays."""

    cell: Streaming
    reason: str


@dataclass
class _Desk:
    """One editor's place: the actor, the cell it has open, and the call that is running."""

    number: int
    life: int = 0
    actor: Any = None
    cell: Streaming | None = None
    call: Any = None  # reference of what it is doing: opening the cell, or making a snapshot
    value: Any = None  # reference of that snapshot; None while it opens the cell

    @property
    def name(self) -> str:
        return f"editor-{self.number}" + (f".{self.life}" if self.life else "")


class Streams:
    """`size` editors made by `start(name)` work through `cells`. Wait on `refs`, hand what is ready to `take`."""

    def __init__(
        self,
        start: Callable[[str], Any],
        size: int,
        cells: Sequence[Streaming],
        note: Callable[..., None] = lambda *a, **k: None,
    ) -> None:
        self._start, self.note = start, note
        self.waiting = deque(cells)
        self.desks = [_Desk(n) for n in range(min(size, len(cells)))]
        for desk in self.desks:
            desk.actor = start(desk.name)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to edit."""
        return bool(self.waiting) or any(d.cell for d in self.desks)

    @property
    def refs(self) -> list[Any]:
        """References to wait on."""
        return [d.call for d in self.desks if d.call is not None]

    def advance(self, room: int) -> None:
        """Give idle editors something to do, for at most `room` more snapshots."""
        for desk in self.desks:
            if desk.call is not None or desk.actor is None:
                continue
            if desk.cell is None and self.waiting:
                desk.cell = self.waiting.popleft()
                desk.call = desk.actor.open.options(name=f"open {desk.cell.job.cell}").remote(desk.cell.job)
            elif desk.cell is not None and room > 0:
                edits = desk.cell.snapshots[desk.cell.next]
                label = f"{desk.cell.job.cell}: to {edits} edits"
                desk.call, desk.value = desk.actor.publish.options(name=label, num_returns=2).remote(edits)
                room -= 1

    def take(self, ref: Any) -> Opened | Made | Lost | None:
        """Deal with a reference of `refs` that is ready."""
        desk = next(d for d in self.desks if d.call == ref)
        cell, value = desk.cell, desk.value
        desk.call = desk.value = None
        assert cell is not None
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            desk.cell = None
            cause = error.cause if isinstance(error.cause, Exception) else error
            return Lost(cell, f"{cause}" if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}")
        except RayError as error:
            return self._died(desk, cell, error)
        return self._opened(desk, cell, answer) if value is None else self._made(desk, cell, value)

    def close(self) -> None:
        """End all editors."""
        for desk in self.desks:
            if desk.actor is not None:
                ray.kill(desk.actor)

    def _opened(self, desk: _Desk, cell: Streaming, stream: Stream) -> Opened | Lost | None:
        if cell.stream is None:
            cell.stream = stream
            return Opened(cell)
        if cell.stream != stream:
            desk.cell = None
            return Lost(cell, "a second editor sees another model or other artifacts than the first one did")
        return None

    def _made(self, desk: _Desk, cell: Streaming, value: Any) -> Made:
        edits = cell.snapshots[cell.next]
        cell.values[edits] = value
        cell.next, cell.deaths = cell.next + 1, 0
        if cell.next == len(cell.snapshots):
            desk.cell = None
        return Made(cell, edits)

    def _died(self, desk: _Desk, cell: Streaming, error: Exception) -> Lost | None:
        """Start a new editor, which opens the same cell and takes the steps so far from the journal."""
        reason = str(error).strip().splitlines()[0]
        self.note("editor lost", editor=desk.name, cell=cell.job.cell, reason=reason)
        cell.deaths += 1
        desk.life += 1
        desk.actor = self._start(desk.name)
        if cell.deaths >= DEATHS:
            desk.cell = None
            return Lost(cell, f"{cell.deaths} editors died on it one after another: {reason}")
        desk.call = desk.actor.open.options(name=f"open {cell.job.cell} again").remote(cell.job)
        return None
