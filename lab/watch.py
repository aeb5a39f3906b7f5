"""
Watch runs while they train: curves in the terminal, and a page that refreshes itself.

    python -m lab.watch out                          # one run, until it ends; Ctrl-C ends the watching alone
    python -m lab.watch out-ablation/*/lr*-seed0     # several; a folder of runs stands for all runs below it
    python -m lab.watch out --once --page=watch.html # one look; the page has the picture and the table

The curve is val_loss, in nats per token, over training steps; --metric names another entry of metrics.jsonl (loss,
train_loss, val_bpb, grad_norm, tokens_per_s, ...). The table has each run's step, its last training loss, its best
validation loss, its speed, and the time left at that speed, evaluations included once there were some.
"""

import base64
import html
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import configurator
from configurator import ConfigError, check_values
from data.files import replace_file
from lab.pictures import TIGHT, png, pyplot, spread_out

LETTERS = "abcdefgh"  # one per curve, so at most eight are drawn; the table below lists every run


@dataclass
class WatchConfig:
    """What to show, and how often."""

    # -- watch --------------------------------------------------------------------------------------------------------
    metric: str = "val_loss"  # the curve: an entry of metrics.jsonl
    every: float = 10.0  # seconds between two looks
    once: bool = False  # look once, then stop
    page: str = ""  # also write this HTML page, which a browser loads again by itself; empty = none
    log_scale: bool = False  # both axes logarithmic: a power law is a straight line

    def __post_init__(self):
        check_values(self, {"every": "[0.1, inf)"})


class Watched:
    """What a run's folder says at the moment: its configuration, and the values of every step."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.values = []
        self.steps = None

    def look(self):
        """Read metrics.jsonl and run.json again; lines that a writer has not finished are left for the next look."""
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            self.steps = json.loads((self.folder / "run.json").read_bytes())["config"]["max_iters"]
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            lines = []  # it is just beginning
        self.values = [value for value in map(parsed, lines) if value]
        return self

    def curve(self, metric, above=-math.inf):
        """Steps and values of a metric above a limit, without the untrained model's: that would set the scale."""
        pairs = [(v["iter"], v[metric]) for v in self.values if isinstance(v.get(metric), (int, float))]
        pairs = [(step, value) for step, value in pairs if step and value > above]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, metric):
        return next((v[metric] for v in reversed(self.values) if v.get(metric) is not None), None)

    @property
    def step(self):
        """Finished steps: a value's `iter` counts from 0, and an evaluation's is that of the step to come."""
        return max((v["iter"] + ("loss" in v) for v in self.values), default=0)

    @property
    def seconds_left(self):
        """Time for the steps that are left, by the median step so far; None before the first."""
        times = sorted(v["ms"] for v in self.values if v.get("ms"))
        if not times or self.steps is None:
            return None
        return max(0, self.steps - self.step) * times[len(times) // 2] / 1e3

    def line(self, name):
        """A line of the table."""
        best = min(self.curve("val_loss")[1], default=None)
        speed, left = self.last("tokens_per_s"), self.seconds_left
        return {
            "run": name,
            "step": f"{self.step:,} / {self.steps:,}" if self.steps is not None else "not begun",
            "loss": "" if self.last("loss") is None else f"{self.last('loss'):.4f}",
            "best val loss": "" if best is None else f"{best:.4f}",
            "tokens/s": "" if speed is None else f"{speed:,.0f}",
            "left": "" if left is None else duration(left),
        }


def parsed(line):
    """A line of metrics.jsonl, or None if it is damaged."""
    try:
        value = json.loads(line)
        return value if isinstance(value.get("iter"), int) else None
    except (ValueError, AttributeError):
        return None


def duration(seconds):
    """0:42, 12:05 or 3:07:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def find(folders):
    """Names and runs: each folder with metrics.jsonl, and all those below the others. ConfigError if there are none."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        if (folder / "metrics.jsonl").exists() or (folder / "run.lock").exists():
            found.append(folder)
        else:
            found += sorted(path.parent for path in folder.glob("**/metrics.jsonl") if "previous-" not in str(path))
    if not found:
        raise ConfigError(f"{', '.join(map(str, folders))}: no run has written metrics.jsonl there yet")
    common = os.path.commonpath([path.parent for path in found])
    return {os.path.relpath(path, common): Watched(path) for path in dict.fromkeys(found)}


def chosen(runs, metric, above):
    """{name: (steps, values)} of the runs to draw: those with the lowest last value, and at least two points."""
    curves = {name: run.curve(metric, above) for name, run in runs.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    names = sorted(curves, key=lambda name: curves[name][1][-1])[: len(LETTERS)]
    return {name: curves[name] for name in names}


def terminal_plot(curves, cfg):
    """The curves as text, as wide as the terminal; a sentence where there are none."""
    if not curves:
        return f"no curve of {cfg.metric} yet: it needs two values"
    try:
        import plotext
    except ImportError:
        raise ConfigError("curves in the terminal need plotext: pip install -e '.[plot]'") from None
    size = shutil.get_terminal_size((100, 30))
    figure = plotext.figure.clear()
    figure.theme("simple" if sys.stdout.isatty() else "colorless")
    figure.canvas("default")
    figure.plot_size(size.columns, max(10, min(24, size.lines - len(curves) - 4)))
    scaled = (lambda numbers: [math.log10(x) for x in numbers]) if cfg.log_scale else list
    for i, (steps, values) in enumerate(curves.values()):
        steps, values = scaled(steps), scaled(values)
        figure.draw(figure.signal(steps, values, marker="braille").lines())
        at = (i + 1) * len(steps) // (len(curves) + 1)  # each letter elsewhere, so that they do not collide
        figure.draw(figure.text(steps[at], values[at], LETTERS[i]))
    figure.title(f"{cfg.metric} by training step")
    steps, values = (scaled(chain(*axis)) for axis in zip(*curves.values()))
    for axis, numbers, form in (("x", steps, ",.0f"), ("y", values, ".4g")):
        ticks = [min(numbers) + (max(numbers) - min(numbers)) * i / 5 for i in range(6)]
        figure.ruler(axis).ticks(ticks, [format(10**tick if cfg.log_scale else tick, form) for tick in ticks])
    text = str(figure.build())
    return text if sys.stdout.isatty() else plotext.uncolorize(text)


def picture(curves, cfg):
    """The curves as a PNG, each with its letter in the table at its end."""
    figure, axes = pyplot().subplots(figsize=(8, 4.5), **TIGHT)
    for letter, (steps, values) in zip(LETTERS, curves.values()):
        axes.plot(steps, values, label=letter, lw=1.2)
    if cfg.log_scale:
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel="training steps", ylabel=unit(cfg.metric), title=f"{cfg.metric} of {len(curves)} runs")
    if curves:
        label_ends(axes, curves)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def label_ends(axes, curves):
    """Each curve's letter beside its last point, in its colour, moved apart where they would collide."""
    ends = [values[-1] for _, values in curves.values()]
    axes.autoscale_view()  # before positions are read
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((1, end))[1] for end in ends]
    for line, height in zip(axes.lines, spread_out(heights, 0.05)):
        axes.text(1.01, height, line.get_label(), color=line.get_color(), transform=axes.transAxes, va="center")


def unit(metric):
    if metric.endswith("loss"):
        return f"{metric} (nats per token)"
    return {"val_bpb": "val_bpb (bits per byte)", "ms": "ms per step"}.get(metric, metric.replace("_per_", " per "))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem }
img { max-width: 100%; background: white } table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884 }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } }
"""


def page(curves, lines, cfg):
    """The page: title, time, picture, table; a browser loads it again as often as it is written."""
    rows = ["".join(f"<th>{html.escape(key)}</th>" for key in lines[0])]
    rows += ["".join(f"<td>{html.escape(text)}</td>" for text in line.values()) for line in lines]
    image = base64.b64encode(picture(curves, cfg)).decode()
    reload = "" if cfg.once else f'<meta http-equiv="refresh" content="{max(1, round(cfg.every))}">'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{reload}<title>{html.escape(cfg.metric)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{len(lines)} runs</h1><p>{time.strftime('%Y-%m-%d %H:%M:%S')}</p>\n"
        f'<img alt="{html.escape(cfg.metric)} by training step" src="data:image/png;base64,{image}">\n'
        f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></body></html>\n"
    )


def table(lines):
    """The lines under their heads, in columns."""
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def look(runs, cfg):
    """Read all runs once, show them, write the page."""
    for run in runs.values():
        run.look()
    curves = chosen(runs, cfg.metric, 0 if cfg.log_scale else -math.inf)
    letters = dict(zip(curves, LETTERS))
    names = [*curves, *sorted(runs.keys() - curves.keys())]
    lines = [{"": letters.get(name, "")} | runs[name].line(name) for name in names]
    clear = "\033[2J\033[H" if sys.stdout.isatty() and not cfg.once else ""
    print(f"{clear}{terminal_plot(curves, cfg)}\n\n{table(lines)}", flush=True)
    if cfg.page:
        replace_file(Path(cfg.page), page(curves, lines, cfg).encode())


def main(argv=None):
    with configurator.one_line_errors("lab.watch", OSError):
        words = sys.argv[1:] if argv is None else argv
        folders = [word for word in words if not word.startswith("-")]
        words = [word for word in words if word.startswith("-")]
        cfg = configurator.read(words or ([] if folders else ["--help"]), WatchConfig, doc=__doc__).build(WatchConfig)
        runs = find(folders or ["out"])
        try:
            look(runs, cfg)
            while not cfg.once and any(run.step != run.steps for run in runs.values()):
                time.sleep(cfg.every)
                look(runs, cfg)
        except KeyboardInterrupt:  # how watching usually ends
            print()


if __name__ == "__main__":
    main()
