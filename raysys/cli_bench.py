"""The commands of `raysys bench`: what methods do and what they cost, outside a study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raysys import cli_shared as shared
from raysys.cli_shared import EXITS, Device, Json, Settings

if TYPE_CHECKING:
    from raysys.bench_methods import Wanted
    from raysys.editing_bench import Size

bench = typer.Typer(no_args_is_help=True, help="Measure what methods do, outside a study.")


@bench.command("single-edits", epilog=EXITS)
def single_edits(
    method: Annotated[str, typer.Argument(help="Editing method.")] = "rome",
    settings: Settings = None,
    model: Annotated[str, typer.Option("--model", help="Folder, hub id or world/small.")] = "world/small",
    count: Annotated[int, typer.Option("--count", min=1, help="How many edits.")] = 100,
    dataset: Annotated[str, typer.Option("--dataset", help="Data set of edits.")] = "world",
    path: Annotated[str, typer.Option("--path", help="Its file, where it needs one.")] = "",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make edits one at a time, each on the untouched model, and say how many took, by each kind of probe.

    Examples: raysys bench single-edits rome; raysys bench single-edits ft_l layers=[2] --count 20
    """
    cases = shared.cases(dataset, path)
    editor = shared.method(method, settings)
    loaded = shared.model(model, device)
    from raysys import checks
    from raysys.tables import singles_table, singles_tree

    found = list(checks.single_edits(loaded, editor.prepare(loaded), islice(cases, count)))
    tree = singles_tree(found, checks.shares(found))
    shared.say(json.dumps(tree, indent=1) if as_json else singles_table(f"{method} on {model}", tree))


@bench.command(epilog=EXITS)
def methods(
    method: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Which; rome+published is a published variant.")
    ] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="A setting: --set rome.layer=3")] = None,
    model: Annotated[str, typer.Option("--model", help="Folder, hub id or world/small.")] = "world/small",
    count: Annotated[int, typer.Option("--count", min=1, help="How many edits.")] = 100,
    part: Annotated[str, typer.Option("--part", help="single, sequence or both.")] = "both",
    facts: Annotated[int, typer.Option("--facts", min=0, help="How many facts that nobody edits to ask too.")] = 200,
    dataset: Annotated[str, typer.Option("--dataset", help="Data set of edits.")] = "world",
    path: Annotated[str, typer.Option("--path", help="Its file, where it needs one.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compare editing methods on one model: single edits, and as many one after another; all methods by default.

    Each row is told on standard error as soon as it is there, the table at the end. A method that can't do it (no
    trained editor, say) is a row with its reason, and the exit code is 1.

    Examples: raysys bench methods; raysys bench methods rome memit mend mend+published --count 30
    """
    from raysys import bench_methods, names, progress

    if part not in ("single", "sequence", "both"):
        raise ValueError(f"--part {part!r}: single, sequence or both")
    wanted = _wanted(method or sorted(names.METHODS), changes or ())
    data = names.build(names.dataset(dataset), {"path": path} if path else {}, f"data set {dataset}")
    cases = list(islice(data.cases(), count))
    loaded = shared.model(model, device, dtype)
    held_out = data.held_out(cases)[:facts] if facts else []
    found = []
    with progress.counted("edits", shared.stderr()) as tell:
        options: dict[str, Any] = {"singles": part != "sequence", "sequence": part != "single", "tell": tell}
        for row in bench_methods.rows(loaded, wanted, cases, held_out, **options):
            found.append(row)
            shared.stderr().print(bench_methods.line(row), markup=False, highlight=False, soft_wrap=True)
    title = f"{len(cases)} edits of {dataset} on {model}"
    shared.say(json.dumps([r.tree() for r in found], indent=1) if as_json else bench_methods.table(found, title))
    if any(row.fault for row in found):
        raise typer.Exit(1)


def _wanted(given: Sequence[str], changes: Sequence[str]) -> list[Wanted]:
    """Methods by name, perhaps with "+published", each with those of `changes` that are its own.

    Raises ValueError for an unknown method, a wrong setting, and a change that is no method's.
    """
    from raysys import names
    from raysys.bench_methods import Wanted
    from raysys.spec import set_key

    found = []
    for name in given:
        plain, plus, variant = name.partition("+")
        if plus and variant != "published":
            raise ValueError(f"method {name!r}: after '+' only 'published' makes sense")
        settings: dict[str, Any] = {"published": True} if plus else {}
        for change in changes:
            if change.startswith(f"{plain}."):
                set_key(settings, change.removeprefix(f"{plain}."))
        names.build(names.method(plain), settings, f"method {name}")
        found.append(Wanted(plain, settings))
    known = {want.name for want in found}
    for change in changes:
        if not any(change.startswith(f"{name}.") for name in known):
            asked = change.partition("=")[0].partition(".")[0]
            raise ValueError(f"--set {change}: no method {asked!r} is measured{names.did_you_mean(asked, known)}")
    return found


@bench.command("editing", epilog=EXITS)
def editing(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here, as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: one run, few steps, no large batches.")] = False,
    methods: Annotated[bool, typer.Option("--methods", help="Only what every method costs; no comparison.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Lines or methods with this name.")] = None,
) -> None:
    """What an edit costs: ours against plain implementations (from a checkout), and every method by itself.

    A random model with the shape of GPT-2 small, one thread, CPU seconds, medians, both sides turn and turn about. The
    whole takes most of an hour. The exit code is 1 when what both sides write differs.

    Examples: raysys bench editing --quick; raysys bench editing --only rome
    """
    from dataclasses import replace

    from raysys import editing_bench, editing_costs
    from raysys.editing_table import costs_table, lines_table

    size = replace(editing_bench.Size.quick() if quick else editing_bench.Size(), only=tuple(only or ()))
    _check_only(size, methods)
    note = shared.stderr().print
    found = [] if methods else list(editing_bench.lines(size, note))
    costs = list(editing_costs.costs(size, note))
    for table in ([lines_table(found)] if found else []) + ([costs_table(costs)] if costs else []):
        shared.say(table)
    if json_file is not None:
        json_file.write_text(json.dumps(editing_costs.tree(size, found, costs), indent=1), encoding="utf-8")
    apart = [line for line in found if not line.difference <= editing_bench.CLOSE]
    if apart:
        said = "; ".join(f"{line.what} by {line.difference:.0e}" for line in apart)
        shared.complain(f"what both sides write differs by more than {editing_bench.CLOSE:.0e}: {said}")
        raise typer.Exit(1)


@bench.command("scoring", epilog=EXITS)
def scoring(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here, as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: few questions, one run.")] = False,
) -> None:
    """What scoring costs: ours against lm-evaluation-harness, and later snapshots against the first.

    A random model with the shape of GPT-2 small, one thread, CPU seconds, medians, both sides turn and turn about.
    Needs the extra `harness`. The exit code is 1 when both sides answer differently.

    Examples: raysys bench scoring --quick; raysys bench scoring --json scoring.json
    """
    from raysys import scoring_bench
    from raysys.tables import scoring_table

    size = scoring_bench.Size.quick() if quick else scoring_bench.Size()
    note = shared.stderr().print
    found = dict(scoring_bench.lines(size, note))
    note("peak memory")
    ours, theirs = (scoring_bench.peak_memory(side, size) for side in ("ours", "theirs"))
    shared.say(scoring_table(found, (ours, theirs)))
    tree = scoring_bench.tree(found, (ours, theirs))
    if json_file is not None:
        json_file.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    if not tree["agree"]:
        shared.complain("answers differ: " + "; ".join(line.what for line in found.values() if not line.same))
        raise typer.Exit(1)


@bench.command("gpu", epilog=EXITS)
def gpu(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here, as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few edits and questions: figures are rougher.")] = False,
) -> None:
    """What edits, snapshots and scoring cost on this machine's GPU, with a model of the shape of Llama-2-7B.

    Random weights in bfloat16; needs neither Ray nor the network. Without a GPU it says so and is skipped, exit code 0.
    What the lines mean: cluster/HARDWARE.md.

    Examples: raysys bench gpu --quick; raysys bench gpu --json gpu.json
    """
    from raysys import gpu_bench

    size = gpu_bench.Size.quick() if quick else gpu_bench.Size()
    why = gpu_bench.missing(size)
    if why:
        shared.say(why)
        found: dict[str, Any] = {"skipped": why}
    else:
        found = gpu_bench.measure(size, shared.stderr().print)
        shared.say(gpu_bench.table(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _check_only(size: Size, methods: bool) -> None:
    """Raises ValueError for a part of `size.only` that no line and no method is called by."""
    from raysys import names
    from raysys.editing_bench import titles

    lines = [] if methods else titles(size)
    for part in size.only:
        if part not in names.METHODS and not any(part in line for line in lines):
            raise ValueError(
                f"--only {part!r}: nothing has this name{names.did_you_mean(part, {*names.METHODS, *lines})}"
            )
