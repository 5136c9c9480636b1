"""A cluster with no CPU more than a study asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raysys.resources import needs
from raysys.study import run
from tests.actors import small

pytestmark = pytest.mark.timeout(240)


def test_models_of_a_study_do_not_wait_for_each_other_for_ever(
    tmp_path: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one begins while evaluators of the first one hold what they can get."""
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path / "cache"))
    place = small.folder(tmp_path)
    slow = {"name": "tests.actors.small:Words", "label": "words", "items": 48, "seconds": 0.1}
    spec = small.spec(
        place, models=[str(place / "model"), str(model_folder("gpt2"))], benchmarks=[slow],
        methods=[{"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}],
        cluster={"evaluators": 2, "idle": 1, "wait": 60},
    )  # fmt: skip
    cpus, _, _ = needs(spec)
    assert cpus == 5
    with small.cluster(int(cpus)):
        results = run(spec)
    assert results.failures() == []
    assert {cell.model for cell in results.cells()} == set(spec.models)
    begun = {m: min(u["started"] for u in results.units().to_pylist() if u["model"] == m) for m in spec.models}
    ended = {m: max(u["ended"] for u in results.units().to_pylist() if u["model"] == m) for m in spec.models}
    assert begun[spec.models[1]] > begun[spec.models[0]] and ended[spec.models[1]] > ended[spec.models[0]]
