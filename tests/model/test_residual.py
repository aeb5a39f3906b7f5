"""Residual wiring against transformers' and hyper-connections' modules, POT's Sinkhorn, autograd, and its own laws."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from kernels import hyper
from model import (
    GPT,
    GPTConfig,
    HyperConnections,
    LayerAggregation,
    Residual,
    composite_gain,
    sinkhorn,
    stream_mean,
    wiring,
    within_reach,
)

N_LAYER, C = 2, 12


def config(**flags):
    base = {"n_layer": N_LAYER, "n_embd": C, "use_region_feedback": False, "use_mhc": True, "mhc_streams": 4}
    base |= {
        "adjacent_possible": 0.0,
        "mhc_sinkhorn_iters": 20,
        "hc_mode": "mhc",
        "gated_blocks": False,
        "use_mla": False,
        "mla_mode": "dense",
    }
    return SimpleNamespace(**base | flags)


def wires(dtype=torch.float64, scale=1.0, **flags):
    """A block's two sublayers of a model of N_LAYER, with coefficients that really depend on the token."""
    torch.manual_seed(0)
    c = config(**flags)
    found = nn.ModuleList(wiring(c, layer, s, 2) for layer in range(N_LAYER) for s in range(2)).to(dtype)
    for wire in found:
        nn.init.normal_(wire.coefficients.weight, std=0.3)
        nn.init.constant_(wire.scale, scale)
    return found


def streams(B=2, T=5, n=4, dtype=torch.float64):
    return torch.randn(B, T, n, C, dtype=dtype, generator=torch.Generator().manual_seed(1))


def plain_sinkhorn(logits, iters):
    P = logits.exp()
    for _ in range(iters):
        P = P / P.sum(-1, keepdim=True)
        P = P / P.sum(-2, keepdim=True)
    return P


# ---------------------------------------------------------------------------------------------------------------------
# Sinkhorn.


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 5),
    iters=st.integers(1, 20),
    batch=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 99),
)
def test_sinkhorn_and_its_backward_are_the_formulas(n, iters, batch, seed):
    g = torch.Generator().manual_seed(seed)
    logits, weight = (2 * torch.randn(*batch, n, n, dtype=torch.float64, generator=g) for _ in range(2))
    found = []
    for f in (sinkhorn, plain_sinkhorn):
        x = logits.clone().requires_grad_()
        P = f(x, iters)
        (P * weight).sum().backward()
        found.append((P.detach(), x.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


def test_sinkhorn_passes_gradcheck():
    logits = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 5), (logits,))


@pytest.mark.slow
def test_sinkhorn_converges_to_optimal_transport():
    ot = pytest.importorskip("ot")
    logits = torch.randn(4, 4, dtype=torch.float64)
    even = torch.ones(4, dtype=torch.float64).numpy()
    want = ot.sinkhorn(
        even, even, -logits.numpy(), reg=1.0, stopThr=1e-14
    )  # exp(-cost / reg), rows and columns sum to 1
    torch.testing.assert_close(sinkhorn(logits, 100), torch.from_numpy(want), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "noise, allowed", [(0.01, 5e-4), (0.1, 5e-3), (1.0, 0.05)]
)  # near-diagonal matrices converge slowly
def test_sinkhorn_is_doubly_stochastic_and_does_not_amplify(dtype, noise, allowed):
    g = torch.Generator().manual_seed(0)
    P = sinkhorn(noise * torch.randn(500, 4, 4, dtype=dtype, generator=g) + 4 * torch.eye(4, dtype=dtype), 20)
    rows, columns = ((P.sum(d) - 1).abs().max().item() for d in (-1, -2))
    print(f"worst row {rows:.1e}, worst column {columns:.1e}")
    assert columns < 4 * torch.finfo(dtype).eps and rows < allowed and P.min() > 0
    assert torch.linalg.matrix_norm(P, 2).max() < (1 + rows) ** 0.5 + 1e-6  # at most 1 where the rows are exact


@pytest.mark.parametrize("size", [30.0, 1e3, 1e30])
def test_sinkhorn_survives_extreme_logits(size):
    logits = torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(0)) * size
    logits[0] = torch.tensor([0.0, -size, -size, -size])  # every row wants the same column
    logits.requires_grad_()
    P = sinkhorn(logits, 20)
    (P * torch.randn_like(P)).sum().backward()
    assert P.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(P.sum(-2), torch.ones(200, 4), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.


@pytest.mark.slow
def test_kernels_pass_gradcheck():
    g = torch.Generator().manual_seed(0)
    x, pre, res, f, W = (
        torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)
        for shape in ((5, 3, 4), (5, 3), (5, 3, 3), (5, 4), (7, 12))
    )
    assert torch.autograd.gradcheck(hyper.mix, (x, pre, res))
    assert torch.autograd.gradcheck(hyper.spread, (x, f, pre))
    assert torch.autograd.gradcheck(lambda x, W: hyper.rms_project(x.flatten(1), W)[0], (x, W))
    assert torch.autograd.gradcheck(
        lambda x, W: hyper.mix(hyper.rms_project(x.flatten(1), W)[1].view_as(x), pre, res), (x, W)
    )


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_blocks_of_tokens_are_the_formula(block, monkeypatch):
    """Values and gradients of a sublayer, whatever the blocks; with one projection, whose x comes back to `mix`."""
    monkeypatch.setattr(hyper, "BLOCK", block)
    g = torch.Generator().manual_seed(0)
    data = [torch.randn(*s, dtype=torch.float64, generator=g) for s in ((9, 4, 6), (24, 24))]
    found = []
    for fast in (True, False):
        x, W = (t.clone().requires_grad_() for t in data)
        flat = x.flatten(1)
        if fast:
            z, again = hyper.rms_project(flat, W, 0.1)
        else:
            z = flat @ W.t() * (flat.square().mean(1, keepdim=True) + 0.1).rsqrt()
        pre, post, res = z.split((4, 4, 16), 1)
        res = res.unflatten(1, (4, 4))
        if fast:
            h, r = hyper.mix(again.view_as(x), pre, res)
            out = hyper.spread(r, h.sin(), post, in_place=True)
        else:
            out = hyper.reference(x, torch.sin, pre, post, res)
        out.cos().sum().backward()
        found.append((out.detach(), x.grad, W.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-connections against code by others.


@pytest.mark.slow
def test_mhc_is_deepseek_v4s():
    """The same pre and post, and comb is Sinkhorn's matrix of the same logits (they then apply its transpose)."""
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    ours = wires(scale=0.7)[0]
    names = {"hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 0.0, "rms_norm_eps": 1e-6, "hidden_size": C}
    theirs = v4.DeepseekV4HyperConnection(SimpleNamespace(**names)).double()
    with torch.no_grad():
        theirs.fn.copy_(ours.coefficients.weight)
        theirs.base.copy_(ours.static)
        theirs.scale.copy_(ours.scale)
    x = streams()
    post, comb, h = theirs(x)
    _, our_pre, our_post, our_res = ours.weights(x.flatten(0, 1))
    # they compute coefficients in float32
    torch.testing.assert_close(our_post, post.flatten(0, 1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_res, comb.flatten(0, 1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        (our_pre[..., None] * x.flatten(0, 1)).sum(1), h.flatten(0, 1).double(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.slow
def test_hc_is_the_packages():
    package = pytest.importorskip("hyper_connections")
    for index in range(3):
        ours = wires(hc_mode="hc", scale=0.3)[index]
        theirs = package.HyperConnections(4, dim=C, layer_index=index).double()
        with torch.no_grad():
            static = torch.cat((theirs.static_alpha, theirs.static_beta[:, None]), 1)
            order = [0, 5, 1, 2, 3, 4]  # ours: pre, post, res
            torch.testing.assert_close(ours.static.view(4, 6), static[:, order])  # the same start
            W = ours.coefficients.weight
            theirs.dynamic_alpha_fn.copy_(W[[0, 2, 3, 4, 5]].t())
            theirs.dynamic_beta_fn.copy_(W[1])
            theirs.dynamic_alpha_scale.fill_(0.3)
            theirs.dynamic_beta_scale.fill_(0.3)
        ours.scale.data.fill_(0.3)
        x = streams()
        h, add = theirs(x.permute(0, 2, 1, 3).reshape(-1, 5, C))  # theirs: (B n, T, C)
        want = add(h.sin()).unflatten(0, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(ours(x, torch.sin), want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Laws.


def test_h_res_keeps_the_mean_of_the_streams():
    for wire in wires()[:-1]:
        x = streams()
        torch.testing.assert_close(stream_mean(wire(x, torch.zeros_like)), stream_mean(x), atol=1e-12, rtol=0)


def test_the_start():
    torch.manual_seed(0)
    for index in range(8):
        wire = HyperConnections(config(), index, 8)
        nn.init.normal_(wire.coefficients.weight, std=0.02)
        _, pre, post, res = wire.weights(streams(dtype=torch.float32).flatten(0, 1))
        assert (pre.argmax(1) == index % 4).all() and (pre.sum(1) - 1).abs().max() < 0.05
        assert (post - 1).abs().max() < 0.05
        assert (res is None) == (index == 7)
        if res is not None:
            assert (res.diagonal(dim1=1, dim2=2) - 0.948).abs().max() < 0.01


@pytest.mark.slow
def test_composite_gain_stays_bounded_over_depth():
    torch.manual_seed(0)
    gains = {}
    for mode in ("mhc", "hc"):
        depth = nn.ModuleList(HyperConnections(config(hc_mode=mode), i, 65) for i in range(64))
        x = streams(dtype=torch.float32)
        for wire in depth:
            nn.init.normal_(wire.coefficients.weight, std=0.3)
            nn.init.constant_(wire.scale, 0.3)
            x = wire(x, torch.tanh)
            assert mode == "hc" or wire.measured["column_error"] < 1e-5
        gains[mode] = composite_gain(depth).item()
    assert gains["mhc"] < 1.1 and gains["hc"] > 10  # the constraint is what bounds it


def test_h_res_gets_a_gradient_from_the_start():
    """With H_pre favouring one stream a sublayer; a uniform H_pre leaves next to none."""
    sizes = {}
    for uniform in (False, True):
        torch.manual_seed(0)
        depth = nn.ModuleList(HyperConnections(config(n_embd=32), i, 8) for i in range(8))
        maps = nn.ModuleList(nn.Linear(32, 32) for _ in depth)
        for wire in depth:
            nn.init.normal_(wire.coefficients.weight, std=0.02)
            if uniform:
                wire.static.data[:4] = 0
        x = torch.randn(2, 6, 1, 32).repeat(1, 1, 4, 1)
        for wire, f in zip(depth, maps):
            x = wire(x, lambda h, f=f: f(torch.tanh(h)))
        stream_mean(x).square().mean().backward()
        sizes[uniform] = min(wire.static.grad[8:].abs().max().item() for wire in depth[1:-1])
    print(sizes)
    assert sizes[False] > 1e-7 and sizes[False] > 20 * sizes[True]


@pytest.mark.parametrize("flags", [{}, {"hc_mode": "hc"}, {"gated_blocks": True}, {"mhc_streams": 2}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_are_independent_and_every_parameter_learns(flags, dtype):
    found = wires(dtype, 0.1, **flags)
    n = flags.get("mhc_streams", 4)
    x = streams(n=n, dtype=dtype)
    y, z = x, x[1:, 2:4]
    for wire in found:
        y, z = wire(y, torch.sin), wire(z, torch.sin)
        assert y.dtype == dtype
    torch.testing.assert_close(y[1:, 2:4], z)
    stream_mean(y).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in found.parameters())


def test_autocast_keeps_coefficients_in_float32():
    wire, lin = wires(torch.float32)[0], nn.Linear(C, C)
    x = streams(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = wire(x, lin)
        assert y.dtype == torch.float32
        plain = wire.weights(x.flatten(0, 1))
    for a, b in zip(plain, wire.weights(x.flatten(0, 1))):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and lin.weight.grad is not None


@pytest.mark.parametrize("mode", ["mhc", "hc"])
@pytest.mark.slow
def test_compiles(mode):
    found = wires(torch.float32, 0.1, hc_mode=mode)[2:]

    def run(x):
        for wire in found:
            x = wire(x, torch.sin)
        return stream_mean(x)

    grads = []
    for f in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        x = streams(dtype=torch.float32).requires_grad_()
        found.zero_grad()
        out = f(x)
        out.square().sum().backward()
        grads.append([out.detach(), x.grad] + [p.grad.clone() for p in found.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(rho=st.floats(0.01, 3), scale=st.floats(0.01, 10), seed=st.integers(0, 99))
def test_steps_stay_within_reach_and_their_gradient_is_the_difference_quotient(rho, scale, seed):
    """Token by token: a short step as it is, a long one cut to rho |x|; gradients for x and y by finite differences."""
    g = torch.Generator().manual_seed(seed)
    x, y, w = (torch.randn(3, 4, 5, dtype=torch.float64, generator=g) for _ in range(3))
    y = scale * y
    far = y.norm(dim=-1) / x.norm(dim=-1) / rho
    got = within_reach(y, x, rho)
    for b in range(3):
        for t in range(4):
            wanted = y[b, t] * min(1, 1 / far[b, t].item())
            torch.testing.assert_close(got[b, t], wanted, atol=1e-12, rtol=1e-12)
    if ((far - 1).abs() < 1e-3).any():
        return  # a kink has no one gradient
    x.requires_grad_(), y.requires_grad_()
    gradients = torch.autograd.grad((within_reach(y, x, rho) * w).sum(), (x, y))
    h = 1e-6
    for which, gradient in enumerate(gradients):
        for i in range(0, 60, 7):
            ends = []
            for sign in (1, -1):
                moved = [x.detach().clone(), y.detach().clone()]
                moved[which].view(-1)[i] += sign * h
                ends.append((within_reach(moved[1], moved[0], rho) * w).sum().item())
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(gradient.view(-1)[i].item(), abs=1e-5 * (1 + scale))


def test_a_step_of_nothing_and_a_step_from_nothing_have_finite_gradients():
    for x, y in ((torch.randn(4), torch.zeros(4)), (torch.zeros(4), torch.randn(4)), (torch.zeros(4), torch.zeros(4))):
        x, y = x.requires_grad_(), y.requires_grad_()
        got = within_reach(y, x, 0.5)
        assert not got.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), (x, y)))


@pytest.mark.parametrize("flags", [{}, {"gated_blocks": True}, {"use_mhc": True}, {"use_mhc": True, "hc_mode": "hc"}])
def test_every_sublayer_of_a_model_stays_within_reach(flags):
    """Read from outside: plain, what a sublayer adds; with streams, what it hands to H_post."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "block_size": 8}
    model = GPT(GPTConfig(**sizes, adjacent_possible=0.1, init_gain=3.0, **flags)).double().eval()
    shares = []
    with pytest.MonkeyPatch.context() as patch:

        def watched(y, x, rho):
            step = within_reach(y, x, rho)
            shares.append((step.norm(dim=-1) / x.norm(dim=-1)).detach())
            return step

        patch.setattr("model.within_reach", watched)
        if "use_mhc" not in flags:
            for block in model.transformer.h:
                for wire in (block.wire_1, block.wire_2):
                    wire.register_forward_hook(
                        lambda _, given, out: shares.append((out - given[0]).norm(dim=-1) / given[0].norm(dim=-1))
                    )
        with torch.no_grad():
            model(torch.randint(11, (2, 8)))
    assert len(shares) == (4 if "use_mhc" in flags else 8)
    assert max(share.max().item() for share in shares) == pytest.approx(0.1, abs=1e-9)


def test_plain_and_gated():
    x = torch.randn(2, 3, C)
    plain, gated = (Residual(config(use_mhc=False, gated_blocks=on)) for on in (False, True))
    assert not list(plain.parameters()) and torch.equal(plain(x, torch.sin), x + x.sin())
    assert torch.equal(gated(x, torch.sin), plain(x, torch.sin))
    gated.gate.data.fill_(0.5)
    torch.testing.assert_close(gated(x, torch.sin), x + 0.5 * x.sin())


@pytest.mark.parametrize("with_streams", [False, True])
def test_dense_aggregation(with_streams):
    x = streams(dtype=torch.float32) if with_streams else torch.randn(2, 5, C)
    mla, outputs = LayerAggregation(config()), [stream_mean(x)]
    for _ in range(N_LAYER):
        y = x.sin()
        x = mla(y, outputs)
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)  # the start: itself
    mla.weights[1].data = torch.tensor([0.2, 0.3, 0.5])
    got = mla(x, kept := outputs[:2])
    want = 0.2 * outputs[0] + 0.3 * outputs[1] + 0.5 * kept[2]
    torch.testing.assert_close(stream_mean(got), want)
    if with_streams:  # only their mean moves
        torch.testing.assert_close(got - stream_mean(got)[:, :, None], x - stream_mean(x)[:, :, None])
    got.square().sum().backward()
    assert mla.weights[1].grad.abs().min() > 0


def test_scalar_aggregation_is_a_softmax_mix():
    mla, xs = LayerAggregation(config(mla_mode="scalar")), [torch.randn(2, 5, C) for _ in range(N_LAYER + 1)]
    mla.weights[0].data = torch.tensor([0.0, 3.0]).log().clamp(min=-50)
    mla.weights[0].data[0] = 0.0  # 1 to 3
    outputs = xs[:1]
    assert mla(xs[1], outputs) is xs[1]
    torch.testing.assert_close(mla(xs[2], outputs), 0.25 * xs[1] + 0.75 * xs[2])
