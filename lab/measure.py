"""
Measuring speed and memory, always beside a reference in the same run.

A contender is a function without arguments that builds a run, another function without arguments: what takes the time.
Where memory is measured, a contender is a partial of a function at the top level of a module, so that a fresh process
can build it too.
"""

import importlib
import multiprocessing
import shlex
import statistics
import time
from dataclasses import fields
from functools import partial

import torch

import configurator
from model import GPTConfig
from train import TrainConfig, memory_mb


def flags_of(row):
    """The GPTConfig flags that a row sets: words as for train.py, but for names that stand for config/ablation/NAME.py.

    "mfs --loss_chunk=256" is a row, and so is "mine.py".
    """
    words = [w if w.startswith("--") or w.endswith(".py") else f"config/ablation/{w}.py" for w in shlex.split(row)]
    settings = configurator.read(words, TrainConfig, GPTConfig)
    return {f.name: settings.values[f.name] for f in fields(GPTConfig) if f.name in settings.given}


def interleave(runs, rounds, device):
    """{name: seconds of each round} of runs {name: run}, each of which runs once per round."""

    def timed(run):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():
        timed(run)  # warm-up: allocation, compilation
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
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


def repeat(step, times):
    for _ in range(times):
        step()


def without_grad(function, *args):
    """A run of function(*args) without gradients."""
    return torch.no_grad()(partial(function, *args))


def with_gradients(function, inputs, parameters=(), grad=None):
    """A run of function(*inputs) and its backward pass, where `grad` reaches the result: by default a random one.

    The default needs a result shaped like the first input.
    """
    grad = torch.randn_like(inputs[0]) if grad is None else grad

    def run():
        leaves = [x.detach().requires_grad_() for x in inputs]
        torch.autograd.grad(function(*leaves), [*leaves, *parameters], grad)

    return run


def peak_memory(contender, device, queue):
    """Put the peak memory in MB of two runs, in a process that does nothing else, into `queue`."""
    importlib.import_module("torch._dynamo")  # 130 MB of code, which the first operator of our own would load

    before = memory_mb(device)
    repeat(contender(), 2)
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

    cfg: a BenchConfig. memory: whether to measure it, by default as cfg says; parameters: {name: count}, to be shown.
    """
    runs = {name: partial(repeat, make(), times) for name, make in contenders.items()}
    rows = speeds(interleave(runs, cfg.repeats, device))
    for row in rows:
        row[f"{unit}_per_s"] = work / row["seconds"]
        if cfg.memory if memory is None else memory:
            row["memory_mb"] = in_fresh_process(peak_memory, contenders[row["name"]], device)
        if parameters:
            row["parameters"] = parameters[row["name"]]
    print_rows(title, rows, unit)
    return rows


def print_rows(title, rows, unit):
    more = {"memory_mb": "peak MB", "parameters": "parameters"}
    more = {key: label for key, label in more.items() if key in rows[0]}
    labels = "".join(f"{label:>12}" for label in more.values())
    print(f"\n{title}\n{'':<38}{'speed':>8}{'quartiles':>18}{unit + '/s':>14}{labels}")
    for row in rows:
        quartiles, rate = f"{row['low']:.2f} to {row['high']:.2f}", row[f"{unit}_per_s"]
        cells = "".join(f"{row[key]:>12,.0f}" for key in more)
        print(f"{row['name']:<38}{row['speed']:>7.2f}x{quartiles:>18}{rate:>14,.0f}{cells}", flush=True)
