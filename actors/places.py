"""The places of a pool: as many as there are evaluators, and each outlives those who hold it one after another."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from actors.waiting import Memory, Unit

IN_FLIGHT = 2  # units an evaluator has: one it runs, one that waits, so that it is never idle
LOADING = 1800.0  # seconds that an actor may take to load its model, should `stall` be less


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`fewest` to `most` evaluators; `retries` of a unit; seconds that one may be idle, and work on a single unit."""

    fewest: int
    most: int
    retries: int = 3
    idle: float = 60.0
    stall: float = 3600.0


@dataclass
class Place:
    """One evaluator's place in the pool: who holds it now, and what it works on, oldest first."""

    number: int
    life: int = 0
    actor: Any = None
    answered: bool = False
    starts: int = 0
    errors: int = 0  # units that failed since one succeeded
    blamed: int = 0  # units that failed here since one succeeded, whoever held the place, and were scored elsewhere
    nodes: tuple[str, ...] = ()  # that the evaluator runs on; none while it waits for room
    leaving: bool = False  # a node of it is to be taken away: no new units
    begun: float = 0.0  # when its process was first seen to run; 0 while it waits for room
    since: float = 0.0  # when its oldest unit came first, or when it became idle
    memory: Memory = field(default_factory=Memory)
    busy: OrderedDict[Any, Unit] = field(default_factory=OrderedDict)

    @property
    def name(self) -> str:
        return f"evaluator-{self.number}" + (f".{self.life}" if self.life else "")

    @property
    def ready(self) -> bool:
        """Whether it takes another unit."""
        return self.answered and not self.leaving and len(self.busy) < IN_FLIGHT
