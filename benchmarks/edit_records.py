"""The layouts of published edit records, each turned into an EditCase; the layout is recognised record by record.

- ROME's CounterFact: `requested_rewrite` {prompt with "{}", subject, target_new {str}, target_true {str}},
  `paraphrase_prompts`, `neighborhood_prompts`, and of our own `portability`, as in `custom`.
  Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262.
- EasyEdit's CounterFact, flat: `prompt` holding its subject, `target_new`, `ground_truth`, `rephrase_prompt`,
  `locality_prompt`, `locality_ground_truth`.
  Wang et al., "EasyEdit", 2023, arXiv:2308.07269.
- EasyEdit's ZsRE: `src` (a question), `rephrase`, `alt`, `answers`, `loc`, `loc_ans`, `portability`.
  Levy et al., "Zero-Shot Relation Extraction via Reading Comprehension", CoNLL 2017, arXiv:1706.04115.
- Our own, for any facts: see `custom`.

Targets and answers are stored without blanks around them, prompts without trailing ones. Every function raises
BadRecord naming the file, the record, the field and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from benchmarks.sources import Placed, what
from raysys.types import EditCase, EditRequest, Probe

Target = Literal["alt", "answers"]
CUSTOM_FIELDS = {
    "prompt", "subject", "target", "was", "paraphrases", "neighbourhood", "portability", "multi_hop", "id",
}  # fmt: skip


class BadRecord(ValueError):
    """A record of edit data that can't become an edit: `place` is its file and number, `reason` the rest."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place
        self.reason = reason


def counterfact(record: Placed) -> EditCase:
    """A CounterFact record in ROME's or EasyEdit's layout."""
    if "requested_rewrite" in record.row:
        return rome(record)
    if "target_new" in record.row:
        return flat(record)
    raise BadRecord(
        record.place,
        f"neither ROME's layout (field 'requested_rewrite') nor EasyEdit's (field 'target_new'); there are: "
        f'{fields(record)}. For data of your own use dataset = "json".',
    )


def rome(record: Placed, dataset: str = "counterfact") -> EditCase:
    """ROME's layout. The neighbourhood's truth is the old target: the same relation of subjects that share it."""
    place = record.place
    rewrite = record.row["requested_rewrite"]
    if not isinstance(rewrite, dict):
        several = ' (for MQuAKE\'s chains of edits say dataset = "mquake")' if isinstance(rewrite, list) else ""
        raise BadRecord(place, f"field 'requested_rewrite' must be an object, not {what(rewrite)}{several}.")
    inner = Placed(place, rewrite)
    within = "requested_rewrite."
    target = text(Placed(place, nested(inner, "target_new", within)), "str", f"{within}target_new.")
    was = text(Placed(place, nested(inner, "target_true", within)), "str", f"{within}target_true.")
    request = edit_request(
        place,
        id=identity(record, dataset),
        prompt=(f"{within}prompt", text(inner, "prompt", within)),
        subject=(f"{within}subject", text(inner, "subject", within)),
        target=(f"{within}target_new.str", target),
        was=was,
    )
    return edit_case(
        record,
        request,
        paraphrases=texts(record, "paraphrase_prompts"),
        neighbourhood=[(prompt, was) for prompt in texts(record, "neighborhood_prompts")] if was.strip() else [],
        portability=consequences(record),
    )


def flat(record: Placed) -> EditCase:
    """EasyEdit's flat layout: one paraphrase and one neighbour, each of which may be missing."""
    request = edit_request(
        record.place,
        id=identity(record, "counterfact"),
        prompt=("prompt", text(record, "prompt")),
        subject=("subject", text(record, "subject")),
        target=("target_new", text(record, "target_new")),
        was=text(record, "ground_truth"),
    )
    neighbour = "locality_prompt" in record.row
    return edit_case(
        record,
        request,
        paraphrases=[text(record, "rephrase_prompt")] if "rephrase_prompt" in record.row else [],
        neighbourhood=[(text(record, "locality_prompt"), text(record, "locality_ground_truth"))] if neighbour else [],
    )


def zsre(record: Placed, target: Target) -> EditCase:
    """EasyEdit's ZsRE layout.

    `target` "alt": edit to the counterfactual answer, as EasyEdit does; the old answer is the first of `answers`, and
    `portability` follows from the new one. "answers": edit to the first of `answers`, as ROME and MEMIT do; there is
    then no old answer, and `portability` (which follows from `alt`) is left out. The neighbour is an unrelated
    question, so the new target is no rival to its answer.
    """
    answers = texts(record, "answers")
    if not answers:
        raise BadRecord(record.place, "field 'answers' is an empty list; give the record an answer or leave it out.")
    wanted = text(record, "alt") if target == "alt" else answers[0]
    request = edit_request(
        record.place,
        id=identity(record, "zsre"),
        prompt=("src", text(record, "src")),
        subject=("subject", text(record, "subject")),
        target=("alt" if target == "alt" else "answers", wanted),
        was=answers[0] if target == "alt" else None,
    )
    hops: list[tuple[str, str, str | None]] = []
    if target == "alt" and record.row.get("portability"):
        hop = Placed(record.place, nested(record, "portability"))
        hops = [(text(hop, "New Question", "portability."), text(hop, "New Answer", "portability."), None)]
    case = edit_case(record, request, paraphrases=[text(record, "rephrase")], neighbourhood=[], portability=hops)
    neighbour = Probe("neighbourhood", text(record, "loc").rstrip(), text(record, "loc_ans").strip())
    return EditCase(case.request, (*case.probes, neighbour), case.source)


def custom(record: Placed) -> EditCase:
    """A record of your own:

        {"prompt": "The capital of {} is",
         "subject": "Freedonia",
         "target": "Glasgow",
         "was": "Bergen",
         "paraphrases": ["Freedonia's capital is"],
         "neighbourhood": [{"prompt": "The capital of France is", "answer": "Paris"}],
         "portability": [{"prompt": "Freedonia's capital lies in", "answer": "Scotland", "was": "Norway"}],
         "multi_hop": [{"prompt": "Who governs the capital of Freedonia?", "answer": "Groucho", "was": "Trentino",
                        "aliases": ["G. Marx"], "needs": ["glasgow-2"]}],
         "id": "freedonia-1"}

    `prompt` has {} in the subject's place, or holds the subject itself; `target` is what the model is to say. The
    rest is optional: `was`, what it says now and the rival of the new answer; `neighbourhood`, what must not change;
    `portability`, what follows from the edit (`was`: the answer before it); `multi_hop`, what follows from this edit
    and those with the ids in `needs`: asked once all are made, and left out where a study lacks one (`aliases`: other
    names of the answer, accepted in free text); `id`, else the record's number. Others are ignored, unless their name
    is nearly one of these.
    """
    for field in record.row:
        near = difflib.get_close_matches(field, sorted(CUSTOM_FIELDS), n=1, cutoff=0.75)
        if field not in CUSTOM_FIELDS and near:
            raise BadRecord(record.place, f"unknown field {field!r}. Did you mean {near[0]!r}?")
    request = edit_request(
        record.place,
        id=identity(record, "json", "id"),
        prompt=("prompt", text(record, "prompt")),
        subject=("subject", text(record, "subject")),
        target=("target", text(record, "target")),
        was=text(record, "was") if record.row.get("was") is not None else None,
    )
    neighbourhood = objects(record, "neighbourhood")
    return edit_case(
        record,
        request,
        paraphrases=texts(record, "paraphrases") if "paraphrases" in record.row else [],
        neighbourhood=[(text(o, "prompt", n), text(o, "answer", n)) for n, o in neighbourhood],
        portability=consequences(record),
        multi_hop=[_hops(o, n) for n, o in objects(record, "multi_hop")],
    )


def _hops(record: Placed, within: str) -> Probe:
    needs, aliases = (texts(record, f, within) if f in record.row else [] for f in ("needs", "aliases"))
    was = text(record, "was", within).strip() if record.row.get("was") is not None else None
    prompt, answer = text(record, "prompt", within).rstrip(), text(record, "answer", within).strip()
    return Probe("multi_hop", prompt, answer, was, tuple(aliases), tuple(f"json/{n}" for n in needs))


# --- from fields to a case -------------------------------------------------------------------------------------------

Field = tuple[str, str]  # the name a message uses, and the text


def edit_request(place: str, *, id: str, prompt: Field, subject: Field, target: Field, was: str | None) -> EditRequest:
    """A checked request. A prompt without "{}" gets it where its subject first stands as a whole word.

    An old answer that is the new one too (29 of EasyEdit's 1,037 ZsRE records) is no rival and becomes None.
    """
    for name, value in (prompt, subject, target):
        if not value.strip():
            raise BadRecord(place, f'field {name!r} is empty; fill it, or leave the record out (policy = "skip").')
    template, name = prompt[1].rstrip(), subject[1].strip()
    if template.count("{}") > 1:
        raise BadRecord(place, f"field {prompt[0]!r} has {template.count('{}')} places for the subject; one is meant.")
    if "{}" not in template:
        at = find_word(template, name)
        if at < 0:
            raise BadRecord(
                place,
                f"field {prompt[0]!r} lacks its subject {name!r} and has no {{}}: {template[:60]!r}. Write {{}} where "
                'the subject belongs, or leave the record out (policy = "skip").',
            )
        template = f"{template[:at]}{{}}{template[at + len(name) :]}"
    new, old = target[1].strip(), (was or "").strip()
    return EditRequest(id, template, name, new, old if old and old != new else None)


def find_word(where: str, word: str) -> int:
    """Where `word` first stands in `where` with no letter or digit beside it; failing that, anywhere; else -1."""
    at = where.find(word)
    while at >= 0:
        before, after = where[at - 1 : at], where[at + len(word) : at + len(word) + 1]
        if not before.isalnum() and not after.isalnum():
            return at
        at = where.find(word, at + 1)
    return where.find(word)


def edit_case(
    record: Placed,
    request: EditRequest,
    *,
    paraphrases: Iterable[str],
    neighbourhood: Iterable[tuple[str, str]],
    portability: Iterable[tuple[str, str, str | None]] = (),
    multi_hop: Iterable[Probe] = (),
) -> EditCase:
    """The request with its probes: the rewrite itself first, then paraphrases, neighbours and consequences.

    The new target is a neighbour's rival unless it is the neighbour's own answer.
    """
    new, old = request.target, request.was
    probes = [
        Probe("rewrite", request.text, new, old),
        *(Probe("paraphrase", prompt.rstrip(), new, old) for prompt in paraphrases),
        *(
            Probe("neighbourhood", prompt.rstrip(), truth.strip(), new if truth.strip() != new else None)
            for prompt, truth in neighbourhood
        ),
        *(
            Probe("portability", prompt.rstrip(), answer.strip(), wrong.strip() if wrong is not None else None)
            for prompt, answer, wrong in portability
        ),
        *multi_hop,
    ]
    for probe in probes:
        if not probe.right or not probe.prompt:
            raise BadRecord(record.place, f"a {probe.kind} probe has an empty prompt or answer; fill it.")
    return EditCase(request, tuple(probes), record.place)


def consequences(record: Placed) -> list[tuple[str, str, str | None]]:
    """The optional `portability` of a record: what follows from the edit, and the answer before it."""
    return [
        (text(o, "prompt", n), text(o, "answer", n), text(o, "was", n) if o.row.get("was") is not None else None)
        for n, o in objects(record, "portability")
    ]


# --- fields ----------------------------------------------------------------------------------------------------------


def text(record: Placed, field: str, within: str = "") -> str:
    value = _value(record, field, within)
    if not isinstance(value, str):
        raise BadRecord(record.place, f"field {within + field!r} must be text, not {what(value)}.")
    return value


def texts(record: Placed, field: str, within: str = "") -> list[str]:
    value = _value(record, field, within)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise BadRecord(record.place, f"field {within + field!r} must be a list of texts, not {what(value)}.")
    return value


def nested(record: Placed, field: str, within: str = "") -> dict[str, Any]:
    value = _value(record, field, within)
    if not isinstance(value, dict):
        raise BadRecord(record.place, f"field {within + field!r} must be an object, not {what(value)}.")
    return value


def objects(record: Placed, field: str) -> list[tuple[str, Placed]]:
    """The objects of an optional list, each with the prefix that names it in messages, and its number from 1."""
    value = record.row.get(field) or []
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise BadRecord(record.place, f"field {field!r} must be a list of objects, not {what(value)}.")
    return [(f"{field}[{i}].", Placed(record.place, v, i + 1)) for i, v in enumerate(value)]


def fields(record: Placed) -> str:
    return ", ".join(map(repr, record.row)) or "none"


def identity(record: Placed, dataset: str, field: str = "case_id") -> str:
    """The record's own id, its number in the file where it has none."""
    value = record.row.get(field)
    if value is not None and not isinstance(value, (str, int)):
        raise BadRecord(record.place, f"field {field!r} must be a text or a whole number, not {what(value)}.")
    return f"{dataset}/{record.number if value is None else value}"


def _value(record: Placed, field: str, within: str) -> Any:
    if field not in record.row:
        raise BadRecord(record.place, f"field {within + field!r} is missing. There are: {fields(record)}.")
    return record.row[field]
