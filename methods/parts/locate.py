"""What every locate-then-edit method shares: tokens of a request, keys at the subject, and the search for a value.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262, sections 3.1 and
eq. 4 (ROME); Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv:2210.07229, eq. 16 (MEMIT).

N = context templates, R = requests, d = width of the residual stream, d_ff = width of a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.parts.passes import Batch, Labels, fused
from methods.parts.passes import Row as Row  # the type of what this module makes
from methods.parts.passes import Site as Site
from raysys.model import Model
from raysys.types import EditRefused, EditRequest

CHUNK = 128  # rows of one forward pass


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
    if continuation[:1].isspace():
        text = text.rstrip(" ")  # the blank that joins them is the continuation's
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
    patience: int = 0  # it also ends with this many passes that decode the target behind every sampled context


def check_steps(name: str, steps: int | None) -> None:
    """Raise ValueError when the search of the method `name` would not make a single pass."""
    if steps is not None and steps < 1:
        raise ValueError(
            f"{name}: steps counts the passes of the search, 1 at least, got {steps}; leave steps out to take the "
            "model's preset"
        )


@dataclass(frozen=True)
class Value:
    """The result for one request: `now` (d,) what the module gives, `offset` (d,) what makes the target likely.

    `losses` is (passes, 4): total, negative log-likelihood, KL, weight decay, in nats, at the start of each step.
    Where an MLP's output is searched, `keys` (N, d_ff) enter its last matrix in the contexts, `outputs` (N, d) leave.
    """

    now: Tensor
    offset: Tensor
    losses: Tensor
    keys: Tensor | None = None
    outputs: Tensor | None = None

    @property
    def wanted(self) -> Tensor:
        """v* = now + offset, (d,) float32."""
        return self.now + self.offset


def values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: Search, site: Site
) -> list[Value]:
    """The value at the subject's last token that makes each request's target likely, whatever text comes before.

    The offset is added to the MLP's output ("mlp": ROME) or to the whole block's ("block": MEMIT and descendants) of
    `layer`, in every context (`contexts[0]` is the bare "{}") and in "<subject> is a", where the next-token
    distribution should stay. Only what lies behind the subject and above `layer` runs more than once; requests are
    independent of each other. Raises EditRefused when a request can't be served or its loss is not finite.
    """
    with fused(model):
        return _values(model, requests, contexts, layer, search, site)


def _values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: Search, site: Site
) -> list[Value]:
    rows = [r for q in requests for r in (*(row(model, q, c, target=True) for c in contexts), essence(model, q))]
    batch = Batch(model, rows, len(contexts) + 1, range(len(requests)), layer, site)
    keys, outputs = batch.keys, batch.outputs  # (R, N, d_in), (R, N, d): what enters and leaves the site
    now = outputs[:, 0]  # (R, d)
    offset = torch.zeros_like(now, requires_grad=True)  # (R, d) float32 whatever the model's type
    adam = torch.optim.Adam([offset], lr=search.lr)
    active = torch.ones(len(requests), dtype=torch.bool, device=model.device)
    before: Tensor | None = None
    history: list[list[Tensor]] = [[] for _ in requests]
    length = now.norm(dim=1)  # (R,)
    decoded = torch.zeros_like(active, dtype=torch.long)  # passes so far, for `patience`
    for step in range(search.steps):
        with torch.enable_grad():
            at_labels, p = batch.logprobs(offset)  # (M, V) at target tokens, (running requests, V) at "... is a"
            picked = at_labels.gather(1, batch.labels.id[:, None])[:, 0]
            nll = torch.zeros_like(length).index_add(0, batch.labels.request, -picked * batch.labels.weight)  # (R,)
            before = p.detach() if before is None else before
            moved = (p.exp() * (p - before)).sum(-1)  # the expectation is under the current distribution
            kl = torch.zeros_like(length).index_add(0, batch.running, search.kl * moved)
            decay = search.weight_decay * offset.norm(dim=1) / length**2
            loss = nll + kl + decay  # (R,)
        for i in active.nonzero()[:, 0].tolist():
            history[i].append(torch.stack((loss[i], nll[i], kl[i], decay[i])).detach())
            if not torch.isfinite(loss[i]):
                raise EditRefused(f"edit {requests[i].id!r}: the loss of step {step} is not finite: a broken model")
        active &= loss.detach() >= search.stop
        if search.patience:
            decoded += _decoded(at_labels, batch.labels, len(requests), batch.per)
            active &= decoded < search.patience
        if step == search.steps - 1 or not active.any():
            break
        adam.zero_grad()
        loss[active].sum().backward()
        kept = offset.detach().clone()
        adam.step()
        with torch.no_grad():
            scale = (search.clamp * length / offset.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
            offset.copy_(torch.where(active[:, None], offset * scale[:, None], kept))
        if 2 * int(active.sum()) <= len(batch.running):  # go on without those that are done
            before = before[active[batch.running]]
            batch = Batch(model, rows, batch.per, active.nonzero()[:, 0].tolist(), layer, site)
    found, mlp = offset.detach(), site == "mlp"
    return [
        Value(now[i], found[i], torch.stack(history[i]).cpu(), keys[i] if mlp else None, outputs[i] if mlp else None)
        for i in range(len(requests))
    ]


def _decoded(at_labels: Tensor, labels: Labels, requests: int, per: int) -> Tensor:
    """Which requests' targets are the argmax everywhere behind the sampled contexts (the bare prompt, without any)."""
    counts = (labels.row % per > 0) | (per == 2)  # (M,)
    wrong = (at_labels.argmax(-1) != labels.id) & counts
    return torch.zeros(requests, dtype=torch.long, device=wrong.device).index_add(0, labels.request, wrong.long()) == 0
