"""Through a chat template, every form of every benchmark is asked and scored as lm-evaluation-harness does.

Needs the extra `harness` (pip install "raysys[harness]"), and the folder of real data for the rendered texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from raysys.chat import DAY, Chat
from raysys.model import Model
from raysys.types import Choose, Query
from tests import families
from tests.templates import TEMPLATES

if util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed: pip install 'raysys[harness]'", allow_module_level=True)

from tests.parity.compare import compare, templated
from tests.parity.forms import FORMS, Form

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own warnings are not ours
ITEMS = 2
SOME: dict[str, Any] = {
    "mmlu": {"subjects": ("abstract_algebra", "professional_law")},
    "bbh": {"subtasks": ("boolean_expressions", "date_understanding", "dyck_languages", "word_sorting")},
}
CHATS = (
    Chat(),
    Chat(system="Be brief."),
    Chat(multiturn=False),
    Chat(multiturn=False, system="Think first.\n"),
)


def forms() -> Iterator[Form]:
    """All forms, few parts of each; those of MMLU that are listed without examples with some, too."""
    for form in FORMS:
        some = replace(form, settings={**form.settings, **SOME.get(form.benchmark, {})})
        yield some
        if form.benchmark == "mmlu" and not form.shots and form.settings["form"] != "letters":
            yield replace(some, name=f"{form.name[:-7]}2 shots", shots=2, settings={**some.settings, "shots": 2})
    trivia = next(f for f in FORMS if f.benchmark == "trivia_qa")
    parts = partial(trivia.parts, splits=("train", "validation"))
    yield replace(trivia, name="trivia_qa, 3 shots", folder="", parts=parts, shots=3, settings={"shots": 3})


def chatty(template: str, bos: bool) -> Model:
    """A tiny model that reads long prompts and has a chat template."""
    tokenizer = families.tokenizer(bos)
    tokenizer.model_max_length, tokenizer.chat_template = 4096, TEMPLATES[template]
    return Model(families.network("llama", max_position_embeddings=4096), tokenizer, "tiny")


def peer(model: Model) -> Any:
    """The harness' own model around the same network, with the same day."""
    from lm_eval.models.huggingface import HFLM

    day = {"date_string": DAY.strftime("%d %b %Y")}
    return HFLM(
        pretrained=model.net, tokenizer=model.tokenizer, batch_size=4, max_length=model.max_length,
        chat_template_args=day,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models() -> list[tuple[Model, Any]]:
    """Every template; the tokenizers of two write the first token, which one of these templates does as well."""
    made = [chatty("marked", bos=False), chatty("brackets", bos=True), chatty("headed", bos=True)]
    return [(model, peer(model)) for model in made]


def ours(model: Model, chat: Chat, query: Query) -> list[tuple[str, str, list[int], list[int]]]:
    """Prompt, choice and tokens of both, for every choice; of a text to be generated the prompt's alone."""
    asked = chat.asked(model.tokenizer, query)
    if isinstance(asked, Choose):
        return [(asked.prompt, c, *model.pair(asked.prompt, c)) for c in asked.choices]
    return [(asked.prompt, "", model.tokens.encode(asked.prompt, generation=True), [])]


def theirs(lm: Any, instance: Any) -> tuple[str, str, list[int], list[int]]:
    """The same of a request of the harness, by its own rules."""
    prompt = instance.args[0]
    if instance.request_type == "loglikelihood":
        return (prompt, instance.args[1], *lm._encode_pair(prompt, instance.args[1]))
    return (prompt, "", lm.tok_batch_encode([prompt])[0][0].tolist(), [])


@pytest.mark.parametrize("form", list(forms()), ids=lambda form: form.name)
def test_every_form_is_rendered_and_tokenised_as_the_harness_does(
    shared: Path, models: list[tuple[Model, Any]], form: Form
) -> None:
    data = str(shared / "data" / form.folder) if form.folder else "world"
    queries = list(form.ours(data, ITEMS).queries())
    tasks = form.parts(form, data, ITEMS)
    for model, lm in models:
        for chat in CHATS:
            requests = []
            for task in tasks.values():
                task.set_fewshot_seed(1234)
                task.build_all_requests(limit=ITEMS, **templated(lm, chat))
                requests += sorted(task.instances, key=lambda i: (i.doc_id, i.idx))
            found = [each for query in queries for each in ours(model, chat, query)]
            assert found == [theirs(lm, i) for i in requests]


SCORED = ("mmlu letters, 5 shots", "toxigen", "gsm8k, 5 shots", "trivia_qa")


@pytest.mark.parametrize("template", TEMPLATES)
def test_scores_and_texts_are_those_of_the_harness(template: str) -> None:
    model = chatty(template, bos=template == "headed")
    lm = peer(model)
    for number, form in enumerate(f for f in FORMS if f.name in SCORED):
        found = compare(model, lm, form, "world", 2, CHATS[number])
        assert not found.faults
        assert found.items >= 2 and found.values
