"""The Parquet tables of a run folder: their columns, and how they are read and written, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.files import Location, write_bytes

SCORES = pa.schema(
    [
        ("unit", pa.string()),
        ("query", pa.string()),
        ("group", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("edit", pa.int32()),  # position of the edit that the query belongs to, 0 for none
        ("answer", pa.string()),  # JSON
    ]
)
UNITS = pa.schema(
    [
        ("unit", pa.string()),
        ("snapshot", pa.string()),
        ("block", pa.string()),
        ("benchmark", pa.string()),
        ("items", pa.int32()),
        ("tokens", pa.int64()),
        ("seconds", pa.float64()),
        ("switch_seconds", pa.float64()),
        ("started", pa.float64()),
        ("ended", pa.float64()),
        ("evaluator", pa.string()),
        ("hardware", pa.string()),
    ]
)


def write_table(table: pa.Table, path: Location) -> None:
    """Raises StorageError when there is no space; else OSError."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_table(path: Location, schema: pa.Schema = SCORES) -> pa.Table:
    """The columns of `schema`. Raises ValueError for a file that isn't one of ours."""
    try:
        return pq.read_table(pa.BufferReader(path.read_bytes())).select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_unit(path: Location) -> dict[str, Any]:
    """What the file of a unit says of the unit itself. Raises ValueError."""
    try:
        about = json.loads((pq.read_metadata(pa.BufferReader(path.read_bytes())).metadata or {})[b"unit"])
        return {name: about.get(name) for name in UNITS.names}
    except (pa.ArrowException, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def unit_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """What `read_unit` gave, as one table. Raises ValueError for a value of the wrong kind."""
    try:
        return pa.Table.from_pylist(list(rows), schema=UNITS)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"a unit is described by values of the wrong kind ({error}); its file is damaged") from error


def _damaged(path: Location, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a whole table of raysys ({error}); remove it, it will be made again")
