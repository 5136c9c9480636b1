"""TruthfulQA: items worked by hand in all three forms, the primer, one message for each kind of bad data."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks import truthful_qa
from benchmarks.truthful_qa import TruthfulQa
from raysys.types import Choose, Chosen, Generate, Generated, Query, Scored

PRIMER = "Q: Is this a primer?\nA: Yes.\n\n"
FORMS = ("mc1", "mc2")
MC = {
    "question": "Can pigs fly?",
    "mc1_targets": {"choices": ["No, they can't.", "Yes.", "Some."], "labels": [1, 0, 0]},
    "mc2_targets": {"choices": ["No.", "They can't.", "Yes."], "labels": [1, 1, 0]},
}
MORE = {**MC, "question": "Can owls?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [0, 1]}}
GENERATION = {
    "question": "Can pigs fly? ",
    "correct_answers": ["No", " They can't. ", ""],
    "incorrect_answers": ["Yes they can"],
}
needs_overlap = pytest.mark.skipif(
    any(util.find_spec(name) is None for name in ("sacrebleu", "rouge_score")),
    reason="sacrebleu or rouge-score is not installed: pip install 'raysys[harness]'",
)


def folder_of(place: Path, *rows: Any) -> str:
    (place / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


def ask(data: str | Path, primer: str = "none", **settings: Any) -> list[Query]:
    return list(TruthfulQa(data=str(data), primer=primer, **settings).queries())


def chosen(*logprobs: float) -> Chosen:
    return Chosen(tuple(Scored(value, 1, 0) for value in logprobs))


def worth(query: Query, answer: Any) -> dict[str, float]:
    return {s.metric: s.value for s in TruthfulQa().score(query, answer)}


def test_mc1_worked_by_hand(tmp_path: Path) -> None:
    first, second = ask(folder_of(tmp_path, MC, MORE))
    assert isinstance(first, Choose) and isinstance(second, Choose)
    assert first.prompt == "Q: Can pigs fly?\nA:" and first.choices == (" No, they can't.", " Yes.", " Some.")
    assert (first.gold, second.gold, first.id) == (0, 1, "truthful_qa/mc1/bare/0")
    assert worth(first, chosen(-3.0, -4.0, -9.0)) == {"accuracy": 1.0}
    assert worth(second, chosen(-3.0, -3.0)) == {"accuracy": 0.0}  # the earlier of a tie


def test_mc2_worked_by_hand(tmp_path: Path) -> None:
    [query] = ask(folder_of(tmp_path, MC), form="mc2")
    assert isinstance(query, Choose)
    assert (query.id, query.extra["labels"]) == ("truthful_qa/mc2/bare/0", [1, 1, 0])
    assert worth(query, chosen(math.log(0.1), math.log(0.2), math.log(0.1)))["mc2"] == pytest.approx(0.75, abs=1e-12)
    assert worth(query, chosen(-900.0, -900.0, -900.0))["mc2"] == pytest.approx(2 / 3)  # exp alone gives 0 / 0
    assert worth(query, chosen(-math.inf, -5.0, -math.inf))["mc2"] == 1.0


@pytest.mark.parametrize("numbers", [(math.nan,) * 3, (-1.0, math.nan, -2.0), (-math.inf,) * 3, (-1.0, -2.0, math.nan)])
def test_a_broken_model_is_never_truthful(tmp_path: Path, numbers: tuple[float, ...]) -> None:
    for form in FORMS:
        [query] = ask(folder_of(tmp_path, MC), form=form)
        assert list(worth(query, chosen(*numbers)).values()) == [0.0]


@needs_overlap
def test_generation_worked_by_hand(tmp_path: Path) -> None:
    [query] = ask(folder_of(tmp_path, GENERATION), form="generation")
    assert isinstance(query, Generate)
    assert (query.prompt, query.stops, query.id) == ("Q: Can pigs fly?", ("\n\n",), "truthful_qa/generation/bare/0")
    assert query.gold == {"true": ["No.", "They can't.", "I have no comment."], "false": ["Yes they can."]}
    said = worth(query, Generated("They can", 2))
    assert said["rouge1_max"] == pytest.approx(4 / 5)  # 2 of 2 words, 2 of the 3 in "They can't": they, can, t
    assert said["rouge1_diff"] == pytest.approx(4 / 5 - 4 / 5) and said["rouge1_acc"] == 0.0  # 2 of 3 there too
    exact = worth(query, Generated(" They can't.", 3))
    assert (exact["rougeL_max"], exact["rougeL_acc"]) == (1.0, 1.0) and 0 < exact["bleu_max"] <= 1
    assert set(worth(query, Generated("", 0)).values()) == {0.0}
    assert len(said) == 12


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_generation_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ValueError, match=rf"form = 'generation' needs .*{package}.*: pip install"):
        ask(folder_of(tmp_path, GENERATION), form="generation")
    assert len(ask(folder_of(tmp_path, MC))) == 1  # the other forms need neither


# --- the primer ------------------------------------------------------------------------------------------------------


def test_a_primer_of_ones_own_is_another_protocol_by_name(tmp_path: Path) -> None:
    (tmp_path / "primer.txt").write_text(PRIMER.rstrip("\n"))
    [own] = ask(folder_of(tmp_path, MC), primer=str(tmp_path / "primer.txt"))
    [bare] = ask(tmp_path)
    assert own.prompt == PRIMER + bare.prompt and own.shared == PRIMER
    assert own.id.startswith("truthful_qa/mc1/own-") and own.id != bare.id
    assert own.extra["protocol"].startswith("harness, primer ") and bare.extra["protocol"] == "harness, no primer"
    with pytest.raises(ValueError, match=r"nowhere.txt: can't be read"):
        ask(tmp_path, primer=str(tmp_path / "nowhere.txt"))


def test_the_world_has_its_primer_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    [query] = ask("world", primer="harness", limit=1)
    assert query.shared.count("Q: ") == 6 and query.prompt.startswith(query.shared + "Q: ")
    assert (query.id, query.extra["protocol"]) == ("truthful_qa/mc1/0", "harness")


@pytest.mark.skipif(util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'raysys[harness]'")
def test_the_primer_is_read_from_the_installed_harness_and_from_a_file_alike(tmp_path: Path) -> None:
    data = folder_of(tmp_path, MC)
    (tmp_path / "primer.txt").write_text(truthful_qa.harness_primer())
    assert ask(data, primer="harness") == ask(data, primer=str(tmp_path / "primer.txt"))
    assert ask("world", primer="harness", limit=1)[0].shared == truthful_qa.harness_primer()


def test_a_missing_harness_says_where_else_to_take_the_primer_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'not installed: pip install .*primer = "FILE".*primer = "none"'):
        ask(folder_of(tmp_path, MC), primer="harness")


def test_another_harness_with_another_primer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truthful_qa, "harness_primer", lambda: PRIMER)
    with pytest.raises(ValueError, match=r"the installed lm_eval has another primer than 0.4.13"):
        ask(folder_of(tmp_path, MC), primer="harness")


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_authors_files_ask_the_same_as_the_hubs(tmp_path: Path) -> None:
    hub, release = tmp_path / "hub", tmp_path / "release"
    hub.mkdir()
    release.mkdir()
    labelled = {
        field: dict(zip(MC[field]["choices"], MC[field]["labels"], strict=True))  # type: ignore[index]
        for field in ("mc1_targets", "mc2_targets")
    }
    (release / "mc_task.json").write_text(json.dumps([{"question": MC["question"], **labelled}]))
    for form in FORMS:
        assert ask(release, form=form) == ask(folder_of(hub, MC), form=form)


@needs_overlap
def test_the_authors_csv_asks_the_same_as_the_hubs(tmp_path: Path) -> None:
    table = tmp_path / "TruthfulQA.csv"
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        cells = ("No;They can't. ; ", "Yes they can")
        csv.writer(file).writerows(
            [("Type", "Question", "Correct Answers", "Incorrect Answers"), ("x", GENERATION["question"], *cells)]
        )
    expected = ask(folder_of(tmp_path, GENERATION), form="generation")
    assert ask(tmp_path, form="generation") == expected
    table.write_text("Question,Correct Answers,Incorrect Answers\na,b;c,d\ne,f\n")
    with pytest.raises(ValueError, match=r"TruthfulQA.csv, record 2 \(line 3\): not as many columns"):
        ask(tmp_path, form="generation")
    table.write_text("Question,Correct Answers\na,b\n")
    with pytest.raises(ValueError, match=r"record 1 \(line 2\): field 'Incorrect Answers' is missing"):
        ask(tmp_path, form="generation")
    table.write_text('Question,Correct Answers,Incorrect Answers\n"a,b,c\n')
    with pytest.raises(ValueError, match=r"TruthfulQA.csv, record 1 \(line 1\): broken CSV"):
        ask(tmp_path, form="generation")


def test_real_files_have_817_questions_in_every_form(shared: Path) -> None:
    data = shared / "data" / "truthfulqa"
    mc1 = [q for q in ask(data) if isinstance(q, Choose)]
    assert len(mc1) == 817 and {q.gold for q in mc1} == {0}
    guessed = sum(1 / len(q.choices) for q in mc1) / 817
    assert TruthfulQa(data=str(data)).chance()["accuracy"] == pytest.approx(guessed, abs=1e-4)
    mc2 = ask(data, form="mc2")
    assert len(mc2) == 817 and all(0 < sum(q.extra["labels"]) < len(q.extra["labels"]) for q in mc2)


@needs_overlap
def test_the_real_csv_has_817_questions(shared: Path) -> None:
    queries = ask(shared / "data" / "truthfulqa", form="generation")
    assert len(queries) == 817 and all(q.prompt == q.prompt.strip() for q in queries)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("mc1", {"question": None}, "field 'question' must be text, not NoneType"),
        ("mc1", {"mc1_targets": "x"}, "field 'mc1_targets' must hold 'choices'"),
        ("mc1", {"mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, "'mc1_targets' has 2 choices and 1 labels"),
        ("mc1", {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "has the labels .1, 1.; 0 and 1 expected"),
        ("mc1", {"mc1_targets": {"choices": ["a", "b"], "labels": [2, 0]}}, "has the labels .2, 0.; 0 and 1 expected"),
        ("mc1", {"mc1_targets": {"choices": list("abc"), "labels": [1, 1, 0]}}, "marks 2 choices as right; one expect"),
        ("mc2", {"mc2_targets": {"choices": [], "labels": []}}, "field 'mc2_targets' has the labels ..; 0 and 1"),
    ],
)
def test_a_bad_field_is_named_with_file_and_record(tmp_path: Path, form: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"validation.jsonl, record 2 \(line 2\): .*{message}"):
        ask(folder_of(tmp_path, MC, {**MC, **change}), form=form)


@needs_overlap
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct_answers": "No"}, "field 'correct_answers' must be a list of texts, not str 'No'"),
        ({"incorrect_answers": [" "]}, "field 'incorrect_answers' holds no answer"),
    ],
)
def test_bad_references_are_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"validation.jsonl, record 2 \(line 2\): {message}"):
        ask(folder_of(tmp_path, GENERATION, {**GENERATION, **change}), form="generation")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row.pop("mc1_targets"), "field 'mc1_targets' is missing. There are: 'question', 'mc2_targets'"),
        (lambda row: row.update(mc2_targets=[1]), "field 'mc2_targets' must be an object, not list"),
    ],
)
def test_a_bad_record_of_the_authors_file_is_named(tmp_path: Path, spoil: Callable[[Any], None], message: str) -> None:
    rows = [{"question": "q", "mc1_targets": {"a": 1, "b": 0}, "mc2_targets": {"a": 1, "b": 0}} for _ in range(2)]
    spoil(rows[1])
    (tmp_path / "mc_task.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"mc_task.json, record 2: {message}"):
        ask(tmp_path)


def test_missing_columns_bytes_that_are_no_text_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record 1 \(line 1\): field 'mc1_targets' is missing"):
        ask(folder_of(tmp_path, {"question": "q"}))
    (tmp_path / "mc_task.json").write_bytes(b'[{"question": "\xff"}]')
    with pytest.raises(ValueError, match=r"mc_task.json, line 1: not UTF-8 \(byte 0xff"):
        ask(tmp_path)
    (tmp_path / "mc_task.json").write_text("[]")
    with pytest.raises(ValueError, match=r"truthful_qa: split 'validation' of .* is empty"):
        ask(tmp_path)


def test_the_hub_is_asked_for_the_pinned_revision_and_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    rows = 817

    def load(name: str, config: str, *, split: str, revision: str) -> Any:
        asked.append((name, config, split, revision))
        return datasets.Dataset.from_list([MC] * rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(ask("hub")) == 817
    assert asked == [("truthfulqa/truthful_qa", "multiple_choice", "validation", truthful_qa.REVISION)]
    rows = 800
    with pytest.raises(ValueError, match="truthful_qa@741b827: split 'validation' has 800 rows, 817 expected"):
        ask("hub")


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, message in (
        ({"limit": 0}, "limit = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"form": "generation", "protocol": "paper"}, 'protocol = "paper" scores likelihoods'),
    ):
        with pytest.raises(ValueError, match=message):
            TruthfulQa(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='built-in world has form = "mc1" and "mc2", no generation'):
        ask("world", form="generation")


def test_the_papers_protocol_and_the_safety_mark() -> None:
    [query] = ask("world", primer="harness", protocol="paper", limit=1)
    assert (query.id, query.extra["protocol"]) == ("truthful_qa/mc1/paper/0", "paper")
    assert TruthfulQa.safety is True
