"""Folders in the layout of recorded vectors, with what our own methods give: to test comparisons, not methods."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden import __main__ as main
from tests.golden import common, ft, hyper, kn, locate, memory, r_rome, searches, spreading

NAMES = {  # of GPT-2's modules in other families; `h[` is how GRACE's and WISE's parameters are written
    "neox": {
        "transformer.h": "gpt_neox.layers",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
        "attn.c_proj": "attention.dense",
    },
    "llama": {
        "transformer.h": "model.layers",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "attn.c_proj": "self_attn.o_proj",
    },
}
COMPARING = (common, ft, hyper, kn, locate, memory, r_rome, searches, spreading)


def renamed(text: str, family: str) -> str:
    """`text` with GPT-2's names of modules in the words of `family`."""
    for old, new in NAMES[family].items():
        text = text.replace(old, new)
    return text


def network(family: str) -> Any:
    """A random model of `family` with the sizes of the recorded GPT-2."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    kinds: dict[str, tuple[Any, Any]] = {
        "neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    config, kind = kinds[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return kind(config(vocab_size=800, max_position_embeddings=128, **sizes)).eval()


def make(source: Path, root: Path, family: str, methods: Sequence[str]) -> None:
    """Write `root` with a random model of `family` and, for each of `methods`, what our own code gives on it.

    Hyper-parameters, requests, contexts, second moments and other inputs are those that `source` has for GPT-2.
    """
    model = root / "models" / f"tiny-{family}"
    network(family).save_pretrained(model)
    words = source / "models" / ("tiny-llama" if family == "llama" else "tiny-gpt2")  # that of llama adds a BOS
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(words / file, model / file)
    for method in ("common", *methods):
        _copy(source / f"gpt2_{method}", root / f"{family}_{method}", family)
    for method in methods:
        folder = root / f"{family}_{method}"
        tensors = load_file(folder / "vectors.safetensors")
        save_file({**tensors, **_ours(root, folder)}, folder / "vectors.safetensors")


def _copy(old: Path, new: Path, family: str) -> None:
    new.mkdir(parents=True)
    meta = json.loads(renamed((old / "meta.json").read_text(encoding="utf-8"), family))
    (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    tensors = load_file(old / "vectors.safetensors")
    known = {name: tensor for name, tensor in tensors.items() if family != "llama" or not name.endswith(".bias")}
    save_file({renamed(name, family): tensor for name, tensor in known.items()}, new / "vectors.safetensors")


def _ours(root: Path, folder: Path) -> dict[str, Tensor]:
    """What was compared with each recorded tensor of `folder`."""
    made: dict[str, Tensor] = {}
    cases: list[common.Case] = []
    load = main.load

    def loaded(*args: Any) -> common.Case:
        cases.append(load(*args))
        return cases[-1]

    def noting(got: Tensor, wanted: Tensor) -> float:
        for name, tensor in cases[-1].vectors.data.items():
            if tensor is wanted:
                made[name] = got.detach().clone().to(wanted.dtype).contiguous()
        return 0.0

    def floors(_: common.Case, number: int, worn: Any) -> Iterator[common.Line]:
        unset = torch.full((0 if worn.live else 1,), 1e9, dtype=torch.float64)
        made[f"edit{number}.min_acts"] = torch.cat((worn.floors.double(), unset))
        yield from ()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(main, "load", loaded))
        stack.enter_context(mock.patch.object(memory, "_floors", floors))
        for module in COMPARING:
            for name in {"error", "largest", "losses"} & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, noting))
        list(main.compare(root, folder))
    for number in range(len(cases[-1].batches) if "edit0.scores" in made else 0):  # KN
        scores = made[f"edit{number}.scores"]
        chosen = scores > cases[-1].hparams["adaptive_threshold"] * scores.max()
        made[f"edit{number}.neurons"] = chosen.nonzero().contiguous()
    return made
