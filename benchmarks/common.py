"""What several benchmarks share: checks of settings, shots drawn as lm-evaluation-harness draws them, texts of a query,
a safe choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from benchmarks.sources import Placed
from raysys.types import Chosen, Turn, plain

SHOT_SEED = 1234  # lm-evaluation-harness' default --seed for shots


def check(*, shots: int | None = None, limit: int | None = None, max_tokens: int | None = None) -> None:
    """Raise ValueError for a number that is out of range; None is left alone."""
    if shots is not None and shots < 0:
        raise ValueError(f"shots = {shots}: a number of examples, 0 or more, is meant")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: a number of questions, 1 or more, or leave it out for all")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}: 1 or more")


def first(pool: Sequence[Placed], shots: int, where: str) -> Sequence[Placed]:
    """The first `shots` rows. Raises ValueError when there are fewer; `where` names benchmark and data."""
    if len(pool) < shots:
        raise ValueError(
            f"{where}: {len(pool)} rows in split 'train', {shots} shots wanted. "
            f"Set shots = {len(pool)} or complete the data."
        )
    return pool[:shots]


def drawn(pool: Sequence[Placed], asked: Sequence[Placed], shots: int, where: str) -> Iterator[Sequence[Placed]]:
    """For each question of `asked` its `shots` rows of `pool`, from one random stream over the questions in order.

    This is the rule of tasks that name neither a test split nor one for shots: one row more than wanted is drawn, rows
    equal to the question are taken out, and the first `shots` of the rest are shown. Where copies leave too few, they
    are drawn again from the rows that differ. Raises ValueError when `pool` is too small.
    """
    if shots and len(pool) <= shots:
        raise ValueError(
            f"{where}: {len(pool)} rows in split 'train', {shots} shots wanted, which are drawn from {shots + 1} or "
            f"more. Set shots = {max(len(pool) - 1, 0)} or complete the data."
        )
    draw = Random(SHOT_SEED)
    for doc in asked:
        if not shots:
            yield ()
            continue
        found = [row for row in draw.sample(pool, shots + 1) if row.row != doc.row]
        if len(found) < shots:
            found = draw.sample([row for row in pool if row.row != doc.row], shots)
        yield found[:shots]


def shot(question: str, answer: str, blank: str = " ") -> tuple[Turn, Turn]:
    """An example: the question, what joins it to its answer (`blank`), the answer."""
    return Turn("user", question, blank), Turn("assistant", answer, "\n\n")


def posed(before: Sequence[Turn], question: str, shared: bool = True) -> dict[str, Any]:
    """The texts of a query: description and examples, then the question; `shared`: others stand behind the same."""
    start = plain(before)
    turns = (*before, Turn("user", question, " "))
    return {"prompt": start + question, "shared": start if shared else "", "turns": turns}


def best(answer: Chosen, worth: Callable[[int, float], float] = lambda _, logprob: logprob) -> int | None:
    """The index of the likeliest choice, the earlier one in a tie; None where the model's numbers say nothing.

    `worth` turns (index, log-probability in nats) into what is compared. A NaN, or nothing but minus infinity, is no
    answer: without this rule a broken model would seem to choose the first option, which some data sets hold right.
    """
    values = [c.logprob for c in answer.choices]
    if any(map(math.isnan, values)) or not math.isfinite(max(values)):
        return None
    worths = [worth(i, value) for i, value in enumerate(values)]
    return max(range(len(worths)), key=worths.__getitem__)
