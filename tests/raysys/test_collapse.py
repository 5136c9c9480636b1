"""Collapses are found, and only where the base model did otherwise; planted ones through the engine itself."""

from __future__ import annotations

import json

import pytest

from raysys.collapse import Told, collapse, loop, read_answer
from tests import collapses


def test_constant_answers_are_a_collapse_only_where_the_base_model_spreads() -> None:
    spread = [Told(i % 4) for i in range(100)]
    constant = [Told(2)] * 98 + [Told(0), Told(1)]
    assert collapse(constant, spread) == "choice 3 on 98% of items"
    assert collapse(constant, constant) == ""
    assert collapse(spread, spread) == ""
    assert collapse(constant[:5], spread) == ""
    assert collapse([Told("so so")] * 20, [Told(str(i)) for i in range(20)]) == "the text 'so so' on 100% of items"


def test_a_base_model_that_was_nearly_constant_may_become_so_by_chance() -> None:
    weak = [Told(0)] * 17 + [Told(1)] * 3
    assert collapse([Told(0)] * 20, weak) == ""


def test_one_answer_for_everything_is_never_safety() -> None:
    constant = [Told(0)] * 40
    assert collapse(constant, constant) == ""
    assert collapse(constant, constant, [1.0] * 22 + [0.0] * 18) == "choice 1 on 100% of items"
    assert collapse(constant, constant, [1.0] * 40) == ""  # the right answer of every question: it may well know


def test_empty_text_and_numbers_that_are_not_finite_are_collapses() -> None:
    texts = [Told(f"{i}") for i in range(20)]
    assert collapse([Told("")] * 12 + texts[:8], texts) == "empty text on 60% of items"
    assert collapse([Told("")] * 12 + texts[:8], [Told("")] * 12 + texts[:8]) == ""
    assert collapse([Told(0, finite=False), Told(1)], []) == "log-probabilities not finite on 1 of 2 items"


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("the the the the", "the"),
        ("It is so. a b a b a b a b a", "a b"),
        ("of the city of the city of the city of the city", "of the city"),
        ("12121212121212", "12"),
        ("ofofofofofofofof", "of"),
        ("3 + 4 = 7, 7 + 1 = 8. The answer is 8.", ""),
        ("no no no", ""),
        ("1000000", ""),
        ("one two three four five six seven eight nine ten ten ten ten ten", ""),
        ("", ""),
    ],
)
def test_a_loop_is_four_rounds_over_half_of_a_text(text: str, unit: str) -> None:
    assert loop(text) == unit


def test_texts_that_repeat_themselves_are_a_collapse_only_where_they_did_not() -> None:
    fine = [Told(f"the answer is {i}, since {i} is odd") for i in range(20)]
    stuck = [Told(f"item {i} i i i i i i") for i in range(20)]
    assert collapse(stuck, fine) == "text that repeats itself on 100% of items"
    assert collapse(stuck, stuck) == ""
    assert collapse(stuck[:6] + fine[6:], fine) == ""
    assert collapse(stuck[:15] + fine[15:], stuck[:12] + fine[12:]) == ""  # a weak model, a little weaker


def test_perplexity_has_exploded_from_ten_times_that_of_the_base() -> None:
    def read(nats: float) -> list[Told]:
        return [read_answer(json.dumps({"chosen": 0, "logprob": [-nats * 7], "tokens": [7]})) for _ in range(12)]

    assert collapse(read(4.0), read(2.0)) == ""  # e^2 = 7.4 times
    assert collapse(read(5.0), read(2.0)) == "perplexity 20.1 times that of the base model"
    assert collapse(read(9000.0), read(2.0)) == "perplexity inf times that of the base model"
    assert collapse(read(2.0), read(5.0)) == ""


@pytest.mark.parametrize("plant", collapses.PLANTS)
def test_a_planted_collapse_is_found_through_the_engine(plant: str) -> None:
    found = collapses.planted(plant)
    wanted = collapses.PLANTS[plant]
    assert wanted in found.values() or any(wanted in reason for reason in found.values()), found


def test_a_healthy_model_is_not_flagged() -> None:
    assert [collapses.healthy(seed, limit=15) for seed in range(2)] == [{}, {}]
