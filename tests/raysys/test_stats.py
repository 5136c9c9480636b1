"""The statistics, worked by hand where a hand can, and by simulation where it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raysys import stats


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
    # the test counts a fifth as lost: 200 q^2 + 10.9 q - 0.36 = 0 -> q = (-10.9 + sqrt(118.81 + 288)) / 400
    # = 0.0231738, z = 9 / sqrt(100 (0.0463477 + 0.09)) = 2.43735 -> p = 0.007398
    assert stats.no_worse(now, base, 0.1) == pytest.approx(0.007398, abs=2e-6)


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


def test_items_needed_decide_either_way_and_are_none_at_delta_itself() -> None:
    # nothing moved: variance floor 0.02 * 0.98, room 0.02: (1.644854 + 0.841621)^2 * 0.0196 / 0.0004 = 302.9
    assert stats.items_needed(ones(50, 100), ones(50, 100)) == 303
    # among four: z = 2.241403 + 0.841621, squared 9.505 instead of 6.183
    assert stats.items_needed(ones(50, 100), ones(50, 100), tests=4) == 466
    # five of a hundred lost: room -0.03, variance 0.05 * 0.95: 6.1826 * 0.0475 / 0.0009 = 326.3
    assert stats.items_needed(ones(90, 100), ones(95, 100)) == 327
    assert stats.items_needed(ones(93, 100), ones(95, 100)) is None


def test_group_errors_are_pooled_as_in_the_worked_example() -> None:
    # 2 tasks of 3 and 5 items, errors 0.1 and 0.2: (2*3*0.01 + 4*5*0.04) / (8 - 2) / 8 = 0.86 / 48
    assert stats.pooled_error([0.1, 0.2], [3, 5]) == pytest.approx(math.sqrt(0.86 / 48))
    assert stats.pooled_error([0.25], [4]) == pytest.approx(0.25)
    assert math.isnan(stats.pooled_error([0.0, 0.0], [1, 1]))


def test_group_errors_equal_those_of_the_harness() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    errors, sizes = [0.01, 0.03, 0.02], [100, 37, 250]
    assert stats.pooled_error(errors, sizes) == pytest.approx(metrics.pooled_sample_stderr(errors, sizes), rel=1e-12)


def test_the_area_is_the_mean_height_over_the_logarithm() -> None:
    weights = stats.area_weights([0, 1, 3])  # log(1 + n) at 0, log 2, 2 log 2: steps of one length
    assert weights == pytest.approx([0.25, 0.5, 0.25])
    assert stats.area_weights([0, 5, 100]).sum() == pytest.approx(1.0)
    assert stats.area_weights([0, 7]) @ np.array([0.8, 0.4]) == pytest.approx(0.6)
