"""The forms of every benchmark: our settings, and the harness' own tasks with the same rows instead of the hub's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bbh_prompts, commonsense_qa, gsm8k, mmlu, sources, toxigen, trivia_qa, truthful_qa
from benchmarks.bbh import Bbh
from benchmarks.mmlu import Mmlu
from raysys import names

Rows = list[dict[str, Any]]
SHOT_SEED = 1234
Parts = Callable[["Form", str, int | None], dict[str, Any]]  # -> the harness' tasks by our group


@dataclass(frozen=True, kw_only=True)
class Form:
    """`metrics`: ours -> the harness' (filter, metric). `limit`: items of a group by default."""

    name: str
    benchmark: str
    folder: str
    parts: Parts
    metrics: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    shots: int = 0
    limit: int = 200
    world: bool = True

    def ours(self, data: str, limit: int | None) -> Any:
        """Our benchmark."""
        made = {**self.settings, "data": data, "limit": limit or self.limit}
        if data == "world":
            made.pop("subjects", None)  # it has its own
        return names.build(names.benchmark(self.benchmark), made, self.name)


def task(file: str, splits: Mapping[str, Rows], shots: int | None, **changes: Any) -> Any:
    """The harness' own task with these rows; its requests are not built yet."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(str(Path(lm_eval.__file__).parent / "tasks" / file), resolve_func=True)
    tables = {split: Dataset.from_list(rows) for split, rows in splits.items()}
    if not shots and (train := config.get("training_split")):
        tables.setdefault(train, next(iter(tables.values())).select([0]))  # opened, and nothing of it shown
    config |= {"custom_dataset": lambda **_: tables, **changes}
    made = ConfigurableTask(config=config if shots is None else {**config, "num_fewshot": shots})
    made.set_fewshot_seed(SHOT_SEED)
    return made


def subjects(form: Form, data: str, limit: int | None, *, folder: str) -> dict[str, Any]:
    """MMLU: one task a subject."""
    found = sources.splits("mmlu", data, mmlu.HUB, ("dev", "test"), Mmlu()._original)
    dev, test = mmlu.by_subject(found["dev"]), mmlu.by_subject(found["test"])
    made = {}
    for subject in sorted(test if data == "world" else form.settings["subjects"]):
        known = data != "world"
        file = f"{folder}/mmlu_{subject if known else 'abstract_algebra'}.yaml"
        changes = {} if known else {"description": mmlu.header(subject)}
        rows = {"dev": plain(dev[subject]), "test": plain(test[subject])}
        made[subject] = task(file, rows, form.shots, **changes)
    return made


def one(
    form: Form, data: str, limit: int | None, *, file: str, hub: Any, splits: tuple[str, ...], original: Any = None
) -> dict[str, Any]:
    """A benchmark that is one task."""
    found = sources.splits(form.benchmark, data, hub, splits, original)
    rows = {split: plain(placed) for split, placed in found.items()}
    if form.benchmark == "toxigen":
        rows = {split: rated(placed) for split, placed in found.items()}
    return {"": task(file, rows, form.shots)}


def subtasks(form: Form, data: str, limit: int | None) -> dict[str, Any]:
    """BIG-Bench Hard: one task a subtask."""
    ours = Bbh(data=data, subtasks=form.settings.get("subtasks", ()))
    kind = form.settings["form"]
    return {name: task(f"bbh/{kind}/{name}.yaml", {"test": plain(rows)}, None) for name, rows in ours._tables().items()}


def plain(placed: Any) -> Rows:
    return [dict(row.row) for row in placed]


def rated(placed: Any) -> Rows:
    """Labels as ratings, since the release has no others; for the harness reads ratings."""
    return [
        {"text": r.row["text"], "toxicity_ai": 5.0 * toxigen.hateful(r), "toxicity_human": 5.0 * toxigen.hateful(r)}
        for r in placed
    ]


SOME = (
    "abstract_algebra", "anatomy", "astronomy", "high_school_us_history", "international_law", "marketing",
    "moral_scenarios", "professional_law", "us_foreign_policy", "virology",
)  # fmt: skip
ACC, NORM = ("none", "acc"), ("none", "acc_norm")
TWO = {"accuracy": ("strict-match", "exact_match"), "flexible": ("flexible-extract", "exact_match")}
MMLU = {"benchmark": "mmlu", "folder": "mmlu", "limit": 20}
_GSM = {"hub": gsm8k.HUB}


def _mmlu(name: str, kind: str, shots: int, metrics: Mapping[str, tuple[str, str]], **more: Any) -> Form:
    folder = {"letters": "mmlu/default"}.get(kind, f"mmlu/{kind}")
    settings = {"form": kind, "shots": shots, "subjects": SOME}
    parts = partial(subjects, folder=folder)
    return Form(name=name, parts=parts, metrics=metrics, settings=settings, shots=shots, **MMLU, **more)


def _qa(name: str, file: str, metrics: Mapping[str, tuple[str, str]], where: Any, **more: Any) -> Form:
    return Form(name=name, parts=partial(one, file=file, **where), metrics=metrics, **more)


_CSQA = {"hub": commonsense_qa.HUB, "splits": ("train", "validation"), "original": commonsense_qa.release_rows}
_MC = {"hub": truthful_qa.MULTIPLE_CHOICE, "splits": ("validation",), "original": truthful_qa.mc_rows}
_GEN = {"hub": truthful_qa.GENERATION, "splits": ("validation",), "original": truthful_qa.csv_rows}
_TRUE: dict[str, Any] = {"benchmark": "truthful_qa", "folder": "truthfulqa"}
OVERLAP = {
    f"{m}_{k}": ("none", f"{m}_{k}") for m in ("bleu", "rouge1", "rouge2", "rougeL") for k in ("max", "acc", "diff")
}
BBH_FILTERS: dict[str, dict[str, tuple[str, str]]] = {
    "cot_fewshot": {"accuracy": ("get-answer", "exact_match")},
    "fewshot": {"accuracy": ("none", "exact_match")},
    "cot_zeroshot": TWO,
    "zeroshot": TWO,
}
FORMS = (
    _mmlu("mmlu letters, 0 shots", "letters", 0, {"accuracy": ACC}),
    _mmlu("mmlu letters, 5 shots", "letters", 5, {"accuracy": ACC}),
    _mmlu("mmlu continuation, 0 shots", "continuation", 0, {"accuracy": ACC, "accuracy_norm": NORM}, world=False),
    _mmlu("mmlu generative, 0 shots", "generative", 0, {"accuracy": ("get_response", "exact_match")}, world=False),
    _qa("commonsense_qa, 0 shots", "commonsense_qa/default.yaml", {"accuracy": ACC}, _CSQA,
        benchmark="commonsense_qa", folder="commonsenseqa", settings={"shots": 0}),
    _qa("commonsense_qa, 7 shots", "commonsense_qa/default.yaml", {"accuracy": ACC}, _CSQA,
        benchmark="commonsense_qa", folder="commonsenseqa", settings={"shots": 7}, shots=7),
    _qa("truthful_qa mc1", "truthfulqa/truthfulqa_mc1.yaml", {"accuracy": ACC}, _MC, settings={"form": "mc1"}, **_TRUE),
    _qa("truthful_qa mc2", "truthfulqa/truthfulqa_mc2.yaml", {"mc2": ACC}, _MC, settings={"form": "mc2"}, **_TRUE),
    _qa("toxigen", "toxigen/toxigen.yaml", {"accuracy": ACC, "accuracy_norm": NORM},
        {"hub": toxigen.HUB, "splits": ("test",), "original": toxigen.release_rows}, benchmark="toxigen",
        folder="toxigen"),
    _qa("trivia_qa", "triviaqa/default.yaml", {"accuracy": ("remove_whitespace", "exact_match")},
        {"hub": trivia_qa.HUB, "splits": ("validation",), "original": trivia_qa.dpr_rows}, benchmark="trivia_qa",
        folder="triviaqa"),
    _qa("gsm8k, 5 shots", "gsm8k/gsm8k.yaml", TWO, {**_GSM, "splits": ("train", "test")}, benchmark="gsm8k",
        folder="gsm8k", settings={"shots": 5}, shots=5),
    _qa("gsm8k cot, 8 shots", "gsm8k/gsm8k-cot.yaml", TWO, {**_GSM, "splits": ("test",)}, benchmark="gsm8k",
        folder="gsm8k", settings={"form": "cot"}, shots=8, world=False),
    _qa("truthful_qa generation", "truthfulqa/truthfulqa_gen.yaml", OVERLAP, _GEN, settings={"form": "generation"},
        world=False, **_TRUE),
    *(Form(name=f"bbh {kind}", benchmark="bbh", folder="bbh", parts=subtasks, metrics=metrics,
           settings={"form": kind}, limit=8, world=False) for kind, metrics in BBH_FILTERS.items()),
)  # fmt: skip
assert len(bbh_prompts.SUBTASKS) == 27
