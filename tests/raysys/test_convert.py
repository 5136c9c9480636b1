"""Foreign model formats: the converted model says what its authors print, and wrong files are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysys.convert import llama2c, random_gpt2

GREEDY = (  # stories260K.md, temperature 0
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\""
)


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = shared / "data" / "stories260K"
    return llama2c(data / "stories260K.bin", data / "tok512.model", tmp_path_factory.mktemp("stories"))


def test_the_story_is_the_one_its_author_prints(stories: Path) -> None:
    net: Any = AutoModelForCausalLM.from_pretrained(stories)
    tokenizer: Any = AutoTokenizer.from_pretrained(stories)
    ids = torch.tensor([[tokenizer.bos_token_id]])
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith(GREEDY)


def test_the_tokenizer_splits_as_sentencepiece_does(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    assert tokenizer("Once upon a time, there was").input_ids == [1, 403, 407, 261, 378, 432, 383, 286]
    text = 'Lily\'s "é" 日 costs 7x,  two\nlines.'
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("日").input_ids[-3:] == [3 + byte for byte in "日".encode()]  # bytes, not unknown
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 512


def test_wrong_files_are_named(shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "stories260K"
    checkpoint, tokenizer, out = data / "stories260K.bin", data / "tok512.model", tmp_path / "out"
    cut = tmp_path / "cut.bin"
    cut.write_bytes(checkpoint.read_bytes()[:-4])
    for wrong, message in (
        ((tmp_path / "no.bin", tokenizer), r"no.bin: can't be read"),
        ((cut, tokenizer), r"cut.bin: \d+,\d+ numbers after the header, \d+,\d+ expected"),
        ((data / "stories260K.md", tokenizer), r"stories260K.md: not a llama2.c checkpoint"),
        ((checkpoint, data / "tok512.bin"), r"tok512.bin: not a sentencepiece model"),
    ):
        with pytest.raises(ValueError, match=message):
            llama2c(*wrong, out)
    assert not out.exists()


def test_a_random_gpt2_has_the_real_tokenizer_and_repeats(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "tokenizers" / "gpt2"
    first, second = (random_gpt2(source, tmp_path / name, layers=1, width=32, seed=3) for name in "ab")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert tokenizer("Hello world, Eiffel Tower").input_ids == [15496, 995, 11, 412, 733, 417, 8765]
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(first).config.vocab_size == 50257
    with pytest.raises(ValueError, match=r"neither encoder.json nor vocab.json is there"):
        random_gpt2(tmp_path, tmp_path / "c")
