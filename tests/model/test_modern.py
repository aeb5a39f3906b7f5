"""The parts of a modern block against their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, DecodingState, GPTConfig, rms_norm, softcap

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
])  # fmt: skip
def test_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**SIZE | flags)
