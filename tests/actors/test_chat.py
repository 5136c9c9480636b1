"""A study of an instruction-tuned model on real Ray: its benchmarks are asked as chats, its probes are not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raysys import names
from raysys.blocks import by_prefix, pack
from raysys.chat import Chat
from raysys.model import Model
from raysys.plan import plan
from raysys.results import Results
from raysys.scoring import Engine
from raysys.study import run, select_edits
from raysys.types import Chosen
from tests import families
from tests.actors import small
from tests.templates import MARKED

pytestmark = pytest.mark.timeout(240)
CHAT = {"apply_chat_template": True, "system_instruction": "Be brief."}
BENCHMARKS: list[dict[str, Any]] = [
    {"name": "tests.actors.small:Words", "label": "words", "items": 6},
    {"name": "toxigen", "limit": 4},
    {"name": "probes", "max_tokens": 4},
]


def spec(place: Path, **scoring: Any) -> Any:
    tuned = {"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}
    scoring = {"batch": 4, "block": 8, **scoring}
    return small.spec(place, snapshots=[0, 2], methods=[tuned], benchmarks=BENCHMARKS, scoring=scoring)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = small.folder(tmp_path_factory.mktemp("chat"))
    tokenizer = families.tokenizer(bos=True)
    tokenizer.model_max_length, tokenizer.chat_template = 256, MARKED
    tokenizer.save_pretrained(found / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSYS_CACHE", str(found / "cache"))
        with small.cluster():
            yield found


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    return run(spec(place, **CHAT))


@pytest.mark.parametrize(
    ("part", "chat"),
    [(BENCHMARKS[0], Chat(system="Be brief.")), (BENCHMARKS[1], Chat(system="Be brief.")), (BENCHMARKS[2], None)],
)
def test_benchmarks_are_asked_as_chats_and_probes_as_they_were_edited(
    place: Path, results: Results, part: dict[str, Any], chat: Chat | None
) -> None:
    assert results.manifest["complete"] and not results.failures()
    title = part.get("label", part["name"])
    benchmark = names.build(names.benchmark(part["name"]), {k: part[k] for k in part.keys() - {"name", "label"}}, "")
    if title == "probes":
        benchmark = benchmark.over(select_edits(results.spec, 0).cases)
    rows = [r for r in results.scores().to_pylist() if r["benchmark"] == title and r["edits"] == 0]
    found = {r["query"]: json.loads(r["answer"]) for r in rows}
    model = Model.load(str(place / "model"))
    engine, compared = Engine(model), 0
    for group in by_prefix(benchmark.queries()):
        for block in pack(model.tokens, title, {}, group, batch=4, size=8, chat=chat):
            for item, answer in zip(block.items, engine.answer(block), strict=True):
                if isinstance(answer, Chosen):
                    values = [c.logprob for c in answer.choices]
                    assert found[item.query.id]["logprob"] == pytest.approx(values, abs=1e-4)
                    compared += 1
    assert compared >= 4


def test_a_model_without_a_template_is_told_before_anything_is_started(place: Path, model_folder: Any) -> None:
    bare = spec(place, **CHAT).model_copy(update={"models": (str(model_folder("llama")),), "name": "bare"})
    for start in (plan, run):
        with pytest.raises(ValueError, match=r"no chat template.* scoring.apply_chat_template = false"):
            start(bare)
    assert not bare.folder.exists()


def test_plan_counts_the_tokens_of_the_chat(place: Path) -> None:
    chat, plain = plan(spec(place, **CHAT)), plan(spec(place))
    assert [a.tokens == b.tokens for a, b in zip(chat.parts, plain.parts, strict=True)] == [False, False, True]
    assert [a.queries for a in chat.parts] == [b.queries for b in plain.parts]
