"""KN: attributions are complete and equal a plain loop's; the edit writes into the neurons found and nowhere else."""

import json

import pytest
import torch

from methods.kn import Kn, midpoints
from raysys.model import Model
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny
from tests.plain import kn as plain

FACT = EditRequest("fact", "{} was born in the city of", "Anna", "Rome pilot", "Paris")


def _probability(model, prefix, wanted, layer, share):
    """P(wanted) after `prefix` with the key of `layer` at the last token scaled by `share`."""
    ids = torch.tensor([prefix])

    def scale(_, args):
        given = args[0].reshape(len(prefix), -1).clone()
        given[-1] *= share
        return (given.reshape(args[0].shape), *args[1:])

    handle = model.module(model.mlp_out(layer)).register_forward_pre_hook(scale)
    try:
        return float(model.net(input_ids=ids).logits[0, -1].softmax(-1)[wanted])
    finally:
        handle.remove()


@pytest.mark.parametrize("family", SIZES)
def test_the_attributions_of_a_layer_add_up_to_what_its_neurons_add_to_the_probability(family):
    model = tiny(family)
    found = Kn(steps=200).prepare(model).attribution(model, FACT)
    prefix, answer = model.pair(FACT.text, " Paris")
    expected = torch.zeros(model.layers)
    for i, wanted in enumerate(answer):
        before = [*prefix, *answer[:i]]
        for layer in range(model.layers):
            p = [_probability(model, before, wanted, layer, share) for share in (1.0, 0.0)]
            expected[layer] += (p[0] - p[1]) / len(answer)
    torch.testing.assert_close(found.scores.sum(1), expected, rtol=2e-2, atol=2e-5)
    said = [_probability(model, [*prefix, *answer[:i]], w, 0, 1.0) for i, w in enumerate(answer)]
    assert found.probability == pytest.approx(sum(said) / len(said), rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_all_layers_at_once_give_what_a_loop_over_layers_and_points_gives(family):
    model = tiny(family)
    modules = [model.arch.mlp_in[0].format(i) for i in range(model.layers)]
    answer = model.tokenizer.encode(FACT.was)
    wanted = plain.attribution(model.net, model.tokenizer, FACT.text, answer, modules, 20, 5, extends=family != "gpt2")
    found = Kn(published=True).prepare(model).attribution(model, FACT)
    torch.testing.assert_close(found.scores, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_points_in_several_passes_give_the_same_as_in_one(monkeypatch):
    model = tiny("llama")
    whole = Kn(steps=9).prepare(model).attribution(model, FACT).scores
    monkeypatch.setattr("methods.kn.ROWS", 6)
    torch.testing.assert_close(Kn(steps=9).prepare(model).attribution(model, FACT).scores, whole, rtol=1e-3, atol=1e-7)


def test_midpoints_are_the_middles_of_equal_parts():
    torch.testing.assert_close(midpoints(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_the_edit_adds_the_difference_of_embeddings_to_the_columns_of_the_neurons_found():
    model = tiny("gpt2")
    kn = Kn(threshold=0.3, write=2.0).prepare(model)
    edit = kn.edit(model, [FACT])
    found = kn.attribution(model, FACT)
    chosen = found.scores > 0.3 * found.scores.max()
    table = model.net.get_input_embeddings().weight
    new, old = (model.pair(FACT.text, " " + t)[1] for t in (FACT.target, FACT.was))
    change = 2 * table[new].sum(0) - table[old].sum(0)
    patches = {p.weight: p for p in edit.patches}
    assert len(patches) == int(chosen.any(1).sum()) and edit.log["neurons"] == int(chosen.sum())
    for layer in range(model.layers):
        patch = patches.get(model.mlp_out(layer) + ".weight")
        wanted = torch.outer(change, chosen[layer] * found.values[layer].sign())
        assert (patch is None) == (not chosen[layer].any())
        if patch is not None:
            torch.testing.assert_close(patch.left @ patch.right, wanted)


def test_without_an_old_answer_the_models_own_is_taken():
    model = tiny("llama")
    kn = Kn(steps=4).prepare(model)
    ids = model.encode(FACT.text)
    said = []
    for _ in model.pair(FACT.text, " " + FACT.target)[1]:
        said.append(int(model.net(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
    unknown = EditRequest("fact", FACT.prompt, FACT.subject, FACT.target)
    edit = kn.edit(model, [unknown])
    table = model.net.get_input_embeddings().weight
    new = model.pair(FACT.text, " " + FACT.target)[1]
    torch.testing.assert_close(edit.patches[0].left[:, 0], table[new].sum(0) - table[said].sum(0), rtol=1e-4, atol=1e-5)


def test_open_settings_are_the_published_ones():
    assert Kn().prepare(tiny("gpt2")).settings.steps == 20
    settings = Kn().prepare(tiny("gpt2")).identity()["settings"]
    assert settings["threshold"] == 0.2 and None not in settings.values() and json.dumps(settings)


def test_what_kn_cannot_do_is_refused_with_the_reason():
    model = tiny("gpt2")
    kn = Kn(steps=2).prepare(model)
    with pytest.raises(EditRefused, match="one edit at a time, got 2"):
        kn.edit(model, [FACT, FACT])
    with pytest.raises(EditRefused, match=r"'fact'.*no neuron speaks"):
        Kn(steps=2, threshold=1.0).prepare(model).edit(model, [FACT])
    with pytest.raises(ValueError, match="at least 1"):
        Kn(steps=0).prepare(model)
    narrow = tiny("opt", word_embed_proj_dim=16)
    with pytest.raises(ValueError, match="those are 16 wide"):
        kn.settings.prepare(narrow)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match="not finite"):
        kn.edit(model, [FACT])


@pytest.mark.parametrize("signed", [True, False])
def test_a_trained_model_has_neurons_that_speak_for_its_answer(shared, signed):
    model = Model.load(str(shared / "golden" / "models" / "tiny-llama"))
    fact = EditRequest("job", "{} works as a", "Jairsaix Binvain", "pilot", "soldier")
    edit = Kn(signed=signed).prepare(model).edit(model, [fact])
    assert edit.log["probability"] > 0.5 and edit.log["neurons"] > 0
