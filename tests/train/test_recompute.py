"""--activation_checkpointing: the same numbers to the last bit, in less memory."""

from types import SimpleNamespace

import pytest
import torch

from configurator import ConfigError
from helpers import every_row, flags, losses, run_here, same
from kernels import recompute
from kernels.recompute import has_counts, recompute_blocks
from lab.cost import saved_bytes
from model import GPT, GPTConfig, load_checkpoint
from smoke_test import VARIANTS
from train import TrainConfig, check_memory_savers

pytestmark = pytest.mark.slow

SIZES = {"block_size": 64, "vocab_size": 65, "n_layer": 2, "n_head": 2, "n_embd": 32}


def batch(seed):
    rows = torch.randint(65, (2, 65), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


def trained(config, recomputes):
    """Losses, gradients, weights, buffers and measures of three steps of two micro-steps."""
    torch.manual_seed(0)
    model = GPT(config)
    if recomputes:
        recompute_blocks(model)
    optimizer, seen = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"), []
    for step in range(3):
        for micro in range(2):
            loss = model(*batch(10 * step + micro))[1]
            (loss / 2).backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return seen, [p.detach() for p in model.parameters()], dict(model.named_buffers()), model.measures()


@every_row
def test_same_to_the_last_bit(name):
    """With dropout too: and no count, loss or threshold moves twice."""
    config = GPTConfig(**SIZES | {"dropout": 0.1} | VARIANTS[name])
    assert same(trained(config, False), trained(config, True))


def test_what_counts_in_forward_would_count_twice(monkeypatch):
    """The test above would see it: without the undoing, this row differs (in "bio_adaptive" twice cancels out)."""
    config = GPTConfig(**SIZES | VARIANTS["fhn_partitioned"])
    assert has_counts(GPT(config).transformer.h[0])
    monkeypatch.setattr(recompute, "has_counts", lambda block: False)
    assert not same(trained(config, False), trained(config, True))


def test_a_block_keeps_its_input_alone():
    """Of 6 layers, about a sixth of what the blocks keep without: in lab/cost's measure, 576 and 29 MB at 10M."""
    config = GPTConfig(**SIZES | {"n_layer": 6})
    kept = []
    for recomputes in (False, True):
        model = GPT(config)
        if recomputes:
            recompute_blocks(model)
        kept.append(saved_bytes(lambda m=model: m(*batch(0)), model.parameters())[1])
    stream = 2 * 64 * 32 * 4  # bytes of (B, T, C)
    assert kept[0] > 6 * 15 * stream
    assert kept[1] < kept[0] / 4 and kept[1] >= 6 * stream


def test_compiled_it_gives_the_same(shakespeare, tmp_path, cli):
    for name, is_on in (("kept", False), ("again", True)):
        words = flags(shakespeare, tmp_path / name, compile=True, dropout=0.1, activation_checkpointing=is_on)
        done = cli("train.py", *words)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")
    weights = [load_checkpoint(tmp_path / name / "ckpt_last.pt")["model"] for name in ("kept", "again")]
    assert same(*weights)


@pytest.mark.parametrize("name", ["bio_adaptive", "fhn_partitioned"])
def test_compiled_counts_are_refused(name):
    model, world = GPT(GPTConfig(**SIZES | VARIANTS[name])), SimpleNamespace(device="cpu", control=None)
    check_memory_savers(TrainConfig(activation_checkpointing=True), model, torch.float32, world)
    with pytest.raises(ConfigError, match="compile=False"):
        check_memory_savers(TrainConfig(activation_checkpointing=True, compile=True), model, torch.float32, world)


def test_a_run_and_its_resume(shakespeare, tmp_path):
    given = {"dropout": 0.1, "lr_decay_iters": 6}
    assert run_here(*flags(shakespeare, tmp_path / "kept", **given)) == 0
    assert run_here(*flags(shakespeare, tmp_path / "again", **given, max_iters=3, activation_checkpointing=True)) == 0
    assert run_here(f"--out_dir={tmp_path / 'again'}", "--init_from=resume", "--max_iters=6") == 0
    weights = [load_checkpoint(tmp_path / name / "ckpt_last.pt")["model"] for name in ("kept", "again")]
    assert losses(tmp_path / "kept") == losses(tmp_path / "again") and same(*weights)
