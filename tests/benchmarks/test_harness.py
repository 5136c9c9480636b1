"""The benchmark `harness`: it asks and scores what lm_eval asks and scores, item by item, and says what it can't."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from benchmarks.harness import Harness
from raysys import names
from raysys.blocks import Block, by_prefix, pack
from raysys.chat import Chat
from raysys.model import Model
from raysys.scoring import Engine
from raysys.types import Choose, Chosen, Generate, Generated, Query, Scored
from tests import families, tasks

ASKED = ("t_choice", "t_inputs", "t_last", "t_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.write(tmp_path_factory.mktemp("tasks"))


def built(folder: Path, name: str, **settings: Any) -> Harness:
    """The benchmark as a study builds it."""
    made: Harness = names.build(names.benchmark("harness"), {"task": str(folder / f"{name}.yaml"), **settings}, "x")
    return made


def scores(model: Model, asked: Harness, judge: Harness) -> dict[str, dict[int, float]]:
    """metric -> record -> value: asked by one instance, scored by another from what travels."""
    engine, found = Engine(model), dict[str, dict[int, float]]()
    for group in by_prefix(asked.queries()):
        for block in pack(model.tokens, "harness", {}, group, batch=4, size=8):
            sent = Block.loads(block.dumps())
            for item, answer in zip(sent.items, engine.answer(sent), strict=True):
                for score in judge.score(item.query, answer):
                    assert score.query == item.query.id
                    found.setdefault(score.metric, {})[item.query.extra["doc"]] = score.value
    return found


@pytest.mark.parametrize(("family", "task"), [*(("llama", task) for task in ASKED), ("gpt2", "t_inputs")])
def test_every_record_is_worth_what_it_is_worth_to_lm_eval(family: str, task: str, folder: Path) -> None:
    model = families.tiny(family)
    ours = scores(model, built(folder, task, shots=1, limit=12), built(folder, task, shots=1))
    peer = HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=4, max_length=model.max_length)
    manager = TaskManager(include_path=folder, include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=peer, tasks=[task], task_manager=manager, num_fewshot=1, limit=12, bootstrap_iters=0
    )
    assert theirs is not None
    expected: dict[str, dict[int, float]] = {}
    for sample in theirs["samples"][task]:
        for metric in sample["metrics"]:
            shown = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            expected.setdefault(shown, {})[sample["doc_id"]] = float(sample[metric])
    assert ours == expected
    for metric, values in ours.items():
        chain = metric if "," in metric else f"{metric},none"
        assert np.mean(list(values.values())) == pytest.approx(theirs["results"][task][chain])


@pytest.mark.parametrize("task", ["t_choice", "t_last", "t_text"])
@pytest.mark.parametrize("shots", [0, 2])
def test_prompts_are_those_of_lm_eval_plain_and_as_chats(task: str, shots: int, folder: Path) -> None:
    model = families.tiny("llama")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    peer = HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=4, max_length=model.max_length)
    queries = list(built(folder, task, shots=shots, limit=5).queries())
    manager = TaskManager(include_path=folder, include_defaults=False)
    for chat in (False, True):
        theirs: Any = lm_eval.simple_evaluate(
            model=peer, tasks=[task], task_manager=manager, num_fewshot=shots, limit=5, bootstrap_iters=0,
            apply_chat_template=chat,
        )  # fmt: skip
        asked = [Chat().asked(model.tokenizer, q) for q in queries] if chat else queries
        samples = {s["doc_id"]: s["arguments"] for s in theirs["samples"][task]}
        for query in asked:
            prompt, *_ = samples[query.extra["doc"]][0]
            assert query.prompt == prompt
            if isinstance(query, Choose):
                assert list(query.choices) == [a[1] for a in samples[query.extra["doc"]]]


def test_queries_are_well_formed_and_the_same_every_time(folder: Path) -> None:
    queries = list(built(folder, "t_choice").queries())
    assert queries == list(built(folder, "t_choice").queries())
    assert len({q.id for q in queries}) == len(queries) == tasks.ROWS
    assert all(q.prompt.startswith(q.shared) and q.shared.startswith("The capital of Norway") for q in queries)
    assert {q.group for q in queries} == {"t_choice"} and queries[0].id == "harness/t_choice/0"


def test_a_group_or_a_folder_is_all_its_tasks(folder: Path, tmp_path: Path) -> None:
    assert [q.group for q in built(folder, "t_group", limit=2).queries()] == ["t_choice"] * 2 + ["t_last"] * 2
    for name in ("t_text", "t_last"):
        (tmp_path / f"{name}.yaml").write_bytes((folder / f"{name}.yaml").read_bytes())
    assert {q.group for q in Harness(task=f"{tmp_path}", limit=1).queries()} == {"t_last", "t_text"}


def test_answers_are_worth_what_the_metric_says_by_hand(folder: Path) -> None:
    """Record 0: gold "Rome , Norway" of a text, the first option of a choice."""
    text, choice = (next(iter(built(folder, name, limit=1).queries())) for name in ("t_text", "t_choice"))
    judge = built(folder, "t_text")
    assert values(judge, text, Generated("ROME , norway", 3)) == {"exact_match": 1.0, "exact_match,start": 0.0}
    assert values(judge, text, Generated("Rome", 1)) == {"exact_match": 0.0, "exact_match,start": 0.0}
    judge = built(folder, "t_choice")
    first, second = Scored(-1.0, 2, 0), Scored(-2.0, 2, 0)
    assert values(judge, choice, Chosen((first, second, second)))["acc"] == 1.0
    assert values(judge, choice, Chosen((second, first, second)))["acc"] == 0.0


def test_a_model_that_computes_nan_is_never_right(folder: Path) -> None:
    query = next(iter(built(folder, "t_choice", limit=1).queries()))
    answer = Chosen((Scored(float("nan"), 2, 0),) * 3)
    assert values(built(folder, "t_choice"), query, answer) == {"acc": 0.0, "acc_norm": 0.0}


def values(judge: Harness, query: Query, answer: Any) -> dict[str, float]:
    return {s.metric: s.value for s in judge.score(query, answer)}


def test_records_that_have_changed_are_not_scored(folder: Path, tmp_path: Path) -> None:
    query = next(iter(built(folder, "t_last", limit=1).queries()))
    other = tasks.write(tmp_path)
    (other / "rows.json").write_text((folder / "rows.json").read_text().replace("Anna", "Emil"))
    with pytest.raises(ValueError, match="record or task differ from those that were asked"):
        list(built(other, "t_last").score(query, Chosen((Scored(-1.0, 1, 1),))))
    with pytest.raises(ValueError, match="task 't_last' is not part of"):
        list(built(folder, "t_text").score(query, Chosen((Scored(-1.0, 1, 1),))))


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("t_f1", {}, r"metric 'f1' is one figure for the whole corpus .* metrics = \[\"acc\"\]"),
        ("t_f1", {"metrics": ["ac"]}, "has no metric 'ac'. Did you mean 'acc'"),
        ("t_whole", {}, 'perplexity of whole texts.*benchmark "perplexity"'),
        ("t_sampled", {}, "it samples its answers .*set greedy = true"),
        ("t_none", {}, "no file or folder"),
    ],
)
def test_what_it_can_not_tell_item_by_item_is_refused(
    task: str, settings: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=f"^harness: .*{message}"):
        list(built(folder, task, **settings).queries())


def test_other_metrics_and_greedy_answers_can_be_had_instead(folder: Path) -> None:
    asked = built(folder, "t_f1", metrics=["acc"], limit=2)
    query = next(iter(asked.queries()))
    assert values(asked, query, Chosen((Scored(-1.0, 1, 1),) * 3)).keys() == {"acc"}
    sampled = next(iter(built(folder, "t_sampled", greedy=True, limit=1).queries()))
    assert isinstance(sampled, Generate) and sampled.stops == (".",) and sampled.max_tokens == 4


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    for settings, message in (
        ({"limit": 0}, "limit = 0"),
        ({"shots": -1}, "shots = -1"),
        ({}, "'task': Field required"),
    ):
        with pytest.raises(ValueError, match=message):
            names.build(Harness, settings if not settings else {"task": "x", **settings}, "harness")


def test_without_lm_eval_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'raysys\[harness\]'"):
        list(built(folder, "t_choice").queries())
