"""MMLU: an item worked by hand, the real files, and one message for each kind of bad data."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mmlu import CATEGORIES, Mmlu
from raysys.types import Choose, Chosen, Generate, Generated, Scored

DEV = [["What is 1 + 1?", "1", "2", "3", "4", "B"], [" Which is a metal? ", "Iron", "Wood", "Salt", "Milk", "A"]]
TEST = [["What is\n2 + 2, then?", "1", "2", "3", "4", "D"], ["Which flies?", "Cow", "Owl", "Eel", "Ant", "B"]]
WORKED = """The following are multiple choice questions (with answers) about high school physics.

What is 1 + 1?
A. 1
B. 2
C. 3
D. 4
Answer: B

Which is a metal?
A. Iron
B. Wood
C. Salt
D. Milk
Answer: A

What is
2 + 2, then?
A. 1
B. 2
C. 3
D. 4
Answer:"""


def release(folder: Path, *, dev: list[list[str]] = DEV, test: list[list[str]] = TEST) -> Path:
    """The authors' layout with one subject."""
    for split, rows in (("dev", dev), ("test", test)):
        (folder / split).mkdir(exist_ok=True)
        with (folder / split / f"high_school_physics_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def hub_rows(rows: list[list[str]]) -> list[dict[str, Any]]:
    return [
        {"question": q, "subject": "high_school_physics", "choices": choices, "answer": "ABCD".index(letter)}
        for q, *choices, letter in rows
    ]


def ask(folder: Path, **settings: Any) -> list[Choose]:
    return [q for q in Mmlu(data=str(folder), **settings).queries() if isinstance(q, Choose)]


def test_an_item_worked_by_hand(tmp_path: Path) -> None:
    first, second = ask(release(tmp_path), shots=2)
    assert first.prompt == WORKED
    assert first.choices == (" A", " B", " C", " D")
    assert (first.gold, second.gold) == (3, 1)
    assert first.shared == second.shared == WORKED[: WORKED.index("What is\n2")]
    assert (first.id, first.group, first.extra["category"]) == (
        "mmlu/high_school_physics/0", "high_school_physics", "stem",
    )  # fmt: skip
    answers = Chosen(tuple(Scored(x, 1, 0) for x in (-3.0, -2.0, -9.0, -1.5)))
    assert [(s.metric, s.value) for s in Mmlu().score(first, answers)] == [("accuracy", 1.0)]
    assert [s.value for s in Mmlu().score(second, answers)] == [0.0]
    tie = Chosen(tuple(Scored(-1.0, 1, 0) for _ in range(4)))
    assert [s.value for s in Mmlu().score(first, tie)] == [0.0]  # the earlier letter wins


def test_all_layouts_ask_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    expected = ask(release(tmp_path), shots=2)
    for layout in ("jsonl", "json", "all", "subjects"):
        folder = tmp_path / layout
        for split, rows in (("dev", hub_rows(DEV)), ("test", hub_rows(TEST))):
            place = folder / {"all": "all", "subjects": "high_school_physics"}.get(layout, "")
            place.mkdir(parents=True, exist_ok=True)
            if layout == "jsonl":
                (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
            elif layout == "json":
                (place / f"{split}.json").write_text("\ufeff" + json.dumps(rows, indent=1))
            else:
                name = f"{split}.parquet" if layout == "all" else f"{split}-00000-of-00001.parquet"
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / name)
        assert ask(folder, shots=2) == expected


def test_limit_is_per_subject_and_zero_shots_need_no_examples(tmp_path: Path) -> None:
    [only] = ask(release(tmp_path, dev=[]), shots=0, limit=1)
    assert only.prompt.startswith(only.shared) and only.shared.endswith("high school physics.\n\n")


def test_real_files_have_57_subjects_in_four_categories(shared: Path) -> None:
    queries = ask(shared / "data" / "mmlu", limit=1)
    assert len(queries) == 57 == sum(map(len, CATEGORIES.values()))
    assert {q.extra["category"] for q in queries} == set(CATEGORIES)
    assert len(ask(shared / "data" / "mmlu", subjects=("anatomy", "virology"))) == 135 + 166


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 3}, "2 rows in split 'dev'.*3 shots wanted. Set shots = 2"),
        ({"subjects": ("high_school_phisics",)}, "no subject .* Did you mean 'high_school_physics'"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(release(tmp_path), **{"shots": 2, **settings})


@pytest.mark.parametrize("setting", ["shots", "limit"])
def test_negative_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} = -1"):
        Mmlu(**{setting: -1})  # type: ignore[arg-type]


def csv_with(cells: list[str]) -> list[list[str]]:
    return [TEST[0], cells]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["q", "1", "2", "3", "A"], "record 2 .line 3.: 5 columns, 6 expected"),
        (["q", "1", "2", "3", "4", "E"], "record 2 .line 3.: column 6 .the answer. is 'E'; a letter A to D"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path: Path, cells: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"high_school_physics_test.csv, {message}"):
        ask(release(tmp_path, test=csv_with(cells)), shots=2)


def test_an_empty_csv_and_a_broken_one_are_named(tmp_path: Path) -> None:
    path = release(tmp_path) / "test" / "high_school_physics_test.csv"
    path.write_text("")
    with pytest.raises(ValueError, match=r"physics_test.csv: no records"):
        ask(tmp_path, shots=2)
    path.write_text('a,1,2,3,4,A\n"never closed,1,2,3,4,B\n')
    with pytest.raises(ValueError, match=r"physics_test.csv, record 2 \(line 2\): broken CSV"):
        ask(tmp_path, shots=2)
    path.write_bytes(b"a,1,2,3,4,A\nb\xff,1,2,3,4,B\n")
    with pytest.raises(ValueError, match=r"physics_test.csv, line 2: not UTF-8 \(byte 0xff"):
        ask(tmp_path, shots=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["a", "b", "c"]}, "field 'choices' must be a list of 4 texts, not 3 entries"),
        ({"choices": "abcd"}, "field 'choices' must be a list of 4 texts, not str"),
        ({"answer": 4}, "field 'answer' is 4; 0 to 3 or a letter"),
        ({"answer": True}, "field 'answer' is True"),
        ({"question": None}, "field 'question' must be text, not NoneType"),
        ({"subject": 3}, "field 'subject' must be text, not int 3"),
    ],
)
def test_a_bad_field_is_named_with_file_and_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = hub_rows(TEST)
    rows[1] |= change
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"test.jsonl, record 2 \(line 2\): {message}"):
        ask(tmp_path, shots=0)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    row = {k: v for k, v in hub_rows(TEST)[0].items() if k != "answer"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"record 1 .*field 'answer' is missing. There are: 'question', 'subject'"):
        ask(tmp_path, shots=0)


def test_the_options_own_text_is_asked_in_the_continuation_form(tmp_path: Path) -> None:
    first, second = ask(release(tmp_path), form="continuation", shots=1)
    head = "The following are questions (with answers) about high school physics.\n\n"
    assert first.prompt == f"{head}Question: What is 1 + 1?\nAnswer: 2\n\nQuestion: What is\n2 + 2, then?\nAnswer:"
    assert first.choices == (" 1", " 2", " 3", " 4") and second.choices[1] == " Owl"
    assert first.id == "mmlu/continuation/high_school_physics/0"


def test_the_normed_accuracy_counts_characters_without_the_blank(tmp_path: Path) -> None:
    rows = [["Which?", "Ox", "Elephant", "Horses", "Donkey", "B"]]
    query = ask(release(tmp_path, test=rows), form="continuation", shots=0)[0]
    answer = Chosen(tuple(Scored(value, 3, 0) for value in (-2.0, -7.0, -6.0, -6.0)))  # per character: 1, 0.875, 1, 1
    scores = {s.metric: s.value for s in Mmlu().score(query, answer)}
    assert scores == {"accuracy": 0, "accuracy_norm": 1}
    assert set(Mmlu(form="continuation").chance()) == set(scores)


def test_the_papers_protocol_generates_a_letter(tmp_path: Path) -> None:
    first, *_ = Mmlu(data=str(release(tmp_path)), protocol="paper", shots=2).queries()
    assert isinstance(first, Generate) and first.prompt == WORKED and (first.gold, first.stops) == ("D", ("</s>", "\n"))
    for text, worth in ((" D", 1), ("d.", 1), ("(D)\nx", 1), ("D 4", 0), ("", 0), ("A", 0)):
        assert [s.value for s in Mmlu().score(first, Generated(text, 1))] == [worth]
    assert isinstance(ask(tmp_path, protocol="paper", form="letters", shots=2)[0], Choose)  # what is said wins
