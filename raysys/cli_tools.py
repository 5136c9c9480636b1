"""Commands that make what methods need: trained editors, and settings searched for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raysys import cli_shared as shared
from raysys.cli_shared import EXITS, Device, Json, Settings

tools = typer.Typer()


@tools.command(epilog=EXITS)
def prepare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study whose methods are prepared.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Processes that sum, each with the model (default: evaluators)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make what a study's methods need of its models, on Ray, before it runs: second moments, contexts, factors.

    A study makes what is missing by itself, in its editor; this is quicker: all layers in one pass over the text, by
    several workers at once. What is in the cache is not made again; interrupted, the same command goes on.

    Example: raysys prepare study.toml --workers 4
    """
    from raysys.spec import StudySpec

    spec = StudySpec.load(study, changes or ())
    from raysys.preparing import prepare as make
    from raysys.progress import counted
    from raysys.tables import prepared_table, prepared_tree

    with counted("documents", shared.stderr()) as tell:
        found = list(make(spec, workers, tell, lambda text: shared.stderr().print(text, markup=False)))
    shared.say(json.dumps(prepared_tree(found), indent=1) if as_json else prepared_table(found))
    if any(p.fault for p in found):
        raise typer.Exit(1)


@tools.command(epilog=EXITS)
def tune(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Editing method.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or world/small.")],
    settings: Settings = None,
    dataset: Annotated[str, typer.Option("--dataset", help="Data set of edits.")] = "world",
    path: Annotated[str, typer.Option("--path", help="Its file, where it needs one.")] = "",
    skip: Annotated[
        int, typer.Option("--skip", min=0, help="Leave out so many edits: those that will be studied.")
    ] = 200,
    count: Annotated[int, typer.Option("--count", min=1, help="How many edits to try them on.")] = 20,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many settings to try at most.")] = 30,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Search a method's main settings for a model on edits that no study of yours uses.

    Tried one after the other are what the method itself names, or layers by depth, rate and steps; the score is the
    mean of efficacy, paraphrase and neighbourhood of single edits (each: right answer likelier than its rival, and
    greedy). Prints every trial and what to write into a study. Interrupted, the same command goes on.

    Example: raysys tune rome path/to/model --dataset counterfact --path counterfact.json --count 30
    """
    from itertools import islice

    from raysys import progress, tuning
    from raysys.tables import trials_table

    given = shared.chosen(settings)
    cases = list(islice(shared.cases(dataset, path), skip, skip + count))
    if not cases:
        raise ValueError(f"data set {dataset} has no edit beyond the first {skip}; lower --skip")
    loaded = shared.model(model, device, dtype)
    found = []
    with progress.counted("edits", shared.stderr()) as tell:
        for trial in tuning.search(loaded, method, given, cases, trials, tell=tell):
            found.append(trial)
            line = ", ".join(f"{k} = {v}" for k, v in trial.changes.items()) or "its own settings"
            shared.stderr().print(f"{trial.score:.3f}  {line}  {trial.fault}".rstrip(), markup=False, highlight=False)
    top = tuning.best(found)
    text = tuning.snippet(method, given, top.changes)
    if as_json:
        trees = [dict(vars(t)) for t in found]
        shared.say(json.dumps({"trials": trees, "best": dict(top.changes), "toml": text}, indent=1))
        return
    shared.say(trials_table(f"{method} on {model}, {len(cases)} edits of {dataset}", found, top))
    shared.say(f"\nfor a study:\n\n{text}")


@tools.command("train-editor", epilog=EXITS)
def train_editor(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="mend, malmen, rledit or serac.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or world/small.")],
    settings: Settings = None,
    dataset: Annotated[str, typer.Option("--dataset", help="Edits to train on; world: its part for that.")] = "world",
    path: Annotated[str, typer.Option("--path", help="Its file, where it needs one.")] = "",
    skip: Annotated[
        int | None,
        typer.Option(
            "--skip",
            min=0,
            help="Leave out the first records, those of studies (default: 1000; world: 0, it has a part for training)",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="How many edits to train on (default: all)")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="The cache folder (default: $RAYSYS_CACHE)")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16 or float16: that of the study; an editor fits one.")
    ] = "float32",
    device: Device = "cpu",
) -> None:
    """Train the network that a method needs for a model (MEND, MALMEN, RLEdit, SERAC) and keep it in the cache.

    A part of the edits is held back to validate with; training ends early when that gets no better. Interrupted, the
    same command goes on from the last checkpoint. Settings of training: training.KEY=VALUE.

    A study edits the first records of its data, so the first 1000 are not trained on; give --skip 0 for a file that no
    study edits.

    Examples: raysys train-editor malmen world/small; raysys train-editor mend path/to/model --dataset zsre --path
    zsre_mend_train.json --skip 0 --dtype bfloat16 training.steps=20000
    """
    given = shared.chosen(settings)
    changes = given.pop("training", {})
    if not isinstance(changes, dict):
        raise ValueError("training: give its settings one by one, such as training.steps=1000")
    from raysys import names, training

    editor = names.build(names.method(method), given, f"method {method}")
    training.check(method, editor, changes)
    err = shared.stderr()
    part = {"part": "training"} if dataset == "world" else {}
    if skip is None:
        skip = 0 if part else training.SKIP
    found = shared.cases(dataset, path, **part)
    cases = training.cases(found, skip, count, lambda text: err.print(text, markup=False, soft_wrap=True))
    loaded = shared.model(model, device, dtype)
    file, last = training.train(editor, loaded, cases, changes, cache, err)
    try:
        editor.prepare(loaded, cache)
    except ValueError as error:
        shared.warn(str(error))
    shared.say(f"{file}: {method} for {model}, trained on {len(cases)} edits; {last}")
