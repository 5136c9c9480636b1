"""`raysys harness`: lm-evaluation-harness itself, with our engine as its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raysys import cli_shared as shared
from raysys.cli_shared import EXITS, Device

harness = typer.Typer()


@harness.command("harness", epilog=EXITS)
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or world/small.")],
    tasks: Annotated[str, typer.Option("--tasks", help="Tasks, groups or tags of lm_eval, or YAML files: a,b,c")],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="A folder with tasks of your own (YAML).")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples before every question (default: the tasks').")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each task, at most.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=0, help="Rows of a pass (default, 0: as many as fit).")] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the results here, as JSON.")] = None,
    samples: Annotated[bool, typer.Option("--log-samples", help="With every question and answer in it.")] = False,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask as messages, by the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system-instruction", help="What stands before every description.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Answer greedily where a task samples.")] = False,
    softmax: Annotated[
        str, typer.Option("--softmax", help="float32, or model: log-probabilities in the model's number type.")
    ] = "float32",
    unsafe: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run the code that the model writes.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
) -> None:
    """Run tasks of lm-evaluation-harness with our engine, and print its results. Needs the extra `harness`.

    Everything but the model is lm_eval's own: prompts, filters, metrics, standard errors. What contexts begin with
    alike is computed once. To follow tasks over edits, give a study the benchmark "harness".

    Examples: raysys harness path/to/model --tasks arc_easy,piqa --limit 100; raysys harness world/small --tasks my.yaml
    """
    from benchmarks.harness_tasks import find

    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    if not wanted:
        raise ValueError("--tasks: name a task, such as arc_easy, or a YAML file")
    if softmax not in ("float32", "model"):
        raise ValueError(f"--softmax {softmax}: float32 or model")
    if output is not None and not output.resolve().parent.is_dir():
        raise ValueError(f"--output {output}: no folder {str(output.parent)!r}")
    found = find(wanted, include_path)  # before the model is loaded, which takes longer
    loaded = shared.model(model, device, dtype)
    from raysys.harness import dumps, evaluate, table

    results = evaluate(
        loaded, found, batch_size=batch or "auto", softmax=softmax, greedily=greedy, num_fewshot=shots, limit=limit,
        log_samples=samples, apply_chat_template=chat, system_instruction=system, confirm_run_unsafe_code=unsafe,
    )  # fmt: skip
    if output is not None:
        output.write_text(dumps(results), encoding="utf-8")
    shared.say(table(results))
