"""What a user sees while a study runs: bars in a terminal, a plain line every few seconds elsewhere, or nothing.

A study calls `start` once per base model, then `edited` and `scored` as often as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

EVERY = 5.0  # seconds between plain lines


class Progress(Protocol):
    """Who listens to a study."""

    def start(self, cells: Mapping[str, int], units: int) -> None:
        """`cells`: name -> how many edits it will make; `units` of scoring in all."""
        ...

    def edited(self, cell: str, n: int) -> None:
        """`n` edits of `cell` are in its journal."""
        ...

    def scored(self, done: int, total: int, busy: int) -> None:
        """`done` of `total` units are scored, `busy` evaluators are at work."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Something went wrong and the study goes on."""
        ...

    def stop(self) -> None:
        """The study has ended, one way or the other. Safe to call twice."""
        ...


def quiet() -> Progress:
    """Says nothing."""
    return _Quiet()


def shown(console: Console | None = None) -> Progress:
    """Bars where `console` (default: standard error) is a terminal, plain lines elsewhere."""
    console = console or Console(stderr=True)
    return _Live(console) if console.is_terminal else _Plain(console)


@contextmanager
def counted(
    thing: str, console: Console | None = None, every: float = EVERY
) -> Iterator[Callable[[str, int, int], None]]:
    """Within it, `tell(what, done, total)` shows how many `thing`s of `what` are done: a bar for each `what` in a
    terminal, elsewhere a line when it begins and ends and at most every `every` seconds in between."""
    console = console or Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=28), MofNCompleteColumn(),
        TextColumn(thing, style="dim", markup=False), TimeElapsedColumn(), console=console,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    last: dict[str, tuple[int, float]] = {}

    def bar(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    def line(what: str, done: int, total: int) -> None:
        before, moment = last.get(what, (-1, -every))
        now = time.monotonic()
        if done != before and (what not in last or done >= total or now - moment >= every):
            last[what] = done, now
            console.print(f"{what}: {done}/{total} {thing}", markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    with bars:
        yield bar


class _Quiet:
    def start(self, cells: Mapping[str, int], units: int) -> None:
        pass

    def edited(self, cell: str, n: int) -> None:
        pass

    def scored(self, done: int, total: int, busy: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class _Rate:
    """Things a second in this run: counted from when the first of them was begun, not from the start of a study, which
    may be a continued one, or spend its first minutes on preparations."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def of(self, n: int) -> float | None:
        now = self._clock()
        if self._first is None or n == self._first[1]:
            self._first = (now, n)
        seconds, made = now - self._first[0], n - self._first[1]
        return made / seconds if seconds > 0 and made > 0 else None


def _pace(rate: float | None, thing: str) -> str:
    if rate is None:
        return ""
    return f"{rate:.1f} {thing}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{thing}"


class _Plain:
    """One line at most every EVERY seconds, and only when something changed."""

    def __init__(self, console: Console, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._every, self._clock = console, every, clock
        self._begun = clock()
        self._next = self._begun
        self._cells: dict[str, tuple[int, int]] = {}
        self._units = (0, 0, 0)
        self._rates: dict[str, _Rate] = {}
        self._said = ""

    def start(self, cells: Mapping[str, int], units: int) -> None:
        self._finish()
        self._cells = {cell: (0, total) for cell, total in cells.items()}
        self._units = (0, units, 0)

    def edited(self, cell: str, n: int) -> None:
        self._cells[cell] = (n, max(n, self._cells.get(cell, (0, n))[1]))
        self._rates.setdefault(cell, _Rate(self._clock)).of(n)
        self._tick()

    def scored(self, done: int, total: int, busy: int) -> None:
        self._units = (done, total, busy)
        self._tick()

    def note(self, text: str) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def stop(self) -> None:
        self._finish()

    def _tick(self) -> None:
        if self._clock() >= self._next:
            self._say()

    def _finish(self) -> None:
        if self._cells or self._units[1]:
            self._say()

    def _say(self) -> None:
        edits = []
        for cell, (n, total) in self._cells.items():
            pace = _pace(self._rates[cell].of(n), "edit") if cell in self._rates and n < total else ""
            edits.append(f"{cell}: {n}/{total} edits {pace}".rstrip())
        done, total, busy = self._units
        text = " | ".join([*edits, f"{done}/{total} units" + (f", {busy} busy" if busy else "")])
        if text != self._said:
            self._said = text
            self._line(text)
        self._next = self._clock() + self._every

    def _line(self, text: str) -> None:
        minutes, seconds = divmod(int(self._clock() - self._begun), 60)
        self._console.print(f"[{minutes:02d}:{seconds:02d}] {text}", markup=False, highlight=False, soft_wrap=True)


class _Live:
    """A bar for each edit stream and one for scoring."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[thing]}", style="dim", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[aside]}", style="dim", markup=False),
            console=console,
        )
        self._cells: dict[str, TaskID] = {}
        self._rates: dict[str, _Rate] = {}
        self._units: TaskID | None = None

    def start(self, cells: Mapping[str, int], units: int) -> None:
        self._bars.start()
        for cell, total in cells.items():
            self._cells[cell] = self._bars.add_task(cell, total=total, thing="edits", aside="")
        self._rates = {}
        self._units = self._bars.add_task("scoring", total=units, thing="units", aside="")

    def edited(self, cell: str, n: int) -> None:
        pace = _pace(self._rates.setdefault(cell, _Rate(time.monotonic)).of(n), "edit")
        if cell in self._cells:
            self._bars.update(self._cells[cell], completed=n, aside=pace)

    def scored(self, done: int, total: int, busy: int) -> None:
        pace = _pace(self._rates.setdefault(" units", _Rate(time.monotonic)).of(done), "unit")
        aside = ", ".join(filter(None, (pace, f"{busy} busy" if busy else "")))
        if self._units is not None:
            self._bars.update(self._units, completed=done, total=total, aside=aside)

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), highlight=False)

    def warn(self, text: str) -> None:
        self._console.print(Text.assemble(("warning: ", "bold yellow"), text), highlight=False)

    def stop(self) -> None:
        self._bars.stop()
