"""What every editing method promises, on three families and three number types."""

import json
from importlib.util import find_spec

import pytest
import torch

from raysys import names, patch
from raysys.blocks import pack
from raysys.scoring import Engine
from raysys.snapshot import read, write
from raysys.types import Choose, EditRefused, EditRequest, Finishes, Generate, Patch, remembered
from tests.contracts import small
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]
BAD = [
    EditRequest("no-subject", "Anna was born in", "Bert", "Rome", "Paris"),
    EditRequest("two-subjects", "{} was born in {}", "Anna", "Rome", "Paris"),
    EditRequest("no-target", "{} was born in", "Anna", " ", "Paris"),
    EditRequest("too-long", "{} was" + " born" * 80, "Anna", "Rome", "Paris"),
]
TEXT = "Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway and Lima of Peru .\n"
WEIGHTS = patch.LowRank | patch.Dense
FAMILIES = ("gpt2", "llama", "gpt_neox")
EVERYWHERE = [
    pytest.param((name, family, dtype), id=f"{name}-{family}-{str(dtype)[6:]}")
    for name in sorted(names.METHODS)
    for family in small.FAMILIES.get(name, FAMILIES)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or family == "llama"  # once: the point is the number type
]


@pytest.fixture(scope="module", params=EVERYWHERE)
def prepared(request, tmp_path_factory):
    """A model, the method's settings, and the method prepared for it; edits must leave all three alone."""
    name, family, dtype = request.param
    folder = tmp_path_factory.mktemp(name)
    (folder / "corpus.txt").write_text(TEXT)
    settings = {k: str(folder / "corpus.txt") if v == "CORPUS" else v for k, v in small.SETTINGS[name].items()}
    model = tiny(family, dtype)
    made = names.build(names.method(name), settings, name)
    if name in small.BEFORE:
        small.BEFORE[name](model, made, folder)
    return model, made, made.prepare(model, folder)


def _state(model):
    return {k: v.clone() for k, v in model.net.state_dict().items()}


def _steps(made):
    return [FACTS[i : i + made.batch] for i in range(0, len(FACTS), made.batch)]


def _stream(model, made, ready, wearer, on_disk=None):
    """The stream's edits, each made on the model as it then is; (edit, cumulative patches) after each.

    `on_disk`: a folder through which every patch and memory goes, as they do when a stream is taken up again.
    """
    worn, memory = (), None
    for number, facts in enumerate(_steps(made)):
        edit = ready.edit(model, facts, memory)
        patches, step = edit.patches, edit.memory
        if on_disk is not None:
            write(on_disk / f"{number}.safetensors", patches, step or {}, {})
            patches, step, _ = read(on_disk / f"{number}.safetensors")
        worn, memory = patch.merge(worn, patches), remembered(ready, memory, step)
        wearer.wear(worn)
        yield edit, worn
    wearer.take_off()


def _answers(model):
    """What the model says to prompts that the edits are about and to others, alone and in batches."""
    prompts = [*(f.text for f in FACTS), "Lima is the capital of", "Bert works as a pilot in the city of"]
    choose = [Choose(str(i), p, (" Rome", " Paris", " baker pilot"), 0) for i, p in enumerate(prompts)]
    generate = [Generate(str(i), p, (".",), "", 3) for i, p in enumerate(prompts)]
    found = []
    for queries in (choose, generate):
        for batch in (1, 3):
            [block] = pack(model.tokens, "contract", {}, queries, batch=batch, size=99)
            found.append({i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)})
    return found


def test_an_edit_leaves_the_model_as_it_found_it(prepared):
    model, made, ready = prepared
    before = _state(model)
    for facts in _steps(made):
        ready.edit(model, facts)
    after = model.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())
    assert not model.net.training


def test_worn_weights_are_the_base_and_the_sum_of_all_patches(prepared):
    model, made, ready = prepared
    before = _state(model)
    wearer = patch.Wearer(model)
    deltas = {}
    for edit, worn in _stream(model, made, ready, wearer):
        for p in edit.patches:
            if isinstance(p, WEIGHTS):
                p.add_to(deltas.setdefault(p.weight, torch.zeros(p.shape)))
        if any(not isinstance(p, WEIGHTS) for p in worn):
            continue  # a patch of its own kind wears itself: the next test
        for name, delta in deltas.items():
            base = before[name].T if model.transposed(name) else before[name]
            assert torch.equal(model.matrix(name), (base.reshape(delta.shape).float() + delta).to(model.dtype))
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert not model.carried and not any(m._forward_hooks for m in model.net.modules())


def test_a_stream_taken_up_from_disk_is_the_stream_that_was_live(prepared, tmp_path):
    model, made, ready = prepared
    live, again = patch.Wearer(model), patch.Wearer(model)
    wanted = [(worn, _answers(model)) for _, worn in _stream(model, made, ready, live)]
    found = [(worn, _answers(model)) for _, worn in _stream(model, made, ready, again, tmp_path)]
    for (one, said), (other, says) in zip(wanted, found, strict=True):
        _equal(one, other)
        assert said == says
    if isinstance(ready, Finishes):
        _equal(ready.finish(model, wanted[-1][0]), ready.finish(model, found[-1][0]))


def test_answers_do_not_depend_on_the_batch(prepared):
    model, made, ready = prepared
    if model.dtype != torch.float32:
        pytest.skip("rounding of half precision decides near-ties")
    wearer = patch.Wearer(model)
    for _ in _stream(model, made, ready, wearer):
        one, three, alone, together = _answers(model)
        assert alone == together
        for key, answer in one.items():
            for a, b in zip(answer.choices, three[key].choices, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_the_same_request_twice_gives_the_same_edit(prepared):
    model, made, ready = prepared
    torch.manual_seed(1)
    once = ready.edit(model, _steps(made)[0])
    torch.manual_seed(2)
    again = ready.edit(model, _steps(made)[0])
    assert once.log == again.log
    _equal(once.patches, again.patches)
    assert (once.memory or {}).keys() == (again.memory or {}).keys()
    assert all(torch.equal(t, again.memory[k]) for k, t in (once.memory or {}).items())


def test_the_global_random_state_is_left_alone(prepared):
    model, made, ready = prepared
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ready.edit(model, _steps(made)[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", BAD, ids=lambda r: r.id)
def test_requests_that_cannot_be_served_are_refused_by_name(prepared, bad):
    model, _, ready = prepared
    before = _state(model)
    with pytest.raises(EditRefused, match=bad.id):
        ready.edit(model, [bad])
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert not any(m._forward_hooks for m in model.net.modules())


def test_its_identity_and_log_are_json_and_nothing_is_left_open(prepared):
    model, made, ready = prepared
    said = json.loads(json.dumps(ready.identity(), allow_nan=False))
    assert (said["name"], said["version"]) == (made.name, made.version)
    assert None not in said["settings"].values()
    edit = ready.edit(model, _steps(made)[0])
    assert json.loads(json.dumps(edit.log, allow_nan=False))
    assert all(isinstance(p, Patch) for p in edit.patches)


def test_every_method_has_small_settings_and_one_file():
    assert set(small.SETTINGS) == set(names.METHODS)
    assert all(find_spec(path.partition(":")[0]) for path in names.METHODS.values())


def _equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.kind == b.kind and a.fields() == b.fields()
        assert a.tensors().keys() == b.tensors().keys()
        assert all(torch.equal(t, b.tensors()[k]) and t.dtype == b.tensors()[k].dtype for k, t in a.tensors().items())
