"""WaveKAN and SwiGLU: wavelets against closed forms and packages, kernels against their references, modules, sizes."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from helpers import FIXTURES
from kernels import wavekan
from kernels.wavekan import WAVELETS, bank_reference, edges_reference, wavelet_bank, wavelet_edges
from model import GPTConfig, SwiGLU, WaveKAN, WaveletEdges, WaveletMap, wavelet_map

FORMS = {"bank": (wavelet_bank, bank_reference), "edges": (wavelet_edges, edges_reference)}
IKAN = json.loads((FIXTURES / "ikan.json").read_text())


def settings_of(**flags):
    defaults = {"n_embd": 32, "bias": True, "dropout": 0.0, "kan_wavelet": "mex", "kan_edges": "shared", "kan_bank": 2}
    return SimpleNamespace(**vars(GPTConfig()) | defaults | {"kan_match_params": True} | flags)


def problem(shape, n, seed=0, dtype=torch.float64):
    """x (*shape) and weights, a, b (n, shape[-1])."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, *3 * [(n, shape[-1])])
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]


def both_ways(function, inputs, kind):
    """[output, gradients] for a fixed gradient of the output, in float64."""
    y = function(*inputs, kind)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [z.double() for z in (y.detach(), *torch.autograd.grad(y, inputs, grad))]


def error(got, want):
    """Largest error of each tensor, as a share of its largest number."""
    return max(((g - w).abs().max() / (w.abs().max() + 1e-30)).item() for g, w in zip(got, want) if w.numel())


# -- the wavelets themselves ------------------------------------------------------------------------------------------


def test_mex_is_pywavelets_mexican_hat():
    values, u = pywt.ContinuousWavelet("mexh").wavefun(length=1001)
    np.testing.assert_allclose(WAVELETS["mex"](torch.tensor(u)).numpy(), values, atol=1e-12)


def test_gaus1_and_morlet_are_pywavelets_up_to_scale():
    """gaus1 is the derivative of e^(-x^2) with unit energy: its x is u / sqrt 2. morl is the real Morlet wavelet."""
    values, u = pywt.ContinuousWavelet("morl").wavefun(length=1001)
    np.testing.assert_allclose(WAVELETS["morlet"](torch.tensor(u)).numpy(), values, atol=1e-12)
    values, x = pywt.ContinuousWavelet("gaus1").wavefun(length=1001)
    ours = WAVELETS["gaus1"](torch.tensor(x) * math.sqrt(2)).numpy()
    scale = (ours @ values) / (values @ values)
    np.testing.assert_allclose(ours, scale * values, atol=1e-9)


def test_wavelets_integrate_to_zero_and_some_have_unit_energy():
    u = torch.linspace(-24, 24, 480_001, dtype=torch.float64)
    for kind, psi in WAVELETS.items():
        assert abs(torch.trapezoid(psi(u), u)) < 1e-5, kind  # Morlet's mean is sqrt(2 pi) e^-12.5
    for kind in ("mex", "dog"):
        assert torch.trapezoid(WAVELETS[kind](u) ** 2, u).item() == pytest.approx(1, abs=1e-9), kind
    assert WAVELETS["mex"](torch.zeros(())).item() == pytest.approx(0.867325, abs=1e-6)


def test_dog_is_the_difference_of_two_normal_densities():
    """Of widths 1 and 2, up to one factor; its Fourier transform is theirs, and zero at frequency 0."""
    u = torch.linspace(-24, 24, 4_801, dtype=torch.float64)
    narrow, wide = (torch.exp(-0.5 * (u / s) ** 2) / s for s in (1.0, 2.0))
    psi = WAVELETS["dog"](u)
    torch.testing.assert_close(psi, psi[2400] / (narrow - wide)[2400] * (narrow - wide), atol=1e-12, rtol=0)
    s1 = math.pi**0.25 * math.sqrt(1.5 - 2 * math.sqrt(0.4))
    for f in (0.0, 0.3, 1.0, 2.5):
        got = torch.trapezoid(psi * torch.cos(f * u), u).item()
        want = math.sqrt(2 * math.pi) / s1 * (math.exp(-f * f / 2) - math.exp(-2 * f * f))
        assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("kind, theirs", [("mex", "mex"), ("gaus1", "dog"), ("morlet", "morlet")])
def test_edges_are_the_layer_of_ikan(kind, theirs):
    """Outputs of ikan's layer without its base branch; its hat has the other sign and no constant."""
    case = IKAN[theirs]
    x, w, t, s = (torch.tensor(case[name], dtype=torch.float64) for name in "xwts")
    y = wavelet_edges(x, w, 1 / s, -t / s, kind) * (-1 / wavekan.MEX if kind == "mex" else 1)
    torch.testing.assert_close(y, torch.tensor(case["y"], dtype=torch.float64), atol=1e-6, rtol=1e-6)


# -- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    form=st.sampled_from(list(FORMS)),
    kind=st.sampled_from(list(WAVELETS)),
    shape=st.lists(st.integers(0, 7), max_size=2),
    channels=st.integers(1, 9),
    n=st.integers(1, 6),
    chunk=st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_kernels_equal_their_references(form, kind, shape, channels, n, chunk):
    fast, reference = FORMS[form]
    inputs = problem((*shape, channels), n)
    before, wavekan.CHUNK["cpu"] = wavekan.CHUNK["cpu"], chunk
    try:
        got = both_ways(fast, inputs, kind)
    finally:
        wavekan.CHUNK["cpu"] = before
    want = both_ways(reference, inputs, kind)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert error(got, want) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("kind", WAVELETS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, kind):
    torch.autograd.gradcheck(lambda *z: FORMS[form][0](*z, kind), problem((2, 3, 4), 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_opcheck(form):
    operator = {"bank": wavekan.bank, "edges": wavekan.edges}[form]
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(operator, (*problem((2, 5, 4), 3, dtype=dtype), "mex"))


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", WAVELETS)
@pytest.mark.parametrize("form", FORMS)
def test_lower_precision(form, kind, dtype, most):
    fast, reference = FORMS[form]
    inputs = problem((3, 50, 40), 9, dtype=dtype)
    exact = [z.detach().double().requires_grad_() for z in inputs]
    got, want = both_ways(fast, inputs, kind), both_ways(reference, exact, kind)
    assert fast(*inputs, kind).dtype == dtype
    if dtype == torch.float32:
        assert error(got, want) < most
    else:  # the gradient that comes in is rounded too
        assert error(got[:1], want[:1]) < most and error(got, want) < 5 * most


@pytest.mark.parametrize("kind", WAVELETS)
@pytest.mark.parametrize("form", FORMS)
def test_far_away_is_nothing_and_never_nan(form, kind):
    x, w, a, b = problem((5, 4), 3, dtype=torch.float32)
    x = (1e6 * x.detach()).requires_grad_()
    y, *gradients = both_ways(FORMS[form][0], (x, w, a, b), kind)
    assert all(g.isfinite().all() for g in (y, *gradients))
    torch.testing.assert_close(y.float(), F.silu(x.detach()) if form == "bank" else torch.zeros_like(y).float())


@pytest.mark.parametrize("form", FORMS)
def test_bad_arguments_are_refused(form):
    fast = FORMS[form][0]
    x, w, a, b = problem((5, 4), 3)
    with pytest.raises(ValueError, match="mex, dog, gaus1, morlet"):
        fast(x, w, a, b, "haar")
    with pytest.raises(ValueError, match="5 channels, the wavelets 4"):
        fast(torch.zeros(2, 5), w, a, b, "mex")
    with pytest.raises(ValueError, match="one shape"):
        fast(x, w, a[:2], b, "mex")
    with pytest.raises(ValueError, match="floating"):
        fast(x.long(), w, a, b, "mex")


def peak_bytes(function):
    """Most bytes that tensors held at once while `function` ran, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.slow
def test_edges_need_a_tenth_of_the_memory_of_the_naive_layer():
    """384 -> 1536. What does not grow with the tokens (weights' gradients, buffers) falls out of the difference."""

    def step(function, tokens):
        inputs = problem((tokens, 384), 1536, dtype=torch.float32)
        return peak_bytes(lambda: torch.autograd.grad(function(*inputs, "mex").sum(), inputs))

    naive = (step(edges_reference, 3) - step(edges_reference, 1)) / 2
    ours = (step(wavelet_edges, 48) - step(wavelet_edges, 16)) / 32
    assert naive > 384 * 1536 * 4  # at least one number an edge and token
    assert ours < naive / 100


# -- the modules ------------------------------------------------------------------------------------------------------

MIXERS = {"swiglu": (SwiGLU, {})}
MIXERS |= {f"kan_{e}_{w}": (WaveKAN, {"kan_edges": e, "kan_wavelet": w}) for e in ("shared", "edge") for w in WAVELETS}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("C", [128, 384, 768])
@pytest.mark.parametrize("name", ["swiglu", "kan_shared_mex", "kan_edge_mex"])
def test_as_many_parameters_as_the_mlp(name, C, bias):
    mixer, flags = MIXERS[name]
    for K in (1, 2, 4) if name == "kan_shared_mex" else (2,):
        with torch.device("meta"):
            module = mixer(settings_of(n_embd=C, bias=bias, kan_bank=K, **flags))
        want = 8 * C * C + (5 * C if bias else 0)
        assert sum(p.numel() for p in module.parameters()) == pytest.approx(want, rel=0.02)


def test_unmatched_hidden_width_is_the_mlps():
    for form in ("shared", "edge"):
        assert WaveKAN(settings_of(kan_match_params=False, kan_edges=form)).c_proj.weight.shape == (32, 128)


@pytest.mark.parametrize("name", MIXERS)
def test_tokens_stay_apart_and_every_parameter_learns(name):
    torch.manual_seed(0)
    mixer, flags = MIXERS[name]
    module, x = mixer(settings_of(**flags)), torch.randn(2, 16, 32)
    y = module(x)
    changed = x.clone()
    changed[:, 7:] += 1
    assert torch.equal(module(changed)[:, :7], y[:, :7])
    torch.testing.assert_close(module(x[:1, 3:5]), y[:1, 3:5], atol=1e-6, rtol=1e-5)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize("name", ["swiglu", "kan_shared_mex", "kan_edge_mex"])
@pytest.mark.slow
def test_compiles_whole(name):
    torch.manual_seed(0)
    mixer, flags = MIXERS[name]
    module, x = mixer(settings_of(**flags)), torch.randn(2, 5, 32)
    results = []
    for f in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        y = f(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_runs_in_other_types(name, dtype):
    mixer, flags = MIXERS[name]
    module, x = mixer(settings_of(**flags)).to(dtype), torch.randn(2, 5, 32, dtype=dtype)
    y = module(x)
    y.sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and all(p.grad.dtype == dtype for p in module.parameters())


def test_a_map_is_its_formula():
    torch.manual_seed(0)
    config = settings_of(kan_bank=3, kan_wavelet="gaus1")
    x = torch.randn(4, 6, dtype=torch.float64)
    for layer in (WaveletMap(6, 5, config).double(), WaveletEdges(6, 5, config).double()):
        s = 0.01 + F.softplus(layer.s)
        if isinstance(layer, WaveletMap):
            u = (x[:, None] - layer.t.view(3, 6)) / s.view(3, 6)
            f = x * x.sigmoid() + (layer.m.view(3, 6) * -u * torch.exp(-u * u / 2)).sum(1)
            want = f @ layer.weight.T + layer.bias
        else:
            u = (x[:, None] - layer.t.view(5, 6)) / s.view(5, 6)
            want = (layer.weight * -u * torch.exp(-u * u / 2)).sum(-1) + layer.bias
        torch.testing.assert_close(layer(x), want, atol=1e-13, rtol=1e-12)


def test_widths_cannot_reach_zero():
    for form in ("shared", "edge"):
        layer = wavelet_map(6, 5, settings_of(kan_edges=form))
        with torch.no_grad():
            layer.s.fill_(-1e4)
        y = layer(torch.randn(7, 6))
        y.sum().backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("form", ["shared", "edge"])
@pytest.mark.slow
def test_learns_a_function_of_one_number(form):
    """sin(3x) by one layer 1 -> 8 -> 1: to 1 % of its variance, where a line explains far less."""
    torch.manual_seed(0)
    config = settings_of(kan_edges=form, kan_bank=8)
    layer = torch.nn.Sequential(torch.nn.Linear(1, 8), wavelet_map(8, 1, config))
    x = torch.linspace(-2, 2, 128)[:, None]
    y = torch.sin(3 * x)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(300):
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * y.var()
