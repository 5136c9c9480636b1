"""Sums for several modules at once equal those of one at a time, and parts may be summed anywhere."""

import torch

from methods.parts import moments
from tests.families import tiny
from tests.plain import moments as plain

TEXTS = ["Anna was born in Rome .", "", "The Eiffel tower is in Paris .", "Oslo is the capital of Norway and Lima"] * 5


def test_several_modules_in_one_pass_give_what_a_pass_for_each_gives():
    for family in ("gpt2", "llama", "opt"):
        model = tiny(family)
        modules = [model.mlp_out(2), model.arch.attn_out.format(1), model.mlp_out(0)]
        found = moments.collect(model, modules, TEXTS)
        for module in modules:
            matrix, count = plain.second_moment(model.net, model.tokenizer, module, [t for t in TEXTS if t], 64)
            extra = TEXTS.count("") if model.encode("") else 0  # the BOS of an empty text counts
            assert found[module].count == count + extra
            if not extra:
                torch.testing.assert_close(found[module].total / count, matrix.double(), rtol=1e-4, atol=1e-5)
            [alone] = moments.collect(model, [module], TEXTS).values()
            assert torch.equal(alone.total, found[module].total)
        assert not any(m._forward_pre_hooks for m in model.net.modules())


def test_parts_summed_apart_and_added_in_order_have_the_same_bits(monkeypatch):
    monkeypatch.setattr(moments, "PART", 6)
    model = tiny("gpt2")
    modules = [model.mlp_out(0), model.mlp_out(1)]
    apart = [moments.moment_sums(model, modules, part) for part in reversed(list(moments.parts(TEXTS)))]
    total = {}
    for part in reversed(apart):
        total = moments.added(total, part)
    for name, sums in moments.collect(model, modules, TEXTS).items():
        assert torch.equal(total[name].total, sums.total) and total[name].count == sums.count


def test_a_wide_key_is_multiplied_block_by_block(monkeypatch):
    model = tiny("gpt2")
    whole = moments.collect(model, [model.mlp_out(1)], TEXTS)[model.mlp_out(1)].total
    monkeypatch.setattr(moments, "BLOCK", 48)
    blocks = moments.collect(model, [model.mlp_out(1)], TEXTS)[model.mlp_out(1)].total
    torch.testing.assert_close(blocks, whole)
    assert torch.equal(blocks, blocks.T)
