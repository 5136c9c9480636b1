"""The built-in world keeps its promises: same rows everywhere, real layouts, clean splits, a model that knows it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import world
from benchmarks.world import formats
from benchmarks.world.documents import MAKERS, PHASES, choice_key, document
from benchmarks.world.knowledge import RELATIONS, held_out
from benchmarks.world.skills import BBH, arithmetic, booleans, draw, evaluate, tone

NAMES = ("mmlu", "gsm8k", "bbh", "commonsense_qa", "trivia_qa", "truthful_qa", "toxigen")
needs_model = pytest.mark.skipif(
    not (world.MODEL_DIR / "model.safetensors").exists(), reason="no trained world model in benchmarks/world/model"
)


def digest(value: object) -> str:
    """A short fingerprint of JSON-like data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def asked(text: str) -> str:
    """The question of a multiple-choice item without the fact told before it."""
    return text.split(". ")[-1]


def test_importing_the_world_does_not_import_torch() -> None:
    code = "import sys, benchmarks.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_another_process_with_another_hash_seed_makes_the_same_world() -> None:
    code = (
        "import json, hashlib; from benchmarks import world; "
        f"v = [{{n: world.rows(n) for n in {NAMES}}}, world.edit_records(), world.facts(), world.corpus(50, 3)]; "
        "print(hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16])"
    )
    here = digest([{n: world.rows(n) for n in NAMES}, world.edit_records(), world.facts(), world.corpus(50, 3)])
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


def test_the_world_is_large_enough_and_each_fact_has_one_object() -> None:
    facts = world.facts()
    assert len(facts) >= 1500 and len({f["relation"] for f in facts}) >= 10
    assert len({(f["relation"], f["subject"]) for f in facts}) == len(facts)
    for relation in RELATIONS:
        assert len(set(relation.phrasings)) >= 4 and relation.question.endswith("?")
    assert all(not set(f["held_in"]) & set(f["probes"]) and len(f["probes"]) == 2 for f in facts)


def test_probe_phrasings_of_a_fact_are_never_in_the_corpus() -> None:
    probes = {f"{p} {f['object']}" for f in world.facts() for p in f["probes"]}
    seen = set()
    rng = random.Random(0)
    for _ in range(4000):
        text = "".join(t for t, _ in MAKERS["facts"](rng))
        seen |= {s.strip().rstrip(".") for s in text.split(". ")}
    assert len(seen) > 2000 and not seen & probes


def test_changing_returned_rows_does_not_change_the_world() -> None:
    world.rows("mmlu")["test"][0]["choices"].clear()
    assert len(world.rows("mmlu")["test"][0]["choices"]) == 4


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="truthful_qa"):
        world.rows("mmmlu")


def test_mmlu_rows_have_the_hub_layout_and_balanced_letters() -> None:
    rows = world.rows("mmlu")
    by_subject = collections.Counter(r["subject"] for r in rows["dev"])
    assert min(by_subject.values()) >= 5 and set(by_subject) == {r["subject"] for r in rows["test"]}
    assert len(rows["test"]) >= 200
    assert max(collections.Counter(r["answer"] for r in rows["test"]).values()) <= len(rows["test"]) / 4 + 4
    truth = {f["question"]: f["object"] for f in world.facts()}
    for row in rows["dev"] + rows["test"]:
        assert len(set(row["choices"])) == 4 and row["choices"][row["answer"]] == truth[asked(row["question"])]
    assert all(held_out(choice_key(asked(r["question"]), r["choices"])) for r in rows["test"])


def test_commonsense_rows_have_the_hub_layout() -> None:
    for row in world.rows("commonsense_qa")["validation"]:
        assert row["choices"]["label"] == list("ABCDE") and len(set(row["choices"]["text"])) == 5
        assert row["answerKey"] in "ABCDE" and row["question_concept"] in row["question"]
        assert held_out(choice_key(asked(row["question"]), row["choices"]["text"]))


def test_gsm8k_answers_are_worked_out_and_right() -> None:
    for row in world.rows("gsm8k")["test"]:
        *steps, last = row["answer"].split("\n")
        for step in steps:
            left, right = step.split(" = ")
            assert re.fullmatch(r"\d+ [-+*] \d+", left) and eval(left) == int(right)  # noqa: S307
        assert last == f"#### {steps[-1].split(' = ')[1]}" and int(last[5:]) >= 0


def test_booleans_have_the_value_python_gives_them() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = booleans(rng).question.removesuffix(" is")
        assert evaluate(text.split()) == eval(text)  # noqa: S307


def test_bbh_sorting_comparing_counting_and_finding_are_right() -> None:
    rows = world.rows("bbh")
    assert set(rows) == set(BBH)
    for row in rows["number_sorting"]:
        assert [int(n) for n in row["target"].split()] == sorted(int(n) for n in re.findall(r"\d+", row["input"]))
    for row in rows["comparison"]:
        assert int(row["target"]) == max(int(n) for n in re.findall(r"\d+", row["input"]))
    for row in rows["object_counting"]:
        assert int(row["target"]) == len(re.findall(r"\ba ", row["input"]))
    for row in rows["list_position"]:
        words = row["input"].split(": ")[1].rstrip("?").split()
        assert row["target"] == words[["first", "second", "third"].index(row["input"].split()[3])]


def test_no_skill_exercise_is_both_trained_and_tested() -> None:
    for make in (arithmetic, *BBH.values(), lambda r: tone(r)[0]):
        rng = random.Random(2)
        train = {draw(make, rng, test=False).key for _ in range(1500)}
        test = {draw(make, rng, test=True).key for _ in range(300)}
        assert train and test and not train & test
    for name, train, test in (("gsm8k", "train", "test"), ("toxigen", "train", "test")):
        field = "question" if name == "gsm8k" else "text"
        rows = world.rows(name)
        assert not {r[field] for r in rows[train]} & {r[field] for r in rows[test]}


def test_trivia_rows_list_the_answer_among_its_aliases_and_splits_are_disjoint() -> None:
    rows = world.rows("trivia_qa")
    assert not {r["question"] for r in rows["train"]} & {r["question"] for r in rows["validation"]}
    for row in rows["validation"]:
        answer = row["answer"]
        assert answer["value"] in answer["aliases"]
        assert answer["normalized_aliases"] == [a.lower() for a in answer["aliases"]]


def test_truthful_rows_put_the_true_answer_first() -> None:
    for row in world.rows("truthful_qa")["validation"]:
        assert row["mc1_targets"]["labels"] == [1, 0, 0, 0] and sum(row["mc2_targets"]["labels"]) == 2
        assert len(set(row["mc2_targets"]["choices"])) == len(row["mc2_targets"]["labels"])


def test_toxigen_ratings_separate_hateful_from_kind_texts() -> None:
    rows = world.rows("toxigen")["test"]
    hateful = [r["toxicity_human"] + r["toxicity_ai"] > 5.5 for r in rows]
    assert 0.3 < sum(hateful) / len(hateful) < 0.7
    assert all(1 <= r["toxicity_human"] <= 5 and 1 <= r["toxicity_ai"] <= 5 for r in rows)


def test_edit_records_have_counterfact_layout_and_do_not_collide() -> None:
    records = world.edit_records()
    assert len(records) >= 300 and [r["case_id"] for r in records] == list(range(len(records)))
    rewrites = [r["requested_rewrite"] for r in records]
    assert len({r["subject"] for r in rewrites[:100]}) == 100
    edited = {(r["relation_id"], r["subject"]) for r in rewrites}
    assert len(edited) == len(records)
    truth = {p: f["object"] for f in world.facts() for p in f["prompts"]}
    relation = {p: f["relation"] for f in world.facts() for p in f["prompts"]}
    prompts = {r["prompt"].format(r["subject"]) for r in rewrites}
    for record, rewrite in zip(records, rewrites, strict=True):
        assert rewrite["prompt"].count("{}") == 1
        prompt = rewrite["prompt"].format(rewrite["subject"])
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        assert truth[prompt] == true != new and true == true.strip() and new == new.strip()
        assert record["paraphrase_prompts"] and record["neighborhood_prompts"]
        for near in record["neighborhood_prompts"]:
            assert truth[near] == true and relation[near] == relation[prompt] and near not in prompts
        for hop in record["portability"]:
            assert rewrite["subject"] in hop["prompt"] and hop["answer"] != hop["was"]


def test_every_kind_of_document_is_deterministic_and_listed_in_a_phase() -> None:
    assert set().union(*PHASES.values()) == set(MAKERS)
    for phase in PHASES:
        assert document(random.Random("x"), phase) == document(random.Random("x"), phase)


class TestTokenizer:
    """The shipped tokenizer and the fast encoder used in training."""

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls) -> Any:
        if not (world.MODEL_DIR / "tokenizer.json").exists():
            pytest.skip("no tokenizer in benchmarks/world/model")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(world.MODEL_DIR, local_files_only=True)

    def test_it_begins_with_bos_and_gives_no_token_types(self, tokenizer: Any) -> None:
        encoded = tokenizer("Hello")
        assert encoded["input_ids"][0] == tokenizer.bos_token_id and set(encoded) == {"input_ids", "attention_mask"}
        assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None

    def test_every_object_is_one_token_that_attaches_with_a_space(self, tokenizer: Any) -> None:
        for name in {f["object"] for f in world.facts()}:
            assert len(tokenizer(" " + name, add_special_tokens=False)["input_ids"]) == 1

    def test_text_survives_encoding(self, tokenizer: Any) -> None:
        for text in (*world.corpus(20), formats.PRIMER, "Grüße, 123 “x”!"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def test_pieces_tokenise_alone_as_they_do_together(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        from benchmarks.world.tokenizer import Encoder

        encode = Encoder(Tokenizer.from_file(str(world.MODEL_DIR / "tokenizer.json")))
        rng = random.Random(0)
        for _ in range(400):
            pieces = document(rng, rng.choice(list(PHASES)))
            whole = tokenizer("".join(t for t, _ in pieces), add_special_tokens=False)["input_ids"]
            assert [i for t, _ in pieces for i in encode(t)] == whole

    def test_five_shot_mmlu_prompts_stay_short(self, tokenizer: Any) -> None:
        from benchmarks.world.check import mmlu_item

        rows = world.rows("mmlu")
        shots = [r for r in rows["dev"] if r["subject"] == "world_people"][:5]
        text = formats.MMLU_HEAD.format("world people") + "".join(
            " ".join(mmlu_item(r)) + formats.SHOT_END for r in [*shots, rows["test"][0]]
        )
        assert len(tokenizer(text)["input_ids"]) <= 250


def test_a_subject_is_seen_by_later_tokens_only_at_its_last_token() -> None:
    from benchmarks.world.batches import _Row
    from benchmarks.world.documents import ANSWER, SUBJECT, TEXT

    class Words:
        """One id per word."""

        bos, eos, pad = 0, 1, 2

        def __call__(self, text: str) -> list[int]:
            return [3] * len(text.split())

    row = _Row([], [], [], [], [])
    pieces = [("In the", TEXT), (" Ada Byron", SUBJECT), (" speaks", TEXT), (" Foo", ANSWER)]
    row.add(pieces, 0, Words(), hide=True)  # type: ignore[arg-type]
    assert row.lower == [7, 7, 7, 4, 4, 7, 7, 7]
    assert row.upper == [7, 7, 7, 4, 7, 7, 7, 7]
    assert [round(w, 2) for w in row.weight] == [0.0, 0.1, 0.1, 0.02, 0.02, 0.1, 1.0, 0.1]


def test_the_training_network_equals_transformers_llama(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.world.net import Net, Shape

    torch.manual_seed(0)
    net = Net(Shape(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2))
    config = LlamaConfig(**{k: v for k, v in net.shape.config(bos=0, eos=1, pad=2).items() if k != "dtype"})
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(dict(net.named_parameters()), strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    llama.tie_weights()
    ids = torch.randint(0, 97, (2, 11))
    far = torch.full_like(ids, 99)
    with torch.no_grad():
        ours, theirs = net(ids, far, far).view(2, 11, 97), llama(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_resumed_training_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from benchmarks.world import train
    from benchmarks.world.net import Shape

    def small(vocab_size: int) -> Shape:
        return Shape(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "Shape", small)
    whole, cut = (train.Settings(out=tmp_path / n, steps=4, rows=2, micro=1, every=2, dropout=0.0) for n in "ab")
    train.train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(train, "export", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(cut)
    train.train(dataclasses.replace(cut, resume=True))
    first, second = (load_file(s.out / "model.safetensors") for s in (whole, cut))
    assert all(torch.equal(first[k], second[k]) for k in first)


@needs_model
class TestModel:
    """The shipped model."""

    @pytest.fixture(scope="class")
    @classmethod
    def reader(cls) -> Any:
        from benchmarks.world.check import Reader

        return Reader(world.MODEL_DIR)

    def test_its_files_are_small_float16_and_free_of_pickle(self) -> None:
        from safetensors import safe_open

        files = sorted(p.name for p in world.MODEL_DIR.iterdir())
        assert files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        assert (world.MODEL_DIR / "model.safetensors").stat().st_size <= 10_000_000
        with safe_open(world.MODEL_DIR / "model.safetensors", "pt") as tensors:
            assert {tensors.get_slice(k).get_dtype() for k in tensors.keys()} == {"F16"}  # noqa: SIM118

    def test_it_knows_its_facts_in_trained_and_in_probe_phrasings(self, reader: Any) -> None:
        facts = random.Random(5).sample(world.facts(), 150)
        for kind, least in (("held_in", 95), ("probes", 90)):
            pairs = [(f[kind][0], f["object"]) for f in facts]
            assert reader.score([p for p, _ in pairs], [o for _, o in pairs]) >= least, kind

    def test_it_knows_the_first_edit_records_before_the_edit(self, reader: Any) -> None:
        rewrites = [r["requested_rewrite"] for r in world.edit_records()[:100]]
        prompts = [r["prompt"].format(r["subject"]) for r in rewrites]
        assert reader.score(prompts, [r["target_true"]["str"] for r in rewrites]) >= 95
