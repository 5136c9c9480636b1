"""The command line: what it prints, how it fails, and that what it exports is what was worn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from raysys import cli, local
from raysys.journal import Entry, Journal, Stream
from raysys.model import Model
from raysys.patch import LowRank, wearing
from raysys.results import Results
from raysys.spec import StudySpec
from tests import families
from tests.raysys import made


def call(*arguments: str | Path, code: int = 0) -> Result:
    found = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def fails(*arguments: str | Path) -> str:
    """The message of a mistake: exit code 2, nothing on standard output, no traceback."""
    found = call(*arguments, code=2)
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    return " ".join(found.stderr.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def scored(here: Path) -> Results:
    return made.make(made.spec(Path("runs"), snapshots=(0, 1, 10)), items=30)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Results:
    """A run whose journal holds three real changes of a tiny model; nothing was scored."""
    folder = model_folder("llama")
    study = made.spec(tmp_path_factory.mktemp("runs"), methods=("rome",), snapshots=(0, 1, 3), models=(str(folder),))
    results = Results.create(study)
    model = Model.load(str(folder))
    weight = f"{model.mlp_out(1)}.weight"
    d_out, d_in = model.matrix(weight).shape
    requests = tuple(made.request(i) for i in range(3))
    stream = Stream(model.digest, "float32", {"name": "rome"}, requests, 0, 1)
    journal = Journal(results.cell_folder("tiny-rome-0") / "journal", stream)
    for i, request in enumerate(requests):
        generator = torch.Generator().manual_seed(i)
        patch = LowRank(weight, torch.randn(d_out, 1, generator=generator), torch.randn(1, d_in, generator=generator))
        journal.append(Entry(i, i + 1, (patch,), {}, (request,), 0.0, 1.0))
    results.write_cell(
        "tiny-rome-0",
        {
            "number": 0,
            "model": str(folder),
            "method": "rome",
            "order": 0,
            "settings": {},
            "requests": [vars(r) for r in requests],
            "dropped": [],
            "stream": {f.name: getattr(stream, f.name) for f in fields(stream) if f.name != "requests"},
            "snapshots": {str(n): stream.key(n) for n in study.snapshots},
            "blocks": [],
        },
    )
    return results


# --- the whole -------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_explains_exit_codes() -> None:
    script = "import sys, raysys.cli; print([m for m in ('torch', 'ray', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
    text = call("--help").output
    assert "130" in text
    commands = ("run", "plan", "status", "report", "list", "export", "ask", "new", "world", "convert", "bench")
    for command in commands:
        assert re.search(rf"\b{command}\b", text), command
        assert "Usage" in call(command, "--help").output


def test_a_mistake_is_one_message_on_standard_error_and_debug_shows_where(here: Path) -> None:
    ours = [sys.executable, "-m", "raysys", "run", "nowhere.toml"]
    environment = {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(here)}
    plain = subprocess.run(ours, capture_output=True, text=True, env=environment, check=False)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "error: nowhere.toml: no such file; `raysys new` writes a study to start from\n"
    debug = subprocess.run([*ours, "--debug"], capture_output=True, text=True, env=environment, check=False)
    assert "Traceback" in debug.stderr


def test_an_interrupted_run_says_how_to_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StudySpec, "load", interrupt)
    found = call("run", "study.toml", code=130)
    assert "run the same command again to continue" in found.stderr


# --- studies ---------------------------------------------------------------------------------------------------------


def test_new_writes_a_study_that_is_valid_and_never_overwrites(here: Path) -> None:
    assert "study.toml written" in call("new").stdout
    spec = StudySpec.load("study.toml")
    assert [m.name for m in spec.methods] == ["rome", "ft_l"]
    assert spec == StudySpec.check(spec.model_dump(mode="json"))
    assert "exists already" in fails("new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('methods.0.name="rmoe"', "Did you mean 'rome'?"),
        ('benchmarks.0.name="mmlv"', "Did you mean 'mmlu'?"),
        ("snapshots=[0,500]", "500 is beyond the 100 edits"),
        ("edits.count=many", "valid integer"),
        ("edit.count=5", "Did you mean 'edits'?"),
        ("nonsense", "wants key=value"),
        ('edits.dataset="json"', "path"),
    ],
)
def test_wrong_settings_are_named_with_the_way_out(here: Path, change: str, message: str) -> None:
    call("new")
    assert message in fails("plan", "study.toml", change)
    assert message in fails("run", "study.toml", change)


def test_a_file_that_is_not_toml_is_named(here: Path) -> None:
    Path("broken.toml").write_text("name = \n")
    assert "broken.toml: not valid TOML" in fails("run", "broken.toml")


def test_plan_counts_what_the_study_would_do(here: Path, model_folder: Callable[[str], Path]) -> None:
    Path("study.toml").write_text(
        f"""
        name = "small"
        models = ["{model_folder("gpt2")}"]
        snapshots = [0, 1, 3]
        orders = 2
        edits = {{dataset = "world", count = 3}}
        methods = [{{name = "ft_l"}}]
        benchmarks = [{{name = "probes", free = false}}, {{name = "locality", limit = 10}}]
        cluster = {{evaluators = 3, gpus_per_evaluator = 0.5}}
        """
    )
    tree = json.loads(call("plan", "study.toml", "--json").stdout)
    assert (tree["cells"], tree["edits"], tree["done"], tree["gpus"]) == (2, 6, 0, 1.5)
    probes, locality = tree["parts"]
    # probes: for each of two orders a block of edit 1 and one of edits 2-3: four at the base, then one, then two
    assert (probes["blocks"], probes["units"]) == (4, 4 + 2 * (1 + 2))
    # held-out facts: one block each of choices and of texts, at the base, then at two snapshots of two cells
    assert (locality["blocks"], locality["queries"], locality["units"]) == (2, 20, 2 + 2 * 2 * 2)
    assert tree["units"] == probes["units"] + locality["units"]
    [weights] = tree["weights"]
    assert weights["bytes"] == 4 * weights["parameters"] == tree["memory_bytes"] / 4
    assert (weights["rank_one_bytes"], weights["dense_bytes"]) == (4 * (32 + 128), 4 * 32 * 128)
    assert "a rank-one edit" in call("plan", "study.toml").stdout
    on_offer = json.loads(call("plan", "study.toml", "--gpus", "1x24", "--json").stdout)["places"]
    [place] = on_offer.values()  # of a GPU that evaluators share; each may keep 2 GiB of what edits don't change
    assert place.startswith("1 x 24 GB (22 GiB each): evaluators = 3, gpus_per_evaluator = 0.25")
    too_small = json.loads(call("plan", "study.toml", "--gpus", "1x1", "--json").stdout)["places"]
    assert "what would do: " in next(iter(too_small.values()))
    assert "count x GiB" in fails("plan", "study.toml", "--gpus", "8")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_folder_name_study_and_toml(scored: Results, here: Path) -> None:
    for name in (str(scored.folder), scored.folder.name, "made"):
        tree = json.loads(call("status", name, "--json").stdout)
        assert tree["folder"] == str(scored.folder), name
    assert "Did you mean 'made'?" in fails("status", "mode")
    call("new")
    assert "has not been run" in fails("status", "study.toml")
    assert "not a run folder" in fails("report", ".")


def test_status_and_list_tell_how_far_runs_are(scored: Results) -> None:
    tree = json.loads(call("status", "made", "--json").stdout)
    assert (tree["state"], tree["failures"]) == ("failed", 1)
    assert [(s["method"], s["edits"], s["wanted"]) for s in tree["streams"]] == [("rome", 10, 10), ("ft_l", 10, 10)]
    assert "10/10" in call("status", "made").stdout
    assert scored.folder.name in call("list").stdout
    with scored.lock():
        assert json.loads(call("status", "made", "--json").stdout)["state"] == "running"
    assert "no runs" in call("list", "elsewhere").stdout


def test_report_prints_tables_and_names_the_page(scored: Results, here: Path) -> None:
    text = call("report", "made", "--html", "page.html").stdout
    assert "edit budget" in text
    assert text.endswith("report: page.html\n")
    assert (here / "page.html").read_text().startswith("<!doctype html>")
    Path("blocked").write_text("")
    assert "blocked" in fails("report", "made", "--html", "blocked/page.html")


# --- models ----------------------------------------------------------------------------------------------------------


def test_an_exported_model_is_the_one_that_was_worn(edited: Results, here: Path) -> None:
    assert "read back and found equal" in call("export", edited.folder, "out", "--edits", "3").stdout
    net = AutoModelForCausalLM.from_pretrained("out")
    model = Model.load(edited.spec.models[0])
    untouched = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    with wearing(model, edited.snapshot("tiny-rome-0", 3).patches):
        for name, tensor in model.net.state_dict().items():
            assert torch.equal(net.state_dict()[name], tensor), name
        worn = local.ask(model, "Anna was born in", 5)
    changed = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, untouched[name])]
    assert changed == [f"{model.mlp_out(1)}.weight"]
    assert call("ask", "out", "Anna was born in", "--tokens", "5").stdout.strip() == (worn.strip() or "(empty)")
    assert json.loads(Path("out/raysys.json").read_text())["edits"] == 3


def test_export_refuses_a_used_folder_and_a_snapshot_that_is_not_there(edited: Results, here: Path) -> None:
    Path("full").mkdir()
    Path("full/x").touch()
    assert "exists already" in fails("export", edited.folder, "full", "--edits", "1")
    assert "no snapshot after 9 edits" in fails("export", edited.folder, "new", "--edits", "9")
    assert "no edit stream 'mend'" in fails("export", edited.folder, "new", "--edits", "1", "--cell", "mend")
    assert not Path("new").exists()


def test_ask_puts_base_and_snapshots_side_by_side(edited: Results, here: Path) -> None:
    text = call("ask", edited.folder, "The capital of France is", "--edits", "0,1,3", "--tokens", "4").stdout
    rows = [line.split("  ")[0].strip() for line in text.splitlines()[2:]]
    assert rows == ["base model", "tiny-rome-0, 1 edit", "tiny-rome-0, 3 edits"]
    assert "wants numbers of edits" in fails("ask", edited.folder, "x", "--edits", "one")
    assert "neither a run nor a model" in fails("ask", "./nothing", "x")


def test_a_base_model_that_has_changed_is_refused(edited: Results, here: Path) -> None:
    about = edited.cell_about("tiny-rome-0")
    stream = about["stream"] | {"model": "0" * 64}
    (here / "copy").mkdir()
    other = Results.create(StudySpec.check(edited.spec.model_dump(mode="json")), here / "copy" / "run")
    requests = tuple(made.request(i) for i in range(3))
    journal = Journal(other.cell_folder("tiny-rome-0") / "journal", Stream(**(stream | {"requests": requests})))
    journal.append(Entry(0, 1, (), {}, requests[:1], 0.0, 1.0))
    other.write_cell("tiny-rome-0", about | {"stream": stream})
    assert "weights are not those that were edited" in fails("export", other.folder, "new", "--edits", "1")


def test_convert_names_what_is_wrong_with_a_checkpoint(here: Path) -> None:
    Path("tiny.bin").write_bytes(b"xx")
    assert "too few for a llama2.c checkpoint" in fails("convert", "llama2c", "tiny.bin", "tok.model", "out")


def test_the_figures_of_a_world_come_from_the_products_own_scoring(tmp_path: Path) -> None:
    families.network("llama", max_position_embeddings=512).save_pretrained(tmp_path)  # GSM8K generates 256 tokens
    families.tokenizer().save_pretrained(tmp_path)
    rows = json.loads(call("world", tmp_path, "--limit", "2", "--json").stdout)
    names = {(r["what"], r["metric"]) for r in rows}
    assert ("facts, phrasings trained on", "free") in names
    assert ("facts, phrasings of the probes", "forced") in names
    assert ("mmlu", "accuracy") in names
    assert next(r for r in rows if r["what"] == "mmlu")["chance"] == 0.25
