"""Forward passes of a resident model as scoring needs them: behind shared prefixes, over kept trunks, within memory.

B = rows of a batch, T = tokens of one pass, P = tokens of a shared prefix, d = width of the residual stream.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from raysys.asking import Asking
from raysys.blocks import Ids
from raysys.kv import KeysValues, behind, held, resumed
from raysys.model import Model
from raysys.trunks import Trunks, around, recording

R = TypeVar("R")
A = TypeVar("A")

AUTO_TOKENS = 4096  # tokens of an automatic batch on a CPU, where larger ones gain nothing
AUTO_ROWS = 256  # rows of an automatic batch at most
AUTO_SHARE = 0.5  # of a device's free memory that an automatic batch may take


class Passes:
    """What is computed from the weights worn now, and what stays valid under other snapshots.

    `depth`: the first block that differs from the base, the number of blocks for the base itself, 0 where it can't be
    told. The trunks of batches are kept at the lowest block that any snapshot so far has changed.
    """

    def __init__(self, model: Model, trunks: Trunks | None = None, prefixes: int = 4) -> None:
        self.model, self.prefixes = model, prefixes
        self.trunks = trunks
        self.depth = model.layers
        self.kept_at: int | None = None  # the block at which trunks are kept, once one is known
        self._prefixes: dict[Ids, KeysValues] = {}

    def forget(self, depth: int = 0) -> None:
        """The model wears something else now, which differs from the base from block `depth` on."""
        self._prefixes.clear()
        self.depth = depth
        if 0 < depth < self.model.layers:
            self.expect(depth)

    def expect(self, depth: int) -> None:
        """Snapshots to come change nothing below block `depth`: keep trunks there from now on."""
        self.kept_at = min(depth, self.kept_at or depth)

    # --- passes ------------------------------------------------------------------------------------------------------

    def final(self, name: Hashable, prefix: Ids, ids: Tensor, asking: Asking | None = None) -> Tensor:
        """Hidden states after the final norm, (B, T, d), of `ids` (B, T; padded on the right) behind `prefix`.

        `name` is that of the batch, for its trunk; `asking` says what the rows are, for patches that want to know.
        """
        cache = behind(self.prefix(prefix)) if prefix else None
        if self.trunks is not None and not self.model.carried:
            if kept := self.trunks.get(name, ids, self.depth):
                return self.model.upper(around(kept[0], cache))
            if self.kept_at and self.kept_at <= self.depth:
                started = time.perf_counter()
                with recording(self.model, self.kept_at) as made:
                    hidden, _ = self.model.hidden(ids.to(self.model.device), cache=cache, use_cache=cache is not None)
                self.trunks.put(name, ids, made[0], self._lower_seconds(started))
                return hidden
        with self.model.asking(asking):
            hidden, _ = self.model.hidden(ids.to(self.model.device), cache=cache, use_cache=cache is not None)
        return hidden

    def prefix(self, prefix: Ids) -> KeysValues:
        """Keys and values of a shared prefix under the weights worn now; nobody's question ends in it."""
        if prefix not in self._prefixes:
            while len(self._prefixes) >= self.prefixes:
                del self._prefixes[next(iter(self._prefixes))]
            with self.model.bare():
                self._prefixes[prefix] = self._prefix(prefix)
        return self._prefixes[prefix]

    def _prefix(self, prefix: Ids) -> KeysValues:
        ids, layer = torch.tensor([prefix]), self.kept_at
        if self.trunks is not None and (kept := self.trunks.get(("prefix", prefix), ids, self.depth)):
            trunk, lower = kept
            cache = resumed(lower, self.model.layers)
            self.model.upper(around(trunk, cache))
            return held(cache)
        cache, started = DynamicCache(), time.perf_counter()
        if self.trunks is None or not layer or layer > self.depth:
            self.model.hidden(ids.to(self.model.device), cache=cache)
            return held(cache)
        with recording(self.model, layer) as made:
            self.model.hidden(ids.to(self.model.device), cache=cache)
        found = held(cache)
        self.trunks.put(("prefix", prefix), ids, made[0], self._lower_seconds(started), found[:layer])
        return found

    def _lower_seconds(self, started: float) -> float:
        """What the blocks below the trunk cost, of a whole pass that began at `started`."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        assert self.kept_at
        return (time.perf_counter() - started) * self.kept_at / self.model.layers

    # --- batches -----------------------------------------------------------------------------------------------------

    def in_batches(
        self, rows: Sequence[R], size: int, run: Callable[[int, Sequence[R]], A]
    ) -> Iterator[tuple[Sequence[R], A]]:
        """`run(number of the first row, rows)` over batches of `size`; where memory does not do, over halves."""
        start = 0
        while start < len(rows):
            part = rows[start : start + size]
            try:
                found = run(start, part)
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or self.model.ranks > 1 or not out_of_memory(error):  # other ranks go on
                    raise
                size = (len(part) + 1) // 2
                self.make_room()
                continue
            yield part, found
            start += len(part)

    def make_room(self) -> None:
        """Give back what can be computed again."""
        if self.trunks is not None:
            self.trunks.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def automatic(self, prefix: int, tokens: int) -> int:
        """How many rows of `tokens` new tokens behind a prefix fit: on a GPU by the memory that is free now."""
        if self.model.device.type != "cuda":
            return max(1, min(AUTO_ROWS, AUTO_TOKENS // max(tokens, 1)))
        free, _ = torch.cuda.mem_get_info(self.model.device)
        cached = torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
        config, bytes_ = self.model.config, torch.finfo(self.model.dtype).bits // 8
        heads = config.num_attention_heads
        share = (getattr(config, "num_key_value_heads", None) or heads) / heads
        keys = 2 * (prefix + tokens) * self.model.width * share * self.model.layers
        work = 16 * tokens * self.model.width + 2 * tokens * (prefix + tokens)
        rows = int(AUTO_SHARE * (free + cached) / (bytes_ * (keys + work)))
        return self.model.agreed(max(1, min(AUTO_ROWS, 1 << max(rows, 1).bit_length() - 1)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, on a GPU or on this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
