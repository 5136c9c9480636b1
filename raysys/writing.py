"""Greedy generation: rows that finish leave the batch, and earlier answers serve as drafts.

**Drafts.** Most answers of a snapshot are those of an earlier one. One pass over prompt and earlier answer tells how
far greedy decoding would have gone the same way; only what follows is generated (speculative decoding with a draft
that costs nothing; Leviathan et al., ICML 2023, arXiv:2211.17192, at temperature 0). With a kept trunk that pass runs
the upper blocks alone.

**Near ties.** Where the two best logits lie closer together than rounding can tell, another batch could choose
otherwise. An item that meets one is answered alone, by plain generation, so that its text depends on neither batch nor
draft. In half precision such ties are everywhere: no drafts there, and batches stay as the block says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysys.asking import Asking
from raysys.blocks import Block, Ids, Item
from raysys.kv import growing
from raysys.passes import Passes
from raysys.types import Generate, Generated

MARGIN = {torch.float32: 2e-4}  # of two logits, within which rounding may decide; other number types: unknown
AT_ONCE = 256  # positions whose logits are held at the same time


@dataclass
class _Text:
    """One item's answer as it grows: `made` tokens, whether it is `over`, whether it met a near tie."""

    made: list[int]
    over: bool = False
    tie: bool = False


class Writer:
    """Generates the answers of blocks. `drafts`: use earlier answers where the number type allows it."""

    def __init__(self, passes: Passes, drafts: bool = True) -> None:
        self.passes, self.model = passes, passes.model
        self.margin = MARGIN.get(self.model.dtype, 0.0)
        self.drafts = drafts and self.margin > 0
        self._drafts: dict[str, list[Ids]] = {}  # block -> one earlier answer per item
        self.accepted = self.drafted = 0  # tokens

    def drafts_of(self, block: Block) -> Sequence[Ids]:
        """What is held to be the answers of `block`, one per item; empty before the first."""
        return self._drafts.get(block.id, ())

    def suppose(self, block: Block, answers: Sequence[Ids]) -> None:
        """Take `answers` (tokens, one answer per item) for drafts: any will do, good ones save time."""
        self._drafts[block.id] = list(answers)

    def write(self, block: Block, size: int) -> Iterator[Generated]:
        """Answers in the block's order, in batches of `size`."""
        prefix, items, query = block.prefix, block.items, block.items[0].query
        assert isinstance(query, Generate)
        if self.model.window < len(prefix) + max(len(i.tokens) for i in items) + query.max_tokens:
            # a sliding window counts the padding between a prefix and a row's own tokens: no prefix, no such padding
            prefix, items = (), tuple(Item(i.query, prefix + i.tokens) for i in items)
        texts = [_Text([]) for _ in items]
        drafting = self.drafts and not self.model.carried
        if drafting and block.id in self._drafts:
            self._verify(block, prefix, items, texts, size)
        open_ = [n for n, text in enumerate(texts) if not text.over and not text.tie]
        open_.sort(key=lambda n: -len(items[n].tokens) - len(texts[n].made))
        for part, found in self.passes.in_batches(
            open_, size, lambda _, part: self._continue(prefix, [items[n] for n in part], [texts[n].made for n in part])
        ):
            for n, text in zip(part, found, strict=True):
                texts[n] = text
        for n in [n for n, text in enumerate(texts) if text.tie]:
            [texts[n]] = self._continue(prefix, [items[n]], [[]])
        if drafting:
            self._remember(block, texts)
        for text in texts:
            yield Generated(_cut(self.model.decode(text.made), query.stops), len(text.made))

    def _remember(self, block: Block, texts: Sequence[_Text]) -> None:
        """Keep answers as drafts; an old draft stays while at least half of it holds, since its trunk is kept too."""
        before = self._drafts.get(block.id)
        new = [tuple(text.made) for text in texts]
        if before is not None:
            new = [old if 2 * _same(old, now) >= len(old) else now for old, now in zip(before, new, strict=True)]
        self._drafts[block.id] = new

    # --- drafts ------------------------------------------------------------------------------------------------------

    def _verify(self, block: Block, prefix: Ids, items: Sequence[Item], texts: list[_Text], size: int) -> None:
        """Take over from each item's draft what greedy decoding would have written now."""
        drafts = self._drafts[block.id]
        order = sorted(range(len(items)), key=lambda n: -len(items[n].tokens) - len(drafts[n]))

        def run(first: int, part: Sequence[int]) -> list[_Text]:
            rows = [items[n].tokens + drafts[n][:-1] for n in part]
            ids = torch.full((len(rows), max(map(len, rows))), self.model.pad_id)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)  # padded on the right: never looked at
            hidden = self.passes.final((block.id, "drafts", first), prefix, ids)
            places = [(i, len(items[n].tokens) - 1 + k) for i, n in enumerate(part) for k in range(len(drafts[n]))]
            best, tie = self._best(hidden, places)
            made, start = [], 0
            for n in part:
                end = start + len(drafts[n])
                made.append(self._accept(drafts[n], best[start:end], tie[start:end], items[n].query))
                start = end
            return made

        for part, found in self.passes.in_batches(order, size, run):
            for n, text in zip(part, found, strict=True):
                texts[n] = text

    def _best(self, hidden: Tensor, places: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The likeliest token at each (row, column) of `hidden` (B, T, d), and whether the next best is as near."""
        at = torch.tensor(places, device=hidden.device)
        best: list[int] = []
        tie: list[bool] = []
        for some in torch.split(at, AT_ONCE):
            logits = self.model.logits(hidden[some[:, 0], some[:, 1]])
            best += logits.argmax(-1).tolist()
            tie += self._near(logits).tolist()
        return best, tie

    def _near(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,) bool: whether rounding could put the second token first."""
        two = logits.topk(2, -1).values
        return two[:, 0] - two[:, 1] < self.margin

    def _accept(self, draft: Ids, best: Sequence[int], tie: Sequence[bool], query: object) -> _Text:
        same = _same(draft, best)
        self.drafted, self.accepted = self.drafted + len(draft), self.accepted + same
        if any(tie[: same + 1]):
            return _Text([], tie=True)
        if same == len(draft):  # it ended then for a reason that holds now
            return _Text(list(draft), over=True)
        made = [*draft[:same], best[same]]
        assert isinstance(query, Generate)
        return _Text(made, over=len(made) >= query.max_tokens or self._stopped(made, query))

    # --- token by token ----------------------------------------------------------------------------------------------

    def _continue(self, prefix: Ids, items: Sequence[Item], begun: Sequence[Sequence[int]]) -> list[_Text]:
        """Greedy continuations of a batch whose answers have `begun`.

        Rows are padded on the left, between the prefix and their own tokens.
        """
        query = items[0].query
        assert isinstance(query, Generate)
        device, prompts = self.model.device, [(*i.tokens, *b) for i, b in zip(items, begun, strict=True)]
        width = max(map(len, prompts))
        ids = torch.full((len(items), width), self.model.pad_id)
        mask = torch.ones(len(items), len(prefix) + width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, len(prefix) : len(prefix) + width - len(prompt)] = 0
        mask = mask.to(device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, len(prefix) :]  # (B, T)
        room = width + query.max_tokens - min(map(len, begun))
        cache = growing(self.passes.prefix(prefix) if prefix else (), self.model.layers, room)
        asking = Asking.of(mask[:, len(prefix) :].bool()) if self.model.carried else None
        with self.model.asking(asking):
            hidden, cache = self.model.hidden(ids.to(device), attention_mask=mask, cache=cache, position_ids=position)
        rows = list(range(len(items)))  # which item each row of the batch is
        texts = [_Text(list(b)) for b in begun]
        position, alone = position[:, -1:], len(items) == 1
        while True:
            logits = self.model.logits(hidden[:, -1])
            tokens = logits.argmax(-1)  # (B,)
            near = [False] * len(rows) if alone or not self.margin else self._near(logits).tolist()
            for row, token, tie in zip(rows, tokens.tolist(), near, strict=True):
                text = texts[row]
                text.made.append(token)
                text.tie = tie
                text.over = len(text.made) >= query.max_tokens or self._stopped(text.made, query)
            going = [i for i, row in enumerate(rows) if not texts[row].over and not texts[row].tie]
            if not going:
                return texts
            if len(going) < len(rows):
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                rows, tokens, mask, position = [rows[i] for i in going], tokens[keep], mask[keep], position[keep]
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
            position = position + 1
            step = asking.following(torch.tensor(rows, device=device)) if asking else None
            with self.model.asking(step):
                hidden, cache = self.model.hidden(tokens[:, None], mask, cache, position)

    def _stopped(self, ids: Sequence[int], query: Generate) -> bool:
        if ids[-1] in self.model.eos_ids:
            return True
        longest = max((len(s) for s in query.stops), default=0)
        tail = self.model.tokens.decode(ids[-(longest + 2) :], special=True)  # a token is at least a byte
        return any(stop in tail for stop in query.stops)


def _same(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text
