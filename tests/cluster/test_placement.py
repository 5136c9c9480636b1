"""Placement: known sizes, measured sizes, and answers for GPUs that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPTJConfig, LlamaConfig

from cluster.placement import BYTES, GIB, NEEDS, Gpus, Needs, Placement, Shape, load, place
from raysys import names
from tests.families import SIZES

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
GPT_J = GPTJConfig()
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip


def placed(config: Any, gpus: str, dtype: str = "bfloat16", method: str = "rome", **options: Any) -> Placement:
    methods = {method: names.method(method)}
    return place(config, dtype, methods, Gpus.parse(gpus), needs=[NEEDS.get(method, Needs())], **options)


def tiny(family: str) -> Any:
    sizes = {k: 100 if k == "vocab_size" else v for k, v in SIZES[family].items()}
    return AutoConfig.for_model(family, **{"vocab_size": 100, **sizes})


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA_7B, 6.738e9), (GPT_J, 6.051e9), (LLAMA_70B, 70.554e9)], ids=["7b", "gptj", "70b"]
)
def test_known_models_have_the_parameters_that_their_cards_state(config: Any, parameters: float) -> None:
    shape = Shape.of(config)
    assert shape.parameters == pytest.approx(parameters, rel=0.01)
    assert shape.weights("bfloat16") == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_bytes_of_weights_are_those_of_a_real_model(family: str) -> None:
    net = AutoModelForCausalLM.from_config(tiny(family), dtype=torch.bfloat16)
    assert Shape.of(tiny(family)).weights("bfloat16") == sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("tokens", [5, 20])
def test_keys_and_values_take_what_a_real_cache_holds(family: str, tokens: int) -> None:
    config = tiny(family)
    net = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        net(torch.ones(3, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert Shape.of(config).keys_values("float32", 3, tokens) == held


def test_second_moments_are_float64_and_do_not_shrink_when_the_model_is_split() -> None:
    shape = Shape.of(LLAMA_7B)
    assert shape.beside(Needs(moments=1), "bfloat16") == 4 * 11008**2 * 8  # the factor, three while it is made
    one, two = (load(shape, "bfloat16", [NEEDS["memit"]], ranks, 16, 1024) for ranks in (1, 2))
    assert one.editor - two.editor < shape.weights("bfloat16") / 2 + shape.activations("bfloat16", 32, 64, True)
    assert two.editor > shape.beside(NEEDS["memit"], "bfloat16")


def test_what_an_evaluator_may_keep_takes_its_room_and_fewer_share_a_gpu() -> None:
    without, with_it = (placed(GPT2Config(), "1x24", trunks=n * GIB) for n in (0, 8))
    assert with_it.gpus_per_evaluator > without.gpus_per_evaluator
    assert 24 * with_it.gpus_per_evaluator > 8


def test_adam_keeps_five_copies_in_float32_beside_the_matrix_as_found() -> None:
    shape = Shape.of(LLAMA_7B)
    assert shape.beside(NEEDS["ft_l"], "bfloat16") == 4096 * 11008 * (2 + 20)


def test_one_gpu_does_not_hold_editor_and_evaluator_of_a_7b_model() -> None:
    found = placed(LLAMA_7B, "1x24")
    assert not found.evaluators
    assert "what would do: 4 x 24 GiB with tensor_parallel = 2 or 1 x 80 GiB with tensor_parallel = 1" in found.why


def test_a_7b_model_fills_eight_large_gpus_with_whole_copies() -> None:
    found = placed(LLAMA_7B, "8x80")
    assert not found.why
    assert found.ranks == 1
    assert found.editors == 1
    assert found.evaluators * found.gpus_per_evaluator + found.gpus_per_editor <= 8
    shape = load(Shape.of(LLAMA_7B), "bfloat16", [NEEDS["rome"]], 1, 16, 1024)
    assert shape.evaluator / found.gpus_per_evaluator < 80 * GIB


def test_a_70b_model_is_split_over_the_gpus_of_one_machine() -> None:
    found = placed(LLAMA_70B, "8x80")
    assert (found.ranks, found.editors, found.evaluators) == (4, 1, 1)
    assert placed(LLAMA_70B, "8x80/2").why


def test_a_70b_model_on_two_gpus_is_refused_with_what_would_do() -> None:
    found = placed(LLAMA_70B, "2x80")
    assert found.evaluators == 0
    assert "2 x 80 GiB" in found.why
    assert "what would do: 8 x 80 GiB with tensor_parallel = 4" in found.why


def test_float32_is_told_of_the_smaller_dtype() -> None:
    assert 'dtype = "bfloat16"' in placed(LLAMA_7B, "2x40", "float32").why


def test_gpt2_is_never_split_and_the_reason_is_given() -> None:
    big = GPT2Config(n_embd=8192, n_layer=48, n_head=64)
    found = placed(big, "8x24", method="ft_l")
    assert "a gpt2 model can't be split" in found.why
    assert "tensor_parallel = 2" not in found.why


def test_small_models_share_a_gpu() -> None:
    found = placed(GPT2Config(), "1x80")
    assert not found.why
    assert 0 < found.gpus_per_evaluator < 1
    assert found.evaluators > 1
    assert found.editors * found.gpus_per_editor + found.evaluators * found.gpus_per_evaluator <= 1


def test_a_wish_for_more_evaluators_than_fit_is_told_to_take_fewer() -> None:
    assert "fewer evaluators" in placed(LLAMA_7B, "2x40", evaluators=9).why


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "8x80/0", "8 80"])
def test_what_is_no_offer_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="count x GiB"):
        Gpus.parse(text)


def test_every_dtype_of_a_study_has_its_size() -> None:
    assert {n: torch.empty(0, dtype=getattr(torch, n)).element_size() for n in BYTES} == BYTES


def test_methods_in_the_table_are_known() -> None:
    assert set(NEEDS) <= set(names.METHODS)
