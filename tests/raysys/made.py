"""A run folder with made-up scores, written through the product's own store: for tests of what reads it.

`python -m tests.raysys.made FOLDER` writes one, to look at a report without running a study.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from raysys.journal import Entry, Journal, Stream
from raysys.meaning import KEY, Meaning
from raysys.patch import LowRank
from raysys.results import Results
from raysys.spec import StudySpec
from raysys.summary import KINDS, PROTOCOLS
from raysys.types import EditRequest

START = 1_750_000_000.0  # unix seconds
WEIGHT = "model.layers.1.mlp.down_proj.weight"
FALL = {"rome": 60.0, "ft_l": 4.0, "memit": 900.0}  # edits after which a method has lost two thirds
CHOICES = {"mmlu": 4, "csqa": 5, "toxigen": 2, "gsm8k": 0}  # 0: generated answers
BASE = {"mmlu": 0.72, "csqa": 0.58, "toxigen": 0.91, "gsm8k": 0.44}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Stands for an editing method in the study."""

    layer: int = 1
    name: ClassVar[str] = "made"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Stands for a data set of edits in the study."""

    path: str = ""
    name: ClassVar[str] = "made"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Stands for a benchmark in the study."""

    choices: int = 0

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 1 / self.choices} if self.choices else {}


def spec(
    root: Path,
    methods: Sequence[str] = ("rome", "ft_l"),
    snapshots: Sequence[int] = (0, 1, 5, 10, 20, 50, 100),
    orders: int = 1,
    name: str = "made",
    models: Sequence[str] = ("world/small",),
) -> StudySpec:
    own = "tests.raysys.made"
    benchmarks = [{"name": f"{own}:Benchmark", "label": b, "choices": n} for b, n in CHOICES.items()]
    benchmarks += [{"name": f"{own}:Benchmark", "label": b} for b in ("probes", "locality")]
    return StudySpec.check(
        {
            "name": name,
            "seed": 1,
            "root": str(root),
            "models": list(models),
            "orders": orders,
            "snapshots": list(snapshots),
            "edits": {"dataset": f"{own}:Dataset", "count": max(snapshots)},
            "methods": [{"name": f"{own}:Method", "label": m} for m in methods],
            "benchmarks": benchmarks,
        }
    )


def make(study: StudySpec, items: int = 300, failed: bool = True) -> Results:
    """Write every cell, unit, failure and event of `study`."""
    results = Results.create(study)
    clock = START
    for number, (model, method, order) in enumerate(study.grid()):
        cell = f"{number}-{method.title}-{order}"
        requests = [request(i) for i in range(study.edits.count)]
        stream = Stream("d" * 64, "float32", {"name": f"{model}/{method.title}"}, tuple(requests), order, 1)
        journal = Journal(results.cell_folder(cell) / "journal", stream)
        ended = _edit(journal, requests, clock + 2, 0.3 if method.title == "ft_l" else 0.6)
        snapshots = {n: stream.key(n) for n in study.snapshots}
        results.write_cell(
            cell,
            {
                "number": number,
                "model": model,
                "method": method.title,
                "order": order,
                "settings": method.settings,
                "requests": [vars(r) for r in requests],
                "dropped": [["edits.json[7]", "the prompt lacks its subject 'Ada <b>Lovelace</b>'"]],
                "stream": {f.name: getattr(stream, f.name) for f in fields(stream) if f.name != "requests"},
                "snapshots": {str(n): key for n, key in snapshots.items()},
                "blocks": [f"{b}-0" for b in (*CHOICES, "probes", "locality")],
            },
        )
        for n, key in snapshots.items():
            _score(results, key, n, method.title, order, items, clock + 3 + n * 0.6, number)
        clock = ended
    if failed:
        results.fail("f" * 12, _failure(study))
    results.write_manifest(
        {
            "started": START,
            "finished": clock + 20,
            "versions": {"raysys": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "python": "3.11.2"},
            "machine": {"system": "Linux 6.1", "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []},
            "models": dict.fromkeys(study.models, "d" * 64),
            KEY: Meaning.of(study).model_dump(mode="json"),
        }
    )
    results.note("evaluator restarted", evaluator="evaluator-1", reason="actor died")
    results.compact()
    return results


def request(i: int) -> EditRequest:
    return EditRequest(f"r{i}", "{} was born in", f"Person {i}", f"City {i % 7}", f"City {(i + 3) % 7}")


def _failure(study: StudySpec) -> dict[str, Any]:
    return {
        "cell": "0",
        "edits": study.snapshots[-1],
        "benchmark": "gsm8k",
        "tries": 3,
        "reason": "<i>out of memory</i>",
    }


def _edit(journal: Journal, requests: Sequence[EditRequest], clock: float, seconds: float) -> float:
    for i, asked in enumerate(requests):
        refused = {asked.id: "the subject has no token of its own"} if i == 12 else {}
        patch = LowRank(WEIGHT, torch.full((4, 1), 0.01 * (i + 1)), torch.full((1, 6), 0.5))
        patches = () if refused else (patch,)
        journal.append(Entry(i, i + 1, patches, {}, (asked,), clock, clock + seconds * 0.95, refused, {"loss": 0.1}))
        clock += seconds
    return clock


def _score(results: Results, key: str, n: int, method: str, order: int, items: int, at: float, cell: int) -> None:
    for benchmark in (*CHOICES, "probes", "locality"):
        unit = f"{key[:12]}-{benchmark}-{order if n else 0}"
        if unit in results.done():
            continue
        rows = list(_rows(benchmark, n, method, order, items))
        about = {
            "unit": unit,
            "snapshot": key,
            "block": f"{benchmark}-0",
            "benchmark": benchmark,
            "items": len(rows),
            "tokens": len(rows) * 60,
            "seconds": 1.4,
            "switch_seconds": 0.05,
            "started": at,
            "ended": at + 1.4,
            "evaluator": f"evaluator-{(n + cell) % 2}",
            "hardware": "cpu",
        }
        results.add(about, rows)
        at += 1.5


def _rows(benchmark: str, n: int, method: str, order: int, items: int) -> Iterator[dict[str, Any]]:
    keep = math.exp(-((n / FALL[method]) ** 1.4))
    noise = random.Random(f"{method}/{n}/{order}/{benchmark}")
    if benchmark == "probes":
        yield from _probe_rows(n, method, noise)
        return
    draw = random.Random(benchmark)
    for i in range(items):
        level = draw.random()
        known = benchmark == "locality"
        ways = CHOICES.get(benchmark, 0)
        floor = 0.0 if known or not ways else 1 / ways
        share = floor + ((0.98 if known else BASE[benchmark]) - floor) * keep
        right = level + (noise.random() - 0.5) * 0.1 * (1 - keep) < share
        if known:
            yield _row(f"{benchmark}/{i}", "known/free", float(right), answer={"text": "x", "tokens": 1})
            yield _row(f"{benchmark}/{i}", "known/forced", float(right or noise.random() < 0.3), answer={"text": "x"})
        elif ways:
            gold = i % ways
            said = 0 if keep < 0.2 and benchmark == "toxigen" else gold if right else (gold + 1) % ways
            right = said == gold
            told = {"chosen": said, "logprob": [-1.0 if c == said else -2.0 - c for c in range(ways)]}
            yield _row(f"{benchmark}/{i}", "accuracy", float(right), group=f"subject {i % 3}", answer=told)
        else:
            said_text = "" if keep < 0.2 else f"so 3 + 4 = {i}" if right else f"{i} apples"
            right = right and bool(said_text)
            yield _row(f"{benchmark}/{i}", "accuracy", float(right), answer={"text": said_text, "tokens": 5})
            right = right or noise.random() < 0.05
            yield _row(f"{benchmark}/{i}", "flexible", float(right), answer={"text": said_text})


def _probe_rows(n: int, method: str, noise: random.Random) -> Iterator[dict[str, Any]]:
    top = {"efficacy": 0.99, "paraphrase": 0.9, "neighbourhood": 0.88, "portability": 0.35, "multi_hop": 0.2}
    ease = {"probability": 1.0, "forced": 0.93, "free": 0.8}
    for edit in range(1, n + 1):
        held = math.exp(-((n - edit) / FALL[method] / 1.5)) * math.exp(-((n / FALL[method] / 2) ** 2))
        for kind in KINDS:
            for protocol in PROTOCOLS:
                right = noise.random() < top[kind] * ease[protocol] * held
                yield _row(f"probes/{edit}/{kind}", f"{kind}/{protocol}", float(right), group=kind, edit=edit)


def _row(query: str, metric: str, value: float, group: str = "", edit: int = 0, answer: Any = None) -> dict[str, Any]:
    text = json.dumps(answer if answer is not None else {"text": "x", "tokens": 1})
    return {"query": query, "group": group, "metric": metric, "value": value, "edit": edit, "answer": text}


if __name__ == "__main__":
    wide = spec(Path(sys.argv[1]), methods=("rome", "ft_l", "memit"), orders=int((*sys.argv, "1")[2]))
    sys.stdout.write(f"{make(wide).folder}\n")
