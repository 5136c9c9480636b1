"""MQuAKE: several edits that a question with several hops rests on together.

Zhong et al., "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions", EMNLP 2023,
arXiv:2305.14795. A record's `requested_rewrite` is a list of rewrites in ROME's layout, each with its `question`;
`questions` ask (three times, in other words) what follows from all of them: `new_answer` or `new_answer_alias`
instead of `answer`.

A record becomes an edit for each rewrite. Records share rewrites (MQuAKE-hard: 1,716 rewrites in 429 records are 769
different edits), and what is shared is made once. The questions of a record hang on the last of its edits in file
order and name the others (`Probe.needs`), so that they are asked once all are made, in whatever order a study makes
them, and not at all where it lacks one. They are also left out where another record edits a hop that this one leaves
alone (`Probe.keeps`). Two rewrites of one prompt to different targets (two pairs in MQuAKE-hard) are left to the
study's policy, which stops by default.

Every question counts for itself; MQuAKE's authors count a record as solved when any of its three questions is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from benchmarks.edit_records import BadRecord, edit_case, edit_request, identity, nested, objects, text, texts
from benchmarks.edits import located
from benchmarks.sources import Placed
from raysys.types import EditCase, Probe


@dataclass(frozen=True, kw_only=True)
class Mquake:
    """MQuAKE. `path`: a JSON file of the original release (MQuAKE-hard.json, MQuAKE-CF-3k.json, …) or its folder."""

    path: str

    name: ClassVar[str] = "mquake"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        return map(_good, linked(located(self.path)))

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        """The single hops before any edit (`single_hops`) in whose prompt no edited subject stands, each once."""
        subjects = tuple({case.request.subject for case in edited})
        found: dict[str, Probe] = {}
        for fact in _facts(located(self.path)):
            if not any(s in fact.prompt for s in subjects):
                found.setdefault(fact.prompt, fact)
        return list(found.values())


@dataclass(frozen=True)
class Chain:
    """A record: its edits in their order, and the questions that rest on all of them."""

    cases: tuple[EditCase, ...]
    questions: tuple[Probe, ...]


def linked(records: Iterable[Placed]) -> list[EditCase | BadRecord]:
    """Every edit once, in file order, with the questions of the records that it completes; bad records as values."""
    found: list[EditCase | BadRecord] = []
    places: dict[tuple[str, str, str], int] = {}  # subject, text, target -> index in `found`
    ids: dict[int, str] = {}
    for record in records:
        try:
            read = chain(record)
        except BadRecord as fault:
            found.append(fault)
            continue
        mine = []
        for case in read.cases:
            key = (case.request.subject, case.request.text, case.request.target)
            if key not in places:
                places[key] = len(found)
                ids[len(found)] = case.request.id
                found.append(case)
            mine.append(places[key])
        *others, last = sorted(set(mine))
        needs = tuple(ids[i] for i in others)
        asked = tuple(replace(q, needs=needs) for q in read.questions)
        final = found[last]
        assert isinstance(final, EditCase)
        found[last] = replace(final, probes=(*final.probes, *asked))
    return found


def chain(record: Placed) -> Chain:
    """One record. Raises BadRecord naming file, record and field."""
    rewrites = objects(record, "requested_rewrite")
    if not rewrites:
        raise BadRecord(record.place, "field 'requested_rewrite' must be a list of one or more objects.")
    name = identity(record, "mquake")
    cases = tuple(_edit(record.place, name, within, rewrite) for within, rewrite in rewrites)
    answer, was = text(record, "new_answer").strip(), text(record, "answer").strip()
    aliases = tuple(a.strip() for a in texts(record, "new_answer_alias") if a.strip())
    prompts = {case.request.text for case in cases}
    hops = (text(o, "cloze", within).rstrip() for within, o in objects(record, "new_single_hops"))
    keeps = tuple(hop for hop in hops if hop not in prompts)
    questions = [q.rstrip() for q in texts(record, "questions")]
    if not answer or not all(questions):
        raise BadRecord(record.place, "field 'new_answer' or one of 'questions' is empty; fill it.")
    wrong = was if was and was != answer else None
    return Chain(cases, tuple(Probe("multi_hop", q, answer, wrong, aliases, keeps=keeps) for q in questions))


def _edit(place: str, name: str, within: str, rewrite: Placed) -> EditCase:
    """One rewrite, with its own question as a paraphrase. `within` names it in messages."""
    target = text(Placed(place, nested(rewrite, "target_new", within)), "str", f"{within}target_new.")
    request = edit_request(
        place,
        id=f"{name}/{rewrite.number}",
        prompt=(f"{within}prompt", text(rewrite, "prompt", within)),
        subject=(f"{within}subject", text(rewrite, "subject", within)),
        target=(f"{within}target_new.str", target),
        was=text(Placed(place, nested(rewrite, "target_true", within)), "str", f"{within}target_true."),
    )
    asked = Placed(f"{place}, rewrite {rewrite.number}", rewrite.row, rewrite.number)
    return edit_case(asked, request, paraphrases=[text(rewrite, "question", within)], neighbourhood=[])


def _facts(records: Iterable[Placed]) -> Iterator[Probe]:
    """Every single hop of the unedited world; records that can't be read are left out."""
    for record in records:
        try:
            hops = [_fact(hop, within) for within, hop in objects(record, "single_hops")]
        except BadRecord:
            continue
        yield from (hop for hop in hops if hop.prompt and hop.right)


def _fact(hop: Placed, within: str) -> Probe:
    aliases = texts(hop, "answer_alias", within) if "answer_alias" in hop.row else []
    prompt, answer = text(hop, "cloze", within).rstrip(), text(hop, "answer", within).strip()
    return Probe("neighbourhood", prompt, answer, None, tuple(a.strip() for a in aliases if a.strip()))


def _good(found: EditCase | BadRecord) -> EditCase:
    if isinstance(found, BadRecord):
        raise found
    return found
