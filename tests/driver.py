"""
train.py with two things that tests need, each switched on by an environment variable.

    FLOAT64=1     compute in float64: no order of sums, hence no number of processes, changes what is worth comparing
    PAUSE_AT=100  wait before step 100 until out_dir/go is there: what a test does meanwhile, it does in time
"""

import os
import sys
import time
from pathlib import Path

import torch

import train


def pause_at(step, take_step):
    def paused(self):
        while self.iter_num == step and not Path(self.cfg.out_dir, "go").exists():
            time.sleep(0.005)
        return take_step(self)

    return paused


if __name__ == "__main__":
    if os.environ.get("FLOAT64"):
        torch.set_default_dtype(torch.float64)
    if at := os.environ.get("PAUSE_AT"):
        train.Trainer.step = pause_at(int(at), train.Trainer.step)
    train.main(sys.argv[1:])
