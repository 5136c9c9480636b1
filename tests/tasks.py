"""A folder of tasks of lm-evaluation-harness with data of their own, for tests: one of every kind."""

from __future__ import annotations

import json
from pathlib import Path

PEOPLE = ("Anna", "Bert", "Carla", "Dora")
CITIES = ("Rome", "Paris", "Oslo", "Lima")
ROWS = 24
MEAN = "    aggregation: mean\n    higher_is_better: true\n"
ACC = f"metric_list:\n  - metric: acc\n{MEAN}"
KINDS = {
    "t_choice": f"""
        output_type: multiple_choice
        description: "The capital of Norway is Oslo . The capital of Peru is Lima . You were born in Rome . "
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: "{{{{options}}}}"
        doc_to_target: gold
        {ACC}  - metric: acc_norm\n{MEAN}""",
    "t_long": f"""
        output_type: multiple_choice
        description: "{"The capital of Norway is Oslo . " * 12}"
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: "{{{{options}}}}"
        doc_to_target: gold
        {ACC}""",
    "t_inputs": f"""
        output_type: multiple_choice
        doc_to_text: gold
        doc_to_choice: "{{{{ [question + ' ' + options[0], question + ' ' + options[1] + ' and Lima'] }}}}"
        doc_to_target: "or the tower works as a pilot"
        {ACC}""",
    "t_last": f"""
        output_type: loglikelihood
        doc_to_text: "{{{{question}}}}"
        doc_to_target: " {{{{answer}}}}"
        {ACC}""",
    "t_text": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: answer
        generation_kwargs: {until: ["a", "."], max_gen_toks: 10, do_sample: false, temperature: 0.0}
        filter_list:
          - name: start
            filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]
          - name: none
            filter: [{function: take_first}]
        metric_list:
          - metric: exact_match
            aggregation: mean
            higher_is_better: true
            ignore_case: true
        """,
    "t_whole": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: text
        """,
    "t_f1": f"""
        output_type: multiple_choice
        doc_to_text: "{{{{question}}}}"
        doc_to_choice: "{{{{options}}}}"
        doc_to_target: gold
        {ACC}  - metric: f1\n    aggregation: f1\n    higher_is_better: true\n""",
    "t_sampled": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: answer
        generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: true, temperature: 0.7}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        """,
}


def write(folder: Path) -> Path:
    """The tasks (`KINDS`), a group of two of them, and their rows: `ROWS` to be asked, four to be shown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps([row(i) for i in range(ROWS)]))
    (folder / "shown.json").write_text(json.dumps([row(i) for i in range(ROWS, ROWS + 4)]))
    files = f"{{test: {folder / 'rows.json'}, train: {folder / 'shown.json'}}}"
    for name, text in KINDS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}, cache_dir: {folder / 'cache'}}}\n"
        splits = "test_split: test\ntraining_split: train\nfewshot_split: train\n"
        lines = [line.removeprefix(" " * 8) for line in text.splitlines()]
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}{splits}" + "\n".join(lines))
    (folder / "t_group.yaml").write_text("group: t_group\ntask: [t_choice, t_last]\n")
    return folder


def row(i: int) -> dict[str, object]:
    """A record: some end like others, some are long."""
    return {
        "question": f"{PEOPLE[i % 4]} was born in the{' city' * (i % 3)} of",
        "options": [CITIES[i % 4], f"the {CITIES[(i + 1) % 4]}", f"{CITIES[(i + 2) % 4]} and {CITIES[i % 3]}"],
        "gold": i % 2,
        "answer": CITIES[i % 4] if i % 2 else f"{CITIES[i % 4]} , Norway",
        "text": f"{PEOPLE[i % 4]} works as a pilot in {CITIES[(i * 3) % 4]} . " * (1 + i % 12),
    }
