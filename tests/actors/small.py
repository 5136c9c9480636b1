"""A study small enough for tests: a tiny random model, a few edits, a benchmark in files, real everything else."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import ray
from ray.cluster_utils import Cluster

from raysys.results import Results
from raysys.spec import StudySpec
from raysys.types import Answer, Choose, Chosen, Query, Score
from tests import families

SUBJECTS = ("Anna", "Bert", "Carla", "Dora", "Emil", "Eiffel", "Norway", "France")
TARGETS = ("Rome", "Paris", "Oslo", "Lima")


def folder(path: Path, family: str = "llama") -> Path:
    """Write a tiny model and eight edits into `path`."""
    families.network(family, max_position_embeddings=256).save_pretrained(path / "model")
    tokenizer = families.tokenizer(bos=True)
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(path / "model")
    edits = [
        {
            "id": f"e{i}",
            "prompt": "{} was born in",
            "subject": subject,
            "target": TARGETS[i % 4],
            "was": TARGETS[(i + 1) % 4],
            "paraphrases": [f"The city of {subject} is"],
            "neighbourhood": [{"prompt": f"{SUBJECTS[i - 1]} works as a", "answer": "pilot"}],
        }
        for i, subject in enumerate(SUBJECTS)
    ]
    (path / "edits.json").write_text(json.dumps(edits))
    (path / "corpus.txt").write_text("\n".join(f"{s} was born in {t} ." for s in SUBJECTS for t in TARGETS))
    return path


def tree(path: Path, **changes: Any) -> dict[str, Any]:
    """The study on what `folder` wrote, as plain data."""
    rome = {"name": "rome", "layer": 1, "steps": 5, "corpus": str(path / "corpus.txt"), "documents": 32}
    base: dict[str, Any] = {
        "name": "small",
        "root": str(path / "runs"),
        "models": [str(path / "model")],
        "snapshots": [0, 1, 3, 6],
        "edits": {"dataset": "json", "path": str(path / "edits.json"), "count": 6},
        "methods": [rome | {"contexts": [[3, 2]]}, {"name": "ft_m", "layers": [1], "steps": 4, "lr": 1e-3}],
        "benchmarks": [{"name": "tests.actors.small:Words", "label": "words"}, {"name": "probes", "max_tokens": 4}],
        "scoring": {"batch": 4, "block": 8},
        "cluster": {"evaluators": 1, "retries": 2},
    }
    return base | changes


def spec(path: Path, **changes: Any) -> StudySpec:
    """The study, checked."""
    return StudySpec.check(tree(path, **changes))


@dataclass(frozen=True, kw_only=True)
class Words:
    """A benchmark outside benchmarks/: which of four words comes next. `bad` makes one item impossible to score:
    "raise" raises, "kill" ends the process that tries. An item takes `seconds` longer than it would."""

    items: int = 20
    seconds: float = 0.0
    bad: Literal["", "raise", "kill"] = ""
    name: ClassVar[str] = "words"
    version: ClassVar[str] = "1"

    def queries(self) -> Iterator[Query]:
        shared = "The capital of Norway is Oslo . The capital of Peru is Lima . "
        for i in range(self.items):
            prompt = f"{shared}{SUBJECTS[i % 8]} works as a {SUBJECTS[i % 5]} in"
            choices = tuple(f" {t}" for t in TARGETS)
            yield Choose(f"words/{i}", prompt, choices, gold=i % 4, group=str(i % 2), shared=shared)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        assert isinstance(query, Choose)
        assert isinstance(answer, Chosen)
        time.sleep(self.seconds)
        if self.bad == "raise" and query.id == "words/3":
            raise ArithmeticError("item 3 can't be scored")
        if self.bad == "kill" and query.id == "words/3":
            os.kill(os.getpid(), signal.SIGKILL)
        yield Score(query.id, query.group, "accuracy", float(answer.best == query.gold))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.25}


@contextmanager
def cluster(cpus: int = 8) -> Iterator[None]:
    """A Ray cluster of our own in this process; what is in the environment now reaches its actors."""
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def machines(cpus: int) -> Iterator[Any]:
    """A cluster whose head has no GPU, for tests that add nodes and take them away, which is found out soon."""
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": cpus, "num_gpus": 0, "include_dashboard": False, "_system_config": soon}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def contents(results: Results) -> list[tuple[Any, ...]]:
    """Everything a study found, in an order of its own: equal for two runs exactly when they agree bit for bit."""
    columns = ("cell", "edits", "benchmark", "query", "group", "metric", "value", "edit", "answer", "unit")
    table = results.scores().to_pydict()
    rows = sorted(zip(*(table[c] for c in columns), strict=True))
    assert len({row[:6] for row in rows}) == len(rows), "a score is there twice"
    return rows
