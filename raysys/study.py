"""A study from end to end: edit, snapshot, score, store. Reads top to bottom; everything else hangs below it."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from actors import editor, evaluator, group, metrics
from actors.cluster import NoResources, cluster, gpus_there, ready, wait_for
from actors.editor import Job
from actors.feed import Source, Work, feed
from actors.places import Limits
from actors.pool import EvaluatorPool, PoolError
from actors.sharing import share
from actors.signs import Signs
from actors.streams import Lost, Made, Opened, Streaming, Streams
from actors.waiting import Done, Failed, Unit
from raysys import names
from raysys.files import content_hash
from raysys.manifest import manifest
from raysys.progress import Progress, quiet
from raysys.resources import device, logical_cpus, needs, unused
from raysys.results import Results
from raysys.saving import Saver
from raysys.shards import splittable
from raysys.spec import ComponentSpec, SpecError, StudySpec
from raysys.tokens import Tokens
from raysys.types import EditCase, Probe

SILENCE = 60.0  # seconds without news after which a user is told what is being waited for
TELLING = 10.0  # seconds between words on what is being prepared
LOSSES = {  # events that a user is told of at once
    "evaluator lost": "is lost",
    "editor lost": "is lost",
    "node lost": "went with its node",
    "evaluator given up": "is not replaced any more",
}
CACHE = "RAYSYS_CACHE"  # environment variable: folder of artifacts (second moments, contexts)


class StudyError(RuntimeError):
    """The study can't go on; what it has found so far stays, and the same command continues it."""


def run(spec: StudySpec, progress: Progress | None = None) -> Results:
    """Run `spec`, or what is missing of it, and return its results.

    Raises SpecError for a study that can't run as written, StudyError when it can't go on, StorageError when its
    results can't be kept (a full disk, storage that is away). Units that keep failing are in `results.failures()`.
    """
    progress = progress or quiet()
    edits = {order: select_edits(spec, order) for order in range(spec.orders)}
    for model in spec.models:  # before anything is started: a wrong name is the user's to mend
        tokens = Tokens.load(model)
        if spec.scoring.chat is not None:
            spec.scoring.chat.check(tokens.tokenizer, model)
        splittable(model, spec.cluster.tensor_parallel, spec.methods)
    results = Results.create(spec)
    with results.lock():
        if results.manifest.get("complete"):
            progress.note(f"complete already: {results.folder}")
            return results
        results.forget_failures()
        results.write_manifest(manifest(spec))
        try:
            cpus, gpus, bundles = needs(spec)
            own = max(logical_cpus(spec, spec.cluster.most), os.cpu_count() or 1)
            with cluster(spec.cluster.address, own, spec.cluster.dashboard) as dashboard:
                if dashboard:
                    progress.note(f"Ray dashboard: http://{dashboard}")
                wait_for(cpus, gpus, spec.cluster.wait, progress.note, bundles)
                if idle := unused(spec, gpus_there()):
                    progress.warn(idle)
                _work([_Run(spec, model, edits, results, progress) for model in spec.models], progress)
        except (PoolError, NoResources) as error:
            raise StudyError(str(error)) from error
        finally:
            progress.stop()
        results.compact()
        results.mark()
        results.write_manifest({"complete": not results.failures(), "finished": time.time()})
    return results


def _work(runs: Sequence[_Run], progress: Progress) -> None:
    """Every base model in turn: the next begins when the one before it is edited and still being scored."""
    waiting, begun, heard, shown = deque(runs), list[_Run](), time.monotonic(), 0.0
    try:
        while waiting or any(r.busy for r in begun):
            if waiting and not any(r.streams.busy for r in begun):
                begun.append(waiting.popleft())
                begun[-1].begin(first=len(begun) == 1)
                if len(begun) == 1:
                    for run in waiting:
                        run.feed()  # now that there is room for it in the cluster
            for run in [r for r in begun if not r.busy]:
                run.end()
            if not (going := [r for r in begun if r.busy]):
                continue
            share([r.pool for r in going], going[0].limits)
            found = ready([ref for r in going for ref in r.refs()])
            for run in going:
                run.step(found)
            if time.monotonic() - shown > 1:  # looking at the run folder costs time
                shown = time.monotonic()
                for run in going:
                    run.show()
                busy = sum(r.pool.busy for r in going)
                progress.scored(sum(r.scored for r in begun), sum(r.expected() for r in begun), busy)
            heard = time.monotonic() if found else heard
            if time.monotonic() - heard > SILENCE and (starting := sum(r.pool.starting for r in going)):
                progress.warn(f"{starting} evaluators wait to be started: has the cluster room?")
                heard = time.monotonic()
        progress.scored(sum(r.scored for r in begun), sum(r.expected() for r in begun), 0)
    finally:
        with ExitStack() as stack:  # all of them, whatever one of them raises
            for run in begun:
                stack.callback(run.end)


class _Run:
    """One base model's part of a study: its editors, its evaluators, its blocks."""

    streams: Streams
    pool: EvaluatorPool

    def __init__(
        self, spec: StudySpec, model: str, edits: dict[int, Selected], results: Results, progress: Progress
    ) -> None:
        self.spec, self.model, self.edits, self.results, self.progress = spec, model, edits, results, progress
        self.done, self.saver = results.done(), Saver(results)
        self.metrics = metrics.Watch(spec.name, model, results.note)
        self.works: list[Work] = []
        self.scored = 0
        self.seen: set[str] = set()  # units submitted or found done
        self.signs = Signs()
        self.told = -TELLING  # when it was last said what is being prepared
        self.cells = [self._cell(m, o) for name, m, o in spec.grid() if name == model]

    def begin(self, first: bool) -> None:
        """Start editors and, unless those of another model run, evaluators; read the benchmarks."""
        c, spec = self.spec.cluster, self.spec
        about = (self.model, spec.dtype, device(spec, c.gpus_per_editor), c.threads)
        makers = group.makers(c.tensor_parallel, c.across_nodes) or (editor.start, evaluator.start)
        start = partial(makers[0], model=about[0], dtype=about[1], device=about[2], threads=about[3],
                        gpus=c.gpus_per_editor)  # fmt: skip
        self.streams = Streams(start, c.editors, self.cells, self._note, c.stall)
        about = (self.model, spec.dtype, device(spec, c.gpus_per_evaluator), c.threads)
        begin = partial(makers[1], model=about[0], dtype=about[1], device=about[2], threads=about[3],
                        gpus=c.gpus_per_evaluator, trunk_memory=c.trunk_memory, drafts=c.drafts,
                        softmax=spec.scoring.softmax)  # fmt: skip
        self.limits = Limits(fewest=c.fewest, most=c.most, retries=c.retries, idle=c.idle, stall=c.stall)
        limits = self.limits if first else replace(self.limits, fewest=0, most=0)  # until they are shared out
        self.pool = EvaluatorPool(begin, limits, self._note)
        if first:
            self.feed()
        self.progress.start({cell.job.cell: spec.snapshots[-1] for cell in self.cells}, self.expected())

    def _note(self, what: str, **details: Any) -> None:
        """Keep an event of the pool or the streams; a loss is told as well."""
        self.metrics.note(what, **details)
        if what in LOSSES:
            who = details.get("evaluator") or details.get("editor")
            self.progress.warn(f"{who} {LOSSES[what]}: {details['reason']}")

    @property
    def busy(self) -> bool:
        """Whether anything is left to edit or to score."""
        return self.streams.busy or self.pool.pending > 0

    def refs(self) -> list[Any]:
        """References to wait on."""
        return [*self.streams.refs, *self.pool.refs]

    def step(self, ready: Sequence[Any]) -> None:
        """Deal with what is ready, and with what time brings."""
        for ref in ready:
            self._take(ref)
        self._tick()
        self.streams.advance(self.spec.cluster.snapshots_in_flight - self.pool.snapshots)

    def end(self) -> None:
        """End all actors, and save what they have done. Safe to call twice, and when they were never started."""
        for part in (getattr(self, "streams", None), getattr(self, "pool", None), self.saver):
            if part is not None:
                part.close()

    def feed(self) -> None:
        """Blocks of all benchmarks, and of the probes of every edit order."""
        spec = self.spec
        sources = [s for b in spec.benchmarks for s in self._sources(b)]
        size, batch = spec.scoring.block, spec.scoring.rows
        self.works, faults = feed(sources, self.model, batch=batch, size=size, cuts=spec.snapshots)
        for title, fault in sorted(faults.items()):
            if spec.on_bad_benchmark == "stop":
                raise SpecError(f"benchmark {title}: {fault}")
            self.progress.warn(f"benchmark {title} is left out: {fault}")
            self.results.fail(f"benchmark-{title}", {"benchmark": title, "tries": 1, "reason": fault})

    def _sources(self, part: ComponentSpec) -> Iterator[Source]:
        cls = names.benchmark(part.name)
        about, chat = getattr(cls, "about", None), self.spec.scoring.chat_of(cls)
        if about == "edits":
            for order, selected in self.edits.items():
                yield Source(part.title, part.name, part.settings, order, cases=selected.cases, chat=chat)
        else:
            facts = self.edits[0].held_out if about == "held_out" else ()
            yield Source(part.title, part.name, part.settings, facts=facts, chat=chat)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """What time brings: actors that hang, nodes that leave, snapshots that nobody asks for any more."""
        pool = self.pool
        self.saver.check()
        for outcome in pool.tick():
            self._record(outcome)
        self.metrics.look(pool)
        for cell in self.cells:
            if cell.stream is not None:
                for edits in [n for n in cell.values if not pool.open(cell.stream.key(n))]:
                    del cell.values[edits]

    def _take(self, ref: Any) -> None:
        if ref not in self.streams.refs:
            for outcome in self.pool.take(ref) if ref in self.pool else []:
                self._record(outcome)
            return
        news = self.streams.take(ref)
        if isinstance(news, Opened):
            self._opened(news.cell)
        elif isinstance(news, Made):
            self.pool.submit(self._units(news.cell, news.edits))
        elif isinstance(news, Lost):
            self._lost(news)

    def _lost(self, news: Lost) -> None:
        """A cell is given up: told, and on record."""
        self.progress.warn(f"{news.cell.job.cell} is given up: {news.reason}")
        about = {"cell": news.cell.job.cell, "benchmark": "", "tries": 1, "reason": news.reason}
        self.results.fail(f"cell-{news.cell.job.cell}", about)

    def _opened(self, cell: Streaming) -> None:
        """Describe the cell: from now on its results can be told from others'."""
        assert cell.stream is not None
        self._same_as_before(cell)
        number = self.cells.index(cell) + len(self.cells) * self.spec.models.index(self.model)
        stream = {f.name: getattr(cell.stream, f.name) for f in fields(cell.stream) if f.name != "requests"}
        about = {
            "number": number,
            "model": self.model,
            "method": cell.method,
            "order": cell.order,
            "settings": dict(cell.stream.method),
            "stream": stream | {"method": dict(cell.stream.method)},
            "requests": [asdict(r) for r in cell.stream.requests],
            "dropped": [list(d) for d in self.edits[cell.order].dropped],
            "snapshots": {n: cell.stream.key(n) for n in self.spec.snapshots},
            "blocks": [w.id for w in self._works(cell.order)],
        }
        self.results.write_cell(cell.job.cell, about)

    def _same_as_before(self, cell: Streaming) -> None:
        """Results of this cell from an earlier run must have come from the same stream. Raises SpecError."""
        assert cell.stream is not None
        before = self.results.cell_about(cell.job.cell)
        now = {f.name: getattr(cell.stream, f.name) for f in fields(cell.stream) if f.name != "requests"}
        now = json.loads(json.dumps(now | {"requests": [asdict(r) for r in cell.stream.requests]}))
        there = before.get("stream", {}) | {"requests": before.get("requests")}
        changed = [name for name, value in now.items() if before and there.get(name) != value]
        if changed:
            raise SpecError(
                f"{self.results.folder}: {cell.job.cell} began with another {' and '.join(changed)} than it has now "
                f"(weights, artifacts, data of the edits or raysys itself have changed since). Nothing was touched. "
                f"Give the study another name, or bring the old state back."
            )

    def _units(self, cell: Streaming, edits: int) -> list[Unit]:
        """What is not scored yet of a snapshot. The base is scored once for all cells."""
        assert cell.stream is not None
        parts = {b.title: b for b in self.spec.benchmarks}
        key, units = cell.stream.key(edits), list[Unit]()
        for work in self._works(cell.order):
            name = content_hash([key, work.id])[:32]
            if not work.due(edits) or name in self.seen:
                continue
            self.seen.add(name)
            if name in self.done:
                self.scored += 1
                continue
            part = parts[work.benchmark]
            units.append(
                Unit(name, key, edits, cell.job.cell, work, part.name, part.settings,
                     partial(cell.value, edits), partial(cell.restore, edits), self._depth())
            )  # fmt: skip
        return units

    def _depth(self) -> int:
        """The lowest block that the methods seen so far say they edit, 0 where none does."""
        told = [cell.stream.method.get("settings", {}) for cell in self.cells if cell.stream is not None]
        layers = [n for s in told for n in (s.get("layers") or [s.get("layer")]) if isinstance(n, int)]
        return min(layers, default=0)

    def _record(self, outcome: Done | Failed) -> None:
        self.metrics.took(outcome)
        if isinstance(outcome, Done):
            self.saver.add(outcome.about, outcome.scores)
            self.scored += 1
            return
        unit, tries, why = outcome.unit, outcome.tries, outcome.reason
        self.progress.warn(f"{unit.work.benchmark} after {unit.edits} edits failed {tries} times: {why}")
        about = {"cell": unit.cell, "edits": unit.edits, "benchmark": unit.work.benchmark, "tries": tries}
        self.results.fail(unit.id, about | {"reason": why})

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _works(self, order: int) -> list[Work]:
        return [w for w in self.works if w.order in (-1, order)]

    def expected(self) -> int:
        """How many units there are, those done before included."""
        later = [n for n in self.spec.snapshots if n]
        edited = sum(w.due(n) for c in self.cells for w in self._works(c.order) for n in later)
        return edited + len({w.id for w in self.works})

    def _cell(self, method: ComponentSpec, order: int) -> Streaming:
        name = cell_name(self.model, method, order)
        requests = tuple(case.request for case in self.edits[order].cases)
        journal = str(self.results.journal_folder(name).resolve())
        cache = os.environ.get(CACHE) or str(Path.home() / ".cache" / "raysys")
        spec = self.spec
        job = Job(name, method.name, method.settings, requests, journal, cache, spec.seed, spec.on_refusal, spec.name)
        return Streaming(job, method.title, order, self.spec.snapshots)

    def show(self) -> None:
        """How far every cell is edited; an editor that gets no further is replaced. Looks into the run folder."""
        signs = {cell.job.cell: self.signs.of(cell.job.journal) for cell in self.cells}
        for cell, (edited, told) in zip(self.cells, signs.values(), strict=True):
            self.progress.edited(cell.job.cell, edited)
            self._preparing(cell.job, told)
        if lost := self.streams.watch(lambda job: signs[job.cell]):
            self._lost(lost)

    def _preparing(self, job: Job, told: Any) -> None:
        """Say what an editor makes before its first edit, and every few seconds how far that is."""
        if told and time.monotonic() - self.told >= TELLING:
            self.told = time.monotonic()
            self.progress.note(f"{job.cell}: {told['what']}, {told['done']} done (once; it is kept in the cache)")


def cell_name(model: str, method: ComponentSpec, order: int) -> str:
    """The name of a cell, fit for a folder."""
    short = model.rstrip("/").split("/")[-1]
    return f"{short}-{content_hash(model)[:4]}-{method.title}-{order}"


class Selected:
    """The edits of one order: the cases in it, what was left out and why, and facts that none of them touches."""

    def __init__(
        self, cases: Sequence[EditCase], dropped: Sequence[tuple[str, str]], held_out: Sequence[Probe]
    ) -> None:
        self.cases, self.dropped, self.held_out = tuple(cases), tuple(dropped), tuple(held_out)


def select_edits(spec: StudySpec, order: int) -> Selected:
    """The edits of a study in one order. Raises SpecError naming file, record and field when they can't be used."""
    choose = import_module("benchmarks.edits").select
    part = spec.edits
    try:
        data = names.build(names.dataset(part.dataset), part.settings, "edits")
        chosen = choose(data.cases(), part.count, seed=spec.seed, order=order, policy=part.policy)
        wanted = any(getattr(names.benchmark(b.name), "about", None) == "held_out" for b in spec.benchmarks)
        held_out = data.held_out(chosen.cases) if wanted and order == 0 else ()
    except (ValueError, OSError) as error:
        raise SpecError(str(error)) from error
    return Selected(chosen.cases, chosen.dropped, held_out)
