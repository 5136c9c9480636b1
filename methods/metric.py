"""How a matrix takes many keys at once: A = (λC + S + KKᵀ)⁻¹ K, from one factorisation of C for all edits (float64).

With C = L Lᵀ and keys seen through L, K̃ = L⁻¹K, Woodbury's identity leaves a system as large as the number of keys:
A = L⁻ᵀ Ũ (λI + ŨᵀŨ)⁻¹ with Ũ = [S̃, K̃], its last n columns; the keys of earlier edits are kept in S̃ (N of them), their
part of the small system factorised as it grows. An edit costs a triangular solve and not an inverse.

A `Space` is the way keys are seen: `Whitened` by C, here, or cut to its null space (methods/projectors.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from methods import artifacts
from methods.rome import cholesky
from raysys.corpora import Corpus
from raysys.model import Model

SINGULAR = 1e-7  # smallest pivot of a small system against its largest: below it keys depend on each other


class Space(Protocol):
    """Keys (d_in, n) seen so that what must not change is a multiple of the identity, and the way back."""

    def into(self, keys: Tensor) -> Tensor:
        """(d_in, n) float64 -> (m, n)."""
        ...

    def back(self, seen: Tensor) -> Tensor:
        """(m, n) -> (d_in, n) float64."""
        ...


@dataclass(frozen=True, eq=False)
class Whitened:
    """Keys seen through C: `factor` L (d_in, d_in) float64, lower, C = L Lᵀ."""

    factor: Tensor

    @classmethod
    def of(cls, matrix: Tensor, ridge: float, device: torch.device | None = None) -> Whitened:
        """From C + ridge · mean(diag C) · I. Raises ValueError when that is singular."""
        return cls(cholesky(matrix.to(device) if device else matrix, ridge))

    def into(self, keys: Tensor) -> Tensor:
        seen: Tensor = torch.linalg.solve_triangular(self.factor, keys.to(self.factor), upper=False)
        return seen

    def back(self, seen: Tensor) -> Tensor:
        keys: Tensor = torch.linalg.solve_triangular(self.factor.T, seen, upper=True)
        return keys


@dataclass(frozen=True, eq=False)
class Earlier:
    """Keys of earlier edits as a space sees them, (m, N), and the lower factor of floor · I + seenᵀ seen, (N, N)."""

    seen: Tensor
    factor: Tensor


def extended(earlier: Earlier | None, new: Tensor, floor: float) -> Earlier:
    """`earlier` and then the keys `new` (m, n), as the space sees them; a factor of NaN where they are dependent."""
    own = new.T @ new
    own.diagonal().add_(floor)
    if earlier is None:
        return Earlier(new, _lower(own))
    beside = torch.linalg.solve_triangular(earlier.factor, earlier.seen.T @ new, upper=False)  # (N, n)
    corner = _lower(own - beside.T @ beside)
    old = earlier.factor.shape[0]
    factor = new.new_zeros(old + len(corner), old + len(corner))
    factor[:old, :old], factor[old:, :old], factor[old:, old:] = earlier.factor, beside.T, corner
    return Earlier(torch.cat([earlier.seen, new], 1), factor)


def answer(space: Space, keys: Tensor, floor: float, earlier: Earlier | None = None) -> Tensor:
    """A (d_in, n) = (floor · C + S + KKᵀ)⁻¹ K of `keys` K (d_in, n), S = Σ k kᵀ of the earlier ones; NaN if singular.

    `floor` 0 gives the change that maps keys exactly (EMMET's equality): possible while they are independent.
    """
    new = space.into(keys)
    all_ = extended(earlier, new, floor)
    number, total = new.shape[1], all_.seen.shape[1]
    picks = torch.eye(total, dtype=new.dtype, device=new.device)[:, total - number :]
    return space.back(all_.seen @ torch.cholesky_solve(picks, all_.factor))


def remembered(
    spaces: Mapping[str, Space], memory: Mapping[str, Earlier] | None, step: Mapping[str, Tensor], floor: float
) -> dict[str, Earlier]:
    """`memory` and then the keys of `step`, (d_in, n) by module; what it was before is left as it is."""
    before = dict(memory or {})
    return before | {m: extended(before.get(m), spaces[m].into(k.double()), floor) for m, k in step.items()}


def _lower(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal()
    if int(info) or not bool(pivots.min() > SINGULAR * pivots.max()):
        return torch.full_like(matrix, float("nan"))
    return factor


def moments(model: Model, modules: Sequence[str], corpus: Corpus, cache: Path | None) -> dict[str, artifacts.Moment]:
    """The second moments of what enters `modules`, from one pass over `corpus` for those that `cache` lacks."""
    return artifacts.second_moments(model, modules, corpus, cache)


def whitened(model: Model, taken: Mapping[str, artifacts.Moment], ridge: float) -> dict[str, Whitened]:
    """By module, on the model's device. Raises ValueError that names the module whose second moment is singular."""
    found = {}
    for module, moment in taken.items():
        try:
            found[module] = Whitened.of(moment.matrix, ridge, model.device)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
    return found
