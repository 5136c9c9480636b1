"""CommonsenseQA: items worked by hand, both protocols, and one message for each kind of bad data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest

from benchmarks import commonsense_qa
from benchmarks.commonsense_qa import LETTERS, CommonsenseQa
from raysys.types import Choose, Chosen, Generate, Generated, Query, Scored


def row(number: int, answer: str = "C") -> dict[str, Any]:
    texts = [f"{word} {number}" for word in ("ash", "bark", "cone", "dust", "elm")]
    return {
        "id": f"id{number}",
        "question": f" What is {number}? ",
        "choices": {"label": list(LETTERS), "text": texts},
        "answerKey": answer,
    }


TRAIN = [row(i, LETTERS[i % 5]) for i in range(9)]
VALIDATION = [row(100, "B"), row(101, "E"), TRAIN[0]]
SHOT = "Question: What is 0?\nA. ash 0\nB. bark 0\nC. cone 0\nD. dust 0\nE. elm 0\nAnswer: A\n\n"
ASKED = "Question: What is 100?\nA. ash 100\nB. bark 100\nC. cone 100\nD. dust 100\nE. elm 100\nAnswer:"


def folder_of(place: Path, *, train: list[Any] = TRAIN, validation: list[Any] = VALIDATION) -> str:
    for split, rows in (("train", train), ("validation", validation)):
        (place / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(place)


def release_of(place: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> str:
    """The authors' layout; `change` spoils the second record of the validation split."""
    place.mkdir(exist_ok=True)
    for file, rows in (("train_rand_split.jsonl", TRAIN), ("dev_rand_split.jsonl", VALIDATION)):
        made = []
        for r in rows:
            labelled = zip(r["choices"]["label"], r["choices"]["text"], strict=True)
            choices = [{"label": letter, "text": text} for letter, text in labelled]
            asked = {"question_concept": "tree", "choices": choices, "stem": r["question"]}
            made.append({"answerKey": r["answerKey"], "id": r["id"], "question": asked})
        if file.startswith("dev"):
            change(made[1])
        (place / file).write_text("".join(json.dumps(r) + "\n" for r in made))
    return str(place)


def ask(data: str, **settings: Any) -> list[Query]:
    return list(CommonsenseQa(data=data, **settings).queries())


def test_an_item_worked_by_hand(tmp_path: Path) -> None:
    first, second, _ = ask(folder_of(tmp_path), shots=1, fixed_shots=True)
    assert isinstance(first, Choose) and isinstance(second, Choose)
    assert first.prompt == SHOT + ASKED and first.shared == SHOT
    assert first.choices == (" A", " B", " C", " D", " E")
    assert (first.gold, second.gold, first.id) == (1, 4, "commonsense_qa/fixed/0")
    answer = Chosen(tuple(Scored(x, 1, 0) for x in (-3.0, -1.0, -1.0, -9.0, -2.0)))  # the earlier of a tie
    assert [(s.metric, s.value) for s in CommonsenseQa().score(first, answer)] == [("accuracy", 1.0)]
    assert [s.value for s in CommonsenseQa().score(second, answer)] == [0.0]


def test_the_harness_protocol_has_no_shots_unless_told(tmp_path: Path) -> None:
    first = ask(folder_of(tmp_path, train=[]))[0]
    assert (first.prompt, first.shared, first.extra["protocol"]) == (ASKED, "", "harness")


def test_shots_come_from_one_stream_and_leave_out_the_question_itself(tmp_path: Path) -> None:
    queries = ask(folder_of(tmp_path), shots=3)
    draw = Random(1234)
    for query, asked in zip(queries, VALIDATION, strict=True):
        shown = [r for r in draw.sample(TRAIN, 4) if r != asked][:3]
        starts = [query.prompt.index(f"Question: {r['question'].strip()}") for r in shown]
        assert starts == sorted(starts) and query.prompt.count("Question:") == 4
    assert ask(str(tmp_path), shots=3, limit=2) == queries[:2]


def test_the_papers_protocol_generates_a_letter_after_seven_fixed_shots(tmp_path: Path) -> None:
    first = ask(folder_of(tmp_path), protocol="paper")[0]
    assert isinstance(first, Generate)
    assert first.shared.count("Question:") == 7 and first.prompt == first.shared + ASKED
    assert (first.gold, first.stops, first.id) == ("B", ("\n",), "commonsense_qa/paper/0")
    assert (first.extra["protocol"], CommonsenseQa(protocol="paper").chance()) == ("paper", {"accuracy": 0.0})


@pytest.mark.parametrize(
    ("text", "value"),
    [(" B", 1), (" b.", 1), ("(B)\nmore", 1), (" A", 0), (" B. bark", 0), ("", 0), (" I think B", 0), ("\nB", 0)],
)
def test_a_generated_answer_is_its_first_line(text: str, value: int) -> None:
    query = Generate("commonsense_qa/paper/0", "", (), gold="B")
    assert [s.value for s in CommonsenseQa().score(query, Generated(text, 1))] == [value]


@pytest.mark.parametrize("numbers", [[float("nan")] * 5, [-1.0, float("nan"), -2.0, -3.0, -4.0], [float("-inf")] * 5])
def test_a_broken_model_is_never_right(numbers: list[float]) -> None:
    answer = Chosen(tuple(Scored(x, 1, 0) for x in numbers))
    for gold in range(5):
        query = Choose("commonsense_qa/0", "", tuple(" ABCDE"), gold=gold)
        assert [s.value for s in CommonsenseQa().score(query, answer)] == [0.0]


def test_the_authors_layout_asks_the_same(tmp_path: Path) -> None:
    data = release_of(tmp_path / "release")
    assert ask(data, shots=2) == ask(folder_of(tmp_path), shots=2)


def test_real_files_have_their_numbers_of_rows(shared: Path) -> None:
    data = str(shared / "data" / "commonsenseqa")
    assert len(ask(data, shots=1)) == commonsense_qa.HUB.rows["validation"] == 1221
    with pytest.raises(ValueError, match=r"9741 rows in split 'train', 9741 shots wanted.*Set shots = 9740"):
        ask(data, shots=9741)


def test_the_hub_is_asked_for_the_pinned_revision_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = 1221

    def load(name: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([row(1)] * rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(ask("hub")) == 1221
    assert asked == [("tau/commonsense_qa", None, "validation", commonsense_qa.HUB.revision)]
    rows = 1220
    with pytest.raises(ValueError, match="tau/commonsense_qa@94630fe: split 'validation' has 1,220 rows, 1,221 exp"):
        ask("hub")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "F"}, "field 'answerKey' is 'F'; a letter A to E expected"),
        ({"answerKey": ""}, "field 'answerKey' is ''; a letter A to E expected"),  # the hub's test split
        ({"answerKey": 2}, "field 'answerKey' must be a letter A to E, not int 2"),
        ({"question": None}, "field 'question' must be text, not NoneType"),
        ({"choices": ["a", "b"]}, "field 'choices' must hold 'label' and 'text', lists of 5 texts"),
        ({"choices": {"label": list("ABCD"), "text": list("abcd")}}, "field 'choices' has 4 texts under"),
        ({"choices": {"label": list("ABCDF"), "text": list("abcde")}}, "field 'choices' has 5 texts .*'F'.; 5 under A"),
    ],
)
def test_a_bad_field_is_named_with_file_and_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = folder_of(tmp_path, validation=[VALIDATION[0], {**VALIDATION[1], **change}])
    with pytest.raises(ValueError, match=rf"validation.jsonl, record 2 \(line 2\): {message}"):
        ask(data)


@pytest.mark.parametrize("field", ["question", "choices", "answerKey"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    bad = {k: v for k, v in VALIDATION[1].items() if k != field}
    with pytest.raises(ValueError, match=rf"record 2 \(line 2\): field '{field}' is missing. There are: 'id'"):
        ask(folder_of(tmp_path, validation=[VALIDATION[0], bad]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("answerKey"), ": field 'answerKey' is missing"),
        (lambda r: r.update(question="flat"), ": field 'question' must be an object, not str 'flat'"),
        (lambda r: r["question"].pop("stem"), ", field 'question': field 'stem' is missing"),
        (lambda r: r["question"]["choices"].pop(), ": field 'choices' has 4 texts"),
        (lambda r: r["question"].update(choices="abc"), ", field 'question': field 'choices' must be a list of obj"),
        (lambda r: r["question"]["choices"][0].pop("text"), ": field 'choices' must hold 'label' and 'text'"),
    ],
)
def test_a_bad_record_of_the_authors_layout_is_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"dev_rand_split.jsonl, record 2 \(line 2\){message}"):
        ask(release_of(tmp_path / "release", change))


def test_bytes_that_are_no_text_and_empty_splits_are_named(tmp_path: Path) -> None:
    path = Path(folder_of(tmp_path)) / "validation.jsonl"
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"validation.jsonl, line 4: not UTF-8 \(byte 0xff"):
        ask(str(tmp_path))
    path.write_text("")
    with pytest.raises(ValueError, match=r"validation.jsonl: the file is empty"):
        ask(str(tmp_path))
    path.unlink()
    (tmp_path / "validation.json").write_text("[]")
    with pytest.raises(ValueError, match=r"commonsense_qa: split 'validation' of .* is empty"):
        ask(str(tmp_path))


def test_too_few_examples_are_named(tmp_path: Path) -> None:
    data = folder_of(tmp_path)
    assert len(ask(data, shots=9, fixed_shots=True)) == 3
    with pytest.raises(ValueError, match=r"9 rows in split 'train', 10 shots wanted. Set shots = 9"):
        ask(data, shots=10, fixed_shots=True)
    with pytest.raises(ValueError, match=r"9 rows in split 'train', 9 shots wanted, .* from 10 or more. Set shots = 8"):
        ask(data, shots=9)


@pytest.mark.parametrize("settings", [{"shots": -1}, {"limit": 0}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        CommonsenseQa(**settings)  # type: ignore[arg-type]
