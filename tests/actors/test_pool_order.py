"""A block goes where its trunks and drafts are, and otherwise where nobody else has them."""

from __future__ import annotations

from collections import deque

from actors.feed import Work
from actors.pool import EvaluatorPool, Unit, _Place


def unit(block: str) -> Unit:
    work = Work(block, "b", -1, 1, 1, (0, 0), None, 0)
    return Unit(f"u-{block}", "s", 0, "c", work, "b", {}, lambda: None, lambda: None)


def pool(*seen: set[str]) -> EvaluatorPool:
    made = EvaluatorPool.__new__(EvaluatorPool)  # no evaluator is started: only the choice is asked about
    made.places = [_Place(n, seen=s) for n, s in enumerate(seen)]
    return made


def test_known_blocks_first_then_new_ones_then_those_of_others() -> None:
    here = pool({"c"}, {"a"})
    queue = deque(map(unit, "abcd"))
    assert [here._pick(here.places[0], queue).work.id for _ in range(4)] == ["c", "b", "d", "a"]
    assert not queue


def test_without_memory_the_order_stays() -> None:
    here = pool(set(), set())
    queue = deque(map(unit, "abc"))
    assert [here._pick(here.places[0], queue).work.id for _ in range(3)] == ["a", "b", "c"]
