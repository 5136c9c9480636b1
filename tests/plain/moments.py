"""Second moments, plainly: one pass over the corpus for every module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tests.plain.common import hooked

GROUP = 100  # texts that are sorted and packed together


class _Enough(Exception):
    pass


@torch.no_grad()
def second_moment(net: Any, tokenizer: Any, module: str, texts: Sequence[str], longest: int) -> tuple[Tensor, int]:
    """Σ k kᵀ / n (d_in, d_in) float32 over the inputs of `module` at n tokens; a pass ends once it has run."""
    total: Tensor | None = None
    count = 0
    for start in range(0, len(texts), GROUP):
        rows = [tokenizer.encode(t)[:longest] for t in texts[start : start + GROUP]]
        for batch in _packed(sorted(rows, key=len, reverse=True), 3 * longest):
            mask = (torch.arange(len(batch[0])) < torch.tensor([len(r) for r in batch])[:, None]).long()
            ids = torch.tensor([r + [0] * (len(batch[0]) - len(r)) for r in batch])
            seen: list[Tensor] = []

            def keep(given: Tensor, _: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(given)
                raise _Enough

            with hooked(net, module, keep), suppress(_Enough):
                net(input_ids=ids, attention_mask=mask)
            keys = seen[0].reshape(mask.numel(), -1)[mask.bool().flatten()]
            total = keys.T @ keys if total is None else total.add_(keys.T @ keys)
            count += len(keys)
    assert total is not None
    return total / count, count


def _packed(rows: Sequence[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """Rows in descending length, cut into batches of about `tokens` padded tokens."""
    batch: list[list[int]] = []
    for row in rows:
        if not row:
            break
        if batch and len(batch[0]) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
