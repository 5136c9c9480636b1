"""BIG-Bench Hard: items worked by hand in each form, and one message for each kind of bad data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks import bbh_answers, bbh_prompts, exemplars
from benchmarks.bbh import Bbh
from raysys.types import Generate, Generated

ROWS = [{"input": f"{n} > 1 is", "target": str(n > 1)} for n in range(3)]
PROMPTS = "canary\n-----\nSay if it is so.\n" + "".join(
    f"\nQ: {n} < 9 is\nA: Let's think step by step.\n{n} is small. So the answer is True.\n" for n in range(3)
)
WORKED_OUT = """Q: 0 < 9 is
A: Let's think step by step.
0 is small. So the answer is True.

Q: 0 > 1 is
A: Let's think step by step.
"""
TASK = "boolean_expressions"


def release(folder: Path, rows: Any = ROWS, prompts: str | None = PROMPTS) -> Path:
    """The authors' layout with one subtask."""
    for name in ("bbh", "cot-prompts"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "bbh" / f"{TASK}.json").write_text(json.dumps({"canary": "", "examples": rows}))
    if prompts is not None:
        (folder / "cot-prompts" / f"{TASK}.txt").write_text(prompts)
    return folder


def ask(data: Path | str, **settings: Any) -> list[Generate]:
    return [q for q in Bbh(data=str(data), **settings).queries() if isinstance(q, Generate)]


def worth(query: Generate, text: str) -> list[float]:
    return [s.value for s in Bbh().score(query, Generated(text, 1))]


@pytest.mark.parametrize(
    ("form", "shots", "tail"),
    [
        ("cot_fewshot", 1, WORKED_OUT),
        ("fewshot", 1, "Q: 0 < 9 is\nA: True\n\nQ: 0 > 1 is\nA:"),
        ("cot_zeroshot", None, "Q: 0 > 1 is\nA: Let's think step by step."),
        ("zeroshot", None, "Q: 0 > 1 is\nA:"),
    ],
)  # fmt: skip
def test_each_form_asks_its_own_prompt(tmp_path: Path, form: str, shots: int | None, tail: str) -> None:
    first = ask(release(tmp_path), form=form, shots=shots)[0]
    assert first.prompt == f"Say if it is so.\n\n{tail}" and first.prompt.startswith(first.shared)
    assert (first.gold, first.group, first.id) == ("False", TASK, f"bbh/{form}/{TASK}/0")


def test_both_protocols_show_three_chains_of_thought(tmp_path: Path) -> None:
    harness, paper = (ask(release(tmp_path), protocol=p)[0] for p in ("harness", "paper"))
    assert harness.prompt == paper.prompt and harness.prompt.count("So the answer is True.") == 3
    assert harness.max_tokens == 1024 and paper.extra["protocol"] == "paper"


def test_the_hubs_layout_gives_the_same_questions(tmp_path: Path) -> None:
    old = release(tmp_path)
    new = tmp_path / "hub"
    (new / TASK).mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(new / TASK / "test-00000-of-00001.parquet")
    assert ask(new, exemplars=str(old / "cot-prompts")) == ask(old)


def test_a_chain_of_thought_counts_only_with_its_full_stop(tmp_path: Path) -> None:
    query = ask(release(tmp_path))[0]
    assert worth(query, "0 is less. So the answer is False.") == [1]
    assert worth(query, "So the answer is False") == [0]  # the harness drops the line's last character


def test_a_bare_answer_may_have_a_blank_before_it_only_in_the_flexible_metric(tmp_path: Path) -> None:
    query = ask(release(tmp_path), form="fewshot")[0]
    assert worth(query, " False") == [0, 1]
    assert worth(query, "False") == [1, 1]
    assert worth(query, " True") == [0, 0]


def test_the_world_has_five_subtasks_with_its_own_examples() -> None:
    queries = ask("world")
    assert {q.group for q in queries} == {
        "boolean_expressions", "object_counting", "number_sorting", "comparison", "list_position",
    }  # fmt: skip
    assert len(queries) == 5 * 37 and all(q.shared.count("Q: ") == 3 for q in queries)
    for query in ask("world", form="zeroshot"):
        assert worth(query, f" {query.gold}\n\n")[1] == 1 and worth(query, " zzz")[1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "cot_fewshot"}, "chains of thought, which the built-in world lacks"),
        ({"form": "zeroshot", "shots": 2}, "has none; leave shots out"),
        ({"shots": -1}, "0 or more"),
        ({"limit": 0}, "1 or more"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bbh(**settings)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"input": "x"}], r"boolean_expressions.json, record 1: field 'target' is missing"),
        ([ROWS[0], {"input": 3, "target": "x"}], r"record 2: field 'input' must be text"),
        ([{"input": "x", "target": " "}], r"record 1: field 'target' is empty"),
        (["x"], r"record 1: a JSON object is expected"),
        ({}, r"field 'examples' must be a list"),
        ([], r"no rows; is the download complete"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(release(tmp_path, rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"examples": [', "broken JSON at line 1"), (b'{"examples": "\xff"}', "line 1: not UTF-8 .byte 0xff")],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (release(tmp_path) / "bbh" / f"{TASK}.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ask(tmp_path)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("text", "no line '-----'"),
        ("x\n-----\nDescription", "no example"),
        (PROMPTS.replace("So the answer is", "So it is", 1), "txt, example 1: "),
        (PROMPTS.replace("step by step.\n", "", 1), "txt, example 1: "),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path: Path, prompts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(release(tmp_path, prompts=prompts))


def test_missing_examples_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exemplars, "harness_task", lambda *_: None)
    with pytest.raises(ValueError, match=r"Set exemplars to the folder cot-prompts.*or install the harness"):
        ask(release(tmp_path, prompts=None))


def test_more_shots_than_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 worked examples, 4 shots wanted. Set shots = 3"):
        ask(release(tmp_path), shots=4)


def test_an_unknown_subtask_or_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no subtask 'boolean'"):
        ask(release(tmp_path), subtasks=("boolean",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no subtask. Looked for"):
        ask(tmp_path / "empty")
    with pytest.raises(ValueError, match="no folder"):
        ask(tmp_path / "nowhere")


def test_the_hub_is_pinned_and_its_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load(name: str, config: str, *, split: str, revision: str) -> Any:
        seen.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="split 'test' has 3 rows, 178 expected"):
        ask("hub", subtasks=("snarks",))
    assert seen == [("SaylorTwift/bbh", "snarks", "test", bbh_prompts.hub("snarks").revision)]
    assert sum(bbh_prompts.ROWS.values()) == 6_511 and len(bbh_prompts.hub("snarks").revision) == 40


def test_words_and_options_of_any_kind_can_be_scored() -> None:
    assert bbh_answers.extracted("word_sorting", "a c++ b", 0, ["c++", "b", "a"]) == "a b"
    assert bbh_answers.extracted("snarks", "Answer: C", 0, [f"option {i}" for i in range(40)]) == "(C)"
