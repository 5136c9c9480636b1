"""ROME: the worn matrix maps the key to the value, and the target becomes likely."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from methods.parts import locate, presets
from methods.rome import PRESETS, Rome
from raysys import patch
from raysys.model import Model
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny

FACT = EditRequest("fact", "{} was born in the city of", "Anna", "Rome", "Paris")
SETTINGS = {"layer": 0, "steps": 25, "lr": 0.3, "weight_decay": 0.0, "contexts": ((5, 5),), "documents": 50}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway .\n" * 9)
    return str(path)


@pytest.fixture
def prepare(corpus, tmp_path):
    return lambda model, **settings: Rome(**{**SETTINGS, "corpus": corpus, **settings}).prepare(model, tmp_path)


def _logprob(model, request):
    row = locate.row(model, request, target=True)
    logprobs = model.net(input_ids=torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
    return float(logprobs[range(row.first - 1, len(row.ids)), list(row.labels)].sum())


@pytest.mark.parametrize("family", SIZES)
def test_the_edited_matrix_maps_the_key_to_the_value(family, prepare):
    model = tiny(family)
    module = model.mlp_out(0)
    rome = prepare(model, ridge=0.01)
    edit = rome.edit(model, [FACT])
    key = locate.read(model, module, [locate.row(model, FACT)]).inputs[0]
    search = locate.Search(steps=25, lr=0.3, weight_decay=0.0, clamp=4.0, kl=0.0625)
    [value] = locate.values(model, [FACT], rome.contexts.texts, 0, search, "mlp")
    with patch.wearing(model, edit.patches):
        bias = model.module(module).bias
        got = model.matrix(f"{module}.weight") @ key + (0 if bias is None else bias)
    torch.testing.assert_close(got, value.wanted, rtol=1e-4, atol=1e-4 * float(value.wanted.norm()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_that_knows_facts_learns_the_new_one(family, shared, prepare):
    model = Model.load(str(shared / "golden" / "models" / f"tiny-{family}"))
    fact = EditRequest("job", "{} works as a", "Jairsaix Binvain", "pilot", "soldier")
    edit = prepare(model, layer=1, lr=0.5, weight_decay=0.05, second_moment=False).edit(model, [fact])
    with patch.wearing(model, edit.patches):
        assert _logprob(model, fact) > -0.2


def test_the_direction_is_the_key_through_the_inverse_second_moment(prepare):
    model = tiny("gpt2")
    plain, shaped = prepare(model, second_moment=False), prepare(model, ridge=0.01)
    rows = [locate.row(model, FACT, c) for c in plain.contexts.texts]
    mean = locate.read(model, model.mlp_out(0), rows).inputs.mean(0).double()
    c = shaped.moment.matrix
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
    for rome, wanted in ((plain, mean), (shaped, torch.linalg.solve(c, mean))):
        [change] = rome.edit(model, [FACT]).patches
        torch.testing.assert_close(change.right[0], (wanted / wanted.norm()).float(), rtol=1e-4, atol=1e-5)


def test_identity_names_settings_and_artifacts_and_is_json(prepare):
    model = tiny("gpt2")
    said = json.loads(json.dumps(prepare(model).identity()))
    assert said["name"] == "rome" and said["settings"]["layer"] == 0
    assert set(said["artifacts"]) == {"contexts", "second_moment"}
    assert said == json.loads(json.dumps(prepare(model).identity()))
    assert prepare(model, seed=1).identity() != prepare(model).identity()


def test_open_settings_come_from_the_preset(prepare):
    settings = prepare(tiny("gpt2"), layer=None, steps=None, weight_decay=None).settings
    assert (settings.layer, settings.steps, settings.weight_decay) == (1, 20, 0.5)


def test_presets_name_the_published_layers():
    assert PRESETS["gpt2-xl"]["layer"] == 17
    assert PRESETS["gpt-j-6b"]["layer"] == PRESETS["llama-2-7b"]["layer"] == 5


def test_the_published_variant_has_no_second_moment(prepare):
    assert prepare(tiny("gpt2"), published=True).moment is None


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        ("llama", {"num_hidden_layers": 6, "hidden_size": 192}, "world/small"),
        ("llama", {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 32000}, "llama-2-7b"),
        ("llama", {"num_hidden_layers": 32, "hidden_size": 4096, "vocab_size": 128256}, "llama-3-8b"),
        ("gpt_neox", {"num_hidden_layers": 16, "hidden_size": 2048}, "pythia-1b"),
        ("gpt_neox", {"num_hidden_layers": 17, "hidden_size": 2048}, ""),
    ],
)
def test_models_are_known_by_their_shape(family, sizes, name):
    config = AutoConfig.for_model(family, **sizes)
    model = SimpleNamespace(config=config, layers=config.num_hidden_layers, width=config.hidden_size)
    assert presets.name(model) == name


def test_llama_3_1_is_told_from_3_by_its_longer_context():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
    config = AutoConfig.for_model("llama", num_hidden_layers=32, hidden_size=4096, vocab_size=128256, rope_scaling=rope)
    assert presets.name(SimpleNamespace(config=config, layers=32, width=4096)) == "llama-3.1-8b"


def test_two_requests_and_a_direction_that_cannot_reach_are_refused(prepare):
    model = tiny("gpt2")
    rome = prepare(model)
    with pytest.raises(EditRefused, match="one edit at a time, got 2"):
        rome.edit(model, [FACT, FACT])
    object.__setattr__(rome, "_direction", torch.zeros_like)
    with pytest.raises(EditRefused, match="orthogonal"):
        rome.edit(model, [FACT])


def test_too_little_text_for_a_second_moment_is_said(prepare):
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="raise `documents` or `ridge`"):
        prepare(model, ridge=0.0).edit(model, [FACT])


def test_a_broken_model_is_said_and_left_alone(prepare):
    model = tiny("gpt2")
    rome = prepare(model)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match="not finite"):
        rome.edit(model, [FACT])
