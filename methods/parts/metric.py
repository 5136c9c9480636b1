"""How a matrix takes many keys at once: A = (λC + S + KKᵀ)⁻¹ K, from one factorisation of C for all edits (float64).

With C = L Lᵀ and keys seen through L, K̃ = L⁻¹K, Woodbury's identity leaves a system as large as the number of keys:
A = L⁻ᵀ Ũ (λI + ŨᵀŨ)⁻¹ with Ũ = [S̃, K̃], its last n columns; the keys of earlier edits are kept in S̃ (N of them), their
part of the small system factorised as it grows. An edit costs triangular solves and not an inverse, and nothing of S̃
is copied for it.

A `Space` is the way keys are seen: `Whitened` by C, here, or cut to its null space (methods/parts/projectors.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from methods.parts import artifacts, spread
from methods.rome import cholesky
from raysys.model import Model

SINGULAR = 1e-7  # smallest pivot of a small system against its largest: below it keys depend on each other
LEAST = 16  # earlier keys that there is room for at least


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
    def of(
        cls, matrix: Tensor, ridge: float, device: torch.device | None = None, remedy: str = spread.REMEDY
    ) -> Whitened:
        """From C + ridge · mean(diag C) · I. Raises ValueError when that is singular, with `remedy` as what to do."""
        return cls(cholesky(matrix.to(device) if device else matrix, ridge, remedy))

    def into(self, keys: Tensor) -> Tensor:
        seen: Tensor = torch.linalg.solve_triangular(self.factor, keys.to(self.factor), upper=False)
        return seen

    def back(self, seen: Tensor) -> Tensor:
        keys: Tensor = torch.linalg.solve_triangular(self.factor.T, seen, upper=True)
        return keys


class _Room:
    """Where earlier keys and their factor are kept, with room for more of them; `used` of it is taken.

    `keys` (room, m), `factor` (room, room). What is written once stays as it is: more is written beside it.
    """

    def __init__(self, like: Tensor, size: int, width: int) -> None:
        self.keys = like.new_zeros(size, width)
        self.factor = like.new_zeros(size, size)
        self.used = 0


@dataclass(frozen=True, eq=False)
class Earlier:
    """The keys of earlier edits: the first `number` in `room`, which later values share, and leave alone."""

    room: _Room
    number: int

    @property
    def seen(self) -> Tensor:
        """The keys as a space sees them, (m, N)."""
        return self.room.keys[: self.number].T

    @property
    def factor(self) -> Tensor:
        """The lower factor of floor · I + seenᵀ seen, (N, N)."""
        return self.room.factor[: self.number, : self.number]

    def and_then(self, new: Tensor, beside: Tensor, corner: Tensor) -> Earlier:
        """With the keys `new` (m, n) and the rows [`besideᵀ`, `corner`] (n, N + n) of the factor."""
        start, stop = self.number, self.number + new.shape[1]
        room = self.room
        if room.used != start or stop > len(room.keys):  # full, or another value goes on from here already
            room = _Room(new, _size(stop), new.shape[0])
            room.keys[:start], room.factor[:start, :start] = self.seen.T, self.factor
        room.keys[start:stop] = new.T
        room.factor[start:stop, :start], room.factor[start:stop, start:stop] = beside.T, corner
        room.used = stop
        return Earlier(room, stop)

    @classmethod
    def none(cls, like: Tensor) -> Earlier:
        """No keys yet, of the type and width of `like` (m, n)."""
        return cls(_Room(like, 0, like.shape[0]), 0)


def _size(number: int) -> int:
    """Room for `number` keys: depends on nothing else, so that the same keys always lie, and count, the same way."""
    return max(LEAST, 1 << (number - 1).bit_length())


def _joined(earlier: Earlier | None, new: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """What `new` keys (m, n) add to the factor of the `earlier` ones: [besideᵀ, corner], (N, n) and (n, n).

    The corner is NaN where keys depend on each other or on earlier ones.
    """
    own = new.T @ new
    own.diagonal().add_(floor)
    if earlier is None or not earlier.number:
        return new.new_zeros(0, new.shape[1]), _lower(own)
    factor = earlier.factor
    beside = torch.linalg.solve_triangular(factor, earlier.seen.T @ new, upper=False)
    return beside, _lower(own - beside.T @ beside, float(factor.diagonal().max()))


def answer(space: Space, keys: Tensor, floor: float, earlier: Earlier | None = None) -> Tensor:
    """A (d_in, n) = (floor · C + S + KKᵀ)⁻¹ K of `keys` K (d_in, n), S = Σ k kᵀ of the earlier ones; NaN if singular.

    `floor` 0 gives the change that maps keys exactly (EMMET's equality): possible while they are independent.
    """
    new = space.into(keys)
    beside, corner = _joined(earlier, new, floor)
    part = torch.cholesky_solve(torch.eye(len(corner), dtype=new.dtype, device=new.device), corner)
    found = new @ part
    if earlier is not None and earlier.number:
        before = torch.linalg.solve_triangular(earlier.factor.T, beside @ part, upper=True)  # (N, n)
        found -= earlier.seen @ before
    return space.back(found)


def remembered(
    spaces: Mapping[str, Space], memory: Mapping[str, Earlier] | None, step: Mapping[str, Tensor], floor: float
) -> dict[str, Earlier]:
    """`memory` and then the keys of `step`, (d_in, n) by module; what it was before is left as it is.

    Raises ValueError when these keys can't be told from earlier ones: no later edit could be solved for.
    """
    found = dict(memory or {})
    for module, keys in step.items():
        new = spaces[module].into(keys.double())
        earlier = found.get(module) or Earlier.none(new)
        beside, corner = _joined(earlier, new, floor)
        if not (bool(corner.isfinite().all()) and bool(beside.isfinite().all())):
            raise ValueError(
                f"{module}: the keys of this edit can't be remembered: they are not finite, or beside those of "
                f"{earlier.number} earlier ones what else counts ({floor:.3g}) is too small for 64 bits; raise the "
                "method's `weight` (AlphaEdit, SPHERE: `l2`)"
            )
        found[module] = earlier.and_then(new, beside, corner)
    return found


def _lower(matrix: Tensor, largest: float = 0.0) -> Tensor:
    """Lower factor, NaN where `matrix` is singular: its pivots beside the `largest` one of what it belongs to."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal()
    if int(info) or not bool(pivots.min() > SINGULAR * max(float(pivots.max()), largest)):
        return torch.full_like(matrix, float("nan"))
    return factor


def whitened(
    model: Model, taken: Mapping[str, artifacts.Moment], ridge: float, remedy: str = spread.REMEDY
) -> dict[str, Whitened]:
    """By module, on the model's device. Raises ValueError that names the module whose second moment is singular."""
    found = {}
    for module, moment in taken.items():
        try:
            found[module] = Whitened.of(moment.matrix, ridge, model.device, remedy)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
    return found
