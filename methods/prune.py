"""PRUNE: snapshots whose sum of edits has its largest singular values restrained.

Ma, Wang, Xu, Ling, Gu, "Perturbation-Restrained Sequential Model Editing", ICLR 2025, arXiv:2405.16821, section 4: of
ΔW = W_n - W_0 = Σ σᵢ uᵢ vᵢᵀ every σᵢ > σ_max(W_0) becomes log_n σᵢ - log_n σ_max + σ_max; W = W_0 + Σ σᵢ' uᵢ vᵢᵀ.
The stream goes on from the weights that are not restrained: it is what a snapshot wears that changes. (AlphaEdit's
comparison adds the restrained ΔW to weights that hold ΔW already, which is another thing.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from methods.parts.wrapping import summed, wrapped, writes_weights, written
from raysys import names
from raysys.model import Model
from raysys.patch import Dense, LowRank
from raysys.types import Edit, EditRequest, Finishes, Patch, PreparedMethod, remembered


@dataclass(frozen=True, kw_only=True)
class Prune:
    """The method `of`, with `settings`, whose snapshots are restrained; biases are left alone."""

    of: str = "rome"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method `of`
    restraint: Literal["log", "linear"] = "log"  # linear: (σ + σ_max) / 2
    base: float = 2.0  # n of the logarithm; the paper takes e, 2, 1.5 or 1.2: the smaller, the weaker the restraint

    name: ClassVar[str] = "prune"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ValueError(f"prune: the base of the logarithm is above 1, got {self.base}")
        writes_weights("prune", self.of)
        self.inner()

    @property
    def batch(self) -> int:
        """What the wrapped method takes."""
        batch: int = self.inner().batch
        return batch

    def inner(self) -> Any:
        """The wrapped method. Raises ValueError when its name or settings are wrong."""
        return names.build(names.method(self.of), self.settings, f"prune of {self.of}")

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedPrune:
        """Prepare the wrapped method. Raises ValueError."""
        inner = self.inner().prepare(model, cache)
        if isinstance(inner, Finishes):
            raise ValueError(f"prune: {self.of} changes snapshots too; only one of them can")
        return PreparedPrune(settings=self, inner=inner)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPrune:
    """The wrapped method, prepared; `tops` keeps σ_max of base weights by name, once they were needed."""

    settings: Prune
    inner: PreparedMethod
    tops: dict[str, float] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Name, version and settings, and the same of the wrapped method with its artifacts."""
        return wrapped(self.settings, self.inner)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """The wrapped method's edit. Raises ValueError when it writes something else than weights."""
        made = self.inner.edit(model, requests, memory)
        for change in made.patches:
            written("prune", self.settings.of, change)
        return made

    def remember(self, memory: Any, step: Mapping[str, Tensor]) -> Any:
        """The wrapped method's memory."""
        return remembered(self.inner, memory, step)

    def finish(self, model: Model, patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
        """`patches` with large singular values restrained; one that has none is handed on as it is."""
        return tuple(self._finished(model, written("prune", self.settings.of, p)) for p in patches)

    def _finished(self, model: Model, change: LowRank | Dense) -> LowRank | Dense:
        if model.parameter(change.weight).ndim == 1:
            return change
        if change.weight not in self.tops:
            self.tops[change.weight] = float(torch.linalg.matrix_norm(model.matrix(change.weight).double(), 2))
        left, values, right = decomposed(change, model.device)
        restrained = self._restrained(values, self.tops[change.weight])
        if torch.equal(values, restrained):
            return change
        left = left * restrained  # (d_out, r)
        if isinstance(change, LowRank):
            return LowRank(change.weight, left.float().contiguous().cpu(), right.float().contiguous().cpu())
        return Dense(change.weight, (left @ right).float().contiguous().cpu())

    def _restrained(self, values: Tensor, top: float) -> Tensor:
        """Singular values (r,) float64, those above `top` brought nearer to it."""
        above = values > top
        if self.settings.restraint == "linear":
            return torch.where(above, (values + top) / 2, values)
        safe = torch.where(above, values, torch.full_like(values, top))
        return torch.where(above, (safe.log() - math.log(top)) / math.log(self.settings.base) + top, values)


def decomposed(change: LowRank | Dense, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), σ (r,), Vᵀ (r, d_in), float64: from the factors, where there are fewer of them than of columns."""
    if isinstance(change, Dense) or change.rank >= min(change.shape):
        left, values, right = torch.linalg.svd(summed(change).to(device).double(), full_matrices=False)
        return left, values, right
    q_left, r_left = torch.linalg.qr(change.left.to(device).double())  # (d_out, r), (r, r)
    q_right, r_right = torch.linalg.qr(change.right.to(device).double().T)  # (d_in, r), (r, r)
    left, values, right = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ left, values, right @ q_right.T
