"""What methods share that keep edits beside the weights (GRACE, WISE, MELO): where they look, and what is near.

d_in = width of what enters a module, K = keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from methods.parts import locate
from raysys.model import Model
from raysys.types import EditRequest

Site = Literal["in", "out"]


def site(model: Model, layer: int, where: Site) -> str:
    """The MLP's first ("in"; of a gated one the gate) or last ("out") projection in block `layer`, by name."""
    last = model.mlp_out(layer)  # says so when there is no such layer
    return last if where == "out" else model.arch.mlp_in[0].format(layer)


def nearest(keys: Tensor, query: Tensor) -> tuple[int, float]:
    """Which of `keys` (K, d_in) is nearest to `query` (d_in,), and how far it is (Euclidean); the first of equals.

    Differences are taken as they are, not through inner products, which lose short distances to rounding.
    """
    distances = (keys - query).square().sum(1).sqrt()  # (K,)
    best = int(distances.argmin())
    return best, float(distances[best])


def noise(model: Model, query: Tensor) -> float:
    """How far the same text's query (d_in,) may lie from itself, asked in another batch: a few units of rounding."""
    return 4 * torch.finfo(model.dtype).eps * float(query.norm())


def joined(labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one (n,) long tensor and their lengths."""
    flat = [token for row in labels for token in row]
    return torch.tensor(flat, dtype=torch.long), torch.tensor([len(row) for row in labels], dtype=torch.long)


def parted(labels: Tensor, lengths: Tensor) -> list[tuple[int, ...]]:
    """What `joined` was given."""
    return [tuple(part.tolist()) for part in torch.split(labels, lengths.tolist())]


def written(rows: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """`rows` (K, ...) with `new` (k, ...) as those numbered `at` (k,); those from K on are appended in their order."""
    known = at < len(rows)
    if bool(known.any()):
        rows = rows.index_copy(0, at[known], new[known])
    return torch.cat((rows, new[~known]))


def relabelled(labels: Tensor, lengths: Tensor, at: Tensor, new: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """`joined` rows of tokens, as `written`: `new` of `sizes` (k,) are the rows numbered `at` (k,)."""
    parts = dict(zip(at.tolist(), torch.split(new, sizes.tolist()), strict=True))
    ends = lengths.cumsum(0)
    pieces, start = [], 0
    for number in sorted(n for n in parts if n < len(lengths)):
        end = int(ends[number])
        pieces += [labels[start : end - int(lengths[number])], parts[number]]
        start = end
    pieces += [labels[start:], *(part for n, part in parts.items() if n >= len(lengths))]
    return torch.cat(pieces), written(lengths, at, sizes)


def subject(model: Model, request: EditRequest, template: str = "{}") -> tuple[int, int]:
    """First and last token of the subject in the request's prompt inside `template`."""
    row = locate.row(model, request, template)
    text = template.replace("{}", request.text, 1)
    start = template.index("{}") + request.prompt.index("{}")
    if getattr(model.tokenizer, "is_fast", False):
        spans = model.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        first = min(i for i, (begin, end) in enumerate(spans) if end > max(begin, start))
    else:
        first = len(model.encode(text[:start].rstrip())) if start else row.at
    return min(first, row.at), row.at
