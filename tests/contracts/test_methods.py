"""What every editing method promises, on three families and two number types."""

import json

import pytest
import torch

from raysys import names, patch
from raysys.types import EditRefused, EditRequest
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
]
BAD = [
    EditRequest("no-subject", "Anna was born in", "Bert", "Rome"),
    EditRequest("no-target", "{} was born in", "Anna", " "),
    EditRequest("too-long", "{} was" + " born" * 80, "Anna", "Rome"),
]
TEXT = "Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway and Lima of Peru .\n"
SMALL = {"layer": 1, "layers": (1,), "steps": 5, "documents": 9, "contexts": ((5, 5),), "lr": 0.05, "ridge": 0.1}
pytestmark = [
    pytest.mark.parametrize("method", sorted(names.METHODS)),
    pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]


@pytest.fixture
def prepared(method, family, dtype, tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    model = tiny(family, dtype)
    cls = names.method(method)
    fields = cls.__dataclass_fields__
    settings = {k: v for k, v in {**SMALL, "corpus": str(tmp_path / "corpus.txt")}.items() if k in fields}
    made = names.build(cls, settings, method)
    return model, made, made.prepare(model, tmp_path)


def _state(model):
    return {k: v.clone() for k, v in model.net.state_dict().items()}


def test_an_edit_leaves_the_model_as_it_found_it(prepared):
    model, made, ready = prepared
    before = _state(model)
    for start in range(0, len(FACTS), made.batch):
        ready.edit(model, FACTS[start : start + made.batch])
    after = model.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())


def test_worn_weights_are_the_base_and_the_sum_of_all_patches(prepared):
    model, _, ready = prepared
    before = _state(model)
    wearer = patch.Wearer(model)
    worn, memory, deltas = (), None, {}
    for fact in FACTS:
        edit = ready.edit(model, [fact], memory)
        worn, memory = patch.merge(worn, edit.patches), edit.memory
        wearer.wear(worn)
        for p in edit.patches:
            p.add_to(deltas.setdefault(p.weight, torch.zeros(p.shape)))
    for name, delta in deltas.items():
        base = before[name].T if model.transposed(name) else before[name]
        assert torch.equal(model.matrix(name), (base.reshape(delta.shape).float() + delta).to(model.dtype))
    untouched = [k for k in before if k not in deltas]
    assert all(torch.equal(before[k], model.net.state_dict()[k]) for k in untouched)
    wearer.take_off()
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())


def test_the_same_request_twice_gives_the_same_edit(prepared):
    model, _, ready = prepared
    torch.manual_seed(1)
    once = ready.edit(model, FACTS[:1])
    torch.manual_seed(2)
    again = ready.edit(model, FACTS[:1])
    assert once.log == again.log
    for a, b in zip(once.patches, again.patches, strict=True):
        assert a.fields() == b.fields()
        assert all(torch.equal(x, b.tensors()[k]) for k, x in a.tensors().items())


def test_requests_that_cannot_be_served_are_refused_by_name(prepared):
    model, _, ready = prepared
    before = _state(model)
    for bad in BAD:
        with pytest.raises(EditRefused, match=bad.id):
            ready.edit(model, [bad])
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())


def test_its_identity_and_log_are_json_and_nothing_is_left_open(prepared):
    model, made, ready = prepared
    said = json.loads(json.dumps(ready.identity()))
    assert (said["name"], said["version"]) == (made.name, made.version)
    assert None not in said["settings"].values()
    assert json.loads(json.dumps(ready.edit(model, FACTS[:1]).log, allow_nan=False))
