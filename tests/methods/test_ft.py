"""Fine-tuning lowers its own loss, stays in its ball and puts the weights back."""

import pytest
import torch

from methods.ft import FtL, FtM
from methods.parts import locate
from raysys import patch
from raysys.types import EditRefused, EditRequest
from tests.families import tiny

FACT = EditRequest("fact", "{} was born in the city of", "Anna", "Rome Oslo", "Paris")
methods = pytest.mark.parametrize("method", [FtL, FtM])


def _probabilities(model, request, together):
    row = locate.row(model, request, target=True)
    logprobs = model.net(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    at = [row.first - 1] * len(row.labels) if together else list(range(row.first - 1, len(row.ids)))
    return -float(logprobs[at, list(row.labels)].mean())


@methods
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_worn_change_has_the_loss_that_training_reached(method, family):
    model = tiny(family)
    few = method(layers=(1,), steps=8, lr=1e-3, norm_constraint=0.0).edit(model, [FACT])
    more = method(layers=(1,), steps=9, lr=1e-3, norm_constraint=0.0).edit(model, [FACT])
    assert more.log["loss"] < more.log["loss_before"]
    assert few.log["loss_before"] == pytest.approx(_probabilities(model, FACT, method is FtL), rel=1e-4)
    with patch.wearing(model, few.patches):
        assert more.log["loss"] == pytest.approx(_probabilities(model, FACT, method is FtL), rel=1e-2)


@methods
def test_weights_stay_in_the_ball(method):
    model = tiny("llama")
    [change] = method(layers=(0,), steps=20, lr=1e-2, norm_constraint=5e-3).edit(model, [FACT]).patches
    assert 4e-3 < float(change.delta.abs().max()) <= 5e-3 + 1e-7


@methods
def test_several_layers_and_biases_can_be_trained(method):
    model = tiny("gpt2")
    edit = method(layers=(0, 2), steps=3, lr=1e-3, norm_constraint=0.0, bias=True).edit(model, [FACT])
    assert [p.weight.split(".", 2)[2] for p in edit.patches] == [
        f"{i}.mlp.c_proj.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    ]
    for p in edit.patches:
        assert p.delta.shape == model.matrix(p.weight).shape and p.delta.any()


def test_a_done_edit_takes_no_step():
    model = tiny("gpt2")
    model.net.lm_head.weight.data.mul_(8)  # so that it can be sure of something
    trained = FtM(layers=(1,), steps=300, lr=3e-3, norm_constraint=0.0).edit(model, [FACT])
    assert trained.log["loss"] < 0.01
    with patch.wearing(model, trained.patches):
        again = FtM(layers=(1,), steps=25, lr=3e-3, norm_constraint=0.0).edit(model, [FACT])
    assert again.log["steps"] == 1 and not any(p.delta.any() for p in again.patches)


def test_a_broken_model_is_said_and_left_alone():
    model = tiny("gpt2")
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match="not finite"):
        FtM(layers=(1,), steps=3, lr=1e-3).edit(model, [FACT])
    assert not model.parameter("transformer.h.1.mlp.c_proj.weight").requires_grad


def test_the_published_ft_l_counts_a_beginning_of_text_as_target():
    fact = EditRequest("fact", "{} was born in", "Anna", "Rome")
    settings = {"layers": (1,), "steps": 2, "lr": 0.01, "norm_constraint": 0.0}
    for family, same in (("gpt2", True), ("gptj", False)):  # gptj's test tokenizer adds <s>
        model = tiny(family)
        ours, theirs = (FtL(published=p, **settings).edit(model, [fact]).log for p in (False, True))
        assert (ours == theirs) is same
