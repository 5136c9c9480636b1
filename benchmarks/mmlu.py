"""MMLU: 57 subjects, four options, accuracy by the likeliest answer letter (or option, or by a generated letter).

Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021, arXiv:2009.03300.
Data: cais/mmlu on the hub, config "all": `dev` (285 rows) gives the shots, `test` (14,042 rows) is scored; or the
authors' release (dev/<subject>_dev.csv, test/<subject>_test.csv; no header; question, four options, letter).
Prompts, shots and metric are those of lm-evaluation-harness 0.4.13, to the character: `form` "letters" is its task
`mmlu`, "continuation" `mmlu_continuation` (the likeliest option's text), "generative" `mmlu_generative` (a letter is
generated). `protocol = "paper"` (Li et al., NeurIPS 2024, arXiv:2410.18785: five shots, generated) takes the last one.
"""

from __future__ import annotations

import csv
import io
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from benchmarks import common, sources
from benchmarks.sources import Placed
from raysys.names import did_you_mean
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Query, Score, Turn

LETTERS = ("A", "B", "C", "D")
STOPS = ("</s>", "\n")  # of the generative form
BARE = str.maketrans("", "", string.punctuation)  # ASCII punctuation in a generated letter is not compared
HUB = sources.Hub(
    id="cais/mmlu",
    config="all",
    revision="c30699e8356da336a370243923dbaf21066bb9fe",
    rows={"dev": 285, "test": 14_042},
)
CATEGORIES: Mapping[str, tuple[str, ...]] = {  # the authors' four; a score of one is the mean over its questions
    "stem": (
        "abstract_algebra", "astronomy", "anatomy", "college_biology", "college_chemistry", "college_computer_science",
        "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
    ),
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
        "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy",
        "prehistory", "professional_law", "world_religions",
    ),
    "social_sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
        "high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology",
        "public_relations", "security_studies", "sociology", "us_foreign_policy",
    ),
    "other": (
        "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management",
        "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
        "professional_medicine", "virology",
    ),
}  # fmt: skip
CATEGORY: Mapping[str, str] = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects}


class Item(NamedTuple):
    """A checked row: its question as letters are asked for, the index of the right option, question and options."""

    text: str
    answer: int
    question: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Mmlu:
    """`data`: "world" (built in), "hub" or a folder; `limit`: questions per subject; `subjects`: all when empty.

    `form` follows the protocol unless it is given: "letters" for the harness', "generative" for the paper's.
    """

    data: str = "world"
    shots: int = 5  # as in the paper; lm-evaluation-harness itself defaults to none
    limit: int | None = None
    subjects: tuple[str, ...] = ()
    form: Literal["letters", "continuation", "generative"] | None = None
    protocol: Literal["harness", "paper"] = "harness"

    name: ClassVar[str] = "mmlu"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"shots = {self.shots}: a number of examples, 0 or more, is meant")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit}: questions per subject, 1 or more, or leave it out for all")

    @property
    def _form(self) -> str:
        return self.form or ("generative" if self.protocol == "paper" else "letters")

    def queries(self) -> Iterator[Query]:
        """One query per question: subjects in alphabetical order, questions in the order of the data."""
        wanted = ("dev", "test") if self.shots else ("test",)
        tables = sources.splits(self.name, self.data, HUB, wanted, self._original)
        dev, test = by_subject(tables.get("dev", [])), by_subject(tables["test"])
        self._check_subjects(set(test))
        for subject in sorted(self.subjects or test):
            examples = [item(row) for row in dev.get(subject, [])[: self.shots]]
            if len(examples) < self.shots:
                raise ValueError(
                    f"mmlu {subject!r}: {len(examples)} rows in split 'dev' of {self.data!r}, {self.shots} shots "
                    f"wanted. Set shots = {len(examples)} or complete the data."
                )
            shown = [Turn("system", self._header(subject)), *(turn for e in examples for turn in self._example(e))]
            for number, row in enumerate(test[subject][: self.limit]):
                yield self._query(subject, number, shown, item(row))

    def _query(self, subject: str, number: int, shown: Sequence[Turn], asked: Item) -> Query:
        extra = {"category": CATEGORY.get(subject, "")}
        if self._form == "letters":
            return Choose(
                id=f"mmlu/{subject}/{number}",
                choices=tuple(f" {letter}" for letter in LETTERS),
                gold=asked.answer,
                group=subject,
                extra=extra,
                **common.posed(shown, asked.text),
            )
        extra |= {"form": self._form, "protocol": self.protocol}
        if self._form == "continuation":
            return Choose(
                id=f"mmlu/continuation/{subject}/{number}",
                choices=tuple(f" {option}" for option in asked.options),
                gold=asked.answer,
                group=subject,
                extra=extra,
                **common.posed(shown, f"Question: {asked.question}\nAnswer:"),
            )
        return Generate(
            id=f"mmlu/generative/{subject}/{number}",
            stops=STOPS,
            gold=LETTERS[asked.answer],
            group=subject,
            extra=extra,
            **common.posed(shown, asked.text),
        )

    def _header(self, subject: str) -> str:
        """What comes before the examples."""
        return header(subject).replace("multiple choice ", "") if self._form == "continuation" else header(subject)

    def _example(self, shown: Item) -> tuple[Turn, Turn]:
        if self._form == "continuation":
            return common.shot(f"Question: {shown.question}\nAnswer:", shown.options[shown.answer])
        return common.shot(shown.text, LETTERS[shown.answer])

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: 1 when the right letter (or option, or generated letter) is given; ties go to the earlier one.

        accuracy_norm, in form "continuation": the same by log-probability per character of the option.
        """
        if isinstance(query, Generate):
            assert isinstance(answer, Generated)
            said = answer.text.partition("\n")[0].strip().lower().translate(BARE)
            yield Score(query.id, query.group, "accuracy", float(said == query.gold.lower()))
            return
        assert isinstance(answer, Chosen)
        yield Score(query.id, query.group, "accuracy", float(answer.best == query.gold))
        if query.extra.get("form") == "continuation":
            lengths = [max(len(choice) - 1, 1) for choice in query.choices]  # the blank before an option isn't counted
            chosen = common.best(answer, lambda i, logprob: logprob / lengths[i])
            yield Score(query.id, query.group, "accuracy_norm", float(chosen == query.gold))

    def chance(self) -> Mapping[str, float]:
        guess = 1 / len(LETTERS)
        return {"accuracy": guess} | ({"accuracy_norm": guess} if self._form == "continuation" else {})

    def _original(self, folder: Path, split: str) -> list[Placed] | None:
        """The authors' release, only the subjects that are needed; None when `folder` holds something else."""
        end = f"_{split}.csv"
        files = {path.name.removesuffix(end): path for path in sorted((folder / split).glob(f"*{end}"))}
        if not files:
            return None
        self._check_subjects(set(files))
        chosen = self.subjects or tuple(files)
        return [row for subject in chosen for row in release_rows(files[subject], subject)]

    def _check_subjects(self, there: set[str]) -> None:
        for subject in self.subjects:
            if subject not in there:
                raise ValueError(f"mmlu: no subject {subject!r} in {self.data!r}{did_you_mean(subject, there)}")


def header(subject: str) -> str:
    """What comes before the examples."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def by_subject(rows: list[Placed]) -> dict[str, list[Placed]]:
    """The rows of each subject, in their order."""
    grouped: dict[str, list[Placed]] = {}
    for row in rows:
        grouped.setdefault(sources.text_field(row, "subject"), []).append(row)
    return grouped


def item(row: Placed) -> Item:
    """Check a row (question, choices: four texts, answer: 0-3 or a letter). Raises ValueError naming the field."""
    question = sources.text_field(row, "question")
    choices = sources.field_of(row, "choices")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices) or len(choices) != len(LETTERS):
        count = f"{len(choices)} entries" if isinstance(choices, list) else type(choices).__name__
        raise ValueError(f"{row.place}: field 'choices' must be a list of {len(LETTERS)} texts, not {count}.")
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))
    return Item(question.strip() + options + "\nAnswer:", _answer(row), question.strip(), tuple(choices))


def _answer(row: Placed) -> int:
    value: Any = sources.field_of(row, "answer")
    if isinstance(value, str) and value in LETTERS:
        return LETTERS.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(LETTERS):
        return value
    raise ValueError(f"{row.place}: field 'answer' is {value!r}; 0 to {len(LETTERS) - 1} or a letter A to D expected.")


def release_rows(path: Path, subject: str) -> Iterator[Placed]:
    """The rows of one CSV of the authors' release, in the hub's layout. Quoted fields may hold line breaks."""
    reader = csv.reader(io.StringIO(sources.decoded(path), newline=""), strict=True)
    number = 0
    try:
        for cells in reader:
            number += 1
            place = f"{path}, record {number} (line {reader.line_num})"
            if len(cells) != len(LETTERS) + 2:
                raise ValueError(
                    f"{place}: {len(cells)} columns, {len(LETTERS) + 2} expected (question, four options, letter); "
                    "is a comma or line break unquoted?"
                )
            if cells[-1] not in LETTERS:
                raise ValueError(f"{place}: column 6 (the answer) is {cells[-1]!r}; a letter A to D expected.")
            answer = LETTERS.index(cells[-1])
            row = {"question": cells[0], "choices": cells[1:-1], "answer": answer, "subject": subject}
            yield Placed(place, row, number)
        if not number:
            raise ValueError(f"{path}: no records; is the download complete?")
    except csv.Error as error:
        raise ValueError(f"{path}, record {number + 1} (line {reader.line_num}): broken CSV ({error}).") from error
