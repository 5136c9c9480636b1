"""GSM8K: grade-school arithmetic in words, answered by free generation, scored by the final number.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, arXiv:2110.14168.
Data: openai/gsm8k on the hub, config "main": `train` (7,473 rows) gives the shots, `test` (1,319 rows) is scored; or
the authors' train.jsonl and test.jsonl. The final number follows "#### " in the answer.
Prompts, shots, stops and both metrics are those of lm-evaluation-harness 0.4.13, task `gsm8k` (version 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from benchmarks import sources
from benchmarks.sources import Placed
from raysys.types import Answer, Generate, Generated, Query, Score

HUB = sources.Hub(
    id="openai/gsm8k",
    config="main",
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    rows={"train": 7_473, "test": 1_319},
)
STOPS = ("Question:", "</s>", "<|im_end|>")  # the end-of-text token stops too: the engine's business
SHOT_SEED = 1234  # lm-evaluation-harness' default --seed for shots
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"
IGNORED = tuple(map(re.compile, (r",", r"\$", r"(?s).*#### ", r"\.$")))  # removed one after the other


@dataclass(frozen=True, kw_only=True)
class Gsm8k:
    """`data`: "world" (built in), "hub" or a folder; `limit`: the first so many questions.

    The harness shows every question other examples, drawn by one random stream over the questions in order, so no
    prefix can be shared. `fixed_shots` shows all of them the first `shots` rows of `train` instead: much faster, and
    another protocol, which the queries' ids and `extra` say.
    """

    data: str = "world"
    shots: int = 5
    limit: int | None = None
    max_tokens: int = 256
    fixed_shots: bool = False

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots = {self.shots}: a number of examples, 0 or more, is meant")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}: a number of questions, 1 or more, or leave it out for all")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: 1 or more")

    @property
    def protocol(self) -> str:
        return "fixed shots" if self.fixed_shots else "harness"

    def queries(self) -> Iterator[Query]:
        """One query per question, in the order of the data."""
        wanted = ("train", "test") if self.shots else ("test",)
        tables = sources.splits(self.name, self.data, HUB, wanted)
        train = tables.get("train", [])
        if len(train) < self.shots:
            raise ValueError(
                f"gsm8k: {len(train)} rows in split 'train' of {self.data!r}, {self.shots} shots wanted. "
                f"Set shots = {len(train)} or complete the data."
            )
        draw = Random(SHOT_SEED)
        fixed = "".join(map(example, train[: self.shots])) if self.fixed_shots else ""
        for number, row in enumerate(tables["test"][: self.limit]):
            examples = fixed or "".join(map(example, draw.sample(train, self.shots)))
            yield Generate(
                id=f"gsm8k/{'fixed/' if self.fixed_shots else ''}{number}",
                prompt=examples + question(row),
                stops=STOPS,
                gold=final(answer_text(row)),
                max_tokens=self.max_tokens,
                shared=fixed,
                extra={"protocol": self.protocol},
            )

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: the first number after "####" (strict-match); flexible: the last number (flexible-extract)."""
        assert isinstance(query, Generate) and isinstance(answer, Generated)
        for metric, found in (("accuracy", strict(answer.text)), ("flexible", flexible(answer.text))):
            yield Score(query.id, query.group, metric, float(final(found).lower() == query.gold.lower()))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.0, "flexible": 0.0}


def question(row: Placed) -> str:
    return f"Question: {sources.text_field(row, 'question')}\nAnswer:"


def example(row: Placed) -> str:
    return f"{question(row)} {answer_text(row)}\n\n"


def answer_text(row: Placed) -> str:
    """The whole worked answer. Raises ValueError where it lacks the final number."""
    text = sources.text_field(row, "answer")
    if not STRICT.search(text):
        raise ValueError(f"{row.place}: field 'answer' must end in '#### ' and a number, not in {text[-30:]!r}.")
    return text


def strict(text: str) -> str:
    """The number after the first "#### ", as it stands."""
    match = STRICT.search(text)
    return match[1].strip() if match else NO_NUMBER


def flexible(text: str) -> str:
    """The last thing that looks like a number; "$", "." and "," count as parts of one."""
    found = FLEXIBLE.findall(text)
    return next(part for part in found[-1] if part).strip() if found else NO_NUMBER


def final(text: str) -> str:
    """What is compared: without commas, dollar signs, anything up to "#### " and one full stop at the end."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text
