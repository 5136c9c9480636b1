"""What a study found, for people: tables in the terminal, and one HTML file to keep and to pass on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysys import report_html, stats, words
from raysys.account import Account, account
from raysys.files import Location, within, write_bytes
from raysys.frame import Metric
from raysys.meaning import Meaning
from raysys.summary import KINDS, PROTOCOLS, Area, CellView, Point, Summary, summarise

if TYPE_CHECKING:
    from raysys.results import Results

STYLE = {"kept": "green", "open": "yellow", "lost": "red", "collapsed": "red"}


@dataclass(frozen=True)
class Report:
    """What a study found, finished or not, worked out once for all ways of showing it."""

    results: Results
    summary: Summary
    account: Account

    @classmethod
    def of(cls, results: Results, delta: float = stats.DELTA) -> Report:
        """Read a run folder. `delta` is the loss that still counts as none."""
        return cls(results, summarise(results, delta), account(results))

    def show(self, console: Console | None = None) -> None:
        """Print the tables."""
        (console or Console()).print(terminal(self.summary, self.account), highlight=False)

    def write(self, path: Path | None = None) -> Location:
        """Write the HTML page and say where (by default into the run folder), and mark collapses. Raises OSError."""
        page = path or within(self.results.folder, "report.html")
        spec = self.results.spec
        toml = words.toml(spec.model_dump(mode="json"))
        chance = Meaning.read(self.results).chances
        text = report_html.page(spec.name, self.summary, self.account, chance, toml, self.results.manifest)
        write_bytes(page, text.encode())
        self.results.mark()
        return page


def show(results: Results, console: Console | None = None, delta: float = stats.DELTA) -> None:
    """Print the tables of a study, finished or not."""
    Report.of(results, delta).show(console)


def write_html(results: Results, path: Path | None = None, delta: float = stats.DELTA) -> Location:
    """Write the page of a study, finished or not, and say where. Raises OSError when it can't be written."""
    return Report.of(results, delta).write(path)


def terminal(summary: Summary, told: Account) -> RenderableType:
    """All tables, for any width."""
    parts: list[RenderableType] = []
    for cell in summary.cells:
        parts.append(Text(f"\n{cell.method}  {cell.model}  order {cell.order}", style="bold"))
        parts += filter(None, (_ability(cell, summary), _edits(cell, summary)))
    parts += [_retention(summary)]
    parts += [Text(""), _budgets(summary), _losses(told)]
    return Group(*parts)


def percent(share: float) -> str:
    """Without a decimal, for places where n is small."""
    return words.percent(share, 0)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right", overflow="fold", no_wrap=i == 0)
    return table


def _ability(cell: CellView, summary: Summary) -> Table | None:
    metrics = [m for m in (*summary.ability, *summary.others) if m in cell.curves]
    if not metrics:
        return None
    table = _table("edits", *(words.title(m) for m in metrics))
    for edits, points in _rows(cell, metrics):
        table.add_row(str(edits), *(_score(p) for p in points))
    if any(m in cell.areas for m in metrics):
        table.add_row("area", *(_area(cell.areas.get(m)) for m in metrics))
    return table


def _area(area: Area | None) -> Text:
    """Mean height of a curve over log(1 + edits)."""
    if area is None:
        return Text("–", style="dim")
    value, more = words.mean(area.estimate, area.unit), words.points(area.change.mean, area.unit)
    return Text.assemble(value, (f" {words.half(area.estimate, area.unit)} {more}", "dim"))


def _score(point: Point | None) -> Text:
    if point is None:
        return Text("–", style="dim")
    if point.void:
        return Text("collapsed", style="bold red")
    unit, estimate = point.unit, point.estimate
    text = Text.assemble(words.mean(estimate, unit), (f" {words.half(estimate, unit)}", "dim"))
    if point.collapse:
        text.append(" collapsed", style="bold red")
    elif point.change:
        worse = point.change.low > 0 if point.falling else point.change.high < 0
        text.append(f" {words.points(point.change.mean, unit)}", style="red" if worse else "dim")
    return text


def _edits(cell: CellView, summary: Summary) -> Table | None:
    """Edit success by kind of probe; each cell holds the protocols, as the caption says."""
    kinds = [k for k in KINDS if any(m[1].startswith(f"{k}/") for m in summary.probes if m in cell.curves)]
    held = [m for m in summary.locality if m in cell.curves]
    if not kinds and not held:
        return None
    table = _table("edits", *kinds, *(["held-out facts"] if held else []))
    probes = [[m for p in PROTOCOLS for m in summary.probes if m[1] == f"{k}/{p}" and m in cell.curves] for k in kinds]
    groups = [*probes, *([held] if held else [])]
    for edits, points in _rows(cell, [m for group in groups for m in group]):
        cells, rest = [], list(points)
        for group in groups:
            mine, rest = rest[: len(group)], rest[len(group) :]
            cells.append(" / ".join(percent(p.estimate.mean) if p else "–" for p in mine) if any(mine) else "–")
        table.add_row(str(edits), *cells)
    ways = [PROTOCOLS[p] for p in PROTOCOLS if any(m[1].endswith(f"/{p}") for group in probes for m in group)]
    known = [PROTOCOLS.get(m[1].partition("/")[2], m[1]) for m in held]
    told = [f"{name}: {' / '.join(w)}" for name, w in (("per cent", ways), ("held-out facts", known)) if w]
    table.caption = Text("; ".join(told), style="dim")
    table.caption_justify = "left"
    return table


def _rows(cell: CellView, metrics: Sequence[Metric]) -> list[tuple[int, list[Point | None]]]:
    found = {(m, p.edits): p for m in metrics for p in cell.curves[m]}
    return [(n, [found.get((m, n)) for m in metrics]) for n in sorted({n for _, n in found})]


def _retention(summary: Summary) -> RenderableType:
    """Do edits still hold at the last snapshot, by how many came after them?"""
    labels = list(dict.fromkeys(a.label for m in summary.methods for ages in m.ages.values() for a in ages))
    if not labels:
        return Text("")
    table = _table("\nretention by edits since", *labels)
    table.columns[0].justify = "left"
    for method in summary.methods:
        for protocol, ages in method.ages.items():
            held = {a.label: percent(a.estimate.mean) for a in ages}
            kind, _, way = protocol.rpartition("/")
            who = f"{method.method}{', multi-hop' if kind else ''}, {PROTOCOLS[way]}"
            row = (who, *(held.get(label, "–") for label in labels))
            table.add_row(*map(Text, row))
    return table


def _budgets(summary: Summary) -> RenderableType:
    if not summary.ability:
        return Text("no general-ability benchmark has been scored: no edit budget", style="dim")
    loss = f"{summary.delta * 100:g} points"
    table = _table("edit budget", "shown", "observed", "interval", "measured", "ended at")
    for column in (0, 5):
        table.columns[column].justify = "left"
    table.columns[0].no_wrap, table.columns[0].max_width = False, 32
    for cell in summary.cells:
        budget = cell.budget
        at = f"{budget.stops[0].edits} " if budget.stops else ""
        stops = [Text(f"{at}{text}", style=STYLE[state]) for state, text in words.stops(budget)]
        name = " ".join((cell.method, cell.model, str(cell.order)) if len(summary.cells) > 1 else (cell.method,))
        shown = f"{'≥ ' if not budget.stops and budget.measured else ''}{budget.shown}"
        within = words.between(budget.interval, budget.measured)
        row = (Text(name), Text(shown, style="bold"), str(budget.observed), within, str(budget.measured))
        table.add_row(*row, Text("\n").join(stops) if stops else Text("nothing", style="green"))
    for method in summary.methods:
        if len(method.cells) > 1:
            orders, last = f"{method.method} {method.model}, over all orders", method.budget.measured
            table.add_row(Text(orders), "", "", words.between(method.interval, last), str(last), "")
    table.caption = Text(
        f"shown: at 95 %, no benchmark lost {loss} or more at any snapshot up to there (paired, Holm-corrected); "
        "observed: the same of the bare means; interval: where the true number lies, at 95 %",
        style="dim",
    )
    table.caption_justify = "left"
    return table


def _losses(told: Account) -> RenderableType:
    """What was left out, refused or failed, in a line each."""
    lines = [Text(text, style="dim") for text in told.published]
    for name, style, found in (("left out", "dim", told.dropped), ("refused", "yellow", told.refused)):
        lines += [Text(f"{name} {x.count}: {x.reason} (first: {x.where})", style=style) for x in found]
    for f in told.failures:
        lines.append(Text(f"failed: {words.failure(f)}: {f.get('reason', '')}", style="bold red"))
    return Group(*lines)
