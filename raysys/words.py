"""How figures and settings read in terminal and page alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from raysys.budget import Budget, Interval, State
from raysys.frame import Metric
from raysys.stats import Difference, Estimate
from raysys.summary import Point

MINUS = "\u2212"
SIGNS = {"kept": "✓", "open": "?", "lost": "✗", "collapsed": "⊘"}
ABOUT = {
    "efficacy": "The prompt of the edit itself.",
    "paraphrase": "The edited fact, asked in other words.",
    "neighbourhood": "Facts about other subjects, which must stay as they were.",
    "portability": "What follows from the edited fact.",
    "multi_hop": "What follows from several facts, edited ones among them, asked once all of them are edited.",
}


def kind(name: str) -> str:
    """A kind of probe in a heading: "Multi-hop"."""
    return name.replace("_", "-").capitalize()


def percent(share: float, digits: int = 1) -> str:
    """0.712 -> "71.2"; no sign, so that columns stay narrow."""
    return f"{share * 100:.{digits}f}" if math.isfinite(share) else "–"


def mean(estimate: Estimate, unit: str = "") -> str:
    """A mean: in per cent, or in its own `unit`: 3.228 -> "3.23"."""
    if not unit:
        return percent(estimate.mean)
    return f"{estimate.mean:.2f}" if math.isfinite(estimate.mean) else "–"


def points(share: float, unit: str = "") -> str:
    """A signed difference in points, or in its own `unit`: "+0.3", "−8.0", "0.0"."""
    if not math.isfinite(share):
        return "–"
    text = _size(share, unit)
    return text if not text.strip("0.") else ("+" if share > 0 else MINUS) + text


def half(estimate: Estimate, unit: str = "") -> str:
    """Half the interval, in points or in its own `unit`; "" where it is unknown."""
    return f"±{_size(estimate.half, unit)}" if math.isfinite(estimate.half) else ""


def _size(value: float, unit: str) -> str:
    return f"{abs(value):.2f}" if unit else f"{abs(value) * 100:.1f}"


def share(estimate: Estimate) -> str:
    """A mean with its uncertainty: "71.2% ±4.9"."""
    return f"{percent(estimate.mean)}% {half(estimate)}".strip()


def span(change: Difference, unit: str = "") -> str:
    """The interval of a change."""
    return f"[{points(change.low, unit)}, {points(change.high, unit)}]"


def title(metric: Metric) -> str:
    """A metric in a heading: the benchmark alone for its accuracy."""
    benchmark, name = metric
    return benchmark if name == "accuracy" else f"{benchmark} {name.replace('/', ' ')}"


def hover(who: str, point: Point) -> str:
    """All there is to say about one point of a curve, a line each."""
    lines = [f"{who}, {count(point.edits, 'edit')}"]
    if not point.void:
        lines.append(share(point.estimate))
    if point.change and not point.void:
        lines.append(f"{points(point.change.mean)} points against the base {span(point.change)}")
    if point.collapse:
        lines.append(f"collapsed: {point.collapse}")
    return "\n".join([*lines, count(point.estimate.n, "item")])


def between(interval: Interval, measured: int) -> str:
    """The interval of an edit budget: "5 – 50", "20 – ≥ 100" where the last snapshot is within it."""
    high = f"≥ {interval.high}" if interval.high == measured else f"{interval.high}"
    return high if interval.low == interval.high else f"{interval.low} – {high}"


def stops(budget: Budget) -> list[tuple[State, str]]:
    """What ended a budget: a line for each state, the worst first."""
    lines: list[tuple[State, str]] = []
    heads: list[tuple[State, str]] = [("collapsed", "collapsed"), ("lost", "lost"), ("open", "not decided")]
    for state, head in heads:
        found = sorted((v for v in budget.stops if v.state == state), key=lambda v: v.change.mean)
        if not found:
            continue
        each = [v.benchmark + ("" if state == "collapsed" else f" {points(v.change.mean)}") for v in found]
        needed = max((v.needed or 0 for v in found), default=0)
        would = f"; about {count(needed, 'item')} of each would" if needed else ""
        lines.append((state, f"{head}: {', '.join(each)}{would}"))
    return lines


def failure(about: Mapping[str, Any]) -> str:
    """What was given up: a unit, a whole benchmark, or a whole edit stream."""
    where = [str(about["benchmark"])] if about.get("benchmark") else []
    if about.get("cell"):
        where.append(f"{'in ' if where else ''}{about['cell']}")
    if about.get("edits") is not None:
        where.append(f"after {count(int(about['edits']), 'edit')}")
    tries = int(about.get("tries", 1))
    return " ".join(where) + (f", {tries} times" if tries > 1 else "")


def count(n: int, thing: str) -> str:
    """ "1 edit", "1 000 edits"."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}".replace(",", "\u202f")


def seconds(t: float) -> str:
    """ "0.8 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if t < 10:
        return f"{t:.1f} s"
    if t < 120:
        return f"{t:.0f} s"
    minutes, rest = divmod(round(t), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n: float) -> str:
    """Bytes: "60 KB", "13.4 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def moment(unix: float) -> str:
    """A time, in UTC."""
    return datetime.fromtimestamp(unix, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def flat(tree: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as ("a.b", "value") pairs; times are written out."""
    for name, value in tree.items():
        path = f"{above}.{name}" if above else str(name)
        if isinstance(value, Mapping):
            yield from flat(value, path)
        elif isinstance(value, list | tuple):
            yield path, ", ".join(map(str, value)) or "none"
        elif isinstance(value, float) and 1e9 < value < 1e10:  # unix seconds
            yield path, moment(value)
        else:
            yield path, str(value)


def toml(tree: Mapping[str, Any]) -> str:
    """Plain data as TOML: values first, then tables, then arrays of tables. Absent values (None) are left out."""
    return "\n".join(_table(tree, "")).strip() + "\n"


def _table(tree: Mapping[str, Any], path: str) -> list[str]:
    values = {k: v for k, v in tree.items() if v is not None}
    tables = {k: v for k, v in values.items() if isinstance(v, Mapping)}
    arrays = {k: v for k, v in values.items() if isinstance(v, list | tuple) and v and isinstance(v[0], Mapping)}
    lines = [f"{_key(k)} = {_value(v)}" for k, v in values.items() if k not in tables and k not in arrays]
    for name, inner in tables.items():
        lines += ["", f"[{path}{_key(name)}]", *_table(inner, f"{path}{_key(name)}.")]
    for name, items in arrays.items():
        for item in items:
            lines += ["", f"[[{path}{_key(name)}]]", *_table(item, f"{path}{_key(name)}.")]
    return lines


def _key(name: str) -> str:
    return name if name and all(c.isalnum() or c in "_-" for c in name) and name.isascii() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
        return '"' + "".join(escapes.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    return repr(value)
