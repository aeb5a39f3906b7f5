"""
Speed and memory, always beside a reference in the same run.

    python -m lab.bench step       # training steps: nanoGPT's recipe as plain eager float32 PyTorch, ours, presets
    python -m lab.bench decode     # greedy text: recomputing every token, as nanoGPT does, and ours; far out; its state
    python -m lab.bench recipe     # the CPU recipe trained to its end by both: loss on the whole val split, some seeds
    python -m lab.bench attention --plot  # dense attention, cells, knots and waves over T, with fitted exponents
    python -m lab.bench mlp        # channel mixers against the MLP; wavelets per edge; events reading active rows
    python -m lab.bench heads      # steps and memory of output heads; FLOPs at GPT-2's size
    python -m lab.bench residual   # steps of residual wirings, and of the package hyper-connections
    python -m lab.bench optimizers # steps by AdamW and by Muon
    python -m lab.bench local      # steps of learning rules
    python -m lab.bench embeddings # steps and memory of sparse codes and manifolds, float32
    python -m lab.bench energy     # operations and bytes of channel mixers, times a table of picojoules: no watt meter
    python -m lab.bench checkpoint # loading a checkpoint of 520 MB with its checks, beside torch.load alone
    python -m lab.bench kernels    # Triton: what ptxas says of each kernel, bytes moved, and speed where there is a GPU
    python -m lab.bench step --only=cpu --repeats=21
    python -m lab.bench step config/ablation/fhn.py  # a config file is a further row of each table
    python -m lab.bench step --only=fhn              # one config beside nanoGPT and the same model without its ideas

Contenders take turns, so that a busy machine slows all of them. A speed is the median over rounds of the ratio to the
reference of the same round, with the quartiles behind it. Memory is the peak of a fresh process, minus what
code alone takes. The last line is JSON. --record adds the speeds to docs/results/bench.jsonl, and says which of them
left the quartiles of the last record from a machine like this one; `make bench` does so for what users wait for.
"""

import importlib
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import configurator
from configurator import ROOT, ConfigError, check_values
from data.corpus import DataError
from data.dataset import TokenDataset
from data.files import replace_file
from kernels.wavekan import edges_reference, wavelet_edges
from lab.attention import ATTENTION_LENGTHS, bench_attention
from lab.energy import ENERGY_ROWS, bench_energy
from lab.measure import (
    compare,
    flags_of,
    in_fresh_process,
    interleave,
    median_and_quartiles,
    peak_memory,
    print_rows,
    repeat,
    speeds,
    with_gradients,
    without_grad,
)
from lab.page import write_between_marks
from lab.reference import PlainGPT, plain_step, plain_val_loss
from model import FHN, GPT, DecodingState, GPTConfig, SparseEventLayer, load_checkpoint, save_checkpoint
from train import TrainConfig, Trainer, World, dtype_name, git_commit, machine, pick_device, pick_dtype


@dataclass
class BenchConfig:
    """How long to measure, and where."""

    # -- benchmark ----------------------------------------------------------------------------------------------------
    only: str = ""  # comma-separated parts; empty = all
    repeats: int = 11  # rounds; each contender runs once in each
    tokens: int = 512  # how many decode writes
    seeds: int = 3  # runs per contender of recipe
    max_iters: int = 2000  # steps per run of recipe
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as train.py's; of attention: float32
    device: str = "cpu"  # "auto" | "cpu" | "cuda" | "mps"
    memory: bool = True  # also measure peak memory, in one process per contender
    plot: bool = False  # attention also writes PNGs to docs/img
    record: bool = False  # add the speeds to docs/results/bench.jsonl, and compare them with the last ones there

    def __post_init__(self):
        check_values(self, {"repeats tokens seeds max_iters": "[1, inf)"})


RECIPE = "config/train_shakespeare_char_cpu.py"
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}  # nanoGPT's CPU recipe
MEDIUM = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
COMMON = {"vocab_size": 65, "bias": False}  # as nanoGPT trains on shakespeare_char


# ---------------------------------------------------------------------------------------------------------------------
# Training steps. A row of a table is a string of words that `flags_of` reads. What is no set of flags is in SPECIAL.


def trainer_step(model, batch, device, folder, dtype, compiles=False, optimizer="adamw"):
    """A step of train.py itself, loss fetched."""
    cfg = TrainConfig(
        dataset="", data_dir=str(folder), batch_size=batch, gradient_accumulation_steps=1, learning_rate=1e-3,
        warmup_iters=100, beta2=0.99, compile=compiles, optimizer=optimizer,
    )  # fmt: skip
    dtype = pick_dtype(dtype, device, model, batch * model.config.block_size)[0]
    trainer = Trainer(cfg, model, TokenDataset(cfg), World(device, "auto"), dtype)
    return lambda: trainer.step()[0].item()


def our_step(flags, batch, device, folder, dtype, compiles=False, optimizer="adamw"):
    return trainer_step(GPT(GPTConfig(**flags)), batch, device, folder, dtype, compiles, optimizer)


def muon_step(flags, batch, device, folder, dtype, row):
    """A step of a row's model by Muon."""
    return trainer_step(GPT(GPTConfig(**flags | flags_of(row))), batch, device, folder, dtype, optimizer="muon")


def nanogpt_step(flags, batch, device, folder, dtype):
    """`plain_step` as a contender. It runs in float32, whatever dtype says."""
    return plain_step(flags, batch, device, folder)[0]


class PackageStreams(nn.Module):
    """The blocks of a GPT, their sublayers wired by the package hyper-connections, as one block."""

    def __init__(self, blocks, width, kind, streams):
        super().__init__()
        from hyper_connections import hyper_connections, manifold_constrained_hyper_connections

        package = {"hc": hyper_connections, "mhc": manifold_constrained_hyper_connections}[kind]
        wrap, self.expand, self.reduce = package.get_init_and_expand_reduce_stream_functions(streams, dim=width)
        pairs = [pair for b in blocks for pair in ((b.ln_1, b.attn), (b.ln_2, b.mlp))]
        self.parts = nn.Sequential(*(wrap(branch=nn.Sequential(*p), layer_index=i) for i, p in enumerate(pairs)))

    def forward(self, x, *_):
        return self.reduce(self.parts(self.expand(x)))


def package_step(flags, batch, device, folder, dtype, kind, streams=4):
    """A step of our GPT with the package's residual streams."""
    model = GPT(GPTConfig(**flags))
    model.transformer.h = nn.ModuleList([PackageStreams(model.transformer.h, flags["n_embd"], kind, streams)])
    return trainer_step(model, batch, device, folder, dtype)


REFERENCE = "nanoGPT's recipe, eager float32"
CORE = {  # rows that are no set of flags: how they make a step, and with what
    REFERENCE: {"make": nanogpt_step},
    "ours, float32": {"dtype": "float32"},
    "ours, bfloat16": {"dtype": "bfloat16"},
    "ours, bfloat16, compiled": {"dtype": "bfloat16", "compiles": True},
}
PACKAGE = {
    "mHC of hyper-connections, 4 streams": {"make": package_step, "kind": "mhc"},
    "HC of hyper-connections, 4 streams": {"make": package_step, "kind": "hc"},
}
MUON = {f"{row} by Muon": {"make": muon_step, "row": row} for row in ("baseline", "modern")}
SPECIAL = CORE | PACKAGE | MUON
STEP_ROWS = list(CORE)
HEAD_ROWS = ["baseline", "baseline --loss_chunk=256", "mfs", "mfs --loss_chunk=256", "l4"]
RESIDUAL_ROWS = ["baseline", "gated_blocks", "mhc", "hc", "mla", *PACKAGE]
OPTIMIZER_ROWS = ["modern", "modern by Muon", "baseline", "baseline by Muon"]
LOCAL_ROWS = ["bp", "fa", "dfa", "sign_sym"]
EMBEDDING_ROWS = ["baseline", "sdr", "sdr_delta", "sdr_no_memory"]
EMBEDDING_ROWS += ["manifold_sphere", "manifold_spectral", "manifold_e7", "manifold_rotor"]


@contextmanager
def random_corpus():
    """A folder with train.bin and val.bin, a million tokens below 65 each."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16).tofile(Path(folder) / f"{split}.bin")
        yield folder


def contender(row, flags, batch, device, folder, dtype):
    """What builds a training step of a row's model, whose size `flags` give."""
    if row not in SPECIAL:
        return partial(our_step, flags | flags_of(row), batch, device, folder, dtype)
    how = {"make": our_step, "dtype": dtype} | SPECIAL[row]
    return partial(how.pop("make"), flags, batch, device, folder, **how)


def has_package(row):
    """Whether the package of a row is installed; a line says so if not."""
    is_there = row not in PACKAGE or find_spec("hyper_connections") is not None
    if not is_there:
        print(f"{row}: skipped, the package hyper-connections is not installed")
    return is_there


def bench_training(flags, batch, steps, rows, cfg, device):
    """Training steps of rows on `batch` sequences of a model of size `flags`, `steps` of them per round."""
    flags = COMMON | flags
    tokens = batch * flags["block_size"]
    dtype = dtype_name(pick_dtype(cfg.dtype, device, GPT(GPTConfig(**flags)), tokens)[0])  # one for all
    with random_corpus() as folder:
        contenders = {row: contender(row, flags, batch, device, folder, dtype) for row in rows if has_package(row)}
        size = ", ".join(f"{name} {flags[name]}" for name in ("n_layer", "n_embd", "block_size", "vocab_size"))
        title = f"training step, {size}, batch {batch}, {dtype}"
        return compare(title, contenders, cfg, device, "tokens", tokens * steps, steps)


SIZE_FLAGS = ("n_layer", "n_head", "n_embd", "block_size", "bias")
CPU_MOST = 2e7  # weights in blocks; presets with more want a GPU, or to be asked for by --only


def bench_config(file, rows, cfg, device):
    """A config file over the CPU recipe, beside nanoGPT, the same model without its ideas, and further rows.

    On at most 4096 tokens per step, without dropout.
    """
    values = configurator.read([RECIPE, file], TrainConfig, GPTConfig).values
    weights, name = 12 * values["n_layer"] * values["n_embd"] ** 2, Path(file).stem
    if device == "cpu" and weights > CPU_MOST and name not in cfg.only.split(","):
        print(f"{name}: skipped on a CPU; --only={name} runs it")
        return None
    row = f"{shlex.quote(file)} --dropout=0"
    size = {name: values[name] for name in SIZE_FLAGS} | {k: v for k, v in flags_of(row).items() if k == "vocab_size"}
    batch = max(1, min(values["batch_size"], 4096 // size["block_size"]))
    rows = [REFERENCE, "baseline", row, *(row for row in rows if row not in SPECIAL)]
    return bench_training(size, batch, 1, rows, cfg, device)


def bench_head_flops(rows, cfg, device):
    """FLOPs per token of a training step at GPT-2's size, as a multiple of the first row's; nothing is computed."""
    flops = {}
    with torch.device("meta"):
        for row in rows:
            flops[row] = GPT(GPTConfig(**GPT2 | {"bias": False} | flags_of(row))).flops_per_token()
    first = next(iter(flops.values()))
    print("\nFLOPs per token of a training step, 12 x 768, vocab_size 50304")
    for row, count in flops.items():
        print(f"{row:<38}{count / first:>7.2f}x{count / 1e6:>14,.0f} MFLOP")
    return {row: {"flops": count, "ratio": count / first} for row, count in flops.items()}


TABLES = {"cpu": partial(bench_training, SMALL, 12, 10), "6x384": partial(bench_training, MEDIUM, 16, 1)}
IDEAS, PRESETS = (
    {path.stem: partial(bench_config, f"config/{kind}/{path.name}") for path in (ROOT / "config" / kind).glob("*.py")}
    for kind in ("ablation", "presets")
)
STEP = IDEAS | PRESETS | TABLES
# presets that change the CPU recipe's model, not its size: those in the originals' own sizes are timed by name only
OF_ITS_SHAPE = sorted(p for p in PRESETS if "n_layer" not in (ROOT / f"config/presets/{p}.py").read_text("utf-8"))
HEADS = {
    "V65": partial(bench_training, SMALL, 12, 5),
    "V16384": partial(bench_training, SMALL | {"block_size": 256, "vocab_size": 16384}, 8, 1),
    "flops": bench_head_flops,
}
RESIDUAL = EMBEDDINGS = {"6x384": partial(bench_training, MEDIUM, 16, 1)}
OPTIMIZERS = LOCAL = {"cpu": partial(bench_training, SMALL, 12, 5), "6x384": partial(bench_training, MEDIUM, 16, 1)}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding.

DECODERS = ["baseline", "baseline --use_block_sparse", "fhn", "knots"]
NOT_FAR = ("knots",)  # they have too many pairs of cells at 32,768 tokens
STRIDE = 8  # tokens that a run of `further` reads


def nanogpt_writer(flags, device, tokens):
    plain = PlainGPT(**flags).to(device).eval()
    return partial(plain.write, torch.zeros(1, 1, dtype=torch.long, device=device), tokens)


def our_writer(flags, device, tokens, dtype):
    model = GPT(GPTConfig(**flags)).to(device, dtype).eval()
    return partial(model.generate, torch.zeros(1, 1, dtype=torch.long, device=device), tokens, temperature=0)


def bench_writing(flags, rows, cfg, device):
    """Greedy text by every mixer's own state."""
    flags = COMMON | flags
    contenders = {"nanoGPT's way, float32": partial(nanogpt_writer, flags, device, cfg.tokens)}
    for dtype in (torch.float32, torch.bfloat16):
        for row in rows:
            make = partial(our_writer, flags | flags_of(row), device, cfg.tokens, dtype)
            contenders[f"{row}, {dtype_name(dtype)}"] = make
    size = f"{flags['n_layer']} x {flags['n_embd']}, block {flags['block_size']}"
    title = f"greedy decoding of {cfg.tokens} tokens, {size}"
    return compare(title, contenders, cfg, device, "tokens", cfg.tokens, memory=False)


@torch.no_grad()
def after(position, flags, device):
    """(model, state) after `position` tokens, without positions of their own."""
    model = GPT(GPTConfig(**COMMON | flags | {"pos_embedding": "none"})).to(device).eval()
    state = DecodingState()
    model(torch.zeros(1, position, dtype=torch.long, device=device), state=state)
    return model, state


def further(position, flags, device):
    """A run that reads STRIDE tokens, one after the other; the first begins at `position`."""
    model, state = after(position, flags, device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def run():
        for _ in range(STRIDE):
            model(token, state=state)

    return run


def bench_far(flags, near, far, rows, cfg, device):
    """The time of a token at position `far` over that at `near`, with quartiles."""
    flags = flags | {"block_size": far + STRIDE * (cfg.repeats + 1)}
    rows = [row for row in rows if row not in NOT_FAR]
    runs = {(row, p): further(p, flags | flags_of(row), device) for row in rows for p in (near, far)}
    seconds, results = interleave(runs, cfg.repeats, device), {}
    size = f"{flags['n_layer']} x {flags['n_embd']}, float32"
    print(f"\ntime per token at position {far:,} over that at {near:,}, {size}")
    for row in rows:
        times = seconds[row, near], seconds[row, far]
        ratio, low, high = median_and_quartiles([f / n for n, f in zip(*times)])
        ms = [statistics.median(t) / STRIDE * 1e3 for t in times]
        results[row] = {"ratio": ratio, "low": low, "high": high, "ms_near": ms[0], "ms_far": ms[1]}
        print(f"{row:<38}{ratio:>7.2f}x{f'{low:.2f} to {high:.2f}':>18}{ms[0]:>10.2f} and {ms[1]:.2f} ms")
    return results


def bench_state(flags, T, rows, cfg, device):
    """Bytes per layer of the state after T tokens, spare room of growing buffers included, and of keys and values."""
    flags, results = flags | {"block_size": 2 * T}, {}
    cache = 2 * 4 * flags["n_embd"] * T
    print(f"\nstate after {T:,} tokens, width {flags['n_embd']}, float32: bytes per layer (keys and values: {cache:,})")
    for row in rows:
        held = after(T, flags | flags_of(row), device)[1].nbytes() / flags["n_layer"]
        results[row] = {"bytes": held, "cache_bytes": cache, "ratio": cache / held}
        print(f"{row:<38}{held:>14,.0f}{cache / held:>12,.1f}x smaller")
    return results


DECODE = {
    "6x384": partial(bench_writing, MEDIUM | {"block_size": 1024}),
    "far": partial(bench_far, MEDIUM, 1024, 32768),
    "state": partial(bench_state, MEDIUM, 4096),
}


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixers.

MIXERS = ["baseline", "relu2", "swiglu", "kan", "kan_dog", "kan_gaus1", "kan_morlet", "bio", "bio_events"]
EDGES = ["kan_edge"]  # slow


def mixer_of(flags, width, device="cpu"):
    config = GPTConfig(**{"n_layer": 1, "n_head": 1, "n_embd": width, "block_size": 8} | COMMON | flags)
    return GPT(config).transformer.h[0].mlp.to(device)


def mixer_run(flags, width, shape, device):
    torch.manual_seed(0)
    mixer = mixer_of(flags, width, device)
    return with_gradients(mixer, [torch.randn(*shape, width, device=device)], list(mixer.parameters()))


def bench_mixers(width, shape, rows, cfg, device):
    """Channel mixers forward and backward on x (*shape, width), float32."""
    flags = {row: flags_of(row) for row in rows}
    contenders = {row: partial(mixer_run, flags[row], width, shape, device) for row in rows}
    parameters = {row: sum(p.numel() for p in mixer_of(flags[row], width).parameters()) for row in rows}
    title = f"channel mixer, forward + backward, width {width}, {math.prod(shape)} tokens, float32"
    return compare(title, contenders, cfg, device, "tokens", math.prod(shape), parameters=parameters)


def edge_run(function, inputs, outputs, tokens, device):
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, inputs, device=device), torch.randn(tokens, outputs, device=device)
    w, a, b = torch.randn(3, outputs, inputs, device=device)
    return with_gradients(partial(function, kind="mex"), [x, w, a, b], grad=grad)


def bench_edges(inputs, outputs, tokens, rows, cfg, device):
    """The layer of Wav-KAN by its formula, which makes (tokens, outputs, inputs) tensors, and by our kernel."""
    layers = {"naive Wav-KAN layer": edges_reference, "wavelet_edges": wavelet_edges}
    contenders = {name: partial(edge_run, f, inputs, outputs, tokens, device) for name, f in layers.items()}
    title = f"wavelets per edge, {inputs} -> {outputs}, {tokens} tokens"
    results = compare(title, contenders, cfg, device, "tokens", tokens)
    for row in results if cfg.memory else ():
        one = partial(edge_run, layers[row["name"]], inputs, outputs, 1, device)
        row["mb_per_token"] = (row["memory_mb"] - in_fresh_process(peak_memory, one, device)) / (tokens - 1)
        print(f"{row['name']:<38}{row['mb_per_token']:>10.3f} MB per further token")
    return results


def bench_events(width, rows, cfg, device):
    """T (mask x) of one token by a matrix product, and by the rows of T that its active units select."""
    layer = SparseEventLayer(width, GPTConfig(use_bio_mlp=True, **COMMON)).to(device)
    x = torch.randn(1, 1, width, device=device)
    contenders = {"dense": partial(without_grad, F.linear, x, layer.T.t(), layer.bias)}
    for silent in (0.25, 0.5, 0.75, 0.9, 0.97):
        mask = (torch.randperm(width, device=device) >= silent * width).to(x.dtype).view_as(x)
        contenders[f"{silent:.0%} silent"] = partial(without_grad, layer.read_active, mask * x, mask)
    title = f"event transform of a token, {width} units"
    return compare(title, contenders, cfg, device, "tokens", 100, 100, memory=False)


CHANNEL = {
    "128": partial(bench_mixers, 128, (12, 64)),
    "384": lambda rows, cfg, device: bench_mixers(384, (16, 256), [r for r in rows if r not in EDGES], cfg, device),
    "edges": partial(bench_edges, 384, 1536, 64),
    "events": partial(bench_events, 1536),
}


# ---------------------------------------------------------------------------------------------------------------------
# The recipe to its end.


def bench_recipe(rows, cfg, device):
    """Losses on the whole val split at the end of the CPU recipe, ours by train.py's own code and config."""
    losses = {REFERENCE: [], "ours": []}
    for seed in range(cfg.seeds):
        words = [RECIPE, f"--seed={seed}", f"--max_iters={cfg.max_iters}"]
        settings = configurator.read(words, TrainConfig, GPTConfig)
        train_cfg = settings.build(TrainConfig)
        data = TokenDataset(train_cfg)
        torch.manual_seed(seed)
        flags = {k: settings.values[k] for k in SIZE_FLAGS} | {"vocab_size": data.meta["vocab_size"]}
        step, plain = plain_step(flags, train_cfg.batch_size, device, data.folder, cfg.max_iters)
        repeat(step, cfg.max_iters)
        losses[REFERENCE].append(plain_val_loss(plain, data.splits["val"]))
        torch.manual_seed(seed)
        model = GPT(GPTConfig(**flags))
        dtype = pick_dtype(cfg.dtype, device, model, train_cfg.batch_size * model.config.block_size)[0]
        trainer = Trainer(train_cfg, model, data, World(device, "auto"), dtype)
        repeat(trainer.step, cfg.max_iters)
        losses["ours"].append(trainer.evaluate()["val_loss"])
        print(f"seed {seed}: " + ", ".join(f"{name} {each[-1]:.4f}" for name, each in losses.items()), flush=True)
    means = {name: statistics.fmean(each) for name, each in losses.items()}
    print("mean: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return {"losses": losses, "means": means, "dtype": dtype_name(dtype), "max_iters": cfg.max_iters}


# ---------------------------------------------------------------------------------------------------------------------
# Triton kernels.

STREAM_SHAPE = (8, 4096, 768)  # (B, T, C) of what bytes are counted and timed for
FHN_STEPS = 2


def compiled_kernels(module):
    """What ptxas says of the usual variants of a module's kernels, for every GPU that aot.py knows, printed."""
    import triton

    from kernels import aot

    found = []
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # what comes out of the cache has no log
        for name, *how in module.aot_rows(False):
            for arch, limit in aot.SHARED_LIMIT.items():
                row = {"kernel": name, "arch": arch} | aot.measure(*how, arch)
                row["fits"] = row["spill"] == 0 and row["shared"] <= limit
                numbers = "".join(f"{row[key]:>8} {key}" for key in ("registers", "spill", "shared"))
                print(f"{name:<38} sm_{arch}{numbers}{'' if row['fits'] else '  <- too much'}", flush=True)
                found.append(row)
    return found


def stream_runs(family, module, device):
    """(forward, backward) of a module that streams over time, each a run on tensors of STREAM_SHAPE."""
    gate, x, grad = torch.rand(3, *STREAM_SHAPE, device=device)
    if family == "scan":
        h0 = torch.zeros_like(x[:, 0])
        h = module.triton_forward(gate, x, h0)
        return partial(module.triton_forward, gate, x, h0), partial(module.triton_backward, grad, gate, h, h0)
    ones = torch.ones(STREAM_SHAPE[-1], device=device)
    inputs = [x, gate, 10 * ones, *(FHN[name] * ones for name in ("a", "b", "eps")), 0.5, FHN_STEPS]
    carries = module.triton_forward(*inputs, None)[2]
    return partial(module.triton_forward, *inputs, None), partial(module.triton_backward, grad, *inputs, carries)


def bench_stream(family, module, cfg, device):
    """Bytes that the kernels move over the floor, each (B, T, C) once. On a GPU, speed beside a copy of as many."""
    results, runs = {}, stream_runs(family, module, device) if device.startswith("cuda") else (None, None)
    for name, tensors, run in zip(("forward", "backward"), (3, 5), runs):
        floor = 4 * tensors * math.prod(STREAM_SHAPE)
        steps = (FHN_STEPS,) if family == "fhn" else ()
        moved = module.bytes_moved(*STREAM_SHAPE, *steps, backward=name == "backward")
        results[name] = {"bytes": moved, "floor": floor, "ratio": moved / floor}
        print(f"{family} {name}, {STREAM_SHAPE}, float32: {moved:,} bytes, {moved / floor:.4f} of the floor")
        if run:
            source, target = torch.zeros(2, floor // 8, device=device)
            contenders = {"a copy of the floor's bytes": partial(without_grad, target.copy_, source)}
            contenders[f"{family} {name}"] = partial(without_grad, run)
            rows = compare(f"{family} {name} on {device}", contenders, cfg, device, "GB", floor / 1e9, memory=False)
            results[name]["rows"] = rows
    return results


def bench_kernels(family, rows, cfg, device):
    if not find_spec("triton"):
        raise ConfigError("kernels: needs the package triton, which exists on Linux alone")
    module = importlib.import_module(f"kernels.{family}_triton")
    results = {"compiled": compiled_kernels(module)}
    if family != "block_sparse":
        results["bytes"] = bench_stream(family, module, cfg, device)
    return results


KERNELS = {family: partial(bench_kernels, family) for family in ("scan", "fhn", "block_sparse")}


def loading_seconds(load, path, queue):
    """Seconds of the first load in a process, whose memory is fresh, as it is when a run is resumed."""
    start = time.perf_counter()
    load(path)
    queue.put(time.perf_counter() - start)


def bench_loading(rows, cfg, device):
    """Loading a file of 520 MB, which the operating system has in memory: torch.load alone, and with all checks."""
    loads = {"torch.load": partial(torch.load, weights_only=True), "load_checkpoint": load_checkpoint}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.pt"
        save_checkpoint(path, {"model": {f"w{i}": torch.randn(1024, 4096) for i in range(31)}, "model_args": {}})
        seconds = {name: [] for name in loads}
        for _ in range(cfg.repeats):
            for name, load in loads.items():
                seconds[name].append(in_fresh_process(loading_seconds, load, path))
        rows = [row | {"MB_per_s": path.stat().st_size / 1e6 / row["seconds"]} for row in speeds(seconds)]
    print_rows("loading a checkpoint, each time in a fresh process", rows, "MB")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The history: a line per benchmark and day, so that what became slower shows.

HISTORY = ROOT / "docs" / "results" / "bench.jsonl"
RESULTS = ROOT / "docs" / "results.md"


def speeds_of(results, name=""):
    """{name: [speed, low, high]} of whatever rows of `speeds` are in nested results."""
    if isinstance(results, dict) and results.keys() >= {"speed", "low", "high"}:
        return {name: [round(results[key], 4) for key in ("speed", "low", "high")]}
    pairs = results.items() if isinstance(results, dict) else ()
    if isinstance(results, list):
        pairs = [(row["name"], row) for row in results if isinstance(row, dict) and "name" in row]
    found = {}
    for key, inner in pairs:
        found |= speeds_of(inner, f"{name} / {key}" if name else str(key))
    return found


def record(what, dtype, results, machine):
    """Add a benchmark's speeds to the history; print those that left the quartiles of the last record like it."""
    like = {"bench": what, "dtype": dtype, "machine": machine, "torch": torch.__version__}
    lines = HISTORY.read_text(encoding="utf-8").splitlines() if HISTORY.exists() else []
    before = [r for r in map(json.loads, lines) if all(r[key] == value for key, value in like.items())]
    now = speeds_of(results)
    for name, (speed, low, high) in now.items() if before else ():
        was = before[-1]["speeds"].get(name)
        if was and (high < was[1] or low > was[2]):
            change = "slower" if high < was[1] else "faster"
            print(f"{change}: {name}: {speed:.2f}x, {was[0]:.2f}x on {before[-1]['date']} ({before[-1]['commit'][:7]})")
    line = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit() or "none", **like, "speeds": now}
    HISTORY.parent.mkdir(parents=True, exist_ok=True)
    lines.append(json.dumps(line))
    replace_file(HISTORY, "".join(f"{line}\n" for line in lines).encode())
    write_between_marks(RESULTS, "speeds", latest(map(json.loads, lines)))
    print(f"recorded in {HISTORY} and {RESULTS}")


def latest(records):
    """docs/results.md on speed: of each benchmark its last record, a line per part with the speeds of its rows."""
    last, text = {}, []
    for found in records:
        last[found["bench"]] = found
    for what, found in sorted(last.items()):
        machine, parts = found["machine"], {}
        for name, (speed, low, high) in found["speeds"].items():
            part, row = name.split(" / ", 1)
            told = f"{row} {speed:.2f}" + f" ({low:.2f} to {high:.2f})" * (low < high)
            parts.setdefault(part, []).append(told)
        where = f"{machine['gpu'] or machine['cpu']}, {machine['threads']} thread(s), torch {found['torch']}"
        text.append(f"**`python -m lab.bench {what}`**, {found['date']}, commit {found['commit'][:7]}, {where}")
        text.append("\n".join(f"- {part}: {'; '.join(rows)}" for part, rows in parts.items()))
    return "\n\n".join(text)


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


@dataclass
class Bench:
    run: Callable  # (chosen parts, rows, cfg, device) -> results
    parts: list  # what runs by default
    rows: list | None = None  # for its tables; config files on the command line are added. None: it takes none


def each(parts):
    """A benchmark whose parts, {name: function of (rows, cfg, device)}, run by themselves."""
    return lambda chosen, rows, cfg, device: {name: parts[name](rows, cfg, device) for name in chosen}


BENCHES = {
    "step": Bench(each(STEP), [*TABLES, *OF_ITS_SHAPE], STEP_ROWS),
    "decode": Bench(each(DECODE), list(DECODE), DECODERS),
    "recipe": Bench(each({"cpu": bench_recipe}), ["cpu"]),
    "attention": Bench(bench_attention, ATTENTION_LENGTHS),
    "mlp": Bench(each(CHANNEL), list(CHANNEL), MIXERS + EDGES),
    "heads": Bench(each(HEADS), list(HEADS), HEAD_ROWS),
    "residual": Bench(each(RESIDUAL), list(RESIDUAL), RESIDUAL_ROWS),
    "optimizers": Bench(each(OPTIMIZERS), list(OPTIMIZERS), OPTIMIZER_ROWS),
    "local": Bench(each(LOCAL), list(LOCAL), LOCAL_ROWS),
    "embeddings": Bench(each(EMBEDDINGS), list(EMBEDDINGS), EMBEDDING_ROWS),
    "checkpoint": Bench(each({"load": bench_loading}), ["load"]),
    "energy": Bench(bench_energy, ["start", "50%", "90%"], ENERGY_ROWS),
    "kernels": Bench(each(KERNELS), list(KERNELS)),
}


def choose(what, only, files):
    """The parts of a benchmark that --only names, or its default ones: without presets if config files are given."""
    parts = BENCHES[what].parts
    is_step = what == "step"
    chosen = [s.strip() for s in only.split(",") if s.strip()]
    if unknown := [s for s in chosen if s not in parts and not (is_step and s in STEP)]:
        more = " and the names in config/ablation and config/presets" if is_step else ""
        raise ConfigError(f"--only={only}: no {unknown[0]!r}; there are {', '.join(parts)}{more}")
    return chosen or [part for part in parts if not (is_step and files and part in PRESETS)]


def split_words(words):
    """(config files, flags)."""
    is_file = [word.endswith(".py") and not word.startswith("-") for word in words]
    return [w for w, yes in zip(words, is_file) if yes], [w for w, yes in zip(words, is_file) if not yes]


def main(argv=None):
    with configurator.one_line_errors("lab.bench", DataError):
        what, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        files, words = split_words(words)
        cfg = configurator.read([what, *words] if what.startswith("-") else words, BenchConfig, doc=__doc__)
        cfg = cfg.build(BenchConfig)
        if what not in BENCHES:
            raise ConfigError(f"{what}: expected {' or '.join(BENCHES)} first")
        bench = BENCHES[what]
        if files and bench.rows is None:
            raise ConfigError(f"{files[0]}: {what} has no rows that a config file could add to")
        rows = [*(bench.rows or ()), *map(shlex.quote, files)]
        for row in rows:
            row in SPECIAL or flags_of(row)  # a mistake in a file is found before any work
        chosen, (device, _) = choose(what, cfg.only, files), pick_device(cfg.device)
        here = machine(device)
        print(f"torch {torch.__version__}, {here['gpu'] or here['cpu']}, {here['threads']} threads, device {device}")
        results = bench.run(chosen, rows, cfg, device)
        if cfg.record:
            record(what, cfg.dtype, results, here)
    print(json.dumps({"bench": what, "torch": torch.__version__, "device": device, "results": results}))


if __name__ == "__main__":
    main()
