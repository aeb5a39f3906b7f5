"""
What happens beyond the trained context? The loss of finished runs on windows of 1, 2 and 4 times their block_size.

    python -m lab.lengths out-rope out-waves --image=docs/img/lengths.png

Each run is measured on the val split of its own data, in windows that do not overlap. "all" is the mean over a window,
"last" that over its last block_size positions, which is what a longer context is for. A model without a learned
position table is simply run on more tokens; its cells go on from the last anchor. One with a table has no rows there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import configurator
from configurator import ROOT, ConfigError
from data.corpus import DataError, load_meta, open_split
from data.runs import find_checkpoint
from lab.pictures import png, pyplot
from model import GPT, CheckpointError, load_checkpoint


@dataclass
class LengthsConfig:
    """How much to read, and where the picture goes."""

    # -- lengths ------------------------------------------------------------------------------------------------------
    longest: int = 4  # up to this many times the block_size, doubling
    tokens: int = 65_536  # how many tokens of the val split are read, at most
    data_dir: str = ""  # where data sets lie; empty = as in training
    image: str = ""  # a PNG of the table; empty = none

    def __post_init__(self):
        configurator.check_values(self, {"longest tokens": "[1, inf)"})


@torch.no_grad()
def loss_at(model, tokens, T):
    """(mean loss over windows of T tokens, mean over their last block_size positions) in nats per token."""
    block = model.config.block_size
    rows = (len(tokens) - 1) // T
    x, y = tokens[: rows * T].view(rows, T), tokens[1 : rows * T + 1].view(rows, T)
    if block < T and model.max_positions is not None:
        model.extend_block_size(T)
    losses = []
    for i in range(0, rows, max(1, 4096 // T)):
        a, b = x[i : i + max(1, 4096 // T)], y[i : i + max(1, 4096 // T)]
        logits, _ = model(a, b)
        each = F.cross_entropy(logits.flatten(0, 1).float(), b.flatten(), reduction="none")  # log-probabilities too
        losses.append(each.view(b.shape).mean(0) * len(b))
    model.crop_block_size(block)
    mean = torch.stack(losses).sum(0) / rows  # by position
    return mean.mean().item(), mean[-block:].mean().item()


def open_run(folder, data_dir=""):
    """(the model of a run's best checkpoint, for evaluation, the folder of its data). ConfigError without one."""
    path = find_checkpoint(folder, best=True)
    if path is None:
        raise ConfigError(f"{folder}: no checkpoint there")
    checkpoint = load_checkpoint(path)
    trained = checkpoint.get("config", {})
    data = Path(data_dir or trained.get("data_dir") or ROOT / "data") / trained.get("dataset", "")
    return GPT.from_checkpoint(checkpoint).eval(), data


def measure(folder, cfg):
    """{length: (all, last)} of a run's best checkpoint."""
    model, data = open_run(folder, cfg.data_dir)
    tokens = torch.from_numpy(open_split(data, "val", load_meta(data))[: cfg.tokens].astype("int64"))
    found, T = {}, model.config.block_size
    while cfg.longest * model.config.block_size >= T and len(tokens) > T:
        if model.config.block_size < T and model.config.pos_embedding == "learned":
            break
        found[T] = loss_at(model, tokens, T)
        T *= 2
    return found


def picture(results):
    """Loss of the last positions against the length of the window, one line per run."""
    figure, axes = pyplot().subplots(figsize=(6, 4), layout="constrained")
    for name, found in results.items():
        axes.plot(list(found), [last for _, last in found.values()], marker="o", label=name)
    lengths = sorted({T for found in results.values() for T in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(str, lengths))
    axes.set(xlabel="tokens in the window", ylabel="nats per token", title="Loss of the last block of a window")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def table(results):
    """The figures as a Markdown table."""
    lengths = sorted({T for found in results.values() for T in found})
    head = "| run | " + " | ".join(f"{T}: all, last" for T in lengths) + " |"
    rows = [
        f"| {name} | " + " | ".join("{:.3f}, {:.3f}".format(*found[T]) if T in found else "" for T in lengths) + " |"
        for name, found in results.items()
    ]
    return "\n".join([head, "| --- |" + " --- |" * len(lengths), *rows])


def main(argv=None):
    with configurator.one_line_errors("lab.lengths", CheckpointError, DataError, OSError):
        words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        folders = [word for word in words if not word.startswith("-")]
        cfg = configurator.read([w for w in words if w.startswith("-")], LengthsConfig, doc=__doc__).build(
            LengthsConfig
        )
        if not folders:
            raise ConfigError("name the folders of finished runs")
        results = {Path(folder).name: measure(folder, cfg) for folder in folders}
        print(table(results))
        if cfg.image:
            Path(cfg.image).write_bytes(png(picture(results)))


if __name__ == "__main__":
    main()
