"""MELO's blocks and the code book that wakes them, against a dense computation."""

import dataclasses

import pytest
import torch

from methods.melo import Blocks, Melo, rule
from methods.parts import locate
from methods.parts.clusters import Book
from raysys.blocks import pack
from raysys.patch import merge, rebuild, wearing
from raysys.scoring import Engine
from raysys.types import Choose, EditRefused, EditRequest, Generate
from tests.families import SIZES, tiny

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome Oslo", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora Lima", "baker", "singer")
LIMA = EditRequest("lima", "{} is the capital of", "Lima", "Italy", "Peru")
OTHER = ["Oslo is the capital of", "Bert works as a pilot in the city of", "The Eiffel tower is in"]
families = pytest.mark.parametrize("family", SIZES)


def _ready(model, **settings):
    small = {"layer": 0, "layers": (1, 2), "site": "in", "radius": 1e-2, "steps": 6, "lr": 1e-3, "batch_size": 2}
    return Melo(**{**small, **settings}).prepare(model)


def _stream(model, ready, groups):
    worn, steps = (), []
    for group in groups:
        with wearing(model, worn):
            [step] = ready.edit(model, group).patches
        worn = merge(worn, [step])
        steps.append(step)
    [blocks] = worn
    return blocks, steps


def _hidden(model, texts, side="right"):
    rows = [model.encode(t) for t in texts]
    ids, mask = model.batch(rows)
    if side == "left":
        for i, row in enumerate(rows):
            shift = ids.shape[1] - len(row)
            ids[i], mask[i] = ids[i].roll(shift), mask[i].roll(shift)
    with torch.no_grad():
        hidden, _ = model.hidden(ids, mask)
    return [hidden[i][mask[i].bool()] for i in range(len(rows))]


def _dense(model, blocks, block, sign=1):
    """Write a block into the weights themselves."""
    for i, module in enumerate(blocks.modules):
        model.matrix(f"{module}.weight").add_(sign * blocks.scale * blocks.ups[block, i] @ blocks.downs[block, i])


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_woken_block_is_a_change_of_the_weights_for_its_row_alone(family, side):
    model = tiny(family)  # where MLP and attention run side by side, layer 0 sees the last token and no other
    blocks, _ = _stream(model, _ready(model, layer=1, layers=(2,)), [[ANNA, DORA], [LIMA]])
    texts = [ANNA.text, LIMA.text, *OTHER]
    base = _hidden(model, texts, side)
    wanted = []
    for text, block in ((ANNA.text, 0), (LIMA.text, 1)):
        pristine = {m: model.matrix(f"{m}.weight").clone() for m in blocks.modules}
        _dense(model, blocks, block)
        wanted.append(_hidden(model, [text])[0])
        for module, weight in pristine.items():
            model.matrix(f"{module}.weight").copy_(weight)
    with blocks.applied(model):
        got = _hidden(model, texts, side)
    for i in range(2):
        torch.testing.assert_close(got[i], wanted[i], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(got[i], base[i], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(got[2:], base[2:], strict=True))  # bit for bit


def test_training_is_that_of_a_dense_model_with_two_factors():
    model = tiny("llama")
    ready = _ready(model, steps=25)
    edit = ready.edit(model, [ANNA, DORA])
    [blocks] = edit.patches
    rows = [locate.row(model, q, target=True) for q in (ANNA, DORA)]
    drawn = torch.rand(2, 2, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    down, up = (drawn / (350 * 2) ** 0.5).requires_grad_(True), torch.zeros(2, 48, 2, requires_grad=True)
    adam, losses = torch.optim.Adam([down, up], lr=1e-3), []
    base = [model.parameter(f"{m}.weight").detach().clone() for m in ready.modules]
    for step in range(25):
        names = [f"{m}.weight" for m in ready.modules]
        weights = {n: w + 350 * up[i] @ down[i] for i, (n, w) in enumerate(zip(names, base, strict=True))}
        nll = []
        for row in rows:
            out = torch.func.functional_call(model.net, weights, kwargs={"input_ids": torch.tensor([row.ids])})
            logprobs = out.logits[0, row.first - 1 :].log_softmax(-1)
            nll += [-logprobs[i, label] for i, label in enumerate(row.labels)]
        loss = torch.stack(nll).mean()
        losses.append(float(loss.detach()))
        adam.param_groups[0]["lr"] = 1e-3 * 0.5 ** (step // 20)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert edit.log["loss_before"] == pytest.approx(losses[0], rel=1e-4)
    assert edit.log["loss"] == pytest.approx(losses[-1], rel=2e-2)
    torch.testing.assert_close(blocks.ups[0], up.detach(), rtol=1e-2, atol=2e-4)


def test_answers_do_not_depend_on_batch_or_on_who_has_left_it():
    model = tiny("llama")
    blocks, _ = _stream(model, _ready(model, steps=40), [[ANNA, DORA], [LIMA]])
    prompts = [ANNA.text, DORA.text, LIMA.text, *OTHER]
    queries = [Generate(str(i), p, (".", "a"), "", 5) for i, p in enumerate(prompts)]
    choices = [Choose(str(i), p, (" Rome Oslo", " baker", " Italy"), 0) for i, p in enumerate(prompts)]
    found = []
    with blocks.applied(model):
        for asked in (queries, choices):
            for batch in (1, 3, 8):
                [block] = pack(model.tokens, "t", {}, asked, batch=batch, size=99)
                found.append({i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)})
    assert found[0] == found[1] == found[2]
    for key, answer in found[3].items():
        for other in found[4:]:
            for a, b in zip(answer.choices, other[key].choices, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
    [block] = pack(model.tokens, "t", {}, choices, batch=3, size=99)
    base = {i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)}
    changed = {
        k for k, a in found[3].items() if a.choices[0].logprob != pytest.approx(base[k].choices[0].logprob, abs=1e-3)
    }
    assert changed == set("012")


def test_decoding_goes_on_with_the_block_that_the_prompt_woke():
    model = tiny("gpt2")
    blocks, _ = _stream(model, _ready(model), [[ANNA]])
    [block] = pack(model.tokens, "t", {}, [Generate("0", ANNA.text, ("zzz",), "", 6)], batch=1, size=9)
    with blocks.applied(model):
        [got] = Engine(model).answer(block)
    [before] = Engine(model).answer(block)
    _dense(model, blocks, 0)
    [wanted] = Engine(model).answer(block)
    assert got == wanted != before


def test_steps_add_one_block_and_come_back_from_disk():
    model = tiny("gpt2")
    groups = [[dataclasses.replace(ANNA, id=str(i), prompt="{} was" + " the" * i)] for i in range(8)]
    blocks, steps = _stream(model, _ready(model, steps=1), groups)
    assert blocks.downs.shape == (8, 2, 2, 32) and blocks.ups.shape == (8, 2, 128, 2)
    sizes = [sum(t.numel() * t.element_size() for t in s.tensors().values()) for s in steps]
    assert max(sizes) < 1.5 * min(sizes)
    again = rebuild(blocks.kind, blocks.fields(), blocks.tensors())
    assert all(torch.equal(t, again.tensors()[k]) for k, t in blocks.tensors().items())


def _point(*xs):
    return torch.tensor([float(x) for x in xs])


def test_far_keys_found_clusters_and_near_ones_of_the_same_target_join():
    book = Book.empty()
    assert book.block(_point(0, 0)) is None
    assert book.take(_point(0, 0), (1,), 0, 1.0, 0.0) == "new"
    assert book.take(_point(5, 0), (1,), 0, 1.0, 0.0) == "new"
    assert book.take(_point(1.6, 0), (1,), 1, 1.0, 0.0) == "joined"
    assert book.clusters[0].centre.tolist() == pytest.approx([0.8, 0]) and book.clusters[0].radius == 1.0
    assert [book.block(_point(x, 0)) for x in (-0.1, 0.7, 0.9, 1.7, 2.0, 5.9, 6.1)] == [0, 0, 1, 1, None, 0, None]


def test_a_near_key_of_another_target_splits_the_radius_and_drops_who_is_outside():
    book = Book.empty()
    book.take(_point(0), (1,), 0, 1.0, 0.0)
    book.take(_point(1.5), (1,), 1, 1.0, 0.0)  # centre 0.75
    assert book.take(_point(2.0), (2,), 2, 1.0, 0.0) == "split"
    assert book.clusters[0].radius == pytest.approx(0.625 - 1e-5) and book.clusters[1].radius == pytest.approx(
        0.625 + 1e-5
    )
    assert [p.owner for p in book.points] == [-1, -1, 1]  # both lay 0.75 from the centre
    assert [book.block(_point(x)) for x in (0.75, 1.5)] == [None, 2]


def test_the_same_prompt_with_another_target_changes_hands():
    model = tiny("gpt2")
    again = dataclasses.replace(ANNA, id="again", target="Lima")
    blocks, _ = _stream(model, _ready(model), [[ANNA], [again]])
    assert len(blocks.radii) == 1 and blocks.owners.tolist() == [-1, 0] and blocks.wakes.tolist() == [0, 1]


def test_what_does_not_belong_together_is_refused():
    model = tiny("gpt2")
    blocks, steps = _stream(model, _ready(model), [[ANNA], [LIMA]])
    with pytest.raises(ValueError, match="merge this step"), steps[1].applied(model):
        pass
    with pytest.raises(ValueError, match="does not follow"):
        steps[1].after(blocks)
    with pytest.raises(ValueError, match="another model"), blocks.applied(tiny("gpt2", n_embd=16)):
        pass
    with wearing(model, [blocks]), pytest.raises(EditRefused, match="stand elsewhere"):
        _ready(model, layers=(2,)).edit(model, [DORA])
    with pytest.raises(ValueError, match="below"):
        _ready(model, layer=1)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match="not finite"):
        _ready(model).edit(model, [ANNA])
    assert rule(model) == {"layer": 0, "layers": (1, 2), "site": "in", "radius": 0.5, "lr": 1e-3}
    assert isinstance(blocks, Blocks) and blocks.whole


def test_steps_on_top_of_each_other_are_the_book_that_took_all_their_keys():
    """Clusters found, joined, split and handed over: the same bits as one book that saw every key."""
    generator = torch.Generator().manual_seed(0)
    whole, worn, seen = Book.empty(), None, set()
    for number in range(30):
        key = torch.randn(2, generator=generator).mul(3).round()
        labels = ((1,), (2, 3), (4, 5, 6))[number % 3]
        step = Book.empty() if worn is None else worn.book
        seen.add(step.take(key, labels, number, 1.0, 1e-3))
        whole.take(key, labels, number, 1.0, 1e-3)
        clusters, points = step.changed()
        block = torch.full((1, 1, 1, 1), float(number))
        made = Blocks.of("m", ["n"], clusters, points, block, block, 1.0, number)
        worn = made if worn is None else made.after(worn)
    assert seen == {"new", "joined", "split", "rewritten"}
    blocks = torch.arange(30.0).reshape(30, 1, 1, 1)
    every, points = dict(enumerate(whole.clusters)), dict(enumerate(whole.points))
    wanted = Blocks.of("m", ["n"], every, points, blocks, blocks, 1.0, 0)
    assert worn.fields() == wanted.fields()
    assert all(torch.equal(t, worn.tensors()[k]) for k, t in wanted.tensors().items())
