"""Prompts and scores equal those of lm-evaluation-harness, asked of the harness itself on real data.

Needs the extra `harness` (pip install "raysys[harness]") and the folder of real data; the worked items in
test_mmlu.py and test_gsm8k.py keep the same promises without them.
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks.gsm8k import Gsm8k
from benchmarks.mmlu import CATEGORY, Mmlu, release_rows
from benchmarks.sources import records
from raysys.types import Choose, Chosen, Generate, Generated, Scored

if util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'raysys[harness]'", allow_module_level=True)

SUBJECTS = ("abstract_algebra", "high_school_us_history", "professional_law", "us_foreign_policy")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own warnings are not ours
REPLIES = [
    " She sold 72 clips.\n#### 72",
    "#### $1,234.50.",
    "#### 5.",
    "The answer is 18",
    " 1. Weng has 2 apples, so -3.",
    "nothing",
    "",
    "#### 7\n\n#### 8",
    "costs $.",
    "####12",
    "#### -4,000",
    "he has 10,20.",
]


def harness_task(folder: str, name: str, splits: dict[str, list[dict[str, Any]]], shots: int) -> Any:
    """The harness' own task with our rows instead of the hub's."""
    import lm_eval
    import yaml
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    place = Path(lm_eval.__file__).parent / "tasks" / folder
    config = yaml.safe_load((place / f"{name}.yaml").read_text())
    if include := config.pop("include", None):
        config = {**yaml.safe_load((place / include).read_text()), **config}
    tables = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: tables, "num_fewshot": shots})
    task.set_fewshot_seed(1234)
    return task


def filtered(task: Any, instance: Any, reply: str, name: str) -> float:
    """The harness' exact match of `reply`, read off by its filter `name`."""
    instance.resps, instance.filtered_resps = [reply], {}
    task._instances = [instance]
    task.apply_filters()
    score: float = task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
    return score


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_mmlu_asks_what_the_harness_asks(shared: Path, subject: str, shots: int) -> None:
    data = shared / "data" / "mmlu"
    rows = {s: [dict(r.row) for r in release_rows(data / s / f"{subject}_{s}.csv", subject)] for s in ("dev", "test")}
    task = harness_task("mmlu/default", f"mmlu_{subject}", rows, shots)
    task.build_all_requests(limit=40)
    ours = list(Mmlu(data=str(data), shots=shots, subjects=(subject,), limit=40).queries())
    assert [(i.args[0], i.args[1]) for i in task.instances] == [
        (q.prompt, choice) for q in ours if isinstance(q, Choose) for choice in q.choices
    ]
    assert [task.doc_to_target(doc) for doc in list(task.test_docs())[:40]] == [
        q.gold for q in ours if isinstance(q, Choose)
    ]
    assert task.config.tag == f"mmlu_{CATEGORY[subject]}_tasks"


@pytest.mark.parametrize("shots", [0, 5])
def test_gsm8k_asks_and_scores_as_the_harness_does(shared: Path, shots: int) -> None:
    data = shared / "data" / "gsm8k"
    rows = {s: [dict(r.row) for r in records(data / f"{s}.jsonl")] for s in ("train", "test")}
    task = harness_task("gsm8k", "gsm8k", rows, shots)
    task.build_all_requests(limit=40)
    ours = [q for q in Gsm8k(data=str(data), shots=shots, limit=40).queries() if isinstance(q, Generate)]
    assert [i.args[0] for i in task.instances] == [q.prompt for q in ours]
    assert [tuple(i.args[1]["until"]) for i in task.instances] == [q.stops for q in ours]

    for query, instance in zip(ours, task.instances, strict=True):
        for reply in [*REPLIES, rows["test"][instance.doc_id]["answer"], f"so it is {query.gold}"]:
            theirs = [filtered(task, instance, reply, name) for name in ("strict-match", "flexible-extract")]
            assert [s.value for s in Gsm8k().score(query, Generated(reply, 1))] == theirs, reply


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("form", ["continuation", "generative"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_other_forms_of_mmlu_ask_and_score_as_the_harness_does(
    shared: Path, subject: str, form: Any, shots: int
) -> None:
    data = shared / "data" / "mmlu"
    rows = {s: [dict(r.row) for r in release_rows(data / s / f"{subject}_{s}.csv", subject)] for s in ("dev", "test")}
    task = harness_task(f"mmlu/{form}", f"mmlu_{subject}", rows, shots)
    task.build_all_requests(limit=40)
    ours = list(Mmlu(data=str(data), shots=shots, subjects=(subject,), limit=40, form=form).queries())
    if form == "generative":
        asked = [q for q in ours if isinstance(q, Generate)]
        assert [i.args[0] for i in task.instances] == [q.prompt for q in asked]
        assert [tuple(i.args[1]["until"]) for i in task.instances] == [q.stops for q in asked]
        assert [task.doc_to_target(i.doc) for i in task.instances] == [q.gold for q in asked]
        for query, instance in zip(asked[:8], list(task.instances), strict=False):
            for reply in ["", " A", "b.", " (C) ", "D\nB", "\nA", "A B", "**a**", "Answer: A", " \t D \r"]:
                instance.resps, instance.filtered_resps = [reply], {}
                task._instances = [instance]
                task.apply_filters()
                (theirs,) = task.process_results(instance.doc, [instance.filtered_resps["get_response"]]).values()
                assert [s.value for s in Mmlu().score(query, Generated(reply, 1))] == [theirs], reply
        return
    choices = [q for q in ours if isinstance(q, Choose)]
    assert [(i.args[0], i.args[1]) for i in task.instances] == [(q.prompt, c) for q in choices for c in q.choices]
    draw = Random(subject)
    for choice, doc in zip(choices, task.test_docs(), strict=False):
        for _ in range(5):
            logs = [draw.uniform(-60, -1) for _ in choice.choices]
            theirs = task.process_results(doc, [(value, False) for value in logs])
            answer = Chosen(tuple(Scored(value, 3, 0) for value in logs))
            assert [s.value for s in Mmlu().score(choice, answer)] == [theirs["acc"], theirs["acc_norm"]]


@pytest.mark.parametrize("shots", [0, 8])
def test_gsm8k_with_chains_of_thought_asks_and_scores_as_the_harness_does(shared: Path, shots: int) -> None:
    data = shared / "data" / "gsm8k"
    rows = {"test": [dict(r.row) for r in records(data / "test.jsonl")]}
    task = harness_task("gsm8k", "gsm8k-cot", rows, shots)
    task.build_all_requests(limit=200)
    settings: dict[str, Any] = {"protocol": "paper"} if shots else {"form": "cot", "shots": 0}
    ours = [q for q in Gsm8k(data=str(data), limit=200, **settings).queries() if isinstance(q, Generate)]
    assert [i.args[0] for i in task.instances] == [q.prompt for q in ours]
    assert [tuple(i.args[1]["until"]) for i in task.instances] == [q.stops for q in ours]
    replies = [
        "The answer is 12",
        "The answer is 12.",
        "so. The answer is $1,200.",
        "The answer is -3. The answer is 4.",
    ]
    for query, instance in zip(ours[:40], list(task.instances), strict=False):
        for reply in [*REPLIES, *replies, f" 1 + 1. The answer is {query.gold}."]:
            theirs = [filtered(task, instance, reply, name) for name in ("strict-match", "flexible-extract")]
            assert [s.value for s in Gsm8k().score(query, Generated(reply, 1))] == theirs, reply
