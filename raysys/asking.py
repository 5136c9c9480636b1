"""What the rows of a forward pass are, for patches that look at a prompt as a whole (code books, side memories).

B = rows of a batch, T = columns (tokens) of one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asking:
    """A pass over prompts, or over what follows them.

    rows: (B,) long, the number of each row's question within its batch: stays the same while rows leave the batch;
    last: (B,) long, the column of the prompt's last token, -1 where the prompt lay in an earlier pass;
    prompt: (B, T) bool, which columns hold prompt tokens (not padding, not what follows the prompt);
    notes: what patches keep between the passes of one batch, by kind of patch.
    """

    rows: Tensor
    last: Tensor
    prompt: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def whole(cls, ids: Tensor, attention_mask: Tensor | None = None) -> Asking:
        """Rows (B, T) that are prompts from end to end, padded on either side; the mask may cover a cache too."""
        prompt = torch.ones_like(ids) if attention_mask is None else attention_mask[:, -ids.shape[1] :]
        return cls.of(prompt.bool())

    @classmethod
    def of(cls, prompt: Tensor) -> Asking:
        """Rows whose prompt tokens are in the columns `prompt` (B, T) bool; every row has at least one."""
        columns = torch.arange(prompt.shape[1], device=prompt.device)
        last = torch.where(prompt, columns, -1).max(1).values
        return cls(torch.arange(len(prompt), device=prompt.device), last, prompt)

    def following(self, rows: Tensor, columns: int = 1) -> Asking:
        """The next pass, over `columns` generated tokens of the questions numbered `rows` (b,); the notes go along."""
        last = torch.full_like(rows, -1)
        return Asking(rows, last, torch.zeros(len(rows), columns, dtype=torch.bool, device=rows.device), self.notes)
