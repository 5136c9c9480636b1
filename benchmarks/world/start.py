"""Initial attention heads: some start as what copying needs, so that it forms in a minute or two.

In-context copying takes two steps: a head that brings along the previous token, and one that looks for the place whose
previous token is the present one (Olsson et al., "In-context Learning and Induction Heads", arXiv:2209.11895).
Answering by letter takes the same two steps with the letter two tokens before the option. Training from random heads
finds these steps late when most of the corpus is recall; here a few heads begin near them and training does the rest.
"""

from __future__ import annotations

from typing import Final

import torch

from .net import Attention, Net

OFFSETS: Final = (1, 2)
CONSTANT: Final = 0.3
SHARPNESS: Final = 6.0
MATCH: Final = 2.4
CARRY: Final = 0.08
COPY: Final = 0.3


def _frames(count: int, width: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """`count` matrices `(size, width)` with orthonormal rows that leave the first coordinate alone."""
    made = []
    for _ in range(count):
        q, _ = torch.linalg.qr(torch.randn(width - 1, size, generator=generator))
        made.append(torch.cat([torch.zeros(size, 1), q.T], dim=1))
    return made


def _look_back(attention: Attention, head: int, offset: int, theta: float, read: torch.Tensor,
               write: torch.Tensor) -> None:
    """Let a head attend `offset` tokens back, whatever the tokens, and carry a projection of what is there."""
    size = attention.head_dim
    rows = slice(head * size, (head + 1) * size)
    half = size // 2
    phase = offset * theta ** (-torch.arange(half).float() / half)
    scale = SHARPNESS * (torch.arange(half) < 7)  # the fast dimensions tell neighbours apart
    attention.q_proj.weight[rows] *= 0.05
    attention.k_proj.weight[rows] *= 0.05
    attention.q_proj.weight[rows, 0] = torch.cat([scale, torch.zeros(half)]) / 5.5
    attention.k_proj.weight[rows, 0] = torch.cat([scale * phase.cos(), scale * phase.sin()]) / 5.5
    attention.v_proj.weight[rows] = read
    attention.o_proj.weight[:, rows] = CARRY * write.T


def _match(attention: Attention, head: int, query: torch.Tensor, key: torch.Tensor, read: torch.Tensor,
           write: torch.Tensor) -> None:
    """Let a head attend where `key` of the residual equals `query` of the present one (slow rotary dimensions only)."""
    size = attention.head_dim
    start, quarter = head * size, size // 4
    slow = [start + i for i in (*range(quarter, 2 * quarter), *range(3 * quarter, size))]
    rows = slice(start, start + size)
    attention.q_proj.weight[rows] *= 0.05
    attention.k_proj.weight[rows] *= 0.05
    attention.q_proj.weight[slow] = MATCH * query[: 2 * quarter]
    attention.k_proj.weight[slow] = MATCH * key[: 2 * quarter]
    attention.v_proj.weight[rows] = read
    attention.o_proj.weight[:, rows] = COPY * write.T


@torch.no_grad()
def shape_heads(net: Net, seed: int) -> None:
    """Give the first heads of every layer their start; the first embedding coordinate becomes equal for all tokens."""
    shape = net.shape
    generator = torch.Generator().manual_seed(seed)
    own = _frames(2, shape.hidden_size, shape.head_dim, generator)
    carried = _frames(2, shape.hidden_size, shape.head_dim, generator)
    net.model.embed_tokens.weight[:, 0] = CONSTANT
    layers = [module for module in net.modules() if isinstance(module, Attention)]
    for head, offset in enumerate(OFFSETS):
        _look_back(layers[0], head, offset, shape.rope_theta, own[head], carried[head])
    for attention in layers[1:]:
        _match(attention, 0, own[0], carried[0], own[0], own[0])
        _match(attention, 1, own[1], own[1], carried[1], own[1])
