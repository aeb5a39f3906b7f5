"""BioMLP: its equations, what it can and cannot compute, its running thresholds, and decoding by active rows."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

import kernels.oscillator as oscillator
from kernels.oscillator import oscillate, reference
from model import BioMLP, DendriticCompartmentLayer, GPTConfig, OscillatingActivation, SparseEventLayer

DEFAULTS = {
    "n_embd": 12, "bias": True, "dropout": 0.0, "bio_omega": 1.0, "bio_osc_learnable": True, "bio_compartments": 0,
    "bio_dendrite_dim": 0, "bio_lateral": "concat", "bio_threshold": 0.25, "bio_gate": "full",
    "bio_adaptive_threshold": False, "bio_target_sparsity": 0.5,
}  # fmt: skip
KINDS = [
    {"bio_threshold": 0.0},
    {"bio_threshold": 0.0, "bias": False, "bio_osc_learnable": False},
    {},
    {"bio_gate": "diag", "bias": False},
    {"bio_gate": "lowrank", "bio_adaptive_threshold": True},
    {"n_embd": 13, "bio_compartments": 5, "bio_dendrite_dim": 7},
    {"bio_compartments": 2, "bio_lateral": "nonlinear", "bio_threshold": 0.4},
    {"bio_compartments": 3, "bio_lateral": "none", "bias": False},
]


def config(**flags):
    return SimpleNamespace(**vars(GPTConfig()) | DEFAULTS | flags)


def build(flags, seed=0, dtype=torch.float64):
    """A BioMLP in evaluation mode, every parameter moved off its start, and an input (2, 5, C)."""
    torch.manual_seed(seed)
    model = BioMLP(config(**flags)).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model, torch.randn(2, 5, model.c_proj.out_features, dtype=dtype)


def own_forward(model, x, c):
    """The spec's equations, one token and one unit of K at a time."""

    def osc(u, a):
        return torch.sin(a.omega * u + a.phi) * torch.tanh(u) + a.baseline

    def token(x):
        if c.bio_compartments:
            d, K = model.dendrites, c.bio_compartments
            w = -(-len(x) // K)
            x = torch.cat((x, x.new_zeros(K * w - len(x))))
            C = torch.stack([torch.tanh(d.A[k](x[k * w : (k + 1) * w])) for k in range(K)])
            if c.bio_lateral != "none":
                LC = torch.stack([sum(d.L[k, j] * C[j] for j in range(K)) for k in range(K)])
                C = torch.cat((C, LC.tanh() if c.bio_lateral == "nonlinear" else LC))
            h = osc(d.S(C.flatten()), d.osc)
        else:
            h = osc(model.dendrites[0](x), model.dendrites[1])
        if c.bio_threshold:
            e = model.events
            mask = (1 / (1 + torch.exp(-e.G(h))) > e.threshold).to(h.dtype)
            h = (mask * h) @ e.T
            h = osc(h if e.bias is None else h + e.bias, e.osc)
        return model.c_proj(h)

    return torch.stack([torch.stack([token(t) for t in row]) for row in x])


# The oscillator -----------------------------------------------------------------------------------------------------


@given(
    N=st.integers(1, 9), h=st.integers(1, 7), block=st.integers(1, 40), learns=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_oscillator_is_its_formula(N, h, block, learns, seed):
    """Values and all four gradients against autograd, through blocks of any size; far arguments too."""
    g = torch.Generator().manual_seed(seed)
    x, up = (torch.randn(N, 2, h, generator=g, dtype=torch.float64) * s for s in (4, 1))
    params = [torch.randn(h, generator=g, dtype=torch.float64) for _ in range(3)]
    ours, theirs = [], []
    full, oscillator.BLOCK = oscillator.BLOCK, block
    try:
        for function, out in ((oscillate, ours), (reference, theirs)):
            inputs = [x.clone().requires_grad_(), *(p.clone().requires_grad_(learns) for p in params)]
            y = function(*inputs)
            y.backward(up)
            out += [y.detach(), *(i.grad for i in inputs if i.requires_grad)]
    finally:
        oscillator.BLOCK = full
    assert len(ours) == (5 if learns else 2)
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(ours, theirs))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
def test_oscillator_in_other_types(dtype, tolerance):
    torch.manual_seed(0)
    x, params = torch.randn(64, 8).to(dtype).requires_grad_(), [torch.randn(8) for _ in range(3)]
    y = oscillate(x, *params)
    exact = x.detach().double().requires_grad_()
    wanted = reference(exact, *(p.double() for p in params))
    y.sum().backward(), wanted.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert (y - wanted).abs().max() < tolerance and (x.grad - exact.grad).abs().max() < tolerance


def test_oscillators_start_as_the_spec_says():
    torch.manual_seed(0)
    osc = OscillatingActivation(20_000, config(bio_omega=2.0))
    assert abs(osc.omega.mean() - 2) < 0.01 and abs(osc.omega.std() - 0.1) < 0.01
    assert abs(osc.phi.mean()) < 0.01 and abs(osc.phi.std() - 0.1) < 0.01 and not osc.baseline.any()
    fixed = OscillatingActivation(3, config(bio_osc_learnable=False))
    assert not list(fixed.parameters()) and fixed.state_dict().keys() == {"omega", "phi", "baseline"}


@pytest.mark.parametrize("unit, solves", [("oscillator", True), ("sigmoid", False)])
@pytest.mark.slow
def test_one_oscillating_unit_learns_xor(unit, solves):
    """One unit, act(w x + b), threshold 1/2. A sigmoid unit is monotone in w x: at most 3 of 4 points."""
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = (x.sum(1) == 1).float()
    best = 0
    for seed in range(3):
        torch.manual_seed(seed)
        act = OscillatingActivation(1, config()) if unit == "oscillator" else nn.Sigmoid()
        model = nn.Sequential(nn.Linear(2, 1), act)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(400):
            loss = F.mse_loss(model(x)[:, 0], y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = max(best, ((model(x)[:, 0] > 0.5) == (y > 0.5)).sum().item())
    assert (best == 4) == solves and best >= 2


# The layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", KINDS)
def test_equations(flags):
    model, x = build(flags)
    assert (model(x) - own_forward(model, x, config(**flags))).abs().max() < 1e-12


@pytest.mark.slow
@given(C=st.integers(1, 9), K=st.integers(1, 5), m=st.integers(0, 5), lateral=st.sampled_from(["concat", "nonlinear"]))
@settings(max_examples=20, deadline=None)
def test_any_slicing(C, K, m, lateral):
    flags = {"n_embd": C, "bio_compartments": K, "bio_dendrite_dim": m, "bio_lateral": lateral}
    model, x = build(flags)
    assert (model(x) - own_forward(model, x, config(**flags))).abs().max() < 1e-11


def test_concat_adds_parameters_but_no_power():
    """S [C; L C] = S' C: a layer without lateral coupling with S' in its place is the same function."""
    torch.manual_seed(0)
    rich = DendriticCompartmentLayer(config(bio_compartments=3)).double()
    poor = DendriticCompartmentLayer(config(bio_compartments=3, bio_lateral="none")).double()
    poor.load_state_dict({k: v for k, v in rich.state_dict().items() if k != "L"} | {"S.weight": rich.soma().detach()})
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(rich(x), poor(x), atol=1e-12)
    count = [sum(p.numel() for p in layer.parameters()) for layer in (rich, poor)]
    assert count[0] - count[1] == 3 * 48 * 48 + 9
    other = DendriticCompartmentLayer(config(bio_compartments=3, bio_lateral="nonlinear")).double()
    other.load_state_dict(rich.state_dict())
    assert (other(x) - rich(x)).abs().max() > 1e-3  # tanh after the coupling is not the same


@pytest.mark.parametrize("flags", KINDS)
def test_parameter_counts(flags):
    c = config(**flags)
    C, h, K, m = c.n_embd, 4 * c.n_embd, c.bio_compartments, c.bio_dendrite_dim or 4 * c.n_embd
    osc = 3 * h * c.bio_osc_learnable
    count = h * C + C * c.bias + osc + h * c.bias  # c_proj; the first oscillator and the bias below it
    if K:
        inputs = K * m * (1 if c.bio_lateral == "none" else 2)
        count += K * m * -(-C // K) + K * m * c.bias + h * inputs + (c.bio_lateral != "none") * K * K
    else:
        count += h * C
    if c.bio_threshold:
        r = max(1, h // 16)
        count += h * h + h * c.bias + osc + h * c.bias + {"full": h * h, "diag": h, "lowrank": 2 * h * r}[c.bio_gate]
    assert sum(p.numel() for p in BioMLP(c).parameters()) == count


def test_events_are_hard_forward_and_straight_through_backward():
    torch.manual_seed(0)
    layer = SparseEventLayer(6, config(bio_threshold=0.5)).double()
    x = torch.randn(1, 7, 6, dtype=torch.float64, requires_grad=True)
    z = layer.G(x)
    gate = torch.sigmoid(z)
    hard = (gate > 0.5).double()
    assert 0.1 < hard.mean() < 0.9
    soft = hard.detach() + gate - gate.detach()
    up = torch.randn_like(x)
    wanted = layer.osc((soft * x) @ layer.T + layer.bias)
    params = [x, layer.T, layer.G.weight, layer.G.bias]
    for a, b in zip(torch.autograd.grad(wanted, params, up), torch.autograd.grad(layer(x), params, up)):
        assert torch.allclose(a, b, atol=1e-12)
    assert layer.measured["sparsity"].shape == () and not layer.measured["sparsity"].requires_grad
    assert layer.measured["sparsity"].item() == pytest.approx(1 - hard.mean().item(), abs=1e-6)


@pytest.mark.parametrize("flags", KINDS)
def test_gradients_reach_every_parameter(flags):
    torch.manual_seed(0)
    model = BioMLP(config(**flags))
    x, reached = torch.randn(4, 8, model.c_proj.out_features), set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        model(x).square().sum().backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert reached == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("flags", KINDS[4:7:2])
@pytest.mark.slow
def test_compiles(flags):
    model, x = build(flags, dtype=torch.float32)
    model.train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = [f(x) for f in (model, compiled)]
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in out]
    assert (out[0] - out[1]).abs().max() < 1e-5
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(*grads))


@pytest.mark.parametrize("flags", KINDS)
def test_bfloat16(flags):
    """Both whole models in bfloat16 and autocast: right types, near the float64 numbers where no choice is hard."""
    if flags.get("bio_threshold") != 0:
        flags = flags | {"bio_threshold": 1e-6, "bio_adaptive_threshold": False}  # every unit is active
    model, x = build(flags)
    wanted, single = model(x), build(flags, dtype=torch.float32)[0]
    single.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = single(x.float())
    half = single.bfloat16()(x.bfloat16())
    assert mixed.dtype == half.dtype == torch.bfloat16
    for y in (mixed, half):
        assert (y - wanted).abs().max() < 0.05 * max(1, wanted.abs().max().item())


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [f for f in KINDS if f.get("bio_threshold") != 0])
@torch.no_grad()
def test_one_token_reads_active_rows_only(flags):
    model, x = build(flags)
    gate = torch.sigmoid(model.events.G(model.dendrites(x[:1, -1:]))).view(-1)
    model.events.threshold = gate.sort().values[len(gate) // 2 - 1 : len(gate) // 2 + 1].mean()  # half are silent
    dense = model(x)[:1, -1:]
    alone = model(x[:1, -1:])
    assert (alone - dense).abs().max() < 1e-12
    silent = gate <= model.events.threshold
    assert silent.any() and not silent.all()
    model.events.T[silent] = torch.nan  # never read
    assert torch.equal(model(x[:1, -1:]), alone)
    assert model(x).isnan().any()
    model.events.threshold = torch.ones_like(gate)  # no unit is active
    assert model(x[:1, -1:]).isfinite().all()


# Adaptive thresholds ------------------------------------------------------------------------------------------------


def adaptive(target=0.7, seed=0):
    torch.manual_seed(seed)
    layer = SparseEventLayer(16, config(bio_adaptive_threshold=True, bio_target_sparsity=target))
    nn.init.normal_(layer.G.weight, std=0.25)
    nn.init.normal_(layer.G.bias)  # features differ
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.2, 0.7])
def test_thresholds_find_their_target(target):
    layer = adaptive(target)
    assert "threshold" in layer.state_dict() and "threshold" not in dict(layer.named_parameters())
    for _ in range(300):
        layer(torch.randn(1, 64, 16))
        layer.before_step()
    silent = torch.sigmoid(layer.G(torch.randn(4000, 16))) <= layer.threshold
    assert (silent.float().mean(0) - target).abs().max() < 0.1  # of each feature
    assert layer.threshold.std() > 0.05


def test_thresholds_count_as_one_batch_and_only_in_training():
    whole, parts = adaptive(), adaptive()
    x = torch.randn(4, 8, 16)
    whole(x), [parts(row) for row in x.split(1)]
    assert torch.equal(whole.counted, parts.counted) and whole.counted[-1] == 32
    before = whole.threshold.clone()
    whole.before_step()
    assert not whole.counted.any() and (whole.threshold != before).any()
    before = whole.threshold.clone()
    whole.eval()(x)
    whole.before_step()
    assert torch.equal(whole.threshold, before)  # nothing counted, nothing moved


def test_processes_steer_as_one(monkeypatch):
    """all_reduce is what another process counted, added; contract 9 tries two real ones."""
    whole, here, there = adaptive(), adaptive(), adaptive()
    x = torch.randn(4, 8, 16)
    whole(x), here(x[:3]), there(x[3:])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counted: counted.add_(there.counted))
    here.before_step()
    monkeypatch.undo()
    whole.before_step()
    assert torch.allclose(here.threshold, whole.threshold, atol=1e-7)
