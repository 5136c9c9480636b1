"""The null space of what a matrix has read so far, as an artifact: the directions that keys of the corpus hardly use.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", ICLR 2025, arXiv:2410.02355,
section 3.1 and eq. 6: of the second moment C = U Λ Uᵀ, P = U₀ U₀ᵀ with the columns whose eigenvalue is below a
threshold. Kept is the smaller of U₀ and its complement, (d_in, at most d_in / 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from methods.parts import artifacts
from raysys.model import Model


@dataclass(frozen=True, eq=False)
class NullSpace:
    """A `metric.Space`: keys without their part outside the null space.

    `basis` (d_in, m) float64, orthonormal: the null space itself if `inside`, else what is outside it.
    """

    basis: Tensor
    inside: bool
    digest: str = ""

    def into(self, keys: Tensor) -> Tensor:
        """P K, (d_in, n) float64."""
        keys = keys.to(self.basis)
        part = self.basis @ (self.basis.T @ keys)
        return part if self.inside else keys - part

    def back(self, seen: Tensor) -> Tensor:
        """The same: what is seen lies in the null space already."""
        return seen

    @property
    def share(self) -> float:
        """The share of directions that may be changed, in (0, 1)."""
        outside, all_ = self.basis.shape[1], self.basis.shape[0]
        return outside / all_ if self.inside else 1 - outside / all_

    def matrix(self) -> Tensor:
        """P, (d_in, d_in) float64."""
        whole = self.basis @ self.basis.T
        return whole if self.inside else torch.eye(len(whole), dtype=whole.dtype, device=whole.device) - whole


def cut(matrix: Tensor, threshold: float, relative: bool, module: str) -> tuple[Tensor, bool]:
    """Basis (d_in, m) float64 of C's null space or its complement, and whether it is the former.

    A direction is kept when its eigenvalue is below `threshold`, counted in mean eigenvalues of C if `relative`.
    Raises ValueError when that keeps no direction, or all of them.
    """
    values, vectors = torch.linalg.eigh(matrix.double())  # ascending
    limit = threshold * float(values.mean()) if relative else threshold
    kept = int((values < limit).sum())
    if kept in (0, len(values)):
        what, way_out = ("no direction", "raise") if kept == 0 else ("every direction: nothing is protected", "lower")
        low, middle, high = (float(values[i]) for i in (0, len(values) // 2, -1))
        raise ValueError(
            f"{module}: the null space below {limit:.3g} has {what} of {len(values)}; eigenvalues of the second moment "
            f"go from {low:.3g} by {middle:.3g} to {high:.3g}: {way_out} `threshold`"
            f"{'' if relative else ', or count it in mean eigenvalues (`relative`)'}"
        )
    inside = kept <= len(values) // 2
    basis = vectors[:, :kept] if inside else vectors[:, kept:]
    return basis.contiguous(), inside


def null_space(
    model: Model,
    module: str,
    moment: artifacts.Moment,
    threshold: float,
    relative: bool = False,
    cache: Path | None = None,
) -> NullSpace:
    """The null space of `moment`, made once and kept under what it was made from. Raises ValueError (see `cut`)."""
    recipe = {"module": module, "moment": moment.digest, "threshold": threshold, "relative": relative}

    def make() -> dict[str, Tensor]:
        basis, inside = cut(moment.matrix, threshold, relative, module)
        return {"basis": basis, "inside": torch.tensor(inside)}

    tensors, digest = artifacts.kept(model, "null_space", recipe, make, cache)
    return NullSpace(tensors["basis"].to(model.device), bool(tensors["inside"]), digest)
