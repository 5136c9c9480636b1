"""EMMET: ROME's exact insertion for a batch of facts: one matrix, the residual under an equality constraint.

Gupta, Sajnani, Anumanchipalli, "A Unified Framework for Model Editing", Findings of EMNLP 2024, arXiv:2403.14236: eq. 9
(the closed form), section 4.2 (the small λ inside it that keeps large batches from failing).
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import memit
from methods.parts import artifacts, locate, metric, presets, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRequest

_LLAMA: presets.Settings = {"layer": 5, "clamp": 4.0, "weight_decay": 1e-3, "weight": 1e5}
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/EMMET; the search for values is MEMIT's
    "world/small": {**memit.WORLD, "layer": 2, "weight": 100.0},
    "gpt2-xl": {"layer": 17, "steps": 20, "weight": 1e4},
    "gpt-j-6b": {"layer": 5, "weight": 1e5},
    "llama-2-7b": _LLAMA,
    "llama-2-13b": _LLAMA,
    "llama-3-8b": _LLAMA,
    "llama-3.1-8b": _LLAMA,
    "llama-3.2-3b": _LLAMA,
    "mistral-7b": _LLAMA,
    "qwen1.5-7b": {"layer": 5, "weight": 1e5},
    "qwen2.5-7b": _LLAMA,
    # nobody has published any for Pythia: ROME's layers
    "pythia-160m": {"layer": 3, "steps": 20},
    "pythia-410m": {"layer": 7, "steps": 20},
    "pythia-1b": {"layer": 7, "steps": 20},
    "pythia-2.8b": {"layer": 5, "steps": 20},
    "pythia-6.9b": {"layer": 5, "steps": 20},
    "pythia-12b": {"layer": 5, "steps": 20},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: a layer a fifth of the way up, the paper's settings."""
    return {
        "layer": max(1, round(model.layers / 5)),
        "steps": 25,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 0.75,
        "weight": 1e4,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


@dataclass(frozen=True, kw_only=True)
class Emmet:
    """W' = W + R (Kᵀ C'⁻¹ K + εI)⁻¹ Kᵀ C'⁻¹ with C' = λC + μI: K the batch's keys, C the second moment of keys, R what

    the layer's hidden states miss of the values that make the targets likely. With ε = 0 every key is met exactly.
    """

    batch: int = 1  # requests that one step takes
    layer: int | None = None
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards today's output
    clamp: float | None = None  # |value - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    weight: float | None = None  # λ: what C counts
    norm_weight: float = 0.0  # μ: what the length of the change counts
    slack: float = 0.1  # ε: how far a key may be missed; 0 refuses batches whose keys depend on each other
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular

    name: ClassVar[str] = "emmet"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedEmmet:
        """Sample contexts, collect and factorise C on the unedited model, or take them from `cache`.

        Raises ValueError when C is singular or something can't be read.
        """
        settings = presets.settled(self, model, PRESETS, rule)
        assert settings.layer is not None and settings.contexts is not None
        assert settings.corpus is not None and settings.documents is not None
        spread.check(settings.name, settings.batch, (settings.layer,), settings.steps, weight=settings.weight)
        sampled = artifacts.contexts(model, settings.contexts, settings.seed, cache)
        corpus = Corpus(settings.corpus, settings.documents)
        moment = artifacts.second_moment(model, model.mlp_out(settings.layer), corpus, cache)
        return PreparedEmmet.of(model, settings, sampled, moment)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedEmmet:
    """EMMET with what it needs of one model; `space`: keys seen through C + μ/λ I; `made_from`: artifact hashes."""

    settings: Emmet
    contexts: artifacts.Contexts
    space: metric.Whitened
    made_from: Mapping[str, str]

    @classmethod
    def of(cls, model: Model, settings: Emmet, contexts: artifacts.Contexts, moment: artifacts.Moment) -> PreparedEmmet:
        """From `settings` without None. Raises ValueError when the second moment is singular."""
        assert settings.weight is not None
        matrix = moment.matrix.double() + settings.norm_weight / settings.weight * torch.eye(len(moment.matrix))
        space = metric.Whitened.of(matrix, settings.ridge, model.device)
        made_from = {"contexts": contexts.digest, "second_moment": moment.digest}
        return cls(settings=settings, contexts=contexts, space=space, made_from=made_from)

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.made_from)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change for the batch `requests`. Raises EditRefused with the reason when there is none."""
        return spread.edit(*self.solved(model, requests))

    def solved(
        self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None
    ) -> tuple[spread.Spread, list[locate.Value]]:
        """The change with what it was made from, and the values."""
        s, texts = self.settings, self.contexts.texts
        assert s.layer is not None and s.weight is not None
        values = spread.values(model, requests, texts, s.layer, memit.search(s))
        floor = s.weight * s.slack  # the closed form is MEMIT's at this λ: ε scales what C counts against the keys

        def solve(turn: spread.Turn, share: Tensor) -> tuple[Tensor, Tensor]:
            return share, metric.answer(self.space, turn.keys, floor).T

        aims, remedy = spread.wanted(values), "raise `slack`, `documents` or `ridge`"
        return spread.spread(model, requests, texts, (s.layer,), aims, solve, remedy=remedy), values
