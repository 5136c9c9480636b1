"""What every benchmark promises, asked of each one by its name, on the built-in world."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.edits import World, select
from raysys import names
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Probe, Query, Scored, plain

LIMITED = ("mmlu", "gsm8k", "commonsense_qa", "trivia_qa", "truthful_qa", "toxigen", "locality", "perplexity")
OPEN = ("ngram_entropy_bits", "nats_per_token")  # metrics whose values are no shares
SETTINGS: dict[str, dict[str, Any]] = {name: {"limit": 20} for name in LIMITED}


def build(name: str) -> Any:
    """The benchmark as a study builds it."""
    built = names.build(names.benchmark(name), SETTINGS.get(name, {}), name)
    chosen = select(World().cases(), 20).cases
    if getattr(built, "about", "") == "edits":
        first, *others = chosen  # the world has no question on several edits
        hops = Probe("multi_hop", "Who of them?", "Anna", "Bert", ("Annie",), needs=(others[0].request.id,))
        return built.over((replace(first, probes=(*first.probes, hops)), *others))
    return built.over(World().held_out(chosen)) if getattr(built, "about", "") == "held_out" else built


@pytest.fixture(scope="module", params=sorted({*names.BENCHMARKS} - {"harness"}))  # that one is whatever it is given
def asked(request: pytest.FixtureRequest) -> tuple[str, list[Query]]:
    """A benchmark's name and all its queries."""
    return request.param, list(build(request.param).queries())


def answers(query: Query) -> list[Answer]:
    """A right and a wrong answer, one with nothing in it, and one from a model that has collapsed."""
    if isinstance(query, Generate):
        gold = query.gold[0] if isinstance(query.gold, list) else query.gold  # aliases: any of them
        texts = (f" {gold}", " something else", "", "\ufffd\x00 ####")
        return [Generated(text, len(text)) for text in texts]
    best = [Scored(-1.0 if i == query.gold else -2.0, 2, 1) for i in range(len(query.choices))]
    nan = [Scored(float("nan"), 2, 0) for _ in query.choices]
    return [Chosen(tuple(best)), Chosen(tuple(reversed(best))), Chosen(tuple(nan))]


def test_ids_are_unique(asked: tuple[str, list[Query]]) -> None:
    name, queries = asked
    assert len({q.id for q in queries}) == len(queries) >= 20
    assert all(q.id.split("/")[0] == name for q in queries)


def test_the_queries_are_the_same_every_time(asked: tuple[str, list[Query]]) -> None:
    name, queries = asked
    assert list(build(name).queries()) == queries


def test_prompts_start_with_what_they_share(asked: tuple[str, list[Query]]) -> None:
    _, queries = asked
    for query in queries:
        assert query.prompt.startswith(query.shared)
        assert len(query.prompt) > len(query.shared) or query.prompt == ""  # running text begins with nothing


def test_turns_say_the_prompt_again(asked: tuple[str, list[Query]]) -> None:
    _, queries = asked
    for query in (q for q in queries if q.turns):
        *before, question = query.turns
        assert plain(before) + question.text == query.prompt
        assert question.role == "user" and all(t.role != "system" for t in query.turns[1:])
        assert not query.shared or query.shared == plain(before)
        if isinstance(query, Choose):
            assert all(choice.startswith(question.end) for choice in query.choices)


def test_questions_are_well_formed(asked: tuple[str, list[Query]]) -> None:
    _, queries = asked
    for query in queries:
        if isinstance(query, Choose):
            assert 0 <= query.gold < len(query.choices) == len(set(query.choices))
            assert all(choice.strip() for choice in query.choices)
        else:
            assert query.max_tokens > 0 and all(query.stops) and query.gold


def test_scoring_needs_nothing_but_what_travels(asked: tuple[str, list[Query]]) -> None:
    name, queries = asked
    fresh = names.benchmark(name)()
    seen: set[str] = set()
    for query in queries:
        bare = replace(query, prompt="", shared="", turns=())
        for answer in answers(query):
            scores = list(fresh.score(bare, answer))
            if query is queries[0]:
                assert repr(scores) == repr(list(build(name).score(query, answer)))  # NaN equals itself
            assert all(s.query == query.id and s.group == query.group for s in scores)
            assert all(s.metric in OPEN or 0 <= s.value <= 1 for s in scores)
            assert len({s.metric for s in scores}) == len(scores)
            seen |= {s.metric for s in scores}
    assert set(fresh.chance()) <= seen
    assert all(0 <= value <= 1 for value in fresh.chance().values())


def test_right_answers_are_worth_most(asked: tuple[str, list[Query]]) -> None:
    name, queries = asked
    if name == "fluency":
        pytest.skip("a text has no right answer")
    fresh = names.benchmark(name)()
    for query in queries:
        right, wrong, *_ = ({s.metric: s.value for s in fresh.score(query, a)} for a in answers(query))
        assert all(right[metric] >= wrong[metric] for metric in right)


def test_name_and_version_are_given(asked: tuple[str, list[Query]]) -> None:
    name, _ = asked
    cls = names.benchmark(name)
    assert cls.name == name and cls.version
