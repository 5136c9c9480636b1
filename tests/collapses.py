"""Planted collapses are found, healthy models are not flagged: `python -m tests.collapses [--healthy N]`.

The built-in model answers its MMLU and GSM8K miniatures through the scoring engine, and the detectors read its answers
as a run folder stores them. A collapse is planted in its weights: the output head given a bias for one answer letter
(constant class), for the end of the text (empty text), for one word (repeated token), or weights of NaN. A healthy
model is the same with noise on every weight matrix, from none to where scores begin to fall, on benchmarks cut to
different sizes. The last line is `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from rich.console import Console
from torch import nn

from actors.evaluator import answer_tree
from benchmarks.gsm8k import Gsm8k
from benchmarks.mmlu import Mmlu
from raysys.blocks import by_prefix, pack
from raysys.collapse import Told, collapse, read_answer
from raysys.model import Model
from raysys.scoring import Engine

PLANTS = {  # what is planted -> what is said of it
    "constant class": "choice 2 on 100% of items",
    "empty text": "empty text on 100% of items",
    "NaN weights": "log-probabilities not finite",
    "repeated token": "text that repeats itself on 100% of items",
}
NOISE = 0.02  # times a matrix' own standard deviation, at most, of a healthy model
Answers = dict[str, list[Told]]  # by benchmark


@cache
def world() -> Model:
    """The built-in model."""
    return Model.load("world/small", "float32", "cpu")


def answers(model: Model, limit: int) -> Answers:
    """What the model says, as it is stored. `limit`: questions of GSM8K; of MMLU as many in every subject, to five."""
    found: Answers = {}
    for benchmark in (Mmlu(limit=min(limit, 5)), Gsm8k(limit=limit, max_tokens=48)):
        told = []
        engine = Engine(model, trunk_memory=0, drafts=False)
        for group in by_prefix(benchmark.queries()):
            for block in pack(model.tokens, benchmark.name, {}, group, batch=16, size=64):
                told += [read_answer(json.dumps(answer_tree(a))) for a in engine.answer(block)]
        found[benchmark.name] = told
    return found


@cache
def base(limit: int) -> Answers:
    """What the untouched model says."""
    return answers(world(), limit)


def flagged(model: Model, limit: int) -> dict[str, str]:
    """Benchmark -> why its answers are worth nothing, where they are."""
    now = answers(model, limit)
    return {name: reason for name, told in now.items() if (reason := collapse(told, base(limit)[name]))}


def planted(what: str, limit: int = 12) -> dict[str, str]:
    """What is found of a planted collapse, by benchmark."""
    base(limit)
    model = world()
    with _planted(model, what):
        return flagged(model, limit)


def healthy(seed: int, limit: int) -> dict[str, str]:
    """What is found, wrongly, of a model with a little noise on its weights."""
    base(limit)
    model, made = world(), torch.Generator().manual_seed(seed)
    matrices = [p for p in model.net.parameters() if p.ndim > 1]
    kept = [p.detach().clone() for p in matrices]
    share = NOISE * (seed % 5) / 4
    try:
        with torch.no_grad():
            for p in matrices:
                p += share * p.std() * torch.randn(p.shape, generator=made)
        return flagged(model, limit)
    finally:
        with torch.no_grad():
            for p, before in zip(matrices, kept, strict=True):
                p.copy_(before)


@contextmanager
def _planted(model: Model, what: str) -> Iterator[None]:
    head: nn.Linear = model.net.lm_head
    assert head.bias is None
    bias = torch.zeros(head.out_features)
    if what == "NaN weights":
        bias[:] = float("nan")
    else:
        text = {"constant class": " B", "repeated token": " the", "empty text": None}[what]
        token = model.tokenizer.eos_token_id if text is None else model.encode(text)[-1]
        bias[token] = 1000.0
    head.bias = nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        head.bias = None


def main() -> int:
    """Plant everything, then perturb; say what failed by the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.collapses", description=__doc__.splitlines()[0])
    parser.add_argument("--healthy", type=int, default=20, help="studies of a healthy model (20)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120, highlight=False)
    passed = failed = 0
    for what, wanted in PLANTS.items():
        found = planted(what)
        ok = any(wanted in reason for reason in found.values())
        passed, failed = passed + ok, failed + (not ok)
        said = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        console.print(f"{'ok' if ok else 'FAILED':<7} {what}: {said or 'nothing found'}")
    for seed in range(asked.healthy):
        found = healthy(seed, limit=(12, 25, 50)[seed % 3])
        passed, failed = passed + (not found), failed + bool(found)
        console.print(f"{'FAILED' if found else 'ok':<7} healthy model {seed}: {found or 'not flagged'}")
    console.print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
