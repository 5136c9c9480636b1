"""What scheduling costs at scale: `python -m tests.scale [--evaluators N] [--units N] [--processes N] [--seconds A B]`.

Evaluators that wait a random time instead of scoring, many of them in each process; everything else is real: Ray, the
pool, the run folder. Told: the share of the ideal time (all units' seconds over evaluators), seconds of the driver's
processor per unit, its memory at the end and what it has grown by over the last third (Ray's own tables have their
size by then), and what was compacted. Checked, a line each: at least 95 % of the ideal time, no growth of memory or of
Python's objects by the unit, every unit on disk once. Exit code 1 on a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from actors.cluster import ready
from actors.evaluator import Task
from actors.feed import Work
from actors.machine import describe
from actors.places import Limits
from actors.pool import EvaluatorPool
from actors.waiting import Done, Unit
from raysys.results import Results
from raysys.saving import Saver
from raysys.spec import StudySpec

SNAPSHOTS = 20
GROWTH = 200  # bytes of the driver by the unit that are allowed; what is kept of one alone is less than its name
SHARE = 0.95


class Waits:
    """Several evaluators in one process, each of which waits as long as its unit says."""

    def __init__(self) -> None:
        self.takes = Task  # so that what an evaluator is made of is imported before it answers, as a real one does

    def describe(self) -> dict[str, Any]:
        """As an evaluator's."""
        return describe(torch.device("cpu"))

    def score(self, task: Task) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A unit and its scores, as an evaluator gives them."""
        started = time.time()
        time.sleep(float(task.name))
        unit = {
            "unit": task.unit, "snapshot": task.snapshot, "block": "b", "benchmark": task.benchmark, "items": 8,
            "tokens": 800, "seconds": time.time() - started, "switch_seconds": 0.0, "started": started,
            "ended": time.time(), "evaluator": "waits", "hardware": "none",
        }  # fmt: skip
        row = {"group": "", "metric": "accuracy", "value": 1.0, "edit": 0, "answer": '{"chosen": 1}'}
        return unit, [{"query": f"{task.unit}/{n}"} | row for n in range(8)]


class Shared:
    """One of several evaluators in a process: the pool ends it, and not the others."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actor, name)

    def end(self) -> None:
        """The process goes when the cluster does."""


def main() -> int:
    """Run it and judge; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluators", type=int, default=200)
    parser.add_argument("--units", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--seconds", type=float, nargs=2, default=(1.0, 3.0), help="the shortest and the longest unit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raysys-scale-") as folder:
        ray.init(address="local", num_cpus=options.processes, include_dashboard=False, log_to_driver=False)
        try:
            lines = list(_measured(options, Path(folder)))
        finally:
            ray.shutdown()
    for good, text in lines:
        print(f"{'passed' if good else 'FAILED'}: {text}")
    passed = sum(good for good, _ in lines)
    print(f"{passed} passed, {len(lines) - passed} failed")
    return int(passed < len(lines))


def _measured(options: Any, folder: Path) -> Iterator[tuple[bool, str]]:
    each = -(-options.evaluators // options.processes)
    share: Any = {"num_cpus": 1, "max_concurrency": each}
    made = [ray.remote(Waits).options(**share).remote() for _ in range(options.processes)]
    ray.get([a.describe.remote() for a in made])
    turn = iter(range(10**9))
    limits = Limits(fewest=options.evaluators, most=options.evaluators)
    pool = EvaluatorPool(lambda name: Shared(made[next(turn) % len(made)]), limits)
    while pool.starting:
        pool.take(ray.wait(pool.refs)[0][0])
    dice = random.Random(0)
    spec = StudySpec.parse('[[methods]]\nname = "rome"\n[[benchmarks]]\nname = "mmlu"\n')
    results = Results.create(spec, folder / "run")
    saver = Saver(results)
    table, total, done = ray.put(0), 0.0, 0
    waiting = list(range(SNAPSHOTS))
    started, cpu = time.monotonic(), time.process_time()
    early = early_units = early_blocks = 0
    while waiting or pool.pending:
        if waiting and pool.snapshots < 4:
            units = [
                _unit(table, waiting[0], n, dice.uniform(*options.seconds)) for n in range(options.units // SNAPSHOTS)
            ]
            total += sum(float(u.name) for u in units)
            pool.submit(units)
            waiting.pop(0)
        for ref in ready(pool.refs):
            for outcome in pool.take(ref):
                assert isinstance(outcome, Done), outcome
                saver.add(outcome.about, outcome.scores)
                done += 1
        pool.tick()
        if not early and done >= 2 * options.units // 3:
            early, early_units, early_blocks = _memory(), done, sys.getallocatedblocks()
    saver.close()
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    growth = (_memory() - early) / max(done - early_units, 1)
    objects = (sys.getallocatedblocks() - early_blocks) / max(done - early_units, 1)
    ideal = total / options.evaluators
    yield (
        ideal / seconds >= SHARE,
        (
            f"{done} units on {options.evaluators} evaluators in {seconds:.0f} s, ideal {ideal:.0f} s: "
            f"{ideal / seconds:.1%} of it; {1000 * cpu / done:.2f} ms of the driver's processor a unit"
        ),
    )
    yield (
        growth <= GROWTH and objects < 1,
        (
            f"driver {_memory() / 2**20:.0f} MiB at the end; a unit of the last third adds {growth:.0f} bytes, "
            f"{objects:.2f} of Python's blocks"
        ),
    )
    before = time.monotonic()
    results.compact()
    rows, left = results._unit_rows().num_rows, len(list((folder / "run" / "units").glob("*")))
    yield rows == done and not left, f"{rows} units compacted in {time.monotonic() - before:.1f} s, {left} files left"


def _unit(table: Any, snapshot: int, number: int, seconds: float) -> Unit:
    work = Work(f"block-{number}", "mmlu", -1, 8, 800, (0, 0), table, 0)
    name = f"{snapshot:02d}-{number:06d}"
    value = partial(_same, table)
    return Unit(name, f"snapshot-{snapshot}", snapshot, "cell", work, f"{seconds:.3f}", {}, value, lambda: None)


def _same(table: Any) -> Any:
    return table


def _memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
