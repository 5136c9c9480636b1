"""The words every folder shares: edits, queries, answers, scores. Frozen, plain and free of Ray.

A *request* is all an editing method may see. A *case* adds the probes that test the edit, which only scoring sees.
A *query* is one question put to a model; an *answer* is what the model gave; a *score* is what that is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from raysys.model import Model


@dataclass(frozen=True)
class EditRequest:
    """Make the model complete `prompt` (one "{}" for the subject) with `target` instead of `was`.

    `target` and `was` are stored without a leading blank; `continuation` is what follows the prompt.
    """

    id: str
    prompt: str
    subject: str
    target: str
    was: str | None = None

    @property
    def text(self) -> str:
        """The prompt with its subject in place."""
        return self.prompt.replace("{}", self.subject, 1)

    @property
    def continuation(self) -> str:
        """The target as it follows the prompt: with exactly the blank that joins them."""
        return self.target if self.target[:1].isspace() else " " + self.target


ProbeKind = Literal["rewrite", "paraphrase", "neighbourhood", "portability", "multi_hop"]


@dataclass(frozen=True)
class Probe:
    """One question about an edit: is `right` now likelier after `prompt` than `wrong`?

    rewrite, paraphrase: right = the new target, wrong = the old one. neighbourhood: right = the (unchanged) truth
    of another subject, wrong = the new target. portability: right = the answer that follows from the edit,
    wrong = the answer before it; multi_hop: the same of a question whose answer takes several facts. `wrong` is None
    where the data hold no rival. `aliases` are as right as `right` in free text. The question makes sense once the
    edits with the ids `needs` are made too, and as long as none is made of the prompts in `keeps`.
    """

    kind: ProbeKind
    prompt: str
    right: str
    wrong: str | None = None
    aliases: Sequence[str] = ()
    needs: Sequence[str] = ()
    keeps: Sequence[str] = ()


@dataclass(frozen=True)
class EditCase:
    """An edit with what tests it. `source` says where it came from (file and record), for messages."""

    request: EditRequest
    probes: tuple[Probe, ...] = ()
    source: str = ""


# --- queries and answers ---------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one side says in a prompt: `text`, and in a plain prompt `end`, which joins it to what follows.

    A chat template needs no ends. What joins a question to its choices is the question's `end`: choices begin with it.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    end: str = ""


def plain(turns: Iterable[Turn]) -> str:
    """The turns as they stand in a plain prompt, each with its end."""
    return "".join(turn.text + turn.end for turn in turns)


@dataclass(frozen=True)
class Choose:
    """Score each of `choices` (continuations with their leading blank) after `prompt`; `gold` indexes the right one.

    `prompt` starts with `shared`, the text that other queries of the benchmark begin with too (few-shot examples):
    its keys and values are computed once for all of them. `edit` is the 1-based position of the edit that the
    query belongs to, 0 for none: a snapshot after n edits is asked only queries with `edit` <= n.
    `turns` say the prompt again, as a chat: a description (system), examples (user, assistant), the question (user).
    Without them a chat template is given the whole prompt as one message of the user's.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    group: str = ""
    shared: str = ""
    edit: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    kind: ClassVar[str] = "choose"


@dataclass(frozen=True)
class Generate:
    """Continue `prompt` greedily until one of `stops` or `max_tokens`; `gold` is what the benchmark compares with."""

    id: str
    prompt: str
    stops: tuple[str, ...]
    gold: Any
    max_tokens: int = 256
    group: str = ""
    shared: str = ""
    edit: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    kind: ClassVar[str] = "generate"


Query = Choose | Generate


@dataclass(frozen=True)
class Scored:
    """A continuation under the model: `logprob` in nats (sum over tokens); `right` of its `tokens` are the argmax."""

    logprob: float
    tokens: int
    right: int

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would have produced this continuation."""
        return self.right == self.tokens


@dataclass(frozen=True)
class Chosen:
    """The answer to a `Choose`: one `Scored` per choice, in their order."""

    choices: tuple[Scored, ...]

    @property
    def best(self) -> int:
        """Index of the likeliest choice; the earlier one wins a tie, as in lm-evaluation-harness."""
        values = [c.logprob for c in self.choices]
        return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class Generated:
    """The answer to a `Generate`: the text before the first stop, and how many tokens were generated."""

    text: str
    tokens: int


Answer = Chosen | Generated


@dataclass(frozen=True)
class Score:
    """One number for one query: `metric` in [0, 1] unless its name says otherwise."""

    query: str
    group: str
    metric: str
    value: float


# --- what plugs in ---------------------------------------------------------------------------------------------------


@runtime_checkable
class Patch(Protocol):
    """One reversible change to a model. Everything it holds is tensors and JSON, so that it can be stored safely."""

    kind: ClassVar[str]
    in_weights: ClassVar[bool]  # wearing it changes weights and nothing else, so that a model folder can hold it

    @property
    def whole(self) -> bool:
        """Whether it must see a prompt from its first token: no prefix is shared between prompts then."""
        ...

    def applied(self, model: Model) -> AbstractContextManager[None]:
        """Wear the change; on exit the model is as before, bit for bit."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by field name."""
        ...

    def fields(self) -> dict[str, Any]:
        """Everything else to store (JSON)."""
        ...


@runtime_checkable
class Joins(Protocol):
    """A patch that writes no weight: what it becomes on top of an earlier one of its kind."""

    def after(self, earlier: Any) -> Patch:
        """`earlier` (cumulative) and then this change, as one patch."""
        ...


@dataclass(frozen=True, eq=False)
class Detour:
    """Answer a question with `model`, after the prompt tokens `prompt`, instead.

    A prompt that is too long loses what stands behind its first `keep` tokens.
    """

    model: Model
    prompt: tuple[int, ...]
    keep: int = 0


@runtime_checkable
class Reroutes(Protocol):
    """A patch that changes what is asked, or who is asked, rather than how the model computes."""

    def reroute(self, model: Model, prompts: Sequence[tuple[int, ...]]) -> Sequence[Detour | None]:
        """For each prompt (tokens, special ones included) its detour; None leaves the question alone."""
        ...


@dataclass(frozen=True)
class Edit:
    """What a method returns for one step: `patches` to add to those so far, what its `memory` gains, a `log`.

    `memory` is durable state of the method (tensors by name) as far as this step adds to it, None where it has none
    (see `Remembers`); `log` holds numbers and strings for the journal (losses, norms, optimiser steps).
    """

    patches: tuple[Patch, ...]
    memory: Mapping[str, Tensor] | None = None
    log: Mapping[str, Any] = field(default_factory=dict)


class PreparedMethod(Protocol):
    """A method with all it needs of one model; made by `EditMethod.prepare`, it makes any number of edits."""

    def identity(self) -> dict[str, Any]:
        """What an edit depends on beside model and request, as JSON: name, version, settings (none left open),
        artifacts (content hashes by name). Part of every snapshot's identity."""
        ...

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """Compute the change for `requests` on the model as it is now; the model is left exactly as it was found.

        `memory` is what the steps of the stream so far have left (see `remembered`), None at its start; it is not
        changed. Raises EditRefused when a request can't be served, with the reason.
        """
        ...


@runtime_checkable
class Remembers(Protocol):
    """A prepared method whose memory grows by what each step adds, so that the journal holds each part once."""

    def remember(self, memory: Any, step: Mapping[str, Tensor]) -> Any:
        """The memory after a step that added `step`; `memory` is the one before it, None at the start."""
        ...


@runtime_checkable
class Finishes(Protocol):
    """A prepared method whose snapshots wear something else than the sum of its edits; editing goes on without that."""

    def finish(self, model: Model, patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
        """What a snapshot wears, from the cumulative `patches` of the stream; `model` wears nothing."""
        ...


def remembered(method: PreparedMethod, memory: Any, step: Mapping[str, Tensor] | None) -> Any:
    """The method's memory after a step whose `Edit.memory` is `step`: by default that, unless it is empty."""
    if not step:
        return memory
    return method.remember(memory, step) if isinstance(method, Remembers) else step


class EditMethod(Protocol):
    """An editing method: a frozen keyword-only dataclass of settings with these members, in one file of methods/."""

    name: ClassVar[str]
    version: ClassVar[str]  # changes when the same settings give other numbers

    @property
    def batch(self) -> int:
        """How many requests one call of `edit` takes (the last call of a stream may get fewer)."""
        ...

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMethod:
        """Settle open settings for `model`, which wears no patch, and collect what is costly (second moments, sampled
        contexts, ...) or take it from the folder `cache` (None: $RAYSYS_CACHE or ~/.cache/raysys).

        Called once per model, before the stream of edits. A method that needs nothing returns itself.
        Raises ValueError when something is missing or unreadable.
        """
        ...


class EditRefused(ValueError):
    """A method can't serve a request; the message says which, why, and what to do. The study's policy decides."""


class Benchmark(Protocol):
    """A benchmark: a frozen keyword-only dataclass of settings with these members, in one file of benchmarks/."""

    name: ClassVar[str]
    version: ClassVar[str]  # part of every result's identity

    def queries(self) -> Iterator[Query]:
        """All queries, in a fixed order. Raises ValueError naming file, record and field when the data are bad."""
        ...

    def score(self, query: Query, answer: Answer) -> Iterator[Score]:
        """What `answer` is worth. Must need nothing of the query but its id, group, gold, choices and extra."""
        ...

    def chance(self) -> Mapping[str, float]:
        """The expected value of each metric under guessing, for the report; missing = unknown."""
        ...
