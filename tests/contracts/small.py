"""Settings that make every method small enough for the contract tests' tiny models (3 layers, width 32).

`SETTINGS[name]`: settings by method; "CORPUS" stands for a text file. `BEFORE[name]`: called with (model, method, cache
folder) before `prepare`, for methods that have to be trained first. Families: `FAMILIES[name]` where a method is asked
on others than the usual three.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysys.model import Model
from raysys.types import EditCase, EditRequest, Probe

SETTINGS: dict[str, dict[str, Any]] = {
    "memit": {
        "batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.05, "weight": 10.0, "earlier_keys": True,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "emmet": {
        "batch": 2, "layer": 1, "steps": 4, "lr": 0.05, "weight": 10.0,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "pmet": {
        "batch": 2, "layers": (0, 1), "attention": True, "steps": 4, "lr": 0.05, "weight": 10.0,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "alphaedit": {
        "batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.05, "threshold": 0.1, "relative": True,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9,
    },
    "kn": {"steps": 4},
    "rome": {
        "layer": 1, "steps": 5, "lr": 0.05, "contexts": ((5, 5),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "r_rome": {
        "layer": 1, "steps": 5, "lr": 0.05, "contexts": ((5, 5),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "encore": {
        "batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.05, "weight": 10.0, "norm_weight": 1.0, "patience": 2,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9,
    },
    "nse": {
        "batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.05, "weight": 10.0, "neurons": 0.8,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9, "ridge": 0.1,
    },
    "sphere": {
        "batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.05, "threshold": 0.1, "relative": True,
        "contexts": ((5, 3),), "corpus": "CORPUS", "documents": 9,
    },
    "rect": {"of": "ft_m", "settings": {"layers": (1,), "steps": 5, "lr": 0.05}},
    "prune": {"of": "ft_m", "settings": {"layers": (1,), "steps": 5, "lr": 0.5}},
    "ft_l": {"layers": (1,), "steps": 5, "lr": 0.05},
    "ft_m": {"layers": (1,), "steps": 5, "lr": 0.05},
    "mend": {"rank": 4},
    "malmen": {"batch": 2, "mlp": "out", "layers": (1, 2), "rank": 4, "start": 0.01},
    "rledit": {"batch": 2, "mlp": "out", "layers": (1, 2), "rank": 4, "blocks": 2, "start": 0.01},
    "ultraedit": {"batch": 2, "lr": 1e-3},
    "grace": {"layer": 1, "site": "in", "radius": 0.5, "steps": 5},
    "wise": {"layer": 1, "steps": 5, "margins": (0.1, 2.0, 1.0), "save": 2, "merge": 2, "contexts": ((5, 3),)},
    "serac": {"classifier": "own", "counterfactual": "own", "width": 16},
    "ike": {"k": 1, "encoder": "model", "layout": "{fact} . {prompt}", "cases": 2},
    "lora": {"type": "lora", "layers": (1, 2), "rank": 2, "steps": 4, "lr": 0.02},
    "melo": {"layer": 0, "layers": (1, 2), "steps": 5, "batch_size": 2},
}  # fmt: skip


def _cases() -> list[EditCase]:
    """Facts that the contracts don't edit."""
    return [
        EditCase(
            EditRequest(str(i), "{} was born in the city of", name, new, old),
            (
                Probe("paraphrase", f"The city of {name} is", new, old),
                Probe("neighbourhood", f"{other} was born in the city of", old, new),
            ),
        )
        for i, (name, other, new, old) in enumerate(
            [("Bert", "Carla", "Lima", "Oslo"), ("Carla", "Bert", "Rome", "Paris"), ("Eiffel", "Bert", "Peru", "Lima")]
        )
    ]


def _trained(model: Model, method: Any, folder: Path) -> None:
    """A few steps of training."""
    few = {"steps": 3, "accumulate": 1, "every": 1, "validation": 1, "lr": 1e-3}
    method.train(model, _cases(), folder, settings=few)


def _streamed(model: Model, method: Any, folder: Path) -> None:
    """A few steps of training on short streams of edits."""
    few = {"steps": 3, "every": 1, "validation": 1, "lr": 1e-3, "length": 2, "edits": 1, "depth": 2}
    method.train(model, _cases(), folder, settings=few)


def _shown(model: Model, method: Any, folder: Path) -> None:
    """Demonstrations."""
    method.train(model, _cases(), folder)


BEFORE: dict[str, Callable[[Model, Any, Path], None]] = {
    "serac": _trained,
    "ike": _shown,
    "mend": _trained,
    "malmen": _trained,
    "rledit": _streamed,
}
FAMILIES: dict[str, tuple[str, ...]] = {}
