"""Sums behind second moments: Σ k kᵀ over the tokens of texts, for several modules in one pass.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262, section 3.1 (C = K Kᵀ).
The forward pass ends where the last of the modules begins; of the symmetric product only the upper half is computed.
Sums are made part by part (`parts`) and added in the order of the parts, so that parts may be computed anywhere and in
any order, interrupted and taken up again: the total has the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from methods.parts.passes import fused
from raysys.model import Model
from raysys.tokens import Tokens

PART = 256  # texts of one part
TOKENS = 4096  # padded tokens of one forward pass
LONGEST = 4096  # tokens of a text: models that read more were published with moments of texts cut there
BLOCK = 512  # columns of K whose products are computed at once


@dataclass(frozen=True, eq=False)
class Sums:
    """`total` (d_in, d_in) float64 = Σ k kᵀ over `count` keys k."""

    total: Tensor
    count: int


def parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in parts of PART, in their order: each is summed by itself."""
    rest = iter(texts)
    while part := list(islice(rest, PART)):
        yield part


def moment_sums(model: Model, modules: Sequence[str], texts: Iterable[str]) -> dict[str, Sums]:
    """Σ k kᵀ over the inputs k of each of `modules` at every token of one part's `texts`, padding left out.

    Texts are cut (see `longest`); empty ones add nothing. The products of one forward pass are float32.
    """
    return token_sums(model, modules, [rows_of(model.tokens, t) for t in texts])


def rows_of(tokens: Tokens, text: str) -> list[int]:
    """The tokens of one text, as far as it counts."""
    return tokens.encode(text)[: longest(tokens)]


def longest(tokens: Tokens) -> int:
    """How many tokens of a text count: what the model reads, but at most LONGEST.

    Models that read 131,072 would spend memory and time on the few texts that are so long; Mistral's published moments
    are of its window and Qwen's of texts cut at 4,096 tokens, which is the same number.
    """
    return min(tokens.max_length, LONGEST)


def token_sums(model: Model, modules: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, Sums]:
    """`moment_sums` of texts that are tokens already."""
    totals: dict[str, Tensor] = {}
    count = 0
    for batch in _packed(sorted((r for r in rows if r), key=len)):
        ids, mask = model.batch(batch)
        real = mask.bool()
        count += int(real.sum())
        with fused(model):
            entering = _inputs(model, modules, ids, mask)
        for name, given in entering.items():
            keys = given[real].float()  # (tokens, d_in)
            width = keys.shape[1]
            if name not in totals:
                totals[name] = torch.zeros(width, width, dtype=torch.float64, device=keys.device)
            _add_upper(totals[name], keys)
    return {name: Sums(_whole(total), count) for name, total in totals.items()}


def added(first: Mapping[str, Sums], second: Mapping[str, Sums]) -> dict[str, Sums]:
    """The sums of two sets of texts together; either may be empty."""
    return {
        name: Sums(first[name].total + second[name].total, first[name].count + second[name].count)
        if name in first and name in second
        else (first.get(name) or second[name])
        for name in {**first, **second}
    }


def collect(model: Model, modules: Sequence[str], texts: Iterable[str]) -> dict[str, Sums]:
    """The sums over all `texts`, part by part, in this process. Raises ValueError when there is no text."""
    total: dict[str, Sums] = {}
    for part in parts(texts):
        total = added(total, moment_sums(model, modules, part))
    if not total:
        raise ValueError(f"second moment of {', '.join(modules)}: the corpus has no text; give one with documents")
    return total


def _packed(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows in ascending length, cut into batches of at most TOKENS padded tokens."""
    batch: list[Sequence[int]] = []
    for row in rows:
        if batch and len(row) * (len(batch) + 1) > TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _AllSeenError(Exception):
    """Ends a forward pass when every module has got its input."""


@torch.no_grad()
def _inputs(model: Model, modules: Sequence[str], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What enters each module, (B, T, d_in) by name; the pass ends before the last of them computes anything."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].reshape(*ids.shape, -1)  # some families flatten B and T
            if len(seen) == len(set(modules)):
                raise _AllSeenError

        return model.module(name).register_forward_pre_hook(keep)

    handles = [watch(name) for name in dict.fromkeys(modules)]
    try:
        with suppress(_AllSeenError):
            model.hidden(ids, mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in dict.fromkeys(modules)}


def _add_upper(total: Tensor, keys: Tensor) -> None:
    """Add the blocks on and above the diagonal of keysᵀ keys to `total`, (d_in, d_in), in place."""
    for start in range(0, keys.shape[1], BLOCK):
        stop = start + BLOCK
        total[start:stop, start:] += keys[:, start:stop].T @ keys[:, start:]


def _whole(total: Tensor) -> Tensor:
    """The symmetric matrix whose upper half `total` holds, on the CPU."""
    upper = total.triu().cpu()
    return upper + upper.triu(1).T
