"""PMET: MEMIT that looks for what attention and MLP should give, and writes the MLP's part alone.

Li, Li, Song, Yang, Ma, Yu, "PMET: Precise Model Editing in a Transformer", AAAI 2024, arXiv:2308.08742, section 4 (the
search for both, the update, its spreading by the square root of the layers that are left).
The search is in methods/parts/pmet_search.py. Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from methods import memit
from methods.parts import artifacts, locate, metric, pmet_search, presets, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRequest

_FIVE: presets.Settings = {"layers": (4, 5, 6, 7, 8)}
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/PMET
    "world/small": {**memit.WORLD, "layers": (2, 3), "weight": 15.0, "kl": 1.0},  # less of it ends the search too soon
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17)},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "clamp": 0.75, "steps": 30, "lr": 0.2, "kl": 1.0},
    "llama-2-7b": _FIVE,
    "llama-2-13b": _FIVE,
    # nobody has published any for these: Llama 2's
    "llama-3-8b": _FIVE,
    "llama-3.1-8b": _FIVE,
    "llama-3.2-3b": _FIVE,
    "qwen1.5-7b": _FIVE,
    "qwen2.5-7b": _FIVE,
    "mistral-7b": _FIVE,
    "pythia-160m": _FIVE,
    "pythia-410m": _FIVE,
    "pythia-1b": _FIVE,
    "pythia-2.8b": {"layers": (3, 4, 5, 6, 7)},
    "pythia-6.9b": _FIVE,
    "pythia-12b": _FIVE,
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: MEMIT's layers, the paper's settings."""
    return {
        "layers": memit.layers(model),
        "steps": 20,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 1.0,
        "kl": 0.0625,
        "weight": 15000.0,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


@dataclass(frozen=True, kw_only=True)
class Pmet:
    """In each layer W' = W + R Kᵀ (λC + KKᵀ)⁻¹: as MEMIT, but R is what the last layer's *MLP* misses of its value, by

    the square root of the number of layers left. The attention's value is searched along with it, so that the MLP
    need not carry what is the attention's; `attention` writes that into the attention's output matrices too.

    `published`: as the authors' code, which writes a change as it is where its shape fits the stored matrix; where this
    is square and stored as (d_in, d_out), GPT-2's attention, that writes the transpose. What the study's code does
    besides (it pads on the left and counts positions as if on the right, and so reads padding) is not rebuilt.
    """

    batch: int = 1  # requests that one step takes
    layers: tuple[int, ...] | None = None  # edited in this order; values are searched at the last one
    attention: bool = False  # write the attention's output matrices too (the paper's two-module variant)
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards today's outputs
    clamp: float | None = None  # |value - now| is at most this many times |now|, for each of the two
    kl: float | None = None  # weight of "<subject> is a" staying as it was
    nll: float = 1.0  # weight of the targets' likelihood
    weight: float | None = None  # λ: how many keys of the corpus a new key weighs against
    published: bool = False  # transpose square changes where the authors' code does
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular

    name: ClassVar[str] = "pmet"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedPmet:
        """Sample contexts, collect and factorise C on the unedited model, or take them from `cache`.

        Raises ValueError when C is singular or something can't be read.
        """
        settings = presets.settled(self, model, PRESETS, rule)
        assert settings.layers is not None and settings.contexts is not None
        assert settings.corpus is not None and settings.documents is not None
        spread.check(settings.name, settings.batch, settings.layers, settings.steps, weight=settings.weight)
        sampled = artifacts.contexts(model, settings.contexts, settings.seed, cache)
        names = [name for layer in settings.layers for name in modules(model, layer, settings.attention)]
        taken = artifacts.second_moments(model, names, Corpus(settings.corpus, settings.documents), cache)
        return PreparedPmet.of(model, settings, sampled, taken)


def modules(model: Model, layer: int, attention: bool) -> tuple[str, ...]:
    """What is written in `layer`, in the order it runs."""
    mlp = model.mlp_out(layer)  # says so when there is no such layer
    return (model.arch.attn_out.format(layer), mlp) if attention else (mlp,)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPmet:
    """PMET with what it needs of one model; `spaces` by module, `made_from`: artifact hashes."""

    settings: Pmet
    contexts: artifacts.Contexts
    spaces: Mapping[str, metric.Space]
    made_from: Mapping[str, str]

    @classmethod
    def of(
        cls, model: Model, settings: Pmet, contexts: artifacts.Contexts, moments: Mapping[str, artifacts.Moment]
    ) -> PreparedPmet:
        """From `settings` without None, and a second moment for each edited module. Raises ValueError."""
        spaces = metric.whitened(model, moments, settings.ridge)
        made_from = artifacts.hashes(contexts, moments)
        return cls(settings=settings, contexts=contexts, spaces=spaces, made_from=made_from)

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.made_from)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change for the batch `requests`. Raises EditRefused with the reason when there is none."""
        done, pairs = self.solved(model, requests)
        return spread.edit(done, [mlp for _, mlp in pairs])

    def solved(
        self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None
    ) -> tuple[spread.Spread, list[pmet_search.Pair]]:
        """The change with what it was made from, and the values of attention and MLP."""
        s, texts = self.settings, self.contexts.texts
        assert s.layers is not None and s.weight is not None and s.steps is not None and s.lr is not None
        assert s.weight_decay is not None and s.clamp is not None and s.kl is not None
        weight, last = s.weight, s.layers[-1]
        search = pmet_search.Search(
            steps=s.steps, lr=s.lr, weight_decay=s.weight_decay, clamp=s.clamp, kl=s.kl, nll=s.nll
        )
        pairs = pmet_search.values(model, requests, texts, last, search)
        both: tuple[Sequence[locate.Value], ...] = tuple(zip(*pairs, strict=True))
        aims = [spread.wanted(found) for found in (both if s.attention else both[1:])]

        def solve(turn: spread.Turn, share: Tensor) -> tuple[Tensor, Tensor]:
            left, right = share, metric.answer(self.spaces[turn.module], turn.keys, weight).T
            weight_name = f"{turn.module}.weight"
            if s.published and model.transposed(weight_name) and left.shape[0] == right.shape[1]:
                return right.T, left.T
            return left, right

        done = spread.spread(
            model,
            requests,
            texts,
            s.layers,
            aims,
            solve,
            rule="root",
            modules=lambda layer: modules(model, layer, s.attention),
            gauges=modules(model, last, s.attention),
        )
        return done, pairs
