"""BIG-Bench Hard in its four forms asks and scores as lm-evaluation-harness does, on real data.

Needs the extra `harness` (pip install "raysys[harness]") and the folder of real data.
"""

from __future__ import annotations

from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bbh, bbh_answers, bbh_prompts
from benchmarks.bbh import Bbh
from raysys.types import Generate, Generated

if util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'raysys[harness]'", allow_module_level=True)

ITEMS = 8
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own warnings are not ours
FORMS = {
    "cot_fewshot": ("get-answer",),
    "fewshot": ("none",),
    "cot_zeroshot": ("strict-match", "flexible-extract"),
    "zeroshot": ("strict-match", "flexible-extract"),
}
REPLIES = [
    "", " True", "True", "False.", " Yes, yes. No", "no", "not plausible", "It is plausible: YES", "tells the truth",
    "He does not tell the truth, yes", "valid", "invalid or valid", "(A)", " (B).", "(b)", "Answer: C", "answer:\n D",
    "So the answer is (A).", "So the answer is (A)", "The answer is True.", "the answer is yes.\nThe answer is no.",
    "The final answer: 24.", "The answer: -5!", "24", "- 7, or -12", "twenty four", "one hundred and five", "six",
    "eight", "two thousand, three hundred and one of fifteen", "fourteen", "] ]", "the rest is ) > }", "<[]>",
    "the answer is .", 'the answer is "no".', "nothing here", "the answer is a, b.", "(Z)", "A) B",
]  # fmt: skip


def harness_task(form: str, subtask: str, rows: list[dict[str, Any]]) -> Any:
    """The harness' own task with our rows instead of the hub's, its first requests built."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(lm_eval.__file__).parent / "tasks" / "bbh" / form / f"{subtask}.yaml"
    config = load_yaml(str(file), resolve_func=True)
    table = {"test": Dataset.from_list(rows)}
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: table})
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=ITEMS)
    return task


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("subtask", bbh_prompts.SUBTASKS)
def test_every_subtask_asks_and_scores_as_the_harness_does(shared: Path, subtask: str, form: Any) -> None:
    data = shared / "data" / "bbh"
    rows = [dict(r.row) for r in bbh._records(data / "bbh" / f"{subtask}.json")]
    assert len(rows) == bbh_prompts.ROWS[subtask]
    task = harness_task(form, subtask, rows)
    ours = Bbh(data=str(data), form=form, subtasks=(subtask,), limit=ITEMS)
    asked = [q for q in ours.queries() if isinstance(q, Generate)]
    assert len(asked) == ITEMS
    assert [i.args[0] for i in task.instances] == [q.prompt for q in asked]
    assert [tuple(i.args[1]["until"]) for i in task.instances] == [q.stops for q in asked]
    assert {i.args[1].get("max_gen_toks", 256) for i in task.instances} == {q.max_tokens for q in asked}
    assert [task.doc_to_target(i.doc) for i in task.instances] == [q.gold for q in asked]
    instances = list(task.instances)
    for query, instance in zip(asked[:4], instances, strict=False):
        option = bbh_answers.options(instance.doc["input"])[-1:]
        gold = query.gold
        swapped = " ".join(reversed(bbh_answers.listed(instance.doc["input"])))
        own = [gold, f" {gold}", f"so the answer is {gold}.", f"The answer is {gold}.", f"{gold}\n", swapped, *option]
        for reply in [*REPLIES, *own]:
            instance.resps, instance.filtered_resps = [reply], {}
            task._instances = [instance]
            task.apply_filters()
            theirs = [
                task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"]
                for name in FORMS[form]
            ]
            found = [s.value for s in Bbh(data=str(data)).score(query, Generated(reply, 1))]
            assert found[: len(theirs)] == theirs, reply


@pytest.mark.parametrize("subtask", bbh_prompts.SUBTASKS)
def test_the_release_and_the_harness_hold_the_same_texts(shared: Path, subtask: str) -> None:
    release = bbh_prompts.prompts(subtask, str(shared / "data" / "bbh"), "")
    installed = bbh_prompts.prompts(subtask, "hub", "")
    assert release == installed and len(release.examples) == 3


def test_spelled_numbers_are_read_as_the_harness_reads_them() -> None:
    w2n: Any = import_module("word2number.w2n")

    ones = bbh_answers.UNITS[1:]
    for text in [
        *ones, *(f"{t} {o}" for t in bbh_answers.TENS for o in ones[:9]), "two hundred", "hundred five",
        "three hundred and twelve", "nine hundred ninety-nine", "one million two", "two thousand and four",
        "three billion one million two thousand five", "one two three four five", "one two", "million",
    ]:  # fmt: skip
        assert bbh_answers.number(text) == w2n.word_to_num(text), text
