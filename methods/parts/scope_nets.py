"""SERAC's two networks as one block of bytes: the scope classifier's encoder and the counterfactual model.

The block is a safetensors file: weights, and as bytes of JSON how the networks are built and the encoder's tokenizer. A
patch carries it, so that whoever wears the patch needs nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from methods.parts.encoder import Encoder, Pooling
from raysys.loading import canonical_config
from raysys.model import Model

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class Nets:
    """The classifier's `encoder`, and the `counterfactual` network: None where the edited model itself answers."""

    encoder: Encoder
    counterfactual: Any

    def packed(self) -> bytes:
        """The block; a tokenizer that is the edited model's is left out."""
        tensors = _weights("classifier", self.encoder.net)
        said: dict[str, Any] = {
            "classifier": json.loads(canonical_config(self.encoder.net.config)),
            "pooling": self.encoder.pooling,
            "lead": self.encoder.lead,
        }
        said["classifier"]["model_type"] = self.encoder.net.config.model_type
        if self.encoder.own_tokenizer:
            tokenizer = self.encoder.tokenizer
            special = {name: getattr(tokenizer, name) for name in SPECIAL if getattr(tokenizer, name, None)}
            said["tokenizer"] = {**special, "model_max_length": tokenizer.model_max_length}
            tensors["tokenizer"] = _text(tokenizer.backend_tokenizer.to_str())
        if self.counterfactual is not None:
            tensors |= _weights("counterfactual", self.counterfactual)
            said["counterfactual"] = json.loads(canonical_config(self.counterfactual.config))
            said["counterfactual"]["model_type"] = self.counterfactual.config.model_type
        tensors["about"] = _text(json.dumps(said, sort_keys=True))
        return save(tensors)

    @classmethod
    def of(cls, block: bytes, model: Model) -> Nets:
        """The networks in a block, on the device of the edited `model`."""
        from transformers import AutoModel, AutoModelForCausalLM

        tensors = load(block)
        said = json.loads(bytes(tensors["about"].tolist()))
        encoder = _network(AutoModel, said["classifier"], _part(tensors, "classifier"), model)
        tokenizer = model.tokenizer
        if "tokenizer" in said:
            tokenizer = _tokenizer(bytes(tensors["tokenizer"].tolist()).decode(), said["tokenizer"])
        pooling: Pooling = said["pooling"]
        counterfactual = None
        if "counterfactual" in said:
            parts = _part(tensors, "counterfactual")
            counterfactual = _network(AutoModelForCausalLM, said["counterfactual"], parts, model)
        return cls(Encoder(encoder, tokenizer, pooling, said["lead"], "tokenizer" in said), counterfactual)


def digest(block: bytes) -> str:
    """Hex SHA-256 of a block."""
    return hashlib.sha256(block).hexdigest()


def _text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


def _weights(part: str, net: Any) -> dict[str, Tensor]:
    """The weights of `net`, tied ones once."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in net.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen or not tensor.numel():
            seen.add(place)
            kept[f"{part}.{name}"] = tensor.detach().cpu().clone()
    return kept


def _network(auto: Any, said: Mapping[str, Any], weights: Mapping[str, Tensor], model: Model) -> Any:
    """A network with these weights, float32, frozen. Raises ValueError when they are not all there."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(said["model_type"], **{k: v for k, v in said.items() if k != "model_type"})
    with torch.random.fork_rng([]):  # its first weights are thrown away
        net = auto.from_config(config, dtype=torch.float32)
    net.tie_weights()
    lacks, unknown = net.load_state_dict(dict(weights), strict=False)
    places = {k: t.data_ptr() for k, t in net.state_dict().items()}
    held = {places[k] for k in weights if k in places}
    lacks = [k for k in lacks if places[k] not in held]
    if lacks or unknown:
        raise ValueError(f"a {said['model_type']} network lacks {lacks[:3]} and has no place for {unknown[:3]}")
    return net.to(model.device).eval().requires_grad_(False)


def _tokenizer(text: str, settings: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(text), **settings
    )
