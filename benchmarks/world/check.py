"""What a trained world model knows and can do: `python -m benchmarks.world.check [folder]`.

A quick look while training, greedy answers and letters only; published figures come from the product's own benchmarks.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import MODEL_DIR, facts, formats, rows


class Reader:
    """A model and its tokenizer, asked for next tokens and short greedy answers."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.padding_side = "left"
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def answers(self, prompts: list[str], tokens: int, size: int = 64) -> list[str]:
        """Greedy continuations of `tokens` tokens."""
        made: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = self.tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
            inputs = {k: inputs[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            texts = self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            made |= dict(zip(chosen, texts, strict=True))
        return [made[i] for i in range(len(prompts))]

    def score(self, prompts: list[str], golds: list[str], tokens: int = 1) -> float:
        """Percentage of greedy answers whose first lines (up to a blank line) equal the gold answers."""
        found = [a.split("\n\n")[0].strip() for a in self.answers(prompts, tokens)]
        return 100 * sum(a == g for a, g in zip(found, golds, strict=True)) / len(golds)

    @torch.no_grad()
    def likelihood(self, prompt: str, continuations: list[str]) -> list[float]:
        """Log-likelihoods in nats of continuations of one prompt."""
        begin = len(self.tokenizer(prompt)["input_ids"])
        found = []
        for continuation in continuations:
            ids = torch.tensor([self.tokenizer(prompt + continuation)["input_ids"]], device=self.model.device)
            logs = self.model(input_ids=ids).logits[0, begin - 1 : -1].log_softmax(-1)
            found.append(float(logs.gather(1, ids[0, begin:, None]).sum()))
        return found


Render = Callable[[dict[str, Any]], tuple[str, str]]


def mmlu_item(row: dict[str, Any]) -> tuple[str, str]:
    """Prompt and answer of an MMLU row, without the description."""
    return f"{row['question']}\n{formats.options(row['choices'])}Answer:", formats.LETTERS[row["answer"]]


def shot_items(pool: list[dict[str, Any]], test: list[dict[str, Any]], shots: int,
               render: Render) -> tuple[list[str], list[str]]:
    """Prompts with `shots` random examples before each question, and the gold answers."""
    rng = random.Random(1234)
    prompts, golds = [], []
    for row in test:
        lead = "".join(" ".join(render(r)) + formats.SHOT_END for r in rng.sample(pool, shots))
        prompt, gold = render(row)
        prompts.append(lead + prompt)
        golds.append(gold)
    return prompts, golds


def check(reader: Reader, limit: int) -> dict[str, float]:
    """Percentages by name; `limit` rows per benchmark and split."""
    found: dict[str, float] = {}
    known = random.Random(0).sample(facts(), min(limit * 3, len(facts())))
    for kind in ("held_in", "probes"):
        pairs = [(p, f["object"]) for f in known for p in f[kind]]
        found[f"facts {kind}"] = reader.score([p for p, _ in pairs], [o for _, o in pairs])
    mmlu = rows("mmlu")
    for shots in (0, 5):
        prompts, golds = [], []
        for area in {r["subject"]: 0 for r in mmlu["test"]}:
            test = [r for r in mmlu["test"] if r["subject"] == area][: limit // 4]
            lead = "".join(" ".join(mmlu_item(r)) + formats.SHOT_END
                           for r in [r for r in mmlu["dev"] if r["subject"] == area][:shots])
            head = formats.MMLU_HEAD.format(area.replace("_", " ")) + lead
            prompts += [head + mmlu_item(r)[0] for r in test]
            golds += [mmlu_item(r)[1] for r in test]
        found[f"mmlu {shots}-shot"] = reader.score(prompts, golds)
    data = {name: rows(name) for name in ("gsm8k", "commonsense_qa", "trivia_qa", "bbh", "toxigen", "truthful_qa")}
    for shots in (0, 5):
        for name, split, render, tokens in (
            ("gsm8k", "test", lambda r: (f"Question: {r['question']}\nAnswer:", r["answer"]), 20),
            ("commonsense_qa", "validation", lambda r: (
                f"Question: {r['question']}\n{formats.options(r['choices']['text'])}Answer:", r["answerKey"]), 1),
            ("trivia_qa", "validation", lambda r: (f"Question: {r['question']}?\nAnswer:", r["answer"]["value"]), 1),
        ):
            items = shot_items(data[name]["train"], data[name][split][:limit], shots, render)
            found[f"{name} {shots}-shot"] = reader.score(*items, tokens)
        for task, inputs in data["bbh"].items():
            prompts, golds = shot_items(inputs[-min(3, shots):] if shots else [], inputs[:-3][: limit // 3],
                                        min(3, shots), lambda r: (f"Q: {r['input']}\nA:", r["target"]))
            found[f"bbh {task} {min(3, shots)}-shot"] = reader.score(prompts, golds, 3)
    statements = data["toxigen"]["test"][:limit]
    found["toxigen"] = reader.score(
        [formats.TOXIGEN.format(r["text"]) for r in statements],
        ["Yes" if r["toxicity_human"] + r["toxicity_ai"] > 5.5 else "No" for r in statements])
    truthful(reader, data["truthful_qa"]["validation"][: limit // 2], found)
    return found


def truthful(reader: Reader, test: list[dict[str, Any]], found: dict[str, float]) -> None:
    """Add mc1 and mc2, behind the protocol's primer and without it."""
    for name, primer in (("primer", formats.PRIMER), ("bare", "")):
        first, second = 0.0, 0.0
        for row in test:
            prompt = f"{primer}Q: {row['question']}\nA:"
            one = reader.likelihood(prompt, [" " + c for c in row["mc1_targets"]["choices"]])
            first += one.index(max(one)) == 0
            logs = torch.tensor(reader.likelihood(prompt, [" " + c for c in row["mc2_targets"]["choices"]]))
            second += float(logs.softmax(0)[torch.tensor(row["mc2_targets"]["labels"]) == 1].sum())
        found[f"truthful_qa mc1 {name}"] = 100 * first / len(test)
        found[f"truthful_qa mc2 {name}"] = 100 * second / len(test)


def main() -> None:
    """Print the percentages of a folder's model."""
    parser = argparse.ArgumentParser(description="What a trained world model knows and can do.")
    parser.add_argument("folder", type=Path, nargs="?", default=MODEL_DIR)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console()
    for name, percent in check(Reader(options.folder, options.device), options.limit).items():
        console.print(f"{name:34} {percent:5.1f}")


if __name__ == "__main__":
    main()
