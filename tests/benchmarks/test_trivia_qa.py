"""TriviaQA: items worked by hand, DPR's file with its quotes, and one message for each kind of bad data."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest

from benchmarks import trivia_qa
from benchmarks.trivia_qa import TriviaQa
from raysys.types import Generate, Generated


def row(number: int, *more: str) -> dict[str, Any]:
    return {"question": f"Who is number {number}?", "answer": {"aliases": [f"No. {number}", *more], "value": "x"}}


TRAIN = [row(i) for i in range(8)]
VALIDATION = [row(100, "Number 100", "The Prisoner"), row(101), TRAIN[2]]


def folder_of(place: Path, *, train: list[Any] = TRAIN, validation: list[Any] = VALIDATION) -> str:
    for split, rows in (("train", train), ("validation", validation)):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(place)


def ask(data: str | Path, **settings: Any) -> list[Generate]:
    return [q for q in TriviaQa(data=str(data), **settings).queries() if isinstance(q, Generate)]


def test_an_item_worked_by_hand(tmp_path: Path) -> None:
    first = ask(folder_of(tmp_path), shots=1, fixed_shots=True)[0]
    shot = "Question: Who is number 0??\nAnswer: No. 0\n\n"
    assert first.prompt == shot + "Question: Who is number 100??\nAnswer:"
    assert (first.shared, first.stops, first.max_tokens) == (shot, ("\n", ".", ","), 256)
    assert first.gold == ["No. 100", "Number 100", "The Prisoner"]
    assert (first.id, first.extra["protocol"]) == ("trivia_qa/fixed/0", "fixed shots")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" the PRISONER", 1),
        ("\tNumber-100!", 0),  # the hyphen goes and leaves no blank
        (" 'Number 100'", 1),
        ("No 100", 1),
        ("Prisoner", 0),  # articles count
        ("number  100", 0),
        ("", 0),
        ("The Prisoner, of course", 0),  # the engine stops at the comma before it gets here
    ],
)
def test_any_alias_is_right_but_for_case_and_punctuation(text: str, value: int) -> None:
    query = Generate("trivia_qa/0", "", (), gold=["No. 100", "Number 100", "The Prisoner"])
    assert [(s.metric, s.value) for s in TriviaQa().score(query, Generated(text, 3))] == [("accuracy", value)]


def test_shots_come_from_one_stream_and_leave_out_the_question_itself(tmp_path: Path) -> None:
    queries = ask(folder_of(tmp_path), shots=3)
    draw = Random(1234)
    for query, asked in zip(queries, VALIDATION, strict=True):
        shown = [r for r in draw.sample(TRAIN, 4) if r != asked][:3]
        text = "".join(f"Question: {r['question']}?\nAnswer: {r['answer']['aliases'][0]}\n\n" for r in shown)
        assert query.prompt == f"{text}Question: {asked['question']}?\nAnswer:" and query.shared == ""
    assert ask(tmp_path, shots=3, limit=2) == queries[:2]


def test_the_papers_protocol_asks_the_same_under_its_own_name(tmp_path: Path) -> None:
    harness, paper = (ask(folder_of(tmp_path), protocol=p)[0] for p in ("harness", "paper"))
    assert (harness.prompt, harness.gold) == (paper.prompt, paper.gold)
    assert (harness.id, paper.id) == ("trivia_qa/0", "trivia_qa/paper/0")
    assert (harness.extra["protocol"], paper.extra["protocol"]) == ("harness", "paper")
    both = ask(tmp_path, protocol="paper", fixed_shots=True, shots=1)[0]  # the paper's shots are fixed anyway
    assert (both.id, both.extra["protocol"]) == ("trivia_qa/paper/0", "paper") and both.shared


def dpr(place: Path, *lines: str) -> Path:
    (place / "topics.dpr.trivia.dev.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return place


def test_quotes_of_dprs_file_are_taken_off_and_those_of_the_question_stay(tmp_path: Path) -> None:
    lines = [
        "Plain?\t['a', 'b']",
        'Once?\t"[""it\'s"", \'b\']"',
        '"What is ""this""?"\t[\'a\']',
        '"""Who said, """"Yes?"""""""\t[\'a\']',
        '"No" or "yes"?\t[\'a\']',
    ]
    queries = ask(dpr(tmp_path, *lines))
    asked = [q.prompt.removeprefix("Question: ").removesuffix("?\nAnswer:") for q in queries]
    assert asked == ["Plain?", "Once?", 'What is "this"?', 'Who said, "Yes?"', '"No" or "yes"?']
    assert [q.gold for q in queries[:2]] == [["a", "b"], ["it's", "b"]]


def test_the_real_file_is_read_to_its_end(shared: Path) -> None:
    queries = ask(shared / "data" / "triviaqa")
    assert len(queries) == 8837
    assert not any(q.prompt.startswith('Question: ""') or "\r" in q.prompt for q in queries)
    assert sum('"' in q.prompt for q in queries) > 500  # quotations inside questions
    assert all(q.gold and all(isinstance(alias, str) and alias.strip() for alias in q.gold) for q in queries)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Who?", "1 columns, 2 expected"),
        ("Who?\t['a']\tb", "3 columns, 2 expected"),
        ("Who?\t['a", r"column 2 \(the aliases\) is no list of texts"),
        ("Who?\tos.getcwd()", r"column 2 \(the aliases\) is no list of texts"),
        ("Who?\t[]", "'aliases' of field 'answer' must be a list of one or more texts"),
        ("Who?\t[3]", "'aliases' of field 'answer' must be a list of one or more texts"),
    ],
)
def test_a_bad_line_of_dprs_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"topics.dpr.trivia.dev.txt, line 2: {message}"):
        ask(dpr(tmp_path, "Good?\t['a']", line))


def test_dprs_file_has_no_shots_and_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dev.txt has no split 'train' to draw shots from. Set shots = 0"):
        ask(dpr(tmp_path, "Good?\t['a']"), shots=1)
    (tmp_path / "topics.dpr.trivia.dev.txt").write_bytes(b"Good?\t['a']\nBad\xe9?\t['b']\n")
    with pytest.raises(ValueError, match=r"dev.txt, line 2: not UTF-8 \(byte 0xe9"):
        ask(tmp_path)
    (tmp_path / "topics.dpr.trivia.dev.txt").write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"trivia_qa: split 'validation' of .* is empty"):
        ask(tmp_path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": "q"}, "field 'answer' is missing. There are: 'question'"),
        ({"answer": {"aliases": ["a"]}}, "field 'question' is missing"),
        ({"question": 3, "answer": {"aliases": ["a"]}}, "field 'question' must be text, not int 3"),
        ({"question": "q", "answer": "a"}, "field 'answer' must be an object with 'aliases', not str 'a'"),
        ({"question": "q", "answer": {"aliases": []}}, "'aliases' of field 'answer' must be a list of one or more"),
        ({"question": "q", "answer": {"aliases": [None]}}, "'aliases' of field 'answer' must be a list of one or"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"validation.jsonl, record 4 \(line 4\): {message}"):
        ask(folder_of(tmp_path, validation=[*VALIDATION, bad]))


def test_an_answer_without_aliases_is_named(tmp_path: Path) -> None:
    bad = {"question": "q", "answer": {"value": "a"}}
    with pytest.raises(ValueError, match=r"record 4 \(line 4\), field 'answer': field 'aliases' is missing"):
        ask(folder_of(tmp_path, validation=[*VALIDATION, bad]))


def test_the_hub_is_asked_for_the_pinned_revision_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = 17_944

    def load(name: str, config: str, *, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([row(1)] * rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(ask("hub", limit=5)) == 5
    assert asked == [("mandarjoshi/trivia_qa", "rc.nocontext", "validation", trivia_qa.HUB.revision)]
    rows = 7_993
    with pytest.raises(ValueError, match="trivia_qa@0f7faf3: split 'validation' has 7,993 rows, 17,944 expected"):
        ask("hub")


@pytest.mark.parametrize("settings", [{"shots": -1}, {"limit": 0}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        TriviaQa(**settings)  # type: ignore[arg-type]
