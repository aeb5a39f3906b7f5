"""FHNDynamics against textbook physics and scipy; the layer's bound, its linear limit and what it remembers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.integrate import solve_ivp

import model
from kernels.fhn import REST_V, REST_W, fhn_propagate
from model import GPT, FHNAttention, FHNDynamics, FHNMedium, GPTConfig, fhn_bound, fhn_eps_limit

pytestmark = pytest.mark.slow

SIZE = {"block_size": 64, "vocab_size": 17, "n_layer": 1, "n_head": 2, "n_embd": 16}


def medium(**flags):
    torch.manual_seed(0)
    return FHNMedium(GPTConfig(**SIZE, attn_mode="fhn", **flags)).double()


def run(dynamics, v, w, I, dt, steps, **coupling):
    """v and w (1, T, 1) after each of `steps` steps: two (steps, T) arrays."""
    v, w = (torch.as_tensor(x, dtype=torch.float64).reshape(1, -1, 1) for x in (v, w))
    vs, ws = [], []
    for _ in range(steps):
        v, w = dynamics.step(v, w, I, dt, **coupling)
        vs.append(v[0, :, 0].clone())
        ws.append(w[0, :, 0].clone())
    return torch.stack(vs).numpy(), torch.stack(ws).numpy()


def field(t, y, I, a=0.7, b=0.8, eps=0.08):
    return [y[0] - y[0] ** 3 / 3 - y[1] + I, eps * (y[0] + a - b * y[1])]


# The uncoupled site ---------------------------------------------------------------------------------------------------


def test_rest_point():
    v, w = FHNDynamics().rest()
    assert (v, w) == pytest.approx((-1.199408, -0.624260), abs=1e-6) == (REST_V, REST_W)
    assert max(map(abs, field(0, (v, w), 0))) < 1e-12


def test_eigenvalues_at_rest():
    """tr = 1 - v^2 - eps b, det = eps (1 - b (1 - v^2)): a stable focus."""
    v = FHNDynamics().rest()[0]
    found = torch.linalg.eigvals(FHNDynamics().jacobian(v))
    trace, det = 1 - v * v - 0.064, 0.08 * (1 - 0.8 * (1 - v * v))
    assert found.real.sum().item() == pytest.approx(trace) and found.prod().real.item() == pytest.approx(det)
    assert trace < 0 and trace**2 < 4 * det and found.imag.abs().min() > 0


def test_hopf_points():
    """The trace at rest changes sign where v^2 = 1 - eps b, at I = 0.3313 and 1.4187."""

    def trace(I):
        return FHNDynamics().jacobian(FHNDynamics().rest(I)[0]).trace().item()

    for low, high, wanted in ((0.0, 0.8, 0.3313), (0.8, 2.0, 1.4187)):
        rising = trace(high) > trace(low)
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if (trace(middle) > 0) == rising else (middle, high)
        assert low == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("imex", [True, False])
def test_limit_cycle(imex):
    dt = 0.02
    v, _ = run(FHNDynamics(), [-1.0], [-0.5], 0.5, dt, int(130 / dt), imex=imex)
    v = v[int(40 / dt) :, 0]
    up = np.flatnonzero((v[:-1] < 0) & (v[1:] >= 0))
    assert np.diff(up).mean() * dt == pytest.approx(39.45, abs=0.2)
    assert (v.min(), v.max()) == pytest.approx((-1.970, 1.852), abs=0.01)


@pytest.mark.parametrize("imex", [True, False])
def test_first_order_towards_scipy(imex):
    exact = solve_ivp(field, (0, 8), (-1.0, -0.5), method="DOP853", rtol=1e-12, atol=1e-12, args=(0.5,)).y[:, -1]
    errors = []
    for steps in (400, 800, 1600):
        v, w = run(FHNDynamics(), [-1.0], [-0.5], 0.5, 8 / steps, steps, imex=imex)
        errors.append(math.hypot(v[-1, 0] - exact[0], w[-1, 0] - exact[1]))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders == pytest.approx(1, abs=0.05)


# The chain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imex", [True, False])
def test_chain_against_scipy(imex):
    T, coupling, I = 5, 1.5, 0.4

    def chain(t, y):
        v, w = y[:T], y[T:]
        left = np.concatenate(([REST_V], v[:-1]))
        return np.concatenate((coupling * (left - v) + v - v**3 / 3 - w + I, 0.08 * (v + 0.7 - 0.8 * w)))

    start = np.concatenate((np.linspace(-1, 1, T), np.zeros(T)))
    exact = solve_ivp(chain, (0, 3), start, method="DOP853", rtol=1e-11, atol=1e-11).y[:T, -1]
    errors = []
    for steps in (500, 1000):
        v, _ = run(FHNDynamics(), start[:T], start[T:], I, 3 / steps, steps, coupling=coupling, imex=imex)
        errors.append(np.abs(v[-1] - exact).max())
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def front(dynamics, coupling, time, T=4, dt=0.4, **how):
    """How far u > 1/2 has come on a line that starts at 0, its left end held at 1."""
    u = torch.zeros(1, T, 1, dtype=torch.float64)
    u[:, 0] = 1.0
    for _ in range(int(time / dt)):
        u, _ = dynamics.step(u, torch.zeros_like(u), 0.0, dt, coupling, u.new_ones(1, 1), **how)
        u[:, 0] = 1.0
    return int((u[0, :, 0] > 0.5).sum())


@pytest.mark.parametrize("imex", [True, False])
@pytest.mark.parametrize("threshold", [0.2, 0.4])
def test_one_way_front_passes_iff_the_coupling_exceeds_a_quarter_of_the_threshold_squared(imex, threshold):
    """g (1 - u) + u (1 - u) (u - a) > 0 on [0, 1) iff g > a^2 / 4, where u (a - u) is largest: at u = a / 2."""
    nagumo = FHNDynamics(threshold=threshold)
    assert front(nagumo, 0.9 * threshold**2 / 4, 600, imex=imex) == 1
    assert front(nagumo, 1.3 * threshold**2 / 4, 1200, imex=imex) == 4


def test_two_way_front_speed():
    """sqrt(D / 2) (1 - 2a) of the continuum, D large enough that sites are dense in the front."""
    D, threshold = 40.0, 0.25
    nagumo = FHNDynamics(threshold=threshold)
    x = torch.arange(400.0, dtype=torch.float64).reshape(1, -1, 1)
    u = torch.sigmoid((100 - x) / math.sqrt(2 * D))  # the exact profile
    places = []
    for step in range(6001):
        if step in (2000, 6000):
            places.append(u.sum().item())  # the front's place up to a constant
        u, _ = nagumo.step(u, torch.zeros_like(u), 0.0, 0.01, D, u[:, 0], imex=False, two_way=True)
    assert (places[1] - places[0]) / 40 == pytest.approx(math.sqrt(D / 2) * (1 - 2 * threshold), rel=0.01)


def test_two_way_has_no_implicit_scheme():
    with pytest.raises(ValueError, match="two_way"):
        FHNDynamics().step(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), 0.0, 0.1, two_way=True)


def test_the_fused_kernel_runs_these_equations():
    torch.manual_seed(0)
    I, g = torch.randn(2, 33, 5, dtype=torch.float64), torch.rand(2, 33, 5, dtype=torch.float64)
    D, a, b, eps = (torch.rand(5, dtype=torch.float64) for _ in range(4))
    v, w = torch.full_like(I, REST_V), torch.full_like(I, REST_W)
    for _ in range(3):
        v, w = FHNDynamics(a, b, eps).step(v, w, I, 0.4, g * D)
    assert (fhn_propagate(I, g, D, a, b, eps, 0.4, 3)[0] - (v - REST_V)).abs().max() < 1e-12


# The layer ------------------------------------------------------------------------------------------------------------


def test_bound_figures():
    """10.4, 3.46, 1.70 and 0.94 (spec, from the cubic's extrema)."""
    for dt, force in ((0.25, 10.4), (0.5, 3.46), (0.75, 1.70), (1.0, 0.94)):
        assert fhn_bound(dt)[1] == pytest.approx(force, abs=0.05)


@given(st.floats(0.05, 1.5), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_bound_is_invariant_and_sharp(dt, share, seed):
    v_max, force = fhn_bound(dt)
    rng = np.random.default_rng(seed)
    v = np.append(rng.uniform(-v_max, v_max, 200), [v_max, -v_max, math.sqrt((1 + dt) / dt)])
    push = rng.choice([-1, 1], len(v)) * force * share
    assert np.abs(v + dt * (v - v**3 / 3 + push)).max() <= v_max * (1 + 1e-12)
    peak = math.sqrt((1 + dt) / dt)  # where v + dt (v - v^3 / 3) is largest: one more push leaves the interval
    assert peak + dt * (peak - peak**3 / 3 + 1.001 * force) > v_max


@pytest.mark.parametrize("steps,dt", [(1, 0.5), (2, 0.5), (4, 0.5), (2, 0.9), (2, 0.75)])
@pytest.mark.parametrize("imex", [True, False])
def test_adversarial_activations_stay_finite(steps, dt, imex):
    layer = medium(fhn_steps=steps, fhn_dt=dt, use_fhn_imex=imex)
    with torch.no_grad():  # parameters far from where they start, too
        layer.a += 3
        layer.log_eps += 5
        layer.log_b -= 5
    q, k, v = (1e4 * torch.randn(2, 50, 16, dtype=torch.float64) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = layer(v, q, k)
    y.square().sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(x.grad).all() for x in leaves)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    if imex:
        assert (y + REST_V).abs().max() <= fhn_bound(dt)[0]


def test_unstable_steps_are_refused():
    assert fhn_eps_limit(0.9, 2) > 0.08 > fhn_eps_limit(0.9, 4)
    with pytest.raises(ValueError, match="fhn_dt"):
        GPTConfig(attn_mode="fhn", fhn_dt=0.9, fhn_steps=4)


def test_explicit_reaches_one_token_a_step_and_implicit_all():
    q, k, v = torch.randn(3, 1, 40, 16, dtype=torch.float64)
    changed = v.clone()
    changed[:, 3] += 1
    for steps in (1, 2, 3):
        layer = medium(fhn_steps=steps, use_fhn_imex=False)
        moved = (layer(changed, q, k) - layer(v, q, k)).abs().amax((0, 2)) > 0
        assert moved.nonzero().flatten().tolist() == list(range(3, 3 + steps))
    moved = (medium(fhn_steps=1)(changed, q, k) - medium(fhn_steps=1)(v, q, k)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(3, 40))


def test_dynamics_matter():
    """The cubic changes the numbers: the layer is not its linear limit, and not attention either."""
    q, k, v = torch.randn(3, 1, 40, 16, dtype=torch.float64)
    waves, linear = medium()(v, q, k), medium(fhn_dynamics="linear")(v, q, k)
    scale = (waves * linear).sum() / linear.square().sum()
    assert (waves - scale * linear).norm() > 0.1 * waves.norm()
    attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (waves - attention).norm() > 0.5 * attention.norm()


def test_linear_limit_is_linear_and_the_waves_are_not():
    q, k, v = torch.randn(3, 1, 40, 16, dtype=torch.float64)
    for dynamics, wanted in (("linear", True), ("fhn", False)):
        layer = medium(fhn_dynamics=dynamics)
        doubled, twice = layer(2 * v, q, k), 2 * layer(v, q, k)
        assert ((doubled - twice).abs().max() < 1e-12) == wanted


def test_nothing_in_nothing_out():
    """Rest is an equilibrium: without stimulus the medium stays there, up to REST's own rounding."""
    q, k, _ = torch.randn(3, 1, 40, 16, dtype=torch.float64)
    assert medium()(torch.zeros_like(q), q, k).abs().max() < 1e-8  # 0.7 and 0.8 are float32 in it


def test_state_is_constant_and_small():
    """Bytes a layer and sequence: the same at every length, 1000 times less than keys and values at T = 4096."""
    sizes = {}
    for mode in ("fhn", "softmax"):
        gpt = GPT(GPTConfig(block_size=4096, n_layer=1, n_head=2, n_embd=16, vocab_size=17, attn_mode=mode)).eval()
        state, idx = model.DecodingState(), torch.zeros(1, 2048, dtype=torch.long)
        for end in (1, 2):
            with torch.no_grad():
                gpt(idx, state=state)
            sizes[mode, end] = state.nbytes()
    assert sizes["fhn", 1] == sizes["fhn", 2]
    keys_and_values = 2 * 4096 * 16 * 4
    assert sizes["softmax", 2] >= keys_and_values > 1000 * sizes["fhn", 2]


def test_reach_spans_a_few_tokens_to_the_block():
    reach = 1 + medium().log_lambda.exp().detach() / 2  # the gate starts half open
    assert (reach.min().item(), reach.max().item()) == pytest.approx((2, 65))


def test_layer_in_half_precision():
    torch.manual_seed(0)
    layer = FHNAttention(GPTConfig(**SIZE, attn_mode="fhn"))
    x = torch.randn(1, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    assert (rough.float() - layer(x)).norm() < 0.03 * layer(x).norm()
