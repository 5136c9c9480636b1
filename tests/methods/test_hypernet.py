"""Networks that transform gradients: their statistics, their training, and the files they are kept in."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.parts import editors, gradients, training
from methods.parts.gradients import Trace
from methods.parts.hypernet import HyperNet, Stats, shapes
from methods.parts.training import Training, order, split
from raysys.types import EditRefused
from tests.families import tiny

SHAPES = {"one": (3, 2), "two": (3, 2), "three": (2, 4)}


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def trace(name, n, seed=0):
    d_in, d_out = SHAPES[name]
    both = rows(n, d_in + d_out, seed)
    return Trace(both[:, :d_in], both[:, d_in:], torch.zeros(n, dtype=torch.long))


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2), (4, 5, 19), range(1, 20)])
def test_statistics_are_mean_and_deviation_however_the_rows_came_in(cuts):
    every = rows(20, 5)
    stats = Stats.none(5)
    for start, stop in itertools.pairwise([0, *cuts, 20]):
        stats = stats.and_then(Stats.of(every[start:stop]))
    wide = every.double()
    torch.testing.assert_close(stats.mean, wide.mean(0))
    torch.testing.assert_close(stats.std, wide.std(0))
    torch.testing.assert_close(stats.normalised(every), ((wide - wide.mean(0)) / (wide.std(0) + 1e-7)).float())


def test_statistics_of_nothing_change_nothing():
    assert torch.equal(Stats.none(3).normalised(rows(4, 3)), rows(4, 3))
    some = Stats.of(rows(4, 3))
    again = some.and_then(Stats.of(rows(0, 3)))
    assert torch.equal(again.mean, some.mean) and torch.equal(again.m2, some.m2)
    assert Stats.of(rows(1, 3)).std.eq(0).all()


def test_an_untrained_network_gives_the_normalised_rows():
    net = HyperNet(SHAPES, rank=2)
    seen = trace("one", 9)
    net.observe("one", seen)
    x, delta = net.transformed("one", seen)
    torch.testing.assert_close(torch.cat((x, delta), 1), Stats.of(rows(9, 5)).normalised(rows(9, 5)))


def test_matrices_of_one_shape_share_a_network_but_not_scale_and_shift():
    net = HyperNet(SHAPES, rank=2, blocks=1)
    net.observe("one", trace("one", 9))
    shared = net.transforms["3x2"]
    with torch.no_grad():
        shared.u[0].fill_(0.1)
        shared.scale[0][1] *= 2
        shared.shift[0][1] += 0.5
    given = trace("one", 4, seed=1)
    a = shared.stats.normalised(torch.cat((given.x, given.delta), 1))
    inner = a @ shared.v[0].T @ shared.u[0].T + shared.b[0]
    for name, scale, shift in (("one", 1.0, 0.0), ("two", 2.0, 0.5)):
        torch.testing.assert_close(torch.cat(net.transformed(name, given), 1), a + torch.relu(scale * inner + shift))
    assert set(net.transforms) == {"3x2", "2x4"}


def test_at_the_start_of_training_every_block_can_be_learnt():
    net = HyperNet(SHAPES, rank=2)
    x, delta = net.transformed("one", trace("one", 9))
    (x.sum() + delta.square().sum()).backward()
    shared = net.transforms["3x2"]
    for learnt in (*shared.u, *shared.b, *shared.shift):
        assert learnt.grad is not None and learnt.grad.abs().sum() > 0


# --- training --------------------------------------------------------------------------------------------------------


class Fit:
    """Learn to give what another network gives."""

    def __init__(self, broken=(), stop=None):
        self.net = HyperNet(SHAPES, rank=2, seed=1)
        self.broken, self.stop, self.calls = broken, stop, []
        self.goal = HyperNet(SHAPES, rank=2, seed=1)
        with torch.no_grad():
            for shared in self.goal.transforms.values():
                for u in shared.u:
                    u.fill_(0.7)
        for number in range(30):
            for name in SHAPES:
                self.goal.observe(name, trace(name, 6, seed=number))
        self.count = 30

    def _loss(self, cases, grow):
        losses = []
        for number in cases:
            for name in SHAPES:
                given = trace(name, 6, seed=number)
                if grow:
                    self.net.observe(name, given)
                out, wanted = (torch.cat(net.transformed(name, given), 1) for net in (self.net, self.goal))
                losses.append((out * self.net.lr(name) * 1e4 - wanted.detach()).square().mean())
        return torch.stack(losses).mean()

    def learn(self, cases):
        self.calls.append(list(cases))
        if self.stop is not None and len(self.calls) > self.stop:
            raise KeyboardInterrupt
        loss = self._loss(cases, True)
        (loss * (float("nan") if len(self.calls) in self.broken else 1.0)).backward()
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def judge(self, cases):
        return {"loss": float(self._loss(cases, False))}


WANTED = {"method": "fit", "model": "m"}
HOW = Training(
    steps=40, cases=2, accumulate=2, lr=0.02, lr_lr=1e-5, every=10, validation=5, patience=99, schedule="linear"
)


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path):
    heard = []
    path = training.train(Fit(), HOW, WANTED, "data", tmp_path, heard.append)
    assert [p.step for p in heard] == [10, 20, 30, 40]
    assert heard[-1].validation["loss"] < 0.7 * heard[0].validation["loss"]
    found = editors.find(WANTED, tiny("gpt2"), tmp_path)
    assert found.path == path and found.training["data"] == "data" and found.training["steps"] == 40
    assert found.training["best"] == min(p.validation["loss"] for p in heard)
    assert list((tmp_path / "editors").iterdir()) == [path]  # no checkpoint is left


@pytest.mark.parametrize("stop", [12, 20, 33])
def test_interrupted_training_ends_with_the_same_bits(tmp_path, stop):
    whole = training.train(Fit(), HOW, WANTED, "data", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        training.train(Fit(stop=stop), HOW, WANTED, "data", tmp_path)
    later = Fit()
    path = training.train(later, HOW, WANTED, "data", tmp_path)
    assert len(later.calls) == 40 - stop // 10 * 10
    one, other = load_file(whole), load_file(path)
    assert path.name == whole.name and all(torch.equal(t, other[k]) for k, t in one.items())


def test_other_data_or_settings_start_from_the_beginning(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training.train(Fit(stop=20), HOW, WANTED, "data", tmp_path)
    for how, data in ((HOW, "other"), (replace(HOW, lr=0.01), "data")):
        later = Fit()
        training.train(later, how, WANTED, data, tmp_path / data)
        assert len(later.calls) == 40


def test_a_step_that_is_not_finite_is_thrown_away(tmp_path):
    heard = []
    broken = Fit(broken=(3, 11))
    training.train(broken, HOW, WANTED, "data", tmp_path, heard.append)
    assert heard[-1].skipped == 2
    assert all(p.isfinite().all() for p in broken.net.parameters())


class Refusing(Fit):
    """Refuses the steps and validations of these numbers (from 1), as a loss that is not finite does."""

    def __init__(self, steps, validations=()):
        super().__init__()
        self.steps, self.validations, self.judged = steps, validations, 0

    def learn(self, cases):
        found = super().learn(cases)
        if len(self.calls) in self.steps:
            raise EditRefused("not finite")
        return found

    def judge(self, cases):
        self.judged += 1
        if self.judged in self.validations:
            raise EditRefused("not finite")
        return super().judge(cases)


def test_a_lesson_that_is_refused_costs_its_update_and_no_more(tmp_path):
    heard, refusing, nan = [], Refusing((3, 12)), Fit(broken=(3, 12))
    path = training.train(refusing, HOW, WANTED, "data", tmp_path / "a", heard.append)
    assert heard[-1].skipped == 2 and heard[-1].step == 40
    same = load_file(training.train(nan, HOW, WANTED, "data", tmp_path / "b"))  # as a gradient of nan does
    assert all(torch.equal(t, same[k]) for k, t in load_file(path).items())


def test_a_validation_that_is_refused_is_no_good_one_and_training_goes_on(tmp_path):
    heard = []
    training.train(Refusing((), (2,)), HOW, WANTED, "data", tmp_path, heard.append)
    assert [p.validation["loss"] == math.inf for p in heard] == [False, True, False, False]
    assert heard[1].best == heard[0].best
    with pytest.raises(ValueError, match="without one finite validation"):
        training.train(Refusing(range(41), range(5)), HOW, WANTED, "other", tmp_path)


def test_training_ends_when_it_does_not_get_better(tmp_path):
    fit = Fit()
    training.train(fit, replace(HOW, lr=0.0, lr_lr=0.0, steps=1000, every=2, patience=6), WANTED, "data", tmp_path)
    assert len(fit.calls) < 200


def test_gradients_are_clipped(tmp_path):
    fit = Fit()
    for group in (fit.net.others(), fit.net.step_sizes()):
        for p in group:
            p.grad = torch.full_like(p, 3.0)
    before = [p.grad.clone() for p in fit.net.parameters()]
    sgd = torch.optim.SGD([{"params": fit.net.others()}, {"params": fit.net.step_sizes()}], lr=1.0)
    was = [p.detach().clone() for p in fit.net.parameters()]
    training._update(fit.net, sgd, replace(HOW, clip=0.5, accumulate=1, lr=1.0, lr_lr=1.0, schedule="constant"), 1)
    moved = torch.cat([(p.detach() - w).flatten() for p, w in zip(fit.net.parameters(), was, strict=True)])
    assert len(before) == len(was) and float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_every_case_comes_once_before_any_comes_again():
    seen = [i for step in range(5) for i in order(10, step, replace(HOW, cases=4))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_cases_are_held_back_evenly_and_never_trained_on():
    held, used = split(30, HOW)
    assert held == [0, 6, 12, 18, 24] and sorted(held + used) == list(range(30))
    assert split(4, HOW)[0] == [0]
    with pytest.raises(ValueError, match="at least two"):
        split(1, HOW)


def test_settings_that_nobody_knows_are_named():
    with pytest.raises(ValueError, match=r"unknown setting .step.\. Did you mean .steps."):
        training.built("mend", {"step": 3}, Training)
    with pytest.raises(ValueError, match="training of mend"):
        training.built("mend", {"steps": "many"}, Training)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return tiny("gpt2")


def saved(model, folder, value=1.0, **structure):
    wanted = editors.fits("mend", model, ["a", "b"], {"rank": 4, **structure})
    return wanted, editors.save(wanted, {"t": torch.full((3,), value)}, {"data": "x"}, folder)


def test_an_editor_is_found_by_what_it_fits(model, tmp_path):
    wanted, path = saved(model, tmp_path)
    found = editors.find(wanted, model, tmp_path)
    assert found.path == path and found.digest.startswith(path.stem.rpartition("-")[2])
    assert saved(model, tmp_path)[1] == path  # the same editor again is the same file


def test_without_an_editor_the_message_says_how_to_train_one(model, tmp_path):
    wanted, _ = saved(model, tmp_path)
    for other in ({"structure": {"rank": 5}}, {"modules": ["a"]}, {"model": "another"}):
        with pytest.raises(ValueError, match=r"raysys train-editor mend tiny-gpt2"):
            editors.find({**wanted, **other}, model, tmp_path)


def test_a_foreign_editor_is_refused_with_what_differs(model, tmp_path):
    wanted, path = saved(model, tmp_path)
    other = tiny("gpt2", seed=1)
    foreign = editors.fits("mend", other, ["a", "b"], {"rank": 4})
    with pytest.raises(ValueError, match=rf"trained for something else: model is {model.digest[:12]}"):
        editors.find(foreign, other, tmp_path, str(path))
    path.rename(path.with_name(f"{editors.name(foreign)}-{path.stem.rpartition('-')[2]}.safetensors"))
    with pytest.raises(ValueError, match="trained for something else"):
        editors.find(foreign, other, tmp_path)
    assert wanted != foreign


def test_a_damaged_or_changed_editor_is_refused(model, tmp_path):
    wanted, path = saved(model, tmp_path)
    tensors = load_file(path)
    header = {"fits": editors._json(wanted), "digest": editors.read(path, wanted).digest, "training": "{}"}
    save_file({"t": tensors["t"] + 1}, path, header)
    with pytest.raises(ValueError, match="changed after it was written"):
        editors.find(wanted, model, tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can't be read"):
        editors.find(wanted, model, tmp_path)


def test_of_several_editors_one_has_to_be_named(model, tmp_path):
    wanted, first = saved(model, tmp_path)
    _, second = saved(model, tmp_path, 2.0)
    with pytest.raises(ValueError, match=r"2 trained editors.*editor = "):
        editors.find(wanted, model, tmp_path)
    assert editors.find(wanted, model, tmp_path, second.stem.rpartition("-")[2]).path == second
    assert editors.find(wanted, model, tmp_path, str(first)).path == first


def test_shapes_are_those_of_the_weights_whatever_their_layout():
    for family in ("gpt2", "llama"):
        model = tiny(family)
        inner = model.arch.mlp_in[0].format(1)
        found = shapes(model, (inner, model.mlp_out(1)))
        assert found[inner] == tuple(reversed(found[model.mlp_out(1)])) and found[inner][0] == 32
        assert gradients.lowest(model, list(found)) == 1
