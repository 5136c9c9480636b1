"""Our edits equal those recorded from the reference implementations."""

import pytest

from tests.golden.__main__ import compare, folders, main, methods

FOLDERS = ["gpt2_common", "llama_common", "llama_ROME", "llama_MEMIT", *(f"gpt2_{m}" for m in sorted(methods()))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_vectors_are_met(shared, folder):
    lines = list(compare(shared / "golden", shared / "golden" / folder))
    assert lines
    assert not [line for line in lines if not line.passed]


def test_every_recorded_folder_is_compared(shared):
    assert {f.name for f in folders(shared / "golden")} <= set(FOLDERS)


def test_a_folder_that_cannot_be_read_fails_the_comparison(tmp_path, capsys):
    (tmp_path / "gpt2_ROME").mkdir()
    (tmp_path / "gpt2_MAGIC").mkdir()
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "0 passed, 2 failed" and "MAGIC" in out
