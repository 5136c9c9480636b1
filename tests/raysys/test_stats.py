"""The statistics, worked by hand where a hand can, and by simulation where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysys import stats
from raysys.stats import Told


def ones(right: int, n: int) -> stats.Array:
    return np.array([1.0] * right + [0.0] * (n - right))


def test_standard_error_divides_by_n_minus_one() -> None:
    # 1, 0, 0, 0: mean 1/4, squared deviations 9/16 + 3/16 = 3/4, variance 1/4, error sqrt(1/4 / 4) = 1/4
    assert stats.standard_error(ones(1, 4)) == pytest.approx(0.25)
    assert math.isnan(stats.standard_error(ones(1, 1)))


def test_wilson_matches_the_worked_example() -> None:
    # 0 of 10, z = 1.959964: upper = z^2 / (n + z^2) = 3.841459 / 13.841459
    assert stats.wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    low, high = stats.wilson(5, 10)
    assert low + high == pytest.approx(1.0)
    # half width at 1/2: z sqrt(1/40 + z^2/400) / (1 + z^2/10) = 0.3659 / 1.38415 -> 0.2634
    assert (high - low) / 2 == pytest.approx(0.26340, abs=1e-4)


def test_estimate_takes_wilson_for_zeros_and_ones_and_student_otherwise() -> None:
    binary = stats.estimate(ones(10, 10))
    assert (binary.mean, binary.high) == (1.0, 1.0)
    assert 0.7 < binary.low < 0.73
    shares = stats.estimate(np.array([0.25, 0.5, 0.75]))
    # sd 1/4, error 0.25 / sqrt 3 = 0.14434; t(0.975, 2) = 4.3027: the interval leaves [0, 1] and is cut
    assert shares.error == pytest.approx(0.144338, abs=1e-6)
    assert (shares.low, shares.high) == (0.0, 1.0)
    beyond = stats.estimate(np.array([2.0, 4.0]))
    assert beyond.mean == 3.0
    assert beyond.low < 0 < 4 < beyond.high


def test_bootstrap_is_seeded_and_agrees_with_the_normal_interval() -> None:
    values = ones(400, 1000)
    low, high = stats.bootstrap(values, seed=3)
    assert (low, high) == stats.bootstrap(values, seed=3)
    half = 1.96 * stats.standard_error(values)
    assert low == pytest.approx(0.4 - half, abs=0.004)
    assert high == pytest.approx(0.4 + half, abs=0.004)
    assert all(math.isnan(x) for x in stats.bootstrap(np.array([math.nan, 1.0])))


def test_mcnemar_is_the_sign_test_on_those_who_moved() -> None:
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert stats.mcnemar(1, 3) == pytest.approx(2 * (1 + 4) / 16)


def test_paired_counts_who_moved() -> None:
    change = stats.paired(np.array([1.0, 0, 0, 1, 1]), np.array([1.0, 1, 1, 0, 1]))
    assert (change.mean, change.gained, change.lost, change.n) == (pytest.approx(-0.2), 1, 2, 5)
    assert change.low < change.mean < change.high


def test_few_items_show_nothing_even_when_none_moved() -> None:
    # nothing seen lost among n items shows a loss below 2 % only when 0.98 ** n <= 5 %: from n = 149 on
    assert stats.no_worse(ones(50, 100), ones(50, 100)) == pytest.approx(0.98**100)
    assert stats.no_worse(ones(50, 148), ones(50, 148)) > 0.05
    assert stats.no_worse(ones(50, 149), ones(50, 149)) < 0.05
    shares = np.full(20, 0.5)
    assert stats.no_worse(shares, shares) == pytest.approx(0.98**20)
    assert stats.no_worse(shares[:1], shares[:1]) == 1.0


def test_tango_matches_the_formula_worked_by_hand() -> None:
    # n = 100, delta = 0.1, 4 gained, 4 lost: 200 q^2 + 12 q - 0.36 = 0 -> q = (-12 + sqrt(144 + 288)) / 400 = 0.0219615
    # z = 10 / sqrt(100 (0.0439230 + 0.1 - 0.01)) = 2.73254 -> p = 0.003142
    base = ones(50, 100)
    now = base.copy()
    now[:4], now[50:54] = 0, 1
    assert stats._tango(4, 4, 100, 0.1) == pytest.approx(0.003142, abs=2e-6)
    assert stats.no_worse(now, base, 0.1) == pytest.approx(0.003142, abs=2e-6)


def test_a_loss_of_delta_is_called_no_loss_at_most_one_time_in_twenty() -> None:
    rng = np.random.default_rng(0)
    for n, gained, delta in [(140, 0.0, 0.02), (200, 0.01, 0.02), (400, 0.05, 0.02), (60, 0.02, 0.1)]:
        wrong = 0
        for _ in range(600):
            moved = rng.multinomial(n, (gained, gained + delta, 1 - 2 * gained - delta))
            base = np.array([0.0] * moved[0] + [1.0] * (n - moved[0]))
            now = np.array([1.0] * moved[0] + [0.0] * moved[1] + [1.0] * moved[2])
            wrong += stats.no_worse(now, base, delta) <= 0.05
        assert wrong / 600 <= 0.075, (n, gained, delta)  # 0.05 + 2.8 standard errors of the simulation


def test_holm_multiplies_by_the_hypotheses_left_and_never_decreases() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.6]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_items_needed_is_none_when_the_observed_loss_is_too_large() -> None:
    assert stats.items_needed(ones(90, 100), ones(95, 100)) is None
    # nothing moved: variance floor 0.02 * 0.98, room 0.02: (1.644854 + 0.841621)^2 * 0.0196 / 0.0004 = 302.9
    assert stats.items_needed(ones(50, 100), ones(50, 100)) == 303
    # among four: z = 2.241403 + 0.841621, squared 9.505 instead of 6.183
    assert stats.items_needed(ones(50, 100), ones(50, 100), tests=4) == 466


def test_the_budget_stops_at_the_first_snapshot_not_shown_to_hold() -> None:
    base = ones(600, 1000)
    worse = ones(500, 1000)
    slightly = ones(585, 1000)  # 1.5 points lost, all by items that only fell: cannot be shown to be below 2
    budget = stats.edit_budget(
        {("a", 1): (base, base), ("a", 10): (slightly, base), ("a", 100): (worse, base), ("b", 1): (base, base)}
    )
    assert (budget.shown, budget.observed, budget.measured) == (1, 10, 100)
    assert [v.state for v in budget.verdicts] == ["kept", "kept", "open", "lost"]
    (stop,) = budget.stops
    assert (stop.benchmark, stop.edits) == ("a", 10)
    assert stop.needed is not None
    assert stop.needed > 1000


def test_the_budget_grows_with_the_items_and_is_whole_when_nothing_moved() -> None:
    few, many = ones(20, 40), ones(500, 1000)
    assert stats.edit_budget({("a", n): (few, few) for n in (1, 10)}).shown == 0
    budget = stats.edit_budget({("a", n): (many, many) for n in (1, 10)})
    assert (budget.shown, budget.stops) == (10, ())
    assert stats.edit_budget({}).shown == 0


def test_the_budget_does_not_shrink_when_more_snapshots_are_measured() -> None:
    base = ones(100, 160)
    one = stats.edit_budget({("a", 1): (base, base)})
    many = stats.edit_budget({("a", n): (base, base) if n < 50 else (1 - base, base) for n in (1, 2, 5, 10, 20, 50)})
    assert (one.shown, many.shown) == (1, 20)


def test_a_collapsed_benchmark_ends_the_budget_whatever_its_mean() -> None:
    same = ones(500, 1000)
    budget = stats.edit_budget({("a", 1): (same, same), ("a", 5): (same, same)}, collapsed=frozenset({("a", 5)}))
    assert (budget.shown, budget.observed) == (1, 1)
    assert budget.stops[0].state == "collapsed"


def test_constant_answers_are_a_collapse_only_where_the_base_model_spreads() -> None:
    spread = [Told(i % 4) for i in range(100)]
    constant = [Told(2)] * 98 + [Told(0), Told(1)]
    assert stats.collapse(constant, spread) == "choice 3 on 98% of items"
    assert stats.collapse(constant, constant) == ""
    assert stats.collapse(spread, spread) == ""
    assert stats.collapse(constant[:5], spread) == ""
    assert (
        stats.collapse([Told("so so")] * 20, [Told(str(i)) for i in range(20)]) == "the text 'so so' on 100% of items"
    )


def test_empty_text_and_numbers_that_are_not_finite_are_collapses() -> None:
    texts = [Told(f"{i}") for i in range(20)]
    assert stats.collapse([Told("")] * 12 + texts[:8], texts) == "empty text on 60% of items"
    assert stats.collapse([Told("")] * 12 + texts[:8], [Told("")] * 12 + texts[:8]) == ""
    assert stats.collapse([Told(0, finite=False), Told(1)], []) == "log-probabilities not finite on 1 of 2 items"
