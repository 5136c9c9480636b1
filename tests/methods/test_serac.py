"""SERAC: scope scores and detours against plain computations, the memory's growth, and its training."""

import dataclasses
import random

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel, LlamaConfig, LlamaForCausalLM

from methods.parts import editors, serac_training
from methods.parts.encoder import Encoder
from methods.parts.scope_nets import Nets
from methods.serac import PreparedSerac, Scope, Serac, mixture, similarity
from raysys.blocks import pack
from raysys.model import Model
from raysys.patch import Wearer, merge, wearing
from raysys.scoring import Engine
from raysys.snapshot import read, write
from raysys.types import Choose, EditCase, EditRefused, EditRequest, Generate, Probe
from tests.families import NAMES, network, tiny, tokenizer

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer")
AGAIN = EditRequest("again", "{} was born in the city of", "Anna", "Lima", "Paris")
SMALL = Serac(classifier="own", counterfactual="own", width=16)
FEW = {"steps": 60, "every": 20, "cases": 8, "accumulate": 1, "lr": 5e-3, "clip": 1.0, "validation": 4}


def cases(count=24):
    names = [n for n in NAMES if n.istitle()]
    made = []
    for i in range(count):
        subject, other, target = names[i % 4], names[(i + 1) % 4], names[4 + i % 4]
        request = EditRequest(f"c{i}", "{} was born in the city of", subject, target, "Paris")
        probes = (
            Probe("paraphrase", f"The city of {subject} is", target, "Paris"),
            Probe("neighbourhood", f"{other} was born in the city of", "Paris", target),
        )
        made.append(EditCase(request, probes))
    return made


def nets(model, width=16):
    """Random networks that tell texts apart."""
    torch.manual_seed(5)
    config = DistilBertConfig(
        vocab_size=len(model.tokenizer), dim=width, hidden_dim=32, n_layers=1, n_heads=2, dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=32,
    )  # fmt: skip
    small = LlamaConfig(
        vocab_size=len(model.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    encoder = Encoder(DistilBertModel(config).eval(), model.tokenizer, "mean", " ", own_tokenizer=False)
    return Nets(encoder, LlamaForCausalLM(small).eval())


def prepared(model, **settings):
    return PreparedSerac(settings=dataclasses.replace(SMALL, **settings), block=nets(model).packed(), model=model)


def stream(model, method, requests, folder=None):
    """The cumulative patches after each of `requests`; through the disk if there is a folder."""
    wearer, worn = Wearer(model), ()
    for i, request in enumerate(requests):
        patches = method.edit(model, [request]).patches
        if folder is not None:
            write(folder / f"{i}.safetensors", patches, {}, {})
            patches = read(folder / f"{i}.safetensors")[0]
        worn = merge(worn, patches)
        wearer.wear(worn)
        yield worn
    wearer.take_off()


def ask(model, queries, batch=4):
    [block] = pack(model.tokens, "serac", {}, queries, batch=batch, size=99)
    return {i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)}


@torch.no_grad()
def by_hand(net, model, text, choice):
    """log P(choice | text) token by token."""
    head, tail = model.pair(text, choice)
    logprobs = net(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(head) - 1 + i, token]) for i, token in enumerate(tail))


def test_scores_are_exp_of_minus_squared_distance():
    entries, asked = torch.randn(3, 5), torch.randn(4, 5)
    for i in range(4):
        for j in range(3):
            wanted = torch.exp(-((entries[j] - asked[i]) ** 2).sum())
            assert torch.allclose(similarity(entries, asked)[i, j], wanted)


def test_the_mixture_is_of_probabilities_and_its_ends_are_the_two_models():
    base, small = torch.randn(2, 7), torch.randn(2, 7)
    half = mixture(base, small, torch.full((2,), 0.5))
    assert torch.allclose(half.exp(), (base.softmax(-1) + small.softmax(-1)) / 2, atol=1e-6)
    assert torch.allclose(
        mixture(base, small, torch.tensor([0.0, 1.0])).argmax(-1), torch.stack([base[0], small[1]]).argmax(-1)
    )


def test_questions_in_scope_go_to_the_small_model_behind_the_text_and_others_to_the_untouched_model():
    model = tiny("llama")
    method = prepared(model, threshold=0.9)
    questions = [ANNA.text, "Lima is in the country of", DORA.text, "The tower of Paris ."]
    choices = (" Rome", " Oslo", " baker pilot")
    queries = [Choose(str(i), q, choices, 0) for i, q in enumerate(questions)]
    before = ask(model, queries)
    worn = list(stream(model, method, [ANNA, DORA]))[-1]
    with wearing(model, worn):
        after, one = ask(model, queries), ask(model, queries, batch=1)
        scores, entry = model.wears(Scope).scores(model, questions)
    assert (scores > 0.9).tolist() == [True, False, True, False] and entry[[0, 2]].tolist() == [0, 1]
    for i in "13":
        for found, was in zip(after[i].choices, before[i].choices, strict=True):
            assert found.logprob == pytest.approx(was.logprob, abs=1e-5)
    for i, text in (("0", f"{ANNA.text} Rome {ANNA.text}"), ("2", f"{DORA.text} baker pilot {DORA.text}")):
        for n, choice in enumerate(choices):
            wanted = by_hand(method.nets.counterfactual, model, text, choice)
            assert after[i].choices[n].logprob == pytest.approx(wanted, abs=1e-4)
            assert one[i].choices[n].logprob == pytest.approx(wanted, abs=1e-4)


def test_generation_is_routed_in_the_same_way():
    model = tiny("gpt2")
    method = prepared(model, threshold=0.9)
    queries = [Generate(str(i), q, (".",), "", 5) for i, q in enumerate((ANNA.text, "Lima is in the country of"))]
    before = ask(model, queries)
    [worn] = stream(model, method, [ANNA])
    with wearing(model, worn):
        after = ask(model, queries)
    ids = torch.tensor([model.encode(f"{ANNA.text} Rome {ANNA.text}")])
    wanted = method.nets.counterfactual.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert after["0"].text == model.decode(wanted[0, ids.shape[1] :]).split(".")[0]
    assert after["1"] == before["1"]


def test_the_memory_grows_by_what_is_new_and_is_the_same_from_disk(tmp_path):
    model = tiny("llama")
    method = prepared(model)
    live = list(stream(model, method, [ANNA, DORA, AGAIN]))
    again = list(stream(model, method, [ANNA, DORA, AGAIN], tmp_path))
    sizes = [(tmp_path / f"{i}.safetensors").stat().st_size for i in range(3)]
    assert sizes[0] > 10 * sizes[1] and abs(sizes[1] - sizes[2]) < 200  # the networks come once
    for [one], [other] in zip(live, again, strict=True):
        assert one.fields() == other.fields()
        assert all(torch.equal(t, other.tensors()[k]) for k, t in one.tensors().items())
    assert len(live[-1][0].texts) == len(live[-1][0].entries) == 3


def test_of_two_edits_of_one_question_the_newer_counts():
    model = tiny("llama")
    worn = list(stream(model, prepared(model), [ANNA, DORA, AGAIN]))[-1]
    with wearing(model, worn):
        _, entry = model.wears(Scope).scores(model, [ANNA.text])
    assert entry.tolist() == [2]


def test_published_keeps_the_last_edit_only():
    """The published executor throws away what `edit` returns, so each edit starts from an empty cache."""
    model = tiny("llama")
    worn = list(stream(model, prepared(model, published=True), [ANNA, DORA]))[-1]
    assert worn[0].texts == ["The singer Dora works as a baker pilot"]
    [kept] = list(stream(model, prepared(model), [ANNA, DORA]))[-1]
    assert len(kept.texts) == 2


def test_published_cuts_one_word_off_and_the_default_the_whole_target():
    model = tiny("llama")
    assert prepared(model, published=True)._key(DORA, DORA.text + " baker pilot") == DORA.text + " baker"
    assert prepared(model)._key(DORA, DORA.text + " baker pilot") == DORA.text


def test_a_text_that_fills_the_counterfactual_model_is_refused():
    model = tiny("llama")
    with pytest.raises(EditRefused, match=r"'long'.*half of the 64 tokens"):
        prepared(model).edit(model, [EditRequest("long", "{} was born" + " in the city" * 12, "Anna", "Rome")])


def test_a_model_with_other_tokens_is_refused_with_the_first_that_differs():
    model, other = tiny("llama"), tokenizer()
    serac_training.same_tokens(model, other, "same")
    other.add_tokens(["zz"])
    serac_training.same_tokens(model, other, "with an added token")
    smaller = Model(network("gpt2"), tokenizer()).tokenizer
    vocabulary = dict(smaller.get_vocab())
    smaller.get_vocab = lambda: {**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}
    with pytest.raises(ValueError, match=r"'a' is \d+ there and \d+ here \(2 differ\)"):
        serac_training.same_tokens(model, smaller, "shuffled")


def test_without_trained_networks_it_says_how_to_train(tmp_path):
    with pytest.raises(ValueError, match="raysys train-editor serac tiny-llama"):
        SMALL.prepare(tiny("llama"), tmp_path)


def test_training_learns_scope_and_answers_and_is_the_same_when_interrupted(tmp_path):
    model = tiny("llama")
    said = []
    whole = SMALL.train(model, cases(), tmp_path / "whole", said.append, FEW)
    losses = [p.validation["loss"] for p in said]
    assert len(losses) == 3 and losses[-1] < losses[0] - 1

    class StopError(Exception):
        pass

    def stop(progress):
        if progress.step == 40:
            raise StopError

    with pytest.raises(StopError):
        SMALL.train(model, cases(), tmp_path / "parts", stop, FEW)
    notes = []
    parts = SMALL.train(model, cases(), tmp_path / "parts", notes.append, FEW)
    assert [p.step for p in notes] == [60] and parts.name == whole.name  # a hash of its contents
    ready = SMALL.prepare(model, tmp_path / "whole")
    assert not any(
        p.requires_grad for net in (ready.nets.encoder.net, ready.nets.counterfactual) for p in net.parameters()
    )
    with pytest.raises(ValueError, match="trained for something else"):
        editors.read(whole, SMALL._fits(tiny("llama", seed=1)))


def test_the_edited_model_itself_can_be_the_counterfactual_one(tmp_path):
    model = tiny("llama")
    base = dataclasses.replace(SMALL, counterfactual="base", threshold=0.0)
    base.train(model, cases(), tmp_path, settings={**FEW, "steps": 2, "every": 2})
    [worn] = stream(model, base.prepare(model, tmp_path), [ANNA])
    with wearing(model, worn):
        [detour] = model.wears(Scope).reroute(model, [tuple(model.encode("Lima is"))])
    assert detour.model is model and model.decode(detour.prompt) == f"{ANNA.text} Rome Lima is"


def test_networks_survive_their_block():
    for family in ("llama", "gpt2"):
        model = tiny(family)
        made = nets(model)
        tied = Nets(made.encoder, network(family, tie_word_embeddings=True).eval())
        own = Nets(dataclasses.replace(made.encoder, own_tokenizer=True), None)
        for before in (made, tied, own):
            after = Nets.of(before.packed(), model)
            assert torch.equal(after.encoder.embed(["Anna was"]), before.encoder.embed(["Anna was"]))
            assert after.encoder.own_tokenizer == before.encoder.own_tokenizer and after.packed() == before.packed()
            if before.counterfactual is not None:
                ids = torch.tensor([model.encode("Anna was")])
                assert torch.equal(after.counterfactual(ids).logits, before.counterfactual(ids).logits)


def test_prompts_that_share_a_wording_ask_the_same():
    first = EditCase(EditRequest("1", "{} speaks", "Anna", "x"), (Probe("paraphrase", "The language of Anna is", "x"),))
    second = EditCase(EditRequest("2", "The language of {} is", "Bert", "y"))
    third = EditCase(EditRequest("3", "{} works as a", "Carla", "z"))
    pairs = serac_training.Pairs([first, second, third], ["Oslo"], 0.5)
    assert pairs._about("The language of Oslo Bert is")[1] == "Oslo Bert"
    assert sorted(map(sorted, pairs.wordings.values())) == [["The language of {} is", "{} speaks"], ["{} works as a"]]


def test_scope_loss_is_binary_cross_entropy_by_hand():
    model = tiny("llama")
    encoder = nets(model).encoder
    pairs = serac_training.Pairs(cases(), ["Oslo", "Lima"], 0.5)
    rng = random.Random(0)
    examples = [pairs.example(rng, case) for case in cases(3)]
    loss, _ = serac_training.scope_loss(encoder, examples)
    groups = {"same": [], "hard": [], "easy": []}
    for e in examples:
        for f in examples:
            for asked in (f.inside, *f.outside):
                apart = (encoder.run([e.key])[0] - encoder.run([asked.text])[0]).square().sum().clamp(min=0)
                s = torch.exp(-apart)
                if asked.about == e.about:
                    groups["same"].append(-s.log())
                elif any(asked is o for o in e.outside):
                    groups["hard"].append(-(1 - s).log())
                else:
                    groups["easy"].append(-(1 - s).log())
    wanted = sum(torch.stack(g).mean() for g in groups.values())
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)


@pytest.mark.parametrize("long", [False, True])
def test_a_question_too_long_for_the_small_model_loses_its_own_beginning_and_not_the_edits_text(long):
    model = tiny("llama", max_position_embeddings=128)
    method = prepared(model, threshold=0.0)  # everything is in scope
    question = "The tower of Paris is " + "the " * (90 if long else 10) + "city of"
    choose = [Choose("c", question, (" Rome", " baker pilot"), 0)]
    generate = [Generate("g", question, (), "", 3)]
    [worn] = stream(model, method, [ANNA])
    with wearing(model, worn):
        chosen, made = ask(model, choose)["c"], ask(model, generate)["g"]
    text, net = model.encode(f"{ANNA.text} Rome"), method.nets.counterfactual
    whole = model.encode(f"{ANNA.text} Rome {question}")
    assert whole[: len(text)] == text
    for scored, choice in zip(chosen.choices, (" Rome", " baker pilot"), strict=True):
        _, tail = model.pair(question, choice)
        room = 64 + 1 - len(model.pair(question, " baker pilot")[1])
        head = text + whole[len(text) :][-(room - len(text)) :]
        assert (len(head) < len(whole)) == long
        with torch.no_grad():
            logprobs = net(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        wanted = sum(float(logprobs[len(head) - 1 + j, t]) for j, t in enumerate(tail))
        assert scored.logprob == pytest.approx(wanted, abs=1e-4)
    ids = torch.tensor([text + whole[len(text) :][-(61 - len(text)) :]])
    wanted = net.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert made.text == model.decode(wanted[0, ids.shape[1] :])


def test_scores_of_many_questions_are_those_of_each_alone():
    entries, asked = torch.randn(50, 8) / 3, torch.randn(20, 8) / 3
    apart = asked[:, None].double() - entries[None].double()
    assert torch.equal(similarity(entries, asked), apart.square().sum(-1).neg().exp().float())


def test_the_small_models_weights_are_not_hashed_for_every_edit(monkeypatch):
    model = tiny("llama")
    method = prepared(model)
    monkeypatch.setattr("raysys.model.digest", lambda *_: pytest.fail("hashed"))
    method.edit(model, [ANNA])
