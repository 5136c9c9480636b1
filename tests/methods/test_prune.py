"""PRUNE: snapshots wear the sum of edits with its large singular values restrained; the stream doesn't notice."""

import math

import numpy as np
import pytest
import torch

from methods.prune import Prune
from raysys.journal import Journal, Stream, make_snapshot
from raysys.patch import Dense, LowRank, merge
from raysys.snapshot import digest
from tests.families import tiny
from tests.methods.dense import FACTS

FT = {"layers": (1,), "steps": 3, "lr": 0.05}


def _generator():
    return torch.Generator().manual_seed(0)


def _change(model, kind, scale):
    """A change of one matrix that is `scale` times as large (in σ_max) as the matrix."""
    weight = f"{model.mlp_out(1)}.weight"
    base = model.matrix(weight)
    d_out, d_in = base.shape
    top = float(torch.linalg.svdvals(base.double())[0])
    left, right = torch.randn(d_out, 5, generator=_generator()), torch.randn(5, d_in, generator=_generator())
    left = left * (scale * top / float(torch.linalg.svdvals((left @ right).double())[0]))
    return LowRank(weight, left, right) if kind == "low_rank" else Dense(weight, left @ right)


def _matrix(change):
    return (change.left @ change.right if isinstance(change, LowRank) else change.delta).double().numpy()


def _wanted(delta, base, restraint, n):
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    top = np.linalg.svd(base, compute_uv=False)[0]
    for i in range(len(s)):
        if s[i] > top:
            s[i] = math.log(s[i], n) - math.log(top, n) + top if restraint == "log" else (s[i] + top) / 2
    return u @ np.diag(s) @ v


@pytest.mark.parametrize("n", [math.e, 2.0, 1.5, 1.2])
@pytest.mark.parametrize("restraint", ["log", "linear"])
@pytest.mark.parametrize("kind", ["low_rank", "dense"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_large_singular_values_are_restrained_as_the_paper_says(family, kind, restraint, n, tmp_path):
    model = tiny(family)
    ready = Prune(of="ft_m", settings=FT, restraint=restraint, base=n).prepare(model, tmp_path)
    change = _change(model, kind, 3.0)
    [done] = ready.finish(model, (change,))
    wanted = _wanted(_matrix(change), model.matrix(change.weight).double().numpy(), restraint, n)
    got = _matrix(done)
    assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.norm(got - _matrix(change)) > 1e-3 * np.linalg.norm(got)
    assert done.kind == change.kind


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_change_below_the_largest_singular_value_is_handed_on_as_it_is(kind, tmp_path):
    model = tiny("llama")
    change = _change(model, kind, 0.9)
    [done] = Prune(of="ft_m", settings=FT).prepare(model, tmp_path).finish(model, (change,))
    assert done is change


def test_biases_are_left_alone(tmp_path):
    model = tiny("gpt2")
    change = Dense(f"{model.mlp_out(1)}.bias", torch.full((32, 1), 9.0))
    [done] = Prune(of="ft_m", settings=FT).prepare(model, tmp_path).finish(model, (change,))
    assert done is change


def test_the_stream_goes_on_from_what_was_not_restrained(tmp_path):
    model = tiny("llama")
    ready = Prune(of="ft_m", settings={**FT, "lr": 2.0}).prepare(model, tmp_path)
    edit = ready.edit(model, FACTS[:1])
    plain = ready.inner.edit(model, FACTS[:1])
    assert torch.equal(edit.patches[0].delta, plain.patches[0].delta)
    worn = merge((), edit.patches)
    [done] = ready.finish(model, worn)
    assert not torch.equal(done.delta, worn[0].delta)
    assert torch.equal(worn[0].delta, edit.patches[0].delta)


def test_a_snapshot_rebuilt_from_disk_is_the_live_one_bit_for_bit(tmp_path):
    model = tiny("llama")
    made = Prune(of="ft_m", settings={**FT, "lr": 2.0})
    ready = made.prepare(model, tmp_path)
    stream = Stream(model.digest, "float32", ready.identity(), tuple(FACTS[:1]), 0, 1)
    journal = Journal(tmp_path / "journal", stream)
    live = make_snapshot(stream, 1, ready.finish(model, merge((), ready.edit(model, FACTS[:1]).patches)))
    journal.keep(live)
    again = journal.snapshot(1)
    assert again.digest == live.digest == digest(model.digest, live.patches)
    other = made.prepare(model, tmp_path)
    assert digest(model.digest, other.finish(model, merge((), other.edit(model, FACTS[:1]).patches))) == live.digest


def test_rect_may_be_wrapped_and_identities_nest(tmp_path):
    model = tiny("gpt2")
    ready = Prune(of="rect", settings={"of": "ft_m", "settings": FT}).prepare(model, tmp_path)
    assert ready.edit(model, FACTS[:1]).log["kept"]
    said = ready.identity()
    assert said["settings"]["settings"]["of"] == "ft_m" and said["of"]["name"] == "rect"


@pytest.mark.parametrize("of", ["grace", "melo", "serac", "lora", "prune"])
def test_methods_that_write_no_weights_are_refused(of):
    with pytest.raises(ValueError, match=f"prune changes the weights that a method has written, and '{of}'"):
        Prune(of=of)


def test_a_base_of_one_is_refused():
    with pytest.raises(ValueError, match="above 1"):
        Prune(base=1.0)
