"""The scoring engine: blocks of queries in, answers out, at the cost of what has to be computed.

- A prefix that the queries of a block share is run once per (snapshot, prefix); its keys and values serve all of them.
- Logits are computed only at the positions that are scored, and read in float32.
- Choices that differ only in their last token share one forward pass (four answer letters cost one, not four).
- Generation is greedy; a row that has met its stop leaves the batch.
- Worn patches that look at a prompt are told where it ends; one that must see it whole gets no shared prefix, and one
  that sends a question elsewhere (to another model, with another prompt) is obeyed.

The answers equal those of lm-evaluation-harness on the same items (its rules for joining prompt and continuation and
for truncation are in raysys/blocks.py and raysys/model.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from raysys.asking import Asking
from raysys.blocks import Block, Ids, Item
from raysys.model import Model
from raysys.types import Answer, Chosen, Detour, Generate, Generated, Reroutes, Scored

KeysValues = list[tuple[Tensor, Tensor]]  # per layer, (1, heads, T, d_head) each


@dataclass(frozen=True)
class _Row:
    """One forward row of a Choose block: the fed tokens, and which choices of which item are read off it."""

    tokens: Ids
    item: int
    choices: tuple[int, ...]


class Engine:
    """Answers blocks with one resident model. `forget()` whenever the model wears something else."""

    def __init__(self, model: Model, prefixes: int = 4) -> None:
        self.model = model
        self.prefixes = prefixes  # how many shared prefixes to keep
        self._kept: dict[Ids, KeysValues] = {}

    def forget(self) -> None:
        """Drop everything computed from the weights."""
        self._kept.clear()

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
        if isinstance(block.items[0].query, Generate):
            return list(self._generate(block))
        return list(self._choose(block))

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
            there = Engine(model)
            with model.bare():
                answers = there._answer(replace(block, prefix=(), items=tuple(items[i] for i in order)))
            found |= {sent[i]: answer for i, answer in zip(order, answers, strict=True)}
        return [found[n] for n in range(len(block.items))]

    # --- choices -----------------------------------------------------------------------------------------------------

    def _choose(self, block: Block) -> Iterator[Answer]:
        rows = [row for number, item in enumerate(block.items) for row in _rows(number, item)]
        rows.sort(key=lambda r: -len(r.tokens))
        found: dict[tuple[int, int], Scored] = {}
        for start in range(0, len(rows), block.batch):
            found |= self._score(block, rows[start : start + block.batch])
        for number, item in enumerate(block.items):
            yield Chosen(tuple(found[number, c] for c in range(len(item.choices))))

    def _score(self, block: Block, rows: Sequence[_Row]) -> dict[tuple[int, int], Scored]:
        """Log-probabilities of every choice that `rows` carry, by (item, choice)."""
        width = max(len(r.tokens) for r in rows)
        ids = torch.full((len(rows), width), self.model.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row.tokens)] = torch.tensor(row.tokens)  # padded on the right: never looked at
        cache = self._cache(block.prefix, len(rows))
        with self.model.asking(self._asking([len(block.items[r.item].tokens) for r in rows], width)):
            hidden, _ = self.model.hidden(ids.to(self.model.device), cache=cache)  # (B, T, d)
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
        at = torch.tensor(list(places), device=hidden.device)  # (P, 2)
        logprobs = self.model.logits(hidden[at[:, 0], at[:, 1]]).float().log_softmax(-1)  # (P, V)
        which = torch.tensor([places[i, p] for i, p, *_ in wanted], device=hidden.device)
        tokens = torch.tensor([token for *_, token in wanted], device=hidden.device)
        values = logprobs[which, tokens].double().tolist()
        right = (logprobs.argmax(-1)[which] == tokens).tolist()
        found: dict[tuple[int, int], Scored] = {}
        for (_, _, item, choice, _), value, hit in zip(wanted, values, right, strict=True):
            so_far = found.get((item, choice), Scored(0.0, 0, 0))
            found[item, choice] = Scored(so_far.logprob + value, so_far.tokens + 1, so_far.right + int(hit))
        return found

    def _asking(self, lengths: Sequence[int], width: int) -> Asking | None:
        """Rows that begin with prompts of these lengths, among `width` columns; None when nobody wants to know."""
        if not self.model.carried:
            return None
        columns = torch.arange(width, device=self.model.device)
        return Asking.of(columns < torch.tensor(lengths, device=self.model.device)[:, None])

    # --- generation --------------------------------------------------------------------------------------------------

    def _generate(self, block: Block) -> Iterator[Answer]:
        prefix, items, query = block.prefix, block.items, block.items[0].query
        assert isinstance(query, Generate)
        if self.model.window < len(prefix) + max(len(i.tokens) for i in items) + query.max_tokens:
            # a sliding window counts the padding between a prefix and a row's own tokens: no prefix, no such padding
            prefix, items = (), tuple(Item(i.query, prefix + i.tokens) for i in items)
        for start in range(0, len(items), block.batch):
            yield from self._continue(prefix, items[start : start + block.batch])

    def _continue(self, prefix: Ids, items: Sequence[Item]) -> list[Answer]:
        """Greedy continuations of a batch. Rows are padded on the left, between the prefix and their own tokens."""
        query = items[0].query
        assert isinstance(query, Generate)
        device, width = self.model.device, max(len(i.tokens) for i in items)
        ids = torch.full((len(items), width), self.model.pad_id)
        mask = torch.ones(len(items), len(prefix) + width, dtype=torch.long)
        for i, item in enumerate(items):
            ids[i, width - len(item.tokens) :] = torch.tensor(item.tokens)
            mask[i, len(prefix) : len(prefix) + width - len(item.tokens)] = 0
        mask = mask.to(device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(prefix) :]  # (B, T)
        cache = self._cache(prefix, len(items)) or DynamicCache()
        asking = Asking.of(mask[:, len(prefix) :].bool()) if self.model.carried else None
        with self.model.asking(asking):
            hidden, cache = self.model.hidden(ids.to(device), attention_mask=mask, cache=cache, position_ids=position)
        rows = list(range(len(items)))  # which item each row of the batch is
        made: list[list[int]] = [[] for _ in items]
        position = position[:, -1:]
        for _ in range(query.max_tokens):
            tokens = self.model.logits(hidden[:, -1]).argmax(-1)  # (B,)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                made[row].append(token)
            going = [i for i, row in enumerate(rows) if not self._stopped(made[row], query)]
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                rows, tokens, mask, position = [rows[i] for i in going], tokens[keep], mask[keep], position[keep]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
            position = position + 1
            step = asking.following(torch.tensor(rows, device=device)) if asking else None
            with self.model.asking(step):
                hidden, cache = self.model.hidden(tokens[:, None], mask, cache, position)
        return [Generated(_cut(self.model.decode(ids), query.stops), len(ids)) for ids in made]

    def _stopped(self, ids: Sequence[int], query: Generate) -> bool:
        if ids[-1] in self.model.eos_ids:
            return True
        longest = max((len(s) for s in query.stops), default=0)
        tail = self.model.tokens.decode(ids[-(longest + 2) :], special=True)  # a token is at least a byte
        return any(stop in tail for stop in query.stops)

    # --- shared prefixes ---------------------------------------------------------------------------------------------

    def _cache(self, prefix: Ids, rows: int) -> DynamicCache | None:
        """A cache that starts with `prefix` for `rows` rows, or None without a prefix."""
        if not prefix:
            return None
        if prefix not in self._kept:
            while len(self._kept) >= self.prefixes:
                del self._kept[next(iter(self._kept))]
            ids = torch.tensor([prefix], device=self.model.device)
            with self.model.bare():  # nobody's question ends here
                _, cache = self.model.hidden(ids, cache=DynamicCache())
            assert cache is not None
            self._kept[prefix] = [(layer.keys, layer.values) for layer in cache.layers]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._kept[prefix]):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
        return cache


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


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text
