"""
The token data set that train.py reads.

The windows that a step reads are a pure function of (seed, step), so that resuming, accumulating gradients or adding
processes never repeats or skips a window.
"""

from pathlib import Path

import numpy as np
import torch

from configurator import ROOT
from data.corpus import DataError, check_identity, load_meta, open_split

TRAIN, TRAIN_LOSS, VAL_LOSS = range(3)  # independent streams of random windows


class TokenDataset:
    """The token files of a data set. DataError for data that cannot be used for training."""

    def __init__(self, cfg):
        self.folder = (Path(cfg.data_dir) if cfg.data_dir else ROOT / "data") / cfg.dataset
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


def to_device(x, device):
    return x.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else x.to(device)
