"""MEND: by default every edit is kept; as published, only the last one is."""

import json

import pytest
import torch

from methods.mend import PRESETS, Mend, rule
from methods.parts import gradients
from methods.parts.mend_training import Course, Learner
from raysys import patch
from raysys.model import Model
from raysys.types import EditCase, EditRefused, EditRequest, Probe, remembered
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]
PEOPLE = ["Anna", "Bert", "Carla", "Dora", "Rome", "Peru"]
CASES = [
    EditCase(
        EditRequest(f"t{i}", "{} was born in the city of", name, new, old),
        (
            Probe("paraphrase", f"The city of {name} is", new, old),
            Probe("neighbourhood", f"{PEOPLE[i - 1]} was born in the city of", old, new),
        ),
    )
    for i, (name, new, old) in enumerate(zip(PEOPLE, ["Lima", "Oslo"] * 3, ["Paris", "Norway"] * 3, strict=True))
]
HOW = {"steps": 12, "cases": 2, "accumulate": 1, "every": 4, "lr": 3e-3, "lr_lr": 1e-3, "edit_lr": 1e-2, "cedit": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an editor for each family, trained a little."""
    folder = tmp_path_factory.mktemp("mend")
    for family in ("gpt2", "llama"):
        Mend(rank=4).train(tiny(family), CASES, folder, settings=HOW)
    return folder


def weights(model, ready):
    return {n: model.matrix(f"{n}.weight").clone() for n in ready.net.names}


def stream(model, ready):
    """(edit, weights worn after it) for each fact, one after the other."""
    wearer, worn, memory, found = patch.Wearer(model), (), None, []
    for fact in FACTS:
        edit = ready.edit(model, [fact], memory)
        memory, worn = remembered(ready, memory, edit.memory), patch.merge(worn, edit.patches)
        wearer.wear(worn)
        found.append((edit, weights(model, ready)))
    wearer.take_off()
    return found


def deltas(edit):
    found = {}
    for p in edit.patches:
        p.add_to(found.setdefault(p.weight.removesuffix(".weight"), torch.zeros(p.shape)))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_after_n_edits_the_weights_are_the_base_and_all_of_them(family, trained):
    model = tiny(family)
    ready = Mend(rank=4).prepare(model, trained)
    total = base = weights(model, ready)
    for edit, worn in stream(model, ready):
        assert edit.memory is None
        total = {n: total[n] + d for n, d in deltas(edit).items()}
        for name in base:
            torch.testing.assert_close(worn[name], total[name])
            assert not torch.equal(worn[name], base[name])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_published_after_n_edits_the_weights_are_the_base_and_the_last(family, trained):
    model = tiny(family)
    ready = Mend(rank=4, published=True).prepare(model, trained)
    base = weights(model, ready)
    for fact, (_, worn) in zip(FACTS, stream(model, ready), strict=True):
        alone = deltas(ready.edit(model, [fact]))
        for name in base:
            torch.testing.assert_close(worn[name], base[name] + alone[name], rtol=1e-5, atol=1e-6)


def test_published_the_gradient_is_that_of_the_untouched_model(trained):
    model = tiny("gpt2")
    kept, fresh = (Mend(rank=4, published=p).prepare(model, trained) for p in (False, True))
    first, alone = kept.edit(model, FACTS[:1]), fresh.edit(model, FACTS[1:2])
    memory = fresh.edit(model, FACTS[:1]).memory
    with patch.wearing(model, first.patches):
        assert fresh.edit(model, FACTS[1:2], memory).log == alone.log
        assert kept.edit(model, FACTS[1:2]).log != alone.log


def test_the_first_edit_is_the_same_either_way(trained):
    model = tiny("llama")
    one, other = (Mend(rank=4, published=p).prepare(model, trained).edit(model, FACTS[:1]) for p in (False, True))
    for a, b in zip(one.patches, other.patches, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


def test_targets_taken_alone_need_an_editor_trained_on_such(trained, tmp_path):
    model = tiny("llama")  # its tokenizer puts a BOS before them
    with pytest.raises(ValueError, match="train-editor mend"):
        Mend(rank=4, labels="alone").prepare(model, trained)
    theirs = Mend(rank=4, labels="alone")
    theirs.train(model, CASES, tmp_path, settings={**HOW, "steps": 4})
    one, other = (m.prepare(model, c) for m, c in ((theirs, tmp_path), (Mend(rank=4), trained)))
    assert one.edit(model, FACTS[:1]).log["nll"] != other.edit(model, FACTS[:1]).log["nll"]


def test_requests_of_a_batch_add_up(trained):
    model = tiny("llama")
    ready = Mend(rank=4, batch=3).prepare(model, trained)
    together, alone = deltas(ready.edit(model, FACTS)), [deltas(ready.edit(model, [f])) for f in FACTS]
    for name, delta in together.items():
        wanted = sum(d[name] for d in alone)
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-4


def test_a_change_has_a_rank_per_token_that_matters(trained):
    model = tiny("gpt2")
    edit = Mend(rank=4).prepare(model, trained).edit(model, FACTS[:1])
    row = gradients.row(model, FACTS[0])
    ranks = {p.weight: p.rank for p in edit.patches}
    assert ranks[f"{model.mlp_out(2)}.weight"] == len(row.labels)  # nothing above looks at other tokens
    assert ranks[f"{model.mlp_out(1)}.weight"] == len(row.ids)


def test_without_a_trained_editor_the_message_says_how_to_get_one(tmp_path):
    with pytest.raises(ValueError, match="raysys train-editor mend tiny-gpt2"):
        Mend(rank=4).prepare(tiny("gpt2"), tmp_path)


def test_an_editor_for_another_model_is_refused(trained):
    [path] = [p for p in (trained / "editors").iterdir() if _fits(p, tiny("gpt2"))]
    with pytest.raises(ValueError, match="trained for something else"):
        Mend(rank=4, editor=str(path)).prepare(tiny("gpt2", seed=3), trained)
    assert Mend(rank=4, editor=str(path)).prepare(tiny("gpt2"), trained).settings.editor == ""


def _fits(path, model):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fits"])["model"] == model.digest


def test_training_makes_edits_work_better_than_chance(trained):
    model = tiny("llama")
    untrained = Learner(model, Mend(rank=4).prepare(model, trained).settings.network(model, 1e-2), CASES, Course())
    taught = Learner(model, Mend(rank=4).prepare(model, trained).net, CASES, Course())
    untrained.net.load_state_dict(
        {**untrained.net.state_dict(), **{k: v for k, v in taught.net.state_dict().items() if k.endswith(("n", "m2"))}}
    )
    every = range(len(CASES))
    assert taught.judge(every)["nll"] < untrained.judge(every)["nll"]


def test_training_sees_the_edit_that_editing_makes(trained):
    model = tiny("gpt2")
    ready = Mend(rank=4).prepare(model, trained)
    learner = Learner(model, ready.net, CASES[:2], Course(general=1))
    said = learner.judge([0])
    edit = ready.edit(model, [CASES[0].request])
    batch = gradients.lay(model, [gradients.row(model, CASES[0].request)])
    with patch.wearing(model, edit.patches), torch.no_grad():
        after = gradients.logprobs(model, batch, gradients.trunk(model, batch, ready.net.names))
    assert float(gradients.nll(batch, after)[0]) == pytest.approx(said["nll"], rel=1e-3)


def test_cases_that_cannot_be_learnt_from_are_left_out_and_told(tmp_path):
    bad = EditCase(EditRequest("long", "{}" + " born" * 80, "Anna", "Rome"), source="file, record 7")
    heard = []
    Mend(rank=4).train(tiny("gpt2"), [*CASES, bad], tmp_path, heard.append, {**HOW, "steps": 4})
    assert [p.left_out for p in heard] == [1]
    with pytest.raises(ValueError, match="file, record 7"):
        Mend(rank=4).train(tiny("gpt2"), [bad, bad], tmp_path)


def test_a_broken_model_refuses_the_edit(trained):
    model = tiny("gpt2")
    ready = Mend(rank=4).prepare(model, trained)
    model.matrix(f"{model.mlp_out(2)}.weight").fill_(float("inf"))
    with pytest.raises(EditRefused, match=r"'anna'.*not finite"):
        ready.edit(model, FACTS[:1])


def test_the_rule_is_what_was_published():
    model = tiny("gpt2")
    assert rule(model)["modules"] == tuple(
        f"transformer.h.{i}.mlp.{name}" for i in range(3) for name in ("c_fc", "c_proj")
    )
    assert rule(model)["rank"] == 1920


def test_the_world_s_editor_is_shipped_and_fits():
    model = Model.load("world/small")
    ready = Mend().prepare(model)
    assert ready.settings.rank == PRESETS["world/small"]["rank"] and ready.identity()["artifacts"]["editor"]
