"""Trunk reuse: what enters the first edited layer is computed once and serves every later snapshot.

Nothing below the first edited block changes between the snapshots of a base model, so the hidden states that enter
it, (B, T, d), and the way in which the blocks from there on are called are kept for a batch; a later snapshot runs the
upper blocks alone. They are run by the same calls on the same shapes as in a whole pass, so the answers are the same
bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from raysys.kv import KeysValues
from raysys.model import Model, Trunk
from raysys.patch import Dense, LowRank

V = TypeVar("V")

GIB = 2**30
IDLE = 3  # snapshots after which a trunk that nobody asked for makes room


def first_edited(model: Model, patches: Sequence[Any]) -> int:
    """The lowest block that `patches` change; the number of blocks when none is, 0 when it can't be told.

    A patch that writes no weight may act anywhere and on any prompt: 0.
    """
    depth = model.layers
    for patch in patches:
        if not isinstance(patch, LowRank | Dense):
            return 0
        depth = min(depth, _block_of(model, patch.weight))
    return depth


def _block_of(model: Model, weight: str) -> int:
    before, _, behind = model.arch.block.partition("{}")
    if weight.startswith(before):
        number, _, _ = weight.removeprefix(before).partition(behind or ".")
        if number.isdigit():
            return int(number)
    head = model.net.get_output_embeddings().weight
    tied = head is model.net.get_input_embeddings().weight
    after = any(weight.startswith(f"{name}.") for name in model.arch.after)
    return model.layers if after or (model.parameter(weight) is head and not tied) else 0


@contextmanager
def recording(model: Model, layer: int) -> Iterator[list[Trunk]]:
    """Within it, one whole pass of `model` is recorded from block `layer` on; afterwards the list holds its trunk."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    made: list[Trunk] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hooks = [model.layer(i).register_forward_pre_hook(keep, with_kwargs=True) for i in range(layer, model.layers)]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
    calls = tuple((args[1:], kwargs) for args, kwargs in seen)
    made.append(around(Trunk(layer, seen[0][0][0], calls), Cache(layers=[])))  # the keys of this pass are not kept


def around(trunk: Trunk, cache: Cache | None) -> Trunk:
    """`trunk` with every call given `cache` in place of the one it was recorded with."""
    swap = partial(_swap, cache=cache)
    calls = tuple((tuple(map(swap, args)), {k: swap(v) for k, v in kwargs.items()}) for args, kwargs in trunk.calls)
    return replace(trunk, calls=calls)


def _swap(value: Any, cache: Cache | None) -> Any:
    return cache if isinstance(value, Cache) else value


@dataclass
class _Kept:
    ids: Tensor  # (B, T), what was read
    trunk: Trunk
    lower: KeysValues  # of the blocks below the trunk, where they are needed
    bytes: int
    far: bool  # in host memory, with the model elsewhere
    used: int = 0


@dataclass
class Trunks:
    """Trunks by name, within `near` bytes on the model's device and `far` bytes of host memory beyond that.

    What is there stays until it has not been asked for during three snapshots: the blocks of a study come round with
    every snapshot, where dropping the longest unused would drop each just before it is needed. On a device of its own,
    a trunk goes to host memory only where fetching it back is quicker than running the lower blocks again: both
    are measured.
    """

    device: torch.device
    near: float = 2 * GIB
    far: float = 0
    agreed: Callable[[int], int] = int  # the least of what the ranks of a split model bring
    hits: int = 0
    _kept: dict[Hashable, _Kept] = field(default_factory=dict)
    _round: int = 0
    _rate: float | None = None  # bytes a second from host memory to the device

    def begin(self) -> None:
        """Another snapshot is worn."""
        self._round += 1

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()

    def get(self, name: Hashable, ids: Tensor, depth: int) -> tuple[Trunk, KeysValues] | None:
        """The trunk of `ids` (B, T) and what `put` was given with it, if one is kept that ends at or below `depth`."""
        kept = self._kept.get(name)
        if kept is None or kept.trunk.layer > depth or not torch.equal(kept.ids, ids):
            return None
        kept.used = self._round
        self.hits += 1
        return _to((kept.trunk, kept.lower), self.device) if kept.far else (kept.trunk, kept.lower)

    def put(self, name: Hashable, ids: Tensor, trunk: Trunk, seconds: float, lower: KeysValues = ()) -> None:
        """Keep a trunk whose recomputation costs `seconds`, where there is room and sense in it.

        `lower`: keys and values of the blocks below it, (1, H, P, d_head) each, for a prefix.
        """
        self._kept.pop(name, None)
        size = -self.agreed(-_bytes((trunk, lower)))
        for far, limit in ((False, self.near), (True, self.far)):
            if far and size / self._speed() > seconds:
                return
            if self._room(size, limit, far):
                trunk, lower = _to((trunk, lower), torch.device("cpu")) if far else (trunk, lower)
                self._kept[name] = _Kept(ids, trunk, lower, size, far, self._round)
                return

    @property
    def bytes(self) -> int:
        """What is kept, in bytes."""
        return sum(k.bytes for k in self._kept.values())

    def _room(self, size: int, limit: float, far: bool) -> bool:
        there = {n: k for n, k in self._kept.items() if k.far == far}
        taken = sum(k.bytes for k in there.values())
        for name, kept in there.items():
            if taken + size <= limit:
                break
            if self._round - kept.used >= IDLE:
                taken -= self._kept.pop(name).bytes
        return taken + size <= limit

    def _speed(self) -> float:
        """Bytes a second from host memory to the device, measured once."""
        if self._rate is None:
            block = torch.empty(64 * 2**20, dtype=torch.uint8)
            started = time.perf_counter()
            block.to(self.device).sum().item()
            self._rate = block.nbytes / max(time.perf_counter() - started, 1e-9)
        return self._rate


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested values, each storage once."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    _walk(value, note)
    return sum(sizes.values())


def _to(value: V, device: torch.device) -> V:
    """Nested values with every tensor on `device`, shared ones moved once."""
    moved: dict[int, Tensor] = {}
    there: V = _walk(value, lambda t: moved.setdefault(id(t), t.to(device)))
    return there


def _walk(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Trunk):
        return replace(value, hidden=change(value.hidden), calls=_walk(value.calls, change))
    if isinstance(value, tuple | list):
        return type(value)([_walk(part, change) for part in value])
    if isinstance(value, dict):
        return {k: _walk(v, change) for k, v in value.items()}
    return value
