"""GRACE's code book: which key answers, how keys and radii grow, and a search that runs the tail alone."""

import dataclasses

import pytest
import torch

from methods import grace
from methods.grace import PRESETS, Codebook, Grace, Tail, rule
from methods.parts import locate, recall
from raysys import patch
from raysys.asking import Asking
from raysys.blocks import pack
from raysys.patch import merge, rebuild, wearing
from raysys.scoring import Engine
from raysys.types import Choose, EditRefused, EditRequest, Generate
from tests.families import SIZES, tiny

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome Oslo", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora", "baker", "singer")
OTHER = ["Lima is the capital of", "Bert works as a pilot in the city of", "The Eiffel tower is in"]
families = pytest.mark.parametrize("family", SIZES)


def _ready(model, **settings):
    return Grace(**{"layer": 1, "site": "in", "radius": 0.05, "steps": 8, **settings}).prepare(model)


def _book(model, ready, requests):
    """The code book after `requests` one by one, and what each did."""
    worn, did = (), []
    for request in requests:
        with wearing(model, worn):
            edit = ready.edit(model, [request])
        worn = merge(worn, edit.patches)
        did.append(edit.log["what"])
    [book] = worn
    return book, did


def _last(model, text, side="right"):
    """Logits at the end of `text`, alone or padded by other prompts in the batch."""
    rows = [model.encode(t) for t in (text, *OTHER)]
    ids, mask = model.batch(rows)
    if side == "left":
        for i, row in enumerate(rows):
            shift = ids.shape[1] - len(row)
            ids[i], mask[i] = ids[i].roll(shift), mask[i].roll(shift)
    with torch.no_grad():
        hidden, _ = model.hidden(ids, mask)
    last = ids.shape[1] - 1 if side == "left" else len(rows[0]) - 1
    return model.logits(hidden[0, last]), hidden, mask.bool()


@families
@pytest.mark.parametrize("site", ["in", "out"])
def test_the_tail_has_the_loss_of_the_whole_model(family, site):
    model = tiny(family)
    row = locate.row(model, ANNA, target=True)
    module = recall.site(model, 1, site)
    tail = Tail(model, row, 1, module)
    value = torch.randn(len(tail.now), generator=torch.Generator().manual_seed(1))

    def put(given, out):
        whole = out.reshape(1, len(row.ids), -1).clone()
        torch.testing.assert_close(given.reshape(1, len(row.ids), -1)[0, row.first - 1], tail.key, rtol=1e-4, atol=1e-5)
        whole[0, row.first - 1] = value
        return whole.reshape(out.shape)

    with torch.no_grad(), model.watching(module, put):
        logits = model.net(input_ids=torch.tensor([row.ids])).logits[0, row.first - 1 :]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels))
    torch.testing.assert_close(tail.loss(value), wanted, rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prompt_is_answered_from_the_book_and_nobody_else(family, side):
    model = tiny(family)
    book, _ = _book(model, _ready(model, steps=60), [ANNA])
    base, before, mask = _last(model, ANNA.text, side)
    with book.applied(model):
        edited, after, _ = _last(model, ANNA.text, side)
    rome = model.pair(ANNA.text, ANNA.continuation)[1][0]
    assert edited.log_softmax(-1)[rome] > base.log_softmax(-1)[rome] + 0.1
    assert torch.equal(before[1:][mask[1:]], after[1:][mask[1:]])  # the other rows, bit for bit
    assert torch.equal(model.net(input_ids=torch.tensor([model.encode(OTHER[0])])).logits, _alone(model, OTHER[0]))


def _alone(model, text):
    return model.net(input_ids=torch.tensor([model.encode(text)])).logits


def test_worn_it_gives_the_loss_that_the_search_ended_with():
    model = tiny("llama")
    few = _ready(model, steps=9).edit(model, [ANNA])
    more = _ready(model, steps=10).edit(model, [ANNA])
    row = locate.row(model, ANNA, target=True)
    ids = torch.tensor([row.ids])
    prompt = torch.arange(len(row.ids))[None] < row.first
    with wearing(model, few.patches), model.asking(Asking.of(prompt)):
        hidden, _ = model.hidden(ids)
    loss = torch.nn.functional.cross_entropy(model.logits(hidden[0, row.first - 1 :]), torch.tensor(row.labels))
    assert float(loss) == pytest.approx(more.log["loss"], rel=1e-4)


def test_answers_do_not_depend_on_batch_or_on_the_pass_that_reads_the_prompt():
    model = tiny("llama")
    book, _ = _book(model, _ready(model, steps=60), [ANNA, DORA])
    prompts = [ANNA.text, DORA.text, *OTHER]
    queries = [Generate(str(i), p, (".",), "", 4) for i, p in enumerate(prompts)]
    choices = [Choose(str(i), p, (" Rome Oslo", " baker", " Paris"), 0) for i, p in enumerate(prompts)]
    found = []
    with book.applied(model):
        for asked in (queries, choices):
            for batch in (1, 3, 8):
                [block] = pack(model.tokens, "t", {}, asked, batch=batch, size=99)
                found.append({i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)})
    assert found[0] == found[1] == found[2]
    for key, answer in found[3].items():
        for other in found[4:]:
            for a, b in zip(answer.choices, other[key].choices, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    first = [answer.choices[0].logprob for answer in found[3].values()]
    [block] = pack(model.tokens, "t", {}, choices, batch=3, size=99)
    base = {i.query.id: a.choices[0].logprob for i, a in zip(block.items, Engine(model).answer(block), strict=True)}
    assert [a == pytest.approx(base[k], abs=1e-4) for k, a in zip(found[3], first, strict=True)].count(False) == 2


def test_a_prompt_with_the_same_target_widens_the_radius_to_hold_it():
    model = tiny("gpt2")
    near = dataclasses.replace(DORA, id="near", target=ANNA.target)
    gap = float((_key(model, ANNA) - _key(model, DORA)).norm())
    book, did = _book(model, _ready(model, radius=gap * 0.6), [ANNA, near])
    assert did == ["new", "joined"] and len(book.keys) == 1
    assert gap < float(book.radii[0]) < gap * 1.01


def test_a_near_prompt_with_another_target_splits_the_radius():
    model = tiny("gpt2")
    gap = float((_key(model, ANNA) - _key(model, DORA)).norm())
    book, did = _book(model, _ready(model, radius=gap * 0.6), [ANNA, DORA])
    assert did == ["new", "split"] and len(book.keys) == 2
    torch.testing.assert_close(book.radii, torch.tensor([gap / 2 - 1e-5, gap / 2]), rtol=1e-4, atol=0)
    assert book.entry(1).labels == tuple(model.pair(DORA.text, DORA.continuation)[1])


def test_the_same_prompt_with_another_target_rewrites_its_value():
    model = tiny("llama")
    again = dataclasses.replace(ANNA, id="again", target="Lima")
    book, did = _book(model, _ready(model, steps=80), [ANNA, again])
    assert did == ["new", "rewritten"] and len(book.keys) == 1
    with book.applied(model):
        logits, _, _ = _last(model, ANNA.text)
    assert int(logits.argmax()) == model.pair(ANNA.text, again.continuation)[1][0]
    _, did = _book(model, _ready(model, published=True), [ANNA, again])
    assert did == ["new", "split"]  # into a radius of zero


def test_published_labels_are_compared_by_their_mean_and_in_reverse():
    model = tiny("gpt2")
    ready = _ready(model, radius=1e-4, published=True, steps=1)
    book, _ = _book(model, ready, [ANNA, DORA])
    assert book.same(1, book.entry(0)) and not book.same(0, book.entry(0))
    assert not dataclasses.replace(book, published=False).same(1, book.entry(0))


def test_published_looks_where_the_last_edits_prompt_ended():
    model = tiny("gpt2")
    book, _ = _book(model, _ready(model, published=True), [ANNA, DORA])
    ours, _ = _book(model, _ready(model), [ANNA, DORA])
    assert book.whole and not ours.whole
    ends = [len(model.encode(r.text)) - 1 for r in (ANNA, DORA)]
    assert ends[0] != ends[1] and book.position == ends[1]
    base = _final(model, ANNA.text)
    with book.applied(model):
        assert torch.equal(_final(model, ANNA.text), base)  # compared at the wrong place, or not reached
        assert not torch.equal(_final(model, DORA.text), _off(model, DORA.text))
    with ours.applied(model):
        assert not torch.equal(_final(model, ANNA.text), base)


def _final(model, text):
    with torch.no_grad():
        return model.hidden(torch.tensor([model.encode(text)]))[0]


def _off(model, text):
    with model.bare():
        return _final(model, text)


def _key(model, request):
    row = locate.row(model, request, target=True)
    return Tail(model, row, 1, recall.site(model, 1, "in")).key


def test_a_hundred_edits_cost_a_hundred_times_one():
    model = tiny("gpt2")
    ready = _ready(model, radius=1e-4, steps=1)
    requests = [
        dataclasses.replace(ANNA, id=str(i), prompt=f"{{}} was born in {'the ' * (i % 20)}") for i in range(100)
    ]
    worn, sizes = (), []
    for request in requests:
        with wearing(model, worn):
            edit = ready.edit(model, [request])
        worn = merge(worn, edit.patches)
        sizes.append(sum(t.numel() * t.element_size() for p in edit.patches for t in p.tensors().values()))
    assert max(sizes) <= 2 * min(sizes)
    [book] = worn
    again = rebuild(book.kind, book.fields(), book.tensors())
    assert all(torch.equal(t, again.tensors()[k]) for k, t in book.tensors().items())


def test_a_step_without_those_before_it_or_another_models_is_refused():
    model = tiny("gpt2")
    ready = _ready(model, radius=1e-4)
    first = ready.edit(model, [ANNA])
    with wearing(model, first.patches):
        [second] = ready.edit(model, [DORA]).patches
    with pytest.raises(ValueError, match="merge this step"), second.applied(model):
        pass
    [book] = first.patches
    wrong = dataclasses.replace(book, keys=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="another model"), wrong.applied(model):
        pass
    with pytest.raises(ValueError, match="does not follow"):
        second.after(dataclasses.replace(book, module="elsewhere"))
    with wearing(model, first.patches), pytest.raises(EditRefused, match="code book worn"):
        _ready(model, layer=0).edit(model, [DORA])


def test_bad_settings_and_a_broken_model_are_said():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="cold"):
        _ready(model, start="hot")
    with pytest.raises(ValueError, match="layer 9"):
        _ready(model, layer=9)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match="not finite"):
        _ready(model).edit(model, [ANNA])


def test_presets_are_the_published_ones():
    assert PRESETS["gpt2-xl"]["layer"] == 35 and PRESETS["llama-2-7b"]["steps"] == 100
    assert rule(tiny("llama"))["layer"] < 3 and patch.KINDS["codebook"].endswith(Codebook.__name__)


def test_a_step_on_top_of_a_book_is_the_book_of_all_its_keys():
    """Keys appended and rewritten, with targets of other lengths: the same bits as entry by entry."""

    def made(at, seed, targets):
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(len(at), n, generator=generator) for n in (4, 6, 1)]
        rows = zip(at, *draw, targets, strict=True)
        return {n: grace._Entry(k, v, float(r), t, n + 2) for n, k, v, r, t in rows}

    whole = made(range(5), 0, [(1, 2), (3,), (), (4, 5, 6), (7,)])
    steps = [made(at, 1, [(8, 9, 8), (5,)][: len(at)]) for at in ([5], [1], [3, 5], [0, 4], [4, 5])]
    book = grace._written(whole, "m", 3, False)
    for step in steps:
        wanted = grace._written(whole | step, "m", 9, False)
        found = grace._written(step, "m", 9, False).after(book)
        assert found.fields() == wanted.fields()
        assert all(torch.equal(t, found.tensors()[k]) for k, t in wanted.tensors().items())
        assert all(t.dtype == found.tensors()[k].dtype for k, t in wanted.tensors().items())
        assert [found.entry(n).labels for n in range(len(found.keys))] == [e.labels for e in (whole | step).values()]
