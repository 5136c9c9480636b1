"""The evaluator pool: hands units to evaluators, grows and shrinks, replaces the dead, tries again, but not for ever.

Ray's own ActorPool raises when an actor dies and never retries its item. Here a lost evaluator costs what it was
working on: it is replaced under a new name, gets work only after it has answered (quarantine), and the unit it was
running goes back to the queue with one try less; a unit that has none left is reported and the study goes on.

Between `fewest` and `most` evaluators there are as many as units wait. An evaluator that is asked for and finds no room
is what the cluster's autoscaler sees as demand; one that has been idle for a while is ended, so that its node can be
released. A node that is about to be taken away gets no new unit, and what is lost with a node is no unit's fault.

Which of the units that an evaluator had has killed it can't be told: each of them is tried again alone, with nothing
behind it, and only a death alone is held against a unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, OwnerDiedError, RayError, RayTaskError

from actors.cluster import alive, draining, where
from actors.evaluator import Task
from actors.machine import end, nodes, reason_of
from actors.places import IN_FLIGHT, LOADING, Limits, Place
from actors.waiting import Done, Failed, Unit, Waiting

ERRORS = 3  # units that may fail on an evaluator one after another before it is replaced
STARTS = 3  # attempts to start an evaluator before its place is given up
BLAME = 6  # units that fail in a place one after another, and elsewhere don't, before it is given up: a bad GPU, say
MOVES = 30  # nodes that a unit may be lost with
LOOKING = 5.0  # seconds between looks at which nodes are to be taken away


class PoolError(RuntimeError):
    """No evaluator can be started; the message says why."""


class EvaluatorPool:
    """Evaluators made by `start(name)`. Give it units, wait on `refs`, hand ready ones to `take`; `tick` often."""

    def __init__(
        self, start: Callable[[str], Any], limits: Limits, note: Callable[..., None] = lambda *a, **k: None
    ) -> None:
        self._start, self.limits, self.note = start, limits, note
        self.places: list[Place] = []
        self.about: dict[str, Any] | None = None  # what the first evaluator said of itself
        self.tries: dict[str, int] = {}
        self.moves: dict[str, int] = {}  # unit -> nodes it was lost with
        self._failed: dict[str, set[int]] = {}  # unit -> numbers of the places where it failed
        self._waiting = Waiting()
        self._open: dict[str, int] = {}  # snapshot -> units not finished
        self._pings: dict[Any, Place] = {}
        self._running: dict[Any, Place] = {}
        self._numbers = 0
        self._spoilt = 0  # places given up
        self._kept: list[Any] = []  # evaluators of such places, which hold what is bad so that nobody else gets it
        self._fault: PoolError | None = None
        self._looked = 0.0
        self._resize()

    # --- what the study sees -----------------------------------------------------------------------------------------

    def submit(self, units: Iterable[Unit]) -> None:
        """Queue units; those of the oldest snapshot go first."""
        for unit in units:
            self._waiting.add(unit)
            self._open[unit.snapshot] = self._open.get(unit.snapshot, 0) + 1
        self._resize()
        self._dispatch()

    @property
    def pending(self) -> int:
        """Units not finished."""
        return sum(self._open.values())

    @property
    def snapshots(self) -> int:
        """Snapshots with units not finished."""
        return len(self._open)

    def open(self, snapshot: str) -> bool:
        """Whether a snapshot has units not finished."""
        return snapshot in self._open

    @property
    def busy(self) -> int:
        """Evaluators at work."""
        return sum(bool(p.busy) for p in self.places)

    @property
    def starting(self) -> int:
        """Evaluators that have not answered yet."""
        return len(self._pings)

    @property
    def size(self) -> int:
        """Evaluators there are, those that have not answered yet included."""
        return len(self.places)

    @property
    def refs(self) -> list[Any]:
        """References to wait on: signs of life and running units."""
        return [*self._pings, *self._running]

    def __contains__(self, ref: Any) -> bool:
        return ref in self._pings or ref in self._running

    def take(self, ref: Any) -> list[Done | Failed]:
        """Deal with a reference of `refs` that is ready."""
        if ref in self._pings:
            self._pinged(ref)
            finished: list[Done | Failed] = []
        else:
            finished = self._finished(ref)
        self._dispatch()
        return finished

    def tick(self) -> list[Done | Failed]:
        """What time brings: nodes to leave, evaluators that hang, too few or too many of them.

        Raises PoolError when no evaluator can be started.
        """
        if self._fault is not None:
            raise self._fault
        finished = self._hung()
        if time.monotonic() - self._looked > LOOKING:
            self._looked = time.monotonic()
            self._drain(set(draining()))
            for place in [p for p in self._pings.values() if not p.begun]:
                place.nodes = where(place.actor)
                place.begun = time.monotonic() if place.nodes else 0.0
        self._retire()
        self._resize()
        self._dispatch()
        return finished

    def close(self) -> None:
        """End all evaluators."""
        for actor in [*(p.actor for p in self.places), *self._kept]:
            end(actor)
        self.places.clear()
        self._kept.clear()
        self._pings.clear()
        self._running.clear()

    # --- evaluators --------------------------------------------------------------------------------------------------

    @property
    def _wanted(self) -> int:
        """As many evaluators as there are units, within the limits."""
        fewest, most = self.limits.fewest - self._spoilt, self.limits.most - self._spoilt
        return max(0, fewest, min(most, self.pending))

    def _resize(self) -> None:
        """Start what is missing."""
        staying = sum(not p.leaving for p in self.places)
        for _ in range(self._wanted - staying):
            place = Place(self._numbers)
            self._numbers += 1
            self.places.append(place)
            self._begin(place)

    def _begin(self, place: Place) -> None:
        place.actor = self._start(place.name)
        place.answered, place.errors, place.nodes = False, 0, ()
        place.begun, place.since = 0.0, time.monotonic()
        place.starts += 1
        self._pings[place.actor.describe.remote()] = place

    def _leave(self, place: Place) -> None:
        """End an evaluator for good."""
        end(place.actor)
        self._waiting.forget(place.memory)
        self.places.remove(place)
        for ref in [r for r, p in self._pings.items() if p is place]:
            del self._pings[ref]

    def _replace(self, place: Place, error: Exception, innocent: bool = False) -> None:
        """A new evaluator in place of a lost one; `innocent`: it went with its node, which is no failed start."""
        self.note("node lost" if innocent else "evaluator lost", evaluator=place.name, reason=reason_of(error))
        going = innocent or place.leaving
        others = any(p.answered and not p.leaving for p in self.places if p is not place)
        bad = not going and place.blamed >= BLAME and others
        if bad and isinstance(error, RayTaskError):
            self._kept.append(place.actor)
        else:
            end(place.actor)
        self._waiting.forget(place.memory)
        if going:  # a node less: the next tick starts as many as are needed then
            self.places.remove(place)
            return
        if place.starts < STARTS and not bad:
            place.life += 1
            self._begin(place)
            return
        self.note("evaluator given up", evaluator=place.name, reason=reason_of(error))
        self.places.remove(place)
        self._spoilt += 1
        if all(p.leaving for p in self.places):
            self._fault = PoolError(f"no evaluator can be started: {reason_of(error)}")  # raised once all is told

    def _pinged(self, ref: Any) -> None:
        place = self._pings.pop(ref)
        try:
            about = ray.get(ref)
        except RayError as error:
            self._replace(place, error, self._with_node(place, error))
            return
        self.about = self.about or about
        if about.get("digest") != self.about.get("digest"):
            self._replace(place, ValueError(f"{about.get('host')} holds another model than the first evaluator has"))
            return
        place.answered, place.starts, place.since = True, 0, time.monotonic()
        place.nodes = nodes(about)

    def _drain(self, going: set[str]) -> None:
        """Evaluators on nodes that are `going` to be taken away: units that wait go elsewhere, the running may end."""
        for place in [p for p in self.places if not p.leaving and not going.isdisjoint(p.nodes)]:
            place.leaving = True
            self.note("node is to leave", evaluator=place.name, node=", ".join(going.intersection(place.nodes)))
            for ref, unit in list(place.busy.items())[:0:-1]:
                with suppress(RayError, ValueError, TypeError):
                    ray.cancel(ref)
                del place.busy[ref], self._running[ref]
                self._waiting.back(unit)

    def _retire(self) -> None:
        """End evaluators that are not needed: on nodes that leave, and beyond what is wanted after a while idle."""
        now, spare = time.monotonic(), sum(not p.leaving for p in self.places) - self._wanted
        for place in [p for p in self.places if not p.busy]:
            if place.leaving:
                self._leave(place)
            elif spare > 0 and now - place.since > self.limits.idle:
                self.note("evaluator retired", evaluator=place.name)
                self._leave(place)
                spare -= 1

    def _hung(self) -> list[Done | Failed]:
        """Kill evaluators that work on one unit, or get ready, for longer than either may take."""
        finished: list[Done | Failed] = []
        patience = max(LOADING, self.limits.stall)
        for ref, place in list(self._pings.items()):
            if place.begun and time.monotonic() - place.begun > patience:
                del self._pings[ref]
                self._replace(place, TimeoutError(f"not ready after {patience:g} s; it was killed"))
        for place in [p for p in self.places if p.busy and time.monotonic() - p.since > self.limits.stall]:
            finished += self._died(place, TimeoutError(f"no result for {self.limits.stall:g} s; it was killed"))
        return finished

    @staticmethod
    def _with_node(place: Place, error: Exception) -> bool:
        """Whether an evaluator was lost because its node was."""
        if isinstance(error, ActorUnavailableError) or getattr(error, "preempted", False):
            return True  # out of reach: an evaluator that dies by itself is reported dead by its node
        return not all(map(alive, place.nodes))

    # --- units -------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give every evaluator what it can take; as many as there are suspects are left to run empty first.

        Nobody gets a second unit while another has none, or starts and would find none.
        """
        waiting, kept = self._waiting, list[Place]()
        for place in [p for p in self.places if p.ready]:
            if len(kept) < waiting.suspects:
                if place.busy:
                    kept.append(place)
                elif (unit := waiting.take_suspect(place.memory, self._better_elsewhere(place))) is not None:
                    self._give(place, unit)
        for have in range(IN_FLIGHT):
            for place in [p for p in self.places if p.ready and len(p.busy) == have and p not in kept]:
                if have and len(waiting) <= self.starting:
                    return
                if any(u.id in waiting.alone for u in place.busy.values()):
                    continue
                if (unit := waiting.take(place.memory)) is None:
                    return
                self._give(place, unit)

    def _better_elsewhere(self, place: Place) -> Callable[[Unit], bool]:
        """Whether a unit that failed on `place` has others to be tried on."""
        able = {p.number for p in self.places if p.answered and not p.leaving}

        def better(unit: Unit) -> bool:
            failed = self._failed.get(unit.id, set())
            return place.number in failed and not able <= failed

        return better

    def _give(self, place: Place, unit: Unit) -> None:
        task = Task(
            unit.id, unit.snapshot, [unit.value()], [unit.work.table], unit.work.row,
            unit.work.benchmark, unit.name, unit.settings, unit.depth,
        )  # fmt: skip
        label = f"{unit.work.benchmark} after {unit.edits} edits"
        ref = place.actor.score.options(name=label).remote(task)
        if not place.busy:
            place.since = time.monotonic()
        place.busy[ref] = unit
        self._running[ref] = place

    def _finished(self, ref: Any) -> list[Done | Failed]:
        place = self._running.pop(ref, None)
        if place is None:
            return []  # of an evaluator already given up
        try:
            about, scores = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError | OwnerDiedError):
                unit = self._ends(place, ref)
                unit.restore()
                return self._again(unit, error, innocent=True)
            place.errors += 1
            self._failed.setdefault(place.busy[ref].id, set()).add(place.number)
            if place.errors >= ERRORS:  # whatever it is given fails: perhaps it is not the units' fault
                return self._died(place, error)
            return self._again(self._ends(place, ref), error)
        except RayError as error:
            return self._died(place, error)
        unit = self._ends(place, ref)
        place.errors = place.blamed = 0
        for other in self.places:
            other.blamed += other is not place and other.number in self._failed.get(unit.id, ())
        self._close(unit)
        return [Done(unit, about, scores)]

    def _ends(self, place: Place, ref: Any) -> Unit:
        place.since = time.monotonic()
        unit = place.busy.pop(ref)
        self._waiting.alone.discard(unit.id)
        return unit

    def _died(self, place: Place, error: Exception) -> list[Done | Failed]:
        """What was not finished goes back. A unit that was there alone loses a try; several are suspects first.

        One that hangs is the oldest: it loses a try whoever waits behind it.
        """
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
            self._waiting.alone.discard(unit.id)
        place.busy.clear()
        innocent = self._with_node(place, error)
        guilty = lost[:1] if len(lost) == 1 or isinstance(error, TimeoutError | RayTaskError) else []
        for unit in reversed(lost[len(guilty) :]):
            if innocent or guilty:
                self._waiting.back(unit)
            else:
                self._waiting.suspect(unit)
        for unit in guilty:
            if not innocent:
                self._failed.setdefault(unit.id, set()).add(place.number)
            finished += self._again(unit, error, innocent)
        self._replace(place, error, innocent)
        return finished

    def _again(self, unit: Unit, error: Exception, innocent: bool = False) -> list[Done | Failed]:
        """Back to the queue with one try less (`innocent`: with one move less), or given up."""
        counts, most = (self.moves, MOVES) if innocent else (self.tries, self.limits.retries)
        tries = counts[unit.id] = counts.get(unit.id, 0) + 1
        reason = reason_of(error)
        if tries > most:
            self._close(unit)
            return [Failed(unit, tries, reason)]
        self.note("unit moved" if innocent else "unit tried again", unit=unit.id, tries=tries, reason=reason)
        if innocent:
            self._waiting.back(unit)
        else:
            self._waiting.suspect(unit)
        return []

    def _close(self, unit: Unit) -> None:
        self.tries.pop(unit.id, None)
        self.moves.pop(unit.id, None)
        self._failed.pop(unit.id, None)
        self._open[unit.snapshot] -= 1
        if not self._open[unit.snapshot]:
            del self._open[unit.snapshot]
