"""
Does an idea help, how much, at what size, at what cost? From a file of flags to a claim card.

    python -m lab.trial config/ablation/short_conv.py                      # 2 hours; prints its plan first
    python -m lab.trial config/ablation/short_conv.py --budget=30m --plan  # the plan alone
    python -m lab.trial "mine: --mlp_act=relu2" --baselines=M1 --rungs=r0,r1
    python -m lab.trial config/ablation/short_conv.py --reveal             # and its loss on the sealed test split
    python -m lab.trial --table                                            # README's table, from all cards

Stages, per baseline: screen (one seed), tune (the same number of rates for idea and baseline, until a worse one lies on
both sides), select (seeds 0 to 2), confirm (seeds 100 to 104, every text), ladder (larger sizes, at the rates found on
the smallest, or with --tune_ladder at their own). docs/claims/NAME.json and .md say what came out. A killed trial goes
on by the same command; baselines are shared between ideas, and several processes or machines on one file system can
work on one trial.

Data: python data/drama/prepare.py, python data/code/prepare.py.
"""

import datetime
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

import configurator
from configurator import ROOT, ConfigError, check_values
from data import domains
from data.corpus import DataError, load_meta
from data.dataset import TokenDataset
from data.files import replace_file
from lab import ablate, claims, identity, laws, measure
from lab.ablate import BASELINE, AblateConfig
from lab.cost import decoding_bytes
from model import GPT, CheckpointError, GPTConfig, load_checkpoint
from train import TrainConfig, Trainer, World, build_model, dtype_name, machine, periods, pick_device, pick_dtype

BASELINES = {"M0": [], "M1": ["config/presets/modern.py"], "M2": ["config/presets/modern_muon.py"]}
CONFIRM_FROM = 100  # the first of the seeds that confirm: none of those that tune and select


@dataclass
class TrialConfig:
    """What to compare, and how long it may take."""

    # -- trial --------------------------------------------------------------------------------------------------------
    budget: str = "2h"  # how long it may take: 90s, 30m, 2h
    baselines: str = "M1,M2,M0"  # in this order: nanoGPT's block (M0), a modern one (M1), and trained by Muon (M2)
    rungs: str = "r0,r1,r2"  # sizes of config/ladder, or config files; tuned and confirmed on the first
    domains: str = "drama,code"  # data sets; tuned and selected on the first, confirmed on all
    select_seeds: int = 3  # seeds 0, 1, ... of select and ladder
    confirm_seeds: int = 5  # seeds 100, 101, ... of confirm
    data_dir: str = ""  # where data sets lie; empty = data/ beside train.py
    out_dir: str = "out-trials"  # where runs lie, those of baselines for all ideas
    docs: str = "docs"  # claims/ goes here
    jobs: int = 0  # runs at a time, one thread each; 0 = as many as there are free cores
    reveal: bool = False  # evaluate what is confirmed on the sealed test split too; writes date and hash down
    tune_decay: bool = False  # after the rate, bracket weight_decay as well, for idea and baseline alike
    tune_ladder: bool = False  # bracket the rate again at each size, from the one before; else that of the first size
    skills: bool = False  # the card also says what python -m lab.skills --quick finds: minutes beyond the budget
    plan: bool = False  # print the plan and stop
    table: bool = False  # write README's table from all cards and stop

    def __post_init__(self):
        check_values(self, {"select_seeds confirm_seeds": "[2, 100]", "jobs": "[0, inf)"})
        self.seconds = seconds_of(self.budget)
        if unknown := [name for name in names(self.baselines) if name not in BASELINES]:
            raise ValueError(f"baselines={self.baselines}: no {unknown[0]}, expected some of {', '.join(BASELINES)}")
        for name in ("baselines", "rungs", "domains"):
            if not names(getattr(self, name)):
                raise ValueError(f"{name}: name at least one")


def names(text):
    return [part.strip() for part in text.split(",") if part.strip()]


def seconds_of(text):
    """90s, 30m or 2h in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or not float(match[1]):
        raise ValueError(f"budget={text}: expected a time such as 90s, 30m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def duration(seconds):
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 5400 else f"{seconds / 3600:.1f}h"


def free_cores():
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, round((os.cpu_count() or 1) - load))


# ---------------------------------------------------------------------------------------------------------------------
# Where idea and baseline meet: a baseline's recipe, a size, a text. Each place is a comparison of lab.ablate.


@dataclass(frozen=True)
class Place:
    baseline: str
    rung: str  # r0, or a config file
    domain: str

    def __str__(self):
        return f"{self.baseline}-{self.size}-{self.domain}"

    @property
    def size(self):
        return Path(self.rung).stem

    @property
    def recipe(self):
        return [*BASELINES[self.baseline], self.rung if self.rung.endswith(".py") else f"config/ladder/{self.rung}.py"]


@dataclass
class Trial:
    """An idea, its rows' words for train.py, and what was measured before anything is trained."""

    cfg: TrialConfig
    name: str
    config: str  # the idea's config file, or its flags
    device: str
    dtype: str
    jobs: int
    startup: float = 0.0  # seconds until a process of train.py begins
    timings: dict = field(default_factory=dict)  # {place without domain: what `measure_steps` found}
    rates: dict = field(default_factory=dict)  # {(baseline, size): {row: learning rate}}
    decays: dict = field(default_factory=dict)  # {baseline: {row: weight_decay}}, where --tune_decay chose one
    left_out: list = field(default_factory=list)

    @property
    def spoken(self):
        """The idea as the command line has it."""
        return self.config if self.config.endswith(".py") else f"{self.name}: {self.config}"

    def ablation(self, place):
        out_dir = str(Path(self.cfg.out_dir) / str(place))
        recipe = ",".join(place.recipe)
        return AblateConfig(recipe=recipe, out_dir=out_dir, docs=self.cfg.docs, jobs=self.jobs, keep="last")

    def rows(self, place):
        """{row: its own words, as lab.ablate takes them}."""
        shared = f"--dataset={place.domain} --dtype={self.dtype} --device={self.device}"
        shared += f" --data_dir={self.cfg.data_dir}" if self.cfg.data_dir else ""
        return {BASELINE: shared, self.name: f"{self.config} {shared}"}

    def words(self, place, row):
        return [*place.recipe, *ablate.words_of(self.rows(place)[row])]

    def rate(self, place, row):
        """The tuned learning rate of this size, else of the first; None before tuning."""
        sizes = (place.size, Place("", names(self.cfg.rungs)[0], "").size)
        return next(filter(None, (self.rates.get((place.baseline, size), {}).get(row) for size in sizes)), None)

    def prepared(self, place, row, rate, seed, decay=None):
        """A run of lab.ablate; one with a weight decay of its own lies in a folder ROW-wdX."""
        words = self.rows(place)[row]
        if decay is not None:
            words, row = f"{words} --weight_decay={decay:g}", f"{row}-wd{decay:g}"
        return ablate.prepare(self.ablation(place), words, row, rate, seed)

    def runs(self, place, row, seeds):
        """Runs at the row's own rate and decay: the tuned ones, or the recipe's before that."""
        rate = self.rate(place, row) or ablate.learning_rates(self.ablation(place), place.recipe)[0]
        decay = self.decays.get(place.baseline, {}).get(row)
        return [self.prepared(place, row, rate, seed, decay) for seed in seeds]

    def pairs(self, place, seeds):
        """The runs of both rows, seed by seed, so that what is finished early can be compared."""
        both = [self.runs(place, row, seeds) for row in (BASELINE, self.name)]
        return [run for pair in zip(*both) for run in pair]

    def losses(self, place, seeds):
        """{row: {seed: loss}} of what is finished."""
        return {
            row: {run.seed: run.loss for run in self.runs(place, row, seeds) if run.is_done}
            for row in (BASELINE, self.name)
        }


def number_format(cfg, place, words):
    """(device, dtype) of every run in out_dir, picked once: what another moment would pick may be another format."""
    path = Path(cfg.out_dir) / "format.json"
    if found := ablate.read_json(path):
        return found["device"], found["dtype"]
    settings = configurator.read(words, TrainConfig, GPTConfig)
    device = pick_device(settings.values["device"])[0]
    model = GPT(settings.build(GPTConfig))
    tokens = settings.values["batch_size"] * model.config.block_size
    dtype = dtype_name(pick_dtype(settings.values["dtype"], device, model, tokens)[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"device": device, "dtype": dtype}).encode())
    return device, dtype


# ---------------------------------------------------------------------------------------------------------------------
# What it will cost, measured by a few steps of each model on its own data.

ROUNDS = 5
SHORTEST = 0.2  # seconds per round: shorter ones measure the machine's other work


def stepper(trial, place, row, folder):
    """(Trainer of a row, its settings), with a constant rate, to be timed."""
    settings = configurator.read(trial.words(place, row), TrainConfig, GPTConfig)
    cfg = replace(settings.build(TrainConfig), decay_lr=False, compile=False, out_dir=folder)
    data = TokenDataset(cfg)
    model = build_model(replace(settings, values=settings.values | {"init_from": "scratch"}), None, data)
    data.check(model.config.block_size, model.config.vocab_size)
    dtype = getattr(torch, trial.dtype)
    return Trainer(cfg, model, data, World(trial.device, cfg.backend), dtype), settings


def measure_steps(trial, place):
    """What a step, an evaluation and a state cost, of both rows at a place; they take turns, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {"rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        both = {row: stepper(trial, place, row, folder) for row in (BASELINE, trial.name)}
        steps = {row: (lambda t=trainer: t.step()[0].item()) for row, (trainer, _) in both.items()}
        once = max(measure.interleave(steps, 1, trial.device)[BASELINE])
        repeats = math.ceil(SHORTEST / once)
        rounds = {row: partial(measure.repeat, step, repeats) for row, step in steps.items()}
        seconds = measure.interleave(rounds, ROUNDS, trial.device)
        found["speed"] = {k: round(measure.speeds(seconds)[-1][k], 4) for k in ("speed", "low", "high")}
        for row, (trainer, settings) in both.items():
            cfg, config = settings.build(TrainConfig), trainer.config
            windows = trainer.data.val_windows(cfg.batch_size, config, trial.device, 0, 1)
            start = time.perf_counter()
            trainer.mean_loss(itertools.islice(windows, 2), 2)
            batch = (time.perf_counter() - start) / 2
            count = math.ceil((len(trainer.data.splits["val"]) - 1) / (cfg.batch_size * config.block_size))
            evaluations = max(len(periods(cfg)), cfg.max_iters // cfg.eval_interval)  # but for the first
            per_evaluation = (count if cfg.eval_full else cfg.eval_iters) + cfg.eval_iters
            found["rows"][row] = {
                "step": statistics.median(seconds[row]) / repeats, "steps": cfg.max_iters,
                "evaluating": evaluations * per_evaluation * batch, "parameters": trainer.model.num_params(),
                "flops": trainer.model.flops_per_token(),
                "state_bytes": decoding_bytes(trainer.model, config.block_size),
                "tokens": trainer.tokens_per_step * (periods(cfg)[-1].horizon if periods(cfg) else cfg.max_iters),
                "train_tokens": len(trainer.data.splits["train"]),
            }  # fmt: skip
    torch.set_num_threads(threads)
    return found


def measure_startup(trial, place):
    """Seconds of a whole run of no steps: imports, the model, one evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*trial.words(place, BASELINE), "--max_iters=0", f"--out_dir={folder}"]
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "train.py"), *words]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ConfigError((done.stderr.strip().splitlines() or ["train.py failed"])[-1])
        return time.perf_counter() - start


def timing_of(trial, place):
    """What `measure_steps` found at a place, measured when it is first asked for."""
    if place not in trial.timings:
        trial.timings[place] = measure_steps(trial, place)
    return trial.timings[place]


def base_row(run):
    """The row of a run, whatever its weight decay."""
    return re.sub(r"-wd[\d.e-]+$", "", run.row)


def runs_at(trial, place):
    """All runs of the idea and of its baseline at a place, other ideas' left aside."""
    return [run for run in ablate.find_runs(trial.ablation(place)) if base_row(run) in (BASELINE, trial.name)]


def run_seconds(trial, place, row):
    """How long one run takes: what finished ones took, else steps and evaluations as measured."""
    done = [run for run in runs_at(trial, place) if base_row(run) == row and run.is_done]
    if took := [run.wall_s for run in done if run.wall_s]:
        return statistics.median(took)
    measured = timing_of(trial, place)["rows"][row]
    return trial.startup + measured["steps"] * measured["step"] + measured["evaluating"]


# ---------------------------------------------------------------------------------------------------------------------
# The plan: units of work, each a verdict, another text or another size, cheapest comparisons first.


@dataclass(frozen=True)
class Stage:
    """Runs of both rows at a place."""

    name: str
    place: Place
    seeds: tuple


@dataclass(frozen=True)
class Unit:
    """Stages that answer one question together; `pairs`: how many comparisons bear on the answer."""

    answers: str
    stages: tuple
    pairs: int
    needs: str = ""  # the baseline whose verdict comes first


TRIALS = 4  # rates per row that a plan counts with; the bracket may need more
DECAYS = 3  # the same of weight decays, beside the recipe's own


def units_of(cfg):
    """Everything that a trial could do, in the order in which equal ones are done."""
    first, select = names(cfg.rungs)[0], tuple(range(cfg.select_seeds))
    confirm = tuple(range(CONFIRM_FROM, CONFIRM_FROM + cfg.confirm_seeds))
    text, *texts = names(cfg.domains)
    found = []
    for baseline in names(cfg.baselines):
        home = Place(baseline, first, text)
        stages = [("screen", (0,)), ("tune", (0,)), ("select", select), ("confirm", confirm)]
        chain = tuple(Stage(name, home, seeds) for name, seeds in stages)
        found.append(Unit(f"verdict on {baseline}", chain, len(confirm)))
        for other in texts:
            stage = Stage("confirm", replace(home, domain=other), confirm)
            found.append(Unit(f"{other} on {baseline}", (stage,), len(confirm), baseline))
        for rung in names(cfg.rungs)[1:]:
            stage = Stage("ladder", replace(home, rung=rung), select)
            found.append(Unit(f"{stage.place.size} on {baseline}", (stage,), len(select), baseline))
    return found


def stage_seconds(trial, stage):
    """How long what is not finished of a stage takes, with `jobs` runs at a time."""
    each = {row: run_seconds(trial, stage.place, row) for row in (BASELINE, trial.name)}
    if stage.name == "tune":
        most = TRIALS + (DECAYS if trial.cfg.tune_decay else 0)
        done = {row: sum(base_row(run) == row and run.seed == 0 for run in runs_at(trial, stage.place)) for row in each}
        todo = [each[row] for row in each for _ in range(max(1, done[row]), most)]
    else:
        todo = [each[base_row(run)] for run in trial.pairs(stage.place, stage.seeds) if not run.is_done]
        if stage.name == "ladder" and trial.cfg.tune_ladder and todo:
            todo += [each[row] for row in each for _ in range(TRIALS - 1)]
    return max(sum(todo) / trial.jobs, max(todo, default=0.0))


def make_plan(units, cost, seconds):
    """(units that fit, units left out): cheapest per comparison first, each after what it needs.

    cost: function of a unit, in seconds. Costs within a quarter of each other count as equal: they are measured.
    """
    planned, left_out, waiting = [], [], list(units)
    costs = {unit.answers: cost(unit) for unit in units}

    def order(unit):
        return round(math.log(max(costs[unit.answers], 1e-3) / unit.pairs) / math.log(1.25))

    def is_ready(unit):
        return not unit.needs or any(p.answers == f"verdict on {unit.needs}" for p in planned)

    while ready := [unit for unit in waiting if is_ready(unit)]:
        unit = min(ready, key=order)
        waiting.remove(unit)
        fits = sum(costs[p.answers] for p in planned) + costs[unit.answers] <= seconds
        (planned if fits else left_out).append(unit)
    return planned, left_out + waiting


def split(unit):
    """The unit's stages as units of their own: what to do of a verdict that does not fit as a whole."""
    return [Unit(f"{unit.answers}: {stage.name}", (stage,), unit.pairs) for stage in unit.stages]


def first_stages(units, cost, seconds):
    """The first stages, in order, of the first verdict, where none fits as a whole."""
    first = next(unit for unit in units if not unit.needs)
    fitting, total = [], 0.0
    for part in split(first):
        total += cost(part)
        if total > seconds:
            break
        fitting.append(part)
    rest = [part for part in split(first) if part not in fitting]
    return fitting, rest + [unit for unit in units if unit is not first]


def buildable(trial):
    """The baselines that the idea can be built on; what the others refuse is told and left out."""
    found = []
    for baseline in names(trial.cfg.baselines):
        place = Place(baseline, names(trial.cfg.rungs)[0], names(trial.cfg.domains)[0])
        settings = configurator.read(trial.words(place, trial.name), TrainConfig, GPTConfig)
        try:
            settings.build(GPTConfig)
            settings.build(TrainConfig)
        except ConfigError as e:
            trial.left_out.append(f"{baseline}: {e}")
            continue
        if ablate.rate_flag(trial.words(place, BASELINE)) != ablate.rate_flag(trial.words(place, trial.name)):
            raise ConfigError(f"{trial.config}: changes the optimiser, whose rates are not the baseline's")
        found.append(baseline)
    if not found:
        raise ConfigError(f"{trial.config}: {'; '.join(trial.left_out)}")
    return found


def show_plan(trial, planned, left_out, cost):
    cfg = trial.cfg
    home = Place(names(cfg.baselines)[0], names(cfg.rungs)[0], names(cfg.domains)[0])
    found = timing_of(trial, home)
    ours, base = found["rows"][trial.name], found["rows"][BASELINE]
    print(
        f"{trial.name}: {' '.join(ablate.words_of(trial.config))}\n"
        f"on {home}: {ours['parameters'] / base['parameters']:.2f}x parameters, "
        f"{ours['flops'] / base['flops']:.2f}x FLOPs, {found['speed']['speed']:.2f}x speed; {trial.dtype} on "
        f"{trial.device}, {trial.jobs} run(s) at a time\n"
        f"budget {duration(cfg.seconds)}; planned {duration(sum(map(cost, planned)))}, most comparisons per hour first:"
    )
    for unit in planned:
        stages = ", ".join(stage.name for stage in unit.stages)
        print(f"  {duration(cost(unit)):>5}  {unit.answers} ({stages}; {unit.pairs} pairs of runs decide)")
    for unit in left_out:
        print(f"  left out: {unit.answers}, {duration(cost(unit))}")
    for told in trial.left_out:
        print(f"  left out: {told}")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Stages.


class OutOfTime(Exception):
    """What is left of the budget is less than what comes next."""


def finish(cfg, runs):
    """Train those that are not finished, here or in another process. Failed ones are tried once."""
    ablate.complete(cfg, [run for run in runs if not run.is_done])


def train_pairs(trial, stage):
    runs = trial.pairs(stage.place, stage.seeds)
    finish(trial.ablation(stage.place), runs)
    if failed := [run for run in runs if run.failed]:
        raise ConfigError(f"{failed[0]}: {failed[0].failed['error']}")


def tried_rates(trial, place, row):
    """{rate: loss with seed 0}, inf for what diverged."""
    settings = ablate.resolve(ablate.command(trial.ablation(place), trial.rows(place)[row], 1.0, 0))
    flag, same = ablate.rate_flag(trial.words(place, row)), {}
    for run in runs_at(trial, place):
        asked = run.asked["settings"]
        if (
            run.row == row
            and run.seed == 0
            and (run.is_done or run.failed)
            and asked
            and asked | {flag: 1.0} == settings
        ):
            same[run.lr] = run.loss if run.is_done else math.inf
    return same


def recipes_decay(trial, place, row):
    settings = ablate.resolve(ablate.command(trial.ablation(place), trial.rows(place)[row], 1.0, 0))
    return settings.get("weight_decay", TrainConfig.weight_decay)


def tried_decays(trial, place, row):
    """{weight decay: loss with seed 0 at the row's best rate}, the recipe's own among them."""
    rates = tried_rates(trial, place, row)
    best = min(rates, key=rates.get)
    found = {recipes_decay(trial, place, row): rates[best]}
    for run in runs_at(trial, place):
        if base_row(run) == row != run.row and run.seed == 0 and run.lr == best and (run.is_done or run.failed):
            found[float(run.row.rpartition("-wd")[2])] = run.loss if run.is_done else math.inf
    return found


def between(tried):
    """The value halfway, in logarithms, between the best one and its neighbour on the wider side."""
    best = min(tried, key=tried.get)
    lower, higher = [x for x in tried if x < best], [x for x in tried if x > best]
    sides = ([max(lower)] if lower else []) + ([min(higher)] if higher else [])
    other = max(sides, key=lambda x: abs(math.log(x / best)))
    return float(f"{math.sqrt(best * other):.2e}")


def values_wanted(tried, start, step=ablate.STEP):
    """{row: values to try next}: each until it is bracketed, then finer ones for the row that had fewer trials.

    tried: {row: {value: loss}}; start: {row: values to begin with}.
    """
    wanted = {row: ablate.rates_to_try(each, start[row], step) for row, each in tried.items()}
    if any(wanted.values()):
        return wanted
    most = max(map(len, tried.values()))
    fewer = [row for row, each in tried.items() if len(each) < most and math.isfinite(min(each.values()))]
    return {row: [between(tried[row])] for row in fewer}


DECAY_STEP = 3.0  # a loss changes little with weight decay: a wider step than of learning rates


def tune(trial, stage, deadline):
    """Train rates, and then decays if asked for, until both rows are bracketed by as many trials, or time is over."""
    place, rows = stage.place, (BASELINE, trial.name)
    start = {row: [trial.rate(place, row)] for row in rows} if stage.name == "ladder" else None
    start = start or dict.fromkeys(rows, ablate.learning_rates(trial.ablation(place), place.recipe))

    def rates():
        wanted = values_wanted({row: tried_rates(trial, place, row) for row in rows}, start)
        return [(row, trial.prepared(place, row, lr, 0)) for row, lrs in wanted.items() for lr in lrs]

    def decays():
        own = {row: [recipes_decay(trial, place, row)] for row in rows}
        wanted = values_wanted({row: tried_decays(trial, place, row) for row in rows}, own, DECAY_STEP)
        best = {row: best_of(tried_rates(trial, place, row)) for row in rows}
        return [(row, trial.prepared(place, row, best[row], 0, x)) for row, xs in wanted.items() for x in xs]

    for next_runs in (rates, decays) if trial.cfg.tune_decay and stage.name == "tune" else (rates,):
        while wanted := next_runs():
            cost = sum(run_seconds(trial, place, row) for row, _ in wanted) / trial.jobs
            if time.monotonic() + cost > deadline:
                raise OutOfTime(f"{len(wanted)} more runs of tuning on {place}")
            finish(trial.ablation(place), [run for _, run in wanted])


def best_of(tried):
    """The value with the lowest loss; None where nothing trained."""
    best = min(tried, key=tried.get, default=None)
    return best if best is not None and math.isfinite(tried[best]) else None


def set_rates(trial, place):
    """Take each row's best rate, and its best weight decay, from what was tried."""
    found = {row: best_of(tried_rates(trial, place, row)) for row in (BASELINE, trial.name)}
    trial.rates[place.baseline, place.size] = found = {row: rate for row, rate in found.items() if rate}
    if trial.cfg.tune_decay and place.rung == names(trial.cfg.rungs)[0]:
        decays = {row: best_of(tried_decays(trial, place, row)) for row in found}
        own = {row: recipes_decay(trial, place, row) for row in found}
        trial.decays[place.baseline] = {row: x for row, x in decays.items() if x != own[row]}


def perform(trial, unit, deadline):
    """Do a unit's stages."""
    for stage in unit.stages:
        print(f"\n{stage.name}, {stage.place}: {duration(max(0.0, deadline - time.monotonic()))} left", flush=True)
        if stage.name != "tune" and time.monotonic() + stage_seconds(trial, stage) > deadline:
            raise OutOfTime(f"{stage.name} on {stage.place}, {duration(stage_seconds(trial, stage))}")
        if stage.name == "screen":
            trial.rates.pop((stage.place.baseline, stage.place.size), None)
        if stage.name == "tune" or stage.name == "ladder" and trial.cfg.tune_ladder:
            tune(trial, stage, deadline)
            set_rates(trial, stage.place)
        if stage.name != "tune":
            train_pairs(trial, stage)
        if stage.name == "screen":
            set_rates(trial, stage.place)


# ---------------------------------------------------------------------------------------------------------------------
# The sealed test split.


def test_loss(run, tokens):
    """Loss of a finished run's last weights on these tokens, as an evaluation of val would measure it."""
    checkpoint = load_checkpoint(run.folder / "ckpt_last.pt")
    cfg = TrainConfig(**checkpoint["config"])
    data = TokenDataset(cfg)
    data.splits["val"] = tokens
    world, model = World(run.facts["device"], cfg.backend), GPT.from_checkpoint(checkpoint)
    trainer = Trainer(replace(cfg, compile=False), model, data, world, getattr(torch, cfg.dtype))
    windows = data.val_windows(cfg.batch_size, trainer.config, world.device, 0, 1)
    count = math.ceil((len(tokens) - 1) / (cfg.batch_size * trainer.config.block_size))
    return trainer.mean_loss(windows, count)[0]


def reveal(trial, places, seeds):
    """Evaluate the confirmed runs of these places on the test splits of their texts; who looked is written down."""
    for domain in dict.fromkeys(place.domain for place in places):
        runs = [run for place in places if place.domain == domain for run in trial.pairs(place, seeds) if run.is_done]
        unseen = [run for run in runs if not (run.folder / "test.json").exists()]
        folder = data_folder(trial.cfg, domain)
        meta = load_meta(folder)
        if unseen:
            tokens = domains.reveal(folder, meta, looks_file(trial.cfg), f"to confirm {trial.name}")
            for run in unseen:
                found = {"loss": test_loss(run, tokens), "sha256": meta["test_sha256"]}
                replace_file(run.folder / "test.json", json.dumps(found).encode())


def looks_file(cfg):
    return Path(cfg.docs) / "claims" / "revealed.jsonl"


def looks_at(cfg, domain):
    """{"date", "sha256", "looks", ...} of the last time that a text's test split was opened; None if it never was."""
    sealed = load_meta(data_folder(cfg, domain)).get("test_sha256")
    path = looks_file(cfg)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in lines if line["sha256"] == sealed]
    return lines[-1] | {"looks": len(lines)} if lines else None


def test_losses(trial, place, seeds):
    """{row: {seed: loss}} on the test split, of the runs that were evaluated there."""
    found = {}
    for row in (BASELINE, trial.name):
        seen = {run.seed: ablate.read_json(run.folder / "test.json") for run in trial.runs(place, row, seeds)}
        found[row] = {seed: each["loss"] for seed, each in seen.items() if each}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The card.


def gap_at(trial, losses):
    return claims.gap(losses[trial.name], losses[BASELINE])


def tuning_of(trial, place):
    """{row: what was tried}, None before any tuning; "weight_decay" in it, where that was tuned."""
    tried = {row: tried_rates(trial, place, row) for row in (BASELINE, trial.name)}
    if max(map(len, tried.values())) < 2:
        return None
    found = {row: summary(each) for row, each in tried.items()}
    for row, each in found.items():
        if len(decays := tried_decays(trial, place, row)) > 1:
            each["weight_decay"] = summary(decays)
    return found


def summary(tried):
    """What a card says of {value: loss}: all, the best, whether it is bracketed, the expected best of n trials."""
    best = min(tried, key=tried.get)
    worse = {value < best for value in tried if tried[value] > tried[best]}
    return {
        "losses": {f"{value:g}": loss for value, loss in sorted(tried.items())}, "best": best,
        "is_bracketed": worse == {True, False}, "expected_best": claims.expected_best(tried.values()),
    }  # fmt: skip


def facts_at(trial, baseline):
    """What a card says of a baseline: costs, tuning, differences."""
    cfg = trial.cfg
    home = Place(baseline, names(cfg.rungs)[0], names(cfg.domains)[0])
    select, confirm = range(cfg.select_seeds), range(CONFIRM_FROM, CONFIRM_FROM + cfg.confirm_seeds)
    set_rates(trial, home)
    measured = timing_of(trial, home)["rows"]
    ours, base = measured[trial.name], measured[BASELINE]
    memory = {key: peak(trial, home, row) for key, row in (("idea", trial.name), ("baseline", BASELINE))}
    places = {domain: replace(home, domain=domain) for domain in names(cfg.domains)}
    larger, found = {(baseline, Place("", rung, "").size) for rung in names(cfg.rungs)[1:]}, {}
    for domain, place in places.items():
        val, test = gap_at(trial, trial.losses(place, confirm)), gap_at(trial, test_losses(trial, place, confirm))
        if val:
            found[domain] = {"val": val, "test": test}
    return {
        "parameters": ours["parameters"] / base["parameters"], "flops": ours["flops"] / base["flops"],
        "state_bytes": {"idea": ours["state_bytes"], "baseline": base["state_bytes"]},
        "memory_mb": memory if all(memory.values()) else None,
        "speed": {place.size: each["speed"] for place, each in trial.timings.items()
                  if place.baseline == baseline and place.domain == home.domain},
        "screen": gap_of_one(trial, home), "tuning": tuning_of(trial, home),
        "ladder_rates": {size: each for (on, size), each in trial.rates.items() if (on, size) in larger},
        "select": gap_at(trial, trial.losses(home, select)), "confirm": found,
    }  # fmt: skip


def peak(trial, place, row):
    """Peak memory in MB over the runs of a row; None where none recorded it."""
    runs = [run for run in runs_at(trial, place) if base_row(run) == row and run.is_done]
    return max((run.memory_mb for run in runs if run.memory_mb), default=None)


def gap_of_one(trial, home):
    """The difference with seed 0 at the recipe's own rate, where both rows have it."""
    start = ablate.learning_rates(trial.ablation(home), home.recipe)[0]
    tried = {row: tried_rates(trial, home, row).get(start) for row in (BASELINE, trial.name)}
    return None if None in tried.values() else tried[trial.name] - tried[BASELINE]


def curves(trial, place, seeds):
    """{row: {tokens: [loss per seed]}} at the horizons of finished runs."""
    found = {BASELINE: {}, trial.name: {}}
    for row, at in found.items():
        for run in trial.runs(place, row, seeds):
            for line in run.evaluations if run.is_done else ():
                if "horizon" in line:
                    at.setdefault(line["tokens"], []).append(line["val_loss"])
    return found


def ladder_of(trial, baseline):
    """Effective speedup over the sizes that were run, or over the lengths of the smallest; None if neither gives three.

    Over sizes, K is the tokens of each size's whole run, which are 20 per parameter.
    """
    cfg = trial.cfg
    places = [Place(baseline, rung, names(cfg.domains)[0]) for rung in names(cfg.rungs)]
    found = {place: curves(trial, place, range(cfg.select_seeds)) for place in places}
    by_size, sizes = {BASELINE: {}, trial.name: {}}, []
    for place, rows in found.items():
        if all(rows.values()) and min(len(at[max(at)]) for at in rows.values()) >= 2:
            sizes.append(place)
            for row, at in rows.items():
                by_size[row][max(at)] = at[max(at)]
    over, data, where = "sizes", by_size, sizes
    if len(by_size[BASELINE]) < 3:
        over, data, where = f"lengths at {places[0].size}", found[places[0]], [places[0]] * 3
    K = sorted(data[BASELINE])
    if len(K) < 3 or sorted(data[trial.name]) != K or min(len(at[k]) for at in data.values() for k in K) < 2:
        return None
    speedup, line = laws.speedup(data[BASELINE], data[trial.name]), laws.trend(data[BASELINE], data[trial.name])
    rates = {k: timing_of(trial, place)["speed"]["speed"] for k, place in zip(K, where)}
    seeds = min(len(data[BASELINE][k]) for k in K)
    means = [statistics.fmean(data[BASELINE][k]) for k in K]
    return {
        "over": over, "law": dict(zip(("E", "A", "alpha"), laws.fit(K, means))), "trend": line, "losses": data,
        "speedup": {k: each | {"w": each["m"] * rates[k]} for k, each in speedup.items()},
        "verdict": laws.verdict(speedup, line, seeds),
    }  # fmt: skip


def repeated(trial, performed):
    """Sentences on texts that a run reads more than once."""
    found = []
    for place in dict.fromkeys(stage.place for unit in performed for stage in unit.stages):
        row = timing_of(trial, place)["rows"][BASELINE]
        if row["tokens"] > row["train_tokens"]:
            found.append(f"{place.size} reads {place.domain} {row['tokens'] / row['train_tokens']:.1f} times")
    return list(dict.fromkeys(found))


def skills_of(trial):
    """What lab.skills prints about the idea, if it was asked for; None after an error, which is left out."""
    if not trial.cfg.skills:
        return None
    folder = Path(trial.cfg.out_dir) / "skills"
    command = [sys.executable, "-m", "lab.skills", trial.spoken, "--quick", f"--out_dir={folder.resolve()}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        trial.left_out.append(f"skills: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return None
    return done.stdout


def command_of(trial):
    """What makes such a card again: the idea, and every setting that shapes the comparison."""
    shaping = ("budget", "baselines", "rungs", "domains", "select_seeds", "confirm_seeds", "tune_decay", "tune_ladder")
    default = TrialConfig()
    given = {name: getattr(trial.cfg, name) for name in shaping if getattr(trial.cfg, name) != getattr(default, name)}
    return shlex.join(["python", "-m", "lab.trial", trial.spoken, *(f"--{k}={v}" for k, v in given.items())])


def make_card(trial, performed):
    cfg = trial.cfg
    places = list(dict.fromkeys(stage.place for unit in performed for stage in unit.stages))
    places = places or [Place(names(cfg.baselines)[0], names(cfg.rungs)[0], names(cfg.domains)[0])]  # costs alone
    done = list(dict.fromkeys(place.baseline for place in places))
    for place in places:
        runs = runs_at(trial, place)
        identity.check_same(runs, False, str(trial.ablation(place).out_dir))
    config, optimizer = model_of(trial, places[0], trial.name)
    facts = {baseline: facts_at(trial, baseline) for baseline in done}
    ladder = {baseline: ladder_of(trial, baseline) for baseline in done}
    seen = {domain for each in facts.values() for domain, splits in each["confirm"].items() if splits["test"]}
    here = machine(trial.device)
    return {
        "name": trial.name, "flags": " ".join(ablate.words_of(trial.config)), "text": ablate.text_of(trial.config),
        "date": datetime.date.today().isoformat(),
        "command": command_of(trial),
        "source": identity.source(config, optimizer),
        "data": {domain: load_meta(data_folder(cfg, domain)).get("data_id") for domain in names(cfg.domains)},
        "machine": f"{here['cpu']}, {here['cores']} cores" + (f", {here['gpu']}" if here["gpu"] else ""),
        "dtype": trial.dtype, "torch": torch.__version__, "baselines": facts,
        "ladder": {baseline: each for baseline, each in ladder.items() if each}, "repeated": repeated(trial, performed),
        "revealed": {domain: looks_at(cfg, domain) for domain in sorted(seen)}, "skills": skills_of(trial),
        "left_out": trial.left_out, "contradicts": "",
    }  # fmt: skip


def model_of(trial, place, row):
    """(GPTConfig, optimizer) of a row at a place."""
    settings = configurator.read(trial.words(place, row), TrainConfig, GPTConfig)
    vocab_size = load_meta(data_folder(trial.cfg, place.domain))["vocab_size"]
    return settings.build(GPTConfig, vocab_size=vocab_size), settings.values["optimizer"]


def check_sources(trial, places):
    """ConfigError, before any work, if runs there were made by other code than this: they could not be compared."""
    for place in places:
        for run in (run for run in runs_at(trial, place) if run.is_done):
            if run.asked["source"] != identity.source(*model_of(trial, place, base_row(run))):
                raise ConfigError(f"{run.folder} was trained by other code than this: give another --out_dir")


def data_folder(cfg, domain):
    return (Path(cfg.data_dir) if cfg.data_dir else ROOT / "data") / domain


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def start_trial(cfg, rows):
    """A Trial of the one idea in `rows`, its number format picked and its baselines checked."""
    if len(rows) != 1 or BASELINE in rows:
        raise ConfigError(f'name one idea, a config file or "NAME: --flag=value", not {", ".join(rows) or "none"}')
    ((name, config),) = rows.items()
    for domain in names(cfg.domains):
        if not load_meta(data_folder(cfg, domain)):
            raise DataError(f"{data_folder(cfg, domain)}: no such data set: run python data/{domain}/prepare.py")
    home = Place(names(cfg.baselines)[0], names(cfg.rungs)[0], names(cfg.domains)[0])
    device, dtype = number_format(cfg, home, home.recipe)
    trial = Trial(cfg, name, config, device, dtype, cfg.jobs or (1 if device != "cpu" else free_cores()))
    cfg.baselines = ",".join(buildable(trial))
    trial.startup = measure_startup(trial, home)
    for baseline in names(cfg.baselines):
        set_rates(trial, replace(home, baseline=baseline))
    return trial


def run_trial(cfg, rows):
    began = time.monotonic()
    trial = start_trial(cfg, rows)

    def cost(unit):
        return sum(stage_seconds(trial, stage) for stage in unit.stages)

    units = units_of(cfg)
    check_sources(trial, dict.fromkeys(stage.place for unit in units for stage in unit.stages))
    planned, left_out = make_plan(units, cost, cfg.seconds)
    if not planned:
        planned, left_out = first_stages(units, cost, cfg.seconds)
    show_plan(trial, planned, left_out, cost)
    if cfg.plan:
        return None
    trial.left_out += [f"{unit.answers} ({duration(cost(unit))})" for unit in left_out]
    performed = []
    for unit in planned:
        performed.append(unit)
        try:
            perform(trial, unit, began + cfg.seconds)
        except OutOfTime as e:
            trial.left_out.append(f"{e}: time was over")
            break
    confirmed = {stage.place for unit in performed for stage in unit.stages if stage.name == "confirm"}
    if cfg.reveal:
        reveal(trial, sorted(confirmed, key=str), range(CONFIRM_FROM, CONFIRM_FROM + cfg.confirm_seeds))
    path = claims.write(Path(cfg.docs) / "claims", make_card(trial, performed))
    print(f"\n{path.read_text(encoding='utf-8')}\nwrote {path} and .json in {duration(time.monotonic() - began)}")
    return path


def main(argv=None):
    with configurator.one_line_errors("lab.trial", DataError, CheckpointError, OSError):
        files, words = ablate.split_words(sys.argv[1:] if argv is None else argv)
        cfg = configurator.read(words or ([] if files else ["--help"]), TrialConfig, doc=__doc__).build(TrialConfig)
        if cfg.table:
            folder = Path(cfg.docs) / "claims"
            if not claims.write_table(ROOT / "README.md", folder):
                raise ConfigError(f"{folder}: no cards; run a trial first")
            return
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # every run has one core
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, stop the runs
        run_trial(cfg, ablate.find_rows(files))


if __name__ == "__main__":
    main()
