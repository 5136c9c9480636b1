"""What a user sees while a study runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysys import progress
from raysys.progress import _Live, _Plain


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock) -> tuple[_Plain, io.StringIO]:
    out = io.StringIO()
    return _Plain(Console(file=out, width=60), every=5.0, clock=clock), out


def test_plain_lines_come_every_few_seconds_and_only_when_something_changed() -> None:
    clock = Clock()
    said, out = plain(clock)
    said.start({"rome-0": 100}, 300)
    said.edited("rome-0", 1)
    for n in range(2, 40):
        clock.now += 0.2
        said.edited("rome-0", n)
        said.scored(n * 3, 300, 2)
    clock.now += 20
    said.scored(117, 300, 2)
    said.scored(117, 300, 2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[00:00] rome-0: 1/100 edits | 0/300 units"
    assert lines[1] == "[00:05] rome-0: 26/100 edits 5.0 edits/s | 75/300 units, 2 busy"
    assert lines[2].startswith("[00:27] rome-0: 39/100 edits ")
    assert len(lines) == 3


def test_a_continued_study_shows_the_pace_of_this_run_alone() -> None:
    clock = Clock()
    said, out = plain(clock)
    said.start({"rome-0": 100}, 10)
    said.edited("rome-0", 90)
    clock.now += 10
    said.edited("rome-0", 95)
    assert "95/100 edits 2.0 s/edit" in out.getvalue()


def test_brackets_in_texts_are_not_markup() -> None:
    said, out = plain(Clock())
    said.warn("unit [bold]x[/bold] failed")
    said.note("[red]")
    assert out.getvalue() == "[00:00] warning: unit [bold]x[/bold] failed\n[00:00] [red]\n"


def test_stop_says_the_last_figures_once() -> None:
    said, out = plain(Clock())
    said.start({"a": 2}, 4)
    said.edited("a", 1)
    said.edited("a", 2)
    said.scored(4, 4, 0)
    said.stop()
    said.stop()
    assert out.getvalue().splitlines()[-1] == "[00:00] a: 2/2 edits | 4/4 units"
    assert len(out.getvalue().splitlines()) == 2


def test_a_terminal_gets_bars_and_anything_else_lines() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    assert isinstance(progress.shown(terminal), _Live)
    assert isinstance(progress.shown(Console(file=io.StringIO())), _Plain)


def test_bars_show_every_cell_and_the_units() -> None:
    out = io.StringIO()
    said = progress.shown(Console(file=out, force_terminal=True, width=110, color_system=None))
    said.start({"rome[0]": 100}, 300)
    said.edited("rome[0]", 50)
    said.edited("unheard-of", 1)
    said.scored(120, 300, 2)
    said.warn("mind [this]")
    said.stop()
    said.stop()
    text = out.getvalue()
    for part in ("rome[0]", "50/100", "120/300", "2 busy", "warning: mind [this]"):
        assert part in text, part


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    said = progress.quiet()
    said.start({"a": 1}, 1)
    said.edited("a", 1)
    said.scored(1, 1, 0)
    said.note("x")
    said.warn("x")
    said.stop()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
