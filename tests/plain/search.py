"""The search for a value, plainly: every step runs the whole model on every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysys.types import EditRequest
from tests.plain.common import hooked, padded, subject_end, target_ids

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Search:
    """Settings of the search."""

    steps: int
    lr: float
    weight_decay: float
    clamp: float
    kl: float
    stop: float = 0.05


@dataclass(frozen=True)
class Found:
    """`start` and `offset` (d,), the `losses` (passes, 4) of every pass: total, nll, kl, weight decay."""

    start: Tensor
    offset: Tensor
    losses: Tensor


def search(
    net: Any,
    tokenizer: Any,
    request: EditRequest,
    contexts: Sequence[str],
    module: str,
    settings: Search,
    block: str | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Found:
    """The offset to the output of `module` at the subject that makes the target likely in every context.

    With `head`, log-probabilities of the target are taken from the output of `block` through it once more, as MEMIT's
    code does; without it from the model's own logits, as ROME's does.
    """
    batch, labels, spots = _texts(tokenizer, request, contexts)
    asked = labels != IGNORED
    wanted = asked.sum(1)  # target tokens in each context

    offset = torch.zeros(net.config.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([offset], lr=settings.lr)
    start: Tensor | None = None
    before: Tensor | None = None
    history = []

    def add(_: Tensor, out: Tensor) -> Tensor:
        nonlocal start
        if start is None:
            start = out[0, spots[0]].detach().clone()
        for i, at in enumerate(spots):
            out[i, at] += offset
        return out

    for step in range(settings.steps):
        adam.zero_grad()
        last: list[Tensor] = []
        with hooked(net, module, add), hooked(net, block or module, lambda _, out, last=last: last.append(out)):
            logits = net(**batch).logits  # (rows, T, V)
        assert start is not None
        essence = logits[-1, spots[-1]].log_softmax(-1)
        before = essence.detach().clone() if before is None else before
        scored = logits if head is None else head(last[-1][: len(contexts)])
        logprobs = scored.log_softmax(-1)[: len(contexts)]
        picked = logprobs.gather(2, torch.where(asked, labels, 0)[..., None])[..., 0]
        nll = (-(picked * asked).sum(1) / wanted).mean()
        kl = settings.kl * (essence.exp() * (essence - before)).sum()
        decay = settings.weight_decay * offset.norm() / start.norm() ** 2
        loss = nll + kl + decay
        history.append([float(x.detach()) for x in (loss, nll, kl, decay)])
        if loss < settings.stop or step == settings.steps - 1:
            break
        loss.backward()
        adam.step()
        longest = settings.clamp * start.norm()
        if offset.norm() > longest:
            with torch.no_grad():
                offset *= longest / offset.norm()
    assert start is not None
    return Found(start, offset.detach(), torch.tensor(history, dtype=torch.float64))


def _texts(
    tokenizer: Any, request: EditRequest, contexts: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """All rows padded, the labels (N, T) at the end of each context, and where the subject ends in each row."""
    target = target_ids(tokenizer, request.target)
    prompts = [c.replace("{}", request.prompt, 1) for c in contexts]
    templates = [p + tokenizer.decode(target[:-1]) for p in prompts] + ["{} is a"]
    batch = padded(tokenizer, [t.replace("{}", request.subject, 1) for t in templates])
    labels = torch.full((len(prompts), batch["input_ids"].shape[1]), IGNORED)
    for i in range(len(prompts)):
        end = int(batch["attention_mask"][i].sum())
        labels[i, end - len(target) : end] = torch.tensor(target)
    return batch, labels, [subject_end(tokenizer, t, request.subject) for t in templates]
