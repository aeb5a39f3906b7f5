"""
The data set that train.py reads: one long text, several of them mixed, or rows that ask questions.

The windows that a step reads are a pure function of (seed, step), so that resuming, accumulating gradients or adding
processes never repeats or skips a window.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT
from data.corpus import DataError, check_identity, load_meta, open_split, open_targets, same_tokenizer

TRAIN, TRAIN_LOSS, VAL_LOSS = range(3)  # independent streams of random windows


class TokenDataset:
    """The token files of a data set. DataError for data that cannot be used for training."""

    has_questions = False  # whether targets are answers, of which the share that is right is worth a line

    def __init__(self, cfg):
        self.folder = folder_of(cfg)
        self.meta = load_meta(self.folder)
        self.splits = {split: open_split(self.folder, split, self.meta) for split in ("train", "val")}
        self.id = check_identity(self.folder, self.meta)
        self.seed = cfg.seed

    def check(self, block_size, vocab_size):
        """Refuse, before any long work, a split shorter than a block or with a token the model does not know."""
        for split, tokens in self.splits.items():
            if len(tokens) <= block_size:
                raise DataError(f"{self.folder}/{split}.bin: {len(tokens)} tokens, too few for block_size={block_size}")
            self.check_ids(tokens[: 1 << 26], vocab_size)  # every batch is checked again as it is read

    def check_ids(self, tokens, vocab_size):
        if tokens.max() >= vocab_size:
            raise DataError(f"{self.folder}: token id {tokens.max()} does not fit vocab_size={vocab_size}; raise it")

    def windows(self, stream, step, count, block_size):
        """Random window starts, (count,) int64, of one step of one stream."""
        tokens = self.splits["val" if stream == VAL_LOSS else "train"]
        return np.random.default_rng((self.seed, stream, step)).integers(0, len(tokens) - block_size, count)

    def batch(self, split, starts, config, device):
        """Inputs and targets (len(starts), block_size) int64 on `device`, for a model of GPTConfig `config`."""
        tokens = self.splits[split][starts[:, None] + np.arange(config.block_size + 1)]
        self.check_ids(tokens, config.vocab_size)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return to_device(tokens[:, :-1], device), to_device(tokens[:, 1:], device)

    def val_windows(self, batch_size, config, device, rank, world_size):
        """The whole val split in windows that do not overlap, this rank's share: pairs as from `batch`.

        All have the same shape: positions beyond the end are padded, with targets -1.
        """
        tokens, T = self.splits["val"], config.block_size
        for start in range(rank * batch_size * T, len(tokens) - 1, world_size * batch_size * T):
            piece = tokens[start : start + batch_size * T + 1].astype(np.int64)
            self.check_ids(piece, config.vocab_size)
            x, y = np.zeros(batch_size * T, np.int64), np.full(batch_size * T, -1)
            x[: len(piece) - 1], y[: len(piece) - 1] = piece[:-1], piece[1:]
            rows = -(-(len(piece) - 1) // T)
            x, y = (torch.from_numpy(a).view(batch_size, T)[:rows] for a in (x, y))
            yield to_device(x, device), to_device(y, device)


class RowDataset(TokenDataset):
    """Rows of tokens with targets of their own: a step reads whole rows, and starts are those of rows."""

    has_questions = True

    def __init__(self, cfg):
        meta = load_meta(folder_of(cfg))
        self.T, splits = meta["row_tokens"], ("train", "val")
        self.targets = {split: open_targets(folder_of(cfg), split, meta) for split in splits}
        super().__init__(cfg)
        if cfg.curriculum:
            raise DataError(f"{self.folder}: its rows are whole, --curriculum would cut their questions off")

    def check(self, block_size, vocab_size):
        if block_size != self.T:
            raise DataError(f"{self.folder}: rows of {self.T} tokens, not {block_size}; set --block_size={self.T}")
        super().check(block_size - 1, vocab_size)  # a row needs no token after it

    def windows(self, stream, step, count, block_size):
        rows = len(self.splits["val" if stream == VAL_LOSS else "train"]) // self.T
        return np.random.default_rng((self.seed, stream, step)).integers(0, rows, count) * self.T

    def batch(self, split, starts, config, device):
        at = starts[:, None] + np.arange(self.T)
        pair = self.splits[split][at], self.targets[split][at]
        for ids in pair:
            self.check_ids(ids, config.vocab_size)
        return tuple(to_device(torch.from_numpy(ids.astype(np.int64)), device) for ids in pair)

    def val_windows(self, batch_size, config, device, rank, world_size):
        starts = np.arange(0, len(self.splits["val"]), self.T)
        for first in range(rank * batch_size, len(starts), world_size * batch_size):
            yield self.batch("val", starts[first : first + batch_size], config, device)


class Mixture(TokenDataset):
    """Several texts, each window from one of them by chance: "a:0.7,b:0.3". Their val splits are read one by one."""

    def __init__(self, cfg):
        shares = shares_of(cfg.dataset)
        self.parts = [TokenDataset(replace(cfg, dataset=name)) for name in shares]
        for name, part in zip(shares, self.parts):
            if not same_tokenizer(part.meta, self.parts[0].meta) or "row_tokens" in part.meta:
                raise DataError(f"--dataset={cfg.dataset}: {name} is not text in the tokens of {next(iter(shares))}")
        self.weights = np.array(list(shares.values())) / sum(shares.values())
        self.folder, self.seed = self.parts[0].folder, cfg.seed
        self.ends = {split: np.cumsum([len(part.splits[split]) for part in self.parts]) for split in ("train", "val")}
        self.splits = {split: range(ends[-1]) for split, ends in self.ends.items()}  # only lengths are read
        sums = {key: sum(part.meta.get(key, 0) for part in self.parts)
                for key in ("train_tokens", "val_tokens", "train_bytes", "val_bytes")}  # fmt: skip
        self.meta = self.parts[0].meta | (sums if all(part.meta for part in self.parts) else {})
        self.id = hashlib.sha256(" ".join([*(part.id for part in self.parts), str(self.weights)]).encode()).hexdigest()

    def check(self, block_size, vocab_size):
        for part in self.parts:
            part.check(block_size, vocab_size)

    def windows(self, stream, step, count, block_size):
        """Starts in the texts one behind the other, as (count,) int64."""
        split, rng = "val" if stream == VAL_LOSS else "train", np.random.default_rng((self.seed, stream, step))
        which = rng.choice(len(self.parts), count, p=self.weights)
        lengths = np.array([len(part.splits[split]) for part in self.parts])
        return self.ends[split][which] - lengths[which] + rng.integers(0, lengths[which] - block_size)

    def batch(self, split, starts, config, device):
        which = np.searchsorted(self.ends[split], starts, side="right")
        rows = torch.empty(2, len(starts), config.block_size, dtype=torch.int64)
        for k, part in enumerate(self.parts):
            mine = np.flatnonzero(which == k)
            if len(mine):
                own = starts[mine] - (self.ends[split][k] - len(part.splits[split]))
                rows[:, mine] = torch.stack(part.batch(split, own, config, "cpu"))
        return tuple(to_device(x, device) for x in rows)

    def val_windows(self, batch_size, config, device, rank, world_size):
        for part in self.parts:
            yield from part.val_windows(batch_size, config, device, rank, world_size)


def shares_of(dataset):
    """{name: weight} of "a:0.7,b:0.3"; {} for the name of one data set."""
    parts = [re.fullmatch(r"(.+):([\d.]+)", part.strip()) for part in dataset.split(",")]
    if not all(parts):
        return {}
    shares = {part[1]: float(part[2]) for part in parts}
    if len(shares) < len(parts) or not all(share > 0 for share in shares.values()):
        raise DataError(f"--dataset={dataset}: each name once, with a weight above 0")
    return shares


def open_dataset(cfg):
    """The data set that a TrainConfig names."""
    if shares_of(cfg.dataset):
        return Mixture(cfg)
    return (RowDataset if "row_tokens" in load_meta(folder_of(cfg)) else TokenDataset)(cfg)


def folder_of(cfg):
    """The data set's folder; of a mixture, that of its first part, for the tokenizer."""
    name = next(iter(shares_of(cfg.dataset)), cfg.dataset)
    return (Path(cfg.data_dir) if cfg.data_dir else ROOT / "data") / name


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else x.to(device)
