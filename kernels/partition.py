"""
Partitions: split numbers into k groups of nearly equal sums by the largest differencing method.

The two partial partitions with the largest spread are merged into one: the largest sum of one with the smallest sum of
the other, the second largest with the second smallest, and so on. This is repeated until one is left. Exact: float64
values are integers over a common power of two. Cost: O(n k log n) in Python. Source: Karmarkar & Karp 1982; k ways as
in Michiels et al. 2003.
"""

import heapq
import math


def karmarkar_karp(values, k):
    """The group, 0 .. k - 1, of each value: a list of ints. Group 0 has the largest sum.

    values: a flat list, array or tensor of ints or finite floats; k >= 1. ValueError otherwise.
    """
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    if not all(isinstance(v, int) or (isinstance(v, float) and math.isfinite(v)) for v in values):
        raise ValueError("values must be a flat list of finite numbers")
    ratios = [v.as_integer_ratio() for v in values]
    unit = max((d for _, d in ratios), default=1)  # denominators are powers of two

    def partial(parts):
        """[(sum, members)], largest first, as an entry of the heap: the largest spread comes out first."""
        parts.sort(key=lambda part: -part[0])
        return parts[0][0] - parts[-1][0], parts

    heap = []
    for i, (p, d) in enumerate(ratios):
        spread, parts = partial([(p * (unit // d), [i])] + [(0, [])] * (k - 1))
        heap.append((-spread, i, parts))
    heapq.heapify(heap)
    for i in range(len(values), 2 * len(values) - 1):
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        spread, parts = partial([(s + t, m + n) for (s, m), (t, n) in zip(a, reversed(b))])
        heapq.heappush(heap, (-spread, i, parts))
    group = [0] * len(values)
    for g, (_, members) in enumerate(heap[0][2] if heap else ()):
        for i in members:
            group[i] = g
    return group
