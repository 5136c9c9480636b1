"""MEMIT and its like where a norm follows the MLP: what was searched is what is reached."""

import pytest
import torch

from methods.alphaedit import AlphaEdit
from methods.emmet import Emmet
from methods.encore import Encore
from methods.memit import Memit
from methods.nse import Nse
from methods.parts import locate, spread
from methods.sphere import Sphere
from raysys.patch import wearing
from tests.families import tiny
from tests.methods.dense import FACTS

FAMILIES = {"llama": {}, "gpt2": {}, "gemma2": {}, "opt": {"do_layer_norm_before": False}}
SHARED = {"steps": 4, "lr": 0.1, "contexts": (), "documents": 9}
METHODS = {  # one layer, and hardly anything beside the edit that counts
    "memit": (Memit, {"layers": (1,), "weight": 1e-9, "ridge": 0.1}),
    "emmet": (Emmet, {"layer": 1, "weight": 1.0, "slack": 1e-9, "ridge": 0.1}),
    "alphaedit": (AlphaEdit, {"layers": (1,), "threshold": 0.5, "relative": True, "l2": 1e-9}),
    "encore": (Encore, {"layers": (1,), "weight": 1e-9, "norm_weight": 1e-9, "patience": 0}),
    "nse": (Nse, {"layers": (1,), "weight": 1e-9, "ridge": 0.1}),
    "sphere": (Sphere, {"layers": (1,), "threshold": 0.5, "relative": True, "l2": 1e-9, "strength": 0.0}),
}


def _given(model, module, row):
    """What `module` and then block 1 give at the subject in a plain pass."""
    ids = torch.tensor([row.ids])
    return [model.through(name, ids)[1][0, row.at].float() for name in (module, model.arch.block.format(1))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_that_was_searched_is_met_exactly(family, method, corpus, tmp_path, monkeypatch):
    model = tiny(family, **FAMILIES[family])
    cls, settings = METHODS[method]
    ready = cls(**SHARED, **settings, corpus=corpus).prepare(model, tmp_path)
    found, plain = [], spread.values
    monkeypatch.setattr(spread, "values", lambda *given: found.extend(plain(*given)) or found)
    edit = ready.edit(model, FACTS[:1])
    module = model.arch.block.format(1) if model.arch.mlp_added else model.mlp_out(1)
    row = locate.row(model, FACTS[0])

    def add(_, out):
        out = out.clone()
        out.view(len(row.ids), -1)[row.at] += found[0].offset
        return out

    with model.watching(module, add):
        searched = _given(model, module, row)[1]  # the block, with the offset where it was looked for
    with wearing(model, edit.patches):
        got, block = _given(model, module, row)
    torch.testing.assert_close(got, found[0].wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(block, searched, rtol=1e-4, atol=1e-3)
