"""Tasks of lm-evaluation-harness in a study on real Ray: asked by one process, scored by another, at every snapshot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raysys.results import Results
from raysys.study import run
from raysys.summary import summarise
from tests import tasks
from tests.actors import small

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """A study of two edits: a folder of two tasks, and one that can't be scored item by item."""
    place = small.folder(tmp_path_factory.mktemp("harness"))
    tasks.write(place / "all")
    (place / "some").mkdir()
    for name in ("t_choice", "t_text"):
        (place / "some" / f"{name}.yaml").write_bytes((place / "all" / f"{name}.yaml").read_bytes())
    benchmarks = [
        {"name": "harness", "label": "tasks", "task": str(place / "some"), "limit": 3, "shots": 1},
        {"name": "harness", "label": "texts", "task": str(place / "all" / "t_whole.yaml")},
    ]
    tuned = {"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}
    spec = small.spec(place, snapshots=[0, 2], methods=[tuned], benchmarks=benchmarks, on_bad_benchmark="skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSYS_CACHE", str(place / "cache"))
        with small.cluster():
            yield run(spec)


def test_every_record_is_scored_at_every_snapshot_by_every_metric(results: Results) -> None:
    metrics = {"t_choice": ("acc", "acc_norm"), "t_text": ("exact_match", "exact_match,start")}
    assert {(r["edits"], r["query"], r["metric"]) for r in results.scores().to_pylist()} == {
        (edits, f"harness/{task}/{record}", metric)
        for edits in (0, 2)
        for task, found in metrics.items()
        for record in range(3)
        for metric in found
    }
    assert summarise(results).ability == [("tasks", "acc")]


def test_a_task_that_does_not_fit_is_left_out_with_its_reason(results: Results) -> None:
    [failure] = results.failures()
    assert failure["benchmark"] == "texts" and "perplexity of whole texts" in failure["reason"]
