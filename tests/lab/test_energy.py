"""lab.bench energy: counts against closed forms and against what a token really reads."""

import pytest
import torch

from configurator import ConfigError
from lab import bench
from lab.energy import PICOJOULES, Count, count, silent_share
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

SIZE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 31, "bias": False}
C, H = 16, 64


def mixer(**flags):
    torch.manual_seed(0)
    return GPT(GPTConfig(**SIZE | flags)).eval().transformer.h[0].mlp


def test_counts_in_closed_form():
    mlp = count(mixer())
    assert (mlp.macs, mlp.skipped, mlp.adds, mlp.functions) == (2 * C * H, 0, 0, H)
    assert mlp.bytes == 4 * (2 * C * H + 2 * C + 2 * H)
    gated = count(mixer(use_bio_mlp=True), 0.75)
    assert (gated.macs, gated.skipped) == (2 * C * H + 1.25 * H * H, 0.75 * H * H)
    assert gated.bytes == 4 * (2 * C * H + 1.25 * H * H + 6 * H + 2 * C + 6 * H)
    diagonal = count(mixer(use_bio_mlp=True, bio_gate="diag"), 0.75)
    assert gated.macs - diagonal.macs == H * H - H
    spiking = count(mixer(use_bio_mlp=True, bio_spiking=True), 0.75)
    assert (spiking.skipped, spiking.adds) == (0.75 * C * H, 0.25 * C * H)
    assert spiking.macs == C * H + H * H + 4 * 4 * H


def test_what_is_skipped_is_what_a_token_does_not_read():
    """Rows of T that are nan and never read, over a token's rows, is the silent share."""
    layer = mixer(use_bio_mlp=True, bio_threshold=0.5).events
    with torch.no_grad():
        x = torch.randn(1, 1, H)
        silent = (torch.sigmoid(layer.G(x)) <= 0.5).flatten()
        layer.threshold = 0.5
        layer.T[silent] = torch.nan
        y = layer.read_active(x, (~silent).float().view(1, 1, H))
    skipped = count(mixer(use_bio_mlp=True), silent.float().mean().item()).skipped
    assert y.isfinite().all() and skipped == pytest.approx(layer.T.isnan().sum().item())


def test_joules_are_the_tables():
    one = Count(macs=10, adds=5, bytes=2)
    assert one.picojoules("sram") == pytest.approx(10 * 4.6 + 5 * 0.9 + 2 * 12.5)
    assert one.picojoules("dram") - one.picojoules("sram") == pytest.approx(2 * 150)
    assert PICOJOULES["dram_byte"] * 8 == 1300 and PICOJOULES["sram_byte"] * 8 == 100


def test_shares_and_refusals():
    model = GPT(GPTConfig(**SIZE | {"use_bio_mlp": True, "bio_spiking": True}))
    assert 0 < silent_share(model, "cpu") < 1 and silent_share(GPT(GPTConfig(**SIZE)), "cpu") == 0
    with pytest.raises(ConfigError, match="not WaveKAN"):
        count(mixer(use_kan=True))


def test_the_command(capsys):
    bench.main(["energy", "--only=start,50%"])
    out = capsys.readouterr().out
    assert "bio_spiking" in out and "50% of event units silent" in out and "Horowitz" in out
