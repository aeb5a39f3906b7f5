"""Ramanujan sums by three classical formulas, and the positions made of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from model import PRIME_POWERS, RamanujanPositions, ramanujan_sum, ramanujan_table

Q, N = st.integers(1, 200), st.integers(-10_000, 10_000)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def moebius(n):
    """From its definition: the sum over divisors is 1 at n = 1 and 0 elsewhere."""
    return 1 if n == 1 else -sum(moebius(d) for d in divisors(n)[:-1])


def phi(n):
    return sum(math.gcd(k, n) == 1 for k in range(1, n + 1))


@given(Q, N)
def test_exponential_sum_over_units(q, n):
    exact = sum(math.cos(2 * math.pi * (n * k % q) / q) for k in range(1, q + 1) if math.gcd(k, q) == 1)
    assert abs(ramanujan_sum(q, n) - exact) < 1e-8


@given(Q, N)
def test_sum_over_common_divisors(q, n):
    assert ramanujan_sum(q, n) == sum(moebius(q // d) * d for d in divisors(math.gcd(n, q)))


@given(Q, N)
def test_hoelder(q, n):
    r = q // math.gcd(n, q)
    assert ramanujan_sum(q, n) == moebius(r) * phi(q) // phi(r)


@given(Q, N)
def test_sum_over_divisors(q, n):
    assert sum(ramanujan_sum(d, n) for d in divisors(q)) == (q if n % q == 0 else 0)


@pytest.mark.parametrize("q", range(1, 13))
@pytest.mark.parametrize("r", range(1, 13))
def test_orthogonal_over_a_common_period(q, r):
    n = torch.arange(math.lcm(q, r))
    wanted = q * phi(q) if q == r else 0
    wanted = wanted * len(n) // q
    assert (ramanujan_sum(q, n) * ramanujan_sum(r, n)).sum() == wanted


@given(Q, st.lists(N, min_size=1, max_size=20))
def test_tensors_and_ints_agree(q, n):
    sums = ramanujan_sum(q, torch.tensor(n))
    assert sums.dtype == torch.int64 and sums.tolist() == [ramanujan_sum(q, i) for i in n]


@pytest.mark.parametrize("q", [0, -3])
def test_bad_modulus(q):
    with pytest.raises(ValueError, match="at least 1"):
        ramanujan_sum(q, 5)


# The table ----------------------------------------------------------------------------------------------------------


def test_columns_are_the_first_prime_powers():
    prime_powers = [q for q in range(2, 24) if sum(moebius(d) != 0 for d in divisors(q)) == 2]
    assert list(PRIME_POWERS) == prime_powers
    assert math.lcm(*PRIME_POWERS) == 5_354_228_880
    table = ramanujan_table(200).double()
    column, n = 0, torch.arange(200).double()
    scale = None
    for q in PRIME_POWERS:
        units = [k for k in range(1, q // 2 + 1) if math.gcd(k, q) == 1]
        parts = [torch.cos(2 * math.pi * n * k / q) for k in units]
        parts += [torch.sin(2 * math.pi * n * k / q) for k in units if q > 2]
        parts += [torch.tensor([ramanujan_sum(q, i) for i in range(200)]).double()]
        for part in parts:
            part = part / math.sqrt(q * phi(q))
            scale = scale or (table[0, 0] / part[0]).item()
            assert (table[:, column] - scale * part).abs().max() < 1e-6
            column += 1
    assert column == table.size(1)


@pytest.mark.parametrize("block_size", [1, 2, 3, 32, 64, 1024])
def test_no_two_positions_coincide(block_size):
    table = ramanujan_table(block_size)
    assert table.shape == (block_size, 124) and table.dtype == torch.float32
    apart = torch.cdist(table, table) + 9 * torch.eye(block_size)
    assert apart.min() > 0.3
    assert torch.equal(table, ramanujan_table(1024)[:block_size])


def test_no_column_is_zero_and_the_size_is_one():
    table = ramanujan_table(1024)
    assert (table.abs().amax(0) > 1e-3).all()
    assert table.square().sum(1).mean() == pytest.approx(1, abs=0.01)


def test_module():
    torch.manual_seed(0)
    positions = RamanujanPositions(SimpleNamespace(block_size=64, n_embd=128))
    assert list(positions.state_dict()) == ["proj.weight"]
    torch.nn.init.normal_(positions.proj.weight, std=0.02)  # as GPT does
    x = positions(64)
    assert x.shape == (64, 128) and 0.015 < x.std() < 0.03
    assert torch.allclose(torch.cat((positions(20), positions(44, past=20))), x, atol=1e-7)
    weights = positions.state_dict()
    positions.crop(40)
    shorter = RamanujanPositions(SimpleNamespace(block_size=40, n_embd=128))
    shorter.load_state_dict(weights)
    assert torch.equal(positions(40), shorter(40)) and torch.allclose(shorter(40), x[:40], atol=1e-7)
