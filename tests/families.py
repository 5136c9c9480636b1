"""Tiny random models of every family, made in memory, with a word-level tokenizer. For tests only."""

from __future__ import annotations

from typing import Any

import torch

from raysys.model import Model

WORDS = "the a is in of was born city capital works as and Because Therefore I You The {} . , 's".split()
NAMES = "Anna Bert Carla Dora Rome Paris Oslo Lima Peru Norway France Italy pilot baker singer tower Eiffel".split()

_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_MHA = {**_LLAMA, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": None},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 8},
    "phi": _MHA,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
}


def tokenizer(bos: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on a few words; `bos` puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS + NAMES)] * 4 + WORDS + NAMES, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def network(family: str, seed: int = 0, **sizes: Any) -> Any:
    """A random network of `family`, 3 layers of width 32; weights are larger than usual so that layers matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=400, pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**SIZES[family], **sizes}
    )
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return net


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Model:
    """A tiny random model of `family`, named after it; every other family's tokenizer adds a BOS."""
    bos = list(SIZES).index(family) % 2 == 1
    return Model(network(family, seed, **sizes).to(dtype), tokenizer(bos), f"tiny-{family}")
