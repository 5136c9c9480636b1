"""The editor: holds a model, applies the edits of a stream one after another, and hands out snapshots.

A plain class, made a Ray actor only by `start`: tests call it without a cluster. Every step is in the journal before
anyone hears of it, so an editor that dies is replaced by one that takes the steps so far from the journal and goes on:
no edit is repeated, none is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors import metrics
from actors.machine import as_actor, describe, settle
from methods.parts import artifacts
from raysys import names, steps
from raysys.files import Location, place, read_json, within, write_json
from raysys.journal import Entry, Journal, Stream, last_edit, make_snapshot
from raysys.model import Model
from raysys.patch import Wearer, merge
from raysys.snapshot import Snapshot, digest
from raysys.stores import Remote
from raysys.types import EditRequest, Finishes, Patch, remembered

PREPARING = "preparing.json"  # in a cell's folder while its method is prepared


@dataclass(frozen=True)
class Job:
    """One cell's stream, as the study orders it."""

    cell: str
    method: str
    settings: Mapping[str, Any]
    requests: tuple[EditRequest, ...]
    journal: str  # folder, or address in object storage
    cache: str | None  # folder of artifacts
    seed: int
    on_refusal: str  # "stop" or "skip"
    study: str = ""  # that it belongs to, for the metrics


class Editor:
    """Edits one base model, stream after stream."""

    def __init__(
        self, model: str | Model, dtype: str, device: str, threads: int, journals: Callable[..., Journal] = Journal
    ) -> None:
        settle(threads)
        self.threads, self.journals = threads, journals
        self.model = Model.load(model, dtype, device) if isinstance(model, str) else model
        self.wearer = Wearer(self.model)
        self.method: Any = None
        self.memory: Any = None

    def __repr__(self) -> str:
        return f"Editor({self.model.name})"

    def open(self, job: Job) -> Stream:
        """Begin (or take up again) a stream; the model is the base again. Returns what identifies the stream.

        Raises ValueError when the method's settings or artifacts don't fit the model.
        """
        settle(self.threads)
        self.wearer.take_off()
        method = names.build(names.method(job.method), job.settings, f"method {job.method}")
        cache = Path(job.cache) if job.cache else None
        self.batch: int = method.batch
        if self.batch < 1:
            raise ValueError(f"method {job.method}: {self.batch} requests at a time; `batch` must be 1 or more")
        self.method = self.memory = None  # what the stream before had on the device goes first
        self.patches: tuple[Patch, ...] = ()
        self.method = self._prepared(method, within(place(job.journal).parent, PREPARING), cache)
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.stream = Stream(self.model.digest, dtype, self.method.identity(), job.requests, job.seed, self.threads)
        self.job, self.done = job, 0
        self.journal = self.journals(place(job.journal), self.stream)
        if isinstance(self.method, Finishes):
            self.journal.keep_snapshots()
        self.recorded: Iterator[Entry] | None = self.journal.entries()
        return self.stream

    def _prepared(self, method: Any, told: Location, cache: Path | None) -> Any:
        """The method prepared; while something costly is made for it, the file `told` says what and how far it is."""

        def tell(what: str, done: int, total: int) -> None:
            with suppress(OSError):  # a full disk is told by whoever writes what has to be kept
                if self.model.leads:
                    write_json(told, {"what": what, "done": done, "total": total})

        def forget() -> None:
            with suppress(OSError):
                if self.model.leads:
                    told.unlink(missing_ok=True)

        forget()  # what an editor before this one left
        try:
            with artifacts.making(tell=tell):
                return method.prepare(self.model, cache)
        finally:
            forget()

    def advance(self, edits: int) -> Snapshot:
        """The snapshot after `edits` requests of the stream: steps on record are taken from there, others are made.

        Raises ValueError when the method refuses a request and the study says to stop then.
        """
        settle(self.threads)
        while self.done < edits:
            entry = next(self.recorded, None) if self.recorded is not None else None
            if entry is None:
                self.recorded = None  # from here on nothing is on record
                entry = self._step(min(self.done + self.batch, len(self.stream.requests)))
                self.journal.append(entry)
            self.patches = merge(self.patches, entry.patches)
            self.memory = remembered(self.method, self.memory, entry.memory)
            self.done = entry.last
        if self.done != edits:
            raise ValueError(
                f"no snapshot after {edits} edits: {self.job.method} makes {self.batch} at a time; choose snapshots "
                f"that are multiples of {self.batch}"
            )
        return self._snapshot(edits)

    def _snapshot(self, edits: int) -> Snapshot:
        """What is worn after `edits` edits; a method that finishes its snapshots leaves each in the journal too."""
        if not edits or not isinstance(self.method, Finishes):
            return make_snapshot(self.stream, edits, self.patches)
        self.wearer.take_off()
        snapshot = make_snapshot(self.stream, edits, self.method.finish(self.model, self.patches))
        self.journal.keep(snapshot)
        return snapshot

    def publish(self, edits: int) -> tuple[int, Snapshot]:
        """`advance`, as two returned values: the driver fetches the number, evaluators the snapshot."""
        snapshot = self.advance(edits)
        metrics.made(self._tags(), snapshot)
        return edits, snapshot

    def _step(self, last: int) -> Entry:
        self.wearer.wear(self.patches)
        requests = self.stream.requests[self.done : last]
        started = time.time()
        torch.manual_seed(self.stream.seed * 1_000_003 + self.done)
        edit, refused = steps.make(self.method, self.model, requests, self.memory)
        if self.model.ranks > 1:
            self.model.check((digest("", edit.patches), refused))
        if refused and self.job.on_refusal == "stop":
            reason = next(iter(refused.values()))
            raise ValueError(f'{self.job.cell}: {reason} (on_refusal = "skip" goes on without it)')
        ended = time.time()
        if self.model.leads:
            metrics.edited(self._tags(), len(requests), len(refused), ended - started)
            metrics.memory(self.model.name, "editor", self.model.device)
        return Entry(self.done, last, edit.patches, edit.memory or {}, requests, started, ended, refused, edit.log)

    def _tags(self) -> dict[str, str]:
        job = self.job
        return {"study": job.study, "model": metrics.short(self.model.name), "method": job.method, "cell": job.cell}

    def describe(self) -> dict[str, Any]:
        """The machine this runs on and the digest of the base model."""
        return describe(self.model.device) | {"digest": self.model.digest}


def sign(journal: str) -> tuple[int, Any]:
    """How far the editor of a journal is: the last edit on record, and what it makes before it edits.

    A look costs a request in object storage, and is worth no waiting. Raises StorageError.
    """
    folder = place(journal)
    folder = folder.hasty(0.0) if isinstance(folder, Remote) else folder
    path = within(folder.parent, PREPARING)
    last = last_edit(folder)
    try:
        return last, read_json(path) if path.is_file() else None
    except (ValueError, FileNotFoundError):  # gone, or being replaced
        return last, None


def start(name: str, model: str, dtype: str, device: str, threads: int, gpus: float) -> Any:
    """An editor as a Ray actor. It is never restarted by Ray: the study starts a new one, which reads the journal."""
    return as_actor(Editor, f"{model}:{name}", threads, gpus).remote(model, dtype, device, threads)
