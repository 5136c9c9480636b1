"""Costly things are computed once, and never used for anything but what they were made from."""

import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from methods.parts import artifacts, moments
from methods.rome import cholesky
from raysys.corpora import Corpus
from raysys.tokens import Tokens
from tests.families import tiny

TEXT = "Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway and Lima of Peru .\n"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return Corpus(str(path), 100)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_the_second_moment_is_the_mean_of_outer_products_over_all_tokens(family, corpus, tmp_path):
    model = tiny(family)
    module = model.mlp_out(1)
    moment = artifacts.second_moment(model, module, corpus, tmp_path)
    keys = torch.cat([model.through(module, torch.tensor([model.encode(t)]))[0][0] for t in TEXT.splitlines()])
    assert moment.count == len(keys)
    torch.testing.assert_close(moment.matrix, (keys.double().T @ keys.double()) / len(keys), rtol=1e-4, atol=1e-6)


def test_an_artifact_is_computed_once(corpus, tmp_path, monkeypatch):
    model = tiny("gpt2")
    first = artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    monkeypatch.setattr(moments, "moment_sums", None)
    again = artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    assert again.digest == first.digest and torch.equal(again.matrix, first.matrix)


def test_another_model_module_or_corpus_gets_its_own(corpus, tmp_path):
    model, other = tiny("gpt2"), tiny("gpt2", seed=1)
    longer = Corpus(corpus.name, 2)
    made = [
        artifacts.second_moment(m, m.mlp_out(i), c, tmp_path).digest
        for m, i, c in ((model, 1, corpus), (model, 0, corpus), (other, 1, corpus), (model, 1, longer))
    ]
    assert len(set(made)) == 4
    assert len(list(tmp_path.glob("second_moment/*.safetensors"))) == 4


def test_a_foreign_or_damaged_artifact_is_refused(corpus, tmp_path):
    model = tiny("gpt2")
    artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    [path] = tmp_path.glob("second_moment/*.safetensors")
    with safe_open(path, "pt") as file:
        tensors, said = {k: file.get_tensor(k) for k in ("sum", "count")}, file.metadata()
    save_file({**tensors, "sum": tensors["sum"] * 2}, path, said)
    with pytest.raises(ValueError, match="was changed after it was written; delete it"):
        artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    save_file(tensors, path, {**said, "origin": "{}"})
    with pytest.raises(ValueError, match="made from something else"):
        artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="can't be read"):
        artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)


def test_computing_it_twice_at_once_ends_in_one_file(corpus, tmp_path):
    model = tiny("gpt2")
    found = []
    workers = [
        threading.Thread(target=lambda: found.append(artifacts.contexts(model, [(5, 5)], 0, tmp_path).texts))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert [p.suffix for p in tmp_path.glob("contexts/*")] == [".safetensors"]


def test_contexts_are_bare_first_of_the_asked_length_and_free_of_braces(tmp_path):
    model = tiny("llama")
    got = artifacts.contexts(model, [(5, 10), (10, 10)], 0, tmp_path)
    assert len(got.texts) == 21 and got.texts[0] == "{}"
    assert all(t.count("{") == t.count("}") == 1 and t.endswith(". {}") for t in got.texts[1:])
    assert [t.startswith(s) for s, t in zip(artifacts.SEEDS, got.texts[1:11:2], strict=True)] == [True] * 5
    assert artifacts.contexts(model, [(5, 10), (10, 10)], 0, tmp_path / "elsewhere") == got
    assert artifacts.contexts(model, [(5, 10), (10, 10)], 1, tmp_path) != got


def test_a_corpus_that_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ValueError, match="can't be read"):
        _ = Corpus(str(tmp_path / "absent.txt"), 5).digest
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        _ = Corpus(str(tmp_path / "empty.txt"), 5).digest
    with pytest.raises(ValueError, match="at least 1"):
        _ = Corpus(str(tmp_path / "empty.txt"), 0).digest


def test_documents_of_a_file_are_its_paragraphs_or_lines(tmp_path):
    (tmp_path / "lines.txt").write_text("a\nb\nc\n")
    (tmp_path / "paragraphs.txt").write_text("a\nb\n\nc\n")
    assert list(Corpus(str(tmp_path / "lines.txt"), 9).texts()) == ["a", "b", "c"]
    assert list(Corpus(str(tmp_path / "paragraphs.txt"), 9).texts()) == ["a\nb", "c"]
    few = list(Corpus(str(tmp_path / "lines.txt"), 2).texts())
    assert len(few) == 2 and few == list(Corpus(str(tmp_path / "lines.txt"), 2).texts())


def test_an_infinite_second_moment_is_said_as_such_and_not_kept(corpus, tmp_path):
    model = tiny("llama", torch.float16)
    model.parameter("model.layers.1.mlp.up_proj.weight").mul_(1e4)
    model.parameter("model.layers.1.mlp.gate_proj.weight").mul_(1e3)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj.*float16.*not finite: .*load it in bfloat16 or fl"
    ):
        artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    assert not list(tmp_path.glob("second_moment/*"))
    with pytest.raises(ValueError, match="not finite"):
        cholesky(torch.full((3, 3), float("inf"), dtype=torch.float64), 1e-4)


def test_texts_are_cut_where_the_published_moments_are_and_the_name_says_so(corpus, tmp_path, monkeypatch):
    model = tiny("gpt2")
    assert moments.longest(Tokens(model.tokenizer, 131_072)) == 4096
    assert moments.longest(model.tokens) == 64
    whole = artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    monkeypatch.setattr(moments, "LONGEST", 4)
    cut = artifacts.second_moment(model, model.mlp_out(1), corpus, tmp_path)
    assert cut.count == sum(min(4, len(model.encode(t))) for t in TEXT.splitlines()) < whole.count
    assert len(list(tmp_path.glob("second_moment/*.safetensors"))) == 2
