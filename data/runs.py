"""
The folder of a run: held by one process, kept apart from earlier runs, its metrics gone on with.

A run's files are ckpt.pt (best) and ckpt_last.pt, metrics.jsonl, run.json, and what trackers write.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from configurator import ConfigError
from data.files import is_alive, is_file, locked, replace_file

CHECKPOINTS = ("ckpt.pt", "ckpt_last.pt")
STABLE = "ckpt_stable.pt"  # in a run with several horizons, the state from before its last decay
RUN_FILES = (*CHECKPOINTS, STABLE, "ckpt.pt.bak", "ckpt_last.pt.bak", "metrics.jsonl", "metrics.jsonl.bak", "run.json")
RUN_FILES += ("tensorboard", "wandb")


def find_checkpoint(out_dir, best=False):
    """A run's last checkpoint, else its best, nanoGPT's only one; with `best` in the other order; or None."""
    paths = (Path(out_dir) / name for name in (CHECKPOINTS if best else reversed(CHECKPOINTS)))
    return next((path for path in paths if os.path.lexists(path)), None)


def hold(out_dir):
    """Keep every other run out of a folder while the body runs."""
    return locked(Path(out_dir) / "run.lock", "training", "wait for it, or choose another --out_dir")


def prepare_out_dir(out_dir, size):
    """Make out_dir, and refuse before any long work one that cannot hold checkpoints of `size` bytes."""
    folder = Path(out_dir)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
    except OSError as e:
        raise ConfigError(f"--out_dir={out_dir}: cannot be written ({e.strerror})") from e
    finally:
        if probe.exists():
            probe.unlink()
    for path in folder.glob("ckpt*.pt.*.tmp"):  # a killed run was writing them
        if not is_alive(int("0" + "".join(re.findall(r"\.(\d+)\.tmp$", path.name)))):
            path.unlink()
    there = sum(path.stat().st_size for path in map(folder.joinpath, CHECKPOINTS) if path.exists())
    free = shutil.disk_usage(folder).free + there
    if free < 3 * size:
        raise ConfigError(
            f"--out_dir={out_dir}: {free / 2**20:,.0f} MB free, but checkpoints (best, last, and the one being "
            f"written) need {3 * size / 2**20:,.0f} MB"
        )


def keep_previous(out_dir):
    """Move an earlier run's files into out_dir/previous-N, N the first that is free; where to, or None."""
    folder = Path(out_dir)
    found = [path for path in map(folder.joinpath, RUN_FILES) if os.path.lexists(path)]
    if not found:
        return None
    number = 1
    while os.path.lexists(folder / f"previous-{number}"):
        number += 1
    target = folder / f"previous-{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return target


def open_metrics(path, start):
    """metrics.jsonl, opened to go on at iteration `start`: what a killed run wrote beyond it is dropped.

    Damaged lines are moved to metrics.jsonl.bak and told on stderr; the good ones after them stay.
    """
    kept, damaged = [], []
    *lines, _ = path.read_bytes().split(b"\n") if start and is_file(path) else [b""]  # _: what a kill cut short
    for line in lines:
        try:
            step = json.loads(line.decode("utf-8"))["iter"]
            if type(step) is not int:
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged.append(line + b"\n")
            continue
        kept += [line + b"\n"] if step < start else []
    if damaged:
        with open(f"{path}.bak", "ab") as f:
            f.writelines(damaged)
        print(f"{path}: {len(damaged)} damaged line(s) moved to {path.name}.bak", file=sys.stderr)
    replace_file(path, b"".join(kept))
    return open(path, "a", encoding="utf-8")
