"""Scores are made durable beside the study's loop: a slow disk or a far storage keeps no evaluator waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from raysys.results import Results
from raysys.stores import StorageError

AT_ONCE = 8  # units that are written at the same time
AHEAD = 256  # units that may wait to be written; what a killed driver loses at most, and scores again


class Saver:
    """Writes units of `results` in the background, each whole or not at all."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="saving")
        self._open: deque[Future[None]] = deque()

    def add(self, unit: Mapping[str, Any], scores: Iterable[Mapping[str, Any]]) -> None:
        """Queue a unit (see `Results.add`); waits when too many are queued. Raises what an earlier one has raised."""
        self._settle(AHEAD - 1)
        self._open.append(self._threads.submit(self.results.add, unit, scores))

    def check(self) -> None:
        """Raises what writing raised, as soon as that is known."""
        while self._open and self._open[0].done():
            self._take()

    def close(self) -> None:
        """Return when everything queued is durable. Raises what writing raised, after all that could be written is."""
        self._threads.shutdown(wait=True)
        self._settle(0)

    def _settle(self, left: int) -> None:
        self.check()
        while len(self._open) > left:
            self._take()

    def _take(self) -> None:
        """What the oldest raised; storage that is full or away for it is so for all, and each would wait in turn."""
        try:
            self._open.popleft().result()
        except StorageError:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._open.clear()
            raise
