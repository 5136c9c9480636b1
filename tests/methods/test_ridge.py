"""MALMEN's normal equation against a dense one in float64, and its gradients against automatic ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from methods.parts.ridge import Ridge
from raysys.patch import Dense, LowRank

SIZES = [(3, 8, 5), (40, 8, 5), (8, 8, 8)]  # tokens, d_in, d_out


def made(tokens: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, d_in, generator=generator), torch.randn(tokens, d_out, generator=generator)


def dense(keys: Tensor, values: Tensor, log_ridge: Tensor) -> Tensor:
    """ΔWᵀ (d_in, d_out) from the equation as the paper writes it, by LU in float64."""
    wide = keys.double()
    system = wide.T @ wide + log_ridge.double().exp() * torch.eye(wide.shape[1], dtype=torch.float64)
    return torch.linalg.solve(system, wide.T @ values.double())


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("log_ridge", [-3.0, 0.0, 2.0])
def test_both_systems_give_the_dense_solution(sizes: tuple[int, int, int], narrow: bool, log_ridge: float) -> None:
    keys, values = made(*sizes)
    shift = Ridge(keys, log_ridge, sizes[2], narrow).shift(values)
    wanted = dense(keys, values, torch.tensor(log_ridge)).T
    near = 1e-4 if narrow and sizes[0] > sizes[1] else 1e-6  # many keys that are sums of others cost digits
    assert torch.allclose(shift.matrix().double(), wanted, rtol=1e-5, atol=near)
    patch = shift.patch("w")
    assert isinstance(patch, LowRank if narrow else Dense)
    delta = torch.zeros(patch.shape)
    patch.add_to(delta)
    assert torch.allclose(delta.double(), wanted, rtol=1e-5, atol=near)
    x = torch.randn(2, 3, sizes[1], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shift.added(x).double(), x.double() @ wanted.T, rtol=1e-4, atol=10 * near)
    assert float(shift.square()) == pytest.approx(float(wanted.square().sum()), rel=1e-4)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_one_graph_through_the_dense_equation(sizes: tuple[int, int, int], narrow: bool) -> None:
    keys, values = made(*sizes)
    target = torch.randn(sizes[1], sizes[2], generator=torch.Generator().manual_seed(9)).double()
    free, log_ridge = (
        values.clone().double().requires_grad_(),
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    )
    loss = (dense(keys, free, log_ridge) - target).pow(3).sum()
    by_values, by_ridge = torch.autograd.grad(loss, (free, log_ridge))

    shift = Ridge(keys, 0.5, sizes[2], narrow).shift(values)
    leaf = shift.free.requires_grad_()
    [gradient] = torch.autograd.grad((shift.matrix().T.double() - target).pow(3).sum(), leaf)
    ours, ours_ridge = shift.ridge.back(shift, gradient)
    assert torch.allclose(ours.double(), by_values, rtol=1e-4, atol=1e-4 * float(by_values.abs().max()))
    assert ours_ridge == pytest.approx(float(by_ridge), rel=1e-4)


def test_the_smaller_system_is_chosen_and_what_is_no_number_is_refused() -> None:
    keys, _ = made(3, 8, 8)
    assert Ridge(keys, 0.0, 8).narrow and not Ridge(keys.repeat(2, 1), 0.0, 8).narrow
    with pytest.raises(ValueError, match="not finite"):
        Ridge(keys * math.nan, 0.0, 8)
