"""
Ramanujan sums c_q(n), the sum of e^(2 pi i n k / q) over the units k of q, and the table of positions made of them:
columns for each prime power q = 2, 3, 4, 5, 7, ..., 23, which determine n through its residues. Source: Ramanujan 1918.
"""

import math

import torch

PRIME_POWERS = (2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23)


def prime_factors(q):
    """[(prime, exponent), ...] of an integer q >= 1, by trial division."""
    factors, p = [], 2
    while q > 1:
        e = 0
        while q % p == 0:
            q, e = q // p, e + 1
        factors += [(p, e)] if e else []
        p = p + 1 if p * p <= q else q
    return factors


def ramanujan_sum(q, n):
    """c_q(n), exact, for an int q >= 1 and any n, an int or a tensor of ints. ValueError for q < 1.

    Multiplicative in q; for q = p^e it is p^e - p^(e-1) if p^e divides n, else -p^(e-1) if p^(e-1) does, else 0.
    """
    if q < 1:
        raise ValueError(f"q={q}: must be at least 1")
    c = 1 + 0 * n
    for p, e in prime_factors(q):
        low = p ** (e - 1)
        c = c * low * (p * (n % (p * low) == 0) - 1) * (n % low == 0)
    return c


def ramanujan_table(block_size):
    """The rows r_t of positions 0 .. block_size - 1, (block_size, 124) float32; their norm is 1 in quadratic mean."""
    n, columns, size = torch.arange(block_size, device="cpu"), [], 0.0
    for q in PRIME_POWERS:
        phi = ramanujan_sum(q, 0)
        units = torch.tensor([k for k in range(1, q // 2 + 1) if math.gcd(k, q) == 1], device="cpu")
        angle = 2 * math.pi / q * (n[:, None] * units % q).double()
        waves = (angle.cos(), angle.sin()) if q > 2 else (angle.cos(),)  # sin(pi n) is 0
        columns += [part * (q * phi) ** -0.5 for part in (*waves, ramanujan_sum(q, n)[:, None])]
        size += (max(phi / 2, 1) + phi) / (q * phi)  # mean over n of the sum of squares of these columns
    return (torch.cat(columns, dim=1) * size**-0.5).float()
