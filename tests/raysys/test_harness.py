"""Our engine as a model of lm-evaluation-harness: it answers what lm_eval's own model for transformers answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from raysys.harness import language_model, register, shared
from raysys.model import Model
from tests import families, tasks

ASKED = ["t_choice", "t_long", "t_inputs", "t_last", "t_text", "t_whole"]
CLOSE = 1e-4  # nats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.write(tmp_path_factory.mktemp("tasks"))


def evaluate(lm: Any, folder: Path, names: Sequence[str] = ASKED, **settings: Any) -> Any:
    manager = TaskManager(include_path=folder, include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **settings)


def peer(model: Model) -> Any:
    return HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=4, max_length=model.max_length)


def same(ours: Any, theirs: Any) -> None:
    """Every question, every response, every aggregate."""
    assert ours["samples"].keys() == theirs["samples"].keys() != set()
    for task, samples in ours["samples"].items():
        assert len(samples) == len(theirs["samples"][task]) > 0
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"]
            for a, b in zip(flat(mine["resps"]), flat(other["resps"]), strict=True):
                if isinstance(a, float):
                    assert a == pytest.approx(b, abs=CLOSE)
                else:
                    assert a == b, (task, mine["doc_id"])
    for task, figures in ours["results"].items():
        for name, value in figures.items():
            other = theirs["results"][task][name]
            assert value == other or math.isclose(value, other, rel_tol=1e-4), (task, name)


def flat(value: Any) -> list[Any]:
    """Floats, flags and texts, in their order."""
    return [x for v in value for x in flat(v)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_it_answers_what_the_harness_own_model_answers(family: str, folder: Path) -> None:
    model = families.tiny(family)
    ours = evaluate(language_model(model, batch_size=3), folder)
    same(ours, evaluate(peer(model), folder))
    texts = [text for sample in ours["samples"]["t_text"] for text in flat(sample["resps"])]
    assert len(set(texts)) > 1  # they were told from each other


def test_it_does_so_on_the_built_in_model_with_examples(folder: Path) -> None:
    model = Model.load("world/small")
    settings: dict[str, Any] = {"num_fewshot": 2, "limit": 4}
    names = ["t_choice", "t_last", "t_text"]
    same(evaluate(language_model(model), folder, names, **settings), evaluate(peer(model), folder, names, **settings))


def test_the_batch_and_its_size_change_nothing(folder: Path) -> None:
    model = families.tiny("llama")
    one = evaluate(language_model(model, batch_size=1), folder, limit=6)
    same(one, evaluate(language_model(model), folder, limit=6))


def test_chat_templates_are_those_of_the_tokenizer(folder: Path) -> None:
    model = families.tiny("llama")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    settings: dict[str, Any] = {"apply_chat_template": True, "num_fewshot": 1, "limit": 3}
    names = ["t_choice", "t_text"]
    ours = evaluate(language_model(model), folder, names, **settings)
    same(ours, evaluate(peer(model), folder, names, **settings))
    assert "<user>" in ours["samples"]["t_text"][0]["arguments"][0][0]


def test_sampling_is_refused_unless_greedy_answers_will_do(folder: Path) -> None:
    model = families.tiny("gpt2")
    with pytest.raises(ValueError, match=r"task 't_sampled': it samples its answers .*temperature = 0\.7"):
        evaluate(language_model(model), folder, ["t_sampled"], limit=2)
    found = evaluate(language_model(model, greedily=True), folder, ["t_sampled"], limit=2)
    assert len(found["samples"]["t_sampled"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams = 4 is not known"),
        ({"max_gen_toks": 64}, "64 tokens to generate leave no room"),
        ({"max_gen_toks": 0}, "0 tokens to generate; 1 or more"),
    ],
)
def test_what_it_can_not_generate_is_refused_in_words(settings: dict[str, Any], message: str) -> None:
    request = Instance("generate_until", {}, ("Anna was", settings), 0)
    with pytest.raises(ValueError, match=message):
        language_model(families.tiny("gpt2")).generate_until([request])


def test_lm_eval_knows_it_by_name_once_registered(folder: Path, tmp_path: Path) -> None:
    model = families.tiny("llama")
    model.net.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    register()
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="raysys", model_args={"pretrained": str(tmp_path), "device": "cpu"}, tasks=["t_last"], batch_size=2,
        task_manager=manager, bootstrap_iters=0, limit=3,
    )  # fmt: skip
    assert found is not None
    assert found["config"]["model"] == "raysys" and found["config"]["model_dtype"] == "torch.float32"


def test_repeated_requests_are_answered_each_in_its_place() -> None:
    lm = language_model(families.tiny("llama"), batch_size=2)
    pairs = [
        ("Anna was born in", " Rome"),
        ("", "The city"),
        ("Anna was born in", " Oslo"),
        ("Anna was born in", " Rome"),
    ]
    one, start, other, again = lm.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs], disable_tqdm=True)
    assert one == again != other and start[0] < 0


def test_a_prompt_asked_again_is_answered_in_each_place() -> None:
    lm = language_model(families.tiny("llama"), batch_size=2)
    prompts = ["Anna was born in", "The city of", "Anna was born in", "Bert works as a"]
    asked = [Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 6}), 0) for p in prompts]
    first, second, again, last = lm.generate_until(asked, disable_tqdm=True)
    assert first == again and len({first, second, last}) == 3
    assert [first] == language_model(lm.model).generate_until(asked[:1], disable_tqdm=True)


def test_prefixes_are_shared_where_that_saves_most() -> None:
    """Two long beginnings with three rows each, and two rows of their own."""
    first, second = tuple(range(1000, 1600)), tuple(range(2000, 2600))
    rows = [(*first, 1, i) for i in range(3)] + [(*second, i, 2) for i in range(3)] + [(7, 8), (9,)]
    found = {tuple(sorted(numbers)): length for length, numbers in shared(rows)}
    assert found == {(0, 1, 2): 601, (3, 4, 5): 600, (6, 7): 0}


def test_a_shared_prefix_leaves_every_row_a_token() -> None:
    row = tuple(range(500))
    for length, numbers in shared([row, row, row[:400], (*row, 1)]):
        assert all(length < len([row, row, row[:400], (*row, 1)][n]) for n in numbers)
    assert list(shared([])) == []
    assert list(shared([row])) == [(0, [0])]


def test_nested_beginnings_are_grouped_without_recursion() -> None:
    rows = [tuple(range(n)) for n in range(1, 3000, 2)]
    assert sorted(n for _, numbers in shared(rows) for n in numbers) == list(range(len(rows)))
