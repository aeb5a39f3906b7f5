"""GPT with every flag off is nanoGPT and GPT-2: names, numbers, loss, optimiser, cost, and what decoding remembers."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from model import (
    GPT,
    CausalSelfAttention,
    CheckpointError,
    DecodingState,
    GPTConfig,
    append_to_cache,
    causal_attention,
)

SMALL = {"block_size": 16, "vocab_size": 29, "n_layer": 2, "n_head": 2, "n_embd": 12}


def small(seed=0, **flags):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**SMALL | flags))


def tokens(B=3, T=16, V=29, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def layout(V, T, C, n_layer, bias):
    """The state dict of nanoGPT's model.py, written out: names in order, with shapes."""

    def norm(name):
        return {f"{name}.weight": (C,)} | ({f"{name}.bias": (C,)} if bias else {})

    def linear(name, n_in, n_out):
        return {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {})

    names = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        names |= norm(f"{h}.ln_1")
        names |= linear(f"{h}.attn.c_attn", C, 3 * C)
        names |= linear(f"{h}.attn.c_proj", C, C)
        names |= norm(f"{h}.ln_2")
        names |= linear(f"{h}.mlp.c_fc", C, 4 * C)
        names |= linear(f"{h}.mlp.c_proj", 4 * C, C)
    return names | norm("transformer.ln_f") | {"lm_head.weight": (V, C)}


# -- nanoGPT's parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_nanogpts(bias):
    model = small(bias=bias)
    expected = layout(V=29, T=16, C=12, n_layer=2, bias=bias)
    assert [(k, tuple(v.shape)) for k, v in model.state_dict().items()] == list(expected.items())
    # the order also counts: nanoGPT's optimiser state is by number
    assert [k for k, _ in model.named_parameters()] == [k for k in expected if k != "lm_head.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_without_position_table():
    names = layout(V=29, T=16, C=12, n_layer=2, bias=True)
    del names["transformer.wpe.weight"]
    assert list(small(pos_embedding="none").state_dict()) == list(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, count",
    [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080), (48, 25, 1600, 1557611200)],
)
def test_parameter_counts_of_gpt2(n_layer, n_head, n_embd, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params(non_embedding=False) == count
    assert model.num_params() == count - 1024 * n_embd


def test_num_params_without_position_table():
    model = small(pos_embedding="none")
    assert model.num_params() == model.num_params(non_embedding=False) == sum(p.numel() for p in model.parameters())


def test_initialisation():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=128, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 layers) = 4
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_initial_loss_is_that_of_guessing():
    _, loss = small()(tokens(8), tokens(8, seed=2))
    assert loss.item() == pytest.approx(math.log(29), abs=0.05)


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act, theirs", [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu2", "relu2")])
@pytest.mark.slow
def test_logits_are_those_of_transformers_gpt2(act, theirs, bias):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = small(mlp_act=act, bias=bias).double().eval()
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=29, n_positions=16, n_embd=12, n_layer=2, n_head=2, activation_function=theirs,
            bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )
    ).double().eval()  # fmt: skip
    weights, g = model.state_dict(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64))
            if name not in weights:
                assert name.endswith("bias") and not bias
                p.zero_()
                continue
            conv1d = p.dim() == 2 and ".h." in name  # (in, out) there, (out, in) here
            weights[name].copy_(p.T if conv1d else p)
    idx = tokens()
    with torch.no_grad():
        ours, theirs = model(idx, idx)[0], hf(idx).logits
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-10


def test_loss_is_the_cross_entropy_without_ignored_targets():
    model, idx, targets = small(), tokens(), tokens(seed=2)
    targets[0, :9], targets[2] = -1, -1
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 16, 29) and loss.shape == ()
    rows = logits.detach().double().numpy()
    nats = [
        np.log(np.exp(rows[b, t]).sum()) - rows[b, t, targets[b, t]]
        for b in range(3) for t in range(16) if targets[b, t] >= 0
    ]  # fmt: skip
    assert len(nats) == 16 - 9 + 16
    assert loss.item() == pytest.approx(np.mean(nats), abs=1e-6)
    assert model.losses.keys() == {"lm"} and model.losses["lm"] == loss and not model.losses["lm"].requires_grad


def test_a_view_of_targets_is_fine():
    data, model = tokens(3, 17), small()  # train.py's x, y are views of one tensor
    loss = model(data[:, :-1], data[:, 1:])[1]
    assert loss == model(data[:, :-1].clone(), data[:, 1:].clone())[1]


def test_without_targets_only_the_last_position():
    model, idx = small().eval(), tokens()
    last, loss = model(idx)
    assert last.shape == (3, 1, 29) and loss is None
    all_logits = model(idx, tokens(seed=2))[0]
    torch.testing.assert_close(last, all_logits[:, -1:], rtol=0, atol=1e-6)
    assert torch.equal(all_logits, model(idx, torch.full_like(idx, 3))[0])  # targets change no logit


@pytest.mark.parametrize("pos", ["learned", "none"])
def test_the_order_of_the_tokens_matters(pos):
    model, idx = small(pos_embedding=pos, n_layer=3).double(), tokens(1)
    swapped = idx.clone()
    swapped[0, [2, 5]] = idx[0, [5, 2]]
    assert idx[0, 2] != idx[0, 5]
    assert (model(idx)[0] - model(swapped)[0]).abs().max() > 1e-9


# -- refusals -----------------------------------------------------------------------------------------------------


@given(st.sampled_from(["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]), st.integers(max_value=0))
def test_refused_size(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: "):
        GPTConfig(**{name: value})


@given(st.integers(1, 64), st.integers(1, 512))
def test_heads_divide_the_width(n_head, n_embd):
    if n_embd % n_head == 0:
        GPTConfig(n_head=n_head, n_embd=n_embd)
    else:
        with pytest.raises(ValueError, match=f"n_embd={n_embd} .*n_head={n_head}"):
            GPTConfig(n_head=n_head, n_embd=n_embd)


@given(st.one_of(st.floats(max_value=0, exclude_max=True), st.floats(min_value=1), st.just(math.nan)))
def test_refused_dropout(value):
    with pytest.raises(ValueError, match="^dropout="):
        GPTConfig(dropout=value)


@given(st.sampled_from(["mlp_act", "pos_embedding"]), st.text() | st.none() | st.booleans())
def test_refused_choice(name, value):
    choices = {"mlp_act": ("gelu", "gelu_tanh", "relu2"), "pos_embedding": ("learned", "rope", "none", "ramanujan")}[
        name
    ]
    with pytest.raises(ValueError, match=f"^{name}=.*{', '.join(choices)}"):
        GPTConfig(**{name: value if value not in choices else f"{value} "})


def test_more_tokens_than_positions():
    model = small()
    for call in (lambda: model(tokens(T=17)), lambda: model(tokens(T=17), tokens(T=17))):
        with pytest.raises(ValueError, match="17 tokens, but block_size is 16"):
            call()
    state = DecodingState()
    model(tokens(T=10), state=state)
    with pytest.raises(ValueError, match="17 tokens, but block_size is 16"):
        model(tokens(T=7), state=state)
    model(tokens(T=6), state=state)  # the refused call left no trace
    assert state.pos == 16
    assert small(pos_embedding="none")(tokens(T=17))[0].isfinite().all()


# -- a shorter context --------------------------------------------------------------------------------------------


def test_crop_block_size():
    model, idx = small(), tokens(T=8)
    with torch.no_grad():
        before = model(idx, idx)[0]
        model.crop_block_size(8)
        assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 12)
    with pytest.raises(ValueError, match="9 tokens, but block_size is 8"):
        model(tokens(T=9))
    assert [tuple(v.shape) for v in model.state_dict().values()] == list(layout(29, 8, 12, 2, True).values())
    model(idx, idx)[1].backward()
    assert model.transformer.wpe.weight.grad.any()
    trained = [id(p) for group in optimizer(model).param_groups for p in group["params"]]
    assert id(model.transformer.wpe.weight) in trained
    model.crop_block_size(8)  # nothing to do
    with pytest.raises(ValueError, match="block_size=9: must be 1 to 8"):
        model.crop_block_size(9)


@pytest.mark.parametrize("block_size", [0, -1])
def test_crop_to_nothing_is_refused(block_size):
    model = small()
    with pytest.raises(ValueError, match="block_size"):
        model.crop_block_size(block_size)
    assert model.config.block_size == 16 and model.transformer.wpe.weight.shape == (16, 12)


def test_crop_without_a_table():
    model = small(pos_embedding="none")
    model.crop_block_size(4)
    assert model.config.block_size == 4 and model(tokens())[0].shape == (3, 1, 29)


# -- optimiser ----------------------------------------------------------------------------------------------------


def optimizer(model):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")


@pytest.mark.parametrize("bias", [True, False])
def test_optimiser_groups(bias):
    model = small(bias=bias)
    opt = optimizer(model)
    assert isinstance(opt, torch.optim.AdamW) and opt.defaults["lr"] == 1e-3 and opt.defaults["betas"] == (0.9, 0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = ([names[id(p)] for p in group["params"]] for group in opt.param_groups)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    matrices = [k for k, shape in layout(29, 16, 12, 2, bias).items() if len(shape) == 2 and k != "lm_head.weight"]
    vectors = [k for k, shape in layout(29, 16, 12, 2, bias).items() if len(shape) == 1]
    assert decay == matrices and rest == vectors


def test_frozen_parameters_stay():
    model = small()
    model.transformer.wpe.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = optimizer(model)
    model(tokens(), tokens(seed=2))[1].backward()
    opt.step()
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert same == {"transformer.wpe.weight"}


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, T, flops",
    [
        # 6 (12 L C^2 + V C) for the matrices and the head, 6 L C (T + 1) for scores and mixing
        ({"n_layer": 2, "n_head": 2, "n_embd": 12, "vocab_size": 29, "block_size": 16}, None,
         6 * (12 * 2 * 144 + 29 * 12) + 6 * 2 * 12 * 17),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "block_size": 1024}, None, 797_870_592),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "block_size": 1024}, 256, 755_403_264),
    ],
)  # fmt: skip
def test_flops_per_token(shape, T, flops):
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape))
    assert model.flops_per_token(T) == flops


@pytest.mark.parametrize("bias", [True, False])
def test_flops_per_token_is_what_pytorch_counts(bias):
    model, idx = small(bias=bias), tokens(B=3, T=16)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in counted.items() if "attention" not in op)
    attention = 3 * sum(m.flops_per_token(16) for m in model.modules() if isinstance(m, CausalSelfAttention))
    assert linear / (3 * 16) == model.flops_per_token(16) - attention


# -- attention ----------------------------------------------------------------------------------------------------


def reference_attention(q, k, v):
    """One query at a time, in float64."""
    rows = []
    for t in range(q.size(2)):
        scores = (k[:, :, : t + 1] @ q[:, :, t, :, None])[..., 0] / math.sqrt(q.size(-1))  # (B, nh, t + 1)
        rows.append((scores.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2))
    return torch.stack(rows, 2)


# bfloat16 keeps 8 bits: 2^-8 relative a rounding, a few roundings in a row
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("T", [1, 2, 77, 512, 513])
def test_causal_attention_and_its_gradients(T, dtype, tol):
    g = torch.Generator().manual_seed(T)
    q, k, v, dy = (torch.randn(2, 2, T, 8, generator=g).to(dtype) for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    rough = [x.requires_grad_() for x in (q, k, v)]
    want, got = reference_attention(*exact), causal_attention(*rough)
    assert got.dtype == dtype and got.shape == q.shape
    want.backward(dy.double())
    got.backward(dy)
    for a, b in [(got, want), *((r.grad, e.grad) for r, e in zip(rough, exact, strict=True))]:
        # T = 1: q and k have no gradient; what cancels there is as large as v's
        assert (a.double() - b).norm() <= tol * max(b.norm(), exact[2].grad.norm())


@pytest.mark.parametrize("T", [64, 600])
def test_bf16_attention_does_not_see_the_future(T):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, 8, generator=g).bfloat16() for _ in range(3))
    before = causal_attention(q, k, v)
    k[:, :, T // 2 :], v[:, :, T // 2 :] = 7.0, -100.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, : T // 2], after[:, :, : T // 2]) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_dropout(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 2, 100, 8).to(dtype)
    ones = torch.ones_like(q)  # weights sum to 1
    assert (causal_attention(q, k, ones) - 1).abs().max() < 0.02
    dropped = causal_attention(q, k, ones, dropout=0.5).float()
    assert dropped.std() > 0.1 and dropped[:, :, 20:].mean() == pytest.approx(1, abs=0.05)
    assert not dropped[:, :, 0].all()  # a query with one key loses it half the time


# -- dropout ------------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only():
    plain, model, idx = small(), small(dropout=0.5), tokens()
    model.load_state_dict(plain.state_dict())
    a, b = (model(idx, idx)[0] for _ in range(2))
    assert not torch.equal(a, b)
    model.eval()
    assert torch.equal(model(idx, idx)[0], plain(idx, idx)[0])


def test_dropout_is_everywhere_it_should_be():
    """With one place at a time left on, outputs in training differ."""
    model, idx = small(dropout=0.5), tokens()
    places = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    blocks = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.resid_dropout", "mlp.dropout")]
    assert sorted(places) == sorted(["transformer.drop", *blocks])
    attention = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]

    def varies():
        return not torch.equal(model(idx, idx)[0], model(idx, idx)[0])

    for m in places.values():
        m.p = 0.0
    assert varies()  # the attention weights alone
    for m in attention:
        m.dropout = 0.0
    assert not varies()
    for m in places.values():
        m.p = 0.5
        assert varies()
        m.p = 0.0


# -- what decoding remembers --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_append_kv_keeps_everything(chunks):
    g, store, seen, buffers = torch.Generator().manual_seed(0), {}, [], set()
    for t in chunks:
        kv = torch.randn(2, 2, 3, t, 5, generator=g)
        seen.append(kv)
        k, v = append_to_cache(store, *kv)
        n = sum(x.size(3) for x in seen)
        assert torch.equal(torch.stack((k, v)), torch.cat(seen, 3))
        buffers.add(store["kv"].data_ptr())
        assert n <= store["kv"].size(3) <= max(64, 2 * n)


def test_append_kv_copies_seldom_and_spares_little():
    store, copied, size = {}, 0, 0
    for n in range(1, 3001):
        append_to_cache(store, *torch.zeros(2, 1, 1, 1, 4))
        if store["kv"].size(3) != size:
            size, copied = store["kv"].size(3), copied + n - 1
        assert n <= size <= n + max(16, n // 32)
    reads = sum(range(3001))  # attention reads all of them for each token
    assert copied <= reads / 16


def test_state_bytes_and_position():
    model, state = small().eval(), DecodingState()
    assert state.pos == 0 and state.nbytes() == 0
    with torch.no_grad():
        model(tokens(B=3, T=10), state=state)
        assert state.pos == 10
        bytes_per_position = 2 * 2 * 3 * 12 * 4  # layers, k and v, rows, width, float32
        assert state.nbytes() == (10 + 16) * bytes_per_position
        model(tokens(B=3, T=1), state=state)
    assert state.pos == 11 and state.nbytes() == (10 + 16) * bytes_per_position


def test_states_do_not_mix():
    model = small().eval()
    a, b = tokens(1, 9, seed=5), tokens(1, 9, seed=6)
    one, two = DecodingState(), DecodingState()
    with torch.no_grad():
        for t in range(9):  # two texts in turns
            last_a, last_b = model(a[:, t : t + 1], state=one)[0], model(b[:, t : t + 1], state=two)[0]
        torch.testing.assert_close(last_a, model(a)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(last_b, model(b)[0], rtol=0, atol=1e-5)


# -- from a checkpoint's dict -------------------------------------------------------------------------------------


def test_from_checkpoint():
    model = small(bias=False, mlp_act="relu2")
    args = SMALL | {"bias": False, "mlp_act": "relu2"}
    copy = GPT.from_checkpoint({"model": model.state_dict(), "model_args": args}, dropout=0.25)
    assert copy.config == GPTConfig(**args, dropout=0.25)
    assert all(torch.equal(v, copy.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "args, said",
    [
        ({"n_embd": 14}, "does not fit"),
        ({"n_layer": 3}, "does not fit"),
        ({"n_layer": 1}, "does not fit"),
        ({"n_head": 5}, "n_head"),
        ({"warp_drive": True}, "warp_drive"),
        ({"n_layer": "two"}, "does not fit"),
    ],
)
def test_a_checkpoint_that_contradicts_itself(args, said):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        GPT.from_checkpoint({"model": small().state_dict(), "model_args": SMALL | args})
