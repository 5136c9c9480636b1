"""Which published settings a model takes, and how a method's open settings are filled in.

Each method's file has its own table of presets, by the names below, and a rule for models nobody has published any
for. A model is known by its shape (family, blocks, width, and where that is not enough, vocabulary or positions), so
that a local copy, or its instruction-tuned sister, counts like the hub's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from raysys.model import Model

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")
Settings = Mapping[str, Any]

MODELS: Mapping[tuple[str, int, int], str] = {  # (config.model_type, decoder blocks, width of the residual stream)
    ("llama", 6, 192): "world/small",
    ("gpt2", 48, 1600): "gpt2-xl",
    ("gptj", 28, 4096): "gpt-j-6b",
    ("llama", 32, 4096): "llama-2-7b",  # and Llama 3, see `name`
    ("llama", 40, 5120): "llama-2-13b",
    ("llama", 28, 3072): "llama-3.2-3b",
    ("mistral", 32, 4096): "mistral-7b",
    ("qwen2", 32, 4096): "qwen1.5-7b",
    ("qwen2", 28, 3584): "qwen2.5-7b",  # and Qwen 2
    ("gpt_neox", 12, 768): "pythia-160m",
    ("gpt_neox", 24, 1024): "pythia-410m",
    ("gpt_neox", 16, 2048): "pythia-1b",
    ("gpt_neox", 32, 2560): "pythia-2.8b",
    ("gpt_neox", 32, 4096): "pythia-6.9b",
    ("gpt_neox", 36, 5120): "pythia-12b",
}
PAPER_TEXT: Settings = {  # what second moments are taken from in the published settings, which take 100,000 documents
    "corpus": "wikimedia/wikipedia:20231101.en",
    "documents": 4000,  # Gupta et al., "Efficient Knowledge Editing via Minimal Precomputation", arXiv:2506.04226
}


def name(model: Model) -> str:
    """The name under which methods keep presets for a model of this shape; "" for one that nobody knows."""
    config = model.config
    found = MODELS.get((config.model_type, model.layers, model.width), "")
    if found == "llama-2-7b" and config.vocab_size > 100_000:
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        return "llama-3.1-8b" if scaling.get("rope_type") == "llama3" else "llama-3-8b"
    return found


def settled(settings: S, model: Model, presets: Mapping[str, Settings], rule: Callable[[Model], Settings]) -> S:
    """`settings` with every None filled in from the model's preset, else from `rule`."""
    known = {**rule(model), **presets.get(name(model), {})}
    missing = {f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) is None}
    filled: S = dataclasses.replace(settings, **{k: v for k, v in known.items() if k in missing})
    return filled


def identity(settings: Any, made_from: Mapping[str, str]) -> dict[str, Any]:
    """A prepared method's identity as JSON: name, version, settings, artifact hashes."""
    fields = dataclasses.asdict(settings)
    return {"name": settings.name, "version": settings.version, "settings": fields, "artifacts": dict(made_from)}
