"""The evaluator pool: hands units to evaluators, replaces the dead, tries again a bounded number of times.

Ray's own ActorPool raises when an actor dies and never retries its item. Here a lost evaluator costs what it was
working on: it is replaced under a new name, gets work only after it has answered (quarantine), and the unit it was
running goes back to the queue with one try less; a unit that has none left is reported and the study goes on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError, RayError, RayTaskError

from actors.evaluator import Task
from actors.feed import Work

IN_FLIGHT = 2  # units an evaluator has: one it runs, one that waits, so that it is never idle
LOOK = 64  # units at the head of a queue among which one is looked for whose block is known
ERRORS = 3  # units that may fail on an evaluator one after another before it is replaced
STARTS = 3  # attempts to start an evaluator before its place is given up


class PoolError(RuntimeError):
    """No evaluator can be started; the message says why."""


@dataclass(frozen=True)
class Unit:
    """A snapshot and a block: the unit of work, of retry, of resume and of result."""

    id: str
    snapshot: str
    edits: int
    cell: str  # that it was submitted for
    work: Work
    name: str  # of the benchmark
    settings: Mapping[str, Any]
    value: Callable[[], Any] = field(compare=False)  # gives the reference of the Snapshot
    restore: Callable[[], None] = field(compare=False)  # makes a lost Snapshot available again
    depth: int = 0  # the lowest block that edits of the study are expected to change, 0: unknown


@dataclass(frozen=True)
class Done:
    """A scored unit."""

    unit: Unit
    about: dict[str, Any]
    scores: list[dict[str, Any]]


@dataclass(frozen=True)
class Failed:
    """A unit given up."""

    unit: Unit
    tries: int
    reason: str


@dataclass
class _Place:
    """One evaluator's place in the pool: who holds it now, and what it works on, oldest first."""

    number: int
    life: int = 0
    actor: Any = None
    answered: bool = False
    starts: int = 0
    errors: int = 0  # units that failed since one succeeded
    wearing: str | None = None
    seen: set[str] = field(default_factory=set)  # blocks of which it keeps trunks and drafts
    busy: OrderedDict[Any, Unit] = field(default_factory=OrderedDict)

    @property
    def name(self) -> str:
        return f"evaluator-{self.number}" + (f".{self.life}" if self.life else "")


class EvaluatorPool:
    """`size` evaluators made by `start(name)`. Give it units, wait on `refs`, hand finished references to `take`."""

    def __init__(
        self, start: Callable[[str], Any], size: int, retries: int, note: Callable[..., None] = lambda *a, **k: None
    ) -> None:
        self._start, self.retries, self.note = start, retries, note
        self.places = [_Place(n) for n in range(size)]
        self.about: dict[str, Any] | None = None  # what the first evaluator said of itself
        self.tries: dict[str, int] = {}
        self._queues: OrderedDict[str, deque[Unit]] = OrderedDict()  # snapshot -> units, oldest snapshot first
        self._open: dict[str, int] = {}  # snapshot -> units not finished
        self._pings: dict[Any, _Place] = {}
        self._running: dict[Any, _Place] = {}
        for place in self.places:
            self._begin(place)

    # --- what the study sees -----------------------------------------------------------------------------------------

    def submit(self, units: Iterable[Unit]) -> None:
        """Queue units; those of the oldest snapshot go first."""
        for unit in units:
            self._queues.setdefault(unit.snapshot, deque()).append(unit)
            self._open[unit.snapshot] = self._open.get(unit.snapshot, 0) + 1
        self._dispatch()

    @property
    def pending(self) -> int:
        """Units not finished."""
        return sum(self._open.values())

    @property
    def snapshots(self) -> int:
        """Snapshots with units not finished."""
        return len(self._open)

    @property
    def busy(self) -> int:
        """Evaluators at work."""
        return sum(bool(p.busy) for p in self.places)

    @property
    def starting(self) -> int:
        """Evaluators that have not answered yet."""
        return sum(p.actor is not None and not p.answered for p in self.places)

    @property
    def refs(self) -> list[Any]:
        """References to wait on: signs of life and running units."""
        return [*self._pings, *self._running]

    def take(self, ref: Any) -> list[Done | Failed]:
        """Deal with a reference of `refs` that is ready. Raises PoolError when no evaluator can be started."""
        if ref in self._pings:
            self._pinged(ref)
            finished: list[Done | Failed] = []
        else:
            finished = self._finished(ref)
        self._dispatch()
        return finished

    def close(self) -> None:
        """End all evaluators."""
        for place in self.places:
            if place.actor is not None:
                ray.kill(place.actor)
        self._pings.clear()
        self._running.clear()

    # --- evaluators --------------------------------------------------------------------------------------------------

    def _begin(self, place: _Place) -> None:
        place.actor = self._start(place.name)
        place.answered, place.wearing, place.errors = False, None, 0
        place.seen.clear()
        place.starts += 1
        self._pings[place.actor.describe.remote()] = place

    def _replace(self, place: _Place, error: Exception) -> None:
        self.note("evaluator lost", evaluator=place.name, reason=_reason(error))
        with suppress(ValueError, RayActorError):  # gone already
            ray.kill(place.actor)
        place.actor = None
        place.life += 1
        if place.starts < STARTS:
            self._begin(place)
        elif all(p.actor is None for p in self.places):
            raise PoolError(f"no evaluator can be started: {_reason(error)}")

    def _pinged(self, ref: Any) -> None:
        place = self._pings.pop(ref)
        try:
            about = ray.get(ref)
        except RayError as error:
            self._replace(place, error)
            return
        place.answered, place.starts = True, 0
        self.about = self.about or about

    # --- units -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for place in self.places:
            while place.answered and place.actor is not None and len(place.busy) < IN_FLIGHT:
                unit = self._next(place)
                if unit is None:
                    return
                place.wearing = unit.snapshot
                place.seen.add(unit.work.id)
                task = Task(
                    unit.id, unit.snapshot, [unit.value()], [unit.work.table], unit.work.row,
                    unit.work.benchmark, unit.name, unit.settings, unit.depth,
                )  # fmt: skip
                label = f"{unit.work.benchmark} after {unit.edits} edits"
                ref = place.actor.score.options(name=label).remote(task)
                place.busy[ref] = unit
                self._running[ref] = place

    def _next(self, place: _Place) -> Unit | None:
        """A unit of the snapshot that is worn here, else of the oldest that no other wears, else of the oldest."""
        worn = {p.wearing for p in self.places if p is not place}
        order = sorted(self._queues, key=lambda s: (s != place.wearing, s in worn))  # stable: oldest first
        for snapshot in order:
            queue = self._queues[snapshot]
            unit = self._pick(place, queue)
            if not queue:
                del self._queues[snapshot]
            return unit
        return None

    def _pick(self, place: _Place, queue: deque[Unit]) -> Unit:
        """Take the first unit whose block was scored here before, else the first that nobody knows, else the first."""
        others = [p.seen for p in self.places if p is not place]

        def rank(index: int) -> int:
            block = queue[index].work.id
            return 0 if block in place.seen else 1 + any(block in seen for seen in others)

        best = min(range(min(len(queue), LOOK)), key=rank)
        unit = queue[best]
        del queue[best]
        return unit

    def _finished(self, ref: Any) -> list[Done | Failed]:
        place = self._running.pop(ref, None)
        if place is None:
            return []  # of an evaluator already given up
        try:
            about, scores = ray.get(ref)
        except RayTaskError as error:
            place.errors += 1
            if place.errors >= ERRORS:  # whatever it is given fails: perhaps it is not the units' fault
                return self._died(place, error)
            unit = place.busy.pop(ref)
            if isinstance(error.cause, ObjectLostError | OwnerDiedError):
                unit.restore()
            return self._again(unit, error)
        except RayError as error:
            return self._died(place, error)
        unit = place.busy.pop(ref)
        place.errors = 0
        self._close(unit)
        return [Done(unit, about, scores)]

    def _died(self, place: _Place, error: Exception) -> list[Done | Failed]:
        """The oldest unit not finished was running and loses a try; the others only waited and go back as they were."""
        finished: list[Done | Failed] = []
        lost: list[Unit] = []
        for ref, unit in place.busy.items():
            self._running.pop(ref, None)
            try:
                about, scores = ray.get(ref, timeout=1)
                self._close(unit)
                finished.append(Done(unit, about, scores))
            except (RayError, TimeoutError):
                lost.append(unit)
        place.busy.clear()
        for unit in reversed(lost[1:]):
            self._back(unit)
        for unit in lost[:1]:
            finished += self._again(unit, error)
        self._replace(place, error)
        return finished

    def _again(self, unit: Unit, error: Exception) -> list[Done | Failed]:
        tries = self.tries[unit.id] = self.tries.get(unit.id, 0) + 1
        reason = _reason(error)
        if tries > self.retries:
            self._close(unit)
            return [Failed(unit, tries, reason)]
        self.note("unit tried again", unit=unit.id, tries=tries, reason=reason)
        self._back(unit)
        return []

    def _back(self, unit: Unit) -> None:
        if unit.snapshot in self._queues:
            self._queues[unit.snapshot].appendleft(unit)
        else:
            self._queues[unit.snapshot] = deque([unit])
            self._queues.move_to_end(unit.snapshot, last=False)

    def _close(self, unit: Unit) -> None:
        self._open[unit.snapshot] -= 1
        if not self._open[unit.snapshot]:
            del self._open[unit.snapshot]


def _reason(error: Exception) -> str:
    """One line a person can use, of Ray's many."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}" if not isinstance(cause, ValueError) else str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("ValueError", "RuntimeError", "OSError"))), lines[0])
