"""Methods side by side, one after another, and searched: on tiny models, with the real methods of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from methods.ft import FtM
from raysys import bench_methods, cli, progress, steps, tuning
from raysys.bench_methods import Wanted
from raysys.checks_sequence import sequential_edits
from raysys.model import Model
from raysys.patch import LowRank
from raysys.types import Edit, EditCase, EditRefused, EditRequest, Probe
from tests.actors import small
from tests.families import tiny


def case(subject: str, target: str, was: str) -> EditCase:
    request = EditRequest(subject, "{} was born in the city of", subject, target, was)
    probes = (
        Probe("rewrite", request.text, target, was),
        Probe("paraphrase", f"The city of {subject} is", target, was),
        Probe("neighbourhood", "Bert was born in the city of", "Oslo", target),
    )
    return EditCase(request, probes)


CASES = [case("Anna", "Rome", "Paris"), case("Dora", "Lima", "Oslo")]
BAD = EditCase(EditRequest("bad", "{} was born in", "Anna", " "), (Probe("rewrite", "Anna was born in", "Rome"),))
TUNED = {"layers": [0, 1, 2], "steps": 40, "lr": 3e-3}


@pytest.fixture
def llama() -> Model:
    model = tiny("llama")
    model.net.lm_head.weight.data.mul_(8)
    return model


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fussy:
    """Serves no request whose id is among `bad`; the update is NaN when one is among `nan`."""

    bad: frozenset[str] = frozenset()
    nan: frozenset[str] = frozenset()
    silent: bool = False  # the reason names nobody

    def identity(self) -> dict[str, Any]:
        return {}

    def edit(self, model: Any, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        for r in requests:
            if r.id in self.bad:
                raise EditRefused("no room" if self.silent else f"edit {r.id!r}: it is bad")
        value = torch.nan if any(r.id in self.nan for r in requests) else float(len(requests))
        return Edit((LowRank("w", torch.full((2, 1), value), torch.ones(1, 2)),))


def ask(*ids: str) -> list[EditRequest]:
    return [EditRequest(i, "{} is", "x", "y") for i in ids]


def test_a_refused_request_leaves_its_batch_and_the_rest_is_made() -> None:
    edit, refused = steps.make(Fussy(frozenset("bd")), None, ask(*"abcde"))  # type: ignore[arg-type]
    assert refused == {"b": "edit 'b': it is bad", "d": "edit 'd': it is bad"}
    [patch] = edit.patches
    assert patch.tensors()["left"][0, 0] == 3


def test_a_batch_that_is_refused_as_a_whole_changes_nothing() -> None:
    edit, refused = steps.make(Fussy(frozenset("b"), silent=True), None, ask(*"abc"))  # type: ignore[arg-type]
    assert not edit.patches
    assert refused == dict.fromkeys("abc", "no room")


@pytest.mark.parametrize("ids", ["a", "abc"])
def test_an_update_that_is_not_finite_is_refused(ids: str) -> None:
    edit, refused = steps.make(Fussy(nan=frozenset("a")), None, ask(*ids))  # type: ignore[arg-type]
    assert not edit.patches
    assert set(refused) == set(ids)
    assert all("NaN or infinite" in why for why in refused.values())


# --- one after another -----------------------------------------------------------------------------------------------


def test_a_stream_is_probed_at_once_and_at_its_end_and_leaves_the_base(llama: Model) -> None:
    before = {k: v.clone() for k, v in llama.net.state_dict().items()}
    made: list[int] = []
    facts = [Probe("neighbourhood", "Carla was born in", " Lima")]
    ready = FtM(layers=(0, 1, 2), steps=40, lr=3e-3).prepare(llama)
    found = sequential_edits(llama, ready, [*CASES, BAD], facts=facts, tell=made.append)
    assert all(torch.equal(v, before[k]) for k, v in llama.net.state_dict().items())
    assert (found.edits, len(found.refused), made) == (3, 1, [1, 2, 3])
    assert "has no tokens" in found.refused[0]
    assert found.at_once["rewrite/greedy"] == pytest.approx(2 / 3)  # the refused one counts
    assert found.at_end["rewrite/greedy"] < 1.0
    assert found.bytes == 3 * 32 * 48 * 4
    assert found.facts is None  # the model knew none


def test_a_neighbour_that_another_edit_changes_is_not_asked(llama: Model) -> None:
    cases = [CASES[0], case("Bert", "Paris", "Oslo")]
    found = sequential_edits(llama, FtM(layers=(1,), steps=1, lr=1e-3).prepare(llama), cases)
    assert "neighbourhood/greedy" not in found.at_end


# --- side by side ----------------------------------------------------------------------------------------------------


def test_a_method_that_fails_is_a_row_with_its_reason_and_the_others_go_on(llama: Model, tmp_path: Path) -> None:
    wanted = [
        Wanted("ft_m", {"layers": [9]}),
        Wanted("nowhere"),
        Wanted("rome", {"published": True, "layer": 1, "steps": 2, "contexts": [[3, 1]], "corpus": "none"}),
        Wanted("ft_m", TUNED),
    ]
    found = list(bench_methods.rows(llama, wanted, CASES, cache=tmp_path))
    assert [bool(r.fault) for r in found] == [True, True, False, False]
    assert "layer 9 is not in" in found[0].fault
    assert "unknown method" in found[1].fault
    assert found[2].title == "rome (published)"
    last = found[-1]
    assert last.single is not None and last.sequence is not None
    assert last.single["shares"]["rewrite/greedy"] == 1.0
    assert last.settings["steps"] == 40
    text = StringIO()
    Console(file=text, width=120).print(bench_methods.table(found, "two edits"))
    shown = text.getvalue()
    assert "rome (published)" in shown
    assert "ft_m: layer 9 is not in" in " ".join(shown.split())
    assert "18.4 KB" in shown
    assert bench_methods.line(last).startswith("ft_m: single 100/100")
    json.dumps([r.tree() for r in found])


def test_the_commands_compare_and_tune_on_edits_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    place = small.folder(tmp_path)
    data = ["--dataset", "json", "--path", str(place / "edits.json")]

    def call(*arguments: str) -> Any:
        done = CliRunner().invoke(cli.app, list(arguments))
        assert done.exit_code == 0, done.output
        return done

    wanted = ["ft_m", "ft_l", "--set", "ft_m.layers=[1]", "--set", "ft_m.steps=2"]
    done = call("bench", "methods", *wanted, "--model", str(place / "model"), *data, "--count", "2", "--json")
    rows = {r["title"]: r for r in json.loads(done.stdout)}
    assert rows["ft_m"]["settings"]["steps"] == 2
    assert rows["ft_l"]["sequence"]["edits"] == 2
    assert "ft_m, single edits: 2/2 edits" in done.stderr
    tune = ["tune", "ft_m", str(place / "model"), "steps=2", *data, "--skip", "2", "--count", "2", "--trials", "3"]
    text = call(*tune).stdout
    assert 'name = "ft_m"' in text
    assert "its own settings" in text
    tree = json.loads(call(*tune, "--json").stdout)
    assert len(tree["trials"]) == 3
    assert tree["toml"].startswith('[[methods]]\nname = "ft_m"\nsteps = 2\n')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["romme"], "Did you mean 'rome'?"),
        (["rome", "--set", "rome.layr=1"], "Did you mean 'layer'?"),
        (["rome", "--set", "rome.layer=soon"], "setting 'layer'"),
        (["rome", "--set", "memit.batch=2"], "no method 'memit' is measured"),
        (["ft_m", "--set", "fm.lr=2"], "Did you mean 'ft_m'?"),
        (["ft_m+published"], "unknown setting 'published'"),
    ],
)
def test_a_wrong_method_or_setting_is_refused_before_the_model_is_loaded(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Model, "load", lambda *_: pytest.fail("the model was loaded"))
    done = CliRunner().invoke(cli.app, ["bench", "methods", *given])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in " ".join(done.stderr.split())


def test_the_exit_code_says_that_a_method_could_not_be_measured(tmp_path: Path) -> None:
    place = small.folder(tmp_path)
    data = ["--model", str(place / "model"), "--dataset", "json", "--path", str(place / "edits.json"), "--count", "1"]
    done = CliRunner().invoke(cli.app, ["bench", "methods", "ft_m", "--set", "ft_m.layers=[9]", *data])
    assert done.exit_code == 1
    assert "layer 9 is not in" in done.stdout


def test_refused_edits_fail_and_a_dash_stands_where_there_is_no_rival(llama: Model) -> None:
    refused = replace(BAD, probes=(*CASES[1].probes,))
    alone = EditCase(CASES[0].request, tuple(replace(p, wrong=None) for p in CASES[0].probes))
    [row] = bench_methods.rows(llama, [Wanted("ft_m", TUNED)], [alone, refused], sequence=False)
    assert row.single is not None
    shares = row.single["shares"]
    assert (shares["rewrite/likelier"], shares["rewrite/greedy"], shares["paraphrase/likelier"]) == (0.0, 0.5, 0.0)
    assert "neighbourhood/likelier" not in shares
    text = StringIO()
    Console(file=text, width=200).print(bench_methods.table([row], "two edits"))
    shown = " ".join(text.getvalue().split())
    assert "0/50" in shown and "–/" in shown
    assert "1 refused edit: failed" in shown and "ft_m, single edits: refused 1 of 2" in shown


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hill:
    """Stands for a method whose edits are right at `layer` 2 and wrong elsewhere; counts how often it edits."""

    layer: int = 0
    power: float = 1.0
    name: ClassVar[str] = "hill"
    version: ClassVar[str] = "1"
    TUNE: ClassVar[dict[str, tuple[float, ...]]] = {"layer": (0, 1, 2), "power": (0.5, 1.0)}
    edits: ClassVar[list[int]] = []
    batch = 1

    def prepare(self, model: Model, cache: Path | None = None) -> Hill:
        return self

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "version": "1", "settings": {"layer": self.layer, "power": self.power}}

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        self.edits.append(self.layer)
        if self.layer == 1:
            raise EditRefused(f"edit {requests[0].id!r}: never here")
        tuned = FtM(layers=(0, 1, 2), steps=40 if self.layer == 2 else 1, lr=3e-3 * self.power)
        return tuned.edit(model, requests)


def test_a_search_climbs_and_is_not_made_twice(llama: Model, tmp_path: Path) -> None:
    path = f"{Hill.__module__}:Hill"
    Hill.edits.clear()
    found = list(tuning.search(llama, path, {}, CASES, 9, cache=tmp_path))
    changes = [dict(t.changes) for t in found]
    assert changes[:3] == [{}, {"layer": 1}, {"layer": 2}]
    assert found[1].score == 0
    assert "never here" in found[1].fault
    best = tuning.best(found)
    assert best.changes["layer"] == 2
    assert best.score > found[0].score
    many = len(Hill.edits)
    again = list(tuning.search(llama, path, {}, CASES, 9, cache=tmp_path))
    assert again == found
    assert len(Hill.edits) == many
    assert len(list(tuning.search(llama, path, {}, CASES, 2, cache=tmp_path))) == 2
    assert (
        tuning.snippet("hill", {"power": 1.0}, {"layer": 2}) == '[[methods]]\nname = "hill"\npower = 1.0\nlayer = 2\n'
    )


def test_a_breakdown_is_not_remembered_and_other_artifacts_are_another_search(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{Hill.__module__}:Hill"
    identity = Hill.identity

    def search() -> list[tuning.Trial]:
        return list(tuning.search(llama, path, {}, CASES, 3, cache=tmp_path))

    def broken(self: Hill, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        if self.layer == 2:
            raise RuntimeError("out of memory")
        return Hill_edit(self, model, requests, memory)

    Hill_edit = Hill.edit
    with monkeypatch.context() as patched:
        patched.setattr(Hill, "edit", broken)
        assert [t.fault for t in search()][2] == "out of memory"
    many = len(Hill.edits)
    assert search()[2].score > 0
    assert set(Hill.edits[many:]) == {2}
    many = len(Hill.edits)
    monkeypatch.setattr(Hill, "identity", lambda self: {**identity(self), "artifacts": {"editor": "trained anew"}})
    search()
    assert len(Hill.edits) > many


def test_without_word_of_the_method_layers_rates_and_steps_are_tried(llama: Model) -> None:
    method = FtM(layers=(1,), steps=10, lr=1e-3)
    found = tuning.candidates(method, method.prepare(llama).identity()["settings"], llama)
    assert found == {"layers": [[0], [1], [2]], "lr": [2.5e-4, 5e-4, 2e-3, 4e-3], "steps": [5, 20]}
    wide = replace(method, layers=(0, 1))
    assert tuning.candidates(wide, {"layers": (0, 1)}, llama)["layers"] == [[0, 1], [1, 2]]


def test_a_method_that_cannot_begin_cannot_be_tuned(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ft_m can't be tuned: layer 9"):
        list(tuning.search(llama, "ft_m", {"layers": [9], "steps": 1, "lr": 1.0}, CASES, 3, cache=tmp_path))


# --- progress --------------------------------------------------------------------------------------------------------


def told(every: float, tells: Callable[[Any], None], terminal: bool = False) -> str:
    text = StringIO()
    with progress.counted("edits", Console(file=text, force_terminal=terminal, width=100), every) as tell:
        tells(tell)
    return text.getvalue()


def test_counting_is_a_line_now_and_then_or_a_bar() -> None:
    def tells(tell: Any) -> None:
        for n in (0, 1, 2, 2, 3):
            tell("rome", n, 3)

    assert told(3600, tells) == "rome: 0/3 edits\nrome: 3/3 edits\n"
    assert told(0, tells).count("\n") == 4
    assert "3/3" in told(3600, tells, terminal=True)
