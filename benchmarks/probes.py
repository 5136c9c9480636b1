"""What became of the edits (`Probes`) and of facts nobody edited (`Locality`).

Each question is put in two ways. *Forced*: the right answer and its rival are scored as continuations, token by token,
as ROME's authors do (Meng et al., NeurIPS 2022, arXiv:2202.05262, section 3.4). *Free*: the model answers greedily in
its own words, which is what a user sees. The first can look perfect where the second has collapsed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import ClassVar, TypeVar

from raysys.types import Answer, Choose, Chosen, EditCase, Generate, Generated, Probe, ProbeKind, Query, Score

GROUPS: Mapping[ProbeKind, str] = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "portability": "portability",
}
KNOWN = "known"  # the group of facts nobody edited


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Efficacy, paraphrase, neighbourhood and portability of every edit, each a group of its own.

    Metrics, for a group K: K/probability (1 when the right answer is likelier than its rival, where there is one;
    log-probabilities are summed over tokens, ROME's code takes their mean), K/forced (share of the right answer's
    tokens that are the argmax), K/free (1 when the greedy text starts with the right answer).

    A neighbourhood prompt that some other edit of the stream changes is left out: its old answer is no longer right.
    """

    free: bool = True
    max_tokens: int | None = None  # of a free answer; None: by the length of the right one, at least 12

    name: ClassVar[str] = "probes"
    about: ClassVar[str] = "edits"  # given to `over`: the cases, in the order in which they are edited
    version: ClassVar[str] = "1"

    cases: tuple[EditCase, ...] = field(default=(), init=False, repr=False)

    def over(self, cases: Sequence[EditCase]) -> Probes:
        """These settings for the edits `cases`, in the order in which they are made."""
        return _holding(self, "cases", tuple(cases))

    @classmethod
    def of(cls, cases: Sequence[EditCase], *, free: bool = True, max_tokens: int | None = None) -> Probes:
        """The probes of `cases`, in the order in which they are made."""
        return cls(free=free, max_tokens=max_tokens).over(cases)

    def queries(self) -> Iterator[Query]:
        """Edit by edit; `edit` is its position, from 1. Ids don't depend on the position."""
        changed = {p.prompt for c in self.cases for p in c.probes if p.kind in ("rewrite", "paraphrase")}
        for position, case in enumerate(self.cases, 1):
            for number, probe in enumerate(case.probes):
                if probe.kind == "neighbourhood" and probe.prompt in changed:
                    continue
                where = f"probes/{case.request.id}/{number}"
                yield from _asked(where, probe, GROUPS[probe.kind], position, self.free, self.max_tokens)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """The metrics that the answer to one of the two ways of asking gives."""
        return _scores(query, answer)

    def chance(self) -> Mapping[str, float]:
        """What guessing gives: of two answers, each is likelier half of the time."""
        return {f"{group}/probability": 0.5 for group in GROUPS.values()}


@dataclass(frozen=True, kw_only=True)
class Locality:
    """Does the model still know what nobody edited? Metrics known/forced and known/free, over held-out facts.

    The facts come from the data set of edits (`Dataset.held_out`); of more than `limit` a fixed sample is asked.
    """

    limit: int | None = 200
    free: bool = True
    max_tokens: int | None = None

    name: ClassVar[str] = "locality"
    about: ClassVar[str] = "held_out"  # given to `over`: facts that no edit of the study touches
    version: ClassVar[str] = "1"

    facts: tuple[Probe, ...] = field(default=(), init=False, repr=False)

    def over(self, facts: Sequence[Probe]) -> Locality:
        """These settings for `facts`. Raises ValueError when there are none."""
        if not facts:
            raise ValueError(
                "locality: the data of the edits hold no fact beyond those edited. Edit fewer records than the file "
                "has, add 'neighbourhood' to records that are not edited, or leave this benchmark out."
            )
        if self.limit is not None and len(facts) > self.limit:
            chosen = sorted(Random("locality").sample(range(len(facts)), self.limit))
            facts = [facts[i] for i in chosen]
        return _holding(self, "facts", tuple(facts))

    @classmethod
    def of(
        cls, facts: Sequence[Probe], *, limit: int | None = 200, free: bool = True, max_tokens: int | None = None
    ) -> Locality:
        """The held-out `facts` as a benchmark."""
        return cls(limit=limit, free=free, max_tokens=max_tokens).over(facts)

    def queries(self) -> Iterator[Query]:
        """Fact by fact, each asked in both ways."""
        for number, fact in enumerate(self.facts):
            yield from _asked(f"locality/{number}", replace(fact, wrong=None), KNOWN, 0, self.free, self.max_tokens)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """known/forced or known/free, by the way of asking."""
        return _scores(query, answer)

    def chance(self) -> Mapping[str, float]:
        return {}


Held = TypeVar("Held", Probes, Locality)


# --- asking and scoring ----------------------------------------------------------------------------------------------


def _asked(
    where: str, probe: Probe, group: str, edit: int, free: bool, max_tokens: int | None
) -> Iterator[Choose | Generate]:
    answers = (probe.right,) if probe.wrong is None else (probe.right, probe.wrong)
    choices = tuple(joined(probe.prompt, a) for a in answers)
    yield Choose(f"{where}/forced", probe.prompt, choices, gold=0, group=group, edit=edit)
    if free:
        tokens = max_tokens or enough(probe.right)
        yield Generate(
            f"{where}/free", probe.prompt, stops=("\n",), gold=probe.right, max_tokens=tokens, group=group, edit=edit
        )


def enough(answer: str) -> int:
    """Tokens in which `answer` can be said, at two bytes a token and some to spare; few different values."""
    tokens = 12
    while tokens < len(answer.encode()) // 2 + 4:
        tokens *= 2
    return tokens


def _scores(query: Query, answer: Answer) -> Iterator[Score]:
    group = query.group
    if isinstance(query, Generate):
        assert isinstance(answer, Generated)
        yield Score(query.id, group, f"{group}/free", float(starts_with(answer.text, query.gold)))
        return
    assert isinstance(answer, Chosen)
    right, *rivals = answer.choices
    yield Score(query.id, group, f"{group}/forced", right.right / right.tokens)
    if rivals:
        yield Score(query.id, group, f"{group}/probability", float(right.logprob > rivals[0].logprob))


def joined(prompt: str, answer: str) -> str:
    """The answer as a continuation of the prompt, with exactly one blank between them."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def starts_with(text: str, right: str) -> bool:
    """Whether `text` begins with the whole word(s) `right`, ignoring case and what comes before the first letter.

    "1.5" does not begin with "1", nor "Parisian" with "Paris"; "Paris, France" does.
    """
    said, wanted = _plain(text), _plain(right)
    if not wanted or not said.startswith(wanted):
        return False
    rest = said[len(wanted) :]
    if wanted[-1].isdigit() and rest[:1] in (".", ",") and rest[1:2].isdigit():
        return False
    return not (wanted[-1].isalnum() and rest[:1].isalnum())


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    start = next((i for i, c in enumerate(folded) if c.isalnum()), 0)
    return folded[start:]


def _holding(settings: Held, name: str, value: tuple[object, ...]) -> Held:
    copy = replace(settings)
    object.__setattr__(copy, name, value)  # frozen, and no setting of the user's
    return copy
