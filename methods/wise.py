"""WISE: a side memory, a changed copy of one MLP matrix, that answers the prompts which excite it.

Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models", NeurIPS 2024,
arXiv:2405.14768: eq. 5 (margins between what is in and out of an edit's scope), eq. 6 (the loss), section 2.3.2 (random
subspaces, merged by TIES). What is worn, and the routing of eq. 4, stands in methods/parts/sides.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.parts import artifacts, locate, presets, recall
from methods.parts.sides import Memory, SideMemory, activation, apart, packed, project, ties
from raysys.model import Model
from raysys.types import Edit, EditRefused, EditRequest

__all__ = ["PRESETS", "PreparedWise", "SideMemory", "Wise", "rule"]

PAUSE = 1e-4, 0.02  # nats: the search ends when the loss moved by less than the first and is below the second
LLAMA: dict[str, Any] = {
    "site": "out", "steps": 70, "lr": 1.0, "margins": (5.0, 20.0, 10.0), "reach": 0.88, "save": 500, "merge": 1000,
}  # fmt: skip
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/WISE; "world/small" was tuned on its own facts
    # a matrix of 98,000 entries holds few edits: 4 to a side memory, none merged before the thousandth
    "world/small": LLAMA | {"layer": 2, "steps": 40, "reach": 0.6, "save": 4},
    "gpt2-xl": LLAMA | {"layer": 8, "site": "in", "steps": 40, "reach": 0.8},
    "gpt-j-6b": LLAMA | {"layer": 21, "margins": (15.0, 40.0, 20.0)},
    "llama-2-7b": LLAMA | {"layer": 27},
    "llama-3-8b": LLAMA | {"layer": 29, "steps": 30, "lr": 0.9, "margins": (2.0, 20.0, 10.0), "reach": 0.5},
    "llama-3.1-8b": LLAMA | {"layer": 29, "steps": 30, "lr": 0.9, "margins": (5.0, 10.0, 10.0), "reach": 0.5},
    "llama-3.2-3b": LLAMA | {"layer": 27},
    "mistral-7b": LLAMA | {"layer": 27},
    "qwen1.5-7b": LLAMA | {"layer": 23},
    "qwen2.5-7b": LLAMA | {"layer": 23},
}


def rule(model: Model) -> presets.Settings:
    """As published for Llama 2, 7 B, at the same relative depth."""
    return {**LLAMA, "layer": min(round(27 / 32 * model.layers), model.layers - 1)}


@dataclass(frozen=True, kw_only=True)
class Wise:
    """Gradient descent on a random share of a copy of one MLP matrix, and of another share after `save` edits.

    The loss is the target's, behind sampled contexts too, plus margins on how far the copy's output is from the
    matrix's own: little where the text does not speak of the subject, far where it does.

    `published` does what the authors' code does: rows are padded on the left and numbered from there, padding counts
    as text out of scope, a target of n tokens is averaged over n + 1 positions, the weight decay shrinks the whole
    copy towards zero (by 1 % in 1,000 steps: the copy drifts from the matrix where nothing was edited), a copy of a
    linear layer has no bias, and a floor is the mean activation of the whole batch one step before the last. By
    default padding is left out, only what is trained decays, and the floor is the activation of the bare prompt under
    the finished edit: what a question is compared by.
    """

    layer: int | None = None
    site: recall.Site | None = None  # the MLP's first or last projection
    steps: int | None = None  # of gradient descent, at most
    lr: float | None = None
    margins: tuple[float, float, float] | None = None  # activation: out of scope at most, in scope at least, between
    reach: float | None = None  # share of the floor at which a prompt goes to the side memory
    share: float = 0.2  # of the entries that are trained between two saves
    norm_constraint: float = 1.0  # how far any entry may get from the matrix's
    weight_decay: float = 1e-5
    save: int | None = None  # edits to a side memory
    merge: int | None = None  # edits after which the side memories saved since the last time become one
    density: float = 0.53  # share of each that goes into the merged one
    longest: int = 100  # tokens of a prompt above which its largest activation counts, not the mean
    contexts: tuple[tuple[int, int], ...] = ((5, 5), (10, 5))  # (tokens, number) of sampled texts before the prompt
    seed: int = 0  # of contexts and shares
    published: bool = False

    name: ClassVar[str] = "wise"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedWise:
        """Settle open settings and sample contexts, or take them from `cache`. Raises ValueError."""
        settings: Wise = presets.settled(self, model, PRESETS, rule)
        assert settings.layer is not None and settings.site is not None
        assert settings.save is not None and settings.merge is not None
        if settings.save < 1 or settings.merge < 1 or settings.merge % settings.save:
            raise ValueError(f"wise: merge is a multiple of save (got {settings.merge} and {settings.save})")
        module = recall.site(model, settings.layer, settings.site)
        sampled = artifacts.contexts(model, self.contexts, self.seed, cache)
        return PreparedWise(settings=settings, module=module, contexts=sampled)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedWise:
    """WISE on one model. `masks` (n,) bool each: the shares, in place of random ones (for comparisons)."""

    settings: Wise
    module: str
    contexts: artifacts.Contexts
    masks: Sequence[Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and the contexts' hash."""
        return presets.identity(self.settings, {"contexts": self.contexts.digest})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """What one request changes in the side memories worn. Raises EditRefused with the reason when it can't."""
        if len(requests) != 1:
            raise EditRefused(f"wise writes one edit at a time, got {len(requests)}")
        s, request = self.settings, requests[0]
        assert s.save is not None
        worn = model.wears(SideMemory)
        if worn is not None and worn.module != self.module:
            raise EditRefused(f"edit {request.id!r}: the side memories worn are of {worn.module}, not {self.module}")
        edits = 0 if worn is None else worn.edits
        with model.bare():
            lesson = Lesson(model, request, self.contexts.texts, self.module, s)
            weight = model.parameter(f"{self.module}.weight").data.float()
            old = worn.memories[-1] if worn is not None and worn.live else None
            mask = self._mask(weight.numel(), edits // s.save) if old is None else old.mask(weight.numel())
            found = self._search(request, lesson, weight, old, mask.to(weight.device))
        floor = found.floor if old is None else min(found.floor, old.floor)
        decay = found.decay * (1.0 if old is None else old.decay)
        new = Memory.of(mask, found.change.view(-1).cpu(), decay, floor)
        log = {"passes": len(found.losses), "loss_before": found.losses[0][0], "loss": found.losses[-1][0]}
        log |= {"nll": found.losses[-1][1], "floor": found.floor, "norm": float(new.delta.norm())}
        return Edit((self._step(worn, new, weight, edits + 1),), log=log)

    def _mask(self, entries: int, window: int) -> Tensor:
        if self.masks is not None:
            return self.masks[window]
        generator = torch.Generator().manual_seed(self.settings.seed + 7919 * window)
        return torch.rand(entries, generator=generator) < self.settings.share

    def _step(self, worn: SideMemory | None, new: Memory, weight: Tensor, edits: int) -> SideMemory:
        """How the memories change: the live one goes on, is saved, or is merged with those saved before."""
        s = self.settings
        assert s.save is not None and s.merge is not None and s.reach is not None
        finished = () if worn is None else worn.finished
        follows = worn is not None and worn.live
        live, kept = edits % s.save != 0, len(finished)
        if edits % s.merge == 0:
            kept = len(finished) + 1 - s.merge // s.save
            group = (*finished[kept:], new)
            change = ties([m.change(weight) for m in group], s.density).view(-1)
            new = Memory.of(change != 0, change, 1.0, min(m.floor for m in group))
            follows = False
        none = torch.zeros(0)
        step = SideMemory(
            module=self.module, masks=none, deltas=none, counts=none, decays=none, floors=none, live=live, edits=edits,
            reach=s.reach, longest=s.longest, biased=not s.published, kept=kept, follows=follows,
        )  # fmt: skip
        return packed(step, [Memory(new.bits[:0], new.delta, new.decay, new.floor) if follows else new])

    def _search(self, request: EditRequest, lesson: Lesson, weight: Tensor, old: Memory | None, mask: Tensor) -> _Found:
        """Gradient descent from the live memory `old`, or from `weight` itself, on the entries of `mask` (n,)."""
        s = self.settings
        assert s.steps is not None and s.lr is not None
        trained = mask.view(weight.shape).float()
        side = (weight if old is None else weight + old.change(weight)).clone().requires_grad_(True)
        losses: list[list[float]] = []
        floor, decay = float("inf"), 1.0
        for step in range(s.steps):
            with torch.enable_grad():
                parts, activity = lesson.loss(side)  # (nll, margins)
                loss = parts.sum()
            losses.append([float(loss.detach()), *parts.detach().tolist()])
            floor = float(activity)
            if not torch.isfinite(loss):
                raise EditRefused(f"edit {request.id!r}: the loss of step {step} is not finite: a broken model")
            if step > 1 and abs(losses[-2][0] - losses[-3][0]) <= PAUSE[0] and losses[-2][0] <= PAUSE[1]:
                break
            (slope,) = torch.autograd.grad(loss, [side])
            with torch.no_grad():
                shrink = s.weight_decay * side
                side -= s.lr * (slope * trained + (shrink if s.published else shrink * trained))
                torch.clamp(side, weight - s.norm_constraint, weight + s.norm_constraint, out=side)
            decay *= 1 - s.lr * s.weight_decay
        side = side.detach()
        if not s.published:
            floor, decay = float(lesson.bare(side)), 1.0
        return _Found(side - weight, decay, floor, losses)


@dataclass(frozen=True)
class _Found:
    """The copy minus the matrix, how far the rest of the copy decayed, its floor, losses (total, nll, margins)."""

    change: Tensor
    decay: float
    floor: float
    losses: list[list[float]]


class Lesson:
    """A request's rows, what enters the edited module in them, and the loss of a changed copy of its matrix."""

    def __init__(self, model: Model, request: EditRequest, contexts: Sequence[str], module: str, s: Wise) -> None:
        assert s.layer is not None and s.margins is not None
        self.model, self.module, self.settings, self.margins = model, module, s, s.margins
        self.act = activation(model)
        rows = [locate.row(model, request, c, target=True) for c in contexts]
        subjects = [recall.subject(model, request, c) for c in contexts]
        texts = [(*r.ids, r.labels[-1]) if s.published else r.ids for r in rows]
        ids, mask = model.batch(texts)
        shifts = [0] * len(rows)
        if s.published:
            if ids.shape[1] > model.max_length:
                raise EditRefused(
                    f"edit {request.id!r}: prompt and target exceed the model's {model.max_length} tokens"
                )
            shifts = [ids.shape[1] - len(t) for t in texts]
            for i, shift in enumerate(shifts):
                ids[i], mask[i] = ids[i].roll(shift), mask[i].roll(shift)
        columns = torch.arange(ids.shape[1], device=ids.device)
        self.scope = torch.zeros_like(mask, dtype=torch.bool)  # (R, T): the subject's tokens
        for i, (first, last) in enumerate(subjects):
            self.scope[i, first + shifts[i] : last + 1 + shifts[i]] = True
        self.rest = ~self.scope & (mask.bool() | s.published)  # (R, T): out of scope
        self.all = self.scope | self.rest
        self._label(rows, shifts)
        self.prompt = rows[0].first
        positions = columns.expand_as(ids) if s.published else None
        self._prepare(ids, mask, positions, s.layer)

    def _label(self, rows: Sequence[locate.Row], shifts: Sequence[int]) -> None:
        extra = 1 if self.settings.published else 0
        table = [
            (i, r.first - 1 + j + shift, label, 1 / (len(rows) * (len(r.labels) + extra)))
            for i, (r, shift) in enumerate(zip(rows, shifts, strict=True))
            for j, label in enumerate(r.labels)
        ]
        row, column, label, weight = (torch.tensor(c, device=self.model.device) for c in zip(*table, strict=True))
        self.row, self.column, self.label, self.weight = row, column, label, weight  # (target tokens,) each

    def _prepare(self, ids: Tensor, mask: Tensor, positions: Tensor | None, layer: int) -> None:
        """Run everything below the copy once."""
        joins = self.module == self.model.mlp_out(layer) and self.model.arch.mlp_added  # straight into the next block
        self.direct = joins and layer + 1 < self.model.layers
        seen: list[tuple[Tensor, Tensor]] = []

        def look(given: Tensor, out: Tensor) -> None:
            seen.append((given.reshape(*ids.shape, -1), out.reshape(*ids.shape, -1)))

        with torch.no_grad(), self.model.watching(self.module, look):
            self.trunk = self.model.trunk(ids, mask, layer + self.direct, position_ids=positions)
        [(self.given, self.out)] = seen  # (R, T, d_in), (R, T, d_out)

    def _there(self, side: Tensor, rows: int | None = None) -> Tensor:
        given, biased = self.given[:rows], not self.settings.published
        return project(self.model, self.module, given, side.to(self.model.dtype), biased)

    def loss(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """The target's loss in nats and that of the margins, (2,), with the copy `side`; how much it is excited."""
        there = self._there(side)
        hidden = self._upper(there)  # (R, T, d)
        logprobs = self.model.logits(hidden[self.row, self.column]).float().log_softmax(-1)
        nll = -(logprobs.gather(1, self.label[:, None])[:, 0] * self.weight).sum()
        distance = apart(self.act, self.out, there)  # (R, T)
        inside, outside = _mean(distance, self.scope), _mean(distance, self.rest)  # (R,)
        most, least, gap = self.margins
        margins = _violated(outside[:, None] - inside + gap) + _violated(outside - most) + _violated(least - inside)
        return torch.stack((nll, margins)), _mean(distance, self.all).mean().detach()

    def _upper(self, there: Tensor) -> Tensor:
        if self.direct:
            return self.model.upper(self.trunk, self.trunk.hidden + (there - self.out))

        def put(_: Tensor, out: Tensor) -> Tensor:
            return there.reshape(out.shape)

        with self.model.watching(self.module, put):
            return self.model.upper(self.trunk)

    @torch.no_grad()
    def bare(self, side: Tensor) -> Tensor:
        """How much the bare prompt, without target, excites the copy `side`."""
        distance = apart(self.act, self.out[:1], self._there(side, 1))[0, : self.prompt]
        return distance.max() if self.prompt > self.settings.longest else distance.mean()


def _mean(distance: Tensor, where: Tensor) -> Tensor:
    """Per row the mean of `distance` (R, T) over `where`; 0 where there is nothing: (R,)."""
    return (distance * where).sum(1) / where.sum(1).clamp(min=1)


def _violated(by: Tensor) -> Tensor:
    """The mean of what is above zero; 0 when nothing is."""
    above = by > 0
    return (by * above).sum() / above.sum().clamp(min=1)
