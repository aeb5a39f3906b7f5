"""
What a channel mixer does per token, counted, and what that would cost: no watt meter.

Operations and bytes follow from the shapes and from the measured share of silent units. Joules are these counts times a
table: Horowitz 2014 ("Computing's energy problem", ISSCC, doi 10.1109/ISSCC.2014.6757323), a 45 nm process at 0.9 V.
The table has no sine, tanh or exponential: such functions are counted and left out of the joules. "Skipped" is what a
machine that reads only active rows need not do. Our decoder is one on a CPU, for gated events, from half of the units
on; a matrix product on a GPU skips nothing. In float32, batch 1, as in decoding: a weight is read once per token.
"""

from dataclasses import dataclass

import torch
from torch import nn

from configurator import ConfigError
from lab.measure import flags_of
from model import GPT, MLP, BioMLP, Diagonal, GPTConfig, SpikingEventLayer

PICOJOULES = {  # float32 operations; bytes from a 1 MB SRAM, 100 pJ per 8 bytes, and from DRAM, 1.3 nJ per 8 bytes
    "multiply": 3.7, "add": 0.9, "sram_byte": 12.5, "dram_byte": 162.5,
}  # fmt: skip
SIZE = {"n_layer": 1, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False}
ENERGY_ROWS = ["baseline", "bio", "bio_events", "bio_events --bio_gate=diag", "bio_spiking"]
BYTES = 4


@dataclass
class Count:
    """Of one token: multiply-accumulates done and skipped, additions alone, bytes moved, functions without a price."""

    macs: float = 0
    skipped: float = 0
    adds: float = 0
    bytes: float = 0
    functions: float = 0

    def picojoules(self, memory):
        """With weights and signals from "sram" or "dram"."""
        arithmetic = self.macs * (PICOJOULES["multiply"] + PICOJOULES["add"]) + self.adds * PICOJOULES["add"]
        return arithmetic + self.bytes * PICOJOULES[f"{memory}_byte"]


def dense_macs(mixer):
    """Multiply-accumulates of a token if nothing is skipped: linear layers, and what modules add themselves."""
    linear = sum(m.weight.numel() for m in mixer.modules() if isinstance(m, nn.Linear | Diagonal))
    return linear + sum(m.flops_per_token(1) for m in mixer.modules() if hasattr(m, "flops_per_token")) / 2


def count(mixer, silent=0.0):
    """The Count of a plain MLP or a BioMLP with this share of silent units; ConfigError for other mixers."""
    if not isinstance(mixer, MLP | BioMLP):
        raise ConfigError(f"energy counts the plain MLP and BioMLP, not {type(mixer).__name__}")
    h, C = mixer.c_proj.in_features, mixer.c_proj.out_features
    events = getattr(mixer, "events", None)
    found, all_macs, maps = Count(functions=h), dense_macs(mixer), 0  # a function per unit after the first map
    if isinstance(events, SpikingEventLayer):  # spikes are 1: the last map adds the columns of those that fired
        found.adds, found.skipped = (1 - silent) * h * C, silent * h * C
        found.macs = all_macs - h * C
        unread, maps = silent * h * C, 1
    elif events is not None:  # the transform reads the rows of active units
        found.skipped = silent * events.weight.numel()
        found.macs, found.functions = all_macs - found.skipped, 3 * h  # and the gate's sigmoid, the second oscillator
        unread, maps = found.skipped, 2
    else:
        found.macs, unread = all_macs, 0
    weights = sum(p.numel() for p in mixer.parameters()) - unread
    signals = 2 * C + 2 * h * (1 + maps)  # into and out of the first, the last, and maps of h to h between them
    found.bytes = BYTES * (weights + signals)
    return found


@torch.no_grad()
def silent_share(model, device):
    """The share of silent units on random tokens; 0 for a model without events."""
    model(torch.randint(model.config.vocab_size, (16, model.config.block_size), device=device))
    share = model.get_avg_sparsity()
    return 0.0 if share is None else share.item()


def bench_energy(chosen, rows, cfg, device):
    """A table per part: "start" takes the silent share of a fresh model on random tokens, "N%" assumes it."""
    results = {}
    for part in chosen:
        title = "a fresh model's silent share" if part == "start" else f"{part} of event units silent"
        print(f"\nper token of one channel mixer, width {SIZE['n_embd']}, float32, 45 nm (Horowitz 2014): {title}")
        print(f"{'':<34}{'silent':>8}{'MACs':>10}{'skipped':>10}{'adds':>8}{'bytes':>11}{'functions':>10}"
              f"{'nJ, SRAM':>10}{'nJ, DRAM':>10}")  # fmt: skip
        for row in rows:
            torch.manual_seed(0)
            model = GPT(GPTConfig(**SIZE | flags_of(row))).to(device).eval()
            mixer = model.transformer.h[0].mlp
            has_events = getattr(mixer, "events", None) is not None
            silent = silent_share(model, device) if part == "start" else has_events * float(part.rstrip("%")) / 100
            c = count(mixer, silent)
            joules = {memory: c.picojoules(memory) / 1e3 for memory in ("sram", "dram")}
            print(f"{row:<34}{silent:>8.1%}{c.macs:>10,.0f}{c.skipped:>10,.0f}{c.adds:>8,.0f}{c.bytes:>11,.0f}"
                  f"{c.functions:>10,.0f}{joules['sram']:>10,.0f}{joules['dram']:>10,.0f}")  # fmt: skip
            results[f"{row}, {part}"] = {"silent": silent, **vars(c), **{f"nj_{m}": j for m, j in joules.items()}}
    return results
