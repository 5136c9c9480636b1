"""The engine's short cuts change the cost, never the answer."""

from collections.abc import Sequence

import pytest
import torch

from raysys.blocks import Block, by_prefix, pack
from raysys.model import Model
from raysys.scoring import Engine
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Query
from tests import families

SHARED = "The capital of Norway is Oslo . The capital of Peru is Lima . "
FAMILIES = list(families.SIZES)


def answers(model: Model, queries: Sequence[Query], batch: int = 3, size: int = 8) -> dict[str, Answer]:
    found: dict[str, Answer] = {}
    engine = Engine(model)
    for group in by_prefix(queries):
        for block in pack(model.tokens, "test", {}, group, batch=batch, size=size):
            for item, answer in zip(block.items, engine.answer(Block.loads(block.dumps())), strict=True):
                found[item.query.id] = answer
    assert set(found) == {q.id for q in queries}
    return found


def choose(shared: str = SHARED) -> list[Choose]:
    prompts = ["Anna was born in", "The capital of France is the city of", "Bert works as a pilot . Carla works as"]
    cities = (" Rome", " Paris", " Oslo", " Lima")
    choices = (cities, (" the capital of Italy .", " Paris"), (" a singer", " a baker ."))
    return [
        Choose(f"{i}{bool(shared)}", shared + p, c, gold=0, shared=shared)
        for i, (p, c) in enumerate(zip(prompts, choices, strict=True))
    ]


def plain_logprob(model: Model, prompt: str, choice: str) -> tuple[float, int, int]:
    """One sequence, no cache, no batch, all logits: what the short cuts must reproduce."""
    head, tail = model.pair(prompt, choice)
    ids = (head + tail)[-(model.max_length + 1) :]
    logits = model.net(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-len(tail) :]
    picked = logits[torch.arange(len(tail)), torch.tensor(tail)]
    return float(picked.sum()), len(tail), int((logits.argmax(-1) == torch.tensor(tail)).sum())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [SHARED, ""], ids=["shared prefix", "no prefix"])
def test_choices_score_as_one_plain_forward_each(family: str, shared: str) -> None:
    model, queries = families.tiny(family), choose(shared)
    for query, answer in ((q, a) for q in queries for a in [answers(model, queries)[q.id]]):
        assert isinstance(answer, Chosen)
        for choice, scored in zip(query.choices, answer.choices, strict=True):
            logprob, tokens, right = plain_logprob(model, query.prompt, choice)
            assert scored.logprob == pytest.approx(logprob, abs=1e-4)
            assert (scored.tokens, scored.right) == (tokens, right)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_batch_size_changes_rounding_only(batch: int) -> None:
    model = families.tiny("llama")
    one, other = answers(model, choose(), batch=3), answers(model, choose(), batch=batch)
    for key, answer in one.items():
        assert isinstance(answer, Chosen)
        again = other[key]
        assert isinstance(again, Chosen)
        assert [c.logprob for c in again.choices] == pytest.approx([c.logprob for c in answer.choices], abs=1e-4)


def test_too_long_a_prompt_loses_its_left_end_and_its_shared_prefix() -> None:
    model = families.tiny("gpt2")  # reads 64 tokens
    prompt = SHARED + "Anna works as a baker . " * 8 + "Bert is a"
    query = Choose("long", prompt, (" pilot", " singer ."), 0, shared=SHARED)
    [block] = pack(model.tokens, "test", {}, [query], batch=1, size=1)
    assert block.prefix == ()
    [answer] = Engine(model).answer(block)
    assert isinstance(answer, Chosen)
    assert answer.choices[1].logprob == pytest.approx(plain_logprob(model, query.prompt, " singer .")[0], abs=1e-4)


def generate(shared: str) -> list[Generate]:
    prompts = ["Anna was born in", "The capital of France is the city of", "Bert", "Carla works as a pilot . I"]
    stops = ("baker",)
    return [Generate(str(i), shared + p, stops, gold="", max_tokens=8, shared=shared) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [SHARED, ""], ids=["shared prefix", "no prefix"])
def test_generation_in_batches_gives_the_text_of_one_prompt_alone(family: str, shared: str) -> None:
    model, queries = families.tiny(family), generate(shared)
    found = answers(model, queries)
    for query in queries:
        ids = torch.tensor([model.encode(query.prompt)])
        out = model.net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=query.max_tokens, do_sample=False,
            pad_token_id=model.pad_id, eos_token_id=sorted(model.eos_ids),
        )  # fmt: skip
        answer = found[query.id]
        assert isinstance(answer, Generated)
        assert answer.text == model.decode(out[0, ids.shape[1] :]).split("baker", 1)[0]


def test_generation_ends_at_a_stop_and_leaves_it_out() -> None:
    model = families.tiny("llama")
    [free] = answers(model, [Generate("free", "Anna was born in", (), gold="", max_tokens=8)]).values()
    assert isinstance(free, Generated)
    stop = free.text[4:6]
    [answer] = answers(model, [Generate("cut", "Anna was born in", (stop,), gold="", max_tokens=8)]).values()
    assert isinstance(answer, Generated)
    assert answer.text == free.text.split(stop, 1)[0]
    assert answer.tokens < 8


def test_a_prefix_is_run_once_for_all_blocks_of_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = families.tiny("llama"), []
    plain = Model.hidden
    monkeypatch.setattr(Model, "hidden", lambda self, ids, **k: calls.append(tuple(ids.shape)) or plain(self, ids, **k))
    engine = Engine(model)
    blocks = [b for g in by_prefix(choose()) for b in pack(model.tokens, "test", {}, g, batch=4, size=1)]
    prefix = len(blocks[0].prefix)
    assert len(blocks) == 3
    assert prefix > 10
    for block in blocks:
        engine.answer(block)
    assert calls.count((1, prefix)) == 1
    engine.forget()
    engine.answer(blocks[0])
    assert calls.count((1, prefix)) == 2


def test_four_letters_cost_one_forward_row() -> None:
    model, rows = families.tiny("llama"), []
    query = Choose("letters", "The capital of", (" a", " of", " in", " is"), 0)
    [block] = pack(model.tokens, "test", {}, [query], batch=8, size=8)
    plain = model.hidden
    model.hidden = lambda ids, **k: rows.append(len(ids)) or plain(ids, **k)  # type: ignore[method-assign,func-returns-value]
    Engine(model).answer(block)
    assert rows == [1]


def test_probes_of_edits_made_between_two_snapshots_stand_in_blocks_of_their_own() -> None:
    model = families.tiny("llama")
    queries = [Choose(str(i), "Anna is", (" a", " the"), 0, edit=i) for i in (0, 1, 2, 5, 6, 10)]
    cuts = (0, 1, 5, 10)
    blocks = [b for g in by_prefix(queries, cuts) for b in pack(model.tokens, "t", {}, g, batch=4, size=8, cuts=cuts)]
    assert sorted((b.edits, len(b.items)) for b in blocks) == [((0, 0), 1), ((0, 1), 1), ((1, 5), 2), ((5, 10), 2)]


def test_a_block_is_named_by_its_contents() -> None:
    model = families.tiny("llama")
    [one] = pack(model.tokens, "t", {"version": "1"}, choose()[:1], batch=4, size=8)
    [same] = pack(model.tokens, "t", {"version": "1"}, choose()[:1], batch=4, size=8)
    [other] = pack(model.tokens, "t", {"version": "2"}, choose()[:1], batch=4, size=8)
    assert one.id == same.id == Block.loads(one.dumps()).id != other.id


def test_generating_more_than_the_context_holds_is_refused() -> None:
    model = families.tiny("gpt2")  # reads 64 tokens
    query = Generate("long", "Anna is", (), gold="", max_tokens=64)
    with pytest.raises(ValueError, match=r"long: 64 tokens to generate leave no room .* lower max_tokens"):
        list(pack(model.tokens, "test", {}, [query], batch=1, size=1))


def test_text_that_grows_past_a_sliding_window_does_not_depend_on_the_batch() -> None:
    model = families.tiny("mistral", sliding_window=24)
    shared = "Anna was born in Rome . Oslo is the capital of "
    prompts = (shared + "Norway and Lima of Peru", shared + "Norway", shared + "Lima is")
    queries = [Generate(str(i), p, (), "", 20, shared=shared) for i, p in enumerate(prompts)]
    found = []
    for batch in (1, 3):
        [block] = pack(model.tokens, "window", {}, queries, batch=batch, size=9)
        answers = zip(block.items, Engine(model).answer(block), strict=True)
        found.append({i.query.id: a for i, a in answers})
    assert found[0] == found[1]
    for query in queries:
        ids = torch.tensor([model.encode(query.prompt)])
        for _ in range(20):
            with torch.no_grad():
                ids = torch.cat([ids, model.net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in model.eos_ids:
                break
        wanted = model.decode(ids[0, len(model.encode(query.prompt)) :])
        assert found[0][query.id].text == wanted  # type: ignore[union-attr]
