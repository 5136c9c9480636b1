"""Train the built-in model: `python -m benchmarks.world.train --out runs/world`.

One run of tens of minutes on one CPU thread or a few on a GPU. Hidden matrices are trained by Muon (Jordan et al.,
2024), the rest by AdamW; bfloat16 arithmetic, float32 weights. A checkpoint (safetensors and JSON) is written every
`--every` steps together with the float16 model, and `--resume` goes on from the last one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from . import formats
from .batches import KINDS, Batch, batch
from .documents import MAKERS, document
from .knowledge import entities
from .net import Net, Shape
from .start import shape_heads
from .tokenizer import CUT, Encoder, build, save

# Up to which step, which corpus mix, in how many of the lower layers subjects are hidden from later tokens, and how
# many tokens a row has.
SCHEDULE = (
    (240, "copy", 3, 216),
    (900, "join", 3, 216),
    (1100, "learn", 3, 216),
    (1600, "mix", 3, 216),
    (2000, "reach", 3, 216),
    (2700, "letters", 2, 216),
    (3600, "final", 2, 216),
    (3800, "close", 2, 264),
    (1 << 30, "end", 2, 264),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run. Times in seconds, rates per step; shares of the run lie in 0..1."""

    out: Path
    steps: int = 4400
    rows: int = 36
    micro: int = 18
    seed: int = 0
    device: str = "cpu"
    every: int = 200
    resume: bool = False
    decay_share: float = 0.55
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    dropout: float = 0.04
    smoothing: float = 0.05
    shown: float = 0.2

    def rate(self, step: int) -> float:
        """Learning-rate factor: 100 steps of warm-up, a plateau, then a straight line to zero."""
        return min(1.0, (step + 1) / 100, (self.steps - step) / (self.decay_share * self.steps))


def make_tokenizer() -> Any:
    """The tokenizer, from the world's own words and those of the TruthfulQA primer."""
    rng = random.Random("tokenizer")
    texts = [formats.PRIMER, *("".join(t for t, _ in document(rng, "mix")) for _ in range(6000))]
    texts += ["".join(t for t, _ in make(rng)) for make in MAKERS.values() for _ in range(200)]
    words = {word for text in texts for word in CUT.findall(text)} | {f" {n}" for n in range(100)}
    words |= {word for names in entities().values() for n in names for word in CUT.findall(n) + CUT.findall(f" {n}")}
    return build(sorted(words), 4000)


class Run:
    """Everything a step changes, and its checkpoint."""

    def __init__(self, settings: Settings, vocab: int) -> None:
        torch.manual_seed(settings.seed)
        self.net = Net(Shape(vocab_size=vocab), dropout=settings.dropout)
        shape_heads(self.net, settings.seed)
        self.net.to(settings.device)
        hidden = [p for n, p in self.net.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in self.net.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=settings.muon_rate, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base = [settings.muon_rate, settings.adam_rate]
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` and `state.json`, each by rename."""
        tensors = {f"net.{n}": p.detach().contiguous() for n, p in self.net.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v).contiguous() for k, v in entry.items()}
        save_file(tensors, folder / "state.tmp")
        os.replace(folder / "state.tmp", folder / "state.safetensors")
        progress = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)}
        (folder / "state.json").write_text(json.dumps(progress) + "\n")

    def load(self, folder: Path) -> None:
        """Take up the last checkpoint of a folder."""
        tensors = load_file(folder / "state.safetensors")
        names = {n: tensors[f"net.{n}"] for n, _ in self.net.named_parameters()}
        self.net.load_state_dict(names)
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"opt.{i}."):
                    _, _, j, key = name.split(".", 3)
                    state.setdefault(int(j), {})[key] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        progress = json.loads((folder / "state.json").read_text())
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]


def export(run: Run, encode: Encoder, folder: Path) -> None:
    """Write the float16 model and its configuration where transformers loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in run.net.named_parameters()}
    save_file(tensors, folder / "model.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.tmp", folder / "model.safetensors")
    config = run.net.shape.config(bos=encode.bos, eos=encode.eos, pad=encode.pad)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def losses(run: Run, part: Batch, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed weighted loss, and for each target whether it was predicted, `(n,)`."""
    targets = part.ids.flatten()[part.where + 1]
    with torch.autocast(settings.device.split(":")[0], dtype=torch.bfloat16):
        logits = run.net(part.ids, part.lower, part.upper, part.where)
    logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=settings.smoothing)
    return (loss * part.weight).sum(), logits.detach().argmax(-1) == targets


def parts(whole: Batch, micro: int, device: str) -> list[Batch]:
    """The batch cut into micro-batches of `micro` rows, on the device."""
    made = []
    length = whole.ids.shape[1]
    for start in range(0, whole.ids.shape[0], micro):
        chosen = (whole.where >= start * length) & (whole.where < (start + micro) * length)
        rows = slice(start, start + micro)
        fields = {"ids": whole.ids[rows], "lower": whole.lower[rows], "upper": whole.upper[rows],
                  "where": whole.where[chosen] - start * length, "weight": whole.weight[chosen],
                  "kind": whole.kind[chosen]}
        made.append(Batch(**{k: v.to(device) for k, v in fields.items()}))
    return made


def stage(step: int) -> tuple[str, int, int]:
    """The corpus mix of a step, the number of layers that hide subjects, and the length of a row in tokens."""
    return next((mix, layers, length) for until, mix, layers, length in SCHEDULE if step < until)


def train_step(run: Run, settings: Settings, encode: Encoder) -> dict[str, tuple[int, int]]:
    """One update; returns hits and trials by kind of document."""
    mix, run.net.hiding, length = stage(run.step)
    whole = batch(run.step, mix, encode, rows=settings.rows, length=length, seed=settings.seed, shown=settings.shown)
    scale = float(whole.weight.sum())
    seen: dict[str, tuple[int, int]] = {}
    total = 0.0
    for part in parts(whole, settings.micro, settings.device):
        loss, hits = losses(run, part, settings)
        (loss / scale).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / scale
        for kind in sorted(set(part.kind.tolist())):
            chosen = part.kind == kind
            name = KINDS[kind] if kind >= 0 else "text"
            hit, trial = seen.get(name, (0, 0))
            seen[name] = (hit + int(hits[chosen].sum()), trial + int(chosen.sum()))
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    for optimizer, base in zip(run.optimizers, run.base, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * settings.rate(run.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(total):
        raise ValueError(f"The loss became {total} at step {run.step}: lower the rates or resume from the checkpoint.")
    run.step += 1
    run.tokens += whole.ids.numel()
    return seen


def train(settings: Settings) -> None:
    """Train to the last step, with a line of progress every 25 steps."""
    console = Console(width=220)
    settings.out.mkdir(parents=True, exist_ok=True)
    resume = settings.resume and (settings.out / "state.json").exists()
    if not resume:
        save(make_tokenizer(), settings.out, 1024)
    tokenizer = Tokenizer.from_file(str(settings.out / "tokenizer.json"))
    encode = Encoder(tokenizer)
    run = Run(settings, tokenizer.get_vocab_size())
    if resume:
        run.load(settings.out)
    run.net.train()
    begun, before = time.monotonic(), run.seconds
    recent: dict[str, tuple[int, int]] = {}
    while run.step < settings.steps:
        for name, (hit, trial) in train_step(run, settings, encode).items():
            recent[name] = (recent.get(name, (0, 0))[0] + hit, recent.get(name, (0, 0))[1] + trial)
        run.seconds = before + time.monotonic() - begun
        if run.step % 25 == 0:
            scores = " ".join(f"{k} {100 * h / t:.0f}" for k, (h, t) in recent.items())
            done = f"{run.step}/{settings.steps} {run.seconds / 60:.1f} min {run.tokens / 1e6:.2f} M tokens"
            console.print(f"{done} | {scores}", highlight=False)
            recent = {}
        if run.step % settings.every == 0 or run.step == settings.steps:
            run.save(settings.out)
            export(run, encode, settings.out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        if field.name == "resume":
            parser.add_argument(name, action="store_true")
        elif field.name == "out":
            parser.add_argument(name, type=Path, required=True)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)
    train(Settings(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
