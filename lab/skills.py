"""
What can a token mixer do? Trains rows on the synthetic skills of data/skills, and shows each row's profile.

    python -m lab.skills config/ablation/rope.py config/ablation/fhn.py --tasks=mqar,parity
    python -m lab.skills config/ablation/gdn.py --quick  # a first look: small settings, one rate, one seed
    python -m lab.skills "nope: config/ablation/rope.py --pos_embedding=none" --seeds=1 --max_iters=500 --jobs=2
    python -m lab.skills --report                        # records, pictures and the table in docs; trains nothing

Rows are config files, or flags, as for lab.ablate, whose run folders, locks and continuation these are: a run is
OUT_DIR/TASK/ROW/lrX-seedY, and what is finished stays. Each row is trained at every rate with seed 0, then with the
other seeds at the rate of its lowest loss. Sizes are the skill's, everything else is the modern block trained by Muon
(config/presets/modern_muon.py), on which attention learns to recall within a few hundred steps; with AdamW it does not
within thousands. Rows change that block; one without attention has no positions, which its order makes superfluous.

Scores: the share of answers of the val split that are right; for state tracking also at longer rows, of the answers
beyond the trained length. State: bytes that decoding keeps after a whole row, for one sequence, the spare room of
its buffers included.
"""

import json
import math
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import configurator
from configurator import ConfigError, check_values
from data.corpus import DataError, load_meta
from data.files import fcntl, replace_file
from data.runs import find_checkpoint
from data.skills import tasks
from data.skills.prepare import prepare as prepare_rows
from lab import ablate
from lab.ablate import AblateConfig, find_rows, find_runs, front, markdown, read_json, words_of
from lab.cost import decoding_bytes
from lab.page import write_between_marks
from lab.pictures import TIGHT, png, pyplot, spread_out
from model import GPT, CheckpointError, GPTConfig, load_checkpoint
from train import TrainConfig


@dataclass
class SkillsConfig:
    """Which skills, how much training, and where runs and results lie."""

    # -- skills -------------------------------------------------------------------------------------------------------
    tasks: str = ""  # with commas; empty = all
    quick: bool = False  # small settings, one rate, one seed
    seeds: int | None = None  # how many per row; None = 3, or 1 if quick
    max_iters: int | None = None  # steps of a run; None = the skill's
    jobs: int = 2  # runs at a time, of one thread each
    device: str = "cpu"  # where they run
    out_dir: str = ""  # where data and runs lie; empty = out-skills, or out-skills-quick
    report: bool = False  # write what finished runs say to docs, and train nothing
    docs: str = "docs"  # results/skills.jsonl, img/ and the table in results.md

    def __post_init__(self):
        check_values(self, {"seeds jobs max_iters": "[1, inf)"})
        self.seeds = self.seeds or (1 if self.quick else 3)
        self.out_dir = self.out_dir or ("out-skills-quick" if self.quick else "out-skills")
        self.chosen = [name.strip() for name in self.tasks.split(",") if name.strip()] or list(SKILLS)
        if unknown := [name for name in self.chosen if name not in SKILLS]:
            raise ValueError(f"tasks={self.tasks}: no {unknown[0]!r}; there are {', '.join(SKILLS)}")


@dataclass(frozen=True)
class Skill:
    """How a task is trained; `small` is what --quick changes of its setting."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    batch: int = 64
    steps: int = 2000
    rates: tuple = (6e-3, 2e-2)  # muon_lr
    setting: dict = field(default_factory=dict)
    longer: tuple = ()  # T beyond the trained one
    val_rows: int = 1000
    small: dict = field(default_factory=dict)
    quick_batch: int = 64  # rows per step with --quick


SKILLS = {
    "mqar": Skill(64, 1, steps=3000, rates=(3e-3, 9e-3, 3e-2), setting={"vocab_size": 512},
                  small={"vocab_size": 64, "T": 32, "n": 4}, quick_batch=32),
    "in_context_recall": Skill(small={"T": 64}),
    "fuzzy_recall": Skill(small={"T": 64, "n": 4}),
    "noisy_recall": Skill(small={"T": 64}),
    "far_recall": Skill(64, small={"T": 64, "n": 4, "keys": 16}),
    "selective_copying": Skill(small={"T": 48, "n": 8}),
    "compression": Skill(),
    "memorisation": Skill(),
    "parity": Skill(longer=(64, 128, 256), small={"T": 24}, quick_batch=32),
    "s3": Skill(longer=(64, 128), small={"T": 16}),
    "a5": Skill(longer=(64, 128), small={"T": 16}),
    "depo": Skill(small={"n": 8, "k": 2, "questions": 6}),
    "mano": Skill(small={"T": 32, "operators": 3}),
}  # fmt: skip
QUICK = {"width": 64, "steps": 400, "rates": (9e-3,), "val_rows": 250}
ENOUGH = 0.9  # share of right answers from which on a seed counts as having learned the task


def skill_of(cfg, task):
    """The Skill as it is to be trained."""
    skill = vars(SKILLS[task])
    if cfg.quick:
        skill = skill | QUICK | {"setting": skill["setting"] | skill["small"], "batch": skill["quick_batch"]}
    return Skill(**skill | {"steps": cfg.max_iters or skill["steps"]})


# ---------------------------------------------------------------------------------------------------------------------
# Training, by lab.ablate.

BLOCK = "config/presets/modern_muon.py"  # what the rows change
RECIPE = """# python -m lab.skills wrote this: {task}, {setting}
data_dir, dataset = {data!r}, "skills/{task}"
n_layer, n_head, n_embd, block_size, bias = {layers}, {heads}, {width}, {T}, False
batch_size, gradient_accumulation_steps = {batch}, 1
max_iters = lr_decay_iters = {steps}
warmup_iters = {warmup}
eval_interval, eval_iters, log_interval = {interval}, 1, 50
device, compile = {device!r}, False
"""


def folders(cfg, task, skill):
    """The AblateConfig of a task, after its data and its recipe are there."""
    folder, data = Path(cfg.out_dir) / task, Path(cfg.out_dir) / "data"
    setting = tasks.setting_of(task, **skill.setting)
    if load_meta(data / "skills" / task).get("setting") != setting:
        rows = min(100_000, skill.steps * skill.batch)
        prepare_rows(task, setting, data / "skills" / task, rows, skill.val_rows)
    T = load_meta(data / "skills" / task)["row_tokens"]
    values = vars(skill) | {"setting": setting, "task": task, "data": str(data), "T": T, "device": cfg.device}
    text = RECIPE.format(**values, warmup=skill.steps // 10, interval=max(1, skill.steps // 10))
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "recipe.py", text.encode())
    return ablate_config(cfg, task)


def ablate_config(cfg, task):
    folder = Path(cfg.out_dir) / task
    return AblateConfig(recipe=f"{folder / 'recipe.py'},{BLOCK}", jobs=cfg.jobs, out_dir=str(folder), docs=cfg.out_dir,
                        keep="best")  # fmt: skip


def words_without_positions(config):
    """A row's words for train.py: without positions where it has no attention and names none itself."""
    words = words_of(config)
    given = configurator.read(words, TrainConfig, GPTConfig)
    model = GPTConfig(**{k: v for k, v in given.values.items() if k in given.given & vars(GPTConfig()).keys()})
    if model.has("has_scores"):
        return config
    without = {"pos_embedding": "none", "qk_norm": False}  # the block's settings that only attention uses
    more = [f"--{name}={value}" for name, value in without.items() if name not in given.given]
    return " ".join([shlex.join(words), *more])


def train(cfg, rows):
    """Train what is not finished of all rows {name: config} on the chosen tasks; the runs that failed."""
    rows = {name: words_without_positions(config) for name, config in rows.items()}
    skills = {task: skill_of(cfg, task) for task in cfg.chosen}
    homes = {task: folders(cfg, task, skill) for task, skill in skills.items()}
    pool, first = homes[cfg.chosen[0]], {}
    ablate.pick_format(pool, rows)  # one number format for all
    for task, skill in skills.items():
        for row, config in rows.items():
            first[task, row] = [ablate.prepare(homes[task], config, row, lr, 0) for lr in skill.rates]
    runs = sum(first.values(), [])
    ablate.train(pool, runs)
    others = [
        ablate.prepare(homes[task], rows[row], row, best.lr, seed)
        for (task, row), tried in first.items()
        if (best := best_of(tried))
        for seed in range(1, cfg.seeds)
    ]
    if others:
        ablate.train(pool, others)
    return [run for run in runs + others if run.failed]


def best_of(runs):
    """The finished run of the lowest loss, or None."""
    return min((run for run in runs if run.is_done), key=lambda run: run.loss, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.

TEXTS = 256  # rows that a longer length is measured on


@torch.no_grad()
def right_beyond(model, task, setting, T):
    """Share of right answers at positions beyond the trained length in rows of T; None where the model has none."""
    trained = model.config.block_size
    if model.max_positions is not None:
        if model.config.pos_embedding == "learned":
            return None
        model.extend_block_size(T)
    idx, targets = (
        torch.from_numpy(x) for x in tasks.TASKS[task](np.random.default_rng((1, T)), TEXTS, **setting, T=T)
    )
    guesses = torch.cat([model(x, y)[0].argmax(-1) for x, y in zip(idx.split(32), targets.split(32))])
    model.crop_block_size(trained)
    asked = targets[:, trained:] >= 0
    return (guesses == targets)[:, trained:][asked].double().mean().item()


def measure(task, run):
    """A finished run's record. What takes a model is measured once and kept in skill.json."""
    path = run.folder / "skill.json"
    found = read_json(path)
    asked = run.asked["settings"]
    if found is None:
        meta = load_meta(Path(asked["data_dir"]) / "skills" / task)
        model = GPT.from_checkpoint(load_checkpoint(find_checkpoint(run.folder, best=True))).eval()
        setting = {k: v for k, v in meta["setting"].items() if k != "T"}
        longer = {str(T): right_beyond(model, task, setting, T) for T in SKILLS[task].longer}
        size = decoding_bytes(model, model.config.block_size)
        found = {"setting": meta["setting"], "longer": longer, "state_bytes": size}
        replace_file(path, (json.dumps(found) + "\n").encode())
    learned = (line["iter"] for line in run.evaluations if line["val_accuracy"] >= ENOUGH)
    return {
        "task": task, "row": run.row, "seed": run.seed, "accuracy": run.evaluations[-1]["val_accuracy"],
        "loss": run.loss, "learned_at": next(learned, None), **found, "lr": run.lr,
        "steps": run.facts["config"]["max_iters"], "batch": asked["batch_size"], "layers": asked["n_layer"],
        "width": asked["n_embd"], "floor": tasks.floor(task, **found["setting"]), "flags": run.asked["config"],
        "parameters": run.facts["parameters"], "git_commit": run.facts["git_commit"], "block": BLOCK,
    }  # fmt: skip


def measured(cfg, rows=()):
    """Records of all finished runs in out_dir (of `rows`, if any), each row's at its best rate with seed 0."""
    found = []
    for task in cfg.chosen:
        runs = [run for run in find_runs(ablate_config(cfg, task)) if run.is_done and (not rows or run.row in rows)]
        for row in dict.fromkeys(run.row for run in runs):
            best = best_of([run for run in runs if run.row == row and run.seed == 0])
            found += [measure(task, run) for run in runs if best and run.row == row and run.lr == best.lr]
    return [record | {"quick": cfg.quick} for record in found]


# ---------------------------------------------------------------------------------------------------------------------
# The report. An axis is a task, or a task beyond its trained length; scores are {axis: {row: [share per seed]}}.


def scores_of(records):
    """({axis: {row: [share per seed]}}, {axis: share of a random guess}); no score where a row has no positions."""
    scores, floors = {}, {}
    for record in records:
        axes = {record["task"]: record["accuracy"]}
        axes |= {f"{record['task']}, {record['setting']['T']} to {T}": x for T, x in record["longer"].items()}
        for axis, score in axes.items():
            floors[axis] = record["floor"]
            if score is not None:
                scores.setdefault(axis, {}).setdefault(record["row"], []).append(score)
    return scores, floors


def table(records):
    """Lines of the table: a row's mean accuracies, and of several seeds how many got to 90 %."""
    scores, floors = scores_of(records)
    rows = dict.fromkeys(record["row"] for record in records)
    lines = [{"": ("random guess", None)} | {axis: (f"{floors[axis]:.3f}", None) for axis in scores}]
    for row in rows:
        cells = {"": (row, None)}
        for axis, each in scores.items():
            values = each.get(row, [])
            learned = f" ({sum(x >= ENOUGH for x in values)}/{len(values)})" if len(values) > 1 else ""
            cells[axis] = (f"{statistics.fmean(values):.3f}{learned}" if values else "", None)
        lines.append(cells)
    return lines


def profile(records):
    """Dots of each seed on one axis per task, a line of dots per row; grey: a random guess."""
    scores, floors = scores_of(records)
    rows = list(dict.fromkeys(record["row"] for record in records))
    size = (1.3 * len(scores) + 2, 0.35 * len(rows) + 1.6)
    figure, panels = pyplot().subplots(1, len(scores), figsize=size, sharey=True, squeeze=False, **TIGHT)
    for axes, (axis, each) in zip(panels[0], scores.items()):
        axes.axvline(floors[axis], color="lightgrey", lw=3)
        for y, row in enumerate(rows):
            axes.plot(each.get(row, []), [y] * len(each.get(row, [])), "o", color="tab:blue", alpha=0.6, ms=6)
        axes.set(xlim=(-0.05, 1.05), xticks=(0, 1))
        axes.set_title(axis.replace(", ", "\n").replace("_", "\n"), fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_yticks(range(len(rows)), rows, fontsize=8)
    panels[0][0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle("What each row can do, by skill", fontsize=10)
    figure.supxlabel("share of answers that are right; a dot is a seed, grey a random guess", fontsize=8)
    return figure


def against_state(records):
    """Accuracy against bytes of state, one panel per task; red and named: nothing is both smaller and better."""
    names = list(dict.fromkeys(record["task"] for record in records))
    across = min(4, len(names))
    down = math.ceil(len(names) / across)
    figure, panels = pyplot().subplots(down, across, figsize=(3.2 * across, 2.6 * down), squeeze=False, **TIGHT)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes, task in zip(panels.flat, names):
        groups = {}
        for record in records:
            if record["task"] == task:
                groups.setdefault(record["row"], []).append((record["state_bytes"], record["accuracy"]))
        points = {row: tuple(map(statistics.fmean, zip(*each))) for row, each in groups.items()}
        best = front({row: (size, -accuracy) for row, (size, accuracy) in points.items()})
        for row, (size, accuracy) in points.items():
            axes.plot(size, accuracy, "o", color="tab:red" if row in best else "grey", ms=5)
        named = sorted(best, key=lambda row: points[row][1])
        heights = spread_out([points[row][1] for row in named], 0.09)
        for row, height in zip(named, heights):
            axes.text(1.25 * points[row][0], height, row, fontsize=7, va="center", color="tab:red")
        largest = max(size for size, _ in points.values())
        axes.set(xscale="log", ylim=(-0.05, max(1.1, max(heights) + 0.08)), title=task)
        axes.set_xlim(right=12 * largest)  # room for its name
        axes.grid(alpha=0.3)
    figure.supxlabel("bytes of the state after a row\nred and named: nothing is both smaller and better", fontsize=8)
    figure.supylabel("share of answers that are right", fontsize=8)
    return figure


def key_of(record):
    return tuple(record.get(name) for name in ("block", "quick", "task", "row", "seed"))


def kept(cfg, records):
    """All records of docs, with `records` in the place of older ones of the same block, task, row and seed."""
    path = Path(cfg.docs) / "results" / "skills.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    order = {task: i for i, task in enumerate(SKILLS)}
    found = {key_of(r): r for r in [*map(json.loads, lines), *records]}.values()
    return path, sorted(found, key=lambda r: (r["quick"], order[r["task"]], r["row"], r["seed"]))


REMARK = (
    "`{command}`, rows changing `{block}`. Mean share of right answers, in brackets how many seeds got to 90 %. "
    "*a to b*: rows of b tokens after training on rows of a, the answers beyond a; empty where a row has no positions "
    "there."
)


def report(cfg, records):
    """Write docs/results/skills.jsonl, and pictures and the table of these settings."""
    path, every = kept(cfg, records)
    shown = [record for record in every if record["quick"] == cfg.quick and record.get("block") == BLOCK]
    if not shown:
        raise ConfigError(f"{cfg.out_dir}: no finished run, and no record in {path}")
    name = "skills-quick" if cfg.quick else "skills"
    images = {f"{name}-profile": profile(shown), f"{name}-state": against_state(shown)}
    for folder in ("results", "img"):
        (Path(cfg.docs) / folder).mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(record) + "\n" for record in every).encode())
    for image, figure in images.items():
        replace_file(Path(cfg.docs) / "img" / f"{image}.png", png(figure))
    remark = REMARK.format(command=f"python -m lab.skills ...{' --quick' if cfg.quick else ''}", block=BLOCK)
    title = "Skills, a first look" if cfg.quick else "Skills"
    parts = [f"## {title}", remark, markdown(table(shown)), *(f"![{image}](img/{image}.png)" for image in images)]
    write_between_marks(Path(cfg.docs) / "results.md", name, "\n\n".join(parts))
    print(f"wrote {path}, {Path(cfg.docs) / 'results.md'} and {', '.join(images)}.png in {Path(cfg.docs) / 'img'}")


def main(argv=None):
    with configurator.one_line_errors("lab.skills", CheckpointError, DataError, OSError):
        files, words = ablate.split_words(sys.argv[1:] if argv is None else argv)
        cfg = configurator.read(words or ([] if files else ["--help"]), SkillsConfig, doc=__doc__).build(SkillsConfig)
        rows, failed = find_rows(files), []
        if not (rows or cfg.report):
            raise ConfigError("name the config files to train, such as config/ablation/rope.py; or --report")
        if not cfg.report:
            if fcntl is None:
                raise ConfigError("training needs locks that a child process inherits, which Windows lacks: use WSL")
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, stop the runs
            failed = train(cfg, rows)
        records = measured(cfg, rows)
        if cfg.report:
            report(cfg, records)
        elif records:
            print(markdown(table(records)))
        for run in failed:
            print(f"failed: {run.folder}: {run.failed['error']}")
    raise SystemExit(int(bool(failed)))


if __name__ == "__main__":
    main()
