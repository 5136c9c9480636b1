"""MEMIT: write a batch of facts into the MLP output matrices of several layers at once.

Meng, Sharma, Andonian, Belinkov, Bau, "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv:2210.07229: eq. 14 (the
update), eq. 16 (the search for the values), algorithm 1 (the spreading over layers).
With `earlier_keys`: what AlphaEdit's authors call MEMIT with earlier keys (Fang et al., ICLR 2025, arXiv:2410.02355,
eq. 7): keys of earlier batches count like keys of the corpus, so that later batches leave them alone.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from methods.parts import artifacts, locate, metric, presets, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRequest

Memory = Mapping[str, metric.Earlier]  # by module: the keys of earlier batches
_LLAMA: presets.Settings = {"layers": (4, 5, 6, 7, 8), "clamp": 4.0, "weight_decay": 1e-3, "weight": 15000.0}
_PYTHIA: presets.Settings = {"layers": (4, 5, 6, 7, 8), "steps": 20}
WORLD: presets.Settings = {  # tuned on facts of the built-in model
    "steps": 20,
    "lr": 4.0,  # the offsets that are needed are some 30 long: steps of 0.5 don't get there in time
    "weight_decay": 0.1,
    "clamp": 4.0,
    "contexts": ((10, 5),),
    "corpus": "world",
    "documents": 1000,
}
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/MEMIT
    "world/small": {**WORLD, "layers": (2, 3), "weight": 50.0},  # below 2, paraphrases don't follow
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "steps": 20},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "weight": 15000.0},
    "llama-2-7b": _LLAMA,
    "llama-2-13b": _LLAMA,
    "llama-3-8b": _LLAMA,
    "llama-3.1-8b": _LLAMA,
    "llama-3.2-3b": _LLAMA,
    "mistral-7b": _LLAMA,
    "qwen1.5-7b": {"layers": (4, 5, 6, 7, 8), "weight": 15000.0},
    "qwen2.5-7b": _LLAMA,
    "pythia-160m": {**_PYTHIA, "layers": (0, 1, 2, 3, 4)},
    "pythia-410m": {**_PYTHIA, "layers": (5, 6, 7, 8, 9)},
    "pythia-1b": _PYTHIA,
    "pythia-2.8b": {**_PYTHIA, "layers": (3, 4, 5, 6, 7)},
    "pythia-6.9b": _PYTHIA,
    "pythia-12b": _PYTHIA,
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: up to five layers that end a quarter of the way up, the paper's settings."""
    return {
        "layers": layers(model),
        "steps": 25,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 0.75,
        "weight": 20000.0,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


def layers(model: Model) -> tuple[int, ...]:
    """Up to five layers, the last one a quarter of the way up."""
    last = max(1, round(model.layers / 4))
    return tuple(range(max(0, last - 4), min(last, model.layers - 1) + 1))


@dataclass(frozen=True, kw_only=True)
class Memit:
    """In each layer W' = W + R Aᵀ with A = (λC + KKᵀ)⁻¹ K: K the batch's keys, C the second moment of keys, R the share

    of what the last layer's hidden states still miss of the values that make the targets likely.
    """

    batch: int = 1  # requests that one step takes
    layers: tuple[int, ...] | None = None  # edited in this order; values are searched at the last one
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards today's output
    clamp: float | None = None  # |value - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    weight: float | None = None  # λ: how many keys of the corpus a new key weighs against
    earlier_keys: bool = False  # count the keys of earlier batches too (MEMIT with earlier keys)
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular

    name: ClassVar[str] = "memit"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMemit:
        """Sample contexts, collect and factorise C on the unedited model, or take them from `cache`.

        Raises ValueError when C is singular or something can't be read.
        """
        settings = presets.settled(self, model, PRESETS, rule)
        assert settings.layers is not None and settings.contexts is not None
        assert settings.corpus is not None and settings.documents is not None
        spread.check(settings.name, settings.batch, settings.layers, settings.steps, weight=settings.weight)
        sampled = artifacts.contexts(model, settings.contexts, settings.seed, cache)
        modules = [model.mlp_out(layer) for layer in settings.layers]
        taken = artifacts.second_moments(model, modules, Corpus(settings.corpus, settings.documents), cache)
        return PreparedMemit.of(model, settings, sampled, taken)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedMemit:
    """MEMIT with what it needs of one model; `spaces` by module, `made_from`: artifact hashes."""

    settings: Memit
    contexts: artifacts.Contexts
    spaces: Mapping[str, metric.Space]
    made_from: Mapping[str, str]

    @classmethod
    def of(
        cls, model: Model, settings: Memit, contexts: artifacts.Contexts, moments: Mapping[str, artifacts.Moment]
    ) -> PreparedMemit:
        """From `settings` without None, and a second moment for each edited module. Raises ValueError."""
        spaces = metric.whitened(model, moments, settings.ridge)
        made_from = artifacts.hashes(contexts, moments)
        return cls(settings=settings, contexts=contexts, spaces=spaces, made_from=made_from)

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
        s = self.settings
        assert s.layers is not None and s.weight is not None
        weight, texts = s.weight, self.contexts.texts
        values = spread.values(model, requests, texts, s.layers[-1], search(s))

        def solve(turn: spread.Turn, share: Tensor) -> tuple[Tensor, Tensor]:
            earlier = memory.get(turn.module) if memory else None
            return share, metric.answer(self.spaces[turn.module], turn.keys, weight, earlier).T

        aims = spread.wanted(values)
        return spread.spread(model, requests, texts, s.layers, aims, solve, keys_after=s.earlier_keys), values

    def remember(self, memory: Memory | None, step: Mapping[str, Tensor]) -> Memory:
        """The keys of all steps so far, as the second moments see them, by module."""
        assert self.settings.weight is not None
        return metric.remembered(self.spaces, memory, step, self.settings.weight)


def search(settings: Any) -> locate.Search:
    """How values are searched, from the settings of a method that has MEMIT's."""
    s = settings
    return locate.Search(steps=s.steps, lr=s.lr, weight_decay=s.weight_decay, clamp=s.clamp, kl=s.kl)
