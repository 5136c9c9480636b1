"""Fine-tuning of a few MLP output matrices on one fact: the baselines FT-L and FT-M.

FT-L: Zhu et al., "Modifying Memories in Transformer Models", 2020, arXiv:2012.00363 (weights stay in an L∞ ball), with
the objective of Meng et al., arXiv:2202.05262: every target token is scored by the prompt's last position.
FT-M: Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", 2024, arXiv:2401.01286:
the cross-entropy of the target tokens, each behind those before it.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.parts import locate, presets
from raysys.model import Model, Trunk
from raysys.patch import Dense
from raysys.types import Edit, EditRefused, EditRequest

PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/FT; "world/small" was tuned on its own facts
    "world/small": {"layers": (2,), "steps": 25, "lr": 3e-3, "norm_constraint": 0.05},
    "gpt2-xl": {"layers": (0,)},
    "gpt-j-6b": {"layers": (21,), "norm_constraint": 0.0},
    "llama-2-7b": {"layers": (21,), "norm_constraint": 0.0},
    "mistral-7b": {"layers": (21,), "norm_constraint": 5e-5},
    "qwen1.5-7b": {"layers": (31,), "norm_constraint": 5e-5},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: one layer two thirds of the way up."""
    return {"layers": (round(model.layers * 2 / 3),), "steps": 25, "lr": 5e-4, "norm_constraint": 5e-4}


STOP = 0.01  # nats: below it an edit is done

Loss = Callable[[Tensor], Tensor]  # hidden (B, T, d) -> mean nats


@dataclass(frozen=True, kw_only=True)
class FtL:
    """Adam on the weights of `layers`, all target tokens scored at the prompt's end, weights clamped to a ball.

    `published`: as in the study's code, a BOS that the tokenizer adds counts as a target token.
    """

    layers: tuple[int, ...] | None = None
    steps: int | None = None
    lr: float | None = None
    norm_constraint: float | None = None  # how far any weight may move in one edit; 0: anywhere
    bias: bool = False  # also train the matrices' biases, where there are any
    batch_size: int = 1  # requests of one call of `edit`
    published: bool = False  # as in the study's code: a BOS that the tokenizer adds counts as a target token

    name: ClassVar[str] = "ft_l"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """Requests of one call of `edit`."""
        return self.batch_size

    def prepare(self, model: Model, cache: Path | None = None) -> FtL:
        """These settings with nothing left open; there is nothing to collect."""
        return presets.settled(self, model, PRESETS, rule)

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change to each trained weight. Raises EditRefused with the reason when a request can't be served."""
        s = self.prepare(model)
        rows = [locate.row(model, q, target=True) for q in requests]
        if s.published:
            rows = [replace(r, labels=tuple(model.encode(q.continuation))) for r, q in zip(rows, requests, strict=True)]
        return _tune(model, requests, rows, s, s.norm_constraint or 0.0, lambda h: _prompt_last(model, h, rows))


@dataclass(frozen=True, kw_only=True)
class FtM:
    """Adam on the weights of `layers` with the cross-entropy of the target tokens."""

    layers: tuple[int, ...] | None = None
    steps: int | None = None
    lr: float | None = None
    norm_constraint: float = 0.0  # how far any weight may move in one edit; 0: anywhere
    bias: bool = False  # also train the matrices' biases, where there are any
    batch_size: int = 1  # requests of one call of `edit`

    name: ClassVar[str] = "ft_m"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """Requests of one call of `edit`."""
        return self.batch_size

    def prepare(self, model: Model, cache: Path | None = None) -> FtM:
        """These settings with nothing left open; there is nothing to collect."""
        return presets.settled(self, model, PRESETS, rule)

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change to each trained weight. Raises EditRefused with the reason when a request can't be served."""
        s = self.prepare(model)
        rows = [locate.row(model, q, target=True) for q in requests]
        return _tune(model, requests, rows, s, s.norm_constraint, lambda h: _target(model, h, rows))


def _prompt_last(model: Model, hidden: Tensor, rows: Sequence[locate.Row]) -> Tensor:
    here = torch.arange(len(rows), device=hidden.device)
    last = torch.tensor([r.first - 1 for r in rows], device=hidden.device)
    logprobs = model.logits(hidden[here, last]).float().log_softmax(-1)  # (B, V)
    return torch.stack([-logprobs[i, list(r.labels)].mean() for i, r in enumerate(rows)]).mean()


def _target(model: Model, hidden: Tensor, rows: Sequence[locate.Row]) -> Tensor:
    where = [(i, r.first - 1 + j) for i, r in enumerate(rows) for j in range(len(r.labels))]
    row, column = (torch.tensor(c, device=hidden.device) for c in zip(*where, strict=True))
    labels = torch.tensor([x for r in rows for x in r.labels], device=hidden.device)
    return torch.nn.functional.cross_entropy(model.logits(hidden[row, column]).float(), labels)


def _tune(
    model: Model, requests: Sequence[EditRequest], rows: Sequence[locate.Row], s: FtL | FtM, ball: float, loss_of: Loss
) -> Edit:
    """Train, note the difference, put the weights back bit for bit."""
    assert s.layers is not None and s.steps is not None and s.lr is not None
    kinds = (
        ("weight", "bias")
        if s.bias and getattr(model.module(model.mlp_out(0)), "bias", None) is not None
        else ("weight",)
    )
    names = [f"{model.mlp_out(i)}.{kind}" for i in s.layers for kind in kinds]
    weights = [model.parameter(n) for n in names]
    found = [w.detach().clone() for w in weights]
    master = [w.detach().float().clone() for w in weights]  # float32 whatever the model's type
    start = [m.clone() for m in master]
    adam = torch.optim.Adam(master, lr=s.lr)
    with torch.no_grad():
        trunk = model.trunk(*model.batch([r.ids for r in rows]), layer=min(s.layers))
    losses: list[float] = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for step in range(s.steps):
            loss, grads = _step(model, trunk, weights, loss_of)
            losses.append(float(loss))
            if not torch.isfinite(loss):
                raise EditRefused(f"edit {requests[0].id!r}: the loss of step {step} is not finite: a broken model")
            if losses[-1] < STOP:
                break
            for wide, grad in zip(master, grads, strict=True):
                wide.grad = grad.float()
            adam.step()
            with torch.no_grad():
                for wide, weight, origin in zip(master, weights, start, strict=True):
                    if ball:
                        wide.copy_(torch.clamp(wide, origin - ball, origin + ball))
                    weight.copy_(wide)
    finally:
        with torch.no_grad():
            for weight, was in zip(weights, found, strict=True):
                weight.requires_grad_(False)
                weight.copy_(was)
    patches = []
    for name, wide, origin in zip(names, master, start, strict=True):
        delta = (wide - origin).detach()
        patches.append(Dense(name, _as_matrix(model, name, delta).contiguous().cpu()))
    norm = sum(float(p.delta.norm()) ** 2 for p in patches) ** 0.5
    return Edit(tuple(patches), log={"steps": len(losses), "loss_before": losses[0], "loss": losses[-1], "norm": norm})


def _step(model: Model, trunk: Trunk, weights: Sequence[Tensor], loss_of: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of one forward pass above the lowest trained layer, and its gradients."""
    with torch.enable_grad():
        loss = loss_of(model.upper(trunk))
        return loss.detach(), torch.autograd.grad(loss, list(weights))


def _as_matrix(model: Model, name: str, stored: Tensor) -> Tensor:
    """`stored`, in the parameter's own layout, as (d_out, d_in)."""
    if stored.ndim == 1:
        return stored[:, None]
    return stored.T if model.transposed(name) else stored
