"""Published settings by method and model, and a rule for models nobody has published any for.

A model is known by its shape (family, blocks, width), so that a local copy counts like the hub's. Sources: the YAML
files of EasyEdit (github.com/zjunlp/EasyEdit, hparams/) and the JSON files of kmeng01/rome (hparams/ROME, commit
0874014), which agree on these numbers. "world/small" was tuned on its own facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raysys.model import Model

Shape = tuple[str, int, int]  # config.model_type, decoder blocks, width of the residual stream
Settings = Mapping[str, Any]

PAPER: Settings = {  # ROME's step size, contexts and second moment, whatever the model
    "lr": 0.5,
    "contexts": ((5, 10), (10, 10)),
    "corpus": "wikimedia/wikipedia:20231101.en",
    "documents": 100_000,
}
GPT2_XL: Shape = ("gpt2", 48, 1600)
GPT_J: Shape = ("gptj", 28, 4096)
LLAMA_7B: Shape = ("llama", 32, 4096)  # and Llama 3, 8 B
LLAMA_13B: Shape = ("llama", 40, 5120)
MISTRAL_7B: Shape = ("mistral", 32, 4096)
LLAMA_3_3B: Shape = ("llama", 28, 3072)
QWEN1_7B: Shape = ("qwen2", 32, 4096)  # Qwen 1.5
QWEN2_7B: Shape = ("qwen2", 28, 3584)  # and Qwen 2.5
WORLD_SMALL: Shape = ("llama", 6, 192)

_PYTHIA = {  # size: (blocks, width, ROME's layer)
    "160m": (12, 768, 3),
    "410m": (24, 1024, 7),
    "1b": (16, 2048, 7),
    "2.8b": (32, 2560, 5),
    "6.9b": (32, 4096, 5),
    "12b": (36, 5120, 5),
}

ROME: Mapping[Shape, Settings] = {
    WORLD_SMALL: {
        "layer": 2,  # the last one at which later tokens do not see the subject yet
        "steps": 20,
        "lr": 4.0,  # the offsets that are needed are some 30 long: steps of 0.5 don't get there in time
        "weight_decay": 0.1,
        "contexts": ((10, 5),),
        "corpus": "world",
        "documents": 1000,
    },
    GPT2_XL: {"layer": 17, "steps": 20, "weight_decay": 0.5, **PAPER},
    GPT_J: {"layer": 5, "steps": 20, "weight_decay": 0.5, **PAPER},
    LLAMA_7B: {"layer": 5, "steps": 25, "weight_decay": 1e-3, **PAPER},
    LLAMA_13B: {"layer": 5, "steps": 25, "weight_decay": 1e-3, **PAPER},
    MISTRAL_7B: {"layer": 5, "steps": 25, "weight_decay": 1e-3, **PAPER},
    LLAMA_3_3B: {"layer": 5, "steps": 25, "weight_decay": 1e-3, **PAPER},
    QWEN1_7B: {"layer": 5, "steps": 20, "weight_decay": 0.5, **PAPER},
    QWEN2_7B: {"layer": 5, "steps": 25, "weight_decay": 1e-3, **PAPER},
    **{
        ("gpt_neox", blocks, width): {"layer": layer, "steps": 20, "weight_decay": 0.5, **PAPER}
        for blocks, width, layer in _PYTHIA.values()
    },
}

FT: Mapping[Shape, Settings] = {
    WORLD_SMALL: {"layers": (2,), "steps": 25, "lr": 3e-3, "norm_constraint": 0.05},
    GPT2_XL: {"layers": (0,), "steps": 25, "lr": 5e-4, "norm_constraint": 5e-4},
    GPT_J: {"layers": (21,), "steps": 25, "lr": 5e-4, "norm_constraint": 0.0},
    LLAMA_7B: {"layers": (21,), "steps": 25, "lr": 5e-4, "norm_constraint": 0.0},
    MISTRAL_7B: {"layers": (21,), "steps": 25, "lr": 5e-4, "norm_constraint": 5e-5},
    QWEN1_7B: {"layers": (31,), "steps": 25, "lr": 5e-4, "norm_constraint": 5e-5},
}


def rome(model: Model) -> Settings:
    """ROME's settings that depend on the model; for unknown shapes a layer a fifth of the way up."""
    rule = {"layer": max(1, round(model.layers / 5)), "steps": 20, "weight_decay": 0.5, **PAPER}
    return ROME.get(shape(model), rule)


def ft(model: Model) -> Settings:
    """Fine-tuning's layers, steps, lr and norm_constraint; for unknown shapes one layer two thirds of the way up."""
    rule = {"layers": (round(model.layers * 2 / 3),), "steps": 25, "lr": 5e-4, "norm_constraint": 5e-4}
    return FT.get(shape(model), rule)


def shape(model: Model) -> Shape:
    """What a preset is looked up by."""
    return model.config.model_type, model.layers, model.width
