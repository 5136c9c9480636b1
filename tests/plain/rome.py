"""ROME, plainly. Meng et al., arXiv:2202.05262."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raysys.types import EditRequest
from tests.plain.common import read
from tests.plain.search import Search, search


def edit(
    net: Any,
    tokenizer: Any,
    request: EditRequest,
    contexts: Sequence[str],
    mlp: str,
    projection: str,
    inverse: Tensor | None,
    settings: Search,
) -> dict[str, Any]:
    """The rank-one change: `left` (d_out,), `right` = u (d_in,), and the search's `passes`.

    `inverse` is C⁻¹ (d_in, d_in) float32, made once for all edits as in the published code; None: u is the key itself.
    """
    templates = [c.replace("{}", request.prompt, 1) for c in contexts]
    keys, _ = read(net, tokenizer, projection, templates, [request.subject] * len(templates))
    u = keys.mean(0) if inverse is None else inverse @ keys.mean(0)
    u = u / u.norm()
    found = search(net, tokenizer, request, contexts, mlp, settings)
    [key], [now] = read(net, tokenizer, projection, [request.prompt], [request.subject])
    left = (found.start + found.offset - now) / torch.dot(key, u)
    return {"left": left, "right": u, "passes": len(found.losses), "losses": found.losses}
