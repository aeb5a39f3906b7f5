"""Heads and auxiliaries against plain formulas: chunked losses, multi-facet softmax, slates, the L4 auto-encoder."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from kernels.heads import mixture_cross_entropy, mixture_log_probs, mixture_nll, reference
from model import (
    GPT,
    ContextSummary,
    DecodingState,
    GPTConfig,
    MFSHead,
    Pass,
    RegionSummary,
    SlidingWindowAE,
    WindowLinear,
    chunked_cross_entropy,
    window_sum,
)

CONFIG = {"l4_loss_weight": 0.1,
    "n_embd": 8, "vocab_size": 13, "bias": True, "loss_chunk": 0, "mfs_K": 3, "mfs_P": 4, "mfs_layers": 2,
    "mfs_window": 2, "mfs_lowrank_r": 0, "ae_window": 4, "ae_dim": 0, "slate_window": 5, "region_size": 2,
    "region_slate_include_prior": True, "region_slate_include_error": True, "region_prior_decay": 0.8,
}  # fmt: skip
CELLS = SimpleNamespace(starts=(0, 3, 4, 9, 14, 20), cell=torch.tensor([0] * 3 + [1] + [2] * 5 + [3] * 5 + [4] * 6))


def config(**flags):
    return SimpleNamespace(**CONFIG | flags)


def build(module, scale=0.3):
    """In float64, with parameters that are all of a size: no gate hides a part."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn_like(p))
    return module.double()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feed(call, sizes):
    """Outputs of call(slice of positions, state) fed in pieces, put together; all pieces share one state."""
    state, out = DecodingState(), []
    for size in sizes:
        out.append(call(slice(state.pos, state.pos + size), state))
        state.pos += size
    return torch.cat(out, 1)


# Losses -------------------------------------------------------------------------------------------------------------


def naive_log_probs(facets, log_prior, weight):
    """log p of one token, from p = sum_k prior_k softmax_k, token by token of the vocabulary."""
    K, V = len(log_prior), len(weight)
    P = len(facets) - K + 1
    p = torch.zeros(V, dtype=facets.dtype)
    for k in range(K):
        logits = torch.stack([facets[v % P if k == 0 else P - 1 + k] @ weight[v] for v in range(V)])
        p = p + log_prior[k].exp() * logits.exp() / logits.exp().sum()
    return p.log()


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    N=st.integers(1, 9), C=st.integers(1, 6), V=st.integers(1, 12), K=st.integers(1, 3), P=st.integers(1, 4),
    chunk=st.integers(0, 12), seed=st.integers(0, 9),
)  # fmt: skip
def test_mixture_equals_the_formula(N, C, V, K, P, chunk, seed):
    P = min(P, V)
    facets, weight = random(N, P + K - 1, C, seed=seed), random(V, C, seed=seed + 1)
    log_prior = random(N, K, seed=seed + 2).log_softmax(-1)
    targets = torch.randint(-1, V, (N,), generator=torch.Generator().manual_seed(seed))
    targets[0] = V - 1
    inputs = [x.requires_grad_() for x in (facets, log_prior, weight)]
    wanted = torch.stack([naive_log_probs(f, p, weight) for f, p in zip(facets, log_prior)])
    assert torch.allclose(mixture_log_probs(facets, log_prior, weight), wanted, atol=1e-10)
    direct = F.nll_loss(wanted, targets, ignore_index=-1)
    loss, each = mixture_cross_entropy(facets, log_prior, weight, targets, chunk)
    assert torch.allclose(loss, direct, atol=1e-10)
    assert torch.allclose(each, F.nll_loss(wanted, targets, ignore_index=-1, reduction="none"), atol=1e-10)
    for got, want in zip(torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * direct, inputs)):
        assert torch.allclose(got, want, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(1,), (7,), (2, 5), (1, 3, 2)]), C=st.integers(1, 6), V=st.integers(1, 12),
    chunk=st.integers(0, 12), seed=st.integers(0, 9),
)  # fmt: skip
def test_chunked_cross_entropy_equals_direct(shape, C, V, chunk, seed):
    x, weight = random(*shape, C, seed=seed).requires_grad_(), random(V, C, seed=seed + 1).requires_grad_()
    targets = torch.randint(-1, V, shape, generator=torch.Generator().manual_seed(seed))
    direct = F.cross_entropy((x @ weight.T).flatten(0, -2), targets.flatten(), ignore_index=-1)  # nan if all are -1
    loss = chunked_cross_entropy(x, weight, targets, chunk)
    assert torch.allclose(loss, direct, atol=1e-12, equal_nan=True)
    for got, want in zip(torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(direct, (x, weight))):
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_sums_in_float32(autocast):
    """bfloat16 rounds each logit, but the sums over 4000 tokens keep float32's digits."""
    torch.manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight = torch.randn(4000, 16, dtype=dtype), torch.randn(31, 16, dtype=dtype)
    targets = torch.randint(31, (4000,))
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = chunked_cross_entropy(x, weight, targets, 100)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, targets)
    assert loss.dtype == torch.float32 and abs(loss - wanted) < 2e-3 * wanted
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, exact)):
        assert got.dtype == dtype and (got - want).norm() < 0.01 * want.norm()


def test_extreme_logits_stay_finite():
    facets = torch.tensor([[[1e4], [-1e4]]], requires_grad=True)
    log_prior, weight = torch.full((1, 2), -math.log(2)), torch.tensor([[1.0], [-1.0]])
    loss, _ = mixture_cross_entropy(facets, log_prior, weight, torch.tensor([1]), 0)
    assert abs(loss.item() - math.log(2)) < 1e-5  # the second softmax gives token 1 everything, the first nothing
    assert torch.isfinite(torch.autograd.grad(loss, facets)[0]).all()


@pytest.mark.slow
def test_operator():
    facets, log_prior, weight = random(7, 6, 5), random(7, 3).log_softmax(-1), random(13, 5)
    inputs = [x.requires_grad_() for x in (facets, log_prior, weight)]
    targets = torch.tensor([3, -1, 12, 0, 5, 6, 7])
    torch.library.opcheck(mixture_nll, (*inputs, targets, 6, True))
    compiled = torch.compile(lambda *a: mixture_cross_entropy(*a, targets, 6)[0], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*inputs), reference(*inputs, targets)[0])
    losses = compiled(*inputs), reference(*inputs, targets)[0]
    for got, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses)):
        assert torch.allclose(got, want)


PEAKS = """
import resource, sys, torch
sys.path[:0] = PATHS
from model import MFSHead, chunked_cross_entropy
from types import SimpleNamespace
torch.set_num_threads(1)
T, V, C = 2048, 16384, 64
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
c = SimpleNamespace(n_embd=C, vocab_size=V, bias=True, loss_chunk=256, mfs_K=3, mfs_P=4, mfs_layers=3, mfs_window=2,
                    mfs_lowrank_r=0)
head = MFSHead(c)
weight = torch.randn(V, C, requires_grad=True)
xs, h = [torch.randn(1, T, C) for _ in range(3)], torch.randn(1, T, C, requires_grad=True)
y = torch.randint(V, (1, T))
def chunked(t): chunked_cross_entropy(h[:, :t], weight, y[:, :t], 256).backward()
def mfs(t): head.loss(*head.mixture([x[:, :t] for x in xs], h[:, :t]), weight, y[:, :t])[0].backward()
def direct(t): torch.nn.functional.cross_entropy((h[:, :t] @ weight.T).flatten(0, 1), y[:, :t].flatten()).backward()
for f in (chunked, mfs, direct):
    f(1)
start = peak()
for f in (chunked, mfs, direct):
    f(T)
    print(peak() - start)
"""


@pytest.mark.slow
def test_memory():
    """At 2048 tokens and 16384 words, in chunks of 256, three softmaxes peak far below the plain head all at once."""
    code = PEAKS.replace("PATHS", repr(sys.path[:2]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    chunked, mfs, direct = map(float, done.stdout.split())
    assert max(chunked, mfs) <= direct / 3  # MiB: 64, 72 and 405, where direct keeps three (2048, 16384) tensors


# Multi-facet softmax ------------------------------------------------------------------------------------------------


def mfs_inputs(T=9, B=2, layers=2, C=8, V=13):
    hiddens = [random(B, T, C, seed=i) for i in range(layers)]
    return hiddens, random(B, T, C, seed=9), random(V, C, seed=10)


def test_equal_facets_collapse_to_one_softmax():
    head, (hiddens, h, weight) = build(MFSHead(config())), mfs_inputs()
    with torch.no_grad():
        for p in head.facets.parameters():
            p.copy_(p.unflatten(0, (head.n_facets, -1))[0].repeat(head.n_facets, *[1] * (p.dim() - 1)))
    facets, log_prior = head.mixture(hiddens, h)
    assert log_prior.exp().std() > 0.01  # the prior is not uniform, and it does not matter
    assert torch.allclose(head(hiddens, h, weight), (facets[:, :, 0] @ weight.T).log_softmax(-1), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_facet_is_the_linear_head(rank):
    head, (hiddens, h, weight) = build(MFSHead(config(mfs_K=1, mfs_P=1, mfs_lowrank_r=rank))), mfs_inputs()
    with torch.no_grad():
        head.facets.weight.zero_(), head.facets.bias.zero_()
    assert torch.equal(head(hiddens, h, weight), (h @ weight.T).log_softmax(-1))
    assert not any("prior" in name for name, _ in head.named_parameters())


@pytest.mark.parametrize("slate", [None, random(2, 9, 8, seed=20)])
@pytest.mark.parametrize("rank", [0, 4])
def test_starts_at_the_linear_head(rank, slate):
    torch.manual_seed(0)
    head = MFSHead(config(mfs_lowrank_r=rank)).double()
    for module in head.modules():
        GPT._init_weights(module)
    head.init_own()
    hiddens, h, weight = mfs_inputs()
    difference = head(hiddens, h, weight, slate) - (h @ weight.T).log_softmax(-1)
    assert 0 < difference.abs().max() < 0.1


def test_reads_the_window_and_the_slate():
    """q by the formula, position by position, with zeros before the start."""
    head, (hiddens, h, _) = build(MFSHead(config())), mfs_inputs()
    W, slate = head.window.linear.weight.view(3, 8, 16), random(2, 9, 8, seed=30)
    for t in range(9):
        past = [torch.cat([x[:, t - j] for x in hiddens], -1) @ W[j].T for j in range(3) if j <= t]
        q = F.gelu(sum(past) + head.window.bias)
        for top, given_slate in ((h[:, t], None), (slate[:, t], slate)):
            joined = torch.cat((top, q), -1)
            facets, log_prior = head.mixture(hiddens, h, given_slate)
            wanted = (head.facets(joined).view(2, 6, 8)) + h[:, t, None]
            assert torch.allclose(facets[:, t], wanted, atol=1e-12)
            assert torch.allclose(log_prior[:, t], head.prior(joined).log_softmax(-1), atol=1e-12)


@pytest.mark.parametrize("with_ae", [False, True])
def test_mfs_slate_is_the_mean_of_the_last_states(with_ae):
    """The whole model against one without the flag whose head is called by hand with the means."""
    flags = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 13, "block_size": 12, "use_mfs_head": True}
    flags |= {"mfs_layers": 2, "add_l4_losses": with_ae}
    torch.manual_seed(0)
    on = GPT(GPTConfig(**flags, mfs_slate=True, slate_window=4)).double().eval()
    off = GPT(GPTConfig(**flags)).double().eval()
    off.load_state_dict(on.state_dict())
    for model in (on, off):
        torch.nn.init.normal_(model.mfs.facets.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    idx = torch.randint(13, (3, 12), generator=torch.Generator().manual_seed(0))
    run = Pass(idx, idx)
    h = off.final_norm(off.trunk(off.embed(run), run), run)
    means = torch.stack([h[:, max(0, t - 3) : t + 1].mean(1) for t in range(12)], 1)
    torch.testing.assert_close(on(idx, idx)[0], off.mfs(run.hiddens, h, run.weight, means))
    assert (on(idx, idx)[0] - off(idx, idx)[0]).abs().max() > 1e-3
    assert torch.equal(on(idx, idx)[0][:, 0], off(idx, idx)[0][:, 0])  # a mean of one


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 4), (7, 2)])
@pytest.mark.parametrize("window", [0, 2, 20])
def test_mfs_decodes(sizes, window):
    head, (hiddens, h, weight) = build(MFSHead(config(mfs_window=window))), mfs_inputs()
    stepped = feed(lambda at, state: head([x[:, at] for x in hiddens], h[:, at], weight, state=state), sizes)
    assert torch.allclose(stepped, head(hiddens, h, weight), atol=1e-12)


def test_loss_in_chunks_is_the_loss_of_the_log_probs():
    hiddens, h, weight = mfs_inputs()
    targets = torch.randint(-1, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, chunked = (build(MFSHead(config(loss_chunk=n))) for n in (0, 6))
    log_probs = whole(hiddens, h, weight)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))
    with torch.no_grad():
        assert torch.allclose(chunked(hiddens, h, weight), log_probs, atol=1e-12)
    direct = F.nll_loss(log_probs.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss, each = chunked.loss(*chunked.mixture(hiddens, h), weight, targets)
    assert torch.allclose(loss, direct) and torch.allclose(each.sum() / (targets != -1).sum(), direct)
    direct.backward(), loss.backward()
    for p, q in zip(whole.parameters(), chunked.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-12)


def parallelogram():
    """Embeddings of 6 words with e0 + e1 = e2 + e3 = 0."""
    weight = torch.zeros(6, 4)
    weight[0, 0], weight[1, 0], weight[2, 1], weight[3, 1], weight[4, 2], weight[5, 3] = 2, -2, 2, -2, 1, 1
    return weight


def fit(log_probs, parameters, steps=150):
    """Cross-entropy after training towards p0 = p1 = 0.5, best of all steps."""
    optimizer, best = torch.optim.Adam(parameters, lr=0.1), math.inf
    for _ in range(steps):
        loss = -log_probs()[..., :2].mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        best = min(best, loss.item())
    return best


@pytest.mark.parametrize("K, P", [(3, 4), (2, 1), (1, 2)])
@pytest.mark.slow
def test_breaks_the_softmax_bottleneck(K, P):
    """One softmax has p0 p1 = p2 p3 <= 1/16 here: a loss of at least ln 4. The entropy is ln 2, and MFS gets there."""
    weight, h = parallelogram(), torch.zeros(1, 1, 4, requires_grad=True)
    torch.manual_seed(0)
    assert fit(lambda: (h @ weight.T).log_softmax(-1), [h]) >= math.log(4) - 1e-4
    head = MFSHead(config(n_embd=4, vocab_size=6, mfs_K=K, mfs_P=P, mfs_layers=1))
    x = torch.randn(1, 1, 4)
    assert fit(lambda: head([x], x, weight), head.parameters()) < math.log(2) + 0.02


def test_costs_at_most_twice_the_linear_head():
    """At 12 x 768, V = 50304, T = 1024, by forward FLOPs a token; the backward is twice that in both."""
    C, V, n_layer, T = 768, 50304, 12, 1024
    with torch.device("meta"):
        head = MFSHead(config(n_embd=C, vocab_size=V, mfs_layers=3))
    plain = n_layer * (2 * 12 * C * C + 4 * C * (T + 1) / 2) + 2 * V * C
    linear = sum(2 * m.weight.numel() for m in head.modules() if isinstance(m, torch.nn.Linear))
    ratio = (plain + linear + head.flops_per_token(T)) / plain
    assert 1.5 < ratio < 2


# Auxiliary heads ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {}, {"loss_chunk": 7}, {"logit_softcap": 3.0}, {"use_mhc": True}, {"use_mla": True}, {"aux_heads_own": True},
        {"aux_heads_own": True, "logit_softcap": 3.0, "tie_weights": False},
    ],
)  # fmt: skip
def test_auxiliary_heads_by_hand(flags):
    """Losses and gradients from the layers' outputs, as the next layers read them, in plain formulas."""
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_head": 2, "n_embd": 16, "vocab_size": 13, "block_size": 12}
    model = GPT(GPTConfig(**sizes, aux_heads="1,3", aux_heads_weight=0.25, **flags)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    idx = torch.randint(13, (3, 12))
    targets = torch.where(torch.rand(3, 12) < 0.2, -1, idx.roll(-1, 1))
    read = {}
    for block, layer in zip(model.transformer.h[1:], (1, 2, 3)):
        block.register_forward_pre_hook(lambda _, x, layer=layer: read.__setitem__(layer, x[0]))
    _, loss = model(idx, targets)
    cap, losses = flags.get("logit_softcap"), [model.losses["lm"]]
    for layer in (1, 3):
        x = read[layer].mean(2) if "use_mhc" in flags else read[layer]
        own = flags.get("aux_heads_own")
        logits = model.transformer.ln_f(x) @ (model.aux.own[str(layer)] if own else model.lm_head).weight.T
        log_p = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)
        picked = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        losses.append(-picked[targets != -1].mean())
        torch.testing.assert_close(model.losses[f"aux_{layer}"], losses[-1].detach())
    assert set(model.losses) == {"lm", "aux_1", "aux_3"}
    torch.testing.assert_close(loss, losses[0] + 0.25 * (losses[1] + losses[2]))
    plain = GPT(GPTConfig(**sizes, **{k: v for k, v in flags.items() if k != "aux_heads_own"})).double()
    shared = {name for name, _ in plain.named_parameters()}
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aux.own")})
    parameters = [p for name, p in model.named_parameters() if name in shared]
    got = torch.autograd.grad(loss, parameters, retain_graph=True)
    lm = torch.autograd.grad(plain(idx, targets)[1], list(plain.parameters()))
    aux = torch.autograd.grad(0.25 * (losses[1] + losses[2]), parameters, allow_unused=True)
    for g, a, b in zip(got, lm, aux):
        torch.testing.assert_close(g, a if b is None else a + b, atol=1e-10, rtol=1e-7)
    model.eval(), plain.eval()
    for a, b in zip(model(idx, targets), plain(idx, targets)):
        assert torch.equal(a, b)


# Windows and slates -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(T=st.integers(1, 9), n=st.integers(1, 12), cut=st.integers(0, 9), seed=st.integers(0, 9))
def test_windows_by_hand(T, n, cut, seed):
    x = random(2, T, 3, seed=seed)
    linear, slate = build(WindowLinear(3, 2, n, True)), ContextSummary(config(slate_window=n))
    W = linear.linear.weight.view(n, 2, 3)
    sums, means, out = window_sum(x, n), slate(x), linear(x)
    for t in range(T):
        window = [x[:, t - j] for j in range(n) if j <= t]
        assert torch.allclose(sums[:, t], sum(window), atol=1e-12)
        assert torch.allclose(means[:, t], sum(window) / len(window), atol=1e-12)
        assert torch.allclose(out[:, t], sum(v @ W[j].T for j, v in enumerate(window)) + linear.bias, atol=1e-12)
    sizes = [s for s in (min(cut, T), T - min(cut, T)) if s]
    for module, full in ((linear, out), (slate, means)):
        assert torch.allclose(feed(lambda at, state, m=module: m(x[:, at], state), sizes), full, atol=1e-12)


def naive_region_slate(slate, h, error):
    """The slate's definition, token by token."""
    rows, prior = [], torch.zeros_like(h[:, 0])
    for t in range(h.size(1)):
        cell = int(CELLS.cell[t])
        first = CELLS.starts[cell // slate.region_size * slate.region_size]
        before = h[:, first : CELLS.starts[cell]]
        done = before.mean(1) if before.size(1) else torch.zeros_like(prior)
        own = h[:, CELLS.starts[cell] : t + 1].mean(1)
        parts = [done, own] + ([prior] if slate.decay is not None else [])
        row = slate.proj(torch.cat(parts, -1))
        rows.append(row if slate.c_error is None else row + slate.c_error(error[:, t]))
        prior = 0.8 * prior + 0.2 * h[:, t]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("prior, with_error", [(True, True), (False, False)])
def test_region_slate_by_hand(size, prior, with_error):
    flags = {"region_size": size, "region_slate_include_prior": prior, "region_slate_include_error": with_error}
    slate = build(RegionSummary(config(**flags), CELLS))
    h, error = random(2, 20, 8), random(2, 20, 1, seed=1)

    def call(at, state=None):
        out = slate(h[:, at], state)
        return slate.with_error(out, error[:, at]) if with_error else out

    wanted = naive_region_slate(slate, h, error)
    assert torch.allclose(call(slice(0, 20)), wanted, atol=1e-12)
    for sizes in ((1,) * 20, (3, 1, 6, 10), (2, 17, 1)):
        assert torch.allclose(feed(call, sizes), wanted, atol=1e-12)
    assert torch.allclose(call(slice(0, 7)), wanted[:, :7], atol=1e-12)  # a prefix alone


def test_region_slate_is_causal_to_the_last_bit():
    slate = build(RegionSummary(config(), CELLS)).float()
    h = random(1, 20, 8).float()
    full = slate(h)
    for t in range(1, 20):
        changed = torch.cat((h[:, :t], 5 * h[:, t:] + 1), 1)
        assert torch.equal(slate(changed)[:, :t], full[:, :t])
        assert (slate(changed)[:, t:] - full[:, t:]).abs().min(-1).values.max() > 1e-3


# L4 auto-encoder ----------------------------------------------------------------------------------------------------


def ae_inputs(T=9):
    idx = torch.randint(13, (2, T), generator=torch.Generator().manual_seed(3))
    return random(2, T, 8), random(2, T, 8, seed=1), idx, random(13, 8, seed=2)


def test_reconstruction_by_hand():
    ae, (h, slate, _, _) = build(SlidingWindowAE(config())), ae_inputs()
    z, V = ae.code(h, slate), ae.decoder.weight.view(4, 8, 2)
    target = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    errors = []
    for t in range(9):
        for j in range(4):
            wanted = target[:, t - j].detach() if j <= t else torch.zeros(2, 8, dtype=h.dtype)
            errors.append(z[:, t] @ V[j].T - wanted)
    direct, fast = torch.stack(errors).square().mean(), ae.reconstruction(z, h)
    assert torch.allclose(fast, direct, atol=1e-12)
    parameters = [p for name, p in ae.named_parameters() if "c_next" not in name]
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (fast, direct)]
    for got, want in zip(*grads):
        assert torch.allclose(got, want, atol=1e-12)


def test_the_target_of_reconstruction_has_no_gradient():
    ae, (h, slate, _, _) = build(SlidingWindowAE(config())), ae_inputs()
    z = ae.code(h, slate).detach()
    h.requires_grad_()
    assert torch.autograd.grad(ae.reconstruction(z, h), h, allow_unused=True) == (None,)


def test_predicts_the_token_after_the_target():
    ae, (h, slate, idx, weight) = build(SlidingWindowAE(config())), ae_inputs()
    targets = torch.cat((idx[:, 1:], torch.full((2, 1), 5)), 1)
    targets[0, 4] = -1
    logits = ae.c_next(ae.code(h, slate)) @ weight.T
    losses = [
        F.cross_entropy(logits[b, s], targets[b, s + 1])
        for b in range(2) for s in range(8) if targets[b, s + 1] != -1
    ]  # fmt: skip
    assert torch.allclose(ae(h, slate, targets, weight)[1], torch.stack(losses).mean(), atol=1e-12)


def test_a_single_token_has_no_next_step():
    ae, (h, slate, idx, weight) = build(SlidingWindowAE(config())), ae_inputs(T=1)
    weight.requires_grad_()
    reconstruction, loss = ae(h, slate, idx, weight)
    (reconstruction + loss).backward()
    assert loss == 0 and not weight.grad.any() and torch.isfinite(ae.c_next.weight.grad).all()


@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 1, 4), (7, 2)])
def test_error_by_hand_and_in_pieces(sizes):
    ae, (h, slate, idx, weight) = build(SlidingWindowAE(config(loss_chunk=5))), ae_inputs()
    error, logits = ae.error(h, slate, idx, weight), ae.c_next(ae.code(h, slate)) @ weight.T
    assert error.shape == (2, 9, 1) and not error.requires_grad and not error[:, :2].any()
    for t in range(2, 9):
        wanted = F.cross_entropy(logits[:, t - 2], idx[:, t], reduction="none")
        assert torch.allclose(error[:, t, 0], wanted, atol=1e-12)
    stepped = feed(lambda at, state: ae.error(h[:, at], slate[:, at], idx[:, at], weight, state), sizes)
    assert torch.allclose(stepped, error, atol=1e-12)


def test_error_is_causal_to_the_last_bit():
    ae, (h, slate, idx, weight) = build(SlidingWindowAE(config())).float(), ae_inputs()
    h, slate, weight = h.float(), slate.float(), weight.float()
    error = ae.error(h, slate, idx, weight)
    for t in range(2, 9):
        later = idx.clone()
        later[:, t:] = (idx[:, t:] + 1) % 13
        other = ae.error(torch.cat((h[:, :t], h[:, t:] + 1), 1), slate, later, weight)
        assert torch.equal(other[:, :t], error[:, :t]) and (other[:, t] - error[:, t]).abs().min() > 1e-4


# Types, compilation, refusals ---------------------------------------------------------------------------------------


def heads_loss(mfs, ae, slate, hiddens, h, weight, idx):
    s = slate(h)
    s = slate.with_error(s, ae.error(h, s, idx, weight))
    lm, _ = mfs.loss(*mfs.mixture(hiddens, h, s), weight, idx)
    return lm + sum(ae(h, s, idx, weight))


def all_heads(dtype=torch.float32):
    parts = [build(m).to(dtype) for m in (MFSHead(config(loss_chunk=7)), SlidingWindowAE(config()))]
    parts.append(build(RegionSummary(config(), CELLS)).to(dtype))
    hiddens, h, weight = mfs_inputs(T=20)
    idx = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    return parts, ([x.to(dtype) for x in hiddens], h.to(dtype), weight.to(dtype).requires_grad_(), idx)


def test_every_parameter_gets_a_gradient():
    parts, inputs = all_heads()
    heads_loss(*parts, *inputs).backward()
    for part in parts:
        for name, p in part.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_bfloat16_is_near_float64():
    exact, rough = (heads_loss(*parts, *inputs) for parts, inputs in map(all_heads, (torch.float64, torch.bfloat16)))
    assert rough.dtype in (torch.float32, torch.bfloat16) and abs(rough - exact) < 0.03 * exact


@pytest.mark.slow
def test_compiles():
    parts, inputs = all_heads()
    torch._dynamo.reset()
    compiled = torch.compile(heads_loss, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (heads_loss, compiled):
        loss = f(*parts, *inputs)
        grads.append((loss, *torch.autograd.grad(loss, [p for part in parts for p in part.parameters()])))
    for got, want in zip(*grads):
        assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"mfs_K": 2}, "use_mfs_head"),
        ({"mfs_lowrank_r": 2}, "use_mfs_head"),
        ({"use_mfs_head": True, "mfs_K": 0}, "mfs_K"),
        ({"use_mfs_head": True, "vocab_size": 3}, "mfs_P"),
        ({"loss_chunk": -1}, "loss_chunk"),
        ({"ae_window": 4}, "add_l4_losses"),
        ({"l4_loss_weight": 0.2}, "add_l4_losses"),
        ({"add_l4_losses": True, "l4_loss_weight": 0.0}, "l4_loss_weight"),
        ({"add_l4_losses": True, "region_size": 2, "slate_window": 4}, "slate_window"),
        ({"use_mfs_head": True, "slate_window": 4}, "slate_window"),
        ({"mfs_slate": True}, "use_mfs_head"),
        ({"aux_heads_weight": 0.5}, "aux_heads"),
        ({"aux_heads": "0"}, "aux_heads='0'"),
        ({"aux_heads": "12"}, "n_layer=12"),
        ({"aux_heads": "4,2"}, "in order"),
        ({"aux_heads": "two"}, "counted from 1"),
        ({"aux_heads": "2", "aux_heads_weight": 0.0}, "aux_heads_weight"),
        ({"aux_heads": "2", "method": "fa", "tie_weights": False}, "aux_heads"),
        ({"use_mfs_head": True, "mfs_slate": True, "region_size": 2}, "region_size=0"),
        ({"use_mfs_head": True, "region_size": 2, "region_slate_include_error": True}, "add_l4_losses"),
        ({"add_l4_losses": True, "region_prior_decay": 0.5}, "region_size"),
        (
            {"add_l4_losses": True, "region_size": 2, "region_slate_include_prior": False, "region_prior_decay": 0.5},
            "region_slate_include_prior",
        ),
        ({"region_size": 2}, "use_mfs_head"),
    ],
)
def test_refuses(flags, named):
    if "use_mfs_head" not in GPTConfig.__dataclass_fields__:
        pytest.skip("the flags are not in model.py yet")
    with pytest.raises(ValueError, match=named):
        GPTConfig(**flags)
