"""What the papers say of one method against another, measured: `python -m tests.compare [--edits N] [--orders N]`.

Runs one study on the built-in world (resumable, see `raysys run`): ROME, R-ROME, MEMIT, AlphaEdit, MEND and published
MEND, each over several edit orders, and asks

1. how many edits ROME and R-ROME survive: the largest measured number up to which every snapshot keeps both *ability*
   (mean of the MMLU and GSM8K miniatures) and *locality* (facts that nobody edited, teacher-forced) at `--level` times
   the unedited model's or more; at most the number of edits made;
2. how much ability AlphaEdit and MEMIT keep after the last edit, in points against the unedited model;
3. how many edits MEND and published MEND hold after the last one (the edits' own prompts, teacher-forced), and how much
   ability and locality that costs.

Each answer is a paired difference over the same edit orders and the same questions, with a bootstrapped 95 % interval
(orders and questions are drawn anew together, 2000 times). Three orders, the default, are few to draw from: their
intervals are rough, mostly too narrow; take more orders where one decides. A contrary result is a finding, and is
printed as one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from raysys.progress import shown
from raysys.results import Results
from raysys.spec import StudySpec
from raysys.study import run

Array = NDArray[np.float64]
METHODS: dict[str, dict[str, Any]] = {
    "rome": {},
    "r_rome": {},
    "memit": {},
    "alphaedit": {},
    "mend": {},
    "mend (published)": {"published": True},
}
METRICS = {"mmlu": "accuracy", "gsm8k": "accuracy", "locality": "known/forced", "efficacy": "efficacy/forced"}
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """`scores[method][metric]`: (orders, snapshots, items), the same items in the same places for all methods.

    `left_out`: methods without, and why.
    """

    snapshots: tuple[int, ...]
    scores: Mapping[str, Mapping[str, Array]]
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """Mean of `first` - `second`, its interval, and both methods' figures per edit order."""

    what: str
    first: str
    second: str
    figures: tuple[list[float], list[float]]
    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words."""
        if self.low > 0:
            return f"{self.first} has more"
        return f"{self.second} has more" if self.high < 0 else "not decided"


def main() -> int:
    """Run the study and print the findings; exit code 1 when a method could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200, help="edits a stream (default 200)")
    parser.add_argument("--every", type=int, default=10, help="edits between snapshots (default 10)")
    parser.add_argument("--orders", type=int, default=3, help="edit orders (default 3)")
    parser.add_argument("--level", type=float, default=0.8, help="share of the base that counts as survived (0.8)")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--root", default="runs", help="where the run folder is (default runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    results = run(study(options.edits, options.every, options.orders, options.methods, options.root), shown())
    data = measured(results)
    found = findings(data, options.level)
    if options.json:
        print(json.dumps([vars(f) | {"verdict": f.verdict} for f in found], indent=1))
    else:
        show(found, data, options.level)
    for failure in results.failures():
        print(f"not measured: {failure.get('cell')}: {failure.get('reason')}", file=sys.stderr)
    for method, why in data.left_out.items():
        print(f"not compared: {method}: {why}", file=sys.stderr)
    return 1 if results.failures() or data.left_out else 0


def study(edits: int, every: int, orders: int, methods: Sequence[str], root: str) -> StudySpec:
    """The study behind the findings."""
    return StudySpec.check(
        {
            "name": "compare",
            "root": root,
            "models": ["world/small"],
            "snapshots": list(range(0, edits + 1, every)),
            "orders": orders,
            "edits": {"dataset": "world", "count": edits},
            "methods": [{"name": m.split()[0], **METHODS[m]} for m in methods],
            "benchmarks": [
                {"name": "mmlu", "data": "world", "limit": 100},
                {"name": "gsm8k", "data": "world", "limit": 100, "fixed_shots": True, "max_tokens": 48},
                {"name": "locality", "free": False},
                {"name": "probes", "free": False},
            ],
            "scoring": {"batch": 32, "block": 128},
            "cluster": {"evaluators": 1, "dashboard": False},
        }
    )


def measured(results: Results) -> Measured:
    """Scores as arrays; a method without a whole set of streams is left out, with the reason."""
    spec = results.spec
    columns = ["query", "metric", "value", "method", "order", "edits", "benchmark"]
    table = results.scores().select(columns).to_pydict()
    found: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in zip(*(table[c] for c in columns), strict=True):
        query, metric, value, method, order, edits, benchmark = row
        name = "efficacy" if benchmark == "probes" else benchmark
        if metric == METRICS[name]:
            found.setdefault((method, name, order, edits), {})[query] = value
    scores: dict[str, dict[str, Array]] = {}
    left_out: dict[str, str] = {}
    places: dict[str, list[str]] = {}  # metric -> the items of the first method that has them
    for method in dict.fromkeys(m.title for m in spec.methods):
        sheets = {}
        for name in METRICS:
            wanted = spec.snapshots if name != "efficacy" else spec.snapshots[-1:]
            rows = [[found.get((method, name, o, n), {}) for n in wanted] for o in range(spec.orders)]
            items = places.get(name) or sorted(rows[0][0])
            odd = [
                (o, n)
                for o, row in enumerate(rows)
                for n, cell in zip(wanted, row, strict=True)
                if not items or set(items) != set(cell)
            ]
            if odd:
                o, n = odd[0]
                left_out[method] = f"{name}: order {o} after {n} edits lacks items, or has others"
                break
            places[name] = items
            sheets[name] = np.array([[[cell[i] for i in items] for cell in row] for row in rows])
        else:
            scores[method] = sheets
    return Measured(spec.snapshots, scores, left_out)


# --- what is asked ---------------------------------------------------------------------------------------------------

Means = Mapping[str, Array]  # metric -> (orders, snapshots)


def survived(means: Means, snapshots: Sequence[int], level: float) -> Array:
    """Per order: the last snapshot up to which ability and locality are at `level` of the base's or more."""
    kept = np.ones_like(means["locality"], dtype=bool)
    for part in (_ability(means), means["locality"]):
        kept &= part >= level * part[:, :1] - 1e-12
    until = np.cumprod(kept, axis=1).sum(axis=1) - 1  # index of the last one before the first failure; the base passes
    return np.asarray(snapshots, dtype=float)[until]


def ability_kept(means: Means) -> Array:
    """Per order: ability after the last edit minus the base's."""
    ability = _ability(means)
    return ability[:, -1] - ability[:, 0]


def _ability(means: Means) -> Array:
    return (means["mmlu"] + means["gsm8k"]) / 2


def findings(data: Measured, level: float) -> list[Finding]:
    """Every comparison whose methods were measured."""
    last = data.snapshots[-1]

    def locality(means: Means) -> Array:
        return means["locality"][:, -1] - means["locality"][:, 0]

    asked: list[tuple[str, str, str, Callable[[Means], Array]]] = [
        (f"edits survived (of {last})", "r_rome", "rome", lambda m: survived(m, data.snapshots, level)),
        (f"ability after {last} edits against the base", "alphaedit", "memit", ability_kept),
        (f"locality after {last} edits against the base", "alphaedit", "memit", locality),
        (f"edits that hold after {last}", "mend", "mend (published)", lambda m: m["efficacy"][:, -1]),
        (f"ability after {last} edits against the base", "mend", "mend (published)", ability_kept),
        (f"locality after {last} edits against the base", "mend", "mend (published)", locality),
    ]
    return [
        compare(data, what, first, second, figure)
        for what, first, second, figure in asked
        if first in data.scores and second in data.scores
    ]


def compare(data: Measured, what: str, first: str, second: str, figure: Callable[[Means], Array]) -> Finding:
    """The paired difference of a figure (means -> one number per order) and its bootstrapped interval."""
    both = [data.scores[first], data.scores[second]]
    here = [figure({n: sheet.mean(-1) for n, sheet in sheets.items()}) for sheets in both]
    dice = np.random.default_rng(0)
    orders = len(here[0])
    drawn = np.empty(RESAMPLES)
    for b in range(RESAMPLES):
        picked = dice.integers(orders, size=orders)
        weights = {n: _weights(dice, sheet.shape[-1]) for n, sheet in both[0].items()}  # the same items for both
        values = [figure({n: sheet[picked] @ weights[n] for n, sheet in sheets.items()}) for sheets in both]
        drawn[b] = (values[0] - values[1]).mean()
    low, high = np.quantile(drawn, (0.025, 0.975))
    figures = (here[0].tolist(), here[1].tolist())
    return Finding(what, first, second, figures, float((here[0] - here[1]).mean()), float(low), float(high))


def _weights(dice: np.random.Generator, n: int) -> Array:
    return dice.multinomial(n, np.full(n, 1 / n)) / n


def show(found: Sequence[Finding], data: Measured, level: float) -> None:
    """Print the findings, and the curves they come from."""
    console = Console(width=150)
    table = Table("what", "first", "second", "first, by order", "second, by order", "difference", "95 %", "so")
    for f in found:
        scale = 1.0 if "survived" in f.what else 100.0
        sides = [", ".join(f"{v * scale:.1f}" for v in side) for side in f.figures]
        span = f"[{f.low * scale:+.1f}, {f.high * scale:+.1f}]"
        table.add_row(f.what, f.first, f.second, *sides, f"{f.difference * scale:+.1f}", span, f.verdict)
    curves = Table("method", "curve", *map(str, data.snapshots), title="per cent, mean over edit orders")
    for method, sheets in data.scores.items():
        means = {n: s.mean(-1) for n, s in sheets.items()}
        for name, rows in (("ability", _ability(means)), ("locality", means["locality"])):
            curves.add_row(method, name, *(f"{v * 100:.0f}" for v in rows.mean(0)))
    console.print(curves)
    console.print(table)
    console.print(
        f"survived: ability and locality at {level:.0%} of the unedited model's or more; else per cent, points"
    )


if __name__ == "__main__":
    sys.exit(main())
