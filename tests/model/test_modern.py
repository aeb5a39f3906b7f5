"""The parts of a modern block against their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels.short_conv import reference, short_conv as convolve
from model import GPT, DecodingState, GPTConfig, ShortConv, rms_norm, softcap

SIZE = {"block_size": 12, "vocab_size": 17, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False}


def build(**flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZE | flags)).double().eval()
    return model, torch.randint(17, (3, 12))


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)


def test_rms_norm():
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    wanted = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    assert torch.allclose(rms_norm(x), wanted, rtol=1e-12, atol=0)


def test_rms_norm_gradient_by_hand():
    """By finite differences, and in each type as PyTorch's own."""
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(rms_norm, torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True))
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        x, grad = torch.randn(2, 5, 16).to(dtype).requires_grad_(), torch.randn(2, 5, 16).to(dtype)
        ours, theirs = (torch.autograd.grad(f(x), x, grad)[0] for f in (rms_norm, lambda x: F.rms_norm(x, (16,))))
        assert ours.dtype == dtype and (ours - theirs).abs().max() < error * theirs.abs().max()


def test_rope_is_ferope_in_its_plain_form():
    rope, idx = build(pos_embedding="rope", rope_base=500.0)
    ferope, _ = build(pos_embedding="none", use_ferope=True, rope_base=500.0)
    assert torch.equal(rope(idx, idx)[0], ferope(idx, idx)[0])


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_qk_norm_by_hand(mode):
    model, idx = build(qk_norm=True, attn_mode=mode, pos_embedding="none", n_layer=1)
    move(model)
    attn, x = model.transformer.h[0].attn, torch.randn(2, 12, 16, dtype=torch.float64)
    q, k, v = (t.view(2, 12, 2, 8).transpose(1, 2) for t in attn.c_attn(x).chunk(3, -1))
    q, k = (t / t.square().mean(-1, keepdim=True).sqrt() for t in (q, k))
    scores = 1.44 / math.sqrt(8) * q @ k.mT
    assert scores.abs().max() <= 1.44 * math.sqrt(8)
    hidden = torch.ones(12, 12).triu(1).bool()
    if mode == "softmax":
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    else:
        weights = (scores - math.log(12)).sigmoid().masked_fill(hidden, 0.0)
    wanted = attn.c_proj((weights @ v).transpose(1, 2).reshape(2, 12, 16))
    assert torch.allclose(attn(x), wanted, rtol=0, atol=1e-6)  # the bias -log n is float32


def test_emb_norm_makes_unit_vectors():
    model, idx = build(emb_norm=True, pos_embedding="none")
    seen = []
    model.transformer.h[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    model(idx)
    assert torch.allclose(seen[0], F.rms_norm(model.transformer.wte(idx), (16,)))


@pytest.mark.parametrize(
    "flags", [{}, {"attn_mode": "fhn"}, {"use_kan": True}, {"use_bio_mlp": True}, {"use_swiglu": True}]
)
def test_zero_init_leaves_the_stream_alone_at_first(flags):
    model, idx = build(zero_init_proj=True, **flags)
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:12]
    wanted = model.lm_head(model.transformer.ln_f(x))
    assert (model(idx, idx)[0] - wanted).abs().max() < 1e-12


def test_init_gain():
    model, _ = build(init_gain=0.6, n_embd=256, n_head=4, n_layer=2, vocab_size=97)
    for name, p in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            assert p.std().item() == pytest.approx(0.6 / 16, rel=0.02)
        elif name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.01, rel=0.02)  # 0.02 / sqrt(2 n_layer)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05)


def test_softcap():
    z = torch.tensor([-1e4, -3.0, 0.0, 0.1, 15.0, 1e4], dtype=torch.float64)
    assert torch.allclose(softcap(z, 15.0), 15 * (z / 15).tanh()) and softcap(z, 15.0).abs().max() <= 15
    assert softcap(z, 0.0) is z and softcap(z.bfloat16(), 15.0).dtype == torch.float32
    capped, idx = build(logit_softcap=2.0)
    plain, _ = build()
    for model in (capped, plain):
        with torch.no_grad():
            model.lm_head.weight *= 50
    assert torch.allclose(capped(idx, idx)[0], 2 * (plain(idx, idx)[0] / 2).tanh())
    assert torch.allclose(capped(idx)[0], 2 * (plain(idx)[0] / 2).tanh())


def test_rope_has_no_longest_context():
    """Beyond block_size the state goes on, and its logits are those of the whole text."""
    model, _ = build(pos_embedding="rope", norm="rms", qk_norm=True)
    move(model)
    text = torch.randint(17, (1, 30))
    state = DecodingState()
    stepped = torch.cat([model(text[:, t : t + 1], state=state)[0] for t in range(30)], 1)
    assert torch.allclose(stepped, model(text, text)[0], atol=1e-10)


@pytest.mark.parametrize("flags, words", [
    ({"norm": "rms", "ln_mode": "ste"}, 'norm="layer"'),
    ({"pos_embedding": "rope", "use_ferope": True}, "use_ferope=False"),
    ({"pos_embedding": "rope", "attn_mode": "fhn"}, "a layer of attention"),
    ({"qk_norm": True, "attn_mode": "fhn"}, "a layer of attention"),
    ({"logit_softcap": 15.0, "loss_chunk": 4}, "loss_chunk=0"),
    ({"logit_softcap": 15.0, "use_mfs_head": True, "mfs_layers": 1}, "no other head"),
    ({"zero_init_proj": True, "freeze_blocks": 1}, "freeze_blocks=1"),
    ({"rope_base": 500.0}, "use_ferope or pos_embedding"),
    ({"short_conv_at": "a"}, "without short_conv"),
    ({"init_gain": -1.0}, "init_gain=-1.0"),
    ({"short_conv": 4, "short_conv_at": "ca"}, "in this order"),
    ({"short_conv": 4, "short_conv_at": ""}, "in this order"),
    ({"short_conv": 4, "short_conv_at": "ax"}, "in this order"),
    ({"n_kv_head": 3}, "must divide n_head=2"),
    ({"n_kv_head": 1, "attn_mode": "fhn"}, "a layer of attention"),
    ({"n_kv_head": 1, "attn_mode": "kaufmann"}, "no kaufmann"),
    ({"n_kv_head": 1, "htm_meta_strength": 0.5}, "no htm_meta_strength"),
    ({"x0_skip": True, "method": "dfa", "tie_weights": False}, "x0_skip"),
])  # fmt: skip
def test_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SIZE | flags)


def conv1d(x, w):
    """x (B, T, C) plus a causal depthwise convolution of it by w (taps, C), by PyTorch."""
    padded = F.pad(x.mT, (len(w) - 1, 0))
    return x + F.conv1d(padded, w.flip(0).T[:, None], groups=x.size(-1)).mT


@pytest.mark.parametrize("taps", [1, 2, 4, 20])
def test_short_conv_is_a_depthwise_convolution(taps):
    conv, x = ShortConv(6, taps).double(), torch.randn(3, 12, 6, dtype=torch.float64)
    assert torch.equal(conv(x), x)  # at first
    nn.init.normal_(conv.w)
    wanted = conv1d(x, conv.w.view(taps, 6))
    assert torch.allclose(conv(x), wanted, atol=1e-12)
    state = DecodingState()
    stepped = torch.cat([conv(part, state) for part in x.split((1, 5, 2, 4), 1)], 1)
    assert torch.allclose(stepped, wanted, atol=1e-12)


def test_short_conv_gradients():
    """Of the hand-written backward, by finite differences, and for texts shorter than the filter."""
    for T in (1, 3, 9):
        x, w = torch.randn(2, T, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(convolve, (x, w))
        assert torch.allclose(convolve(x, w), reference(x, w), atol=1e-14)


def test_short_conv_is_where_it_is_said_to_be():
    model, idx = build(short_conv=3, short_conv_at="abcd", n_layer=1, mlp_act="relu2")
    move(model)
    block, x = model.transformer.h[0], torch.randn(2, 12, 16, dtype=torch.float64)

    def conv(module, h):
        return conv1d(h, module.w.view(3, -1))

    q, k, v = conv(block.attn.conv, block.attn.c_attn(conv(block.conv_1, block.ln_1(x)))).chunk(3, -1)
    q, k, v = (t.view(2, 12, 2, 8).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 12, 16)
    y = x + block.attn.c_proj(y)
    hidden = conv(block.mlp.conv, block.mlp.c_fc(conv(block.conv_2, block.ln_2(y))))
    assert torch.allclose(block(x), y + block.mlp.c_proj(hidden.relu() ** 2), atol=1e-12)


def test_token_shift_by_hand():
    model, idx = build(token_shift=True, n_embd=32)
    shift, x = model.token_shift, torch.randn(2, 5, 32, dtype=torch.float64)
    assert torch.equal(shift(x), x)
    move(model)
    w, strength = shift.gate.weight[0], shift.strength
    wanted = x.clone()
    for t in range(1, 5):
        gate = torch.sigmoid((x[:, t, :24] * w).sum(-1, keepdim=True))
        wanted[:, t] += strength * gate * x[:, t - 1]
    assert torch.allclose(shift(x), wanted, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"attn_mode": "sigmoid"}, {"pos_embedding": "rope", "qk_norm": True}])
def test_grouped_queries_are_attention_with_repeated_keys_and_values(flags):
    grouped, idx = build(n_head=4, n_kv_head=2, **flags)
    plain, _ = build(n_head=4, **flags)
    move(grouped)
    weights = grouped.state_dict()
    for name in [name for name in weights if name.endswith("c_attn.weight")]:
        q, k, v = weights[name].split((16, 8, 8))
        k, v = (t.view(2, 4, 16).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v))
        weights[name] = torch.cat((q, k, v))
    plain.load_state_dict(weights)
    assert torch.allclose(grouped(idx, idx)[0], plain(idx, idx)[0], atol=1e-12)
    states = DecodingState(), DecodingState()
    for model, state in zip((grouped, plain), states):
        model(idx, state=state)
    assert states[0].nbytes() == states[1].nbytes() / 2


def test_values_of_token_ids_by_hand():
    model, idx = build(value_embeds=True, n_layer=3)
    move(model)
    assert [block.attn.value_embedding is not None for block in model.transformer.h] == [True, False, True]
    one, x, v = (
        model.transformer.h[0].attn.value_embedding,
        torch.randn(3, 12, 16).double(),
        torch.randn(3, 12, 16).double(),
    )
    gate = 3 * torch.sigmoid(x[..., :12] @ one.gate.weight.T)  # (B, T, heads)
    wanted = v + gate.repeat_interleave(8, -1) * one.table.weight[idx]
    assert torch.allclose(one(v, x, idx), wanted, atol=1e-12)
    assert model.num_params() == sum(p.numel() for p in model.parameters()) - 12 * 16 - 2 * 17 * 16


def test_x0_skip_by_hand():
    model, idx = build(x0_skip=True, n_layer=3, pos_embedding="none")
    skip = model.input_skip
    assert torch.allclose(skip.a, torch.tensor([1.15, 1.1, 1.05]).double(), atol=1e-6)
    assert torch.allclose(skip.b, torch.tensor([0.2, 0.125, 0.05]).double(), atol=1e-6)
    move(model)
    x = x0 = model.transformer.wte(idx)
    for layer, block in enumerate(model.transformer.h):
        x = block(skip.a[layer] * x + skip.b[layer] * x0)
    assert torch.allclose(model(idx, idx)[0], model.lm_head(model.transformer.ln_f(x)), atol=1e-12)


def test_grouped_heads_are_split_for_other_learning_rules():
    """A model trained by backpropagation goes on under feedback alignment, with fewer keys and values too."""
    plain, idx = build(n_kv_head=1, tie_weights=False)
    checkpoint = {"model": plain.state_dict(), "model_args": vars(plain.config) | {"method": "fa"}}
    assert torch.allclose(GPT.from_checkpoint(checkpoint).double().eval()(idx)[0], plain(idx)[0], atol=1e-6)
