"""Small models in foreign formats as ordinary model folders, which transformers and `Model.load` read.

llama2.c (github.com/karpathy/llama2.c): a checkpoint is 7 int32 (dim, hidden_dim, layers, heads, kv_heads, vocab,
sequence length; a negative vocab means that the output head is stored apart), then float32 tensors: token embedding
(vocab, dim); per layer, each stacked over layers: attention norm, wq, wk, wv, wo, FFN norm, w1, w2, w3; final norm;
the cosines and sines of the rotary embedding; the output head where it is stored apart. Its rotary embedding turns
neighbouring pairs of a head's features, transformers' the two halves: the rows of wq and wk are reordered.
The tokenizer is a sentencepiece BPE model (`tok512.model`), read here without sentencepiece.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

HEADER = struct.Struct("<7i")
NORM_EPS = 1e-5  # llama2.c's run.c; not stored in the file
BLANK = "\u2581"  # sentencepiece's mark for a blank
PIECE_TEXT, PIECE_SCORE, PIECE_KIND = 1, 2, 3  # field numbers of sentencepiece_model.proto
MODEL_PIECES, MODEL_TRAINER, MODEL_NORMALIZER = 1, 2, 3
TRAINER_KIND, KIND_BPE = 3, 2
NORMALIZER_NAME, NORMALIZER_PREFIX = 1, 3
UNKNOWN, CONTROL = 2, 3


def llama2c(checkpoint: str | Path, tokenizer: str | Path, out: str | Path) -> Path:
    """Write the folder `out`: a Llama of transformers with its tokenizer. Returns `out`.

    checkpoint: a llama2.c .bin (float32, version 0). tokenizer: its sentencepiece .model.
    Raises ValueError when a file is missing, is something else, or the two don't belong together.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = _read(checkpoint)
    if len(raw) < HEADER.size:
        raise ValueError(f"{checkpoint}: {len(raw)} bytes are too few for a llama2.c checkpoint; download it again.")
    dim, hidden, layers, heads, kv_heads, vocab, length = HEADER.unpack_from(raw)
    shape = Shape(dim, hidden, layers, heads, kv_heads, abs(vocab), length, tied=vocab > 0)
    if not shape.sane:
        raise ValueError(
            f"{checkpoint}: not a llama2.c checkpoint: its first numbers are {HEADER.unpack_from(raw)}. "
            "The float32 export (version 0) is meant, not a .pt file or a quantised export."
        )
    pieces, fast = sentencepiece_bpe(tokenizer, length)
    if pieces != shape.vocab:
        raise ValueError(f"{tokenizer}: {pieces} pieces, {checkpoint} has {shape.vocab}: they don't belong together.")

    weights = shape.weights(raw, str(checkpoint))
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=[1, 2],  # llama2.c parts texts by BOS, and ends a text there
        dtype=torch.float32,
    )
    net = LlamaForCausalLM(config)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    net.save_pretrained(out, safe_serialization=True)
    fast.save_pretrained(out)
    return Path(out)


@dataclass(frozen=True)
class Shape:
    """A llama2.c header. `length` is in tokens; `tied`: the output head is the token embedding."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    length: int
    tied: bool

    @property
    def sane(self) -> bool:
        sizes = (self.dim, self.hidden, self.layers, self.heads, self.kv_heads, self.vocab, self.length)
        return (
            min(sizes) > 0
            and max(sizes) < 1 << 24
            and self.dim % self.heads == 0
            and self.heads % self.kv_heads == 0
            and (self.dim // self.heads) % 2 == 0
        )

    def weights(self, raw: bytes, where: str) -> dict[str, Tensor]:
        """The tensors under transformers' names. Raises ValueError when the file is too short or too long."""
        import torch

        n, d, kv = self.layers, self.dim, self.dim // self.heads * self.kv_heads
        sizes = {
            "embed_tokens": (self.vocab, d), "input_layernorm": (n, d), "self_attn.q_proj": (n, d, d),
            "self_attn.k_proj": (n, kv, d), "self_attn.v_proj": (n, kv, d), "self_attn.o_proj": (n, d, d),
            "post_attention_layernorm": (n, d), "mlp.gate_proj": (n, self.hidden, d),
            "mlp.down_proj": (n, d, self.hidden), "mlp.up_proj": (n, self.hidden, d), "norm": (d,),
            "cos": (self.length, d // self.heads // 2), "sin": (self.length, d // self.heads // 2),
        }  # fmt: skip
        if not self.tied:
            sizes["lm_head"] = (self.vocab, d)
        numbers = torch.frombuffer(bytearray(raw[HEADER.size :]), dtype=torch.float32)
        total = sum(torch.Size(s).numel() for s in sizes.values())
        if len(numbers) != total:
            raise ValueError(
                f"{where}: {len(numbers):,} numbers after the header, {total:,} expected from it; download it again."
            )
        split = torch.split(numbers, [torch.Size(s).numel() for s in sizes.values()])
        parts = dict(zip(sizes, split, strict=True))
        found: dict[str, Tensor] = {}
        for name, size in sizes.items():
            part = parts[name].view(size)
            if name in ("cos", "sin"):
                continue
            if name in ("embed_tokens", "norm", "lm_head"):
                found[f"{'' if name == 'lm_head' else 'model.'}{name}.weight"] = part
                continue
            for layer in range(n):
                turned = name in ("self_attn.q_proj", "self_attn.k_proj")
                matrix = halves(part[layer], d // self.heads) if turned else part[layer]
                found[f"model.layers.{layer}.{name}.weight"] = matrix
        return found


def halves(matrix: Tensor, head: int) -> Tensor:
    """Rows (heads * head, d_in) of each head reordered from neighbouring pairs to two halves."""
    return matrix.view(-1, head // 2, 2, matrix.shape[-1]).transpose(1, 2).reshape(matrix.shape).contiguous()


# --- sentencepiece ---------------------------------------------------------------------------------------------------


def sentencepiece_bpe(path: str | Path, length: int) -> tuple[int, PreTrainedTokenizerFast]:
    """The number of pieces, and a fast tokenizer that splits as the sentencepiece BPE model at `path` does.

    `length`: the model's longest text in tokens. Raises ValueError when the file is no such model.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, merges, prefix = _pieces(path)
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    special = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    unknown, begin, end = special[0], "<s>", "</s>"
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(BLANK)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    plain = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*plain, *strip])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, ids[begin])]
    )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    return len(pieces), fast


Piece = tuple[str, float, int]


def _pieces(path: str | Path) -> tuple[list[Piece], list[tuple[str, str]], bool]:
    """(text, score, kind) of every piece; the merges, best first; whether a blank is put before the text."""
    try:
        message = list(_fields(_read(path)))
        trainer = dict(_fields(_last(message, MODEL_TRAINER)))
        normalizer = dict(_fields(_last(message, MODEL_NORMALIZER)))
        pieces = [_piece(value) for field, value in message if field == MODEL_PIECES]
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(
            f"{path}: not a sentencepiece model. The .model file is meant, not llama2.c's own .bin."
        ) from error
    if trainer.get(TRAINER_KIND, 1) != KIND_BPE or normalizer.get(NORMALIZER_NAME) != b"identity":
        raise ValueError(f"{path}: only sentencepiece BPE models without normalisation can be converted.")
    if not {"<s>", "</s>"} <= {text for text, _, _ in pieces} or not any(k == UNKNOWN for _, _, k in pieces):
        raise ValueError(f"{path}: the pieces <s>, </s> and one for unknown text are expected.")
    rank = {text: (-score, i) for i, (text, score, _) in enumerate(pieces)}
    pairs = [(text[:at], text[at:]) for text, _, kind in pieces if kind == 1 for at in range(1, len(text))]
    merges = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
    merges.sort(key=lambda pair: (rank[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]))
    return pieces, merges, bool(normalizer.get(NORMALIZER_PREFIX, 1))


def _piece(message: Any) -> Piece:
    parts = dict(_fields(message))
    [score] = struct.unpack("<f", parts.get(PIECE_SCORE, bytes(4)))
    return parts[PIECE_TEXT].decode(), score, parts.get(PIECE_KIND, 1)


def _last(message: list[tuple[int, Any]], field: int) -> Any:
    return [value for number, value in message if number == field][-1]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol buffer: int for varints, bytes for everything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(message):
            raise IndexError("cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); check the path.") from error


# --- a random GPT-2 --------------------------------------------------------------------------------------------------


def random_gpt2(
    tokenizer_folder: str | Path, out: str | Path, *, layers: int = 4, width: int = 128, seed: int = 0
) -> Path:
    """Write the folder `out`: a GPT-2 with random weights and the real GPT-2 tokenizer. Returns `out`.

    tokenizer_folder: holds encoder.json and vocab.bpe (OpenAI's names) or vocab.json and merges.txt (the hub's).
    For trying things out at real vocabulary size; it knows nothing. Raises ValueError when the files are missing.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    source, out = Path(tokenizer_folder), Path(out)
    files: dict[str, Path] = {}
    for ours, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        found = next((source / name for name in (ours, theirs) if (source / name).is_file()), None)
        if found is None:
            raise ValueError(f"{source}: neither {theirs} nor {ours} is there; GPT-2's tokenizer needs two files.")
        files[ours] = found
    out.mkdir(parents=True, exist_ok=True)
    for ours, found in files.items():
        shutil.copyfile(found, out / ours)
    vocab = len(json.loads((out / "vocab.json").read_text(encoding="utf-8")))
    end = vocab - 1  # <|endoftext|>
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=max(1, width // 32),
            bos_token_id=end,
            eos_token_id=end,
            dtype=torch.float32,
        )
        net = GPT2LMHeadModel(config)
    net.save_pretrained(out, safe_serialization=True)
    gpt2_tokenizer(out).save_pretrained(out)
    return out


def gpt2_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The byte-level BPE of vocab.json and merges.txt in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
