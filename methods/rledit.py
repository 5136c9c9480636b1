"""RLEdit: MALMEN's editor, trained over streams of edits: a shift answers for what the ones before it wrote.

Li et al., "Reinforced Lifelong Editing for Language Models", ICML 2025, arXiv:2502.05759, section 3: the network is a
policy, the model its environment, an action a shift ΔW, and the reward after it is minus the loss on its own edits and,
with weights .95 per shift ago, on those of the shifts before, minus 1e-4 |ΔW|². Settings: UltraEdit's repository.
Where a setting is None, PRESETS (or the rule below it) has it. Editors are trained: `raysys train-editor rledit MODEL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from methods import malmen
from methods.malmen import PreparedMalmen
from methods.parts import presets, training
from methods.parts.meta import Tokens
from raysys.model import Model
from raysys.types import EditCase

PAPER: presets.Settings = {"rank": 1024, "blocks": 4, "tokens": "all"}
PRESETS: Mapping[str, presets.Settings] = {  # UltraEdit's repository, whose files of models its methods share
    "world/small": {"layers": (3, 4, 5), "mlp": "all", "rank": 32, "blocks": 2, "tokens": "all"},  # tuned on its facts
    "gpt-j-6b": {"layers": tuple(range(18, 27)), **PAPER},
    "mistral-7b": {"layers": (29, 30), **PAPER},
    "llama-3-8b": {
        "modules": (
            *(f"model.layers.{i}.mlp.gate_proj" for i in range(11, 16)),
            *(f"model.layers.{i}.mlp.up_proj" for i in range(18, 25)),
        ),
        **PAPER,
    },
    "qwen2.5-7b": {
        "modules": tuple(f"model.layers.{i}.mlp.{name}_proj" for i in range(18, 27) for name in ("gate", "up")),
        **PAPER,
    },
}
TRAINING: presets.Settings = {
    "steps": 1000, "accumulate": 1, "lr": 1e-5, "lr_lr": 1e-5, "clip": 1.0, "every": 10, "patience": 100,
    "length": 20, "edits": 20, "depth": 10, "decay": 0.95, "loc_coef": 0.6, "reg": 1e-4, "general": 1, "local": 1,
}  # fmt: skip
TRAININGS: Mapping[str, presets.Settings] = {
    "world/small": {  # the short way: from MALMEN's editor, which knows how to make one edit
        "begin": True, "steps": 32, "lr": 3e-4, "lr_lr": 3e-4, "schedule": "linear", "validation": 32, "every": 8,
        "length": 16, "edits": 1, "depth": 4, "streams": 2, "loc_coef": 1.0,
    },
}  # fmt: skip


def rule(model: Model) -> presets.Settings:
    """For models without a preset: MALMEN's matrices, the paper's network."""
    return {**malmen.rule(model), **PAPER}


@dataclass(frozen=True, kw_only=True)
class RlEdit:
    """A shift as in MALMEN. What differs is how its network came about.

    Other than in the published code, the size of a shift counts when the network is trained (there its gradient is
    dropped), and what must not change is compared with the unedited model, not with the model one shift earlier, whose
    drift nobody answers for. `published` trains without these two changes.
    """

    layers: tuple[int, ...] | None = None  # the blocks whose MLP's last matrix is edited ("out")
    mlp: Literal["out", "all"] | None = None  # or all of the MLP's matrices
    modules: tuple[str, ...] | None = None  # instead of these, modules by name
    rank: int | None = None  # of the network's blocks
    blocks: int | None = None  # how many of them
    tokens: Tokens | None = None  # "all" of prompt and target, or those at which the "target" is predicted
    start: float = 1e-6  # η before training
    batch: int = 1  # edits of one shift
    chunk: int = 1024  # tokens that the network takes at once
    editor: str = ""  # which trained editor, where there are several: a file, or the beginning of its digest
    published: bool = False

    name: ClassVar[str] = "rledit"
    version: ClassVar[str] = "1"

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMalmen:
        """Find the editor trained for `model`. Raises ValueError that says how to train one."""
        return malmen.prepared(self, malmen.settled(self, model, PRESETS, rule), model, cache)

    def train(
        self,
        model: Model,
        cases: Sequence[EditCase],
        cache: Path | None = None,
        note: training.Note = training.silent,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Train an editor for `model` on `cases` and save it; its path. Interrupted, it goes on where it was.

        `settings`: changes to those of `Training` and `Course`. Raises ValueError.
        """
        asked = malmen.settled(self, model, PRESETS, rule)
        usual = {**TRAINING, **TRAININGS.get(presets.name(model), {})}
        if self.published:
            usual |= {"reg": 0.0, "since": "before"}
        return malmen.taught(asked, model, cases, usual, settings, cache, note)
