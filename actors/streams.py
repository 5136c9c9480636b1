"""Edit streams on editor actors: which cell is edited next, how far ahead of scoring, and what to do when one dies.

Editing runs ahead of scoring by a bounded number of snapshots. A snapshot is *returned* by the editor, so it belongs
to the driver and outlives the actor; should its copy be lost all the same, it is made again from the journal.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from actors.cluster import alive, where
from actors.editor import Job
from actors.machine import end, nodes, reason_of
from actors.places import LOADING
from raysys.files import place
from raysys.journal import Journal, Stream
from raysys.stores import StorageError

DEATHS = 3  # editors a cell may lose without getting any further, before it is given up
MOVES = 30  # editors a cell may lose together with their nodes


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
    moves: int = 0  # editors lost together with their nodes

    def value(self, edits: int) -> Any:
        """Reference of the snapshot after `edits` edits; one that was let go is made again from the journal."""
        if edits not in self.values:
            self.restore(edits)
        return self.values[edits]

    def restore(self, edits: int) -> None:
        """Put the snapshot after `edits` edits into the object store again, from the journal."""
        assert self.stream is not None
        self.values[edits] = ray.put(Journal(place(self.job.journal), self.stream).snapshot(edits))


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
    about: Any = None  # reference of what the editor says of itself, its node included
    nodes: tuple[str, ...] = ()  # where it is while it gets ready
    sign: Any = None  # of progress: when it changes, the editor is alive
    since: float = 0.0  # when it changed, or the call began

    @property
    def name(self) -> str:
        return f"editor-{self.number}" + (f".{self.life}" if self.life else "")

    @property
    def node_gone(self) -> bool:
        """Whether the editor's node was lost, and not just the editor."""
        there = self.nodes
        with suppress(RayError, TimeoutError, TypeError, ValueError):
            there = nodes(ray.get(self.about, timeout=0))
        return not all(map(alive, there))


class Streams:
    """`size` editors made by `start(name)` work through `cells`. Wait on `refs`, hand what is ready to `take`."""

    def __init__(
        self,
        start: Callable[[str], Any],
        size: int,
        cells: Sequence[Streaming],
        note: Callable[..., None] = lambda *a, **k: None,
        stall: float = 3600.0,
    ) -> None:
        self._start, self.note, self.stall = start, note, stall
        self.waiting = deque(cells)
        self.desks = [_Desk(n) for n in range(min(size, len(cells)))]
        for desk in self.desks:
            desk.actor = start(desk.name)
            desk.about = desk.actor.describe.remote()

    @property
    def busy(self) -> bool:
        """Whether there is anything left to edit."""
        return bool(self.waiting) or any(d.cell for d in self.desks)

    @property
    def refs(self) -> list[Any]:
        """References to wait on."""
        return [d.call for d in self.desks if d.call is not None]

    def advance(self, room: int) -> None:
        """Give idle editors something to do, for at most `room` more snapshots; end those that have nothing left."""
        for desk in self.desks:
            if desk.call is not None or desk.actor is None:
                continue
            desk.since = time.monotonic()
            if desk.cell is None and not self.waiting:
                end(desk.actor)
                desk.actor = None
            elif desk.cell is None:
                desk.cell = self.waiting.popleft()
                desk.call = desk.actor.open.options(name=f"open {desk.cell.job.cell}").remote(desk.cell.job)
            elif room > 0:
                edits = desk.cell.snapshots[desk.cell.next]
                label = f"{desk.cell.job.cell}: to {edits} edits"
                desk.call, desk.value = desk.actor.publish.options(name=label, num_returns=2).remote(edits)
                room -= 1

    def take(self, ref: Any) -> Opened | Made | Lost | None:
        """Deal with a reference of `refs` that is ready. Raises StorageError when an editor can't keep its edits."""
        desk = next(d for d in self.desks if d.call == ref)
        cell, value = desk.cell, desk.value
        desk.call = desk.value = None
        assert cell is not None
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, StorageError):  # what is full or away for one is so for all
                raise error.cause from None
            if isinstance(error.cause, ValueError):  # the method says no, and would say it again
                desk.cell = None
                return Lost(cell, str(error.cause))
            return self._died(desk, cell, error)  # perhaps it is the editor's fault, or its machine's
        except RayError as error:
            return self._died(desk, cell, error)
        return self._opened(desk, cell, answer) if value is None else self._made(desk, cell, value)

    def watch(self, sign: Callable[[Job], Any]) -> Lost | None:
        """Replace an editor whose `sign(job)` of progress has not changed for too long; one at a time."""
        for desk in self.desks:
            if desk.call is None or desk.cell is None:
                continue
            answered = bool(ray.wait([desk.about], timeout=0)[0])
            patience = self.stall if answered else max(LOADING, self.stall)
            desk.nodes = desk.nodes or (() if answered else where(desk.actor))
            if not answered and not desk.nodes:  # it waits for room in the cluster
                desk.since = time.monotonic()
            elif (now := sign(desk.cell.job)) != desk.sign:
                desk.sign, desk.since = now, time.monotonic()
            elif time.monotonic() - desk.since > patience:
                cell, desk.call, desk.value = desk.cell, None, None
                return self._died(desk, cell, TimeoutError(f"no progress for {patience:g} s; it was killed"))
        return None

    def close(self) -> None:
        """End all editors."""
        for desk in self.desks:
            end(desk.actor)

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
        reason = reason_of(error)
        innocent = isinstance(error, ActorUnavailableError) or desk.node_gone  # out of reach, or its node is gone
        what = "node lost" if innocent else "editor lost"
        self.note(what, editor=desk.name, cell=cell.job.cell, reason=reason)
        cell.deaths, cell.moves = cell.deaths + (not innocent), cell.moves + innocent
        end(desk.actor)  # what is left of it: other ranks, and their place
        desk.life += 1
        desk.actor, desk.since = self._start(desk.name), time.monotonic()
        desk.about, desk.nodes = desk.actor.describe.remote(), ()
        if cell.deaths >= DEATHS or cell.moves > MOVES:
            desk.cell = None
            return Lost(cell, f"{cell.deaths + cell.moves} editors failed on it: {reason}")
        desk.call = desk.actor.open.options(name=f"open {cell.job.cell} again").remote(cell.job)
        return None
