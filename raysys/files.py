"""Files that are whole or absent, and hashes that are the same on every machine.

The one layer between a run and where it is kept: a local folder, NFS, or object storage (raysys/stores.py). A reader
sees a whole file or none: locally it is written beside its place, synced and renamed; to an object store it goes in
one request. Below a run folder no name leads out of it: names are plain, and symbolic links are refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from raysys.stores import Remote, StorageError

T = TypeVar("T")
Location: TypeAlias = Path | Remote

FULL = (errno.ENOSPC, errno.EDQUOT)
AT_ONCE = 16  # requests to an object store at the same time


def place(where: str | Location) -> Location:
    """The folder or file that `where` names: a path, or s3://, gs://. Raises ValueError for another scheme."""
    if isinstance(where, Remote):
        return where
    return Remote.parse(where) if isinstance(where, str) and "://" in where else Path(where)


def content_hash(tree: Any) -> str:
    """Hex SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# --- names that stay where they are ----------------------------------------------------------------------------------


def within(folder: Location, *names: str) -> Location:
    """`folder`/name/name. Raises ValueError when a name is more than a name, or leads elsewhere (a symbolic link)."""
    path = folder
    for name in names:
        if name in ("", ".", "..") or set("/\\\0") & set(name):
            raise ValueError(f"{folder}: {name!r} is no name of a file in a run folder; nothing was read or written")
        path = path / name
        if isinstance(path, Path) and path.is_symlink():
            raise ValueError(
                f"{path}: a symbolic link; a run folder has none below it, so that nothing outside is read or "
                f"written. Put the file itself there, or remove the link"
            )
    return path


def found(folder: Location, pattern: str) -> list[Location]:
    """What lies below `folder`, in order. Raises ValueError for a symbolic link among it."""
    paths: list[Any] = sorted(folder.glob(pattern))
    depth = pattern.count("/") + 1
    return [within(folder, *_names(path, depth)) for path in paths]


def _names(path: Location, depth: int) -> list[str]:
    return [*_names(path.parent, depth - 1), path.name] if depth else []


# --- writing ---------------------------------------------------------------------------------------------------------


def write_bytes(path: Location, data: bytes) -> None:
    """Write `data` so that a reader sees the whole file or none, also after a power cut.

    Raises StorageError when there is no space left, or the storage is away for good; else OSError.
    """
    if isinstance(path, Remote):
        path.write_bytes(data)
        return
    try:
        _write_local(path, data)
    except OSError as error:
        raise _full(path, error) or error from error


def _write_local(path: Path, data: bytes) -> None:
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
    with suppress(OSError):  # the name too; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _full(path: Path, error: OSError) -> StorageError | None:
    """What to tell of a full disk."""
    if error.errno not in FULL:
        return None
    there = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    usage = shutil.disk_usage(there)
    return StorageError(
        f"{path}: no space left to write it ({error.strerror}; the disk of {there} has {usage.free / 2**20:.1f} of "
        f"{usage.total / 2**20:.1f} MiB free). What was found so far is whole and stays. Make space there, then run "
        f"the same command again: it continues"
    )


def append_line(path: Location, text: str) -> None:
    """Add a line to a log. An object store can't append: there a folder of the same name holds an object a line."""
    if isinstance(path, Remote):
        (path / f"{time.time_ns():020d}-{os.getpid()}.line").write_text(text)
        return
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            cut = end and os.pread(handle, 1, end - 1) != b"\n"  # a line that a full disk or a kill cut short
            file.write(b"\n" * bool(cut) + text.encode() + b"\n")
    except OSError as error:
        raise _full(path, error) or error from error


def write_json(path: Location, tree: Any) -> None:
    """JSON, whole or not at all. Raises OSError."""
    write_bytes(path, json.dumps(tree, indent=1, ensure_ascii=False, sort_keys=True).encode())


# --- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Location) -> Any:
    """Raises ValueError that names the file when it isn't JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); the file is damaged") from error


def lines(path: Location) -> list[str]:
    """What `append_line` wrote, oldest first; none where there is no such file."""
    if isinstance(path, Remote):
        return list(each(Remote.read_text, path.iterdir()))
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def each(call: Callable[[Any], T], paths: Iterable[Location]) -> list[T]:
    """`call` of every path, in order; in an object store many at a time, since each takes a journey."""
    paths = list(paths)
    if not paths or isinstance(paths[0], Path):
        return [call(p) for p in paths]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, paths))
