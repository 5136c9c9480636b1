"""Text and tokens of a model, without its weights: the rules by which a prompt and what follows it are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raysys.loading import load_tokenizer


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with the length that its model can read. `max_length` is in tokens."""

    tokenizer: Any
    max_length: int

    @classmethod
    def load(cls, name: str, revision: str | None = None) -> Tokens:
        """The tokenizer of a hub id, a folder or "world/small". Raises ValueError that says what to do."""
        config, tokenizer = load_tokenizer(name, revision)
        return cls.of(tokenizer, config)

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> Tokens:
        """With the longest input: the config's word, else the tokenizer's (when it has one), else 2048."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None and tokenizer is not None and tokenizer.model_max_length < 1_000_000:
            limit = tokenizer.model_max_length
        return cls(tokenizer, int(limit or 2048))

    @property
    def pad_id(self) -> int:
        """What fills a batch; always masked."""
        for id_ in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if id_ is not None:
                return int(id_)
        return 0

    @cached_property
    def start_id(self) -> int | None:
        """The token that begins a text: BOS, or EOS where there is none."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((int(i) for i in ids if i is not None), None)

    @cached_property
    def _start(self) -> str | None:
        return None if self.start_id is None else self.decode([self.start_id], special=True)

    def encode(self, text: str, generation: bool = False) -> list[int]:
        """Tokens of `text`, with the special tokens that the tokenizer adds by itself unless the text has the first.

        So lm-evaluation-harness does; for a prompt of `generation` it looks for BOS alone, elsewhere also for what
        begins a text without it (see `start_id`).
        """
        start = self.tokenizer.bos_token if generation else self._start
        there = start is not None and text.startswith(start)
        ids: list[int] = self.tokenizer.encode(text, verbose=False, **({"add_special_tokens": False} if there else {}))
        return ids

    def decode(self, ids: Sequence[int] | Any, special: bool = False) -> str:
        """Text of `ids`, with or without `special` tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return text

    def pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of `prompt` and of what follows it, split as lm-evaluation-harness does.

        Blanks at the prompt's end belong to the continuation, whose tokens are those that `prompt + continuation`
        has beyond the prompt's. An empty prompt becomes the token that begins a text.
        """
        blanks = len(prompt) - len(prompt.rstrip())
        if blanks:
            prompt, continuation = prompt[:-blanks], prompt[-blanks:] + continuation
        if not prompt:
            ids = self.tokenizer.encode(continuation, add_special_tokens=False, verbose=False)
            if self.start_id is None or ids[:1] == [self.start_id]:
                return ids[:1], ids[1:]
            return [self.start_id], ids
        head = self.encode(prompt)
        return head, self.encode(prompt + continuation)[len(head) :]
