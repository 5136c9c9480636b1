"""SPHERE: AlphaEdit's change, weakened along the directions that a matrix's rows share.

Liu, Gu, Yao, Wang, Peng, "Energy-Regularized Sequential Model Editing on Hyperspheres", ICLR 2026, arXiv:2510.01172:
the rows of W, each at length one, are points on a sphere; that they stay evenly spread is what keeps a model able. Of
ŴᵀŴ / d_out those leading eigenvectors U are taken that hold a share of the trace; Δ becomes Δ (I - s U Uᵀ).
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import alphaedit
from methods.parts import presets, spread
from raysys.model import Model
from raysys.types import Edit, EditRequest

PRESETS: Mapping[str, presets.Settings] = alphaedit.PRESETS  # EasyEdit, hparams/SPHERE: those of AlphaEdit
TINY = 1e-8  # added to the length of a row


def rule(model: Model) -> presets.Settings:
    """For models without a preset: AlphaEdit's rule."""
    return alphaedit.rule(model)


@dataclass(frozen=True, kw_only=True)
class Sphere:
    """AlphaEdit (methods/alphaedit.py) with each layer's Δ projected before the next layer's turn."""

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
    ratio: float = 0.5  # leading directions are those up to this share of the trace, and one more
    strength: float = 0.5  # s: how much of Δ along them is taken away; 1: all of it
    published: bool = False  # take W as its parameter is stored: for GPT-2's layout directions of outputs, not inputs
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what the second moment is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it

    name: ClassVar[str] = "sphere"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes
    published_means: ClassVar[str] = (
        "The leading directions are those of the parameter as it is stored, which in GPT-2's layers, stored the other "
        "way round, are directions of the outputs instead of the inputs."
    )

    def __post_init__(self) -> None:
        if not (0 < self.ratio <= 1 and 0 <= self.strength <= 1):
            raise ValueError(f"sphere: ratio and strength are shares, got {self.ratio} and {self.strength}")

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedSphere:
        """What AlphaEdit prepares. Raises ValueError."""
        s = presets.settled(self, model, PRESETS, rule)
        alphaedit.AlphaEdit.check(s.name, s)
        shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(alphaedit.AlphaEdit) if hasattr(s, f.name)}
        return PreparedSphere(settings=s, alpha=alphaedit.AlphaEdit(**shared).prepare(model, cache))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedSphere:
    """SPHERE with what it needs of one model: `settings` without None, and AlphaEdit, prepared."""

    settings: Sphere
    alpha: alphaedit.PreparedAlphaEdit

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.alpha.identity()["artifacts"])

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: alphaedit.Memory | None = None) -> Edit:
        """The change for the batch `requests`; its log has the number of leading directions, by module.

        Raises EditRefused with the reason when there is none.
        """
        leading: dict[str, int] = {}
        done, values = self.alpha.solved(model, requests, memory, self._weakened(model, leading))
        return spread.edit(done, values, {"leading": leading})

    def _weakened(self, model: Model, leading: dict[str, int]) -> alphaedit.Then:
        """What becomes of a change left (d_out, n), right (n, d_in) of a module; notes how many directions lead."""
        s = self.settings

        def weakened(module: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            weight = f"{module}.weight"
            across = s.published and model.transposed(weight)
            matrix = model.matrix(weight)
            held = directions(matrix.T if across else matrix, s.ratio)  # (d_in, r), or (d_out, r)
            leading[module] = held.shape[1]
            if across:
                return left - s.strength * held @ (held.T @ left), right
            return left, right - s.strength * (right @ held) @ held.T

        return weakened

    def remember(self, memory: alphaedit.Memory | None, step: Mapping[str, Tensor]) -> alphaedit.Memory:
        """AlphaEdit's memory."""
        return self.alpha.remember(memory, step)


def directions(matrix: Tensor, ratio: float) -> Tensor:
    """Leading eigenvectors (n, r) float64 of ŴᵀŴ, W = `matrix` (m, n): as many as hold `ratio` of the trace, and one.

    Taken from the smaller of ŴᵀŴ and ŴŴᵀ, which have the same eigenvalues above zero.
    """
    wide = matrix.double()
    rows = wide / (wide.norm(dim=1, keepdim=True) + TINY)
    narrow = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if narrow else rows.T @ rows)  # ascending
    values = values.clamp(min=0).flip(0)
    number = min(int((values.cumsum(0) / values.sum() <= ratio).sum()) + 1, len(values))
    leading: Tensor = vectors.flip(1)[:, :number]
    if not narrow:
        return leading
    back: Tensor = rows.T @ leading
    return torch.nn.functional.normalize(back, dim=0)
