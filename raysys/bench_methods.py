"""`raysys bench methods`: what every editing method does on one model, as single edits and one after another."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from raysys import checks, names, words
from raysys.checks_sequence import Sequential, sequential_edits
from raysys.model import Model
from raysys.spec import method_title
from raysys.tables import grid, refusals
from raysys.types import EditCase, Probe

KINDS = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "portability": "portability",
}
WAYS = ("likelier", "greedy")
BROKEN = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError)  # of one method: a row
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """A row of the table to be: a method by name with settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the table calls it."""
        return method_title(self.name, self.settings)


@dataclass(frozen=True)
class Row:
    """What was found of one method. `single`, `sequence`: None where they were not measured; `fault` says why."""

    title: str
    settings: Mapping[str, Any]
    single: Mapping[str, Any] | None = None
    sequence: Mapping[str, Any] | None = None
    fault: str = ""

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def rows(
    model: Model,
    wanted: Sequence[Wanted],
    cases: Sequence[EditCase],
    facts: Sequence[Probe] = (),
    *,
    cache: Path | None = None,
    singles: bool = True,
    sequence: bool = True,
    tell: Tell = lambda what, done, total: None,
) -> Iterator[Row]:
    """A row for each method, as soon as it is measured. A method that can't go on is a row with the reason."""
    for want in wanted:
        row = Row(want.title, dict(want.settings))
        try:
            method = names.build(names.method(want.name), want.settings, f"method {want.name}")
            ready = method.prepare(model, cache)
            row = dataclasses.replace(row, settings=ready.identity()["settings"])
            if singles:
                row = dataclasses.replace(row, single=_singles(model, ready, cases, want.title, tell))
            if sequence:
                found = _sequence(model, ready, method.batch, cases, facts, want.title, tell)
                row = dataclasses.replace(row, sequence=_sequence_tree(found))
        except BROKEN as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            row = dataclasses.replace(row, fault=f"{kind}{error}" or type(error).__name__)
        yield row


def _singles(model: Model, ready: Any, cases: Sequence[EditCase], title: str, tell: Tell) -> dict[str, Any]:
    found = []
    for single in checks.single_edits(model, ready, cases):
        found.append(single)
        tell(f"{title}, single edits", len(found), len(cases))
    return {
        "edits": len(found),
        "refused": dict(Counter(s.refused for s in found if s.refused)),
        "seconds": fmean(s.seconds for s in found) if found else None,
        "shares": checks.shares(found),
    }


def _sequence(
    model: Model, ready: Any, batch: int, cases: Sequence[EditCase], facts: Sequence[Probe], title: str, tell: Tell
) -> Sequential:
    def told(made: int) -> None:
        tell(f"{title}, one after another", made, len(cases))

    return sequential_edits(model, ready, cases, batch, facts, told)


def _sequence_tree(found: Sequential) -> dict[str, Any]:
    return {
        "edits": found.edits,
        "refused": dict(Counter(found.refused)),
        "seconds": fmean(found.seconds) if found.seconds else None,
        "bytes": found.bytes,
        "at_once": dict(found.at_once),
        "at_end": dict(found.at_end),
        "facts": found.facts,
    }


# --- for people ------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    """A row as one line, for those who wait."""
    parts = [row.title]
    if row.single:
        parts.append("single " + " ".join(_cells(row.single["shares"])))
    if row.sequence:
        ends = " ".join(_cells(row.sequence["at_end"]))
        parts.append(f"after {row.sequence['edits']} {ends}, {row.sequence['seconds'] or 0:.2f} s an edit")
    return ": ".join(parts) + (f" FAILED: {row.fault}" if row.fault else "")


def table(found: Sequence[Row], title: str) -> RenderableType:
    """Single edits, then the stream; each cell is "likelier/greedy" in per cent."""
    parts: list[RenderableType] = [Text(title, style="bold")]
    if any(r.single for r in found):
        columns = ("single edits", *KINDS.values(), "unchanged", "s/edit")
        about = "each edit on the untouched model; unchanged: neighbourhood probes that are answered as before"
        refused = sum(sum(r.single["refused"].values()) for r in found if r.single)
        about += f"; {refusals(refused)}" if refused else ""
        parts += [Text(""), _table(columns, [(r, _single_cells(r.single) if r.single else None) for r in found], about)]
    if any(r.sequence for r in found):
        most = max(r.sequence["edits"] for r in found if r.sequence)
        rest = list(KINDS.values())[1:]
        columns = (f"{most} one after another", "efficacy", "retention", *rest, "other facts", "s/edit", "snapshot")
        about = (
            "efficacy: right after each edit, a refused one fails; retention and the rest: all edits, after the last; "
            "other facts: those that nobody edited and the model told right; snapshot: its size after the last edit"
        )
        parts += [
            Text(""),
            _table(columns, [(r, _sequence_cells(r.sequence) if r.sequence else None) for r in found], about),
        ]
    parts += [Text("\nper cent: right answer likelier than its rival / greedy answer right", style="dim")]
    parts += [Text(f"{r.title}: {r.fault}", style="red") for r in found if r.fault]
    for row in found:
        for part, what in ((row.single, "single edits"), (row.sequence, "one after another")):
            if part is None:
                continue
            for why, n in part["refused"].items():
                parts.append(Text(f"{row.title}, {what}: refused {n} of {part['edits']}: {why}", style="yellow"))
    return Group(*parts)


def _table(columns: Sequence[str], lines: Sequence[tuple[Row, list[str] | None]], about: str) -> RenderableType:
    told = grid(*columns)
    for row, cells in lines:
        given = cells or ["–"] * (len(columns) - 1)
        told.add_row(Text(row.title, style="red" if row.fault else ""), *given)
    told.caption, told.caption_justify = Text(about, style="dim"), "left"
    return told


def _single_cells(tree: Mapping[str, Any]) -> list[str]:
    shares = tree["shares"]
    unchanged = shares.get("neighbourhood/unchanged")
    return [*_cells(shares), "–" if unchanged is None else words.percent(unchanged, 0), _seconds(tree)]


def _sequence_cells(tree: Mapping[str, Any]) -> list[str]:
    retention, *rest = _cells(tree["at_end"])
    facts = "–" if tree["facts"] is None else words.percent(tree["facts"], 0)
    return [_cells(tree["at_once"])[0], retention, *rest, facts, _seconds(tree), words.size(tree["bytes"])]


def _seconds(tree: Mapping[str, Any]) -> str:
    return "–" if tree["seconds"] is None else f"{tree['seconds']:.2f}"


def _cells(shares: Mapping[str, float]) -> list[str]:
    """A cell for each kind of probe: "97/95"; a dash where it was not asked, "–/95" where it has no rival."""
    return [
        "/".join(words.percent(shares.get(f"{kind}/{way}", math.nan), 0) for way in WAYS)
        if f"{kind}/greedy" in shares
        else "–"
        for kind in KINDS
    ]
