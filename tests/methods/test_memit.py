"""MEMIT: a batch equals its closed form, a stream the sum of its steps, and earlier keys stay where they were put."""

import json

import pytest
import torch

from methods import memit
from methods.memit import PRESETS, Memit
from methods.parts import spread
from raysys import patch
from raysys.types import EditRefused, EditRequest, remembered
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]
SETTINGS = {"layers": (0, 1), "steps": 6, "lr": 0.1, "weight": 5.0, "contexts": ((5, 4),), "documents": 50}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway .\n" * 9)
    return str(path)


@pytest.fixture
def prepare(corpus, tmp_path):
    return lambda model, **settings: Memit(**{**SETTINGS, "corpus": corpus, "ridge": 0.01, **settings}).prepare(
        model, tmp_path
    )


def _mlp(model):
    return lambda layer: (model.mlp_out(layer),)


def _dense(ready, model, facts, s=None):
    """Algorithm 1 with whole matrices, one LU each, on a model that really wears what was written: {weight: delta}."""
    settings, found = ready.settings, {}
    last = settings.layers[-1]
    z = spread.wanted(spread.values(model, facts, ready.contexts.texts, last, memit.search(settings)))
    block = spread.gauge(model, last)
    for number, layer in enumerate(settings.layers):
        module = model.mlp_out(layer)
        worn = [patch.Dense(name, d.float()) for name, d in found.items()]
        texts = ready.contexts.texts
        with patch.wearing(model, worn), spread.Course(model, facts, texts, (layer, last), _mlp(model)) as course:
            k, now = course.keys(layer)[module], course.outputs((block,))[block]
        c = ready.spaces[module].factor @ ready.spaces[module].factor.T
        a = torch.linalg.solve(settings.weight * c + k @ k.T + (0 if s is None else s[module]), k)
        found[f"{module}.weight"] = (z - now) / (len(settings.layers) - number) @ a.T
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_a_batch_equals_its_closed_form(family, prepare):
    model = tiny(family)
    ready = prepare(model, batch=3)
    wanted = _dense(ready, model, FACTS)
    done = ready.edit(model, FACTS)
    assert [p.weight for p in done.patches] == list(wanted)
    for change in done.patches:
        assert change.rank == 3
        torch.testing.assert_close(change.left @ change.right, wanted[change.weight].float(), rtol=1e-3, atol=1e-4)


def test_one_layer_and_one_request_with_hardly_any_corpus_meet_the_value_exactly(prepare):
    model = tiny("llama")
    ready = prepare(model, layers=(1,), weight=1e-9, contexts=())
    done, [value] = ready.solved(model, FACTS[:1])
    with patch.wearing(model, done.patches):
        block = model.arch.block.format(1)
        with spread.Course(model, FACTS[:1], ("{}",), (1,), _mlp(model)) as course:
            now = course.outputs((block,))[block]
    torch.testing.assert_close(now[:, 0].float(), value.wanted, rtol=1e-4, atol=1e-3)


def test_a_stream_is_the_sum_of_its_steps_each_made_on_the_model_as_it_then_is(prepare):
    model = tiny("gpt2")
    ready = prepare(model)
    before = {w: model.matrix(f"{model.mlp_out(w)}.weight").clone() for w in (0, 1)}
    wearer, worn, steps = patch.Wearer(model), (), []
    for fact in FACTS:
        done = ready.edit(model, [fact])
        assert done.memory is None
        steps.append(done.patches)
        worn = patch.merge(worn, done.patches)
        wearer.wear(worn)
    for layer in (0, 1):
        total = sum(step[layer].left @ step[layer].right for step in steps)
        got = model.matrix(f"{model.mlp_out(layer)}.weight") - before[layer]
        torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-5)
    wearer.take_off()


def test_with_earlier_keys_a_step_equals_the_closed_form_that_counts_them(prepare):
    model = tiny("llama")
    ready = prepare(model, earlier_keys=True)
    wearer, worn, memory, s = patch.Wearer(model), (), None, {}
    for fact in FACTS:
        wanted = _dense(ready, model, [fact], s or None)
        done = ready.edit(model, [fact], memory)
        for change in done.patches:
            torch.testing.assert_close(change.left @ change.right, wanted[change.weight].float(), rtol=1e-3, atol=1e-4)
        worn = patch.merge(worn, done.patches)
        wearer.wear(worn)
        memory = remembered(ready, memory, done.memory)
        for module, keys in done.memory.items():
            assert keys.shape[1] == 1 and keys.dtype == torch.float32
            s[module] = s.get(module, 0) + keys.double() @ keys.double().T
    wearer.take_off()


def test_with_earlier_keys_later_steps_change_what_those_give_less(prepare):
    model = tiny("gpt2")
    moved, name, keys = {}, model.mlp_out(1), None
    for earlier in (True, False):
        ready = prepare(model, earlier_keys=earlier, layers=(1,), weight=0.01)
        first = ready.edit(model, FACTS[:1])
        keys = first.memory[name] if earlier else keys
        memory = remembered(ready, None, first.memory)
        with patch.wearing(model, first.patches):
            [change] = ready.edit(model, FACTS[1:2], memory).patches
        moved[earlier] = float((change.left @ (change.right @ keys)).norm())
    assert moved[True] < 0.1 * moved[False]


def test_identity_names_settings_and_artifacts_and_is_json(prepare):
    model = tiny("gpt2")
    said = json.loads(json.dumps(prepare(model).identity()))
    assert said["settings"]["layers"] == [0, 1]
    assert set(said["artifacts"]) == {"contexts", *(f"second_moment.{model.mlp_out(i)}" for i in (0, 1))}
    assert prepare(model, seed=1).identity() != prepare(model).identity()


def test_the_log_speaks_of_every_request_and_matrix(prepare):
    model = tiny("gpt2")
    log = prepare(model, batch=3).edit(model, FACTS).log
    assert all(len(log[k]) == 3 for k in ("passes", "loss_before", "loss", "nll", "value_shift"))
    assert set(log["norm"]) == {model.mlp_out(0), model.mlp_out(1)}


def test_presets_name_the_published_layers_and_the_rule_depends_on_depth():
    assert PRESETS["gpt2-xl"]["layers"] == (13, 14, 15, 16, 17)
    assert PRESETS["pythia-410m"]["layers"] == (5, 6, 7, 8, 9)
    assert memit.rule(tiny("gpt2"))["layers"] == (0, 1)
    assert memit.rule(tiny("llama", num_hidden_layers=32))["layers"] == (4, 5, 6, 7, 8)


def test_a_singular_second_moment_is_said_before_the_first_edit_with_the_way_out(prepare):
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_proj: .*raise `documents` or `ridge`"):
        prepare(tiny("gpt2"), ridge=0.0)


def test_the_same_fact_twice_in_a_batch_is_written_once_over(prepare):
    model = tiny("gpt2")
    ready = prepare(model, batch=2)
    once = ready.edit(model, FACTS[:1]).patches
    twice = ready.edit(model, [FACTS[0], FACTS[0]]).patches
    assert all(bool(torch.isfinite(p.left @ p.right).all()) for p in twice)
    a, b = (sum(float((p.left @ p.right).norm()) for p in patches) for patches in (once, twice))
    assert b == pytest.approx(a, rel=0.6)


def test_a_broken_model_is_said_and_left_alone(prepare):
    model = tiny("gpt2")
    ready = prepare(model)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match=r"'anna'.*not finite"):
        ready.edit(model, FACTS[:1])


@pytest.mark.parametrize(("settings", "said"), [({"batch": 0}, "at least one"), ({"layers": (1, 0)}, "lowest up")])
def test_settings_that_mean_nothing_are_told(prepare, settings, said):
    with pytest.raises(ValueError, match=f"memit: .*{said}"):
        prepare(tiny("gpt2"), **settings)


def test_a_layer_that_the_model_lacks_is_told(prepare):
    with pytest.raises(ValueError, match="layer 3 is not in tiny-gpt2"):
        prepare(tiny("gpt2"), layers=(2, 3))
