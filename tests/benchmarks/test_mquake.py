"""MQuAKE: chains of edits read by hand, shared ones made once, questions asked when their last edit is made."""

from __future__ import annotations

import json
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.edits import select
from benchmarks.mquake import Mquake
from benchmarks.probes import Locality, Probes
from raysys.types import EditCase, EditRequest, Generate, Generated, Probe


def rewrite(prompt: str, subject: str, new: str, old: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": {"str": new},
        "target_true": {"str": old},
        "question": f"Which? {prompt.replace('{}', subject)}?",
    }


def hop(cloze: str, answer: str) -> dict[str, Any]:
    return {"cloze": cloze, "question": "?", "answer": answer, "answer_alias": ["alias"]}


SONG = rewrite("{} was performed by", "Hey Jude", "Madonna", "The Beatles")
HOME = rewrite("{} is a citizen of", "Madonna", "Norway", "Italy")
FIRST: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": [SONG, HOME],
    "questions": ["Where does Hey Jude's performer belong?", "Whose citizen sang it?"],
    "answer": "Britain",
    "new_answer": "Norway",
    "new_answer_alias": ["Kingdom of Norway", "NO"],
    "single_hops": [hop("Hey Jude was performed by", "The Beatles"), hop("The Beatles belong to", "Britain")],
    "new_single_hops": [hop("Hey Jude was performed by", "Madonna"), hop("Madonna is a citizen of", "Norway")],
}
SECOND = FIRST | {  # shares an edit with the first, rests on a fact that it leaves alone, and edits one of its own
    "case_id": 9,
    "requested_rewrite": [SONG, rewrite("{} is the capital of", "Oslo", "Peru", "Norway")],
    "new_single_hops": [hop("Hey Jude was performed by", "Madonna"), hop("Madonna sings for", "Sire")],
    "questions": ["What of it?"],
}


def file_of(place: Path, *records: dict[str, Any]) -> str:
    path = place / "mquake.json"
    path.write_text(json.dumps(records))
    return str(path)


def hops(cases: list[EditCase]) -> list[tuple[str, int]]:
    """(question, edit) of every multi-hop question that is asked in free text."""
    queries = Probes.of(cases).queries()
    return [(q.prompt, q.edit) for q in queries if isinstance(q, Generate) and q.group == "multi_hop"]


def test_a_record_becomes_an_edit_for_each_rewrite_with_the_questions_on_the_last(tmp_path: Path) -> None:
    path = file_of(tmp_path, FIRST)
    song, home = Mquake(path=path).cases()
    assert song.request == EditRequest("mquake/7/1", "{} was performed by", "Hey Jude", "Madonna", "The Beatles")
    assert song.source == f"{path}, record 1, rewrite 1"
    assert [p.kind for p in song.probes] == ["rewrite", "paraphrase"]
    assert song.probes[1].prompt == "Which? Hey Jude was performed by?"
    assert home.request.id == "mquake/7/2"
    assert home.probes[2] == Probe(
        "multi_hop", FIRST["questions"][0], "Norway", "Britain", ("Kingdom of Norway", "NO"), ("mquake/7/1",)
    )
    assert hops([song, home]) == [(FIRST["questions"][0], 2), (FIRST["questions"][1], 2)]


def test_a_question_waits_for_its_last_edit_in_any_order_and_is_not_asked_without_one(tmp_path: Path) -> None:
    song, home = Mquake(path=file_of(tmp_path, FIRST)).cases()
    assert [edit for _, edit in hops([home, song])] == [2, 2]
    assert hops([home]) == hops([song]) == []


def test_an_edit_that_records_share_is_made_once(tmp_path: Path) -> None:
    cases = list(Mquake(path=file_of(tmp_path, FIRST, SECOND)).cases())
    assert [c.request.id for c in cases] == ["mquake/7/1", "mquake/7/2", "mquake/9/2"]
    assert hops(cases)[-1] == ("What of it?", 3)
    same = SECOND | {"requested_rewrite": [SONG]}  # nothing new: its question hangs on the other record's edit
    cases = list(Mquake(path=file_of(tmp_path, FIRST, same)).cases())
    assert len(cases) == 2 and hops(cases)[0] == ("What of it?", 1)


def test_a_question_whose_other_hops_are_edited_is_not_asked(tmp_path: Path) -> None:
    other = FIRST | {"case_id": 11, "requested_rewrite": [rewrite("{} sings for", "Madonna", "Motown", "Sire")]}
    cases = list(Mquake(path=file_of(tmp_path, SECOND, other)).cases())
    assert "What of it?" not in dict(hops(cases))
    assert "What of it?" in dict(hops(cases[:2]))


def test_aliases_count_in_free_text_and_codes_of_two_letters_only_alone(tmp_path: Path) -> None:
    cases = list(Mquake(path=file_of(tmp_path, FIRST)).cases())
    query = next(q for q in Probes.of(cases).queries() if isinstance(q, Generate) and q.group == "multi_hop")
    assert query.gold == ["Norway", "Kingdom of Norway", "NO"]

    def worth(text: str) -> float:
        [score] = Probes().score(query, Generated(text, 3))
        assert score.metric == "multi_hop/free"
        return score.value

    assert [worth(t) for t in (" Norway.", " the", " Kingdom of Norway, of course", " no", " No one knows")] == [
        1, 0, 1, 1, 0,
    ]  # fmt: skip


def test_facts_that_nobody_edited_are_the_hops_before_the_edits(tmp_path: Path) -> None:
    data = Mquake(path=file_of(tmp_path, FIRST))
    facts = data.held_out(list(data.cases()))
    assert facts == [Probe("neighbourhood", "The Beatles belong to", "Britain", None, ("alias",))]
    [_, free] = Locality.of(facts).queries()
    assert free.gold == ["Britain", "alias"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("requested_rewrite",), {}, "field 'requested_rewrite' must be a list of one or more objects"),
        (("requested_rewrite", 1, "prompt"), "x", r"field 'requested_rewrite.1..prompt' lacks its subject 'Madonna'"),
        (("requested_rewrite", 0, "target_new"), "x", r"field 'requested_rewrite.0..target_new' must be an object"),
        (("requested_rewrite", 0, "question"), 5, r"field 'requested_rewrite.0..question' must be text, not int 5"),
        (("new_answer",), " ", "field 'new_answer' or one of 'questions' is empty"),
        (("new_answer_alias",), "x", "field 'new_answer_alias' must be a list of texts"),
        (("new_single_hops", 0), {"answer": "x"}, r"field 'new_single_hops.0..cloze' is missing. There are: 'answer'"),
    ],
)
def test_a_bad_record_is_named_and_takes_no_other_with_it(
    tmp_path: Path, path: tuple[Any, ...], value: Any, message: str
) -> None:
    bad = deepcopy(FIRST) | {"case_id": 8}
    where: Any = bad
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    data = Mquake(path=file_of(tmp_path, bad, SECOND))
    with pytest.raises(ValueError, match=f"mquake.json, record 1: {message}"):
        select(data.cases())
    found = select(data.cases(), policy="skip")
    assert [c.request.id for c in found.cases] == ["mquake/9/1", "mquake/9/2"] and len(found.dropped) == 1


def test_the_published_file_has_769_edits_for_429_records(shared: Path) -> None:
    data = Mquake(path=str(shared / "data" / "mquake"))
    cases = list(data.cases())
    assert len(cases) == 769
    assert Counter(p.kind for c in cases for p in c.probes) == {"rewrite": 769, "paraphrase": 769, "multi_hop": 3 * 429}
    with pytest.raises(ValueError, match="Portal was developed by"):
        select(data.cases())
    for order in (0, 1):
        chosen = select(data.cases(), policy="skip", order=order)
        assert (len(chosen.cases), len(chosen.dropped)) == (767, 2)
        position = {c.request.id: n for n, c in enumerate(chosen.cases, 1)}
        asked = [q for q in Probes.of(chosen.cases, free=False).queries() if q.group == "multi_hop"]
        assert len(asked) == 3 * 427
        needs = {f"probes/{c.request.id}/{i}/forced": p.needs for c in chosen.cases for i, p in enumerate(c.probes)}
        assert all(q.edit >= max(map(position.__getitem__, needs[q.id]), default=0) for q in asked)
