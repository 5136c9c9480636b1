"""What an actor knows of the machine under it, and how it settles in."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def settle(threads: int) -> None:
    """Fix what rounding depends on: the number of threads, and algorithms that give the same bits every time."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, host and process."""
    return {"hardware": hardware(device), "host": platform.node(), "pid": os.getpid(), "torch": str(torch.__version__)}


def hardware(device: torch.device) -> str:
    """The kind of processor that does the arithmetic: results are bit-identical only within one kind."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
