"""One driver at a time writes a run folder.

Locally (and over NFS) the operating system holds the lock and lets it go with the process. Object storage has none:
there `.lock` names its holder, which rewrites it every few seconds. Whoever wants it and sees it unchanged for LEASE
seconds takes it over; no two clocks are compared. Should two drivers overlap all the same (one had been asleep), the
first to notice stops, and no result is wrong for it: both write the same bytes under the same names.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raysys.files import Location, within
from raysys.stores import Remote, StorageError

NAME = ".lock"
LEASE = 30.0  # seconds after which a holder that was not heard of is taken for gone
BEAT = 5.0  # seconds between two signs of life


class Locked(ValueError):
    """Another process holds the lock."""


@contextmanager
def lock(folder: Location) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run folder. Yields what raises StorageError once it was lost. Raises Locked."""
    path = within(folder, NAME)
    if isinstance(path, Remote):
        with _leased(path) as check:
            yield check
        return
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Locked(f"{folder}: another process is running this study (`raysys status`)") from error
        yield lambda: None


def held(folder: Location) -> bool:
    """Whether a process holds the lock, as far as one can see without disturbing it."""
    path = within(folder, NAME)
    if isinstance(path, Remote):
        there = _read(path)
        return bool(there) and not _dead(there) and time.time() - path.stat().st_mtime < LEASE
    try:
        with Path(path).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or not ours to open
        return False
    return False


@contextmanager
def _leased(path: Remote) -> Iterator[Callable[[], None]]:
    mine = {"holder": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid(), "space": _space(), "beat": 0}
    _wait(path)
    _write(path, mine)
    time.sleep(min(1.0, BEAT))  # another one that saw it free at the same moment has written by now
    if _read(path).get("holder") != mine["holder"]:
        raise Locked(f"{path.parent}: another process has just begun to run this study")
    over, lost = threading.Event(), threading.Event()

    def beat() -> None:
        hasty = path.hasty(0.0)
        while not over.wait(BEAT):
            with suppress(OSError):  # the storage is away: nobody else can take it either
                if _read(hasty).get("holder") != mine["holder"]:
                    lost.set()
                    return
                mine["beat"] = int(str(mine["beat"])) + 1
                _write(hasty, mine)

    def check() -> None:
        if lost.is_set():
            raise StorageError(f"{path.parent}: another process has taken over this study; this one stops")

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        over.set()
        thread.join(timeout=2 * BEAT)
        with suppress(OSError):
            if not lost.is_set():
                path.hasty().unlink(missing_ok=True)


def _wait(path: Remote) -> None:
    """Return once nobody holds it. Raises Locked as soon as the holder gives a sign of life."""
    first, since = _read(path), time.monotonic()
    while first and not _dead(first) and time.monotonic() - since < LEASE:
        time.sleep(min(1.0, BEAT / 2))
        now = _read(path)
        if now and now != first:
            who = f"process {now.get('pid')} on {now.get('host')}"
            raise Locked(f"{path.parent}: another process ({who}) is running this study (`raysys status`)")
        first = now


def _dead(there: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid = there.get("pid")
    here = there.get("host") == platform.node() and there.get("space") == _space() != ""
    return here and isinstance(pid, int) and not Path(f"/proc/{pid}").exists()


def _space() -> str:
    """What a process number means something in: this machine since it was started, and within it this container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(path: Remote) -> dict[str, Any]:
    try:
        there = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return there if isinstance(there, dict) else {}


def _write(path: Remote, tree: dict[str, Any]) -> None:
    path.write_bytes(json.dumps(tree).encode())
