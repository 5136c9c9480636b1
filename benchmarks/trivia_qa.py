"""TriviaQA without documents: quiz questions answered from memory, right when any alias of the answer is said.

Joshi et al., "TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading Comprehension", ACL 2017,
arXiv:1705.03551.
Data: mandarjoshi/trivia_qa on the hub, config "rc.nocontext": `train` (138,384 rows) gives the shots, `validation`
(17,944 rows) is scored. Or topics.dpr.trivia.dev.txt, the 8,837 questions that Karpukhin et al. (DPR, EMNLP 2020,
arXiv:2004.04906) held out for development: tab-separated, a question and a Python list of aliases, either of them in
CSV quotes where it holds a quotation mark (questions often twice over). These are other questions than the hub's
validation split, and they come without training questions, so without shots.
Prompts, shots, stops and metric are those of lm-evaluation-harness 0.4.13, task `triviaqa` (version 3): its template
puts a question mark behind every question, also behind those that end in one. `protocol = "paper"` (Li et al.,
NeurIPS 2024, arXiv:2410.18785: no shots, generated) asks the same questions in the same way.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmarks import common, sources
from benchmarks.sources import Placed
from raysys.types import Answer, Generate, Generated, Query, Score, Turn

HUB = sources.Hub(
    id="mandarjoshi/trivia_qa",
    config="rc.nocontext",
    revision="0f7faf33a3908546c6fd5b73a660e0f8ff173c2f",
    rows={"train": 138_384, "validation": 17_944},
)
DPR = "topics.dpr.trivia.dev.txt"
STOPS = ("\n", ".", ",")
BARE = str.maketrans("", "", string.punctuation)  # ASCII punctuation is not compared


@dataclass(frozen=True, kw_only=True)
class TriviaQa:
    """`data`: "world" (built in), "hub" or a folder; `limit`: the first so many questions.

    With `shots` the harness shows every question other examples, drawn by one random stream over the questions in
    order. `fixed_shots` (and the paper's protocol) shows all of them the first `shots` rows of `train` instead: much
    faster, and another protocol, which the queries' ids and `extra` say.
    """

    data: str = "world"
    shots: int = 0  # the harness' own default, and the paper's
    limit: int | None = None
    max_tokens: int = 256
    protocol: Literal["harness", "paper"] = "harness"
    fixed_shots: bool = False

    name: ClassVar[str] = "trivia_qa"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        common.check(shots=self.shots, limit=self.limit, max_tokens=self.max_tokens)

    def queries(self) -> Iterator[Query]:
        """One query per question, in the order of the data."""
        wanted = ("train", "validation") if self.shots else ("validation",)
        tables = sources.splits(self.name, self.data, HUB, wanted, dpr_rows)
        pool, asked = tables.get("train", []), tables["validation"][: self.limit]
        where = f"{self.name} {self.data!r}"
        fixed = self.fixed_shots or self.protocol == "paper"
        shown: Iterable[Sequence[Placed]] = (
            [common.first(pool, self.shots, where)] * len(asked)
            if fixed
            else common.drawn(pool, asked, self.shots, where)
        )
        protocol = "fixed shots" if self.fixed_shots and self.protocol == "harness" else self.protocol
        part = {"fixed shots": "fixed/", "paper": "paper/"}.get(protocol, "")
        for number, (row, rows) in enumerate(zip(asked, shown, strict=True)):
            yield Generate(
                id=f"{self.name}/{part}{number}",
                stops=STOPS,
                gold=list(aliases(row)),
                max_tokens=self.max_tokens,
                extra={"protocol": protocol},
                **common.posed([turn for r in rows for turn in example(r)], question(row), shared=fixed),
            )

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: 1 when the text is one of the aliases, but for case, ASCII punctuation and blanks around it."""
        assert isinstance(query, Generate) and isinstance(answer, Generated)
        said = bare(answer.text.strip())
        yield Score(query.id, query.group, "accuracy", float(any(said == bare(alias) for alias in query.gold)))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.0}


def question(row: Placed) -> str:
    return f"Question: {sources.text_field(row, 'question')}?\nAnswer:"


def example(row: Placed) -> tuple[Turn, Turn]:
    return common.shot(question(row), aliases(row)[0])


def bare(text: str) -> str:
    """What is compared. Blanks that punctuation leaves behind stay, as in the harness."""
    return text.lower().translate(BARE)


def aliases(row: Placed) -> tuple[str, ...]:
    """Everything that counts as the answer; the first alias is what an example shows."""
    answer: Any = sources.field_of(row, "answer")
    if not isinstance(answer, dict):
        raise ValueError(f"{row.place}: field 'answer' must be an object with 'aliases', not {sources.what(answer)}.")
    found = sources.field_of(Placed(f"{row.place}, field 'answer'", answer, row.number), "aliases")
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise ValueError(f"{row.place}: 'aliases' of field 'answer' must be a list of one or more texts.")
    return tuple(found)


# --- DPR's file ------------------------------------------------------------------------------------------------------


def dpr_rows(folder: Path, split: str) -> list[Placed] | None:
    """The questions of DPR's file in the hub's layout; None when `folder` holds something else."""
    path = folder / DPR
    if not path.is_file():
        return None
    if split == "train":
        raise ValueError(f"trivia_qa: {path} has no split 'train' to draw shots from. Set shots = 0.")
    lines = sources.decoded(path).split("\n")
    return [_dpr_row(path, number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


def _dpr_row(path: Path, number: int, line: str) -> Placed:
    place = f"{path}, line {number}"
    cells = line.split("\t")
    if len(cells) != 2:
        raise ValueError(f"{place}: {len(cells)} columns, 2 expected (a question, a tab, a list of aliases).")
    try:
        found = ast.literal_eval(_unquoted(cells[1]))
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{place}: column 2 (the aliases) is no list of texts, but {cells[1][:40]!r}.") from error
    return Placed(place, {"question": _unquoted(cells[0]), "answer": {"aliases": found}}, number)


def _unquoted(text: str) -> str:
    """A cell without its CSV quotes, however often they were put around it.

    A quotation mark at both ends is CSV's own only where every mark between them is doubled.
    """
    while len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        text = text[1:-1].replace('""', '"')
    return text
