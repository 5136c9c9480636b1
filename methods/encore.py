"""ENCORE: MEMIT for long streams: earlier keys, a price on the length of the change, values that are searched no
further than needed.

Gupta, Prateepamornkul, Lu, Alaa, Hartvigsen, Anumanchipalli, "Lifelong Knowledge Editing requires Better
Regularization", Findings of EMNLP 2025, arXiv:2502.01636 (first called "Lifelong Sequential Knowledge Editing without
Model Degradation"): MPES, most-probable early stopping, and the constraint on the Frobenius norm.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import memit
from methods.parts import artifacts, locate, metric, presets, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRequest

Memory = Mapping[str, metric.Earlier]  # by module: the keys of earlier batches
REMEDY = "raise `documents` or `norm_weight`"
_FIVE: presets.Settings = {"layers": (4, 5, 6, 7, 8)}
PRESETS: Mapping[str, presets.Settings] = {  # the authors' repository for gpt2-xl, llama-2-7b, llama-3-8b; others alike
    "world/small": {**memit.WORLD, "layers": (2,), "weight": 10.0, "norm_weight": 10.0, "patience": 3},
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "steps": 20, "weight": 20000.0, "patience": 4},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8)},
    "llama-2-7b": _FIVE,
    "llama-2-13b": _FIVE,
    "llama-3-8b": {**_FIVE, "norm_weight": 20.0, "patience": 2, "documents": 10_000},
    "llama-3.1-8b": {**_FIVE, "norm_weight": 20.0, "patience": 2, "documents": 10_000},
    "llama-3.2-3b": {**_FIVE, "norm_weight": 20.0, "patience": 2, "documents": 10_000},
    "mistral-7b": _FIVE,
    "qwen1.5-7b": _FIVE,
    "qwen2.5-7b": _FIVE,
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: MEMIT's layers, the paper's settings."""
    return {
        "layers": memit.PRESETS.get(presets.name(model), {}).get("layers") or memit.layers(model),
        "steps": 25,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 0.75,
        "weight": 15000.0,
        "norm_weight": 10.0,
        "patience": 3,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


@dataclass(frozen=True, kw_only=True)
class Encore:
    """In each layer W' = W + R Aᵀ with A = (λC + μI + S + KKᵀ)⁻¹ K, S = Σ kkᵀ over the keys of earlier batches.

    The search for a value also ends once `patience` passes have decoded the target behind every sampled context.
    """

    batch: int = 1  # requests that one step takes
    layers: tuple[int, ...] | None = None  # edited in this order; values are searched at the last one
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards today's output
    clamp: float | None = None  # |value - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    patience: int | None = None  # 0: the search goes on until its loss is small, as MEMIT's
    weight: float | None = None  # λ: how many keys of the corpus a new key weighs against
    norm_weight: float | None = None  # μ: what the squared Frobenius norm of the change counts
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it

    name: ClassVar[str] = "encore"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedEncore:
        """Sample contexts, collect and factorise λC + μI on the unedited model, or take them from `cache`.

        Raises ValueError when that is singular or something can't be read.
        """
        s = presets.settled(self, model, PRESETS, rule)
        assert s.layers is not None and s.contexts is not None and s.corpus is not None and s.documents is not None
        assert s.weight is not None and s.norm_weight is not None
        spread.check(s.name, s.batch, s.layers, s.steps, weight=s.weight)
        if not 0 <= s.norm_weight < float("inf"):
            raise ValueError(f"encore: norm_weight is 0 or more, got {s.norm_weight}; leave it out to take the preset")
        sampled = artifacts.contexts(model, s.contexts, s.seed, cache)
        modules = [model.mlp_out(layer) for layer in s.layers]
        taken = artifacts.second_moments(model, modules, Corpus(s.corpus, s.documents), cache)
        floor = s.norm_weight / s.weight  # λC + μI = λ(C + floor · I)
        spaces = metric.whitened(model, {m: _raised(taken[m], floor) for m in modules}, 0.0, REMEDY)
        made_from = artifacts.hashes(sampled, taken)
        return PreparedEncore(settings=s, contexts=sampled, spaces=spaces, made_from=made_from)


def _raised(moment: artifacts.Moment, by: float) -> artifacts.Moment:
    matrix = moment.matrix.double()
    return replace(moment, matrix=matrix + by * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedEncore:
    """ENCORE with what it needs of one model; `spaces` by module, `made_from`: artifact hashes."""

    settings: Encore
    contexts: artifacts.Contexts
    spaces: Mapping[str, metric.Space]
    made_from: Mapping[str, str]

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.made_from)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Memory | None = None) -> Edit:
        """The change for the batch `requests`. Raises EditRefused with the reason when there is none."""
        return spread.edit(*self.solved(model, requests, memory))

    def solved(
        self, model: Model, requests: Sequence[EditRequest], memory: Memory | None = None
    ) -> tuple[spread.Spread, list[locate.Value]]:
        """The change with what it was made from, and the values."""
        s, texts = self.settings, self.contexts.texts
        assert s.layers is not None and s.weight is not None and s.patience is not None
        weight = s.weight
        search = replace(memit.search(s), patience=s.patience)
        values = spread.values(model, requests, texts, s.layers[-1], search)

        def solve(turn: spread.Turn, share: Tensor) -> tuple[Tensor, Tensor]:
            earlier = memory.get(turn.module) if memory else None
            return share, metric.answer(self.spaces[turn.module], turn.keys, weight, earlier).T

        aims = spread.wanted(values)
        done = spread.spread(model, requests, texts, s.layers, aims, solve, keys_after=True, remedy=REMEDY)
        return done, values

    def remember(self, memory: Memory | None, step: Mapping[str, Tensor]) -> Memory:
        """The keys of all steps so far, as the second moments see them, by module."""
        assert self.settings.weight is not None
        return metric.remembered(self.spaces, memory, step, self.settings.weight)
