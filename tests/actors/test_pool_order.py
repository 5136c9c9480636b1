"""A block goes where its trunks and drafts are, and otherwise where nobody else has them."""

from __future__ import annotations

from collections.abc import Iterator

from actors.feed import Work
from actors.waiting import Memory, Unit, Waiting


def unit(block: str, snapshot: str = "s") -> Unit:
    work = Work(block, "b", -1, 1, 1, (0, 0), None, 0)
    return Unit(f"{snapshot}-{block}", snapshot, 0, "c", work, "b", {}, lambda: None, lambda: None)


def waiting(blocks: str, snapshot: str = "s") -> Waiting:
    made = Waiting()
    for block in blocks:
        made.add(unit(block, snapshot))
    return made


def taken(queue: Waiting, memory: Memory) -> Iterator[str]:
    while (found := queue.take(memory)) is not None:
        yield found.id


def test_known_blocks_first_then_new_ones_then_those_of_others() -> None:
    queue, here, there = waiting("ca"), Memory(), Memory()
    assert [queue.take(m).work.id for m in (here, there)] == ["c", "a"]  # type: ignore[union-attr]
    for block in "abcd":
        queue.add(unit(block))
    assert list(taken(queue, here)) == ["s-c", "s-b", "s-d", "s-a"]
    assert not queue


def test_without_memory_the_order_stays() -> None:
    assert list(taken(waiting("abc"), Memory())) == ["s-a", "s-b", "s-c"]


def test_an_evaluator_keeps_its_snapshot_and_the_next_takes_the_oldest_that_nobody_wears() -> None:
    queue, one, two = waiting("ab", "old"), Memory(), Memory()
    for block in "ab":
        queue.add(unit(block, "new"))
    order = [queue.take(m) for m in (one, two, one, two)]
    assert [u.id for u in order if u] == ["old-a", "new-b", "old-b", "new-a"]  # `one` has scored a


def test_what_an_evaluator_had_is_forgotten_with_it() -> None:
    queue, gone, here = waiting("ab"), Memory(), Memory()
    queue.take(gone)
    queue.forget(gone)
    queue.back(unit("a"))
    assert list(taken(queue, here)) == ["s-a", "s-b"]  # nobody knows a any more


def test_a_unit_handed_back_comes_first_and_so_does_its_snapshot() -> None:
    queue = waiting("ab", "new")
    queue.back(unit("x", "old"))
    queue.back(unit("y", "new"))
    assert list(taken(queue, Memory())) == ["old-x", "new-y", "new-a", "new-b"]
