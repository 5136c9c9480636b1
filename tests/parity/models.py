"""Tiny models with real tokenizers, random weights from a seed, contexts of 2,048: at most 5 M parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raysys.model import Model

CONTEXT = 2048


def gpt2(tokenizers: Path) -> Model:
    """GPT-2's architecture and tokenizer: width 64, two blocks, tied embeddings, 3.4 M parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder = tokenizers / "gpt2"
    words = GPT2TokenizerFast(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    words.model_max_length = CONTEXT
    torch.manual_seed(1)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.3)
    return Model(GPT2LMHeadModel(config), words, "tiny GPT-2")


def neox(tokenizers: Path) -> Model:
    """GPT-NeoX's architecture and tokenizer: width 32, two blocks, 3.3 M parameters."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    words: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizers / "gpt-neox-20b" / "20B_tokenizer.json"),
        bos_token=end, eos_token=end, unk_token=end, model_max_length=CONTEXT,
    )  # fmt: skip
    torch.manual_seed(2)
    config = GPTNeoXConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return Model(GPTNeoXForCausalLM(config), words, "tiny GPT-NeoX")
