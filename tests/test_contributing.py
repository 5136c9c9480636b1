"""The examples in CONTRIBUTING.md are complete: each is taken from the page as it stands and run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from raysys import Choose, Chosen, EditRequest, Model, Scored, names
from raysys.arch import FAMILIES
from tests import families

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"
FACT = EditRequest("fact", "The {} is in", "Eiffel tower", "Rome")


def example(path: str) -> str:
    """The block of the page that begins with `# path`."""
    [found] = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`module(path)` -> the example as an importable module, named as a plug-in's would be."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(path: str) -> str:
        name = f"plugin_{Path(path).stem}"
        (tmp_path / f"{name}.py").write_text(example(path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return load


def loss(model: Model, request: EditRequest) -> float:
    prompt, target = model.pair(request.text, request.continuation)
    ids, mask = model.batch([prompt + target[:-1]])
    with torch.no_grad():
        hidden, _ = model.hidden(ids, mask)
        said = model.logits(hidden[0, len(prompt) - 1 :]).log_softmax(-1)
    return -float(said[range(len(target)), target].mean())


def test_the_method_makes_the_target_likelier_and_leaves_the_model_as_it_was(model, module):
    cls = names.method(f"{module('methods/nudge.py')}:Nudge")
    method = names.build(cls, {"layer": 1, "rate": 0.01}, "methods[0]")
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    [patch] = method.edit(model, [FACT]).patches
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
    plain = loss(model, FACT)
    with patch.applied(model):
        assert loss(model, FACT) < plain


def test_the_benchmark_scores_the_likelier_answer(module):
    cls = names.benchmark(f"{module('benchmarks/capitals.py')}:Capitals")
    benchmark = names.build(cls, {"limit": 2}, "benchmarks[0]")
    france, italy = benchmark.queries()
    assert isinstance(france, Choose)
    likelier, unlikelier = Scored(-1.0, 1, 1), Scored(-2.0, 1, 0)
    assert [s.value for s in benchmark.score(france, Chosen((likelier, unlikelier)))] == [1.0]
    assert [s.value for s in benchmark.score(italy, Chosen((unlikelier, likelier)))] == [0.0]


def test_the_data_set_gives_edits_that_a_study_can_choose_from(module):
    from benchmarks.edits import select

    cls = names.dataset(f"{module('benchmarks/moves.py')}:Moves")
    dataset = names.build(cls, {}, "edits")
    chosen = select(dataset.cases(), 2)
    assert [c.request.text for c in chosen.cases] == ["The capital of Kazakhstan is", "The capital of Brazil is"]
    assert [p.kind for p in chosen.cases[0].probes] == ["rewrite", "paraphrase", "neighbourhood"]
    assert dataset.held_out(chosen.cases)


def test_the_family_gives_the_networks_own_logits(monkeypatch):
    monkeypatch.setattr("raysys.arch.FAMILIES", FAMILIES.copy())
    page = ModuleType("page")
    exec(compile(example("raysys/arch.py"), str(PAGE), "exec"), page.__dict__)  # noqa: S102 (our own page)
    shape = families.SIZES["llama"]
    monkeypatch.setitem(families.SIZES, "stablelm", shape | {"num_key_value_heads": 2})
    model = families.tiny("stablelm")
    ids, mask = model.batch([model.encode("The Eiffel tower is in Rome")])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.hidden(ids, mask)[0]), model.net(ids).logits)
        torch.testing.assert_close(model.upper(model.trunk(ids, mask, 1)), model.hidden(ids, mask)[0])
    assert model.matrix(f"{model.mlp_out(1)}.weight").shape == (32, 48)
