"""Where the memory's recall and the manifold's features enter: at the embedding, before the head, or in each block."""

import pytest
import torch

from model import GPT, GPTConfig, path_bending

SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 16, "block_size": 40, "vocab_size": 31}
SDR = {"use_sdr": True, "sdr_size": 128, "sdr_active": 7, "sdr_value_dim": 8}


def build(**flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | flags)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model, torch.randint(31, (2, 40))


def before_the_norm(model, idx):
    """What the last norm reads, (B, T, C)."""
    seen = []
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(idx, idx)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("flags", [{}, {"use_mhc": True}, {"use_mla": True}])
def test_recall_after_the_blocks_is_added_to_their_output(flags):
    model, idx = build(**SDR, engram_at="head", **flags)
    recalled = []
    model.transformer.wte.memory.register_forward_hook(lambda module, args, y: recalled.append(y))
    whole = before_the_norm(model, idx)
    model.transformer.wte.memory = None
    assert (whole - before_the_norm(model, idx) - recalled[0]).abs().max() < 1e-12
    assert recalled[0].abs().max() > 1e-3


def test_both_places_recall_the_same():
    late, idx = build(**SDR, engram_at="head")
    early, _ = build(**SDR)
    assert late.state_dict().keys() == early.state_dict().keys()
    early.load_state_dict(late.state_dict())
    kept = []
    for model in (late, early):
        model.transformer.wte.memory.register_forward_hook(lambda module, args, y: kept.append(y))
        model(idx, idx)
    assert torch.equal(*kept)
    (x, _, recalled), (with_it, _, none) = late.transformer.wte(idx), early.transformer.wte(idx)
    assert none is None and (x + recalled - with_it).abs().max() < 1e-12


def test_a_head_that_reads_layers_reads_the_recall():
    model, idx = build(**SDR, engram_at="head", use_mfs_head=True, mfs_layers=2)
    seen = []
    model.mfs.register_forward_pre_hook(lambda module, args: None)
    mixture = model.mfs.mixture
    model.mfs.mixture = lambda hiddens, *rest: seen.append(hiddens) or mixture(hiddens, *rest)
    x = before_the_norm(model, idx)
    assert len(seen[0]) == 2 and torch.equal(seen[0][-1], x)


@pytest.mark.parametrize("spectral", [False, True])
def test_each_block_projects_its_own_input(spectral):
    sizes = {"n_eigenvectors": 3, "spectral_landmarks": 8} if spectral else {"skip_manifold_spectral": True}
    model, idx = build(use_manifold=True, manifold_at="blocks", manifold_dim=5, **sizes)
    assert model.manifold is None and model.spectral is None
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:40]
    spectra = []
    for block in model.transformer.h:
        m = block.manifold
        point = torch.nn.functional.normalize(m.c_point(m.ln(x)), dim=-1)
        x = x + m.gate.tanh() * m.c_proj(point * 5**0.5)
        spectra.append(block.spectral(point) if spectral else None)
        run = type("Run", (), {"state": None, "past": 0, "spectrum": spectra[-1], "idx": idx, "training": False})()
        x = x + block.attn(block.ln_1(x), run)
        x = x + block.mlp(block.ln_2(x))
    assert (before_the_norm(model, idx) - x).abs().max() < 1e-12
    assert not spectral or (spectra[0] - spectra[1]).abs().max() > 1e-3


def test_the_bending_is_the_blocks_mean():
    flags = {"use_manifold": True, "manifold": "rotor", "skip_manifold_spectral": True, "geodesic_weight": 0.3}
    model, idx = build(**flags, manifold_at="blocks")
    points = []
    for block in model.transformer.h:
        block.manifold.register_forward_hook(lambda module, args, y: points.append(y[1]))
    loss = model.train()(idx, idx)[1]
    bending = sum(path_bending(p, "rotor") for p in points) / 3
    assert len(points) == 3 and abs(model.losses["geodesic"] - bending) < 1e-12
    assert abs(loss - model.losses["lm"] - 0.3 * bending) < 1e-12


def test_a_curriculum_reaches_every_block():
    model, _ = build(use_manifold=True, manifold="e7", manifold_at="blocks", skip_manifold_spectral=True)
    model.set_stage(1)
    assert all(block.manifold.active.sum() < 70 for block in model.transformer.h)
