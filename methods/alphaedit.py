"""AlphaEdit: MEMIT whose change is kept out of the directions that keys of the corpus use.

Fang, Jiang, Wang, Ma, Jie, Wang, He, Chua, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
ICLR 2025, arXiv:2410.02355: eq. 6 (the null space), eq. 11 (the update with the keys of earlier batches).
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from methods import memit
from methods.parts import artifacts, locate, metric, presets, projectors, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRequest

Memory = Mapping[str, metric.Earlier]  # by module: the keys of earlier batches
Then = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]  # module, left (d_out, n), right (n, d_in) -> the same
_FIVE: presets.Settings = {"layers": (4, 5, 6, 7, 8), "threshold": 2e-2, "relative": False}
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit and the authors' repository, hparams/AlphaEdit
    # a fifth of the mean eigenvalue; more of it edits paraphrases better and leaves neighbours less alone
    "world/small": {**memit.WORLD, "layers": (2, 3), "threshold": 0.2, "relative": True, "l2": 1.0},
    "gpt2-xl": {**_FIVE, "layers": (13, 14, 15, 16, 17), "steps": 20},
    "gpt-j-6b": {**_FIVE, "layers": (3, 4, 5, 6, 7, 8)},
    "llama-3-8b": {**_FIVE, "lr": 0.1, "l2": 1.0},
    "llama-3.1-8b": {**_FIVE, "lr": 0.1},
    "qwen2.5-7b": {**_FIVE, "clamp": 4.0, "weight_decay": 1e-3, "l2": 1.0},
    # nobody has published any for these: those of the nearest relative
    "llama-2-7b": _FIVE,
    "llama-2-13b": _FIVE,
    "llama-3.2-3b": {**_FIVE, "lr": 0.1},
    "mistral-7b": _FIVE,
    "qwen1.5-7b": {**_FIVE, "clamp": 4.0, "weight_decay": 1e-3, "l2": 1.0},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: MEMIT's layers, the paper's search, and a threshold counted in mean eigenvalues."""
    return {
        "layers": memit.PRESETS.get(presets.name(model), {}).get("layers") or memit.layers(model),
        "steps": 25,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 0.75,
        "threshold": 0.02,
        "relative": True,
        "l2": 10.0,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


@dataclass(frozen=True, kw_only=True)
class AlphaEdit:
    """In each layer W' = W + R Aᵀ with A = (P(KKᵀ + S) + L₂I)⁻¹ P K: K the batch's keys, S = Σ kkᵀ over the keys of

    earlier batches, R the share of what is missing (as in MEMIT), P the projector on the null space of the second
    moment: directions whose eigenvalue is below `threshold`. The published threshold is absolute, so that what it
    keeps depends on how large a model's keys are; `relative` counts it in mean eigenvalues instead.
    """

    batch: int = 1  # requests that one step takes
    layers: tuple[int, ...] | None = None  # edited in this order; values are searched at the last one
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards today's output
    clamp: float | None = None  # |value - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    threshold: float | None = None  # directions with a smaller eigenvalue of the second moment may be changed
    relative: bool | None = None  # whether that is counted in mean eigenvalues
    l2: float | None = None  # L₂: what the length of the change counts
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what the second moment is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it

    name: ClassVar[str] = "alphaedit"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedAlphaEdit:
        """Sample contexts and find the null spaces on the unedited model, or take them from `cache`.

        Raises ValueError when a null space is empty or everything, or something can't be read.
        """
        s = presets.settled(self, model, PRESETS, rule)
        assert s.layers is not None and s.contexts is not None and s.corpus is not None and s.documents is not None
        assert s.threshold is not None and s.relative is not None
        self.check(s.name, s)
        sampled = artifacts.contexts(model, s.contexts, s.seed, cache)
        modules = [model.mlp_out(layer) for layer in s.layers]
        taken = artifacts.second_moments(model, modules, Corpus(s.corpus, s.documents), cache)
        spaces = {m: projectors.null_space(model, m, taken[m], s.threshold, s.relative, cache) for m in modules}
        return PreparedAlphaEdit(settings=s, contexts=sampled, spaces=spaces)

    @staticmethod
    def check(name: str, s: Any) -> None:
        """Raise ValueError when the method `name`, whose settings `s` are AlphaEdit's, can't take them."""
        spread.check(name, s.batch, s.layers, s.steps, l2=s.l2)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedAlphaEdit:
    """AlphaEdit with what it needs of one model: `settings` without None, null spaces by module."""

    settings: AlphaEdit
    contexts: artifacts.Contexts
    spaces: Mapping[str, projectors.NullSpace]

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        found = {f"null_space.{module}": space.digest for module, space in self.spaces.items()}
        return presets.identity(self.settings, {"contexts": self.contexts.digest, **found})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Memory | None = None) -> Edit:
        """The change for the batch `requests`; its log has the share of directions that may be changed, by module.

        Raises EditRefused with the reason when there is none.
        """
        done, values = self.solved(model, requests, memory)
        kept = {"directions": {module: space.share for module, space in self.spaces.items()}}
        return spread.edit(done, values, kept)

    def solved(
        self, model: Model, requests: Sequence[EditRequest], memory: Memory | None = None, then: Then | None = None
    ) -> tuple[spread.Spread, list[locate.Value]]:
        """The change with what it was made from, and the values; `then` is what becomes of each layer's change."""
        s, texts = self.settings, self.contexts.texts
        assert s.layers is not None and s.l2 is not None
        l2 = s.l2
        values = spread.values(model, requests, texts, s.layers[-1], memit.search(s))

        def solve(turn: spread.Turn, share: Tensor) -> tuple[Tensor, Tensor]:
            earlier = memory.get(turn.module) if memory else None
            right = metric.answer(self.spaces[turn.module], turn.keys, l2, earlier).T
            return then(turn.module, share, right) if then else (share, right)

        aims, remedy = spread.wanted(values), "raise `l2` or `documents`"
        return spread.spread(model, requests, texts, s.layers, aims, solve, keys_after=True, remedy=remedy), values

    def remember(self, memory: Memory | None, step: Mapping[str, Tensor]) -> Memory:
        """The keys of all steps so far, cut to the null space, by module."""
        assert self.settings.l2 is not None
        return metric.remembered(self.spaces, memory, step, self.settings.l2)
