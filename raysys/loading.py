"""Find and load a model's weights and tokenizer; every failure is a ValueError that says what to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from raysys.arch import arch

WORLD = Path(__file__).resolve().parent.parent / "benchmarks" / "world" / "model"  # "world/small"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOT_IDENTITY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation")


def load(
    name: str, *, dtype: str, device: str, revision: str | None = None, attention: str | None = None
) -> tuple[Any, Any]:
    """The network and the tokenizer of `name` (hub id, folder or "world/small"). Raises ValueError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    source = locate(name)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **common)
    except (OSError, ValueError) as error:
        raise ValueError(_why(name, "configuration", error)) from error
    arch(config)
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        with _quiet():
            both: Any = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                **common,
                **chosen,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(_why(name, "weights (safetensors)", error)) from error
    net, loaded = both
    if loaded["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(f"model {name!r}: its weights lack {', '.join(sorted(loaded['missing_keys'])[:3])}, ...")
    return net.to(_device(device)), load_tokenizer(name, revision)[1]


def load_tokenizer(name: str, revision: str | None = None) -> tuple[Any, Any]:
    """The configuration and the tokenizer of `name`, without weights. Raises ValueError."""
    from transformers import AutoConfig, AutoTokenizer

    source = locate(name)
    what = "configuration"
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        what = "tokenizer"
        return config, AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(_why(name, what, error)) from error


def locate(name: str) -> str:
    """The folder that `name` stands for, checked for what loading needs; a hub id is returned as it is."""
    if name.startswith("world/"):
        if name != "world/small":
            raise ValueError(f"unknown built-in model {name!r}; there is 'world/small'")
        folder = WORLD
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
                raise ValueError(f"model {name!r}: no such folder; give a folder with config.json, or a hub id")
            return name
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r}: folder {folder} has no config.json; it must be one that transformers saved")
    if not any(folder.glob("*.safetensors")):
        other = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        found = f" ({other[0]} is a pickle, which is not read: save it again with save_pretrained)" if other else ""
        way = found or "; give a folder that save_pretrained wrote, weights and all"
        raise ValueError(f"model {name!r}: folder {folder} has no *.safetensors weights{way}")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")):
        raise ValueError(f"model {name!r}: folder {folder} has no tokenizer (tokenizer.json); save one there")
    return str(folder)


def canonical_config(config: Any) -> str:
    """The configuration as JSON without paths, versions and load options."""
    fields = {k: v for k, v in config.to_diff_dict().items() if k not in _NOT_IDENTITY}
    return json.dumps(fields, sort_keys=True, default=str)


def digest(net: Any, tokenizer: Any) -> str:
    """SHA-256 (hex) over configuration, tokenizer and all weights; independent of where they lie on disk."""
    sha = hashlib.sha256(canonical_config(net.config).encode())
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        sha.update(text.encode())
    seen: dict[tuple[int, torch.Size], str] = {}  # tied weights once
    for name, tensor in sorted(net.state_dict().items()):
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen and tensor.numel():
            sha.update(f"{name} is {seen[place]}".encode())
            continue
        seen[place] = name
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(data.numpy().data)
    return sha.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar: the face has its own."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _why(name: str, what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"model {name!r}: its {what} can't be loaded: {reason} (If this machine is offline, download the model where "
        f"there is a network, `hf download {name} --local-dir FOLDER`, and give that folder.)"
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not cpu, cuda, cuda:N or auto") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine has no CUDA device that torch can use; say cpu or auto")
    return chosen
