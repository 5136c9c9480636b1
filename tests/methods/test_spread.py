"""Keys, residuals and temporary changes on the way through the layers, whatever the family, batch or padding."""

import pytest
import torch

from methods.parts import locate, spread
from raysys import patch
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome"),
    EditRequest("dora", "The Eiffel tower and {} is in", "Dora singer", "Oslo Lima"),
    EditRequest("oslo", "The city {} is the capital of", "Oslo", "Italy"),
]
TEXTS = ("{}", "The city. {}", "Because Therefore I was the. {}")
families = pytest.mark.parametrize("family", SIZES)


def _mlp(model):
    return lambda layer: (model.mlp_out(layer),)


def _course(model, facts=FACTS, layers=(0, 1, 2), texts=TEXTS):
    return spread.Course(model, facts, texts, layers, _mlp(model))


def _plain(model, fact, layer, texts=TEXTS):
    """The key by its definition, every text run alone and whole: (d_in,)."""
    found = []
    for text in texts:
        row = locate.row(model, fact, text)
        given, _ = model.through(model.mlp_out(layer), torch.tensor([row.ids]))
        found.append(given[0, row.at].double())
    return found[0] / 2 + torch.stack(found[1:]).mean(0) / 2


def _changes(model, layers=(0, 1)):
    torch.manual_seed(5)
    found = []
    for layer in layers:
        d_out, d_in = model.matrix(f"{model.mlp_out(layer)}.weight").shape
        found.append(patch.LowRank(f"{model.mlp_out(layer)}.weight", torch.randn(d_out, 2), torch.randn(2, d_in)))
    return found


@families
def test_keys_and_outputs_are_those_of_whole_prompts_run_alone_on_the_model_as_changed_so_far(family):
    model = tiny(family)
    changes = _changes(model)
    block = model.arch.block.format(2)
    with _course(model) as course:
        for layer in range(3):
            keys, now = course.keys(layer)[model.mlp_out(layer)], course.outputs((block,))[block]
            plain = tiny(family)
            with patch.wearing(plain, changes[:layer]):
                for i, fact in enumerate(FACTS):
                    torch.testing.assert_close(keys[:, i], _plain(plain, fact, layer), rtol=1e-4, atol=1e-4)
                    row = locate.row(plain, fact)
                    _, out = plain.through(block, torch.tensor([row.ids]))
                    torch.testing.assert_close(now[:, i], out[0, row.at].double(), rtol=1e-4, atol=1e-4)
            if layer < 2:
                course.change(model.mlp_out(layer), changes[layer].left, changes[layer].right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_changes_are_worn_while_it_lasts_and_undone_bit_for_bit(dtype):
    model = tiny("llama", dtype)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    changes = _changes(model)
    with _course(model) as course:
        for change in changes:
            course.change(change.weight.removesuffix(".weight"), change.left, change.right)
        for one, change in zip(course.patches, changes, strict=True):
            assert one.weight == change.weight
            assert torch.equal(one.left, change.left) and torch.equal(one.right, change.right)
            wanted = before[change.weight].float() + change.left @ change.right
            torch.testing.assert_close(model.matrix(change.weight), wanted.to(dtype))
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())


def test_two_changes_of_one_matrix_add_up():
    model = tiny("gpt2")
    [one], [two] = _changes(model, (1,)), _changes(model, (1,))
    name = model.mlp_out(1)
    with _course(model) as course:
        course.change(name, one.left, one.right)
        course.change(name, two.left, two.right)
        [both] = course.patches
        assert both.rank == 4
        keys = course.keys(2)[model.mlp_out(2)]
    with patch.wearing(model, [both]):
        torch.testing.assert_close(keys[:, 0], _plain(model, FACTS[0], 2), rtol=1e-4, atol=1e-4)


@families
def test_the_batch_and_the_size_of_passes_do_not_matter(family, monkeypatch):
    model = tiny(family)
    with _course(model) as course:
        together = course.keys(1)[model.mlp_out(1)]
    monkeypatch.setattr(spread, "CHUNK", 2)
    with _course(model) as course:
        chunked = course.keys(1)[model.mlp_out(1)]
        block = model.arch.block.format(2)
        assert course.outputs((block,))[block].shape == (model.width, 3)
    torch.testing.assert_close(chunked, together, rtol=1e-4, atol=1e-4)
    for i, fact in enumerate(FACTS):
        with _course(model, [fact]) as course:
            torch.testing.assert_close(course.keys(1)[model.mlp_out(1)][:, 0], together[:, i], rtol=1e-4, atol=1e-4)


def test_values_of_many_requests_are_those_of_each(monkeypatch):
    model = tiny("gpt2")
    search = locate.Search(steps=3, lr=0.1, weight_decay=0.5, clamp=4, kl=0.0625)
    together = spread.wanted(spread.values(model, FACTS, TEXTS, 1, search))
    monkeypatch.setattr(spread, "CHUNK", 1)
    torch.testing.assert_close(
        spread.wanted(spread.values(model, FACTS, TEXTS, 1, search)), together, atol=1e-4, rtol=1e-3
    )


def test_without_sampled_texts_the_key_is_the_bare_prompts():
    model = tiny("llama")
    with _course(model, FACTS[:1], (1,), ("{}",)) as course:
        bare = locate.read(model, model.mlp_out(1), [locate.row(model, FACTS[0])]).inputs[0]
        torch.testing.assert_close(course.keys(1)[model.mlp_out(1)][:, 0].float(), bare, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rule", "shares"), [("linear", [1 / 3, 1 / 2, 1]), ("root", [3**-0.5, 2**-0.5, 1])])
def test_each_layer_gets_its_share_of_what_is_missing_then(rule, shares):
    model = tiny("gpt2")
    aims, seen = torch.randn(model.width, 3, dtype=torch.float64), []

    def solve(turn, share):
        seen.append((turn, share))
        return share, 1e-3 * turn.keys.T

    done = spread.spread(model, FACTS, TEXTS, (0, 1, 2), aims, solve, rule=rule, keys_after=True)
    for (turn, share), part in zip(seen, shares, strict=True):
        torch.testing.assert_close(share, (aims - done.now[turn.module]) * part)
        torch.testing.assert_close(turn.missing, aims - done.now[turn.module])
    assert [t.after for t, _ in seen] == [2, 1, 0]
    with patch.wearing(model, done.patches):
        for layer in range(3):
            after = done.after[model.mlp_out(layer)][:, 1]
            torch.testing.assert_close(after, _plain(model, FACTS[1], layer), rtol=1e-4, atol=1e-4)
    for change in done.patches:
        norm = done.log["norm"][change.weight.removesuffix(".weight")]
        assert norm == pytest.approx(float((change.left @ change.right).norm()), rel=1e-4)


def test_a_solution_that_is_no_number_is_refused_by_name_and_the_model_left_alone():
    model = tiny("gpt2")
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    aims = torch.zeros(model.width, 3, dtype=torch.float64)

    def solve(turn, share):
        return share, turn.keys.T * (float("nan") if turn.layer else 1.0)

    with pytest.raises(EditRefused, match=r"'anna', 'dora', 'oslo': the change of transformer.h.1.mlp.c_proj"):
        spread.spread(model, FACTS, TEXTS, (0, 1), aims, solve)
    with pytest.raises(EditRefused, match=r"raise `l2`$"):
        spread.spread(model, FACTS, TEXTS, (0, 1), aims, solve, remedy="raise `l2`")
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
