"""What the plain implementations share: padded texts, the subject's last token, readings, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS = 128  # texts of one pass while keys and values are read


def padded(tokenizer: Any, texts: Sequence[str], left: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, T) each, of texts padded to the longest."""
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    fill = [[pad] * (longest - len(row)) for row in rows]
    zeros = [[0] * len(f) for f in fill]
    ones = [[1] * len(row) for row in rows]
    ids = [f + r if left else r + f for f, r in zip(fill, rows, strict=True)]
    mask = [z + o if left else o + z for z, o in zip(zeros, ones, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def subject_end(tokenizer: Any, template: str, subject: str) -> int:
    """Index of the subject's last token in `template` (one "{}"), special tokens counted."""
    return len(tokenizer.encode(template.split("{}")[0] + subject)) - 1


def target_ids(tokenizer: Any, target: str) -> list[int]:
    """The target's tokens, behind a blank and without special tokens."""
    ids: list[int] = tokenizer.encode(target if target.startswith(" ") else " " + target, add_special_tokens=False)
    return ids


def tensor(out: Any) -> Tensor:
    """The tensor of a module that returns one, or the first of a tuple."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@contextmanager
def hooked(net: nn.Module, name: str, hook: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Within it, `hook(input, output)` sees every call of module `name`; a tensor it returns replaces the output."""

    def call(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        new = hook(args[0], tensor(out))
        if new is None:
            return None
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = net.get_submodule(name).register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def read(net: Any, tokenizer: Any, module: str, templates: Sequence[str], subjects: Sequence[str]) -> list[Tensor]:
    """Input (N, d_in) and output (N, d_out) of `module` at the subject's last token in each template.

    The whole model runs, logits at all positions included, on up to ROWS texts at once.
    """
    inputs, outputs = [], []
    for start in range(0, len(templates), ROWS):
        some = list(zip(templates, subjects, strict=True))[start : start + ROWS]
        batch = padded(tokenizer, [t.replace("{}", s, 1) for t, s in some])
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(given: Tensor, out: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            seen.append((given, out))

        with hooked(net, module, keep):
            net(**batch)
        [(given, out)] = seen
        for i, (template, subject) in enumerate(some):
            at = subject_end(tokenizer, template, subject)
            inputs.append(given[i, at])
            outputs.append(out[i, at])
    return [torch.stack(inputs), torch.stack(outputs)]


def add_(net: nn.Module, module: str, change: Tensor) -> None:
    """Add `change` (d_out, d_in) to the weight of `module`, in the layout in which it is stored."""
    linear = net.get_submodule(module)
    weight = linear.get_parameter("weight").data
    weight += (change.T if isinstance(linear, Conv1D) else change).to(weight.dtype)
