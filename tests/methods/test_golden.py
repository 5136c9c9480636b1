"""Our edits equal those recorded from the reference implementations."""

import pytest

from tests.golden import METHODS, compare


@pytest.mark.parametrize("folder", ["gpt2_common", *(f"gpt2_{m}" for m in METHODS), "llama_ROME"])
def test_recorded_vectors_are_met(shared, folder):
    found = [line for line in compare(shared / "golden", folder) if not isinstance(line, str)]
    lines = [line for line in found if line.case == folder]
    assert lines
    assert not [line for line in lines if not line.passed]
