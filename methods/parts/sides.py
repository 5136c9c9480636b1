"""The side memories that WISE makes: changed copies of one MLP matrix, and which of them answers a prompt.

Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", NeurIPS 2024,
arXiv:2405.14768: section 2.3.1 (the routing), 2.3.2 (merging by TIES: Yadav et al., NeurIPS 2023, arXiv:2306.01708).

n = entries of the matrix, in the layout in which the family stores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from raysys.asking import Asking
from raysys.model import Model


@dataclass(frozen=True, eq=False)
class Memory:
    """A copy of the matrix that differs where `bits` (n / 8,) uint8 are set, by `delta` (entries set,) float32.

    Elsewhere it is `decay` times the matrix (1 unless the published weight decay was asked for). `floor`: the least
    activation that one of its edits caused; `SideMemory` routes by it.
    """

    bits: Tensor
    delta: Tensor
    decay: float
    floor: float

    @classmethod
    def of(cls, mask: Tensor, delta: Tensor, decay: float, floor: float) -> Memory:
        """With the entries where `mask` (n,) bool is set of a `delta` (n,) float32."""
        bits = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        return cls(bits, delta[mask].cpu(), decay, floor)

    def mask(self, entries: int) -> Tensor:
        """(n,) bool."""
        return torch.from_numpy(np.unpackbits(self.bits.numpy(), count=entries)).bool()

    def change(self, weight: Tensor) -> Tensor:
        """What it adds to `weight`, of any shape with n entries: float32 of that shape."""
        change = weight.float() * (self.decay - 1) if self.decay != 1 else torch.zeros_like(weight, dtype=torch.float32)
        change.view(-1)[self.mask(weight.numel()).to(weight.device)] = self.delta.to(weight.device)
        return change


def project(model: Model, module: str, given: Tensor, weight: Tensor, biased: bool = True) -> Tensor:
    """What `module` gives for `given` (..., d_in) with another `weight`: the same operations, its own bias.

    Not `biased`: as in the published code, a linear layer's bias is forgotten (GPT-2's kind of layer keeps it).
    """
    bias = getattr(model.module(module), "bias", None)
    if not model.transposed(f"{module}.weight"):
        return linear(given, weight, bias if biased else None)
    flat = given.reshape(-1, given.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.reshape(*given.shape[:-1], -1)


def activation(model: Model) -> Callable[[Tensor], Tensor]:
    """The model's own activation function, which outputs are compared through."""
    names = ("hidden_act", "activation_function", "hidden_activation")
    name = next((getattr(model.config, n) for n in names if getattr(model.config, n, None)), "linear")
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def apart(act: Callable[[Tensor], Tensor], one: Tensor, other: Tensor) -> Tensor:
    """Distance of two outputs (..., d_out), each through `act`: (...,) float32."""
    distance: Tensor = torch.linalg.vector_norm(act(other.float()) - act(one.float()), dim=-1)
    return distance


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """One change for many of the same shape: the largest `density` of each, where they agree with the majority's sign.

    Entries that several hold are averaged over those that agree.
    """
    kept = []
    for change in changes:
        size = change.abs().view(-1)
        best = torch.argsort(size, descending=True, stable=True)[: int(density * len(size))]
        mask = torch.zeros_like(size).index_fill_(0, best, 1.0)
        kept.append(change * mask.view(change.shape))
    stack = torch.stack(kept)
    agrees = stack.sign() == (stack.sum(0) >= 0).float() * 2 - 1
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SideMemory:
    """Side memories of `module`, the one being written last: all of them, or how a step changes the last of them.

    masks: (m, n / 8) uint8, bits of each memory; deltas: float32, theirs one after another; counts: (m,) long, entries
    of each; decays, floors: (m,) float64, see `Memory`. `live`: the last one takes further edits. A step keeps the
    first `kept` finished memories before it; `follows`: its memory goes on from the live one and has its mask.
    edits: how many were made so far; reach: share of a floor that calls for a memory; longest: prompts of more tokens
    are judged by their largest activation, not the mean; biased: see `project`.
    """

    module: str
    masks: Tensor
    deltas: Tensor
    counts: Tensor
    decays: Tensor
    floors: Tensor
    live: bool
    edits: int
    reach: float
    longest: int
    biased: bool = True
    kept: int = 0
    follows: bool = False
    kind: ClassVar[str] = "side_memory"
    whole: ClassVar[bool] = True
    in_weights: ClassVar[bool] = False

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("masks", "deltas", "counts", "decays", "floors")}

    def fields(self) -> dict[str, Any]:
        names = ("module", "live", "edits", "reach", "longest", "biased", "kept", "follows")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """One by one; of a step that `follows`, the first has no bits of its own."""
        none = torch.zeros(0, dtype=torch.uint8)
        bits = ([none] if self.follows else []) + list(self.masks)
        parts = torch.split(self.deltas, self.counts.tolist())
        numbers = zip(self.decays.tolist(), self.floors.tolist(), strict=True)
        return tuple(Memory(b, d, *rest) for b, d, rest in zip(bits, parts, numbers, strict=True))

    @property
    def finished(self) -> tuple[Memory, ...]:
        """Those that take no more edits."""
        return self.memories[:-1] if self.live else self.memories

    def after(self, earlier: SideMemory) -> SideMemory:
        """`earlier`, all memories so far, with this step. Raises ValueError when it doesn't belong there."""
        if earlier.module != self.module or earlier.edits >= self.edits or self.follows > earlier.live:
            raise ValueError(f"a step of side memories of {self.module} does not follow those after {earlier.edits}")
        new = list(self.memories)
        if self.follows:
            new[0] = replace(new[0], bits=earlier.memories[-1].bits)
        return packed(replace(self, kept=0, follows=False), (*earlier.finished[: self.kept], *new))

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear the memories. Raises ValueError for a step without those before it, or another model's."""
        if self.kept or self.follows:
            raise ValueError(f"side memories of {self.module}: merge this step with those before it")
        weight = model.parameter(f"{self.module}.weight").data
        if self.masks.shape[1] != -(-weight.numel() // 8):
            raise ValueError(f"side memories of {self.module} don't fit {tuple(weight.shape)}: made for another model?")
        with model.carrying(self, {self.module: self._hook(model, weight)}):
            yield

    def _hook(self, model: Model, weight: Tensor) -> Callable[[Tensor, Tensor, Asking], Tensor | None]:
        order = self.memories[-1:] + self.finished if self.live else self.finished  # the live one is asked first
        sides = [(m, (weight.float() + m.change(weight)).to(weight.dtype)) for m in order]
        act = activation(model)

        def look(given: Tensor, out: Tensor, asking: Asking) -> Tensor | None:
            choices: dict[int, int] = asking.notes.setdefault(self.kind, {})  # question -> memory
            questions, asked = asking.rows.tolist(), asking.last >= 0
            new: Tensor | None = None
            best = out.new_zeros(len(out), dtype=torch.float32)  # (B,)
            for number, (memory, side) in enumerate(sides):
                if not asked.any() and number not in {choices.get(q) for q in questions}:
                    continue
                there = project(model, self.module, given, side, self.biased)
                activity = self._activity(apart(act, out, there), asking.prompt)
                first = self.live and number == 0
                takes = asked & (activity >= self.reach * memory.floor) & (first | (activity > best))
                best = activity if first else torch.where(takes, activity, best)
                choices |= {questions[i]: number for i in takes.nonzero()[:, 0].tolist()}
                takes |= ~asked & torch.tensor([choices.get(q) == number for q in questions], device=out.device)
                if takes.any():
                    new = torch.where(takes[:, None, None], there, out if new is None else new)
            return new

        return look

    def _activity(self, distances: Tensor, prompt: Tensor) -> Tensor:
        """Per row the mean of `distances` (B, T) over the prompt's tokens, the largest of a long prompt: (B,)."""
        tokens, counted = prompt.sum(1), torch.where(prompt, distances, 0.0)
        return torch.where(tokens > self.longest, counted.amax(1), counted.sum(1) / tokens.clamp(min=1))


def packed(like: SideMemory, memories: Sequence[Memory]) -> SideMemory:
    """`like` with `memories` instead of its own; one without bits goes on with the mask it had."""
    bits = [m.bits for m in memories if len(m.bits)]
    return replace(
        like,
        masks=torch.stack(bits) if bits else torch.zeros(0, 0, dtype=torch.uint8),
        deltas=torch.cat([m.delta for m in memories]),
        counts=torch.tensor([len(m.delta) for m in memories]),
        decays=torch.tensor([m.decay for m in memories], dtype=torch.float64),
        floors=torch.tensor([m.floor for m in memories], dtype=torch.float64),
    )
