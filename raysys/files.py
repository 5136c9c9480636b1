"""Files that are whole or absent, and hashes that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def content_hash(tree: Any) -> str:
    """Hex SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the whole file or none, also after a power cut. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, tree: Any) -> None:
    """JSON, whole or not at all. Raises OSError."""
    write_bytes(path, json.dumps(tree, indent=1, ensure_ascii=False, sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """Raises ValueError that names the file when it isn't JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from error
