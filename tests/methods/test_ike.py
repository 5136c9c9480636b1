"""IKE: layout, demonstrations, retrieval and which questions go behind which fact."""

import dataclasses

import pytest
import torch

from methods.ike import END, PAPER_LAYOUT, Demonstrations, Ike, PreparedIke, _names, demonstrations, put
from methods.parts.encoder import Encoder, own_encoder
from raysys.blocks import pack
from raysys.patch import Wearer, merge, wearing
from raysys.scoring import Engine
from raysys.snapshot import read, write
from raysys.types import Choose, EditCase, EditRequest, Generate, Probe
from tests.families import tiny

ANNA = EditRequest("anna", "{} was born in", "Anna", "Rome", "Paris")
JOB = EditRequest("job", "{} works as a", "Anna", "pilot", "baker")
DORA = EditRequest("dora", "The singer {} is", "Dora", "a baker", "singer")
AGAIN = EditRequest("again", "{} was born in", "Anna", "Lima", "Paris")
CASES = [
    EditCase(
        EditRequest(str(i), "{} was born in", name, "Oslo", "Paris"),
        (
            Probe("paraphrase", f"{name} is of", "Oslo", "Paris"),
            Probe("neighbourhood", "Carla was born in", "Paris", "Oslo"),
        ),
    )
    for i, name in enumerate(("Bert", "Carla", "Lima"))
]
SMALL = Ike(k=2, encoder="model", layout=PAPER_LAYOUT, cases=3, threshold=-1.0)


@pytest.fixture
def prepared(tmp_path):
    model = tiny("llama", max_position_embeddings=256)
    SMALL.train(model, CASES, tmp_path)
    return model, SMALL.prepare(model, tmp_path)


def stream(model, method, requests, folder=None):
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
    [block] = pack(model.tokens, "ike", {}, queries, batch=batch, size=99)
    return {i.query.id: a for i, a in zip(block.items, Engine(model).answer(block), strict=True)}


def test_the_papers_layout_is_the_papers():
    asked = put(PAPER_LAYOUT, "Anna was born in Rome", "Rome", "Where is {fact}?")
    assert asked == "New Fact: Anna was born in Rome\nPrompt: Where is {fact}?"


def test_a_case_gives_a_copy_an_update_and_a_retention():
    copy, update, retain = demonstrations(CASES[0], PAPER_LAYOUT)
    fact = "New Fact: Bert was born in Oslo\nPrompt: "
    assert copy == f"{fact}Bert was born in Oslo\n\n"
    assert update == f"{fact}Bert is of Oslo\n\n"
    assert retain == f"{fact}Carla was born in Paris\n\n"


@torch.no_grad()
def test_the_nearest_demonstrations_come_before_the_fact_the_nearest_last(prepared):
    model, method = prepared
    [patch] = method.edit(model, [ANNA]).patches

    def end(text):
        hidden = model.net.base_model(input_ids=torch.tensor([model.encode(text)])).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden[-1], dim=0)

    texts = [t for case in CASES for t in demonstrations(case, PAPER_LAYOUT)]
    near = end("New Fact: Anna was born in Rome\nPrompt: Anna was born in\n\n")
    ranked = sorted(texts, key=lambda t: float(end(t) @ near))
    own = "New Fact: Anna was born in Rome\nPrompt: Anna was born in Rome\n\n"
    assert patch.facts[0]["shown"] == ranked[-2] + ranked[-1] + own


@torch.no_grad()
def test_questions_about_a_fact_are_asked_behind_it_and_others_as_they_are(prepared):
    model, method = prepared
    questions = ["In the city Anna was", "Bert was born in", "The singer Dora is", "Annabert was born in"]
    choices = (" Rome", " a baker")
    queries = [Choose(str(i), q, choices, 0) for i, q in enumerate(questions)]
    before = ask(model, queries)
    worn = list(stream(model, method, [ANNA, DORA]))[-1]
    with wearing(model, worn):
        after, one = ask(model, queries), ask(model, queries, batch=1)
    for i, fact in enumerate((0, None, 1, None)):
        known = worn[0].facts[fact] if fact is not None else None
        prompt = f"{known['shown']}New Fact: {known['fact']}\nPrompt: {questions[i]}" if known else questions[i]
        for n, choice in enumerate(choices):
            head, tail = model.pair(prompt, choice)
            logprobs = model.net(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            wanted = sum(float(logprobs[len(head) - 1 + j, t]) for j, t in enumerate(tail))
            assert after[str(i)].choices[n].logprob == pytest.approx(wanted, abs=1e-4)
            assert one[str(i)].choices[n].logprob == pytest.approx(wanted, abs=1e-4)
            if known is None:
                assert after[str(i)].choices[n].logprob == pytest.approx(before[str(i)].choices[n].logprob, abs=1e-5)


def test_generation_goes_behind_the_fact_too(prepared):
    model, method = prepared
    queries = [Generate(str(i), q, (".",), "", 4) for i, q in enumerate(("Anna was born in", "Bert was born in"))]
    before = ask(model, queries)
    [worn] = stream(model, method, [ANNA])
    with wearing(model, worn):
        after = ask(model, queries)
    fact = worn[0].facts[0]
    ids = torch.tensor([model.encode(f"{fact['shown']}New Fact: {fact['fact']}\nPrompt: Anna was born in")])
    made = model.net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=2)
    assert after["0"].text == model.decode(made[0, ids.shape[1] :]).split(".")[0] and after["1"] == before["1"]


def test_among_a_subjects_facts_the_nearest_counts_and_the_newest_of_equals(prepared):
    model, method = prepared
    worn = list(stream(model, method, [ANNA, JOB, DORA, AGAIN]))[-1]
    with wearing(model, worn):
        patch = model.wears(Demonstrations)
        assert patch.about(model, [JOB.text, AGAIN.text, DORA.text, "Oslo is"]) == [1, 3, 2, None]


def test_only_the_last_part_of_a_few_shot_prompt_is_the_question(prepared):
    model, method = prepared
    worn = list(stream(model, method, [ANNA]))[-1]
    with wearing(model, worn):
        patch = model.wears(Demonstrations)
        assert patch.about(model, [f"Anna is in Rome{END}Bert is in", f"Bert is in{END}Anna is in"]) == [None, 0]
        [_, detour] = patch.reroute(model, [tuple(model.encode(t)) for t in ("Bert", f"Bert is in{END}Anna is in")])
        asked = "New Fact: Anna was born in Rome\nPrompt: Anna is in"
        assert model.decode(detour.prompt) == f"{patch.facts[0]['shown']}Bert is in{END}{asked}"


def test_similarity_alone_can_decide(prepared):
    model, method = prepared
    settings = dataclasses.replace(method.settings, scope="similarity", threshold=0.999)
    alone = PreparedIke(settings=settings, pool=method.pool, encoder=None)
    worn = list(stream(model, alone, [ANNA, DORA]))[-1]
    with wearing(model, worn):
        assert model.wears(Demonstrations).about(model, [ANNA.text, "Peru and France", DORA.text]) == [0, None, 1]


def test_published_asks_everything_behind_the_last_edit(prepared):
    """The published evaluation puts every question behind the edit being evaluated, in its scope or not."""
    model, method = prepared
    published = PreparedIke(
        settings=dataclasses.replace(method.settings, published=True), pool=method.pool, encoder=None
    )
    worn = list(stream(model, published, [ANNA, DORA]))[-1]
    with wearing(model, worn):
        patch = model.wears(Demonstrations)
        assert [f["subject"] for f in patch.facts] == ["Dora"]
        assert patch.about(model, ["Oslo is", ANNA.text]) == [0, 0]


def test_the_memory_grows_by_what_is_new_and_is_the_same_from_disk(prepared, tmp_path):
    model, method = prepared
    torch.manual_seed(0)
    encoder = own_encoder(model, 16)
    carried = PreparedIke(
        settings=method.settings,
        pool=dataclasses.replace(method.pool, embedded=torch.randn(len(method.pool.texts), 16)),
        encoder=Encoder(encoder.net, encoder.tokenizer, "mean", "", own_tokenizer=True),
    )
    for way in (method, carried):
        live = list(stream(model, way, [ANNA, DORA]))
        again = list(stream(model, way, [ANNA, DORA], tmp_path))
        for [one], [other] in zip(live, again, strict=True):
            assert one.fields() == other.fields()
            assert all(torch.equal(t, other.tensors()[k]) for k, t in one.tensors().items())
        with wearing(model, again[-1]):
            assert model.wears(Demonstrations).about(model, [ANNA.text, DORA.text]) == [0, 1]
    sizes = [(tmp_path / f"{i}.safetensors").stat().st_size for i in range(2)]
    assert sizes[0] > 5 * sizes[1]  # the encoder comes once


def test_without_demonstrations_it_says_how_to_make_them(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="raysys train-editor ike tiny-llama"):
        SMALL.prepare(model, tmp_path)
    with pytest.raises(ValueError, match="edit cases"):
        SMALL.train(model, [], tmp_path)
    with pytest.raises(ValueError, match=r"no \{prompt\}"):
        dataclasses.replace(SMALL, layout="{fact}").prepare(model, tmp_path)


def test_demonstrations_of_another_layout_are_not_taken(tmp_path):
    model = tiny("llama")
    SMALL.train(model, CASES, tmp_path)
    with pytest.raises(ValueError, match="there is none"):
        dataclasses.replace(SMALL, layout="Q: {prompt}").prepare(model, tmp_path)
    with pytest.raises(ValueError, match="unknown setting 'lr'"):
        SMALL.train(model, CASES, tmp_path, settings={"lr": 1.0})


def test_demonstrations_and_identity_depend_on_the_encoders_weights(tmp_path, monkeypatch):
    model = tiny("llama", max_position_embeddings=256)

    def use(seed):
        torch.manual_seed(seed)
        net = own_encoder(model, 16).net
        made = Encoder(net, model.tokenizer, "mean", "", own_tokenizer=True)
        monkeypatch.setattr("methods.ike.pretrained_encoder", lambda *_: made)

    method = dataclasses.replace(SMALL, encoder="folder")
    said = []
    for seed in (0, 1):
        use(seed)
        with pytest.raises(ValueError, match="there is none"):
            method.prepare(model, tmp_path)
        method.train(model, CASES, tmp_path)
        said.append(method.prepare(model, tmp_path).identity())
    use(0)
    again = method.prepare(model, tmp_path).identity()
    assert again == said[0] and again["artifacts"]["weights"] != said[1]["artifacts"]["weights"]


def test_a_subject_is_named_as_whole_words_only():
    for question, named in (("Is Anna in?", True), ("Annabert", False), ("Annabert Anna", True), ("Bert", False)):
        assert _names(question, " Anna") is named
    assert _names("a (b.c) d", "(b.c)") and not _names("a (bxc) d", "(b.c)")
