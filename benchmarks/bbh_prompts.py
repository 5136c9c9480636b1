"""BIG-Bench Hard's subtasks, their descriptions and three worked examples each, read at run time.

The release has them in cot-prompts/<subtask>.txt: a canary line, "-----", the description, then three times "Q: " with
"A: Let's think step by step." and the worked answer. lm-evaluation-harness 0.4.13 holds the same texts in its task
files. They are equal to the character but for one thing: the release's sports_understanding has a space, not a line
break, between "step by step." and the worked answer. Both are read as the harness has it (a line break).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from benchmarks import exemplars, sources
from benchmarks.exemplars import Exemplar

SUBTASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip
ROWS = dict.fromkeys(SUBTASKS, 250) | {"causal_judgement": 187, "penguins_in_a_table": 146, "snarks": 178}
STEPS = "Let's think step by step."
WORKED = re.compile(rf"\nA: {re.escape(STEPS)}[ \n]")
CONCLUSION = "the answer is "


class Prompts(NamedTuple):
    """What stands before a subtask's questions: its description and its worked examples."""

    description: str
    examples: tuple[Exemplar, ...]


def hub(task: str) -> sources.Hub:
    """Where the hub has a subtask's rows."""
    return sources.Hub(
        id="SaylorTwift/bbh",
        config=task,
        revision="b5306be6f827cfafbb545ff5a51f96916029b0fd",
        rows={"test": ROWS[task]},
    )


def prompts(task: str, data: str, folder: str) -> Prompts:
    """Description and examples of `task`.

    From `folder` (files <subtask>.txt of the release) when it is given, else from cot-prompts/ of a local `data`, else
    from the installed harness. Raises ValueError that says how to get them.
    """
    places = [Path(folder)] if folder else [Path(data) / "cot-prompts"]
    for place in places:
        if (path := place / f"{task}.txt").is_file():
            return parsed(path)
    if folder:
        raise ValueError(f"bbh: {places[0]} has no {task}.txt; give the folder cot-prompts of the original release.")
    file = f"{task}.yaml"
    found = exemplars.harness_task("bbh", "cot_fewshot", file)
    if found is None:
        raise ValueError(
            f"bbh {task!r}: no description and worked examples. Set exemplars to the folder cot-prompts of the "
            f"original release (github.com/suzgunmirac/BIG-Bench-Hard), or install the harness, which has them: "
            f"{exemplars.INSTALL}."
        )
    description = found.get("description")
    if not isinstance(description, str):
        raise ValueError(f"lm_eval, bbh/cot_fewshot/{file}: no description; lm_eval 0.4.13 has one.")
    return Prompts(description, tuple(exemplars.samples(found, f"lm_eval, bbh/cot_fewshot/{file}", "input")))


def parsed(path: Path) -> Prompts:
    """A prompt file of the release. Raises ValueError naming the file and what is missing in it."""
    _, line, body = sources.decoded(path).replace("\r\n", "\n").partition("-----\n")
    if not line:
        raise ValueError(f"{path}: no line '-----' behind the canary; is this a file of cot-prompts?")
    description, *rest = body.strip("\n").split("\n\nQ: ")
    if not rest:
        raise ValueError(f"{path}: no example (an empty line and 'Q: ') behind the description.")
    found = []
    for number, text in enumerate(rest, 1):
        pair = WORKED.split(text, maxsplit=1)
        if len(pair) != 2 or CONCLUSION not in pair[1]:
            raise ValueError(
                f"{path}, example {number}: 'A: {STEPS}' and then a text with '{CONCLUSION}' is expected behind the "
                "question; download the file again."
            )
        found.append(Exemplar(*pair))
    return Prompts(description + "\n\n", tuple(found))


def short(worked: str) -> str:
    """The answer alone: what follows the last "the answer is ", without the final full stop."""
    return worked.rpartition(CONCLUSION)[2].removesuffix(".")
