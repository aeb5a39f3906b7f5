"""lab.ablate: tiny comparisons from end to end, stopped and failed runs, the report's numbers worked out by hand."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from scipy import stats

from configurator import ConfigError
from helpers import ROOT, TrainHere, command_here
from lab import ablate
from lab.ablate import AblateConfig, Difference, Run, difference, find_runs, front
from lab.page import drawn, scale_of

pytestmark = pytest.mark.slow

TINY = """
data_dir, dataset = {folder!r}, {name!r}
n_layer, n_head, n_embd, block_size, bias = 1, 2, 16, 16, False
batch_size, gradient_accumulation_steps, max_iters, lr_decay_iters = 4, 1, {steps}, {steps}
warmup_iters, learning_rate, eval_interval, eval_iters, log_interval = 2, 1e-3, {interval}, 1, 1
device, dtype, compile = "cpu", "float32", False
"""


@pytest.fixture
def recipe(shakespeare, tmp_path):
    """recipe(steps, interval) -> the path of a config file for a run that takes moments."""

    def write(steps=4, interval=2):
        path = tmp_path / "recipe.py"
        values = {"folder": str(shakespeare.parent), "name": shakespeare.name, "steps": steps, "interval": interval}
        path.write_text(TINY.format(**values))
        return path

    return write


def config(tmp_path, row, text=""):
    path = tmp_path / f"{row}.py"
    path.write_text(text)
    return path


run_here = partial(command_here, ablate.main)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(ablate, "Popen", TrainHere)


class Page(HTMLParser):
    """The cells of all tables, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.fetched, self.open = [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k == "src" or (k == "href" and tag != "a")]
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text


def table_under(text, title):
    """{row: {header: cell}} of the Markdown table under a heading."""
    lines = text.split(f"## {title}\n\n")[1].split("\n\n")
    lines = next(part for part in lines if part.startswith("|")).splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells)) for cells in body}


@pytest.fixture
def tiny(recipe, tmp_path, in_process):
    """Two rows with two seeds each, trained: where they lie, the command that trained them, the finished runs."""
    out, docs = tmp_path / "out-tiny", tmp_path / "docs"
    rows = [config(tmp_path, "baseline"), config(tmp_path, "relu2", '# A control.\nmlp_act = "relu2"\n')]
    words = [*rows, f"--recipe={recipe()}", "--seeds=2", f"--out_dir={out}", "--jobs=2"]
    assert run_here(*words) == 0
    runs = find_runs(AblateConfig(out_dir=str(out)))
    loss = {row: [run.loss for run in runs if run.row == row] for row in ("baseline", "relu2")}
    return SimpleNamespace(folder=tmp_path, out=out, docs=docs, words=words, runs=runs, loss=loss)


def report(tiny):
    """The tables of the two rows, written anew."""
    assert run_here("--report", f"--out_dir={tiny.out}", f"--docs={tiny.docs}") == 0
    return (tiny.docs / "results/tiny.md").read_text()


def test_two_configs_two_seeds(tiny):
    assert [(run.row, run.lr, run.seed, run.is_done) for run in tiny.runs] == [
        (row, 0.001, seed, True) for row in ("baseline", "relu2") for seed in (0, 1)
    ]
    assert len({run.loss for run in tiny.runs}) == 4
    for run in tiny.runs:
        assert run.facts["config"]["eval_full"] and run.asked["settings"]["seed"] == run.facts["config"]["seed"]
        assert run.asked["source"]["of"] == "its specialised file" and run.wall_s > 0
        assert run.facts["machine"].keys() == {"cpu", "cores", "threads", "gpu"} and len(run.facts["data_id"]) == 64
        assert run.asked["text"] == (tiny.folder / f"{run.row}.py").read_text() and "git_commit" in run.facts
        assert (run.folder / "ckpt.pt").exists() == (run.seed == 0) and not (run.folder / "ckpt_last.pt").exists()


def test_a_second_call_trains_nothing(tiny, recipe, capsys):
    stamps = {run.folder: os.stat(run.folder / "metrics.jsonl").st_mtime_ns for run in tiny.runs}
    assert run_here(*tiny.words) == 0
    assert stamps == {folder: os.stat(folder / "metrics.jsonl").st_mtime_ns for folder in stamps}
    assert "4 runs, 4 of them finished before" in capsys.readouterr().out
    recipe(6)  # the recipe's file changed: what lies there is another run, which is told and not overwritten
    assert run_here(*tiny.words) == 2
    assert "lr_decay_iters=4, not 6, max_iters=4, not 6" in capsys.readouterr().err


def test_the_report_by_hand(tiny):
    tiny.docs.mkdir()
    (tiny.docs / "results.md").write_text("# By hand\n")
    report(tiny)
    text = report(tiny)  # the second replaces the first
    whole = (tiny.docs / "results.md").read_text()
    assert whole.startswith("# By hand\n\n<!-- tiny:start -->") and whole.count("<!-- tiny:") == 2
    assert list(table_under(whole, "Comparison: tiny")) == list(table_under(text, "Loss, lr 0.001"))
    assert "(results/tiny.md)" in whole
    table = table_under(text, "Loss, lr 0.001")
    for row, values in tiny.loss.items():
        spread = abs(values[0] - values[1]) / math.sqrt(2)
        assert table[row]["val loss"] == f"{sum(values) / 2:.4f} ± {spread:.4f}"
        assert table[row]["seeds"] == "2"
    gaps = [a - b for a, b in zip(tiny.loss["relu2"], tiny.loss["baseline"])]
    half = stats.t.ppf(0.975, 1) * abs(gaps[0] - gaps[1]) / 2  # stdev = |difference| / sqrt 2, over sqrt 2
    assert table["relu2"]["to baseline"] == f"{sum(gaps) / 2:+.4f} ± {half:.4f}"
    bits = statistics.fmean(tiny.loss["baseline"]) / math.log(2)
    assert math.isclose(float(table["baseline"]["bits per byte"]), bits, abs_tol=6e-5)  # a character is a byte


def test_the_cost_by_hand(tiny):
    text = report(tiny)
    cost = table_under(text, "Cost")
    # a block of width 16: 12 16^2 weights and two norms, the last norm, the embedding; the position table is left out
    vocabulary = tiny.runs[0].facts["model_args"]["vocab_size"]
    assert cost["baseline"]["parameters"] == f"{12 * 256 + 3 * 16 + vocabulary * 16:,} (1.00x)"
    flops = 3 * (2 * (12 * 256 + vocabulary * 16) + 4 * 16 * 17 / 2)
    assert cost["baseline"]["MFLOPs per token"] == f"{flops / 1e6:.2f} (1.00x)"
    assert table_under(text, "Matched time, lr 0.001")["baseline"]["steps done by then"] == "100%"
    assert cost["relu2"]["speed"].startswith("~") and cost["relu2"]["peak MB"] == ""


def test_the_page(tiny):
    text = report(tiny)
    table = table_under(text, "Loss, lr 0.001")
    written = (tiny.docs / "tiny.html").read_text()
    page = Page(written)
    assert page.fetched and all(link.startswith("data:image/png;base64,") for link in page.fetched)
    assert "http" not in written
    assert page.tables[0][0] == list(table["relu2"])
    assert {row[0]: row[1] for row in page.tables[0][1:]} == {row: table[row]["val loss"] for row in table}
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (tiny.docs / "results" / name).stat().st_size > 1000


def test_steps_are_measured_once(tiny, capsys, monkeypatch):
    monkeypatch.setattr(ablate.measure, "speeds", lambda seconds: [{}, {"speed": 0.5, "low": 0.4, "high": 0.6}])
    monkeypatch.setattr(ablate.measure, "in_fresh_process", lambda *args: 7.0)
    monkeypatch.setattr(ablate.measure, "interleave", lambda steps, rounds, device: list(steps))
    for _ in range(2):
        assert run_here("--time", f"--out_dir={tiny.out}", f"--docs={tiny.docs}") == 0
        text = report(tiny)
    said = capsys.readouterr().out
    assert said.count("relu2: 0.50x, 7.0 MB") == 1 == said.count("baseline: 0.50x")
    cost = table_under(text, "Cost")["relu2"]
    assert (cost["speed"], cost["peak MB"]) == ("0.50x (0.40 to 0.60)", "7")
    assert "relu2" not in table_under(text, "Matched time, lr 0.001")  # at half speed, three evaluations are too few


def test_pictures_need_runs_of_their_rows(tiny, capsys):
    report(tiny)
    assert run_here("--pictures", f"--out_dir={tiny.out}", f"--docs={tiny.docs}") == 0
    assert re.search(r"^waves: skipped, .*no finished run of fhn", capsys.readouterr().out, re.MULTILINE)


def test_tuned_column(recipe, tmp_path, in_process):
    out, docs = tmp_path / "out-tuned", tmp_path / "docs"
    rows = [config(tmp_path, "baseline"), config(tmp_path, "bias", "bias = True\n")]
    words = [*rows, f"--recipe={recipe()}", "--seeds=2", "--tune", "--learning_rates=0.1", f"--out_dir={out}"]
    assert run_here(*words) == 0
    runs = [run for run in find_runs(AblateConfig(out_dir=str(out))) if run.is_done]
    for row in ("baseline", "bias"):
        losses = {run.lr: run.loss for run in runs if run.row == row and run.seed == 0}
        best = min(losses, key=losses.get)
        assert {0.1, 0.067, 0.15} <= losses.keys()
        assert min(losses) < best < max(losses)  # worse on both sides
        assert [run.lr for run in runs if run.row == row and run.seed == 1] == [best]  # other seeds only there
    assert run_here("--report", "--learning_rates=0.1", f"--out_dir={out}", f"--docs={docs}") == 0
    text = (docs / "results/tuned.md").read_text()
    assert re.findall(r"^## Loss, (.*)$", text, re.MULTILINE) == ["lr 0.1", "tuned"]
    tuned = table_under(text, "Loss, tuned")["bias"]
    assert (tuned["lr"], tuned["rate"], tuned["verdict"]) == (f"{best:g}", "tuned", "2 seeds")
    losses = [Run(out / "bias" / f"lr{best:g}-seed{seed}").loss for seed in (0, 1)]
    assert table_under(text, "Loss, tuned")["bias"]["val loss"].startswith(f"{statistics.fmean(losses):.4f}")


def test_tuning_waits_for_the_rates_that_another_process_trains(recipe, tmp_path, in_process, monkeypatch, capsys):
    """The best rate is that of all, so that other seeds are trained there alone."""
    out, hidden = tmp_path / "out-shared", tmp_path / "metrics.jsonl"
    words = [config(tmp_path, "baseline"), f"--recipe={recipe()}", "--tune", f"--out_dir={out}"]
    assert run_here(*words, "--seeds=1", "--learning_rates=0.1") == 0
    run = min(find_runs(AblateConfig(out_dir=str(out))), key=lambda run: run.loss)
    best = run.folder
    (best / "metrics.jsonl").rename(hidden)
    with open(best / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def end():
            hidden.rename(best / "metrics.jsonl")
            fcntl.flock(lock, fcntl.LOCK_UN)

        def start(cfg, run, before=ablate.start):
            process = before(cfg, run)
            if process is None:  # the other one needs half a second more
                threading.Timer(0.5, end).start()
            return process

        monkeypatch.setattr(ablate, "start", start)
        capsys.readouterr()
        assert run_here(*words, "--seeds=2", f"--learning_rates={run.lr}") == 0
    assert capsys.readouterr().out.count("is being trained by another process") == 1
    assert [path.name for path in out.glob("baseline/*-seed1")] == [best.name.replace("seed0", "seed1")]


def test_rates_are_tried_until_worse_ones_lie_on_both_sides():
    """On losses that are a parabola in log rate, the search ends at the best rate of its grid wherever it begins."""
    for optimum in (1e-4, 9e-4, 2e-3, 0.03):
        tried = {}
        while wanted := ablate.rates_to_try(tried, [2e-3]):
            tried |= {lr: math.log(lr / optimum) ** 2 for lr in wanted}
        best = min(tried, key=tried.get)
        assert abs(math.log(best / optimum)) <= math.log(1.5) / 2 + 0.05 or len(tried) == ablate.MOST_RATES
        assert min(tried) < best < max(tried) or len(tried) == ablate.MOST_RATES
    assert ablate.rates_to_try({}, [2e-3]) == [2e-3]
    assert ablate.rates_to_try({2e-3: 1.0}, [2e-3]) == [1.3e-3, 3e-3]
    assert ablate.rates_to_try({2e-3: 1.0, 3e-3: math.inf}, [2e-3]) == [1.3e-3]  # what diverges is worse
    assert ablate.rates_to_try({2e-3: math.inf}, [2e-3]) == []  # nothing trains
    assert ablate.rates_to_try({lr * 1e-4: lr for lr in range(1, 10)}, [1e-4]) == []  # enough were tried


class Done:
    """A finished run as the report sees it."""

    is_done = True

    def __init__(self, row, lr, loss, seed=0):
        self.row, self.lr, self.loss, self.seed = row, lr, loss, seed


def test_best_rates_weigh_means_of_equally_many_seeds():
    runs = [Done("a", 1e-3, 2.0), Done("a", 1e-3, 2.2, 1), Done("a", 3e-3, 1.9), Done("a", 3e-3, 2.1, 1)]
    runs += [Done("a", 5e-3, 1.5), Done("b", 3e-3, 3.0)]  # one lucky seed at 5e-3 does not count
    found = ablate.best_rates(runs)
    assert (found["a"]["lr"], found["b"]["lr"]) == (3e-3, 3e-3)
    assert found["a"]["losses"] == pytest.approx({1e-3: 2.1, 3e-3: 2.0, 5e-3: 1.5})
    assert ablate.best_rates(runs[:2]) == {}


def test_a_rate_is_bracketed_by_worse_ones_on_the_same_seeds():
    """Seed 1 is a bad draw: the best rate's mean of two seeds must not be held against one lucky seed of another."""
    runs = [Done("a", 2e-3, 1.9), Done("a", 2e-3, 2.5, 1), Done("a", 1e-3, 2.0), Done("a", 3e-3, 1.95)]
    found = ablate.best_rates(runs)["a"]
    assert found["lr"] == 2e-3 and found["is_bracketed"] and ablate.bracket(found) == "tuned"
    for lower_or_higher in (runs[:3], [*runs[:2], runs[3]], [*runs[:3], Done("a", 3e-3, 1.8)]):
        found = ablate.best_rates(lower_or_higher)["a"]
        assert found["lr"] == 2e-3 and ablate.bracket(found) == "unbracketed"


def test_speeds_are_measured_or_all_are_logged():
    assert ablate.is_timed("relu2", {})
    assert [ablate.is_timed(row, {"relu2": {}}) for row in ("relu2", "baseline", "fhn")] == [True, True, False]


def test_a_step_is_timed_with_the_rows_own_optimizer(tmp_path, monkeypatch):
    def run(row, **settings):
        return SimpleNamespace(row=row, is_done=True, changed_args={}, asked={"settings": {"batch_size": 2} | settings})

    seen = []
    monkeypatch.setattr(ablate.bench, "our_step", lambda *args, optimizer: seen.append(optimizer))
    monkeypatch.setattr(ablate.measure, "interleave", lambda *args: None)
    monkeypatch.setattr(ablate.measure, "speeds", lambda times: [{"speed": 1.0, "low": 1.0, "high": 1.0}])
    monkeypatch.setattr(ablate.measure, "in_fresh_process", lambda *args: 1)
    cfg = AblateConfig(out_dir=str(tmp_path / "out-timed"), docs=str(tmp_path))
    ablate.time_rows(cfg, [run("baseline"), run("idea", optimizer="muon")])
    assert seen == ["adamw", "adamw", "muon"]


def test_plots_of_many_rows_leave_out_the_worst_tenth():
    assert ablate.ceiling([1.0, 2.0, 37.0]) == (37.0, "")
    assert ablate.ceiling([*(1 + i / 100 for i in range(27)), 5.0, 6.0, 37.0]) == (5.0, ", 2 rows above")


def test_reports_name_the_device(recipe, tmp_path, in_process):
    out, docs = tmp_path / "out-there", tmp_path / "docs"
    words = [f"--recipe={recipe()}", f"--out_dir={out}", f"--docs={docs}"]
    assert run_here(config(tmp_path, "baseline"), "--seeds=1", *words) == 0
    facts = out / "baseline" / "lr0.001-seed0" / "run.json"
    facts.write_text(facts.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert run_here("--report", *words) == 0
    assert re.search(r"machine [^;]*, cuda, ", (docs / "results/there.md").read_text())
    assert json.loads((docs / "results" / "there.jsonl").read_text())["facts"]["device"] == "cuda"


def test_records_stand_for_runs(recipe, tmp_path, capsys, in_process):
    """What is committed is enough for the same report elsewhere, and for training only what is missing."""
    docs, here, there = tmp_path / "docs", tmp_path / "a/out-tiny", tmp_path / "b/out-tiny"
    rows = [config(tmp_path, "baseline"), config(tmp_path, "relu2", 'mlp_act = "relu2"\n')]
    words = [f"--recipe={recipe()}", f"--docs={docs}"]
    assert run_here(*rows, *words, "--seeds=1", f"--out_dir={here}") == 0
    assert run_here("--report", *words, f"--out_dir={here}") == 0
    lines = (docs / "results/tiny.jsonl").read_text().splitlines()
    assert [json.loads(line)["asked"]["row"] for line in lines] == ["baseline", "relu2"]
    first = (docs / "results.md").read_text()
    assert run_here("--report", rows[1], *words, f"--out_dir={here}") == 0  # a report of one row keeps all records
    assert (docs / "results/tiny.jsonl").read_text().splitlines() == lines
    assert run_here("--report", *words, f"--out_dir={there}") == 0
    assert (docs / "results.md").read_text() == first
    assert (docs / "results/tiny.jsonl").read_text().splitlines() == lines

    capsys.readouterr()
    assert run_here(*rows, *words, "--seeds=2", f"--out_dir={there}") == 0
    said = capsys.readouterr().out
    assert "4 runs, 2 of them finished before" in said and "4 of 4 runs finished, 0 failed" in said
    assert sorted(path.parent.name for path in there.glob("*/*/metrics.jsonl")) == ["lr0.001-seed1"] * 2
    rows[1].write_text("bias = True\n")  # another model under the same name: its record says nothing of it
    assert run_here(rows[1], *words, "--seeds=1", f"--out_dir={there}") == 0
    assert "1 runs, 0 of them finished before" in capsys.readouterr().out


def test_a_killed_run_goes_on_where_it_was(recipe, tmp_path, capsys):
    rows, steps, out = [config(tmp_path, "baseline")], 1000, tmp_path / "out-killed"
    words = [str(word) for word in (*rows, f"--recipe={recipe(steps, interval=100)}", "--seeds=1", f"--out_dir={out}")]
    folder = out / "baseline/lr0.001-seed0"
    process = subprocess.Popen([sys.executable, "-m", "lab.ablate", *words], start_new_session=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 100
        while len(Run(folder).evaluations) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGSTOP)  # it cannot end meanwhile, however busy the machine is
        assert run_here(*words) == 0  # another call keeps its hands off what is being trained
        assert "is being trained by another process" in capsys.readouterr().out
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(folder / "lock") as lock:  # its child, killed too, lets go of it once it is gone
        fcntl.flock(lock, fcntl.LOCK_EX)
    stopped = Run(folder)
    assert not stopped.is_done and not stopped.failed and (folder / "ckpt_last.pt").exists()
    assert run_here(*words) == 0
    resumed = Run(folder)
    assert resumed.is_done and resumed.evaluations[-1]["iter"] == steps
    assert [line["iter"] for line in resumed.evaluations] == list(range(0, steps + 1, 100))
    assert resumed.asked["source"] == stopped.asked["source"]
    kept = {line["iter"]: line["tokens_per_s"] for line in stopped.steps if line["iter"] < 200}
    assert kept and kept.items() <= {line["iter"]: line["tokens_per_s"] for line in resumed.steps}.items()  # not redone


def test_what_other_code_began_starts_again(recipe, tmp_path, in_process):
    """Half a run of one model.py and half of another would be a result of neither."""
    rows, out = [config(tmp_path, "baseline")], tmp_path / "out-changed"
    words = [*rows, f"--recipe={recipe(6, interval=2)}", "--seeds=1", f"--out_dir={out}"]
    folder = out / "baseline/lr0.001-seed0"
    assert run_here(*words) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "ckpt.pt").rename(folder / "ckpt_last.pt")
    (folder / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")  # as if it had been stopped
    asked = json.loads((folder / "ablate.json").read_text())
    (folder / "ablate.json").write_text(json.dumps(asked | {"source": asked["source"] | {"model": "older"}}))
    assert run_here(*words) == 0
    again = Run(folder)
    assert again.is_done and again.asked["source"] == asked["source"]
    assert again.evaluations[0]["iter"] == 0 and (folder / "previous-1/ckpt_last.pt").exists()


def test_a_row_by_its_flags_alone(recipe, tmp_path, capsys, in_process):
    """And under Muon the rate that is varied is its own."""
    words = [config(tmp_path, "baseline"), "by_muon: --optimizer=muon --bias=True", f"--recipe={recipe()}", "--seeds=1"]
    out = tmp_path / "out-flags"
    assert run_here(*words, f"--out_dir={out}", "--learning_rates=0.01") == 0
    plain, muon = Run(out / "baseline/lr0.01-seed0"), Run(out / "by_muon/lr0.01-seed0")
    assert plain.is_done and muon.is_done
    assert plain.facts["config"]["learning_rate"] == 0.01 and plain.facts["config"]["optimizer"] == "adamw"
    assert muon.facts["config"]["muon_lr"] == 0.01 and muon.facts["config"]["learning_rate"] == 1e-3
    assert muon.facts["model_args"]["bias"] and muon.asked["text"] == "--optimizer=muon --bias=True"
    capsys.readouterr()
    assert run_here(*words, f"--out_dir={out}", "--learning_rates=0.01") == 0
    assert "2 runs, 2 of them finished before" in capsys.readouterr().out


def test_a_failed_run_is_marked_and_tried_again(recipe, tmp_path, capsys):
    out = tmp_path / "out-failed"
    rows = [config(tmp_path, "baseline"), config(tmp_path, "broken", 'mlp_act = "no such thing"\n')]
    words = [*rows, f"--recipe={recipe()}", "--seeds=1", f"--out_dir={out}"]
    assert run_here(*words) == 1
    broken = Run(out / "broken/lr0.001-seed0")
    assert broken.failed["status"] == 2 and "mlp_act='no such thing'" in broken.failed["error"]
    assert not broken.is_done and Run(out / "baseline/lr0.001-seed0").is_done
    assert "1 of 2 runs finished, 1 failed" in capsys.readouterr().out
    assert run_here("--report", f"--out_dir={out}", f"--docs={tmp_path}") == 0
    text = (tmp_path / "results/failed.md").read_text()
    assert list(table_under(text, "Loss, lr 0.001")) == ["baseline"] and "Failed, and in no table: broken" in text
    config(tmp_path, "broken", 'mlp_act = "relu2"\n')
    assert run_here(*words) == 0
    mended = Run(out / "broken/lr0.001-seed0")
    assert mended.is_done and not mended.failed and mended.facts["model_args"]["mlp_act"] == "relu2"
    (mended.folder / "failed.json").write_text('{"status": 1, "error": "while saving"}')
    assert not Run(mended.folder).is_done  # however far its metrics go


@pytest.mark.parametrize("words, said", [
    (["--seeds=0", "x.py"], "seeds=0: must be in [1, inf)"),
    (["nowhere.py"], "nowhere.py: no such config file"),
    (["--report", "--out_dir=nowhere"], "nowhere: no finished runs"),
    (["--seeds=2"], "name the config files to train"),
    (["--learning_rates=fast", "x.py"], "learning_rates=fast: expected numbers"),
    (["--sed=1", "x.py"], "did you mean"),
    (["config/ablation/bio.py", "config/presets/bio.py"], "would both be the row bio"),
])  # fmt: skip
def test_mistakes_are_told_in_one_line(words, said, capsys):
    assert run_here(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.ablate: error: ") and said in error and error.count("\n") == 1


def test_difference():
    paired = difference({0: 1.0, 1: 1.3, 2: 1.1, 9: 7.0}, {0: 1.2, 1: 1.4, 2: 1.4})
    interval = stats.ttest_rel([1.0, 1.3, 1.1], [1.2, 1.4, 1.4]).confidence_interval()
    assert paired.kind == "paired" and math.isclose(paired.mean, -0.2)
    assert math.isclose(paired.half, (interval.high - interval.low) / 2, rel_tol=1e-3)
    assert paired.verdict == ""  # three seeds 0.1 apart are not enough
    a, b = {0: 1.0, 1: 1.02, 2: 1.01}, {3: 1.2, 4: 1.21, 5: 1.22}
    welch = difference(a, b)
    interval = stats.ttest_ind(list(a.values()), list(b.values()), equal_var=False).confidence_interval()
    assert welch.kind == "Welch" and math.isclose(welch.half, (interval.high - interval.low) / 2, rel_tol=0.1)
    assert welch.verdict == "better (Welch)"
    assert difference({0: 1.0}, {0: 1.5}) == Difference(-0.5, None, "one seed")


def test_a_queue_says_what_is_left(monkeypatch, capsys):
    """By the time per run so far; a run that another process trains took none of it."""
    now = [1000.0]
    monkeypatch.setattr(ablate.time, "monotonic", lambda: now[0])
    ours, theirs = SimpleNamespace(began=1.0), SimpleNamespace(began=None)
    queue = ablate.Queue(5)
    queue.ended(theirs, "elsewhere")
    now[0] += 90
    queue.ended(ours, "done")
    now[0] += 3600 - 90
    queue.ended(ours, "done")
    queue.ended(theirs, "elsewhere")
    queue.ended(ours, "done")
    left = [line.partition(";")[2] for line in capsys.readouterr().out.splitlines()]
    assert left == ["", " about 5 min left", " about 1.0 h left", " about 30 min left", ""]


def test_a_queue_on_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(ablate.sys.stderr, "isatty", lambda: True, raising=False)
    queue = ablate.Queue(2)
    for _ in range(2):
        queue.ended(SimpleNamespace(began=1.0), "done")
    queue.bar.close()
    told = capsys.readouterr()
    assert "2/2" in told.err and told.out.count("done") == 2 and "left" not in told.out


def test_pareto_front():
    points = {"cheap": (1, 3), "good": (3, 1), "middle": (2, 2), "bad": (3, 3), "same": (2, 2)}
    assert front(points) == {"cheap", "good", "middle", "same"}


def test_marks_are_kept(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("before\n<!-- a:start -->\nold\n<!-- a:end -->\nafter\n")
    ablate.write_between_marks(path, "a", "new")
    assert path.read_text() == "before\n<!-- a:start -->\n\nnew\n\n<!-- a:end -->\nafter\n"
    ablate.write_between_marks(path, "b", "more")
    assert path.read_text().endswith("after\n\n<!-- b:start -->\n\nmore\n\n<!-- b:end -->\n")
    path.write_text("<!-- a:start -->\n")
    with pytest.raises(ConfigError, match="only one of the marks"):
        ablate.write_between_marks(path, "a", "new")


def test_the_page_in_a_browser(recipe, tmp_path, in_process):
    """It opens from disk, sorts by a click on a header, shows its plots, and the console stays empty."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (driver := shutil.which("chromedriver")):
        pytest.skip("no chromedriver; Debian has it: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    out = tmp_path / "out-page"
    rows = [
        config(tmp_path, "baseline"),
        config(tmp_path, "relu2", 'mlp_act = "relu2"\n'),
        config(tmp_path, "bias", "bias = True\n"),
    ]
    assert run_here(*rows, f"--recipe={recipe(8)}", "--seeds=1", f"--out_dir={out}") == 0
    assert run_here("--report", f"--recipe={recipe(8)}", f"--out_dir={out}", f"--docs={tmp_path}") == 0
    options = webdriver.ChromeOptions()
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update",
                 "disable-sync", "no-first-run", f"user-data-dir={tmp_path / 'browser'}"):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        for width in (1280, 390):
            size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((tmp_path / "page.html").as_uri())
            assert browser.execute_script("return innerWidth") == width
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
            sort_and_filter(browser)
            widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
            assert len(widths) == 2 and min(widths) > 300
            assert browser.get_log("browser") == []
    finally:
        browser.quit()


def sort_and_filter(browser):
    first = "document.querySelectorAll('table')[0]"
    cells = f"return [...{first}.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].textContent)"
    order = f"return {first}.tHead.rows[0].cells[0].ariaSort"
    assert sorted(browser.execute_script(cells)) == ["baseline", "bias", "relu2"]
    for sort, rows in (("ascending", ["baseline", "bias", "relu2"]), ("descending", ["relu2", "bias", "baseline"])):
        browser.execute_script(f"{first}.tHead.rows[0].cells[0].click()")
        assert browser.execute_script(cells) == rows and browser.execute_script(order) == sort
    words = "const f = document.querySelector('input'); f.value = arguments[0]; f.dispatchEvent(new Event('input'))"
    browser.execute_script(words, "relu, base")
    assert browser.execute_script(cells) == ["relu2", "baseline"]
    assert not browser.execute_script("return document.querySelector('#row-relu2').hidden")
    assert browser.execute_script("return document.querySelector('#row-bias').hidden")
    browser.execute_script(words, "")
    assert len(browser.execute_script(cells)) == 3
    targets = "return [...document.querySelectorAll('td a')].every(a => document.querySelector(a.getAttribute('href')))"
    assert browser.execute_script(targets)


def test_intervals_are_drawn_to_scale():
    """Zero in the middle, the largest interval of the table at an end, in the colour of its verdict."""
    table = [{"row": ("a", "a"), "to baseline": (text, 0)} for text in ("-0.0300 ± 0.0100", "+0.0200 ± 0.0300", "")]
    assert scale_of(table) == pytest.approx(0.05) and scale_of(table[2:]) == 0
    better, unknown = (
        re.sub(r"<path[^>]*stroke=.#8888./>", "", drawn(cells["to baseline"][0], 0.05)) for cells in table[:2]
    )
    assert "M10.0 6H30.0" in better and 'cx="20.0"' in better and "var(--better)" in better
    assert "M40.0 6H100.0" in unknown and 'cx="70.0"' in unknown and "color: inherit" in unknown
    assert "var(--worse)" in drawn("+0.0400 ± 0.0100", 0.05) and "inherit" in drawn("-0.0400", 0.05)
    far = [{"row": ("a", "a"), "to baseline": (f"+{x:.4f}", x)} for x in (0.01, 0.02, 0.03, 5.0)]
    assert scale_of(far) == pytest.approx(0.09)  # three times the median: one bad row does not flatten the others
    assert 'cx="100.0"' in drawn("+5.0000", 0.09)


def test_a_sweep_is_a_row_per_combination():
    cfg = ablate.AblateConfig(grid="bio_threshold:0.1,0.4; bio_omega:1,2")
    rows = ablate.swept({"bio": "config/ablation/bio.py", "mine": "--use_bio_mlp=True"}, cfg.sweep)
    assert len(rows) == 8
    words = ablate.words_of(rows["bio_bio_threshold_0_4_bio_omega_2"])
    assert words == ["config/ablation/bio.py", "--bio_threshold=0.4", "--bio_omega=2"]
    assert ablate.words_of(rows["mine_bio_threshold_0_1_bio_omega_1"])[0] == "--use_bio_mlp=True"
    for wrong in ("no_flag:1", "bio_threshold:", "bio_threshold:0.1;x"):
        with pytest.raises(ValueError, match="grid"):
            ablate.AblateConfig(grid=wrong)
