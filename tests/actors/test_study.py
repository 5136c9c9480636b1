"""A study on real Ray: complete, overlapping, the same whoever did the work and whatever was killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.feed import Source, feed
from raysys.journal import load_all
from raysys.progress import quiet
from raysys.results import Results
from raysys.spec import SpecError
from raysys.study import run, select_edits
from raysys.types import Patch
from tests import processes
from tests.actors import small

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(cluster: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The study with one evaluator, start to end: what every other run must equal."""
    os.environ["RAYSYS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return run(small.spec(place))


def patches(results: Results) -> dict[str, list[Any]]:
    """What the journals say was changed."""

    def described(patch: Patch) -> Any:
        return patch.kind, patch.fields(), {n: t.tolist() for n, t in patch.tensors().items()}

    cells = sorted((results.folder / "cells").iterdir())
    return {c.name: [(e.last, [described(p) for p in e.patches]) for e in load_all(c / "journal")] for c in cells}


def killing(results: Path, who: str, after: int, what: int = signal.SIGKILL) -> Callable[[], None]:
    """A thread that sends `what` to the first `who` actor once `after` units are on disk; call the result to wait."""
    killed: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            steps = len(list(results.glob("cells/*/journal/*.safetensors")))
            if len(list(results.glob("units/*.parquet"))) + steps >= after:
                pids = processes.actors(os.getpid(), who)
                if pids:
                    os.kill(pids[0], what)
                    killed.append(pids[0])
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()

    def finish() -> None:
        thread.join(timeout=1)
        assert killed, f"no {who} was there to kill"

    return finish


def test_every_snapshot_is_scored_on_every_block_once(undisturbed: Results) -> None:
    scores = undisturbed.scores().to_pydict()
    assert undisturbed.failures() == []
    assert undisturbed.manifest["complete"]
    for method in ("rome", "ft_m"):
        for edits in (0, 1, 3, 6):
            seen = [
                q
                for q, *where in zip(*(scores[c] for c in ("query", "method", "edits", "benchmark")), strict=True)
                if where == [method, edits, "words"]
            ]
            assert sorted(seen) == sorted(f"words/{i}" for i in range(20))
    small.contents(undisturbed)  # asserts that nothing is double


def test_a_snapshot_is_asked_about_the_edits_made_so_far_and_the_base_about_all(undisturbed: Results) -> None:
    scores = undisturbed.scores().to_pydict()
    rows = zip(scores["edits"], scores["edit"], scores["benchmark"], strict=True)
    asked: dict[int, set[int]] = {}
    for edits, edit, benchmark in rows:
        if benchmark == "probes":
            asked.setdefault(edits, set()).add(edit)
    assert asked == {0: set(range(1, 7)), 1: {1}, 3: {1, 2, 3}, 6: set(range(1, 7))}


def test_every_edit_is_made_once_in_order(undisturbed: Results) -> None:
    edits = undisturbed.edits().to_pydict()
    for cell in {*edits["cell"]}:
        assert [e for e, c in zip(edits["edit"], edits["cell"], strict=True) if c == cell] == [1, 2, 3, 4, 5, 6]


def test_the_base_is_scored_once_for_all_methods(undisturbed: Results) -> None:
    units = undisturbed.units().to_pydict()
    base = [(u, c) for u, c, e in zip(units["unit"], units["cell"], units["edits"], strict=True) if e == 0]
    assert len({c for _, c in base}) == 2
    assert len({u for u, _ in base}) * 2 == len(base)


def test_two_evaluators_give_the_same_bits(undisturbed: Results, place: Path) -> None:
    spec = small.spec(place, root=str(place / "two"), cluster={"evaluators": 2, "editors": 2})
    again = run(spec)
    assert small.contents(again) == small.contents(undisturbed)
    assert patches(again) == patches(undisturbed)


@pytest.mark.parametrize("who", ["Evaluator", "Editor"])
def test_a_killed_actor_changes_nothing(who: str, undisturbed: Results, place: Path) -> None:
    spec = small.spec(place, root=str(place / f"killed-{who}"), cluster={"evaluators": 2})
    finish = killing(spec.folder, who, after=4)
    again = run(spec)
    finish()
    assert again.failures() == []
    assert any(e["what"] == f"{who.lower()} lost" for e in again.events())
    assert small.contents(again) == small.contents(undisturbed)
    assert patches(again) == patches(undisturbed)


def test_an_editor_that_hangs_is_killed_and_replaced(undisturbed: Results, place: Path) -> None:
    spec = small.spec(place, root=str(place / "hung"), cluster={"evaluators": 1, "stall": 20.0})
    finish = killing(spec.folder, "Editor", after=4, what=signal.SIGSTOP)
    again = run(spec)
    finish()
    assert again.failures() == []
    lost = [e["reason"] for e in again.events() if e["what"] == "editor lost"]
    assert len(lost) == 1
    assert "no progress for 20 s" in lost[0]
    assert processes.left(os.getpid(), "Editor") == []
    assert small.contents(again) == small.contents(undisturbed)
    assert patches(again) == patches(undisturbed)


def test_models_share_the_evaluators_and_each_is_scored_as_if_alone(
    undisturbed: Results, place: Path, model_folder: Callable[[str], Path]
) -> None:
    models = [str(place / "model"), str(model_folder("gpt2"))]
    both = run(small.spec(place, root=str(place / "both"), models=models, cluster={"evaluators": 2, "idle": 1}))
    assert both.failures() == []
    first = [row for row in small.contents(both) if row[0] in {c.id for c in undisturbed.cells()}]
    assert first == small.contents(undisturbed)
    assert {c.model for c in both.cells()} == set(models)


def test_an_interrupted_study_goes_on_where_it_stopped(undisturbed: Results, place: Path) -> None:
    spec = small.spec(place, root=str(place / "interrupted"))

    class Stops:
        """A progress display that interrupts the study half-way."""

        def __getattr__(self, name: str) -> Any:
            return getattr(quiet(), name)

        def scored(self, done: int, total: int, busy: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec, Stops())
    half = Results.open(spec.folder)
    assert not half.manifest["complete"]
    before = {p.name: p.stat().st_mtime_ns for p in spec.folder.glob("units/*.parquet")}
    assert before
    again = run(spec)
    assert again.units().num_rows > len(before)
    assert small.contents(again) == small.contents(undisturbed)
    assert patches(again) == patches(undisturbed)


def test_two_orders_that_ask_the_same_each_keep_their_probes(undisturbed: Results, place: Path) -> None:
    chosen = select_edits(small.spec(place), 0)
    sources = [Source("probes", "probes", {"free": False}, order, cases=chosen.cases) for order in (0, 1)]
    works, faults = feed(sources, str(place / "model"), batch=4, size=8, cuts=(0, 6))
    assert faults == {}
    assert {w.id for w in works if w.order == 0} == {w.id for w in works if w.order == 1} != set()


def test_results_of_other_artifacts_are_not_gone_on_with(undisturbed: Results, place: Path) -> None:
    spec = small.spec(place, root=str(place / "changed"), snapshots=[0, 1])
    results = Results.create(spec)
    for cell in undisturbed.cells():
        changed = dict(cell.about) | {"stream": dict(cell.about["stream"]) | {"method": {"name": "another"}}}
        results.write_cell(cell.id, changed)
    with pytest.raises(SpecError, match="began with another method"):
        run(spec)
    assert results.cell_about(undisturbed.cells()[0].id)["stream"]["method"] == {"name": "another"}


def test_a_complete_study_is_not_run_again(undisturbed: Results, place: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.folder.rglob("*.parquet")}
    assert run(small.spec(place)).manifest["finished"] == undisturbed.manifest["finished"]
    assert {p: p.stat().st_mtime_ns for p in undisturbed.folder.rglob("*.parquet")} == before


@pytest.mark.parametrize(("bad", "reason"), [("raise", "item 3 can't be scored"), ("kill", "died")])
def test_a_poisoned_unit_is_reported_and_the_study_goes_on(bad: str, reason: str, cluster: None, place: Path) -> None:
    spec = small.spec(
        place,
        root=str(place / bad),
        snapshots=[0],
        methods=[{"name": "ft_m", "layers": [1], "steps": 2}],
        benchmarks=[
            {"name": "tests.actors.small:Words", "label": "words", "bad": bad},
            {"name": "probes", "free": False},
        ],
        cluster={"evaluators": 1, "retries": 1},
    )
    results = run(spec)
    failures = results.failures()
    assert [(f["benchmark"], f["tries"]) for f in failures] == [("words", 2)]
    assert all(reason in f["reason"] for f in failures)
    assert not results.manifest["complete"]
    scores = results.scores().to_pydict()
    assert "probes" in scores["benchmark"]
    words = [q for q, b in zip(scores["query"], scores["benchmark"], strict=True) if b == "words"]
    assert len(words) == 20 - 8  # all but the block of eight that holds the bad one


def test_a_snapshot_rebuilt_from_the_journal_is_the_one_that_was_scored(undisturbed: Results) -> None:
    for cell in undisturbed.cells():
        snapshot = undisturbed.snapshot(cell.id, 3)
        assert snapshot.id == cell.about["snapshots"]["3"]
        assert snapshot.edits == 3
        assert snapshot.patches


def test_a_folder_that_holds_another_study_is_left_alone(undisturbed: Results, place: Path) -> None:
    with pytest.raises(SpecError, match="another study: snapshots is"):
        Results.create(small.spec(place, snapshots=[0, 2]), undisturbed.folder)


def test_a_second_driver_is_kept_out(undisturbed: Results, place: Path) -> None:
    with undisturbed.lock(), pytest.raises(SpecError, match="another process"), undisturbed.lock():
        pass
