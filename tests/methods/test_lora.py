"""LoRA: the trained adapter against an independent computation, and what it leaves behind."""

import hashlib
import json

import pytest
import torch
from torch.func import functional_call

from methods.lora import Adapter, Lora
from methods.parts import locate
from raysys.model import Model
from raysys.patch import Wearer, merge, wearing
from raysys.snapshot import read, write
from raysys.types import EditRefused, EditRequest
from tests.families import tiny

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome Oslo", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora", "baker", "singer")
MODULES = {"gpt2": ("c_attn", "c_proj"), "gpt_neox": ("query_key_value",), "llama": ("q_proj", "down_proj")}


def lora(family="llama", **settings):
    return Lora(**{"modules": MODULES[family], "layers": (1, 2), "type": "lora", "steps": 4, "rank": 2, **settings})


def stream(model, method, requests, folder=None):
    """The cumulative patches after `requests`, one by one; through the disk if there is a folder."""
    wearer, worn = Wearer(model), ()
    for i, request in enumerate(requests):
        patches = method.edit(model, [request]).patches
        if folder is not None:
            write(folder / f"{i}.safetensors", patches, {}, {})
            patches = read(folder / f"{i}.safetensors")[0]
        worn = merge(worn, patches)
        wearer.wear(worn)
    wearer.take_off()
    return worn


def by_hand(model: Model, start: Adapter, request: EditRequest, s: Lora) -> dict[str, torch.Tensor]:
    """The changed matrices (d_out, d_in) after Adam on the factors, with whole weights put in by functional_call."""
    weights = {f"{n}.weight": model.matrix(f"{n}.weight").float().clone() for n, *_ in start.shapes}
    parts = [(f"{n}.weight", b.clone(), a.clone(), e.clone()) for n, b, a, e in start.parts]
    trained = [t for _, b, a, e in parts for t in ((a, b, e) if s.type == "adalora" else (a, b))]
    adam = torch.optim.Adam([t.requires_grad_() for t in trained], lr=s.lr)
    prompt, target = model.pair(request.text, request.continuation)
    ids = torch.tensor([prompt + target])
    for _ in range(s.steps):
        changed = {n: weights[n] + start.scale * (b * e) @ a for n, b, a, e in parts}
        stored = {n: w.T if model.transposed(n) else w for n, w in changed.items()}
        logits = functional_call(model.net, stored, args=(ids,)).logits[0, len(prompt) - 1 : -1]
        loss = -logits.log_softmax(-1)[range(len(target)), target].mean()
        if s.type == "adalora":
            apart = [
                torch.linalg.matrix_norm(m - torch.eye(s.rank)) for _, b, a, _ in parts for m in (a @ a.T, b.T @ b)
            ]
            loss = loss + 0.5 * sum(apart) / len(apart)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return {n: (start.scale * (b * e) @ a).detach() for n, b, a, e in parts}


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("family", MODULES)
def test_a_stream_trains_one_adapter_as_plain_gradient_descent_on_whole_weights_does(family, kind):
    model = tiny(family)
    method = lora(family, type=kind, dropout=0.0, lr=0.005).prepare(model)
    [untrained] = lora(family, type=kind, dropout=0.0, lr=0.0).edit(model, [ANNA]).patches
    [first] = stream(model, method, [ANNA])
    [second] = stream(model, method, [ANNA, DORA])
    for start, request, found in ((untrained, ANNA, first), (first, DORA, second)):
        wanted = by_hand(model, start, request, method)
        for change in found.changes:
            got = change.left @ change.right
            assert float((got - wanted[change.weight]).norm() / wanted[change.weight].norm()) < 1e-3
            assert float(got.norm()) > 0


def test_the_first_factors_are_pefts_and_change_nothing():
    model = tiny("llama")
    [adapter] = lora(lr=0.0).prepare(model).edit(model, [ANNA]).patches
    assert all(float(c.left.norm()) == 0 and float(c.right.norm()) > 0 for c in adapter.changes)
    assert adapter.scale == 32 / 2


def test_worn_weights_are_base_and_scaled_product_bit_for_bit():
    model = tiny("gpt2", torch.bfloat16)
    worn = stream(model, lora("gpt2").prepare(model), [ANNA, DORA])
    names = [f"{n}.weight" for n, *_ in worn[0].shapes]
    base = {n: model.matrix(n).clone() for n in names}
    with wearing(model, worn):
        inside = {n: model.matrix(n).clone() for n in names}
        assert model.wears(Adapter) is worn[0]
    with wearing(model, worn[0].changes):
        assert all(torch.equal(model.matrix(n), inside[n]) for n in names)
    assert all(torch.equal(model.matrix(n), base[n]) and not torch.equal(base[n], inside[n]) for n in names)


def test_an_edit_leaves_no_trace_of_peft():
    model = tiny("gpt2")
    modules, attributes = dict(model.net.named_modules()), set(vars(model.net))
    config = json.dumps(model.config.to_dict(), default=str)
    method = lora("gpt2").prepare(model)
    wearer = Wearer(model)
    wearer.wear(method.edit(model, [ANNA]).patches)
    worn = {k: v.clone() for k, v in model.net.state_dict().items()}
    method.edit(model, [DORA])
    assert all(torch.equal(v, worn[k]) for k, v in model.net.state_dict().items())
    with pytest.raises(EditRefused, match="dora"):
        method.edit(model, [EditRequest("dora", "nobody", "Dora", "x")])
    wearer.take_off()
    now = dict(model.net.named_modules())
    assert list(now) == list(modules) and all(now[n] is m for n, m in modules.items())
    assert set(vars(model.net)) == attributes and json.dumps(model.config.to_dict(), default=str) == config
    assert not any(p.requires_grad for p in model.net.parameters()) and not any(m.training for m in now.values())


def test_a_stream_from_disk_is_the_live_stream(tmp_path):
    model = tiny("llama")
    method = lora().prepare(model)
    live, again = stream(model, method, [ANNA, DORA]), stream(model, method, [ANNA, DORA], tmp_path)
    digest = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for p in (*live, *again) for t in p.tensors().values()]
    assert digest[:3] == digest[3:]


def test_dropout_is_drawn_anew_for_each_request_and_repeats_for_the_same():
    model = tiny("llama")
    method = lora(dropout=0.5, rank=4).prepare(model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    [once], [again] = (method.edit(model, [ANNA]).patches for _ in range(2))
    assert torch.equal(once.left, again.left) and torch.equal(torch.get_rng_state(), state)
    [plain] = lora(dropout=0.0, rank=4).prepare(model).edit(model, [ANNA]).patches
    assert not torch.equal(once.left, plain.left)


def test_unknown_modules_are_a_users_mistake():
    model = tiny("llama")
    before = dict(model.net.named_modules())
    with pytest.raises(ValueError, match="c_attn"):
        lora(modules=("c_attn",)).prepare(model)
    assert dict(model.net.named_modules()) == before


@pytest.mark.parametrize(
    "family", ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "opt"]
)
def test_the_rule_finds_matrices_in_every_family(family):
    model = tiny(family)
    before = float(_nll(model, ANNA))
    [adapter] = Lora(steps=8, lr=0.02, type="lora").prepare(model).edit(model, [ANNA]).patches
    with wearing(model, [adapter]):
        assert float(_nll(model, ANNA)) < before


@torch.no_grad()
def _nll(model, request):
    row = locate.row(model, request, target=True)
    hidden, _ = model.hidden(torch.tensor([row.ids]))
    logprobs = model.logits(hidden[0, row.first - 1 :]).log_softmax(-1)
    return -logprobs[range(len(row.labels)), list(row.labels)].mean()
