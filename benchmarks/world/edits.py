"""Edit cases over the facts of the built-in world, in the layout of CounterFact (Meng et al., arXiv:2202.05262).

400 records, no fact edited twice, the first 120 about different subjects. Neighbours (other subjects with the same true
object) are facts that no record edits; paraphrases are the phrasings in which the fact was never trained.

Methods that are trained before they edit get records of their own: facts that none of the 400 edits, about none of the
first 120 subjects, each to two different targets in two of its phrasings.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any, Final

from .documents import hop_reserved
from .knowledge import HOPS, RELATIONS, Fact, all_facts, lookup, rivals

COUNT: Final = 400
FIRST: Final = 120
ROUND: Final = 50  # training records in a row about different facts; then come the same facts again, said otherwise
EDITABLE: Final = ("born_in", "employer", "profession", "instrument", "language", "food", "pet", "country", "fame",
                   "continent", "headquarters", "product")


def chosen() -> list[Fact]:
    """The facts to edit, in order: one per subject first, then second ones."""
    rng = random.Random("edits")
    facts = [f for f in all_facts() if f.relation.id in EDITABLE]
    rng.shuffle(facts)
    first: dict[str, Fact] = {}
    for fact in facts:
        first.setdefault(fact.subject, fact)
    order = list(first.values())
    rest = [f for f in facts if first[f.subject] is not f]
    left = {(f.relation.id, f.object): 0 for f in facts}
    for fact in facts:
        left[fact.relation.id, fact.object] += 1
    taken: list[Fact] = []
    for fact in order + rest:
        key = (fact.relation.id, fact.object)
        if left[key] > 2 and len(taken) < COUNT:
            left[key] -= 1
            taken.append(fact)
    return taken


def records() -> list[dict[str, Any]]:
    """The edit records, in a fixed order."""
    edited = chosen()
    names = {(f.relation.id, f.subject) for f in edited}
    made: list[dict[str, Any]] = []
    for i, fact in enumerate(edited):
        rng = random.Random(f"edit {i}")
        target = rng.choice(rivals(fact))
        made.append(_record(i, fact, 0, target, neighbours(fact, names, rng)))
    return made


def training_records() -> list[dict[str, Any]]:
    """The records to train editors on, in a fixed order; a fact's two records are `ROUND` apart."""
    edited = chosen()
    names = {(f.relation.id, f.subject) for f in edited}
    subjects = {f.subject for f in edited[:FIRST]}
    free = [f for f in all_facts() if (f.relation.id, f.subject) not in names and f.subject not in subjects]
    random.Random("training edits").shuffle(free)
    facts: list[tuple[Fact, list[str], int, list[str]]] = []
    for fact in free:
        rng = random.Random(f"training edit {fact.relation.id} {fact.subject}")
        prompts = neighbours(fact, names | {(fact.relation.id, fact.subject)}, rng)
        if prompts:
            facts.append((fact, rng.sample(rivals(fact), 2), rng.choice(fact.held_in[1:]), prompts))
    made: list[dict[str, Any]] = []
    for start in range(0, len(facts), ROUND):
        for again in (0, 1):
            for fact, targets, other, prompts in facts[start:start + ROUND]:
                made.append(_record(f"training-{len(made)}", fact, other if again else 0, targets[again], prompts))
    return made


def neighbours(fact: Fact, names: Collection[tuple[str, str]], rng: random.Random) -> list[str]:
    """Two prompts each about up to five other subjects of which the same is true; none of `names`."""
    near = [f for f in all_facts() if f.relation is fact.relation and f.object == fact.object
            and (f.relation.id, f.subject) not in names]
    near = rng.sample(near, min(5, len(near)))
    return [f.prompt(p) for f in near for p in (0, *rng.sample(f.held_in[1:], 1))]


def _record(case: int | str, fact: Fact, phrasing: int, target: str, near: list[str]) -> dict[str, Any]:
    numbers = {r.id: f"W{i}" for i, r in enumerate(RELATIONS)}
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": fact.relation.phrasings[phrasing],
            "relation_id": numbers[fact.relation.id],
            "target_new": {"str": target},
            "target_true": {"str": fact.object},
            "subject": fact.subject,
            "question": fact.question,
        },
        "paraphrase_prompts": [fact.prompt(p) for p in fact.probes],
        "neighborhood_prompts": near,
        "portability": portability(fact, target),
    }


def portability(fact: Fact, target: str) -> list[dict[str, str]]:
    """Two-hop prompts whose answer the edit changes; only ones the model was never trained on."""
    made = []
    for first, second, template in HOPS:
        if first != fact.relation.id or not hop_reserved(first, fact.subject):
            continue
        was, now = (lookup()[second, name].object for name in (fact.object, target))
        if was != now:
            made.append({"prompt": template.format(fact.subject), "answer": now, "was": was})
    return made
