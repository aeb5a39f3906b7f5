"""Ramanujan sums by three classical formulas, and the positions made of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from model import GPT, PRIME_POWERS, DecodingState, GPTConfig, RamanujanPositions, ramanujan_sum, ramanujan_table

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


@pytest.mark.slow
@pytest.mark.parametrize("q", range(1, 13))
@pytest.mark.parametrize("r", range(1, 13))
def test_orthogonal_over_a_common_period(q, r):
    n = torch.arange(math.lcm(q, r))
    wanted = q * phi(q) if q == r else 0
    wanted = wanted * len(n) // q
    assert (ramanujan_sum(q, n) * ramanujan_sum(r, n)).sum() == wanted


@pytest.mark.slow
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


# -- resonance in Kaufmann attention ----------------------------------------------------------------------------------


def row_of(t):
    """r_t, number by number, from the exponential sums."""
    row, size = [], 0.0
    for q in (2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23):
        units = [k for k in range(1, q + 1) if math.gcd(k, q) == 1]
        half = [k for k in units if k <= q / 2]
        waves = [math.cos(2 * math.pi * t * k / q) for k in half]
        waves += [math.sin(2 * math.pi * t * k / q) for k in half] if q > 2 else []
        total = sum(math.cos(2 * math.pi * t * k / q) for k in units)
        row += [part / math.sqrt(q * len(units)) for part in (*waves, total)]
        size += (len(half) if q > 2 else 1) / (q * len(units)) + 1 / q
    return torch.tensor(row, dtype=torch.float64) / math.sqrt(size)


def kaufmann(**flags):
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 13, "knot_block": 4}
    return GPT(GPTConfig(**sizes, use_kaufmann_attention=True, knot_threshold=1.0, **flags)).double().eval()


def with_stimulus(model, idx, sizes=None):
    """(logits at the last position, the stimulus (B, T, C) that reached the medium), fed in pieces of these sizes."""
    found, state, end = [], None if sizes is None else DecodingState(), 0
    handle = model.transformer.h[0].attn.medium.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    with torch.no_grad():
        for size in sizes or (idx.size(1),):
            logits, _ = model(idx[:, end : end + size], state=state)
            end += size
    handle.remove()
    return logits, torch.cat(found, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, (1,) * 24, (9, 1, 14)])
def test_resonance_scales_the_stimulus_by_the_wave_of_its_position(sizes):
    plain, resonant = kaufmann(), kaufmann(kaufmann_resonance=True)
    resonance = resonant.transformer.h[0].attn.resonance
    resonant.load_state_dict(plain.state_dict(), strict=False)
    idx = torch.randint(13, (2, 24))
    logits, stimulus = with_stimulus(plain, idx)
    assert torch.equal(with_stimulus(resonant, idx)[0], logits)  # g is 0
    with torch.no_grad():
        resonance.g.fill_(0.7)
    other, got = with_stimulus(resonant, idx, sizes)
    wanted = [stimulus[:, t] * (1 + math.tanh(0.7) * (resonance.proj.weight @ row_of(t))) for t in range(24)]
    torch.testing.assert_close(got, torch.stack(wanted, 1), atol=1e-6, rtol=1e-6)  # the table is float32's
    assert (other - logits).abs().max() > 1e-5


def test_the_gate_of_the_resonance_learns_first_and_then_its_wave():
    model = kaufmann(kaufmann_resonance=True)
    resonance, idx = model.transformer.h[0].attn.resonance, torch.randint(13, (2, 25))
    assert resonance.proj(resonance.table).std().item() == pytest.approx(1, rel=0.3)
    for step in range(2):
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        assert resonance.g.grad != 0 and (resonance.proj.weight.grad.abs().max() > 0) == (step > 0)
        with torch.no_grad():
            resonance.g -= 0.1 * resonance.g.grad.sign()


@pytest.mark.slow
def test_resonance_ends_where_positions_end():
    model = kaufmann(kaufmann_resonance=True)
    with pytest.raises(ValueError, match="block_size is 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    idx = torch.randint(13, (1, 20))
    assert torch.equal(*(model.generate(idx, 12, temperature=0, use_cache=cached) for cached in (True, False)))
    model.crop_block_size(16)
    assert len(model.transformer.h[0].attn.resonance.table) == 16 and model(idx[:, :16])[0].isfinite().all()
    with pytest.raises(ValueError, match="kaufmann layer"):
        GPTConfig(kaufmann_resonance=True)
