"""A run folder, a snapshot, a study or a data file from a stranger: what is in it runs nothing, and leads nowhere."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from raysys import locks, runs
from raysys.files import append_line, found, within, write_bytes
from raysys.journal import load_all
from raysys.patch import LowRank
from raysys.report import Report
from raysys.results import Results
from raysys.snapshot import Snapshot, read, write
from raysys.spec import SpecError, StudySpec
from tests.raysys import made

SECRET = "a secret outside the run folder"


@pytest.fixture
def run(tmp_path: Path) -> Results:
    """A sound run, before a stranger had it."""
    return made.make(made.spec(tmp_path / "runs", methods=("rome",), snapshots=(0, 1, 2)), items=4)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that is none of the run's business."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.json").write_text(json.dumps({"reason": SECRET}))
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", "/etc/passwd", "a\\b", "a\0b"])
def test_a_name_in_a_run_folder_is_a_name(name: str, run: Results, outside: Path) -> None:
    before = state(outside.parent)
    for act in (
        lambda: within(run.folder, name),
        lambda: run.fail(f"../{name}", {}),
        lambda: run.cell_about(name),
        lambda: run.snapshot(name, 1),
        lambda: run.write_cell(name, {"number": 0}),
    ):
        with pytest.raises(ValueError, match="no name of a file in a run folder"):
            act()
    assert state(outside.parent) == before


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/evil", ".."])
def test_a_study_names_no_folder_but_its_own(name: str) -> None:
    parts: dict[str, Any] = {"benchmarks": [{"name": "mmlu"}], "methods": [{"name": "ft_m"}]}
    with pytest.raises(SpecError, match="name"):
        StudySpec.check(parts | {"name": name})
    with pytest.raises(SpecError, match="label"):
        StudySpec.check(parts | {"methods": [{"name": "ft_m", "label": name}]})


# --- links -----------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[Results], Any]] = {
    "spec.json": lambda r: r.spec,
    "manifest.json": lambda r: r.manifest,
    "collapsed.json": lambda r: r.scores(),
    "scores.parquet": lambda r: r.scores(),
    "units.parquet": lambda r: r.done(),
    "units": lambda r: r.done(),
    "failures": lambda r: r.failures(),
    "cells": lambda r: r.cells(),
    "events.jsonl": lambda r: r.events(),
    "report.html": lambda r: Report.of(r).write(),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_link_in_a_run_folder_is_not_followed(name: str, run: Results, outside: Path) -> None:
    path = Path(str(run.folder)) / name
    moved = outside / f"moved-{name}"
    path.rename(moved) if path.exists() else moved.write_text("{}")
    path.symlink_to(moved)
    before = state(outside)
    with pytest.raises(ValueError, match=f"{name}: a symbolic link"):
        PLACES[name](run)
    assert state(outside) == before


def test_a_link_among_failures_cells_steps_or_units_is_not_followed(run: Results, outside: Path) -> None:
    folder = Path(str(run.folder))
    cell = folder / "cells" / run.cells()[0].id
    (folder / "units").mkdir(exist_ok=True)
    for place, read_it in (
        (folder / "failures" / "x.json", run.failures),
        (folder / "units" / "x.parquet", run.done),
        (folder / "cells" / "x", run.cells),
        (cell / "journal" / "000009.safetensors", run.edits),
    ):
        target = outside / "secret.json"
        if place.name == "x":
            target = outside
            (outside / "cell.json").write_text("{}")
        place.symlink_to(target)
        with pytest.raises(ValueError, match="symbolic link") as told:
            read_it()
        assert SECRET not in str(told.value)
        place.unlink()


def test_nothing_is_written_through_a_link(run: Results, outside: Path) -> None:
    folder = Path(str(run.folder))
    before = state(outside)
    (folder / "failures").rename(folder / "was")
    (folder / "failures").symlink_to(outside)
    with pytest.raises(ValueError, match="symbolic link"):
        run.fail("x", {})
    with pytest.raises(ValueError, match="symbolic link"):
        run.forget_failures()
    for name, act in ((".lock", lambda: locks.lock(folder).__enter__()), ("events.jsonl", lambda: run.note("x"))):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / "secret.json")
        with pytest.raises(ValueError, match="symbolic link"):
            act()
    with pytest.raises(OSError, match=r"symbolic link|Too many"):
        append_line(folder / "events.jsonl", "x")  # the system too refuses to follow it
    (folder / "file").symlink_to(outside / "secret.json")
    write_bytes(folder / "file", b"new")  # takes the link's place
    assert not (folder / "file").is_symlink()
    assert state(outside) == before
    assert found(folder, "file") == [folder / "file"]


# --- contents --------------------------------------------------------------------------------------------------------


def header(tree: Any, data: bytes = b"") -> bytes:
    text = json.dumps(tree).encode()
    return struct.pack("<Q", len(text)) + text + data


def described(patches: Any, about: Any = None) -> dict[str, Any]:
    return {"__metadata__": {"raysys": json.dumps({"format": 1, "patches": patches, "about": about or {}})}}


TENSOR = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
PATCH = {"kind": "low_rank", "fields": {"weight": "w"}, "tensors": ["left", "right"]}
BAD = {
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of all memory": struct.pack("<Q", 2**63 - 1) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 4) + b"abcd",
    "no header of ours": header({"__metadata__": {}}),
    "nothing": b"",
    "a tensor beyond the file": header({**described([]), "a": TENSOR | {"data_offsets": [0, 2**40]}}),
    "a shape that is not its bytes": header({**described([]), "a": TENSOR | {"shape": [2**31, 2**31]}}, b"\0" * 4),
    "a dtype that does not exist": header({**described([]), "a": TENSOR | {"dtype": "PICKLE"}}, b"\0" * 4),
    "offsets that overlap": header({**described([]), "a": TENSOR, "b": TENSOR}, b"\0" * 4),
    "a kind that is a dotted path": header(described([PATCH | {"kind": "os:system", "tensors": []}])),
    "a tensor that is absent": header(described([PATCH])),
    "fields that don't exist": header(described([PATCH | {"fields": {"command": "x"}, "tensors": []}])),
    "patches that are none": header(described("patches")),
    "patches that are numbers": header(described([1, 2])),
    "lists in lists": header({"__metadata__": {"raysys": "[" * 100_000}}),
    "a description that is a list": header(described([], about=[1])),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_safetensors_file_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path = tmp_path / "000001.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises(ValueError, match=r"000001\.safetensors|patch of"):
        Snapshot.load(path)
    with pytest.raises(ValueError, match=r"000001\.safetensors|patch of"):
        list(load_all(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_a_patch_of_the_wrong_number_type_or_shape_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    for left, right in ((torch.ones(2, 1).to(dtype), torch.ones(1, 2)), (torch.ones(2, 2), torch.ones(1, 2))):
        tensors = {"0.left": left, "0.right": right}
        (tmp_path / "x").write_bytes(save(tensors, metadata={"raysys": json.dumps(
            {"format": 1, "patches": [PATCH], "about": {}})}))  # fmt: skip
        with pytest.raises(ValueError, match=r"wants float32 matrices|don't multiply"):
            read(tmp_path / "x")


def test_a_snapshot_whose_bytes_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Snapshot("id", None, 1, (LowRank("w", torch.ones(2, 1), torch.ones(1, 2)),), "base").save(path)
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", 9.0))
    with pytest.raises(ValueError, match="is damaged"):
        Snapshot.load(path)


def test_a_name_of_a_tensor_is_only_a_name(tmp_path: Path) -> None:
    write(tmp_path / "m", (), {"../../evil": torch.ones(1)}, {})
    _, memory, _ = read(tmp_path / "m")
    assert list(memory) == ["../../evil"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spec.json", "[]"),
        ("spec.json", "[" * 100_000),
        ("spec.json", '{"methods": 1}'),
        ("manifest.json", "[1]"),
        ("cells/x/cell.json", "{}"),
        ("cells/x/cell.json", '{"number": "1", "model": {}, "method": [], "order": null, "settings": 1}'),
        ("failures/x.json", "\udcff"),
    ],
)
def test_a_damaged_description_is_named_without_a_traceback(name: str, text: str, run: Results) -> None:
    path = Path(str(run.folder)) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=path.name):
        (runs.status(run), run.failures())


@pytest.mark.parametrize("unit", [None, "[]", '{"items": "many"}', "[" * 100_000])
def test_a_bad_unit_is_refused(unit: str | None, run: Results) -> None:
    folder = Path(str(run.folder)) / "units"
    folder.mkdir(exist_ok=True)
    table = pa.table({"x": [1]}).replace_schema_metadata({"unit": unit} if unit else None)
    pq.write_table(table, folder / "u.parquet")
    with pytest.raises(ValueError, match=r"u\.parquet|wrong kind"):
        run.units()
    with pytest.raises(ValueError, match=r"u\.parquet|wrong kind"):
        run.scores()
    (folder / "u.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"u\.parquet: not a whole table"):
        run.units()


def test_reading_a_run_imports_nothing_that_lies_in_it(run: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(run.folder))
    ran = folder.parent / "it-ran"
    (folder / "evil_plugin.py").write_text(f"open({str(ran)!r}, 'w')\n")
    tree = json.loads((folder / "spec.json").read_text())
    for part in ("methods", "benchmarks"):
        tree[part] = [{"name": "evil_plugin:Evil", "label": "x"}]
    tree["edits"] = {"dataset": "evil_plugin:Evil", "count": 2}
    (folder / "spec.json").write_text(json.dumps(tree))
    monkeypatch.syspath_prepend(str(folder))  # as `python -m raysys` in that very folder would
    monkeypatch.chdir(folder)
    opened = Results.open(folder)
    assert opened.spec.methods[0].name == "evil_plugin:Evil"
    runs.status(opened)
    Report.of(opened).write()
    assert "evil_plugin" not in sys.modules
    assert not ran.exists()


def test_reading_a_run_imports_no_module_that_it_names(
    run: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed_module.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = Path(str(run.folder)) / "spec.json"
    tree = json.loads(path.read_text())
    tree["benchmarks"] += [{"name": "installed_module:Evil", "label": "x"}]
    tree["methods"] += [{"name": "installed_module:Evil", "label": "y", "published": True}]
    path.write_text(json.dumps(tree))
    opened = Results.open(run.folder)
    runs.status(opened)
    Report.of(opened).write()
    opened.mark()
    opened.snapshot(opened.cells()[0].id, 1)
    assert "installed_module" not in sys.modules


@pytest.mark.parametrize("told", [[], {"benchmarks": {"mmlu": {"units": 3}}}, {"published": {"rome": ["x"]}}])
def test_a_damaged_meaning_is_told(run: Results, told: Any) -> None:
    run.write_manifest({"meaning": told})
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(meaning"):
        Report.of(run)


def test_what_a_run_says_is_text_in_its_report(run: Results) -> None:
    script = "<script>alert(1)</script>"
    run.fail("x", {"cell": script, "edits": 1, "benchmark": script, "tries": 1, "reason": script})
    run.write_manifest({"versions": {script: script}})
    page = Report.of(run).write().read_text()
    assert script not in page
    assert "alert(1)" in page


def test_a_lock_that_is_a_pipe_or_a_folder_stops_nobody_for_ever(run: Results) -> None:
    path = Path(str(run.folder)) / ".lock"
    path.unlink(missing_ok=True)
    path.mkdir()
    assert not locks.held(run.folder)
    assert os.listdir(path) == []
