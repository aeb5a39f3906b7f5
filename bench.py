"""
Speed and memory, always beside a reference in the same run.

    python bench.py step       # training steps: nanoGPT's recipe as plain eager float32 PyTorch, ours, every preset
    python bench.py decode     # greedy text: recomputing every token, as nanoGPT does, and ours; far out; its state
    python bench.py recipe     # the CPU recipe trained to its end by both: loss on the whole val split, several seeds
    python bench.py attention --plot  # dense attention, cells, knots and waves over T, with fitted exponents
    python bench.py mlp        # channel mixers against the MLP; wavelets an edge; events that read their active rows
    python bench.py heads      # steps and memory of output heads; FLOPs at GPT-2's size
    python bench.py residual   # steps of residual wirings, and of the package hyper-connections
    python bench.py local      # steps of learning rules
    python bench.py embeddings # steps and memory of sparse codes and manifolds, float32
    python bench.py recall     # key-value pairs in random text: the share recalled from beyond the attention window
    python bench.py kernels    # Triton: what ptxas says of each kernel, bytes moved, and speed where there is a GPU
    python bench.py step --only=cpu --repeats=21

Contenders take turns, so that a busy machine slows all of them. A speed is the median over rounds of the ratio to the
reference of the same round, with the quartiles behind it. Memory is the peak of a fresh process, less what
code alone takes. The last line is JSON.
"""

import importlib
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import configurator
from configurator import ROOT, ConfigError
from data.corpus import DataError
from data.dataset import TokenDataset
from kernels.block_sparse import Route, block_sparse_attention
from kernels.fhn import fhn_propagate
from kernels.wavekan import edges_reference, wavelet_edges
from model import FHN, GPT, Cells, DecodingState, FHNMedium, GPTConfig, KnotGate, SparseEventLayer, build_pd_anchors_1d
from train import TrainConfig, Trainer, World, dtype_name, memory_mb, pick_device, pick_dtype


@dataclass
class BenchConfig:
    """How long to measure, and where."""

    # -- benchmark ----------------------------------------------------------------------------------------------------
    only: str = ""  # comma-separated parts; empty = all
    repeats: int = 11  # rounds; each contender runs once in each
    tokens: int = 512  # of decode: how many to write
    seeds: int = 3  # of recipe and recall: runs of each contender
    max_iters: int = 2000  # of recipe: steps of a run
    dtype: str = "auto"  # number format of our training steps (auto: as train.py's) and of attention (auto: float32)
    device: str = "cpu"  # "auto" | "cpu" | "cuda" | "mps"
    memory: bool = True  # also measure peak memory, in a process for each contender
    plot: bool = False  # of attention: write PNGs to docs/img

    def __post_init__(self):
        for name in ("repeats", "tokens", "seeds", "max_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}  # nanoGPT's CPU recipe
MEDIUM = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
COMMON = {"vocab_size": 65, "bias": False}  # as nanoGPT trains on shakespeare_char


# ---------------------------------------------------------------------------------------------------------------------
# Measuring. A contender is a function without arguments that builds a run: another one, what takes the time. Where
# memory is measured it is a partial of a function at the top level, so that a fresh process can be told of it.


def interleave(contenders, rounds, device):
    """{name: seconds of each round}; every contender is a function without arguments and runs once a round."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in contenders.values():
        timed(run)  # warm-up: allocation, compilation
    seconds = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(timed(run))
    return seconds


def median_and_quartiles(values):
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), low, high


def speeds(seconds):
    """Rows {name, speed, low, high}: each contender's speed as a multiple of the first one's, median and quartiles."""
    reference = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        speed, low, high = median_and_quartiles([r / t for r, t in zip(reference, times)])
        rows.append({"name": name, "speed": speed, "low": low, "high": high, "seconds": statistics.median(times)})
    return rows


def several(step, steps):
    for _ in range(steps):
        step()


def peak_memory(contender, device, queue):
    """Put the peak memory in MB of two runs, in a process that does nothing else, into `queue`."""
    importlib.import_module("torch._dynamo")  # 130 MB of code, which the first operator of our own would load

    before = memory_mb(device)
    several(contender(), 2)
    queue.put(round(memory_mb(device) - before, 1))


def in_fresh_process(function, *args):
    """What `function(*args, queue)` puts into its queue, run in a new process."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=function, args=(*args, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__}{args} ended with status {process.exitcode}")
    return queue.get()


def compare(title, contenders, cfg, device, unit="run", work=1, times=1, memory=None, parameters=None):
    """Rows of {name: contender}, printed; the first is the reference. A round is `times` runs, `work` units in all.

    memory: whether to measure it, by default as cfg says; parameters: {name: how many}, if that is to be shown.
    """
    runs = {name: partial(several, make(), times) for name, make in contenders.items()}
    rows = speeds(interleave(runs, cfg.repeats, device))
    for row in rows:
        row[f"{unit}_per_s"] = work / row["seconds"]
        if cfg.memory if memory is None else memory:
            row["memory_mb"] = in_fresh_process(peak_memory, contenders[row["name"]], device)
        if parameters:
            row["parameters"] = parameters[row["name"]]
    more = {"memory_mb": "peak MB", "parameters": "parameters"}
    more = {key: label for key, label in more.items() if key in rows[0]}
    labels = "".join(f"{label:>12}" for label in more.values())
    print(f"\n{title}\n{'':<38}{'speed':>8}{'quartiles':>18}{unit + '/s':>14}{labels}")
    for row in rows:
        quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
        cells = "".join(f"{row[key]:>12,.0f}" for key in more)
        print(
            f"{row['name']:<38}{row['speed']:>7.2f}x{quartiles:>18}{work / row['seconds']:>14,.0f}{cells}", flush=True
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The reference: the same transformer and recipe in plain eager float32 PyTorch, sharing no code with model.py. Layer by
# layer it does what nanoGPT's documented CPU recipe does, so its speed stands for nanoGPT's.


class PlainBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias):
        super().__init__()
        self.block_size = block_size
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(n_embd, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd, bias=bias)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx):
        x = self.tokens(idx) + self.places(torch.arange(idx.size(1), device=idx.device))
        return self.norm(self.blocks(x))

    def loss(self, idx, targets):
        logits = F.linear(self(idx), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def write(self, idx, count):
        """Greedy text, each token from a forward pass over the whole context."""
        for _ in range(count):
            x = self(idx[:, -self.block_size :])[:, -1]
            idx = torch.cat((idx, F.linear(x, self.tokens.weight).argmax(-1, keepdim=True)), 1)
        return idx


def plain_step(flags, batch, device, folder, max_iters=2000):
    """(step, model): a training step as nanoGPT's train.py does it on a CPU, with the README's CPU recipe.

    float32, AdamW (fused on CUDA only), warm-up and cosine, clipping, loss fetched every step.
    """
    model = PlainGPT(**flags).to(device)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=device.startswith("cuda"))
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, max_iters - 100), 1e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [100])

    def step():
        data, T = np.memmap(Path(folder) / "train.bin", np.uint16, mode="r"), flags["block_size"]
        starts = torch.randint(len(data) - T, (batch,)).tolist()
        x = torch.stack([torch.from_numpy(data[s : s + T].astype(np.int64)) for s in starts]).to(device)
        y = torch.stack([torch.from_numpy(data[s + 1 : s + 1 + T].astype(np.int64)) for s in starts]).to(device)
        loss = model.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return loss.item()

    return step, model


def nanogpt_step(flags, batch, device, folder, dtype):
    """`plain_step` as a row of a table. It runs in float32, whatever dtype says."""
    return plain_step(flags, batch, device, folder)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Training steps. A row of a table holds flags of GPTConfig, and what else `our_step` takes; "make" takes its place.


def trainer_step(model, batch, device, folder, dtype, compiles=False):
    """A step of train.py itself, loss fetched."""
    cfg = TrainConfig(
        dataset="", data_dir=str(folder), batch_size=batch, gradient_accumulation_steps=1, learning_rate=1e-3,
        warmup_iters=100, beta2=0.99, compile=compiles,
    )  # fmt: skip
    trainer = Trainer(cfg, model, TokenDataset(cfg), World(device, "auto"), pick_dtype(dtype, device)[0])
    return lambda: trainer.step()[0].item()


def our_step(flags, batch, device, folder, dtype, compiles=False, **more):
    return trainer_step(GPT(GPTConfig(**flags | more)), batch, device, folder, dtype, compiles)


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
STEP_ROWS = {
    REFERENCE: {"make": nanogpt_step},
    "ours, float32": {"dtype": "float32"},
    "ours, bfloat16": {"dtype": "bfloat16"},
    "ours, bfloat16, compiled": {"dtype": "bfloat16", "compiles": True},
}
HEAD_ROWS = {
    "linear": {},
    "linear, loss_chunk": {"loss_chunk": 256},
    "MFS": {"use_mfs_head": True},
    "MFS, loss_chunk": {"use_mfs_head": True, "loss_chunk": 256},
    "linear, L4 losses": {"add_l4_losses": True},
}
RESIDUAL_ROWS = {
    "plain": {},
    "gated": {"gated_blocks": True},
    "mHC, 4 streams": {"use_mhc": True, "mhc_streams": 4},
    "HC, 4 streams": {"use_mhc": True, "mhc_streams": 4, "hc_mode": "hc"},
    "layer aggregation": {"use_mla": True},
    "mHC of hyper-connections, 4 streams": {"make": package_step, "kind": "mhc"},
    "HC of hyper-connections, 4 streams": {"make": package_step, "kind": "hc"},
}
LOCAL_ROWS = {
    "backpropagation": {"tie_weights": False},
    "feedback alignment": {"tie_weights": False, "method": "fa"},
    "direct feedback alignment": {"tie_weights": False, "method": "dfa"},
    "sign symmetry": {"tie_weights": False, "method": "sign_sym"},
}
EMBEDDING_ROWS = {
    "plain": {},
    "sdr": {"use_sdr": True},
    "sdr, delta": {"use_sdr": True, "sdr_rule": "delta"},
    "sdr, no memory": {"use_sdr": True, "sdr_rule": "none"},
    "sphere": {"use_manifold": True, "skip_manifold_spectral": True},
    "sphere, spectral": {"use_manifold": True},
    "e7": {"use_manifold": True, "manifold": "e7", "skip_manifold_spectral": True},
    "rotor": {"use_manifold": True, "manifold": "rotor", "skip_manifold_spectral": True},
}


@contextmanager
def random_corpus():
    """A folder with train.bin and val.bin, a million tokens below 65 each."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16).tofile(Path(folder) / f"{split}.bin")
        yield folder


def can_run(name, row):
    """Whether the package of a row is there; says so if not."""
    is_there = row.get("make") is not package_step or find_spec("hyper_connections") is not None
    if not is_there:
        print(f"{name}: skipped, the package hyper-connections is not installed")
    return is_there


def bench_training(rows, flags, batch, steps, cfg, device):
    """Training steps of rows on `batch` sequences of a model of `flags`, `steps` of them a round."""
    flags = COMMON | flags
    with random_corpus() as folder:
        contenders = {}
        for name, row in rows.items():
            if can_run(name, row):
                how = {"make": our_step, "dtype": cfg.dtype} | row
                contenders[name] = partial(how.pop("make"), flags, batch, device, folder, **how)
        size = ", ".join(f"{name} {flags[name]}" for name in ("n_layer", "n_embd", "block_size", "vocab_size"))
        title = f"training step, {size}, batch {batch}, {dtype_name(pick_dtype(cfg.dtype, device)[0])}"
        return compare(title, contenders, cfg, device, "tokens", batch * flags["block_size"] * steps, steps)


SIZE_FLAGS = ("n_layer", "n_head", "n_embd", "block_size", "bias")
CPU_MOST = 2e7  # weights in blocks; presets with more want a GPU, or to be asked for by --only


def bench_preset(path, cfg, device):
    """A preset, over the CPU recipe, beside nanoGPT and itself with its ideas off, on at most 4096 tokens a step.

    All without dropout.
    """
    settings = configurator.read(["config/train_shakespeare_char_cpu.py", str(path)], TrainConfig, GPTConfig)
    weights = 12 * settings.values["n_layer"] * settings.values["n_embd"] ** 2
    if device == "cpu" and weights > CPU_MOST and path.stem not in cfg.only.split(","):
        print(f"preset {path.stem}: skipped on a CPU; --only={path.stem} runs it")
        return None
    given = {f.name: settings.values[f.name] for f in fields(GPTConfig) if f.name in settings.given}
    flags = {name: settings.values[name] for name in SIZE_FLAGS} | {k: given[k] for k in ("vocab_size",) if k in given}
    ideas = {name: value for name, value in given.items() if name not in (*flags, "dropout")}
    rows = {REFERENCE: {"make": nanogpt_step}, "ours, ideas off": {}, f"preset {path.stem}": ideas}
    batch = max(1, min(settings.values["batch_size"], 4096 // flags["block_size"]))
    return bench_training(rows, flags, batch, 1, cfg, device)


def bench_head_flops(cfg, device):
    """FLOPs a token of a training step at GPT-2's size, as a multiple of the linear head's; nothing is computed."""
    rows = {}
    with torch.device("meta"):
        for name, flags in HEAD_ROWS.items():
            rows[name] = GPT(GPTConfig(**GPT2 | {"bias": False} | flags)).flops_per_token()
    linear = next(iter(rows.values()))
    print("\nFLOPs a token of a training step, 12 x 768, vocab_size 50304")
    for name, flops in rows.items():
        print(f"{name:<38}{flops / linear:>7.2f}x{flops / 1e6:>14,.0f} MFLOP")
    return {name: {"flops": flops, "ratio": flops / linear} for name, flops in rows.items()}


STEP = {
    "cpu": partial(bench_training, STEP_ROWS, SMALL, 12, 10),
    "6x384": partial(bench_training, STEP_ROWS, MEDIUM, 16, 1),
} | {path.stem: partial(bench_preset, path) for path in sorted((ROOT / "config" / "presets").glob("*.py"))}
HEADS = {
    "V65": partial(bench_training, HEAD_ROWS, SMALL, 12, 5),
    "V16384": partial(bench_training, HEAD_ROWS, SMALL | {"block_size": 256, "vocab_size": 16384}, 8, 1),
    "flops": bench_head_flops,
}
RESIDUAL = {"6x384": partial(bench_training, RESIDUAL_ROWS, MEDIUM, 16, 1)}
EMBEDDINGS = {"6x384": partial(bench_training, EMBEDDING_ROWS, MEDIUM, 16, 1)}
LOCAL = {
    "cpu": partial(bench_training, LOCAL_ROWS, SMALL, 12, 5),
    "6x384": partial(bench_training, LOCAL_ROWS, MEDIUM, 16, 1),
}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding.

DECODERS = {
    "softmax": {},
    "block-sparse": {"use_block_sparse": True},
    "waves": {"attn_mode": "fhn"},
    "knots": {"use_knot_attention": True},
}
FAR_DECODERS = ("waves", "block-sparse", "softmax")
STRIDE = 8  # tokens that a run of `further` reads


def nanogpt_writer(flags, device, tokens):
    plain = PlainGPT(**flags).to(device).eval()
    return partial(plain.write, torch.zeros(1, 1, dtype=torch.long, device=device), tokens)


def our_writer(flags, device, tokens, dtype):
    model = GPT(GPTConfig(**flags)).to(device, dtype).eval()
    return partial(model.generate, torch.zeros(1, 1, dtype=torch.long, device=device), tokens, temperature=0)


def bench_writing(flags, cfg, device):
    """Greedy text by every mixer's own state."""
    flags = COMMON | flags
    contenders = {"nanoGPT's way, float32": partial(nanogpt_writer, flags, device, cfg.tokens)}
    for dtype in (torch.float32, torch.bfloat16):
        for name, row in DECODERS.items():
            contenders[f"{name}, {dtype_name(dtype)}"] = partial(our_writer, flags | row, device, cfg.tokens, dtype)
    title = (
        f"greedy decoding of {cfg.tokens} tokens, {flags['n_layer']} x {flags['n_embd']}, block {flags['block_size']}"
    )
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


def bench_far(flags, near, far, cfg, device):
    """The time of a token at position `far` over that at `near`, with quartiles."""
    flags = flags | {"block_size": far + STRIDE * (cfg.repeats + 1)}
    runs = {(name, p): further(p, flags | DECODERS[name], device) for name in FAR_DECODERS for p in (near, far)}
    seconds, results = interleave(runs, cfg.repeats, device), {}
    print(
        f"\na token at position {far:,} takes, times one at {near:,}, {flags['n_layer']} x {flags['n_embd']}, float32"
    )
    for name in FAR_DECODERS:
        times = seconds[name, near], seconds[name, far]
        ratio, low, high = median_and_quartiles([f / n for n, f in zip(*times)])
        ms = [statistics.median(t) / STRIDE * 1e3 for t in times]
        results[name] = {"ratio": ratio, "low": low, "high": high, "ms_near": ms[0], "ms_far": ms[1]}
        print(f"{name:<38}{ratio:>7.2f}x{f'{low:.2f} to {high:.2f}':>18}{ms[0]:>10.2f} and {ms[1]:.2f} ms")
    return results


def bench_state(flags, T, cfg, device):
    """Bytes a layer of the state after T tokens, spare room of growing buffers included, and of keys and values."""
    flags, results = flags | {"block_size": 2 * T}, {}
    cache = 2 * 4 * flags["n_embd"] * T
    print(f"\nstate after {T:,} tokens, width {flags['n_embd']}, float32: bytes a layer (keys and values: {cache:,})")
    for name, row in DECODERS.items():
        held = after(T, flags | row, device)[1].nbytes() / flags["n_layer"]
        results[name] = {"bytes": held, "cache_bytes": cache, "ratio": cache / held}
        print(f"{name:<38}{held:>14,.0f}{cache / held:>12,.1f}x smaller")
    return results


DECODE = {
    "6x384": partial(bench_writing, MEDIUM | {"block_size": 1024}),
    "far": partial(bench_far, MEDIUM, 1024, 32768),
    "state": partial(bench_state, MEDIUM, 4096),
}


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixers.

MIXERS = {
    "MLP, GELU": {},
    "MLP, ReLU^2": {"mlp_act": "relu2"},
    "SwiGLU": {"use_swiglu": True},
    "WaveKAN, mex": {"use_kan": True},
    "WaveKAN, dog": {"use_kan": True, "kan_wavelet": "dog"},
    "WaveKAN, morlet": {"use_kan": True, "kan_wavelet": "morlet"},
    "BioMLP, oscillators": {"use_bio_mlp": True, "bio_threshold": 0.0},
    "BioMLP, events": {"use_bio_mlp": True},
}
EDGES = {"WaveKAN, a wavelet an edge": {"use_kan": True, "kan_edges": "edge"}}


def mixer_of(flags, width, device="cpu"):
    config = GPTConfig(n_layer=1, n_head=1, n_embd=width, block_size=8, **COMMON | flags)
    return GPT(config).transformer.h[0].mlp.to(device)


def quietly(function, *args):
    """A run of function(*args) without gradients."""
    return torch.no_grad()(partial(function, *args))


def with_gradients(function, inputs, parameters=(), grad=None):
    """A run of function(*inputs) and its backward; grad: of the result, by default random and like the first input."""
    grad = torch.randn_like(inputs[0]) if grad is None else grad

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(function(*leaves), [*leaves, *parameters], grad)

    return run


def mixer_run(flags, width, shape, device):
    torch.manual_seed(0)
    mixer = mixer_of(flags, width, device)
    return with_gradients(mixer, [torch.randn(*shape, width, device=device)], list(mixer.parameters()))


def bench_mixers(rows, width, shape, cfg, device):
    """Channel mixers forward and backward on x (*shape, width), float32."""
    contenders = {name: partial(mixer_run, flags, width, shape, device) for name, flags in rows.items()}
    parameters = {name: sum(p.numel() for p in mixer_of(flags, width).parameters()) for name, flags in rows.items()}
    title = f"channel mixer, forward + backward, width {width}, {math.prod(shape)} tokens, float32"
    return compare(title, contenders, cfg, device, "tokens", math.prod(shape), parameters=parameters)


def edge_run(function, inputs, outputs, tokens, device):
    torch.manual_seed(0)
    x, grad = torch.randn(tokens, inputs, device=device), torch.randn(tokens, outputs, device=device)
    w, a, b = torch.randn(3, outputs, inputs, device=device)
    return with_gradients(partial(function, kind="mex"), [x, w, a, b], grad=grad)


def bench_edges(inputs, outputs, tokens, cfg, device):
    """The layer of Wav-KAN by its formula, which makes (tokens, outputs, inputs) tensors, and by our kernel."""
    layers = {"naive Wav-KAN layer": edges_reference, "wavelet_edges": wavelet_edges}
    contenders = {name: partial(edge_run, f, inputs, outputs, tokens, device) for name, f in layers.items()}
    rows = compare(
        f"wavelets an edge, {inputs} -> {outputs}, {tokens} tokens", contenders, cfg, device, "tokens", tokens
    )
    for row in rows if cfg.memory else ():
        one = partial(edge_run, layers[row["name"]], inputs, outputs, 1, device)
        row["mb_a_token"] = (row["memory_mb"] - in_fresh_process(peak_memory, one, device)) / (tokens - 1)
        print(f"{row['name']:<38}{row['mb_a_token']:>10.3f} MB for each token more")
    return rows


def bench_events(width, cfg, device):
    """T (mask x) of one token by a matrix product, and by the rows of T that its active units select."""
    layer = SparseEventLayer(width, GPTConfig(use_bio_mlp=True, **COMMON)).to(device)
    x = torch.randn(1, 1, width, device=device)
    contenders = {"dense": partial(quietly, F.linear, x, layer.T.t(), layer.bias)}
    for silent in (0.25, 0.5, 0.75, 0.9, 0.97):
        mask = (torch.randperm(width, device=device) >= silent * width).to(x.dtype).view_as(x)
        contenders[f"{silent:.0%} silent"] = partial(quietly, layer.read_active, mask * x, mask)
    return compare(
        f"event transform of a token, {width} units", contenders, cfg, device, "tokens", 100, 100, memory=False
    )


CHANNEL = {
    "128": partial(bench_mixers, MIXERS | EDGES, 128, (12, 64)),
    "384": partial(bench_mixers, MIXERS, 384, (16, 256)),
    "edges": partial(bench_edges, 384, 1536, 64),
    "events": partial(bench_events, 1536),
}


# ---------------------------------------------------------------------------------------------------------------------
# The recipe to its end.


@torch.no_grad()
def plain_val_loss(model, tokens):
    """Mean cross entropy over the whole split, in windows of block_size that do not overlap."""
    T, total = model.block_size, 0.0
    for start in range(0, len(tokens) - 1, 64 * T):
        piece = torch.from_numpy(tokens[start : start + 64 * T + 1].astype(np.int64))
        for x, y in zip(piece[:-1].split(64 * T), piece[1:].split(64 * T)):
            rows = len(x) // T * T
            for a, b in ((x[:rows].view(-1, T), y[:rows].view(-1, T)), (x[None, rows:], y[None, rows:])):
                total += model.loss(a, b).item() * b.numel() if b.numel() else 0.0
    return total / (len(tokens) - 1)


def bench_recipe(cfg, device):
    """Losses on the whole val split at the end of the CPU recipe, ours by train.py's own code and config."""
    rows = {REFERENCE: [], "ours": []}
    for seed in range(cfg.seeds):
        words = ["config/train_shakespeare_char_cpu.py", f"--seed={seed}", f"--max_iters={cfg.max_iters}"]
        settings = configurator.read(words, TrainConfig, GPTConfig)
        train_cfg = settings.build(TrainConfig)
        data = TokenDataset(train_cfg)
        torch.manual_seed(seed)
        flags = {k: settings.values[k] for k in SIZE_FLAGS} | {"vocab_size": data.meta["vocab_size"]}
        step, plain = plain_step(flags, train_cfg.batch_size, device, data.folder, cfg.max_iters)
        several(step, cfg.max_iters)
        rows[REFERENCE].append(plain_val_loss(plain, data.splits["val"]))
        torch.manual_seed(seed)
        dtype = pick_dtype(cfg.dtype, device)[0]
        trainer = Trainer(train_cfg, GPT(GPTConfig(**flags)), data, World(device, "auto"), dtype)
        several(trainer.step, cfg.max_iters)
        rows["ours"].append(trainer.evaluate()["val_loss"])
        print(f"seed {seed}: " + ", ".join(f"{name} {losses[-1]:.4f}" for name, losses in rows.items()), flush=True)
    means = {name: statistics.fmean(losses) for name, losses in rows.items()}
    print("mean: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return {"losses": rows, "means": means, "dtype": dtype_name(dtype), "max_iters": cfg.max_iters}


# ---------------------------------------------------------------------------------------------------------------------
# Recall: pairs of a key and its value, drawn anew for each text, lie in its first quarter between random words; its
# last quarter asks for each, 64 tokens later or more. Two layers of cells of 8 to 11 tokens and the cell before see
# at most 40 tokens back.

PAIRS, KEYS, TEXT = 8, 64, 128  # pairs a text, possible keys (as many values), tokens a text
RECALL = {"vocab_size": 3 * KEYS, "block_size": TEXT, "n_layer": 2, "n_head": 4, "n_embd": 64, "bias": False}
NEAR = {"use_block_sparse": True, "anchor_min_gap": 8, "anchor_jitter": 2, "use_ferope": True}
RECALLERS = {
    "block-sparse": NEAR,
    "block-sparse, sdr without memory": NEAR | {"use_sdr": True, "sdr_rule": "none"},
    "block-sparse, sdr, hebb": NEAR | {"use_sdr": True},
    "block-sparse, sdr, hebb without decay": NEAR | {"use_sdr": True, "sdr_decay": 1.0},
    "block-sparse, sdr, delta": NEAR | {"use_sdr": True, "sdr_rule": "delta"},
    "block-sparse, sdr, willshaw": NEAR | {"use_sdr": True, "sdr_rule": "willshaw", "sdr_decay": 1.0},
    "dense attention": {"use_ferope": True},
}
RECALL_STEPS = 400


def recall_texts(rows, generator):
    """Texts (rows, TEXT) and targets: the value after each key in the last quarter, -1 elsewhere."""
    texts = torch.randint(2 * KEYS, 3 * KEYS, (rows, TEXT), generator=generator)
    targets = torch.full_like(texts, -1)

    def some(n, among):
        return torch.rand(rows, among, generator=generator).argsort(1)[:, :n]

    keys, values = some(PAIRS, KEYS), some(PAIRS, KEYS) + KEYS
    told, asked = (start + 2 * some(PAIRS, TEXT // 8) for start in (0, 3 * TEXT // 4))
    for at in (told, asked):
        texts.scatter_(1, at, keys).scatter_(1, at + 1, values)
    targets.scatter_(1, asked, values)
    return texts, targets


def recalled(flags, seed, steps, device):
    """Share of the pairs of 256 new texts whose value is the likeliest word, after training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**RECALL | flags)).to(device)
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.99), device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50, 2 - 2 * step / steps)  # warm-up, flat, down to 0
        texts, targets = (x.to(device) for x in recall_texts(16, generator))
        model(texts, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    texts, targets = (x.to(device) for x in recall_texts(256, generator))
    with torch.no_grad():
        right = model(texts, targets)[0].argmax(-1) == targets
    return right[targets >= 0].float().mean().item()


def bench_recall(cfg, device, chosen):
    shares = {name: [] for name in chosen}
    for seed in range(cfg.seeds):
        for name in chosen:
            shares[name].append(recalled(RECALLERS[name], seed, min(cfg.max_iters, RECALL_STEPS), device))
            print(f"seed {seed}: {name} recalls {shares[name][-1]:.1%}", flush=True)
    for name, values in shares.items():
        print(f"{name:34s} {statistics.fmean(values):6.1%} ({min(values):.1%} to {max(values):.1%})")
    print(f"chance, of one value: {1 / KEYS:.1%}")
    return shares


# ---------------------------------------------------------------------------------------------------------------------
# Attention over T: 6 heads of 64, or as many channels. Each is a function of T that returns (how to mix, its
# inputs, *parameters).

ATTENTION_LENGTHS = [str(2**n) for n in range(8, 17)]
HEADS_OF = (6, 64)
WIDTH = math.prod(HEADS_OF)
CELLS = {"anchor_min_gap": 240, "anchor_jitter": 31}  # about 256 tokens


def heads_of(T, device):
    """q, k, v (1, 6, T, 64)."""
    return list(torch.randn(3, 1, HEADS_OF[0], T, HEADS_OF[1], device=device).unbind())


def sparse_route(T, device):
    generator = torch.Generator().manual_seed(0)
    _, cell = build_pd_anchors_1d(T, *CELLS.values(), generator)
    distance = torch.arange(int(cell[-1]) + 1)
    distance = distance[:, None] - distance[None, :]
    return Route.from_cells(cell, (distance >= 0) & (distance <= 1))


def dense_attention(T, device):
    return partial(F.scaled_dot_product_attention, is_causal=True), heads_of(T, device)


def sparse_attention(T, device):
    """Cells of about 256 tokens, a ring of 1."""
    return partial(block_sparse_attention, route=sparse_route(T, device)), heads_of(T, device)


def flex_attention(T, device):
    """PyTorch's FlexAttention, compiled, with the mask of `sparse_attention`; on a CPU it has no backward."""
    from torch.nn.attention import flex_attention as flex

    cell = sparse_route(T, device).cell(device)

    def mask(b, h, i, j):
        return (j <= i) & (cell[i] - cell[j] <= 1)

    block_mask = flex.create_block_mask(mask, None, None, T, T, device=device)
    return partial(torch.compile(flex.flex_attention), block_mask=block_mask), heads_of(T, device)


def knot_attention(T, device, **flags):
    """From the layer's input x to its values mixed: strands, links, integrals, and attention over what they tie."""
    config = GPTConfig(n_layer=1, n_head=HEADS_OF[0], n_embd=WIDTH, block_size=T, use_knot_attention=True, **flags)
    gate = KnotGate(config, Cells(config, 0)).to(device)

    def attend(q, k, v, x):
        _, allowed, bias = gate(x)
        return block_sparse_attention(q, k, v, Route(gate.cells.starts, allowed), bias=bias)

    return attend, [*heads_of(T, device), torch.randn(1, T, WIDTH, device=device)], *gate.parameters()


def waves(T, device):
    """`fhn_propagate` alone: stimulus, conductance, parameters."""
    ones = torch.ones(WIDTH, device=device)
    parameters = [torch.logspace(0, 3, WIDTH, device=device), *(FHN[name] * ones for name in ("a", "b", "eps"))]
    inputs = [torch.randn(1, T, WIDTH, device=device), torch.rand(1, T, WIDTH, device=device), *parameters]
    return lambda *x: fhn_propagate(*x, dt=0.5, steps=2)[0], inputs


def wave_mixer(T, device):
    """All that an FHN layer does between its two matrices."""
    medium = FHNMedium(GPTConfig(n_layer=1, n_head=1, n_embd=WIDTH, attn_mode="fhn")).to(device)
    inputs = list(torch.randn(3, 1, T, WIDTH, device=device).unbind())
    return lambda q, k, v: medium(v, q, k) * F.silu(q), inputs, *medium.parameters()


DENSE, SPARSE = "dense SDPA, forward + backward", "block-sparse, forward + backward"
KNOTS, WAVES = "knots, forward + backward", "FHN mixer, forward + backward"
# name: (what, with the backward pass, longest T)
ATTENTIONS = {
    DENSE: (dense_attention, True, 2**14),
    SPARSE: (sparse_attention, True, 2**14),
    KNOTS: (partial(knot_attention, use_block_sparse=True, **CELLS), True, 2**14),
    "knots, cells of 32, forward + backward": (knot_attention, True, 2**14),
    WAVES: (wave_mixer, True, 2**16),
    "fhn_propagate, forward + backward": (waves, True, 2**16),
    "dense SDPA, forward": (dense_attention, False, 2**14),
    "FlexAttention compiled, forward": (flex_attention, False, 2**14),
    "block-sparse, forward": (sparse_attention, False, 2**14),
}


def attention_run(make, with_backward, T, device, dtype=torch.float32):
    """One pass, forward alone or with the backward; sequences in `dtype`, parameters in float32 under autocast."""
    torch.manual_seed(0)
    mix, inputs, *parameters = make(T, device)
    inputs = [x.to(dtype) if x.dim() > 2 else x for x in inputs]
    if dtype != torch.float32:
        mix = torch.autocast(torch.device(device).type, dtype)(mix)
    return with_gradients(mix, inputs, parameters) if with_backward else quietly(mix, *inputs)


def exponent(seconds):
    """The slope of log time over log T from T = 1024 on, of {T: seconds}; None without two of them."""
    long = {T: s for T, s in seconds.items() if T >= 1024}
    return float(np.polyfit(np.log(list(long)), np.log(list(long.values())), 1)[0]) if len(long) > 1 else None


def bench_attention(cfg, device, sizes):
    """Seconds of each attention at each length, its exponent, and how much faster than dense attention it is."""
    lengths = [int(s) for s in sizes]
    dtype = torch.float32 if cfg.dtype == "auto" else pick_dtype(cfg.dtype, device)[0]
    seconds, faster = {name: {} for name in ATTENTIONS}, {}
    for T in lengths:
        here = {name: how for name, (*how, longest) in ATTENTIONS.items() if longest >= T}
        times = interleave(
            {name: attention_run(*how, T, device, dtype) for name, how in here.items()}, cfg.repeats, device
        )
        for row in speeds(times):
            seconds[row["name"]][T] = row["seconds"]
            if DENSE in here and ATTENTIONS[row["name"]][1]:
                faster.setdefault(row["name"], {})[T] = {k: row[k] for k in ("speed", "low", "high")}
        torch._dynamo.reset()
    fits = {name: exponent(times) for name, times in seconds.items()}
    print(f"\n{'seconds at T =':<40}" + "".join(f"{T:>10}" for T in lengths) + f"{'exponent':>10}")
    for name, times in seconds.items():
        cells = "".join(f"{times[T]:>10.4f}" if T in times else f"{'':>10}" for T in lengths)
        print(f"{name:<40}{cells}" + (f"{fits[name]:>10.2f}" if fits[name] else ""))
    print("\nfaster than dense SDPA, forward + backward, median and quartiles")
    for name, ratios in faster.items():
        print(
            f"{name:<40}" + "  ".join(f"{r['speed']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in ratios.values())
        )
    memory = {}
    for name in (DENSE, SPARSE, KNOTS, WAVES) if cfg.memory else ():
        *how, longest = ATTENTIONS[name]
        memory[name] = {
            T: in_fresh_process(peak_memory, partial(attention_run, *how, T, device, dtype), device)
            for T in lengths
            if 4096 <= T <= longest
        }
        print(f"{name}, peak MB: {memory[name]}")
    if cfg.plot:
        plot_attention(seconds, fits)
        plot_routing()
    return {"seconds": seconds, "exponents": fits, "faster": faster, "memory_mb": memory}


def plot_attention(seconds, fits):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, times in seconds.items():
        dash = "-" if "backward" in name else "--"
        label = f"{name}: T^{fits[name]:.2f}" if fits[name] else name
        axes.loglog(list(times), list(times.values()), dash, marker="o", base=2, label=label)
    axes.set(xlabel="T, tokens", ylabel="seconds", title="Mixing 1 x T x 384 (6 heads of 64), cells of about 256")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save(figure, "attention")


def plot_routing():
    """The routing graph of config/ablation/region_edges.py at block 512, by what put each edge there."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    flags = {"n_layer": 1, "n_head": 1, "n_embd": 16, "use_block_sparse": True, "region_size": 2, "region_edges": 2}
    cells = GPT(GPTConfig(block_size=512, anchor_min_gap=24, anchor_jitter=16, **flags)).transformer.h[0].attn.cells
    mask, cell = cells.route.mask(), cells.cell
    back = cell[:, None] - cell[None, :]
    kind = torch.where(mask, torch.where(back == 0, 1, torch.where(back == 1, 2, 3)), 0)
    figure, axes = plt.subplots(figsize=(6.4, 6.4), layout="constrained")
    axes.imshow(kind.numpy(), cmap=ListedColormap(["white", "#1f4e79", "#6fa8dc", "#f6b26b"]), interpolation="nearest")
    for c, start in enumerate(cells.route.starts[1:-1], 1):
        region = c % flags["region_size"] == 0
        for line in (axes.axhline, axes.axvline):
            line(start - 0.5, color="black" if region else "grey", lw=0.8 if region else 0.25)
    for color, label in (("#1f4e79", "own cell"), ("#6fa8dc", "ring: the cell before"), ("#f6b26b", "region edges")):
        axes.plot([], [], "s", color=color, label=label)
    axes.legend(loc="upper right")
    share = mask.float().sum() / (512 * 513 / 2)
    axes.set(xlabel="key position", ylabel="query position")
    axes.set_title(f"{len(cells.route.starts) - 1} cells, regions of 2 (black): {share:.0%} of the causal pairs")
    save(figure, "routing")


def save(figure, name):
    folder = ROOT / "docs" / "img"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=120)


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
            contenders = {"a copy of the floor's bytes": partial(quietly, target.copy_, source)}
            contenders[f"{family} {name}"] = partial(quietly, run)
            rows = compare(f"{family} {name} on {device}", contenders, cfg, device, "GB", floor / 1e9, memory=False)
            results[name]["rows"] = rows
    return results


def bench_kernels(family, cfg, device):
    if not find_spec("triton"):
        raise ConfigError("kernels: needs the package triton, which exists on Linux alone")
    module = importlib.import_module(f"kernels.{family}_triton")
    results = {"compiled": compiled_kernels(module)}
    if family != "block_sparse":
        results["bytes"] = bench_stream(family, module, cfg, device)
    return results


KERNELS = {family: partial(bench_kernels, family) for family in ("scan", "fhn", "block_sparse")}


def each(parts):
    """A benchmark whose parts run by themselves."""
    return lambda cfg, device, chosen: {name: parts[name](cfg, device) for name in chosen}


RECIPE = {"cpu": bench_recipe}
BENCHES = {"attention": (bench_attention, ATTENTION_LENGTHS), "recall": (bench_recall, RECALLERS)} | {
    what: (each(parts), parts)
    for what, parts in {
        "step": STEP, "decode": DECODE, "recipe": RECIPE, "mlp": CHANNEL, "heads": HEADS, "residual": RESIDUAL,
        "local": LOCAL, "embeddings": EMBEDDINGS, "kernels": KERNELS,
    }.items()
}  # fmt: skip


def main():
    with configurator.one_line_errors("bench.py", DataError):
        what, *words = sys.argv[1:] or ["--help"]
        settings = configurator.read([what, *words] if what.startswith("-") else words, BenchConfig, doc=__doc__)
        cfg = settings.build(BenchConfig)
        if what not in BENCHES:
            raise ConfigError(f"{what}: expected {' or '.join(BENCHES)} first")
        bench, sizes = BENCHES[what]
        chosen = [s.strip() for s in cfg.only.split(",") if s.strip()] or list(sizes)
        if unknown := [s for s in chosen if s not in sizes]:
            raise ConfigError(f"--only={cfg.only}: no {unknown[0]!r}; there are {', '.join(sizes)}")
        device, _ = pick_device(cfg.device)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}")
        results = bench(cfg, device, chosen)
    print(json.dumps({"bench": what, "torch": torch.__version__, "device": device, "results": results}))


if __name__ == "__main__":
    main()
