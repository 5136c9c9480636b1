"""A text encoder with its tokenizer: what decides whether a question belongs to an edit (SERAC), or which examples
resemble it (IKE).

Any encoder of transformers will do. An own one is a small DistilBERT over the edited model's tokenizer.
N = texts, e = width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Pooling = Literal["first", "mean"]
ROWS = 64  # texts of one forward pass


@dataclass(frozen=True, eq=False)
class Encoder:
    """`net` gives the last hidden state, of which the first position or the mean is a text's embedding.

    `lead` is put before every text: a blank makes a name at its start the same token as elsewhere. `own_tokenizer` is
    False where the tokenizer is that of the edited model.
    """

    net: Any
    tokenizer: Any
    pooling: Pooling = "first"
    lead: str = ""
    own_tokenizer: bool = True

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, e) float32, on the CPU; of a text that is too long the end counts."""
        return torch.cat([self.run(texts[i : i + ROWS]) for i in range(0, len(texts), ROWS)]).cpu()

    def run(self, texts: Sequence[str]) -> Tensor:
        """`embed` in one forward pass, which gradients may go through."""
        rows = [self.tokens(t) for t in texts]
        width = max(map(len, rows))
        device = next(self.net.parameters()).device
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
        hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (N, T, e)
        if self.pooling == "first":
            first: Tensor = hidden[:, 0]
            return first
        weight = mask[:, :, None].to(hidden.dtype)
        mean: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return mean

    def tokens(self, text: str) -> list[int]:
        """Tokens of `text` with the tokenizer's special ones; cut on the left to what the net reads."""
        tokenizer, longest = self.tokenizer, self.longest
        whole: list[int] = tokenizer.encode(self.lead + text, verbose=False)
        if len(whole) > longest:
            bare = tokenizer.encode(self.lead + text, add_special_tokens=False, verbose=False)
            end = tokenizer.decode(bare[len(whole) - longest :], clean_up_tokenization_spaces=False)
            whole = tokenizer.encode(end, truncation=True, max_length=longest)
        return whole or [tokenizer.pad_token_id or 0]

    @property
    def longest(self) -> int:
        """How many tokens the net reads, special ones included."""
        config = self.net.config
        positions = int(getattr(config, "max_position_embeddings", 512))
        taken = int(config.pad_token_id) + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
        return min(positions - taken, int(self.tokenizer.model_max_length))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar: the face has its own."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def own_encoder(model: Any, width: int) -> Encoder:
    """A random DistilBERT of two blocks over the tokens of `model`, not longer than 64 tokens."""
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        vocab_size=len(model.tokenizer), dim=width, hidden_dim=2 * width, n_layers=2, n_heads=4, dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=64, pad_token_id=model.pad_id,
    )  # fmt: skip
    return Encoder(DistilBertModel(config).to(model.device).eval(), model.tokenizer, "first", " ", own_tokenizer=False)


def pretrained_encoder(name: str, model: Any, pooling: Pooling = "first") -> Encoder:
    """The encoder `name` (folder or hub id), float32, without dropout. Raises ValueError when it can't be loaded."""
    from transformers import AutoModel, AutoTokenizer

    try:
        with _quiet():
            net = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        way = "give a folder that save_pretrained wrote, or a hub id where there is a network"
        raise ValueError(f"encoder {name!r} can't be loaded: {error}; {way}") from error
    return Encoder(net.to(model.device).eval(), tokenizer, pooling)
