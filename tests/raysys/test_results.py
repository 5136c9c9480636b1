"""Results are valid at every moment: whole files, nothing double, compaction loses nothing and may be interrupted."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raysys.results import Results
from raysys.spec import SpecError, StudySpec

SPEC = {"name": "r", "snapshots": [0], "methods": [{"name": "ft_m"}], "benchmarks": [{"name": "mmlu"}]}


def unit(name: str, snapshot: str = "s0", block: str = "b0") -> dict[str, Any]:
    return {
        "unit": name, "snapshot": snapshot, "block": block, "benchmark": "mmlu", "items": 1, "tokens": 5,
        "seconds": 0.5, "switch_seconds": 0.1, "started": 1.0, "ended": 1.5, "evaluator": "evaluator-0",
        "hardware": "cpu",
    }  # fmt: skip


def score(query: str, value: float) -> dict[str, Any]:
    return {"query": query, "group": "g", "metric": "accuracy", "value": value, "edit": 0, "answer": "{}"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    made = Results.create(StudySpec.check(SPEC | {"root": str(tmp_path)}))
    for number, cell in enumerate(("a", "b")):
        about = {"number": number, "model": "m", "method": cell, "order": 0, "settings": {}, "blocks": ["b0", "b1"]}
        made.write_cell(cell, about | {"snapshots": {"0": "s0", "5": f"s5{cell}"}})
    made.add(unit("u0"), [score("q0", 1.0)])
    made.add(unit("u1", block="b1"), [score("q1", 0.0)])
    made.add(unit("u2", snapshot="s5a"), [score("q0", 0.0)])
    return made


def rows(results: Results) -> list[tuple[Any, ...]]:
    table = results.scores().to_pydict()
    return sorted(zip(table["cell"], table["edits"], table["query"], table["value"], strict=True))


EXPECTED = [("a", 0, "q0", 1.0), ("a", 0, "q1", 0.0), ("a", 5, "q0", 0.0), ("b", 0, "q0", 1.0), ("b", 0, "q1", 0.0)]


def test_a_unit_counts_for_every_cell_whose_snapshot_it_scored(results: Results) -> None:
    assert rows(results) == EXPECTED


def test_compaction_changes_no_row_and_leaves_no_loose_file(results: Results) -> None:
    results.compact()
    assert rows(results) == EXPECTED
    assert results.done() == {"u0", "u1", "u2"}
    assert list((results.folder / "units").iterdir()) == []
    results.add(unit("u3", snapshot="s5b"), [score("q0", 1.0)])
    assert rows(results) == [*EXPECTED, ("b", 5, "q0", 1.0)]
    results.compact()
    assert rows(results) == [*EXPECTED, ("b", 5, "q0", 1.0)]


def test_compaction_interrupted_before_it_removes_the_files_counts_nothing_twice(results: Results) -> None:
    loose = {p.name: p.read_bytes() for p in (results.folder / "units").iterdir()}
    results.compact()
    for name, data in loose.items():
        (results.folder / "units" / name).write_bytes(data)
    assert rows(results) == EXPECTED
    results.compact()
    assert rows(results) == EXPECTED


def test_compaction_interrupted_between_its_two_tables_loses_nothing(results: Results) -> None:
    loose = {p.name: p.read_bytes() for p in (results.folder / "units").iterdir()}
    results.compact()
    (results.folder / "units.parquet").unlink()
    for name, data in loose.items():
        (results.folder / "units" / name).write_bytes(data)
    assert rows(results) == EXPECTED


def test_not_a_number_is_kept_as_such(results: Results) -> None:
    results.add(unit("u4", snapshot="s5b", block="b1"), [score("q1", math.nan)])
    assert math.isnan(next(v for c, e, _, v in rows(results) if (c, e) == ("b", 5)))


def test_a_unit_is_one_parquet_file_that_anyone_can_read(results: Results) -> None:
    table = pq.read_table(results.folder / "units" / "u0.parquet")
    assert table["query"].to_pylist() == ["q0"]


def test_another_study_in_the_folder_is_refused_with_the_difference(results: Results) -> None:
    before = (results.folder / "spec.json").read_bytes()
    with pytest.raises(SpecError, match="seed is 0 there and 1 here"):
        Results.create(StudySpec.check(SPEC | {"seed": 1}), results.folder)
    assert (results.folder / "spec.json").read_bytes() == before


def test_a_failure_is_forgotten_once_the_unit_is_scored(results: Results) -> None:
    results.fail("u9", {"cell": "a", "edits": 5, "benchmark": "mmlu", "tries": 4, "reason": "no"})
    assert [f["unit"] for f in results.failures()] == ["u9"]
    results.add(unit("u9", snapshot="s5b"), [score("q0", 1.0)])
    assert results.failures() == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        Results.open(tmp_path)


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="can't write there"):
        Results.create(StudySpec.check(SPEC | {"root": str(tmp_path / "file")}))
