"""
A model on the tasks of lm-evaluation-harness, and the bits per byte of a text.

    python -m lab.evaluate --out_dir=OUT --tasks=mine --include_path=TASKS  # TASKS/mine.yaml, with JSONL beside it
    python -m lab.evaluate --init_from=DIR --tasks=mine --include_path=TASKS --limit=200  # a Hugging Face directory
    python -m lab.evaluate --out_dir=OUT --bits_per_byte=my.txt

Prints a table and writes evaluate.json into the run's folder. For its own tasks, such as lambada_openai, the harness
downloads the data; a task of yours needs no network. lab/harness.py does the work. Needs `pip install lm-eval`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import sample
from configurator import ConfigError, check_values
from data.corpus import DataError, decode_text
from data.files import is_file, replace_file
from model import CheckpointError
from train import pick_device, pick_dtype


@dataclass
class EvaluateConfig:
    """Which model, and what to ask it."""

    # -- model, as in sample.py ---------------------------------------------------------------------------------------
    init_from: str = "resume"  # "resume" (the checkpoint in out_dir) | "gpt2*" | a Hugging Face folder, ours too
    out_dir: str = "out"  # the run's folder
    checkpoint: str = ""  # a file in out_dir; empty = ckpt.pt (best), else ckpt_last.pt
    data_dir: str = ""  # where the data set lies, for its tokenizer; empty = as in training
    # -- tasks --------------------------------------------------------------------------------------------------------
    tasks: str = ""  # names of tasks or groups, comma-separated
    include_path: str = ""  # a folder of tasks in YAML
    num_fewshot: int | None = None  # solved examples before each question; None = as the task says
    limit: int | None = None  # only so many documents per task: for a trial, not for a result
    bits_per_byte: str = ""  # a text file, read in windows of block_size
    json: str = ""  # where results go; empty = evaluate.json in the run's folder, of other weights nowhere
    # -- system -------------------------------------------------------------------------------------------------------
    batch_size: int = 16  # rows per forward
    seed: int = 1337  # for few-shot examples and sampling
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1" | "mps"
    dtype: str = "float32"  # "auto" | "float32" | "bfloat16" | "float16": the weights are cast to it

    def __post_init__(self):
        check_values(self, {"batch_size limit": "[1, inf)", "num_fewshot": "[0, inf)", "seed": "[0, 2^63)"})
        if not (self.tasks or self.bits_per_byte):
            raise ValueError("nothing to evaluate: give --tasks=NAME,... or --bits_per_byte=FILE")


def import_harness():
    """lab.harness; ConfigError where lm-evaluation-harness is missing."""
    try:
        import lab.harness
    except ModuleNotFoundError as e:
        if not (e.name or "").startswith("lm_eval"):
            raise
        raise ConfigError("needs lm-evaluation-harness: pip install lm-eval") from None
    return lab.harness


def manager_of(names, include_path):
    """A TaskManager that knows the tasks; ConfigError for a name that it does not."""
    from lm_eval.tasks import TaskManager

    if include_path:
        if not Path(include_path).is_dir():
            raise ConfigError(f"--include_path={include_path}: is no folder")
        manager = TaskManager(include_path=include_path, include_defaults=False)  # reading all others takes a minute
        if all(manager.match_tasks([name]) for name in names):
            return manager
    manager = TaskManager(include_path=include_path or None)
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigError(f"--tasks: no task or group {name!r}; tasks of your own need --include_path")
    return manager


def on_tasks(lm, cfg):
    """The harness's results of the tasks."""
    from lm_eval import simple_evaluate

    names = [name.strip() for name in cfg.tasks.split(",") if name.strip()]
    manager = manager_of(names, cfg.include_path)
    return simple_evaluate(
        lm, tasks=names, num_fewshot=cfg.num_fewshot, limit=cfg.limit, task_manager=manager, batch_size=cfg.batch_size,
        log_samples=False, random_seed=cfg.seed, numpy_random_seed=cfg.seed, torch_random_seed=cfg.seed,
        fewshot_random_seed=cfg.seed,
    )  # fmt: skip


def bits_of(lm, path):
    """{"bits_per_byte", "bytes", "tokens"} of a text file."""
    if not is_file(path):
        raise ConfigError(f"--bits_per_byte={path}: there is no such file")
    text = decode_text(Path(path).read_bytes(), f"--bits_per_byte={path}:")
    if not text:
        raise ConfigError(f"--bits_per_byte={path}: is empty")
    bits, size, tokens = lm.bits_per_byte(text)
    return {"file": str(path), "bits_per_byte": bits, "bytes": size, "tokens": tokens}


def evaluate(cfg):
    """All that was asked for, as a dict of plain values."""
    harness = import_harness()
    model, tokenizer = sample.load(cfg)
    device, _ = pick_device(cfg.device)
    model = model.to(device, pick_dtype(cfg.dtype, device, model)[0])
    lm, found = harness.NanoChimeraLM(model, tokenizer, cfg.batch_size), {}
    if cfg.tasks:
        from lm_eval.utils import make_table

        results = on_tasks(lm, cfg)
        print(make_table(results))
        found = {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples")
                 if name in results}  # fmt: skip
    if cfg.bits_per_byte:
        found["text"] = bits_of(lm, cfg.bits_per_byte)
        print("{file}: {bits_per_byte:.4f} bits per byte ({bytes:,} bytes, {tokens:,} tokens)".format(**found["text"]))
    if lm.truncated:
        print(f"{lm.truncated} requests were longer than block_size={lm.max_length} and lost their first tokens")
    return found | {"truncated": lm.truncated, "asked": vars(cfg), "torch": torch.__version__}


def write(found, cfg):
    path = cfg.json or (str(Path(cfg.out_dir) / "evaluate.json") if cfg.init_from == "resume" else "")
    if path:
        replace_file(path, (json.dumps(found, indent=2, default=str) + "\n").encode())


def main(argv=None):
    with configurator.one_line_errors("lab.evaluate", CheckpointError, DataError, OSError):
        words = sys.argv[1:] if argv is None else argv
        settings = configurator.read(words, EvaluateConfig, doc=__doc__)
        settings = settings.expanded("out_dir", "data_dir", "init_from", "include_path", "bits_per_byte", "json")
        cfg = settings.build(EvaluateConfig)
        write(evaluate(cfg), cfg)


if __name__ == "__main__":
    main()
