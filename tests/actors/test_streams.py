"""Editors that go wrong, on real Ray: what is theirs is tried again on another one, what is the method's is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import editor
from actors.editor import Job
from actors.streams import Lost, Opened, Streaming, Streams
from raysys.files import write_json

pytestmark = pytest.mark.timeout(120)


class Opens:
    """An editor that opens cells; its first life has a GPU that is broken, and one cell is beyond its method."""

    def __init__(self, name: str, always: bool) -> None:
        self.broken = always or "." not in name

    def describe(self) -> dict[str, Any]:
        """As an editor's, without a node."""
        return {}

    def open(self, job: Job) -> str:
        """The cell's stream."""
        if job.cell == "refused":
            raise ValueError("layer 99 is not there")
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return f"stream of {job.cell}"


def cells(*names: str) -> list[Streaming]:
    """Cells to edit, with a base and nothing else."""
    return [Streaming(Job(name, "rome", {}, (), "", None, 0, "skip"), "rome", 0, (0,)) for name in names]


def news(streams: Streams, count: int) -> list[Any]:
    """What comes of opening `count` cells; none of them is edited any further."""
    found: list[Any] = []
    deadline = time.monotonic() + 60
    while len(found) < count:
        assert time.monotonic() < deadline
        streams.advance(0)
        for ref in ray.wait(streams.refs, timeout=0.2)[0] if streams.refs else ():
            if (told := streams.take(ref)) is not None:
                found.append(told)
                for desk in streams.desks:
                    desk.cell = None if isinstance(told, Opened) else desk.cell
    return found


def start(always: bool) -> Any:
    return lambda name: ray.remote(Opens).options(num_cpus=0).remote(name, always)


def test_a_broken_editor_loses_no_cell_and_a_refusal_is_told_at_once(cluster: None) -> None:
    events: list[str] = []
    streams = Streams(start(False), 1, cells("a", "refused", "b"), lambda what, **more: events.append(what))
    told = news(streams, 3)
    streams.close()
    assert [type(t) for t in told] == [Opened, Lost, Opened]
    assert told[1].reason == "layer 99 is not there"
    assert events == ["editor lost"]


def test_a_cell_on_which_every_editor_fails_is_given_up_with_the_reason(cluster: None) -> None:
    streams = Streams(start(True), 1, cells("a"))
    [told] = news(streams, 1)
    streams.close()
    assert isinstance(told, Lost)
    assert told.reason == "3 editors failed on it: RuntimeError: CUDA error: device-side assert triggered"


def test_what_is_prepared_again_is_a_sign_of_life(tmp_path: Path) -> None:
    journal = tmp_path / "cell" / "journal"
    journal.mkdir(parents=True)
    before = editor.sign(str(journal))
    write_json(journal.parent / editor.PREPARING, {"what": "second moments", "done": 1, "total": 9})
    (journal / "000000-000005.safetensors").touch()
    first = editor.sign(str(journal))
    write_json(journal.parent / editor.PREPARING, {"what": "second moments", "done": 2, "total": 9})
    assert before != first != editor.sign(str(journal))
