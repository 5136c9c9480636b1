"""KN's attribution, plainly: layer by layer, point by point. Dai et al., arXiv:2104.08696."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.plain.common import hooked


def attribution(
    net: Any,
    tokenizer: Any,
    prompt: str,
    answer: Sequence[int],
    modules: Sequence[str],
    steps: int,
    rows: int = 20,
    extends: bool = False,
) -> Tensor:
    """Scores (L, f): integrated gradients of each token of `answer` with respect to the output of each of `modules`.

    At the last position, points linspace(0, 1, steps), `rows` of them in one pass, the mean over the answer's tokens.
    `extends`: the model's own next token is put behind the prompt before the next token of the answer is asked for.
    """
    return torch.stack([_layer(net, tokenizer, prompt, answer, m, steps, rows, extends) for m in modules])


def _layer(
    net: Any, tokenizer: Any, prompt: str, answer: Sequence[int], module: str, steps: int, rows: int, extends: bool
) -> Tensor:
    per_token = []
    for wanted in answer:
        ids = torch.tensor([tokenizer.encode(prompt)])
        seen: list[Tensor] = []
        with torch.no_grad(), hooked(net, module, lambda _, out, seen=seen: seen.append(out[0, -1])):
            logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        [own] = seen
        points = (torch.linspace(0, 1, steps)[:, None] * own).requires_grad_()
        total = torch.zeros_like(own)
        for some in torch.split(points, rows):
            again = ids.repeat(len(some), 1)

            def replace(_: Tensor, out: Tensor, some: Tensor = some) -> Tensor:
                out = out.clone()
                out[:, -1] = some
                return out

            with hooked(net, module, replace):
                scaled = net(input_ids=again, attention_mask=torch.ones_like(again)).logits
            likely = scaled[:, -1].softmax(-1)[:, wanted]
            total += torch.autograd.grad(likely.sum(), some)[0].sum(0)
        per_token.append(total * own / steps)
        if extends:
            prompt += tokenizer.decode([int(logits[0, -1].argmax())])
    return torch.stack(per_token).mean(0)
