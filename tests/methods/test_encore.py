"""ENCORE against a dense computation; its search for values stops when the target is decoded everywhere."""

from dataclasses import replace

import pytest
import torch

from methods.encore import PRESETS, Encore
from methods.parts import locate
from raysys.model import Model
from raysys.types import EditRequest
from tests.families import tiny
from tests.methods.dense import FACTS, Twin, close, stream

SETTINGS = {"batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.1, "weight": 5.0, "norm_weight": 2.0, "patience": 2,
            "contexts": ((5, 3),), "documents": 9}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_equal_the_dense_solution_with_earlier_keys_and_the_norm_term(
    family,
    corpus,
    found_values,
    tmp_path,
):
    model = tiny(family)
    ready = Encore(**SETTINGS, corpus=corpus).prepare(model, tmp_path)
    twin = Twin(model)
    contexts = ready.contexts.texts
    modules = [model.mlp_out(i) for i in (0, 1)]
    moments = {m: twin.moment(m, corpus, 9) for m in modules}
    earlier = {m: torch.zeros_like(moments[m]) for m in modules}
    batches = [FACTS[:2], FACTS[2:]]
    for number, (edit, changes) in enumerate(stream(model, ready, batches)):
        for layer, module in enumerate(modules):
            keys = twin.keys(module, batches[number], contexts)
            missing = (found_values[number] - twin.hidden(1, batches[number])) / (2 - layer)
            whole = 5.0 * moments[module] + 2.0 * torch.eye(len(keys)) + earlier[module] + keys @ keys.T
            wanted = missing @ torch.linalg.solve(whole, keys).T
            close(changes[module], wanted)
            twin.matrix(module).add_(wanted)
        for module in modules:
            keys = twin.keys(module, batches[number], contexts)
            close(edit.memory[module].double(), keys)
            earlier[module] += keys @ keys.T


def _decoded(model, request, contexts, layer, offset):
    """Whether greedy decoding gives the target behind every sampled context when `offset` is added at the subject."""
    for context in contexts[1:]:
        row = locate.row(model, request, context, target=True)

        def add(_, out, at=row.at):
            return torch.cat([out[:, :at], out[:, at : at + 1] + offset, out[:, at + 1 :]], 1)

        with model.watching(model.arch.block.format(layer), add), torch.no_grad():
            logits = model.net(input_ids=torch.tensor([row.ids])).logits[0]
        if logits[row.first - 1 :].argmax(-1).tolist() != list(row.labels):
            return False
    return True


@pytest.mark.parametrize("patience", [1, 3])
def test_the_search_ends_with_the_pass_that_decodes_the_target_for_the_last_time_needed(shared, patience):
    model = Model.load(str(shared / "golden" / "models" / "tiny-gpt2"))
    requests = [
        EditRequest("job", "{} works as a", "Jairsaix Binvain", "pilot", "soldier"),
        EditRequest("city", "{} was born in", "Stolcim Flikvand", "Selby", "Rannoch"),
    ]
    contexts = ("{}", "The man said. {}", "You know that. {}")
    search = locate.Search(steps=20, lr=0.5, weight_decay=0.05, clamp=4.0, kl=0.0625, stop=0.0)
    together = locate.values(model, requests, contexts, 1, replace(search, patience=patience), "block")
    for request, value in zip(requests, together, strict=True):
        hits = passes = 0
        while hits < patience:
            passes += 1
            [so_far] = locate.values(model, [request], contexts, 1, replace(search, steps=passes), "block")
            hits += _decoded(model, request, contexts, 1, so_far.offset)
        assert len(value.losses) == passes < 20
        torch.testing.assert_close(value.offset, so_far.offset, rtol=1e-4, atol=1e-5)


def test_without_patience_the_search_is_memits(shared):
    model = tiny("gpt2")
    search = locate.Search(steps=4, lr=0.1, weight_decay=0.5, clamp=4.0, kl=0.0625)
    one, other = (locate.values(model, FACTS[:1], ("{}",), 1, replace(search, patience=p), "block")[0] for p in (0, 99))
    assert torch.equal(one.offset, other.offset)


def test_presets_have_the_published_patience_and_norm_term():
    assert [PRESETS[m]["patience"] for m in ("gpt2-xl", "llama-3-8b")] == [4, 2]
    assert PRESETS["llama-3-8b"]["norm_weight"] == 20


def test_a_weight_of_zero_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="weight is a number above 0"):
        Encore(**{**SETTINGS, "weight": 0.0}, corpus=corpus).prepare(tiny("gpt2"), tmp_path)
