"""Texts as rows aligned at their subjects, and passes over them that run only what changes.

What every search for a value shares: what comes before a subject or lies below the searched layer is computed once,
rows of like length go together, and logits are computed where a target is scored.

d = width of the residual stream, S = columns from the subject's last token on, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.activations import NewGELUActivation

from raysys.model import Model

SLACK = 16  # tokens of padding that cost as much as running their rows apart: on a CPU
MUCH = 2048  # ... and on a GPU, where a pass of few tokens costs hardly less than one of many
FEW = 4  # rows that are few for a matrix product

Site = Literal["mlp", "block"]


@dataclass(frozen=True)
class Row:
    """A text as tokens. `at` is the position of the subject's last token; `labels` what follows `ids[first - 1]`.

    Position first + i - 1 must predict labels[i]; `ids` ends before the last label.
    """

    ids: tuple[int, ...]
    at: int
    first: int = 0
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Labels:
    """Where targets are scored, M = all target tokens of all rows: everything (M,)."""

    row: Tensor
    column: Tensor  # counted from the subject's last token
    id: Tensor
    request: Tensor
    weight: Tensor  # 1 / (target tokens · contexts)


def labels(rows: Sequence[Row], per: int, device: torch.device) -> Labels:
    table = [
        (j, r.first - 1 + i - r.at, label, j // per, 1 / (len(r.labels) * (per - 1)))
        for j, r in enumerate(rows)
        for i, label in enumerate(r.labels)
    ]
    row, column, id_, request, weight = (torch.tensor(c, device=device) for c in zip(*table, strict=True))
    return Labels(row, column, id_, request, weight)


class Batch:
    """The rows of the requests numbered `running`, in bundles of like length, and what is read of them.

    Of `rows`, each request has `per`: its contexts and, last, its essence. `keys` (running requests, contexts, d_in)
    and `outputs` (.., d), float32, enter and leave the site at the subjects; `labels` name requests by their number.
    """

    def __init__(
        self, model: Model, rows: Sequence[Row], per: int, running: Sequence[int], layer: int, site: Site
    ) -> None:
        self.model, self.per = model, per
        self.running = torch.tensor(list(running), device=model.device)
        rows = [rows[i * per + j] for i in running for j in range(per)]
        self.owner = self.running.repeat_interleave(per)  # (rows,)
        where = labels(rows, per, model.device)
        self.labels = replace(where, request=self.running[where.request])
        essences = torch.arange(per - 1, len(rows), per, device=model.device)
        read = torch.cat([where.row, essences]), torch.cat([where.column, torch.zeros_like(essences)])
        self.bundles: list[tuple[Tensor, Bundle, Tensor, Tensor]] = []  # rows, bundle, what is read: row, column
        order, keys, outputs = [], None, torch.zeros(len(rows), model.width, device=model.device)
        for group in alike([len(r.ids) - r.at for r in rows], SLACK if model.device.type == "cpu" else MUCH):
            bundle = Bundle(model, [rows[i] for i in group], layer, site)
            members = torch.tensor(group, device=model.device)
            keys = bundle.keys.new_zeros(len(rows), bundle.keys.shape[1]) if keys is None else keys
            keys[members], outputs[members] = bundle.keys, bundle.now
            place = torch.full((len(rows),), -1, device=model.device)
            place[members] = torch.arange(len(group), device=model.device)
            mine = (place[read[0]] >= 0).nonzero()[:, 0]
            self.bundles.append((members, bundle, place[read[0][mine]], read[1][mine]))
            order.append(mine)
        self.order = torch.cat(order).argsort()
        assert keys is not None
        self.keys, self.outputs = (x.reshape(-1, per, x.shape[1])[:, :-1] for x in (keys, outputs))

    def logprobs(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (M, V) at all labels, and at the essences, with `offset` (R, d) at every subject."""
        each = offset[self.owner]
        read = [bundle.read(each[rows], row, column) for rows, bundle, row, column in self.bundles]
        logprobs = self.model.logits(torch.cat(read)[self.order]).float().log_softmax(-1)
        return logprobs[: len(self.labels.id)], logprobs[len(self.labels.id) :]


def alike(widths: Sequence[int], slack: int) -> list[list[int]]:
    """Numbers of rows in groups of like width: padding adds less to a pass than `slack` tokens per width joined."""
    by_width: dict[int, list[int]] = {}
    for i, width in enumerate(widths):
        by_width.setdefault(width, []).append(i)
    groups: list[list[int]] = []
    waiting: list[int] = []
    ordered = sorted(by_width)
    for width, wider in zip(ordered, [*ordered[1:], 0], strict=True):
        waiting = waiting + by_width[width]
        if not wider or sum(wider - widths[i] for i in waiting) >= slack:
            groups.append(sorted(waiting))
            waiting = []
    return groups


class Bundle:
    """Rows aligned at their subject's last token: what comes before it is computed once, what follows is run again.

    `now` (rows, d) float32 is what the site gives at the subject, `keys` (rows, d_in) what enters it.
    """

    def __init__(self, model: Model, rows: Sequence[Row], layer: int, site: Site) -> None:
        self.model = model
        self.name = model.mlp_out(layer) if site == "mlp" else model.arch.block.format(layer)
        joins = site == "block" or model.arch.mlp_added  # the offset passes into the next block as it is
        self.direct = joins and layer + 1 < model.layers
        ids, mask, before = aligned(model, rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = Fixed(config=model.config) if before else None
        grabbed: list[Tensor] = []

        def grab(given: Tensor, out: Tensor) -> None:
            grabbed.extend(x.reshape(len(rows), -1, x.shape[-1])[:, 0].detach().float() for x in (given, out))

        pairs: set[bool] = set()  # whether blocks give a tuple
        start = layer + 1 if self.direct else layer
        with torch.no_grad():
            if cache is not None:
                with _noting(model, pairs):
                    model.hidden(ids[:, :before], mask[:, :before], cache, positions[:, :before])
                cache.fixed = True
            idle = model.layers if cache is None or model.carried else start + (not self.direct)
            with model.watching(self.name, grab), _idle(model, idle, True in pairs):
                self.trunk = model.trunk(ids[:, before:], mask, start, cache, positions[:, before:])
        self.keys, self.now = grabbed

    def forward(self, offset: Tensor) -> Tensor:
        """Final hidden states (rows, S, d) when `offset` (rows, d) is added at column 0."""
        if self.direct:
            return self.model.upper(self.trunk, added(self.trunk.hidden, offset))

        def add(_: Tensor, out: Tensor) -> Tensor:
            return added(out.reshape(len(offset), -1, out.shape[-1]), offset).reshape(out.shape)

        with self.model.watching(self.name, add):
            return self.model.upper(self.trunk)

    def read(self, offset: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """What `forward` gives at `row` and `column`, (K,) each: (K, d). The last MLP runs on these alone."""
        last = self.model.layers - 1
        name, _, _ = self.model.mlp_out(last).rpartition(".")
        apart = self.trunk.layer < last and name != self.model.arch.block.format(last) and not self.model.carried
        with sparse(self.model.module(name), row, column) if apart else nullcontext():
            return self.forward(offset)[row, column]


@contextmanager
def _noting(model: Model, pairs: set[bool]) -> Iterator[None]:
    """Within it, `pairs` learns whether the last block gives a tuple rather than a tensor."""
    handle = model.layer(model.layers - 1).register_forward_hook(lambda _, __, out: pairs.add(isinstance(out, tuple)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _idle(model: Model, start: int, pairs: bool) -> Iterator[None]:
    """Within it, blocks from `start` on hand on what they get: enough to see how they are called."""

    def hand_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden, None) if pairs else hidden

    blocks = [model.layer(i) for i in range(start, model.layers)]
    try:
        for block in blocks:
            block.forward = hand_on
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def sparse(module: nn.Module, row: Tensor, column: Tensor) -> Iterator[None]:
    """Within it, `module`, which treats tokens one by one, computes those at `row` and `column` only, else zeros."""
    shapes: list[torch.Size] = []

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append(args[0].shape)
        return (args[0][row, column][None], *args[1:])

    def put(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.new_zeros(shapes.pop()).index_put((row, column), out[0])

    handles = module.register_forward_pre_hook(pick), module.register_forward_hook(put)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(hidden: Tensor, offset: Tensor) -> Tensor:
    """`offset` (rows, d) added to column 0 of `hidden` (rows, S, d)."""
    return torch.cat([hidden[:, :1] + offset[:, None].to(hidden.dtype), hidden[:, 1:]], 1)


def aligned(model: Model, rows: Sequence[Row]) -> tuple[Tensor, Tensor, int]:
    """Ids and mask (rows, T) with every subject's last token in the same column; that column's number."""
    before = max(r.at for r in rows)
    total = before + max(len(r.ids) - r.at for r in rows)
    ids = torch.full((len(rows), total), model.pad_id)
    mask = torch.zeros((len(rows), total), dtype=torch.long)
    for i, r in enumerate(rows):
        start = before - r.at
        ids[i, start : start + len(r.ids)] = torch.tensor(r.ids)
        mask[i, start : start + len(r.ids)] = 1
    return ids.to(model.device), mask.to(model.device), before


class Fixed(DynamicCache):
    """Keys and values of what comes first; once `fixed`, later tokens see them and leave nothing behind.

    Kept for one row, they serve any number of rows that begin alike.
    """

    fixed = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values for the attention of `layer_idx`: those kept, followed by the given ones."""
        if not self.fixed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        kept: Any = self.layers[layer_idx]
        shape = (len(key_states), -1, -1, -1)
        keys, values = kept.keys.expand(shape), kept.values.expand(shape)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@contextmanager
def fused(model: Model) -> Iterator[None]:
    """Within it, float32 models compute the published form of GELU, eight passes over memory, in one kernel."""
    slow = [
        (parent, name)
        for parent in (model.net.modules() if model.dtype == torch.float32 else ())
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    kept = [getattr(parent, name) for parent, name in slow]
    try:
        for parent, name in slow:
            setattr(parent, name, nn.GELU(approximate="tanh"))
        yield
    finally:
        for (parent, name), child in zip(slow, kept, strict=True):
            setattr(parent, name, child)


def logits(model: Model, hidden: Tensor) -> Tensor:
    """`model.logits` of hidden states (K, d); quicker for a few rows in float32 on a CPU, where products are slow."""
    head = model.net.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and getattr(head, "bias", None) is None and not model.arch.softcap
    if plain and 1 < len(hidden) <= FEW and hidden.dtype == torch.float32 and hidden.device.type == "cpu":
        few: Tensor = _Few.apply(hidden, head.weight)  # type: ignore[no-untyped-call]
        return few
    return model.logits(hidden)


class _Few(torch.autograd.Function):
    """hidden (K, d), weight (V, d) -> (K, V); no gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (weight @ hidden.T).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        padded = torch.cat([grad, grad.new_zeros(FEW - len(grad), grad.shape[1])])  # four rows cost half of three
        return (padded @ weight)[: len(grad)], None
