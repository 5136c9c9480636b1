"""The journal is the truth about what was edited: it rebuilds any snapshot and notices what isn't its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raysys.journal import Entry, Journal, Stream, make_snapshot
from raysys.patch import LowRank, merge
from raysys.types import EditRequest, Patch

REQUESTS = tuple(EditRequest(str(i), "{} is", f"subject {i}", f"target {i}") for i in range(6))
STREAM = Stream("model", "float32", {"name": "rome"}, REQUESTS, seed=0, threads=1)


def patch(step: int) -> LowRank:
    generator = torch.Generator().manual_seed(step)
    return LowRank("w", torch.randn(40, 1, generator=generator), torch.randn(1, 60, generator=generator))


def entry(step: int) -> Entry:
    return Entry(
        step, step + 1, (patch(step),), {"sum": torch.tensor([step])}, (REQUESTS[step],), 1.0, 2.0, log={"n": 1}
    )


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "journal", STREAM)
    for step in range(4):
        made.append(entry(step))
    return made


def test_entries_come_back_in_order_with_everything(journal: Journal) -> None:
    found = list(journal.entries())
    assert [(e.first, e.last) for e in found] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [e.requests[0].subject for e in found] == [f"subject {i}" for i in range(4)]
    assert [int(e.memory["sum"]) for e in found] == [0, 1, 2, 3]
    assert found[0].log == {"n": 1}


def test_a_snapshot_from_the_journal_is_the_live_one(journal: Journal) -> None:
    live: tuple[Patch, ...] = ()
    for step in range(3):
        live = merge(live, [patch(step)])
    assert journal.snapshot(3).digest == make_snapshot(STREAM, 3, live).digest
    assert journal.snapshot(3).id == STREAM.key(3)


def test_a_snapshot_beyond_the_journal_is_refused(journal: Journal) -> None:
    with pytest.raises(ValueError, match=r"no snapshot after 5 edits .it reaches 4"):
        journal.snapshot(5)


@pytest.mark.parametrize(
    "other",
    [
        replace(STREAM, model="another"),
        replace(STREAM, method={"name": "rome", "layer": 3}),
        replace(STREAM, requests=(replace(REQUESTS[0], target="else"), *REQUESTS[1:])),
        replace(STREAM, seed=1),
    ],
    ids=["model", "method", "request", "seed"],
)
def test_steps_of_another_stream_are_refused(journal: Journal, other: Stream) -> None:
    with pytest.raises(ValueError, match="belongs to another study"):
        list(Journal(journal.folder, other).entries())


def test_what_follows_a_missing_step_is_made_again(journal: Journal) -> None:
    (journal.folder / "000002.safetensors").unlink()
    assert [e.last for e in journal.entries()] == [1]
    with pytest.raises(ValueError, match="reaches 1"):
        journal.snapshot(3)
    journal.append(entry(1))
    assert [e.last for e in journal.entries()] == [1, 2, 3, 4]


def test_a_truncated_step_is_named(journal: Journal) -> None:
    path = journal.folder / "000003.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"000003.safetensors: not a whole file"):
        list(journal.entries())


def test_the_base_has_one_name_whatever_the_method() -> None:
    assert replace(STREAM, method={"name": "ft"}, requests=(), seed=3).key(0) == STREAM.key(0)
    assert len({STREAM.key(n) for n in range(7)}) == 7


def test_later_requests_don_t_change_the_name_of_an_earlier_snapshot() -> None:
    assert replace(STREAM, requests=REQUESTS[:3]).key(2) == STREAM.key(2)


def test_a_method_that_finishes_its_snapshots_has_only_those_that_were_kept(journal: Journal) -> None:
    plain = journal.snapshot(2)
    journal.keep_snapshots()
    with pytest.raises(ValueError, match=r"finishes its snapshots.*none yet"):
        journal.snapshot(2)
    other = make_snapshot(STREAM, 2, ())
    journal.keep(other)
    assert journal.snapshot(2).digest == other.digest != plain.digest
    with pytest.raises(ValueError, match="that only those of the study can be had: 2"):
        journal.snapshot(3)
    assert not journal.snapshot(0).patches


def test_a_finished_snapshot_of_another_stream_is_not_taken(journal: Journal) -> None:
    journal.keep_snapshots()
    journal.keep(make_snapshot(replace(STREAM, seed=1), 2, ()))
    with pytest.raises(ValueError, match="no snapshot after 2"):
        journal.snapshot(2)
