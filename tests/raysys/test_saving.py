"""What is saved beside the loop is all there in the end, and a disk that is full is heard of."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from raysys.results import Results
from raysys.saving import AHEAD, Saver
from raysys.spec import StudySpec

UNIT = {
    "snapshot": "s", "block": "b", "benchmark": "m", "items": 1, "tokens": 1, "seconds": 1.0, "switch_seconds": 0.0,
    "started": 1.0, "ended": 2.0, "evaluator": "e", "hardware": "h",
}  # fmt: skip
SCORE = {"query": "q", "group": "", "metric": "accuracy", "value": 1.0, "edit": 0, "answer": "{}"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    spec = StudySpec.parse('[[methods]]\nname = "rome"\n[[benchmarks]]\nname = "mmlu"\n')
    return Results.create(spec, tmp_path / "run")


def test_everything_is_durable_once_it_is_closed(results: Results) -> None:
    saver = Saver(results)
    for n in range(50):
        saver.add(UNIT | {"unit": f"u{n}"}, [SCORE])
    saver.close()
    assert results.done() == {f"u{n}" for n in range(50)}


def test_a_fault_is_raised_by_what_comes_next_and_nothing_else_is_lost(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Results.add

    def add(self: Results, unit: Any, scores: Any) -> None:
        if unit["unit"] == "u3":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, unit, scores)

    monkeypatch.setattr(Results, "add", add)
    saver = Saver(results)

    def save() -> None:
        for n in range(100):
            saver.add(UNIT | {"unit": f"u{n}"}, [SCORE])
        saver.close()

    with pytest.raises(OSError, match="No space left"):
        save()
    saver.close()
    assert {"u0", "u1", "u2", "u4"} <= results.done() and "u3" not in results.done()
    assert len(results.done()) >= 4


def test_a_slow_storage_holds_the_loop_up_only_when_much_is_waiting(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, written = threading.Event(), list[str]()

    def add(self: Results, unit: dict[str, Any], scores: Any) -> None:
        answers.wait()
        written.append(unit["unit"])

    monkeypatch.setattr(Results, "add", add)
    saver = Saver(results)
    for n in range(AHEAD):
        saver.add(UNIT | {"unit": f"u{n}"}, [SCORE])
    assert written == []  # here we are, and storage has not taken a single one
    more = threading.Thread(target=lambda: saver.add(UNIT | {"unit": "one more"}, [SCORE]))
    more.start()
    more.join(0.2)
    assert more.is_alive()
    answers.set()
    more.join(60)
    assert len(saver._open) <= AHEAD
    saver.close()
    assert len(written) == AHEAD + 1
