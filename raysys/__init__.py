"""raysys: how many edits can a language model take before it stops being a good model?

    from raysys import StudySpec, run
    results = run(StudySpec.load("study.toml"))

Names are imported when first used, so that `import raysys` needs neither ray nor torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "StudySpec": "raysys.spec",
    "run": "raysys.study",
    "Results": "raysys.results",
    "Model": "raysys.model",
    "Snapshot": "raysys.snapshot",
    "LowRank": "raysys.patch",
    "Dense": "raysys.patch",
    **dict.fromkeys(
        ("Answer", "Benchmark", "Choose", "Chosen", "Edit", "EditCase", "EditMethod", "EditRefused", "EditRequest",
         "Generate", "Generated", "Patch", "Probe", "Query", "Score", "Scored", "Turn"),
        "raysys.types",
    ),
}  # fmt: skip

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'raysys' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
