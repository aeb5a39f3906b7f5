"""
The law of loss and compute, and what an idea is worth in it.

L(K) = E + A K^-alpha, K in tokens or FLOPs, E the loss that no compute removes. An idea that reaches L_v where the
baseline has L_b saves the factor m = [(L_b - E) / (L_v - E)]^(1 / alpha): the baseline would need m K to be as good.

For given E the law is a line in log K, weighted least squares on log(L - E); E is searched, so that thousands of
resamples are fitted at once. Errors are counted in log L, large ones linearly (Huber).
"""

import math

import numpy as np
from scipy import stats

LEAST_E = 0.3  # nats
DELTA = 1e-2  # an error in log L above this counts linearly, not squared
GRID, ZOOMS = 48, 4


def lines(x, z, w):
    """Weighted least squares z = c - alpha x over the last axis: (c, alpha)."""
    total = w.sum(-1)
    mx, mz = (w * x).sum(-1) / total, (w * z).sum(-1) / total
    dx = x - mx[..., None]
    alpha = -(w * dx * (z - mz[..., None])).sum(-1) / (w * dx * dx).sum(-1)
    return mz + alpha * mx, alpha


def given_floor(x, L, E):
    """(Huber loss, log A, alpha) of the best law with these floors: L (..., R), E (...,)."""
    gap = np.maximum(L - E[..., None], 1e-9)
    scale = (gap / L) ** 2  # an error in log L is one in log(L - E) times this root
    w = scale
    for _ in range(3):  # reweighted for Huber's loss
        c, alpha = lines(x, np.log(gap), w)
        error = np.log(E[..., None] + np.exp(c[..., None] - alpha[..., None] * x)) - np.log(L)
        w = scale * np.minimum(1, DELTA / np.maximum(np.abs(error), 1e-12))
    size = np.abs(error)
    huber = np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum(-1)
    return np.where(alpha > 0, huber, np.inf), c, alpha


def fit_many(K, L):
    """(E, A, alpha), each (n,), of n curves: K (R,), L (n, R), three sizes at least."""
    x, L = np.log(np.asarray(K, float)), np.asarray(L, float)
    if L.shape[-1] != len(x) or len(x) < 3:
        raise ValueError(f"a law needs three sizes or more, with a loss for each: {len(x)} sizes, losses {L.shape}")
    low, high = np.full(len(L), LEAST_E), L.min(-1) - 1e-6
    low = np.minimum(low, high - 1e-6)
    for _ in range(ZOOMS):
        E = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, GRID)
        loss, c, alpha = given_floor(x, L[:, None, :], E)
        best, rows = loss.argmin(-1), np.arange(len(L))
        step = (high - low) / (GRID - 1)
        found = E[rows, best], np.exp(c[rows, best]), alpha[rows, best]
        low, high = np.maximum(low, found[0] - step), np.minimum(high, found[0] + step)
    return found


def fit(K, L):
    """(E, A, alpha) of L = E + A K^-alpha through the losses L at K, arrays of equal length; E is 0.3 nats or more."""
    return tuple(float(part[0]) for part in fit_many(K, np.asarray(L, float)[None]))


def factors(K, L_b, L_v):
    """m at each K, (n, R), of mean losses (n, R) of baseline and variant; beyond E it has no bound."""
    E, _, alpha = fit_many(K, L_b)
    gap_b, gap_v = (np.maximum(L - E[:, None], 1e-9) for L in (L_b, L_v))
    return np.exp((np.log(gap_b) - np.log(gap_v)) / alpha[:, None])


def resampled(baseline, variant, resamples, seed, level):
    """(K, log m, its resampled deviations (resamples, R), how much wider each must be, (R,))."""
    K = sorted(baseline)
    if sorted(variant) != K or min(len(each[k]) for each in (baseline, variant) for k in K) < 2:
        raise ValueError("baseline and variant need the same sizes and two seeds or more for each")
    rng = np.random.default_rng(seed)

    def drawn(losses):
        """Means of resampled seeds, (resamples, R)."""
        return np.stack([np.mean(rng.choice(losses[k], (resamples, len(losses[k]))), -1) for k in K], -1)

    means = [np.array([[np.mean(each[k]) for k in K]]) for each in (baseline, variant)]
    m = np.log(factors(K, *means))[0]
    deviations = np.log(factors(K, drawn(baseline), drawn(variant))) - m
    n = np.array([len(baseline[k]) + len(variant[k]) for k in K])
    wide = stats.t.ppf((1 + level) / 2, n - 2) / stats.norm.ppf((1 + level) / 2) * np.sqrt(n / (n - 2))
    return K, m, deviations, wide


def speedup(baseline, variant, resamples=2000, seed=0, level=0.95):
    """{K: {"m", "low", "high"}}: how many times the baseline's compute the variant is worth, with intervals.

    Both are {K: [loss per seed]} over the same three sizes or more, two seeds each at least. Seeds are resampled within
    sizes, and the law refitted each time. Few seeds show too little spread: deviations of log m are widened by the
    t quantile over the normal one, with as many degrees of freedom as the two groups leave, and by sqrt(n / (n - 1)).
    """
    K, m, deviations, wide = resampled(baseline, variant, resamples, seed, level)
    ends = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2], axis=0) * wide + m
    low, high = np.exp(ends)
    return {k: {"m": float(np.exp(m[r])), "low": float(low[r]), "high": float(high[r])} for r, k in enumerate(K)}


def trend(baseline, variant, resamples=2000, seed=0, level=0.95):
    """{"slope", "low", "high", "even"}: of log m over log K, and the K at which that line has m = 1 (None: nowhere)."""
    K, m, deviations, wide = resampled(baseline, variant, resamples, seed, level)
    x = np.log(np.asarray(K, float))
    slopes = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = float(slopes @ m)
    low, high = np.quantile(deviations @ slopes, [(1 - level) / 2, (1 + level) / 2]) * wide.max() + slope
    cross = x.mean() - m.mean() / slope if slope else np.inf
    even = float(np.exp(cross)) if abs(cross - x.mean()) < 50 else None
    return {"slope": slope, "low": float(low), "high": float(high), "even": even}


MOST_SEEDS = 100  # beyond which the number that a decision would take is not worth telling


def verdict(found, line, seeds):
    """
    What speedups {K: {"m", "low", "high"}} and their `trend` say of an idea: holds, grows, fades, loses, or undecided
    with the seeds per size that it would take, given how many there were.
    """
    lows, highs = ([found[K][end] for K in sorted(found)] for end in ("low", "high"))
    crossing = f" (m = 1 at K = {line['even']:.2g})" if line["even"] else ""
    if max(highs) < 1:
        return "loses"
    if line["high"] < 0:
        return f"fades{crossing}"
    if line["low"] > 0 and lows[-1] > 1:  # better at last, whatever it was at first
        return "grows" if min(lows) > 1 else f"grows{crossing}"
    if min(lows) > 1:
        return "holds"
    open_ones = [each for each in found.values() if each["low"] <= 1 <= each["high"]]
    if not open_ones:
        return "undecided (better and worse without a trend)"
    halves = [np.log(each["high"] / each["low"]) / 2 / max(abs(np.log(each["m"])), 1e-9) for each in open_ones]
    needed = max(seeds + 1, math.ceil(seeds * max(halves) ** 2))
    return f"undecided (needs {needed} seeds)" if needed <= MOST_SEEDS else "undecided (no effect in sight)"
