"""Networks that turn an edit's gradient into a better change: what MEND, MALMEN and RLEdit share.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, arXiv:2110.11309, section 3.1 and eq. 4 (the transform, its
sharing between matrices of one shape, the learned step sizes); Tan et al., "Massive Editing for Large Language Models
via Meta Learning", ICLR 2024, arXiv:2311.04661 (the same network). Welford, "Note on a Method for Calculating Corrected
Sums of Squares and Products", Technometrics 1962; Chan et al., 1979 (merging).

D = d_in + d_out of a matrix, n = tokens, r = rank, P = matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.parts.gradients import Trace
from raysys.model import Model

EPSILON = 1e-7  # added to every standard deviation


@dataclass(frozen=True, eq=False)
class Stats:
    """Mean and spread of rows seen so far, float64: n () their number, mean (D,), m2 (D,) Σ (row - mean)².

    How the rows were grouped when they came in makes no difference beyond rounding.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, size: int) -> Stats:
        """Of no rows at all."""
        wide = torch.zeros(size, dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.float64), wide, wide.clone())

    @classmethod
    def of(cls, rows: Tensor) -> Stats:
        """Of `rows` (n, D)."""
        wide = rows.double()
        if not len(wide):
            return cls.none(wide.shape[1])
        mean = wide.mean(0)
        return cls(torch.tensor(float(len(wide)), dtype=torch.float64), mean, (wide - mean).square().sum(0))

    def and_then(self, more: Stats) -> Stats:
        """Of these rows and those of `more`."""
        n = self.n + more.n
        if not n:
            return self
        step = more.mean.to(self.mean) - self.mean
        mean = self.mean + step * (more.n / n)
        return Stats(n, mean, self.m2 + more.m2.to(self.m2) + step.square() * (self.n * more.n / n))

    @property
    def std(self) -> Tensor:
        """Sample standard deviation (D,); that of fewer than two rows counts as 0."""
        return (self.m2 / (self.n - 1).clamp(min=1)).sqrt()

    def normalised(self, rows: Tensor) -> Tensor:
        """(rows - mean) / (std + 1e-7), (n, D) float32; rows as they are before two were seen."""
        if self.n < 2:
            return rows.float()
        mean, std = (t.to(rows.device, torch.float32) for t in (self.mean, self.std))
        return (rows.float() - mean) / (std + EPSILON)


class Transform(nn.Module):
    """Normalise [x, δ], then `blocks` times a ← a + max(0, scale_p ⊙ (U V a + b) + shift_p), for P matrices alike.

    U starts at zero, so that the transform starts as the identity on normalised rows.
    """

    n: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, size: int, rank: int, blocks: int, members: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, size)
        for name, value in (("n", torch.zeros(())), ("mean", torch.zeros(size)), ("m2", torch.zeros(size))):
            self.register_buffer(name, value.double())
        self.u = nn.ParameterList(torch.zeros(size, rank) for _ in range(blocks))
        self.v = nn.ParameterList(torch.randn(rank, size, generator=generator) for _ in range(blocks))
        self.b = nn.ParameterList(torch.zeros(size) for _ in range(blocks))
        self.scale = nn.ParameterList(torch.ones(members, size) for _ in range(blocks))
        self.shift = nn.ParameterList(torch.zeros(members, size) for _ in range(blocks))

    @property
    def stats(self) -> Stats:
        """What the rows seen in training were like."""
        return Stats(self.n, self.mean, self.m2)

    def observe(self, rows: Tensor) -> None:
        """Add rows (n, D) to the statistics."""
        now = self.stats.and_then(Stats.of(rows.detach()))
        self.n, self.mean, self.m2 = now.n.to(self.n), now.mean.to(self.mean), now.m2.to(self.m2)

    def forward(self, rows: Tensor, member: int) -> Tensor:
        """Rows (n, D) of matrix number `member` -> (n, D) float32."""
        a = self.stats.normalised(rows)
        for u, v, b, scale, shift in zip(self.u, self.v, self.b, self.scale, self.shift, strict=True):
            inner = scale[member] * (a @ v.T @ u.T + b) + shift[member]
            a = a + inner.clamp(min=0)  # at 0, where training starts, its gradient is 1; that of relu is 0
        return a


class HyperNet(nn.Module):
    """One `Transform` for all of a model's edited modules of one shape, and a learned step size for each module.

    `lrs` is (modules,), in the order of `names`. `lamdas` (modules,) is there for methods that solve a regularised
    least-squares problem per module: log λ.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],  # module -> (d_in, d_out)
        *,
        rank: int,
        blocks: int = 2,
        lr: float = 1e-4,
        seed: int = 0,
        lamda: float | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(shapes)
        self.shapes = dict(shapes)
        generator = torch.Generator().manual_seed(seed)
        alike: dict[tuple[int, int], list[str]] = {}
        for name, shape in shapes.items():
            alike.setdefault(shape, []).append(name)
        self.transforms = nn.ModuleDict(
            {_key(s): Transform(sum(s), rank, blocks, len(members), generator) for s, members in alike.items()}
        )
        self._member = {name: members.index(name) for members in alike.values() for name in members}
        self.lrs = nn.Parameter(torch.full((len(shapes),), lr))
        self.lamdas = None if lamda is None else nn.Parameter(torch.full((len(shapes),), lamda))

    def _of(self, name: str) -> Transform:
        found = self.transforms[_key(self.shapes[name])]
        assert isinstance(found, Transform)
        return found

    def observe(self, name: str, trace: Trace) -> None:
        """Add module `name`'s tokens to the running statistics; in training only."""
        self._of(name).observe(torch.cat((trace.x, trace.delta), 1))

    def transformed(self, name: str, trace: Trace) -> tuple[Tensor, Tensor]:
        """x̃ (n, d_in) and δ̃ (n, d_out) of module `name`."""
        rows: Tensor = self._of(name)(torch.cat((trace.x, trace.delta), 1), self._member[name])
        x, delta = torch.split(rows, list(self.shapes[name]), 1)
        return x, delta

    def lr(self, name: str) -> Tensor:
        """The learned step size of module `name`, ()."""
        return self.lrs[self.names.index(name)]

    def step_sizes(self) -> list[nn.Parameter]:
        """Parameters that are learned at a rate of their own: step sizes and log λ."""
        return [self.lrs, *([] if self.lamdas is None else [self.lamdas])]

    def others(self) -> list[nn.Parameter]:
        """All other parameters: those of the transforms."""
        return list(self.transforms.parameters())


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def shapes(model: Model, modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of each module's weight. Raises ValueError for one that isn't there."""
    found = {}
    for name in modules:
        d_out, d_in = model.matrix(f"{name}.weight").shape
        found[name] = (d_in, d_out)
    return found
