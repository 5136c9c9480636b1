"""Bad input to a study, end to end: refused with its reason, counted, and the stream goes on or stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysys.account import account
from raysys.journal import load_all
from raysys.report import Report
from raysys.results import Results
from raysys.spec import SpecError
from raysys.study import run
from tests.actors import small
from tests.actors.bad import REFUSED

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("small"))


def study(place: Path, **changes: Any) -> Results:
    """Every kind of bad input, asked of a method that edits singly, one in batches and two that go wrong."""
    rome = small.tree(place)["methods"][0]
    tuned = {"name": "ft_m", "layers": [1], "steps": 3, "lr": 1e-3}
    base: dict[str, Any] = {
        "snapshots": [0, 6],
        "edits": {"dataset": "tests.actors.bad:Bad", "count": 6, "policy": "skip"},
        "methods": [
            rome,
            tuned | {"label": "batches", "batch_size": 6},
            tuned | {"label": "wild", "lr": 3e37},
            rome | {"label": "singular", "documents": 1, "ridge": 0.0},
        ],
        "benchmarks": [{"name": "probes", "free": False}],
    }
    return run(small.spec(place, **(base | changes)))


@pytest.fixture(scope="module")
def results(cluster: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSYS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield study(place)


def refused(results: Results, method: str) -> list[str]:
    rows = results.edits().select(["cell", "id", "refused"]).to_pylist()
    return [r["id"] for r in rows if f"-{method}-" in r["cell"] and r["refused"]]


def test_bad_requests_are_refused_each_with_its_reason_and_the_stream_goes_on(results: Results) -> None:
    rows = results.edits().select(["cell", "id", "refused"]).to_pylist()
    reasons = {r["id"]: r["refused"] for r in rows if "-rome-" in r["cell"] and r["refused"]}
    assert tuple(reasons) == REFUSED
    assert "has no tokens" in reasons["zero-tokens"]
    assert "needs one '{}'" in reasons["subject-twice"]
    assert "needs one '{}'" in reasons["subject-missing"]
    assert "exceed the 256" in reasons["too-long"]
    scores = results.scores().to_pydict()
    assert {(m, e) for m, e in zip(scores["method"], scores["edits"], strict=True)} >= {("rome", 6), ("batches", 6)}


def test_a_bad_request_does_not_take_its_batch_with_it(results: Results) -> None:
    assert tuple(refused(results, "batches")) == REFUSED
    [cell] = [c for c in results.cells() if c.method == "batches"]
    [entry] = load_all(results.cell_folder(cell.id) / "journal")
    assert entry.patches
    assert set(entry.refused) == set(REFUSED)


def test_an_update_that_is_not_finite_is_never_applied(results: Results) -> None:
    assert set(refused(results, "wild")) == {"good-1", "good-2", *REFUSED}
    [cell] = [c for c in results.cells() if c.method == "wild"]
    assert not results.snapshot(cell.id, 6).patches


def test_a_singular_second_moment_ends_its_stream_with_the_reason_and_no_other(results: Results) -> None:
    [failure] = results.failures()
    assert "singular" in failure["cell"]
    assert "second moment" in failure["reason"]
    assert "raise `documents` or `ridge`" in failure["reason"]
    assert not results.manifest["complete"]


def test_the_report_counts_what_was_left_out_refused_and_given_up(results: Results) -> None:
    told = account(results)
    assert [(x.count, x.where) for x in told.dropped] == [(1, "bad, record 6")]
    assert "edits the same subject and prompt" in told.dropped[0].reason
    each = Counter[str]()
    for x in told.refused:
        each[next((r for r in (*REFUSED, "good-1", "good-2") if f"'{r}'" in x.reason), x.reason)] += x.count
    assert each == {**dict.fromkeys(REFUSED, 3), "good-1": 1, "good-2": 1}
    text = StringIO()
    Report.of(results).show(Console(file=text, width=300))
    assert "left out 1: edits the same subject and prompt" in text.getvalue()
    assert "refused 3: edit 'zero-tokens'" in text.getvalue()
    assert "failed: " in text.getvalue()
    page = Report.of(results).write().read_text()
    assert "subject-missing" in page
    assert "is singular" in page


def test_a_study_that_stops_at_a_refusal_gives_up_that_stream_alone(results: Results, place: Path) -> None:
    tuned = {"name": "ft_m", "layers": [1], "steps": 3, "lr": 1e-3}
    stopped = study(place, on_refusal="stop", methods=[tuned], root=str(place / "stop"), snapshots=[0, 1, 6])
    [failure] = stopped.failures()
    assert "'zero-tokens'" in failure["reason"]
    assert 'on_refusal = "skip"' in failure["reason"]
    scores = stopped.scores().to_pydict()
    assert set(scores["edits"]) == {0, 1}


def test_duplicates_stop_the_study_where_the_policy_is_to_fail(cluster: None, place: Path) -> None:
    with pytest.raises(SpecError, match="one edit would undo the other"):
        study(place, edits={"dataset": "tests.actors.bad:Bad", "count": 6}, root=str(place / "fail"))


def test_the_published_variant_is_named_as_such(cluster: None, place: Path) -> None:
    rome = small.tree(place)["methods"][0] | {"published": True}
    edits = small.tree(place)["edits"]
    named = study(
        place, methods=[rome, rome | {"label": "mine"}], edits=edits, snapshots=[0, 1], root=str(place / "pub")
    )
    assert [c.method for c in named.cells()] == ["rome (published)", "mine"]
    said = account(named).published
    assert [s.partition(":")[0] for s in said] == ["rome (published)", "mine"]
    assert all("a published variant" in s and "without C" in s for s in said)
    assert "a published variant" in Report.of(named).write().read_text()
    assert named.snapshot(named.cells()[0].id, 1).patches
