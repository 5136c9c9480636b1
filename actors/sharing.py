"""Several models of one study share its evaluators: each holds one base model, so one is let go and another started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actors.places import Limits
from actors.pool import EvaluatorPool


def share(pools: Sequence[EvaluatorPool], limits: Limits) -> None:
    """Let `pools`, oldest first, have `limits.most` evaluators together.

    The oldest keeps what it has work for; what it has no more work for goes to the next that has. With one pool left
    everything is its own.
    """
    if len(pools) == 1:
        pools[0].limits = limits
        return
    hungry = any(pool.pending > pool.size for pool in pools[1:])
    for number, pool in enumerate(pools):
        others = sum(other.size for other in pools if other is not pool)
        idle = 0.0 if hungry and not number else limits.idle
        pool.limits = replace(limits, fewest=0, most=max(0, limits.most - others), idle=idle)
