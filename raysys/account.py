"""What happened in a run besides its scores: records left out, edits refused, units given up, who was busy when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raysys.meaning import PUBLISHED, Meaning

if TYPE_CHECKING:
    from raysys.results import Cell, Results

Interval = tuple[float, float]  # seconds


@dataclass(frozen=True)
class Left:
    """Something left out `count` times for one reason; `where` is the first such place."""

    reason: str
    count: int
    where: str


@dataclass(frozen=True)
class Lane:
    """When one actor was busy, in seconds of `Times.length`."""

    who: str
    does: str  # "edits" or "scores"
    busy: Sequence[Interval]

    @property
    def seconds(self) -> float:
        """How long it was busy."""
        return sum(b - a for a, b in self.busy)


@dataclass(frozen=True)
class Times:
    """Who was busy when. Pauses in which nobody was (between two runs of a study) are left out; `breaks` says where.

    `length`, `editing`, `scoring` and `both` are seconds: of all, with an editor busy, an evaluator, both.
    """

    lanes: list[Lane]
    length: float
    breaks: list[float]
    editing: float
    scoring: float
    both: float


@dataclass(frozen=True)
class Identity:
    """What decided an edit stream: digest of the base model; the method's settings, none left open, and artifacts; the
    last snapshot's id, a hash of all of it and of the requests."""

    cell: str
    model: str
    method: Mapping[str, Any]
    snapshot: str


@dataclass(frozen=True)
class Account:
    """Everything but the scores."""

    dropped: list[Left]
    refused: list[Left]
    failures: Sequence[Mapping[str, Any]]
    times: Times
    units: int
    edits: int
    tokens: int
    hardware: list[str]
    streams: list[Identity]
    published: Sequence[str] = ()  # a sentence on each method that was run as published


def account(results: Results) -> Account:
    """Read a run folder's accounts, finished or not."""
    edits = results.edits().select(["cell", "edit", "subject", "refused", "started", "ended"]).to_pylist()
    columns = ["unit", "evaluator", "started", "ended", "tokens", "hardware"]
    units = {u["unit"]: u for u in results.units().select(columns).to_pylist()}
    dropped = dict.fromkeys(_dropped(d) for c in results.cells() for d in c.about.get("dropped", ()))
    refused = [(f"{e['cell']}: edit {e['edit']} ({e['subject']})", e["refused"]) for e in edits if e["refused"]]
    busy: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    for e in edits:
        busy["edits", f"editor {e['cell']}"].append((e["started"], e["ended"]))
    for u in units.values():
        busy["scores", u["evaluator"]].append((u["started"], u["ended"]))
    return Account(
        _counted(dropped), _counted(refused), results.failures(), times(busy),
        len(units), len(edits), sum(u["tokens"] or 0 for u in units.values()),
        sorted({u["hardware"] for u in units.values()}), [_identity(c) for c in results.cells()], _published(results),
    )  # fmt: skip


def _identity(cell: Cell) -> Identity:
    snapshots = {int(n): key for n, key in cell.about["snapshots"].items()}
    return Identity(cell.id, cell.about["stream"]["model"], cell.about["stream"]["method"], snapshots[max(snapshots)])


def _published(results: Results) -> list[str]:
    """What is meant by the published variant of each method that was run as such."""
    said, found = Meaning.read(results).published, dict[str, str]()
    for cell in results.cells():
        if cell.about["stream"]["method"].get("settings", {}).get("published") is True:
            found[cell.method] = said.get(cell.method, PUBLISHED)
    return [f"{title}: {means}" for title, means in found.items()]


def _dropped(entry: Any) -> tuple[str, str]:
    if isinstance(entry, Mapping):
        return str(entry.get("source", "")), str(entry.get("reason", ""))
    return str(entry[0]), str(entry[1])


def _counted(found: Iterable[tuple[str, str]]) -> list[Left]:
    places: dict[str, list[str]] = defaultdict(list)
    for where, reason in found:
        places[reason].append(where)
    return sorted((Left(r, len(p), p[0]) for r, p in places.items()), key=lambda left: -left.count)


def times(busy: Mapping[tuple[str, str], Sequence[Interval]]) -> Times:
    """The time line from (what, who) -> intervals in unix seconds."""
    everything = union([i for spans in busy.values() for i in spans])
    active = sum(b - a for a, b in everything)
    pause = max(30.0, 0.05 * active)
    starts: list[tuple[float, float]] = []  # (unix second, second of the line) where each stretch begins
    breaks: list[float] = []
    position = 0.0
    for number, (a, b) in enumerate(everything):
        if not number or a - everything[number - 1][1] > pause:
            breaks += [position] if number else []
            starts.append((a, position))
        position = starts[-1][1] + b - starts[-1][0]

    def place(t: float) -> float:
        begin, at = next(s for s in reversed(starts) if s[0] <= t)
        return at + t - begin

    lanes = [
        Lane(who, what, union([(place(a), place(b)) for a, b in spans])) for (what, who), spans in sorted(busy.items())
    ]
    editing = union([i for lane in lanes if lane.does == "edits" for i in lane.busy])
    scoring = union([i for lane in lanes if lane.does == "scores" for i in lane.busy])
    return Times(lanes, position, breaks, _length(editing), _length(scoring), _length(overlap(editing, scoring)))


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Overlapping and touching intervals joined, in order."""
    joined: list[Interval] = []
    for a, b in sorted(intervals):
        if joined and a <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return joined


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Where both hold; each argument is the outcome of `union`."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        a, b = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if a < b:
            found.append((a, b))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(intervals: Sequence[Interval]) -> float:
    return sum(b - a for a, b in intervals)
