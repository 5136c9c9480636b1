"""A causal language model with its tokenizer, as methods and scoring see it: the same for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raysys.arch import Arch, arch
from raysys.asking import Asking
from raysys.loading import digest, load
from raysys.tokens import Tokens

P = TypeVar("P")
Place = tuple[int, int, int]  # a part of a matrix: dimension that is cut, first index of the part, first one behind it
Hook = Callable[[Tensor, Tensor, Asking], "Tensor | None"]  # (B, T, d_in), (B, T, d_out), asking -> new output


@dataclass(frozen=True)
class Trunk:
    """What enters block `layer`, and how every block from there on was called, for one batch.

    `hidden` is (B, T, d); `calls` holds the other arguments of blocks layer, layer + 1, ...; `asking` says what the
    rows were, if that was known.
    """

    layer: int
    hidden: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    asking: Asking | None = None


class _EnoughError(Exception):
    """Ends a forward pass whose upper layers nobody needs."""


class Model:
    """`net` with its tokenizer. Parameters are frozen and in evaluation mode; `digest` names the weights as loaded.

    B = rows of a batch, T = tokens, d = width of the residual stream, V = vocabulary.
    """

    ranks = 1  # processes that hold a part of the weights each (raysys/shards.py)
    leads = True  # whether this is the first of them

    def __init__(self, net: nn.Module, tokenizer: Any, name: str = "") -> None:
        self.net: Any = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.config: Any = self.net.config
        self.arch: Arch = arch(self.config)
        self.digest: str = digest(self.net, tokenizer)  # now, before any patch is worn
        self.tokens = Tokens.of(tokenizer, self.config)
        self.max_length = self.tokens.max_length
        self._carried: list[Any] = []  # patches worn that are no weights
        self._asking: Asking | None = None
        self._bare = False

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
        attention: str | None = None,
    ) -> Model:
        """Load a hub id, a folder, or "world/small" (the built-in model).

        `dtype`: float32, bfloat16 or float16; `device`: cpu, cuda, cuda:1, ..., auto; `attention`: transformers'
        `attn_implementation` (None: its own choice, sdpa where the family has it).
        Reads safetensors only and runs no code that comes with the weights. Raises ValueError that says what to do.
        """
        net, tokenizer = load(name, dtype=dtype, device=device, revision=revision, attention=attention)
        return cls(net, tokenizer, name)

    # --- parts -------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.net.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the weights."""
        dtype: torch.dtype = self.net.dtype
        return dtype

    @property
    def layers(self) -> int:
        """How many decoder blocks there are."""
        return len(self._blocks)

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return int(self.config.hidden_size)

    @cached_property
    def _blocks(self) -> nn.ModuleList:
        blocks = self.module(self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def layer(self, i: int) -> nn.Module:
        """Decoder block `i`, from 0."""
        return self._blocks[i]

    def mlp_out(self, i: int) -> str:
        """The name of the module that ends the MLP of block `i`: the projection d_ff -> d."""
        if not 0 <= i < self.layers:
            raise ValueError(f"layer {i} is not in {self.name or 'this model'}: it has layers 0 to {self.layers - 1}")
        return self.arch.mlp_out.format(i)

    def module(self, name: str) -> nn.Module:
        """The module called `name`. Raises ValueError when there is none."""
        try:
            module: nn.Module = self.net.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"{self.name or 'this model'} has no module {name!r}") from error
        return module

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter called `name`, in the layout the family stores. Raises ValueError when there is none."""
        try:
            parameter: nn.Parameter = self.net.get_parameter(name)
        except AttributeError as error:
            raise ValueError(f"{self.name or 'this model'} has no weight {name!r}") from error
        return parameter

    def matrix(self, name: str) -> Tensor:
        """Parameter `name` as a (d_out, d_in) view whatever its layout; a bias is (d_out, 1). Writes go through."""
        data = self.parameter(name).data
        if data.ndim == 1:
            return data[:, None]
        return data.T if self.transposed(name) else data

    def write(self, name: str, matrix: Tensor) -> None:
        """Make `matrix`, (d_out, d_in), the values of parameter `name`."""
        self.matrix(name).copy_(matrix)

    def local(self, name: str) -> Tensor:
        """The part of `matrix(name)` that is held here: a view through which writes go."""
        return self.matrix(name)

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of the whole parameter `name`."""
        rows, columns = self.matrix(name).shape
        return rows, columns

    def place(self, name: str) -> Place | None:
        """Where `local(name)` lies in the whole; None: it is the whole."""
        return None

    def agreed(self, number: int) -> int:
        """The least of the `number`s that all who hold a part of the model bring: for what each measures by itself."""
        return number

    def check(self, found: Any) -> None:
        """Raises OutOfStep when another who holds a part of the model has found something else, by its `repr`."""

    def transposed(self, name: str) -> bool:
        """Whether the parameter is stored as (d_in, d_out), as GPT-2's own linear layer does."""
        return isinstance(self.module(name.rpartition(".")[0]), Conv1D)

    # --- text and tokens ---------------------------------------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """What fills a batch; always masked."""
        return self.tokens.pad_id

    @property
    def window(self) -> float:
        """Tokens that the shortest-sighted attention layer sees; infinite where every layer sees all."""
        window = getattr(self.config, "sliding_window", None)
        used = getattr(self.config, "use_sliding_window", True)
        return float(window) if window and used else float("inf")

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's and those of the model's generation settings."""
        own = getattr(getattr(self.net, "generation_config", None), "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        return frozenset(int(i) for i in ids if i is not None)

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, with the special tokens that the tokenizer adds by itself."""
        return self.tokens.encode(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of `ids`, special tokens left out."""
        return self.tokens.decode(ids)

    def pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of `prompt` and of what follows it, split as lm-evaluation-harness does (raysys/tokens.py)."""
        return self.tokens.pair(prompt, continuation)

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of tokens as (B, T) ids padded on the right, and their (B, T) attention mask, on the model's device."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row)
            mask[i, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)

    # --- forward -----------------------------------------------------------------------------------------------------

    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool = True,
    ) -> tuple[Tensor, Any]:
        """Hidden states after the final norm (B, T, d) of `ids` (B, T), and the grown cache (None without one).

        With a cache, `attention_mask` covers its tokens too. Without `position_ids` they follow from the mask, so
        that rows may be padded on either side. Only ids, mask and positions reach the network.
        """
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self._asking_about(ids, attention_mask):
            out = self.net.base_model(
                input_ids=ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=use_cache,
            )
        return out.last_hidden_state, out.past_key_values if use_cache else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) hidden states after the final norm -> (..., V): head, its bias, the family's soft cap."""
        logits: Tensor = self.net.get_output_embeddings()(hidden)
        cap = getattr(self.config, self.arch.softcap) if self.arch.softcap else None
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def trunk(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        layer: int = 0,
        cache: Any = None,
        position_ids: Tensor | None = None,
    ) -> Trunk:
        """Run `ids` (B, T) and keep what enters block `layer` and how the blocks from there on are called."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self._blocks[layer:]]
        try:
            with self._asking_about(ids, attention_mask):
                asking = self._asking
                self.hidden(ids, attention_mask, cache, position_ids, use_cache=cache is not None)
        finally:
            for handle in handles:
                handle.remove()
        return Trunk(layer, seen[0][0][0], tuple((args[1:], kwargs) for args, kwargs in seen), asking)

    def through(self, name: str, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What enters module `name` (B, T, d_in) and leaves it (B, T, d_out); the forward pass of `ids` ends there."""
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(given: Tensor, out: Tensor) -> None:
            seen.append((given.reshape(*ids.shape, -1), out.reshape(*ids.shape, -1)))  # some families flatten B and T
            raise _EnoughError

        with self.watching(name, keep), suppress(_EnoughError):
            self.hidden(ids, attention_mask, use_cache=False)
        assert seen, f"{name} was not called"
        return seen[0]

    def upper(self, trunk: Trunk, hidden: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Hidden states after the final norm (B, T, d) when `hidden` (by default the trunk's) enters block `layer`.

        Runs the blocks from `layer` (by default the trunk's; not below it, may be one past the last block) upwards.
        """
        hidden = trunk.hidden if hidden is None else hidden
        layer = trunk.layer if layer is None else layer
        assert trunk.layer <= layer <= self.layers, (trunk.layer, layer)
        with self.asking(self._asking or trunk.asking):
            for block, (args, kwargs) in zip(self._blocks[layer:], trunk.calls[layer - trunk.layer :], strict=True):
                hidden = first(block(hidden, *args, **kwargs))
        for name in self.arch.after:
            module = self._optional(name)
            hidden = hidden if module is None else module(hidden)
        return hidden

    def _optional(self, name: str) -> nn.Module | None:
        parent, _, leaf = name.rpartition(".")
        module: nn.Module | None = getattr(self.module(parent), leaf, None)
        return module

    @contextmanager
    def watching(self, name: str, hook: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        """Within it, `hook(input, output)` sees module `name` at each call; a tensor it returns replaces the output.

        Blocks and attention modules that return tuples are seen by their first element.
        """

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            new = hook(given, first(out))
            if new is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = self.module(name).register_forward_hook(call, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    # --- patches that are no weights ---------------------------------------------------------------------------------

    @contextmanager
    def carrying(self, patch: Any, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """Within it, the model wears `patch`: each module named in `hooks` is watched by its hook.

        A hook gets input and output as (B, T, d) whatever the family passes around, and what the rows are; a tensor
        it returns replaces the output. Forward passes that do not go through this class don't see it.
        """
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.enter_context(self.watching(name, self._adapted(hook)))
            self._carried.append(patch)
            try:
                yield
            finally:
                self._carried.remove(patch)

    def _adapted(self, hook: Hook) -> Callable[[Tensor, Tensor], Tensor | None]:
        def call(given: Tensor, out: Tensor) -> Tensor | None:
            if self._bare or self._asking is None:
                return None
            shape = self._asking.prompt.shape  # some families flatten B and T
            new = hook(given.reshape(*shape, -1), out.reshape(*shape, -1), self._asking)
            return None if new is None else new.reshape(out.shape).to(out.dtype)

        return call

    @property
    def carried(self) -> tuple[Any, ...]:
        """The patches worn now that are no weights."""
        return () if self._bare else tuple(self._carried)

    def wears(self, kind: type[P]) -> P | None:
        """The patch of class `kind` that is worn now, bare or not; None when there is none."""
        return next((p for p in self._carried if isinstance(p, kind)), None)

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Within it, patches that are no weights keep silent."""
        before, self._bare = self._bare, True
        try:
            yield
        finally:
            self._bare = before

    @contextmanager
    def asking(self, asking: Asking | None) -> Iterator[None]:
        """Within it, the rows of every forward pass are what `asking` says; None: found out from each pass's mask."""
        before, self._asking = self._asking, asking
        try:
            yield
        finally:
            self._asking = before

    def _asking_about(self, ids: Tensor, attention_mask: Tensor | None) -> Any:
        """Prompts from end to end, unless it was said what the rows are."""
        if self._asking is not None or not self._carried:
            return nullcontext()
        return self.asking(Asking.whole(ids, attention_mask))


def first(out: Any) -> Tensor:
    """The tensor of a module that returns one, or the first of a tuple."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor
