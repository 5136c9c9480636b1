"""Patches that look at prompts: told where each prompt ends, alone or in a batch, in scoring and in generation."""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from raysys.asking import Asking
from raysys.blocks import pack
from raysys.patch import Wearer, merge
from raysys.scoring import Engine
from raysys.types import Choose, Detour, Generate, Generated
from tests.families import SIZES, tiny

SHARED = "Anna was born in Rome . Oslo is the capital of Norway . "
PROMPTS = ("Lima is the capital of", "The singer Dora works as a", "Bert", "The Eiffel tower is in")
CHOICES = (" Rome", " Paris", " baker pilot")


@dataclass(frozen=True, eq=False)
class Marker:
    """Adds `size` to what block 1's MLP gives at every prompt's last token, and notes what it was told."""

    size: float
    kind: ClassVar[str] = "marker"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = False

    @contextmanager
    def applied(self, model):
        def hook(given, out, asking):
            assert given.shape[:2] == out.shape[:2] == asking.prompt.shape
            asking.notes.setdefault("rows", []).append(asking.rows.tolist())
            hit = (asking.last >= 0).nonzero()[:, 0]
            out = out.clone()
            out[hit, asking.last[hit]] += self.size * torch.arange(out.shape[-1]).sin()  # a norm would undo a constant
            return out

        with model.carrying(self, {model.mlp_out(1): hook}):
            yield

    def tensors(self):
        return {}

    def fields(self):
        return {"size": self.size}

    def after(self, earlier):
        return Marker(self.size + earlier.size)


@dataclass(frozen=True, eq=False)
class Whole(Marker):
    """Adds the number of the prompt's tokens, shared ones included, so it must see them all."""

    kind: ClassVar[str] = "whole"
    whole: ClassVar[bool] = True
    in_weights: ClassVar[bool] = False

    @contextmanager
    def applied(self, model):
        def hook(given, out, asking):
            seen = asking.prompt.sum(1) * (asking.last >= 0) * self.size / 20
            return out + seen[:, None, None] * torch.arange(out.shape[-1]).sin()

        with model.carrying(self, {model.mlp_out(1): hook}):
            yield


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Sends prompts about Lima to another model, and others with "Bert" before them."""

    other: object
    kind: ClassVar[str] = "elsewhere"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = False

    @contextmanager
    def applied(self, model):
        with model.carrying(self, {}):
            yield

    def reroute(self, model, prompts):
        texts = [model.decode(p) for p in prompts]
        return [
            Detour(self.other, tuple(p)) if "Lima" in t
            else Detour(model, tuple(model.encode("Bert is a")) + p) if "Dora" in t
            else None
            for p, t in zip(prompts, texts, strict=True)
        ]  # fmt: skip


def _ask(model, patches, batch, shared=SHARED):
    wearer = Wearer(model)
    wearer.wear(patches)
    found = []
    kinds = (Choose("", "", CHOICES, 0), Generate("", "", (".",), "", 4))
    for kind in kinds:
        queries = [replace(kind, id=str(i), prompt=shared + p, shared=shared) for i, p in enumerate(PROMPTS)]
        [block] = pack(model.tokens, "asking", {}, queries, batch=batch, size=9)
        answers = Engine(model).answer(block)
        found.append([a for _, a in sorted(zip([i.query.id for i in block.items], answers, strict=True))])
    wearer.take_off()
    return found


def _plain(model, patches, prompt, choice):
    """One forward pass of one row, by hand."""
    wearer = Wearer(model)
    wearer.wear(patches)
    before, after = model.pair(prompt, choice)
    ids = torch.tensor([[*before, *after[:-1]]])
    prompt_columns = torch.arange(ids.shape[1])[None] < len(before)
    with torch.no_grad(), model.asking(Asking.of(prompt_columns)):
        hidden, _ = model.hidden(ids, use_cache=False)
        logprobs = model.logits(hidden[0, len(before) - 1 :]).log_softmax(-1)
    wearer.take_off()
    return float(logprobs[range(len(after)), after].sum())


@pytest.mark.parametrize("kind", [Marker, Whole])
@pytest.mark.parametrize("family", SIZES)
def test_it_is_told_where_each_prompt_ends(family, kind):
    model = tiny(family)
    patches = (kind(0.5),)
    bare = _ask(model, (), 1)
    one, three = _ask(model, patches, 1), _ask(model, patches, 3)
    assert one[1] == three[1]
    for i, prompt in enumerate(PROMPTS):
        for choice, a, b, without in zip(
            CHOICES, one[0][i].choices, three[0][i].choices, bare[0][i].choices, strict=True
        ):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert a.logprob == pytest.approx(_plain(model, patches, SHARED + prompt, choice), abs=1e-4)
            assert abs(a.logprob - without.logprob) > 1e-4


def test_rows_keep_their_numbers_while_others_leave():
    asking = Asking.of(torch.ones(3, 4, dtype=torch.bool))
    step = asking.following(torch.tensor([0, 2]))
    step.notes["seen"] = 1
    assert asking.notes == {"seen": 1} and step.last.tolist() == [-1, -1] and step.rows.tolist() == [0, 2]


def test_a_prompt_alone_is_a_prompt_from_end_to_end_on_either_side_of_padding():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert Asking.whole(ids).last.tolist() == [2, 2]
    assert Asking.whole(ids, torch.tensor([[1, 1, 0], [0, 1, 1]])).last.tolist() == [1, 2]
    assert Asking.whole(ids, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 1, 1]])).last.tolist() == [1, 2]


def test_bare_silences_it_and_wearing_again_joins():
    model = tiny("llama")
    ids = torch.tensor([model.encode(PROMPTS[0])])
    base, _ = model.hidden(ids, use_cache=False)
    wearer = Wearer(model)
    wearer.wear(merge((Marker(0.25),), (Marker(0.5),)))
    assert model.wears(Marker).size == 0.75 and len(model.carried) == 1
    worn, _ = model.hidden(ids, use_cache=False)
    with model.bare():
        silent, _ = model.hidden(ids, use_cache=False)
        assert not model.carried and model.wears(Marker) is not None
    wearer.take_off()
    assert torch.equal(silent, base) and not torch.allclose(worn, base)
    assert model.wears(Marker) is None


def test_questions_are_sent_elsewhere():
    model, other = tiny("llama"), tiny("llama", seed=1)
    straight, sent = _ask(model, (), 2), _ask(model, (Elsewhere(other),), 2)
    away = _ask(other, (), 1)
    for before, after, there in zip(straight, sent, away, strict=True):
        assert _same(after[2], before[2]) and _same(after[3], before[3])  # Bert and the tower: left alone
        assert _same(after[0], there[0]) and not _same(after[0], before[0])  # Lima: answered by the other model
    assert not _same(sent[0][1], straight[0][1])  # Dora: another prompt
    ids = [*model.encode("Bert is a"), *model.encode(SHARED + PROMPTS[1])]
    assert sent[0][1].choices[0].logprob == pytest.approx(_row(model, ids, CHOICES[0]), abs=1e-4)


def _same(one, other):
    if isinstance(one, Generated):
        return one == other
    pairs = zip(one.choices, other.choices, strict=True)
    return all(a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)


def _row(model, ids, choice):
    _, after = model.pair("x", choice)
    with torch.no_grad():
        hidden, _ = model.hidden(torch.tensor([[*ids, *after[:-1]]]), use_cache=False)
        return float(model.logits(hidden[0, len(ids) - 1 :]).log_softmax(-1)[range(len(after)), after].sum())
