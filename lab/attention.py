"""
Attention over T: 6 heads of 64, or as many channels. `python -m lab.bench attention` measures it.

A contender is a function of T that returns (how to mix, its inputs, *parameters).
"""

import math
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from configurator import ROOT
from kernels.block_sparse import Route, block_sparse_attention
from kernels.fhn import fhn_propagate
from lab import pictures
from lab.measure import flags_of, in_fresh_process, interleave, peak_memory, speeds, with_gradients, without_grad
from model import FHN, Cells, FHNMedium, GPTConfig, KnotGate, build_pd_anchors_1d

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
    return with_gradients(mix, inputs, parameters) if with_backward else without_grad(mix, *inputs)


def exponent(seconds):
    """The slope of log time over log T from T = 1024 on, of {T: seconds}; None without two of them."""
    long = {T: s for T, s in seconds.items() if T >= 1024}
    return float(np.polyfit(np.log(list(long)), np.log(list(long.values())), 1)[0]) if len(long) > 1 else None


def time_attentions(lengths, cfg, device):
    """({name: {T: seconds}}, {name: {T: how much faster than dense attention, forward and backward}})."""
    dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    seconds, faster = {name: {} for name in ATTENTIONS}, {}
    for T in lengths:
        here = {name: how for name, (*how, longest) in ATTENTIONS.items() if longest >= T}
        runs = {name: attention_run(*how, T, device, dtype) for name, how in here.items()}
        for row in speeds(interleave(runs, cfg.repeats, device)):
            seconds[row["name"]][T] = row["seconds"]
            if DENSE in here and ATTENTIONS[row["name"]][1]:
                faster.setdefault(row["name"], {})[T] = {k: row[k] for k in ("speed", "low", "high")}
        torch._dynamo.reset()
    return seconds, faster


def attention_memory(lengths, cfg, device):
    """{name: {T: peak MB}}, printed."""
    dtype = torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    memory = {}
    for name in (DENSE, SPARSE, KNOTS, WAVES):
        *how, longest = ATTENTIONS[name]
        runs = {T: partial(attention_run, *how, T, device, dtype) for T in lengths if 4096 <= T <= longest}
        memory[name] = {T: in_fresh_process(peak_memory, run, device) for T, run in runs.items()}
        print(f"{name}, peak MB: {memory[name]}")
    return memory


def bench_attention(sizes, rows, cfg, device):
    """Seconds of each attention at each length, its exponent, and how much faster than dense attention it is."""
    lengths = [int(s) for s in sizes]
    seconds, faster = time_attentions(lengths, cfg, device)
    fits = {name: exponent(times) for name, times in seconds.items()}
    print(f"\n{'seconds at T =':<40}" + "".join(f"{T:>10}" for T in lengths) + f"{'exponent':>10}")
    for name, times in seconds.items():
        cells = "".join(f"{times[T]:>10.4f}" if T in times else f"{'':>10}" for T in lengths)
        print(f"{name:<40}{cells}" + (f"{fits[name]:>10.2f}" if fits[name] else ""))
    print("\nfaster than dense SDPA, forward + backward, median and quartiles")
    for name, ratios in faster.items():
        quartiles = (f"{r['speed']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in ratios.values())
        print(f"{name:<40}" + "  ".join(quartiles))
    memory = attention_memory(lengths, cfg, device) if cfg.memory else {}
    if cfg.plot:
        folder = ROOT / "docs" / "img"
        folder.mkdir(exist_ok=True)
        (folder / "attention.png").write_bytes(pictures.png(pictures.attention_over_length(seconds, fits)))
        (folder / "routing.png").write_bytes(pictures.png(pictures.routing_by_kind(flags_of("region_edges"))))
    return {"seconds": seconds, "exponents": fits, "faster": faster, "memory_mb": memory}
