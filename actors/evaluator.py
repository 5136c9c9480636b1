"""The evaluator: one model on its own processor, answering blocks of queries as any snapshot.

A plain class, made a Ray actor only by `start`: tests call it without a cluster. It keeps the base model for the whole
study; putting on the next snapshot touches only the edited weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray

from actors import metrics
from actors.machine import as_actor, describe, hardware, settle
from raysys import names
from raysys.blocks import Block
from raysys.model import Model
from raysys.patch import Wearer
from raysys.scoring import Engine
from raysys.snapshot import Snapshot
from raysys.types import Answer, Chosen

KEEP = 64  # blocks kept in parsed form


@dataclass(frozen=True)
class Task:
    """One unit of work as it travels: which snapshot, which block, and how to score it."""

    unit: str
    snapshot: str
    values: list[Any]  # [reference of the Snapshot]; in a list, so that it is fetched only when it is not yet worn
    table: list[Any]  # [reference of the Arrow table that holds the block]
    row: int
    benchmark: str  # title
    name: str  # of the benchmark
    settings: Mapping[str, Any]
    depth: int = 0  # the lowest block that edits are expected to change, 0: unknown


class Evaluator:
    """Scores blocks as snapshots of one base model."""

    def __init__(self, name: str, model: str | Model, dtype: str, device: str, threads: int, **engine: Any) -> None:
        settle(threads)
        self.name, self.threads = name, threads
        self.model = Model.load(model, dtype, device) if isinstance(model, str) else model
        self.engine = Engine(self.model, **engine)
        self.wearer = Wearer(self.model)
        self.wearing: str | None = None
        self._blocks: dict[tuple[Any, int], Block] = {}
        self._benchmarks: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Evaluator({self.name})"

    def describe(self) -> dict[str, Any]:
        """The machine this runs on and the digest of the base model; also the sign of life after a start."""
        return describe(self.model.device) | {"digest": self.model.digest}

    def score(
        self, task: Task, together: AbstractContextManager[None] | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(unit, scores) as raysys/results.py stores them. Raises ValueError for a snapshot of another model.

        `together`: within it the model is asked, which may be spread over several processes.
        """
        started = time.time()
        with together or nullcontext():
            block, answers, switched = self.answers(task)
        scores = self._score(task, block, answers)
        ended = time.time()
        metrics.memory(self.model.name, self.name, self.model.device)
        unit = {
            "unit": task.unit,
            "snapshot": task.snapshot,
            "block": block.id,
            "benchmark": task.benchmark,
            "items": len(block.items),
            "tokens": block.tokens,
            "seconds": ended - started,
            "switch_seconds": switched - started,
            "started": started,
            "ended": ended,
            "evaluator": self.name,
            "hardware": hardware(self.model.device),
        }
        return unit, scores

    def answers(self, task: Task) -> tuple[Block, list[Answer], float]:
        """The task's block, its answers, and when the snapshot was on."""
        settle(self.threads)
        if task.snapshot != self.wearing:
            self.put_on(ray.get(task.values[0]))
        if task.depth:
            self.engine.passes.expect(task.depth)
        switched = time.time()
        block = self._block(task)
        answers = self.engine.answer(block)
        self.model.check(answers)
        return block, answers, switched

    def put_on(self, snapshot: Snapshot) -> None:
        """Wear `snapshot` in place of what is worn now."""
        if snapshot.base != self.model.digest:
            raise ValueError(
                f"snapshot {snapshot.id} was made from another model than {self.model.name} on this machine "
                f"(digests {snapshot.base[:12]} and {self.model.digest[:12]}); are all machines given the same files?"
            )
        snapshot.verify()
        self.wearing = None  # should wearing fail half-way
        self.engine.forget()
        self.wearer.wear(snapshot.patches)
        self.engine.wears(snapshot.patches)
        self.wearing = snapshot.id

    def _block(self, task: Task) -> Block:
        key = (task.table[0], task.row)
        if key not in self._blocks:
            while len(self._blocks) >= KEEP:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = Block.loads(ray.get(task.table[0])["block"][task.row].as_py())
        return self._blocks[key]

    def _score(self, task: Task, block: Block, answers: list[Answer]) -> list[dict[str, Any]]:
        if task.benchmark not in self._benchmarks:
            self._benchmarks[task.benchmark] = names.build(names.benchmark(task.name), task.settings, task.benchmark)
        benchmark = self._benchmarks[task.benchmark]
        rows = []
        for item, answer in zip(block.items, answers, strict=True):
            text = json.dumps(answer_tree(answer))
            for score in benchmark.score(item.query, answer):
                row = {"query": score.query, "group": score.group, "metric": score.metric, "value": score.value}
                rows.append(row | {"edit": item.query.edit, "answer": text})
        return rows


def answer_tree(answer: Answer) -> dict[str, Any]:
    """An answer as plain data, for the results."""
    if isinstance(answer, Chosen):
        columns = ("logprob", "tokens", "right")
        return {"chosen": answer.best} | {c: [getattr(s, c) for s in answer.choices] for c in columns}
    return {"text": answer.text, "tokens": answer.tokens}


def start(name: str, model: str, dtype: str, device: str, threads: int, gpus: float, **engine: Any) -> Any:
    """An evaluator as a Ray actor; `engine` holds settings of `Engine`. Ray never restarts it: the pool replaces it."""
    return as_actor(Evaluator, f"{model}:{name}", threads, gpus).remote(name, model, dtype, device, threads, **engine)
