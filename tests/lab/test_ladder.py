"""config/ladder: each rung's size, data and horizons, on every baseline."""

import re

import pytest
import torch
from torch import nn

import configurator
from data.corpus import Byte
from helpers import ROOT
from model import GPT, GPTConfig
from train import TrainConfig, periods

pytestmark = pytest.mark.slow

SIZES = {"r0": 0.1e6, "r1": 0.25e6, "r2": 0.6e6, "r3": 1.3e6, "r4": 4.8e6, "r5": 14.3e6, "r6": 37.9e6}
BASELINES = {"M0": [], "M1": ["config/presets/modern.py"], "M2": ["config/presets/modern_muon.py"]}


@pytest.mark.parametrize("rung", SIZES)
def test_twenty_bytes_per_parameter(rung):
    first = None
    for words in BASELINES.values():
        settings = configurator.read([*words, f"config/ladder/{rung}.py"], TrainConfig, GPTConfig)
        cfg = settings.build(TrainConfig)
        with torch.device("meta"):
            model = GPT(settings.build(GPTConfig, vocab_size=Byte.vocab_size))
        products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        assert products == pytest.approx(SIZES[rung], rel=0.16)
        tokens = [p.horizon * cfg.batch_size * cfg.gradient_accumulation_steps * 128 for p in periods(cfg)]
        assert [t / products for t in tokens] == pytest.approx([5, 10, 20], rel=0.01)
        assert cfg.min_lr == 0 and cfg.warmup_iters < periods(cfg)[0].branch / 4 and not cfg.sample_interval
        shape = [
            settings.values[name] for name in ("n_layer", "n_embd", "n_head", "block_size", "dataset", "max_iters")
        ]
        first = first or shape
        assert shape == first  # whatever comes before it
    text = (ROOT / "config/ladder" / f"{rung}.py").read_text()
    assert re.search(f"{products:,} parameters in products", text)
    read = [float(found) for found in re.findall(r"(?:Drama is read|code) ([\d.]+) times", text)]
    assert read == pytest.approx([tokens[-1] / 4_327_740, tokens[-1] / 35_971_749], rel=0.07)
