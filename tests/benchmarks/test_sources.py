"""Files that can't be read, and the hub's tables: each fault is one message that names file, record and way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks import gsm8k, sources

ROW = {"question": "q", "answer": "#### 1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": "cut o', r"a.jsonl, record 2 \(line 3\): broken JSON at column 7"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', r"a.jsonl, record 2 \(line 2\): a JSON object is expected, not str 'text'"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', r"a.json, after record 2: broken JSON at line 2, byte 20 .*',' or '\]'"),
        ("a.json", b'[{"a": 1},\n {"a": tru', r"a.json, record 2: broken JSON at line 2, byte 18"),
        ("a.json", b'[{"a": 1}] x', r"a.json, after record 1: broken JSON at line 1, byte 10 \('x' after"),
        ("a.json", b"[1]", r"a.json, record 1: a JSON object is expected, not int 1"),
        ("a.json", b"", r"a.json: the file is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"a.jsonl, line 2: not UTF-8 \(byte 0xe9 at offset 16\).*iconv"),
        ("a.parquet", b"PAR1 not really", r"a.parquet: not a readable parquet file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(sources.records(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no.jsonl: can't be read .*check the path"):
        list(sources.records(tmp_path / "no.jsonl"))


def test_records_are_numbered_as_a_person_would(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps([{"a": 1}, {"a": "é\n"}], indent=2))
    first, second = sources.records(path)
    assert (first.number, second.number, second.row) == (1, 2, {"a": "é\n"})
    path.write_text("[]")
    assert list(sources.records(path)) == []


def test_a_folder_without_the_split_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no 'train' split. Looked for train-\*.parquet"):
        list(gsm8k.Gsm8k(data=str(tmp_path)).queries())
    with pytest.raises(ValueError, match=r'gsm8k: no folder .*nowhere.*data = "world"'):
        list(gsm8k.Gsm8k(data=str(tmp_path / "nowhere")).queries())


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("[]")
    with pytest.raises(ValueError, match=r"gsm8k: split 'train' of .* is empty"):
        list(gsm8k.Gsm8k(data=str(tmp_path)).queries())


def test_paths_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.jsonl").write_text(json.dumps(ROW))
    monkeypatch.chdir(tmp_path)
    assert len(list(gsm8k.Gsm8k(data="mine", shots=0).queries())) == 1


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str, *, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([ROW] * gsm8k.HUB.rows[split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(gsm8k.Gsm8k(data="hub").queries())) == 1319
    assert asked == [("openai/gsm8k", "main", split, gsm8k.HUB.revision) for split in ("train", "test")]
    assert len(gsm8k.HUB.revision) == 40


def test_a_hub_table_with_other_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([ROW] * 7000))
    with pytest.raises(ValueError, match="openai/gsm8k@e53f048: split 'train' has 7,000 rows, 7,473 expected"):
        list(gsm8k.Gsm8k(data="hub").queries())


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"can't read split 'train' .*no route.*Without a connection"):
        list(gsm8k.Gsm8k(data="hub").queries())


def test_a_download_that_is_not_whole_is_refused_and_a_part_under_a_plain_name_is_not(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([ROW] * 3)
    folder = tmp_path / "main"
    folder.mkdir()
    pq.write_table(table, folder / "test-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"main: test-00001-of-00002.parquet is missing, one of 2 files"):
        sources.splits("gsm8k", str(tmp_path), gsm8k.HUB, ("test",))
    (folder / "test-00000-of-00002.parquet").rename(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"main: split 'test' has 3 rows in test-00000.*, 1,319 in openai/gsm8k@e53f"):
        sources.splits("gsm8k", str(tmp_path), gsm8k.HUB, ("test",))
    (folder / "test-00000-of-00001.parquet").rename(folder / "test.parquet")
    assert len(sources.splits("gsm8k", str(tmp_path), gsm8k.HUB, ("test",))["test"]) == 3
