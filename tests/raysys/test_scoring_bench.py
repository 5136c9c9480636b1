"""The bench of scoring compares like with like: the same items, and answers that have to agree."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest

from raysys import bench_model, scoring_bench
from raysys.bench_model import Shape
from raysys.scoring_bench import Line, Size
from raysys.types import Chosen, Scored

SMALL = Size(shape=Shape(layers=3, width=32, heads=2), questions=4, prompts=3, answer=6, depths=(1,), runs=1, batch=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `harness`")
def test_every_line_is_measured_and_both_sides_agree() -> None:
    found = dict(scoring_bench.lines(SMALL, lambda _: None))
    assert all(line.same and line.ours and line.other for line in found.values())
    tree = scoring_bench.tree(found, (1, 2))
    assert set(tree) >= {"mmlu_5shot_ratio", "mmlu_0shot_ratio", "generation_ratio", "peak_memory_ratio"}
    assert set(tree["trunk_reuse_cost"]) == {"1"} and tree["agree"] is True and tree["peak_memory_ratio"] == 0.5


def test_a_different_choice_or_likelihood_is_no_agreement() -> None:
    one = {"q": Chosen((Scored(-1.0, 1, 1), Scored(-2.0, 1, 0)))}
    assert scoring_bench.agree(one, one)
    assert not scoring_bench.agree(one, {"q": Chosen((Scored(-1.001, 1, 1), Scored(-2.0, 1, 0)))})
    assert not scoring_bench.agree(one, {"q": Chosen((Scored(-2.0, 1, 1), Scored(-1.0, 1, 0)))})


def test_five_shots_are_as_long_as_mmlus() -> None:
    model = bench_model.model(replace(SMALL.shape, context=1024))
    [block] = scoring_bench.blocks(model, scoring_bench.mmlu(5, 60), 8)
    assert 480 <= len(block.prefix) <= 540
    assert 70 <= sum(len(i.tokens) for i in block.items) / 60 <= 130


def test_ratios_are_of_medians() -> None:
    line = Line("x", (1.0, 2.0, 9.0), (4.0, 4.0, 4.0), True)
    assert line.ratio == 2 and line.share == 0.5


def test_peak_memory_is_of_the_process_itself_and_not_of_the_one_that_started_it() -> None:
    held = bytearray(2**30)  # touched: zeroed pages of a gigabyte
    held[::4096] = b"x" * len(held[::4096])
    code = "from raysys.scoring_bench import _peak; print(_peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < len(held) < scoring_bench._peak()
