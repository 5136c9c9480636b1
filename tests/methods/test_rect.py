"""RECT: exactly the entries that change their weight most survive, whatever method wrote them."""

import numpy as np
import pytest
import torch

from methods.rect import Rect, thinned
from raysys import names
from raysys.patch import LowRank, merge, wearing
from raysys.types import Edit, remembered
from tests.families import tiny
from tests.methods.dense import FACTS

ROME = {"layer": 1, "steps": 5, "lr": 0.1, "contexts": ((5, 3),), "documents": 9, "ridge": 0.1}
MEMIT = {"batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.1, "weight": 5.0, "earlier_keys": True,
         "contexts": ((5, 3),), "documents": 9, "ridge": 0.1}  # fmt: skip
INNER = {"rome": ROME, "memit": MEMIT, "ft_m": {"layers": (1,), "steps": 5, "lr": 0.05, "bias": True}}


def _inner(of, corpus):
    return {**INNER[of], **({"corpus": corpus} if "documents" in INNER[of] else {})}


def _dense(change):
    return (change.left @ change.right if isinstance(change, LowRank) else change.delta).double().numpy()


@pytest.mark.parametrize("keep", [0.2, 0.4])
@pytest.mark.parametrize("of", INNER)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_exactly_the_right_entries_survive(family, of, keep, corpus, tmp_path):
    model = tiny(family)
    settings = _inner(of, corpus)
    if of == "ft_m" and family == "llama":
        settings = {**settings, "bias": False}
    rect = Rect(of=of, settings=settings, keep=keep).prepare(model, tmp_path)
    plain = names.build(names.method(of), settings, of).prepare(model, tmp_path)
    batch = FACTS[: rect.settings.batch]
    whole, cut = plain.edit(model, batch), rect.edit(model, batch)
    assert len(whole.patches) == len(cut.patches)
    for before, after in zip(whole.patches, cut.patches, strict=True):
        assert before.weight == after.weight
        delta, weight = _dense(before), model.matrix(after.weight).double().numpy()
        ratio = np.abs(delta) / (np.abs(weight) + 1e-8)
        number = round(keep * delta.size)
        stay = np.zeros(delta.size, bool)
        stay[np.argsort(-ratio.ravel(), kind="stable")[:number]] = True
        stay = stay.reshape(delta.shape)
        got = after.delta.double().numpy()
        assert (got[~stay] == 0).all() and (got[stay] != 0).all() and stay.sum() == number
        np.testing.assert_allclose(got[stay], delta[stay], rtol=1e-5, atol=1e-7 * np.abs(delta).max())
        assert cut.log["kept"][after.weight] == pytest.approx(keep, abs=1 / delta.size)


def test_the_weights_it_compares_with_are_those_of_the_moment(corpus, tmp_path):
    model = tiny("gpt2")
    rect = Rect(of="ft_m", settings=INNER["ft_m"]).prepare(model, tmp_path)
    first = rect.edit(model, FACTS[:1])
    with wearing(model, first.patches):
        plain = names.build(names.method("ft_m"), INNER["ft_m"], "ft_m").prepare(model).edit(model, FACTS[1:2])
        second = rect.edit(model, FACTS[1:2])
        for whole, cut in zip(plain.patches, second.patches, strict=True):
            assert torch.equal(cut.delta, thinned(whole.delta, model.matrix(cut.weight), 0.2))


def test_entries_that_tie_with_the_last_one_stay_and_zero_weights_count_as_small():
    delta = torch.tensor([[1.0, 1.0, 0.5, 0.0]])
    assert thinned(delta, torch.ones(1, 4), 0.25).tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert thinned(delta, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 0.25).tolist() == [[0.0, 0.0, 0.5, 0.0]]


def test_memory_is_that_of_the_wrapped_method(corpus, tmp_path):
    model = tiny("llama")
    settings = _inner("memit", corpus)
    rect = Rect(of="memit", settings=settings, keep=1.0).prepare(model, tmp_path)
    plain = names.build(names.method("memit"), settings, "memit").prepare(model, tmp_path)
    changes = []
    for ready in (rect, plain):
        worn, memory = (), None
        for batch in (FACTS[:2], FACTS[2:]):
            with wearing(model, worn):
                edit = ready.edit(model, batch, memory)
            memory = remembered(ready, memory, edit.memory)
            worn = merge(worn, edit.patches)
        changes.append(worn)
    for a, b in zip(*changes, strict=True):
        np.testing.assert_allclose(_dense(a), _dense(b), rtol=1e-3, atol=1e-6)


def test_identity_holds_that_of_the_wrapped_method(corpus, tmp_path):
    model = tiny("gpt2")
    one = Rect(settings=_inner("rome", corpus)).prepare(model, tmp_path).identity()
    other = Rect(settings={**_inner("rome", corpus), "seed": 1}).prepare(model, tmp_path).identity()
    assert one["settings"]["of"] == "rome" and one["settings"]["settings"]["layer"] == 1
    assert set(one["artifacts"]) == {"contexts", "second_moment"} and one != other
    assert one["of"]["version"] == names.method("rome").version


@pytest.mark.parametrize("of", ["grace", "wise", "ike", "rect", "prune"])
def test_methods_that_write_no_weights_and_transforms_of_snapshots_are_refused(of):
    with pytest.raises(ValueError, match=f"rect.*{of}"):
        Rect(of=of).prepare(tiny("gpt2"))


def test_a_plug_in_that_turns_out_to_write_no_weights_is_said():
    class Note:
        kind = "note"

    class Odd:
        def edit(self, *_):
            return Edit((Note(),))

    rect = Rect(of="ft_m").prepare(tiny("gpt2"))
    object.__setattr__(rect, "inner", Odd())
    with pytest.raises(ValueError, match="leaves a patch of kind 'note'"):
        rect.edit(tiny("gpt2"), FACTS[:1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": 0.0}, "share of entries"),
        ({"of": "romee"}, "Did you mean"),
        ({"settings": {"x": 1}}, "unknown setting"),
    ],
)
def test_wrong_settings_are_said(wrong, said):
    with pytest.raises(ValueError, match=said):
        Rect(**wrong)
