"""`raysys train-editor`: real training of tiny editors, what it says, how it goes on, and its mistakes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from methods.malmen import Malmen
from methods.parts import training as trainer
from raysys import cli, training
from raysys.model import Model
from raysys.types import EditRequest

MODULES = {"layers": "[1,2]", "mlp": "out", "rank": "4", "start": "0.01"}
SETTINGS = [f"{k}={v}" for k, v in MODULES.items()]
FEW = [f"training.{k}={v}" for k, v in {"steps": 4, "every": 2, "edits": 1, "validation": 2, "lr": 1e-3}.items()]
NAMES = ["Anna", "Bert", "Carla", "Dora", "Oslo", "Lima"]


def call(*arguments: str | Path, code: int = 0) -> Result:
    found = CliRunner().invoke(cli.app, ["train-editor", *map(str, arguments)])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def fails(*arguments: str | Path) -> str:
    found = call(*arguments, code=2)
    assert found.stdout == "" and "Traceback" not in found.stderr
    return " ".join(found.stderr.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path / "cache"))
    records = [
        {
            "prompt": "{} was born in the city of",
            "subject": name,
            "target": "Rome",
            "was": "Paris",
            "paraphrases": [f"The city of {name} is"],
            "neighbourhood": [{"prompt": "The singer works in the city of", "answer": "Paris"}],
        }
        for name in NAMES
    ]
    (tmp_path / "edits.json").write_text(json.dumps([*records, {"prompt": "{} was born in", "subject": "Anna"}]))
    return tmp_path


ALL = ("--dataset", "json", "--path", "edits.json")
DATA = (*ALL, "--skip", "0")


def test_an_editor_is_trained_told_about_and_found_again(here: Path, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    found = call("malmen", folder, *SETTINGS, *FEW, *DATA)
    [file] = (here / "cache" / "editors").glob("malmen-*.safetensors")
    assert found.stdout.startswith(f"{file}: malmen for {folder}, trained on 6 edits; 4 steps, best validation loss ")
    assert "1 record left out; the first: edits.json, record 7" in found.stderr
    assert "training: 2/4 steps" in found.stderr and "training: 4/4 steps" in found.stderr
    assert "step 4: training loss" in found.stderr and "validation loss" in found.stderr
    model = Model.load(str(folder))
    made = Malmen(layers=(1, 2), mlp="out", rank=4).prepare(model)
    assert len(made.edit(model, [EditRequest("a", "{} is", "Anna", "Rome")]).patches) == 2
    assert made.identity()["artifacts"]["editor"].startswith(file.stem.rpartition("-")[2])


def test_rledit_is_trained_over_streams(here: Path, model_folder: Callable[[str], Path]) -> None:
    streams = ("training.length=2", "training.depth=2", "training.streams=1", "blocks=2")
    found = call("rledit", model_folder("gpt2"), *SETTINGS, *FEW, *streams, *DATA, "--skip", "1", "--count", "4")
    assert "trained on 4 edits" in found.stdout and "left out" not in found.stderr


def test_an_interrupted_training_goes_on_with_the_same_command(
    here: Path, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    say, steps = training._figures, []

    def interrupt(losses: Any) -> str:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return say(losses)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_figures", interrupt)
        found = call("malmen", folder, *SETTINGS, *FEW, *DATA, code=130)
    assert "run the same command again to continue" in found.stderr
    assert list((here / "cache" / "editors").glob("*.checkpoint.safetensors"))
    found = call("malmen", folder, *SETTINGS, *FEW, *DATA)
    assert "training: 2/4" not in found.stderr and "training: 4/4" in found.stderr
    assert not list((here / "cache" / "editors").glob("*.checkpoint.safetensors"))


def test_mistakes_are_named_with_the_way_out(here: Path, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    assert "methods that do: mend, malmen, rledit, serac" in fails("rome", folder)
    assert "Did you mean 'steps'?" in fails("malmen", folder, *SETTINGS, *DATA, "training.stepz=3")
    assert "Did you mean 'rank'?" in fails("malmen", folder, "rnak=3")
    assert "one by one" in fails("malmen", folder, "training=3")
    assert "Did you mean 'malmen'?" in fails("malmn", folder)
    assert "lower --skip" in fails("malmen", folder, *SETTINGS, *DATA, "--skip", "7")
    assert "at least two are needed" in fails("malmen", folder, *SETTINGS, *DATA, "--count", "1")


def test_the_records_that_studies_edit_are_not_trained_on_unless_asked(
    here: Path, model_folder: Callable[[str], Path]
) -> None:
    assert "default: 1000" in " ".join(call("--help").stdout.replace("│", " ").split())
    said = fails("malmen", model_folder("llama"), *SETTINGS, *ALL)
    assert "after the first 1000 records" in said and "--skip" in said
    record = json.loads((here / "edits.json").read_text())[0]
    many = [{**record, "subject": f"Anna {i}"} for i in range(1003)]
    (here / "edits.json").write_text(json.dumps(many))
    assert "trained on 3 edits" in call("malmen", model_folder("llama"), *SETTINGS, *FEW, *ALL).stdout


def test_a_study_in_bfloat16_is_told_how_to_train_its_editor(here: Path, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    method, model = Malmen(layers=(1, 2), mlp="out", rank=4), Model.load(str(folder), "bfloat16")
    call("malmen", folder, *SETTINGS, *FEW, *DATA)
    with pytest.raises(ValueError, match=r"raysys train-editor malmen .* --dtype bfloat16`"):
        method.prepare(model)
    call("malmen", folder, *SETTINGS, *FEW, *DATA, "--dtype", "bfloat16")
    assert method.prepare(model).identity()["artifacts"]["editor"]


def test_two_editors_that_fit_are_a_warning_that_says_how_to_choose(
    here: Path, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder("llama")
    call("malmen", folder, *SETTINGS, *FEW, *DATA)
    found = call("malmen", folder, *SETTINGS, *FEW, *DATA, "training.seed=5")
    assert "warning:" in found.stderr and "say which" in found.stderr


class Talking:
    """A method that says what a trainer says."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def train(self, model: Any, cases: Any, cache: Any, note: Any) -> Path:
        for one in self.told:
            note(one)
        return Path("made")


def test_a_terminal_gets_a_bar_and_skipped_updates_are_told() -> None:
    told = trainer.Progress(5, 10, {"loss": 1.0}, {"loss": 2.0}, 2.0, 3, 0.1, 2)
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=150)
        path, last = training.train(Talking(["made ready", told]), None, [], {}, None, console)  # type: ignore[arg-type]
        assert (path, last) == (Path("made"), "5 steps, best validation loss 2.0000")
        assert "2 cases left out, too long" in out.getvalue()
        assert "made ready" in out.getvalue() and "3 updates skipped, not finite" in out.getvalue()
        assert ("━" in out.getvalue()) == terminal


def test_settings_of_training_are_refused_where_a_method_has_none() -> None:
    with pytest.raises(ValueError, match=r"without 'training\.'"):
        training.check("talking", Talking([]), {"steps": 3})
