"""The built-in world's network: a small Llama whose attention can be told, layer by layer, what not to see.

The forward pass is that of `transformers.LlamaForCausalLM` (Touvron et al., "LLaMA: Open and Efficient Foundation
Language Models", arXiv:2302.13971) with the same parameter names, so a trained state loads there unchanged. Two things
are ours: a visibility rule for the lower layers and one for the upper, which teach the network to recall a fact at the
last token of its subject, and logits only where a target is trained.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the network, named as in a Llama configuration."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def config(self, *, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The `config.json` under which transformers loads the trained weights."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "dtype": "float16",
        }


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale, `(..., d) -> (..., d)`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in float32, return float32."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and an additive visibility mask.

    Written out rather than left to `scaled_dot_product_attention`: in bfloat16 on a CPU that is four times slower.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.num_attention_heads, shape.head_dim
        width = shape.hidden_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(B, T, d) -> (B, T, d)`; mask `(B, 1, T, T)` is 0 where a query may look, very negative elsewhere."""
        b, t, d = x.shape
        q, k, v = (p(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q * self.head_dim**-0.5, cos, sin), rotate(k, cos, sin)
        scores = torch.matmul(q, k.transpose(-1, -2)) + mask.to(q.dtype)
        y = torch.matmul(torch.softmax(scores, dim=-1, dtype=q.dtype), v)
        out: torch.Tensor = self.o_proj(y.transpose(1, 2).reshape(b, t, d))
        return out


class MLP(nn.Module):
    """Gated feed-forward block, `(..., d) -> (..., d)`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, projected back."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Dropout(nn.Module):
    """Dropout whose masks are slices, at random offsets, of one long fixed mask: drawing them costs nothing."""

    pool: torch.Tensor
    SIZE = 1 << 22

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("pool", torch.empty(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share `rate` of the entries while training."""
        if not self.training or self.rate == 0.0 or x.numel() > self.SIZE // 2:
            return F.dropout(x, self.rate, self.training)
        if self.pool.dtype != x.dtype or self.pool.numel() == 0 or self.pool.device != x.device:
            self.pool = (torch.rand(self.SIZE, device=x.device) >= self.rate).to(x.dtype) / (1.0 - self.rate)
        start = int(torch.randint(0, self.SIZE - x.numel(), ()))
        return x * self.pool[start : start + x.numel()].view(x.shape)


class Layer(nn.Module):
    """One pre-norm transformer layer with dropout on both block outputs."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(B, T, d) -> (B, T, d)`."""
        a = self.self_attn(self.input_layernorm(x), mask, cos, sin)
        x = x + self.dropout(a)
        m = self.mlp(self.post_attention_layernorm(x))
        out: torch.Tensor = x + self.dropout(m)
        return out


class Trunk(nn.Module):
    """Embeddings, layers and final norm: the part transformers calls `model`."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Net(nn.Module):
    """The whole network; the output head is the embedding matrix."""

    def __init__(self, shape: Shape, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.hiding = shape.num_hidden_layers // 2
        self.model = Trunk(shape, dropout)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.05 if "embed" in name else p.shape[1] ** -0.5
                nn.init.normal_(p, std=std * (0.02 if residual else 1.0))

    def forward(self, ids: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor,
                where: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `(n, vocab)` at the flat positions `where` of ids `(B, T)`, or everywhere `(B * T, vocab)`.

        lower, upper: `(B, T)` for each key position the last query position that may see it, in the first `hiding`
        layers and in those above.
        """
        t = ids.shape[1]
        cos, sin = angles(self.shape, t, ids.device)
        if torch.is_autocast_enabled(ids.device.type):
            cos, sin = cos.bfloat16(), sin.bfloat16()
        position = torch.arange(t, device=ids.device)
        causal = position[:, None] >= position[None, :]
        masks = [
            torch.zeros((), device=ids.device)
            .where(causal & (position[None, :, None] <= last[:, None, :]), torch.tensor(-1e4, device=ids.device))
            .unsqueeze(1)
            .to(torch.bfloat16 if torch.is_autocast_enabled(ids.device.type) else torch.float32)
            for last in (lower, upper)
        ]
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, masks[int(i >= self.hiding)], cos, sin)
        x = x.reshape(-1, x.shape[-1])
        if where is not None:
            x = x[where]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def angles(shape: Shape, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary positions, each `(length, head_dim)`."""
    exponent = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    phase = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta ** -exponent)
    phase = torch.cat([phase, phase], dim=-1)
    return phase.cos(), phase.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to `(B, heads, T, head_dim)`."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
