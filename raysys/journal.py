"""The journal of an edit stream: every step on disk before anyone hears of it.

One file a step (`000001.safetensors`): the patches of that step, the method's memory after it, and what was edited.
The entries form a chain: each names the hash of the one before, so that a step of another study, a missing step or a
changed request is noticed, and no edit is applied twice or left out. Any snapshot can be rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from raysys.files import Location, content_hash, found, within
from raysys.patch import merge
from raysys.snapshot import Snapshot, read, write
from raysys.types import EditRequest, Patch


@dataclass(frozen=True)
class Stream:
    """What decides a stream of edits: the same stream gives the same journal, bit for bit."""

    model: str  # digest of the base model
    dtype: str
    method: Mapping[str, Any]  # name, version, settings, artifacts
    requests: tuple[EditRequest, ...]
    seed: int
    threads: int

    def key(self, edits: int) -> str:
        """Identity of the stream after `edits` requests; after none it is the base model's, whatever the method."""
        return self._keys[edits]

    @cached_property
    def _keys(self) -> list[str]:
        """`key` of every number of edits: each hashes the one before and one request more."""
        keys = [content_hash(["base", self.model, self.dtype])[:32]]
        link = content_hash([keys[0], dict(self.method), self.seed, self.threads])
        for request in self.requests:
            link = content_hash([link, _contents(request)])
            keys.append(link[:32])
        return keys


@dataclass(frozen=True)
class Entry:
    """One step: requests number `first`+1 .. `last` of the stream. `refused`: by request id why it was not made."""

    first: int
    last: int
    patches: tuple[Patch, ...]
    memory: Mapping[str, Tensor]
    requests: tuple[EditRequest, ...]
    started: float  # unix seconds
    ended: float
    refused: Mapping[str, str] = field(default_factory=dict)
    log: Mapping[str, Any] = field(default_factory=dict)


class Journal:
    """Reads and appends the entries of one stream in `folder`."""

    def __init__(self, folder: Location, stream: Stream) -> None:
        self.folder, self.stream = folder, stream

    def append(self, entry: Entry) -> None:
        """Make `entry` durable. Raises OSError when the disk can't take it."""
        about = {
            "first": entry.first,
            "last": entry.last,
            "before": self.stream.key(entry.first),
            "key": self.stream.key(entry.last),
            "requests": [asdict(r) for r in entry.requests],
            "started": entry.started,
            "ended": entry.ended,
            "refused": dict(entry.refused),
            "log": dict(entry.log),
        }
        write(self._path(entry.last), entry.patches, entry.memory, about)

    def entries(self) -> Iterator[Entry]:
        """The entries so far, in order, up to the first gap. Raises ValueError for one that isn't of this stream."""
        done = 0
        for path in _paths(self.folder):
            if int(path.stem) <= done:
                continue
            entry, about = _load(path)
            if entry.first > done:
                return  # a step is missing: it and what follows are made again
            if about["before"] != self.stream.key(done) or about["key"] != self.stream.key(entry.last):
                raise ValueError(
                    f"{path}: this step belongs to another study (model, method, settings or requests differ); "
                    f"move {self.folder} away, or give the study another name"
                )
            yield entry
            done = entry.last

    def snapshot(self, edits: int) -> Snapshot:
        """The snapshot after `edits` requests, rebuilt from disk. Raises ValueError when the journal stops before."""
        if edits and self._kept.is_dir():
            return self._finished(edits)
        patches: tuple[Patch, ...] = ()
        done = 0
        if edits:
            for entry in self.entries():
                if entry.last > edits:
                    break
                patches, done = merge(patches, entry.patches), entry.last
        if done != edits:
            raise ValueError(f"{self.folder}: the journal has no snapshot after {edits} edits (it reaches {done})")
        return make_snapshot(self.stream, edits, patches)

    def keep_snapshots(self) -> None:
        """From now on snapshots are more than the sum of their steps, and only those given to `keep` can be had."""
        self._kept.mkdir(parents=True, exist_ok=True)

    def keep(self, snapshot: Snapshot) -> None:
        """Keep a snapshot that is more than the sum of its steps. Raises OSError when the disk can't take it."""
        snapshot.save(within(self._kept, f"{snapshot.edits:06d}.safetensors"))

    @property
    def _kept(self) -> Location:
        return within(self.folder, "finished")

    def _finished(self, edits: int) -> Snapshot:
        path = within(self._kept, f"{edits:06d}.safetensors")
        if path.is_file() and (there := Snapshot.load(path)).id == self.stream.key(edits):
            return there
        kept = ", ".join(str(int(p.stem)) for p in _paths(self._kept)) or "none yet"
        raise ValueError(
            f"{self.folder}: no snapshot after {edits} edits; this method finishes its snapshots, so that only those "
            f"of the study can be had: {kept}"
        )

    def _path(self, last: int) -> Location:
        return within(self.folder, f"{last:06d}.safetensors")


def make_snapshot(stream: Stream, edits: int, patches: Sequence[Patch], parent: str | None = None) -> Snapshot:
    """The snapshot of `stream` after `edits` requests."""
    return Snapshot(stream.key(edits), parent, edits, tuple(patches), stream.model)


def load_all(folder: Location, tensors: bool = True) -> Iterator[Entry]:
    """Every entry in a folder, in order, whatever stream it belongs to; for reports, without its `tensors`."""
    for path in _paths(folder):
        yield _load(path, tensors)[0]


def last_edit(folder: Location) -> int:
    """The number of the last edit on record in a folder, 0 for none."""
    return max((int(p.stem) for p in _paths(folder)), default=0)


def _load(path: Location, tensors: bool = True) -> tuple[Entry, dict[str, Any]]:
    patches, memory, about = read(path, tensors)
    try:
        requests = tuple(EditRequest(**r) for r in about["requests"])
        refused = about["refused"] or {}
        if isinstance(refused, str):  # as version 0.1 wrote it: a reason for all
            refused = {r.id: refused for r in requests}
        span, times = (int(about["first"]), int(about["last"])), (float(about["started"]), float(about["ended"]))
        entry = Entry(*span, patches, memory, requests, *times, dict(refused), about["log"])
        about = {"before": about["before"], "key": about["key"]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a step of a journal ({error!r}); remove it, it will be made again") from error
    return entry, about


def _paths(folder: Location) -> list[Location]:
    return [p for p in found(folder, "*.safetensors") if p.stem.isdecimal()]


def _contents(request: EditRequest) -> list[str | None]:
    return [request.prompt, request.subject, request.target, request.was]
