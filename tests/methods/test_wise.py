"""WISE's side memories: what the loss is, which memory answers, how they are saved, merged and stored."""

import dataclasses

import pytest
import torch

from methods.parts import locate, recall
from methods.parts.sides import Memory, SideMemory, activation, packed, project, ties
from methods.wise import Lesson, Wise, rule
from raysys.blocks import pack
from raysys.patch import merge, rebuild, wearing
from raysys.scoring import Engine
from raysys.types import Choose, EditRefused, EditRequest, Generate
from tests.families import SIZES, tiny

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome Oslo", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora Lima", "baker", "singer")
LIMA = EditRequest("lima", "{} is the capital of", "Lima", "Italy", "Peru")
FACTS = [ANNA, DORA, LIMA, dataclasses.replace(ANNA, id="again", target="pilot")]
OTHER = ["Lima is the capital of", "Bert works as a pilot in the city of", "The Eiffel tower is in"]
SMALL = {"layer": 1, "site": "out", "steps": 6, "lr": 0.3, "margins": (0.1, 2.0, 1.0), "reach": 0.5}
families = pytest.mark.parametrize("family", SIZES)


def _ready(model, tmp_path, **settings):
    return Wise(**{**SMALL, "save": 50, "merge": 100, "contexts": ((5, 3),), **settings}).prepare(model, tmp_path)


def _stream(model, ready, requests):
    worn, steps = (), []
    for request in requests:
        with wearing(model, worn):
            [step] = ready.edit(model, [request]).patches
        worn = merge(worn, [step])
        steps.append(step)
    [memory] = worn
    return memory, steps


@families
@pytest.mark.parametrize("site", ["in", "out"])
def test_the_loss_is_that_of_a_model_with_the_copy_in_place(family, site, tmp_path):
    model = tiny(family)
    ready = _ready(model, tmp_path, site=site)
    lesson = Lesson(model, DORA, ready.contexts.texts, ready.module, ready.settings)
    weight = model.parameter(f"{ready.module}.weight")
    base = weight.data.clone()
    side = base + 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    (nll, margins), _ = lesson.loss(side)
    rows = [locate.row(model, DORA, c, target=True) for c in ready.contexts.texts]
    act = activation(model)
    total, inside, outside = 0.0, [], []
    for row, context in zip(rows, ready.contexts.texts, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            _, own = model.through(ready.module, ids)
            weight.data.copy_(side)
            _, there = model.through(ready.module, ids)
            logprobs = model.net(input_ids=ids).logits[0].log_softmax(-1)
            weight.data.copy_(base)
        total -= sum(float(logprobs[row.first - 1 + i, t]) for i, t in enumerate(row.labels)) / len(row.labels)
        first, last = recall.subject(model, DORA, context)
        assert model.decode(row.ids[first : last + 1]).strip() == DORA.subject
        distance = (act(there) - act(own)).norm(dim=-1)[0]
        within = torch.zeros(len(row.ids), dtype=torch.bool)
        within[first : last + 1] = True
        inside.append(float(distance[within].mean()))
        outside.append(float(distance[~within].mean()))
    assert float(nll) == pytest.approx(total / len(rows), rel=1e-3)
    most, least, gap = ready.settings.margins
    wanted = [[o - i + gap for o in outside for i in inside], [o - most for o in outside], [least - i for i in inside]]
    wanted = sum(sum(above) / len(above) for group in wanted if (above := [v for v in group if v > 0]))
    assert float(margins) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_only_the_shared_out_entries_change_and_none_goes_too_far(tmp_path):
    model = tiny("gpt2")
    ready = _ready(model, tmp_path, norm_constraint=0.02, lr=5.0)
    memory, _ = _stream(model, ready, [ANNA, DORA])
    weight = model.parameter(f"{ready.module}.weight").data
    change = memory.memories[0].change(weight).view(-1)
    mask = memory.memories[0].mask(weight.numel())
    assert 0.15 < float(mask.float().mean()) < 0.25 and not change[~mask].any()
    assert 0.019 < float(change.abs().max()) <= 0.02 + 1e-6


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_that_excite_it_get_the_side_memorys_answer_and_others_the_models(family, side, tmp_path):
    model = tiny(family)
    ready = _ready(model, tmp_path, reach=0.99)
    memory, _ = _stream(model, ready, [ANNA])
    base, before, mask = _batch(model, [ANNA.text, *OTHER], side)
    weight = model.parameter(f"{ready.module}.weight")
    found = weight.data.clone()
    weight.data.add_(memory.memories[0].change(found))
    wanted, _, _ = _batch(model, [ANNA.text, *OTHER], side)
    weight.data.copy_(found)
    with memory.applied(model):
        got, after, _ = _batch(model, [ANNA.text, *OTHER], side)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[0], base[0], atol=1e-3)
    excited = [_activity(model, ready.module, memory, text) >= 0.99 * memory.floors[0] for text in OTHER]
    assert not all(excited)
    for i, there in enumerate(excited, 1):
        same = torch.equal(before[i][mask[i]], after[i][mask[i]])  # bit for bit
        assert same != bool(there)


def _activity(model, module, memory, text):
    weight = model.parameter(f"{module}.weight")
    with torch.no_grad():
        given, own = model.through(module, torch.tensor([model.encode(text)]))
        there = project(model, module, given, weight.data + memory.memories[0].change(weight.data))
    act = activation(model)
    return (act(there) - act(own)).norm(dim=-1).mean()


def _batch(model, texts, side):
    rows = [model.encode(t) for t in texts]
    ids, mask = model.batch(rows)
    if side == "left":
        for i, row in enumerate(rows):
            shift = ids.shape[1] - len(row)
            ids[i], mask[i] = ids[i].roll(shift), mask[i].roll(shift)
    with torch.no_grad():
        hidden, _ = model.hidden(ids, mask)
    last = [ids.shape[1] - 1 if side == "left" else len(row) - 1 for row in rows]
    return model.logits(hidden[range(len(rows)), last]), hidden, mask.bool()


def test_answers_do_not_depend_on_batch_or_on_who_has_left_it(tmp_path):
    model = tiny("llama")
    memory, _ = _stream(model, _ready(model, tmp_path, reach=0.9, save=1, merge=50), [ANNA, DORA])
    assert len(memory.memories) == 2
    prompts = [ANNA.text, DORA.text, *OTHER]
    queries = [Generate(str(i), p, (".", "a"), "", 5) for i, p in enumerate(prompts)]
    choices = [Choose(str(i), p, (" Rome Oslo", " baker", " Paris"), 0) for i, p in enumerate(prompts)]
    found = []
    with memory.applied(model):
        for asked in (queries, choices):
            for batch in (1, 3, 8):
                [block] = pack(model.tokens, "t", {}, asked, batch=batch, size=99)
                found.append({i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)})
    assert found[0] == found[1] == found[2]
    for key, answer in found[3].items():
        for other in found[4:]:
            for a, b in zip(answer.choices, other[key].choices, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_decoding_goes_on_with_the_memory_that_the_prompt_chose(tmp_path):
    model = tiny("gpt2")
    ready = _ready(model, tmp_path, reach=0.9, steps=20)
    memory, _ = _stream(model, ready, [ANNA])
    [block] = pack(model.tokens, "t", {}, [Generate("0", ANNA.text, ("zzz",), "", 6)], batch=1, size=9)
    with memory.applied(model):
        [got] = Engine(model).answer(block)
    weight = model.parameter(f"{ready.module}.weight")
    weight.data.add_(memory.memories[0].change(weight.data))
    [wanted] = Engine(model).answer(block)
    assert got == wanted


def test_memories_are_saved_and_merged_when_their_time_comes(tmp_path):
    model = tiny("gpt2")
    ready = _ready(model, tmp_path, save=1, merge=2)
    weight = model.parameter(f"{ready.module}.weight").data
    memory, steps = _stream(model, ready, FACTS)
    assert [(s.live, s.kept, s.edits) for s in steps] == [(False, 0, 1), (False, 0, 2), (False, 1, 3), (False, 1, 4)]
    assert len(memory.memories) == 2
    with wearing(model, [steps[0]]):
        alone = ready.edit(model, [DORA]).log
    assert memory.memories[0].floor == pytest.approx(min(steps[0].memories[0].floor, alone["floor"]))
    loner = _ready(model, tmp_path, save=1, merge=50)
    apart, _ = _stream(model, loner, FACTS[:2])
    wanted = ties([m.change(weight) for m in apart.memories], ready.settings.density)
    torch.testing.assert_close(memory.memories[0].change(weight), wanted)


def test_a_window_of_edits_shares_one_mask_which_is_stored_once(tmp_path):
    model = tiny("gpt2")
    memory, steps = _stream(model, _ready(model, tmp_path, save=2, merge=50), FACTS)
    assert [len(s.masks) for s in steps] == [1, 0, 1, 0] and [s.live for s in steps] == [True, False, True, False]
    one, two = memory.memories
    assert not torch.equal(one.bits, two.bits) and memory.masks.shape[0] == 2
    again = rebuild(memory.kind, memory.fields(), memory.tensors())
    assert all(torch.equal(t, again.tensors()[k]) for k, t in memory.tensors().items())
    sizes = [sum(t.numel() * t.element_size() for t in s.tensors().values()) for s in steps]
    assert sizes[1] < sizes[0] < 0.3 * model.parameter(f"{memory.module}.weight").numel() * 4


def test_the_most_excited_of_several_memories_answers(tmp_path):
    model = tiny("gpt2")
    module = model.mlp_out(1)
    weight = model.parameter(f"{module}.weight").data
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    changes = [scale * torch.randn(weight.numel(), generator=torch.Generator().manual_seed(3)) for scale in (0.1, 0.3)]
    none = torch.zeros(0)
    like = SideMemory(
        module=module, masks=none, deltas=none, counts=none, decays=none, floors=none, live=False, edits=2, reach=1.0,
        longest=100,
    )  # fmt: skip
    for floors, chosen in (((0.0, 0.0), 1), ((0.0, 1e6), 0), ((1e6, 1e6), None)):
        memory = packed(like, [Memory.of(mask, c, 1.0, f) for c, f in zip(changes, floors, strict=True)])
        with memory.applied(model):
            got, _, _ = _batch(model, [OTHER[0]], "right")
        found = weight.clone()
        if chosen is not None:
            weight.add_(changes[chosen].view(weight.shape))
        wanted, _, _ = _batch(model, [OTHER[0]], "right")
        weight.copy_(found)
        torch.testing.assert_close(got, wanted)


def test_ties_keeps_the_largest_and_averages_those_who_agree():
    one, two = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([2.0, 5.0, 0.2, -2.5])
    torch.testing.assert_close(ties([one, two], 0.75), torch.tensor([3.0, 5.0, 0.0, -2.5]))
    torch.testing.assert_close(ties([one], 0.5), torch.tensor([4.0, -3.0, 0.0, 0.0]))


def test_published_decay_shrinks_the_whole_copy(tmp_path):
    model = tiny("gpt2")
    ready = _ready(model, tmp_path, published=True, weight_decay=1e-3)
    memory, _ = _stream(model, ready, [ANNA])
    weight = model.parameter(f"{ready.module}.weight").data
    change, mask = memory.memories[0].change(weight).view(-1), memory.memories[0].mask(weight.numel())
    wanted = weight.view(-1)[~mask] * ((1 - ready.settings.lr * 1e-3) ** ready.settings.steps - 1)
    torch.testing.assert_close(change[~mask], wanted, rtol=1e-3, atol=1e-6)


def test_what_does_not_belong_together_is_refused(tmp_path):
    model = tiny("gpt2")
    ready = _ready(model, tmp_path)
    memory, steps = _stream(model, ready, [ANNA, DORA])
    with pytest.raises(ValueError, match="merge this step"), steps[1].applied(model):
        pass
    with pytest.raises(ValueError, match="does not follow"):
        steps[1].after(memory)
    with pytest.raises(ValueError, match="another model"), memory.applied(tiny("gpt2", n_embd=16)):
        pass
    with wearing(model, [memory]), pytest.raises(EditRefused, match="side memories worn"):
        _ready(model, tmp_path, layer=0).edit(model, [LIMA])
    with pytest.raises(ValueError, match="multiple"):
        _ready(model, tmp_path, save=3, merge=5)
    assert rule(model)["layer"] == 2
