"""Muon against its singular values, PyTorch's Muon and itself in parts."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import every_row
from kernels.muon import COEFFICIENTS, Muon, orthogonalize, orthogonalize_parts, reference
from model import GPT, GPTConfig
from smoke_test import LOCAL, SIZE, VARIANTS, build

RATES = {"matrices": 0.02, "embedding": 0.03, "head": 0.003, "vectors": 0.005}


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 100), st.integers(0, 2**31))
def test_orthogonalize_moves_singular_values_alone(n, r, more, seed):
    """By five times the polynomial, in either form, wide or square."""
    u = torch.randn(n, r, r + more, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    wanted = torch.stack([reference(each) for each in u])
    assert torch.allclose(orthogonalize(u), wanted, rtol=0, atol=1e-7)
    assert torch.allclose(orthogonalize(u.float()), wanted.float(), rtol=0, atol=2e-4)


def test_singular_values_end_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 64, 128, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


def test_an_orthogonal_matrix_keeps_its_directions():
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    assert (orthogonalize(q[None])[0] - q).abs().max() < 0.3


def test_zeros_stay_zeros():
    assert orthogonalize(torch.zeros(1, 4, 9)).abs().max() == 0


def test_parts_of_mixed_shapes_are_each_scaled_by_their_own_side():
    parts = [torch.randn(shape, dtype=torch.float64) for shape in ((8, 8), (32, 8), (8, 32), (8, 8), (12, 5))]
    wanted = [reference(part) * max(1, part.size(0) / part.size(1)) ** 0.5 for part in parts]
    orthogonalize_parts(parts)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(parts, wanted))


def steps(optimizer, params, n=4, seed=0):
    """n steps on the same random gradients."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def test_as_pytorchs_muon():
    """Which computes in bfloat16: a few bits are all that can agree."""
    start = [torch.randn(48, 48), torch.randn(96, 32), torch.randn(32, 96)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    vector = torch.nn.Parameter(torch.zeros(3))
    groups = [{"params": ours, "lr": 0.02, "weight_decay": 0.1, "splits": [()] * 3}, {"params": [vector], "lr": 0.1}]
    assert COEFFICIENTS == (3.4445, -4.7750, 2.0315)
    steps(Muon(groups), ours)
    steps(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95), theirs)
    for a, b, p in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - p).norm()


def test_vectors_take_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    groups = [{"params": [ours], "lr": 0.01, "weight_decay": 0.1}]
    steps(Muon(groups, betas=(0.8, 0.95)), [ours])
    steps(torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)), [theirs])
    assert torch.equal(ours, theirs)


def test_a_split_matrix_is_as_its_parts():
    whole = torch.nn.Parameter(torch.randn(40, 16, dtype=torch.float64))
    apart = [torch.nn.Parameter(part.clone()) for part in whole.detach().split((16, 8, 16))]
    vector = torch.nn.Parameter(torch.zeros(1))
    group = {"lr": 0.02, "weight_decay": 0.1}
    one = Muon([{"params": [whole], "splits": [(16, 8, 16)], **group}, {"params": [vector], "lr": 0.1}])
    three = Muon([{"params": apart, "splits": [()] * 3, **group}, {"params": [vector], "lr": 0.1}])
    for seed in range(3):
        steps(one, [whole], 1, seed)
        for p, g in zip(apart, whole.grad.split((16, 8, 16))):
            p.grad = g.clone()
        three.step()
    assert torch.allclose(whole, torch.cat(apart), rtol=0, atol=1e-14)


@every_row
def test_every_parameter_is_in_one_group(name):
    model, _ = build(VARIANTS[name])
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", RATES).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    blocks = {id(p) for p in model.transformer.h.parameters()}
    for group in groups:
        assert group["lr"] == RATES[group["role"]] and group["weight_decay"] == 0.1 * (group["role"] == "matrices")
        if group["role"] == "matrices":
            for p, split in zip(group["params"], group["splits"]):
                assert id(p) in blocks and p.dim() == 2 and min(p.shape) >= model.config.n_embd
                assert not split or sum(split) == p.size(0)


def roles(**flags):
    model = GPT(GPTConfig(**SIZE | flags))
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", RATES).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["role"]: [names[id(p)] for p in group["params"]] for group in groups}


def test_who_gets_what():
    found = roles(bias=False, tie_weights=False)
    matrices = [
        f"transformer.h.{i}.{m}.weight"
        for i in (0, 1)
        for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert found["matrices"] == matrices
    assert found["embedding"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert found["head"] == ["lm_head.weight"] and all(".ln_" in name for name in found["vectors"])
    assert "head" not in roles()  # tied: the embedding
    odd = roles(use_bio_mlp=True, bio_compartments=4, value_embeds=True, use_sdr=True, sdr_size=256, sdr_active=8)
    assert not any(".A." in name or "events.T" in name for name in odd["matrices"])
    assert any("value_embedding.table" in name for name in odd["embedding"])
    assert all(not name.startswith("transformer.wte") for role in odd.keys() - {"embedding"} for name in odd[role])


def test_state_goes_on_to_the_last_bit():
    torch.manual_seed(0)
    model, idx = build({"bias": False, "n_kv_head": 1})
    other = copy.deepcopy(model)
    optimizer, again = (m.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", RATES) for m in (model, other))

    def train(model, optimizer, n):
        for _ in range(n):
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"htm_meta_strength": 0.5},
        {"method": "fa", "fa_grape": True, "fa_grape_every": 1, **LOCAL},
        {"method": "dfa", **LOCAL},
        {"use_bio_mlp": True, "bio_adaptive_threshold": True},
    ],
    ids=["htm", "grape", "dfa", "bio"],
)
def test_rules_that_hook_into_the_optimizer_run_once_per_step(flags):
    model, idx = build(flags)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", RATES)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    losses = []
    for _ in range(6):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(calls) == 6 and losses[-1] < losses[0]
