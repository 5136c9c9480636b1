"""Where each model family keeps its parts, by `config.model_type`: the one place that knows module names.

To add a family, add one entry to FAMILIES. `{}` stands for the layer number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Module names of one family, relative to the causal language model."""

    block: str  # one decoder block
    mlp_out: str  # the MLP's last projection: d_ff -> d; what locate-then-edit methods write
    mlp_in: tuple[str, ...]  # the MLP's first projections: d -> d_ff
    attn: str  # the attention module
    attn_out: str  # its last projection
    after: tuple[str, ...]  # what follows the last block, in order (final norm, ...); those a model lacks are skipped
    mlp_added: bool = True  # the MLP's output joins the residual stream unchanged (no norm between, none after)
    splits: bool = True  # a tensor-parallel group can hold it (raysys/shards.py)
    softcap: str = ""  # the config's attribute that holds the logits' soft cap

    @property
    def blocks(self) -> str:
        """The list of decoder blocks."""
        return self.block.removesuffix(".{}")


_LLAMA = Arch(
    block="model.layers.{}",
    mlp_out="model.layers.{}.mlp.down_proj",
    mlp_in=("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    attn="model.layers.{}.self_attn",
    attn_out="model.layers.{}.self_attn.o_proj",
    after=("model.norm",),
)

FAMILIES: dict[str, Arch] = {
    "gpt2": Arch(
        block="transformer.h.{}",
        mlp_out="transformer.h.{}.mlp.c_proj",
        mlp_in=("transformer.h.{}.mlp.c_fc",),
        attn="transformer.h.{}.attn",
        attn_out="transformer.h.{}.attn.c_proj",
        after=("transformer.ln_f",),
        splits=False,
    ),
    "gptj": Arch(
        block="transformer.h.{}",
        mlp_out="transformer.h.{}.mlp.fc_out",
        mlp_in=("transformer.h.{}.mlp.fc_in",),
        attn="transformer.h.{}.attn",
        attn_out="transformer.h.{}.attn.out_proj",
        after=("transformer.ln_f",),
    ),
    "gpt_neox": Arch(
        block="gpt_neox.layers.{}",
        mlp_out="gpt_neox.layers.{}.mlp.dense_4h_to_h",
        mlp_in=("gpt_neox.layers.{}.mlp.dense_h_to_4h",),
        attn="gpt_neox.layers.{}.attention",
        attn_out="gpt_neox.layers.{}.attention.dense",
        after=("gpt_neox.final_layer_norm",),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": replace(_LLAMA, mlp_added=False, softcap="final_logit_softcapping"),  # a norm follows the MLP
    "phi": replace(
        _LLAMA,
        mlp_out="model.layers.{}.mlp.fc2",
        mlp_in=("model.layers.{}.mlp.fc1",),
        attn_out="model.layers.{}.self_attn.dense",
        after=("model.final_layernorm",),
    ),
    "opt": Arch(
        block="model.decoder.layers.{}",
        mlp_out="model.decoder.layers.{}.fc2",
        mlp_in=("model.decoder.layers.{}.fc1",),
        attn="model.decoder.layers.{}.self_attn",
        attn_out="model.decoder.layers.{}.self_attn.out_proj",
        after=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    ),
}


def arch(config: Any) -> Arch:
    """The `Arch` of a transformers config. Raises ValueError for a family that is not in the table."""
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"unknown model family {family!r}; known are {', '.join(sorted(FAMILIES))}. To add it, write one entry "
            f"FAMILIES[{family!r}] = Arch(...) with its module names in raysys/arch.py."
        )
    known = FAMILIES[family]
    if getattr(config, "do_layer_norm_before", True) is False:  # opt-350m: a norm follows each block's MLP
        known = replace(known, mlp_added=False)
    return known
