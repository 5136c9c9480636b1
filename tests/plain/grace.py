"""GRACE's training of a value, plainly. Hartvigsen et al., "Aging with GRACE", NeurIPS 2023, arXiv:2211.11031."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.plain.common import hooked


def train(net: Any, tokenizer: Any, text: str, target: str, module: str, start: Tensor, steps: int, lr: float) -> Any:
    """Key (d_in,), value (d_out,) and losses (steps,) for "text target".

    The value replaces the output of `module` at the last token of the prompt; Adam(lr), `steps` steps from `start`.
    """
    ids = torch.tensor([tokenizer.encode(f"{text} {target}")])
    prompt = len(tokenizer.encode(text))
    labels = ids.clone()
    labels[:, :prompt] = -100
    value = nn.Parameter(start.clone())
    adam = torch.optim.Adam([value], lr)
    keys: list[Tensor] = []
    losses = []

    def replace(given: Tensor, out: Tensor) -> Tensor:
        keys.append(given[0, prompt - 1].detach())
        out[:, prompt - 1] = value
        return out

    for _ in range(steps):
        with hooked(net, module, replace):
            loss = net(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return keys[0], value.detach(), losses
