"""
Where in real text does a model lose or win? The loss of a run's best checkpoint on slices of its val split.

    python -m lab.slices --out_dir=out-ablation/fhn/lr0.003-seed0 --against=out-ablation/baseline/lr0.003-seed0

Windows of block_size tokens that do not overlap, and in them: positions in bins; recall hits, that is tokens that
complete a gram seen earlier in the window (5 characters or bytes, 2 tokens of a larger vocabulary), frequent or rare in
train.bin; and, as a whole, the same windows with their tokens shuffled, where only the frequency of words can be known.
With --against: the other run on the same windows, the gain over it, and the share of the whole gain that each slice
brings. Most of what attention gains on recurrences is recall (Arora et al. 2023, arXiv 2312.04927).
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

import configurator
from configurator import ConfigError, check_values
from data.corpus import DataError, load_meta, open_split
from lab.ablate import markdown
from lab.lengths import open_run
from model import CheckpointError


@dataclass
class SlicesConfig:
    """Which runs, and how much to read."""

    # -- slices -------------------------------------------------------------------------------------------------------
    out_dir: str = "out"  # the run's folder
    against: str = ""  # another run on the same data, whose loss minus this run's is the gain
    tokens: int = 65_536  # how many tokens of the val split are read, at most
    gram: int | None = None  # tokens of a gram, the completed one included; None = 5, or 2 from 1,000 token ids on
    frequent: int = 10  # a gram is frequent if train.bin has it at least this many times, else rare
    train_tokens: int = 20_000_000  # most tokens of train.bin in which grams are counted
    seed: int = 0  # for the order of tokens in shuffled windows
    data_dir: str = ""  # where data sets lie; empty = as in training

    def __post_init__(self):
        check_values(self, {"tokens frequent train_tokens": "[1, inf)", "gram": "[2, inf)", "seed": "[0, 2^63)"})


def codes(tokens, gram, vocab_size):
    """A number for each gram along the last axis of `tokens` (..., N): (..., N - gram + 1), equal for equal grams."""
    count = tokens.shape[-1] - gram + 1
    found = np.zeros((*tokens.shape[:-1], max(count, 0)), np.int64)
    for i in range(gram):
        found = found * vocab_size + tokens[..., i : i + max(count, 0)]
    return found


def seen_before(grams):
    """Whether each gram of (rows, n) stands earlier in its row."""
    row = np.arange(len(grams))[:, None].repeat(grams.shape[1], 1)
    pairs = np.stack((row.ravel(), grams.ravel()))
    _, first = np.unique(pairs, axis=1, return_index=True)
    again = np.ones(grams.size, bool)
    again[first] = False
    return again.reshape(grams.shape)


def counts_in(tokens, grams, gram, vocab_size):
    """How often each of `grams` stands in a text of tokens (N,)."""
    known, counts = np.unique(codes(tokens.astype(np.int64), gram, vocab_size), return_counts=True)
    if not len(known):
        return np.zeros(grams.shape, np.int64)
    at = np.searchsorted(known, grams).clip(max=len(known) - 1)
    return np.where(known[at] == grams, counts[at], 0)


def bins(T):
    """{name: positions} of a window of T: 1-8, 9-32, 33-128, ..., each four times as far."""
    found, start, end = {}, 0, 8
    while start < T:
        found[f"positions {start + 1} to {min(end, T)}"] = slice(start, min(end, T))
        start, end = end, 4 * end
    return found


def slices_of(windows, train, cfg, gram, vocab_size):
    """{name: bool (rows, T)}, which targets of windows (rows, T + 1) are in the slice."""
    grams = codes(windows, gram, vocab_size)  # the last one ends at the last target
    hit = np.zeros((len(windows), windows.shape[1]), bool)
    hit[:, gram - 1 :] = seen_before(grams)
    often = np.zeros_like(hit)
    often[:, gram - 1 :] = counts_in(train, grams, gram, vocab_size) >= cfg.frequent
    hit, often = hit[:, 1:], often[:, 1:]
    found = {"all": np.ones_like(hit)}
    for name, positions in bins(hit.shape[1]).items():
        found[name] = np.zeros_like(hit)
        found[name][:, positions] = True
    return found | {"recall hits": hit, "frequent hits": hit & often, "rare hits": hit & ~often, "no hits": ~hit}


@torch.no_grad()
def losses_on(model, windows):
    """The loss of each target of windows (rows, T + 1): (rows, T), nats."""
    found, tokens = [], torch.from_numpy(windows)
    for part in tokens.split(max(1, 4096 // tokens.size(1))):
        x, y = part[:, :-1], part[:, 1:]
        logits = model(x, y)[0].float()
        found.append(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape))
    return torch.cat(found).double().numpy()


def shuffled(windows, seed):
    """The windows, each with its tokens in random order."""
    return np.random.default_rng(seed).permuted(windows, axis=1)


def line(name, share, ours, other, whole):
    """A line of the table: the slice's share of the tokens, losses (n,), and its share of the sum of gains `whole`."""
    cells = {"slice": name, "tokens": "" if share is None else f"{share:.1%}", "loss": mean(ours)}
    if other is not None:
        gain = other - ours
        cells |= {"against": mean(other), "gain": f"{gain.mean():+.4f}" if len(gain) else ""}
        cells["share of the gain"] = "" if share is None or not whole else f"{gain.sum() / whole:.1%}"
    return {key: (text, None) for key, text in cells.items()}


def mean(losses):
    return f"{losses.mean():.4f}" if len(losses) else ""


def measure(cfg):
    """Lines of the table."""
    runs = [open_run(folder, cfg.data_dir) for folder in (cfg.out_dir, cfg.against) if folder]
    models, folders = zip(*runs)
    if len(set(folders)) > 1:
        raise ConfigError(f"--against={cfg.against}: was trained on {folders[1]}, not on {folders[0]}")
    meta, T = load_meta(folders[0]), min(model.config.block_size for model in models)
    if "row_tokens" in meta:
        raise ConfigError(f"{folders[0]}: rows that ask questions, not text; see python -m lab.skills")
    vocab_size = max(model.config.vocab_size for model in models)
    gram = cfg.gram or (5 if vocab_size < 1000 else 2)
    if vocab_size**gram >= 2**63:
        raise ConfigError(f"--gram={gram}: too long for {vocab_size} token ids; lower it")
    tokens = open_split(folders[0], "val", meta)[: cfg.tokens].astype(np.int64)
    rows = (len(tokens) - 1) // T
    if not rows:
        raise ConfigError(f"--tokens={len(tokens)}: a window takes {T + 1}")
    windows = np.stack([tokens[i * T : i * T + T + 1] for i in range(rows)])
    train = open_split(folders[0], "train", meta)[: cfg.train_tokens]
    mixed = shuffled(windows, cfg.seed)
    each, each_mixed = ([losses_on(model, part) for model in models] for part in (windows, mixed))
    whole = (each[1] - each[0]).sum() if len(models) > 1 else 0.0
    lines = []
    for name, chosen in slices_of(windows, train, cfg, gram, vocab_size).items():
        ours, other = ([*(losses[chosen] for losses in each), None])[:2]
        lines.append(line(name, chosen.mean(), ours, other, whole))
    ours, other = ([*(losses.ravel() for losses in each_mixed), None])[:2]
    return [*lines, line("shuffled windows", None, ours, other, 0.0)]


def main(argv=None):
    with configurator.one_line_errors("lab.slices", CheckpointError, DataError, OSError):
        words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        cfg = configurator.read(words, SlicesConfig, doc=__doc__).build(SlicesConfig)
        print(markdown(measure(cfg)))


if __name__ == "__main__":
    main()
