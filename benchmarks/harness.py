"""Any task of lm-evaluation-harness that is installed, or your own in its YAML: asked and scored as lm_eval does it.

Gao et al., "The Language Model Evaluation Harness", github.com/EleutherAI/lm-evaluation-harness (the extra `harness`).
Prompts come from lm_eval's own requests, scores from the task's own filters and metrics, item by item. A record travels
as its number and a digest: whoever scores loads the task again, so lm_eval and the data must be there on every machine.

Scores here belong to single questions, since edited and unedited model are compared on each. A metric that is one
figure for the whole corpus (f1, perplexity, bleu as lm_eval aggregates them), no share between 0 and 1, or better when
it is lower, is refused by its name: list the others in `metrics`. The mean of a group is over all its questions.

A question whose choices stand in the prompt (winogrande) is asked as differences: log P(rest and answer) minus
log P(rest), both behind what the prompts share; where they share nothing, behind the token that begins a text. That is
lm_eval's number but in that last case, where no token begins a prompt otherwise, and under a chat template.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from benchmarks import common, harness_tasks
from benchmarks.harness_tasks import why
from raysys.names import did_you_mean
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Query, Score, Scored, Turn

LIKELIHOOD = "loglikelihood"
PROBE = (0.0, 1.0, 1.0, 0.25, 0.5, 1.0, 0.0)  # a metric's aggregate of these tells whether it is their mean
SCORING = ("metric_list", "filter_list", "repeats", "process_results")  # of a task's settings
WORTH_SHARING = 64  # characters

Measured = dict[tuple[str, str], Any]  # (metric, filter) -> value of one record


@dataclass(frozen=True, kw_only=True)
class Harness:
    """`task`: a task, group or tag of lm_eval, a YAML file, or a folder of them; `limit`: questions of each task.

    `shots`: examples before every question (default: the task's; a task with 0 of its own keeps them). `metrics`:
    only these (default: all). `greedy`: answer greedily where a task samples.
    """

    task: str
    shots: int | None = None
    limit: int | None = None
    metrics: tuple[str, ...] = ()
    greedy: bool = False

    name: ClassVar[str] = "harness"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        common.check(shots=self.shots, limit=self.limit)
        if not self.task:
            raise ValueError('task = "": name a task of lm-evaluation-harness, such as "arc_easy", or a YAML file')

    def queries(self) -> Iterator[Query]:
        """Task by task, record by record. Raises ValueError for a task that can't be asked or scored item by item."""
        for name, task in self._tasks.items():
            records = self._records(name, task)
            first = next(iter(records.values()))
            self._check(name, task, first)
            asked = [self._query(name, task, found) for found in records.values()]
            start = _beginning([q["prompt"] for q in asked])
            start = start if len(start) >= WORTH_SHARING else ""
            for fields in asked:
                yield (Generate if "stops" in fields else Choose)(**fields, shared=start)

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """The task's metrics of one record; 0 where the model's numbers say nothing (NaN, or minus infinity alone)."""
        name, number = query.extra["task"], query.extra["doc"]
        if name not in self._tasks:
            raise ValueError(f"{query.id}: task {name!r} is not part of {self.task!r} here; is lm_eval the same?")
        task, doc = self._tasks[name], self._docs[name][number]
        if self._digest(name, doc) != query.extra["digest"]:
            raise ValueError(f"{query.id}: record or task differ from those that were asked; are the data the same?")
        said: list[Any]
        if isinstance(answer, Generated):
            said, broken = [answer.text], False
        else:
            values = [c.logprob for c in answer.choices]
            broken = any(map(math.isnan, values)) or not math.isfinite(max(values))
            said = [(c.logprob, c.greedy) for c in _differences(query, answer)]
        for (metric, chain), value in self._measured(task, number, doc, said).items():
            if not self.metrics or metric in self.metrics:
                shown = metric if chain == "none" else f"{metric},{chain}"
                yield Score(query.id, query.group, shown, 0.0 if broken else _share(value, f"{query.id}: {metric}"))

    def chance(self) -> Mapping[str, float]:
        return {}

    # --- what lm_eval asks -------------------------------------------------------------------------------------------

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        try:
            return harness_tasks.load(self.task, self.shots)
        except ValueError as error:
            raise ValueError(f"harness: {error}") from error

    @cached_property
    def _docs(self) -> dict[str, Any]:
        """The records of each task, in their order."""
        with harness_tasks.settled():
            found = {name: task.eval_docs for name, task in self._tasks.items()}
        return {name: docs if hasattr(docs, "__getitem__") else list(docs) for name, docs in found.items()}

    @cached_property
    def _rules(self) -> dict[str, str]:
        """By what each task scores its answers, without addresses in memory."""
        configs = {name: task.dump_config() for name, task in self._tasks.items()}
        kept = {name: [task.VERSION, *map(configs[name].get, SCORING)] for name, task in self._tasks.items()}
        return {name: re.sub(r" at 0x[0-9a-f]+", "", json.dumps(rule, default=str)) for name, rule in kept.items()}

    def _digest(self, name: str, doc: Any) -> str:
        """Names a record and how its task scores it (16 hex digits of SHA-256)."""
        text = self._rules[name] + json.dumps(doc, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _records(self, name: str, task: Any) -> dict[int, list[tuple[Any, Any]]]:
        """(request, the same under a chat template) of every record, by its number. Raises ValueError."""
        plain = self._requests(name, task)
        try:
            chats = self._requests(name, task, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=_told)
        except ValueError:  # a task of somebody's own that knows no chats: the prompt is one message there
            chats = plain
        found: dict[int, list[tuple[Any, Any]]] = {}
        for request, chat in zip(plain, chats if len(chats) == len(plain) else plain, strict=True):
            found.setdefault(request.doc_id, []).append((request, chat))
        return {number: sorted(both, key=lambda b: int(b[0].idx)) for number, both in found.items()}

    def _requests(self, name: str, task: Any, **chat: Any) -> list[Any]:
        task.set_fewshot_seed(seed=harness_tasks.OTHER_SEED)
        try:
            with harness_tasks.settled():
                task.build_all_requests(limit=self.limit, **chat)
        except Exception as error:  # tasks are programs of many hands
            raise ValueError(f"harness: task {name!r} can't ask its questions: {why(error)}") from error
        return list(task.instances)

    def _query(self, name: str, task: Any, asked: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
        """Fields of the query for one record, all but what it shares."""
        first, chat = asked[0]
        number = first.doc_id
        extra = {"task": name, "doc": number, "digest": self._digest(name, first.doc)}
        fields: dict[str, Any] = {"id": f"harness/{name}/{number}", "group": name, "extra": extra}
        if first.request_type == "generate_until":
            prompt, settings = first.args
            settings = {**settings, "do_sample": False} if self.greedy else settings
            stops, tokens = harness_tasks.greedy(settings, f"harness: task {name!r}")
            turns = _turns(prompt, chat.args[0], "")
            return fields | {"prompt": prompt, "stops": stops, "max_tokens": tokens, "gold": None, "turns": turns}
        contexts = [request.args[0] for request, _ in asked]
        choices = [request.args[1] for request, _ in asked]
        if len(set(contexts)) == 1:
            end = choices[0].removesuffix(chat.args[1])  # what a chat does without
            turns = _turns(contexts[0], chat.args[0], end)
            return fields | {"prompt": contexts[0], "choices": tuple(choices), "gold": 0, "turns": turns}
        prompt, parts = _split(contexts, choices, fields["id"])
        return fields | {"prompt": prompt, "choices": parts, "gold": 0, "extra": extra | {"parts": True}}

    # --- what lm_eval makes of answers -------------------------------------------------------------------------------

    def _check(self, name: str, task: Any, asked: Sequence[tuple[Any, Any]]) -> None:
        """Raise ValueError for a task whose questions or metrics do not fit, judged by its first record."""
        where = f"harness: task {name!r}"
        kinds = {request.request_type for request, _ in asked}
        if "loglikelihood_rolling" in kinds:
            raise ValueError(
                f"{where} measures the perplexity of whole texts, which is one figure for all of them. In a study take "
                'the benchmark "perplexity"; `raysys harness` runs this task on a model.'
            )
        if len(kinds) > 1 or (len(asked) > 1 and kinds != {LIKELIHOOD}):
            raise ValueError(f"{where} asks several kinds of questions about one record; `raysys harness` can do that")
        request = asked[0][0]
        said: list[Any] = [""] if kinds == {"generate_until"} else [(-1.0 - i, False) for i in range(len(asked))]
        try:
            values = self._measured(task, request.doc_id, request.doc, said)
        except Exception as error:  # whatever a task's own metric meets, before hours are spent
            raise ValueError(f"{where}: its metrics can't be computed: {why(error)}") from error
        rising, aggregates = task.higher_is_better(), task.aggregation()
        faults = {m: _unfit(v, aggregates.get(m), rising.get(m, True)) for (m, _), v in values.items()}
        fits = json.dumps(sorted(m for m, fault in faults.items() if not fault))
        for metric in self.metrics or faults:
            if metric not in faults:
                raise ValueError(f"{where} has no metric {metric!r}{did_you_mean(metric, faults)}")
            if faults[metric]:
                others = f". Name others: metrics = {fits}" if fits != "[]" else ". It has no other."
                raise ValueError(f"{where}: metric {metric!r} {faults[metric]}{others}")

    def _measured(self, task: Any, number: int, doc: Any, said: Sequence[Any]) -> Measured:
        """The task's filters and metrics on what was `said` to the requests of one record."""
        instance = harness_tasks.module("lm_eval.api.instance").Instance
        repeats = int(task.get_config("repeats") or 1)
        kind = LIKELIHOOD if isinstance(said[0], tuple) else "generate_until"
        requests = [
            instance(kind, doc, (), i, (task.task_name, number, repeats), resps=[answer] * repeats)
            for i, answer in enumerate(said)
        ]
        task._instances = requests
        with harness_tasks.settled():
            task.apply_filters()
            return {
                (metric, chain): value
                for chain in requests[0].filtered_resps
                for metric, value in task.process_results(doc, [r.filtered_resps[chain] for r in requests]).items()
            }


def _unfit(value: Any, aggregate: Callable[[Any], Any] | None, rising: bool) -> str:
    """Why a metric can't be told question by question, or nothing."""
    if not _number(value) or not _is_mean(aggregate):
        return "is one figure for the whole corpus and has no value for a single question"
    return "" if rising else "is better when it is lower, which is not shown here"


def _is_mean(aggregate: Callable[[Any], Any] | None) -> bool:
    if aggregate is None:  # lm_eval takes the mean then
        return True
    try:
        return math.isclose(float(aggregate(list(PROBE))), sum(PROBE) / len(PROBE))
    except Exception:  # noqa: BLE001 - it wants something else than numbers
        return False


def _number(value: Any) -> bool:
    if isinstance(value, (list, tuple, str, dict)) or value is None:
        return False
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _share(value: Any, what: str) -> float:
    """`value` as a share. Raises ValueError for anything else."""
    if not _number(value) or not 0 <= float(value) <= 1:
        raise ValueError(f"{what} is {value!r}, no share between 0 and 1; name other metrics of the task in `metrics`")
    return float(value)


# --- prompts ---------------------------------------------------------------------------------------------------------


def _told(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """A chat template that only tells what it was given."""
    return json.dumps([[m["role"], m["content"]] for m in messages])


def _turns(prompt: str, chat: str, end: str) -> tuple[Turn, ...]:
    """The messages of `chat` (see `_told`) with what joins them in the plain prompt; none where they don't tell it."""
    if chat == prompt:
        return ()
    messages, turns, at = json.loads(chat), list[Turn](), 0
    for number, (role, text) in enumerate(messages):
        if not prompt.startswith(text, at):
            return ()
        at += len(text)
        last = number + 1 == len(messages)
        after = len(prompt) if last else prompt.find(messages[number + 1][1], at)
        if after < 0 or (last and after != at):
            return ()
        turns.append(Turn(role, text, end if last else prompt[at:after]))
        at = after
    return tuple(turns)


def _split(contexts: Sequence[str], choices: Sequence[str], where: str) -> tuple[str, tuple[str, ...]]:
    """Different contexts as one prompt, cut at a blank, and two choices each: the rest; the rest with the answer."""
    bare = [context.rstrip() for context in contexts]  # blanks before an answer belong to the answer
    start = _beginning(bare)
    prompt = start[: max(start.rfind(" "), start.rfind("\n"), 0)].rstrip()
    parts = []
    for context, text, choice in zip(contexts, bare, choices, strict=True):
        rest = text[len(prompt) :]
        if not rest:
            raise ValueError(f"{where}: one of its prompts begins another; `raysys harness` can ask that")
        parts += [rest, rest + context[len(text) :] + choice]
    return prompt, tuple(parts)


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)  # what these two share, all do
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def _differences(query: Query, answer: Chosen) -> Sequence[Scored]:
    """What each answer is worth: as it was said, or the difference of the two parts of `_split`."""
    if not query.extra.get("parts"):
        return answer.choices
    pairs = zip(answer.choices[::2], answer.choices[1::2], strict=True)
    return [Scored(b.logprob - a.logprob, b.tokens - a.tokens, b.right - a.right) for a, b in pairs]
