"""Where the rows of a benchmark come from: the built-in world, a local folder or the hub.

A row is a mapping in the hub's layout together with a place ("file, record 3 (line 5)"), so that whoever finds a
fault in it can name it. Every reader raises ValueError naming the file, the record and what to do; relative paths
are relative to the current folder.

A local folder may hold the hub's layout: `<config>/<split>-*.parquet` as in a download of the repository, or
`<split>.parquet`, `<split>.jsonl`, `<split>.json` in the folder itself or in its `data/`. A download must be whole, a
plain file may hold any number of rows. The layouts of the original releases are known to the benchmarks whose release
differs (`mmlu.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]
ENDINGS = (".parquet", ".jsonl", ".json")


class Placed(NamedTuple):
    """A row, where it stands (for messages) and its number in its file, from 1."""

    place: str
    row: Row
    number: int = 0


Splits = dict[str, list[Placed]]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A dataset of the hub: which revision is meant, and how many rows each split must have."""

    id: str
    config: str | None
    revision: str
    rows: Mapping[str, int]


def splits(
    name: str,
    data: str,
    hub: Hub,
    wanted: Sequence[str],
    original: Callable[[Path, str], list[Placed] | None] | None = None,
) -> Splits:
    """The `wanted` splits of benchmark `name`, each with at least one row.

    `data` is "world" (built in), "hub" or a folder; `original` reads a split of the original release's layout from a
    folder, or returns None where the folder is not that (None: the release
    has the hub's layout). Raises ValueError when data are missing or unreadable.
    """
    folder = Path(data)
    if data == "world":
        found = _world(name, wanted)
    elif data == "hub":
        found = {split: from_hub(hub, split) for split in wanted}
    elif folder.is_dir():
        found = {}
        for split in wanted:
            rows = original(folder, split) if original else None
            found[split] = _hub_layout(name, folder, hub, split) if rows is None else rows
    else:
        raise ValueError(
            f'{name}: no folder {data!r}. Give the folder that holds the data, or data = "world" (built in) '
            f'or "hub" ({hub.id}).'
        )
    for split, rows in found.items():
        if not rows:
            raise ValueError(f"{name}: split {split!r} of {data!r} is empty; is the download complete?")
    return found


def _world(name: str, wanted: Sequence[str]) -> Splits:
    tables: Mapping[str, Iterable[Row]] = import_module("benchmarks.world").rows(name)
    return {
        split: [Placed(f"world {name} {split}, record {i}", row, i) for i, row in enumerate(tables[split], 1)]
        for split in wanted
    }


def from_hub(hub: Hub, split: str) -> list[Placed]:
    """The rows of the pinned revision, from the hub or its local cache. Raises ValueError when their number is off."""
    import datasets

    where, expected = f"{hub.id}@{hub.revision[:7]}", hub.rows[split]
    try:
        table = datasets.load_dataset(hub.id, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{where}: can't read split {split!r} ({type(error).__name__}: {error}). Without a connection, "
            "download the data elsewhere and give their folder instead."
        ) from error
    if len(table) != expected:
        raise ValueError(
            f"{where}: split {split!r} has {len(table):,} rows, {expected:,} expected. Clear the local cache of "
            "this dataset (an interrupted download is the usual cause), or give a local folder."
        )
    return [Placed(f"{where} {split}, record {i}", row, i) for i, row in enumerate(table, 1)]


def _hub_layout(name: str, folder: Path, hub: Hub, split: str) -> list[Placed]:
    places = [folder / hub.config] if hub.config else []
    places += [folder, folder / "data"]
    files = next((files for place in places if (files := split_files(place, split))), [])
    if not files:  # one config per subject, as the hub's MMLU has beside "all"
        files = [file for place in sorted(folder.iterdir()) for file in split_files(place, split)]
    if not files:
        raise ValueError(
            f"{name}: {folder} has no {split!r} split. Looked for {split}-*.parquet, {split}.parquet, {split}.jsonl "
            f"and {split}.json in {', '.join(map(str, places))}, and for the original release's files."
        )
    sharded = _check_shards(files)
    rows = [row for file in files for row in records(file)]
    if sharded and files[0].parent in places and len(rows) != hub.rows[split]:
        raise ValueError(
            f"{files[0].parent}: split {split!r} has {len(rows):,} rows in {', '.join(f.name for f in files)}, "
            f"{hub.rows[split]:,} in {hub.id}@{hub.revision[:7]}. Download it again; to use a part, name the file "
            f"{split}.parquet."
        )
    return rows


def _check_shards(files: Sequence[Path]) -> bool:
    """Whether these are a split's shards as the hub names them (`test-00000-of-00003.parquet`).

    Raises ValueError when one is missing.
    """
    found = False
    for file in files:
        stem, _, total = file.stem.rpartition("-of-")
        if not (stem and total.isdecimal()):
            continue
        found = True
        whole = [f"{stem.rpartition('-')[0]}-{n:05d}-of-{total}{file.suffix}" for n in range(int(total))]
        there = {f.name for f in files if f.parent == file.parent}
        if missing := [name for name in whole if name not in there]:
            raise ValueError(f"{file.parent}: {missing[0]} is missing, one of {int(total)} files; download it again.")
    return found


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in the hub's naming, of the first format that is there."""
    if not folder.is_dir():
        return []
    for ending in ENDINGS:
        files = sorted({*folder.glob(f"{split}-*{ending}"), *folder.glob(f"{split}{ending}")})
        if files:
            return files
    return []


# --- files -----------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[Placed]:
    """The records of a .parquet, .jsonl or .json file (a JSON array, or one JSON object per line), in file order."""
    if path.suffix == ".parquet":
        return _parquet(path)
    text = decoded(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; is the download complete?")
    return _json_array(path, text) if text.lstrip()[0] == "[" else _json_lines(path, text)


def decoded(path: Path) -> str:
    """The file as text; a byte order mark is dropped. Raises ValueError when it is missing or not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); check the path.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}). Convert the "
            "file, for example with iconv -f latin1 -t utf-8, or download it again."
        ) from error


def _parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); download it again.") from error
    number = 0
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            number += 1
            yield Placed(f"{path}, record {number}", row, number)


def _json_lines(path: Path, text: str) -> Iterator[Placed]:
    number = 0
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        number += 1
        place = f"{path}, record {number} (line {line})"
        try:
            value = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: broken JSON at column {error.colno} ({error.msg}). A JSON array or one object per line is "
                "expected; if the file is cut off, download it again."
            ) from error
        yield Placed(place, _object(place, value), number)


def _json_array(path: Path, text: str) -> Iterator[Placed]:
    """Records one by one, so that those before a fault are counted and the fault's own record can be named."""
    decoder = json.JSONDecoder()
    at, number, separator = _blank(text, text.index("[") + 1), 0, ","
    while text[at : at + 1] != "]":
        number += 1
        place = f"{path}, record {number}"
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _broken(place, text, error.pos, error.msg) from error
        at = _blank(text, at)
        separator = text[at : at + 1]
        if separator not in (",", "]") or not separator:
            raise _broken(f"{path}, after record {number}", text, at, "',' or ']' expected")
        yield Placed(place, _object(place, value), number)
        if separator == ",":
            at = _blank(text, at + 1)
    if rest := text[at + 1 :].strip():
        raise _broken(f"{path}, after record {number}", text, at + 1, f"{rest[:20]!r} after the array's end")


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _broken(place: str, text: str, at: int, why: str) -> ValueError:
    line = text.count("\n", 0, at) + 1
    byte = len(text[:at].encode())
    return ValueError(
        f"{place}: broken JSON at line {line}, byte {byte} ({why}); the file may be cut off: "
        "download it again or mend the record."
    )


def _object(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON object is expected, not {what(value)}.")
    return value


# --- fields ----------------------------------------------------------------------------------------------------------


def text_field(placed: Placed, field: str, kind: str = "text") -> str:
    """The string in `field`. Raises ValueError when it is missing or something else."""
    value = field_of(placed, field)
    if not isinstance(value, str):
        raise ValueError(f"{placed.place}: field {field!r} must be {kind}, not {what(value)}.")
    return value


def field_of(placed: Placed, field: str) -> Any:
    """Whatever is in `field`. Raises ValueError when there is no such field."""
    if field not in placed.row:
        there = ", ".join(map(repr, placed.row)) or "none"
        raise ValueError(f"{placed.place}: field {field!r} is missing. There are: {there}.")
    return placed.row[field]


def what(value: object) -> str:
    """A value as a message shows it: its type and its beginning."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
