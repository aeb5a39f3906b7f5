"""The CPU paths of the gated scan and of FitzHugh-Nagumo propagation: against plain loops, closed forms, contracts."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import forward_ad

from kernels import fhn, scan
from kernels.fhn import REST_V, REST_W, fhn_propagate
from kernels.scan import gated_scan

LENGTHS = [1, 2, 3, 8, 9, 31, 32, 33, 130]
# (most elements in a block, lanes from which a scan goes item by item): one block, or many; chunks, or none
PLANS = {"one block": (400_000, 5_000), "many blocks": (200, 5_000), "item by item": (200, 1)}


def plan(name):
    block, lanes = PLANS[name]
    return mock.patch.multiple(scan, BLOCK=block, STEP=16, LANES=lanes)


def medium(B, T, C, seed=0, dtype=torch.float64, steps=2):
    """[stimulus, conductance, D, a, b, eps] near the standard parameters, and a state near rest, in float64 before."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = [uniform(-1, 1, B, T, C), uniform(0, 1, B, T, C), 10 ** uniform(-1, 2.5, C)]
    inputs += [uniform(0.5, 0.9, C), uniform(0.6, 1.0, C), uniform(0.02, 0.2, C)]
    return [x.to(dtype) for x in inputs], uniform(-1.8, -0.8, B, steps, C).to(scan.sum_dtype(inputs[0].to(dtype)))


def recurrence(B, T, C, seed=0, dtype=torch.float64, signed=False):
    generator = torch.Generator().manual_seed(seed)
    A = torch.rand(B, T, C, generator=generator, dtype=torch.float64) ** 0.1  # mostly near 1: a long memory
    if signed:
        A *= torch.randint(2, (B, T, C), generator=generator) * 2 - 1
    b, h0 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((B, T, C), (B, C)))
    return [x.to(dtype) for x in (A, b, h0)]


def both_ways(function, inputs, dtype, seed=1):
    """[*outputs, gradient of each input] of `function` in `dtype`, for a fixed gradient of the first output."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad(outputs[0], leaves, grad.to(dtype), allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves)]
    return [*(x.detach() for x in outputs), *zeros]


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest entry of each tensor, or of 1."""
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape
        error = (x.double() - y.double()).abs().max().item() / max(1.0, y.abs().max().item())
        assert error <= tolerance, f"number {i}: {error}"


def scan_agrees(B, T, C, seed, dtype, tolerance):
    inputs = recurrence(B, T, C, seed)
    assert_close(both_ways(gated_scan, inputs, dtype), both_ways(scan.reference, inputs, torch.float64), tolerance)


def fhn_agrees(B, T, C, seed, dtype, tolerance, dt=0.4, steps=2, with_state=True):
    inputs, state = medium(B, T, C, seed, steps=steps)
    state = state if with_state else None

    def run(function):
        def call(*x):
            return function(*x, dt, steps, state if state is None else state.to(scan.sum_dtype(x[0])))

        return call

    expected = both_ways(run(fhn.reference), inputs, torch.float64)
    assert_close(both_ways(run(fhn_propagate), inputs, dtype), expected, tolerance)


# -- against the plain loops ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_scan_and_its_gradients(name, dtype, tolerance):
    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 3), st.sampled_from(LENGTHS) | st.integers(1, 200), st.integers(1, 7), st.integers(0, 2**32))
    def check(B, T, C, seed):
        with plan(name):
            scan_agrees(B, T, C, seed, dtype, tolerance)

    check()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.slow
def test_propagation_and_its_gradients(name, dtype, tolerance):
    @settings(max_examples=25, deadline=None)
    @given(
        st.integers(1, 3), st.sampled_from(LENGTHS) | st.integers(1, 200), st.integers(1, 7), st.integers(0, 2**32),
        st.sampled_from([0.1, 0.4, 1.0]), st.integers(1, 5), st.booleans(),
    )  # fmt: skip
    def check(B, T, C, seed, dt, steps, with_state):
        with plan(name):
            fhn_agrees(B, T, C, seed, dtype, tolerance, dt, steps, with_state)

    check()


@pytest.mark.parametrize("B, T, C", [(1, 1000, 5), (2, 1100, 384), (12, 64, 128), (16, 70, 384)])
@pytest.mark.slow
def test_sizes_of_real_models(B, T, C):
    scan_agrees(B, T, C, 0, torch.float32, 1e-4)
    fhn_agrees(B, T, C, 0, torch.float32, 1e-4)


@pytest.mark.parametrize("T, steps", [(1, 3), (3, 1), (13, 2), (9, 4)])
@pytest.mark.slow
def test_gradcheck(T, steps):
    inputs, state = medium(2, T, 2, steps=steps)
    inputs = [x.requires_grad_() for x in inputs]
    for function in (fhn.reference, fhn_propagate):
        torch.autograd.gradcheck(lambda *x, f=function: f(*x, 0.4, steps, state)[0], inputs)
    inputs = [x.requires_grad_() for x in recurrence(2, T, 2)]
    for function in (scan.reference, gated_scan):
        torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_decays_of_either_sign(name, dtype, tolerance):
    inputs = recurrence(2, 150, 5, signed=True)
    with plan(name):
        assert_close(both_ways(gated_scan, inputs, dtype), both_ways(scan.reference, inputs, torch.float64), tolerance)


@pytest.mark.parametrize("name", PLANS)
def test_a_decay_of_minus_one_counts_parity(name):
    """h <- -h + 1 at a one and h <- h at a zero, that is A = 1 - 2 x and b = (1 - A) / 2: exact at any length."""
    x = torch.randint(2, (2, 3000, 4), generator=torch.Generator().manual_seed(0)).float()
    A = 1 - 2 * x
    with plan(name):
        assert torch.equal(gated_scan(A, (1 - A) / 2), x.cumsum(1) % 2)


def test_products_may_underflow():
    A, b, h0 = recurrence(1, 600, 4, dtype=torch.float32)
    A = A * torch.tensor([0.0, 1e-30, 1e-5, 0.5])
    assert_close(
        both_ways(gated_scan, [A, b, h0], torch.float32), both_ways(scan.reference, [A, b, h0], torch.float64), 1e-6
    )


# -- against closed forms ---------------------------------------------------------------------------------------------


def standard(C):
    return [torch.full((C,), x, dtype=torch.float64) for x in (0.7, 0.8, 0.08)]


def test_rest_point_stays():
    assert abs(REST_V - REST_V**3 / 3 - REST_W) < 1e-15
    assert abs(REST_V + 0.7 - 0.8 * REST_W) < 1e-15
    still, g = torch.zeros(2, 50, 3, dtype=torch.float64), torch.rand(2, 50, 3, dtype=torch.float64)
    deviation, state = fhn_propagate(still, g, torch.ones(3, dtype=torch.float64), *standard(3), 0.5, 6)
    assert deviation.abs().max() < 1e-15
    assert (state - REST_V).abs().max() < 1e-15


def test_one_step_is_a_geometric_decay():
    """One step is linear: a kick at site 5 decays by A = dt D g / (1 + dt D g) a site."""
    dt, D, g = 0.3, torch.tensor([0.0, 1.0, 20.0], dtype=torch.float64), 0.6
    kick = torch.zeros(1, 40, 3, dtype=torch.float64)
    kick[:, 5] = 2.0
    deviation, _ = fhn_propagate(kick, torch.full_like(kick, g), D, *standard(3), dt, 1)
    A = dt * D * g / (1 + dt * D * g)
    t = torch.arange(40, dtype=torch.float64)[:, None] - 5
    expected = torch.where(t >= 0, 2 * dt * (1 - A) * A ** t.clamp(min=0), 0)
    assert (deviation[0] - expected).abs().max() < 1e-15


def test_uncoupled_sites():
    """D = 0: each site is a neuron by itself, here one that gets a constant current and fires."""
    dt, a, b, eps, steps, I = 0.25, 0.7, 0.8, 0.08, 200, 0.5
    v, w = REST_V, REST_W
    for _ in range(steps):
        v, v_before = v + dt * (v - v**3 / 3 - w + I), v
        w = (w + dt * eps * (v + a)) / (1 + dt * eps * b)
    assert abs(v - v_before) > 1e-3  # on its cycle
    current = torch.full((1, 10, 1), I, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    deviation, state = fhn_propagate(current, torch.ones_like(current), zero, *standard(1), dt, steps)
    assert (deviation + REST_V - v).abs().max() < 1e-10
    assert state[0, -2:, 0].tolist() == pytest.approx([v_before, v], abs=1e-10)


# -- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_causal_exactly(name):
    (I, g, *parameters), _ = medium(2, 100, 5, dtype=torch.float32)
    A, b, _ = recurrence(2, 100, 5, dtype=torch.float32)
    with plan(name):
        for t in (1, 17, 50, 99):
            for changed in (0, 1):
                pair, other = [I, g], [A, b]
                for xs in (pair, other):
                    xs[changed] = xs[changed].clone()
                    xs[changed][:, t:] = torch.rand(2, 100 - t, 5)
                before, after = (fhn_propagate(*x, *parameters, 0.4, 3)[0] for x in ((I, g), pair))
                assert (before[:, :t] == after[:, :t]).all()
                assert (before[:, t:] != after[:, t:]).any()
                before, after = (gated_scan(*x) for x in ((A, b), other))
                assert (before[:, :t] == after[:, :t]).all()


def test_prefix_consistent():
    (I, g, *parameters), _ = medium(1, 2500, 200, dtype=torch.float32)
    A, b, _ = recurrence(1, 2500, 200, dtype=torch.float32)
    whole, h = fhn_propagate(I, g, *parameters, 0.4, 2)[0], gated_scan(A, (1 - A) * b)
    for n in (1, 2, 9, 63, 64, 65, 127, 1000, 1984, 1985, 2001):
        part = fhn_propagate(I[:, :n], g[:, :n], *parameters, 0.4, 2)[0]
        assert (part - whole[:, :n]).abs().max() < 1e-6
        assert (gated_scan(A[:, :n], (1 - A[:, :n]) * b[:, :n]) - h[:, :n]).abs().max() < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_state_continues(dtype, tolerance, steps):
    (I, g, *parameters), _ = medium(2, 90, 3, dtype=dtype)
    whole, last = fhn_propagate(I, g, *parameters, 0.4, steps)
    for cuts in ([0, 40, 90], [0, 1, 2, 3, 20, 89, 90]):
        state, parts = None, []
        for s, e in zip(cuts, cuts[1:]):
            part, state = fhn_propagate(I[:, s:e], g[:, s:e], *parameters, 0.4, steps, state)
            parts.append(part)
        assert state.shape == (2, steps, 3)
        assert state.dtype == dtype
        assert_close([torch.cat(parts, 1), state], [whole, last], tolerance)
    A, b, h0 = recurrence(2, 90, 3, dtype=dtype)
    parts, h = [], h0
    for s, e in ((0, 40), (40, 41), (41, 90)):
        parts.append(gated_scan(A[:, s:e], b[:, s:e], h))
        h = parts[-1][:, -1]
    assert_close([torch.cat(parts, 1)], [gated_scan(A, b, h0)], tolerance)


@pytest.mark.parametrize("T", [1, 20])
def test_no_gradient_to_the_state(T):
    inputs, state = medium(2, T, 3)
    deviation, new_state = fhn_propagate(inputs[0].requires_grad_(), *inputs[1:], 0.4, 2, state.requires_grad_())
    assert deviation.requires_grad
    assert not new_state.requires_grad
    deviation.sum().backward()
    assert state.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("T", [1, 50, 1300])
def test_half_types(T, dtype, tolerance):
    inputs, state = medium(1, T, 310, dtype=dtype)
    state = state.float()
    parameters = [x.float() for x in inputs[2:]]  # as under autocast
    actual = both_ways(lambda I, g: fhn_propagate(I, g, *parameters, 0.4, 2, state), inputs[:2], dtype)
    expected = both_ways(lambda I, g: fhn_propagate(I, g, *parameters, 0.4, 2, state), inputs[:2], torch.float32)
    assert [x.dtype for x in actual] == [dtype, torch.float32, dtype, dtype]
    assert_close(actual, expected, tolerance)
    inputs = recurrence(1, T, 310, dtype=dtype)
    inputs[0] = inputs[0] * 0.9
    assert_close(both_ways(gated_scan, inputs, dtype), both_ways(gated_scan, inputs, torch.float32), tolerance)


@pytest.mark.parametrize("T", [1, 60])
def test_strides_do_not_matter(T):
    inputs, state = medium(2, T, 6, dtype=torch.float32)
    packed = torch.cat(inputs[:2], 2)
    views = [
        packed.split(6, 2),
        [x.mT.contiguous().mT for x in inputs[:2]],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:2]],
    ]
    expected = both_ways(lambda *x: fhn_propagate(*x, *inputs[2:], 0.4, 2, state), inputs[:2], torch.float32)
    A, b, h0 = recurrence(2, T, 6, dtype=torch.float32)
    for I, g in views:
        assert T == 1 or not (I.is_contiguous() and g.is_contiguous())
        leaves = [x.detach().requires_grad_() for x in (I, g)]
        out, last = fhn_propagate(*leaves, *inputs[2:], 0.4, 2, state)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        assert_close([out, last, *torch.autograd.grad(out, leaves, grad.mT.contiguous().mT)], expected, 1e-6)
    same = torch.rand(2, T, 1).expand(2, T, 6)
    leaf = same.requires_grad_()
    assert_close([gated_scan(leaf, b, h0)], [gated_scan(same.contiguous(), b, h0)], 1e-6)
    gated_scan(leaf, b, h0).sum().backward()  # a gradient that is one number, expanded


@pytest.mark.parametrize("dt", [0.25, 0.5, 0.75])
def test_bounded_stimulus_stays_finite(dt):
    """|v| stays below 2 sqrt((1 + dt) / dt) while |I| + |w| <= (2/3) ((2 - dt) / dt) sqrt((1 + dt) / dt)."""
    steps, top = 4, 2 * ((1 + dt) / dt) ** 0.5
    (I, g, *parameters), _ = medium(2, 300, 8, dtype=torch.float32)
    D, a, b, eps = parameters[0], *(x.float() for x in standard(8))
    w = 0.625 + steps * dt * 0.08 * (top + 0.7) / (1 + dt * 0.08 * 0.8)
    limit = (2 - dt) / dt * top / 3 - w
    I.mul_(1e4).requires_grad_()
    deviation, _ = fhn_propagate(limit * torch.tanh(I / limit), g.requires_grad_(), D, a, b, eps, dt, steps)
    assert (deviation + REST_V).abs().max() <= top
    deviation.square().sum().backward()
    assert I.grad.isfinite().all()
    assert g.grad.isfinite().all()


# -- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype, steps", [("one block", torch.float32, 1), ("many blocks", torch.bfloat16, 3)])
@pytest.mark.slow
def test_opcheck(name, dtype, steps):
    with plan(name):
        inputs, state = medium(2, 37, 5, dtype=dtype, steps=steps)
        leaves = [x.requires_grad_() for x in inputs]
        torch.library.opcheck(fhn.fhn_op, (*leaves, 0.4, steps, None if steps == 1 else state))
        inputs = [x.detach() for x in inputs]
        carries = fhn.fhn_op(*inputs, 0.4, steps, None)[2]
        torch.library.opcheck(fhn.fhn_backward_op, (inputs[0], *inputs, 0.4, steps, carries))
        A, b, h0 = recurrence(2, 37, 5, dtype=dtype)
        torch.library.opcheck(scan.scan_op, tuple(x.requires_grad_() for x in (A, b, h0)))
        A, b, h0 = (x.detach() for x in (A, b, h0))
        torch.library.opcheck(scan.scan_backward_op, (b, A, b, h0))


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.slow
def test_compiles_without_a_break(T):
    inputs, state = medium(2, T, 3, dtype=torch.float32)
    recurrent = recurrence(2, T, 3, dtype=torch.float32)

    def model(A, b, h0, *medium):
        deviation, new_state = fhn_propagate(*medium, 0.4, 2, state)
        return deviation * gated_scan(A, b, h0), new_state

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    everything = [*recurrent, *inputs]
    assert_close(both_ways(compiled, everything, torch.float32), both_ways(model, everything, torch.float32), 1e-6)


@pytest.mark.parametrize("T", [1, 4])
def test_refuses_forward_mode(T):
    inputs, _ = medium(1, T, 2)
    A, b, h0 = recurrence(1, T, 2)
    with forward_ad.dual_level():
        for i in range(6):
            dual = [forward_ad.make_dual(x, x) if i == j else x for j, x in enumerate(inputs)]
            with pytest.raises(NotImplementedError, match="reference"):
                fhn_propagate(*dual, 0.4, 2)
        for dual in ((forward_ad.make_dual(A, A), b, h0), (A, b, forward_ad.make_dual(h0, h0))):
            with pytest.raises(NotImplementedError, match="reference"):
                gated_scan(*dual)


def test_bad_input():
    inputs, state = medium(2, 5, 3)
    I, g, *parameters = inputs
    bad = [
        ((I[0], g[0], *parameters, 0.4, 2), "stimulus must be"),
        ((I[:, :0], g[:, :0], *parameters, 0.4, 2), "not empty"),
        ((I.long(), g.long(), *parameters, 0.4, 2), "floating"),
        ((I, g[:, :4], *parameters, 0.4, 2), "conductance must be"),
        ((I, g.float(), *parameters, 0.4, 2), "conductance must be"),
        ((I, g, parameters[0][:2], *parameters[1:], 0.4, 2), "D, a, b and eps"),
        ((*inputs, 0.0, 2), "dt=0.0"),
        ((*inputs, float("nan"), 2), "dt=nan"),
        ((*inputs, 0.4, 0), "steps=0"),
        ((*inputs, 0.4, 2.0), "steps=2.0"),
        ((*inputs, 0.4, 3, state), "state must be"),
        ((*inputs, 0.4, 2, state.float()), "state must be"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            fhn_propagate(*arguments)
    A, b, h0 = recurrence(2, 5, 3)
    for arguments in ((A[0], b[0]), (A, b[:, :4]), (A, b.float()), (A[:, :0], b[:, :0]), (A.long(), b.long())):
        with pytest.raises(ValueError, match="A and b must agree"):
            gated_scan(*arguments)
    for start in (h0[:1], h0.float()):
        with pytest.raises(ValueError, match="h0 must be"):
            gated_scan(A, b, start)
