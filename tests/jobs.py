"""What the tests of several processes share: jobs of torchrun, and runs whose numbers must be equal to theirs."""

import re
import sys
from pathlib import Path

import pytest
import torch

from helpers import PATIENCE, TIMING, history, run_here
from model import load_checkpoint

FOUR = {"gradient_accumulation_steps": 4, "max_iters": 6, "eval_interval": 3, "eval_full": True}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENDLESS = FOUR | {"max_iters": 100_000, "eval_interval": 20, "log_interval": 1}


def finish(process):
    """(exit status, stdout, stderr) of a job that must end by itself: well before gloo gives up, after half an hour."""
    stdout, stderr = process.communicate(timeout=PATIENCE)
    return process.returncode, stdout, stderr


def workers(process):
    """{pid: rank} of the training processes of a torchrun, from /proc."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"^PPid:\t(\d+)", (folder / "status").read_text(), re.M)[1])
            if parent == process.pid:
                found[int(folder.name)] = int(re.search(rb"\0RANK=(\d+)", (folder / "environ").read_bytes())[1])
        except (OSError, TypeError):
            continue  # it ended meanwhile, or is none of ours
    return found


def weights(out):
    return load_checkpoint(out / "ckpt_last.pt")["model"]


def run_alone(*words):
    """Exit status of a run in this process and in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return run_here(*words)
    finally:
        torch.set_default_dtype(torch.float32)


def assert_close(a, b):
    """In float64, gradients of the same batch differ by about 1e-17, and AdamW divides them by 1e-8 or more."""
    for x, y in zip(history(a, TIMING), history(b, TIMING), strict=True):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-9)
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and {x.dtype for x in a.values()} == {torch.float64}
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-9
