"""GSM8K: grade-school arithmetic in words, answered by free generation, scored by the final number.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021, arXiv:2110.14168.
Data: openai/gsm8k on the hub, config "main": `train` (7,473 rows) gives the shots, `test` (1,319 rows) is scored; or
the authors' train.jsonl and test.jsonl. The final number follows "#### " in the answer.
Prompts, shots, stops and both metrics are those of lm-evaluation-harness 0.4.13, task `gsm8k` (version 3) and, with
`form = "cot"`, task `gsm8k_cot` (version 3): the eight chains of thought of Wei et al., NeurIPS 2022, arXiv:2201.11903,
read when they are needed. `protocol = "paper"` (Li et al., NeurIPS 2024, arXiv:2410.18785) takes these eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from benchmarks import common, exemplars, sources
from benchmarks.exemplars import Exemplar
from benchmarks.sources import Placed
from raysys.types import Answer, Generate, Generated, Query, Score, Turn

HUB = sources.Hub(
    id="openai/gsm8k",
    config="main",
    revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
    rows={"train": 7_473, "test": 1_319},
)
STOPS = ("Question:", "</s>", "<|im_end|>")  # the end-of-text token stops too: the engine's business
COT_STOPS = ("Q:", "</s>", "<|im_end|>")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
COT_STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")  # takes a digit too few where nothing follows the number
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
NO_NUMBER = "[invalid]"
IGNORED = tuple(map(re.compile, (r",", r"\$", r"(?s).*#### ", r"\.$")))  # removed one after the other


@dataclass(frozen=True, kw_only=True)
class Gsm8k:
    """`data`: "world" (built in), "hub" or a folder; `limit`: the first so many questions.

    The harness shows every question other examples, drawn by one random stream over the questions in order, so no
    prefix can be shared. `fixed_shots` shows all of them the first `shots` rows of `train` instead: much faster, and
    another protocol, which the queries' ids and `extra` say. `form = "cot"` shows everyone the same eight worked
    examples, `exemplars`: a file of them (question, target), by default the installed harness' own. `form` and `shots`
    follow the protocol unless they are given.
    """

    data: str = "world"
    shots: int | None = None
    limit: int | None = None
    max_tokens: int = 256
    fixed_shots: bool = False
    form: Literal["worked", "cot"] | None = None
    protocol: Literal["harness", "paper"] = "harness"
    exemplars: str = ""

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        common.check(shots=self.shots, limit=self.limit, max_tokens=self.max_tokens)

    @property
    def _form(self) -> str:
        return self.form or ("cot" if self.protocol == "paper" else "worked")

    def queries(self) -> Iterator[Query]:
        """One query per question, in the order of the data."""
        return self._cot() if self._form == "cot" else self._worked()

    def _worked(self) -> Iterator[Query]:
        """The rows of `train` as examples."""
        shots = 5 if self.shots is None else self.shots
        wanted = ("train", "test") if shots else ("test",)
        tables = sources.splits(self.name, self.data, HUB, wanted)
        train = tables.get("train", [])
        if len(train) < shots:
            raise ValueError(
                f"gsm8k: {len(train)} rows in split 'train' of {self.data!r}, {shots} shots wanted. "
                f"Set shots = {len(train)} or complete the data."
            )
        draw = Random(common.SHOT_SEED)
        for number, row in enumerate(tables["test"][: self.limit]):
            examples = train[:shots] if self.fixed_shots else draw.sample(train, shots)
            shown = [turn for each in examples for turn in example(each)]
            yield Generate(
                id=f"gsm8k/{'fixed/' if self.fixed_shots else ''}{number}",
                stops=STOPS,
                gold=final(answer_text(row)),
                max_tokens=self.max_tokens,
                extra={"protocol": "fixed shots" if self.fixed_shots else self.protocol},
                **common.posed(shown, question(row), shared=self.fixed_shots),
            )

    def _cot(self) -> Iterator[Query]:
        """The chains of thought as examples, the same for every question."""
        found = chains(self.exemplars)
        shots = len(found) if self.shots is None else self.shots
        if len(found) < shots:
            raise ValueError(
                f"gsm8k: {len(found)} worked examples, {shots} shots wanted. Set shots = {len(found)} or fewer."
            )
        shown = [turn for e in found[:shots] for turn in common.shot(f"Q: {e.question}\nA:", e.answer)]
        rows = sources.splits(self.name, self.data, HUB, ("test",))["test"]
        for number, row in enumerate(rows[: self.limit]):
            yield Generate(
                id=f"gsm8k/cot/{number}",
                stops=COT_STOPS,
                gold=final(answer_text(row)),
                max_tokens=self.max_tokens,
                extra={"protocol": self.protocol, "form": "cot"},
                **common.posed(shown, f"Q: {sources.text_field(row, 'question')}\nA:"),
            )

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: the first number after "####" (strict-match); flexible: the last number (flexible-extract).

        In form "cot" the strict number follows "The answer is " and has something behind it.
        """
        assert isinstance(query, Generate) and isinstance(answer, Generated)
        pattern = COT_STRICT if query.extra.get("form") == "cot" else STRICT
        for metric, found in (("accuracy", strict(answer.text, pattern)), ("flexible", flexible(answer.text))):
            yield Score(query.id, query.group, metric, float(final(found).lower() == query.gold.lower()))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.0, "flexible": 0.0}


def question(row: Placed) -> str:
    return f"Question: {sources.text_field(row, 'question')}\nAnswer:"


def example(row: Placed) -> tuple[Turn, Turn]:
    return common.shot(question(row), answer_text(row))


def answer_text(row: Placed) -> str:
    """The whole worked answer. Raises ValueError where it lacks the final number."""
    text = sources.text_field(row, "answer")
    if not STRICT.search(text):
        raise ValueError(f"{row.place}: field 'answer' must end in '#### ' and a number, not in {text[-30:]!r}.")
    return text


def chains(file: str) -> list[Exemplar]:
    """The worked examples of form "cot". Raises ValueError that says how to get them.

    `file`: records of question and target (.json, .jsonl, .parquet), or a task of the harness (.yaml); empty: that of
    the installed harness.
    """
    path, name = Path(file), "lm_eval, gsm8k/gsm8k-cot.yaml"
    if file and path.suffix not in (".yaml", ".yml"):
        rows = list(sources.records(path))
        return [Exemplar(sources.text_field(r, "question"), sources.text_field(r, "target")) for r in rows]
    found = exemplars.settings(path) if file else exemplars.harness_task("gsm8k", "gsm8k-cot.yaml")
    if found is None:
        raise ValueError(
            'gsm8k: form = "cot" needs worked examples. Set exemplars to a file of them (JSON, an object with question '
            f"and target each), or install the harness, which has them: {exemplars.INSTALL}."
        )
    return exemplars.samples(found, file or name, "question")


def strict(text: str, pattern: re.Pattern[str] = STRICT) -> str:
    """The number after the first "#### ", as it stands."""
    match = pattern.search(text)
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
