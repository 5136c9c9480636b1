"""The tables of the HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from raysys import charts, words
from raysys.frame import Metric
from raysys.summary import KINDS, PROTOCOLS, CellView, MethodView, Point


def _scroll(label: str, table: str) -> str:
    """A table that scrolls by itself where the page is too narrow for it."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{table}</div>'


def matrix(method: MethodView, style: int) -> str:
    """Benchmark x snapshot: shown to hold, open, lost or collapsed, with the change in points."""
    cell = min(method.cells, key=lambda c: (c.budget.shown, c.budget.observed))
    verdicts = {(v.benchmark, v.edits): v for v in cell.budget.verdicts}
    snapshots = sorted({edits for _, edits in verdicts})
    if not snapshots:
        return ""
    rows = []
    for benchmark in dict.fromkeys(b for b, _ in verdicts):
        cells = []
        for edits in snapshots:
            v = verdicts.get((benchmark, edits))
            if v is None:
                cells.append("<td></td>")
                continue
            sign = f'<span class="state" aria-hidden="true">{words.SIGNS[v.state]}</span>'
            change, span = ("", "") if v.state == "collapsed" else (words.points(v.change.mean), words.span(v.change))
            said = f'<span class="visually-hidden">{v.state} </span>{change}'
            cells.append(f'<td class="{v.state}" title="{span}">{sign}{said}</td>')
        rows.append(f'<tr><th scope="row">{escape(benchmark)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{n}</th>' for n in snapshots)
    name = escape(method.method) + (f" <small>order {cell.order}</small>" if len(method.cells) > 1 else "")
    top = f'<thead><tr><th scope="col">{charts.key(style)} {name}</th>{heads}</tr></thead>'
    label = f"Change of each benchmark at each snapshot, {method.method}"
    wide = f"min-width: {100 + 44 * len(snapshots)}px"
    table = f'<table class="matrix" style="{wide}">{top}<tbody>{"".join(rows)}</tbody></table>'
    return _scroll(label, table)


def ability_table(cell: CellView, metrics: Sequence[Metric]) -> str:
    """Rows are snapshots, columns the metrics of general ability."""
    shown = [m for m in metrics if m in cell.curves]
    if not shown:
        return ""
    heads = "".join(f'<th scope="col">{escape(words.title(m))}</th>' for m in shown)
    table = _rows(cell, shown, True) + _areas(cell, shown)
    top = f'<thead><tr><th scope="col">Edits</th>{heads}</tr></thead>'
    return _scroll(f"General ability, {cell.id}", f"<table>{top}<tbody>{table}</tbody></table>")


def _areas(cell: CellView, metrics: Sequence[Metric]) -> str:
    """The last row: the area under each curve, that is its mean height."""
    if not any(m in cell.areas for m in metrics):
        return ""
    cells = []
    for metric in metrics:
        area = cell.areas.get(metric)
        if area is None:
            cells.append("<td>–</td>")
            continue
        value, width = words.mean(area.estimate, area.unit), words.half(area.estimate, area.unit)
        below = f'<small class="sub">{words.points(area.change.mean, area.unit)}</small>'
        cells.append(f'<td title="{words.span(area.change, area.unit)}">{value} <small>{width}</small>{below}</td>')
    return f'<tr><th scope="row">Area</th>{"".join(cells)}</tr>'


def edits_table(cell: CellView, probes: Sequence[Metric], locality: Sequence[Metric]) -> str:
    """Rows are snapshots, columns the kinds of probes by protocol, then held-out facts."""
    groups = []
    for kind in KINDS:
        by_protocol = [m for p in PROTOCOLS for m in probes if m[1] == f"{kind}/{p}" and m in cell.curves]
        groups.append((words.kind(kind), by_protocol))
    groups.append(("Held-out facts", [m for m in locality if m in cell.curves]))
    groups = [(name, metrics) for name, metrics in groups if metrics]
    if not groups:
        return ""
    first = "".join(f'<th class="group" scope="colgroup" colspan="{len(m)}">{name}</th>' for name, m in groups)
    names = [m[1].partition("/")[2] for _, metrics in groups for m in metrics]
    second = "".join(f'<th scope="col">{"P" if n == "probability" else escape(n)}</th>' for n in names)
    table = _rows(cell, [m for _, metrics in groups for m in metrics], False)
    top = f'<thead><tr><th scope="col" rowspan="2">Edits</th>{first}</tr><tr>{second}</tr></thead>'
    return _scroll(f"Edits, {cell.id}", f"<table>{top}<tbody>{table}</tbody></table>")


def _rows(cell: CellView, metrics: Sequence[Metric], changes: bool) -> str:
    found = {(m, p.edits): p for m in metrics for p in cell.curves[m]}
    rows = []
    for edits in sorted({n for _, n in found}):
        cells = "".join(_cell(found.get((m, edits)), changes) for m in metrics)
        rows.append(f'<tr><th scope="row">{edits}</th>{cells}</tr>')
    return "".join(rows)


def _cell(point: Point | None, changes: bool) -> str:
    if point is None:
        return "<td>–</td>"
    if point.void:
        return f'<td><small class="sub collapsed" title="{escape(point.collapse)}">collapsed</small></td>'
    value, width = words.mean(point.estimate, point.unit), words.half(point.estimate, point.unit)
    if not changes:
        return f'<td>{value}<small class="sub">{width}</small></td>'
    value, below = f"{value} <small>{width}</small>", ""
    if point.collapse:
        below = f'<small class="sub collapsed" title="{escape(point.collapse)}">collapsed</small>'
    elif point.change:
        below = f'<small class="sub">{words.points(point.change.mean, point.unit)}</small>'
    return f"<td>{value}{below}</td>"
