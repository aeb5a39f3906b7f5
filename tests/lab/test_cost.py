"""train.py --cost: what can be counted by hand, and that nothing is written."""

import re
from dataclasses import fields

import pytest
import torch
from torch import nn

import configurator
from data.corpus import load_meta
from helpers import flags, run_here
from lab import cost
from model import GPT, GPTConfig
from train import TrainConfig

pytestmark = pytest.mark.slow


def rows(text):
    """{name: its numbers} of the printed table."""
    lines = [line for line in text.splitlines() if re.search(r"\S\s{2,}[\d.,e+-]+", line)]
    return {line.split("  ")[0] or line.strip().split("  ")[0]: re.findall(r"(?<= )[\d][\d.,e+-]*", line[30:])
            for line in lines}  # fmt: skip


def test_the_table_beside_the_twin(shakespeare, tmp_path, capsys):
    words = flags(shakespeare, tmp_path / "new", attn_mode="fhn", use_kan=True, max_iters=100)
    assert run_here(*words, "--cost") == 0
    assert not (tmp_path / "new").exists()
    said = capsys.readouterr().out
    assert "this model" in said and "ideas off" in said and "float32" in said
    found = rows(said)
    counts = [int(n.replace(",", "")) for n in found["parameters"][:2]]
    settings = configurator.read(words, TrainConfig, GPTConfig)
    config = GPTConfig(**{f.name: settings.values[f.name] for f in fields(GPTConfig)})
    config.vocab_size = load_meta(shakespeare)["vocab_size"]
    assert counts == [sum(p.numel() for p in GPT(c).parameters()) for c in (config, cost.twin_of(config))]
    assert found["hours for all steps"] and float(found["tokens/s"][0].replace(",", "")) > 0


def test_without_ideas_there_is_no_twin(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path), "--cost") == 0
    said = capsys.readouterr().out
    assert "ideas off" not in said and "decoding state" in said


def test_groups_hold_every_parameter_once():
    own_heads, facets = {"aux_heads": "1", "aux_heads_own": True}, {"use_mfs_head": True, "mfs_layers": 1}
    for given in ({}, {"tie_weights": False}, {"use_sdr": True, "sdr_size": 256}, {"use_mhc": True}, own_heads, facets):
        config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=61, block_size=16, **given)
        model = GPT(config)
        assert sum(cost.parameters(model).values()) == sum(p.numel() for p in model.parameters())
    counts = cost.parameters(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=61, block_size=16, bias=False)))
    assert counts == {"embedding": (61 + 16) * 32, "token mixers": 2 * 4 * 32**2, "channel mixers": 2 * 8 * 32**2,
                      "other parts of blocks": 2 * 2 * 32, "head": 0, "the rest": 32}  # fmt: skip


def test_what_backward_keeps():
    """A linear layer keeps its input, a ReLU its output; parameters are not counted, and none counts twice."""
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)
    x = torch.randn(5, 8)
    parameters = [*first.parameters(), *second.parameters()]
    _, kept = cost.saved_bytes(lambda: second(first(x).relu()), parameters)
    assert kept == 4 * (5 * 8 + 5 * 16)


def test_the_twin_shares_the_shape_alone():
    config = GPTConfig(n_layer=3, n_head=2, n_embd=48, attn_mode="fhn", bias=False, use_kan=True, tie_weights=False)
    twin = cost.twin_of(config)
    assert twin == GPTConfig(n_layer=3, n_head=2, n_embd=48, bias=False)


def test_keys_and_values_are_the_decoding_state():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=61, block_size=16))
    least = 2 * 2 * 16 * 32 * 4  # layers, keys and values, tokens, width, bytes
    assert least <= cost.decoding_bytes(model, 16) <= 2 * least  # 16 tokens spare
    assert model.training


def test_several_processes_are_refused():
    class Two:
        class world:
            size, device = 2, "cpu"

        cfg = None

    with pytest.raises(cost.ConfigError, match="leave torchrun out"):
        cost.show(Two)
