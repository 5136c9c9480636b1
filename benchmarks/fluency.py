"""Fluency: does the model still write, or does it repeat itself? n-gram entropy of what it says after an edit's prompt.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262 (GE, "generation
entropy"; the measure is Zhang et al.'s, NeurIPS 2018, arXiv:1809.05972); MEMIT, ICLR 2023, arXiv:2210.07229, reports
the same. With H_n the entropy in bits of a text's n-grams of words, a text is worth (2/3 H_2 + 4/3 H_3) / 2. The text
is prompt and continuation, as in ROME's code; its tables show a hundred times the value.

What differs: the text is greedy (ROME samples among the five likeliest tokens, so that its figures are higher and vary
with the seed), it follows the edit's own prompt (ROME: CounterFact's `generation_prompts`), and its words are runs of
letters, digits and what stands within them, other signs each for itself (ROME: NLTK's tokenizer). The figures of one
study can be compared with each other, not with a paper's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from benchmarks.common import check
from raysys.types import Answer, EditCase, Generate, Generated, Query, Score

WEIGHTS: Mapping[int, float] = {2: 2 / 3, 3: 4 / 3}  # n -> weight of the entropy of n-grams
WORD = re.compile(r"\w+(?:['’.,-]\w+)*|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """Metric ngram_entropy_bits, not in [0, 1]: 0 for one word again and again, the higher the less is repeated.

    `max_tokens`: how much is written. `limit`: only the first so many edits.
    """

    max_tokens: int = 100  # ROME writes to 100 tokens, the prompt's included
    limit: int | None = None

    name: ClassVar[str] = "fluency"
    about: ClassVar[str] = "edits"  # given to `over`: the cases, in the order in which they are edited
    chat: ClassVar[bool] = False  # plain text, as it was edited: never put through a chat template
    version: ClassVar[str] = "1"
    ability: ClassVar[bool] = False  # no share of right answers, so no part of the edit budget
    units: ClassVar[Mapping[str, str]] = {"ngram_entropy_bits": "bits"}

    cases: tuple[EditCase, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        check(max_tokens=self.max_tokens, limit=self.limit)

    def over(self, cases: Sequence[EditCase]) -> Fluency:
        """These settings for the edits `cases`, in the order in which they are made."""
        copy = replace(self)
        object.__setattr__(copy, "cases", tuple(cases[: self.limit]))  # frozen, and no setting of the user's
        return copy

    def queries(self) -> Iterator[Query]:
        """Edit by edit; `edit` is its position, from 1. `gold` is the prompt, which belongs to the text."""
        for position, case in enumerate(self.cases, 1):
            text = case.request.text
            where = f"fluency/{case.request.id}"
            yield Generate(where, text, (), text, max_tokens=self.max_tokens, group="fluency", edit=position)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """The entropy of prompt and continuation, in bits."""
        assert isinstance(query, Generate) and isinstance(answer, Generated)
        yield Score(query.id, query.group, "ngram_entropy_bits", ngram_entropy(query.gold + answer.text))

    def chance(self) -> Mapping[str, float]:
        return {}


def ngram_entropy(text: str) -> float:
    """The weighted mean of the entropies of a text's 2-grams and 3-grams of words, in bits."""
    words = WORD.findall(text)
    return sum(weight * entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def entropy(words: Sequence[str], n: int) -> float:
    """Of the distribution of the `n`-grams of `words`, in bits; 0 where there are none."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0
