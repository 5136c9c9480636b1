"""Edit data: each layout read by hand, real files counted, the choice of edits, and one message per kind of fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import world
from benchmarks.edits import CounterFact, Custom, World, Zsre, select
from raysys.types import EditCase, EditRequest, Probe

ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Paris", "id": "Q2"},
    },
    "paraphrase_prompts": ["Noise. France's capital is "],
    "neighborhood_prompts": ["The Louvre is in"],
}
FLAT = {
    "case_id": 8,
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": "Rome",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital is",
    "locality_prompt": "The Louvre is in",
    "locality_ground_truth": "Paris",
}
ZSRE = {
    "subject": "France",
    "src": "What is the capital of France?",
    "rephrase": "Which city rules France?",
    "alt": "Rome ",
    "answers": ["Paris", "City of Paris"],
    "loc": "nq question: who wrote Emma",
    "loc_ans": "Jane Austen",
    "portability": {"New Question": "Which river flows through the capital of France?", "New Answer": "Tiber"},
}
OWN = {
    "prompt": "In Francey, France is ruled from",
    "subject": "France",
    "target": " Rome",
    "was": "Paris",
    "paraphrases": ["France's capital is"],
    "neighbourhood": [{"prompt": "Italy is ruled from", "answer": "Rome"}],
    "portability": [{"prompt": "France's capital lies on the", "answer": "Tiber", "was": "Seine"}],
    "multi_hop": [{"prompt": "Who governs France's capital? ", "answer": "Anna ", "aliases": ["A."], "needs": ["7"]}],
}


def file_of(place: Path, records: Sequence[Any]) -> str:
    path = place / "edits.json"
    path.write_text(json.dumps(list(records)))
    return str(path)


def test_the_four_layouts_become_the_same_kind_of_case(tmp_path: Path) -> None:
    rome, flat = CounterFact(path=file_of(tmp_path, [ROME, FLAT])).cases()
    assert rome.request == EditRequest("counterfact/7", "The capital of {} is", "France", "Rome", "Paris")
    assert flat.request == EditRequest("counterfact/8", "The capital of {} is", "France", "Rome", "Paris")
    assert rome.probes == (
        Probe("rewrite", "The capital of France is", "Rome", "Paris"),
        Probe("paraphrase", "Noise. France's capital is", "Rome", "Paris"),
        Probe("neighbourhood", "The Louvre is in", "Paris", "Rome"),
    )
    assert flat.probes[2] == rome.probes[2]
    assert flat.source == f"{tmp_path}/edits.json, record 2"

    [alt] = Zsre(path=file_of(tmp_path, [ZSRE])).cases()
    assert alt.request == EditRequest("zsre/1", "What is the capital of {}?", "France", "Rome", "Paris")
    assert {p.kind: (p.right, p.wrong) for p in alt.probes} == {
        "rewrite": ("Rome", "Paris"),
        "paraphrase": ("Rome", "Paris"),
        "portability": ("Tiber", None),
        "neighbourhood": ("Jane Austen", None),
    }
    [answers] = Zsre(path=file_of(tmp_path, [ZSRE]), target="answers").cases()
    assert (answers.request.target, answers.request.was) == ("Paris", None)
    assert "portability" not in {p.kind for p in answers.probes}  # it follows from `alt`

    [own] = Custom(path=file_of(tmp_path, [OWN])).cases()
    assert own.request == EditRequest("json/1", "In Francey, {} is ruled from", "France", "Rome", "Paris")
    assert own.probes[2] == Probe("neighbourhood", "Italy is ruled from", "Rome", None)  # the target is no rival
    assert own.probes[3] == Probe("portability", "France's capital lies on the", "Tiber", "Seine")
    assert own.probes[4] == Probe("multi_hop", "Who governs France's capital?", "Anna", None, ("A.",), ("json/7",))


def test_an_old_answer_that_is_the_new_one_is_no_rival(tmp_path: Path) -> None:
    [case] = Custom(path=file_of(tmp_path, [OWN | {"was": "Rome"}])).cases()
    assert case.request.was is None and case.probes[0].wrong is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Who rules?"}, "field 'prompt' lacks its subject 'France' and has no {}: 'Who rules.'. Write {}"),
        ({"prompt": "{} and {} are"}, "field 'prompt' has 2 places for the subject; one is meant"),
        ({"prompt": 5}, "field 'prompt' must be text, not int 5"),
        ({"target": "  "}, "field 'target' is empty; fill it, or leave the record out"),
        ({"subject": ""}, "field 'subject' is empty"),
        ({"subject": None}, "field 'subject' must be text, not NoneType None"),
        ({"paraphrases": "one"}, "field 'paraphrases' must be a list of texts, not str 'one'"),
        ({"paraphrases": [""]}, "a paraphrase probe has an empty prompt or answer"),
        ({"neighbourhood": ["x"]}, "field 'neighbourhood' must be a list of objects"),
        ({"neighbourhood": [{"prompt": "x"}]}, "field 'neighbourhood.0..answer' is missing. There are: 'prompt'"),
        ({"neighborhood": []}, "unknown field 'neighborhood'. Did you mean 'neighbourhood'"),
        ({"multi_hop": [{"prompt": "x", "answer": "y", "needs": "z"}]}, "field 'multi_hop.0..needs' must be a list of"),
        ({"multi_hop": [{"prompt": "x"}]}, "field 'multi_hop.0..answer' is missing"),
        ({"id": [1]}, "field 'id' must be a text or a whole number, not list"),
    ],
)
def test_a_bad_field_is_named_with_file_and_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    other = OWN | {"subject": "Spain", "prompt": "{} is ruled from"}
    path = file_of(tmp_path, [other, OWN | change])
    with pytest.raises(ValueError, match=rf"edits.json, record 2: {message}"):
        list(Custom(path=path).cases())
    kept = select(Custom(path=path).cases(), policy="skip")
    assert len(kept.cases) == 1 and [place for place, _ in kept.dropped] == [f"{path}, record 2"]


@pytest.mark.parametrize(
    ("data", "record", "message"),
    [
        (CounterFact, {"prompt": "x"}, "neither ROME's layout .* nor EasyEdit's .*dataset = \"json\""),
        (CounterFact, ROME | {"requested_rewrite": [1]}, "field 'requested_rewrite' must be an object, .*MQuAKE"),
        (CounterFact, ROME | {"requested_rewrite": {"prompt": "x"}}, "field 'requested_rewrite.target_new' is missing"),
        (CounterFact, FLAT | {"target_new": {"str": "x"}}, "field 'target_new' must be text, not dict"),
        (Zsre, ZSRE | {"alt": ""}, "field 'alt' is empty"),
        (Zsre, ZSRE | {"answers": []}, "field 'answers' is an empty list"),
        (Zsre, {k: v for k, v in ZSRE.items() if k != "loc"}, "field 'loc' is missing"),
    ],
)
def test_a_bad_published_record_is_named(tmp_path: Path, data: Any, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"edits.json, record 1: {message}"):
        list(data(path=file_of(tmp_path, [record])).cases())


def test_truncated_json_is_named_after_the_good_records(tmp_path: Path) -> None:
    path = Path(file_of(tmp_path, [FLAT, FLAT | {"case_id": 9, "prompt": "Now France has"}]))
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"edits.json, record 2: broken JSON at line 1, byte \d+ .*download it again"):
        select(CounterFact(path=str(path)).cases(), policy="skip")


def test_a_folder_is_read_where_one_file_is_meant(tmp_path: Path) -> None:
    file_of(tmp_path, [FLAT])
    assert len(list(CounterFact(path=str(tmp_path)).cases())) == 1
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"one .json, .* file is meant; it has: edits.json, more.jsonl"):
        CounterFact(path=str(tmp_path)).cases()
    with pytest.raises(ValueError, match=r"nowhere.json: can't be read"):
        list(Custom(path=str(tmp_path / "nowhere.json")).cases())
    with pytest.raises(ValueError, match="zsre: `path` is empty"):
        Zsre().cases()


# --- the choice ------------------------------------------------------------------------------------------------------


def numbered(names: str) -> list[EditCase]:
    """One case per letter; the same letter is the same edit again."""
    return [
        EditCase(EditRequest(f"id{i}", "{} is", name, f"new{i}", "old"), source=f"record {i}")
        for i, name in enumerate(names)
    ]


def kept(names: str, **settings: Any) -> str:
    return "".join(c.request.id[2:] for c in select(numbered(names), **settings).cases)


def test_colliding_edits_follow_the_policy() -> None:
    with pytest.raises(ValueError, match=r"record 2: fields 'subject' and 'prompt': it edits .* as record 0.*\"last\""):
        select(numbered("ABA"))
    assert kept("ABAC", policy="skip") == "013"
    assert kept("ABAC", policy="last") == "123"
    assert kept("ABAC", policy="last", count=2) == "01"  # what comes after the second is not looked at
    assert select(numbered("ABA"), policy="skip").dropped == (
        ("record 2", "edits the same subject and prompt ('A is') as record 0"),
    )
    assert select(numbered("ABA"), policy="last").dropped[0][0] == "record 0"


def test_an_id_used_twice_is_named() -> None:
    twin = numbered("AB")[1]
    again = EditCase(EditRequest(twin.request.id, "{} was", "B", "x"), source="record 9")
    with pytest.raises(ValueError, match="record 9: its id 'id1' is that of record 1 too"):
        select([*numbered("AB"), again])


def test_every_order_has_the_same_edits() -> None:
    assert kept("ABCDEFGH", count=6) == "012345"
    first, second = (kept("ABCDEFGH", count=6, seed=3, order=k) for k in (1, 2))
    assert first != second and sorted(first) == sorted(second) == list("012345")
    assert first == kept("ABCDEFGH", count=6, seed=3, order=1)
    assert first != kept("ABCDEFGH", count=6, seed=4, order=1)


def test_too_few_edits_say_how_many_there_are() -> None:
    with pytest.raises(ValueError, match=r"5 edits wanted, but only 2 of 3 records are usable \(1 left out by policy"):
        select(numbered("ABA"), 5, policy="skip")


# --- real and built-in data ------------------------------------------------------------------------------------------


def test_real_counterfact_is_read_whole(shared: Path) -> None:
    data = CounterFact(path=str(shared / "data" / "counterfact" / "counterfact-edit.json"))
    chosen = select(data.cases(), policy="skip")
    assert (len(chosen.cases), len(chosen.dropped)) == (9_917, 83)
    assert all(c.request.prompt.count("{}") == 1 and len(c.probes) == 3 for c in chosen.cases)
    with pytest.raises(ValueError, match=r"counterfact-edit.json, record 1092: .*record 453"):
        select(data.cases())
    first = select(data.cases(), 50).cases
    held_out = data.held_out(first)
    assert len({p.prompt for p in held_out}) == len(held_out) > 8_000
    assert not any(c.request.subject in p.prompt for c in first for p in held_out)


def test_real_zsre_is_read_whole(shared: Path) -> None:
    folder = shared / "data" / "zsre"
    cases = list(Zsre(path=str(folder / "zsre_mend_eval_portability_gpt4.json")).cases())
    assert len(cases) == 1_037 and sum(c.request.was is None for c in cases) == 29
    train = Zsre(path=str(folder / "zsre_mend_train-1k.json"))
    assert len(select(train.cases(), policy="skip").dropped) == 2
    with pytest.raises(ValueError, match="record 535: field 'alt' is empty"):
        select(train.cases())


def test_the_world_has_edits_with_every_kind_of_probe() -> None:
    chosen = select(World().cases(), 100).cases
    assert len(chosen) == 100
    assert {p.kind for c in chosen for p in c.probes} == {"rewrite", "paraphrase", "neighbourhood", "portability"}
    held_out = World().held_out(chosen)
    assert len(held_out) > 100
    assert not {c.request.text for c in chosen} & {p.prompt for p in held_out}


def test_the_world_has_other_facts_to_train_editors_on() -> None:
    edits, training = list(World().cases()), list(World(part="training").cases())
    assert World() == World(part="edits") and len(edits) == 400 and len(training) > 900
    assert list(World(part="training").cases()) == training
    assert {p.kind for c in training for p in c.probes} == {"rewrite", "paraphrase", "neighbourhood", "portability"}
    fact = {p: (f["relation"], f["subject"]) for f in world.facts() for p in f["prompts"]}
    edited = {fact[c.request.text] for c in edits}
    first = {c.request.subject for c in edits[:120]}
    for case in training:
        asked = [p.prompt for p in case.probes if p.kind == "neighbourhood"]
        assert asked and not {fact[case.request.text], *map(fact.get, asked)} & edited
        assert fact[case.request.text] not in map(fact.get, asked) and case.request.subject not in first


def test_training_records_can_be_edited_one_after_the_other_and_split_at_the_end() -> None:
    cases = list(World(part="training").cases())
    assert len(select(cases).cases) == len(cases)
    last = len(cases) - len(cases) % 100
    for start in range(0, last, 50):
        run = {(c.request.subject, c.request.was) for c in cases[start : start + 50]}
        assert len(run) == 50
    early, late = ({(c.request.subject, c.request.was) for c in part} for part in (cases[:last], cases[last:]))
    assert late and not early & late
