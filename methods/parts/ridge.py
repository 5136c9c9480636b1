"""MALMEN's parameter shift: the change of a matrix that moves many tokens' values at once, and its gradients.

Tan, Zhang, Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv:2311.04661: eq. 3 (the
normal equation), eq. 5 and 6 (gradients of the loss by the value differences and by the regulariser).

Wanted differences V (T, d_out) at T tokens with keys K (T, d_in) give ΔW = Vᵀ K (KᵀK + λI)⁻¹, the solution of
min |ΔW Kᵀ - Vᵀ|² + λ|ΔW|². By Woodbury's identity ΔW = Cᵀ K with C = (KKᵀ + λI)⁻¹ V: for few tokens a small system, a
low-rank change, and gradients by C in place of gradients by the whole matrix. With more tokens than pay, the matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysys.patch import Dense, LowRank


@dataclass(frozen=True, eq=False)
class Shift:
    """ΔW of one matrix, held by what its gradient is taken by.

    `free`: C (T, d_out) when `narrow`, so that ΔW = Cᵀ K; else ΔWᵀ itself (d_in, d_out). float32 on the keys' device.
    """

    ridge: Ridge
    free: Tensor

    def added(self, x: Tensor) -> Tensor:
        """What ΔW adds to the output for inputs x (..., d_in): (..., d_out)."""
        return x @ self.ridge.keys.T @ self.free if self.ridge.narrow else x @ self.free

    def matrix(self) -> Tensor:
        """ΔW, (d_out, d_in) float32."""
        return self.free.T @ self.ridge.keys if self.ridge.narrow else self.free.T

    def patch(self, weight: str) -> LowRank | Dense:
        """The change of parameter `weight`."""
        free = self.free.detach().cpu()
        if self.ridge.narrow:
            return LowRank(weight, free.T.contiguous(), self.ridge.keys.detach().cpu().contiguous())
        return Dense(weight, free.T.contiguous())

    def square(self) -> Tensor:
        """|ΔW|² (Frobenius), differentiable by `free`."""
        if self.ridge.narrow:
            return (self.free * (self.ridge.keys @ (self.ridge.keys.T @ self.free))).sum()
        return (self.free**2).sum()


class Ridge:
    """The normal equation of keys K (T, d_in) with λ = exp(`log_ridge`), factorised once in float64.

    `narrow`: the system of tokens (T x T) is solved, and changes are held as factors; by default when these are smaller
    than the matrix. Raises ValueError when K or λ is not finite.
    """

    def __init__(self, keys: Tensor, log_ridge: float, d_out: int, narrow: bool | None = None) -> None:
        tokens, d_in = keys.shape
        self.keys = keys.float()
        self.strength = math.exp(log_ridge)
        self.narrow = tokens * (d_in + d_out) < d_in * d_out if narrow is None else narrow
        wide = keys.double()
        system = wide @ wide.T if self.narrow else wide.T @ wide
        system.diagonal().add_(self.strength)
        factor, info = torch.linalg.cholesky_ex(system)
        if int(info) or not bool(torch.isfinite(factor).all()):
            raise ValueError("the normal equation of the shift can't be solved: keys or ridge are not finite numbers")
        self._factor: Tensor = factor

    def shift(self, differences: Tensor) -> Shift:
        """The shift that gives the tokens `differences` V (T, d_out)."""
        wide = differences.double()
        free = torch.cholesky_solve(wide if self.narrow else self.keys.double().T @ wide, self._factor)
        return Shift(self, free.float())

    def back(self, shift: Shift, gradient: Tensor) -> tuple[Tensor, float]:
        """From the gradient of a loss by `shift.free` to those by V (T, d_out) and by log λ (eq. 5 and 6).

        By C it is K G, with G the one by ΔWᵀ: dV = (KKᵀ + λI)⁻¹ K G = K (KᵀK + λI)⁻¹ G, d log λ = -λ <dV, C>, which is
        -λ <(KᵀK + λI)⁻¹ G, ΔWᵀ>.
        """
        solved = torch.cholesky_solve(gradient.double(), self._factor)
        by_ridge = -self.strength * float((solved * shift.free.detach().double()).sum())
        by_values = solved if self.narrow else self.keys.double() @ solved
        return by_values.float(), by_ridge
