"""Edit probes and locality: what is asked, and what an answer is worth, worked by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.probes import Locality, Probes, equals, named, starts_with
from raysys import names
from raysys.types import Choose, Chosen, EditCase, EditRequest, Generate, Generated, Probe, Scored


def case(number: int, *probes: Probe) -> EditCase:
    request = EditRequest(f"e{number}", "{} lives in", f"S{number}", "Rome", "Paris")
    return EditCase(request, (Probe("rewrite", request.text, "Rome", "Paris"), *probes))


def test_an_edit_worked_by_hand() -> None:
    forced, free = Probes.of([case(1)]).queries()
    assert isinstance(forced, Choose) and isinstance(free, Generate)
    assert (forced.prompt, forced.choices, forced.gold) == ("S1 lives in", (" Rome", " Paris"), 0)
    assert (free.prompt, free.stops, free.gold, free.max_tokens) == ("S1 lives in", ("\n",), "Rome", 12)
    assert (forced.group, forced.edit, free.edit) == ("efficacy", 1, 1)

    likelier = Chosen((Scored(-2.0, 4, 3), Scored(-2.5, 1, 0)))
    assert {s.metric: s.value for s in Probes().score(forced, likelier)} == {
        "efficacy/forced": 0.75,
        "efficacy/probability": 1.0,
    }
    [score] = Probes().score(free, Generated(" rome, of course", 4))
    assert (score.metric, score.value, score.group) == ("efficacy/free", 1.0, "efficacy")


def test_without_a_rival_there_is_no_comparison() -> None:
    hop = Probe("portability", "S1's river is the", "Tiber")
    forced = [q for q in Probes.of([case(1, hop)], free=False).queries() if q.group == "portability"]
    assert [q.choices for q in forced if isinstance(q, Choose)] == [(" Tiber",)]
    [score] = Probes().score(forced[0], Chosen((Scored(-1.0, 2, 1),)))
    assert (score.metric, score.value) == ("portability/forced", 0.5)


def test_a_neighbour_that_another_edit_changes_is_not_asked() -> None:
    near = Probe("neighbourhood", "S2 lives in", "Paris", "Rome")
    assert [q.group for q in Probes.of([case(1, near)], free=False).queries()] == ["efficacy", "neighbourhood"]
    assert [q.group for q in Probes.of([case(1, near), case(2)], free=False).queries()] == ["efficacy", "efficacy"]


def test_the_same_probe_has_the_same_id_in_every_order() -> None:
    first, second = (list(Probes.of(cases).queries()) for cases in ([case(1), case(2)], [case(2), case(1)]))
    assert {q.id for q in first} == {q.id for q in second}
    assert [q.edit for q in first] == [1, 1, 2, 2]


def test_a_long_answer_may_be_said_to_its_end() -> None:
    fact = Probe("neighbourhood", "It is", "x" * 100)
    free = [q for q in Locality.of([fact]).queries() if isinstance(q, Generate)]
    assert free[0].max_tokens == 96
    assert [q.max_tokens for q in Locality.of([fact], max_tokens=3).queries() if isinstance(q, Generate)] == [3]


@pytest.mark.parametrize(
    ("text", "right", "worth"),
    [
        (" Paris, France", "Paris", True),
        ("paris", "Paris", True),
        ('"Paris"', "Paris", True),
        ("Parisian", "Paris", False),
        ("In Paris", "Paris", False),
        ("", "Paris", False),
        ("New York City", "New York", True),
        ("1.5", "1", False),
        ("1.", "1", True),
        ("1,000", "1", False),
        ("2006", "20", False),
        ("$20", "$20", True),
        ("É́tienne", "étienne", False),  # another word: two accents
        ("STRASSE 1", "straße", True),
    ],
)
def test_free_answers_start_with_whole_words(text: str, right: str, worth: bool) -> None:
    assert starts_with(text, right) is worth


def test_by_length_the_longer_answer_may_win_and_the_magnitude_says_by_how_much() -> None:
    forced, free = Probes.of([case(1)]).queries()
    answer = Chosen((Scored(-4.0, 4, 3), Scored(-2.0, 1, 0)))  # nats a token: 1 and 2
    summed = {s.metric: s.value for s in Probes(magnitude=True).score(forced, answer)}
    assert summed["efficacy/probability"] == 0.0
    assert summed["efficacy/magnitude"] == pytest.approx(math.exp(-4) - math.exp(-2))
    mean = {s.metric: s.value for s in Probes(magnitude=True, length_norm=True).score(forced, answer)}
    assert mean["efficacy/probability"] == 1.0
    assert mean["efficacy/magnitude"] == pytest.approx(math.exp(-1) - math.exp(-2))
    alone = Probes(magnitude=True).score(forced, Chosen((Scored(-1.0, 2, 1),)))
    assert [s.metric for s in alone] == ["efficacy/forced"]  # no rival, no difference
    said = {s.metric: s.value for s in Probes(exact=True).score(free, Generated(" Rome, Italy", 4))}
    assert said == {"efficacy/free": 1.0, "efficacy/exact": 0.0}


@pytest.mark.parametrize(
    ("text", "right", "worth"),
    [
        (" Paris. It is", "Paris", True),
        (" the Paris", "Paris", True),
        (" Paris, France", "Paris", False),
        (" paris\nRome", "Paris", True),
        (" Washington D.C.", "Washington D.C.", True),
        (" Paris Paris", "Paris", False),
        ("", "Paris", False),
        (" the", "The", False),  # nothing is left of either
    ],
)
def test_exact_answers_are_no_more_than_the_answer(text: str, right: str, worth: bool) -> None:
    assert equals(text, right) is worth


def test_an_alias_as_short_as_a_code_must_be_all_that_is_said() -> None:
    assert named(" de", "de") and named(" DE.", "de") and named(" USA, of course", "USA")
    assert not named(" de Gaulle", "de")


def test_a_question_on_several_edits_waits_for_the_last_and_needs_them_all() -> None:
    hops = Probe("multi_hop", "S1's river?", "Tiber", "Seine", ("Tevere",), needs=("e2",), keeps=("S3 lives in",))
    asked = [q for q in Probes.of([case(1, hops), case(2)]).queries() if q.group == "multi_hop"]
    assert [(type(q), q.edit, q.gold) for q in asked] == [(Choose, 2, 0), (Generate, 2, ["Tiber", "Tevere"])]
    assert [s.metric for s in Probes().score(asked[0], Chosen((Scored(-1.0, 2, 2), Scored(-2.0, 2, 1))))] == [
        "multi_hop/forced",
        "multi_hop/probability",
    ]
    for cases in ([case(1, hops)], [case(1, hops), case(2), case(3)]):  # one edit is missing; one is too many
        assert "multi_hop" not in {q.group for q in Probes.of(cases).queries()}


def test_locality_asks_a_fixed_sample() -> None:
    facts = [Probe("neighbourhood", f"Fact {i} is", "x", "y") for i in range(30)]
    queries = list(Locality.of(facts, limit=10, free=False).queries())
    assert len({q.prompt for q in queries}) == 10
    assert queries == list(Locality.of(facts, limit=10, free=False).queries())
    assert [(q.group, q.edit, len(q.choices)) for q in queries if isinstance(q, Choose)] == [("known", 0, 1)] * 10
    [score] = Locality().score(queries[0], Chosen((Scored(-1.0, 2, 2),)))
    assert (score.metric, score.value) == ("known/forced", 1.0)


def test_locality_without_facts_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"hold no fact beyond those edited. Edit fewer"):
        Locality().over([])


def test_cases_are_no_setting_of_the_users() -> None:
    built = names.build(Probes, {"free": False}, "benchmarks.0")
    assert built.over([case(1)]).free is False
    with pytest.raises(ValueError, match="unknown setting 'cases'"):
        names.build(Probes, {"cases": []}, "benchmarks.0")
