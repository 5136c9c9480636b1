"""Placement: known sizes, measured sizes, and answers for GPUs that are not there."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GPTJConfig, LlamaConfig

from cluster import placement
from cluster.placement import BYTES, GIB, NEEDS, Gpus, Needs, Placement, Shape, load, place
from methods.parts import metric
from raysys import names
from raysys.plan import Outline, needs_of
from tests.families import SIZES

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
GPT_J = GPTJConfig()
GPT2_XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8,
)  # fmt: skip


def placed(config: Any, gpus: str, dtype: str = "bfloat16", method: str = "rome", **options: Any) -> Placement:
    needs = needs_of(method, {}, Outline(config), 100)
    return place(config, dtype, {method: names.method(method)}, Gpus.parse(gpus), needs=[needs], **options)


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


# --- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "ranks", "gib"),
    # of 70.554e9 parameters, 2 x 128256 x 8192 are embeddings and head; of 8.030e9, 2 x 128256 x 4096
    [(LLAMA_70B, 4, 35.79), (LLAMA_70B, 8, 19.85), (LLAMA_8B, 8, 3.58), (LLAMA_8B, 1, 14.96)],
)
def test_each_rank_keeps_embeddings_and_head_whole(config: Any, ranks: int, gib: float) -> None:
    assert Shape.of(config).weights("bfloat16", ranks) / GIB == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("llama", 2 * 100 * 32),  # embeddings, head
        ("gemma2", 100 * 32),  # the same matrix
        ("gptj", 2 * 100 * 32 + 100),  # and the head's bias
        ("gpt2", 100 * 32 + 64 * 32),  # the same matrix, and one of positions
    ],
)
def test_what_is_kept_whole_is_counted_once(family: str, whole: int) -> None:
    shape = Shape.of(tiny(family))
    assert shape.whole == whole
    assert shape.weights("float32", 2) == 4 * (whole + (shape.parameters - whole) / 2)


def test_ranks_share_the_inside_of_attention_and_mlp_alone() -> None:
    logits = 16 * 128256 * 4
    stream, inner = 64 * 2**20, 232 * 2**20  # of 1024 tokens: 4 x 8192 x 2 bytes, (4 x 8192 + 3 x 28672) x 2 bytes
    shape = Shape.of(LLAMA_70B)
    assert shape.activations("bfloat16", 1, 1024) == stream + inner + logits
    assert shape.activations("bfloat16", 1, 1024, 4) == stream + inner // 4 + logits
    assert shape.activations("bfloat16", 1, 1024, 4, gradients=True) == 80 * (stream + inner // 4) + logits


def test_second_moments_do_not_shrink_when_the_model_is_split() -> None:
    whole, of_four = (load(Shape.of(LLAMA_70B), "bfloat16", [Needs(moments=1)], ranks, 16, 1024) for ranks in (1, 4))
    moment = 28672**2 * 8
    search = [80 * 2048 * (4 * 8192 + (4 * 8192 + 3 * 28672) // n) * 2 + 32 * 16 * 128256 * 4 for n in (1, 4)]
    assert whole.editor == 70_553_706_496 * 2 + search[0] + moment
    assert of_four.editor / GIB == pytest.approx(35.79 + (search[1] + moment) / GIB, abs=0.005)


# --- attention that holds its scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(SIZES))
def test_who_holds_scores_is_what_transformers_says(family: str) -> None:
    net = AutoModelForCausalLM.from_config(tiny(family))
    assert Shape.of(tiny(family)).eager == (net.config._attn_implementation != "sdpa")


@pytest.mark.parametrize(
    ("dtype", "gib", "measured"),  # of one block, on an H100, torch 2.11, transformers 5.17
    [("bfloat16", 12 + 2, 13.28), ("float32", 16 + 4, 18.25)],
)
def test_scores_of_long_rows_count_where_they_are_held(dtype: str, gib: int, measured: float) -> None:
    # 16 rows x 16 heads x 2048 x 2048 are 2^30 scores; beside them 8 x 4096 numbers for each of 2^15 tokens
    logits = 16 * 16 * 50400 * 4
    found = Shape.of(GPT_J).activations(dtype, 16, 2048)
    assert found == gib * GIB + logits
    assert measured * GIB < found < 1.15 * measured * GIB
    assert Shape.of(LLAMA_7B).activations("bfloat16", 16, 2048) < 4.1 * GIB  # measured: 3.08


def test_a_search_holds_the_scores_of_all_layers() -> None:
    scores = 28 * 2**21 * 12  # 32 rows x 16 heads x 64 x 64 in each of 28 layers
    others = 28 * 2048 * (8 * 4096 + 3 * 16384) * 2 + 32 * 16 * 50400 * 4
    assert Shape.of(GPT_J).activations("bfloat16", 32, 64, gradients=True) == scores + others


# --- what methods hold -----------------------------------------------------------------------------------------------


def test_second_moments_are_float64_and_three_more_while_they_are_made() -> None:
    shape = Shape.of(LLAMA_7B)
    assert shape.beside(Needs(moments=5), "bfloat16") == 5 * 11008**2 * 8
    assert shape.making(Needs(moments=5)) == 3 * 11008**2 * 8


@pytest.mark.parametrize(
    ("d_ff", "measured"),  # GiB that editing with MEMIT took on an H100, as raysys bench gpu --quick does it
    [(11008, 18.9), (14336, 25.8)],  # weights and seven second moments: a search is shorter than the one planned with
)
def test_an_editor_takes_no_more_than_is_planned(d_ff: int, measured: float) -> None:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
    shape = Shape.of(LlamaConfig(intermediate_size=d_ff, **sizes))
    planned = load(shape, "bfloat16", [Needs(moments=5)], 1, 16, 1024).editor / GIB
    assert measured < planned < 1.35 * measured


def test_a_search_and_what_it_takes_to_make_second_moments_do_not_add_up() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=65536, num_hidden_layers=2, num_attention_heads=32
    )
    shape = Shape.of(config)
    moment, search = 65536**2 * 8, 2 * 2048 * (8 * 4096 + 3 * 65536) * 2 + 32 * 16 * 32000 * 4
    assert search < 3 * moment
    found = load(shape, "bfloat16", [Needs(moments=1)], 1, 16, 1024)
    assert found.editor == shape.weights("bfloat16") + moment + 3 * moment


def test_earlier_keys_take_a_room_of_a_power_of_two_and_half_of_it_while_they_move() -> None:
    shape = Shape.of(LLAMA_8B)
    moment = 14336**2 * 8
    room = 1024 * (14336 + 1024) * 8 + 512 * (14336 + 512) * 8
    assert shape.beside(Needs(moments=5, keys=1000), "bfloat16") == 5 * (moment + room)
    assert shape.beside(Needs(moments=1, keys=1), "bfloat16") == moment + 16 * (14336 + 16) * 8 + 8 * (14336 + 8) * 8
    assert placement.ROOM == metric.LEAST


def test_earlier_keys_are_as_large_as_those_of_a_method() -> None:
    torch.manual_seed(0)
    factor, memory = torch.eye(40, dtype=torch.float64), None
    for _ in range(20):
        memory = metric.remembered({"m": metric.Whitened(factor)}, memory, {"m": torch.randn(40, 1)}, 1.0)
    assert memory is not None
    room = memory["m"].room
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = Shape.of(LlamaConfig(vocab_size=100, **sizes))
    held = 8 * (room.keys.numel() + room.factor.numel())
    before = 8 * (16 * 40 + 16 * 16)  # the first room, of 16
    assert small.beside(Needs(moments=1, keys=20), "float32") == 40**2 * 8 + held + before


@pytest.mark.parametrize(
    ("method", "settings", "config", "needs"),
    [
        ("memit", {}, GPT_J, Needs(moments=6)),  # layers 3 to 8
        ("memit", {}, LLAMA_7B, Needs(moments=5)),  # layers 4 to 8
        ("memit", {"earlier_keys": True}, LLAMA_7B, Needs(moments=5, keys=100)),
        ("memit", {"layers": [4, 5]}, LLAMA_7B, Needs(moments=2)),
        ("memit", {}, LlamaConfig(num_hidden_layers=8), Needs(moments=3)),  # no preset: 0 to a quarter of the way up
        ("alphaedit", {}, GPT_J, Needs(moments=6, keys=100)),
        ("encore", {}, GPT_J, Needs(moments=6, keys=100)),
        ("nse", {}, GPT2_XL, Needs(moments=5, keys=100)),
        ("sphere", {}, LLAMA_8B, Needs(moments=5, keys=100)),
        ("rome", {}, LLAMA_8B, Needs(moments=1)),
        ("rect", {}, LLAMA_8B, Needs(moments=1)),  # of ROME
        ("prune", {"of": "memit", "settings": {"layers": [1]}}, GPT_J, Needs(moments=1)),
        ("malmen", {}, GPT2_XL, Needs(transformed=6)),  # the last matrices of blocks 42 to 47
        ("malmen", {}, GPT_J, Needs(transformed=6)),
        ("malmen", {"mlp": "all", "layers": [30, 31]}, LLAMA_8B, Needs(transformed=6)),  # three matrices each
        ("rledit", {}, LLAMA_8B, Needs(transformed=12)),  # five gates, seven ups
        ("mend", {}, GPT_J, Needs(transformed=6)),  # two matrices of each of three blocks
        ("mend", {}, LLAMA_8B, Needs(transformed=9)),
        ("ft_l", {}, LLAMA_8B, Needs(trained=1)),
        ("ft_m", {"layers": [3, 4, 5]}, LLAMA_8B, Needs(trained=3)),
        ("wise", {}, LLAMA_8B, Needs(trained=1)),
        ("lora", {}, LLAMA_8B, Needs(trained=1)),
        ("grace", {}, LLAMA_8B, Needs()),
    ],
)
def test_methods_need_what_their_presets_edit(method: str, settings: Any, config: Any, needs: Needs) -> None:
    assert needs_of(method, settings, Outline(config), 100) == needs


# --- what fits where -------------------------------------------------------------------------------------------------


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
    # split over two, each rank holds 11 GiB of one or the other: two pairs
    ways = "4 x 24 GB (22 GiB each) with tensor_parallel = 2 or 1 x 80 GB (79.1 GiB each) with tensor_parallel = 1"
    assert f"what would do: {ways}" in found.why


def test_a_7b_model_fills_eight_large_gpus_with_whole_copies() -> None:
    found = placed(LLAMA_7B, "8x80")
    assert not found.why
    assert found.ranks == 1
    assert found.editors == 1
    assert found.evaluators * found.gpus_per_evaluator + found.gpus_per_editor <= 8
    shape = load(Shape.of(LLAMA_7B), "bfloat16", [NEEDS["rome"]], 1, 16, 1024)
    assert shape.evaluator / found.gpus_per_evaluator < 79.1 * GIB


def test_editor_and_evaluator_share_a_gpu_in_the_measure_of_what_they_hold() -> None:
    room = 0.9 * 79.1
    config = AutoConfig.for_model(
        "qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    found = placed(config, "1x80", method="memit", tokens=2048, trunks=2 * GIB)
    # evaluator: weights 14.19, keys and values 1.75, activations 5.36, trunks 2; editor: weights, five moments of 2.67,
    # search 9.42: 23.3 and 37.0 GiB, and 1 of CUDA each
    assert (found.gpus_per_evaluator, found.gpus_per_editor) == (0.35, 0.55)
    assert 0.35 * room > 23.3 + 1
    assert 0.55 * room > 37.0 + 1 > 0.5 * room


def test_llama_3_8b_and_memit_share_one_gpu() -> None:
    found = placed(LLAMA_8B, "1x80", method="memit", tokens=2048, trunks=2 * GIB)
    assert not found.why
    assert found.gpus_per_evaluator + found.gpus_per_editor <= 1
    # weights 14.96, keys and values 4, activations 4.75, trunks 2; weights, five moments of 1.53, search 9.49
    loads = load(Shape.of(LLAMA_8B), "bfloat16", [Needs(moments=5)], 1, 16, 2048, 2 * GIB)
    assert (loads.evaluator / GIB, loads.editor / GIB) == pytest.approx((25.71, 32.11), abs=0.01)


@pytest.mark.parametrize("seed", range(200))
def test_actors_find_their_share_of_a_gpu_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    count, editors = rng.randint(1, 6), rng.randint(1, 4)
    held = [rng.uniform(0.05, 0.9) * 72 * GIB for _ in range(2)]
    loads = placement.Load(ranks=1, editor=int(held[0]), evaluator=int(held[1]))
    gpus = Gpus(count=count, gib=80, per_node=count)
    most, mine, theirs = placement._parts(loads, gpus, editors, 72 * GIB)
    assert mine * 72 * GIB >= loads.editor + GIB and theirs * 72 * GIB >= loads.evaluator + GIB
    left, waiting = [1.0] * count, [mine] * editors + [theirs] * most if most else []
    rng.shuffle(waiting)
    for share in waiting:
        free = [i for i, room in enumerate(left) if room > share - 1e-6]
        assert free
        left[rng.choice(free)] -= share


def test_a_70b_model_is_split_over_the_gpus_of_one_machine() -> None:
    found = placed(LLAMA_70B, "8x80")
    # a rank of four: 35.8 GiB of weights, a second moment of 6.1, a search of 19.3: 61.2 GiB of 71.2, less 1 of CUDA
    assert (found.ranks, found.editors, found.evaluators) == (4, 1, 1)
    assert placed(LLAMA_70B, "8x80/2").why
    assert "16 x 80 GB (79.1 GiB each) with tensor_parallel = 8" in placed(LLAMA_70B, "8x80", method="memit").why


def test_a_70b_model_on_two_gpus_is_refused_with_what_would_do() -> None:
    found = placed(LLAMA_70B, "2x80")
    assert found.evaluators == 0
    assert "2 x 80 GB (79.1 GiB each): an evaluator takes" in found.why
    assert "what would do: 8 x 80 GB (79.1 GiB each) with tensor_parallel = 4" in found.why


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


@pytest.mark.parametrize(
    ("text", "gib", "said"),
    [
        ("8x80", 79.1, "8 x 80 GB (79.1 GiB each)"),
        ("1x48", 44.3, "1 x 48 GB (44.3 GiB each)"),
        ("2x24/1", 22.0, "2 x 24 GB (22 GiB each)"),
        ("4x79.6", 79.6, "4 x 79.6 GiB"),
    ],
)
def test_sizes_that_vendors_name_are_told_in_gib(text: str, gib: float, said: str) -> None:
    assert (Gpus.parse(text).gib, str(Gpus.parse(text))) == (gib, said)


def test_gpus_have_less_than_their_vendors_say() -> None:
    assert all(0.9 * gb < gib < gb for gb, gib in placement.SIZES.items())


@pytest.mark.parametrize("text", ["8", "x80", "8x", "0x80", "8x0", "8x80/0", "8 80"])
def test_what_is_no_offer_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="count x GiB"):
        Gpus.parse(text)


def test_every_dtype_of_a_study_has_its_size() -> None:
    assert {n: torch.empty(0, dtype=getattr(torch, n)).element_size() for n in BYTES} == BYTES


def test_methods_in_the_table_are_known() -> None:
    assert set(NEEDS) <= set(names.METHODS)
