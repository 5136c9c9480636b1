"""What a study costs on this machine: `python -m tests.bench [STUDY.toml] [key=value ...]`, or `make bench`.

Runs the study (the demo by default) afresh in a temporary folder and prints where the time went. Figures in the
documentation come from here.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raysys import Results, StudySpec, run
from raysys.account import account
from raysys.progress import shown

DEMO = Path(__file__).resolve().parent.parent / "benchmarks" / "world" / "demo.toml"


def gaps(results: Results) -> list[float]:
    """Seconds between the end of a unit and the start of the next one on the same evaluator, ascending."""
    spans: dict[str, set[tuple[float, float]]] = defaultdict(set)
    for unit in results.units().select(["evaluator", "started", "ended"]).to_pylist():
        spans[unit["evaluator"]].add((unit["started"], unit["ended"]))
    pauses = []
    for busy in map(sorted, spans.values()):
        pauses += [after[0] - before[1] for before, after in pairwise(busy)]
    return sorted(pauses)


def figures(results: Results, seconds: float) -> list[tuple[str, str]]:
    """Name and value of every figure, for a table."""
    told = account(results)
    rows = [("whole study, Ray's start included", f"{seconds:.1f} s")]
    spent: dict[str, list[float]] = defaultdict(list)
    for edit in results.edits().select(["cell", "seconds"]).to_pylist():
        spent[edit["cell"]].append(edit["seconds"])
    rows += [(f"an edit, {cell} (median)", f"{statistics.median(s):.3f} s") for cell, s in spent.items()]
    times, pauses = told.times, gaps(results)
    rows += [
        ("units scored", f"{told.units}"),
        ("tokens scored", f"{told.tokens:,} ({told.tokens / max(times.scoring, 1e-9):,.0f} a second)"),
        ("first edit to last score", f"{times.length:.1f} s"),
        ("  an editor at work", f"{times.editing:.1f} s"),
        ("  evaluators at work meanwhile", f"{times.both:.1f} s ({times.both / max(times.editing, 1e-9):.0%})"),
    ]
    for lane in times.lanes:
        if lane.does == "scores":
            rows.append((f"  {lane.who} busy", f"{lane.seconds:.1f} s"))
    if pauses:
        late = pauses[int(0.95 * (len(pauses) - 1))]
        rows.append(
            ("between two units of an evaluator", f"{pauses[len(pauses) // 2] * 1e3:.1f} ms (95 %: {late * 1e3:.0f})")
        )
    return rows


def main() -> None:
    arguments = sys.argv[1:]
    path = Path(arguments.pop(0)) if arguments and arguments[0].endswith(".toml") else DEMO
    with tempfile.TemporaryDirectory() as folder:
        spec = StudySpec.load(path, [*arguments, f"root={folder}"])
        started = time.perf_counter()
        results = run(spec, shown())
        rows = figures(results, time.perf_counter() - started)
    table = Table("what", "measured", title=f"{path.name} on this machine")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
