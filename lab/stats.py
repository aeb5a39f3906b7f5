"""
How sure a comparison is: paired and Welch's intervals (scipy), and corrections for many comparisons.

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
