"""
Which ideas help? Trains configs with several seeds and learning rates through train.py, and reports.

    python -m lab.ablate config/ablation/*.py --seeds=3 --tune --jobs=2
    python -m lab.ablate "no_rope: --pos_embedding=learned" config/ablation/baseline.py  # a row by its flags alone
    python -m lab.ablate config/ablation/bio_events.py "--grid=bio_threshold:0.1,0.25,0.4"  # a sweep: a row per value
    python -m lab.ablate --time      # each row's training step beside the baseline's, taking turns; trains nothing
    python -m lab.ablate --report    # tables in docs/results/, plots, a page that opens offline; trains nothing
    python -m lab.ablate --pictures  # what the ideas look like inside trained models; trains nothing

A run is OUT_DIR/ROW/lrX-seedY, ROW the config's name and X the learning rate (muon_lr under Muon); the next call
leaves finished runs alone, continues stopped ones and tries failed ones again. --report writes the results of finished
runs to docs/results/NAME.jsonl (NAME: OUT_DIR without out-), which is committed: a run of those records with the same
settings counts as finished too, so that a comparison can be spread over days and machines. Another recipe, with commas
between its files (--recipe=config/train_shakespeare_char_cpu.py,config/block_512.py), needs its own --out_dir.

Records say what made them: the code of the row's model and of the training loop, data, machine, number format,
versions. --report refuses to compare records of different sources or formats, or from before sources were recorded,
unless --mix is given, which the tables then say. All runs of a comparison have one number format: that of the finished
ones, else what train.py measures to be faster on the machine of the first.

--tune trains each row at its own best learning rate: with seed 0 at the recipe's rate, at 1.5 times and at 1/1.5 of
it, and further until a lower and a higher rate are worse than the best one; then with the other seeds at that one.
"""

import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Literal

import numpy as np

import configurator
from configurator import ROOT, ConfigError, check_values
from data.corpus import DataError, load_meta
from data.files import fcntl, replace_file
from data.progress import tqdm
from data.runs import STABLE
from lab import bench, identity, measure, pictures, stats
from lab.page import page, write_between_marks
from lab.pictures import COLOURS, LINES, TIGHT, png, pyplot
from model import GPT, GPTConfig
from train import TrainConfig, dtype_name, pick_device, pick_dtype


@dataclass
class AblateConfig:
    """What to train, where runs lie, and what to make of them."""

    # -- ablation -----------------------------------------------------------------------------------------------------
    recipe: str = "config/train_shakespeare_char_cpu.py"  # config files that come before each row's, with commas
    seeds: int = 3  # how many seeds, 0, 1, ..., per row
    max_iters: int | None = None  # steps of a run, its schedule included; None = the recipe's
    learning_rates: str = ""  # with commas; empty = the recipe's own
    tune: bool = False  # each row at its own best learning rate, bracketed with seed 0; begins at the rates above
    grid: str = ""  # a sweep, FLAG:VALUES;FLAG:...: each row with each combination of the values
    keep: Literal["one", "best", "last"] = "one"  # checkpoints: the best of seed 0 | every seed's best | last
    jobs: int = 1  # runs at a time; if more than one, with one thread each
    dtype: str = "auto"  # number format of all runs; auto: that of the finished ones, else measured once
    out_dir: str = "out-ablation"  # where runs lie
    time: bool = False  # measure the steps of finished rows that were not measured yet, and train nothing
    report: bool = False  # write the results of finished runs, and train nothing
    mix: bool = False  # compare records of different sources too, which the report then says
    pictures: bool = False  # draw ideas from checkpoints, and train nothing
    docs: str = "docs"  # where --report and --pictures write: results.md, a page named as out_dir, img/, results/

    def __post_init__(self):
        check_values(self, {"seeds jobs": "[1, inf)", "max_iters": "[0, inf)"})
        numbers("learning_rates", self.learning_rates)
        self.sweep = sweep_of(self.grid)

    @property
    def recipes(self):
        return [file.strip() for file in self.recipe.split(",") if file.strip()]

    @property
    def name(self):
        """What the report's marks, page and plots are called."""
        return Path(self.out_dir).name.removeprefix("out-")

    @property
    def records(self):
        """The file of committed records, one line per run."""
        return Path(self.docs) / "results" / f"{self.name}.jsonl"

    @property
    def timings(self):
        """The file of what --time measured."""
        return self.records.with_name(f"{self.name}-speed.json")


def sweep_of(text):
    """[(flag, [value, ...])] of "bio_threshold:0.1,0.4;bio_omega:1,2"; ValueError for a flag that there is not."""
    found = []
    for part in filter(None, text.split(";")):
        flag, _, values = part.strip().partition(":")
        if flag not in DEFAULTS or not values:
            raise ValueError(f"grid={part}: expected a model's flag, a colon, and values with commas between them")
        found.append((flag, [value.strip() for value in values.split(",")]))
    return found


def swept(rows, sweep):
    """The rows with each combination of the values: NAME_FLAG_VALUE, by its own words and those flags."""
    for flag, values in sweep:
        rows = {
            f"{row}_{flag}_{re.sub(r'[^0-9A-Za-z]', '_', value)}": f"{' '.join(words_of(config))} --{flag}={value}"
            for row, config in rows.items()
            for value in values
        }
    return rows


def numbers(name, text):
    """The positive floats in a comma-separated text."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name}={text}: expected numbers with commas between them") from None
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"{name}={text}: must be positive")
    return values


BASELINE = "baseline"
STEP = 1.5  # between the learning rates that --tune tries
MOST_RATES = 9  # that a row may try; if it has no bracket then, the report says so


# ---------------------------------------------------------------------------------------------------------------------
# A run: a folder with train.py's run.json, metrics.jsonl and checkpoints, and beside them ablate.json (what was asked
# for), train.log, failed.json (why, if it failed) and lock (held by whoever trains there).


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # not there, or cut short by a kill
        return None


class Run:
    """What is in OUT_DIR/ROW/lrX-seedY, or in a record of it; lrX-seedY-FORMAT: the same in another number format."""

    def __init__(self, folder):
        self.folder, self.row = Path(folder), Path(folder).parent.name
        lr, seed = Path(folder).name.removeprefix("lr").split("-seed")
        self.lr, self.seed = float(lr), int(seed.partition("-")[0])
        self.began = None  # when this process began to train it
        self.read()

    def read(self):
        self.asked, self.facts, self.failed = (
            read_json(self.folder / f"{name}.json") for name in ("ablate", "run", "failed")
        )
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        lines = [json.loads(line) for line in lines if line.endswith("}")]
        self.evaluations = [line for line in lines if line.get("val_loss") is not None]
        self.steps = [line for line in lines if "tokens_per_s" in line]

    def __str__(self):
        return f"{self.row} lr {self.lr:g} seed {self.seed}"

    @property
    def pair(self):
        """What pairs it with a run of another row: the seed, and the number format, which shifts a loss as a seed does.

        Records without a format are from when bfloat16 was what "auto" took.
        """
        return self.seed, self.facts.get("dtype") or "bfloat16"

    def record(self):
        """A line for the records: what was asked, what was built, what came out."""
        facts = {"config": {"max_iters": self.facts["config"]["max_iters"]}, "model_args": self.changed_args}
        kept = ("parameters", "git_commit", "device", "dtype", "data_id", "machine", "versions")
        facts |= {name: self.facts[name] for name in kept if name in self.facts}
        facts |= {"wall_s": wall} if (wall := self.wall_s) is not None else {}
        steps = [{"tokens_per_s": round(self.speed, 1), "memory_mb": self.memory_mb}]
        return {"asked": self.asked, "facts": facts, "evaluations": self.evaluations, "steps": steps}

    @property
    def wall_s(self):
        """Seconds that processes of train.py took for it; None where that was not recorded."""
        if "wall_s" in self.facts:
            return self.facts["wall_s"]
        return (read_json(self.folder / "wall.json") or {}).get("seconds")

    @property
    def changed_args(self):
        """The model's settings that are not GPTConfig's defaults."""
        return {k: v for k, v in self.facts["model_args"].items() if k in DEFAULTS and v != DEFAULTS[k]}

    def recall(self, record):
        """The run as a record describes it."""
        self.failed = None
        for name in ("asked", "facts", "evaluations", "steps"):
            setattr(self, name, record[name])
        return self

    @property
    def is_done(self):
        ended = bool(self.evaluations and self.facts and self.asked)
        return ended and not self.failed and self.evaluations[-1]["iter"] >= self.facts["config"]["max_iters"]

    @property
    def loss(self):
        """Nats per token on the whole val split, after the last step."""
        return self.evaluations[-1]["val_loss"]

    @property
    def speed(self):
        """Training tokens per second, median over all log lines except the first."""
        return statistics.median([line["tokens_per_s"] for line in self.steps[1:] or self.steps])

    @property
    def has_curve(self):
        """Whether it was evaluated often enough for a curve."""
        return len(self.evaluations) > 4

    def loss_at(self, step):
        """Loss after so many steps, linear between evaluations; at most the last one."""
        return float(np.interp(step, *zip(*((line["iter"], line["val_loss"]) for line in self.evaluations))))

    @property
    def memory_mb(self):
        return max((line["memory_mb"] for line in self.steps if line.get("memory_mb")), default=None)

    @property
    def measured(self):
        """What modules measured of themselves at the end: sparsity, link_density."""
        known = {"iter", "tokens", "train_loss", "val_loss", "val_bpb", "horizon"}
        return {k: v for k, v in self.evaluations[-1].items() if k not in known and "/" not in k}


DEFAULTS = {f.name: f.default for f in fields(GPTConfig)}


def folder_of(cfg, row, lr, seed):
    return Path(cfg.out_dir) / row / f"lr{lr:g}-seed{seed}"


def read_records(cfg):
    """{folder: record} of the committed runs; the second of two number formats has its own folder."""
    if not cfg.records.exists():
        return {}
    found = {}
    for record in map(json.loads, cfg.records.read_text(encoding="utf-8").splitlines()):
        folder = folder_of(cfg, *(record["asked"][k] for k in ("row", "learning_rate", "seed")))
        own = folder.with_name(f"{folder.name}-{record['facts'].get('dtype')}")
        found[own if folder in found else folder] = record
    return found


def find_runs(cfg):
    """All runs in out_dir, and those of the records that are not finished there, by row, learning rate and seed."""
    folders = [p for p in Path(cfg.out_dir).glob("*/lr*-seed*") if re.fullmatch(r"lr[\d.e+-]+-seed\d+(-\w+)?", p.name)]
    runs = {run.folder: run for run in map(Run, folders)}
    for folder, record in read_records(cfg).items():
        if folder not in runs or not runs[folder].is_done:
            runs[folder] = Run(folder).recall(record)
    return sorted(runs.values(), key=lambda run: (run.row, run.lr, run.seed, run.folder.name))


# ---------------------------------------------------------------------------------------------------------------------
# Training: a process of train.py for each run that is not finished.


def find_rows(files):
    """{row name: config file, or flags where the word is "NAME: --flag=value ..."}."""
    rows = {}
    for file in files:
        name, colon, words = file.partition(":")
        if colon and re.fullmatch(r"\w+", name) and name not in rows:
            rows[name] = words.strip()
            continue
        if not (Path(file).is_file() or (ROOT / file).is_file()):
            raise ConfigError(f"{file}: no such config file")
        if (row := Path(file).stem) in rows:
            raise ConfigError(f"{file} and {rows[row]} would both be the row {row}: rename one")
        rows[row] = file
    return rows


def command(cfg, config, lr, seed):
    """The words for train.py, but for where the run lies."""
    words = [*cfg.recipes, *words_of(config)]
    steps = [] if cfg.max_iters is None else [f"--max_iters={cfg.max_iters}", f"--lr_decay_iters={cfg.max_iters}"]
    return [*words, f"--{rate_flag(words)}={lr:g}", f"--seed={seed}", "--eval_full=True", *steps]


def words_of(config):
    """A row's own words for train.py: its config file, or the flags that stand in its place."""
    return [config] if config.endswith(".py") else shlex.split(config)


def rate_flag(words):
    """The learning rate that a comparison varies: that of the matrices in blocks."""
    try:
        return "muon_lr" if configurator.read(words, TrainConfig, GPTConfig).values["optimizer"] == "muon" else LR
    except ConfigError:  # train.py itself will report it
        return LR


LR = "learning_rate"


def learning_rates(cfg, recipe):
    """Those that were asked for, or the recipe's own."""
    own = configurator.read(recipe, TrainConfig, GPTConfig).values[rate_flag(recipe)]
    return numbers("learning_rates", cfg.learning_rates) or [own]


def resolve_all(words):
    """What configurator.read makes of them; None if they are wrong, which train.py itself will report."""
    try:
        return configurator.read(words, TrainConfig, GPTConfig)
    except ConfigError:
        return None


def resolve(words):
    """Every setting that `words` give; None if they are wrong."""
    if (settings := resolve_all(words)) is None:
        return None
    given = settings.given - {"out_dir", "init_from"}
    return json.loads(json.dumps({name: settings.values[name] for name in sorted(given)}))


def prepare(cfg, config, row, lr, seed):
    """The Run in its folder, or of the records. ConfigError if another run's results lie in the folder."""
    run = Run(folder_of(cfg, row, lr, seed))
    words = command(cfg, config, lr, seed)
    settings = resolve(words)
    record = read_records(cfg).get(run.folder)
    if record and not run.evaluations and record["asked"]["settings"] == settings:
        return run.recall(record)
    before = run.asked["settings"] if run.asked else None
    if run.evaluations and before and settings:
        was, now = ({k: x.get(k, "default") for k in before | settings} for x in (before, settings))
        if changed := ", ".join(f"{k}={was[k]}, not {now[k]}" for k in sorted(was) if was[k] != now[k]):
            raise ConfigError(f"{run.folder} holds a run with {changed}: move it away, or give --out_dir=NEW")
    if not run.is_done:
        run.asked = {"row": row, "config": config, "text": text_of(config), "flags": words,
                     "settings": settings, "seed": seed, "learning_rate": lr, "recipe": cfg.recipes,
                     "jobs": cfg.jobs, "source": None}  # fmt: skip
    return run


def source_of(words):
    """Which code makes a run of these words that starts now; None for words that train.py itself will refuse."""
    try:
        settings = configurator.read(words, TrainConfig, GPTConfig)
        cfg = settings.build(TrainConfig)
        vocab_size = load_meta((Path(cfg.data_dir) if cfg.data_dir else ROOT / "data") / cfg.dataset).get("vocab_size")
        given = "vocab_size" in settings.given or vocab_size is None
        config = settings.build(GPTConfig, **({} if given else {"vocab_size": vocab_size}))
    except (ConfigError, DataError):
        return None
    return identity.source(config, cfg.optimizer)


def text_of(config):
    """What a row's config file says, or its flags."""
    if not config.endswith(".py"):
        return config
    return (Path(config) if Path(config).is_file() else ROOT / config).read_text(encoding="utf-8")


def start(cfg, run):
    """A process that trains it, or None where another one is at it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "lock", "w") as lock, open(run.folder / "train.log", "a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child inherits it, and holds it as long as it lives
        except BlockingIOError:
            return None
        (run.folder / "failed.json").unlink(missing_ok=True)
        before = (read_json(run.folder / "ablate.json") or {}).get("source")
        run.asked["source"] = source_of(run.asked["flags"])
        replace_file(run.folder / "ablate.json", (json.dumps(run.asked, indent=2) + "\n").encode())
        how = "auto" if before == run.asked["source"] else "scratch"  # not half by one code, half by another
        words = [*run.asked["flags"], *format_flag(cfg, run), f"--out_dir={run.folder}", f"--init_from={how}"]
        run.began = time.monotonic()
        return Popen(
            [sys.executable, str(ROOT / "train.py"), *words], stdin=DEVNULL, stdout=log, stderr=log,
            env=os.environ | ({"OMP_NUM_THREADS": "1"} if cfg.jobs > 1 else {}), pass_fds=(lock.fileno(),),
        )  # fmt: skip


def format_flag(cfg, run):
    """--dtype of the whole comparison, where the run's own flags name none."""
    own = run.asked["settings"] or {}
    return [] if own.get("dtype", "auto") != "auto" else [f"--dtype={cfg.dtype}"]


def pick_format(cfg, rows):
    """Set cfg.dtype: what "auto" finds on another machine, or at another moment, may be another format."""
    if cfg.dtype != "auto":
        return
    found = Counter(run.facts.get("dtype") for run in find_runs(cfg) if run.is_done)
    found.pop(None, None)  # records from before formats were kept
    if found:
        cfg.dtype, why = found.most_common(1)[0][0], f"that of {found.most_common(1)[0][1]} finished runs"
    else:
        cfg.dtype, why = measured_format(cfg, rows)
    print(f"number format of all runs: {cfg.dtype}, {why}", flush=True)


def measured_format(cfg, rows):
    """(dtype, reason) that train.py would take here for the first row."""
    settings = resolve_all(command(cfg, next(iter(rows.values())), 1.0, 0))
    if settings is None:
        return "auto", "since the first row is wrong"
    device = pick_device(settings.values["device"])[0]
    try:
        model = GPT(settings.build(GPTConfig))
    except ConfigError:
        return "auto", "since the first row is refused"
    tokens = settings.values["batch_size"] * model.config.block_size
    dtype, why = pick_dtype(settings.values["dtype"], device, model, tokens)
    return dtype_name(dtype), why


def finish(cfg, run, status):
    """Read what an ended process left: mark a failure, delete what a success does not need. Returns a line on it."""
    wall = (read_json(run.folder / "wall.json") or {"seconds": 0.0})["seconds"] + time.monotonic() - run.began
    replace_file(run.folder / "wall.json", json.dumps({"seconds": round(wall, 1)}).encode())
    if status:
        last = (run.folder / "train.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        why = f"killed by signal {-status}" if status < 0 else (last or ["no output"])[0]
        replace_file(run.folder / "failed.json", json.dumps({"status": status, "error": why}).encode())
        return f"FAILED: {why}"
    run.read()
    if not run.is_done:
        return "stopped; the next call goes on with it"
    kept = {"one": "ckpt.pt" if run.seed == 0 else None, "best": "ckpt.pt", "last": "ckpt_last.pt"}[cfg.keep]
    for name in {"ckpt.pt", "ckpt_last.pt", STABLE} - {kept}:
        (run.folder / name).unlink(missing_ok=True)
    return f"val loss {run.loss:.4f}, {run.speed:,.0f} tokens/s"


class Queue:
    """How far a queue of runs is: a line per run that ended, and on a terminal a bar with the time that is left."""

    def __init__(self, total):
        self.total, self.count, self.trained, self.began = total, 0, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="run", disable=not (total and sys.stderr.isatty()), dynamic_ncols=True)

    def ended(self, run, told):
        """Show what became of a run; the time left is that of the runs so far, which no other process trained."""
        self.count += 1
        self.trained += run.began is not None
        line = f"[{self.count}/{self.total}] {run}: {told}"
        self.bar.update()
        if self.bar.disable:
            print(line + self.left, flush=True)
        else:
            self.bar.write(line)

    @property
    def left(self):
        """ "; about 12 min left", from the time per run so far, those at the same time included."""
        if not self.trained or self.count == self.total:
            return ""
        hours = (time.monotonic() - self.began) / self.trained * (self.total - self.count) / 3600
        return f"; about {hours:.1f} h left" if hours >= 1 else f"; about {math.ceil(60 * hours)} min left"


def train(cfg, runs):
    """Train those of `runs` that are not finished, cfg.jobs at a time."""
    unfinished, active = [run for run in runs if not run.is_done], {}
    waiting, queue = list(unfinished), Queue(len(unfinished))
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished before", flush=True)
    try:
        while waiting or active:
            while waiting and len(active) < cfg.jobs:
                run = waiting.pop(0)
                process = start(cfg, run)
                if process is None:
                    queue.ended(run, "is being trained by another process")
                else:
                    active[process] = run
            time.sleep(0.1)
            for process in [p for p in active if p.poll() is not None]:
                run = active.pop(process)
                queue.ended(run, finish(cfg, run, process.returncode))
    finally:  # Ctrl-C: runs save themselves
        for process in active:
            process.terminate()
        for process in active:
            process.wait()
        queue.bar.close()
    for run in unfinished:  # not those of the records, which have no folder
        run.read()


def complete(cfg, runs):
    """Train them, and wait for those that another process trains; what that one leaves unfinished is gone on with."""
    train(cfg, runs)
    while pending := [run for run in runs if not run.is_done and not run.failed]:
        for run in pending:
            with open(run.folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
            run.read()
        if left := [run for run in pending if not run.is_done and not run.failed]:
            train(cfg, left)


def tune(cfg, rows):
    """{row: its best learning rate with seed 0}, after training rates until a worse one lies on both sides."""
    start = learning_rates(cfg, cfg.recipes)
    tried = {row: {} for row in rows}
    for run in find_runs(cfg):
        if run.is_done and run.seed == 0 and run.row in rows:
            tried[run.row][run.lr] = run.loss
    while wanted := [(row, lr) for row in rows for lr in rates_to_try(tried[row], start)]:
        runs = [prepare(cfg, rows[row], row, lr, 0) for row, lr in wanted]
        complete(cfg, runs)
        for run in runs:
            tried[run.row][run.lr] = run.loss if run.is_done else math.inf
    return {row: min(tried[row], key=tried[row].get) for row in rows if tried[row]}


def rates_to_try(tried, start, step=STEP):
    """
    The next learning rates, given {rate: loss} of those tried: `start` and its neighbours, then a step beyond the best
    while it lies at an edge. Empty once a worse rate lies on both sides, or when nothing trains.
    """
    if missing := [lr for lr in start if lr not in tried]:
        return missing
    best = min(tried, key=tried.get)
    if math.isinf(tried[best]) or len(tried) >= MOST_RATES:
        return []
    lower = [] if min(tried) < best else [best / step]
    higher = [] if max(tried) > best else [best * step]
    return [float(f"{lr:.1e}") for lr in lower + higher]


def best_rates(runs):
    """{row: {"lr", "losses", "is_bracketed"}}: the learning rate with the lowest mean loss, of those with most seeds.

    "losses" are the means at every rate that was tried; bracketed is the best one if a lower and a higher one are worse
    on the seeds that they share with it. Empty where no row was trained at more than one rate.
    """
    tried = {}
    for run in runs:
        if run.is_done:
            tried.setdefault(run.row, {}).setdefault(run.lr, {}).setdefault(run.seed, []).append(run.loss)
    if all(len(rates) == 1 for rates in tried.values()):
        return {}
    found = {}
    for row, rates in tried.items():
        rates = {lr: {seed: statistics.fmean(each) for seed, each in seeds.items()} for lr, seeds in rates.items()}
        most = max(map(len, rates.values()))
        losses = {lr: statistics.fmean(each.values()) for lr, each in rates.items()}
        best = min((lr for lr in rates if len(rates[lr]) == most), key=losses.get)
        sides = {lr < best for lr in rates if is_worse(rates[lr], rates[best])}
        found[row] = {"lr": best, "losses": losses, "is_bracketed": sides == {True, False}}
    return found


def is_worse(losses, best):
    """Whether {seed: loss} is worse than another on the seeds that both have."""
    common = losses.keys() & best.keys()
    return bool(common) and sum(losses[seed] for seed in common) > sum(best[seed] for seed in common)


def train_rows(cfg, rows):
    """Train all that was asked for; True if nothing failed."""
    pick_format(cfg, rows)
    if cfg.tune:
        wanted = list(tune(cfg, rows).items())
    else:
        wanted = [(row, lr) for row in rows for lr in learning_rates(cfg, cfg.recipes)]
    todo = [prepare(cfg, rows[row], row, lr, seed) for seed in range(cfg.seeds) for row, lr in wanted]
    train(cfg, todo)
    failed = [run for run in todo if run.failed]
    for run in failed:
        print(f"failed: {run}: {run.failed['error']}")
    print(f"{sum(run.is_done for run in todo)} of {len(todo)} runs finished, {len(failed)} failed")
    return not failed


# ---------------------------------------------------------------------------------------------------------------------
# Statistics: mean and standard deviation over seeds, and the difference to the baseline with a 95 % interval.

LEAST_SEEDS = 3  # for a verdict
SCREEN_Q = 0.1  # share of false ones among what a screening calls different


@dataclass
class Difference:
    """Mean loss minus the baseline's, +- half; kind "paired", "Welch", or "one seed", which has no interval.

    p: two-sided; n: pairs, or seeds of the smaller group.
    """

    mean: float
    half: float | None
    kind: str
    p: float | None = None
    n: int = 1

    def __str__(self):
        return f"{self.mean:+.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    @property
    def is_judged(self):
        """Whether there are seeds enough for a verdict."""
        return self.half is not None and self.n >= LEAST_SEEDS

    @property
    def verdict(self):
        """better or worse, with the kind of interval that says so; of three seeds or more."""
        if self.half is None:
            return self.kind
        if not self.is_judged:
            return f"{self.n} seeds"
        return "" if abs(self.mean) <= self.half else ("better" if self.mean < 0 else "worse") + f" ({self.kind})"


def difference(losses, base):
    """{pair: loss} minus {pair: loss}: paired over common seeds if there are two or more, else Welch's, else without an
    interval. pair: a seed, or what else two runs share."""
    common = sorted(losses.keys() & base.keys())
    if len(common) >= 2:
        found = stats.paired([losses[seed] for seed in common], [base[seed] for seed in common])
        kind, n = "paired", len(common)
    elif min(len(losses), len(base)) >= 2:
        found, kind = stats.welch(list(losses.values()), list(base.values())), "Welch"
        n = min(len(losses), len(base))
    else:
        return Difference(statistics.fmean(losses.values()) - statistics.fmean(base.values()), None, "one seed")
    mean, low, high, p = found
    return Difference(mean, (high - low) / 2, kind, p, n)


def family(gaps):
    """{row: {"holm", "bh", "verdict"}} of a family of comparisons {row: Difference}, those of three seeds or more.

    "better" and "worse" need Holm's p below 0.05: any false one in the table is then that unlikely. "screened" ones
    pass Benjamini and Hochberg's q of 0.1 alone: worth more seeds, no result.
    """
    judged = [row for row, gap in gaps.items() if gap.is_judged]
    ps = [gaps[row].p for row in judged]
    found = {}
    for row, holm, bh in zip(judged, stats.holm(ps), stats.benjamini_hochberg(ps)):
        side = "better" if gaps[row].mean < 0 else "worse"
        verdict = side if holm < 0.05 else f"screened: {side}" if bh <= SCREEN_Q else ""
        found[row] = {"holm": holm, "bh": bh, "verdict": verdict}
    return found


def smallest_effect(gaps):
    """A sentence on what a table of {row: Difference} could tell from nothing."""
    halves = [gap.half for gap in gaps.values() if gap.is_judged]
    if not halves:
        return "No row has the three seeds that a verdict needs."
    return (
        f"Smallest effect that this table could see: {statistics.median(halves):.4f} nats (the median half-width of "
        f"the 95 % intervals of its {len(halves)} rows with three seeds or more, {min(halves):.4f} to "
        f"{max(halves):.4f})."
    )


def mean_std(values):
    values = list(values)
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# The report. A column of results is {row: finished runs} at one learning rate. A table is a list of its lines, each a
# dict from a header to (the text shown, the number to sort by).


def columns_of(cfg, runs):
    """{column name: {row: finished runs}}: each learning rate that was asked for, and "tuned", each row's best."""
    done = [run for run in runs if run.is_done]
    if not done:
        raise ConfigError(f"{cfg.out_dir}: no finished runs; train some first")
    fixed = learning_rates(cfg, done[0].asked["recipe"])
    wanted = {f"lr {lr:g}": dict.fromkeys((run.row for run in done), lr) for lr in fixed}
    wanted["tuned"] = {row: found["lr"] for row, found in best_rates(runs).items()}
    columns = {}
    for run in done:
        for name, lr_of in wanted.items():
            if run.lr == lr_of.get(run.row):
                columns.setdefault(name, {}).setdefault(run.row, []).append(run)
    return {name: columns[name] for name in wanted if name in columns}


def mflops(run):
    """Training MFLOPs per token of the model that the run's flags build."""
    return flops(json.dumps(run.facts["model_args"])) / 1e6


@cache
def flops(model_args):
    known = {f.name for f in fields(GPTConfig)}
    args = {name: value for name, value in json.loads(model_args).items() if name in known}
    return GPT(GPTConfig(**args)).flops_per_token()


def gaps_of(rows):
    """{row: Difference to the baseline} of a column; {} without a baseline."""
    base = {run.pair: run.loss for run in rows.get(BASELINE, [])}
    others = {row: {run.pair: run.loss for run in runs} for row, runs in rows.items() if row != BASELINE}
    return {row: difference(losses, base) for row, losses in others.items()} if base else {}


def quality(rows, found=None):
    """The table of losses in a column, best first; found: for "tuned", `best_rates`."""
    gaps, table = gaps_of(rows), []
    judged = family(gaps)
    for row, runs in rows.items():
        gap, corrected = gaps.get(row), judged.get(row)
        losses = [run.loss for run in runs]
        bpb = [run.evaluations[-1]["val_bpb"] for run in runs if "val_bpb" in run.evaluations[-1]]
        cells = {"row": (row, row), "val loss": (mean_std(losses), statistics.fmean(losses))}
        if found is not None:
            cells["lr"] = (f"{runs[0].lr:g}", runs[0].lr)
            cells["rate"] = (bracket(found[row]), bracket(found[row]))
        verdict = corrected["verdict"] if corrected else gap.verdict if gap else ""
        cells["to baseline"] = (str(gap), gap.mean) if gap else ("", 0.0)
        cells["verdict"] = (verdict, verdict)
        for name in ("holm", "bh"):
            cells[CORRECTIONS[name]] = (f"{corrected[name]:.3f}", corrected[name]) if corrected else ("", None)
        cells["bits per byte"] = (f"{statistics.fmean(bpb):.4f}", statistics.fmean(bpb)) if bpb else ("", None)
        seeds = len({run.seed for run in runs})
        cells["seeds"] = (str(seeds), seeds)
        table.append(cells)
    return sorted(table, key=lambda cells: cells["val loss"][1])


CORRECTIONS = {"holm": "Holm p", "bh": "BH q"}


def bracket(found):
    """Whether a row's best rate is tuned: without a worse one on both sides, a better one may lie outside."""
    return "tuned" if found["is_bracketed"] else "unbracketed"


def costs(rows, timings):
    """The table of what each row costs: parameters, FLOPs, speed, memory, sparsity."""
    table = []
    base = rows.get(BASELINE)
    for row, runs in rows.items():
        count, flops = runs[0].facts["parameters"], mflops(runs[0])
        memory, measured = timings.get(row, {}).get("memory_mb"), runs[-1].measured
        share = (lambda x, of: f" ({x / of:.2f}x)") if base else (lambda x, of: "")
        against = (base[0].facts["parameters"], mflops(base[0])) if base else (1, 1)
        table.append({
            "row": (row, row),
            "parameters": (f"{count:,}" + share(count, against[0]), count),
            "MFLOPs per token": (f"{flops:.2f}" + share(flops, against[1]), flops),
            "speed": speed_of(row, rows, timings) if is_timed(row, timings) else ("", None),
            "peak MB": (f"{memory:,.0f}", memory) if memory else ("", None),
            "measured": (", ".join(f"{k} {v:.3f}" for k, v in measured.items()), measured.get("sparsity")),
        })  # fmt: skip
    return sorted(table, key=lambda cells: cells["parameters"][1])


def is_timed(row, timings):
    """Whether a row's speed is shown: where --time measured some rows, the logs of others may be off by a factor."""
    return not timings or row in (*timings, BASELINE)


def speed_of(row, rows, timings):
    """(text, number): steps in the time of one of the baseline's, of --time; else of what training logged, with a ~."""
    if row in timings:
        return "{speed:.2f}x ({low:.2f} to {high:.2f})".format(**timings[row]), timings[row]["speed"]
    if BASELINE not in rows:
        return f"{median_of(rows[row], 'speed'):,.0f} tokens/s", median_of(rows[row], "speed")
    ratio = median_of(rows[row], "speed") / median_of(rows[BASELINE], "speed")
    return f"~{ratio:.2f}x", ratio


def median_of(runs, name):
    values = [getattr(run, name) for run in runs if getattr(run, name) is not None]
    return statistics.median(values) if values else None


def at_the_baselines_time(rows, timings):
    """The table of losses after the time that the baseline trained, and of the difference to its end."""
    end = {run.pair: run.loss for run in rows[BASELINE]}
    table = []
    for row, runs in rows.items():
        if not is_timed(row, timings):
            continue
        speed = 1.0 if row == BASELINE else speed_of(row, rows, timings)[1]
        steps = speed * runs[0].facts["config"]["max_iters"]
        losses = {run.pair: run.loss_at(steps) for run in runs if speed >= 1 or run.has_curve}
        if losses:
            gap = difference(losses, end) if row != BASELINE else None
            table.append({
                "row": (row, row),
                "steps done by then": (f"{min(speed, 1):.0%}", min(speed, 1)),
                "val loss then": (mean_std(losses.values()), statistics.fmean(losses.values())),
                "to baseline": (str(gap), gap.mean) if gap else ("", 0.0),
                "seeds": (str(len(losses)), len(losses)),
            })  # fmt: skip
    return sorted(table, key=lambda cells: cells["val loss then"][1])


def matched(rows, share=0.05):
    """The rows whose parameters are the baseline's within `share`."""
    count = rows[BASELINE][0].facts["parameters"]
    return {row: runs for row, runs in rows.items() if abs(runs[0].facts["parameters"] / count - 1) <= share}


def markdown(table):
    head = list(table[0])
    lines = [head, ["---"] * len(head), *([cells[name][0] for name in head] for cells in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe(cfg, runs):
    """Sentences on what was run: recipe, steps, seeds, machine, commits; and on what --mix mixed."""
    done = [run for run in runs if run.is_done]
    steps = sorted({run.facts["config"]["max_iters"] for run in done})
    recipes = sorted({" ".join(run.asked["recipe"]) for run in done})
    if len(steps) > 1 or len(recipes) > 1:
        raise ConfigError(f"{cfg.out_dir} holds runs of {recipes} with {steps} steps: give each its own --out_dir")
    commits = Counter((run.facts["git_commit"] or "none")[:7] + "+" * str(run.facts["git_commit"]).endswith("+")
                      for run in done)  # fmt: skip
    mixed = identity.check_same(done, cfg.mix, cfg.out_dir)
    machines = sorted(set(map(machine_of, done)))
    jobs, seeds = sorted({run.asked["jobs"] for run in done}), sorted({run.seed for run in done})
    flag, formats = rate_flag(recipes[0].split()), sorted({run.facts.get("dtype", "not recorded") for run in done})
    return (
        f"Recipe `{recipes[0]}`, {steps[0]} steps, {len(done)} finished runs, seeds {', '.join(map(str, seeds))}; "
        f"machine {'; '.join(machines)}, {' or '.join(map(str, jobs))} run(s) at a time; number format "
        f"{' or '.join(formats)}; commits "
        + ", ".join(f"{commit} ({n})" for commit, n in commits.most_common()) + ". "
        f"A run is `python train.py {recipes[0]} CONFIG --{flag}=LR --seed=SEED --eval_full=True`, its config "
        "and flags are on the page; several at once: `python -m lab.ablate CONFIG ... --seeds=N --learning_rates=LR`. "
        "Loss: nats per token on the whole val split after the last step, mean ± standard deviation over seeds. "
        "The difference to the baseline of the same column has a 95 % t interval, paired by seed where two or more "
        "seeds are common, else Welch's. Verdicts need three seeds: \"better\" and \"worse\" a p below 0.05 by Holm's "
        "correction over the table, \"screened\" a q of 0.1 or less by Benjamini and Hochberg's, which asks for more "
        "seeds and is no result."
        + f" {mixed}" * bool(mixed)
    )  # fmt: skip


def machine_of(run):
    """Where a run was trained, in words; old records have a text of fewer words."""
    on = run.facts.get("device", "cpu")
    found = run.facts.get("machine")
    if found is None:
        words = [run.asked.get("machine", "not recorded")]
    else:
        words = [
            found["cpu"],
            f"{found['cores']} cores",
            f"{found['threads']} thread(s)",
            *filter(None, [found["gpu"]]),
        ]
    return ", ".join(words + [on] * (on != "cpu"))


COSTS_ARE = (
    "Speed: training steps in the time of one of the baseline's, taking turns, median and quartiles of rounds "
    "(`--time`); with a ~, what runs logged while they trained, which other work on the machine disturbs. Memory: "
    "the peak of a fresh process over what code alone takes."
)
AT_THE_TIME = (
    "Loss after the time that the baseline needs to its end, by the speeds above, between evaluations by "
    "straight lines. A slower row is cut off before its learning rate has decayed; a schedule of that length "
    "would do better."
)


def how_tuned(rows, found):
    """What the table of tuned rows shows; found: `best_rates`."""
    searched = {row: sorted(found[row]["losses"]) for row in sorted(rows) if len(found[row]["losses"]) > 1}
    return (
        "Each row at its best learning rate by mean loss, of those with the row's most seeds. Tried: "
        + "; ".join(f"{row} {', '.join(f'{lr:g}' for lr in rates)}" for row, rates in searched.items())
        + ". *unbracketed*: no lower or no higher rate was found worse, so a better one may lie outside. "
    )


def sections(cfg, runs):
    """[(title, remark, table)] of the report."""
    columns = columns_of(cfg, runs)
    if not columns:
        raise ConfigError(f"{cfg.out_dir}: nothing at these learning rates; give --learning_rates")
    found, parts = best_rates(runs), []
    for name, rows in columns.items():
        remark, rates = (how_tuned(rows, found), found) if name == "tuned" else ("", None)
        parts.append((f"Loss, {name}", remark + smallest_effect(gaps_of(rows)), quality(rows, rates)))
    timings = read_json(cfg.timings) or {}
    every = dict(sorted({row: runs for column in columns.values() for row, runs in column.items()}.items()))
    parts.append(("Cost", COSTS_ARE, costs(every, timings)))
    if BASELINE in rows:
        alike = matched(rows)
        remark = f"Rows within 5 % of the baseline's parameters. {smallest_effect(gaps_of(alike))}"
        parts.append((f"Matched parameters, {name}", remark, quality(alike, rates)))
        parts.append((f"Matched time, {name}", AT_THE_TIME, at_the_baselines_time(rows, timings)))
    return parts


def report(cfg, runs):
    """Write docs/results/NAME.md, its best rows into docs/results.md between marks, the plots and the page."""
    parts, intro, docs = sections(cfg, runs), describe(cfg, runs), Path(cfg.docs)
    failed = [f"{run}: {run.failed['error']}" for run in runs if run.failed]
    rows = list(columns_of(cfg, runs).items())[-1]
    for folder in ("img", "results"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    records = "".join(
        json.dumps(run.record()) + "\n" for run in find_runs(cfg) if run.is_done
    )  # all rows, not only those reported
    replace_file(cfg.records, records.encode())
    timings = read_json(cfg.timings) or {}
    plots = {f"{cfg.name}-pareto": plot_pareto(*rows, timings)}
    if any(run.has_curve for column in rows[1].values() for run in column):
        plots = {f"{cfg.name}-curves": plot_curves(*rows)} | plots
    for name, data in plots.items():
        replace_file(docs / "img" / f"{name}.png", data)
    finished = {
        row: [run for run in runs if run.row == row and run.is_done] for row in dict.fromkeys(run.row for run in runs)
    }
    finished = {row: found for row, found in finished.items() if found}
    text = page(cfg.name, intro, parts, plots, finished, failed, f"results/{cfg.name}.jsonl")
    replace_file(docs / f"{cfg.name}.html", text.encode())
    link = f"The same, sortable and with every config: docs/{cfg.name}.html, which `make report` builds."
    text = [f"# Comparison: {cfg.name}", intro, link]
    for title, remark, table in parts:
        if title.startswith("Matched parameters"):  # nearly the table before it: the page has it
            others = [row for row in rows[1] if row not in {cells["row"][0] for cells in table}]
            table = None
            but = f" but {', '.join(others)}" if others else ""
            remark = f"Within 5 % of the baseline's parameters: all rows{but}."
        text += [f"## {title}", *([remark] if remark else []), *([markdown(table)] if table else [])]
    text += [f"![{name}](../img/{name}.png)" for name in plots]
    text += ["Failed, and in no table: " + "; ".join(failed) + "."] if failed else []
    tables = docs / "results" / f"{cfg.name}.md"
    replace_file(tables, ("\n\n".join(text) + "\n").encode())
    write_between_marks(docs / "results.md", cfg.name, short(cfg, runs, parts, rows[0]))
    print(f"wrote {tables}, {docs / 'results.md'}, {docs / cfg.name}.html and {', '.join(plots)}.png in {docs / 'img'}")


SHOWN = 12  # rows of a comparison in results.md


def short(cfg, runs, parts, column):
    """What docs/results.md says of a comparison: its best rows of three seeds, else of any, and where all are."""
    table = next(table for title, _, table in parts if title == f"Loss, {column}")
    confirmed = [cells for cells in table if cells["seeds"][1] >= LEAST_SEEDS]
    best, of = (
        (confirmed, f"of {LEAST_SEEDS} seeds or more") if len(confirmed) > 1 else (table, "of any number of seeds")
    )
    kept = [cells for i, cells in enumerate(best) if i < SHOWN or cells["row"][0] == BASELINE]
    dropped = {"bits per byte", *CORRECTIONS.values()}
    kept = [{name: cell for name, cell in cells.items() if name not in dropped} for cells in kept]
    recipe = " ".join(next(run for run in runs if run.is_done).asked["recipe"])
    count = sum(run.is_done for run in runs)
    return (
        f"## Comparison: {cfg.name}\n\nRecipe `{recipe}`; {count} runs. Rows {of}, {column}, best first: {len(kept)} "
        f"of {len(table)}. All rows, costs, how it was run and the plots: "
        f"[results/{cfg.name}.md](results/{cfg.name}.md).\n\n{markdown(kept)}"
    )


# Plots: PNG bytes.


def ceiling(losses):
    """(the highest loss that a plot shows, how many rows lie above, in words): the worst tenth of many rows is cut."""
    losses = list(losses)
    top = float(np.quantile(losses, 0.9, method="higher")) if len(losses) > 20 else max(losses)
    above = sum(loss > top for loss in losses)
    return top, f", {above} rows above" if above else ""


def plot_curves(column, rows, named=10):
    """Val loss over tokens, mean over seeds: the baseline and the best rows in colour, the others in grey."""
    figure, axes = pyplot().subplots(figsize=(8, 5), **TIGHT)
    order = sorted(rows, key=lambda row: statistics.fmean(run.loss for run in rows[row]))
    for row in reversed(order):
        curves = [[line["val_loss"] for line in run.evaluations] for run in rows[row] if run.has_curve]
        if not curves:
            continue
        tokens = [line["tokens"] for line in next(run.evaluations for run in rows[row] if run.has_curve)]
        mean = [statistics.fmean(values) for values in zip(*curves)]
        style = {"color": "lightgrey", "lw": 0.8, "ls": "-"}
        if row in order[:named]:
            style = {"color": COLOURS[order.index(row) % len(COLOURS)], "ls": LINES[order.index(row) // len(COLOURS)]}
        if row == BASELINE:
            style = {"color": "black", "ls": "-"}
        if row == BASELINE or row in order[:named]:
            style |= {"label": f"{row} {mean[-1]:.3f}", "lw": 1.5}
        axes.plot(tokens, mean, **style)
    losses = [statistics.fmean(run.loss for run in runs) for runs in rows.values()]
    top, _ = ceiling(losses)
    axes.set(xlabel="tokens", ylabel="val loss, nats per token", title=f"Loss, {column}")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g} M")
    axes.set_ylim(min(losses) - 0.1, top + 1.0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8)
    axes.grid(alpha=0.3)
    return png(figure)


def front(points):
    """The names of those points {name: (cost, loss)} that no other beats in both."""
    beaten = {n for n, (x, y) in points.items() for a, b in points.values() if a <= x and b <= y and (a, b) != (x, y)}
    return set(points) - beaten


def plot_pareto(column, rows, timings):
    """Loss against parameters, FLOPs and time per step; rows on the front are named."""
    figure, panels = pyplot().subplots(1, 3, figsize=(15, 5), **TIGHT, sharey=True)
    losses = {row: statistics.fmean(run.loss for run in runs) for row, runs in rows.items()}
    top, above = ceiling(losses.values())
    margin = 0.05 * (top - min(losses.values()) or 1.0)
    prices = {
        "parameters": lambda row: rows[row][0].facts["parameters"],
        "MFLOPs per token": lambda row: mflops(rows[row][0]),
        "time per step, baseline = 1" if BASELINE in rows else "s per token": lambda row: (
            1 / speed_of(row, rows, timings)[1]
        ),
    }
    for axes, (label, price) in zip(panels, prices.items()):
        shown = [row for row in rows if is_timed(row, timings) or "time" not in label]
        points = {row: (price(row), losses[row]) for row in shown}
        best, labels, costs = front(points), [], [x for x, _ in points.values()]
        for row, (x, y) in sorted(points.items(), key=lambda point: point[1][1]):
            axes.plot(x, y, "o", color="black" if row == BASELINE else "tab:red" if row in best else "lightgrey")
            is_free = y <= top and all(y - other > margin / 2 for other in labels)
            if row == BASELINE or (row in best and is_free):
                axes.annotate(row, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
                labels.append(y)
        axes.set(xlabel=label, xscale="log" if max(costs) > 5 * min(costs) else "linear")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("val loss, nats per token")
    panels[0].set_ylim(min(losses.values()) - margin, top + margin)
    figure.suptitle(f"Loss against cost, {column}; red: nothing is both cheaper and better{above}")
    return png(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Timing, pictures and the command line.


def time_rows(cfg, runs):
    """Measure each row's training step beside the baseline's, and its memory; cfg.timings is written after each row."""
    first = {run.row: run for run in reversed(runs) if run.is_done}
    if BASELINE not in first:
        raise ConfigError(f"{cfg.out_dir}: no finished run of {BASELINE}, which speeds are compared with")
    found = read_json(cfg.timings) or {}
    cfg.timings.parent.mkdir(parents=True, exist_ok=True)
    with bench.random_corpus() as folder:
        for row in [BASELINE, *sorted(first.keys() - {BASELINE})]:
            if row in found or first[row].asked["settings"].get("curriculum"):  # a step of varying length
                continue
            both = {}
            for name in (BASELINE, row):
                flags, settings = first[name].changed_args, first[name].asked["settings"]
                optimizer = settings.get("optimizer", "adamw")  # Muon's own work is in both steps
                both[name] = partial(bench.our_step, flags, settings["batch_size"], "cpu", folder, "auto",
                                     optimizer=optimizer)  # fmt: skip
            steps = {name: partial(measure.repeat, make(), 5) for name, make in both.items()}
            measured = measure.speeds(measure.interleave(steps, 11, "cpu"))[-1]
            found[row] = {k: round(measured[k], 4) for k in ("speed", "low", "high")}
            found[row]["memory_mb"] = measure.in_fresh_process(measure.peak_memory, both[row], "cpu")
            print(f"{row}: {found[row]['speed']:.2f}x, {found[row]['memory_mb']} MB", flush=True)
            replace_file(cfg.timings, (json.dumps(found, indent=1) + "\n").encode())


def draw_pictures(cfg, runs):
    """Write docs/img/NAME-PICTURE.png for each picture whose run is there."""
    folder = Path(cfg.docs) / "img"
    folder.mkdir(parents=True, exist_ok=True)
    there = {run.row: run.folder for run in reversed(runs) if run.is_done and (run.folder / "ckpt.pt").exists()}
    for name, (rows, draw) in (pictures.PICTURES | pictures.COMPARISONS).items():
        shown = [row for row in rows if row in there]
        if name in pictures.PICTURES:
            shown = shown[:1]
        if not shown:
            print(f"{name}: skipped, {cfg.out_dir} has no finished run of {' or '.join(rows)} with a checkpoint")
            continue
        figure = draw(there[shown[0]] if name in pictures.PICTURES else {row: there[row] for row in shown})
        path = folder / f"{cfg.name}-{name}.png"
        replace_file(path, png(figure))
        print(f"{name}: {path}, from {', '.join(str(there[row]) for row in shown)}")


def split_words(words):
    """(rows, flags): rows are words "NAME: --flag=value ..." and those ending in .py that are not a flag's value."""
    files = [w for before, w in zip(["", *words], words) if before != "--recipe" and re.match(r"[^-].*\.py$|\w+:", w)]
    return files, [w for before, w in zip(["", *words], words) if w not in files or before == "--recipe"]


def main(argv=None):
    with configurator.one_line_errors("lab.ablate", OSError):
        files, words = split_words(sys.argv[1:] if argv is None else argv)
        cfg = configurator.read(words or ([] if files else ["--help"]), AblateConfig, doc=__doc__).build(AblateConfig)
        rows = swept(find_rows(files), cfg.sweep)
        if cfg.time or cfg.report or cfg.pictures:
            runs = [run for run in find_runs(cfg) if not rows or run.row in rows]
            if cfg.time:
                time_rows(cfg, runs)
            if cfg.report:
                report(cfg, runs)
            if cfg.pictures:
                draw_pictures(cfg, runs)
            return
        if fcntl is None:
            raise ConfigError("training rows needs locks that a child process inherits, which Windows lacks: use WSL")
        if not rows:
            raise ConfigError(
                "name the config files to train, such as config/ablation/*.py; or --time, --report, --pictures"
            )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, stop the runs
        succeeded = train_rows(cfg, rows)
    raise SystemExit(not succeeded)


if __name__ == "__main__":
    main()
