"""An edit that ends half-way, for whatever reason, leaves weights and hooks as it found them, and can be made again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from methods.parts import metric
from methods.parts.hypernet import HyperNet
from raysys import names
from raysys.model import Model
from raysys.patch import LowRank, wearing
from raysys.types import EditRefused
from tests.contracts import small
from tests.families import tiny
from tests.methods.dense import FACTS

HALFWAY: dict[str, tuple[Any, str]] = {  # what is called several times in an edit
    "memit": (metric, "answer"),  # once a layer
    "alphaedit": (metric, "answer"),
    "pmet": (metric, "answer"),
    "nse": (metric, "answer"),
    "ft_m": (torch.optim.Adam, "step"),
    "grace": (torch.optim.Adam, "step"),
    "wise": (Model, "upper"),
    "mend": (HyperNet, "transformed"),
}
SETTINGS: dict[str, dict[str, Any]] = {"nse": {"neurons": 1.0}, "pmet": {"attention": False}}
CHANGED = {"memit", "alphaedit", "pmet", "nse", "ft_m"}  # the network itself is changed on the way


def _raising(plain: Callable[..., Any], error: BaseException, call: int, look: Callable[[], None]) -> Any:
    """`plain`, until it is called for time number `call`."""
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            look()
            raise error
        return plain(*given, **named)

    return counted


@pytest.fixture(params=sorted(HALFWAY))
def ready(request, tmp_path, corpus):
    """(name, model, method prepared for it), the model wearing what an earlier edit may have left."""
    name = request.param
    model = tiny("llama")
    settings = {k: corpus if v == "CORPUS" else v for k, v in small.SETTINGS[name].items()}
    made = names.build(names.method(name), settings | SETTINGS.get(name, {}), name)
    if name in small.BEFORE:
        small.BEFORE[name](model, made, tmp_path)
    prepared = made.prepare(model, tmp_path)
    weight = f"{model.mlp_out(0)}.weight"
    with wearing(model, [LowRank(weight, torch.full((32, 1), 0.01), torch.full((1, 48), 0.01))]):
        yield name, model, prepared


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EditRefused("edit 'anna': half-way")], ids=["stop", "refused"])
@pytest.mark.parametrize("where", ["half-way", "in a forward pass"])
def test_the_model_is_as_it_was_found(ready, error, where, monkeypatch):
    name, model, prepared = ready
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    changed: list[bool] = []

    def look() -> None:
        changed.append(any(not torch.equal(before[k], v) for k, v in model.net.state_dict().items()))

    owner, function = HALFWAY[name] if where == "half-way" else (Model, "logits")
    call = 2 if where == "half-way" else 1
    with monkeypatch.context() as patched:
        patched.setattr(owner, function, _raising(getattr(owner, function), error, call, look))
        with pytest.raises(type(error)):
            prepared.edit(model, FACTS[:1])
    assert changed  # it did get there
    if where == "half-way" and name in CHANGED - {"ft_m"}:
        assert changed == [True]
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.net.modules())
    assert not any(p.requires_grad for p in model.net.parameters())
    assert not model.carried and not model._bare and model._asking is None
    again = prepared.edit(model, FACTS[:1])
    assert again.patches
    assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
