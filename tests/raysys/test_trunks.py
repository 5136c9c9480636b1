"""What is kept from one snapshot to the next changes the cost of an answer, never the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raysys.blocks import Block, by_prefix, pack
from raysys.model import Model
from raysys.patch import Dense, LowRank, Wearer
from raysys.scoring import Engine
from raysys.trunks import Trunks, first_edited
from raysys.types import Answer, Chosen, Generate, Generated, Patch, Query
from tests import families
from tests.raysys.test_scoring import SHARED, choose, generate

FAMILIES = list(families.SIZES)


def blocks(model: Model, queries: list[Query], batch: int = 3, size: int = 8) -> list[Block]:
    groups = by_prefix(queries)
    return [b for g in groups for b in pack(model.tokens, "t", {}, g, batch=batch, size=size)]


def edit(model: Model, layer: int, size: float = 0.02, seed: int = 0) -> tuple[Patch, ...]:
    weight = f"{model.mlp_out(layer)}.weight"
    d_out, d_in = model.matrix(weight).shape
    made = torch.Generator().manual_seed(seed)
    return (LowRank(weight, size * torch.randn(d_out, 1, generator=made), torch.randn(1, d_in, generator=made)),)


def answers(model: Model, engine: Engine, steps: list[tuple[Patch, ...]], todo: list[Block]) -> list[list[Answer]]:
    """Every block under one snapshot after another."""
    wearer, found = Wearer(model), []
    for patches in steps:
        wearer.wear(patches)
        engine.wears(patches)
        found.append([a for b in todo for a in engine.answer(b)])
    wearer.take_off()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [SHARED, ""], ids=["shared prefix", "no prefix"])
def test_scores_over_a_kept_trunk_are_the_same_bits(family: str, dtype: torch.dtype, shared: str) -> None:
    model = families.tiny(family, dtype)
    todo = blocks(model, list(choose(shared)))
    steps = [(), edit(model, 1), edit(model, 2, seed=1), edit(model, 1, seed=2), ()]
    engine = Engine(model)
    assert answers(model, engine, steps, todo) == answers(model, Engine(model, trunk_memory=0), steps, todo)
    assert engine.trunks is not None
    assert engine.trunks.hits >= 3 * len(todo)  # the first snapshot with an edit records, three reuse


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shared", [SHARED, ""], ids=["shared prefix", "no prefix"])
def test_drafts_do_not_change_the_text(family: str, dtype: torch.dtype, shared: str) -> None:
    model = families.tiny(family, dtype)
    todo = blocks(model, list(generate(shared)))
    steps = [(), edit(model, 1, 1e-4), edit(model, 1, 0.2, 1), edit(model, 0, 0.2), edit(model, 2, 1e-4, 3), ()]
    engine = Engine(model)
    assert answers(model, engine, steps, todo) == answers(
        model, Engine(model, trunk_memory=0, drafts=False), steps, todo
    )
    if dtype == torch.float32:
        assert engine.writer.drafted > engine.writer.accepted > 0  # some drafts held, some did not


def test_an_unchanged_answer_is_not_generated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.tiny("llama")
    [block] = blocks(model, list(generate(SHARED)), batch=4)
    engine, passes = Engine(model), []
    first = engine.answer(block)
    plain = Model.hidden
    monkeypatch.setattr(Model, "hidden", lambda self, ids, *a, **k: passes.append(1) or plain(self, ids, *a, **k))
    engine.wears(())
    assert engine.answer(block) == first
    assert len(passes) <= 2 + len(block.items)  # the prefix, all drafts in one pass, and near ties if there are any


@pytest.mark.parametrize("batch", [1, 3, 8, 0])
def test_texts_do_not_depend_on_the_batch(batch: int) -> None:
    model = families.tiny("gpt_neox")
    found: list[dict[str, Answer]] = []
    for size in (2, batch):
        todo = blocks(model, list(generate(SHARED)), size)
        found.append({i.query.id: a for b in todo for i, a in zip(b.items, Engine(model).answer(b), strict=True)})
    assert found[0] == found[1]


def test_a_near_tie_is_answered_alone() -> None:
    """Two tokens with one and the same row of the head are always tied: the earlier one is taken, in any batch."""
    model = families.tiny("llama")
    [block] = blocks(model, list(generate("")), batch=4)
    head = model.net.get_output_embeddings().weight
    with torch.no_grad():
        head[5:] = head[:1]
    texts = [a for a in Engine(model).answer(block) if isinstance(a, Generated)]
    alone = [Engine(model).answer(replace(block, items=(i,)))[0] for i in block.items]
    assert texts == alone


def test_memory_that_does_not_do_is_met_with_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.tiny("llama")
    todo = blocks(model, [*choose(), *generate(SHARED)], batch=8)
    wanted = [a for b in todo for a in Engine(model).answer(b)]
    plain, refused = Model.hidden, []

    def hidden(self: Model, ids: torch.Tensor, *a: object, **k: object) -> object:
        if len(ids) > 2:
            refused.append(len(ids))
            raise torch.OutOfMemoryError("out of memory")
        return plain(self, ids, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "hidden", hidden)
    engine = Engine(model)
    engine.passes.expect(1)
    found = [a for b in todo for a in engine.answer(b)]
    assert refused
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, Generated):
            assert one == other
        else:
            assert isinstance(one, Chosen) and isinstance(other, Chosen)
            values = [[c.logprob for c in a.choices] for a in (one, other)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_memory_that_does_not_do_for_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.tiny("llama")
    [block] = blocks(model, list(choose("")), batch=8)

    def refuse(*a: object, **k: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Model, "hidden", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(model).answer(block)


def test_another_mistake_is_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = families.tiny("llama"), []
    [block] = blocks(model, list(choose("")), batch=8)

    def fail(*a: object, **k: object) -> None:
        calls.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Model, "hidden", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        Engine(model).answer(block)
    assert len(calls) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_edited_block_is_read_off_the_weights(family: str) -> None:
    model = families.tiny(family)
    assert first_edited(model, ()) == model.layers
    assert first_edited(model, edit(model, 2)) == 2
    assert first_edited(model, (*edit(model, 2), *edit(model, 1))) == 1
    embeddings = next(n for n, p in model.net.named_parameters() if p is model.net.get_input_embeddings().weight)
    rows, columns = model.matrix(embeddings).shape
    assert first_edited(model, (Dense(embeddings, torch.zeros(rows, columns)),)) == 0
    assert first_edited(model, (object(),)) == 0


def test_trunks_stay_within_their_memory_and_make_room_when_nobody_asks() -> None:
    model = families.tiny("llama")
    todo = blocks(model, list(choose("")), size=1)
    engine = Engine(model)
    assert engine.trunks is not None
    answers(model, engine, [edit(model, 1)], todo)
    one = max(k.bytes for k in engine.trunks._kept.values())
    small = Engine(model, trunk_memory=one / 2**30)
    plain = answers(model, Engine(model, trunk_memory=0), [edit(model, 1)] * 2, todo)
    assert answers(model, small, [edit(model, 1)] * 2, todo) == plain
    assert small.trunks is not None
    assert 0 < small.trunks.bytes <= one
    kept = set(small.trunks._kept)
    for _ in range(4):
        answers(model, small, [edit(model, 1)], todo[-1:])
    assert set(small.trunks._kept) != kept


def test_a_trunk_goes_to_host_memory_only_where_fetching_it_is_quicker() -> None:
    model = families.tiny("llama")
    engine = Engine(model)
    answers(model, engine, [edit(model, 1)], blocks(model, list(choose("")), batch=8))
    assert engine.trunks is not None
    [kept] = engine.trunks._kept.values()
    for rate, there in ((1e3, False), (1e12, True)):
        trunks = Trunks(model.device, near=0, far=2**30, _rate=rate)
        trunks.put("x", kept.ids, kept.trunk, seconds=0.01)
        assert (trunks.get("x", kept.ids, 1) is not None) is there
        assert trunks.get("x", kept.ids, 0) is None
        assert trunks.get("x", kept.ids + 1, 1) is None


def test_log_probabilities_in_the_models_own_type_are_coarser() -> None:
    model = families.tiny("llama", torch.bfloat16)
    [block] = blocks(model, list(choose("")), batch=8)
    values: dict[str, list[float]] = {}
    for engine in (Engine(model), Engine(model, softmax="model")):
        answers = [a for a in engine.answer(block) if isinstance(a, Chosen)]
        values[engine.softmax] = [c.logprob for a in answers for c in a.choices]
    assert values["float32"] == pytest.approx(values["model"], rel=0.05)
    single = [c for c in values["model"] if c == float(torch.tensor(c).bfloat16())]
    assert len(single) > sum(c == float(torch.tensor(c).bfloat16()) for c in values["float32"])


def test_a_query_that_generates_keeps_its_own_length() -> None:
    model = families.tiny("llama")
    [block] = blocks(model, [Generate("1", "Anna was born in", (), "", 5)], batch=1)
    engine = Engine(model)
    lengths = set()
    for _ in range(2):
        [answer] = engine.answer(block)
        assert isinstance(answer, Generated)
        lengths.add(answer.tokens)
        engine.wears(())
    assert len(lengths) == 1 and max(lengths) <= 5
