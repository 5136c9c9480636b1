"""MEMIT, plainly: one edit or a batch. Meng et al., arXiv:2210.07229."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raysys.types import EditRequest
from tests.plain.common import add_, read
from tests.plain.search import Search, search


def edit(
    net: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    contexts: Sequence[Sequence[str]],
    layers: Sequence[int],
    names: tuple[str, str, str],
    moments: Sequence[Tensor],
    weight: float,
    settings: Search,
) -> dict[str, Any]:
    """`changes`: per layer A (d_in, n) and the residual's share (d_out, n), float64; the searches' `passes`.

    `contexts` are the two groups of templates; `names` the block, the projection ("{}" for the layer) and the final
    norm; `moments` one C (d_in, d_in) per layer. The weights are left as they were.
    """
    block, projection, norm = names
    top = block.format(layers[-1])
    flat = [c for group in contexts for c in group]
    head = net.get_output_embeddings()
    after = net.get_submodule(norm)
    final = block.format(net.config.num_hidden_layers - 1)
    found = [search(net, tokenizer, r, flat, top, settings, final, lambda h: head(after(h))) for r in requests]
    wanted = torch.stack([f.start + f.offset for f in found])  # (n, d)
    kept = [net.get_submodule(projection.format(i)).get_parameter("weight").data.clone() for i in layers]
    changes = []
    for number, layer in enumerate(layers):
        module = projection.format(layer)
        keys = _keys(net, tokenizer, module, requests, contexts).double()  # (n, d_in)
        _, now = read(net, tokenizer, top, [r.prompt for r in requests], [r.subject for r in requests])
        share = (wanted - now).double() / (len(layers) - number)
        factors = torch.linalg.solve(weight * moments[number].double() + keys.T @ keys, keys.T)  # (d_in, n), by LU
        add_(net, module, (share.T @ factors.T).float())
        changes.append((factors, share.T))
    for layer, before in zip(layers, kept, strict=True):
        net.get_submodule(projection.format(layer)).get_parameter("weight").data.copy_(before)
    return {"changes": changes, "passes": [len(f.losses) for f in found], "found": found, "wanted": wanted}


def _keys(
    net: Any, tokenizer: Any, module: str, requests: Sequence[EditRequest], contexts: Sequence[Sequence[str]]
) -> Tensor:
    """Keys (n, d_in), each the mean over the groups of templates of a group's mean."""
    flat = [c.replace("{}", r.prompt, 1) for r in requests for group in contexts for c in group]
    per = len(flat) // len(requests)
    keys, _ = read(net, tokenizer, module, flat, [r.subject for r in requests for _ in range(per)])
    means = []
    for own in keys.split(per):
        groups = own.split([len(group) for group in contexts])
        means.append(torch.stack([g.mean(0) for g in groups]).mean(0))
    return torch.stack(means)
