"""CommonsenseQA: everyday questions with five options, accuracy by the likeliest answer letter.

Talmor et al., "CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge", NAACL 2019,
arXiv:1811.00937.
Data: tau/commonsense_qa on the hub: `train` (9,741 rows) gives the shots, `validation` (1,221 rows) is scored; or the
authors' train_rand_split.jsonl and dev_rand_split.jsonl, which hold the same questions in another layout.
Prompts, shots and metric of `protocol = "harness"` are those of lm-evaluation-harness 0.4.13, task `commonsense_qa`.
`protocol = "paper"` is that of Li et al., "Should We Really Edit Language Models?", NeurIPS 2024, arXiv:2410.18785, as
far as they tell it: seven shots and a generated answer. Their shots are not published; here they are the first rows of
`train`, the same for every question, and the answer counts when its line is the letter and nothing else.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmarks import common, sources
from benchmarks.sources import Placed
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Query, Score, Turn

LETTERS = ("A", "B", "C", "D", "E")
HUB = sources.Hub(
    id="tau/commonsense_qa",
    config=None,
    revision="94630fe30dad47192a8546eb75f094926d47e155",
    rows={"train": 9_741, "validation": 1_221},
)
RELEASE = {"train": "train_rand_split.jsonl", "validation": "dev_rand_split.jsonl"}
SHOTS = {"harness": 0, "paper": 7}  # the harness' own default; Table 6 of the paper
STOPS = ("\n",)


@dataclass(frozen=True, kw_only=True)
class CommonsenseQa:
    """`data`: "world" (built in), "hub" or a folder; `limit`: the first so many questions; `shots`: by protocol.

    The harness shows every question other examples, drawn by one random stream over the questions in order, so no
    prefix can be shared. `fixed_shots` shows all of them the first `shots` rows of `train` instead: much faster, and
    another protocol, which the queries' ids and `extra` say. The paper's protocol always does.
    """

    data: str = "world"
    shots: int | None = None
    limit: int | None = None
    protocol: Literal["harness", "paper"] = "harness"
    fixed_shots: bool = False
    max_tokens: int = 16  # of a generated letter

    name: ClassVar[str] = "commonsense_qa"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        common.check(shots=self.shots, limit=self.limit, max_tokens=self.max_tokens)

    def queries(self) -> Iterator[Query]:
        """One query per question, in the order of the data."""
        shots = SHOTS[self.protocol] if self.shots is None else self.shots
        wanted = ("train", "validation") if shots else ("validation",)
        tables = sources.splits(self.name, self.data, HUB, wanted, release_rows)
        pool, asked = tables.get("train", []), tables["validation"][: self.limit]
        where = f"{self.name} {self.data!r}"
        fixed = self.fixed_shots or self.protocol == "paper"
        shown: Iterable[Sequence[Placed]] = (
            [common.first(pool, shots, where)] * len(asked) if fixed else common.drawn(pool, asked, shots, where)
        )
        for number, (row, rows) in enumerate(zip(asked, shown, strict=True)):
            yield self._query(number, row, rows, fixed)

    def _query(self, number: int, row: Placed, rows: Sequence[Placed], fixed: bool) -> Query:
        texts = common.posed([turn for shown in rows for turn in example(shown)], question(row), shared=fixed)
        gold = answer_index(row)
        if self.protocol == "paper":
            return Generate(
                id=f"{self.name}/paper/{number}",
                stops=STOPS,
                gold=LETTERS[gold],
                max_tokens=self.max_tokens,
                extra={"protocol": "paper"},
                **texts,
            )
        return Choose(
            id=f"{self.name}/{'fixed/' if self.fixed_shots else ''}{number}",
            choices=tuple(f" {letter}" for letter in LETTERS),
            gold=gold,
            extra={"protocol": "fixed shots" if self.fixed_shots else "harness"},
            **texts,
        )

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: 1 when the right letter is the likeliest (harness), or is what the model says (paper)."""
        if isinstance(query, Choose):
            assert isinstance(answer, Chosen)
            right = common.best(answer) == query.gold
        else:
            assert isinstance(answer, Generated)
            right = letter(answer.text) == query.gold
        yield Score(query.id, query.group, "accuracy", float(right))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.0 if self.protocol == "paper" else 1 / len(LETTERS)}


def question(row: Placed) -> str:
    """The question as it is shown, up to "Answer:". Raises ValueError naming the field of a bad row."""
    options = zip(LETTERS, texts(row), strict=True)
    lines = "".join(f"\n{letter}. {text}" for letter, text in options)
    return f"Question: {sources.text_field(row, 'question').strip()}{lines}\nAnswer:"


def example(row: Placed) -> tuple[Turn, Turn]:
    return common.shot(question(row), LETTERS[answer_index(row)])


def letter(text: str) -> str:
    """The letter that a generated text says: its first line without blanks and punctuation, in capitals."""
    return text.split("\n")[0].translate(str.maketrans("", "", string.punctuation)).strip().upper()


def texts(row: Placed) -> list[str]:
    """The five options of a row in the hub's layout: {"label": ["A", ...], "text": [...]}."""
    choices: Any = sources.field_of(row, "choices")
    found, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not isinstance(found, list) or not all(isinstance(c, str) for c in found):
        raise ValueError(f"{row.place}: field 'choices' must hold 'label' and 'text', lists of {len(LETTERS)} texts.")
    if len(found) != len(LETTERS) or labels != list(LETTERS):
        raise ValueError(
            f"{row.place}: field 'choices' has {len(found)} texts under the labels {labels}; "
            f"{len(LETTERS)} under A to E expected."
        )
    return found


def answer_index(row: Placed) -> int:
    """Where the right option stands, from 0."""
    value = sources.text_field(row, "answerKey", "a letter A to E")
    if value not in LETTERS:
        raise ValueError(f"{row.place}: field 'answerKey' is {value!r}; a letter A to E expected.")
    return LETTERS.index(value)


def release_rows(folder: Path, split: str) -> list[Placed] | None:
    """A split of the authors' release in the hub's layout; None when `folder` holds something else."""
    path = folder / RELEASE[split]
    return list(map(_hub_row, sources.records(path))) if path.is_file() else None


def _hub_row(placed: Placed) -> Placed:
    asked: Any = sources.field_of(placed, "question")
    if not isinstance(asked, dict):
        raise ValueError(f"{placed.place}: field 'question' must be an object, not {sources.what(asked)}.")
    inner = Placed(f"{placed.place}, field 'question'", asked, placed.number)
    choices = sources.field_of(inner, "choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise ValueError(f"{inner.place}: field 'choices' must be a list of objects with 'label' and 'text'.")
    row = {
        "id": placed.row.get("id", ""),
        "question": sources.text_field(inner, "stem"),
        "question_concept": asked.get("question_concept", ""),
        "choices": {"label": [c.get("label") for c in choices], "text": [c.get("text") for c in choices]},
        "answerKey": sources.field_of(placed, "answerKey"),
    }
    return Placed(placed.place, row, placed.number)
