"""The benchmark of a GPU: its whole path on the CPU with a tiny shape, without Ray; without a GPU it says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from raysys import gpu_bench
from raysys.cli import app
from raysys.gpu_bench import Shape, Size

ROOT = Path(__file__).resolve().parents[2]
TINY = Size(
    shape=Shape(width=32, layers=4, heads=2, inner=48, vocabulary=2000, context=1024),
    device="cpu",
    dtype="float32",
    rome_layer=1,
    memit_layers=(1, 2),
    steps=3,
    edits=2,
    batches=(1, 3),
    runs=2,
    documents=20,
    questions=6,
    batch=4,
)


@pytest.fixture(scope="module")
def found():
    return gpu_bench.measure(TINY)


def test_edits_are_counted_and_no_search_ends_early(found):
    lines = {line["what"]: line for line in found["editing"]}
    assert {what: line["edits"] for what, line in lines.items()} == {
        "MEMIT, 1 at once": 2,
        "MEMIT, 3 at once": 6,
        "ROME": 2,
    }
    assert {line["passes"] for line in lines.values()} == {3}
    assert all(line["seconds_per_edit"] > 0 for line in lines.values())


def test_bytes_of_a_snapshot_are_those_of_its_factors(found):
    by = {line["what"]: line for line in found["snapshots"]}
    assert by["ROME"]["weights"] == 1 and by["ROME"]["bytes"] == 2 * (32 + 48) * 4  # rank 2, float32
    assert by["MEMIT, 1 at once"]["weights"] == 2 and by["MEMIT, 1 at once"]["bytes"] == 2 * 2 * (32 + 48) * 4


def test_mmlu_is_the_questions_that_were_asked_times_how_many_there_are(found):
    score = found["scoring"]
    assert score["mmlu_minutes"] == pytest.approx(score["seconds"] / 6 * 14042 / 60)
    asked = 6 * (score["prefix_tokens"] + score["question_tokens"])
    assert score["prefix_tokens"] > 500 and score["prompt_tokens"] == pytest.approx(asked)
    assert 500 < score["computed_tokens"] < score["prompt_tokens"]  # what questions share is computed once


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    model = gpu_bench.model(TINY)
    before = {n: p.clone() for n, p in model.net.named_parameters()}
    _, patches = gpu_bench.editing(model, TINY, tmp_path, lambda _: None)
    gpu_bench.snapshot(model, TINY, "ROME", patches["ROME"])
    assert [n for n, p in model.net.named_parameters() if not torch.equal(p, before[n])] == []


def test_the_default_has_the_shape_of_llama_2_7b():
    net = gpu_bench.network(Size(device="meta"))
    assert sum(p.numel() for p in net.parameters()) == 6_738_415_616
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_neither_ray_nor_the_network_is_needed():
    code = (
        "import socket, sys\n"
        "def no(*_): raise AssertionError('the network was asked for')\n"
        "socket.socket.connect = no\n"
        "from tests.raysys.test_gpu_bench import TINY\n"
        "from raysys import gpu_bench\n"
        "gpu_bench.table(gpu_bench.measure(TINY))\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "False"


def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "gpu.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--json", str(file)])
    assert done.exit_code == 0 and "no GPU" in done.output
    assert list(json.loads(file.read_text())) == ["skipped"]


def test_the_command_shows_the_figures_and_writes_json(monkeypatch, tmp_path):
    monkeypatch.setattr(Size, "quick", classmethod(lambda cls: TINY))
    file = tmp_path / "gpu.json"
    done = CliRunner().invoke(app, ["bench", "gpu", "--quick", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "5-shot MMLU" in done.output
    assert json.loads(file.read_text())["peak_bytes"] == {"editing": None, "scoring": None}
