"""Worn weights are the base plus the sum of all patches, with the same bits however one gets there."""

import pytest
import torch

from raysys.model import Model
from raysys.patch import Dense, LowRank, Wearer, merge
from raysys.snapshot import Snapshot, read, write
from raysys.types import Patch
from tests import families


def weight(model: Model, layer: int = 1) -> str:
    return f"{model.mlp_out(layer)}.weight"


def low_rank(model: Model, seed: int, rank: int = 1, layer: int = 1) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = model.matrix(weight(model, layer)).shape
    left, right = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    return LowRank(weight(model, layer), left, right)


def dense(model: Model, seed: int) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    return Dense(weight(model), torch.randn(*model.matrix(weight(model)).shape, generator=generator))


def state(model: Model) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in model.net.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, other[n]) for n, t in one.items())


def test_a_patch_changes_its_weight_by_left_times_right_and_nothing_else(model: Model) -> None:
    before, patch = state(model), low_rank(model, 0, rank=3)
    wanted = model.matrix(weight(model)) + patch.left @ patch.right
    with patch.applied(model):
        torch.testing.assert_close(model.matrix(weight(model)), wanted)
        changed = [n for n, p in model.net.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [weight(model)]
    assert same(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_live_stepwise_wear_equals_wearing_the_sum_bit_for_bit(dtype: torch.dtype) -> None:
    model, other = families.tiny("gpt2", dtype), families.tiny("gpt2", dtype)
    live, patches = Wearer(model), ()
    for step in range(30):  # past the rank at which factors are summed into a matrix
        own = low_rank(model, step) if step % 7 else dense(model, step)
        patches = merge(patches, [own, low_rank(model, step, layer=0)])
        live.wear(patches)
    at_once = Wearer(other)
    at_once.wear(patches)
    assert same(state(model), state(other))
    live.take_off()
    assert same(state(model), state(families.tiny("gpt2", dtype)))


def test_factors_become_a_matrix_when_the_rank_no_longer_pays_with_the_same_bits() -> None:
    model, other = families.tiny("llama"), families.tiny("llama")
    parts = [low_rank(model, s) for s in range(40)]
    d_out, d_in = parts[0].shape
    merged: tuple[Patch, ...] = ()
    for part in parts:
        merged = merge(merged, [part])
    assert isinstance(merged[0], Dense)
    joined = LowRank(weight(model), torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts]))
    assert joined.rank * (d_out + d_in) > d_out * d_in
    Wearer(model).wear(merged)
    Wearer(other).wear([joined])
    assert same(state(model), state(other))


def test_threads_do_not_change_the_worn_bits() -> None:
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = families.tiny("llama", hidden_size=256, intermediate_size=512)
        Wearer(model).wear([low_rank(model, 0, rank=20)])
        states.append(state(model))
    torch.set_num_threads(1)
    assert same(*states)


def test_switching_back_and_forth_never_drifts(model: Model) -> None:
    wearer, before = Wearer(model), state(model)
    early, late = (low_rank(model, 0),), merge((low_rank(model, 0),), [low_rank(model, 1)])
    wearer.wear(early)
    first = state(model)
    for patches in (late, early, (), late, (dense(model, 3),), early):
        wearer.wear(patches)
    assert same(state(model), first)
    wearer.take_off()
    assert same(state(model), before)


def test_wearing_that_fails_half_way_leaves_nothing_behind(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wearer, before = Wearer(model), state(model)
    early = (low_rank(model, 0),)
    late = merge(merge(early, [low_rank(model, 1)]), [low_rank(model, 2)])
    wearer.wear(early)
    plain, calls = torch.outer, []

    def fails_at_the_second_term(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return plain(*args)

    monkeypatch.setattr(torch, "outer", fails_at_the_second_term)
    with pytest.raises(RuntimeError, match="out of memory"):
        wearer.wear(late)
    monkeypatch.undo()
    assert same(state(model), before)
    wearer.wear(late)
    tried_again = state(model)
    wearer.take_off()
    Wearer(model).wear(late)
    assert same(state(model), tried_again)


def test_a_patch_for_another_shape_is_refused_and_nothing_is_worn(model: Model) -> None:
    before, wearer = state(model), Wearer(model)
    wearer.wear([low_rank(model, 0)])
    with pytest.raises(ValueError, match="made for another model"):
        wearer.wear([LowRank(weight(model), torch.ones(3, 1), torch.ones(1, 5))])
    assert same(state(model), before)


def test_a_snapshot_comes_back_from_disk_bit_for_bit(model: Model, tmp_path) -> None:
    snapshot = Snapshot("s", "p", 2, (low_rank(model, 0), dense(model, 1)), base=model.digest)
    snapshot.save(tmp_path / "s.safetensors")
    again = Snapshot.load(tmp_path / "s.safetensors")
    assert (again.id, again.parent, again.edits, again.digest) == ("s", "p", 2, snapshot.digest)
    again.verify()
    for one, other in zip(snapshot.patches, again.patches, strict=True):
        assert one.fields() == other.fields()
        assert all(torch.equal(t, other.tensors()[n]) for n, t in one.tensors().items())


def test_a_damaged_snapshot_is_refused(model: Model, tmp_path) -> None:
    path = tmp_path / "s.safetensors"
    Snapshot("s", None, 1, (low_rank(model, 0),), base=model.digest).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + b"\0" * 8)
    with pytest.raises(ValueError, match="digest"):
        Snapshot.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole file"):
        Snapshot.load(path)


def test_a_half_written_file_is_never_seen(model: Model, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.safetensors"
    write(path, (low_rank(model, 0),), {}, {"n": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, (low_rank(model, 1),), {}, {"n": 2})
    monkeypatch.undo()
    assert read(path)[2] == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["step.safetensors"]
