"""What every locate-then-edit method shares: tokens of a request, keys at the subject, and the search for a value.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262, sections 3.1 and
eq. 4 (ROME); Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv:2210.07229, eq. 16 (MEMIT).

N = context templates, R = requests, d = width of the residual stream, d_ff = width of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from raysys.model import Model
from raysys.types import EditRefused, EditRequest

CHUNK = 128  # rows of one forward pass


@dataclass(frozen=True)
class Row:
    """A text as tokens. `at` is the position of the subject's last token; `labels` what follows `ids[first - 1]`.

    Position first + i - 1 must predict labels[i]; `ids` ends before the last label.
    """

    ids: tuple[int, ...]
    at: int
    first: int = 0
    labels: tuple[int, ...] = ()


def row(model: Model, request: EditRequest, template: str = "{}", target: bool = False) -> Row:
    """The request's prompt inside `template`, with its target's tokens as labels if `target`.

    Target tokens are the suffix that prompt + target has beyond the prompt. Raises EditRefused when the prompt
    lacks its subject, the target has no tokens or the text exceeds the model's context.
    """
    if request.prompt.count("{}") != 1 or not request.subject.strip():
        raise EditRefused(f"edit {request.id!r}: the prompt {request.prompt!r} needs one '{{}}' and a subject for it")
    text = template.replace("{}", request.text, 1)
    end = template.index("{}") + request.prompt.index("{}") + len(request.subject.rstrip())
    return _row(model, request, text, end, request.continuation if target else "")


def essence(model: Model, request: EditRequest) -> Row:
    """ "<subject> is a", up to the subject: what the edit should keep believing of it is read there."""
    whole = _row(model, request, f"{request.subject} is a", len(request.subject.rstrip()), "")
    return Row(whole.ids[: whole.at + 1], whole.at)  # what follows the subject can't change what is read at it


def _row(model: Model, request: EditRequest, text: str, end: int, continuation: str) -> Row:
    labels: tuple[int, ...] = ()
    if continuation:
        prompt, following = model.pair(text, continuation)
        if not continuation.strip() or not following:
            raise EditRefused(f"edit {request.id!r}: its target {request.target!r} has no tokens; give a target")
        labels = tuple(following)
    else:
        prompt = model.encode(text)
    ids = (*prompt, *labels[:-1])
    if len(ids) > model.max_length:
        raise EditRefused(
            f"edit {request.id!r}: {len(ids)} tokens of prompt and target exceed the {model.max_length} that "
            f"{model.name or 'the model'} reads; shorten the prompt"
        )
    return Row(ids, _last_token(model, text, end, prompt), len(prompt), labels)


def _last_token(model: Model, text: str, end: int, prompt: Sequence[int]) -> int:
    """Index of the token that holds character `end - 1` of `text`."""
    if getattr(model.tokenizer, "is_fast", False):
        spans = model.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        at = max(i for i, (start, stop) in enumerate(spans) if start < end and stop > start)
    else:
        at = len(model.encode(text[:end])) - 1
    return min(at, len(prompt) - 1)


@dataclass(frozen=True)
class Reading:
    """What a linear module got and gave at each row's `at`: inputs (N, d_in), outputs (N, d_out), float32."""

    inputs: Tensor
    outputs: Tensor


def read(model: Model, module: str, rows: Sequence[Row]) -> Reading:
    """Input and output of `module` at each row's `at`; the forward pass ends there. Rows may differ in length."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        ids, mask = model.batch([r.ids[: r.at + 1] for r in chunk])  # later tokens can't be seen from `at`
        here = torch.arange(len(chunk), device=ids.device)
        at = torch.tensor([r.at for r in chunk], device=ids.device)
        with torch.no_grad():
            given, out = model.through(module, ids, mask)
        inputs.append(given[here, at].float())
        outputs.append(out[here, at].float())
    return Reading(torch.cat(inputs), torch.cat(outputs))


# --- the search for a value ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to look for a value: at most `steps` - 1 steps of Adam(lr) on an offset to what the model computes now."""

    steps: int
    lr: float
    weight_decay: float
    clamp: float  # the offset is at most this many times as long as the current value
    kl: float  # weight of "<subject> is a" staying as it was
    stop: float = 0.05  # loss (nats) below which the search ends


@dataclass(frozen=True)
class Value:
    """The result for one request: `now` (d,) what the module gives, `offset` (d,) what makes the target likely.

    `losses` is (passes, 4): total, negative log-likelihood, KL, weight decay, in nats, at the start of each step.
    """

    now: Tensor
    offset: Tensor
    losses: Tensor

    @property
    def wanted(self) -> Tensor:
        """v* = now + offset, (d,) float32."""
        return self.now + self.offset


Site = Literal["mlp", "block"]


def values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: Search, site: Site
) -> list[Value]:
    """The value at the subject's last token that makes each request's target likely, whatever text comes before.

    The offset is added to the MLP's output ("mlp": ROME) or to the whole block's ("block": MEMIT and descendants) of
    `layer`, in every context (`contexts[0]` is the bare "{}") and in "<subject> is a", where the next-token
    distribution should stay. Only what lies behind the subject and above `layer` runs more than once; requests are
    independent of each other. Raises EditRefused when a request can't be served or its loss is not finite.
    """
    rows = [r for q in requests for r in (*(row(model, q, c, target=True) for c in contexts), essence(model, q))]
    per = len(contexts) + 1
    group = torch.arange(len(requests), device=model.device).repeat_interleave(per)  # (R·per,)
    bundle = _Bundle(model, rows, layer, site)
    now = bundle.now[::per]  # (R, d) in the bare prompts
    labels = _labels(rows, per, model.device)
    kl_rows = torch.arange(per - 1, len(rows), per, device=model.device)  # (R,)

    offset = torch.zeros_like(now, requires_grad=True)  # (R, d) float32 whatever the model's type
    adam = torch.optim.Adam([offset], lr=search.lr)
    active = torch.ones(len(requests), dtype=torch.bool, device=model.device)
    before: Tensor | None = None
    history: list[list[Tensor]] = [[] for _ in requests]
    length = now.norm(dim=1)  # (R,)
    for step in range(search.steps):
        with torch.enable_grad():
            hidden = bundle.forward(offset[group])  # (R·per, S, d), column 0 = the subject's last token
            at_labels = model.logits(hidden[labels.row, labels.column]).float().log_softmax(-1)
            picked = at_labels.gather(1, labels.id[:, None])[:, 0]
            nll = torch.zeros_like(length).index_add(0, labels.request, -picked * labels.weight)  # (R,)
            p = model.logits(hidden[kl_rows, 0]).float().log_softmax(-1)  # (R, V) log-probabilities
            before = p.detach() if before is None else before
            kl = search.kl * (p.exp() * (p - before)).sum(-1)  # the expectation is under the current distribution
            decay = search.weight_decay * offset.norm(dim=1) / length**2
            loss = nll + kl + decay  # (R,)
        for i in active.nonzero()[:, 0].tolist():
            history[i].append(torch.stack((loss[i], nll[i], kl[i], decay[i])).detach())
            if not torch.isfinite(loss[i]):
                raise EditRefused(f"edit {requests[i].id!r}: the loss of step {step} is not finite: a broken model")
        active &= loss.detach() >= search.stop
        if step == search.steps - 1 or not active.any():
            break
        adam.zero_grad()
        loss[active].sum().backward()
        kept = offset.detach().clone()
        adam.step()
        with torch.no_grad():
            scale = (search.clamp * length / offset.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
            offset.copy_(torch.where(active[:, None], offset * scale[:, None], kept))
    found = offset.detach()
    return [Value(now[i], found[i], torch.stack(history[i]).cpu()) for i in range(len(requests))]


@dataclass(frozen=True)
class _Labels:
    """Where targets are scored, M = all target tokens of all rows: everything (M,)."""

    row: Tensor
    column: Tensor  # counted from the subject's last token
    id: Tensor
    request: Tensor
    weight: Tensor  # 1 / (target tokens · contexts)


def _labels(rows: Sequence[Row], per: int, device: torch.device) -> _Labels:
    table = [
        (j, r.first - 1 + i - r.at, label, j // per, 1 / (len(r.labels) * (per - 1)))
        for j, r in enumerate(rows)
        for i, label in enumerate(r.labels)
    ]
    row, column, id_, request, weight = (torch.tensor(c, device=device) for c in zip(*table, strict=True))
    return _Labels(row, column, id_, request, weight)


class _Bundle:
    """Rows aligned at their subject's last token: what comes before it is computed once, what follows is run again.

    `now` (rows, d) float32 is what the site gives at the subject.
    """

    def __init__(self, model: Model, rows: Sequence[Row], layer: int, site: Site) -> None:
        self.model = model
        self.name = model.mlp_out(layer) if site == "mlp" else model.arch.block.format(layer)
        joins = site == "block" or model.arch.mlp_added  # the offset passes into the next block as it is
        self.direct = joins and layer + 1 < model.layers
        ids, mask, before = _aligned(model, rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = _Fixed(config=model.config) if before else None
        grabbed: list[Tensor] = []

        def grab(_: Tensor, out: Tensor) -> None:
            grabbed.append(out.reshape(len(rows), -1, out.shape[-1])[:, 0].detach().float())

        with torch.no_grad():
            if cache is not None:
                model.hidden(ids[:, :before], mask[:, :before], cache, positions[:, :before])
                cache.fixed = True
            with model.watching(self.name, grab):
                start = layer + 1 if self.direct else layer
                self.trunk = model.trunk(ids[:, before:], mask, start, cache, positions[:, before:])
        self.now = grabbed[0]

    def forward(self, offset: Tensor) -> Tensor:
        """Final hidden states (rows, S, d) when `offset` (rows, d) is added at column 0."""
        if self.direct:
            return self.model.upper(self.trunk, _add(self.trunk.hidden, offset))

        def add(_: Tensor, out: Tensor) -> Tensor:
            return _add(out.reshape(len(offset), -1, out.shape[-1]), offset).reshape(out.shape)

        with self.model.watching(self.name, add):
            return self.model.upper(self.trunk)


def _add(hidden: Tensor, offset: Tensor) -> Tensor:
    """`offset` (rows, d) added to column 0 of `hidden` (rows, S, d)."""
    return torch.cat([hidden[:, :1] + offset[:, None].to(hidden.dtype), hidden[:, 1:]], 1)


def _aligned(model: Model, rows: Sequence[Row]) -> tuple[Tensor, Tensor, int]:
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


class _Fixed(DynamicCache):
    """Keys and values of what comes first; once `fixed`, later tokens see them and leave nothing behind."""

    fixed = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values for the attention of `layer_idx`: those kept, followed by the given ones."""
        if not self.fixed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        kept: Any = self.layers[layer_idx]
        return torch.cat([kept.keys, key_states], -2), torch.cat([kept.values, value_states], -2)
