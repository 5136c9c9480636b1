"""Queries, tokenised and packed: what an evaluator takes in one go, and what a result belongs to.

A `Block` holds queries of one benchmark that share a token prefix, in the order in which they are run, and the batch
size, so that the shapes of every forward pass belong to the block and not to the moment: the same block gives the
same bits on whichever evaluator it lands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from raysys.files import content_hash
from raysys.types import Choose, Generate, Query, Turn

if TYPE_CHECKING:
    from raysys.chat import Chat
    from raysys.tokens import Tokens

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """One tokenised query: `tokens` follow the block's prefix; `choices` (of a Choose) follow those."""

    query: Query  # without its texts: id, group, gold, choices, extra are what scoring needs
    tokens: Ids
    choices: tuple[Ids, ...] = ()


@dataclass(frozen=True)
class Block:
    """Items that share `prefix`. `edits`: the range (from, to] of edits that its queries belong to, (0, 0) for none."""

    benchmark: str  # title in the study
    identity: Mapping[str, Any]  # name, version and settings of the benchmark, and of the packing
    prefix: Ids
    items: tuple[Item, ...]
    batch: int
    edits: tuple[int, int] = (0, 0)
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            content = [dict(self.identity), self.prefix, self.batch, self.edits, [_item_tree(i) for i in self.items]]
            object.__setattr__(self, "id", content_hash(content)[:32])

    @property
    def tokens(self) -> int:
        """Tokens a model has to read, the prefix once."""
        return len(self.prefix) + sum(len(i.tokens) + sum(len(c) for c in i.choices) for i in self.items)

    def dumps(self) -> str:
        """JSON, for a column of a table."""
        tree = {
            "benchmark": self.benchmark,
            "identity": dict(self.identity),
            "prefix": self.prefix,
            "items": [_item_tree(i) for i in self.items],
            "batch": self.batch,
            "edits": self.edits,
            "id": self.id,
        }
        return json.dumps(tree)

    @classmethod
    def loads(cls, text: str) -> Block:
        """What `dumps` wrote."""
        tree = json.loads(text)
        items = tuple(
            Item(query_of(i["query"]), tuple(i["tokens"]), tuple(map(tuple, i["choices"]))) for i in tree["items"]
        )
        first, last = tree["edits"]
        return cls(
            tree["benchmark"], tree["identity"], tuple(tree["prefix"]), items, tree["batch"], (first, last), tree["id"]
        )


def query_tree(query: Query) -> dict[str, Any]:
    """A query as plain data; without turns it is what it was before there were any."""
    tree = {"kind": query.kind} | asdict(query)
    return tree if query.turns else {k: v for k, v in tree.items() if k != "turns"}


def query_of(tree: Mapping[str, Any]) -> Query:
    """The query that `query_tree` described."""
    fields = {k: v for k, v in tree.items() if k != "kind"}
    fields["turns"] = tuple(Turn(*turn) for turn in fields.get("turns", ()))
    if tree["kind"] == Choose.kind:
        return Choose(**(fields | {"choices": tuple(fields["choices"])}))
    return Generate(**(fields | {"stops": tuple(fields["stops"])}))


def by_prefix(queries: Iterable[Query], cuts: Sequence[int] = ()) -> Iterator[list[Query]]:
    """Queries in groups that may stand in one block: the same kind, shared text, generation settings and edit range.

    `cuts` are the numbers of edits at which snapshots are taken: an edit between two cuts is first asked about at the
    later one, so the ranges between cuts are kept apart.
    """
    groups: dict[Any, list[Query]] = {}
    for query in queries:
        limits = (query.stops, query.max_tokens) if isinstance(query, Generate) else ()
        groups.setdefault((query.kind, query.shared, limits, _range(query.edit, cuts)), []).append(query)
    yield from groups.values()


def pack(
    model: Tokens,
    benchmark: str,
    identity: Mapping[str, Any],
    queries: Sequence[Query],
    *,
    batch: int,
    size: int,
    cuts: Sequence[int] = (),
    chat: Chat | None = None,
) -> Iterator[Block]:
    """Tokenise one group of `by_prefix` and cut it into blocks of at most `size` queries of similar length.

    A query too long for the model is truncated from the left (the rule of lm-evaluation-harness) and, since it has
    lost the prefix that the others share, goes into a block without one. Under a chat template (`chat`) a prefix is
    whatever tokens the queries all begin with.
    """
    whole: list[Item] = []
    cut: list[Item] = []
    for query in queries:
        item, truncated = _tokenise(model, query, chat)
        (cut if truncated else whole).append(item)
    edits = _range(queries[0].edit, cuts) if queries else (0, 0)
    for items, limit in ((whole, _shared(model, queries, chat)), (cut, 0)):
        if not items:
            continue
        prefix = _common_prefix([i.tokens for i in items], limit)
        items = [Item(i.query, i.tokens[len(prefix) :], i.choices) for i in items]
        items.sort(key=lambda i: (-len(i.tokens) - max(map(len, i.choices), default=0), i.query.id))
        for start in range(0, len(items), size):
            yield Block(benchmark, identity, prefix, tuple(items[start : start + size]), batch, edits)


def _range(edit: int, cuts: Sequence[int]) -> tuple[int, int]:
    if edit == 0:
        return 0, 0
    first = max((c for c in cuts if c < edit), default=0)
    last = min((c for c in cuts if c >= edit), default=edit)
    return first, last


def _shared(model: Tokens, queries: Sequence[Query], chat: Chat | None) -> int:
    """How many tokens a group may share at most."""
    if chat is not None:
        return model.max_length
    return len(model.encode(queries[0].shared)) if queries and queries[0].shared else 0


def _tokenise(model: Tokens, query: Query, chat: Chat | None) -> tuple[Item, bool]:
    blank = asdict(replace(query, prompt="", shared="", turns=()))  # choices as the benchmark scores them
    if chat is not None:
        query = chat.asked(model.tokenizer, query)
    if isinstance(query, Generate):
        tokens = model.encode(query.prompt, generation=True)
        room = model.max_length - query.max_tokens
        if room < 1:
            raise ValueError(
                f"{query.id}: {query.max_tokens} tokens to generate leave no room for a prompt in the model's "
                f"{model.max_length}; lower max_tokens"
            )
        return Item(Generate(**blank), tuple(tokens[-room:])), len(tokens) > room
    pairs = [model.pair(query.prompt, choice) for choice in query.choices]
    context = pairs[0][0]
    if any(p[0] != context for p in pairs):  # trailing blanks moved to the continuation are the same for all
        raise ValueError(f"{query.id}: its choices are tokenised after different prompts")
    longest = max(len(c) for _, c in pairs)
    room = model.max_length + 1 - longest  # the last token of a continuation is never fed
    if room < 1:
        raise ValueError(f"{query.id}: a choice of {longest} tokens is longer than the model's {model.max_length}")
    if not all(c for _, c in pairs):
        raise ValueError(f"{query.id}: one of its choices has no tokens")
    if not context:
        raise ValueError(f"{query.id}: an empty prompt and a tokenizer without a first token: nothing to condition on")
    item = Item(Choose(**blank), tuple(context[-room:]), tuple(tuple(c) for _, c in pairs))
    return item, len(context) > room


def _common_prefix(rows: Sequence[Ids], limit: int) -> Ids:
    """The longest prefix that all rows share, at most `limit` long, leaving each row at least one token."""
    length = min(limit, *(len(r) - 1 for r in rows))
    first, last = min(rows), max(rows)  # what these two share, all do
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: max(min(length, same), 0)]


def _item_tree(item: Item) -> dict[str, Any]:
    return {"query": query_tree(item.query), "tokens": item.tokens, "choices": item.choices}
