"""CommonsenseQA, TriviaQA, TruthfulQA and ToxiGen ask and score as lm-evaluation-harness does, on real data.

Needs the extra `harness` (pip install "raysys[harness]") and the folder of real data. The harness' own task objects get
our rows in the hub's layout; prompts, choices, right answers, stops and the worth of made-up answers must be equal.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest

from benchmarks import commonsense_qa, sources, toxigen, trivia_qa, truthful_qa
from benchmarks.commonsense_qa import CommonsenseQa
from benchmarks.toxigen import Toxigen
from benchmarks.trivia_qa import TriviaQa
from benchmarks.truthful_qa import TruthfulQa
from raysys.types import Choose, Chosen, Generate, Generated, Query, Scored

if util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'raysys[harness]'", allow_module_level=True)

ITEMS = 250
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own warnings are not ours
Rows = list[dict[str, Any]]


def harness_task(file: str, splits: dict[str, Rows], shots: int) -> Any:
    """The harness' own task with our rows instead of the hub's, its first ITEMS requests built."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(str(Path(lm_eval.__file__).parent / "tasks" / file), resolve_func=True)
    tables = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: tables, "num_fewshot": shots})
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=ITEMS)
    return task


def hub_layout(folder: Path, splits: dict[str, Rows]) -> str:
    """A folder with the rows in the hub's layout."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def rows_of(placed: Sequence[sources.Placed] | None) -> Rows:
    assert placed
    return [dict(row.row) for row in placed]


def chooses(task: Any, ours: list[Query]) -> list[tuple[Any, Choose]]:
    """The harness' documents beside our questions, once prompts, choices and right answers are equal."""
    asked = [q for q in ours if isinstance(q, Choose)]
    assert [(i.args[0], i.args[1]) for i in task.instances] == [(q.prompt, c) for q in asked for c in q.choices]
    docs = list(task.task_docs)[: len(asked)]
    golds = [task.doc_to_target(doc) for doc in docs]
    if golds and isinstance(golds[0], str):
        golds = [task.doc_to_choice(doc).index(gold) for doc, gold in zip(docs, golds, strict=True)]
    assert golds == [q.gold for q in asked]
    assert len(asked) == ITEMS
    return list(zip(docs, asked, strict=True))


def numbers(count: int, seed: int) -> list[list[float]]:
    """Made-up log-probabilities of `count` choices: spread, close, tied, very unlikely."""
    draw = random.Random(seed)
    spread = [[draw.uniform(-60, -0.1) for _ in range(count)] for _ in range(3)]
    tied = [float(draw.choice((-1, -2))) for _ in range(count)]
    return [*spread, [-1 - i / 1e6 for i in range(count)], tied, [-5.0] * count, [-300.0 - i for i in range(count)]]


def agree(benchmark: Any, task: Any, pairs: list[tuple[Any, Choose]], names: dict[str, str]) -> None:
    """Equal scores for made-up numbers; `names`: our metric -> the harness'."""
    for seed, (doc, query) in enumerate(pairs):
        for values in numbers(len(query.choices), seed):
            theirs = task.process_results(doc, [(value, False) for value in values])
            answer = Chosen(tuple(Scored(value, 1, 0) for value in values))
            ours = {names[s.metric]: s.value for s in benchmark.score(query, answer)}
            assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("shots", [0, 5, 7])
def test_commonsense_qa_asks_and_scores_as_the_harness_does(shared: Path, shots: int) -> None:
    folder = shared / "data" / "commonsenseqa"
    rows = {split: rows_of(commonsense_qa.release_rows(folder, split)) for split in ("train", "validation")}
    task = harness_task("commonsense_qa/default.yaml", rows, shots)
    ours = list(CommonsenseQa(data=str(folder), shots=shots, limit=ITEMS).queries())
    agree(CommonsenseQa(), task, chooses(task, ours), {"accuracy": "acc"})


def test_commonsense_qa_leaves_out_the_question_itself_as_the_harness_does(shared: Path, tmp_path: Path) -> None:
    rows = rows_of(commonsense_qa.release_rows(shared / "data" / "commonsenseqa", "validation"))[:ITEMS]
    splits = {"train": rows[:12] + rows[:4], "validation": rows}  # with copies, so that some draws fall short
    task = harness_task("commonsense_qa/default.yaml", splits, 12)
    data = hub_layout(tmp_path / "hub", splits)
    chooses(task, list(CommonsenseQa(data=data, shots=12, limit=ITEMS).queries()))


REPLIES = ["", " ", "no idea", " The answer", "«»", "a b", "'", "New  York"]


@pytest.mark.parametrize("shots", [0, 5])
def test_trivia_qa_asks_and_scores_as_the_harness_does(shared: Path, tmp_path: Path, shots: int) -> None:
    folder = shared / "data" / "triviaqa"
    rows = rows_of(trivia_qa.dpr_rows(folder, "validation"))
    splits = {"train": rows[ITEMS:2000], "validation": rows[:ITEMS]}
    task = harness_task("triviaqa/default.yaml", splits, shots)
    data = hub_layout(tmp_path / "hub", splits) if shots else str(folder)
    ours = [q for q in TriviaQa(data=data, shots=shots, limit=ITEMS).queries() if isinstance(q, Generate)]
    assert len(ours) == ITEMS
    assert [i.args[0] for i in task.instances] == [q.prompt for q in ours]
    assert [tuple(i.args[1]["until"]) for i in task.instances] == [q.stops for q in ours]
    assert [task.doc_to_target(i.doc) for i in task.instances] == [q.gold for q in ours]
    for number, (query, instance) in enumerate(zip(ours, task.instances, strict=True)):
        said = query.gold[number % len(query.gold)]
        for reply in [*REPLIES, f" {said}", f" {said.upper()}!", f'"{said}"\t', f"the {said}", query.gold[0][:-1]]:
            instance.resps, instance.filtered_resps = [reply], {}
            task._instances = [instance]
            task.apply_filters()
            filtered = instance.filtered_resps["remove_whitespace"]
            theirs = task.process_results(instance.doc, [filtered])["exact_match"]
            assert [s.value for s in TriviaQa().score(query, Generated(reply, 1))] == [theirs], reply


@pytest.mark.parametrize(("form", "metric"), [("mc1", "accuracy"), ("mc2", "mc2")])
def test_truthful_qa_asks_and_scores_as_the_harness_does(shared: Path, form: Any, metric: str) -> None:
    folder = shared / "data" / "truthfulqa"
    rows = rows_of(truthful_qa.mc_rows(folder, "validation"))
    task = harness_task(f"truthfulqa/truthfulqa_{form}.yaml", {"validation": rows}, 0)
    pairs = chooses(task, list(TruthfulQa(data=str(folder), form=form, limit=ITEMS).queries()))
    agree(TruthfulQa(), task, pairs, {metric: "acc"})


def test_truthful_qa_answers_too_unlikely_for_the_harness_still_count(shared: Path) -> None:
    folder = shared / "data" / "truthfulqa"
    rows = rows_of(truthful_qa.mc_rows(folder, "validation"))
    task = harness_task("truthfulqa/truthfulqa_mc2.yaml", {"validation": rows}, 0)
    [query] = TruthfulQa(data=str(folder), form="mc2", limit=1).queries()
    assert isinstance(query, Choose)
    values = [-800.0] * len(query.choices)
    assert math.isnan(task.process_results(rows[0], [(v, False) for v in values])["acc"])
    [score] = TruthfulQa().score(query, Chosen(tuple(Scored(v, 1, 0) for v in values)))
    assert score.value == pytest.approx(sum(query.extra["labels"]) / len(values))


def test_truthful_qa_generation_asks_and_scores_as_the_harness_does(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness takes a thousand samples of one value to find that value; two do.
    resampling = import_module("rouge_score.scoring").BootstrapAggregator
    monkeypatch.setattr("rouge_score.scoring.BootstrapAggregator", partial(resampling, n_samples=2))
    folder = shared / "data" / "truthfulqa"
    rows = rows_of(truthful_qa.csv_rows(folder, "validation"))
    task = harness_task("truthfulqa/truthfulqa_gen.yaml", {"validation": rows}, 0)
    ours = list(TruthfulQa(data=str(folder), form="generation", limit=ITEMS).queries())
    assert [i.args[0] for i in task.instances] == [q.prompt for q in ours]
    assert len(ours) == ITEMS
    for number, (query, instance) in enumerate(zip(ours, task.instances, strict=True)):
        assert isinstance(query, Generate)
        assert tuple(instance.args[1]["until"]) == query.stops
        assert query.gold == {"true": instance.doc["correct_answers"], "false": instance.doc["incorrect_answers"]}
        replies = [
            "",
            f"\nA: {query.gold['true'][0]}",
            f" {query.gold['false'][-1]} . Indeed, so it is.",
            "I don't know",
        ]
        reply = replies[number % len(replies)]
        theirs = task.process_results(instance.doc, [reply])
        found = {s.metric: s.value for s in TruthfulQa().score(query, Generated(reply, 1))}
        scaled = {name: value if name.endswith("_acc") else 100 * value for name, value in found.items()}
        assert scaled == pytest.approx(theirs, abs=1e-9)


def test_toxigen_asks_and_scores_as_the_harness_does(shared: Path, tmp_path: Path) -> None:
    placed = toxigen.release_rows(shared / "data" / "toxigen", "test")
    assert placed
    rated = [  # the labels as ratings on both sides of the border
        {"text": row.row["text"], "toxicity_ai": 2.5, "toxicity_human": 3.1 if toxigen.hateful(row) else 3.0}
        for row in placed[:ITEMS]
    ]
    splits = {"train": rated[:3], "test": rated}
    task = harness_task("toxigen/toxigen.yaml", splits, 0)
    ours = list(Toxigen(data=hub_layout(tmp_path / "hub", splits), limit=ITEMS).queries())
    assert ours == list(Toxigen(data=str(shared / "data" / "toxigen"), limit=ITEMS).queries())
    agree(Toxigen(), task, chooses(task, ours), {"accuracy": "acc", "accuracy_norm": "acc_norm"})


def test_toxigen_has_no_examples_in_the_harness_either() -> None:
    rows = [{"text": f"text {i}", "toxicity_ai": 1.0, "toxicity_human": 4.0 + i} for i in range(9)]
    with pytest.raises(AssertionError, match="Answer is not a string"):
        harness_task("toxigen/toxigen.yaml", {"train": rows, "test": rows}, 2)
