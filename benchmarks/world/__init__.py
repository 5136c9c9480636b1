"""The built-in world: a small synthetic world, the benchmarks in miniature, edit cases, and a model that knows it.

Nothing here imports torch; the training script is `python -m benchmarks.world.train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from . import documents as _documents
from . import edits as _edits
from . import knowledge as _knowledge
from . import tasks as _tasks

MODEL_DIR: Final = Path(__file__).parent / "model"

__all__ = ["MODEL_DIR", "corpus", "edit_records", "facts", "rows", "training_records"]


def rows(name: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a miniature benchmark by split, in the layout of the real data set.

    Names: mmlu, gsm8k, bbh (keyed by subtask), commonsense_qa, trivia_qa, truthful_qa, toxigen.
    Raises ValueError for another name.
    """
    return _tasks.rows(name)


def edit_records() -> list[dict[str, Any]]:
    """400 edit cases in CounterFact's layout, in a fixed order; the first 120 have different subjects."""
    return _edits.records()


def training_records() -> list[dict[str, Any]]:
    """Edit cases in the same layout to train editors on: no fact of `edit_records`, none of its first 120 subjects."""
    return _edits.training_records()


def facts() -> list[dict[str, Any]]:
    """Every fact: relation, area, subject, object, question, and its cloze prompts.

    `held_in` lists the prompts this fact is trained in, `probes` those it is never trained in (their wording is trained
    with other subjects); `prompts` lists all six in the relation's order.
    """
    return [
        {
            "relation": f.relation.id,
            "area": f.relation.area,
            "subject": f.subject,
            "object": f.object,
            "question": f.question,
            "prompts": [f.prompt(i) for i in range(_knowledge.PHRASINGS)],
            "held_in": [f.prompt(i) for i in f.held_in],
            "probes": [f.prompt(i) for i in f.probes],
        }
        for f in _knowledge.all_facts()
    ]


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` plain documents of the kind the model is trained on, the same for the same seed on every machine."""
    return _documents.corpus(n, seed)
