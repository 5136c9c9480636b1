"""Perplexity: passages cut by hand, scored as torch does, and what is said of a text that can't be used."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.perplexity import Perplexity, passages
from raysys.local import score
from raysys.model import Model
from raysys.types import Choose, Chosen, Scored
from tests import families


def test_running_text_is_cut_at_blanks_and_nothing_within_is_changed() -> None:
    assert list(passages(["one  two\n three four five six seven\n"], 3)) == ["one  two\n three", "four five six"]
    assert list(passages(["one two three four five"], 3)) == ["one two three", "four five"]  # half of 3 or more
    assert list(passages(["one", "two three"], 3)) == ["one", "two three"]


def test_passages_stay_short_in_bytes_whatever_the_words() -> None:
    found = list(passages(["é" * 10 + " " + "x" * 100 + " ab cd"], 2))
    assert [len(p.encode()) for p in found] == [16, 16, 5]
    assert found[0] == "é" * 8


def test_a_passage_worked_by_hand() -> None:
    [query, *_] = Perplexity(limit=3).queries()
    assert isinstance(query, Choose) and query.prompt == "" and len(query.choices) == 1
    [found] = Perplexity().score(query, Chosen((Scored(-6.0, 4, 1),)))
    assert (found.metric, found.value) == ("nats_per_token", 1.5)
    [found] = Perplexity().score(query, Chosen((Scored(float("nan"), 4, 0),)))
    assert math.isnan(found.value)


def test_a_model_reads_the_passage_after_its_first_token(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The capital of Norway is Oslo . Anna works as a pilot in Rome .")
    model = families.tiny("llama")
    [(_, estimate)] = score(model, Perplexity(data=str(path), words=7)).items()
    wanted = [by_torch(model, text) for text in ("The capital of Norway is Oslo .", "Anna works as a pilot in Rome")]
    assert estimate.mean == pytest.approx(sum(wanted) / 2, abs=1e-5)


def by_torch(model: Model, text: str) -> float:
    """Mean cross-entropy in nats of all tokens of `text` after BOS (EOS without one)."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if ids[0] != start:
        ids = [start, *ids]
    with torch.no_grad():
        return float(model.net(torch.tensor([ids]), labels=torch.tensor([ids])).loss)


def test_passages_are_spread_over_the_text_and_none_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i // 2 % 40}" for i in range(400)))
    texts = [q.choices[0] for q in Perplexity(data=str(path), words=10, limit=4).queries() if isinstance(q, Choose)]
    assert [t.split()[0] for t in texts] == ["w0", "w10", "w20", "w30"]
    assert len(list(Perplexity(data=str(path), words=10, limit=None).queries())) == 8


def test_the_hubs_layout_is_read(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": " = Head = \\n"}\n{"text": ""}\n{"text": " One two three . \\n"}\n')
    [query] = Perplexity(data=str(tmp_path), words=20).queries()
    assert isinstance(query, Choose) and query.choices == ("= Head = \n One two three .",)


def test_bad_data_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n ")
    with pytest.raises(ValueError, match=r"empty.txt' has no passage of 60 words. Lower `words`"):
        list(Perplexity(data=str(empty)).queries())
    empty.write_bytes(b"good\n\xff")
    with pytest.raises(ValueError, match=r"empty.txt, line 2: not UTF-8"):
        list(Perplexity(data=str(empty)).queries())
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        list(Perplexity(data="nowhere").queries())
    with pytest.raises(ValueError, match="words = 1"):
        Perplexity(words=1)
