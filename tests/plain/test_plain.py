"""The plain implementations, which ours are timed against, give what was recorded from the published ones."""

import json

import pytest
import torch
from safetensors.torch import load_file

from raysys.model import Model
from tests.golden.common import error, load
from tests.plain import grace, kn, memit, moments, rome
from tests.plain.common import add_
from tests.plain.search import Search

ROMES = ["gpt2_ROME", "gpt2_ROME-nomom2", "llama_ROME"]
MEMITS = ["gpt2_MEMIT", "gpt2_MEMIT-batch5", "llama_MEMIT"]


@pytest.fixture
def case(shared, request):
    root = shared / "golden"
    family, _, method = request.param.partition("_")
    return load(root, root / request.param, family, method)


def _search(h):
    return Search(
        steps=h["v_num_grad_steps"],
        lr=h["v_lr"],
        weight_decay=h["v_weight_decay"],
        clamp=h["clamp_norm_factor"],
        kl=h["kl_factor"],
    )


def _weights(model, modules):
    return {f"{m}.weight": model.parameter(f"{m}.weight").detach().clone() for m in modules}


@pytest.mark.parametrize("case", ROMES, indirect=True)
def test_rome(case):
    h, model, wanted = case.hparams, case.model, case.vectors
    layer = h["layers"][0]
    module = model.mlp_out(layer)
    inverse = torch.inverse(case.common[f"cov.{module}"]) if h["mom2_adjustment"] else None
    before = _weights(model, [module])[f"{module}.weight"]
    for number, [i] in enumerate(case.batches):
        names = h["mlp_module_tmp"].format(layer), module
        found = rome.edit(
            model.net, model.tokenizer, case.requests[i], case.contexts["rome"], *names, inverse, _search(h)
        )
        assert found["passes"] == len(wanted[f"edit{number}.losses"])
        assert error(found["right"], wanted[f"edit{number}.u"]) < 1e-4
        assert error(found["left"], wanted[f"edit{number}.right_vector"]) < 1e-4
        add_(model.net, module, torch.outer(found["left"], found["right"]))
        if number == 0:
            assert error(model.parameter(f"{module}.weight") - before, wanted["edit0.weight_delta"]) < 1e-4
    assert error(model.parameter(f"{module}.weight") - before, wanted["weight_delta_total5"]) < 1e-4


@pytest.mark.parametrize("case", MEMITS, indirect=True)
def test_memit(case):
    h, model, wanted = case.hparams, case.model, case.vectors
    modules = [model.mlp_out(i) for i in h["layers"]]
    names = h["layer_module_tmp"], h["rewrite_module_tmp"], h["ln_f_module"]
    covs = [case.common[f"cov.{m}"] for m in modules]
    before = _weights(model, modules)
    for number, batch in enumerate(case.batches):
        requests = [case.requests[i] for i in batch]
        found = memit.edit(
            model.net,
            model.tokenizer,
            requests,
            case.contexts["memit"],
            h["layers"],
            names,
            covs,
            h["mom2_update_weight"],
            _search(h),
        )
        for module, (factors, share) in zip(modules, found["changes"], strict=True):
            assert error(factors, wanted[f"edit{number}.adj_k.{module}.weight"]) < 1e-4
            assert error(share, wanted[f"edit{number}.resid.{module}.weight"]) < 1e-4
            add_(model.net, module, (share @ factors.T).float())
        if number == 0:
            for name, weight in before.items():
                assert error(model.parameter(name) - weight, wanted[f"edit0.weight_delta.{name}"]) < 1e-4
    for name, weight in before.items():
        assert error(model.parameter(name) - weight, wanted[f"weight_delta_total.{name}"]) < 1e-4


@pytest.mark.parametrize("case", ["gpt2_KN"], indirect=True)
def test_kn_attribution(case):
    model, request = case.model, case.requests[0]
    modules = [model.arch.mlp_in[0].format(i) for i in range(model.layers)]
    answer = model.tokenizer.encode(request.was)
    scores = kn.attribution(model.net, model.tokenizer, request.text, answer, modules, case.hparams["steps"])
    assert error(scores, case.vectors["edit0.scores"]) < 1e-4


@pytest.mark.parametrize("case", ["gpt2_GRACE"], indirect=True)
def test_grace_training(case):
    h, model, wanted = case.hparams, case.model, case.vectors
    module = h["inner_params"][0].replace("[", ".").replace("]", "").removesuffix(".weight")
    for i, request in enumerate(case.requests):
        key, value, losses = grace.train(
            model.net,
            model.tokenizer,
            request.text,
            request.target,
            module,
            wanted[f"edit{i}.cold_init"][0],
            h["n_iter"],
            h["edit_lr"],
        )
        assert error(key, wanted[f"edit{i}.keys"][-1]) < 1e-4
        assert error(torch.tensor(losses), wanted[f"edit{i}.losses"]) < 1e-3  # Adam with so large a step, see README
        assert (value - wanted[f"edit{i}.values"][-1]).abs().median() < 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_second_moments(shared, family):
    root = shared / "golden"
    model = Model.load(str(root / "models" / f"tiny-{family}"))
    documents = json.loads((root / "cov_docs.json").read_text())
    counts = json.loads((root / f"{family}_common" / "meta.json").read_text())["counts"]
    for name, wanted in load_file(root / f"{family}_common" / "vectors.safetensors").items():
        module = name.removeprefix("cov.")
        got, count = moments.second_moment(model.net, model.tokenizer, module, documents, model.max_length)
        assert count == counts[module]
        assert error(got, wanted) < 1e-4
