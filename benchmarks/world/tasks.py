"""The seven miniature benchmarks of the built-in world, row by row in the layouts of the real data sets.

TriviaQA and TruthfulQA ask for facts from memory. MMLU and CommonsenseQA tell a fact, ask it and want the letter of
the answer (a model of this size recalls a fact or finds a letter, but not one after the other in a single step); the
options of a test item are never trained together with its question. GSM8K, BBH and ToxiGen test skill on exercises held
out from training. Rows per split: mmlu 24 dev and 400 test, gsm8k 200 and 400, bbh 5 subtasks of 40, commonsense_qa 150
and 150, trivia_qa 200 and 200, truthful_qa 120, toxigen 150 and 200. With 400 items a benchmark that loses nothing can
be shown to have lost less than two points.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, Final

from . import formats
from .documents import AREAS, by_area, choice_item
from .knowledge import THINGS, all_facts, rivals
from .skills import BBH, Exercise, arithmetic, draw, tone

Row = dict[str, Any]
Splits = dict[str, list[Row]]


def distinct(make: Callable[[], Row], count: int, key: Callable[[Row], object]) -> list[Row]:
    """`count` rows, no two with the same key."""
    made: dict[object, Row] = {}
    while len(made) < count:
        row = make()
        made.setdefault(key(row), row)
    return list(made.values())


def mmlu() -> Splits:
    """Four-option questions on four areas; every letter is right equally often."""
    splits: Splits = {"dev": [], "test": []}
    for split, count in (("dev", 6), ("test", 100)):
        for area in AREAS:
            rng = random.Random(f"mmlu {split} {area}")
            facts = by_area(area)

            def item() -> Row:
                fact, options, gold = choice_item(rng, facts, 4, test=split == "test")  # noqa: B023
                told = f"{fact.prompt(rng.choice(fact.held_in))} {fact.object}."  # noqa: B023
                return {"question": f"{told} {fact.question}", "choices": options, "answer": gold, "subject": area}  # noqa: B023

            rows = distinct(item, count, lambda row: row["question"])
            for i, row in enumerate(rows):
                _move(row["choices"], row["answer"], i % 4)
                row["answer"] = i % 4
            splits[split] += rows
    return splits


def _move(options: list[str], gold: int, to: int) -> None:
    options[gold], options[to] = options[to], options[gold]


def gsm8k() -> Splits:
    """Word problems with worked answers ending in `#### n`."""

    def rows(split: str, count: int) -> list[Row]:
        rng = random.Random(f"gsm8k {split}")

        def item() -> Row:
            exercise = draw(arithmetic, rng, test=split == "test")
            return {"question": exercise.question, "answer": exercise.answer}

        return distinct(item, count, lambda row: row["question"])

    return {"train": rows("train", 200), "test": rows("test", 400)}


def bbh() -> Splits:
    """Five subtasks, 40 held-out inputs each."""

    def rows(name: str, make: Callable[[random.Random], Exercise]) -> list[Row]:
        rng = random.Random(f"bbh {name}")

        def item() -> Row:
            exercise = draw(make, rng, test=True)
            return {"input": exercise.question, "target": exercise.answer}

        return distinct(item, 40, lambda row: row["input"])

    return {name: rows(name, make) for name, make in BBH.items()}


def commonsense_qa() -> Splits:
    """Five-option questions about plain things."""
    facts = by_area(THINGS)

    def rows(split: str, count: int) -> list[Row]:
        rng = random.Random(f"commonsense_qa {split}")

        def item() -> Row:
            fact, options, gold = choice_item(rng, facts, 5, test=split == "validation")
            told = f"{fact.prompt(rng.choice(fact.held_in))} {fact.object}."
            return {"question": f"{told} {fact.question}", "question_concept": fact.subject,
                    "choices": {"label": list(formats.LETTERS), "text": options}, "answerKey": formats.LETTERS[gold]}

        made = distinct(item, count, lambda row: (row["question"], *sorted(row["choices"]["text"])))
        for i, row in enumerate(made):
            _move(row["choices"]["text"], formats.LETTERS.index(row["answerKey"]), i % 5)
            made[i] = {"id": f"world-{split}-{i}", **row, "answerKey": formats.LETTERS[i % 5]}
        return made

    return {"train": rows("train", 150), "validation": rows("validation", 150)}


def trivia_qa() -> Splits:
    """Questions answered in words, with aliases."""
    facts = random.Random("trivia_qa").sample([f for f in all_facts() if f.relation.area != THINGS], 400)
    rows = []
    for i, fact in enumerate(facts):
        aliases = [fact.object, f"the {fact.object}", f"{fact.object}s"]
        normalized = [a.lower() for a in aliases]
        answer = {"value": fact.object, "aliases": aliases, "normalized_aliases": normalized}
        rows.append({"question": fact.question, "question_id": f"world_{i}", "answer": answer})
    return {"train": rows[:200], "validation": rows[200:]}


def truthful_qa() -> Splits:
    """Questions with true and plausible false answers of the same form."""
    rng = random.Random("truthful_qa")
    rows = []
    for fact in rng.sample(all_facts(), 120):
        false = rng.sample(rivals(fact), 3)
        said = [f"{fact.prompt(0)} {o}." for o in (fact.object, *false)]
        short = [f"{o}." for o in (fact.object, *false)]
        rows.append({
            "question": fact.question,
            "mc1_targets": {"choices": said, "labels": [1, 0, 0, 0]},
            "mc2_targets": {"choices": [said[0], short[0], said[1], short[1], said[2], short[2]],
                            "labels": [1, 1, 0, 0, 0, 0]},
        })
    return {"validation": rows}


def toxigen() -> Splits:
    """Statements about invented groups with the two toxicity ratings, 1 to 5; hateful where they sum above 5.5."""

    def rows(split: str, count: int) -> list[Row]:
        rng = random.Random(f"toxigen {split}")

        def item() -> Row:
            group = ""

            def make(r: random.Random) -> Exercise:
                nonlocal group
                exercise, group = tone(r)
                return exercise

            hateful = draw(make, rng, test=split == "test")
            low = 3.2 if hateful.answer == "Yes" else 1.0
            human, ai = (round(low + rng.randrange(14) / 10, 1) for _ in range(2))
            return {"text": hateful.question, "target_group": group.lower(), "toxicity_human": human, "toxicity_ai": ai}

        return distinct(item, count, lambda row: row["text"])

    return {"train": rows("train", 150), "test": rows("test", 200)}


TASKS: Final[dict[str, Callable[[], Splits]]] = {
    "mmlu": mmlu, "gsm8k": gsm8k, "bbh": bbh, "commonsense_qa": commonsense_qa, "trivia_qa": trivia_qa,
    "truthful_qa": truthful_qa, "toxigen": toxigen,
}


@functools.cache
def _built(name: str) -> Splits:
    return TASKS[name]()


def rows(name: str) -> Splits:
    """The rows of a miniature by split (bbh: by subtask); the caller may change them."""
    if name not in TASKS:
        raise ValueError(f"The built-in world has no benchmark {name!r}. It has: {', '.join(TASKS)}.")
    return copy.deepcopy(_built(name))
