"""`raysys harness`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from raysys import cli
from tests import families, tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks, and a tiny model in `model`."""
    found = tasks.write(tmp_path_factory.mktemp("tasks"))
    families.network("llama").save_pretrained(found / "model")
    families.tokenizer(bos=True).save_pretrained(found / "model")
    return found


def call(*arguments: Any, code: int = 0) -> Result:
    found = CliRunner().invoke(cli.app, ["harness", *map(str, arguments)])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def fails(*arguments: Any) -> str:
    """The message of a mistake: exit code 2, nothing on standard output, no traceback."""
    found = call(*arguments, code=2)
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    return " ".join(found.stderr.split())


def test_it_prints_a_table_and_writes_the_results(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    found = call(
        place / "model", "--tasks", f"t_group,{place / 't_inputs.yaml'}", "--include-path", place, "--limit", 4,
        "--num-fewshot", 1, "--batch", 2, "--output", out, "--log-samples",
    )  # fmt: skip
    lines = [line.split() for line in found.stdout.splitlines()[2:]]
    assert [line[:4] if len(line) > 5 else line[:2] for line in lines] == [
        ["t_inputs", "Yaml", "none", "acc"],
        ["t_group"],
        ["t_choice", "Yaml", "none", "acc"],
        ["none", "acc_norm"],
        ["t_last", "Yaml", "none", "acc"],
    ]
    tree = json.loads(out.read_text())
    assert tree["n-shot"]["t_choice"] == 1 and len(tree["samples"]["t_last"]) == 4
    assert 0 <= tree["results"]["t_inputs"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "t_chioce"], "no task, group or tag 't_chioce'. Did you mean 't_choice'?"),
        (["--tasks", " , "], "--tasks: name a task, such as arc_easy"),
        (["--tasks", "./absent.yaml"], "no file or folder 'absent.yaml'"),
        (["--tasks", "t_last", "--softmax", "double"], "--softmax double: float32 or model"),
        (["--tasks", "t_last", "--apply-chat-template"], "its tokenizer has no chat template"),
        (["--tasks", "t_last", "--output", "no/such/folder.json"], "no folder 'no/such'"),
        (["--tasks", "t_sampled"], "task 't_sampled': it samples its answers (do_sample = True, temperature = 0.7)"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, place: Path) -> None:
    assert message in fails(place / "model", *arguments, "--include-path", place)


def test_an_unknown_model_or_folder_is_told(place: Path) -> None:
    assert "model './absent': no such folder" in fails("./absent", "--tasks", "t_last", "--include-path", place)
    assert "no folder 'absent' with tasks" in fails(place / "model", "--tasks", "t_last", "--include-path", "absent")


def test_tasks_that_can_not_be_loaded_are_told(place: Path, tmp_path: Path) -> None:
    text = (place / "t_last.yaml").read_text().replace("rows.json", "missing.json").replace("t_last", "t_lost")
    (tmp_path / "t_lost.yaml").write_text(text)
    assert "can't be loaded: FileNotFoundError" in fails(place / "model", "--tasks", tmp_path / "t_lost.yaml")
    (tmp_path / "empty").mkdir()
    assert "no task of lm-evaluation-harness in it" in fails(place / "model", "--tasks", tmp_path / "empty")


def test_without_lm_eval_it_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'raysys[harness]'" in fails(place / "model", "--tasks", "t_last", "--include-path", place)
