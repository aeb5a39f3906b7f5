"""lab.nir: what is exported runs as the model's own neurons do, and what cannot be is named in one line."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from kernels.spiking import reference
from lab.nir import main
from model import GPT, GPTConfig, save_checkpoint

nir = pytest.importorskip("nir")

pytestmark = pytest.mark.slow
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 31}


def saved(tmp_path, **flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | flags))
    args = {f.name: getattr(model.config, f.name) for f in fields(GPTConfig)}
    save_checkpoint(tmp_path / "ckpt.pt", {"model": model.state_dict(), "model_args": args})
    return model


def run(affine, lif, x, dt):
    """Spikes of NIR's own equations by Euler's method, in float64, for x (T, h)."""
    v, out = np.zeros_like(x[0]), []
    for x_t in x:
        current = affine.weight.astype(np.float64) @ x_t + getattr(affine, "bias", 0.0)
        v = v + dt / lif.tau.astype(np.float64) * (lif.v_leak - v + lif.r * current)
        z = v > lif.v_threshold
        v = np.where(z, lif.v_reset, v)
        out.append(z)
    return np.stack(out)


@pytest.mark.parametrize("flags", [{}, {"bias": False}, {"bio_adaptive_threshold": True}])
def test_an_event_layer_and_its_export_spike_alike(tmp_path, capsys, flags):
    model = saved(tmp_path, use_bio_mlp=True, bio_spiking=True, **flags)
    main([str(tmp_path), str(tmp_path / "OUT.nir"), "--dt=0.01"])
    assert "8 nodes, 6 edges" in capsys.readouterr().out
    graph = nir.read(tmp_path / "OUT.nir")
    for i, block in enumerate(model.transformer.h):
        layer, (affine, lif) = block.mlp.events, (graph.nodes[f"h_{i}_mlp_events_{n}"] for n in ("current", "neurons"))
        x = 0.1 * torch.randn(1, 100, 32, dtype=torch.float64)
        I = x @ layer.T.double() + (0.0 if layer.bias is None else layer.bias.double())
        wanted = reference(I, torch.sigmoid(layer.leak.double()), layer.threshold)[1][0].detach().numpy() > 0
        same = (run(affine, lif, x[0].numpy(), 0.01) == wanted).mean()
        assert 0.02 < wanted.mean() < 0.9 and same > 0.999  # float32 parameters


@pytest.mark.parametrize(
    "flags, words, said",
    [
        ({"use_bio_mlp": True}, [], "h.0.mlp.events: its mask"),
        ({"use_bio_mlp": True, "bio_threshold": 0.0}, [], "h.0.mlp.dendrites: sin"),
        ({"use_bio_mlp": True, "bio_spiking": True}, ["--part=mixers"], "h.0.mlp.dendrites: sin"),
        ({"use_bio_mlp": True, "bio_spiking": True, "bio_plasticity": True}, [], "h.0.mlp.events.plastic"),
        ({}, [], "use_bio_mlp"),
        ({"use_bio_mlp": True}, ["--dt=0"], "dt"),
    ],
)
def test_what_has_no_primitive_is_named(tmp_path, capsys, flags, words, said):
    saved(tmp_path, **flags)
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), str(tmp_path / "OUT.nir"), *words])
    error = capsys.readouterr().err
    assert error.startswith("lab.nir: error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "OUT.nir").exists()
