"""What became of the edits (`Probes`) and of facts nobody edited (`Locality`).

Each question is put in two ways. *Forced*: the right answer and its rival are scored as continuations, token by token,
as ROME's authors do (Meng et al., NeurIPS 2022, arXiv:2202.05262, section 3.4) and EasyEdit's (Wang et al.,
arXiv:2308.07269: the share of tokens that are the likeliest, those before them given). *Free*: the model answers
greedily in its own words, which is what a user sees: nothing of the answer is given, neither words nor length. The
first can look perfect where the second has collapsed (Yang et al., "The Mirage of Model Editing", ACL 2025,
arXiv:2502.11177: 96.8 % against 38.5 %).

That paper's protocol (its code: the prompt alone, greedy, at most 50 tokens, to the first "." or line break; a language
model judges the text, or else it equals the answer but for case, punctuation and articles) is `exact = true,
max_tokens = 50`. K/free itself is its judge's substitute: the text, to the end of its line, must begin with the answer
as whole words, and what follows is no matter. That forgives "Paris, France", as a judge does, and also a text that goes
on and contradicts itself, as a judge does not; it does not forgive "The answer is Paris".
"""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import ClassVar, TypeVar

from raysys.types import Answer, Choose, Chosen, EditCase, Generate, Generated, Probe, ProbeKind, Query, Score, Scored

GROUPS: Mapping[ProbeKind, str] = {
    "rewrite": "efficacy",
    "paraphrase": "paraphrase",
    "neighbourhood": "neighbourhood",
    "portability": "portability",
    "multi_hop": "multi_hop",
}
KNOWN = "known"  # the group of facts nobody edited
SHORT = 2  # characters up to which an alias ("de", "NA") must be all that is said


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Efficacy, paraphrase, neighbourhood, portability and multi_hop of every edit, each a group of its own.

    Metrics, for a group K: K/probability (1 when the right answer is likelier than its rival, where there is one),
    K/forced (share of the right answer's tokens that are the argmax), K/free (1 when the greedy text starts with the
    right answer, or with an alias of it). Two more when asked for: K/magnitude, in [-1, 1], P(right) - P(rival), as
    ROME's tables have it ("EM", "PM", "NM"); K/exact, the free text by the rule of arXiv:2502.11177 (see above).

    `length_norm`: what a probability is, in K/probability and K/magnitude. False: that of the whole answer, the
    log-probabilities of its tokens summed, as the equations of ROME and MEMIT write it. True: exp of their mean over
    the answer's tokens, which is what the published code of both computes (and the tables they print), so that a longer
    answer is not less likely for its length.

    A neighbourhood prompt that some other edit of the stream changes is left out: its old answer is no longer right.
    So is a question that rests on an edit which the stream lacks, or on a fact which it edits; one that rests on
    several edits belongs to the last of them that is made.
    """

    free: bool = True
    max_tokens: int | None = None  # of a free answer; None: by the length of the right one, at least 12
    length_norm: bool = False
    magnitude: bool = False
    exact: bool = False

    name: ClassVar[str] = "probes"
    about: ClassVar[str] = "edits"  # given to `over`: the cases, in the order in which they are edited
    chat: ClassVar[bool] = False  # plain text, as it was edited: never put through a chat template
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
        edited = {c.request.text for c in self.cases}
        positions = {c.request.id: n for n, c in enumerate(self.cases, 1)}
        for position, case in enumerate(self.cases, 1):
            for number, probe in enumerate(case.probes):
                if probe.kind == "neighbourhood" and probe.prompt in changed:
                    continue
                if not positions.keys() >= set(probe.needs) or edited & set(probe.keeps):
                    continue
                last = max((position, *(positions[n] for n in probe.needs)))
                where = f"probes/{case.request.id}/{number}"
                yield from _asked(where, probe, GROUPS[probe.kind], last, self.free, self.max_tokens)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """The metrics that the answer to one of the two ways of asking gives."""
        yield from _scores(query, answer, self.length_norm)
        if self.magnitude and isinstance(answer, Chosen) and len(answer.choices) > 1:
            right, rival = (math.exp(_logprob(c, self.length_norm)) for c in answer.choices[:2])
            yield Score(query.id, query.group, f"{query.group}/magnitude", right - rival)
        if self.exact and isinstance(answer, Generated):
            held = any(equals(answer.text, right) for right in _right(query))
            yield Score(query.id, query.group, f"{query.group}/exact", float(held))

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
    chat: ClassVar[bool] = False  # plain text, beside what was edited: never put through a chat template
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
        gold = [probe.right, *probe.aliases] if probe.aliases else probe.right
        tokens = max_tokens or max(map(enough, (probe.right, *probe.aliases)))
        yield Generate(f"{where}/free", probe.prompt, ("\n",), gold, max_tokens=tokens, group=group, edit=edit)


def enough(answer: str) -> int:
    """Tokens in which `answer` can be said, at two bytes a token and some to spare; few different values."""
    tokens = 12
    while tokens < len(answer.encode()) // 2 + 4:
        tokens *= 2
    return tokens


def _scores(query: Query, answer: Answer, length_norm: bool = False) -> Iterator[Score]:
    group = query.group
    if isinstance(query, Generate):
        assert isinstance(answer, Generated)
        right, *aliases = _right(query)
        held = starts_with(answer.text, right) or any(named(answer.text, alias) for alias in aliases)
        yield Score(query.id, group, f"{group}/free", float(held))
        return
    assert isinstance(answer, Chosen)
    first, *rivals = answer.choices
    yield Score(query.id, group, f"{group}/forced", first.right / first.tokens)
    if rivals:
        likelier = _logprob(first, length_norm) > _logprob(rivals[0], length_norm)
        yield Score(query.id, group, f"{group}/probability", float(likelier))


def _right(query: Query) -> list[str]:
    """The right answer of a free question and its aliases."""
    gold = query.gold
    return list(gold) if isinstance(gold, list) else [str(gold)]


def _logprob(choice: Scored, length_norm: bool) -> float:
    """Of an answer, in nats: the sum over its tokens, or their mean."""
    return choice.logprob / choice.tokens if length_norm else choice.logprob


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


def named(text: str, alias: str) -> bool:
    """Whether `text` begins with `alias`, or is no more than that where the alias is as short as a code of letters."""
    return starts_with(text, alias) if len(alias) > SHORT else equals(text, alias)


def equals(text: str, right: str) -> bool:
    """Whether `text`, to its first full stop or line break, is `right` but for case, ASCII punctuation and articles.

    An answer that has a full stop itself ("Washington D.C.") is also compared with the whole text.
    """
    cut = min((n for n in (text.find("\n"), text.find(".")) if n >= 0), default=len(text))
    wanted = _bare(right)
    return bool(wanted) and wanted in (_bare(text[:cut]), _bare(text) if "." in right else "")


def _bare(text: str) -> str:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in letters.split() if word not in ("a", "an", "the"))


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold().strip()
    start = next((i for i, c in enumerate(folded) if c.isalnum()), 0)
    return folded[start:]


def _holding(settings: Held, name: str, value: tuple[object, ...]) -> Held:
    copy = replace(settings)
    object.__setattr__(copy, name, value)  # frozen, and no setting of the user's
    return copy
