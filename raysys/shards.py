"""A model whose matrices are split over the ranks of a process group, behind the interface of `Model`.

Every rank runs the same code on the same inputs (SPMD): what passes between modules is the same on all of them, bit
for bit, so that control flow, and what methods and scoring find, agree too. Only inside attention and MLP does each
rank hold its share: a *column* module (q, k, v, gate, up) owns rows of its (d_out, d_in) matrix and gives its share of
the output, a *row* module (o, down) owns columns, takes a share of the input, and all ranks add what they have
(Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3). A module that somebody watches shows whole inputs
and outputs with right gradients; one that nobody watches communicates no more than it must.

Changes to weights are told in full coordinates everywhere. A rank wears its slice of them, by the same products and
sums, so a split model wears the same bits as a whole one. Cutting the matrices is the matter of actors/group.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysys import names
from raysys.arch import arch
from raysys.loading import load_tokenizer
from raysys.model import Model, Place


class OutOfStep(RuntimeError):
    """Ranks found different things for the same question: the group can't be trusted any more."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The process group that a model is split over, as one of its ranks sees it."""

    rank: int
    size: int
    group: Any = None  # of torch.distributed; None: all processes

    def total(self, part: Tensor) -> Tensor:
        """The sum of every rank's `part`, the same bits on all of them."""
        whole = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=self.group)
        return whole

    def joined(self, part: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Every rank's `part`, of extent sizes[rank] along `dim`, one behind the other."""
        part = part.movedim(dim, 0)
        room = part.new_zeros(max(sizes), *part.shape[1:])  # gloo gathers equal shapes alone
        room[: len(part)] = part
        parts = [torch.empty_like(room) for _ in sizes]
        dist.all_gather(parts, room, group=self.group)
        return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def share(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's part of the last dimension."""
        return whole.narrow(-1, sum(sizes[: self.rank]), sizes[self.rank]).contiguous()

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of the ranks' numbers."""
        told = torch.tensor(number, device=device)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self.group)
        return int(told)

    def check(self, found: bytes, device: torch.device) -> None:
        """Raises OutOfStep unless all ranks have found the same bytes."""
        number = int.from_bytes(hashlib.sha256(found).digest()[:7], "big")
        low, high = self.least(number, device), -self.least(-number, device)
        if low != high:
            raise OutOfStep(f"rank {self.rank} of {self.size} has found something else than another rank")


# --- what goes through a split module, with gradients ----------------------------------------------------------------


class _Copied(torch.autograd.Function):
    """The same on all ranks -> each rank's own use of it; the gradients of all uses add up."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return given.view_as(given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(grad), None


class _Summed(torch.autograd.Function):
    """Each rank's part of a sum -> the sum, the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Joined(torch.autograd.Function):
    """Each rank's share of the last dimension -> the whole, the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        return ranks.joined(part, sizes, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.share(grad, ctx.sizes), None, None


class _Shared(torch.autograd.Function):
    """The whole, the same on all ranks -> this rank's share of the last dimension."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        return ranks.share(whole, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.joined(grad, ctx.sizes, -1), None, None


class _Split(nn.Module):
    """A linear layer of which this rank holds a part: `weight` and `bias` as it stores them, `sizes` all ranks' shares.

    d_out and d_in are the whole layer's.
    """

    dim: int  # of the (d_out, d_in) matrix that is split
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, sizes: Sequence[int], ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.sizes, self.ranks = weight, tuple(sizes), ranks
        self.register_parameter("bias", bias)
        assert weight.shape[self.dim] == self.sizes[ranks.rank], (weight.shape, sizes)

    @property
    def watched(self) -> bool:
        """Whether anybody sees what enters or leaves it."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def place(self, name: str) -> Place | None:
        """Where this rank's part of "weight" or "bias" lies in the whole; None: it has the whole."""
        if name == "bias" and self.dim == 1:
            return None
        start = sum(self.sizes[: self.ranks.rank])
        return self.dim, start, start + self.sizes[self.ranks.rank]


class Columns(_Split):
    """(..., d_in), the same on all ranks -> this rank's share of (..., d_out)."""

    dim = 0

    def __call__(self, given: Tensor) -> Tensor:
        if not self.watched:
            return self._own(given)
        whole: Tensor = super().__call__(given)
        return _Shared.apply(whole, self.ranks, self.sizes)  # type: ignore[no-any-return, no-untyped-call]

    def forward(self, given: Tensor) -> Tensor:
        """The whole output."""
        return _Joined.apply(self._own(given), self.ranks, self.sizes)  # type: ignore[no-any-return, no-untyped-call]

    def _own(self, given: Tensor) -> Tensor:
        copied: Tensor = _Copied.apply(given, self.ranks)  # type: ignore[no-untyped-call]
        return nn.functional.linear(copied, self.weight, self.bias)


class Rows(_Split):
    """This rank's share of (..., d_in) -> (..., d_out), the same on all ranks."""

    dim = 1

    def __call__(self, given: Tensor) -> Tensor:
        if not self.watched:
            return self._summed(given)
        whole = _Joined.apply(given, self.ranks, self.sizes)  # type: ignore[no-untyped-call]
        return super().__call__(whole)  # type: ignore[no-any-return]

    def forward(self, given: Tensor) -> Tensor:
        """The output of a whole input."""
        return self._summed(_Shared.apply(given, self.ranks, self.sizes))  # type: ignore[no-untyped-call]

    def _summed(self, given: Tensor) -> Tensor:
        part = nn.functional.linear(given, self.weight)
        out: Tensor = _Summed.apply(part, self.ranks)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


# --- the model -------------------------------------------------------------------------------------------------------


class Sharded(Model):
    """One rank's part of a model that is split over `ranks`; all of them must call the same methods in the same order.

    It is made from the whole model, whose digest it keeps, after `net` has got its `Columns` and `Rows`.
    """

    def __init__(self, whole: Model, net: nn.Module, ranks: Ranks) -> None:
        vars(self).update({k: v for k, v in vars(whole).items() if k != "_blocks"})
        self.net = net.eval().requires_grad_(False)
        self.split = ranks
        self.ranks, self.leads = ranks.size, ranks.rank == 0

    def place(self, name: str) -> Place | None:
        module, _, leaf = name.rpartition(".")
        owner = self.module(module)
        return owner.place(leaf) if isinstance(owner, _Split) else None

    def local(self, name: str) -> Tensor:
        return super().matrix(name)

    def shape(self, name: str) -> tuple[int, int]:
        rows, columns = super().matrix(name).shape
        owner = self.module(name.rpartition(".")[0])
        if isinstance(owner, _Split) and (place := self.place(name)):
            return (sum(owner.sizes), columns) if place[0] == 0 else (rows, sum(owner.sizes))
        return rows, columns

    def matrix(self, name: str) -> Tensor:
        """Parameter `name` as a whole (d_out, d_in) matrix: a copy, bit for bit. To change it, `write`."""
        mine = super().matrix(name)
        owner = self.module(name.rpartition(".")[0])
        place = self.place(name)
        if place is None:
            return mine.clone()
        assert isinstance(owner, _Split)
        return self.split.joined(mine, owner.sizes, place[0])

    def write(self, name: str, matrix: Tensor) -> None:
        place = self.place(name)
        super().matrix(name).copy_(matrix if place is None else matrix.narrow(place[0], place[1], place[2] - place[1]))

    def agreed(self, number: int) -> int:
        return self.split.least(int(number), self.device)

    def check(self, found: Any) -> None:
        self.split.check(repr(found).encode(), self.device)


def splittable(name: str, ranks: int, methods: Sequence[Any]) -> None:
    """Raises ValueError with every reason why model `name`, edited by `methods` of a study, can't be so split."""
    if ranks == 1:
        return
    config, _ = load_tokenizer(name)
    if faults := why_not(config, ranks, {m.title: names.method(m.name) for m in methods}):
        way_out = "set cluster.tensor_parallel = 1, or leave that out"
        raise ValueError(f"model {name!r} over {ranks} processes: {'; '.join(faults)}; {way_out}")


def why_not(config: Any, ranks: int, methods: Mapping[str, type]) -> list[str]:
    """Why a model of `config`, edited by `methods` (by title), can't be split over `ranks`; empty when it can."""
    faults = []
    family = arch(config)
    if not family.splits:
        faults.append(
            f"a {config.model_type} model can't be split: it keeps query, key and value in one matrix, one behind the "
            "other, which DeepSpeed's tensor parallelism refuses"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads < ranks:
        faults.append(f"the model has {heads} key-value heads, fewer than {ranks} ranks; each rank needs one")
    for title, method in methods.items():
        if not getattr(method, "splits", False):
            faults.append(f"method {title} does not work on a model that is split over several processes")
    return faults
