"""R-ROME: ROME whose key and output are averaged over the contexts everywhere, not in the direction alone.

Gupta, Baskaran, Anumanchipalli, "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing", EMNLP
2024, arXiv:2403.07175, section 4: ROME divides by uᵀk with u from the averaged key and k from the bare prompt; where
these two happen to be nearly orthogonal the update explodes and one edit disables the model. With k̄ in both places
uᵀk̄ = k̄ᵀC⁻¹k̄ / |C⁻¹k̄| is always positive. p-ROME, of the same paper, is `keys = "bare"`.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from methods import rome
from methods.parts import locate, presets
from raysys.model import Model
from raysys.types import Edit, EditRequest

PRESETS: Mapping[str, presets.Settings] = rome.PRESETS  # EasyEdit, hparams/R-ROME: those of ROME


def rule(model: Model) -> presets.Settings:
    """For models without a preset: ROME's rule."""
    return rome.rule(model)


@dataclass(frozen=True, kw_only=True)
class RRome:
    """ROME with one key: u = C⁻¹ k̄, W' = W + (v - m̄) uᵀ / (uᵀ k̄), k̄ and m̄ the input and output of the edited

    projection at the subject, averaged over contexts; v is what ROME looks for.
    """

    layer: int | None = None
    steps: int | None = None  # passes of the search for v; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls v towards today's output
    clamp: float = 4.0  # |v - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    keys: Literal["mean", "bare"] = "mean"  # bare: p-ROME, key and output of the bare prompt everywhere
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    second_moment: bool = True  # False: u = k̄
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular
    double: bool = True  # False: C is inverted in 32 bits, as the reference does

    name: ClassVar[str] = "r_rome"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedRRome:
        """Sample contexts and collect C on the unedited model, or take them from `cache`. Raises ValueError."""
        settings = presets.settled(self, model, PRESETS, rule)
        locate.check_steps(settings.name, settings.steps)
        shared = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "keys"}
        prepared = rome.Rome(**shared).prepare(model, cache)
        return PreparedRRome(settings=settings, rome=dataclasses.replace(prepared, keys=settings.keys))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRRome:
    """R-ROME with what it needs of one model: `settings` without None, and ROME's machinery set to one key."""

    settings: RRome
    rome: rome.PreparedRome

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.rome.identity()["artifacts"])

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The rank-one change for exactly one request. Raises EditRefused with the reason when there is none."""
        return self.rome.edit(model, requests)
