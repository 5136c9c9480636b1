"""The scoring engine: blocks of queries in, answers out, at the cost of what has to be computed.

- A prefix that the queries of a block share is run once per (snapshot, prefix); its keys and values serve all of them.
- Logits are computed only at the positions that are scored, and read in float32 (`softmax = "model"`: in the model's
  own number type, as lm-evaluation-harness does by default).
- Choices that differ only in their last token share one forward pass (four answer letters cost one, not four).
- Below the first edited block nothing is computed twice (raysys/trunks.py).
- Generation is greedy; a row that has met its stop leaves the batch; earlier answers are drafts (raysys/writing.py).
- A batch that does not fit into memory is halved.
- Worn patches that look at a prompt are told where it ends; one that must see it whole gets no shared prefix, and one
  that sends a question elsewhere (to another model, with another prompt) is obeyed.

The answers equal those of lm-evaluation-harness on the same items (its rules for joining prompt and continuation and
for truncation are in raysys/blocks.py and raysys/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from raysys.asking import Asking
from raysys.blocks import Block, Ids, Item
from raysys.model import Model
from raysys.passes import Passes
from raysys.trunks import GIB, Trunks, first_edited
from raysys.types import Answer, Chosen, Detour, Generate, Patch, Reroutes, Scored
from raysys.writing import AT_ONCE, Writer

Softmax = Literal["float32", "model"]


@dataclass(frozen=True)
class _Row:
    """One forward row of a Choose block: the fed tokens, and which choices of which item are read off it."""

    tokens: Ids
    item: int
    choices: tuple[int, ...]


class Engine:
    """Answers blocks with one resident model. Say `wears(patches)` whenever the model wears something else.

    `trunk_memory`: GiB for what enters the first edited block, on the model's device, and as much again in host
    memory beside a GPU; 0: every pass is whole. `drafts`: verify earlier answers instead of generating them again.
    `softmax`: in which number type log-probabilities are computed.
    """

    def __init__(
        self, model: Model, *, trunk_memory: float = 2.0, drafts: bool = True, softmax: Softmax = "float32"
    ) -> None:
        self.model, self.softmax = model, softmax
        # what goes to host memory depends on measured times, which the ranks of a split model don't share
        far = trunk_memory * GIB if model.device.type == "cuda" and model.ranks == 1 else 0.0
        self.trunks = Trunks(model.device, trunk_memory * GIB, far, model.agreed) if trunk_memory else None
        self.passes = Passes(model, self.trunks)
        self.writer = Writer(self.passes, drafts)

    def wears(self, patches: Sequence[Patch]) -> None:
        """The model now wears `patches`: what was computed from edited weights is dropped, the rest is kept."""
        self.passes.forget(first_edited(self.model, patches))
        if self.trunks is not None:
            self.trunks.begin()

    def forget(self) -> None:
        """Drop everything computed from the weights, which may differ anywhere now."""
        self.passes.forget()

    @torch.inference_mode()
    def answer(self, block: Block) -> list[Answer]:
        """One answer per item of the block, in its order."""
        if not block.items:
            return []
        carried = self.model.carried
        if block.prefix and any(getattr(p, "whole", False) for p in carried):
            block = _whole(block)
        for patch in carried:
            if isinstance(patch, Reroutes):
                return self._rerouted(patch, block)
        return self._answer(block)

    def _answer(self, block: Block) -> list[Answer]:
        query = block.items[0].query
        following = query.max_tokens if isinstance(query, Generate) else 1
        longest = max(len(i.tokens) + max(map(len, i.choices), default=0) for i in block.items) + following
        size = block.batch or self.passes.automatic(len(block.prefix), longest)
        if isinstance(query, Generate):
            return list(self.writer.write(block, size))
        return list(self._choose(block, size))

    def _rerouted(self, patch: Reroutes, block: Block) -> list[Answer]:
        """Answers of which some come by a detour: from another model, or after another prompt."""
        detours = patch.reroute(self.model, [block.prefix + i.tokens for i in block.items])
        straight = [n for n, detour in enumerate(detours) if detour is None]
        found: dict[int, Answer] = {}
        if straight:
            rest = replace(block, items=tuple(block.items[n] for n in straight))
            found |= dict(zip(straight, self._answer(rest), strict=True))
        away = {n: detour for n, detour in enumerate(detours) if detour is not None}
        models = {id(d.model): d.model for d in away.values()}
        for key, model in models.items():
            sent = [n for n, d in away.items() if id(d.model) == key]
            items = [_sent(block.items[n], away[n]) for n in sent]
            order = sorted(range(len(sent)), key=lambda i: -len(items[i].tokens))
            there = Engine(model, trunk_memory=0, drafts=False, softmax=self.softmax)
            with model.bare():
                answers = there._answer(replace(block, prefix=(), items=tuple(items[i] for i in order)))
            found |= {sent[i]: answer for i, answer in zip(order, answers, strict=True)}
        return [found[n] for n in range(len(block.items))]

    # --- choices -----------------------------------------------------------------------------------------------------

    def _choose(self, block: Block, size: int) -> Iterator[Answer]:
        rows = [row for number, item in enumerate(block.items) for row in _rows(number, item)]
        rows.sort(key=lambda r: -len(r.tokens))
        found: dict[tuple[int, int], Scored] = {}
        for _, some in self.passes.in_batches(rows, size, lambda first, part: self._score(block, first, part)):
            found |= some
        for number, item in enumerate(block.items):
            yield Chosen(tuple(found[number, c] for c in range(len(item.choices))))

    def _score(self, block: Block, first: int, rows: Sequence[_Row]) -> dict[tuple[int, int], Scored]:
        """Log-probabilities of every choice that `rows` carry, by (item, choice); `first`: the first row's number."""
        width = max(len(r.tokens) for r in rows)
        ids = torch.full((len(rows), width), self.model.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row.tokens)] = torch.tensor(row.tokens)  # padded on the right: never looked at
        asking = self._asking([len(block.items[r.item].tokens) for r in rows], width)
        hidden = self.passes.final((block.id, first), block.prefix, ids, asking)  # (B, T, d)
        wanted = [
            (i, len(row.tokens) - len(target) + k, row.item, choice, token)
            for i, row in enumerate(rows)
            for choice in row.choices
            for target in (block.items[row.item].choices[choice],)
            for k, token in enumerate(target)
        ]
        places: dict[tuple[int, int], int] = {}  # (row, position) -> index of its logits
        for i, position, *_ in wanted:
            places.setdefault((i, position), len(places))
        values, hits = self._read(hidden, list(places), [(places[i, p], token) for i, p, *_, token in wanted])
        found: dict[tuple[int, int], Scored] = {}
        for (_, _, item, choice, _), value, hit in zip(wanted, values, hits, strict=True):
            so_far = found.get((item, choice), Scored(0.0, 0, 0))
            found[item, choice] = Scored(so_far.logprob + value, so_far.tokens + 1, so_far.right + int(hit))
        return found

    def _read(
        self, hidden: Tensor, places: list[tuple[int, int]], wanted: list[tuple[int, int]]
    ) -> tuple[list[float], list[bool]]:
        """Log-probability in nats of each wanted (index into `places`, token), and whether it is the likeliest token.

        `places` are (row, column) of `hidden` (B, T, d).
        """
        values, hits = [0.0] * len(wanted), [False] * len(wanted)
        order = sorted(range(len(wanted)), key=lambda n: wanted[n][0])
        for start in range(0, len(places), AT_ONCE):
            at = torch.tensor(places[start : start + AT_ONCE], device=hidden.device)  # (P, 2)
            logits = self.model.logits(hidden[at[:, 0], at[:, 1]])  # (P, V)
            logprobs = (logits.float() if self.softmax == "float32" else logits).log_softmax(-1)
            here = [n for n in order if start <= wanted[n][0] < start + AT_ONCE]
            which = torch.tensor([wanted[n][0] - start for n in here], device=hidden.device)
            tokens = torch.tensor([wanted[n][1] for n in here], device=hidden.device)
            right = (logits.argmax(-1)[which] == tokens).tolist()
            for n, value, hit in zip(here, logprobs[which, tokens].double().tolist(), right, strict=True):
                values[n], hits[n] = value, hit
        return values, hits

    def _asking(self, lengths: Sequence[int], width: int) -> Asking | None:
        """Rows that begin with prompts of these lengths, among `width` columns; None when nobody wants to know."""
        if not self.model.carried:
            return None
        columns = torch.arange(width, device=self.model.device)
        return Asking.of(columns < torch.tensor(lengths, device=self.model.device)[:, None])


def _rows(number: int, item: Item) -> Iterator[_Row]:
    """Forward rows of an item: one for all choices whose fed tokens (all but the last) are the same."""
    by_tokens: dict[Ids, list[int]] = {}
    for choice, target in enumerate(item.choices):
        by_tokens.setdefault(item.tokens + target[:-1], []).append(choice)
    for tokens, choices in by_tokens.items():
        yield _Row(tokens, number, tuple(choices))


def _whole(block: Block) -> Block:
    """The block without a shared prefix: every item has its own."""
    items = tuple(replace(i, tokens=block.prefix + i.tokens) for i in block.items)
    return replace(block, prefix=(), items=items)


def _sent(item: Item, detour: Detour) -> Item:
    """`item` after a detour's prompt, cut behind what it keeps (if that leaves a token) to what its model reads."""
    model, prompt = detour.model, detour.prompt
    following = item.query.max_tokens if isinstance(item.query, Generate) else max(map(len, item.choices)) - 1
    if following >= model.max_length:
        raise ValueError(f"{item.query.id}: {following} tokens of answer leave {model.name or 'the model'} no room")
    room = model.max_length - following
    if len(prompt) > room:
        keep = detour.keep if detour.keep < room else 0
        prompt = prompt[:keep] + prompt[-(room - keep) :]
    return replace(item, tokens=prompt)
