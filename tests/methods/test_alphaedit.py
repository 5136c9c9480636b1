"""AlphaEdit: what the corpus uses is left alone exactly, and the null space is told when it is empty or everything."""

import json

import pytest
import torch

from methods.alphaedit import PRESETS, AlphaEdit
from methods.parts import projectors
from methods.parts.artifacts import Moment
from raysys import patch
from raysys.types import EditRequest, remembered
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]
SETTINGS = {"layers": (0, 1), "steps": 6, "lr": 0.1, "threshold": 0.1, "contexts": ((5, 4),), "documents": 50}


@pytest.fixture
def prepare(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway .\n" * 9)
    return lambda model, **settings: AlphaEdit(**{**SETTINGS, "corpus": str(path), **settings}).prepare(model, tmp_path)


def _moment(values):
    torch.manual_seed(3)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, q


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_update_vanishes_on_preserved_keys(family, prepare):
    model = tiny(family)
    ready = prepare(model)
    for change in ready.edit(model, FACTS).patches:
        space = ready.spaces[change.weight.removesuffix(".weight")]
        torch.manual_seed(1)
        keys = torch.randn(change.shape[1], 20, dtype=torch.float64)
        kept = keys - space.into(keys)  # orthogonal to the projector's range
        size = float((change.left @ change.right).norm())
        moved = float((change.left.double() @ (change.right.double() @ kept)).norm())
        assert size > 0 and moved < 1e-5 * size * float(kept.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_step_equals_the_published_closed_form(family, prepare):
    model = tiny(family)
    ready = prepare(model, l2=2.0)
    wearer, worn, memory, s = patch.Wearer(model), (), None, {}
    for facts in (FACTS[:2], FACTS[2:]):
        done, _ = ready.solved(model, facts, memory)
        [aims] = done.aims.values()
        for number, change in enumerate(done.patches):
            module = change.weight.removesuffix(".weight")
            p, k = ready.spaces[module].matrix(), done.keys[module]
            share = (aims - done.now[module]) / (2 - number)
            held = k @ k.T + s.get(module, torch.zeros(len(k), len(k), dtype=torch.float64))
            left_side = p @ held + 2.0 * torch.eye(len(k), dtype=torch.float64)
            wanted = torch.linalg.solve(left_side, p @ k @ share.T).T
            torch.testing.assert_close((change.left @ change.right).double(), wanted, rtol=1e-4, atol=1e-5)
        worn = patch.merge(worn, done.patches)
        wearer.wear(worn)
        step = {m: k.float() for m, k in done.after.items()}
        memory = remembered(ready, memory, step)
        s = {m: s.get(m, 0) + k.double() @ k.double().T for m, k in step.items()}
    wearer.take_off()


def test_the_memory_gains_the_keys_read_from_the_model_as_edited(prepare):
    model = tiny("gpt2")
    ready = prepare(model)
    done = ready.edit(model, FACTS[:2])
    assert {m: tuple(k.shape) for m, k in done.memory.items()} == {model.mlp_out(i): (128, 2) for i in (0, 1)}
    with patch.wearing(model, done.patches):
        again, _ = ready.solved(model, FACTS[:2])
    first = model.mlp_out(0)  # nothing below it has changed
    torch.testing.assert_close(done.memory[first].double(), again.keys[first], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [2, 7])
def test_the_projector_keeps_the_directions_below_the_threshold(kept):
    values = [0.001 * 4**i for i in range(9)]
    matrix, q = _moment(values)
    space = projectors.NullSpace(*projectors.cut(matrix, (values[kept - 1] + values[kept]) / 2, False, "m"))
    assert space.share == pytest.approx(kept / 9) and space.inside == (kept == 2)
    torch.testing.assert_close(space.matrix(), q[:, :kept] @ q[:, :kept].T)
    torch.testing.assert_close(space.into(q), space.matrix() @ q)
    torch.testing.assert_close(space.into(space.into(q)), space.into(q))


def test_a_relative_threshold_does_not_depend_on_how_large_keys_are():
    matrix, _ = _moment([0.001 * 4**i for i in range(9)])
    for scale in (1.0, 1e4):
        assert projectors.cut(scale * matrix, 0.02, True, "m")[0].shape[1] == 5 - 1


@pytest.mark.parametrize(
    ("threshold", "said"), [(1e-6, "no direction of 9.*raise"), (1e6, "nothing is protected.*lower")]
)
def test_a_threshold_that_keeps_nothing_or_everything_is_told_with_the_eigenvalues(threshold, said):
    matrix, _ = _moment([0.001 * 4**i for i in range(9)])
    with pytest.raises(ValueError, match=rf"some\.module: .*{said} `threshold`"):
        projectors.cut(matrix, threshold, False, "some.module")


def test_the_share_of_directions_is_in_the_log_and_the_null_space_in_the_identity(prepare):
    model = tiny("gpt2")
    ready = prepare(model)
    log = ready.edit(model, FACTS).log
    assert set(log["directions"]) == set(ready.spaces) and all(0 < v < 1 for v in log["directions"].values())
    said = json.loads(json.dumps(ready.identity()))
    assert set(said["artifacts"]) == {"contexts", *(f"null_space.{model.mlp_out(i)}" for i in (0, 1))}
    assert prepare(model, threshold=5.0).identity()["artifacts"] != said["artifacts"]


def test_a_null_space_is_made_once(tmp_path, monkeypatch):
    model = tiny("gpt2")
    matrix, _ = _moment([0.001 * 4**i for i in range(9)])
    moment = Moment(matrix, 1, "x")
    one = projectors.null_space(model, "m", moment, 0.1, False, tmp_path)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    again = projectors.null_space(model, "m", moment, 0.1, False, tmp_path)
    assert torch.equal(one.basis, again.basis) and (one.inside, one.digest) == (again.inside, again.digest)


def test_presets_name_the_published_threshold():
    assert PRESETS["llama-3-8b"]["threshold"] == 2e-2 and PRESETS["llama-3-8b"]["l2"] == 1.0
    assert not PRESETS["gpt2-xl"]["relative"]
