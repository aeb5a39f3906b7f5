"""The estimator of what an idea is worth, on losses from a known law; intervals and corrections by hand."""

import math

import numpy as np
import pytest
from scipy import optimize

from lab.laws import LEAST_E, fit, speedup
from lab.stats import benjamini_hochberg, holm, kendall, paired, smallest_effect, welch

pytestmark = pytest.mark.slow

K = np.array([2e6, 5e6, 12e6, 26e6])
E, A, ALPHA = 1.0, 60.0, 0.28


def law(k, multiplier=1.0):
    return E + A * (k * multiplier) ** -ALPHA


def seeds(rng, n, multiplier=1.0, sd=0.004):
    return {k: (law(k, multiplier) + rng.normal(0, sd, n)).tolist() for k in K}


def test_a_law_is_found_again():
    assert fit(K, law(K)) == pytest.approx((E, A, ALPHA), rel=1e-4)
    assert fit(K, 0.1 + A * K**-ALPHA)[0] == LEAST_E  # text has some entropy
    with pytest.raises(ValueError, match="three sizes"):
        fit(K[:2], law(K[:2]))


def test_one_bad_point_does_not_bend_the_law():
    """Huber: against scipy's robust fit from many starts, with one loss far off."""
    x = np.geomspace(1e6, 1e9, 8)
    L = law(x)
    L[3] *= 1.1

    def residual(p):
        return np.log(np.exp(p[0]) + np.exp(p[1]) * x ** -p[2]) - np.log(L)

    starts = [(math.log(e), math.log(a), b) for e in (0.5, 1.0, 1.5) for a in (10, 100) for b in (0.2, 0.4)]
    options = {"loss": "huber", "f_scale": 1e-2, "xtol": 1e-14, "ftol": 1e-14}
    best = min((optimize.least_squares(residual, s, **options) for s in starts), key=lambda r: r.cost)
    found = fit(x, L)
    assert found == pytest.approx((np.exp(best.x[0]), np.exp(best.x[1]), best.x[2]), rel=0.02)
    assert abs(found[2] - ALPHA) < 0.02


def test_the_factor_is_the_multiplier():
    exact = {k: [law(k)] * 2 for k in K}
    faster = {k: [law(k, 1.3)] * 2 for k in K}
    assert [each["m"] for each in speedup(exact, faster, 10).values()] == pytest.approx([1.3] * 4, rel=1e-4)
    for wrong in ({k: [1.0] for k in K}, {k: [1.0, 2.0] for k in K[:3]}):
        with pytest.raises(ValueError, match="same sizes"):
            speedup(exact, wrong, 10)


@pytest.mark.parametrize("multiplier", [1.2, 1.0])
def test_intervals_cover_what_they_promise(multiplier):
    """500 trials of three seeds: the 95 % interval holds the true factor in 93 to 97 % of the trials and sizes."""
    rng, covered = np.random.default_rng(0), []
    for trial in range(500):
        found = speedup(seeds(rng, 3), seeds(rng, 3, multiplier), resamples=300, seed=trial)
        covered += [each["low"] <= multiplier <= each["high"] for each in found.values()]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_paired_intervals_by_hand():
    a, b = [1.0, 1.2, 1.1, 1.4], [1.1, 1.25, 1.3, 1.45]
    d = np.subtract(a, b)
    half = 3.182446305284263 * d.std(ddof=1) / 2  # t of 3 degrees of freedom at 97.5 %
    difference, low, high, p = paired(a, b)
    assert (difference, low, high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    assert 0.05 < p < 0.1 and smallest_effect(d) == pytest.approx(half)
    assert paired([1, 2], [1, 2]) == (0, 0, 0, 1) and paired([1, 2], [2, 3])[3] == 0
    assert welch(a, b)[0] == pytest.approx(d.mean()) and welch(a, b)[3] > p
    for wrong in (([1.0], [2.0]), ([1, 2, 3], [1, 2])):
        with pytest.raises(ValueError, match="two or more"):
            paired(*wrong)


def test_corrections_by_hand():
    ps = [0.01, 0.04, 0.03, 0.005]
    assert holm(ps) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(ps) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([]) == [] and benjamini_hochberg([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_family_of_null_comparisons_is_seldom_called_different():
    rng = np.random.default_rng(1)
    false = [
        min(holm([paired(rng.normal(size=5), rng.normal(size=5))[3] for _ in range(20)])) < 0.05 for _ in range(60)
    ]
    assert np.mean(false) <= 0.15


def test_kendall_counts_pairs():
    """tau is the share of pairs in the same order minus that in the other; the interval holds it and ends at 1."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=12), rng.normal(size=12)
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i in range(12) for j in range(i)]
    tau, low, high = kendall(x, y, resamples=100)
    assert tau == pytest.approx(np.mean(signs)) and -1 <= low <= tau <= high <= 1
    assert kendall(x, np.exp(x), resamples=50) == pytest.approx((1, 1, 1))


def test_kendall_tells_a_probe_that_predicts_from_one_that_does_not():
    rng = np.random.default_rng(1)
    gains = rng.normal(size=16)
    assert kendall(gains + 0.2 * rng.normal(size=16), gains, resamples=100)[1] > 0.3
    noise = [kendall(rng.normal(size=16), gains, 60) for _ in range(10)]
    assert sum(not low <= 0 <= high for _, low, high in noise) <= 2


@pytest.mark.parametrize("scores, gains, told", [
    ([1, 2, 3], [1, 2, 3], "four or more"),
    ([1, 2, 3, 4], [1, 2, 3], "four or more"),
    ([1] * 5, range(5), "all of these"),
])  # fmt: skip
def test_kendall_refuses(scores, gains, told):
    with pytest.raises(ValueError, match=told):
        kendall(scores, gains)
