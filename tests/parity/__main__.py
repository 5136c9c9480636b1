"""`python -m tests.parity [--model FOLDER] [--data FOLDER] [--limit N] [--benchmarks a,b] [--chat]`: lm_eval beside us.

Both score the same items with the same network in one process, one thread, float32. Compared: prompts, likelihoods
(1e-4, or a millionth beyond 100 nats), predictions, generated text to the character, aggregates and standard errors (6
digits). Left out, listed and at most 1 %: near-ties, items whose two best logits are within 1e-4 where the two first
differ. Without --model: tiny models made on the spot from seeds, and the built-in one. With `--chat` all is asked
through the model's chat template (one is given to a model that has none), with `--chat joined` in one message. The last
line is `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import torch
from rich.console import Console
from rich.table import Table

from raysys.chat import DAY, Chat
from raysys.model import Model
from raysys.types import Generate
from tests.parity import models
from tests.parity.compare import BATCH, Found, compare
from tests.parity.forms import FORMS, Form
from tests.templates import MARKED

SHOWN = 5  # faults of one comparison
SHARED = Path(os.environ.get("RAYSYS_SHARED", Path(__file__).parents[2] / ".." / "shared"))


def main() -> int:
    """Compare, print, and return how many failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model folder, or world/small (default: two tiny ones and that)")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder in the layouts of the releases")
    parser.add_argument("--limit", type=int, help="items of a task (MMLU: of a subject, BBH: of a subtask)")
    parser.add_argument("--benchmarks", default="", help="names, or starts of forms: mmlu,bbh zeroshot")
    parser.add_argument("--chat", nargs="?", const="turns", choices=("turns", "joined"), help="apply chat templates")
    args = parser.parse_args()
    chat = Chat(multiturn=args.chat == "turns") if args.chat else None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    starts = tuple(filter(None, args.benchmarks.split(",")))
    forms = [f for f in FORMS if not starts or f.name.startswith(starts)]
    console, told = Console(width=140), Console(stderr=True, highlight=False)
    table = Table("model", "data", "form", "items", "largest gap", "near-ties", "first metric ± error", "seconds", "")
    passed = failed = 0
    for model, place, form in runs(args.model, args.data, forms):
        if model.max_length <= (room := longest(form, place)):
            told.print(f"{model.name}, {form.name}: left out, {room} tokens are more than it can generate")
            continue
        started = time.monotonic()
        if chat and not model.tokenizer.chat_template:
            model.tokenizer.chat_template = MARKED
        found = compare(model, peer(model), form, place, args.limit, chat)
        bad = bool(found.faults)
        passed, failed = passed + (not bad), failed + bad
        shown = "world" if place == "world" else "release"
        told.print(
            f"{model.name}, {form.name}: {'differs' if bad else 'same'} after {time.monotonic() - started:.0f} s"
        )
        row(table, model.name, shown, form, found, time.monotonic() - started)
        for text in found.faults[:SHOWN]:
            console.print(f"{model.name}, {form.name}: {text}", markup=False)
        for tie in found.ties:
            console.print(f"{model.name}, {form.name}: near-tie {tie}", markup=False)
    console.print(table)
    console.print(f"{passed} passed, {failed} failed")
    return failed


def runs(name: str | None, data: Path, forms: list[Form]) -> Iterator[tuple[Model, str, Form]]:
    """Every comparison: real items with each model, the world's with the built-in one."""
    words = SHARED / "data" / "tokenizers"
    made = [Model.load(name)] if name else [models.gpt2(words), models.neox(words)]
    world = Model.load("world/small") if name is None else None
    for model in made:
        yield from ((model, str(data / form.folder), form) for form in forms)
    if world is not None:
        yield from ((world, str(data / form.folder), form) for form in forms)
        for form in (f for f in forms if f.world):
            yield world, "world", form


def longest(form: Form, place: str) -> int:
    """Tokens that a form generates at most, 0 for one that chooses."""
    query = next(iter(form.ours(place, 1).queries()))
    return query.max_tokens if isinstance(query, Generate) else 0


def peer(model: Model) -> object:
    """The harness' own model around the same network."""
    from lm_eval.models.huggingface import HFLM

    day = {"date_string": DAY.strftime("%d %b %Y")}  # our templates have a clock that stands still
    return HFLM(
        pretrained=model.net, tokenizer=model.tokenizer, batch_size=BATCH, max_length=model.max_length,
        chat_template_args=day,
    )  # fmt: skip


def row(table: Table, model: str, data: str, form: Form, found: Found, seconds: float) -> None:
    """One line of the table."""
    first = next(iter(found.values.values()), None)
    shown = f"{first[0]:.6f} ± {first[1]:.6f}" if first else ""
    gap = f"{found.gap:.1e}" if found.gap else ""
    end = "differs" if found.faults else "same"
    table.add_row(model, data, form.name, str(found.items), gap, str(len(found.ties)), shown, f"{seconds:.0f}", end)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
