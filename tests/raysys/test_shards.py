"""Split models agree with whole ones: two real processes, every family that can be split, uneven shares among them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raysys.shards import why_not
from tests import families, ranks

pytestmark = pytest.mark.timeout(280)
Found = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two ranks found, for all families in one go: processes cost seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus.txt").write_text(ranks.corpus())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        subprocess.Popen([sys.executable, "-m", "tests.ranks", str(rank), str(port), str(folder)], cwd=root, stderr=-1)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[1].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [p.returncode for p in both] == [0, 0], "\n".join(s[-2000:] for s in said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", ranks.FAMILIES)
def test_a_split_model_computes_what_the_whole_one_does(found: list[Found], family: str) -> None:
    told = found[0][family]
    assert told["logits"] <= 1e-5
    far = {what for what, value in told.items() if not value <= 1e-5}
    assert far <= {"seconds", "uneven"}  # gradients, keys, second moments and edits, relative
    assert {"gradient", "rome", "memit", "second moment"} < set(told)


@pytest.mark.parametrize("family", ranks.FAMILIES)
def test_a_snapshot_is_worn_by_a_split_model_to_the_bit(found: list[Found], family: str) -> None:
    assert found[0][family]["worn"] == 0


def test_ranks_find_the_same_numbers_to_the_bit(found: list[Found]) -> None:
    without = [{f: {k: v for k, v in told.items() if k != "seconds"} for f, told in one.items()} for one in found]
    assert without[0] == without[1]


def test_uneven_shares_are_among_them(found: list[Found]) -> None:
    assert {told["uneven"] for told in found[0].values()} == {0.0, 1.0}


def test_methods_that_say_they_work_split_are_tested_split() -> None:
    from raysys import names

    assert set(ranks.METHODS) == {name for name in names.METHODS if getattr(names.method(name), "splits", False)}


def test_what_can_not_be_split_is_told_with_the_reason() -> None:
    from transformers import AutoConfig

    from raysys import names

    def reasons(family: str, ranks_: int, *methods: str) -> Any:
        config = AutoConfig.for_model(family, **families.SIZES[family])
        return why_not(config, ranks_, {m: names.method(m) for m in methods})

    assert "keeps query, key and value in one matrix" in reasons("gpt2", 2, "rome")[0]
    assert reasons("llama", 2, "rome") == ["the model has 1 key-value heads, fewer than 2 ranks; each rank needs one"]
    assert reasons("mistral", 2, "grace")[-1].startswith("method grace does not work on a model that is split")
    assert reasons("opt", 2, "rome", "memit") == []
