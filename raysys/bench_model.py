"""A random network with the shape of GPT-2 small, a tokenizer made in memory, and facts: what editing is timed on.

What an edit costs depends on shapes and lengths alone, so neither weights nor text need be real. Prompts have about
eight tokens and answers one, as in CounterFact; documents have some hundred.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from raysys.model import Model
from raysys.types import EditRequest

VOCABULARY = 50257
PLAIN = 400  # words that may begin a text too; all others follow a blank
SPECIAL = ["<pad>", "<unk>", "</s>"]
BEGINNINGS = ["The", "Therefore", "Because", "I", "You"]  # of the sampled contexts
GLUE = [".", " is", " a", " {}"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2; by default those of GPT-2 small (124 million parameters)."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024


def model(shape: Shape = Shape(), seed: int = 0) -> Model:
    """The network, float32 on the CPU, with its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = GPT2LMHeadModel(config)
    return Model(net, tokenizer(shape.context), "gpt2-small-shaped")


def words(vocabulary: int = VOCABULARY) -> list[str]:
    """As many words as `vocabulary` has room for; the first PLAIN of them stand there without a blank too."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    room = vocabulary - len(SPECIAL) - len(GLUE) - len(BEGINNINGS) - PLAIN
    return [a + b + c for a in syllables for b in syllables for c in syllables[:12]][:room]


def tokenizer(context: int, vocabulary: int = VOCABULARY) -> Any:
    """One token a word: what is decoded and read again stays as it is. Words without room become <unk>, one each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = words(vocabulary)
    table = [*SPECIAL, *GLUE, *BEGINNINGS, *made[:PLAIN], *(f" {w}" for w in made)]
    assert len(set(table)) == vocabulary
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(table)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[^A-Za-z\s]+"), "isolated")
    raw.decoder = decoders.Fuse()
    made_of: Any = PreTrainedTokenizerFast  # untyped
    return made_of(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="</s>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def requests(count: int, seed: int = 0) -> list[EditRequest]:
    """Facts as long as those of CounterFact are in GPT-2's tokens: four in five begin with their subject, others have
    three words before it; subjects of two to six (4.2 on average), then one to five (3.1), answers of one.

    What a search runs again and again lies between the subject's last token and the answer's end.
    """
    drawn = random.Random(seed)
    made = words()

    def some(*lengths: int) -> str:
        rest = drawn.choices(made, k=drawn.choice(lengths) - 1)
        return " ".join([drawn.choice(made[:PLAIN]), *rest])

    def fact(number: int) -> EditRequest:
        before = f"{some(3)} " if drawn.random() < 0.2 else ""
        subject, after = some(2, 3, 3, 4, 4, 4, 5, 5, 6, 6), some(1, 2, 2, 3, 3, 3, 4, 4, 4, 5)
        return EditRequest(f"bench/{number}", f"{before}{{}} {after}", subject, some(1), some(1))

    return [fact(i) for i in range(count)]


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 30 to 400 words, most of them short."""
    drawn = random.Random(f"documents {seed}")
    made = words()
    return [" ".join(drawn.choices(made, k=int(30 * (400 / 30) ** drawn.random()))) for _ in range(count)]
