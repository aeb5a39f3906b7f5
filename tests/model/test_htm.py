"""HTM-style meta-updates: what is counted, what is scaled, and that nothing happens without them."""

import copy

import pytest
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, load_checkpoint, save_checkpoint
from smoke_test import build

FLAGS = {"htm_meta_strength": 0.5, "htm_meta_decay": 0.9}


def optimizer_of(model):
    return model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")


def backward(model, idx):
    model(idx[:, :-1], idx[:, 1:])[1].backward()


def columns(model):
    """(rows of, columns of, how many of its units make a column) of each sublayer, in the order of the statistics."""
    for block in model.transformer.h:
        yield block.attn.c_attn, block.attn.c_proj, model.config.n_embd // model.config.n_head
        yield block.mlp.c_fc, block.mlp.c_proj, 64


def test_strength_zero_is_the_base_optimiser():
    model, _ = build({})
    optimizer = optimizer_of(model)
    assert model.htm is None and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert "htm.success" not in model.state_dict()


def test_equal_success_changes_nothing():
    """All columns alike: every factor is 1, and a step is AdamW's to the last bit."""
    plain, idx = build({})
    model, _ = build(FLAGS | {"htm_meta_strength": 1.0})
    model.htm.apply_counts = lambda: None  # success stays equal
    for m in (plain, model):
        optimizer = optimizer_of(m)
        backward(m, idx)
        optimizer.step()
    assert all(torch.equal(p, dict(plain.named_parameters())[n]) for n, p in model.named_parameters())


def test_counts_by_brute_force():
    model, idx = build(FLAGS)
    seen, hooks = {}, []
    for n, (_, back, width) in enumerate(columns(model)):
        hooks.append(back.register_forward_pre_hook(lambda _, x, n=n, w=width: seen.update({n: (x[0].detach(), w)})))
    targets = idx.roll(-1, 1)
    targets[:, ::5] = -1
    model.htm.mean_loss.fill_(4.1)
    logits, _ = model(idx, targets)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp(min=0), reduction="none").view(idx.shape)
    there, good, wanted = targets != -1, (loss < 4.1) & (targets != -1), []
    assert 0 < good.sum() < there.sum()
    for n, (x, width) in sorted(seen.items()):
        parts = x.split(width, dim=-1)
        for a in [p.norm(dim=-1) if n % 2 == 0 else p.abs().mean(-1) for p in parts]:
            wanted.append((a * good).sum() / (a * there).sum())
    model.htm.apply_counts()
    assert torch.allclose(model.htm.success, 0.9 * 0.5 + 0.1 * torch.stack(wanted), atol=1e-5)
    assert model.htm.mean_loss.item() == pytest.approx(0.9 * 4.1 + 0.1 * loss[there].mean().item(), abs=1e-5)
    assert not model.htm.counted.any()


def test_micro_steps_count_as_one_batch():
    whole, idx = build(FLAGS)
    parts = copy.deepcopy(whole)
    whole(idx, idx)
    for rows in idx.split(1):
        parts(rows, rows)
    assert torch.allclose(whole.htm.counted, parts.htm.counted, rtol=1e-4)


def test_evaluation_counts_nothing():
    model, idx = build(FLAGS)
    model.eval()(idx, idx)
    assert not model.htm.counted.any()


def test_each_column_moves_by_its_factor():
    model, idx = build(FLAGS)
    plain, _ = build({})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("htm.")})
    model.htm.apply_counts = lambda: None
    model.htm.success.copy_(torch.rand(len(model.htm.success), generator=torch.Generator().manual_seed(0)))
    start = copy.deepcopy(plain.state_dict())
    for m in (plain, model):
        optimizer = optimizer_of(m)
        backward(m, idx)
        optimizer.step()
    moved = {n: p - start[n] for n, p in model.named_parameters()}
    base = {n: p - start[n] for n, p in plain.named_parameters()}
    factors = model.htm.multipliers()
    assert all(f.min() >= 0.5 and f.max() <= 1.5 for f in factors) and torch.cat(factors).std() > 0.1
    n_head = model.config.n_head
    for layer in range(model.config.n_layer):
        heads, groups = factors[2 * layer], factors[2 * layer + 1]
        at = f"transformer.h.{layer}."
        for h in range(n_head):  # q, k and v of head h, and what reads the head
            rows = [part.chunk(n_head)[h] for part in moved[at + "attn.c_attn.weight"].chunk(3)]
            want = [part.chunk(n_head)[h] * heads[h] for part in base[at + "attn.c_attn.weight"].chunk(3)]
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(rows, want))
            read = moved[at + "attn.c_proj.weight"].chunk(n_head, 1)[h]
            assert torch.allclose(read, base[at + "attn.c_proj.weight"].chunk(n_head, 1)[h] * heads[h], atol=1e-6)
        for g, factor in enumerate(groups):
            for name, dim in (("mlp.c_fc.weight", 0), ("mlp.c_fc.bias", 0), ("mlp.c_proj.weight", 1)):
                got, want = moved[at + name].split(64, dim)[g], base[at + name].split(64, dim)[g]
                assert torch.allclose(got, want * factor, atol=1e-6)
    assert torch.equal(moved["transformer.wte.weight"], base["transformer.wte.weight"])  # belongs to no column


@pytest.mark.slow
def test_momentum_fades_whatever_the_factor():
    """beta1 times the factor stays below 1, so a first moment without new gradients goes to 0."""
    model, idx = build(FLAGS | {"htm_meta_target": "momentum", "htm_meta_strength": 1.0})
    optimizer = optimizer_of(model)
    backward(model, idx)
    optimizer.step()
    model.htm.apply_counts = lambda: None
    model.htm.success.copy_(torch.linspace(0, 1, len(model.htm.success)))
    moment = optimizer.state[model.transformer.h[-1].mlp.c_fc.weight]["exp_avg"]
    sizes = [moment.norm().item()]
    for _ in range(200):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        sizes.append(moment.norm().item())
    assert all(a >= b for a, b in zip(sizes, sizes[1:])) and sizes[-1] < 0.9 * sizes[0]


def test_success_survives_a_checkpoint(tmp_path):
    model, idx = build(FLAGS)
    optimizer = optimizer_of(model)
    for _ in range(3):
        backward(model, idx)
        optimizer.step()
    args = {"model_args": vars(model.config), "model": model.state_dict()}
    save_checkpoint(tmp_path / "ckpt.pt", args)
    again = GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt"))
    assert torch.equal(again.htm.success, model.htm.success) and model.htm.success.std() > 0


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"htm_meta_strength": 1.5}, "htm_meta_strength"),
        ({"htm_meta_strength": -0.1}, "htm_meta_strength"),
        ({"htm_meta_strength": 0.1, "htm_meta_decay": 1.0}, "htm_meta_decay"),
        ({"htm_meta_target": "momentum"}, "htm_meta_strength"),
        ({"htm_meta_strength": 0.1, "htm_meta_target": "sgd"}, "htm_meta_target"),
        ({"htm_meta_strength": 0.1, "n_embd": 24, "n_head": 2}, "multiple of 16"),
    ],
)
def test_refusals(flags, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**flags)


def test_momentum_with_frozen_blocks_can_be_saved():
    """Frozen parameters have no moment to scale, and get no entry in the optimiser's state."""
    model, idx = build({"htm_meta_strength": 0.5, "htm_meta_target": "momentum", "freeze_blocks": 1})
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for _ in range(2):
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
    assert len(optimizer.state_dict()["state"]) == sum(p.requires_grad for p in model.parameters())
