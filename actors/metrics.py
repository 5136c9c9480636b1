"""What a study tells a monitoring system, through Ray's metrics: on Prometheus's side every name begins `ray_raysys_`.

Setting a number costs microseconds; Ray sends them on every few seconds, whether anybody collects them or not. Outside
a cluster nothing is set: the actors' classes work without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from actors.waiting import Done, Failed
from raysys.snapshot import Snapshot

SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]  # bounds of the histograms of time
STUDY = ("study", "model")
CELL = ("study", "model", "method", "cell")
UNIT = (*STUDY, "cell", "benchmark")
EVALUATOR = (*STUDY, "evaluator")

NOTES = {  # what the pool and the streams note -> the counter of it
    "unit tried again": "units_retried",
    "unit moved": "units_moved",
    "evaluator lost": "evaluators_lost",
    "evaluator given up": "evaluators_given_up",
    "node lost": "nodes_lost",
}
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "units_done": ("units scored", UNIT),
    "units_failed": ("units given up after all their tries", UNIT),
    "units_retried": ("times a unit was tried again after an error or the death of its evaluator", STUDY),
    "units_moved": ("times a unit was given to another evaluator because its node or an object went away", STUDY),
    "evaluators_lost": ("evaluators that died or were killed while their node was there", STUDY),
    "evaluators_given_up": ("evaluators that are not replaced any more", STUDY),
    "nodes_lost": ("evaluators that went with their node", STUDY),
    "items": ("questions scored", EVALUATOR),
    "tokens": ("tokens read to score them", EVALUATOR),
    "busy_seconds": ("seconds spent on units, switching included", EVALUATOR),
    "edits_applied": ("requests of a stream that were edited in; those on record already are not counted", CELL),
    "edits_refused": ("requests that a method refused", CELL),
}
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "queue_depth": ("units not finished, those at work included", STUDY),
    "snapshots_in_flight": ("snapshots with units not finished", STUDY),
    "evaluators_running": ("evaluators that have answered", STUDY),
    "evaluators_starting": ("evaluators that have not answered yet", STUDY),
    "evaluators_busy": ("evaluators at work", STUDY),
    "snapshot_bytes": ("size of the latest snapshot of a cell", CELL),
    "gpu_memory_bytes": ("memory of its GPU that an actor's process has reserved; 0 without one", ("model", "actor")),
}
TIMES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "edit_seconds": ("seconds per edit (of a batch: its time over its size)", CELL),
    "switch_seconds": ("seconds to put on a snapshot", EVALUATOR),
}

_made: dict[str, Metric] = {}  # in this process


def short(model: str) -> str:
    """A model as the tag `model` names it."""
    return model.rstrip("/").split("/")[-1]


def _metric(name: str) -> Any:
    if name not in _made:
        full = f"raysys_{name}"
        if name in COUNTERS:
            about, tags = COUNTERS[name]
            _made[name] = Counter(full, about, tags)
        elif name in GAUGES:
            about, tags = GAUGES[name]
            _made[name] = Gauge(full, about, tags)
        else:
            about, tags = TIMES[name]
            _made[name] = Histogram(full, about, SECONDS, tags)
    return _made[name]


def add(name: str, value: float, tags: Mapping[str, str]) -> None:
    """Add to one of `COUNTERS`; adding nothing is no error."""
    if value > 0 and ray.is_initialized():
        _metric(name).inc(value, dict(tags))


def put(name: str, value: float, tags: Mapping[str, str]) -> None:
    """Set one of `GAUGES`, or add an observation to one of `TIMES`."""
    if ray.is_initialized():
        metric = _metric(name)
        (metric.observe if name in TIMES else metric.set)(value, dict(tags))


def memory(model: str, actor: str, device: torch.device) -> None:
    """Tell how much of the GPU this process holds."""
    held = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    put("gpu_memory_bytes", float(held), {"model": short(model), "actor": actor})


def edited(tags: Mapping[str, str], edits: int, refused: int, seconds: float) -> None:
    """Tell of one step of a stream."""
    add("edits_applied", edits - refused, tags)
    add("edits_refused", refused, tags)
    put("edit_seconds", seconds / edits, tags)


def made(tags: Mapping[str, str], snapshot: Snapshot) -> None:
    """Tell the size of a snapshot."""
    put("snapshot_bytes", float(sum(t.nbytes for p in snapshot.patches for t in p.tensors().values())), tags)


class Watch:
    """What the driver tells of one base model's part of a study."""

    def __init__(self, study: str, model: str, note: Callable[..., None]) -> None:
        self._tags, self._note = {"study": study, "model": short(model)}, note

    def note(self, what: str, **details: Any) -> None:
        """Count what is counted of what is noted, and pass it on."""
        if what in NOTES:
            add(NOTES[what], 1, self._tags)
        self._note(what, **details)

    def took(self, outcome: Done | Failed) -> None:
        """A unit is done or given up."""
        unit = self._tags | {"cell": outcome.unit.cell, "benchmark": outcome.unit.work.benchmark}
        if isinstance(outcome, Failed):
            add("units_failed", 1, unit)
            return
        add("units_done", 1, unit)
        about = outcome.about
        by = self._tags | {"evaluator": about["evaluator"]}
        add("items", about["items"], by)
        add("tokens", about["tokens"], by)
        add("busy_seconds", about["seconds"], by)
        put("switch_seconds", about["switch_seconds"], by)

    def look(self, pool: Any) -> None:
        """How much waits, and who works on it."""
        put("queue_depth", pool.pending, self._tags)
        put("snapshots_in_flight", pool.snapshots, self._tags)
        put("evaluators_running", pool.size - pool.starting, self._tags)
        put("evaluators_starting", pool.starting, self._tags)
        put("evaluators_busy", pool.busy, self._tags)
