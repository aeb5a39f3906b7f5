"""
Train a GPT: on a CPU, on one GPU, or on many with torchrun.

    python train.py config/train_shakespeare_char.py
    python train.py config/train_shakespeare_char.py --n_layer=4 --device=cpu --compile=False
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --out_dir=out --init_from=resume  # goes on with the run's own configuration, to the last bit

Config files are Python assignments, run in order; flags win over them.
"""

import signal

import configurator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback
    configurator.help_before_imports(
        "train.py",
        {"train.py": ["PRECISIONS", "TrainConfig"], "model.py": ["NEEDS", "GPTConfig"]},
        ["precision", "devices"],
    )

import errno
import json
import math
import os
import platform
import random
import re
import shlex
import stat
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from configurator import ROOT, ConfigError, check_values
from data.corpus import (
    GPT2,
    GPT2_NAMES,
    DataError,
    first_ids,
    has_tokenizer,
    load_meta,
    load_tokenizer,
    same_tokenizer,
    visible,
)
from data.dataset import TRAIN, TRAIN_LOSS, VAL_LOSS, folder_of, open_dataset
from data.files import replace_file
from data.progress import tqdm
from data.runs import STABLE, find_checkpoint, hold, keep_previous, open_metrics, prepare_out_dir
from kernels.muon import Muon as Muon, local
from kernels.recompute import has_counts, recompute_blocks
from model import GPT, CheckpointError, GPTConfig, load_checkpoint, save_checkpoint

RANGES = {
    "seed": "[0, 2^63)",
    "max_iters warmup_iters curriculum_iters sample_interval": "[0, inf)",
    "lr_decay_iters": "[1, inf)",
    "batch_size gradient_accumulation_steps eval_interval eval_iters log_interval": "[1, inf)",
    "learning_rate muon_lr emb_lr head_lr scalar_lr peak_tflops": "(0, inf)",
    "weight_decay min_lr": "[0, inf)",
    "beta1 beta2": "[0, 1)",
    "grad_clip": "[0, inf]",
    "wsd_decay_share": "(0, 1]",
    "wsds_horizons": "[1, 16]",
}

MUON_RATES = {"matrices": "muon_lr", "embedding": "emb_lr", "head": "head_lr", "vectors": "scalar_lr"}


@dataclass
class TrainConfig:
    """Everything about a run but the model; ValueError for values that make no sense."""

    # -- run ----------------------------------------------------------------------------------------------------------
    out_dir: str = "out"  # checkpoints, metrics.jsonl and run.json go here
    init_from: str = "scratch"  # "scratch" | "resume" | "auto" (resume if it can) | "gpt2*" | a run's or HF's folder
    seed: int = 1337  # for weights, data order and dropout
    max_iters: int = 600_000  # optimiser steps in all
    # -- data ---------------------------------------------------------------------------------------------------------
    dataset: str = "openwebtext"  # a folder with train.bin and val.bin; "a:0.7,b:0.3", a mixture; or a text file's path
    data_dir: str = ""  # where data sets lie; empty = data/ beside train.py
    batch_size: int = 12  # sequences per micro-step and process
    gradient_accumulation_steps: int = 40  # micro-steps per optimiser step, divided among all processes
    # -- optimiser ----------------------------------------------------------------------------------------------------
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal updates for the matrices in blocks, else AdamW
    learning_rate: float = 6e-4  # peak learning rate of AdamW; with muon only what min_lr is compared with
    muon_lr: float = 0.02  # peak learning rate of muon's matrices
    emb_lr: float = 0.03  # with muon, AdamW's for embeddings
    head_lr: float = 0.003  # for the head
    scalar_lr: float = 0.003  # for norms, biases, gains and all that is no matrix in a block
    weight_decay: float = 0.1  # on matrices; norms, biases and gains do not decay, nor do embedding and head with muon
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    # -- learning-rate schedule ---------------------------------------------------------------------------------------
    decay_lr: bool = True  # False = constant learning rate, without warm-up
    lr_schedule: Literal["cosine", "constant", "wsd", "wsds"] = "cosine"  # wsd: flat, then linear decay; wsds: several
    warmup_iters: int = 2000  # linear warm-up steps
    lr_decay_iters: int | None = None  # where the decay ends; None = max_iters
    min_lr: float | None = None  # where it ends; None = learning_rate / 10
    wsd_decay_share: float = 0.2  # share of lr_decay_iters in which "wsd" decays
    wsds_horizons: int = 3  # "wsds" also decays after a half, a quarter, ... of the run, and then goes on from before
    # -- curriculum ---------------------------------------------------------------------------------------------------
    curriculum: Literal["", "length", "e7"] = ""  # none | sequences grow in seven stages | and the model's own stages
    curriculum_iters: int = 0  # optimiser steps of the seven stages; the last one stays
    # -- evaluation and logging ---------------------------------------------------------------------------------------
    eval_interval: int = 2000  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 200  # random batches per split and evaluation
    eval_full: bool = False  # validate on the whole val split, once, in windows that do not overlap
    eval_only: bool = False  # evaluate once and stop
    cost: bool = False  # show parameters, FLOPs, memory and time beside the same shape with every idea off, and stop
    always_save_checkpoint: bool = True  # write ckpt_last.pt after every evaluation, not only after better ones
    log_alignment: bool = False  # with a method other than "bp": also compare gradients with backpropagation's
    log_interval: int = 1  # steps between lines of metrics.jsonl
    sample_interval: int = 0  # steps between short samples of text; 0 = none
    profile: str = ""  # steps, as in "10:15" for 10 to 14: torch.profiler's trace.json and profile.txt go to out_dir
    tensorboard_log: bool = False  # also to out_dir/tensorboard
    wandb_log: bool = False  # also to Weights & Biases
    wandb_project: str | None = None  # its project; None = $WANDB_PROJECT, else nanochimera
    wandb_run_name: str | None = None  # its run name; None = $WANDB_NAME, else after the config files
    wandb_mode: Literal["online", "offline", "disabled"] | None = None  # None = $WANDB_MODE, else online
    # -- system -------------------------------------------------------------------------------------------------------
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1" | "mps"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # number format; auto: measured on a CPU
    compile: bool | None = None  # torch.compile: minutes at the start, faster steps; None = on CUDA only
    peak_tflops: float | None = None  # the GPU's 16-bit peak, for the printed mfu; None = by its name, if that is known
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # for torch.distributed; auto: nccl on CUDA, else gloo
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: each process has the whole model | a share of it (FSDP2)
    activation_checkpointing: bool = False  # the backward pass computes blocks again: less memory, a third more FLOPs

    def __post_init__(self):
        check_values(self, RANGES)
        rates = [name for name in MUON_RATES.values() if getattr(self, name) != getattr(type(self), name)]
        if self.optimizer != "muon" and rates:
            raise ValueError(
                f'{rates[0]}={getattr(self, rates[0])} does nothing without optimizer="muon": set that too'
            )
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr}: must be at most learning_rate={self.learning_rate}")
        if self.profile and not re.fullmatch(r"\d+:\d+", self.profile):
            raise ValueError(f"profile={self.profile}: expected two steps, as in 10:15")
        self.profiled = range(*map(int, self.profile.split(":"))) if self.profile else range(0)
        if self.profile and not self.profiled:
            raise ValueError(f"profile={self.profile}: no step lies between them")
        if bool(self.curriculum) != (self.curriculum_iters >= 7):
            raise ValueError("curriculum and curriculum_iters (7 or more) go together: set both or neither")
        if self.curriculum and self.decay_lr and self.lr_schedule == "wsds":
            raise ValueError(f"curriculum={self.curriculum!r}: stages go on once, but wsds goes back after each decay")


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum: sequences that grow in stages, and with them whatever the model has stages for.

STAGES = 7


def curriculum(iteration, block_size, iters, kind):
    """(tokens per sequence, stage 0 to 6) of a step: a pure function, so that a resumed run continues exactly.

    Equal stages in `iters` steps, the last one for good; lengths grow geometrically from block_size / 16 to block_size.
    """
    last = STAGES - 1
    if not kind:
        return block_size, last
    stage = min(STAGES * iteration // iters, last) if iters else last
    return max(1, round(block_size * 16 ** (stage / last - 1))), stage


def tokens_before(iteration, sequences, block_size, iters, kind):
    """Tokens of all steps before `iteration`, with so many sequences per step."""
    starts = [0, iteration]
    if kind:
        starts = [0, *(-(-stage * iters // STAGES) for stage in range(1, STAGES)), max(iters, iteration)]
    lengths = [curriculum(start, block_size, iters, kind)[0] for start in starts[:-1]]
    return sequences * sum(T * max(0, min(b, iteration) - a) for T, a, b in zip(lengths, starts, starts[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Where it runs: processes, device, number format.


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def ranks():
    """(rank, number of processes) that torchrun assigned; (0, 1) without it. ConfigError for half an assignment.

    Schedulers and notebooks leave single variables behind: they must not make this process one of several.
    """
    there = [name for name in TORCHRUN if os.environ.get(name)]
    if not set(there) & set(TORCHRUN[:3]):
        return 0, 1
    told = ", ".join(f"{name}={os.environ[name]}" for name in there)
    if len(there) < len(TORCHRUN):
        missing = " and ".join(name for name in TORCHRUN if name not in there)
        raise ConfigError(f"{told} without {missing}: unset them to train in one process, or start with torchrun")
    try:
        rank, size, local = (int(os.environ[name]) for name in TORCHRUN[:3])
    except ValueError:
        raise ConfigError(f"{told}: expected whole numbers; start with torchrun") from None
    if not (0 <= rank < size and local >= 0):
        raise ConfigError(f"{told}: RANK must be 0 to WORLD_SIZE - 1; start with torchrun")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch/pytorch issue 135712
        told = f"--max_restarts={restarts}: processes that are started again may wait for ever for those before them"
        needed = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone or --rdzv_backend=c10d"
        raise ConfigError(f"{told}; start torchrun with {needed}")
    return rank, size


class World:
    """The processes of this job: one, or as many as torchrun started.

    Small agreements (stop? the mean loss, random states) go through a gloo group of their own, so they never make a GPU
    wait.
    """

    def __init__(self, device, backend):
        self.rank, self.size = ranks()
        self.is_main = self.rank == 0
        self.device = device
        self.control = None  # a group, where torchrun started this process
        if os.environ.get("RANK"):
            if device == "cuda":
                self.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(self.device)
            default = "nccl" if device.startswith("cuda") else "gloo"
            try:
                dist.init_process_group(default if backend == "auto" else backend)
                self.control = dist.new_group(backend="gloo")
            except (RuntimeError, ValueError) as e:  # an address in use, a backend that is not built in
                raise ConfigError(f"the {self.size} processes cannot find each other: {e}") from e

    def sum(self, values):
        """Element-wise sum over the processes of a list of floats."""
        if self.control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value):
        """The list of every process's `value` on the main process; None elsewhere."""
        if self.control is None:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, group=self.control)
        return values

    def of_main(self, value):
        """The main process's `value`, on all processes."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def close(self):
        if self.control is not None:
            dist.destroy_process_group()


def sharding_of(cfg, world):
    """The module of --parallel=fsdp, whose import takes a second; None for ddp, and without torchrun."""
    if cfg.parallel == "ddp" or world.control is None:
        return None
    from kernels import sharding

    return sharding


def how_shared(cfg, trainer):
    """What the line about processes adds under --parallel=fsdp."""
    if cfg.parallel == "ddp":
        return ""
    return ", each with a part of the weights (fsdp)" if trainer.sharding else ", so fsdp has nothing to share out"


def compiles(cfg, world):
    """Whether the run uses torch.compile."""
    return world.device.startswith("cuda") if cfg.compile is None else cfg.compile


def check_memory_savers(cfg, model, dtype, world):
    """ConfigError for what --parallel=fsdp or --activation_checkpointing cannot do right."""
    if cfg.activation_checkpointing and compiles(cfg, world) and any(map(has_counts, model.transformer.h)):
        told = "torch.compile cannot undo what bio_adaptive_threshold or use_fhn_partitioning count a second time"
        raise ConfigError(f"--activation_checkpointing: {told}: set --compile=False")
    config, told = model.config, "--parallel=fsdp: a process has a part of every weight, but"
    refused = (
        (config.htm_meta_strength, f"{told} htm_meta_strength scales whole columns: use --parallel=ddp"),
        (config.fa_grape, f"{told} fa_grape probes whole weights between passes: use --parallel=ddp"),
        (cfg.log_alignment, f"{told} log_alignment compares whole gradients: use --parallel=ddp"),
        (dtype == torch.float16, f"{told} float16's loss scaler would see that part alone: use --dtype=bfloat16"),
    )
    for is_on, why in refused if sharding_of(cfg, world) else ():
        if is_on:
            raise ConfigError(why)


def pick_device(name):
    """(device, reason); ConfigError if the wanted one is not here."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        device = next(d for d, here in there.items() if here)
        return device, "the fastest one here" if device != "cpu" else "no GPU here"
    if not there.get(name.split(":")[0], False):
        raise ConfigError(f"--device={name}: not here; available: {', '.join(d for d, here in there.items() if here)}")
    return name, "as asked"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def product_seconds(shapes, tokens, dtype):
    """Seconds of the products of linear layers, {(out, in): how many}, for so many tokens, backward included."""
    seconds = 0.0
    for (out, width), count in shapes.items():
        x, w, g = torch.ones(tokens, width), torch.ones(out, width), torch.ones(tokens, out)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            start = time.perf_counter()
            y = F.linear(x.requires_grad_(), w.requires_grad_())
            torch.autograd.grad(y, (x, w), g.to(y.dtype))
            seconds += count * (time.perf_counter() - start)
    return seconds


def time_formats(model, tokens):
    """{dtype: seconds} of a model's own products on this CPU, medians of rounds in either order; under 0.5 s in all.

    A round has at most MEASURED_FLOPS: of large models the smaller shapes alone, since few tokens would show little
    but the weights' conversion.
    """
    counts = Counter(tuple(m.weight.shape) for m in model.transformer.h.modules() if isinstance(m, nn.Linear))
    order = sorted(counts, key=math.prod)
    cost = list(accumulate(6 * math.prod(shape) * tokens for shape in order))
    shapes = {shape: counts[shape] for shape, flops in zip(order, cost) if flops <= max(MEASURED_FLOPS, cost[0])}
    tokens = max(1, min(tokens, int(tokens * MEASURED_FLOPS / cost[0])))
    formats, times = [torch.float32, torch.bfloat16], {torch.float32: [], torch.bfloat16: []}
    first = {dtype: product_seconds(shapes, -(-tokens // 16), dtype) for dtype in formats}  # also warms up
    if first[torch.bfloat16] > 4 * first[torch.float32]:
        return first  # it is emulated: full rounds would take seconds
    for round_ in range(4):
        for dtype in formats if round_ % 2 else formats[::-1]:
            times[dtype].append(product_seconds(shapes, tokens, dtype))
    return {dtype: statistics.median(each) for dtype, each in times.items()}


MEASURED_FLOPS = 4e9
MARGIN = 0.8  # what surrounds products costs more in bfloat16: they must be this much faster


def pick_dtype(name, device, model, tokens=1):
    """(dtype, reason) of the matrix products of `model` on `device`, for so many tokens at a time."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has it") if has_bf16 else (torch.float16, "this GPU has no bfloat16")
    if device != "cpu":
        return torch.float32, "no fast bfloat16 here"
    seconds = time_formats(model, tokens)
    is_faster = seconds[torch.bfloat16] < MARGIN * seconds[torch.float32]
    reason = ", ".join(f"{dtype_name(dtype)} {1e3 * each:.3g} ms" for dtype, each in seconds.items())
    return torch.bfloat16 if is_faster else torch.float32, f"its products here: {reason}"


# Dense peaks in TFLOP/s of 16-bit products that are summed in float32, from the makers' data sheets and white papers.
# On GeForce cards that is twice their float32 rate at boost clock, on the 20 series four times. Names: see `card`.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "A100": 312, "A40": 150, "A10": 125, "V100": 125,
    "L40S": 362, "L40": 181, "L4": 121, "T4": 65,
    "RTX 5090": 209.5, "RTX 5080": 112.6, "RTX 5070 Ti": 87.9, "RTX 5070": 61.7, "RTX 5060 Ti": 47.4, "RTX 5060": 38.4,
    "RTX 4090": 165.2, "RTX 4080 SUPER": 104.4, "RTX 4080": 97.5, "RTX 4070 Ti SUPER": 88.2, "RTX 4070 Ti": 80.2,
    "RTX 4070 SUPER": 70.9, "RTX 4070": 58.3, "RTX 4060 Ti": 44.1, "RTX 4060": 30.2,
    "RTX 3090 Ti": 80, "RTX 3090": 71.2, "RTX 3080 Ti": 68.2, "RTX 3080": 59.5, "RTX 3070 Ti": 43.5, "RTX 3070": 40.6,
    "RTX 3060 Ti": 32.4, "RTX 3060": 25.5,
    "RTX 2080 Ti": 56.9, "RTX 2080 SUPER": 44.6, "RTX 2080": 42.4, "RTX 2070 SUPER": 36.2, "RTX 2070": 31.5,
    "RTX 2060": 25.8,
}  # fmt: skip


def card(name):
    """A card's name as PEAK_TFLOPS has it: without maker, memory and, where it makes no difference, form."""
    name = re.sub(r"NVIDIA|GeForce|Tesla", "", name)
    name = re.sub(r"[- ](\d+GB|HBM\w*|SXM\w*)", "", name).strip()
    return name if name in PEAK_TFLOPS else re.sub(r"[- ]PCIE$", "", name, flags=re.IGNORECASE)


def peak_flops(device, tflops=None):
    """Peak FLOP/s of a CUDA device: `tflops` where given, else by its name; None for a CPU and for unknown cards."""
    if not device.startswith("cuda"):
        return None
    tflops = tflops or PEAK_TFLOPS.get(card(torch.cuda.get_device_name(device)))
    return None if tflops is None else tflops * 1e12


# ---------------------------------------------------------------------------------------------------------------------
# Starting: where weights and settings come from.


NANOGPT = {  # settings of nanoGPT's own checkpoints that a resume takes over; the others belong to another machine
    "batch_size", "gradient_accumulation_steps", "max_iters", "learning_rate", "weight_decay", "beta1", "beta2",
    "grad_clip", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "eval_interval", "eval_iters", "log_interval",
    "always_save_checkpoint", "dataset",
}  # fmt: skip
OWN = {f.name for f in fields(TrainConfig)} - {"out_dir", "init_from", "eval_only", "cost", "profile"}  # and of ours


def resume(settings):
    """(settings, checkpoint): a resumed run's own settings below those given now; checkpoint is None for a new run."""
    out_dir, init_from = settings.values["out_dir"], settings.values["init_from"]
    path = find_checkpoint(out_dir) if init_from in ("resume", "auto") else None
    if path is None:
        if init_from == "resume":
            raise CheckpointError(f"{out_dir}: no checkpoint to resume from; start with --init_from=scratch")
        return settings, None
    # with shared-out weights the main process alone reads them; the others need their shapes
    checkpoint = load_checkpoint(path, mmap=settings.values["parallel"] == "fsdp" and ranks()[0] > 0)
    is_own, config = "format" in checkpoint, checkpoint.get("config", {})
    if not isinstance(config, dict) or (is_own and "config" not in checkpoint):
        raise CheckpointError(f"{path}: has no training configuration; give a config file and --init_from=scratch")
    inherited = {k: v for k, v in config.items() if k in (OWN if is_own else NANOGPT)}
    try:
        TrainConfig(**inherited)
        check_position(checkpoint)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: damaged, what it says of its run is impossible: {e}") from e
    inherited = {k: v for k, v in inherited.items() if k not in settings.given}
    if not is_own and inherited and ranks()[0] == 0:
        told = ", ".join(f"{k}={v}" for k, v in sorted(inherited.items()))
        print(f"from nanoGPT's checkpoint, where flags do not say otherwise: {told}", flush=True)
    return replace(settings, values=settings.values | inherited), checkpoint


def check_position(checkpoint):
    """ValueError unless a checkpoint says where its run was, in numbers that a run can have."""
    step, best = checkpoint.get("iter_num"), checkpoint.get("best_val_loss")
    if isinstance(best, torch.Tensor) and best.ndim == 0:  # nanoGPT's
        checkpoint["best_val_loss"] = best = best.item()
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(f"iter_num={step!r}")
    if type(best) not in (int, float) or math.isnan(best):
        raise ValueError(f"best_val_loss={best!r}")
    if not isinstance(checkpoint.get("meta", {}), dict) or type(checkpoint.get("tokens", 0)) is not int:
        raise ValueError("meta or tokens")


def check_data(checkpoint, data, out_dir):
    """CheckpointError if a run would go on with other data than its own; one from before data_id says less of it."""
    known = {k: v for k, v in checkpoint.get("meta", {}).items() if k in ("data_id", "train_tokens", "val_tokens")}
    known |= {"data_id": checkpoint["data_id"]} if "data_id" in checkpoint else {}
    now = data.meta | {"data_id": data.id}
    is_same = same_tokenizer(checkpoint.get("meta", {}), data.meta) if checkpoint.get("meta") else True
    if not is_same or any(now.get(k, v) != v for k, v in known.items()):
        raise CheckpointError(
            f"{data.folder} is not the data that the run in {out_dir} was trained on; resume it with its own data, or "
            f"start a new run from its weights: --init_from={out_dir} --out_dir=ANOTHER"
        )


def measures_otherwise(checkpoint, cfg):
    """What makes a resumed run's validation losses incomparable with its earlier ones; "" if nothing."""
    before = checkpoint.get("config", {})
    changed = [
        name for name in ("eval_full", "eval_iters") if before.get(name, getattr(cfg, name)) != getattr(cfg, name)
    ]
    return " and ".join(f"{name}={getattr(cfg, name)}, before {before[name]}" for name in changed)


def check_against_weights(settings, model_args, source):
    """ConfigError if a model flag is given that differs from the weights' own; dropout may differ."""
    for name in settings.given & model_args.keys() - {"dropout"}:
        if settings.values[name] != model_args[name]:
            told = f"--{name}={settings.values[name]}: {source} has {name}={model_args[name]}"
            raise ConfigError(f"{told}; leave it out, or start a new run in another --out_dir")


def check_memory(v):
    """ConfigError for sizes whose weights, or one batch, are larger than the machine, before it tries."""
    vocab_size = v["vocab_size"]
    weights = 4 * (12 * v["n_layer"] * v["n_embd"] ** 2 + (vocab_size + v["block_size"]) * v["n_embd"])
    batch = 4 * v["batch_size"] * v["block_size"] * max(v["n_embd"], 0 if v["loss_chunk"] else vocab_size)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    for needed, names in ((weights, ("n_layer", "n_embd", "vocab_size", "block_size")),
                          (batch, ("batch_size", "block_size", "n_embd", "vocab_size"))):  # fmt: skip
        if needed > there:
            sizes = ", ".join(f"{name}={v[name]}" for name in names)
            raise ConfigError(
                f"{sizes}: needs at least {needed:,} bytes, this machine has {there:,}; lower one of them"
            )


def build_model(settings, checkpoint, data):
    """The model to train: from a checkpoint, from scratch, or from the weights of another run or of GPT-2."""
    init_from = settings.values["init_from"]
    dropout = {"dropout": settings.values["dropout"]} if "dropout" in settings.given else {}
    if checkpoint is not None:
        check_against_weights(settings, asdict(GPTConfig()) | checkpoint["model_args"], "the checkpoint")
        return GPT.from_checkpoint(checkpoint, **dropout)
    if init_from in ("scratch", "auto"):
        sizes = {"vocab_size": data.meta.get("vocab_size"), "block_size": data.meta.get("row_tokens")}
        sizes = {name: size for name, size in sizes.items() if size and name not in settings.given}
        check_memory(settings.values | sizes)  # before rules that look at each layer
        return GPT(settings.build(GPTConfig, **sizes))
    model = model_of(init_from, dropout, data)
    if "block_size" in settings.given:
        try:
            model.crop_block_size(settings.values["block_size"])
        except ValueError as e:
            raise ConfigError(f"--init_from={init_from}: {e}") from e
    check_against_weights(settings, asdict(model.config), init_from)
    return model


def model_of(init_from, dropout, data):
    """The model in a run's folder, in a Hugging Face folder, or GPT-2; ConfigError if `data` has other tokens."""
    tokenizer = data.meta.get("tokenizer", "gpt2")
    other = (
        f"--init_from={init_from}: its tokens are not those of {data.folder}, which are of the tokenizer "
        f"{tokenizer!r}; prepare that data with the tokenizer of the weights"
    )
    if path := find_checkpoint(init_from, best=True):
        checkpoint = load_checkpoint(path)
        meta = checkpoint.get("meta") or {}
        if not isinstance(meta, dict) or not same_tokenizer(meta, data.meta):
            raise ConfigError(f"{other}, {meta.get('tokenizer', 'gpt2') if isinstance(meta, dict) else meta!r}")
        return GPT.from_checkpoint(checkpoint, **dropout)
    if meta := load_meta(init_from):  # lab.export wrote this directory
        if not same_tokenizer(meta, data.meta):
            raise ConfigError(f"{other}, {meta['tokenizer']}")
    elif tokenizer != "gpt2" and (init_from in GPT2_NAMES or has_tokenizer(init_from)):
        raise ConfigError(f"{other}, gpt2")
    try:
        model = GPT.from_pretrained(init_from, **dropout)
    except ImportError:
        raise ConfigError(f"--init_from={init_from} needs transformers: pip install transformers safetensors") from None
    except (ValueError, OSError) as e:
        raise ConfigError(f"--init_from={init_from}: {e}") from e
    if tokenizer != "gpt2" and model.config.vocab_size == GPT2.vocab_size:
        raise ConfigError(f"{other}, gpt2")
    return model


@dataclass(frozen=True)
class Period:
    """
    Of a "wsds" run, a part of its trunk and the decay that ends it: steps `first` to `end` of the run.

    `branch`: the step at which the decay leaves the trunk. The weights after the last step have been trained for
    `horizon` steps. The next period goes on from the weights at `branch`.
    """

    first: int
    branch: int
    end: int
    horizon: int


WSDS_SHARE = 0.1  # the last share of each horizon, in which the rate decays


def periods(cfg):
    """The periods of a "wsds" run, [] under another schedule: their horizons double, and the last one ends the run."""
    if not cfg.decay_lr or cfg.lr_schedule != "wsds":
        return []
    return periods_of(cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters, cfg.wsds_horizons)


@cache
def periods_of(steps, count):
    shares = [0.5**k for k in range(count - 1, 0, -1)]
    last = steps / (1 + WSDS_SHARE * sum(shares))
    horizons = [h for h in (round(last * share) for share in shares) if h >= 2]
    decays = [max(1, round(WSDS_SHARE * h)) for h in horizons]
    horizons.append(steps - sum(decays))
    decays.append(max(1, round(WSDS_SHARE * horizons[-1])))
    found, first, trunk = [], 0, 0  # trunk: how many steps the weights at step `first` had been trained for
    for horizon, decay in zip(horizons, decays):
        branch = first + horizon - decay - trunk
        found.append(Period(first, branch, branch + decay, horizon))
        first, trunk = branch + decay, horizon - decay
    return found


def period_at(cfg, step):
    """The period of a "wsds" run that a step belongs to; the last one for those after it."""
    return next((period for period in periods(cfg) if step < period.end), periods(cfg)[-1])


def steps_trained(cfg, step):
    """How many steps the weights that `step` changes were trained for: fewer than `step` once "wsds" went back."""
    if not periods(cfg):
        return step
    period = period_at(cfg, step)
    return step - period.end + period.horizon


def lr_at(cfg, step):
    """Learning rate of a step: linear warm-up, then cosine, constant or warm-up-stable-decay, then min_lr."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    if cfg.lr_schedule == "wsds":
        return wsds_lr_at(cfg, step)
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    end = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    start = cfg.warmup_iters if cfg.lr_schedule == "cosine" else max(cfg.warmup_iters, end * (1 - cfg.wsd_decay_share))
    done = min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)
    share = 0.5 * (1 + math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else 1 - done
    return low + share * (cfg.learning_rate - low)


def wsds_lr_at(cfg, step):
    """Linear warm-up, then flat; linear decay to min_lr at the end of each period."""
    trained, low = steps_trained(cfg, step), cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    if trained < cfg.warmup_iters:
        return cfg.learning_rate * (trained + 1) / (cfg.warmup_iters + 1)
    period = period_at(cfg, step)
    done = min(max((step - period.branch) / (period.end - period.branch), 0.0), 1.0)
    return low + (1 - done) * (cfg.learning_rate - low)


def seed_all(seed):
    """Seed every random generator that a model may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # all that it takes
    torch.manual_seed(seed)


def rng_states():
    """The state of every random generator a model may use, in types that a safe checkpoint holds."""
    kind, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states):
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# The run itself.


class Diverged(ArithmeticError):
    """The loss is not finite any more; checkpoints written before are good."""

    def __str__(self):
        return f"{super().__str__()}; checkpoints saved before it are good, lower --learning_rate"


class Stopped(Exception):
    """An evaluation was asked to stop."""


def finite(results, step):
    """`results`; Diverged if the validation loss is not finite."""
    if not math.isfinite(results["val_loss"]):
        raise Diverged(f"the validation loss is {results['val_loss']} at step {step}")
    return results


class Trainer:
    """Model, optimiser and position of a run. `step()` trains, `evaluate()` measures, `save()` keeps."""

    def __init__(self, cfg, model, data, world, dtype, checkpoint=None):
        self.cfg, self.data, self.world, self.dtype = cfg, data, world, dtype
        self.config = model.config
        self.device_type = world.device.split(":")[0]
        self.sharding = sharding_of(cfg, world)
        if cfg.activation_checkpointing:
            recompute_blocks(model)
        shard = self.sharding and self.sharding.shard
        self.model = shard(model, world.device, dtype, compiles(cfg, world)) if shard else model.to(world.device)
        self.iter_num, self.best_val_loss = 0, math.inf
        self.seen = 0, 0  # (step, tokens until then) of the checkpoint that it goes on from
        self.stop = None  # a Stop, while the run may be asked to
        self.autocast = torch.autocast(self.device_type, dtype) if dtype != torch.float32 else nullcontext()
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)
        rates = {role: getattr(cfg, name) for role, name in MUON_RATES.items()} if cfg.optimizer == "muon" else None
        if rates and self.config.htm_meta_target == "momentum":
            raise ConfigError('--htm_meta_target=momentum scales AdamW\'s first moment: write "lr" under muon')
        self.optimizer = model.configure_optimizers(
            cfg.weight_decay, cfg.learning_rate, (cfg.beta1, cfg.beta2), self.device_type, rates
        )
        if rates and dtype == torch.bfloat16:
            self.optimizer.dtype = dtype  # its products are faster in it too
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        if cfg.gradient_accumulation_steps % world.size:
            raise ConfigError(
                f"--gradient_accumulation_steps={cfg.gradient_accumulation_steps}: must be a multiple of the "
                f"{world.size} processes"
            )
        self.micro_steps = cfg.gradient_accumulation_steps // world.size
        self.sequences = cfg.batch_size * cfg.gradient_accumulation_steps  # an optimiser step
        self.tokens_per_step = self.sequences * self.config.block_size
        seed_all(cfg.seed + world.rank)  # dropout differs between ranks, weights do not
        if checkpoint is not None:
            self.restore(checkpoint)
        if cfg.curriculum == "e7":  # the stage of the last step; a new model is evaluated with all of it
            self.set_stage(self.iter_num - 1 if self.iter_num else cfg.curriculum_iters)
        self.forward = torch.compile(model) if compiles(cfg, world) and not self.sharding else model
        self.ddp = self.averaging() if world.control is not None and not self.sharding else None

    def averaging(self):
        """The model under DDP, each process with a whole one; gradients are averaged."""
        ids = [torch.device(self.world.device).index] if self.device_type == "cuda" else None
        # buffers are equal by construction, and counts that a step has not applied yet must not be overwritten
        return DistributedDataParallel(self.forward, device_ids=ids, broadcast_buffers=False)

    def restore(self, checkpoint):
        """Go on where `checkpoint` stopped; nanoGPT's has no scaler and no random states."""
        own = self.optimizer.state_dict()  # its groups hold this run's weight decay and betas
        try:
            saved = checkpoint["optimizer"]
            self.check_state(saved, checkpoint["iter_num"])
            state = saved["state"]
            if self.sharding:
                state = self.sharding.shares_of(state, self.optimizer)
            self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
            if checkpoint.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.iter_num, self.best_val_loss = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
            self.seen = self.iter_num, checkpoint.get("tokens", self.tokens_by(checkpoint.get("config", {})))
            states = checkpoint.get("rng", [])
            if self.world.rank < len(states):
                set_rng_states(states[self.world.rank])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as e:
            raise CheckpointError(f"the checkpoint can write text but not be resumed: {type(e).__name__} {e}") from e

    def check_state(self, saved, step):
        """ValueError unless a saved optimiser state is of these parameters: fused kernels would write past others."""
        groups = self.optimizer.param_groups
        sizes = [[len(group["params"]) for group in each] for each in (groups, saved["param_groups"])]
        params = [(p, "splits" in group) for group in groups for p in group["params"]]
        state = saved["state"]
        if sizes[0] != sizes[1] or state.keys() != (set(range(len(params))) if step else set()):
            raise ValueError("the optimiser's state is of other parameters")
        for number, (p, is_muon) in enumerate(params if step else []):
            found = dict(state[number])
            count = found.pop("step", None)  # a plain number before PyTorch 1.12
            if not is_muon and not (torch.is_tensor(count) and count.shape == () or type(count) in (int, float)):
                raise ValueError(f"the optimiser's state {number} has no step")
            names = {"momentum_buffer"} if is_muon else {"exp_avg", "exp_avg_sq"}
            alike = [torch.is_tensor(t) and (t.shape, t.dtype) == (p.shape, p.dtype) for t in found.values()]
            if found.keys() != names or not all(alike):
                raise ValueError(f"the optimiser's state {number} does not fit its parameter of {tuple(p.shape)}")

    def tokens_by(self, config):
        """Tokens of the steps so far, with another batch size or curriculum where `config` says so."""
        batch_size, micro_steps, iters, kind = (
            config.get(name, getattr(self.cfg, name))
            for name in ("batch_size", "gradient_accumulation_steps", "curriculum_iters", "curriculum")
        )
        return tokens_before(self.iter_num, batch_size * micro_steps, self.config.block_size, iters, kind)

    def groups(self):
        """What each group of the optimiser trains, in words."""
        parts = []
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            role = group.get("role", "matrices" if group["weight_decay"] else "without decay")
            n = sum(p.numel() for p in group["params"])
            parts.append(f"{role} {len(group['params'])} tensors of {n:,} numbers at {peak:g}")
        return ", ".join(parts)

    def set_stage(self, step):
        """Put the model into the curriculum's stage of a step; ConfigError if it has no stages."""
        stage = curriculum(step, self.config.block_size, self.cfg.curriculum_iters, self.cfg.curriculum)[1]
        try:
            self.model.set_stage(stage)
        except ValueError:
            needs = 'set use_manifold and manifold="e7" too'
            raise ConfigError(f"--curriculum=e7 frees the coset's coordinates: {needs}") from None

    def step(self):
        """One optimiser step; returns this process's mean loss and the gradient norm, 0-d tensors on the device."""
        cfg, B, first = self.cfg, self.cfg.batch_size, self.world.rank * self.micro_steps
        self.branch()
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak / cfg.learning_rate * lr_at(cfg, self.iter_num)
        trained = steps_trained(cfg, self.iter_num)  # what a decay reads, the trunk reads again
        starts = self.data.windows(TRAIN, trained, self.sequences, self.config.block_size)
        T, _ = curriculum(self.iter_num, self.config.block_size, cfg.curriculum_iters, cfg.curriculum)
        if cfg.curriculum == "e7":
            self.set_stage(self.iter_num)
        total = 0.0
        for micro in range(self.micro_steps):
            x, y = self.data.batch("train", starts[(first + micro) * B :][:B], self.config, self.world.device)
            is_last = micro == self.micro_steps - 1
            if self.ddp is not None:  # gradients are averaged once, in the last backward pass
                self.ddp.require_backward_grad_sync = is_last
            elif self.sharding:
                self.model.set_requires_gradient_sync(is_last)
            with self.autocast:
                _, loss = (self.ddp or self.forward)(x[:, :T], y[:, :T])
            self.scaler.scale(loss / self.micro_steps).backward()
            total = total + loss.detach() / self.micro_steps
        self.scaler.unscale_(self.optimizer)
        clip = self.sharding.clip_grad_norm if self.sharding else torch.nn.utils.clip_grad_norm_
        norm = clip(self.model.parameters(), cfg.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.iter_num += 1
        return total, norm

    def branch(self):
        """Under "wsds", before a step: keep the trunk where a decay leaves it, and go back to it after the decay."""
        *earlier, _ = periods(self.cfg) or [None]
        for period in earlier:
            if self.iter_num == period.branch:
                self.save(STABLE)
            elif self.iter_num == period.end:
                self.go_back(period.branch)

    def go_back(self, step):
        """Take weights, optimiser and random states from the checkpoint of `step`; the run's step count goes on."""
        now, path = self.iter_num, Path(self.cfg.out_dir) / STABLE
        checkpoint = load_checkpoint(path)
        if checkpoint.get("iter_num") != step:
            raise CheckpointError(f"{path}: expected the run at step {step}, from before its decay; start it again")
        best, seen = self.best_val_loss, self.seen
        if self.sharding:
            self.sharding.fill(self.model, checkpoint["model"])
        else:
            self.model.load_state_dict(checkpoint["model"])
        self.restore(checkpoint)
        self.iter_num, self.best_val_loss, self.seen = now, best, seen

    def horizon(self):
        """Under "wsds", for how many steps the weights were trained if their decay has just ended; else None."""
        return next((p.horizon for p in periods(self.cfg) if p.end == self.iter_num), None)

    def tokens(self, step):
        """Tokens of all steps before `step`: what a resumed run had seen, and what this one adds.

        Under "wsds" those that the weights have seen, without the decays that were left again.
        """
        cfg = self.cfg
        trained = [steps_trained(cfg, s - 1) + 1 if s else 0 for s in (step, self.seen[0])]
        until = [
            tokens_before(s, self.sequences, self.config.block_size, cfg.curriculum_iters, cfg.curriculum)
            for s in trained
        ]
        return self.seen[1] + until[0] - until[1]

    @torch.no_grad()
    def mean_loss(self, batches, total):
        """Mean language-model loss in nats per token over all processes' `batches`, targets of -1 left out.

        And the share of targets that are the likeliest token, 0 for data without questions. `total`: how many batches
        there are here, for the progress bar. Stopped if a stop was asked for in any process.
        """
        self.model.eval()
        loss_sum, right, count, stopped = 0.0, 0, 0, 0
        is_shown = self.world.is_main and sys.stderr.isatty()
        batches = self.in_step(batches) if self.sharding else batches
        for x, y in tqdm(batches, "evaluating", total, leave=False, disable=not is_shown, delay=1, dynamic_ncols=True):
            if self.stop and self.stop.requested and not self.sharding:
                stopped = 1
                break
            with self.autocast:
                logits, loss = self.forward(x, y)
            n = int((y != -1).sum())
            if n == 0 and self.sharding:  # it only keeps the others company
                continue
            loss_sum, count = loss_sum + loss.item() * n, count + n
            if self.data.has_questions:
                right += int((logits.argmax(-1) == y).sum())  # no logit is at -1
        self.model.train()
        loss_sum, right, count, stopped = self.world.sum([loss_sum, right, count, stopped])
        if stopped:
            raise Stopped
        return loss_sum / count, right / count

    def in_step(self, batches):
        """Batches as long as any process has one, since all gather the weights: an empty one where this has none left.

        Stopped, in all of them at once, if a stop was asked for in any.
        """
        shape = self.cfg.batch_size, self.config.block_size
        nothing = torch.zeros(shape, dtype=torch.int64, device=self.world.device)
        for batch in chain(batches, repeat(None)):
            is_asked = self.stop is not None and self.stop.requested
            left, stopped = self.world.sum([float(batch is not None), float(is_asked)])
            if stopped:
                raise Stopped
            if not left:
                return
            yield (nothing, nothing - 1) if batch is None else batch

    def evaluate(self):
        """{"train_loss", "val_loss"} in nats per token, "val_bpb" in bits per byte where the bytes are known.

        "val_accuracy" is the share of answers that are the likeliest token, where the data asks questions.
        """
        cfg, B, device = self.cfg, self.cfg.batch_size, self.world.device

        def random_batches(split, stream):
            starts = self.data.windows(stream, self.iter_num, cfg.eval_iters * B, self.config.block_size)
            for i in range(self.world.rank, cfg.eval_iters, self.world.size):
                yield self.data.batch(split, starts[i * B : (i + 1) * B], self.config, device)

        some = len(range(self.world.rank, cfg.eval_iters, self.world.size))
        losses = {"train_loss": self.mean_loss(random_batches("train", TRAIN_LOSS), some)[0]}
        if cfg.eval_full:
            windows = self.data.val_windows(B, self.config, device, self.world.rank, self.world.size)
            count = -(-(len(self.data.splits["val"]) - 1) // (B * self.config.block_size * self.world.size))
            losses["val_loss"], right = self.mean_loss(windows, count)
        else:
            losses["val_loss"], right = self.mean_loss(random_batches("val", VAL_LOSS), some)
        if self.data.has_questions:
            losses["val_accuracy"] = right
        meta = self.data.meta
        if meta.get("val_bytes"):
            losses["val_bpb"] = losses["val_loss"] * meta["val_tokens"] / meta["val_bytes"] / math.log(2)
        return losses

    def save(self, *names):
        """Write the run's state to these files of out_dir. All processes must call it.

        Diverged, with nothing written, if a weight is not finite: the checkpoint there may be the last good one.
        """
        bad = not all(torch.isfinite(local(p)).all() for p in self.model.parameters())
        if self.world.sum([float(bad)])[0]:  # each process has seen its own part
            raise Diverged(f"a weight is not finite after {self.iter_num} steps")
        states = self.world.gather(rng_states())
        weights, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if self.sharding:  # all processes put them together, the main one keeps them
            weights, optimizer = (self.sharding.whole(x, self.world.is_main) for x in (weights, optimizer))
        if not self.world.is_main:
            return
        checkpoint = {
            "model": weights,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "model_args": asdict(self.config),
            "config": asdict(self.cfg),
            "meta": self.data.meta,  # what sample.py needs to know of the data
            "data_id": self.data.id,
            "iter_num": self.iter_num,
            "tokens": self.tokens(self.iter_num),
            "best_val_loss": self.best_val_loss,
            "rng": states,
        }
        for name in names:
            save_checkpoint(Path(self.cfg.out_dir) / name, checkpoint)

    def alignment(self):
        """Angles between weights and feedback; with log_alignment, cosines of gradients on a batch of the val split.

        {} under plain backpropagation.
        """
        batch = ()
        if self.cfg.log_alignment:
            starts = self.data.windows(VAL_LOSS, 0, self.cfg.batch_size, self.config.block_size)
            batch = self.data.batch("val", starts, self.config, self.world.device)
        return self.model.alignment(*batch)

    def evaluate_and_save(self):
        """`evaluate`, then the checkpoints its result asks for. Diverged, with nothing saved, if it is not finite."""
        results = finite(self.evaluate(), self.iter_num)
        better = results["val_loss"] < self.best_val_loss
        self.best_val_loss = min(results["val_loss"], self.best_val_loss)
        if better or self.cfg.always_save_checkpoint:
            self.save(*(["ckpt.pt"] if better else []), "ckpt_last.pt")
        return results

    def report(self, norm, seconds):
        """The values of a training line besides the loss; `seconds`: the time per step."""
        parts = self.model.losses if len(self.model.losses) > 1 else {}
        stage = self.cfg.curriculum_iters, self.cfg.curriculum
        tokens = self.sequences * curriculum(self.iter_num - 1, self.config.block_size, *stage)[0]
        rate = tokens / seconds
        values = {k: v.item() for k, v in (parts | self.model.measures()).items()}
        values |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm.item()}
        if self.cfg.curriculum:
            values["sequence_length"] = tokens // self.sequences
        values |= {"ms": seconds * 1e3, "tokens_per_s": rate}
        if memory := memory_mb(self.world.device):
            values["memory_mb"] = memory
        if peak := peak_flops(self.world.device, self.cfg.peak_tflops):
            values["mfu"] = rate * self.model.flops_per_token() / (peak * self.world.size)
        return values

    def write_sample(self, tokenizer, tokens=100):
        """A short text from the model as it is."""
        generator = torch.Generator(self.world.device).manual_seed(self.cfg.seed)
        start = torch.tensor([first_ids(tokenizer)], device=self.world.device)
        with self.autocast:
            ids = self.model.generate(start, tokens, generator=generator, known_ids=tokenizer.vocab_size)
        return visible(tokenizer.decode(ids[0].tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind: metrics.jsonl, run.json, TensorBoard, W&B, lines on the terminal.


class Log:
    """Writes metrics and messages to files, trackers and the terminal. Only the main process has one."""

    def __init__(self, cfg, model, start, facts):
        self.folder = Path(cfg.out_dir)
        self.file = open_metrics(self.folder / "metrics.jsonl", start)
        replace_file(self.folder / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
        self.board = self.wandb = None
        if cfg.tensorboard_log:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=start)
        if cfg.wandb_log:
            self.wandb = start_wandb(cfg, facts)
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=cfg.max_iters, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
        self.terminal = not self.bar.disable

    def metrics(self, step, values):
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no inf
        self.file.write(json.dumps({"iter": step, **finite}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def training(self, step, values):
        """A training line; the bar moves, or a line is printed where there is no terminal."""
        self.metrics(step, values)
        self.bar.n = step + 1
        silent = f", sparsity {values['sparsity']:.4f}" if "sparsity" in values else ""  # silent share of the events
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_s']:,.0f} tokens/s{silent}")
        if not self.terminal:
            mfu = f", mfu {values['mfu']:.1%}" if "mfu" in values else ""
            speed = f"{values['ms']:.1f} ms, {values['tokens_per_s']:,.0f} tokens/s"
            self.write_line(f"iter {step}: loss {values['loss']:.4f}, {speed}{mfu}{silent}")

    def evaluation(self, step, values):
        self.metrics(step, values)
        losses = ", ".join(f"{k} {v:.4f}" for k, v in values.items() if k not in ("tokens", "horizon") and "/" not in k)
        self.write_line(f"step {step}: {losses}")

    def write_line(self, text):
        try:
            if self.terminal:
                self.bar.write(text)  # to stdout; the bar itself is on stderr, and tqdm minds its terminal
            else:
                print(text, flush=True)
        except OSError as e:  # a terminal that was lost a moment ago: SIGHUP is about to say so
            if e.errno != errno.EIO or not stat.S_ISCHR(os.fstat(sys.stdout.fileno()).st_mode):
                raise
            drop_terminal()

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(cfg, facts):
    """A run of Weights & Biases, whose own environment variables hold where a flag does not say otherwise."""
    import wandb

    project, name = cfg.wandb_project or os.environ.get("WANDB_PROJECT", "nanochimera"), cfg.wandb_run_name
    folder = None if os.environ.get("WANDB_DIR") else cfg.out_dir
    try:
        return wandb.init(project=project, name=name, mode=cfg.wandb_mode, dir=folder, config=facts)
    except wandb.Error as e:
        raise ConfigError(f"--wandb_log: {e}; log in with `wandb login`, or keep it here: --wandb_mode=offline") from e


def git_commit():
    """The commit this code is at, with + if files were changed; None without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def memory_mb(device):
    """Peak memory in MB: of the GPU, or of this process on a CPU (Linux; None elsewhere)."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:  # not getrusage: its peak survives exec, so a child would report its parent's
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


class Stop:
    """While it is open, Ctrl-C, SIGTERM and a lost terminal ask for a stop after the step; a second one quits at once.

    What it tells goes straight to file descriptor 2: a signal may arrive in the middle of a print.
    """

    def __init__(self, is_main=True):
        self.requested, self.is_main = False, is_main

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not under nohup
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number, frame):
        if number == getattr(signal, "SIGHUP", None):
            drop_terminal()
        if self.requested:
            self.tell("stopped at once; the last checkpoint is whole")
            os._exit(128 + number)
        self.requested = True
        self.tell("stopping after this step; again to quit now")

    def tell(self, text):
        if self.is_main:
            os.write(2, f"\n{text}\n".encode())

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def drop_terminal():
    """After a hang-up: what would go to the terminal goes nowhere, since writing to it is an error now."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            os.dup2(nowhere, fd)


def run(settings):
    """A whole run, from resolved settings. Raises ConfigError, DataError, CheckpointError or Diverged."""
    settings = settings.expanded("out_dir", "data_dir", "dataset", "init_from")
    out_dir, is_main = settings.values["out_dir"], ranks()[0] == 0
    writes = is_main and not (settings.values["eval_only"] or settings.values["cost"])
    with ExitStack() as held:
        is_held = writes and os.path.isdir(out_dir)
        if is_held:  # before its checkpoint is read: another run may be about to write it
            held.enter_context(hold(out_dir))
        settings, checkpoint = resume(settings)
        trainer, tokenizer, dtype = build(settings, checkpoint)
        if writes:
            prepare_out_dir(out_dir, 3 * sum(p.numel() * p.element_size() for p in trainer.model.parameters()))
            if not is_held:
                held.enter_context(hold(out_dir))
            if checkpoint is None and (moved := keep_previous(out_dir)):
                print(f"{out_dir}: an earlier run was there; its files are in {moved} now", flush=True)
        if trainer.cfg.cost:
            from lab import cost  # it imports this script

            cost.show(trainer)
        elif trainer.cfg.eval_only:
            losses = finite(trainer.evaluate(), trainer.iter_num)
            if is_main:
                print(", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
        elif checkpoint is not None and trainer.iter_num >= trainer.cfg.max_iters:
            if is_main:
                print(
                    f"nothing to do: {trainer.iter_num} of max_iters={trainer.cfg.max_iters} steps are done; raise it"
                )
        else:
            run_training(trainer, tokenizer, dtype)
        trainer.world.close()


def build(settings, checkpoint):
    """(Trainer, tokenizer for samples or None, number format) of a run, told in a few lines."""
    cfg = settings.build(TrainConfig)
    check_packages(cfg)
    if cfg.cost:
        cfg.compile, cfg.parallel = False, "ddp"  # minutes of compiling are no part of an estimate; of one process
    cfg.wandb_run_name = cfg.wandb_run_name or os.environ.get("WANDB_NAME") or "-".join(settings.files) or "nanochimera"
    device, why_device = pick_device(cfg.device)
    world = World(device, cfg.backend)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32
    torch.manual_seed(cfg.seed)
    cfg.dataset = own_text(cfg, world)
    data = open_dataset(cfg)
    if checkpoint is not None:
        check_data(checkpoint, data, cfg.out_dir)
    sharding = sharding_of(cfg, world)
    with sharding.weightless() if sharding and not world.is_main else nullcontext():
        model = build_model(settings, checkpoint, data)
    data.check(model.config.block_size, model.config.vocab_size)
    dtype, why_dtype = world.of_main(pick_dtype(cfg.dtype, device, model, cfg.batch_size * model.config.block_size))
    cfg.dtype = dtype_name(dtype)  # what a resumed run goes on with
    check_memory_savers(cfg, model, dtype, world)
    if cfg.log_alignment and not model.alignment(*data.batch("val", np.zeros(1, np.int64), model.config, "cpu")):
        raise ConfigError('--log_alignment compares with backpropagation: set a method other than "bp"')
    tokenizer = load_tokenizer(data.meta, data.folder) if cfg.sample_interval else None
    trainer = Trainer(cfg, model, data, world, dtype, checkpoint)
    if cfg.profile and not (trainer.iter_num <= cfg.profiled[0] and cfg.profiled[-1] < cfg.max_iters):
        raise ConfigError(f"--profile={cfg.profile}: this run trains steps {trainer.iter_num} to {cfg.max_iters - 1}")
    if world.is_main:
        tell_start(trainer, why_device, why_dtype)
    if checkpoint is not None and (changed := measures_otherwise(checkpoint, cfg)):
        trainer.best_val_loss = math.inf
        if world.is_main:
            print(f"{changed}: the best loss so far was measured otherwise and is forgotten", flush=True)
    return trainer, tokenizer, dtype


def tell_start(trainer, why_device, why_dtype):
    """Print what is trained, on what, and by which optimiser."""
    cfg, model, world = trainer.cfg, trainer.model, trainer.world
    print(
        f"{model.num_params() / 1e6:.2f}M parameters, {trainer.tokens_per_step:,} tokens per step, "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOPs per token\n"
        f"device {world.device} ({why_device}), dtype {cfg.dtype} ({why_dtype}), {world.size} process(es)"
        f"{how_shared(cfg, trainer)}\n"
        f"{cfg.optimizer}: {trainer.groups()}",
        flush=True,
    )


def own_text(cfg, world):
    """The data set's name; where it is the path of a text, which the main process prepares, the folder that is made."""
    path, is_set = Path(cfg.dataset), (folder_of(cfg) / "train.bin").exists()
    if is_set or not (path.is_file() or (path.is_dir() and os.sep in cfg.dataset)):
        return cfg.dataset
    from data.prepare import prepared

    return world.of_main(str(prepared(path)) if world.is_main else None)


def check_packages(cfg):
    """Refuse a log whose package is missing before any work is done."""
    import importlib.util

    for wanted, package in ((cfg.tensorboard_log, "tensorboard"), (cfg.wandb_log, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"--{package}_log needs the package {package}: pip install {package}")


def machine(device):
    """{"cpu", "cores", "threads", "gpu"}: what this process computes on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def facts_of(trainer, dtype):
    """The contents of run.json."""
    return {
        "config": asdict(trainer.cfg), "model_args": asdict(trainer.config), "git_commit": git_commit(),
        "device": trainer.world.device, "dtype": dtype_name(dtype), "processes": trainer.world.size,
        "data_id": trainer.data.id, "machine": machine(trainer.world.device),
        "parameters": trainer.model.num_params(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip


def run_training(trainer, tokenizer, dtype):
    """Train to max_iters with logs and checkpoints, until done or stopped."""
    log = Log(trainer.cfg, trainer.model, trainer.iter_num, facts_of(trainer, dtype)) if trainer.world.is_main else None
    try:
        with Stop(trainer.world.is_main) as trainer.stop:
            loop(trainer, log, tokenizer, trainer.stop)
    finally:
        if log:
            log.close()


class StepLosses:
    """The losses of the last steps, on the device until they are fetched, so that no step waits for another."""

    def __init__(self, trainer):
        self.trainer, self.losses, self.norm = trainer, [], None  # norm: the last step's gradient norm

    def append(self, loss, norm):
        self.norm = norm
        # an infinite gradient shows in the loss too; but a GradScaler skips such a step, and may
        self.losses.append(loss if self.trainer.scaler.is_enabled() else loss + 0 * norm)

    def fetch(self):
        """The last loss, averaged over processes; None without one. Diverged if any since the last fetch is bad."""
        world = self.trainer.world
        means = [x / world.size for x in world.sum(torch.stack(self.losses).tolist())] if self.losses else []
        for step, loss in enumerate(means, self.trainer.iter_num - len(means)):
            if not math.isfinite(loss):
                raise Diverged(f"the loss or its gradient is {loss} at step {step}")
        self.losses.clear()
        return means[-1] if means else None


class StepProfile:
    """torch.profiler around the steps that cfg.profile names: trace.json for a browser, profile.txt to read."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.profiler = trainer, trainer.cfg.profiled, None

    def step(self):
        """One step of the trainer; what `Trainer.step` returns."""
        number = self.trainer.iter_num
        if self.steps and number == self.steps[0]:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        result = self.trainer.step()
        if self.profiler and number == self.steps[-1]:
            self.write()
        return result

    def write(self):
        self.profiler.stop()
        folder, profiler, self.profiler = Path(self.trainer.cfg.out_dir), self.profiler, None
        profiler.export_chrome_trace(str(folder / "trace.json"))
        key = "self_device_time_total" if self.trainer.device_type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=50)
        replace_file(folder / "profile.txt", table.encode())
        what = f"{folder / 'trace.json'}, {folder / 'profile.txt'}"
        print(f"profile of steps {self.steps[0]} to {self.steps[-1]}: {what}", flush=True)


def evaluate_and_log(trainer, log):
    """Evaluate, save, and log what was measured."""
    i, results = trainer.iter_num, trainer.evaluate_and_save()
    aligned = trainer.alignment() if log or trainer.sharding else {}  # whole weights, for the angles
    if log:
        measured = {k: v.item() for k, v in trainer.model.measures().items()}
        measured |= {"horizon": horizon} if (horizon := trainer.horizon()) else {}
        log.evaluation(i, {"tokens": trainer.tokens(i), **results, **measured, **aligned})


def save_stopped(trainer, log):
    """Save a run that was asked to stop, and print how to continue it."""
    trainer.save("ckpt_last.pt")
    if log:
        again = f"python train.py --out_dir={shlex.quote(str(trainer.cfg.out_dir))} --init_from=resume"
        log.write_line(f"stopped after {trainer.iter_num} steps; go on with: {again}")


def loop(trainer, log, tokenizer, stop):
    """Train to max_iters, or until a stop is asked for. `log` is None on all processes but the main one."""
    cfg, losses = trainer.cfg, StepLosses(trainer)
    logged, clock = trainer.iter_num, time.perf_counter()
    step = StepProfile(trainer).step if log and cfg.profile else trainer.step
    while True:
        i, pause = trainer.iter_num, time.perf_counter()
        if i % cfg.eval_interval == 0 or i >= cfg.max_iters or trainer.horizon():
            losses.fetch()  # nothing bad is saved
            try:
                evaluate_and_log(trainer, log)
            except Stopped:
                return save_stopped(trainer, log)
        if i >= cfg.max_iters:
            return
        if (log or trainer.sharding) and cfg.sample_interval and i and i % cfg.sample_interval == 0:
            text = trainer.write_sample(tokenizer).strip()
            if log:
                log.write_line(f"--- a sample at step {i} ---\n{text}\n---")
        clock += time.perf_counter() - pause
        losses.append(*step())
        if i % cfg.log_interval == 0:
            loss = losses.fetch()
            seconds = (time.perf_counter() - clock) / (trainer.iter_num - logged)
            logged, clock = trainer.iter_num, time.perf_counter()
            if log:
                values = {"tokens": trainer.tokens(trainer.iter_num), "loss": loss}
                log.training(i, values | trainer.report(losses.norm, seconds))
        if trainer.world.sum([float(stop.requested)])[0]:
            losses.fetch()
            return save_stopped(trainer, log)


PRECISIONS = {
    "bf16-mixed": "bfloat16",
    "fp16-mixed": "float16",
    "16-mixed": "float16",
    "fp32": "float32",
    "32": "float32",
}


def precision(text):
    """Lightning's names for --dtype: bf16-mixed, fp16-mixed or 16-mixed, fp32 or 32"""
    if text not in PRECISIONS:
        raise ConfigError(f"--precision={text}: expected {', '.join(PRECISIONS)}")
    return {"dtype": PRECISIONS[text]}


def devices(text):
    """1; for more, torchrun --standalone --nproc_per_node=N train.py ..."""
    if text == "1":
        return {}
    raise ConfigError(f"--devices={text}: use torchrun --standalone --nproc_per_node={text} train.py ...")


@contextmanager
def told_when_out_of_memory():
    """ConfigError in place of the errors with which NumPy and PyTorch say that memory is exhausted."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        is_memory = isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(e)  # on a CPU
        if not is_memory:
            raise
        what = str(e).splitlines()[0] if str(e) else "no more memory"
        lower = "batch_size, block_size, eval_iters, num_samples or the model's sizes"
        raise ConfigError(f"out of memory ({what}): lower {lower}") from e


def main(argv=None):
    with configurator.one_line_errors("train.py", DataError, CheckpointError, Diverged, OSError):
        aliases = {"precision": precision, "devices": devices}
        words = sys.argv[1:] if argv is None else argv
        with told_when_out_of_memory():
            run(configurator.read(words, TrainConfig, GPTConfig, doc=__doc__, aliases=aliases))


if __name__ == "__main__":
    main()
