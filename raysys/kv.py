"""Keys and values of attention, as scoring needs them: a prefix held once for all rows, and room to write in place.

P = tokens of a shared prefix, B = rows, H = heads of keys and values. A `Prefix` holds (1, H, P, d_head) per layer; a
pass over B rows sees it in front of their own keys without storing B copies, and a generation writes into buffers of
the final size, where a growing concatenation would copy everything at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

KeysValues = Sequence[tuple[Tensor, Tensor]]  # per layer, (1, H, P, d_head) each


class _Behind(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of one pass behind a prefix: gives prefix and new keys together, and keeps nothing but the prefix."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        keys = torch.cat((self.keys.expand(rows, -1, -1, -1), key_states), dim=-2)
        return keys, torch.cat((self.values.expand(rows, -1, -1, -1), value_states), dim=-2)


class _Growing(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a generation: `room` tokens are reserved behind the prefix and written in place."""

    def __init__(self, before: tuple[Tensor, Tensor] | None, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.room, self.length = before, room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.length = self.before[0].shape[-2] if self.before else 0
        self._keys, self._values = (self._buffer(t, n) for n, t in enumerate((key_states, value_states)))
        self.before = None
        self.is_initialized = True

    def _buffer(self, like: Tensor, which: int) -> Tensor:
        rows, heads, _, width = like.shape
        buffer = like.new_empty(rows, heads, self.length + self.room, width)
        if self.before:
            buffer[:, :, : self.length] = self.before[which]
        return buffer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else (self.before[0].shape[-2] if self.before else 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; only what is written is copied."""
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(len(indices), *old.shape[1:])
            new[:, :, : self.length] = old[indices, :, : self.length]
            setattr(self, name, new)


def behind(prefix: KeysValues) -> Cache:
    """A cache for one pass over any number of rows that follow `prefix`."""
    return Cache(layers=[_Behind(keys, values) for keys, values in prefix])


def growing(prefix: KeysValues, layers: int, room: int) -> Cache:
    """A cache for a generation: rows that follow `prefix` (empty: none), `room` tokens of prompt and answer each."""
    return Cache(layers=[_Growing(prefix[n] if prefix else None, room) for n in range(layers)])


def held(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values in a cache, layer by layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def resumed(lower: KeysValues, layers: int) -> DynamicCache:
    """A cache whose first layers hold `lower`, and whose others (up to `layers`) are still to be filled."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(lower):
        cache.update(keys, values, number)
    cache.layers += [DynamicLayer() for _ in range(layers - len(lower))]  # type: ignore[no-untyped-call]
    return cache
