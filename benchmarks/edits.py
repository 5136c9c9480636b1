"""Data sets of edits, and the choice of those that a study makes.

`cases()` gives the records of a file in its order. It is an iterator that survives a bad record: `next` raises
BadRecord for it and may be called again. `select` uses that to drop bad records where the policy says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from random import Random
from typing import ClassVar, Literal, Protocol

from benchmarks import edit_records, sources
from benchmarks.edit_records import BadRecord, Target
from benchmarks.sources import Placed
from raysys.types import EditCase, Probe

Policy = Literal["fail", "skip", "last"]
COUNTERFACT = sources.Hub(  # ROME's 21,919 records, in two parts
    id="azhx/counterfact",
    config=None,
    revision="c01c413f856ee38f5c080c9fc5e87aff478e2ff9",
    rows={"train": 19_728, "test": 2_191},
)


class Dataset(Protocol):
    """A data set of edits: a frozen keyword-only dataclass of settings with these members."""

    name: ClassVar[str]
    version: ClassVar[str]

    def cases(self) -> Iterator[EditCase]:
        """The edits in file order. Raises ValueError when the file can't be read, BadRecord for one record."""
        ...

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        """Facts that none of `edited` touches, for `locality`, each once."""
        ...


@dataclass(frozen=True, kw_only=True)
class CounterFact:
    """CounterFact. `path`: a JSON, JSONL or parquet file in ROME's or EasyEdit's layout, or a folder with one such
    file; empty: ROME's records from the hub (azhx/counterfact, 21,919 rows)."""

    path: str = ""

    name: ClassVar[str] = "counterfact"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        rows = located(self.path) if self.path else chain.from_iterable(
            sources.from_hub(COUNTERFACT, split) for split in COUNTERFACT.rows
        )  # fmt: skip
        return map(edit_records.counterfact, rows)

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        return neighbours_beyond(self.cases(), edited)


@dataclass(frozen=True, kw_only=True)
class Zsre:
    """ZsRE in EasyEdit's layout. `path`: a file or a folder with one; `target`: see `edit_records.zsre`."""

    path: str = ""
    target: Target = "alt"

    name: ClassVar[str] = "zsre"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        if not self.path:
            raise ValueError(
                "zsre: `path` is empty and no copy on the hub is pinned. Give the file, for example EasyEdit's "
                "zsre_mend_eval_portability_gpt4.json (1,037 records) or MEND's zsre_mend_eval.json."
            )
        return map(partial(edit_records.zsre, target=self.target), located(self.path))

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        return neighbours_beyond(self.cases(), edited)


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Your own edits: a JSON array or JSON lines; `benchmarks.edit_records.custom` documents a record."""

    path: str

    name: ClassVar[str] = "json"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        return map(edit_records.custom, located(self.path))

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        return neighbours_beyond(self.cases(), edited)


@dataclass(frozen=True, kw_only=True)
class World:
    """Edits of the built-in world's facts. `part` "training": others, for methods that are trained before they edit."""

    part: Literal["edits", "training"] = "edits"

    name: ClassVar[str] = "world"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        world = import_module("benchmarks.world")
        rows = enumerate(world.edit_records() if self.part == "edits" else world.training_records(), 1)
        placed = (Placed(f"world {self.part}, record {i}", row, i) for i, row in rows)
        return map(partial(edit_records.rome, dataset=self.name), placed)

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        subjects = {case.request.subject for case in edited}
        facts = [f for f in import_module("benchmarks.world").facts() if f["subject"] not in subjects]
        return [Probe("neighbourhood", fact["held_in"][0], fact["object"]) for fact in facts]


def located(path: str) -> Iterator[Placed]:
    """The records of a file, or of the only data file in a folder."""
    place = Path(path)
    if place.is_dir():
        files = sorted(p for p in place.iterdir() if p.suffix in sources.ENDINGS)
        if len(files) != 1:
            names = ", ".join(p.name for p in files) or "none"
            raise ValueError(f"{place}: a folder with one .json, .jsonl or .parquet file is meant; it has: {names}.")
        [place] = files
    return sources.records(place)


def neighbours_beyond(cases: Iterator[EditCase], edited: Sequence[EditCase]) -> list[Probe]:
    """The neighbourhood facts of all records that are not edited, about no edited subject, each prompt once."""
    ids = {case.request.id for case in edited}
    subjects = tuple({case.request.subject for case in edited})
    found: dict[str, Probe] = {}
    for case in readable(cases):
        if isinstance(case, EditCase) and case.request.id not in ids:
            for probe in case.probes:
                if probe.kind == "neighbourhood" and not any(s in probe.prompt for s in subjects):
                    found.setdefault(probe.prompt, Probe("neighbourhood", probe.prompt, probe.right))
    return list(found.values())


# --- the choice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """The edits of a study in their order; `dropped` says which records were left out (place, reason)."""

    cases: tuple[EditCase, ...]
    dropped: tuple[tuple[str, str], ...] = ()


def readable(cases: Iterable[EditCase]) -> Iterator[EditCase | BadRecord]:
    """The cases with bad records in place, as values."""
    iterator = iter(cases)
    while (case := _next(iterator)) is not None:
        yield case


def _next(iterator: Iterator[EditCase]) -> EditCase | BadRecord | None:
    try:
        return next(iterator, None)
    except BadRecord as fault:
        return fault


def select(
    cases: Iterable[EditCase], count: int | None = None, *, seed: int = 0, order: int = 0, policy: Policy = "fail"
) -> Selection:
    """The first `count` good records (all when None), in file order for `order` 0, else in the order-th shuffle.

    Every order has the same edits. A record is bad when it can't be read, has an empty field or lacks its subject;
    two records collide when they edit the same subject in the same prompt, or have the same id. `policy` "fail":
    ValueError for the first of these; "skip": leave out the bad one, or the later of two that collide; "last": leave
    out the bad one, or the earlier of two. Records after the `count`-th good one are not looked at.
    Raises ValueError when there are fewer than `count` good records.
    """
    kept: dict[tuple[str, str], EditCase] = {}
    ids: dict[str, str] = {}
    dropped: list[tuple[str, str]] = []
    looked_at = 0
    for case in readable(cases):
        if count is not None and len(kept) >= count:
            break
        looked_at += 1
        reason = case.reason if isinstance(case, BadRecord) else _same_id(case, ids)
        if isinstance(case, BadRecord) or reason:
            place = case.place if isinstance(case, BadRecord) else case.source
            if policy == "fail":
                raise ValueError(f"{place}: {reason}")
            dropped.append((place, reason))
            continue
        key = (case.request.subject, case.request.text)
        if key in kept:
            loser, reason = _collision(kept[key], case, policy)
            dropped.append((loser.source, reason))
            if loser is case:
                continue
            del kept[key]  # so that the later one also stands later
        ids[case.request.id] = case.source
        kept[key] = case
    if count is not None and len(kept) < count:
        lost = f" ({len(dropped)} left out by policy = {policy!r}, first: {': '.join(dropped[0])})" if dropped else ""
        raise ValueError(f"{count} edits wanted, but only {len(kept)} of {looked_at} records are usable{lost}.")
    chosen = list(kept.values())
    if order:
        Random(f"{seed}/{order}").shuffle(chosen)
    return Selection(tuple(chosen), tuple(dropped))


def _same_id(case: EditCase, ids: dict[str, str]) -> str:
    """The fault of a record whose id another one has; "" when there is none."""
    first = ids.get(case.request.id)
    return f"its id {case.request.id!r} is that of {first} too; give each record its own, or none." if first else ""


def _collision(first: EditCase, second: EditCase, policy: Policy) -> tuple[EditCase, str]:
    """Which of two edits of one prompt is left out, and why. Raises ValueError where the policy is to fail."""
    fact = f"edits the same subject and prompt ({second.request.text!r})"
    if policy == "fail":
        raise ValueError(
            f"{second.source}: fields 'subject' and 'prompt': it {fact} as {first.source}, so one edit would undo the "
            'other. Remove one, or set policy = "skip" (keep the first) or "last" (keep the last).'
        )
    loser, winner = (second, first) if policy == "skip" else (first, second)
    return loser, f"{fact} as {winner.source}"
