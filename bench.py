"""
Speed and memory, always beside a reference in the same run.

    python bench.py step      # training steps: nanoGPT's recipe as plain eager float32 PyTorch, and ours
    python bench.py decode    # greedy text: recomputing every token, as nanoGPT does, and ours with its state
    python bench.py recipe    # the CPU recipe trained to its end by both: loss on the whole val split, several seeds
    python bench.py attention --plot  # dense and block-sparse attention over T, with fitted exponents
    python bench.py step --only=cpu --repeats=21

Contenders take turns, so that a busy machine slows all of them. A speed is the median over rounds of the ratio to the
reference of the same round, with the quartiles behind it. Memory is the peak of a fresh process. The last line is JSON.
"""

import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import configurator
from configurator import ROOT, ConfigError
from data.corpus import DataError
from kernels.block_sparse import Route, block_sparse_attention
from model import GPT, GPTConfig, build_pd_anchors_1d
from train import Corpus, TrainConfig, Trainer, World, dtype_name, memory_mb, pick_device, pick_dtype


@dataclass
class BenchConfig:
    """How long to measure, and where."""

    # -- benchmark ----------------------------------------------------------------------------------------------------
    only: str = ""  # comma-separated sizes; empty = all
    repeats: int = 11  # rounds; each contender runs once in each
    tokens: int = 512  # of decode: how many to write
    seeds: int = 3  # of recipe: runs of each contender
    max_iters: int = 2000  # of recipe: steps of a run
    dtype: str = "auto"  # of recipe: the number format of our runs
    device: str = "cpu"  # "auto" | "cpu" | "cuda" | "mps"
    memory: bool = True  # also measure peak memory, in a process for each contender
    plot: bool = False  # write a PNG to docs/img

    def __post_init__(self):
        for name in ("repeats", "tokens", "seeds", "max_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


# size: (model flags, sequences a step, steps a round)
STEP_SIZES = {
    "cpu": ({"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}, 12, 10),
    "6x384": ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 16, 1),
}
DECODE_SIZES = {"6x384": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 1024}}
COMMON = {"vocab_size": 65, "bias": False}  # as nanoGPT trains on shakespeare_char


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


def our_step(flags, batch, device, folder, dtype, compiles=False):
    """A step of train.py itself, loss fetched."""
    cfg = TrainConfig(
        dataset="", data_dir=str(folder), batch_size=batch, gradient_accumulation_steps=1, learning_rate=1e-3,
        warmup_iters=100, beta2=0.99, compile=compiles,
    )  # fmt: skip
    trainer = Trainer(cfg, GPT(GPTConfig(**flags)), Corpus(cfg), World(device, "auto"), dtype)
    return lambda: trainer.step()[0].item()


REFERENCE = "nanoGPT's recipe, eager float32"
STEP_CONTENDERS = {
    REFERENCE: lambda *a: plain_step(*a)[0],
    "ours, float32": lambda *a: our_step(*a, torch.float32),
    "ours, bfloat16": lambda *a: our_step(*a, torch.bfloat16),
    "ours, bfloat16, compiled": lambda *a: our_step(*a, torch.bfloat16, compiles=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.


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


def speeds(seconds):
    """Rows {name, speed, low, high}: each contender's speed as a multiple of the first one's, median and quartiles."""
    reference = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        ratios = [r / t for r, t in zip(reference, times)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append({"name": name, "speed": statistics.median(ratios), "low": low, "high": high,
                     "seconds": statistics.median(times)})  # fmt: skip
    return rows


def several(step, steps):
    for _ in range(steps):
        step()


def step_memory(name, flags, batch, device, folder, queue):
    """Put the peak memory in MB of two training steps, in a process that does nothing else, into `queue`."""
    before = memory_mb(device)
    step = STEP_CONTENDERS[name](flags, batch, device, folder)
    step(), step()
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


def table(title, rows, unit, work):
    """Print rows for people: `work` units are done in a row's seconds."""
    print(f"\n{title}\n{'':<34}{'speed':>8}{'quartiles':>16}{unit + '/s':>14}{'peak MB':>10}")
    for row in rows:
        row[f"{unit}_per_s"] = work / row["seconds"]
        spread = f"{row['low']:.2f} to {row['high']:.2f}"
        memory = f"{row['memory_mb']:,.0f}" if "memory_mb" in row else ""
        print(f"{row['name']:<34}{row['speed']:>7.2f}x{spread:>16}{work / row['seconds']:>14,.0f}{memory:>10}")


# ---------------------------------------------------------------------------------------------------------------------
# What can be measured.


def bench_step(cfg, device, sizes):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16).tofile(Path(folder) / f"{split}.bin")
        for size in sizes:
            flags, batch, steps = STEP_SIZES[size]
            flags = flags | COMMON
            made = {name: make(flags, batch, device, folder) for name, make in STEP_CONTENDERS.items()}
            built = {name: partial(several, step, steps) for name, step in made.items()}
            rows = speeds(interleave(built, cfg.repeats, device))
            for row in rows if cfg.memory else ():
                row["memory_mb"] = in_fresh_process(step_memory, row["name"], flags, batch, device, folder)
            table(f"training step, {size}, batch {batch}", rows, "tokens", batch * flags["block_size"] * steps)
            results[size] = rows
    return results


def bench_decode(cfg, device, sizes):
    results = {}
    for size in sizes:
        flags = DECODE_SIZES[size] | COMMON
        idx = torch.zeros(1, 1, dtype=torch.long, device=device)
        plain = PlainGPT(**flags).to(device).eval()
        built = {"nanoGPT's way, float32": partial(plain.write, idx, cfg.tokens)}
        for dtype in (torch.float32, torch.bfloat16):
            model = GPT(GPTConfig(**flags)).to(device, dtype).eval()
            built[f"ours, {dtype_name(dtype)}"] = partial(model.generate, idx, cfg.tokens, temperature=0)
        rows = speeds(interleave(built, cfg.repeats, device))
        title = f"greedy decoding of {cfg.tokens} tokens, {size}, block {flags['block_size']}"
        table(title, rows, "tokens", cfg.tokens)
        results[size] = rows
    return results


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


def bench_recipe(cfg, device, sizes):
    """Losses on the whole val split at the end of the CPU recipe, ours by train.py's own code and config."""
    rows = {REFERENCE: [], "ours": []}
    for seed in range(cfg.seeds):
        words = ["config/train_shakespeare_char_cpu.py", f"--seed={seed}", f"--max_iters={cfg.max_iters}"]
        settings = configurator.read(words, TrainConfig, GPTConfig)
        train_cfg = settings.build(TrainConfig)
        corpus = Corpus(train_cfg)
        torch.manual_seed(seed)
        flags = {k: settings.values[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
        flags["vocab_size"] = corpus.meta["vocab_size"]
        step, plain = plain_step(flags, train_cfg.batch_size, device, corpus.folder, cfg.max_iters)
        several(step, cfg.max_iters)
        rows[REFERENCE].append(plain_val_loss(plain, corpus.splits["val"]))
        torch.manual_seed(seed)
        dtype = pick_dtype(cfg.dtype, device)[0]
        trainer = Trainer(train_cfg, GPT(GPTConfig(**flags)), corpus, World(device, "auto"), dtype)
        several(trainer.step, cfg.max_iters)
        rows["ours"].append(trainer.evaluate()["val_loss"])
        print(f"seed {seed}: " + ", ".join(f"{name} {losses[-1]:.4f}" for name, losses in rows.items()), flush=True)
    means = {name: statistics.fmean(losses) for name, losses in rows.items()}
    print("mean: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return {"losses": rows, "means": means, "dtype": dtype_name(dtype), "max_iters": cfg.max_iters}


# ---------------------------------------------------------------------------------------------------------------------
# Attention over T.

ATTENTION_LENGTHS = {str(2**n): 2**n for n in range(8, 15)}
HEADS, HEAD_DIM, CELL_GAP, CELL_JITTER = 6, 64, 240, 31  # cells of about 256 tokens, a ring of 1


def sparse_route(T):
    generator = torch.Generator().manual_seed(0)
    _, cell = build_pd_anchors_1d(T, CELL_GAP, CELL_JITTER, generator)
    distance = torch.arange(int(cell[-1]) + 1)
    distance = distance[:, None] - distance[None, :]
    return Route.from_cells(cell, (distance >= 0) & (distance <= 1))


def dense_attention(T):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sparse_attention(T):
    route = sparse_route(T)
    return lambda q, k, v: block_sparse_attention(q, k, v, route)


def flex_attention(T):
    """PyTorch's FlexAttention, compiled, with the mask of `sparse_attention`; on a CPU it has no backward."""
    from torch.nn.attention import flex_attention as flex

    cell = sparse_route(T).cell()

    def mask(b, h, i, j):
        return (j <= i) & (cell[i] - cell[j] <= 1)

    block_mask = flex.create_block_mask(mask, None, None, T, T, device="cpu")
    compiled = torch.compile(flex.flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


# name: (attention of a length, with the backward pass)
ATTENTIONS = {
    "dense SDPA, forward + backward": (dense_attention, True),
    "block-sparse, forward + backward": (sparse_attention, True),
    "dense SDPA, forward": (dense_attention, False),
    "FlexAttention compiled, forward": (flex_attention, False),
    "block-sparse, forward": (sparse_attention, False),
}


def attention_run(make, with_backward, T, device):
    """One pass over q, k, v (1, 6, T, 64) float32, forward alone or with the backward."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, HEADS, T, HEAD_DIM, device=device)
    attend = make(T)

    def forward():
        with torch.no_grad():
            attend(q, k, v)

    def both():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*leaves).backward(grad)

    return both if with_backward else forward


def attention_memory(name, T, device, queue):
    before = memory_mb(device)
    attention_run(*ATTENTIONS[name], T, device)()
    queue.put(round(memory_mb(device) - before, 1))


def exponent(lengths, seconds):
    """The slope of log time over log T."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def bench_attention(cfg, device, sizes):
    """Seconds of each attention at each length; exponents fitted from T = 1024 on."""
    lengths = [ATTENTION_LENGTHS[s] for s in sizes]
    seconds = {name: [] for name in ATTENTIONS}
    for T in lengths:
        runs = {name: attention_run(*how, T, device) for name, how in ATTENTIONS.items()}
        for name, times in interleave(runs, cfg.repeats, device).items():
            seconds[name].append(statistics.median(times))
        torch._dynamo.reset()
    long = [i for i, T in enumerate(lengths) if T >= 1024]
    fits = {n: exponent([lengths[i] for i in long], [s[i] for i in long]) for n, s in seconds.items() if len(long) > 1}
    print(f"\n{'seconds at T =':<34}" + "".join(f"{T:>10}" for T in lengths) + f"{'exponent':>10}")
    for name, times in seconds.items():
        print(f"{name:<34}" + "".join(f"{t:>10.4f}" for t in times) + f"{fits.get(name, math.nan):>10.2f}")
    ratios = {T: seconds[DENSE][i] / seconds[SPARSE][i] for i, T in enumerate(lengths)}
    print(f"{'block-sparse is faster by':<34}" + "".join(f"{r:>9.2f}x" for r in ratios.values()))
    memory = {}
    for name in (DENSE, SPARSE) if cfg.memory else ():
        memory[name] = {T: in_fresh_process(attention_memory, name, T, device) for T in lengths if T >= 4096}
        print(f"{name}, peak MB: {memory[name]}")
    if cfg.plot:
        plot_attention(lengths, seconds, fits)
        plot_routing()
    return {"lengths": lengths, "seconds": seconds, "exponents": fits, "ratios": ratios, "memory_mb": memory}


DENSE, SPARSE, *_ = ATTENTIONS


def plot_attention(lengths, seconds, fits):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, times in seconds.items():
        dash = "-" if "backward" in name else "--"
        axes.loglog(lengths, times, dash, marker="o", base=2, label=f"{name}: T^{fits.get(name, math.nan):.2f}")
    axes.set(xlabel="T, tokens", ylabel="seconds", title=f"Attention, 1 x {HEADS} heads x {HEAD_DIM}, cells of ~256")
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
    axes.imshow(kind, cmap=ListedColormap(["white", "#1f4e79", "#6fa8dc", "#f6b26b"]), interpolation="nearest")
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


BENCHES = {
    "step": (bench_step, STEP_SIZES),
    "decode": (bench_decode, DECODE_SIZES),
    "attention": (bench_attention, ATTENTION_LENGTHS),
    "recipe": (bench_recipe, {"cpu": None}),
}


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
