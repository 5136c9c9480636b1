"""BIG-Bench Hard: 27 subtasks that need several steps, answered by free generation.

Suzgun et al., "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them", 2022, arXiv:2210.09261.
Data: SaylorTwift/bbh on the hub, one config per subtask, split `test` (6,511 rows: 250 per subtask, but
causal_judgement 187, penguins_in_a_table 146, snarks 178); or the authors' release (bbh/<subtask>.json,
cot-prompts/<subtask>.txt); or the hub's layout. Descriptions and worked examples are read when
they are needed (`bbh_prompts.py`).
Prompts, stops, extraction (`bbh_answers.py`) and metric are those of lm-evaluation-harness 0.4.13, to the character:
`form` "cot_fewshot" is its task bbh (= bbh_cot_fewshot, version 4), the others bbh_fewshot (2), bbh_cot_zeroshot (3)
and bbh_zeroshot (3). `protocol = "paper"` (Li et al., NeurIPS 2024, arXiv:2410.18785) asks three shots with chains of
thought, which is the harness' own default.
The built-in world has five subtasks of its own, without descriptions and chains of thought: its default is "fewshot",
with the last rows of each subtask as examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from benchmarks import bbh_answers, bbh_prompts, common, sources
from benchmarks.bbh_prompts import STEPS, SUBTASKS
from benchmarks.exemplars import Exemplar
from benchmarks.sources import Placed
from raysys.names import did_you_mean
from raysys.types import Answer, Generate, Generated, Query, Score, Turn

Form = Literal["cot_fewshot", "fewshot", "cot_zeroshot", "zeroshot"]
SHOTS = 3
FEWSHOT_STOPS = ("</s>", "Q", "\n\n")  # any capital Q
ZEROSHOT_STOPS = ("</s>", "Q:", "<|im_end|>")
MAX_TOKENS: Mapping[str, int] = {"cot_fewshot": 1024}  # the other forms: the harness' default
LAST: Mapping[str, int] = {"cot_zeroshot": -1, "zeroshot": 0}  # which match of several counts
WORLD = ("boolean_expressions", "object_counting", "number_sorting", "comparison", "list_position")


@dataclass(frozen=True, kw_only=True)
class Bbh:
    """`data`: "world" (built in), "hub" or a folder; `limit`: questions per subtask; `subtasks`: all when empty.

    `exemplars`: the release's folder cot-prompts; by default that of the data folder, else the installed harness'.
    `form`, `shots` and `max_tokens` follow the protocol unless they are given.
    """

    data: str = "world"
    form: Form | None = None
    shots: int | None = None
    limit: int | None = None
    subtasks: tuple[str, ...] = ()
    exemplars: str = ""
    max_tokens: int | None = None
    protocol: Literal["harness", "paper"] = "harness"

    name: ClassVar[str] = "bbh"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        common.check(shots=self.shots, limit=self.limit, max_tokens=self.max_tokens)
        if self._zero and self.shots:
            raise ValueError(f'shots = {self.shots}: form = "{self._form}" has none; leave shots out')
        if self.data == "world" and self._form.startswith("cot_"):
            raise ValueError(
                f'bbh: form = "{self._form}" needs chains of thought, which the built-in world lacks. '
                'Take form = "fewshot" or "zeroshot", or other data.'
            )

    @property
    def _form(self) -> Form:
        return self.form or ("fewshot" if self.data == "world" else "cot_fewshot")

    @property
    def _zero(self) -> bool:
        return self._form in LAST

    def queries(self) -> Iterator[Query]:
        """One query per question: subtasks in alphabetical order, questions in the order of the data."""
        form, shots = self._form, 0 if self._zero else SHOTS if self.shots is None else self.shots
        for task, rows in self._tables().items():
            description, examples, asked = self._shown(task, rows, shots)
            shown = [Turn("system", description)] if description else []
            shown += [turn for example in examples for turn in self._example(example)]
            for number, row in enumerate(asked[: self.limit]):
                text, target = sources.text_field(row, "input"), _target(row)
                extra: dict[str, Any] = {"form": form, "protocol": self.protocol}
                if self._zero:
                    words = task in bbh_answers.SORTED
                    extra["known"] = bbh_answers.listed(text) if words else bbh_answers.options(text)
                yield Generate(
                    id=f"bbh/{form}/{task}/{number}",
                    stops=ZEROSHOT_STOPS if self._zero else FEWSHOT_STOPS,
                    gold=target,
                    max_tokens=self.max_tokens or MAX_TOKENS.get(form, 256),
                    group=task,
                    extra=extra,
                    **common.posed(shown, self._question(text)),
                )

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """accuracy: the harness' strictest filter (get-answer, strict-match or the bare reply) gives the target.

        flexible: in the zero-shot forms its flexible-extract; in "fewshot", where the harness counts the blank before
        an answer as a mistake, the same without blanks around it (not a metric of the harness).
        """
        assert isinstance(query, Generate) and isinstance(answer, Generated)
        form, text = query.extra["form"], answer.text
        if form == "cot_fewshot":
            found = {"accuracy": bbh_answers.concluded(text, bbh_answers.COT) == query.gold}
        elif form == "fewshot":
            found = {"accuracy": text == query.gold, "flexible": text.strip() == query.gold}
        else:
            strict = bbh_answers.concluded(text, bbh_answers.STRICT) if form == "cot_zeroshot" else text
            loose = bbh_answers.extracted(query.group, text, LAST[form], query.extra["known"])
            gold = bbh_answers.normal(query.gold)
            found = {"accuracy": bbh_answers.normal(strict) == gold, "flexible": bbh_answers.normal(loose) == gold}
        for metric, right in found.items():
            yield Score(query.id, query.group, metric, float(right))

    def chance(self) -> Mapping[str, float]:
        return {"accuracy": 0.0}

    def _question(self, text: str) -> str:
        steps = {"cot_fewshot": f" {STEPS}\n", "cot_zeroshot": f" {STEPS}"}.get(self._form, "")
        return f"Q: {text}\nA:{steps}"

    def _example(self, example: Exemplar) -> tuple[Turn, Turn]:
        return common.shot(self._question(example.question), example.answer, "" if self._form == "cot_fewshot" else " ")

    def _shown(self, task: str, rows: list[Placed], shots: int) -> tuple[str, Sequence[Exemplar], list[Placed]]:
        """The description, `shots` examples in this form, and the rows that are asked."""
        if self.data == "world":
            last = len(rows) - shots
            if last < 1:
                raise ValueError(f"bbh {task!r}: {shots} shots of {len(rows)} rows leave no question; lower shots.")
            return "", [Exemplar(sources.text_field(r, "input"), _target(r)) for r in rows[last:]], rows[:last]
        found = bbh_prompts.prompts(task, self.data, self.exemplars)
        if len(found.examples) < shots:
            raise ValueError(
                f"bbh {task!r}: {len(found.examples)} worked examples, {shots} shots wanted. "
                f"Set shots = {len(found.examples)} or fewer."
            )
        examples = found.examples[:shots]
        if self._form == "fewshot":
            examples = tuple(Exemplar(e.question, bbh_prompts.short(e.answer)) for e in examples)
        return found.description, examples, rows

    def _tables(self) -> dict[str, list[Placed]]:
        """The rows of each wanted subtask."""
        if self.data == "world":
            return sources.splits(self.name, "world", bbh_prompts.hub("snarks"), self._wanted(WORLD))
        if self.data == "hub":
            return {task: sources.from_hub(bbh_prompts.hub(task), "test") for task in self._wanted(SUBTASKS)}
        files = _files(self.name, self.data)
        tables = {}
        for task in self._wanted(tuple(files)):
            rows = [row for file in files[task] for row in _records(file)]
            if not rows:
                raise ValueError(f"{files[task][0]}: no rows; is the download complete?")
            tables[task] = rows
        return tables

    def _wanted(self, there: Sequence[str]) -> list[str]:
        for task in self.subtasks:
            if task not in there:
                raise ValueError(f"bbh: no subtask {task!r} in {self.data!r}{did_you_mean(task, set(there))}")
        return sorted(self.subtasks or there)


def _target(row: Placed) -> str:
    text = sources.text_field(row, "target")
    if not text.strip():
        raise ValueError(f"{row.place}: field 'target' is empty; complete the record or remove it.")
    return text


def _files(name: str, data: str) -> dict[str, list[Path]]:
    """The files of each subtask in a folder: the release's bbh/<subtask>.json or the hub's <subtask>/test-*.parquet."""
    folder = Path(data)
    if not folder.is_dir():
        sources.splits(name, data, bbh_prompts.hub("snarks"), ("test",))  # says that there is no such folder
    found: dict[str, list[Path]] = {}
    for task in SUBTASKS:
        released = [p for place in (folder / "bbh", folder) if (p := place / f"{task}.json").is_file()]
        if files := released[:1] or sources.split_files(folder / task, "test"):
            found[task] = files
    if not found:
        raise ValueError(
            f"bbh: {folder} has no subtask. Looked for bbh/<subtask>.json (the original release) and "
            "<subtask>/test-*.parquet, test.jsonl or test.json (the hub's layout)."
        )
    return found


def _records(path: Path) -> Iterator[Placed]:
    """The rows of a file: the release's JSON object with a list `examples`, or any format of the hub's layout."""
    text = sources.decoded(path).lstrip() if path.suffix == ".json" else ""
    if not text.startswith("{") or path.stem not in SUBTASKS:
        yield from sources.records(path)
        return
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON at line {error.lineno} ({error.msg}); download it again.") from error
    rows = sources.field_of(Placed(str(path), whole), "examples")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: field 'examples' must be a list of objects, not {sources.what(rows)}.")
    for number, row in enumerate(rows, 1):
        place = f"{path}, record {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a JSON object is expected, not {sources.what(row)}.")
        yield Placed(place, row, number)
