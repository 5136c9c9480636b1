"""Worked examples that a protocol builds in: read at run time, from a file or from an installed lm-evaluation-harness.

Such examples are texts of a paper or a data set and are not part of this repository.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import sources

INSTALL = "pip install 'raysys[harness]'"


class Exemplar(NamedTuple):
    """A question and the whole worked answer behind it."""

    question: str
    answer: str


def harness_task(*parts: str) -> dict[str, Any] | None:
    """The settings of a task of the installed lm-evaluation-harness (its YAML file under tasks/), or None."""
    spec = util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath("tasks", *parts)
    return settings(path) if path.is_file() else None


def settings(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ValueError naming the file when it is something else."""
    import yaml

    try:
        found = yaml.safe_load(sources.decoded(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a readable YAML file ({str(error).splitlines()[0]}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a YAML mapping is expected, not {sources.what(found)}.")
    return found


def samples(found: dict[str, Any], place: str, question: str) -> list[Exemplar]:
    """The built-in samples of a harness task; `question` names the field of the question, the answer is in "target".

    Raises ValueError naming the sample and field that is missing.
    """
    config = found.get("fewshot_config")
    rows = config.get("samples") if isinstance(config, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{place}: no built-in samples (fewshot_config: samples); lm_eval 0.4.13 has them.")
    placed = [sources.Placed(f"{place}, sample {i}", row, i) for i, row in enumerate(rows, 1)]
    return [Exemplar(sources.text_field(row, question), sources.text_field(row, "target")) for row in placed]
