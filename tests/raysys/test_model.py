"""Every model family looks the same to methods and scoring."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysys.arch import FAMILIES, arch
from raysys.loading import locate
from raysys.model import Model
from tests.families import SIZES, network, tiny, tokenizer

TEXTS = ("Anna was born in the city of Rome", "The Eiffel tower is in", "Oslo")
families = pytest.mark.parametrize("family", SIZES)


def test_every_known_family_is_tested():
    assert set(SIZES) == set(FAMILIES)


@families
def test_hidden_and_logits_equal_the_plain_forward_pass(family):
    model = tiny(family)
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)])
        hidden, _ = model.hidden(ids)
        torch.testing.assert_close(model.logits(hidden), model.net(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@families
def test_padding_on_either_side_changes_nothing(family):
    model = tiny(family)
    rows = [model.encode(t) for t in TEXTS]
    ids, mask = model.batch(rows)
    alone = [model.hidden(torch.tensor([r]))[0][0] for r in rows]
    right, _ = model.hidden(ids, mask)
    shift = [ids.shape[1] - len(r) for r in rows]
    flipped = torch.stack([i.roll(s) for i, s in zip(ids, shift, strict=True)])
    left, _ = model.hidden(flipped, torch.stack([m.roll(s) for m, s in zip(mask, shift, strict=True)]))
    for i, wanted in enumerate(alone):
        torch.testing.assert_close(right[i, : len(wanted)], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left[i, shift[i] :], wanted, rtol=1e-4, atol=1e-4)


@families
def test_a_cached_prefix_changes_nothing(family):
    model = tiny(family)
    ids = torch.tensor([model.encode(TEXTS[0])])
    whole, _ = model.hidden(ids)
    _, cache = model.hidden(ids[:, :3])
    rest, _ = model.hidden(ids[:, 3:], torch.ones_like(ids), cache)
    torch.testing.assert_close(rest, whole[:, 3:], rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_trunk_and_upper_equal_the_whole(family, layer):
    model = tiny(family)
    ids, mask = model.batch([model.encode(t) for t in TEXTS])
    whole, _ = model.hidden(ids, mask)
    trunk = model.trunk(ids, mask, layer)
    torch.testing.assert_close(model.upper(trunk)[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


@families
def test_matrix_maps_inputs_to_outputs_and_writes_go_through(family):
    model = tiny(family)
    name = model.mlp_out(1)
    ids = torch.tensor([model.encode(TEXTS[0])])
    given, out = model.through(name, ids)
    module = model.module(name)
    bias = module.bias if module.bias is not None else 0
    torch.testing.assert_close(given @ model.matrix(f"{name}.weight").T + bias, out, rtol=1e-4, atol=1e-4)
    model.matrix(f"{name}.weight").zero_()
    assert not model.through(name, ids)[1].sub(bias).any()


@families
def test_module_names_of_a_family_exist(family):
    model = tiny(family)
    a = model.arch
    for name in (a.block, a.mlp_out, a.attn, a.attn_out, *a.mlp_in):
        model.module(name.format(1))
    assert model.module(a.after[0]) is not None
    assert model.layer(1) is model.module(a.block.format(1))


def test_a_change_of_the_mlp_output_joins_the_residual_stream_where_arch_says_so():
    for family in SIZES:
        model = tiny(family)
        ids = torch.tensor([model.encode(TEXTS[0])])
        block = model.arch.block.format(1)
        before = model.through(block, ids)[1]
        with model.watching(model.mlp_out(1), lambda _, out: out + 0.5):
            after = model.through(block, ids)[1]
        joins = torch.allclose(after - before, torch.tensor(0.5), atol=1e-4)
        assert joins == model.arch.mlp_added, family


def test_an_unknown_family_is_refused_with_the_way_to_add_it():
    from transformers import BertConfig

    with pytest.raises(ValueError, match=r"unknown model family 'bert'.*raysys/arch\.py"):
        arch(BertConfig())


def test_trailing_blanks_of_a_prompt_move_to_the_continuation():
    model = tiny("gpt2")
    assert model.pair("Anna was ", "born") == model.pair("Anna was", " born")
    head, rest = model.pair("Anna was", " born in Rome")
    assert head == model.encode("Anna was") and head + rest == model.encode("Anna was born in Rome")


def test_an_empty_prompt_becomes_the_token_that_begins_a_text():
    for family in ("gpt2", "llama"):  # without and with a BOS that the tokenizer adds
        model = tiny(family)
        assert model.pair("", "born") == ([1], model.tokenizer.encode("born", add_special_tokens=False))


@families
def test_digest_names_weights_tokenizer_and_configuration(family):
    model = tiny(family)
    assert model.digest == tiny(family).digest
    net = network(family)
    net.get_parameter(f"{model.mlp_out(0)}.weight").data[0, 0] += 1e-3
    assert Model(net, model.tokenizer).digest != model.digest
    assert Model(network(family), tokenizer(bos=model.encode("a")[0] != 1)).digest != model.digest


def test_digest_is_the_same_from_another_folder(model_folder, tmp_path):
    copy = shutil.copytree(model_folder("gpt2"), tmp_path / "copy")
    assert Model.load(str(copy)).digest == Model.load(str(model_folder("gpt2"))).digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_loads_in_any_number_type(model_folder, dtype):
    model = Model.load(str(model_folder("llama")), dtype=dtype)
    assert model.dtype is getattr(torch, dtype) and not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


def test_loading_errors_say_what_to_do(model_folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Model.load(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        Model.load(str(tmp_path))
    with pytest.raises(ValueError, match="offline"):
        Model.load("nobody/nothing")
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        Model.load(str(model_folder("gpt2")), dtype="int8")
    with pytest.raises(ValueError, match="world/small"):
        Model.load("world/large")
    bare = shutil.copytree(model_folder("gpt2"), tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        Model.load(str(bare))
    mute = shutil.copytree(model_folder("gpt2"), tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        Model.load(str(mute))
    alien = shutil.copytree(model_folder("gpt2"), tmp_path / "alien")
    config = json.loads((alien / "config.json").read_text())
    (alien / "config.json").write_text(json.dumps({**config, "model_type": "bloom", "architectures": []}))
    with pytest.raises(ValueError, match="unknown model family 'bloom'"):
        Model.load(str(alien))
    cut = shutil.copytree(model_folder("gpt2"), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="its weights"):
        Model.load(str(cut))
    part = shutil.copytree(model_folder("gpt2"), tmp_path / "part")
    tensors = load_file(part / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_proj.weight")
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack transformer\.h\.1\.mlp\.c_proj\.weight"):
        Model.load(str(part))


def test_names_that_do_not_exist_are_said():
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="no weight 'nowhere'"):
        model.matrix("nowhere")
    with pytest.raises(ValueError, match="layers 0 to 2"):
        model.mlp_out(3)


def test_a_hub_id_is_left_alone():
    assert locate("owner/name") == "owner/name" and locate("gpt2") == "gpt2"
