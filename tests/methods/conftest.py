"""What tests of methods share: a text file, and the values that a method found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.parts import spread

TEXT = "Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway and Lima of Peru .\n"


@pytest.fixture
def corpus(tmp_path: Any) -> str:
    """A small text file."""
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 3)
    return str(path)


@pytest.fixture
def found_values(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The values (d, n) of every batch, as they are found."""
    kept: list[Tensor] = []
    plain = spread.values

    def keeping(*given: Any) -> Any:
        found = plain(*given)
        kept.append(torch.stack([v.wanted for v in found], 1).double())
        return found

    monkeypatch.setattr(spread, "values", keeping)
    return kept
