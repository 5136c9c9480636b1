"""PMET: both values are searched together, the MLP's is written, and the square root of the layers left spreads it."""

import pytest
import torch

from methods.parts import locate, pmet_search
from methods.pmet import PRESETS, Pmet, modules
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
]
TEXTS = ("{}", "The city. {}", "Because Therefore I was the. {}")
SETTINGS = {"layers": (0, 1), "steps": 6, "lr": 0.1, "weight": 5.0, "contexts": ((5, 4),), "documents": 50}
SEARCH = {"steps": 4, "lr": 0.1, "weight_decay": 0.5, "clamp": 4.0, "kl": 0.0625}


@pytest.fixture
def prepare(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway .\n" * 9)
    settings = {**SETTINGS, "corpus": str(path), "ridge": 0.01}
    return lambda model, **more: Pmet(**{**settings, **more}).prepare(model, tmp_path)


def _add(value, row):
    def hook(_, out):
        out = out.clone()
        out.view(len(row.ids), -1)[row.at] += value.offset
        return out

    return hook


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_search_reports_the_loss_that_plain_forward_passes_give(family, layer):
    model = tiny(family)
    pair = pmet_search.values(model, FACTS, TEXTS, layer, pmet_search.Search(**SEARCH))[1]
    nll = 0.0
    for text in TEXTS:
        row = locate.row(model, FACTS[1], text, target=True)
        ids = torch.tensor([row.ids])

        names = modules(model, layer, True)
        with model.watching(names[0], _add(pair[0], row)), model.watching(names[1], _add(pair[1], row)):
            logprobs = model.net(input_ids=ids).logits[0].log_softmax(-1)
        nll -= float(logprobs[range(row.first - 1, len(row.ids)), list(row.labels)].mean()) / len(TEXTS)
    assert nll == pytest.approx(float(pair[1].losses[-1, 1]), rel=1e-4)


def test_requests_are_independent_of_each_other():
    model = tiny("llama")
    together = pmet_search.values(model, FACTS, TEXTS, 1, pmet_search.Search(**SEARCH))
    for fact, pair in zip(FACTS, together, strict=True):
        [alone] = pmet_search.values(model, [fact], TEXTS, 1, pmet_search.Search(**SEARCH))
        for one, other in zip(alone, pair, strict=True):
            torch.testing.assert_close(one.offset, other.offset, rtol=1e-3, atol=1e-4)


def test_each_offset_stays_in_its_own_ball():
    model = tiny("gpt2")
    search = pmet_search.Search(**{**SEARCH, "steps": 6, "lr": 0.5, "clamp": 0.5})
    [pair] = pmet_search.values(model, FACTS[:1], TEXTS, 1, search)
    for value in pair:
        assert 0 < float(value.offset.norm()) <= 0.5 * float(value.now.norm()) * (1 + 1e-5)


def test_it_ends_once_all_targets_are_the_likeliest_and_the_essence_is_quiet():
    model = tiny("gpt2")
    easy = {**SEARCH, "steps": 40, "lr": 0.3, "weight_decay": 0.0, "clamp": 9.0, "kl": 0.0}
    fact = EditRequest("easy", "{}", "Anna was born in", "Rome")  # the subject's last token is where the target is said
    [pair] = pmet_search.values(model, [fact], TEXTS, 0, pmet_search.Search(**easy))
    losses = pair[1].losses
    assert len(losses) < 40 and float(losses[-1, 0]) > 0.05  # not because the loss was small
    loud = {**easy, "kl": 50.0}
    [pair] = pmet_search.values(model, [fact], TEXTS, 0, pmet_search.Search(**loud))
    assert len(pair[1].losses) > len(losses)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_changes_equal_the_closed_form(family, attention, prepare):
    model = tiny(family)
    ready = prepare(model, attention=attention)
    done, pairs = ready.solved(model, FACTS)
    aims = {n: torch.stack([p[i].wanted for p in pairs], 1) for i, n in enumerate(modules(model, 1, True))}
    assert [p.weight for p in done.patches] == [f"{m}.weight" for i in (0, 1) for m in modules(model, i, attention)]
    for change in done.patches:
        module = change.weight.removesuffix(".weight")
        number = next(i for i in (0, 1) if module in modules(model, i, attention))
        gauge = dict(zip(modules(model, number, attention), modules(model, 1, attention), strict=True))[module]
        k, factor = done.keys[module], ready.spaces[module].factor
        inverse = torch.linalg.inv(k @ k.T + 5.0 * factor @ factor.T)
        wanted = (aims[gauge].double() - done.now[module]) / (2 - number) ** 0.5 @ k.T @ inverse
        torch.testing.assert_close((change.left @ change.right).double(), wanted, rtol=1e-3, atol=1e-4)


def test_the_published_variant_transposes_square_changes_of_transposed_weights_alone(prepare):
    model = tiny("gpt2")
    fixed, published = (prepare(model, layers=(1,), attention=True, published=p) for p in (False, True))
    (attention, _), (transposed, mlp) = fixed.edit(model, FACTS).patches, published.edit(model, FACTS).patches
    torch.testing.assert_close(transposed.left @ transposed.right, (attention.left @ attention.right).T)
    assert mlp.shape == (32, 128)
    llama = tiny("llama")
    one, two = (prepare(llama, layers=(1,), attention=True, published=p).edit(llama, FACTS) for p in (False, True))
    assert all(torch.equal(a.left, b.left) for a, b in zip(one.patches, two.patches, strict=True))


def test_a_broken_model_is_said_and_left_alone(prepare):
    model = tiny("gpt2")
    ready = prepare(model)
    model.matrix("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(EditRefused, match=r"'anna'.*not finite"):
        ready.edit(model, FACTS[:1])


def test_presets_name_the_published_layers():
    assert PRESETS["gpt-j-6b"]["layers"] == (3, 4, 5, 6, 7, 8) and PRESETS["gpt-j-6b"]["lr"] == 0.2
