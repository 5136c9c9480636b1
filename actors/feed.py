"""Ray Data prepares every benchmark once: read, prompt, tokenise, group by prefix, pack by length, materialise.

What comes out are blocks in the object store; evaluators take them by reference, in any order, for every snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raysys import names
from raysys.blocks import Block, by_prefix, pack, query_of, query_tree
from raysys.chat import Chat
from raysys.tokens import Tokens
from raysys.types import EditCase, EditRequest, Probe


@dataclass(frozen=True)
class Source:
    """One benchmark as the feed needs it: what to build, and the edits it is about (for edit probes)."""

    title: str
    name: str
    settings: Mapping[str, Any]
    order: int = -1  # of the edits, for a benchmark about them; -1 for all others
    cases: tuple[EditCase, ...] = ()  # what a benchmark about the edits is about
    facts: tuple[Probe, ...] = ()  # what a benchmark about everything else is about
    chat: Chat | None = None  # how the model's chat template is applied, if it is

    def build(self) -> Any:
        """The benchmark itself."""
        built = names.build(names.benchmark(self.name), self.settings, f"benchmark {self.title}")
        over = {"edits": self.cases, "held_out": self.facts}.get(getattr(built, "about", ""))
        return built if over is None else built.over(over)

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version, settings and the chat, if there is one: part of the identity of every result."""
        about = {"name": self.name, "version": names.benchmark(self.name).version, "settings": dict(self.settings)}
        return about if self.chat is None else about | {"chat": asdict(self.chat)}


@dataclass(frozen=True)
class Work:
    """A block that waits in the object store: where it lies, and what scheduling needs to know of it."""

    id: str
    benchmark: str
    order: int  # the edit order it belongs to, -1 for all
    items: int
    tokens: int
    edits: tuple[int, int]
    table: Any  # reference of an Arrow table
    row: int

    def due(self, edits: int) -> bool:
        """Whether a snapshot after `edits` edits is asked it; the base is asked everything."""
        return edits == 0 or self.edits[1] <= edits


class BadBenchmark(ValueError):
    """The data of a benchmark can't be used; the message names file, record and field."""


def feed(
    sources: Sequence[Source], model: str, *, batch: int, size: int, cuts: Sequence[int]
) -> tuple[list[Work], dict[str, str]]:
    """Blocks of every source, tokenised for `model`, in the object store; and what was wrong, by title.

    Each source is read and tokenised by a task of its own (by several on a large cluster). A source whose data are bad
    gives no block and a message; the caller decides what becomes of the study.
    """
    shards = max(1, min(16, int(_cpus()) // (4 * max(1, len(sources)))))
    parts = [(json.dumps(asdict(s)), i) for s in sources for i in range(shards)]
    rows = [{"source": s, "shard": i, "shards": shards, "cuts": list(cuts)} for s, i in parts]
    data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    packing = {"model": model, "batch": batch, "size": size, "cuts": tuple(cuts)}
    data = data.flat_map(_read).map_batches(_pack, fn_kwargs=packing, batch_size=None, batch_format="pyarrow")
    found: list[Work] = []
    faults: dict[str, str] = {}
    for made in data.materialize().to_arrow_refs():
        blocks = ray.get(made)
        table = ray.put(blocks)  # on the driver's own node: others may leave, and are let go when nothing is on them
        for number, row in enumerate(_head(blocks).to_pylist()):
            if row["fault"]:
                faults[row["benchmark"]] = row["fault"]
            elif row["id"]:
                edits = (row["first"], row["last"])
                place = (row["order"], row["items"], row["tokens"], edits, table, number)
                found.append(Work(row["id"], row["benchmark"], *place))
    unique = {(work.order, work.id): work for work in found if work.benchmark not in faults}
    return sorted(unique.values(), key=lambda w: (-w.tokens, w.id)), faults


def _cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def _head(table: pa.Table) -> pa.Table:
    return table.drop_columns(["block"]) if "block" in table.column_names else table


def _read(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Queries of one source, a row for each group that may share blocks; this shard's share of them."""
    source = _load(json.loads(row["source"]))
    about = {"title": source.title, "identity": json.dumps(source.identity), "order": source.order}
    try:
        for number, group in enumerate(by_prefix(source.build().queries(), row["cuts"])):
            if number % row["shards"] == row["shard"]:
                told = group if source.chat else [replace(q, turns=()) for q in group]  # nobody else reads the turns
                yield about | {"queries": json.dumps([query_tree(q) for q in told]), "fault": ""}
    except (ValueError, OSError) as error:
        yield about | {"queries": "[]", "fault": str(error)}


def _pack(table: pa.Table, model: str, batch: int, size: int, cuts: tuple[int, ...]) -> pa.Table:
    """Tokenise and pack rows of `_read` into rows of blocks."""
    tokens = Tokens.load(model)
    out = []
    for row in table.to_pylist():
        identity = json.loads(row["identity"]) | {"batch": batch, "size": size}
        chat = Chat(**identity["chat"]) if "chat" in identity else None
        blocks: list[Block] = []
        fault = row["fault"]
        try:
            for group in by_prefix(map(query_of, json.loads(row["queries"])), cuts):
                blocks += pack(tokens, row["title"], identity, group, batch=batch, size=size, cuts=cuts, chat=chat)
        except ValueError as error:
            blocks, fault = [], str(error)
        out += [_row(row["title"], row["order"], block, "") for block in blocks]
        if fault:
            out.append(_row(row["title"], row["order"], None, fault))
    return pa.Table.from_pylist(out, schema=_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("order", pa.int32()),
        ("items", pa.int32()),
        ("tokens", pa.int64()),
        ("first", pa.int32()),
        ("last", pa.int32()),
        ("fault", pa.string()),
        ("block", pa.string()),
    ]
)


def _row(title: str, order: int, block: Block | None, fault: str) -> dict[str, Any]:
    if block is None:
        empty = {"id": "", "items": 0, "tokens": 0, "first": 0, "last": 0, "block": ""}
        return {"benchmark": title, "order": order, "fault": fault} | empty
    return {
        "id": block.id,
        "benchmark": title,
        "order": order,
        "items": len(block.items),
        "tokens": block.tokens,
        "first": block.edits[0],
        "last": block.edits[1],
        "fault": "",
        "block": block.dumps(),
    }


def _load(tree: Mapping[str, Any]) -> Source:
    cases = tuple(
        EditCase(EditRequest(**c["request"]), tuple(Probe(**p) for p in c["probes"]), c["source"])
        for c in tree["cases"]
    )
    facts, chat = tuple(Probe(**p) for p in tree["facts"]), Chat(**tree["chat"]) if tree["chat"] else None
    return Source(**(dict(tree) | {"cases": cases, "facts": facts, "chat": chat}))
