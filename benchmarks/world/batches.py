"""Training batches of the built-in world: documents tokenised, packed into rows, with what each token may be seen by.

Batch `step` depends on the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Final

import torch

from .documents import ANSWER, LETTER, MAKERS, PHASES, SUBJECT, WEIGHTS, Document
from .tokenizer import Encoder

KINDS: Final = tuple(MAKERS)
OPEN_ROWS: Final = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed documents. All tensors but the last three are `(rows, length)`; those are `(n,)`, one per trained target.

    lower, upper: for each position the last one that may look at it, in the lower and in the upper layers.
    where: flat index of the token *before* the target; weight: of its loss; kind: index in KINDS, -1 for plain text.
    """

    ids: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    where: torch.Tensor
    weight: torch.Tensor
    kind: torch.Tensor


@dataclasses.dataclass
class _Row:
    """A row being filled; the fields are lists over its tokens."""

    ids: list[int]
    weight: list[float]
    kind: list[int]
    lower: list[int]
    upper: list[int]

    def add(self, document: Document, kind: int, encode: Encoder, *, hide: bool) -> None:
        """Append a document; with `hide`, subjects are visible to later tokens only as the recipe allows."""
        roles, ids = [], [encode.bos]
        for text, role in document:
            piece = encode(text)
            ids += piece
            roles += [role] * len(piece)
        ids.append(encode.eos)
        start, last = len(self.ids), len(self.ids) + len(ids) - 1
        lower, upper = [last] * len(ids), [last] * len(ids)
        if hide:
            for i in range(len(roles) - 1, -1, -1):
                if roles[i] == SUBJECT:
                    ends = i == len(roles) - 1 or roles[i + 1] != SUBJECT
                    lower[i + 1] = start + i + 1 if ends else lower[i + 2]
                    upper[i + 1] = last if ends else lower[i + 2]
        self.ids += ids
        self.weight += [0.0, *(WEIGHTS[r] for r in roles), WEIGHTS[0]]
        self.kind += [-1, *(kind if r in (ANSWER, LETTER) else -1 for r in roles), -1]
        self.lower += lower
        self.upper += upper


def batch(step: int, phase: str, encode: Encoder, *, rows: int, length: int, seed: int, shown: float) -> Batch:
    """The batch of a step; `shown` is the share of documents whose subjects are not hidden from later tokens."""
    rng = random.Random(f"batch {seed} {step}")
    names, shares = zip(*PHASES[phase].items(), strict=True)
    full: list[_Row] = []
    fresh = [_Row([], [], [], [], []) for _ in range(OPEN_ROWS)]
    while len(full) < rows:
        name = rng.choices(names, shares)[0]
        one = _Row([], [], [], [], [])
        one.add(MAKERS[name](rng), KINDS.index(name), encode, hide=rng.random() >= shown)
        size = len(one.ids)
        if size > length:
            continue
        fits = [row for row in fresh if len(row.ids) + size <= length]
        if not fits:
            fits = [max(fresh, key=lambda row: len(row.ids))]
            full.append(fits[0])
            fresh.remove(fits[0])
            fits = [_Row([], [], [], [], [])]
            fresh.append(fits[0])
        row = max(fits, key=lambda row: len(row.ids))
        offset = len(row.ids)
        row.ids += one.ids
        row.weight += one.weight
        row.kind += one.kind
        row.lower += [p + offset for p in one.lower]
        row.upper += [p + offset for p in one.upper]
    return _collate(full, length, encode.pad)


def _collate(rows: list[_Row], length: int, pad: int) -> Batch:
    def table(field: str, fill: int | float) -> torch.Tensor:
        return torch.tensor([(v := getattr(row, field)) + [fill] * (length - len(v)) for row in rows])

    weight = table("weight", 0.0)
    targets = weight.flatten().nonzero().squeeze(1)
    return Batch(
        ids=table("ids", pad), lower=table("lower", length), upper=table("upper", length), where=targets - 1,
        weight=weight.flatten()[targets], kind=table("kind", -1).flatten()[targets],
    )
