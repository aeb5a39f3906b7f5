"""
How sure a comparison is: paired and Welch's intervals (scipy), corrections for many comparisons, rank correlation.

Differences are ours minus the baseline's, in nats: negative is better.
"""

import math

import numpy as np
from scipy import stats


def paired(a, b, level=0.95):
    """(mean of a - b, low, high, p) of two equally long sequences of losses, one pair per seed; two pairs at least.

    The interval and the two-sided p are those of the paired t test. Equal differences have no spread: p is then 0 or 1.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"paired needs two or more pairs, not {a.shape} and {b.shape}")
    d = a - b
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0]), float(d[0]), float(d[0] == 0)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(level)
    return float(d.mean()), float(interval.low), float(interval.high), float(test.pvalue)


def welch(a, b, level=0.95):
    """(mean of a - mean of b, low, high, p) of two groups of other seeds, by Welch's t test; two of each at least."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"welch needs two or more of each, not {len(a)} and {len(b)}")
    if np.ptp(a) == np.ptp(b) == 0:
        return paired(np.full(2, a[0]), np.full(2, b[0]), level)
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(level)
    return float(a.mean() - b.mean()), float(interval.low), float(interval.high), float(test.pvalue)


def holm(ps):
    """Adjusted p of each comparison: below 0.05 where the chance of any false one in the family is (Holm 1979)."""
    order = np.argsort(ps)
    adjusted, worst = np.empty(len(ps)), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = worst
    return adjusted.tolist()


def benjamini_hochberg(ps):
    """Adjusted p of each: of those below q, a share q is expected to be false (Benjamini & Hochberg 1995)."""
    return stats.false_discovery_control(ps).tolist() if len(ps) else []


def smallest_effect(differences, level=0.95):
    """What a comparison with the spread of these paired differences could just tell from nothing: half its interval."""
    n = len(differences)
    return stats.t.ppf((1 + level) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n) if n > 1 else math.inf


def kendall(scores, gains, resamples=2000, seed=0, level=0.95):
    """(tau, low, high) of Kendall's rank correlation over rows, tau-b; the interval is a bootstrap's over rows.

    Whether a probe predicts: `scores` of its rows and what they gain elsewhere, such as log m of a ladder. A probe
    whose interval contains 0 is not predictive. ValueError for fewer than four rows, or where all rows are equal.
    """
    scores, gains = np.asarray(scores, float), np.asarray(gains, float)
    if scores.shape != gains.shape or scores.ndim != 1 or len(scores) < 4:
        raise ValueError(f"kendall needs four or more pairs, not {scores.shape} and {gains.shape}")
    if np.ptp(scores) == 0 or np.ptp(gains) == 0:
        raise ValueError("kendall ranks rows, and all of these are equal")
    drawn = np.random.default_rng(seed).integers(len(scores), size=(resamples, len(scores)))
    drawn = [at for at in drawn if np.ptp(scores[at]) and np.ptp(gains[at])]  # a draw of equals has no ranks
    taus = [stats.kendalltau(scores[at], gains[at]).statistic for at in drawn]
    low, high = np.quantile(taus, [(1 - level) / 2, (1 + level) / 2])
    return float(stats.kendalltau(scores, gains).statistic), float(low), float(high)
