"""Second moments on real Ray: the bits of one process, whoever summed and however often it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from actors.editor import PREPARING, Editor, Job
from actors.signs import Signs
from actors.statistics import Workers
from methods.parts import artifacts, moments
from raysys import cli, study
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.preparing import needed, prepare
from raysys.types import EditRequest
from tests.actors import small

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small.folder(tmp_path_factory.mktemp("small"))
    texts = (folder / "corpus.txt").read_text().splitlines()
    (folder / "corpus.txt").write_text("\n".join(f"{text} {i}" for i in range(30) for text in texts))  # 960: 4 parts
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return Model.load(str(place / "model"))


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k].total, other[k].total) and one[k].count == other[k].count for k in one
    )


def workers(place: Path, cache: Path, **more: Any) -> Workers:
    return Workers(model=str(place / "model"), dtype="float32", device="cpu", cache=cache, **more)


def test_two_workers_give_the_bits_of_one_process(cluster: None, place: Path, model: Model, tmp_path: Path) -> None:
    corpus = Corpus(str(place / "corpus.txt"), 900)
    modules = [model.mlp_out(i) for i in (2, 0)]
    told: list[tuple[int, int]] = []
    found = workers(place, tmp_path, number=2, tell=lambda _, done, total: told.append((done, total)))(
        model, modules, corpus
    )
    assert same(found, moments.collect(model, modules, corpus.texts()))
    assert told[0] == (0, 900)
    assert told[-1] == (900, 900)
    assert [d for d, _ in told] == sorted(d for d, _ in told)
    assert not list(tmp_path.rglob("*.safetensors"))  # the parts are of no use any more


def test_an_interrupted_pass_goes_on_from_the_parts_it_has(
    cluster: None, place: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.statistics.FOLD", 1)
    corpus, modules = Corpus(str(place / "corpus.txt"), 900), [model.mlp_out(1)]

    def interrupt(_: str, done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers(place, tmp_path, tell=interrupt)(model, modules, corpus)
    told: list[int] = []
    found = workers(place, tmp_path, tell=lambda _, done, total: told.append(done))(model, modules, corpus)
    assert told[0] >= 256
    assert same(found, moments.collect(model, modules, corpus.texts()))


def test_a_damaged_part_is_made_again(cluster: None, place: Path, model: Model, tmp_path: Path) -> None:
    corpus, modules = Corpus(str(place / "corpus.txt"), 500), [model.mlp_out(1)]
    who = workers(place, tmp_path)
    path = who.store(model, modules, list(moments.parts(corpus.texts()))).path(1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    assert same(who(model, modules, corpus), moments.collect(model, modules, corpus.texts()))


def test_workers_that_load_another_model_are_refused(cluster: None, place: Path, tmp_path: Path) -> None:
    corpus = Corpus(str(place / "corpus.txt"), 20)
    other = Model.load(str(place / "model"), "bfloat16")
    with pytest.raises(ValueError, match="another model than the one"):
        workers(place, tmp_path)(other, [other.mlp_out(1)], corpus)


def test_a_study_is_prepared_in_one_pass_and_then_needs_nothing(
    cluster: None, place: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path / "cache"))
    rome = {"name": "rome", "steps": 5, "corpus": str(place / "corpus.txt"), "documents": 300, "contexts": [[3, 2]]}
    methods = [rome | {"layer": 0}, rome | {"layer": 1, "label": "upper"}, {"name": "ft_m", "layers": [1]}]
    spec = small.spec(place, methods=methods)
    whats: set[str] = set()
    found = list(prepare(spec, 2, lambda what, done, total: whats.add(what)))
    assert len(whats) == 1
    assert "2 modules from 300 documents" in whats.pop()
    assert [(p.method, sorted(p.artifacts)) for p in found] == [
        ("rome", ["contexts", "second_moment"]),
        ("upper", ["contexts", "second_moment"]),
        ("ft_m", []),
    ]
    from raysys import names

    built = [names.build(names.method(p.name), p.settings, p.name) for p in spec.methods]
    assert needed(model, built, tmp_path / "cache") == {}
    alone = artifacts.second_moment(model, model.mlp_out(1), Corpus(str(place / "corpus.txt"), 300), tmp_path / "two")
    assert alone.digest == found[1].artifacts["second_moment"]


def test_an_editor_says_what_it_makes_and_then_no_more(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Path, Any]] = []
    monkeypatch.setattr("actors.editor.write_json", lambda path, tree: told.append((path, tree)))
    settings = small.tree(place)["methods"][0] | {"documents": 300}
    requests = (EditRequest("e", "{} was born in", "Anna", "Rome"),)
    job = Job(
        "cell", "rome", {k: v for k, v in settings.items() if k != "name"}, requests,
        str(tmp_path / "cell" / "journal"), str(tmp_path / "cache"), 0, "skip",
    )  # fmt: skip
    editor = Editor(str(place / "model"), "float32", "cpu", 1)
    editor.open(job)
    assert {path for path, _ in told} == {tmp_path / "cell" / PREPARING}
    assert [(t["done"], t["total"]) for _, t in told] == [(0, 300), (256, 300), (300, 300)]
    told.clear()
    editor.open(job)
    assert not told  # it is in the cache


def test_a_study_passes_on_what_an_editor_makes(tmp_path: Path) -> None:
    said: list[str] = []
    run: Any = object.__new__(study._Run)
    run.told, run.progress, run.signs = -study.TELLING, SimpleNamespace(note=said.append), Signs()
    job: Any = SimpleNamespace(cell="cell", journal=str(tmp_path / "journal"))
    run._preparing(job, run.signs.of(job.journal)[1])
    (tmp_path / PREPARING).write_text('{"what": "second moments", "done": 256, "total": 1000}')
    run._preparing(job, run.signs.of(job.journal)[1])
    run._preparing(job, run.signs.of(job.journal)[1])  # not again so soon
    assert said == ["cell: second moments, 256 done (once; it is kept in the cache)"]


def test_the_command_says_what_it_made_and_what_it_could_not(
    cluster: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path / "cache"))
    rome = f'name = "rome"\nlayer = 1\ncontexts = [[3, 2]]\ndocuments = 300\ncorpus = "{place}/corpus.txt"'
    bad = rome.replace("corpus.txt", "none.txt") + '\nlabel = "bad"'
    text = f'models = ["{place}/model"]\nsnapshots = [0]\n[[benchmarks]]\nname = "probes"\n'
    (tmp_path / "study.toml").write_text(f"{text}[[methods]]\n{rome}\n[[methods]]\n{bad}\n")
    done = CliRunner().invoke(cli.app, ["prepare", str(tmp_path / "study.toml"), "--json"])
    assert done.exit_code == 1, done.output
    made, failed = json.loads(done.stdout)
    assert set(made["artifacts"]) == {"contexts", "second_moment"}
    assert "none.txt" in failed["fault"]
    assert "300/300 documents" in done.stderr
