"""Questions through a chat template: what is rendered, tokenised and shared. Parity with the harness is elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raysys.blocks import Block, by_prefix, pack, query_of, query_tree
from raysys.chat import Chat
from raysys.model import Model
from raysys.scoring import Engine
from raysys.tokens import Tokens
from raysys.types import Answer, Choose, Chosen, Generate, Query, Turn, plain
from tests import families
from tests.templates import BRACKETS, HEADED, MARKED, TEMPLATES

BEFORE = (
    Turn("system", "Name the city.\n\n"),
    Turn("user", "Anna was born in", " "),
    Turn("assistant", "Rome", "\n\n"),
)
SHOWN = (*BEFORE, Turn("user", "Bert was born in", " "))
PLAIN = "Name the city.\n\nAnna was born in Rome\n\nBert was born in"
CITIES = (" Rome", " Paris", " Oslo")


def choose(turns: tuple[Turn, ...] = SHOWN) -> Choose:
    return Choose("q", PLAIN, CITIES, 0, shared=plain(BEFORE), turns=turns)


def tokenizer(template: str, bos: bool = False) -> Any:
    made = families.tokenizer(bos)
    made.model_max_length, made.chat_template = 1024, template
    return made


def model(template: str, bos: bool = False) -> Model:
    return Model(families.network("llama", max_position_embeddings=1024), tokenizer(template, bos), "tiny")


def rendered(template: str, chat: Chat, query: Query | None = None) -> str:
    return chat.asked(tokenizer(template), query or choose()).prompt


def test_examples_are_turns_and_the_description_is_the_systems() -> None:
    assert rendered(MARKED, Chat()) == (
        "<|im_start|>system\nName the city.\n\n<|im_end|>\n"
        "<|im_start|>user\nAnna was born in<|im_end|>\n<|im_start|>assistant\nRome<|im_end|>\n"
        "<|im_start|>user\nBert was born in<|im_end|>\n<|im_start|>assistant\n"
    )


def test_or_examples_and_question_are_one_message() -> None:
    assert rendered(MARKED, Chat(multiturn=False, system="Be brief.")) == (
        "<|im_start|>system\nBe brief.\n\nName the city.\n\n<|im_end|>\n"
        "<|im_start|>user\nAnna was born in Rome\n\nBert was born in<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("multiturn", [True, False])
def test_a_template_that_knows_no_system_is_asked_without(multiturn: bool) -> None:
    shown = "[INST] Anna was born in [/INST] Rome</s>[INST] Bert was born in [/INST]"
    joined = "[INST] Anna was born in Rome\n\nBert was born in [/INST]"
    chat = Chat(multiturn=multiturn, system="Be brief.")
    assert rendered(BRACKETS, chat) == (shown if multiturn else joined)


def test_an_answer_that_has_begun_is_continued_and_its_choices_keep_their_blank() -> None:
    turns = (*SHOWN[:-1], Turn("user", "Where was Bert born?\n"), Turn("assistant", "Bert was born in"))
    for multiturn in (True, False):
        asked = Chat(multiturn=multiturn).asked(tokenizer(MARKED), choose(turns))
        assert isinstance(asked, Choose) and asked.choices == CITIES
        assert asked.prompt.endswith("Bert born?\n<|im_end|>\n<|im_start|>assistant\nBert was born in")


def test_choices_lose_what_joins_them_to_the_question_and_no_more() -> None:
    for turns, choices in (
        (SHOWN, ("Rome", "Paris", "Oslo")),
        ((Turn("user", "Where?"),), CITIES),
        ((), ("Rome", "Paris", "Oslo")),
    ):
        asked = Chat().asked(tokenizer(MARKED), choose(turns))
        assert isinstance(asked, Choose) and asked.choices == choices
    mixed = replace(choose(()), choices=(" Rome", "Paris"))
    asked = Chat().asked(tokenizer(MARKED), mixed)
    assert isinstance(asked, Choose) and asked.choices == (" Rome", "Paris")


def test_a_benchmark_that_knows_no_turns_is_asked_in_one_message() -> None:
    for multiturn in (True, False):
        assert rendered(BRACKETS, Chat(multiturn=multiturn), choose(())) == f"[INST] {PLAIN} [/INST]"


def test_what_scoring_reads_of_a_question_stays() -> None:
    network = model(MARKED)
    [block] = pack(network.tokens, "t", {}, [choose()], batch=1, size=1, chat=Chat())
    [item] = block.items
    assert item.query == replace(choose(), prompt="", shared="", turns=())  # choices with their blanks: as given
    tails = [network.decode(c) for c in item.choices]
    assert tails == ["\nRome", "\nParis", "\nOslo"]  # the prompt's last line break is scored with the choice
    assert network.tokens.decode(block.prefix + item.tokens, special=True) == rendered(MARKED, Chat())[:-1]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_no_prompt_begins_with_two_first_tokens(template: str, bos: bool) -> None:
    network = model(TEMPLATES[template], bos)
    begun = 1 if bos or template == "headed" else 0
    for query in (choose(), Generate("g", PLAIN, ("\n",), "", 8, turns=SHOWN)):
        [block] = pack(network.tokens, "t", {}, [query], batch=1, size=1, chat=Chat())
        ids = block.prefix + block.items[0].tokens
        assert ids.count(network.tokenizer.bos_token_id) == begun == ids[:1].count(network.tokenizer.bos_token_id)


def test_a_text_that_begins_with_the_end_token_of_a_tokenizer_without_a_first_is_left_alone_when_scored() -> None:
    made = families.tokenizer(bos=True)  # whatever it is called, <s> is written before every text
    made.bos_token = None
    tokens = Tokens(made, 64)
    assert tokens.encode("</s>Anna")[:2] == [2, *tokens.encode("Anna")[1:2]]
    assert tokens.encode("</s>Anna", generation=True)[:2] == [1, 2]


def asked() -> list[Query]:
    names = ("Bert", "Carla of Peru", "Dora, the pilot,")
    turns = [(*BEFORE, Turn("user", f"{n} was born in", " ")) for n in names]
    found: list[Query] = [Choose(f"c{i}", "", CITIES, 0, turns=t) for i, t in enumerate(turns)]
    return found + [Generate(f"g{i}", "", ("zzz",), "", 12, turns=t) for i, t in enumerate(turns)]


def answers(network: Model, blocks: list[Block]) -> dict[str, Answer]:
    engine = Engine(network)
    return {i.query.id: a for b in blocks for i, a in zip(b.items, engine.answer(b), strict=True)}


@pytest.mark.parametrize("template", TEMPLATES)
def test_whatever_renderings_begin_with_is_run_once_and_changes_no_answer(template: str) -> None:
    network = model(TEMPLATES[template])
    groups = by_prefix(asked())
    blocks = [b for g in groups for b in pack(network.tokens, "t", {}, g, batch=3, size=9, chat=Chat())]
    assert len(blocks) == 2
    start = Chat().asked(network.tokenizer, asked()[0]).prompt.partition("Bert")[0]
    for block in blocks:
        assert network.tokens.decode(block.prefix, special=True) == start.rstrip(" ")  # a blank is its word's
    apart = [
        replace(b, id="", prefix=(), items=tuple(replace(i, tokens=b.prefix + i.tokens) for i in b.items))
        for b in blocks
    ]
    one, other = answers(network, blocks), answers(network, apart)
    for key, answer in one.items():
        again = other[key]
        if isinstance(answer, Chosen) and isinstance(again, Chosen):
            assert [c.logprob for c in answer.choices] == pytest.approx([c.logprob for c in again.choices], abs=1e-4)
            assert answer.best == again.best
        else:
            assert answer == again
    assert answers(network, blocks) == one


def test_a_question_that_is_too_long_loses_its_left_end_and_its_prefix() -> None:
    network = model(MARKED)
    long = (*BEFORE[:1], *BEFORE[1:] * 60, SHOWN[-1])
    [block] = pack(network.tokens, "t", {}, [choose(long)], batch=1, size=1, chat=Chat())
    assert block.prefix == () and len(block.items[0].tokens) + max(map(len, block.items[0].choices)) == 1025


def test_the_day_of_a_study_does_not_change_what_it_asks() -> None:
    assert "Today: 26 Jul 2024\n" in rendered(HEADED, Chat())
    assert "Today: 1 May\n" in rendered(HEADED, Chat(arguments={"date_string": "1 May"}))
    assert rendered("{{ strftime_now('%A, %B %d, %Y at %H:%M') }}", Chat()) == "Friday, July 26, 2024 at 00:00"
    assert rendered("\n x {{ strftime_now('%Y') }}", Chat()) == "\n x 2024"  # the rest of a template stays as it is


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "model 'm': its tokenizer has no chat template. Take the instruction-tuned model, .* = false"),
        ({"tool_use": MARKED}, "model 'm': its tokenizer has no chat template"),
        ("{{ raise_exception('never') }}", "model 'm': the model's chat template can't render it: never"),
        ("{% for %}", "model 'm': the model's chat template can't render it: "),
        (
            "{{ messages[0].content.__class__.__mro__ }}",
            "model 'm': .* can't render it: .*unsafe",
        ),
    ],
)
def test_a_model_whose_template_is_of_no_use_is_told_before_anything_runs(template: Any, message: str) -> None:
    made = families.tokenizer()
    made.chat_template = template
    with pytest.raises(ValueError, match=message):
        Chat().check(made, "m")


@pytest.mark.parametrize("template", TEMPLATES.values())
def test_a_template_that_works_passes(template: str) -> None:
    Chat(system="Be brief.").check(tokenizer(template), "m")


def test_a_question_that_a_template_refuses_is_named() -> None:
    two = (Turn("user", "Anna"), Turn("user", "Bert"))
    with pytest.raises(ValueError, match=r"q: the model's chat template can't render it: turns must alternate"):
        rendered(BRACKETS, Chat(), choose(two))


def test_queries_travel_with_their_turns_and_are_named_as_before_without() -> None:
    for query in (choose(), Generate("g", PLAIN, ("\n",), "", 8, turns=SHOWN)):
        assert query_of(query_tree(query)) == query
        assert "turns" not in query_tree(replace(query, turns=()))


def test_a_block_asked_through_a_template_is_another_block() -> None:
    network = model(MARKED)
    one, other, third = (
        next(iter(pack(network.tokens, "t", {}, [choose()], batch=1, size=1, chat=chat)))
        for chat in (None, Chat(), Chat(multiturn=False))
    )
    assert len({one.id, other.id, third.id}) == 3
