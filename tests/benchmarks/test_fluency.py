"""Fluency: n-gram entropy worked by hand, on the prompt and what follows it."""

from __future__ import annotations

import math

import pytest

from benchmarks.fluency import WORD, Fluency, entropy, ngram_entropy
from raysys.types import EditCase, EditRequest, Generate, Generated

CASES = [EditCase(EditRequest(f"e{i}", "{} lives in", f"S{i}", "Rome")) for i in range(3)]


def test_entropy_worked_by_hand() -> None:
    words = "a b a b a c".split()
    # pairs: ab 2, ba 2, ac 1 of 5; triples: aba 2, bab 1, bac 1 of 4
    pairs = -(2 * 0.4 * math.log2(0.4) + 0.2 * math.log2(0.2))
    assert entropy(words, 2) == pytest.approx(pairs)
    assert entropy(words, 3) == pytest.approx(1.5)
    assert ngram_entropy("a b a b a c") == pytest.approx((2 / 3 * pairs + 4 / 3 * 1.5) / 2)


def test_a_word_again_and_again_has_none_and_neither_has_nothing() -> None:
    assert ngram_entropy("the the the the the") == ngram_entropy("") == ngram_entropy("one") == 0.0


def test_words_keep_what_stands_within_them() -> None:
    assert WORD.findall("Anna's 1.5 km, (no) well-known!") == [
        "Anna's", "1.5", "km", ",", "(", "no", ")", "well-known", "!",
    ]  # fmt: skip


def test_an_edit_is_asked_to_go_on_and_its_prompt_counts() -> None:
    queries = list(Fluency(max_tokens=20).over(CASES).queries())
    assert [(q.prompt, q.edit, q.group) for q in queries] == [(f"S{i} lives in", i + 1, "fluency") for i in range(3)]
    first = queries[0]
    assert isinstance(first, Generate) and (first.stops, first.max_tokens) == ((), 20)
    [score] = Fluency().score(first, Generated(" S0 lives in", 3))
    pairs = -(2 * 0.4 * math.log2(0.4) + 0.2 * math.log2(0.2))  # S0 lives, lives in: twice; in S0: once
    triples = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert score.metric == "ngram_entropy_bits"
    assert score.value == pytest.approx(pairs / 3 + 2 * triples / 3)


def test_settings() -> None:
    assert len(list(Fluency(limit=2).over(CASES).queries())) == 2
    with pytest.raises(ValueError, match="limit = 0"):
        Fluency(limit=0)
    with pytest.raises(ValueError, match="max_tokens = 0"):
        Fluency(max_tokens=0)
