"""What every test may ask for: tiny models, the folder of real data. No test reaches the network."""

from __future__ import annotations

import os

# Before any import of a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raysys.model import Model
from tests import families

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("RAYSYS_SHARED", ROOT.parent / "shared"))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference vectors; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED} (set RAYSYS_SHARED): tests on real data and reference vectors need it")
    return SHARED


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder(family)` -> a folder with a tiny random model of that family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            families.network(family).save_pretrained(made[family])
            families.tokenizer().save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(params=["gpt2", "llama", "gpt_neox"])
def model(request: pytest.FixtureRequest) -> Model:
    """A tiny random model, fresh for each test: both weight layouts, gated and plain MLPs, parallel residuals."""
    return families.tiny(request.param)
