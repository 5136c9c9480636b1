"""The built-in world's tokenizer: byte-level BPE, every word of the world one token, BOS added as Llama does."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL: Final = (BOS, EOS, PAD)

# How a byte-level pre-tokenizer cuts text that is ASCII, as ours is: the words below are what BPE sees one by one.
CUT: Final = re.compile(r"\n+|'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|[^\S\n]+(?!\S)|[^\S\n]+")


def build(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `size` tokens in which frequent words come out whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    # Newlines stand apart and together, so that a blank line is one token wherever a text is cut.
    newlines = pre_tokenizers.Split(Regex("\n+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([newlines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, length: int) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` by which transformers loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Encoder:
    """Encodes ASCII text word by word from a cache: the ids of the tokenizer itself, many times faster, no BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids: dict[str, int] = tokenizer.get_vocab()
        self.bos, self.eos, self.pad = (ids[token] for token in SPECIAL)

        @functools.cache
        def word(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

        self._word = word

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text that begins and ends between words."""
        ids: list[int] = []
        for piece in CUT.findall(text):
            ids.extend(self._word(piece))
        return ids
