"""Processes below a given one, by name, read from /proc: so that tests end only what they started."""

from __future__ import annotations

import re
import time
from pathlib import Path


def below(root: int) -> dict[int, str]:
    """Every living descendant of process `root`: pid -> command line."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    queue = [root]
    while queue:
        above = queue.pop()
        for pid, parent in parents.items():
            if parent == above and pid not in found:
                found[pid] = names[pid]
                queue.append(pid)
    return found


TITLES = {  # a process is called by its actor while it is idle, and by what it does while it is at work
    "Evaluator": r"Evaluator|.+ after \d+ edits",
    "Editor": r"Editor|open .+|.+: to \d+ edits",
    "Rank": r"Rank|rank: .+",
    "First": r"First",
}


def actors(root: int, kind: str) -> list[int]:
    """Pids of the Ray actors of class `kind` that live below process `root`, oldest first."""
    title = re.compile(f"ray::({TITLES.get(kind, kind)})")
    return sorted(pid for pid, name in below(root).items() if title.match(name))


def left(root: int, kind: str, within: float = 60.0) -> list[int]:
    """Pids of the Ray actors of class `kind` below `root` that still live after `within` seconds.

    Ray ends an actor behind the caller's back, so its process outlives the call by a moment.
    """
    deadline = time.monotonic() + within
    while (pids := actors(root, kind)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return pids
