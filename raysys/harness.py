"""Our engine as a model of lm-evaluation-harness (arXiv:2405.14782): whatever lm_eval can ask, answered by it.

`language_model(model)` is an instance of lm_eval's `LM`; after `register()`, lm_eval knows it as "raysys". Requests are
grouped so that what contexts have in common is run once, all continuations of a context are one question, and batches
are of like length. Likelihoods, greedy flags, windows over long texts, truncation and generations are those of
lm_eval's own model for transformers (tests/raysys/test_harness.py); sampling is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from benchmarks.harness_tasks import MAX_TOKENS, Found, greedy, module, why
from raysys.blocks import Block, Ids, Item
from raysys.model import Model
from raysys.scoring import Engine, Softmax
from raysys.types import Choose, Chosen, Generate, Generated, Scored

if TYPE_CHECKING:
    from rich.console import RenderableType

AT_ONCE = 256  # rows of a block
LEAST = 16  # tokens of a prefix that is worth a pass of its own
COST = 256  # tokens that a block of its own must save

Pair = tuple[Ids, Ids]  # context and continuation


def language_model(model: Model, **settings: Any) -> Any:
    """`model` as an instance of lm_eval's `LM`; settings as for `_Requests`. Raises ValueError without lm_eval."""
    return _kind()(model, **settings)


def register() -> None:
    """Make lm_eval know us: `lm_eval.simple_evaluate(model="raysys", model_args="pretrained=world/small")`."""
    _kind()


@lru_cache(maxsize=1)
def _kind() -> Any:
    """The class that joins `_Requests` with lm_eval's base class, made and registered when it is first wanted."""
    made = type("Raysys", (_Requests, module("lm_eval.api.model").TemplateLM), {"__module__": __name__})
    return module("lm_eval.api.registry").register_model("raysys")(made)


class _Requests:
    """What lm_eval asks of a language model.

    `pretrained`: a model, or what `Model.load` takes; `batch_size`: rows of a pass, "auto" as many as fit;
    `max_gen_toks`: tokens of an answer where a task does not say; `softmax`: "model" for log-probabilities in the
    model's own number type; `greedily`: answer greedily where a task samples.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Model | str,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "float32",
        softmax: Softmax = "float32",
        max_gen_toks: int = MAX_TOKENS,
        greedily: bool = False,
    ) -> None:
        super().__init__()
        self.model = Model.load(pretrained, dtype, device) if isinstance(pretrained, str) else pretrained
        self.tokenizer = self.model.tokenizer
        self.max_length, self.max_gen_toks, self.greedily = self.model.max_length, int(max_gen_toks), greedily
        self.rows = 0 if str(batch_size) == "auto" else int(batch_size)
        self.engine = Engine(self.model, trunk_memory=0, drafts=False, softmax=softmax)  # every block comes once
        self._encoded = lru_cache(maxsize=8)(self.model.encode)  # a context is asked for with every continuation

    # --- what lm_eval wants to know of a model -----------------------------------------------------------------------

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in lm_eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        if self.model.tokens.start_id is None:
            raise ValueError(f"{self.model.name}: a tokenizer without BOS and EOS; nothing can stand before a text")
        return self.model.tokens.start_id

    def get_model_info(self) -> dict[str, Any]:
        """For lm_eval's record of a run."""
        return {"model_name": self.model.name, "model_dtype": str(self.model.dtype), "model_sha": self.model.digest}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text; a template that refuses them is tried again without the system's."""
        from jinja2 import TemplateError

        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(render(chat_history))
        except TemplateError:
            return str(render([m for m in chat_history if m["role"] != "system"]))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, special ones as the tokenizer adds them unless told otherwise."""
        if add_special_tokens is None:
            return self._encoded(string)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    # --- likelihoods -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, greedy?) of every (texts, context, continuation); lm_eval makes them of texts."""
        pairs = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        for n, scored in self._scored(pairs, disable_tqdm):
            found[n] = scored.logprob, scored.greedy
            if requests[n][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])  # type: ignore[attr-defined]
        return [found[n] for n in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token once, in windows as long as the model reads."""
        utils = module("lm_eval.utils")
        pairs: list[Pair] = []
        texts: list[int] = []  # which text each window is of
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs += [(tuple(a), tuple(b)) for a, b in map(utils.make_disjoint_window, windows)]
            texts += [number] * (len(pairs) - len(texts))
        totals = [0.0] * len(requests)
        for n, scored in sorted(self._scored(pairs, disable_tqdm)):
            totals[texts[n]] += scored.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)  # type: ignore[attr-defined]
        return totals

    def _scored(self, pairs: Sequence[Pair], quiet: bool) -> Iterator[tuple[int, Scored]]:
        """The number of every pair and what its continuation is worth, in the order in which they come out."""
        groups: dict[Ids | int, list[int]] = {}
        for n, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(f"request {n + 1} of lm_eval has an empty {'continuation' if context else 'context'}")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"request {n + 1} of lm_eval: {len(continuation)} tokens to score, {self.max_length} read at most"
                )
            whole = len(context) + len(continuation) <= self.max_length + 1  # the last token is never fed
            groups.setdefault(context if whole else n, []).append(n)  # how much is cut depends on what follows
        items: list[Item] = []
        which: list[list[int]] = []
        for numbers in groups.values():
            choices = tuple(pairs[n][1] for n in numbers)
            room = self.max_length + 1 - max(map(len, choices))
            items.append(Item(Choose(str(len(items)), "", (), 0), pairs[numbers[0]][0][-room:], choices))
            which.append(numbers)
        for item, answer in self._answered(items, "likelihoods", quiet):
            assert isinstance(answer, Chosen)
            yield from zip(which[item], answer.choices, strict=True)

    # --- texts -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop, or as many tokens as the task allows."""
        kinds: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for n, request in enumerate(requests):
            where = f"task {request.task_name!r}" if request.task_name else f"request {n + 1} of lm_eval"
            settings: Mapping[str, Any] = request.args[1]
            if self.greedily:
                settings = {**settings, "do_sample": False}
            stops, tokens = greedy(settings, where, self.max_gen_toks)
            if tokens >= self.max_length:
                raise ValueError(
                    f"{where}: {tokens} tokens to generate leave no room for a prompt in the model's "
                    f"{self.max_length}; set max_gen_toks lower"
                )
            end = self.tokenizer.eos_token
            kinds.setdefault((stops if end is None or end in stops else (*stops, end), tokens), []).append(n)
        found: dict[int, str] = {}
        for (stops, tokens), numbers in kinds.items():
            places: dict[Ids, list[int]] = {}  # the same prompt has the same answer, however often it is asked
            for n in numbers:
                ids = tuple(self.model.tokens.encode(requests[n].args[0], generation=True))
                if not ids:
                    raise ValueError(f"request {n + 1} of lm_eval: an empty prompt; nothing to continue")
                places.setdefault(ids[-(self.max_length - tokens) :], []).append(n)
            items = [Item(Generate(str(k), "", stops, None, tokens), ids) for k, ids in enumerate(places)]
            which = list(places.values())
            for item, answer in self._answered(items, "answers", disable_tqdm):
                assert isinstance(answer, Generated)
                for n in which[item]:
                    found[n] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[n].args, answer.text)  # type: ignore[attr-defined]
        return [found[n] for n in range(len(requests))]

    def _answered(self, items: Sequence[Item], what: str, quiet: bool) -> Iterator[tuple[int, Any]]:
        """The number of every item and its answer, block by block."""
        progress: Any = import_module("tqdm").tqdm
        with progress(total=len(items), desc=what, disable=quiet) as bar:
            for numbers, block in blocks(items, self.rows):
                yield from zip(numbers, self.engine.answer(block), strict=True)
                bar.update(len(numbers))


# --- blocks ----------------------------------------------------------------------------------------------------------


def blocks(items: Sequence[Item], batch: int) -> Iterator[tuple[list[int], Block]]:
    """Items in blocks that share a prefix and have like lengths, with their numbers."""
    for length, numbers in shared([i.tokens for i in items]):
        numbers = sorted(numbers, key=lambda n: -len(items[n].tokens) - max(map(len, items[n].choices), default=0))
        for start in range(0, len(numbers), AT_ONCE):
            part = numbers[start : start + AT_ONCE]
            prefix = items[part[0]].tokens[:length]
            rest = tuple(Item(items[n].query, items[n].tokens[length:], items[n].choices) for n in part)
            yield part, Block("lm_eval", {}, prefix, rest, batch, id=f"{length} {part[0]} {len(part)}")


@dataclass
class _Node:
    """Neighbours among sorted rows, from `left` on, that have `depth` tokens in common; the best way to group them."""

    depth: int
    left: int
    gain: int = 0  # tokens saved
    groups: list[tuple[int, int, int]] = field(default_factory=list)  # length of the prefix, first row, behind the last

    def take(self, child: _Node) -> None:
        self.gain += child.gain
        self.groups += child.groups

    def close(self, right: int) -> None:
        """All rows are there: one group of all of them, if that saves more than those within it."""
        saved = (right - self.left - 1) * self.depth - COST
        if self.depth >= LEAST and saved > self.gain:
            self.gain, self.groups = saved, [(self.depth, self.left, right)]


def shared(rows: Sequence[Ids]) -> Iterator[tuple[int, list[int]]]:
    """Rows grouped by the prefixes that save most: (length of the prefix, numbers of the rows).

    A prefix leaves every row at least one token. Sorted rows with something in common are neighbours, and what they
    have in common nests; a stack holds the open groups, and each is closed where its rows end.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    stack = [_Node(0, 0)]
    for i, number in enumerate(order):
        ahead = _same(rows[number], rows[order[i + 1]]) if i + 1 < len(order) else 0
        child, left = _Node(0, i, 0, [(0, i, i + 1)]), i
        while True:
            if ahead > stack[-1].depth:
                stack.append(_Node(ahead, left))
            stack[-1].take(child)
            if ahead >= stack[-1].depth:
                break
            child = stack.pop()
            child.close(i + 1)
            left = child.left
    alone = [order[first] for depth, first, _ in stack[0].groups if not depth]
    if alone:
        yield 0, alone
    yield from ((depth, order[first:last]) for depth, first, last in stack[0].groups if depth)


def _same(one: Ids, other: Ids) -> int:
    """How many tokens two rows begin with alike, at least one of each left over."""
    most = min(len(one), len(other)) - 1
    return next((n for n, (a, b) in enumerate(zip(one[:most], other[:most], strict=True)) if a != b), max(most, 0))


# --- a run -----------------------------------------------------------------------------------------------------------


def evaluate(model: Model, tasks: Found, **settings: Any) -> dict[str, Any]:
    """`lm_eval.simple_evaluate` with our engine; `settings` are its own, and those of `_Requests`.

    Raises ValueError for tasks that can't be loaded or asked.
    """
    ours = {k: settings.pop(k) for k in ("batch_size", "softmax", "max_gen_toks", "greedily") if k in settings}
    if settings.get("apply_chat_template") and not getattr(model.tokenizer, "chat_template", None):
        raise ValueError(
            f"model {model.name!r}: its tokenizer has no chat template; save one beside it (chat_template.jinja), or "
            "leave out --apply-chat-template"
        )
    load = tasks.manager.load

    def loaded(names: Any) -> Any:
        try:
            return load(names)
        except Exception as error:  # tasks are programs of many hands
            raise ValueError(f"a task of {', '.join(tasks.names)} can't be loaded: {why(error)}") from error

    tasks.manager.load = loaded
    run: Any = module("lm_eval.evaluator").simple_evaluate
    results: dict[str, Any] = run(
        model=language_model(model, **ours), tasks=tasks.names, task_manager=tasks.manager, **settings
    )
    return results


def table(results: Mapping[str, Any]) -> RenderableType:
    """Results with the columns of lm_eval's own table; the tasks of a group stand below it."""
    from rich.text import Text

    from raysys.tables import grid

    found = grid("task", "version", "filter", "metric", "shots", "value", "stderr", left=4)
    groups = {**results.get("groups", {}), **results["results"]}
    below: Mapping[str, Sequence[str]] = results.get("group_subtasks", {})
    inner = {name for names in below.values() for name in names}

    def add(name: str, depth: int) -> None:
        first = True
        for key, value in sorted(groups.get(name, {}).items()):
            metric, comma, chain = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = groups[name].get(f"{metric}_stderr,{chain}")
            about = (f"{'  ' * depth}{name}", str(results["versions"].get(name, ""))) if first else ("", "")
            shots = str(results["n-shot"].get(name, "")) if first else ""
            cells = (*about, chain, metric, shots, _figure(value), _figure(error))
            found.add_row(*map(Text, cells))
            first = False
        if first:  # a group without figures of its own
            found.add_row(Text(f"{'  ' * depth}{name}"))
        for child in below.get(name, ()):
            add(child, depth + 1)

    for name in results["results"]:
        if name not in inner:
            add(name, 0)
    return found


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value in (None, "N/A") else str(value)


def dumps(results: Mapping[str, Any]) -> str:
    """Results as JSON; what JSON does not know (numbers of NumPy, functions of tasks) as lm_eval writes it."""
    return json.dumps(results, indent=1, default=module("lm_eval.utils").handle_non_serializable, ensure_ascii=False)
