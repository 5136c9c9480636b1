"""Changes to weights, and how they are put on: one fixed float32 procedure that gives the same bits everywhere.

A worn weight is `(base.float() + delta).to(dtype)`, and `delta` is the sum of all changes in the order they were
made, rank-one term by rank-one term, each a product and an addition rounded once (IEEE 754). Nothing in it depends on
the number of threads, the kernel or the device, so an editor, an evaluator and a laptop that rebuilds the snapshot
from disk agree bit for bit. Sums stay in float32: a thousand rank-one changes added one by one in bfloat16 would lose
9 % of their total.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from raysys.model import Model, Place
from raysys.types import Joins, Patch

C = TypeVar("C", bound=type)


@dataclass(frozen=True, eq=False)
class LowRank:
    """`weight` += left @ right, in (d_out, d_in) coordinates whatever the layout of the parameter.

    left: (d_out, r) float32; right: (r, d_in) float32; columns in the order in which they were made.
    """

    weight: str
    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "low_rank"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.left, self.right)
        if self.left.shape[1] != self.right.shape[0]:
            shapes = tuple(self.left.shape), tuple(self.right.shape)
            raise ValueError(f"patch of {self.weight}: factors of shapes {shapes[0]} and {shapes[1]} don't multiply")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Number of rank-one terms."""
        return self.right.shape[0]

    def add_to(self, delta: Tensor, start: int = 0) -> None:
        """Add the terms from number `start` on to `delta`, (d_out, d_in) float32, in place and in order."""
        left, right = self.left.to(delta.device), self.right.to(delta.device)
        for term in range(start, self.rank):
            delta += torch.outer(left[:, term], right[term])

    def part(self, place: Place | None) -> LowRank:
        """What it changes of a part of the weight; None: of the whole."""
        if place is None:
            return self
        dim, start, stop = place
        if dim:
            return LowRank(self.weight, self.left, self.right[:, start:stop])
        return LowRank(self.weight, self.left[start:stop], self.right)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def fields(self) -> dict[str, Any]:
        return {"weight": self.weight}

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear this patch alone; on exit the model is as before, bit for bit."""
        with wearing(model, (self,)):
            yield


@dataclass(frozen=True, eq=False)
class Dense:
    """`weight` += delta, (d_out, d_in) float32."""

    weight: str
    delta: Tensor
    kind: ClassVar[str] = "dense"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.weight, self.delta)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight."""
        return self.delta.shape[0], self.delta.shape[1]

    def add_to(self, delta: Tensor) -> None:
        """Add to `delta`, (d_out, d_in) float32, in place."""
        delta += self.delta.to(delta.device)

    def part(self, place: Place | None) -> Dense:
        """What it changes of a part of the weight; None: of the whole."""
        if place is None:
            return self
        dim, start, stop = place
        return Dense(self.weight, self.delta.narrow(dim, start, stop - start))

    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.delta}

    def fields(self) -> dict[str, Any]:
        return {"weight": self.weight}

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear this patch alone; on exit the model is as before, bit for bit."""
        with wearing(model, (self,)):
            yield


WeightPatch = LowRank | Dense
KINDS: dict[str, Any] = {  # a class, or where to find it
    "low_rank": LowRank,
    "dense": Dense,
    "codebook": "methods.grace:Codebook",
    "side_memory": "methods.wise:SideMemory",
    "melo": "methods.melo:Blocks",
    "scope": "methods.serac:Scope",
    "demonstrations": "methods.ike:Demonstrations",
    "adapter": "methods.lora:Adapter",
}


def register(cls: C) -> C:
    """Class decorator: lets patches of your own kind be read back from disk, once their module is imported."""
    KINDS.setdefault(cls.kind, cls)  # type: ignore[attr-defined]
    return cls


def _kind(kind: str) -> Any:
    found = KINDS.get(kind)
    if found is None:
        raise ValueError(f"patch of unknown kind {kind!r}; there are {', '.join(KINDS)}")
    if not isinstance(found, str):
        return found
    module, _, name = found.partition(":")
    return getattr(import_module(module), name)


def rebuild(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Patch:
    """A patch from what `tensors()` and `fields()` gave. Raises ValueError for a kind or fields that don't exist."""
    cls = _kind(kind)
    try:
        built: Patch = cls(**fields, **tensors)
    except TypeError as error:
        raise ValueError(f"patch of kind {kind!r}: {error}") from error
    return built


def merge(so_far: Sequence[Patch], more: Iterable[Patch]) -> tuple[Patch, ...]:
    """`so_far` and then `more` as one change against the base: at most one patch per weight, in order of first change.

    Low-rank factors are joined until the dense matrix would be smaller, then summed once, in the same order: the worn
    bits stay the same. A patch that writes no weight is kept beside the others: one of each kind, joined by its own
    `after`, or else the newest.
    """
    weights: dict[str, WeightPatch] = {p.weight: p for p in so_far if isinstance(p, LowRank | Dense)}
    others: dict[str, Patch] = {p.kind: p for p in so_far if not isinstance(p, LowRank | Dense)}
    for patch in more:
        if isinstance(patch, LowRank | Dense):
            earlier = weights.get(patch.weight)
            weights[patch.weight] = patch if earlier is None else _joined(earlier, patch)
        else:
            before = others.get(patch.kind)
            others[patch.kind] = patch.after(before) if before is not None and isinstance(patch, Joins) else patch
    return (*weights.values(), *others.values())


def _joined(first: WeightPatch, second: WeightPatch) -> WeightPatch:
    if first.shape != second.shape:
        raise ValueError(f"patches of {first.weight} have shapes {first.shape} and {second.shape}")
    d_out, d_in = first.shape
    if isinstance(first, LowRank) and isinstance(second, LowRank) and _pays(first.rank + second.rank, d_out, d_in):
        left = torch.cat((first.left, second.left), dim=1)
        return LowRank(first.weight, left, torch.cat((first.right, second.right)))
    delta = torch.zeros(d_out, d_in)
    for patch in (first, second):
        patch.add_to(delta)
    return Dense(first.weight, delta)


def _pays(rank: int, d_out: int, d_in: int) -> bool:
    """Whether factors of this rank are smaller than the matrix."""
    return rank * (d_out + d_in) < d_out * d_in


class Wearer:
    """Puts cumulative patches on a model and takes them off, touching only the edited weights.

    It keeps a pristine copy of each touched weight (the model's dtype) and the float32 sum now worn. When the next
    set of patches continues the present one (the same terms and then more), only the new terms are added: the same
    bits as from the start, at the cost of the difference.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._base: dict[str, Tensor] = {}  # name -> (d_out, d_in) or the part of it that is held here, pristine
        self._worn: dict[str, tuple[WeightPatch, Tensor]] = {}  # name -> (whole patch, its float32 sum in that part)
        self._others: list[Any] = []  # open contexts of patches that change no weight

    @torch.no_grad()
    def wear(self, patches: Sequence[Patch]) -> None:
        """Wear `patches` and nothing else; if that fails, nothing is worn.

        Raises ValueError when they don't fit the model.
        """
        try:
            self._wear(patches)
        except BaseException:
            self._reset()  # the sums kept may be half-way: none of them is used again
            raise

    def _wear(self, patches: Sequence[Patch]) -> None:
        weights = {p.weight: p for p in patches if isinstance(p, LowRank | Dense)}
        self._fit(weights)
        self._close_others()
        for name in [n for n in self._worn if n not in weights]:
            self.model.local(name).copy_(self._base[name])
            del self._worn[name]
        for name, patch in weights.items():
            self._put_on(name, patch)
        for other in patches:
            if not isinstance(other, LowRank | Dense):
                context = other.applied(self.model)
                context.__enter__()
                self._others.append(context)

    def take_off(self) -> None:
        """Back to the base model, bit for bit."""
        self._reset()

    @torch.no_grad()
    def _reset(self) -> None:
        self._close_others()
        for name, base in self._base.items():
            self.model.local(name).copy_(base)
        self._worn.clear()

    def _put_on(self, name: str, patch: WeightPatch) -> None:
        matrix, here = self.model.local(name), patch.part(self.model.place(name))
        base = self._base.setdefault(name, matrix.detach().clone()) if name not in self._worn else self._base[name]
        before = self._worn.get(name)
        if before is not None and isinstance(here, LowRank) and _continues(before[0], patch):
            delta, start = before[1], before[0].rank  # type: ignore[union-attr]
            here.add_to(delta, start)
        else:
            delta = torch.zeros(here.shape, dtype=torch.float32, device=matrix.device)
            here.add_to(delta)
        self._worn[name] = (patch, delta)
        matrix.copy_((base.float() + delta).to(matrix.dtype))

    def _fit(self, weights: Mapping[str, WeightPatch]) -> None:
        for name, patch in weights.items():
            shape = self.model.shape(name)
            if shape != patch.shape:
                raise ValueError(f"patch of {name} is {patch.shape}, the weight {shape}: made for another model?")

    def _close_others(self) -> None:
        while self._others:
            self._others.pop().__exit__(None, None, None)


def _continues(before: WeightPatch, now: WeightPatch) -> bool:
    if not isinstance(before, LowRank) or not isinstance(now, LowRank) or before.rank > now.rank:
        return False
    same_left = torch.equal(now.left[:, : before.rank], before.left)
    return same_left and torch.equal(now.right[: before.rank], before.right)


@contextmanager
def wearing(model: Model, patches: Sequence[Patch]) -> Iterator[None]:
    """Wear `patches` for the length of a with-block; afterwards the model is as before, bit for bit."""
    wearer = Wearer(model)
    wearer.wear(patches)
    try:
        yield
    finally:
        wearer.take_off()


def _check(weight: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.ndim != 2:
            raise ValueError(f"patch of {weight}: wants float32 matrices, got {tensor.dtype} {tuple(tensor.shape)}")
