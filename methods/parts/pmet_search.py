"""PMET's search: what attention and MLP of one layer should give at a subject, looked for together.

Li, Li, Song, Yang, Ma, Yu, "PMET: Precise Model Editing in a Transformer", AAAI 2024, arXiv:2308.08742, section 4; the
rules by which it weakens the likelihood term and ends are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.parts import locate, passes
from methods.parts.locate import Row
from raysys.model import Model
from raysys.types import EditRefused, EditRequest

CHUNK = 256  # rows of one search
QUIET = 0.01  # the KL term, nats, below which a search whose targets are all the likeliest tokens ends


@dataclass(frozen=True, kw_only=True)
class Search:
    """Adam(lr) on both offsets, at most `steps` - 1 steps; each is at most `clamp` times as long as what it moves.

    `nll` weighs the likelihood of the targets, a tenth of it once every target token is the likeliest one.
    """

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl: float
    nll: float = 1.0
    stop: float = 0.05  # loss (nats) below which the search ends


Pair = tuple[locate.Value, locate.Value]  # attention's, the MLP's


def values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: Search
) -> list[Pair]:
    """What the last projections of attention and MLP of `layer` should give at each subject's last token.

    Both offsets are added in every context and in "<subject> is a". Raises EditRefused when a request can't be
    served or its loss is not finite.
    """
    size = max(1, CHUNK // (len(contexts) + 1))
    found: list[Pair] = []
    for start in range(0, len(requests), size):
        found += _values(model, requests[start : start + size], contexts, layer, search)
    return found


def _values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: Search
) -> list[Pair]:
    rows = [
        r
        for q in requests
        for r in (*(locate.row(model, q, c, target=True) for c in contexts), locate.essence(model, q))
    ]
    per = len(contexts) + 1
    group = torch.arange(len(requests), device=model.device).repeat_interleave(per)  # (R·per,)
    bundle = _Bundle(model, rows, layer)
    now = bundle.now[:, ::per]  # (2, R, d)
    length = now.norm(dim=-1)  # (2, R)
    labels = passes.labels(rows, per, model.device)
    kl_rows = torch.arange(per - 1, len(rows), per, device=model.device)

    offset = torch.zeros_like(now, requires_grad=True)
    adam = torch.optim.Adam([offset], lr=search.lr)
    active = torch.ones(len(requests), dtype=torch.bool, device=model.device)
    weight = torch.full_like(length[0], search.nll)  # (R,)
    before: Tensor | None = None
    history: list[list[Tensor]] = [[] for _ in requests]
    for step in range(search.steps):
        with torch.enable_grad():
            hidden = bundle.forward(offset[:, group])  # (R·per, S, d), column 0 = the subject's last token
            at_labels = model.logits(hidden[labels.row, labels.column]).float().log_softmax(-1)
            picked = at_labels.gather(1, labels.id[:, None])[:, 0]
            nll = weight * torch.zeros_like(length[0]).index_add(0, labels.request, -picked * labels.weight)
            p = model.logits(hidden[kl_rows, 0]).float().log_softmax(-1)  # (R, V) log-probabilities
            before = p.detach() if before is None else before
            kl = search.kl * (p.exp() * (p - before)).sum(-1)
            decay = search.weight_decay * (offset.norm(dim=-1) / length**2).sum(0)
            loss = nll + kl + decay  # (R,)
        for i in active.nonzero()[:, 0].tolist():
            history[i].append(torch.stack((loss[i], nll[i], kl[i], decay[i])).detach())
            if not torch.isfinite(loss[i]):
                raise EditRefused(f"edit {requests[i].id!r}: the loss of step {step} is not finite: a broken model")
        missed = torch.zeros_like(length[0]).index_add(0, labels.request, (at_labels.amax(-1) > picked).float())
        likeliest = missed == 0  # every target token, in every context
        active &= (loss.detach() >= search.stop) & ~(likeliest & (kl.detach() <= QUIET))
        weight = torch.where(likeliest, 0.1 * search.nll, search.nll)
        if step == search.steps - 1 or not active.any():
            break
        adam.zero_grad()
        loss[active].sum().backward()
        kept = offset.detach().clone()
        adam.step()
        with torch.no_grad():
            scale = (search.clamp * length / offset.norm(dim=-1).clamp(min=1e-30)).clamp(max=1)
            offset.copy_(torch.where(active[:, None], offset * scale[..., None], kept))
    done = offset.detach()
    losses = [torch.stack(h).cpu() for h in history]
    pairs = [[locate.Value(now[k, i], done[k, i], losses[i]) for k in (0, 1)] for i in range(len(requests))]
    return [(attention, mlp) for attention, mlp in pairs]


class _Bundle:
    """Rows aligned at their subject's last token, run from `layer` on: what comes before and below runs once.

    `now` (2, rows, d) float32 is what attention and MLP give at the subject.
    """

    def __init__(self, model: Model, rows: Sequence[Row], layer: int) -> None:
        self.model = model
        self.names = model.arch.attn_out.format(layer), model.mlp_out(layer)
        ids, mask, before = passes.aligned(model, rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = passes.Fixed(config=model.config) if before else None
        seen: list[Tensor] = []

        def grab(_: Tensor, out: Tensor) -> None:
            seen.append(out.reshape(len(rows), -1, out.shape[-1])[:, 0].detach().float())

        with torch.no_grad(), ExitStack() as stack:
            if cache is not None:
                model.hidden(ids[:, :before], mask[:, :before], cache, positions[:, :before])
                cache.fixed = True
            for name in self.names:
                stack.enter_context(model.watching(name, grab))
            self.trunk = model.trunk(ids[:, before:], mask, layer, cache, positions[:, before:])
        self.now = torch.stack(seen)

    def forward(self, offset: Tensor) -> Tensor:
        """Final hidden states (rows, S, d) when `offset` (2, rows, d) is added at column 0 of both outputs."""
        with ExitStack() as stack:
            for name, part in zip(self.names, offset, strict=True):

                def add(_: Tensor, out: Tensor, part: Tensor = part) -> Tensor:
                    wide = out.reshape(len(part), -1, out.shape[-1])
                    moved = wide[:, :1] + part[:, None].to(wide.dtype)
                    return torch.cat([moved, wide[:, 1:]], 1).reshape(out.shape)

                stack.enter_context(self.model.watching(name, add))
            return self.model.upper(self.trunk)
