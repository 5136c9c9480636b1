"""A study as a user has it in a folder: a model, edits, a corpus and a benchmark of their own, by relative paths."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.actors import small

ROOT = Path(__file__).resolve().parents[2]
OWN = '''"""A benchmark of the user's own, which takes its time."""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path
from time import sleep
from typing import ClassVar
from raysys import Answer, Choose, Query, Score

@dataclass(frozen=True, kw_only=True)
class Cities:
    items: int = 16
    seconds: float = 0.15
    name: ClassVar[str] = "cities"
    version: ClassVar[str] = "1"

    def queries(self) -> Iterator[Query]:
        for i in range(self.items):
            yield Choose(f"cities/{i}", f"Anna works as a {i} in", (" Rome", " Oslo"), gold=i % 2)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        sleep(self.seconds)
        while "HOLD" in environ and Path(environ["HOLD"]).exists():
            sleep(0.1)
        if "SEEN" in environ:
            from huggingface_hub import get_token
            Path(environ["SEEN"]).write_text(get_token()[::-1])
        yield Score(query.id, query.group, "accuracy", float(answer.best == query.gold))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.5}
'''
STUDY = """
name = "small"
models = ["model"]
snapshots = [0, 1, 3]
edits = {dataset = "json", path = "edits.json", count = 3}
methods = [{name = "ft_m", layers = [1], steps = 4, lr = 1e-3}]
benchmarks = [{name = "cities:Cities", label = "cities"}, {name = "probes", max_tokens = 4}]
scoring = {batch = 4, block = 4}
cluster = {evaluators = 1, retries = 2}
"""


def folder(path: Path) -> Path:
    """Write all of it into `path`, beside things that must not travel; the study's file."""
    small.folder(path)
    (path / "cities.py").write_text(OWN)
    (path / "study.toml").write_text(STUDY)
    (path / "secret.txt").write_text("not for others")
    return path / "study.toml"


def started(here: Path, *arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The command line in the folder `here`, as a user calls it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_TOKEN"))}
    return subprocess.Popen(
        [sys.executable, "-m", "raysys", *map(str, arguments)], cwd=here, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**plain, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **(env or {})},
    )  # fmt: skip


def raysys(here: Path, *arguments: str | Path, env: Mapping[str, str] | None = None, seconds: float = 240) \
        -> subprocess.CompletedProcess[str]:  # fmt: skip
    """The same, until it ends."""
    with started(here, *arguments, env=env) as process:
        stdout, stderr = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)
