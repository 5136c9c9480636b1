"""`raysys prepare`: everything that a study's methods need of its models, made before the study, in parallel.

Second moments are taken for all methods in one pass over the text, by workers on Ray (actors/statistics.py); contexts,
factors and projectors follow from them. What is in the cache already is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from actors.cluster import cluster, wait_for
from actors.statistics import Workers
from methods.parts import artifacts
from methods.parts.moments import Sums
from raysys import names
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.resources import device
from raysys.spec import StudySpec


@dataclass(frozen=True)
class Prepared:
    """One method on one model: the content hashes of its artifacts, or why it can't be prepared."""

    model: str
    method: str
    artifacts: Mapping[str, str]
    fault: str = ""


def prepare(spec: StudySpec, workers: int | None = None, tell: artifacts.Tell | None = None,
            note: Callable[[str], None] = lambda text: None) -> Iterator[Prepared]:  # fmt: skip
    """Prepare every method of `spec` for every model; `workers` sum second moments (by default as many as evaluators).

    A method that can't be prepared (no trained editor, say) is told with its reason; the others go on.
    """
    cache = artifacts.folder()
    with ExitStack() as stack:
        for name in spec.models:
            model = Model.load(name, spec.dtype, device(spec, spec.cluster.gpus_per_editor))
            collect = _collector(spec, name, workers or spec.cluster.most, cache, tell, note, stack)
            yield from _prepared(spec, model, collect, cache, tell)


def _prepared(
    spec: StudySpec, model: Model, collect: artifacts.Collect, cache: Path, tell: artifacts.Tell | None
) -> Iterator[Prepared]:
    methods = [(p.title, names.build(names.method(p.name), p.settings, f"method {p.name}")) for p in spec.methods]
    with artifacts.making(collect, tell):
        for corpus, modules in needed(model, [m for _, m in methods], cache).items():
            artifacts.second_moments(model, modules, corpus, cache)
        for title, method in methods:
            try:
                made_from = method.prepare(model, cache).identity()["artifacts"]
            except ValueError as error:
                yield Prepared(model.name, title, {}, str(error))
            else:
                yield Prepared(model.name, title, made_from)


class _MissingError(Exception):
    """Ends a method's preparation where second moments would have to be made."""

    def __init__(self, modules: Sequence[str], corpus: Corpus) -> None:
        self.modules, self.corpus = modules, corpus


def needed(model: Model, methods: Sequence[Any], cache: Path) -> dict[Corpus, list[str]]:
    """The second moments that `methods` will ask for first and the cache lacks: modules by corpus."""

    def record(model: Model, modules: Sequence[str], corpus: Corpus) -> NoReturn:
        raise _MissingError(modules, corpus)

    found: dict[Corpus, dict[str, None]] = {}
    with artifacts.making(record):
        for method in methods:
            try:
                method.prepare(model, cache)
            except _MissingError as missing:
                found.setdefault(missing.corpus, {}).update(dict.fromkeys(missing.modules))
            except ValueError:
                continue  # told when its turn comes
    return {corpus: list(modules) for corpus, modules in found.items()}


def _collector(
    spec: StudySpec, model: str, number: int, cache: Path, tell: artifacts.Tell | None, note: Callable[[str], None],
    stack: ExitStack,
) -> artifacts.Collect:  # fmt: skip
    """Workers on a cluster that is started (or joined) when it is first needed, and left when `stack` is."""
    started: list[str] = []

    def collect(asked: Model, modules: Sequence[str], corpus: Corpus) -> Mapping[str, Sums]:
        c = spec.cluster
        cpus = number * c.threads + 2
        gpus = number * c.gpus_per_editor
        if not started:
            enough = max(cpus, os.cpu_count() or 1)
            started.append(stack.enter_context(cluster(c.address, enough, dashboard=False)))
            wait_for(cpus, gpus, c.wait, note)
        who = Workers(
            model=model, dtype=spec.dtype, device=device(spec, c.gpus_per_editor), number=number, threads=c.threads,
            gpus=c.gpus_per_editor, cache=cache, tell=tell or (lambda what, done, total: None),
        )  # fmt: skip
        return who(asked, modules, corpus)

    return collect
