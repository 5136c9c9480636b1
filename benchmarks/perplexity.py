"""Perplexity of a text that no edit is about: does the model still expect ordinary language?

Passages of running text, each scored whole after the token that begins a text (BOS, or EOS where a model has none):
nats per token, the logarithm of the perplexity. It is comparable between snapshots of one model, not between models
with different tokenizers.

Data: WikiText-2 (Merity et al., "Pointer Sentinel Mixture Models", ICLR 2017, arXiv:1609.07843), hub
Salesforce/wikitext, config wikitext-2-raw-v1, revision b08601e, test split (4,358 rows, a line of an article each); or
any text file; or documents of the built-in world, drawn with a seed that nothing else uses (their facts are those of
the world, which the built-in model knows).

Passages are cut out of the running text at blanks: `words` words each, fewer where these would have more than `words`
times 8 bytes. A tokenizer on bytes makes at most as many tokens, so that the default fits a window of 512 whatever the
language. Nothing is cut later: a passage longer than a model's window is a fault of the study, to be met with fewer
`words`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from benchmarks import sources
from benchmarks.common import check
from raysys.types import Answer, Choose, Chosen, Query, Score

HUB = sources.Hub(
    id="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    rows={"test": 4_358},
)
BYTES = 8  # a word, at most, on average over a passage
HELD_OUT = 20_240  # seed of the world's documents
DOCUMENTS = 2_000  # of the world, which are short


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Metric nats_per_token, not in [0, 1]; lower is better.

    `data`: "world" (built in), "hub", a text file (UTF-8), or a folder in the hub's layout. `words`: of a passage;
    `limit`: passages, spread evenly over the text.
    """

    data: str = "world"
    words: int = 60
    limit: int | None = 200

    name: ClassVar[str] = "perplexity"
    version: ClassVar[str] = "1"
    chat: ClassVar[bool] = False  # plain text, never put through a chat template
    ability: ClassVar[bool] = False  # no share of right answers, so no part of the edit budget
    units: ClassVar[Mapping[str, str]] = {"nats_per_token": "nats"}
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"nats_per_token"})

    def __post_init__(self) -> None:
        check(limit=self.limit)
        if self.words < 2:
            raise ValueError(f"words = {self.words}: words of a passage, 2 or more")

    def queries(self) -> Iterator[Query]:
        """Passage by passage, each the only choice after nothing."""
        found = list(dict.fromkeys(passages(self._texts(), self.words)))
        if not found:
            raise ValueError(
                f"perplexity: {self.data!r} has no passage of {self.words} words. Lower `words`, or give a longer text."
            )
        count = min(len(found), self.limit or len(found))
        for number in range(count):
            yield Choose(f"perplexity/{number}", "", (found[number * len(found) // count],), gold=0)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """Minus the log-probability of the passage over its tokens, NaN where the model computes none."""
        assert isinstance(answer, Chosen)
        [passage] = answer.choices
        yield Score(query.id, query.group, "nats_per_token", -passage.logprob / passage.tokens)

    def chance(self) -> Mapping[str, float]:
        return {}

    def _texts(self) -> Iterable[str]:
        path = Path(self.data)
        if self.data == "world":
            documents: Sequence[str] = import_module("benchmarks.world").corpus(DOCUMENTS, HELD_OUT)
            return documents
        if path.is_file():
            return [sources.decoded(path)]
        rows = sources.splits(self.name, self.data, HUB, ("test",))["test"]
        return ["".join(sources.text_field(row, "text") for row in rows)]


def passages(texts: Iterable[str], words: int) -> Iterator[str]:
    """Each text cut at blanks into passages of `words` words, or of fewer that would else be too long; blanks within a
    passage are as in the text. What is left at a text's end counts when it has half of `words`; a short text does too.
    """
    most = words * BYTES
    for text in texts:
        spans = [m.span() for m in re.finditer(r"\S+", text)]
        first = 0
        while first < len(spans):
            end = first + 1
            start = spans[first][0]
            while end < min(first + words, len(spans)) and len(text[start : spans[end][1]].encode()) <= most:
                end += 1
            passage = text[start : spans[end - 1][1]]
            if first == 0 or end < len(spans) or 2 * (end - first) >= words:
                yield passage.encode()[:most].decode(errors="ignore")
            first = end
