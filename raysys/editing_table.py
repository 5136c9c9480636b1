"""What `raysys bench editing` prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from raysys.tables import grid

if TYPE_CHECKING:
    from raysys.editing_bench import Line
    from raysys.editing_costs import Cost

STAGES = ("keys", "search", "solve", "rest", "wear")


def lines_table(lines: Sequence[Line]) -> RenderableType:
    """Ours against plain, CPU seconds per edit (second moments: per pass over the corpus)."""
    from raysys.editing_bench import CLOSE, KN

    table = grid("what", "plain", "ours", "times faster", "asked for", "difference")
    for line in lines:
        plain, ours = (statistics.median(runs) / line.edits for runs in (line.plain, line.ours))
        ratio = Text(f"{line.ratio:.1f}", style="" if line.ratio >= line.wanted else "yellow")
        apart = Text(f"{line.difference:.0e}", style="" if line.difference <= CLOSE else "red")
        table.add_row(Text(line.what), f"{plain:.2f} s", f"{ours:.2f} s", ratio, f"{line.wanted:g}", apart)
    table.title = "CPU seconds an edit, medians, one thread; difference: of what both write, relative"
    table.title_justify = "left"
    if any(line.what == KN for line in lines):
        about = (
            "KN: with published = true on both sides, as its published code computes it; not how the default compares"
        )
        table.caption, table.caption_justify = Text(about, style="dim"), "left"
    return table


def costs_table(costs: Sequence[Cost]) -> RenderableType:
    """Every method's edit, in seconds by stage; why it could not be measured, where it couldn't."""
    table = grid("method", "an edit", *STAGES)
    for cost in costs:
        if cost.why:
            table.add_row(Text(cost.method), Text("-"), *[""] * (len(STAGES) - 1), Text(cost.why, style="dim"))
        else:
            stages = (f"{cost.stages.get(stage, 0.0):.2f}" for stage in STAGES)
            table.add_row(Text(cost.method), f"{cost.seconds:.2f} s", *stages)
    table.title = "CPU seconds of one edit with each method's own settings"
    table.title_justify = "left"
    return table
