"""
Prepare data/skills/TASK: rows of a synthetic skill, with targets where something is asked, for train.py.

    python data/skills/prepare.py mqar                      # then: python train.py --dataset=skills/mqar
    python data/skills/prepare.py mqar --T=256 --n=16 --out_dir=data/skills/mqar_256

tasks.py says what each task asks, and which of the settings below it has.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

import configurator
from configurator import ConfigError, check_values, expand
from data.corpus import write_rows
from data.skills import tasks

HERE = Path(__file__).resolve().parent


@dataclass
class RowsConfig:
    """How many rows, from which seed, and where to."""

    # -- rows ---------------------------------------------------------------------------------------------------------
    rows: int = 100_000  # rows of the train split
    val_rows: int = 1_000  # rows of the val split
    seed: int = 0  # for both splits, which are drawn one after the other
    out_dir: str | None = None  # where the data set goes; None: the task's name beside this script

    def __post_init__(self):
        check_values(self, {"rows val_rows": "[1, inf)", "seed": "[0, 2^63)"})


@dataclass
class TaskConfig:
    """The settings of all tasks; None is the task's own default."""

    # -- the task's setting -------------------------------------------------------------------------------------------
    T: int | None = None  # tokens per row
    n: int | None = None  # pairs, motifs, words to copy, or words of the cycle
    vocab_size: int | None = None  # token ids
    a: float | None = None  # mqar: exponent of the distances between a pair and its question
    keys: int | None = None  # far_recall: possible keys
    noise: float | None = None  # noisy_recall: share of the pairs that are noise
    noise_words: int | None = None  # noisy_recall: ids that are noise
    shortest: int | None = None  # fuzzy_recall: tokens of the shortest motif
    longest: int | None = None  # fuzzy_recall: tokens of the longest motif
    map_seed: int | None = None  # memorisation: seed of the map
    k: int | None = None  # depo: most hops
    questions: int | None = None  # depo: questions per row
    modulus: int | None = None  # mano: of the arithmetic
    operators: int | None = None  # mano: most operators per expression

    def __post_init__(self):
        check_values(self, {"map_seed": "[0, 2^63)"})


def prepare(task, setting, out_dir, rows=100_000, val_rows=1_000, seed=0):
    """Write a task's data set, the given part of its setting changed; returns its meta. ConfigError for a wrong one."""
    rng = np.random.default_rng(seed)
    try:
        setting = tasks.setting_of(task, **setting)
        made = {split: tasks.TASKS[task](rng, n, **setting) for split, n in (("train", rows), ("val", val_rows))}
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return write_rows(out_dir, made, tasks.vocab_size(task, **setting), task, setting, seed)


def main(argv=None):
    with configurator.one_line_errors("prepare.py", OSError):
        task, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
        settings = configurator.read(
            [task, *words] if task.startswith("-") else words, RowsConfig, TaskConfig, doc=__doc__
        )
        if task not in tasks.TASKS:
            raise ConfigError(f"{task}: expected a task first, one of {', '.join(tasks.TASKS)}")
        cfg, given = settings.build(RowsConfig), settings.build(TaskConfig)
        setting = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) is not None}
        out_dir = Path(expand(cfg.out_dir)) if cfg.out_dir else HERE / task
        meta = prepare(task, setting, out_dir, cfg.rows, cfg.val_rows, cfg.seed)
        told = ", ".join(f"{name} {value}" for name, value in meta["setting"].items())
        print(f"{task}: {told}; a random guess is right in {tasks.floor(task, **setting):.1%}")
        size = f"{meta['row_tokens']} tokens, {meta['vocab_size']:,} ids"
        print(f"{cfg.rows:,} + {cfg.val_rows:,} rows of {size} -> {out_dir}")


if __name__ == "__main__":
    main()
