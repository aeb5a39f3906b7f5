"""Local learning: every rule against a closed form, autograd or biotorch's own layers (fixtures/biotorch.json)."""

import copy
import json
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import model as module
from helpers import FIXTURES
from model import (
    FA_INITS,
    GELUSTE,
    GPT,
    E7Quantizer,
    FrozenSubspace,
    GPTConfig,
    HardTopK,
    Join,
    LayerNormCenterScale,
    LayerNormProjectedSurrogate,
    LayerNormSTE,
    LocalLinear,
    SigmoidSTE,
    SoftmaxValueMixLocal,
    VQResidualDir,
    backpropagation,
    feedback_matrix,
    local_attention,
    residual_limits,
    set_backprop,
    sigmoid_attention,
    sign_feedback,
    turn_towards,
)

SIZE = {"block_size": 16, "vocab_size": 31, "n_layer": 2, "n_head": 2, "n_embd": 16}
few = settings(max_examples=20, deadline=None)
sizes = st.integers(1, 9)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(**flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZE | {"tie_weights": False} | flags))
    return model, torch.randint(model.config.vocab_size, (4, model.config.block_size))


def cut_stream(model, idx, cuts):
    """The stream after all blocks, with what it was at each of dfa's cuts in the list `cuts`."""
    run = module.Pass(idx, cuts=cuts, cut=module.detach_and_record(cuts, model.dfa.places))
    return model.trunk(model.embed(run), run)


def nudged(model, idx, nudges):
    run = module.Pass(idx)
    return module.perturbed_hidden(model, model.embed(run), run, *nudges)


def backward(layer, x, g):
    """(y, dx, dW, db) of a layer for the error g at its output."""
    x = x.clone().requires_grad_()
    y = layer(x)
    tensors = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    return (y.detach(), *torch.autograd.grad(y, tensors, g))


def gradients(model, idx):
    model.zero_grad()
    model(idx, idx.roll(-1, 1))[1].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# LocalLinear --------------------------------------------------------------------------------------------------------


@few
@given(sizes, sizes, st.booleans(), st.sampled_from(("bp", "dfa")), st.lists(sizes, min_size=0, max_size=2))
def test_bp_is_nn_linear_to_the_last_bit(n_in, n_out, bias, method, lead):
    torch.manual_seed(0)
    plain, after = nn.Linear(n_in, n_out, bias), torch.rand(1)
    torch.manual_seed(0)
    local = LocalLinear(n_in, n_out, bias, method)
    assert torch.equal(after, torch.rand(1))  # nothing was drawn on top
    assert isinstance(local, nn.Linear) and not list(local.buffers())
    assert local.state_dict().keys() == plain.state_dict().keys()
    x, g = torch.randn(*lead, n_in), torch.randn(*lead, n_out)
    assert all(torch.equal(a, b) for a, b in zip(backward(local, x, g), backward(plain, x, g), strict=True))


@few
@given(sizes, sizes, st.booleans(), st.lists(sizes, min_size=0, max_size=2))
def test_feedback_equal_to_the_weight_is_backpropagation(n_in, n_out, bias, lead):
    local, plain = LocalLinear(n_in, n_out, bias, "fa").double(), nn.Linear(n_in, n_out, bias).double()
    plain.load_state_dict({k: v for k, v in local.state_dict().items() if k != "feedback"})
    local.feedback.copy_(local.weight.detach())
    x, g = torch.randn(*lead, n_in).double(), torch.randn(*lead, n_out).double()
    for a, b in zip(backward(local, x, g), backward(plain, x, g), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14 * (1 + b.abs().max()))


@pytest.mark.parametrize("name", ["fa", "usf", "brsf"])
def test_equals_biotorch(name):
    theirs = json.loads((FIXTURES / "biotorch.json").read_text())["layers"][name]
    t = {k: torch.tensor(v, dtype=torch.float64) for k, v in theirs.items()}
    method = {"fa": "fa"}.get(name, "sign_sym")
    scale = {"usf": "init", "brsf": "frozen_magnitude"}.get(name, "mean")
    layer = LocalLinear(4, 3, True, method, sign_scale=scale, std=theirs["scale"]).double()
    with torch.no_grad():
        layer.weight.copy_(t["weight"]), layer.bias.copy_(t["bias"])
        if name != "usf":
            layer.feedback.copy_(t["feedback"] if name == "fa" else t["feedback"].abs())
    tolerance = 1e-7 if name == "usf" else 1e-14  # its scale was rounded to float32 on the way
    for mine, key in zip(backward(layer, t["x"], t["g"]), ("y", "dx", "dw", "db"), strict=True):
        assert torch.allclose(mine, t[key], rtol=0, atol=tolerance), key
    cosine = F.cosine_similarity(layer.error_weight().flatten(), layer.weight.flatten(), dim=0)
    assert math.degrees(math.acos(cosine.item())) == pytest.approx(theirs["angle"], abs=1e-4)


@pytest.mark.slow
def test_sign_feedback_angles_and_scale():
    """angle(W, sign W) = acos(E|w| / sqrt(E w^2)): 30 degrees for uniform weights, 37.07 for Gaussian ones."""
    for W, degrees in ((2 * torch.rand(2000, 2000) - 1, 30.0), (torch.randn(2000, 2000), 37.07)):
        assert module.cosine(W, sign_feedback(W, None)) == pytest.approx(math.cos(math.radians(degrees)), abs=2e-4)
        B = sign_feedback(W, None)  # the multiple of sign(W) that is nearest to W
        assert all((W - B).norm() < (W - c * B).norm() for c in (0.98, 1.02))


def test_sign_feedback_follows_the_weight():
    for scale in ("mean", "init", "frozen_magnitude"):
        layer = LocalLinear(6, 5, False, "sign_sym", sign_scale=scale)
        x, g = torch.randn(3, 6), torch.randn(3, 5)
        before = backward(layer, x, g)[1]
        with torch.no_grad():
            layer.weight.neg_()
        assert torch.allclose(backward(layer, x, g)[1], -before) and before.abs().max() > 0


@few
@given(sizes, sizes, st.integers(0, 3), st.sampled_from(FA_INITS))
def test_feedback_matrices_are_reproducible_and_leave_the_generator_alone(n_out, n_in, seed, mode):
    state = torch.get_rng_state()
    first, again, other = (LocalLinear(n_in, n_out, False, "fa", mode, seed=s).feedback for s in (seed, seed, seed + 1))
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    feedback_matrix(n_out, n_in, mode, 0.02, 0, torch.Generator().manual_seed(seed))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again) and first.shape == (n_out, n_in)
    assert n_in * n_out == 1 or not torch.equal(first, other)


def test_feedback_statistics():
    def draw(mode, shape=(64, 256), k=0):
        return feedback_matrix(*shape, mode, 0.02, k, torch.Generator().manual_seed(0))

    assert draw("gaussian").std().item() == pytest.approx(0.02, rel=0.02)
    for shape in ((64, 256), (256, 64), (8, 8)):
        B, least = draw("orthogonal", shape), min(shape)
        gram = B @ B.T if shape[0] == least else B.T @ B
        assert torch.allclose(gram, torch.eye(least), atol=1e-5)
        he = draw("ortho_he", shape)
        assert he.square().mean().item() == pytest.approx(2 / shape[0], rel=1e-4)
        assert torch.allclose(he / he.norm(), B / B.norm(), atol=1e-6)
    for k, wanted in ((0, 16), (5, 5), (999, 256)):
        B = draw("sparse", k=k)
        assert ((B != 0).sum(1) == wanted).all()
        assert B.std().item() == pytest.approx(0.02, rel=0.08)


def test_each_layer_has_feedback_of_its_own_that_is_saved():
    model, _ = build(method="fa", n_layer=3)
    own = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert all(isinstance(m, module.LocalLinear) for m in own.values()) and len(own) == 3 * 6 + 1
    assert {f"{n}.feedback" for n in own} <= model.state_dict().keys()
    square = [m.feedback for n, m in own.items() if m.weight.shape == (16, 16)]
    assert all(not torch.equal(a / a.std(), b / b.std()) for i, a in enumerate(square) for b in square[:i])
    assert own["transformer.h.0.attn.o_proj"].feedback.std() < 0.015 < own["transformer.h.0.attn.q_proj"].feedback.std()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    for method in ("fa", "sign_sym"):
        layer = LocalLinear(6, 5, True, method).to(dtype)
        grads = backward(layer, torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 3, 5, dtype=dtype))
        assert {t.dtype for t in grads} == {dtype}
        layer, x = LocalLinear(6, 5, True, method), torch.randn(4, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.weight.grad.dtype == torch.float32
        wanted = y.new_ones(4, 5).float() @ layer.error_weight()
        assert torch.allclose(x.grad, wanted, atol=0.05 * wanted.abs().max())


def test_forward_mode_goes_through_the_layer_itself():
    """J p = W p whatever the rule, and the true derivative where a surrogate is in the way."""
    x, p = torch.randn(3, 6), torch.randn(3, 6)
    for method in ("bp", "fa", "sign_sym"):
        layer = LocalLinear(6, 5, True, method)
        assert torch.allclose(torch.func.jvp(layer, (x,), (p,))[1], p @ layer.weight.T, atol=1e-6)
    plain = ((SigmoidSTE(), torch.sigmoid), (GELUSTE(), F.gelu))
    plain += tuple((ln(6), nn.LayerNorm(6)) for ln in (LayerNormSTE, LayerNormCenterScale, LayerNormProjectedSurrogate))
    for surrogate, true in plain:
        assert torch.allclose(torch.func.jvp(surrogate, (x,), (p,))[1], torch.func.jvp(true, (x,), (p,))[1], atol=1e-6)


def test_names_that_do_not_exist():
    for bad in ({"method": "hebb"}, {"init_mode": "zeros"}, {"sign_scale": "max"}):
        with pytest.raises(ValueError, match="must be one of"):
            LocalLinear(3, 3, **bad)


# TinyDFA ------------------------------------------------------------------------------------------------------------


def test_one_hidden_layer_fa_is_dfa_in_closed_form():
    """y = W2 tanh(W1 x), error e: dW2 = e^T h, dW1 = (e B * (1 - h^2))^T x, by either rule."""
    W1, W2 = LocalLinear(5, 7, False, "fa").double(), LocalLinear(7, 3, False, "fa").double()
    x, target = torch.randn(11, 5).double(), torch.randn(11, 3).double()
    h = torch.tanh(W1(x))
    e = (W2(h) - target).detach()
    fa = torch.autograd.grad(0.5 * (W2(h) - target).square().sum(), [W1.weight, W2.weight])
    h = torch.tanh(W1(x))
    y = Join.apply(F.linear(h.detach(), W2.weight), W2.feedback[None], h)
    dfa = torch.autograd.grad(0.5 * (y - target).square().sum(), [W1.weight, W2.weight])
    h = h.detach()
    closed = ((e @ W2.feedback) * (1 - h**2)).T @ x, e.T @ h
    for a, b, c in zip(fa, dfa, closed, strict=True):
        assert torch.allclose(a, c, rtol=0, atol=1e-12) and torch.allclose(b, c, rtol=0, atol=1e-12)


def test_linear_net_with_the_true_products_is_backpropagation():
    weights = [torch.randn(6, 6, dtype=torch.float64).requires_grad_() for _ in range(4)]
    x, target = torch.randn(9, 6).double(), torch.randn(9, 6).double()

    def loss(y):
        return 0.5 * (y - target).square().sum()

    bp = torch.autograd.grad(loss(x @ weights[0].T @ weights[1].T @ weights[2].T @ weights[3].T), weights)
    taps, h = [], x
    for W in weights[:-1]:
        taps.append(h @ W.T)
        h = taps[-1].detach()
    upper = torch.stack([torch.linalg.multi_dot([*(W.detach() for W in weights[:l:-1]), torch.eye(6).double()])
                         for l in range(3)])  # fmt: skip
    dfa = torch.autograd.grad(loss(Join.apply(h @ weights[-1].T, upper, *taps)), weights)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(bp, dfa, strict=True))


# Direct feedback in the model ---------------------------------------------------------------------------------------


def reachable(tensor):
    """ids of the parameters that a gradient at `tensor` can reach."""
    found, queue, seen = set(), [tensor.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        queue += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("granularity", ["sublayer", "block"])
def test_segments_carry_no_gradient_function_into_earlier_ones(granularity):
    model, idx = build(method="dfa", dfa_granularity=granularity)
    taps = []
    end = cut_stream(model, idx, taps)
    segments = [reachable(t) for t in (*taps, end)]
    assert len(taps) == model.dfa.n_cuts == (3 if granularity == "sublayer" else 1)
    for i, a in enumerate(segments):
        assert a and all(not a & b for b in segments[:i])
    every = {id(p) for n, p in model.named_parameters() if not n.startswith(("lm_head", "transformer.ln_f"))}
    assert set.union(*segments) == every


def test_dfa_is_the_error_times_b_in_every_segment():
    model, idx = build(method="dfa")
    got = gradients(model, idx)
    taps = []
    h = model.transformer.ln_f(cut_stream(model, idx, taps))
    leaf = h.detach().requires_grad_()
    loss = F.cross_entropy(model.lm_head(leaf).flatten(0, 1), idx.roll(-1, 1).flatten())
    e, head = torch.autograd.grad(loss, [leaf, model.lm_head.weight])
    names, params = zip(*model.named_parameters())
    sent = [e @ B for B in model.dfa.feedback] + [e]
    wanted = torch.autograd.grad([*taps, h], params, sent, allow_unused=True)
    for name, w in zip(names, wanted, strict=True):
        assert torch.allclose(got[name], head if w is None else w, atol=1e-7), name
    with module.backpropagation(model):
        bp = gradients(model, idx)
    exact = {n for n in got if (got[n] - bp[n]).norm() < 1e-5 * bp[n].norm()}
    local = ("lm_head", "transformer.ln_f", "transformer.h.1.mlp", "transformer.h.1.ln_2")
    last = {n for n in got if n.startswith(local)}
    assert exact == last  # the head and the last segment, and nothing else


def test_skip_control_hands_the_streams_error_to_every_tap():
    model, idx = build(method="dfa", dfa_feedback="skip")
    got, taps = gradients(model, idx), []
    x = cut_stream(model, idx, taps)
    leaf = x.detach().requires_grad_()
    logits = model.lm_head(model.transformer.ln_f(leaf))
    e = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), idx.roll(-1, 1).flatten()), leaf)[0]
    names, params = zip(*model.named_parameters())
    wanted = torch.autograd.grad([*taps, x], params, [e] * (len(taps) + 1), allow_unused=True)
    assert all(torch.allclose(got[n], w, atol=1e-7) for n, w in zip(names, wanted) if w is not None)
    assert not [n for n in model.state_dict() if "dfa" in n]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fa", "sign_sym", "dfa"])
def test_forward_is_the_same_by_every_rule(method):
    model, idx = build(method=method)
    twin, _ = build()
    twin.load_state_dict(join_c_attn(model.state_dict()))
    assert torch.allclose(model(idx, idx)[0], twin(idx, idx)[0], atol=1e-6)
    with module.backpropagation(model):
        got = gradients(model, idx)
    wanted = gradients(twin, idx)
    assert all(torch.allclose(g, wanted[n], atol=1e-6) for n, g in got.items() if n in wanted)
    assert max((gradients(model, idx)[n] - g).abs().max() for n, g in got.items()) > 1e-4


def join_c_attn(weights):
    joined = {k: v for k, v in weights.items() if not k.endswith(".feedback")}
    for name in [k for k in joined if k.endswith("q_proj.weight") or k.endswith("q_proj.bias")]:
        joined[name.replace("q_proj", "c_attn")] = torch.cat([joined.pop(name.replace("q_", f"{p}_")) for p in "qkv"])
    return {k.replace("o_proj", "c_proj"): v for k, v in joined.items()}


def test_split_c_attn():
    plain, idx = build()
    model, _ = build(method="fa")
    weights = module.own_projections(plain.state_dict(), model)
    model.load_state_dict(weights)
    assert torch.allclose(model(idx, idx)[0], plain(idx, idx)[0], atol=1e-6)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in join_c_attn(weights).items())


def test_frozen_parts_stay():
    model, idx = build(freeze_blocks=1, freeze_emb=True)
    before, optimizer = copy.deepcopy(model.state_dict()), model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    gradients(model, idx)
    optimizer.step()
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    frozen = {n for n in before if n.startswith(("transformer.h.0.", "transformer.wte", "transformer.wpe"))}
    assert moved == before.keys() - frozen


# GrAPE --------------------------------------------------------------------------------------------------------------


def test_probe_identities():
    """E[(J p) p^T] = J; for one unit probe s, cos((J s) s^T, J) = |J s| / |J|_F."""
    J = torch.randn(6, 5).double()
    p = torch.randn(400_000, 5).double()
    assert torch.allclose((p @ J.T).T @ p / len(p), J, atol=0.02)
    for _ in range(5):
        s = F.normalize(torch.randn(5).double(), dim=0)
        wanted = (J @ s).norm() / J.norm()
        assert module.cosine(torch.outer(J @ s, s), J) == pytest.approx(wanted.item(), abs=1e-12)


@few
@given(st.integers(2, 8), st.integers(2, 8), st.floats(0.001, 1.0))
def test_a_turn_is_a_gradient_step_on_one_minus_cosine(rows, columns, rate):
    B, M = torch.randn(rows, columns).double(), torch.randn(rows, columns).double()
    leaf = B.clone().requires_grad_()
    loss = 1 - F.cosine_similarity(leaf.flatten(), M.flatten(), dim=0)
    stepped = B - rate * B.norm() ** 2 * torch.autograd.grad(loss, leaf)[0]
    turned = B.clone()
    turn_towards(turned, M, rate)
    assert torch.allclose(turned.norm(dim=0), B.norm(dim=0))
    assert torch.allclose(F.normalize(turned, dim=0), F.normalize(stepped, dim=0), atol=1e-9)


def test_a_turn_keeps_zeros():
    B = feedback_matrix(6, 8, "sparse", 1.0, 3, torch.Generator().manual_seed(1))
    turned = B.clone()
    turn_towards(turned, torch.randn(6, 8), 0.5)
    assert torch.equal(turned == 0, B == 0) and not torch.allclose(turned, B)


@pytest.mark.slow
def test_grape_aligns_feedback_with_the_weights():
    model, idx = build(method="fa", fa_grape=True, fa_grape_every=1)
    optimizer = model.configure_optimizers(0.0, 1e-9, (0.9, 0.95), "cpu")
    start = module.feedback_angles(model)
    for _ in range(30):
        gradients(model, idx)
        optimizer.step()
    end = module.feedback_angles(model)
    assert min(start.values()) > 70 and max(end.values()) < 45
    assert model.grape.step == 30


@pytest.mark.parametrize("flags", [{}, {"use_block_sparse": True, "anchor_min_gap": 3, "anchor_jitter": 1}])
def test_tap_jacobians(flags):
    """Against the Jacobian by autograd, summed over positions; the same row many times makes many probes."""
    model, _ = build(method="dfa", block_size=4, n_embd=4, fa_grape=True, **flags)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    idx = torch.randint(31, (1, 4))
    zeros = [torch.zeros(1, 4, 4).double() for _ in range(3)]
    J = torch.func.jacrev(lambda *n: nudged(model, idx, n), argnums=(0, 1, 2))(*zeros) if not flags else None
    M = module.cut_jacobians(model, idx.expand(3000, 4), torch.Generator().manual_seed(0))
    for l in range(3):
        if flags:  # the kernel's backward is not a functorch one: unit errors through autograd instead
            n = zeros[l].clone().requires_grad_()
            out = nudged(model, idx, [*zeros[:l], n, *zeros[l + 1 :]])
            wanted = torch.zeros(4, 4).double()
            for t in range(4):
                for c in range(4):
                    wanted[c] += torch.autograd.grad(out[0, t, c], n, retain_graph=True)[0][0, t]
        else:
            wanted = sum(J[l][0, t, :, 0, t, :] for t in range(4))
        assert module.cosine(M[l], wanted) > 0.97
        assert torch.allclose(M[l] / 3000, wanted, atol=0.15 * wanted.abs().max().item())


@pytest.mark.slow
def test_dfa_grape_turns_taps_towards_their_jacobians():
    model, idx = build(method="dfa", fa_grape=True, fa_grape_every=1, fa_grape_n_probe=4)
    optimizer = model.configure_optimizers(0.0, 1e-9, (0.9, 0.95), "cpu")
    wanted = module.cut_jacobians(model, idx.repeat(100, 1), torch.Generator().manual_seed(5))
    before = [module.cosine(B, M) for B, M in zip(model.dfa.feedback, wanted)]
    for _ in range(20):
        gradients(model, idx)
        optimizer.step()
    after = [module.cosine(B, M) for B, M in zip(model.dfa.feedback, wanted)]
    assert max(before) < 0.3 and min(after) > 0.7
    assert (model.grape.probe_tokens == -1).all() and model.training


@few
@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 100))
def test_the_sequences_chosen_do_not_depend_on_how_a_batch_is_split(a, b, seed):
    torch.manual_seed(seed)
    grape = module.Grape(GPTConfig(**SIZE, tie_weights=False, method="dfa", fa_grape=True, fa_grape_n_probe=4))
    rows = torch.randint(31, (a + b, 16))

    def heard(*parts):
        grape.probe_tokens.fill_(-1)
        for part in parts:
            grape.observe(part)
        return grape.probe_tokens.clone()

    whole = heard(rows)
    assert torch.equal(whole, heard(rows[:a], rows[a:])) and torch.equal(whole, heard(rows.flip(0)))
    parts = torch.cat((heard(rows[:a]), heard(rows[a:])))  # as all_gather of two processes
    assert torch.equal(whole, grape.chosen(parts))
    assert (whole[:, 0] >= 0).sum() == min(4, a + b)


@pytest.mark.parametrize("method", ["fa", "dfa", "sign_sym"])
def test_calibration_steps_are_true_backpropagation(method):
    model, idx = build(method=method, fa_calibrate_every=3)
    optimizer = model.configure_optimizers(0.0, 1e-3, (0.9, 0.95), "cpu")
    was_true = []
    for _ in range(6):
        got = gradients(model, idx)
        with module.backpropagation(model):
            true = gradients(model, idx)
        was_true.append(all(torch.equal(got[n], true[n]) for n in true))
        optimizer.step()
    assert was_true == [False, False, True] * 2
    again, _ = build(method=method, fa_calibrate_every=3)
    again.load_state_dict(model.state_dict())
    assert again.grape.step == 6


# Surrogates ---------------------------------------------------------------------------------------------------------


@few
@given(st.lists(sizes, min_size=1, max_size=3))
def test_straight_through_activations(shape):
    for ste, true in ((SigmoidSTE(), torch.sigmoid), (GELUSTE(), F.gelu)):
        x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
        assert torch.equal(ste(x), true(x))
        assert torch.equal(torch.autograd.grad(ste(x), x, g)[0], g)
        set_backprop(ste, True)
        assert torch.equal(torch.autograd.grad(ste(x), x, g)[0], torch.autograd.grad(true(x), x, g)[0])


@few
@given(st.integers(2, 9), sizes, st.booleans(), st.booleans())
def test_layer_norms(C, rows, affine, bias):
    plain = nn.LayerNorm(C, elementwise_affine=affine, bias=bias).double()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    x, g = torch.randn(rows, C).double(), torch.randn(rows, C).double()

    def run(ln):
        leaf = x.clone().requires_grad_()
        y = ln(leaf)
        return y.detach(), *torch.autograd.grad(y, [leaf, *ln.parameters()], g)

    y, dx, *exact = run(plain)
    gain = plain.weight.detach() if affine else torch.ones(C).double()
    sigma = (x.var(-1, unbiased=False, keepdim=True) + plain.eps).sqrt()
    g_hat = g * gain
    centred = (g_hat - g_hat.mean(-1, keepdim=True)) / sigma
    for kind, wanted in ((LayerNormSTE, g), (LayerNormCenterScale, centred), (LayerNormProjectedSurrogate, dx)):
        ln = kind(C, elementwise_affine=affine, bias=bias).double()
        ln.load_state_dict(plain.state_dict())
        got = run(ln)
        assert torch.allclose(got[0], y, atol=1e-12) and torch.allclose(got[1], wanted, atol=1e-10)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got[2:], exact, strict=True))


@few
@given(sizes, sizes, st.integers(0, 3))
def test_softmax_value_mix_equals_autograd(T, hs, seed):
    torch.manual_seed(seed)
    S = torch.randn(3, T, T).double().masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).requires_grad_()
    V, g = torch.randn(3, T, hs).double().requires_grad_(), torch.randn(3, T, hs).double()
    local, plain = SoftmaxValueMixLocal.apply(S, V)[0], S.softmax(-1) @ V
    assert torch.allclose(local, plain, atol=1e-14)
    for a, b in zip(torch.autograd.grad(local, (S, V), g), torch.autograd.grad(plain, (S, V), g), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_local_attention_equals_sdpa():
    q, k, v = (torch.randn(2, 3, 7, 4).double().requires_grad_() for _ in range(3))
    g = torch.randn(2, 3, 7, 4).double()
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    local = local_attention(q, k, v)
    assert torch.allclose(local, plain, atol=1e-13)
    for a, b in zip(torch.autograd.grad(local, (q, k, v), g), torch.autograd.grad(plain, (q, k, v), g)):
        assert torch.allclose(a, b, atol=1e-13)


@few
@given(sizes, st.integers(0, 5), st.booleans())
def test_sigmoid_attention(T, past, straight):
    n = T + past
    q, (k, v) = torch.randn(2, 3, T, 4).double(), (torch.randn(2, 3, n, 4).double() for _ in range(2))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    bias, g = torch.randn(T).double().requires_grad_(), torch.randn(2, 3, T, 4).double()
    mask = torch.arange(n) <= torch.arange(past, n)[:, None]
    scores = q @ k.mT / 2 + bias[:, None]
    A = scores.sigmoid() * mask
    y = sigmoid_attention(q, k, v, bias, mask, ste=SigmoidSTE() if straight else None)
    assert torch.allclose(y, A @ v, atol=1e-13)
    dS = (g @ v.mT) * mask * (1 if straight else A * (1 - A))
    wanted = dS @ k / 2, dS.mT @ q / 2, A.mT @ g, dS.sum((0, 1, 3))
    for a, b in zip(torch.autograd.grad(y, (q, k, v, bias), g), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


# Limits -------------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 9))
def test_hard_top_k_keeps_exactly_k_on_ties(C, k, rows, seed):
    torch.manual_seed(seed)
    x = torch.randint(1, 3, (rows, C)).float() * (2 * torch.randint(0, 2, (rows, C)) - 1)  # ties, and no zeros
    x.requires_grad_()
    y, g = HardTopK(k)(x), torch.randn(rows, C)
    kept = y != 0
    assert (kept.sum(-1) == min(k, C)).all() and torch.equal(y[kept], x[kept])
    if k < C:
        weakest = y.abs().masked_fill(~kept, 9).amin(-1)
        assert (x.abs().masked_fill(kept, 0).amax(-1) <= weakest).all()
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g * kept)


def test_frozen_subspace():
    P = FrozenSubspace(12, 5).double()
    x, g = torch.randn(3, 12).double().requires_grad_(), torch.randn(3, 12).double()
    y = P(x)
    assert torch.allclose(P(y), y, atol=1e-6) and torch.linalg.matrix_rank(P(torch.eye(12).double()), atol=1e-5) == 5
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], P(g)) and not list(P.parameters())
    assert ((x - y) * y).sum(-1).abs().max() < 1e-5


def test_with_all_limits_on_the_stream_lies_in_the_subspace():
    """Top-k, then the direction, then the projection: against each by hand, and the rank of what comes out."""
    flags = {"n_layer": 2, "n_head": 1, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    limits = residual_limits(GPTConfig(**flags, resid_topk=5, vq_codes=9, subspace_rank=6)).double()
    assert list(limits) == ["topk", "vq", "subspace"]
    x, Q = torch.randn(40, 16).double(), limits["subspace"].basis
    y = limits(x, 1)
    assert (y - y @ Q @ Q.T).abs().max() < 1e-6  # the basis was drawn in float32
    for row, got in zip(x, y):
        kept = row * (row.abs() >= row.abs().sort().values[-5])
        code = max(limits["vq"].codes, key=lambda c: torch.dot(c, kept))
        torch.testing.assert_close(got, Q @ (Q.T @ (kept.norm() * code)))


def test_each_block_can_have_its_own_directions():
    flags = {"n_layer": 3, "n_head": 1, "n_embd": 16, "block_size": 8, "vocab_size": 11, "vq_codes": 9}
    own, shared = (residual_limits(GPTConfig(**flags, vq_per_block=on)) for on in (True, False))
    books = [book.codes for book in own["vq"]]
    assert len(books) == 3 and torch.equal(books[0], shared["vq"].codes)
    assert not any(torch.equal(books[0], book) for book in books[1:])
    x = torch.randn(20, 16)
    for block, codes in enumerate(books):
        directions = F.normalize(own(x, block), dim=-1) @ codes.T
        torch.testing.assert_close(directions.max(-1).values, torch.ones(20))
    model = GPT(GPTConfig(**flags, vq_per_block=True)).eval()
    seen = []
    for book in model.limits["vq"]:
        book.register_forward_hook(lambda module, *_: seen.append(module))
    model(torch.arange(4)[None])
    assert seen == list(model.limits["vq"])


def test_vq_directions():
    vq = VQResidualDir(6, 40).double()
    x, g = torch.randn(50, 6).double().requires_grad_(), torch.randn(50, 6).double()
    y = vq(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    by_angle = torch.stack([F.cosine_similarity(x[:, None], vq.codes[None], dim=-1)]).argmax(-1)[0]
    assert torch.allclose(F.normalize(y, dim=-1), vq.codes[by_angle], atol=1e-6)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)
    assert len(set(by_angle.tolist())) > 5


def test_e7_quantizer():
    """Against whatever rounds to the lattice: dx = dy, and the scale's gradient is that of u + (round(u) - u) held."""
    quantize = E7Quantizer().double()
    x, g = (0.03 * torch.randn(5, 14).double()).requires_grad_(), torch.randn(5, 14).double()
    y = quantize(x)
    point = (y / quantize.scale).detach()
    again = quantize((point * quantize.scale).detach())
    assert torch.allclose(again, y, atol=1e-9)  # a lattice point stays where it is
    dx, ds = torch.autograd.grad(y, (x, quantize.scale), g)
    assert torch.allclose(dx, g)
    assert ds.item() == pytest.approx((g * (point - x / quantize.scale)).sum().item(), abs=1e-9)


# Diagnostics and refusals -------------------------------------------------------------------------------------------


def test_alignment():
    model, idx = build()
    report = module.alignment(model, idx, idx.roll(-1, 1))
    assert report["cosine"] == pytest.approx(1) and report["descends"] == 1 and "angle" not in report
    model, idx = build(method="sign_sym")
    state = torch.get_rng_state()
    report = module.alignment(model, idx, idx.roll(-1, 1))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert report["angle"] == pytest.approx(37.07, abs=1.5)
    assert report["cosine/lm_head"] == pytest.approx(1) and 0.3 < report["cosine"] < 1 and report["descends"] == 1
    assert all(p.grad is None for p in model.parameters())
    local = gradients(model, idx)
    with module.backpropagation(model):
        bp = gradients(model, idx)
    name = "transformer.h.0.attn.q_proj"
    wanted = module.cosine(local[f"{name}.weight"], bp[f"{name}.weight"])
    assert report[f"cosine/{name}"] == pytest.approx(wanted, abs=1e-6)


def test_exactly_restores_what_was():
    layer = LocalLinear(3, 3, method="fa")
    for on in (False, True):
        set_backprop(layer, on)
        with backpropagation(layer):
            assert layer.backprop
        assert layer.backprop == on


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"method": "hebb"}, "method"),
        ({"method": "fa"}, "tie_weights"),
        ({"freeze_emb": True}, "tie_weights"),
        ({"fa_init_mode": "sparse"}, "fa_init_mode"),
        ({"method": "fa", "tie_weights": False, "fa_sparse_k": 3}, "fa_sparse_k"),
        ({"sign_sym_scale": "init"}, "sign_sym_scale"),
        ({"dfa_granularity": "block"}, "dfa_granularity"),
        ({"method": "dfa", "tie_weights": False, "dfa_granularity": "block", "n_layer": 1}, "dfa_granularity"),
        ({"method": "sign_sym", "tie_weights": False, "fa_grape": True}, "fa_grape"),
        ({"method": "dfa", "tie_weights": False, "dfa_feedback": "skip", "fa_grape": True}, "fa_grape"),
        ({"fa_grape_every": 5}, "fa_grape"),
        ({"fa_calibrate_every": 5}, "fa_calibrate_every"),
        ({"ste_sigmoid": True}, "ste_sigmoid"),
        ({"ste_gelu": True, "mlp_act": "relu2"}, "ste_gelu"),
        ({"ln_mode": "zca"}, "ln_mode"),
        ({"fuse_attn_local": True, "use_block_sparse": True}, "fuse_attn_local"),
        ({"fuse_attn_local": True, "attn_mode": "sigmoid"}, "fuse_attn_local"),
        ({"mlp_topk": -1}, "mlp_topk"),
        ({"resid_topk": 768}, "resid_topk"),
        ({"subspace_rank": 768}, "subspace_rank"),
        ({"vq_codes": 1}, "vq_codes"),
        ({"vq_lattice": "e7"}, "vq_lattice"),
        ({"vq_lattice": "e8"}, "vq_lattice"),
        ({"freeze_blocks": 13}, "freeze_blocks"),
        ({"frozen_seed": 3}, "frozen_seed"),
        ({"method": "fa", "tie_weights": False, "htm_meta_strength": 0.1}, "htm_meta_strength"),
    ],
)
def test_refusals(flags, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**flags)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fa", "sign_sym", "dfa"])
@pytest.mark.parametrize("pattern", ["fhn", "fhn,softmax"])
def test_waves_come_back_under_every_rule(method, pattern, tmp_path):
    """A layer of waves keeps c_attn whole, where attention has q_proj, k_proj and v_proj."""
    model, idx = build(method=method, attn_pattern=pattern)
    module.save_checkpoint(tmp_path / "ckpt.pt", {"model": model.state_dict(), "model_args": vars(model.config)})
    again = GPT.from_checkpoint(module.load_checkpoint(tmp_path / "ckpt.pt"))
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("manifold", ["sphere", "e7", "rotor"])
def test_grape_probes_behind_a_manifold(manifold):
    """The embedding comes before all cuts, so its parts need no forward mode."""
    model, idx = build(
        method="dfa", fa_grape=True, fa_grape_every=1, use_manifold=True, manifold=manifold, skip_manifold_spectral=True
    )
    before, optimizer = model.dfa.feedback.clone(), model.configure_optimizers(0.0, 1e-3, (0.9, 0.95), "cpu")
    gradients(model, idx)
    optimizer.step()
    assert not torch.equal(model.dfa.feedback, before)


def test_grape_under_dfa_refuses_knots():
    with pytest.raises(ValueError, match="forward mode"):
        build(method="dfa", fa_grape=True, use_knot_attention=True)


@pytest.mark.parametrize("mode", ["ste", "center_scale", "projected"])
def test_norms_give_the_same_numbers_under_backpropagation(mode):
    """To the last bit: calibration steps switch the rule, and a checkpoint does not say which one was on."""
    model, idx = build(ln_mode=mode)
    logits = model(idx, idx)[0]
    with module.backpropagation(model):
        assert torch.equal(model(idx, idx)[0], logits)


def test_limits_are_counted_in_every_block():
    """Forward and twice backward: 2 K C per block for directions, 4 r C for a subspace, whether shared or not."""
    size = {"n_layer": 3, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 11}
    plain = GPT(GPTConfig(**size)).flops_per_token()
    for flags, each in (({"vq_codes": 16}, 2 * 16 * 8), ({"vq_codes": 16, "vq_per_block": True}, 2 * 16 * 8),
                        ({"subspace_rank": 4}, 4 * 4 * 8)):  # fmt: skip
        assert GPT(GPTConfig(**size, **flags)).flops_per_token() - plain == 3 * 3 * each


@pytest.mark.slow
def test_the_local_softmax_drops_its_mix():
    """With dropout: in evaluation the plain model, in training a mean over many draws that is its output."""
    size = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 11, "dropout": 0.2}
    torch.manual_seed(0)
    local, plain = (GPT(GPTConfig(**size, fuse_attn_local=on)) for on in (True, False))
    plain.load_state_dict(local.state_dict())
    idx = torch.randint(11, (2, 8))
    torch.testing.assert_close(local.eval()(idx)[0], plain.eval()(idx)[0])
    attention = local.train().transformer.h[0].attn
    attention.resid_dropout.p = 0.0
    x = torch.randn(2, 8, 8)
    draws = torch.stack([attention(x) for _ in range(3000)])
    error = (draws.mean(0) - plain.eval().transformer.h[0].attn(x)).abs()
    assert (draws.std(0) > 0).all() and (error < 6 * draws.std(0) / 3000**0.5).all()
