"""UltraEdit: one gradient, normalised over all edits so far, and one least-squares problem: no training, no search.

Gu, Wang, Zhang, Yu, Zhu, Shu, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language
Models", 2025, arXiv:2505.14679, section 3 and algorithm 1. With h what enters a module and g the loss's gradient at its
output, at every token of a batch of edits: [ĥ, ĝ] is [h, g] normalised by mean and deviation over the whole history,
V = -lr |ĥ|² ĝ, and ΔWᵀ = (HᵀH + λI)⁻¹ Hᵀ V.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from methods.parts import gradients, locate, presets
from methods.parts.gradients import Batch, Labels, Trace
from methods.parts.hypernet import Stats, shapes
from methods.parts.ridge import Ridge
from raysys.model import Model
from raysys.patch import Dense, LowRank
from raysys.types import Edit, EditRefused, EditRequest

Tokens = Literal["all", "target"]


def _llama(blocks: range, *names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{i}.mlp.{name}_proj" for name in names for i in blocks)


PRESETS: Mapping[str, presets.Settings] = {  # UltraEdit's repository, config/; "world/small" was tuned on its own facts
    "world/small": {"modules": _llama(range(3, 6), "gate", "up"), "lr": 2e-3},
    "gpt-j-6b": {"modules": tuple(f"transformer.h.{i}.mlp.fc_out" for i in range(18, 27))},
    "llama-3-8b": {"modules": _llama(range(11, 16), "gate") + _llama(range(18, 25), "up")},
    "llama-3.1-8b": {"modules": _llama(range(11, 16), "gate") + _llama(range(18, 25), "up")},
    "mistral-7b": {"modules": _llama(range(29, 31), "down")},
    "qwen2.5-7b": {"modules": _llama(range(18, 27), "gate", "up")},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: the MLPs' last matrices from two thirds of the way up to the last block but one.

    As published for gpt-j-6b, whose blocks 18-26 of 28 they are; lr is published.
    """
    first = min(round(model.layers * 2 / 3), max(0, model.layers - 2))
    blocks = range(first, max(first + 1, model.layers - 1))
    return {"modules": tuple(model.mlp_out(i) for i in blocks), "lr": 1e-6}


@dataclass(frozen=True, kw_only=True)
class UltraEdit:
    """Normalised gradients written by least squares; mean and deviation of all edits so far are the method's memory.

    `published`: as EasyEdit computes it. Texts are put together `at_once` at a time and padded on the left without
    their positions being told (absolute positions shift); the target's tokens are those of the target alone, with
    the BOS that some tokenizers add; the padding in front of shorter targets is asked for as if it were a target; the
    loss is the mean over all that; and deviations are merged from unbiased variances as if they were biased ones.
    """

    modules: tuple[str, ...] | None = None  # names of the linear modules that are edited
    lr: float | None = None
    batch: int = 1  # requests of one call of `edit`: one least-squares problem (published: 100, gpt-j-6b 10)
    ridge: float = 1.0  # λ
    tokens: Tokens = "all"  # of prompt and target, or only those that predict the target
    published: bool = False
    at_once: int = 10  # texts of one pass; makes a difference to `published` alone

    name: ClassVar[str] = "ultraedit"
    version: ClassVar[str] = "1"

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedUltraEdit:
        """These settings with nothing left open; there is nothing to collect. Raises ValueError for unknown modules."""
        settings = presets.settled(self, model, PRESETS, rule)
        assert settings.modules is not None
        gradients.lowest(model, settings.modules)
        return PreparedUltraEdit(settings=settings, shapes=shapes(model, settings.modules))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedUltraEdit:
    """UltraEdit for one model: `settings` without None, and (d_in, d_out) of every module."""

    settings: UltraEdit
    shapes: Mapping[str, tuple[int, int]]

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self.settings, {})

    def remember(self, memory: Mapping[str, Tensor] | None, step: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The statistics of all tokens so far: "<d_in>x<d_out>.n", ".mean", ".m2" (see hypernet.Stats), float64."""
        found: dict[str, Tensor] = {}
        for key in dict.fromkeys(name.partition(".")[0] for name in step):
            before = _stats(memory, key) if memory is not None else None
            found |= _named(key, _stats(step, key) if before is None else before.and_then(_stats(step, key)))
        return found

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change of every edited matrix; `memory`: statistics of this step's tokens.

        Raises EditRefused when a request can't be served.
        """
        s = self.settings
        assert s.lr is not None
        parts: dict[str, list[Trace]] = {name: [] for name in self.shapes}
        step: dict[str, Stats] = {}
        losses: list[float] = []
        for batch, some in self.batches(model, requests):
            traces = gradients.trace(model, batch, list(self.shapes), some)
            losses += traces.losses.tolist()
            for name, whole in traces.modules.items():
                trace = _chosen(whole, batch) if s.tokens == "target" else whole
                parts[name].append(trace)
                new, key = self._counted(trace), _key(self.shapes[name])
                step[key] = step[key].and_then(new) if key in step else new
        increment = {k: t for key, stats in step.items() for k, t in _named(key, stats).items()}
        now = self.remember(memory, increment)
        patches = [self.change(name, parts[name], _stats(now, _key(self.shapes[name]))) for name in self.shapes]
        if not all(t.isfinite().all() for p in patches for t in p.tensors().values()):
            raise EditRefused(f"edit {requests[0].id!r}: UltraEdit's change is not finite: a broken model")
        tokens = sum(len(trace.x) for trace in next(iter(parts.values())))
        return Edit(tuple(patches), increment, {"nll": sum(losses) / len(requests), "tokens": tokens})

    def batches(self, model: Model, requests: Sequence[EditRequest]) -> Iterator[tuple[Batch, Sequence[EditRequest]]]:
        s = self.settings
        labels: Labels = "alone" if s.published else "suffix"
        rows = [gradients.row(model, q, labels, last=True) for q in requests]
        many = s.at_once if s.published else locate.CHUNK
        for start in range(0, len(rows), many):
            some = rows[start : start + many]
            batch = _as_published(model, some) if s.published else gradients.lay(model, some)
            yield batch, requests[start : start + many]

    def _counted(self, trace: Trace) -> Stats:
        stats = Stats.of(torch.cat((trace.x, trace.delta), 1).cpu())
        if self.settings.published and stats.n > 1:
            stats = replace(stats, m2=stats.m2 * stats.n / (stats.n - 1))
        return stats

    def change(self, name: str, parts: Sequence[Trace], stats: Stats) -> LowRank | Dense:
        """The change of one module that gives the tokens of `parts` V: factors, or a matrix where that is smaller."""
        h, g = torch.cat([t.x for t in parts]), torch.cat([t.delta for t in parts])
        ridge = Ridge(h, math.log(self.settings.ridge), self.shapes[name][1])
        return ridge.shift(self.values(h, g, stats)).patch(f"{name}.weight")

    def values(self, h: Tensor, g: Tensor, stats: Stats) -> Tensor:
        """V = -lr |ĥ|² ĝ, (n, d_out), for inputs h (n, d_in) and gradients g (n, d_out)."""
        assert self.settings.lr is not None
        hat = stats.normalised(torch.cat((h, g), 1))
        return -self.settings.lr * hat[:, : h.shape[1]].square().sum(1, keepdim=True) * hat[:, h.shape[1] :]


def _as_published(model: Model, rows: Sequence[locate.Row]) -> Batch:
    """Padded on the left with positions counted from there; short targets are filled up with padding, in front."""
    batch = gradients.lay(model, rows, left=True)
    width, longest = batch.ids.shape[1], max(len(r.labels) for r in rows)
    labels = [[*[model.pad_id] * (longest - len(r.labels)), *r.labels] for r in rows]
    here = torch.arange(len(rows), device=batch.ids.device).repeat_interleave(longest)
    return replace(
        batch,
        positions=torch.arange(width, device=batch.ids.device).expand(len(rows), width),
        row=here,
        column=torch.arange(width - 1 - longest, width - 1, device=here.device).repeat(len(rows)),
        label=torch.tensor(labels, device=here.device).flatten(),
        weight=torch.full((len(here),), 1 / len(here), device=here.device),
    )


def _chosen(trace: Trace, batch: Batch) -> Trace:
    """Of the tokens of `batch` those that predict a target."""
    wanted = torch.zeros_like(batch.mask, dtype=torch.bool)
    wanted[batch.row, batch.column] = True
    keep = wanted[batch.mask.bool()]
    return Trace(trace.x[keep], trace.delta[keep], trace.row[keep])


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _named(key: str, stats: Stats) -> dict[str, Tensor]:
    return {f"{key}.n": stats.n, f"{key}.mean": stats.mean, f"{key}.m2": stats.m2}


def _stats(named: Mapping[str, Tensor], key: str) -> Stats:
    return Stats(named[f"{key}.n"], named[f"{key}.mean"], named[f"{key}.m2"])
