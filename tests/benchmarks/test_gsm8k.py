"""GSM8K: items worked by hand, the shots of the harness, and one message for each kind of bad data."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import exemplars
from benchmarks.gsm8k import Gsm8k
from raysys.types import Generate, Generated

TRAIN = [{"question": f"How much is {i} + {i}?", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
         for i in range(8)]  # fmt: skip
TEST = [{"question": "Tom has 3 pens and gets 1,000.", "answer": "3+1000=1003\n#### 1,003"}, *TRAIN[:3]]


def folder_of(place: Path, *, train: list[Any] = TRAIN, test: list[Any] = TEST) -> Path:
    for split, rows in (("train", train), ("test", test)):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def ask(folder: Path, **settings: Any) -> list[Generate]:
    return [q for q in Gsm8k(data=str(folder), **settings).queries() if isinstance(q, Generate)]


def test_an_item_worked_by_hand(tmp_path: Path) -> None:
    first = ask(folder_of(tmp_path), shots=1, fixed_shots=True)[0]
    shot = "Question: How much is 0 + 0?\nAnswer: 0+0=<<0+0=0>>0\n#### 0\n\n"
    assert first.prompt == shot + "Question: Tom has 3 pens and gets 1,000.\nAnswer:"
    assert (first.shared, first.gold, first.max_tokens) == (shot, "1003", 256)
    assert first.stops == ("Question:", "</s>", "<|im_end|>")


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" So 1,003.\n#### 1,003", 1, 1),
        ("#### $1003", 0, 1),  # strict wants a digit after "#### "
        ("#### 1003.", 1, 1),  # a full stop at the end is dropped
        (" The answer is 1003", 0, 1),
        ("1003 of 7", 0, 0),  # flexible takes the last number
        ("#### 7\n#### 1003", 0, 1),  # strict takes the first
        ("", 0, 0),
        ("none", 0, 0),
        ("#### 1004", 0, 0),
    ],
)
def test_answers_are_worth_what_the_harness_gives(text: str, strict: int, flexible: int) -> None:
    query = Generate("gsm8k/0", "", (), gold="1003")
    scores = {s.metric: s.value for s in Gsm8k().score(query, Generated(text, 9))}
    assert scores == {"accuracy": strict, "flexible": flexible}


def test_shots_come_from_one_stream_over_the_questions(tmp_path: Path) -> None:
    queries = ask(folder_of(tmp_path), shots=3)
    draw = Random(1234)
    for query in queries:
        shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in draw.sample(TRAIN, 3))
        assert query.prompt.startswith(shown + "Question: ") and query.shared == ""
    assert ask(tmp_path, shots=3, limit=2) == queries[:2]


def test_fixed_shots_are_another_protocol_by_name(tmp_path: Path) -> None:
    harness, fixed = (ask(folder_of(tmp_path), fixed_shots=f)[0] for f in (False, True))
    assert harness.id != fixed.id
    assert (harness.extra["protocol"], fixed.extra["protocol"]) == ("harness", "fixed shots")


def test_the_third_real_question_gets_the_shots_the_harness_gives_it(shared: Path) -> None:
    data = shared / "data" / "gsm8k"
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    third = ask(data, limit=3)[2]
    places = [third.prompt.index(train[i]["question"]) for i in (5677, 687, 806, 6279, 2905)]
    assert places == sorted(places)
    assert len(ask(data)) == 1319


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "field 'answer' is missing. There are: 'question'"),
        ({"question": 3, "answer": "#### 3"}, "field 'question' must be text, not int 3"),
        ({"question": "q", "answer": "three"}, "field 'answer' must end in '#### ' and a number, not in 'three'"),
        (["q", "a"], "a JSON object is expected, not list"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"test.jsonl, record 5 \(line 5\): {message}"):
        ask(folder_of(tmp_path, test=[*TEST, row]))


def test_too_few_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8 rows in split 'train' of .*, 9 shots wanted. Set shots = 8"):
        ask(folder_of(tmp_path), shots=9)


@pytest.mark.parametrize("settings", [{"shots": -1}, {"limit": 0}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Gsm8k(**settings)  # type: ignore[arg-type]


def chains(place: Path) -> str:
    file = place / "chains.json"
    file.write_text(json.dumps([{"question": f"What is {i}?", "target": f"It is. The answer is {i}."} for i in (1, 2)]))
    return str(file)


@pytest.mark.parametrize("settings", [{"form": "cot"}, {"protocol": "paper"}])
def test_chains_of_thought_are_shown_to_every_question(tmp_path: Path, settings: dict[str, Any]) -> None:
    first, *_, last = ask(folder_of(tmp_path), exemplars=chains(tmp_path), **settings)
    shared = "Q: What is 1?\nA: It is. The answer is 1.\n\nQ: What is 2?\nA: It is. The answer is 2.\n\n"
    assert first.prompt == shared + "Q: Tom has 3 pens and gets 1,000.\nA:"
    assert first.shared == last.shared == shared
    assert (first.id, first.gold, first.stops) == ("gsm8k/cot/0", "1003", ("Q:", "</s>", "<|im_end|>"))


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" The answer is 1,003.", 1, 1),
        (" The answer is 1003", 0, 1),  # the last digit is taken for the full stop
        ("#### 1003", 0, 1),
        ("The answer is $1003.", 0, 1),
        ("The answer is 7. The answer is 1003.", 0, 1),
    ],
)
def test_a_chain_of_thought_ends_in_the_answer_is(tmp_path: Path, text: str, strict: int, flexible: int) -> None:
    query = ask(folder_of(tmp_path), exemplars=chains(tmp_path), form="cot")[0]
    scores = {s.metric: s.value for s in Gsm8k().score(query, Generated(text, 9))}
    assert scores == {"accuracy": strict, "flexible": flexible}


def test_missing_or_too_few_chains_of_thought_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_of(tmp_path)
    with pytest.raises(ValueError, match=r"2 worked examples, 3 shots wanted\. Set shots = 2"):
        ask(data, form="cot", shots=3, exemplars=chains(tmp_path))
    (tmp_path / "task.yaml").write_text("task: mine\n")
    with pytest.raises(ValueError, match=r"task\.yaml: no built-in samples"):
        ask(data, form="cot", exemplars=str(tmp_path / "task.yaml"))
    monkeypatch.setattr(exemplars, "harness_task", lambda *_: None)
    with pytest.raises(ValueError, match=r"Set exemplars to a file.*or install the harness"):
        ask(data, form="cot")
