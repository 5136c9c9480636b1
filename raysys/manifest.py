"""What a run folder says of the run itself: versions, machine, seed, what its parts mean."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any

from raysys.meaning import KEY, Meaning
from raysys.spec import StudySpec


def manifest(spec: StudySpec) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    packages = ("raysys", "ray", "torch", "transformers", "pyarrow", "datasets", "deepspeed")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "started": time.time(),
        "complete": False,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "seed": spec.seed,
        "study": spec.hash,
        KEY: Meaning.of(spec).model_dump(mode="json"),
    }
