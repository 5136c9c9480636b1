"""Tokens, keys and values at the right place, whatever the batch."""

import pytest
import torch

from methods.parts import locate
from raysys.types import EditRefused, EditRequest
from tests.families import SIZES, tiny

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome")
DORA = EditRequest("dora", "The Eiffel tower and {} is in", "Dora singer", "Oslo Lima", "Paris")
CONTEXTS = ("{}", "The city. {}", "Because Therefore I was the. {}")
SEARCH = locate.Search(steps=4, lr=0.1, weight_decay=0.5, clamp=4, kl=0.0625)
families = pytest.mark.parametrize("family", SIZES)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("request_", [ANNA, DORA], ids=lambda r: r.id)
@pytest.mark.parametrize("template", CONTEXTS)
def test_a_row_is_the_prompt_with_its_subject_and_target_in_place(family, request_, template):
    model = tiny(family)
    row = locate.row(model, request_, template, target=True)
    text = template.replace("{}", request_.text)
    assert model.decode(row.ids[: row.first]) == text
    assert model.decode((*row.ids, row.labels[-1])) == text + " " + request_.target
    assert (text.index(request_.subject) + len(request_.subject)) == len(model.decode(row.ids[: row.at + 1]))


def test_the_subjects_last_token_is_the_one_that_holds_its_last_letter():
    model = tiny("gpt2")
    cut = EditRequest("cut", "{}na was born in", "An", "Rome")  # one token reaches beyond the subject
    row = locate.row(model, cut)
    assert model.decode(row.ids[: row.at]) == "" and model.decode(row.ids[: row.at + 1]).startswith("An")


def test_the_padding_side_of_the_tokenizer_does_not_matter():
    model = tiny("gpt2")
    rows = [locate.row(model, r, c) for r in (ANNA, DORA) for c in CONTEXTS]
    wanted = locate.read(model, model.mlp_out(1), rows)
    model.tokenizer.padding_side = "left"
    again = [locate.row(model, r, c) for r in (ANNA, DORA) for c in CONTEXTS]
    assert again == rows
    assert torch.equal(locate.read(model, model.mlp_out(1), again).inputs, wanted.inputs)


@families
def test_a_batch_gives_the_same_keys_as_one_prompt_at_a_time(family):
    model = tiny(family)
    rows = [locate.row(model, r, c) for r in (ANNA, DORA) for c in CONTEXTS]
    together = locate.read(model, model.mlp_out(1), rows)
    for i, row in enumerate(rows):
        given, out = model.through(model.mlp_out(1), torch.tensor([row.ids]))
        torch.testing.assert_close(together.inputs[i], given[0, row.at], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.outputs[i], out[0, row.at], rtol=1e-4, atol=1e-4)


@families
@pytest.mark.parametrize("site", ["mlp", "block"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_search_reports_the_loss_that_plain_forward_passes_give(family, site, layer):
    model = tiny(family)
    name = model.mlp_out(layer) if site == "mlp" else model.arch.block.format(layer)
    value = locate.values(model, [ANNA, DORA], CONTEXTS, layer, SEARCH, site)[1]
    nll = 0.0
    for context in CONTEXTS:
        row = locate.row(model, DORA, context, target=True)
        ids = torch.tensor([row.ids])

        def add(_, out, row=row):
            out = out.clone()
            out.view(len(row.ids), -1)[row.at] += value.offset
            return out

        if context == "{}":
            torch.testing.assert_close(value.now, model.through(name, ids)[1][0, row.at], rtol=1e-4, atol=1e-4)
        with model.watching(name, add):
            logprobs = model.net(input_ids=ids).logits[0].log_softmax(-1)
        nll -= float(logprobs[range(row.first - 1, len(row.ids)), list(row.labels)].mean()) / len(CONTEXTS)
    assert nll == pytest.approx(float(value.losses[-1, 1]), rel=1e-4)


def test_requests_are_independent_of_each_other():
    model = tiny("llama")
    together = locate.values(model, [ANNA, DORA], CONTEXTS, 1, SEARCH, "block")
    for request, value in zip((ANNA, DORA), together, strict=True):
        [alone] = locate.values(model, [request], CONTEXTS, 1, SEARCH, "block")
        torch.testing.assert_close(alone.offset, value.offset, rtol=1e-3, atol=1e-4)


def test_the_search_stays_in_its_ball_stops_early_and_counts_steps():
    model = tiny("gpt2")
    tight = locate.Search(steps=6, lr=0.5, weight_decay=0.0, clamp=0.5, kl=0.0)
    [value] = locate.values(model, [ANNA], CONTEXTS, 0, tight, "mlp")
    assert float(value.offset.norm()) <= 0.5 * float(value.now.norm()) * (1 + 1e-5)
    assert len(value.losses) == 6
    easy = locate.Search(steps=6, lr=0.5, weight_decay=0.0, clamp=0.5, kl=0.0, stop=100.0)
    [value] = locate.values(model, [ANNA], CONTEXTS, 0, easy, "mlp")
    assert len(value.losses) == 1 and not value.offset.any()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (EditRequest("x", "Anna was born in", "Anna", "Rome"), "needs one '{}'"),
        (EditRequest("x", "{} was born in", " ", "Rome"), "a subject"),
        (EditRequest("x", "{} was born in", "Anna", "  "), "has no tokens"),
        (EditRequest("x", "{} was" + " born" * 80, "Anna", "Rome"), "exceed the 64"),
    ],
)
def test_a_bad_request_is_refused_with_its_name_and_the_reason(request_, reason):
    with pytest.raises(EditRefused, match=f"'x'.*{reason}"):
        locate.row(tiny("gpt2"), request_, target=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("prompt", ["{} was born in the city of", "The city of {}"])
@pytest.mark.parametrize("blanks", [" ", "   "])
def test_a_blank_at_the_prompts_end_is_not_a_second_one_before_the_target(family, prompt, blanks):
    model = tiny(family)
    plain = locate.row(model, EditRequest("x", prompt, "Anna", "Rome"), target=True)
    assert locate.row(model, EditRequest("x", prompt + blanks, "Anna", "Rome"), target=True) == plain
    assert locate.row(model, EditRequest("x", prompt + "\n", "Anna", "Rome"), target=True) != plain
