"""Units that wait to be scored, and which of them an evaluator is given: pure bookkeeping, no Ray.

A unit goes where it costs least: to an evaluator that wears its snapshot already, and that has scored its block before
(whose trunks and drafts it keeps). The oldest snapshot comes first, so that snapshots leave memory in order. Every
choice costs the same however many evaluators and units there are.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.feed import Work  # by name alone: actors that score need no Ray Data

LOOK = 64  # units at the head of a queue among which one is looked for whose block is known


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
class Memory:
    """What one evaluator has: the snapshot that it will wear once its work is done, and the blocks it has scored."""

    wearing: str | None = None
    seen: set[str] = field(default_factory=set)


class Waiting:
    """Queues of units, and what is known of all evaluators together."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Unit]] = OrderedDict()  # snapshot -> units, oldest snapshot first
        self._worn: Counter[str | None] = Counter()  # snapshot -> evaluators that wear it
        self._known: Counter[str] = Counter()  # block -> evaluators that have scored it
        self._suspects: deque[Unit] = deque()
        self.alone: set[str] = set()  # units that are tried alone now

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, unit: Unit) -> None:
        """Queue a unit behind those of its snapshot."""
        self._queues.setdefault(unit.snapshot, deque()).append(unit)

    def back(self, unit: Unit) -> None:
        """Put a unit back at the head: it, and its snapshot, had their turn already."""
        if unit.snapshot in self._queues:
            self._queues[unit.snapshot].appendleft(unit)
        else:
            self._queues[unit.snapshot] = deque([unit])
            self._queues.move_to_end(unit.snapshot, last=False)

    def take(self, memory: Memory) -> Unit | None:
        """The unit that suits an evaluator best, None when there is none; from now on it wears its snapshot.

        A unit of the snapshot that is worn here, else of the oldest that no other wears, else of the oldest.
        """
        if not self._queues:
            return None
        if memory.wearing is not None and memory.wearing in self._queues:
            snapshot = memory.wearing
        else:
            free = (s for s in self._queues if not self._worn[s])
            snapshot = next(free, next(iter(self._queues)))
        queue = self._queues[snapshot]
        unit = self._pick(memory, queue)
        if not queue:
            del self._queues[snapshot]
        self.gives(memory, unit)
        return unit

    def gives(self, memory: Memory, unit: Unit) -> None:
        """An evaluator is given `unit`: it will wear its snapshot, and know its block."""
        if memory.wearing != unit.snapshot:
            self._takes_off(memory)
            memory.wearing = unit.snapshot
            self._worn[unit.snapshot] += 1
        if unit.work.id not in memory.seen:
            memory.seen.add(unit.work.id)
            self._known[unit.work.id] += 1

    @property
    def suspects(self) -> int:
        """Units that were with an evaluator when it was lost, and have to be tried alone."""
        return len(self._suspects)

    def suspect(self, unit: Unit) -> None:
        """Put a unit back that has to be tried alone."""
        self._suspects.append(unit)

    def take_suspect(self, memory: Memory, elsewhere: Callable[[Unit], bool]) -> Unit | None:
        """The next unit that has to be tried alone, but for those that are better tried `elsewhere`; None without one.

        It is among those `alone` until it ends.
        """
        unit = next((u for u in self._suspects if not elsewhere(u)), None)
        if unit is None:
            return None
        self._suspects.remove(unit)
        self.alone.add(unit.id)
        self.gives(memory, unit)
        return unit

    def forget(self, memory: Memory) -> None:
        """The evaluator is gone, and what it had with it."""
        self._takes_off(memory)
        memory.wearing = None
        self._known.subtract(memory.seen)
        memory.seen.clear()

    def _takes_off(self, memory: Memory) -> None:
        if memory.wearing is not None:
            self._worn[memory.wearing] -= 1
            if not self._worn[memory.wearing]:
                del self._worn[memory.wearing]

    def _pick(self, memory: Memory, queue: deque[Unit]) -> Unit:
        """Take the first unit whose block was scored here before, else the first that nobody knows, else the first."""
        best, rank = 0, 3
        for index in range(min(len(queue), LOOK)):
            block = queue[index].work.id
            now = 0 if block in memory.seen else 1 + (self._known[block] > 0)
            if now < rank:
                best, rank = index, now
            if not now:
                break
        unit = queue[best]
        del queue[best]
        return unit
