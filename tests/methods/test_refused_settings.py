"""Settings that a method can't work with are told before the first edit, with their name and the way out."""

import pytest

from methods.alphaedit import AlphaEdit
from methods.emmet import Emmet
from methods.encore import Encore
from methods.memit import Memit
from methods.nse import Nse
from methods.pmet import Pmet
from methods.r_rome import RRome
from methods.rome import Rome
from methods.sphere import Sphere
from tests.families import tiny

STREAMS = {"memit": Memit, "emmet": Emmet, "pmet": Pmet, "alphaedit": AlphaEdit, "encore": Encore, "nse": Nse,
           "sphere": Sphere}  # fmt: skip
ALL = {**STREAMS, "rome": Rome, "r_rome": RRome}
WEIGHTS = {name: "l2" if name in ("alphaedit", "sphere") else "weight" for name in STREAMS}


def _prepare(name, tmp_path, corpus, **settings):
    shared = {"steps": 3, "contexts": ((5, 3),), "documents": 9, "corpus": corpus}
    return ALL[name](**{**shared, **settings}).prepare(tiny("gpt2"), tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", STREAMS)
def test_what_bounds_a_change_is_above_zero(name, value, tmp_path, corpus):
    with pytest.raises(ValueError, match=f"^{name}: {WEIGHTS[name]} is a number above 0, got .*leave {WEIGHTS[name]}"):
        _prepare(name, tmp_path, corpus, **{WEIGHTS[name]: value})


@pytest.mark.parametrize("name", ALL)
def test_a_search_makes_a_pass(name, tmp_path, corpus):
    with pytest.raises(ValueError, match=f"^{name}: steps counts .*got 0; leave steps out"):
        _prepare(name, tmp_path, corpus, steps=0)


@pytest.mark.parametrize("name", STREAMS)
def test_a_batch_holds_something(name, tmp_path, corpus):
    with pytest.raises(ValueError, match=f"^{name}: a batch .*batch = 0; set it"):
        _prepare(name, tmp_path, corpus, batch=0)


@pytest.mark.parametrize("name", [n for n in STREAMS if n != "emmet"])
@pytest.mark.parametrize("layers", [(1, 0), (), (1, 1)])
def test_layers_go_up(name, layers, tmp_path, corpus):
    with pytest.raises(ValueError, match=f"^{name}: layers are named once"):
        _prepare(name, tmp_path, corpus, layers=layers)


def test_encores_second_weight_may_be_zero_but_not_below(tmp_path, corpus):
    with pytest.raises(ValueError, match="encore: norm_weight is 0 or more"):
        _prepare("encore", tmp_path, corpus, norm_weight=-1.0)


def test_a_way_out_names_settings_that_the_method_has(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"singular.*raise `documents` or `norm_weight`") as said:
        _prepare("encore", tmp_path, corpus, norm_weight=0.0, documents=1)
    assert "ridge" not in str(said.value)
