"""An evaluator that only waits: for tests of the pool on real Ray, where the scoring itself is not the question."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
import torch

from actors.evaluator import Task
from actors.feed import Work
from actors.machine import as_actor, describe
from actors.pool import EvaluatorPool
from actors.waiting import Done, Failed, Unit


class Waits:
    """Its benchmark says what a unit does to it: "0.5" (seconds), "kill", "raise", "hang", or a file it waits for;
    "not evaluator-0" raises on that one alone."""

    def __init__(self, name: str, digest: str = "d") -> None:
        self.name, self.digest = name, digest

    def describe(self) -> dict[str, Any]:
        """As an evaluator's."""
        return describe(torch.device("cpu")) | {"digest": self.digest}

    def score(self, task: Task) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(who, where) and no scores."""
        if task.name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.name == "raise":
            raise ArithmeticError("it can't be scored")
        if task.name.startswith("not "):
            if task.name.endswith(self.name.partition(".")[0]):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif task.name.startswith("/"):
            while not Path(task.name).exists():
                time.sleep(0.02)
        else:
            time.sleep(1000 if task.name == "hang" else float(task.name))
        node = ray.get_runtime_context().get_node_id()
        return {"unit": task.unit, "evaluator": self.name, "node": node, "pid": os.getpid()}, []


def start(name: str, cpus: int = 1, digest: str = "d") -> Any:
    """One as an actor."""
    return as_actor(Waits, f"light-{os.urandom(4).hex()}:{name}", cpus, 0).remote(name, digest)


def units(names: Iterable[str], snapshot: str = "s") -> list[Unit]:
    """A unit for each of `names`."""
    table = ray.put(0)
    return [
        Unit(f"{snapshot}/{n}", snapshot, 1, "c", Work(f"b{n}", "b", -1, 1, 1, (0, 0), table, 0), name, {},
             lambda: table, lambda: None)
        for n, name in enumerate(names)
    ]  # fmt: skip


def work(
    pool: EvaluatorPool, until: Callable[[], bool] | None = None, seconds: float = 90, each: Callable[[], None] = str
) -> list[Done | Failed]:
    """Run the pool until nothing is pending (or `until`), as a study does; `each` is called once a round."""
    finished: list[Done | Failed] = []
    deadline = time.monotonic() + seconds
    while pool.pending if until is None else not until():
        assert time.monotonic() < deadline, f"{pool.pending} units, {pool.size} evaluators, {pool.starting} starting"
        ready, _ = ray.wait(pool.refs, timeout=0.2) if pool.refs else ([], [])
        for ref in ready:
            finished += pool.take(ref)
        finished += pool.tick()
        each()
        if not pool.refs:
            time.sleep(0.05)
    return finished
