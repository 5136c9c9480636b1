"""Questions to a model in this process, without Ray: `ask`, and the figures of the built-in world."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys import names
from raysys.blocks import by_prefix, pack
from raysys.patch import Wearer
from raysys.scoring import Engine
from raysys.stats import Estimate, estimate
from raysys.types import Generate, Generated, Probe, Query

if TYPE_CHECKING:
    from raysys.model import Model
    from raysys.results import Results


@dataclass(frozen=True)
class Reply:
    """What a model said after `edits` edits of `cell` ("" for the base model)."""

    cell: str
    edits: int
    text: str


def ask(model: Model, prompt: str, tokens: int) -> str:
    """Greedy continuation of `prompt`, to the end of the line."""
    query = Generate("0", prompt, ("\n",), gold="", max_tokens=tokens)
    [block] = pack(model.tokens, "ask", {}, [query], batch=1, size=1)
    [answer] = Engine(model).answer(block)
    assert isinstance(answer, Generated)
    return answer.text


def ask_run(
    results: Results, model: Model, cells: Sequence[str], edits: Sequence[int], prompt: str, tokens: int
) -> Iterator[Reply]:
    """The base model's answer, then that of every cell at each number of edits.

    Raises ValueError when a journal holds no such snapshot, or `model` is not the one that was edited.
    """
    yield Reply("", 0, ask(model, prompt, tokens))
    wearer = Wearer(model)
    try:
        for cell in cells:
            for n in (n for n in edits if n):
                snapshot = results.snapshot(cell, n)
                if snapshot.base != model.digest:
                    raise ValueError(
                        f"{model.name}: its weights are not those that {cell} edited; put the old ones back"
                    )
                wearer.wear(snapshot.patches)
                yield Reply(cell, n, ask(model, prompt, tokens))
    finally:
        wearer.take_off()


def score(model: Model, benchmark: Any, batch: int = 32, size: int = 256) -> dict[str, Estimate]:
    """Every metric of a benchmark (built, and given what it is about), scored in this process."""
    found: dict[str, list[float]] = defaultdict(list)
    engine = Engine(model)
    for group in by_prefix(benchmark.queries()):
        for block in pack(model.tokens, benchmark.name, {}, group, batch=batch, size=size):
            for item, answer in zip(block.items, engine.answer(block), strict=True):
                for scored in benchmark.score(item.query, answer):
                    found[scored.metric].append(scored.value)
    return {metric: estimate(np.array(values)) for metric, values in found.items()}


def world(model: Model, limit: int | None = None) -> Iterator[tuple[str, str, Estimate, float | None]]:
    """(what, metric, figure, chance) of the built-in world: its facts, and its miniature of every benchmark.

    `limit`: facts, and queries of a benchmark, at most.
    """
    facts = import_module("benchmarks.world").facts()
    for what, key in (("facts, phrasings trained on", "held_in"), ("facts, phrasings of the probes", "probes")):
        probes = [Probe("neighbourhood", prompt, f["object"]) for f in facts[:limit] for prompt in f[key]]
        locality = names.build(names.benchmark("locality"), {"limit": None}, "locality").over(probes)
        for metric, figure in score(model, locality).items():
            yield what, metric.partition("/")[2], figure, None
    for name in names.BENCHMARKS:
        cls = names.benchmark(name)
        if getattr(cls, "about", None) or not getattr(cls, "ability", True):  # edits, not skill
            continue
        if not hasattr(cls, "data"):  # nothing of it in the world
            continue
        benchmark = names.build(cls, {"data": "world"}, name)
        shown = benchmark if limit is None else _First(benchmark, limit)
        for metric, figure in score(model, shown).items():
            yield name, metric, figure, benchmark.chance().get(metric)


class _First:
    """The first `limit` queries of a benchmark."""

    def __init__(self, benchmark: Any, limit: int) -> None:
        self.name, self.score, self._benchmark, self._limit = benchmark.name, benchmark.score, benchmark, limit

    def queries(self) -> Iterable[Query]:
        return (q for q, _ in zip(self._benchmark.queries(), range(self._limit), strict=False))
