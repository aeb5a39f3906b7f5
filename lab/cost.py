"""
What a run would cost, before it is trained: python train.py CONFIG --cost

A table of the model beside its twin, the same shape with every idea off: parameters by group, FLOPs per token, memory
while training, time at the speed of three steps, and what decoding keeps. The model is built and takes four steps;
nothing is written.
"""

import statistics
import time

import torch

from configurator import ConfigError
from data.dataset import TRAIN
from model import GPT, DecodingState, GPTConfig

SHAPE = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")  # what the twin shares
STEPS = 3  # timed ones, after one that is not
GROUPS = {  # group of parameters: what their names start with, block numbers left out
    "embedding": ("transformer.wte.", "transformer.wpe.", "transformer.positions."),
    "token mixers": ("transformer.h.attn.",),
    "channel mixers": ("transformer.h.mlp.",),
    "other parts of blocks": ("transformer.h.",),
    "head": ("lm_head.", "head.", "aux."),
}


def twin_of(config):
    """The GPTConfig of the same shape with every idea off."""
    return GPTConfig(**{name: value for name, value in vars(config).items() if name in SHAPE})


def parameters(model):
    """{group: number of parameters}, tied ones counted once, where they come first."""
    counts = dict.fromkeys([*GROUPS, "the rest"], 0)
    for name, p in model.named_parameters():
        name = ".".join(part for part in name.split(".") if not part.isdigit())
        group = next((g for g, starts in GROUPS.items() if name.startswith(starts)), "the rest")
        counts[group] += p.numel()
    return counts


def saved_bytes(run, parameters):
    """(what run() returns, bytes that it keeps for the backward pass besides the parameters), each storage once."""
    own, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)  # x: so that no other storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    return result, sum(size for size, _ in kept.values())


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def decoding_bytes(model, tokens):
    """Bytes that a model remembers of one sequence of `tokens` tokens, the spare room of its buffers included."""
    state, was_training = DecodingState(), model.training
    model.eval()(torch.zeros(1, tokens, dtype=torch.int64, device=next(model.parameters()).device), state=state)
    model.train(was_training)
    return state.nbytes()


def step_seconds(trainer):
    """Median seconds of a few optimiser steps."""
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        trainer.step()[0].item()  # item() waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(trainer):
    """{line of the table: number} of a Trainer at its start; its model is trained by a few steps."""
    cfg, model, config = trainer.cfg, trainer.model, trainer.config
    counts = parameters(model)
    starts = trainer.data.windows(TRAIN, 0, cfg.batch_size, config.block_size)
    x, y = trainer.data.batch("train", starts, config, trainer.world.device)
    with trainer.autocast:
        _, kept = saved_bytes(lambda: model(x, y), model.parameters())
    seconds = step_seconds(trainer)
    trained = [p for p in model.parameters() if p.requires_grad]
    memory = {
        "weights": size_of(model.parameters()), "gradients": size_of(trained),
        "optimiser": size_of(t for s in trainer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)),
        "buffers": size_of(model.buffers()), "kept for the backward pass": kept,
    }  # fmt: skip
    return {
        "parameters": sum(counts.values()), **{f"  {group}": n for group, n in counts.items() if n},
        "MFLOPs per token": model.flops_per_token() / 1e6,
        "training memory, MB": sum(memory.values()) / 1e6, **{f"  {part}": n / 1e6 for part, n in memory.items()},
        "ms per step": 1e3 * seconds, "tokens/s": trainer.tokens_per_step / seconds,
        "hours for all steps": (cfg.max_iters - trainer.iter_num) * seconds / 3600,
        f"decoding state after {config.block_size} tokens, kB": decoding_bytes(model, config.block_size) / 1e3,
    }  # fmt: skip


def shown(value):
    """A number with commas, or with three digits that count."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def table(trainer):
    """The lines of the table; the trainer's model is trained by a few steps."""
    twin = twin_of(trainer.config)
    columns = {"this model": measure(trainer)}
    if twin != trainer.config:
        other = type(trainer)(trainer.cfg, GPT(twin), trainer.data, trainer.world, trainer.dtype)
        columns["ideas off"] = measure(other)
    ours, *other = columns.values()
    names = [*ours, *(name for each in other for name in each if name not in ours)]
    wide = max(map(len, names)) + 2
    lines = [" " * wide + "".join(f"{head:>14}" for head in columns) + "    ratio" * bool(other)]
    for name in names:
        values = [each.get(name, 0) for each in columns.values()]
        ratio = f"{values[0] / values[-1]:8.2f}x" if other and values[-1] and not name.startswith("  ") else ""
        lines.append(f"{name:<{wide}}" + "".join(f"{shown(value):>14}" for value in values) + ratio)
    return lines


def show(trainer):
    """Print the table, and what it was measured with."""
    cfg, device = trainer.cfg, trainer.world.device
    if trainer.world.size > 1:
        raise ConfigError("--cost measures one process: leave torchrun out")
    print("\n".join(table(trainer)))
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    kept = "kept for the backward pass: of one micro-step, without torch.compile"
    print(f"on {device}{threads}, {cfg.dtype}; {trainer.tokens_per_step:,} tokens per step; {kept}")
