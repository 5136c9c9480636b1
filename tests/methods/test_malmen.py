"""MALMEN and RLEdit: shifts, and what is learned from them, against plain computations in one graph."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.edits import World
from methods import malmen
from methods.malmen import Malmen
from methods.parts import meta
from methods.parts.hypernet import HyperNet, shapes
from methods.parts.meta import Course, Learner
from methods.parts.training import Progress
from methods.rledit import RlEdit
from raysys import checks
from raysys.model import Model
from raysys.patch import Dense, LowRank, wearing
from raysys.types import EditCase, EditRefused, EditRequest, Probe
from tests.families import tiny
from tests.methods.plain_streams import module_names, plain_shift, plain_stream

ANNA = EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris")
DORA = EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer")
OSLO = EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway")
BERT = EditRequest("bert", "{} works as a", "Bert", "baker", "pilot")


def case(request: EditRequest) -> EditCase:
    follows = Probe("paraphrase", f"The city of {request.subject} is", request.target, request.was)
    stays = Probe("neighbourhood", "Lima is the capital of", "Peru", request.target)
    return EditCase(request, (follows, stays))


CASES = [case(r) for r in (ANNA, DORA, OSLO, BERT)]


def small_net(model: Model, seed: int = 0) -> HyperNet:
    """A network whose transform is not the identity and whose shifts are large enough to matter."""
    net = HyperNet(shapes(model, module_names(model)), rank=4, blocks=2, lr=0.3, seed=seed, lamda=-1.0)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in net.others():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return net


def warmed(learner: Learner) -> None:
    """Let the network see what gradients are like, as earlier steps of training would."""
    learner.learn(list(range(len(CASES))))
    learner.net.zero_grad()


def gradients_of(net: HyperNet) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def same_gradients(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    for name, wanted in plain.items():
        assert torch.allclose(ours[name], wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()) + 1e-7), name


# --- the shift -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny(request.param)


COURSE = Course(edits=2, loc_coef=0.7, general=2, local=1, chunk=3)


def test_the_shift_of_a_batch_is_the_dense_solution(model: Model) -> None:
    learner = Learner(model, small_net(model), meta.lessons(model, CASES), COURSE)
    warmed(learner)
    wanted = {n: d.detach() for n, d in plain_shift(model, learner.net, [ANNA, DORA], {}).items()}
    [[_], [made]] = learner._shifts([learner.lessons[:2]], [{}], learning=False)
    for name, shift in made.items():
        assert float(wanted[name].norm()) > 1e-3
        assert torch.allclose(shift.matrix(), wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("chunk", [3, 1000])
def test_two_stages_of_training_give_the_gradient_of_one_graph(model: Model, chunk: int) -> None:
    learner = Learner(model, small_net(model), meta.lessons(model, CASES), replace(COURSE, chunk=chunk))
    warmed(learner)
    statistics = {n: b.clone() for n, b in learner.net.named_buffers()}
    told = learner.learn([0, 1])
    ours = gradients_of(learner.net)
    learner.net.zero_grad()
    seen = {n: b.clone() for n, b in learner.net.named_buffers()}
    assert all(not torch.equal(seen[n], b) for n, b in statistics.items())
    loss = plain_stream(model, learner.net, [CASES[:2]], COURSE)
    loss.backward()
    assert told["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    same_gradients(ours, gradients_of(learner.net))


@pytest.mark.parametrize("since", ["start", "before"])
def test_a_stream_pays_for_what_it_wrote_before(since: Any) -> None:
    model = tiny("llama")
    course = Course(length=3, depth=2, decay=0.9, loc_coef=0.6, reg=0.5, general=2, local=1, since=since)
    learner = Learner(model, small_net(model), meta.lessons(model, CASES), course)
    frozen = Stilled(learner)
    told = frozen.learn([3, 0, 2])
    ours = gradients_of(learner.net)
    learner.net.zero_grad()
    loss = plain_stream(model, learner.net, [[CASES[3]], [CASES[0]], [CASES[2]]], course)
    loss.backward()
    assert told["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    same_gradients(ours, gradients_of(learner.net))


class Stilled:
    """A learner whose statistics no longer grow, so that a whole stream sees the same network."""

    def __init__(self, learner: Learner) -> None:
        warmed(learner)
        learner.net.observe = lambda name, trace: None  # type: ignore[method-assign]
        self.learn = learner.learn


def test_streams_side_by_side_are_the_mean_of_streams_alone() -> None:
    model = tiny("gpt2")
    course = Course(length=2, depth=2, decay=0.9, general=2, local=1, reg=0.1)
    learner = Learner(model, small_net(model), meta.lessons(model, CASES), course)
    stilled = Stilled(learner)
    alone = [stilled.learn([0, 1]), stilled.learn([2, 3])]
    each = {n: g / 2 for n, g in gradients_of(learner.net).items()}
    learner.net.zero_grad()
    both = stilled.learn([0, 1, 2, 3])
    for key in ("loss", "nll", "kl"):
        assert both[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2, rel=1e-4)
    same_gradients(gradients_of(learner.net), each)


# --- the methods -----------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"layers": (1, 2), "mlp": "out", "rank": 4, "blocks": 2, "tokens": "all", "start": 0.01}
QUICK = {"steps": 3, "every": 1, "lr": 1e-3, "lr_lr": 1e-3, "validation": 1, "edits": 1, "length": 1, "streams": 1}


def test_wearing_the_patches_is_the_edited_model_that_was_trained(model: Model, tmp_path: Path) -> None:
    method = Malmen(**TINY, batch=2)
    method.train(model, CASES, tmp_path, settings=QUICK)
    ready = method.prepare(model, tmp_path)
    edit = ready.edit(model, [ANNA, DORA])
    wanted = plain_shift(model, ready.net, [ANNA, DORA], {})
    assert {p.weight for p in edit.patches if isinstance(p, LowRank | Dense)} == {f"{n}.weight" for n in wanted}
    for patch in edit.patches:
        assert isinstance(patch, LowRank | Dense)
        delta = torch.zeros(patch.shape)
        patch.add_to(delta)
        dense = wanted[patch.weight.removesuffix(".weight")].detach()
        assert torch.allclose(delta, dense, rtol=1e-3, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("method", [Malmen(**TINY), RlEdit(**TINY)])
def test_the_next_gradient_is_taken_on_the_changed_model(method: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    method.train(model, CASES, tmp_path, settings=QUICK)
    ready = method.prepare(model, tmp_path)
    first = ready.edit(model, [ANNA])
    alone = ready.edit(model, [DORA])
    with wearing(model, first.patches):
        after = ready.edit(model, [DORA])
    worn = {}
    for patch in first.patches:
        worn[patch.weight.removesuffix(".weight")] = patch.left @ patch.right
    wanted = plain_shift(model, ready.net, [DORA], worn)
    for one, other in zip(after.patches, alone.patches, strict=True):
        made, untouched = one.left @ one.right, other.left @ other.right
        assert not torch.allclose(made, untouched, rtol=1e-3)
        dense = wanted[one.weight.removesuffix(".weight")].detach()
        assert torch.allclose(made, dense, rtol=1e-3, atol=1e-4 * float(dense.abs().max()))


def test_only_tokens_that_predict_the_target_are_moved_where_that_is_asked(tmp_path: Path) -> None:
    model = tiny("gpt2")
    method = Malmen(**{**TINY, "tokens": "target"}, batch=2)
    method.train(model, CASES, tmp_path, settings=QUICK)
    targets = sum(len(model.pair(r.text, r.continuation)[1]) for r in (ANNA, DORA))
    assert method.prepare(model, tmp_path).edit(model, [ANNA, DORA]).log["tokens"] == targets


def test_too_many_edits_for_a_shift_are_refused(tmp_path: Path) -> None:
    model = tiny("gpt2")
    method = Malmen(**TINY)
    method.train(model, CASES, tmp_path, settings=QUICK)
    with pytest.raises(EditRefused, match="made of 1 to 1 edits"):
        method.prepare(model, tmp_path).edit(model, [ANNA, DORA])


@pytest.mark.parametrize("method", [Malmen(), RlEdit()])
def test_the_editor_shipped_for_the_world_edits_it(method: Any, tmp_path: Path) -> None:
    world = Model.load("world/small")
    ready = method.prepare(world, tmp_path)
    found = checks.shares(list(checks.single_edits(world, ready, islice(World().cases(), 12))))
    assert found["rewrite/greedy"] > 0.8 and found["neighbourhood/greedy"] > 0.7


# --- training --------------------------------------------------------------------------------------------------------


def test_without_a_trained_editor_the_command_is_named(tmp_path: Path) -> None:
    for method in (Malmen(**TINY), RlEdit(**TINY)):
        with pytest.raises(ValueError, match=f"raysys train-editor {method.name} tiny-llama"):
            method.prepare(tiny("llama"), tmp_path)


def test_an_editor_for_another_model_or_network_is_not_taken(tmp_path: Path) -> None:
    model = tiny("llama")
    path = Malmen(**TINY).train(model, CASES, tmp_path, settings=QUICK)
    for method, other in (
        (Malmen(**TINY), tiny("llama", seed=1)),
        (Malmen(**{**TINY, "rank": 3}), model),
        (Malmen(**{**TINY, "tokens": "target"}), model),
        (RlEdit(**TINY), model),
        (Malmen(**TINY, editor=str(path)), tiny("llama", seed=1)),
    ):
        with pytest.raises(ValueError, match=r"train-editor|something else"):
            method.prepare(other, tmp_path)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", [Malmen(**TINY), RlEdit(**TINY)])
def test_training_taken_up_again_ends_with_the_same_bits(method: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    settings = {**QUICK, "steps": 6, "length": 2, "depth": 2}
    whole = method.train(model, CASES, tmp_path / "whole", settings=settings)

    def stop(told: Progress) -> None:
        if told.step == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        method.train(model, CASES, tmp_path / "parts", stop, settings)
    parts = method.train(model, CASES, tmp_path / "parts", settings=settings)
    assert whole.name == parts.name  # it holds a hash of the contents
    one, other = load_file(whole), load_file(parts)
    assert one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())
    assert not list((tmp_path / "parts").rglob("*checkpoint*"))


def test_rledit_can_begin_with_the_network_of_malmen(tmp_path: Path) -> None:
    model = tiny("llama")
    settings = {**QUICK, "length": 2, "begin": True, "lr": 1e-9, "lr_lr": 1e-9}
    with pytest.raises(ValueError, match="raysys train-editor malmen"):
        RlEdit(**TINY).train(model, CASES, tmp_path, settings=settings)
    begun = load_file(Malmen(**TINY).train(model, CASES, tmp_path, settings=QUICK))
    made = load_file(RlEdit(**TINY).train(model, CASES, tmp_path, settings=settings))
    published = load_file(RlEdit(**TINY, published=True).train(model, CASES, tmp_path, settings=settings))
    learned = [k for k, t in begun.items() if t.dtype == torch.float32]
    for taught in (made, published):
        assert learned and all(torch.allclose(taught[k], begun[k], atol=1e-7) for k in learned)


def test_a_lesson_whose_shift_is_not_finite_costs_its_update_only(tmp_path: Path, monkeypatch: Any) -> None:
    real, calls = meta.Ridge, []

    def ridge(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("not finite numbers")
        return real(*args)

    monkeypatch.setattr(meta, "Ridge", ridge)
    heard: list[Progress] = []
    long = case(replace(ANNA, id="long", prompt="{}" + " was" * 80))
    Malmen(**TINY).train(tiny("llama"), [*CASES, long], tmp_path, heard.append, {**QUICK, "steps": 6, "every": 6})
    assert [(p.step, p.skipped, p.left_out) for p in heard] == [(6, 1, 1)]


def test_training_makes_edits_better() -> None:
    model = tiny("llama")
    net = HyperNet(shapes(model, module_names(model)), rank=4, blocks=1, lr=0.1, lamda=0.0)
    learner = Learner(model, net, meta.lessons(model, CASES), Course(streams=4, general=2, loc_coef=0.1))
    adam = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(30):
        losses.append(learner.learn([0, 1, 2, 3])["nll"])
        adam.step()
        adam.zero_grad()
    assert losses[-1] < losses[0] - 0.5


def test_cases_that_do_not_fit_are_left_out_and_neighbours_lent() -> None:
    model = tiny("llama")
    bare = EditCase(BERT, ())
    long = case(replace(ANNA, prompt="{}" + " was" * 80))
    found = meta.lessons(model, [bare, long, CASES[0]])
    assert [lesson.request.id for lesson in found] == ["bert", "anna"]
    assert found[0].local == found[1].local and len(found[0].general) == 1
    with pytest.raises(ValueError, match="none of 1 training cases has neighbours"):
        meta.lessons(model, [bare])


def test_presets_name_modules_and_layers_that_are_asked_for_come_first() -> None:
    model = tiny("llama", num_hidden_layers=4)
    for cls in (Malmen, RlEdit):
        usual = malmen.settled(cls(), model, {}, malmen.rule)
        assert (usual.layers, usual.modules, usual.mlp) == ((1, 2, 3), (), "out")
        known = {"": {"modules": ("model.layers.0.mlp.up_proj",)}}
        assert malmen.modules(malmen.settled(cls(), model, known, malmen.rule), model) == known[""]["modules"]
        chosen = malmen.settled(cls(layers=(2,), mlp="all"), model, known, malmen.rule)
        names = [f"model.layers.2.mlp.{n}_proj" for n in ("gate", "up", "down")]
        assert sorted(malmen.modules(chosen, model)) == sorted(names)


def test_wrong_settings_of_training_are_named(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="Did you mean 'length'"):
        RlEdit(**TINY).train(model, CASES, tmp_path, settings={"lenght": 3})
    with pytest.raises(ValueError, match="streams \\* length \\* edits"):
        Malmen(**TINY).train(model, CASES, tmp_path, settings={"cases": 3})
