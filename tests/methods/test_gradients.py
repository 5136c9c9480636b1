"""Gradients of an edit as a few vectors: they are what autograd says, whatever the batch."""

import pytest
import torch

from methods.parts import gradients
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]


def modules(model, layer=1):
    return [*(name.format(layer) for name in model.arch.mlp_in), model.mlp_out(layer), model.mlp_out(layer + 1)]


def rows(model, **how):
    return [gradients.row(model, q, **how) for q in FACTS]


def state(model):
    return {k: v.clone() for k, v in model.net.state_dict().items()}


@pytest.mark.parametrize("family", SIZES)
def test_the_tokens_add_up_to_the_gradient_that_autograd_gives(family):
    model = tiny(family)
    names = modules(model)
    batch = gradients.lay(model, rows(model))
    traces = gradients.trace(model, batch, names)
    weights = [model.parameter(f"{n}.weight") for n in names]
    for weight in weights:
        weight.requires_grad_(True)
    hidden, _ = model.hidden(batch.ids, batch.mask, use_cache=False)
    logprobs = model.logits(hidden[batch.row, batch.column]).log_softmax(-1)
    loss = (-logprobs.gather(1, batch.label[:, None])[:, 0] * batch.weight).sum()
    wanted = torch.autograd.grad(loss, weights)
    assert float(traces.losses.sum()) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, grad in zip(names, wanted, strict=True):
        grad = grad.T if model.transposed(f"{name}.weight") else grad
        got = traces.modules[name].delta.T @ traces.modules[name].x
        torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("left", [False, True])
def test_a_batch_padded_on_either_side_gives_what_each_text_gives_alone(family, left):
    model = tiny(family)
    names = modules(model)
    together = gradients.trace(model, gradients.lay(model, rows(model), left=left), names)
    for i, row in enumerate(rows(model)):
        alone = gradients.trace(model, gradients.lay(model, [row]), names)
        assert float(together.losses[i]) == pytest.approx(float(alone.losses[0]), rel=1e-5)
        for name in names:
            mine = together.modules[name].row == i
            for what in ("x", "delta"):
                wanted = getattr(alone.modules[name], what)
                got = getattr(together.modules[name], what)[mine]
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_is_left_as_it_was(dtype):
    model = tiny("llama", dtype)
    before = state(model)
    found = gradients.trace(model, gradients.lay(model, rows(model)), modules(model))
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert all(t.x.dtype == t.delta.dtype == torch.float32 for t in found.modules.values())


def test_half_precision_keeps_gradients_that_are_too_small_for_its_numbers():
    wide, half = tiny("llama"), tiny("llama", torch.float16)
    name = wide.mlp_out(2)
    one, other = (gradients.trace(m, gradients.lay(m, rows(m)), [name]).modules[name].delta for m in (wide, half))
    assert float((one - other).norm() / one.norm()) < 0.05


def test_a_change_added_to_the_output_is_a_change_of_the_weight():
    model = tiny("gpt2")
    name = model.mlp_out(1)
    batch = gradients.lay(model, rows(model))
    delta = torch.randn(model.matrix(f"{name}.weight").shape, generator=torch.Generator().manual_seed(0))
    base = gradients.trunk(model, batch, [name])
    with torch.no_grad():
        got = gradients.logprobs(model, batch, base, {name: lambda x: x @ delta.T})
        model.matrix(f"{name}.weight").add_(delta)
        wanted = gradients.logprobs(model, batch, base)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    same = torch.zeros(len(FACTS))
    torch.testing.assert_close(gradients.divergence(batch, got, got), same)


def test_a_target_taken_alone_brings_its_bos_along():
    model = tiny("llama")  # its tokenizer adds one
    suffix, alone = gradients.row(model, FACTS[0]), gradients.row(model, FACTS[0], "alone")
    assert alone.labels == (model.tokenizer.bos_token_id, *suffix.labels)
    assert alone.first == suffix.first - 1 and alone.ids == suffix.ids
    plain = tiny("gpt2")
    assert gradients.row(plain, FACTS[0], "alone") == gradients.row(plain, FACTS[0])


def test_a_model_that_is_broken_is_told_by_the_edit():
    model = tiny("gpt2")
    model.matrix(f"{model.mlp_out(2)}.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match=r"'dora'.*not finite"):
        gradients.trace(model, gradients.lay(model, rows(model)[1:]), [model.mlp_out(1)], FACTS[1:])


def test_modules_outside_the_blocks_are_refused():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="none of the decoder blocks"):
        gradients.lowest(model, ["transformer.wte"])
    with pytest.raises(ValueError, match="no module"):
        gradients.lowest(model, ["transformer.h.7.mlp.c_proj"])
