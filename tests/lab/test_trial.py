"""lab.trial: the plan by hand, equal tuning, and whole trials of a toy idea, killed and gone on with."""

import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import configurator
from data import domains
from helpers import LINES, PATIENCE, ROOT, TrainHere, command_here
from lab import ablate, claims, trial
from lab.trial import Place, Stage, TrialConfig, Unit, first_stages, make_plan, seconds_of, units_of, values_wanted

pytestmark = pytest.mark.slow

RUNG = """
n_layer, n_head, n_embd, block_size, bias, dropout = 1, 2, 16, 16, False, 0.0
batch_size, gradient_accumulation_steps = 4, 1
max_iters = lr_decay_iters = 43
lr_schedule, wsds_horizons = "wsds", 3
warmup_iters, learning_rate, min_lr = 2, 0.05, 0.0
beta2 = 0.95 if optimizer == "muon" else 0.99
eval_interval, eval_iters, eval_full, sample_interval, log_interval = max_iters, 2, True, 0, 5
device, compile = "cpu", False
"""


run_here = partial(command_here, trial.main)


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_times():
    assert [seconds_of(text) for text in ("90s", "30m", "2h", "1.5h")] == [90, 1800, 7200, 5400]
    assert [trial.duration(s) for s in (40, 600, 7200)] == ["40s", "10m", "2.0h"]


def test_units_are_a_verdict_per_baseline_and_what_follows_it():
    units = units_of(TrialConfig(baselines="M1,M2", rungs="r0,r1", domains="drama,code"))
    assert [unit.answers for unit in units] == [
        "verdict on M1", "code on M1", "r1 on M1", "verdict on M2", "code on M2", "r1 on M2"]  # fmt: skip
    chain = units[0].stages
    assert [stage.name for stage in chain] == ["screen", "tune", "select", "confirm"]
    assert chain[2].seeds == (0, 1, 2) and chain[3].seeds == (100, 101, 102, 103, 104)
    assert {stage.place for stage in chain} == {Place("M1", "r0", "drama")}
    assert units[1].stages[0].seeds == chain[3].seeds and units[1].stages[0].place.domain == "code"
    assert Place("M2", "r1", "code").recipe == ["config/presets/modern_muon.py", "config/ladder/r1.py"]


def made(answers, pairs, needs=""):
    return Unit(answers, (Stage(answers, Place("M1", "r0", "drama"), (0,)),), pairs, needs)


def test_the_cheapest_comparison_comes_first_after_what_it_needs():
    units = [made("verdict on M1", 5), made("code on M1", 5, "M1"), made("r2 on M1", 3, "M1"), made("verdict on M2", 5)]
    costs = {"verdict on M1": 100, "code on M1": 40, "r2 on M1": 600, "verdict on M2": 105}
    planned, left_out = make_plan(units, lambda unit: costs[unit.answers], 1e6)
    assert [unit.answers for unit in planned] == ["verdict on M1", "code on M1", "verdict on M2", "r2 on M1"]
    planned, left_out = make_plan(units, lambda unit: costs[unit.answers], 250)
    assert [unit.answers for unit in planned] == ["verdict on M1", "code on M1", "verdict on M2"]
    assert [unit.answers for unit in left_out] == ["r2 on M1"]
    planned, left_out = make_plan(units, lambda unit: costs[unit.answers], 99)
    assert planned == [] and len(left_out) == 4


def test_a_verdict_that_does_not_fit_is_begun():
    units = units_of(TrialConfig(baselines="M1", rungs="r0", domains="drama"))
    costs = {"screen": 2, "tune": 6, "select": 4, "confirm": 10}
    fitting, rest = first_stages(units, lambda unit: sum(costs[stage.name] for stage in unit.stages), 13)
    assert [unit.stages[0].name for unit in fitting] == ["screen", "tune", "select"]
    assert [unit.stages[0].name for unit in rest] == ["confirm"]


def test_skills_are_run_where_they_are_asked_for(tmp_path, monkeypatch):
    asked, answers = [], [SimpleNamespace(returncode=0, stdout="parity 1.0", stderr=""),
                          SimpleNamespace(returncode=2, stdout="", stderr="x\nlab.skills: error: no")]  # fmt: skip
    monkeypatch.setattr(trial.subprocess, "run", lambda words, **_: asked.append(words) or answers[len(asked) - 1])
    cfg = TrialConfig(out_dir=str(tmp_path / "out"), skills=True)
    idea = SimpleNamespace(cfg=cfg, spoken="mine: --bias=True", left_out=[])
    assert trial.skills_of(idea) == "parity 1.0" and idea.left_out == []
    assert asked[0][1:] == ["-m", "lab.skills", "mine: --bias=True", "--quick", f"--out_dir={tmp_path / 'out/skills'}"]
    assert trial.skills_of(idea) is None and idea.left_out == ["skills: lab.skills: error: no"]
    cfg.skills = False
    assert trial.skills_of(idea) is None and len(asked) == 2


@pytest.mark.parametrize("optima", [(2e-3, 2e-3), (2e-3, 0.01), (0.015, 4e-4)])
def test_both_rows_are_bracketed_by_as_many_trials(optima):
    tried = {"baseline": {}, "idea": {}}
    best = dict(zip(tried, optima))
    while wanted := {row: rates for row, rates in values_wanted(tried, dict.fromkeys(tried, [2e-3])).items() if rates}:
        for row, rates in wanted.items():
            tried[row] |= {lr: math.log(lr / best[row]) ** 2 for lr in rates}
    assert len(tried["baseline"]) == len(tried["idea"]) <= ablate.MOST_RATES
    for row, each in tried.items():
        found = min(each, key=each.get)
        assert min(each) < found < max(each) and abs(math.log(found / best[row])) < math.log(1.5) / 2 + 0.05


@pytest.mark.parametrize("words, told", [
    (["--budget=soon", "x: --bias=True"], "budget=soon: expected a time"),
    (["--baselines=M7", "x: --bias=True"], "no M7, expected some of M0, M1, M2"),
    (["--domains=", "x: --bias=True"], "domains: name at least one"),
    (["--confirm_seeds=1", "x: --bias=True"], "confirm_seeds"),
    (["nowhere.py"], "nowhere.py: no such config file"),
    (["--budget=1h"], "name one idea"),
    (["a: --bias=True", "b: --bias=True"], "name one idea"),
    (["--domains=nowhere", "x: --bias=True"], "nowhere: no such data set: run python data/nowhere/prepare.py"),
])  # fmt: skip
def test_mistakes_are_one_line(words, told, capsys):
    assert run_here(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.trial: error: ") and told in error and error.count("\n") == 1


# -- whole trials -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """DATA_DIR with the domains lines and more, of shuffled lines."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    for name in ("lines", "more"):
        texts = ["".join(rng.choice(LINES, 12)) for _ in range(60)]
        domains.write_domain(folder / name, texts, 1e6, "tests/lab/test_trial.py")
    return folder


@pytest.fixture(scope="module")
def command(data, tmp_path_factory):
    """command(folder) -> the words of a trial of seconds there."""
    files = tmp_path_factory.mktemp("files")
    (files / "tiny.py").write_text(RUNG)
    (files / "idea.py").write_text('mlp_act = "relu2"\n')

    def words(folder):
        return [files / "idea.py", "--baselines=M0", f"--rungs={files / 'tiny.py'}", "--domains=lines",
                f"--data_dir={data}", f"--out_dir={folder / 'out'}", f"--docs={folder / 'docs'}", "--select_seeds=2",
                "--confirm_seeds=3", "--jobs=1", "--budget=30m"]  # fmt: skip

    return words


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(folder, what was printed) of a trial that was let run to its end."""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(ablate, "Popen", TrainHere)
        assert run_here(*command(folder)) == 0
    return folder, printed.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that folder, to be gone on with."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(ablate, "Popen", TrainHere)


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/metrics.jsonl")}


def card_in(folder):
    return json.loads((folder / "docs/claims/idea.json").read_text())


def test_a_trial_ends_in_a_card(finished):
    folder, said = finished
    assert said.index("planned") < said.index("\nscreen, M0-tiny-lines") < said.index("\ntune, M0-tiny-lines")
    assert "verdict on M0 (screen, tune, select, confirm" in said
    card = card_in(folder)
    each = card["baselines"]["M0"]
    assert each["tuning"].keys() == {"baseline", "idea"}
    assert len({len(tried["losses"]) for tried in each["tuning"].values()}) == 1  # as many trials
    assert each["select"]["seeds"] == [0, 1] and each["confirm"].keys() == {"lines"}
    assert each["confirm"]["lines"]["val"]["seeds"] == [100, 101, 102] and each["confirm"]["lines"]["test"] is None
    assert card["ladder"]["M0"]["over"] == "lengths at tiny" and len(card["ladder"]["M0"]["speedup"]) == 3
    assert "sealed" in claims.verdicts(card)["M0"] and card["revealed"] == {}
    assert len(card["source"]["model"]) == 64 and card["repeated"] == []
    files, words = ablate.split_words(shlex.split(card["command"])[3:])  # it makes such a card again
    again = configurator.read(words, trial.TrialConfig).build(trial.TrialConfig)
    assert [Path(file).name for file in files] == ["idea.py"]
    assert (again.baselines, again.budget, again.confirm_seeds, again.domains) == ("M0", "30m", 3, "lines")


def test_the_test_split_is_opened_once_and_by_name(copied, command, in_process):
    before = stamps(copied / "out")
    assert run_here(*command(copied), "--reveal") == 0
    assert stamps(copied / "out") == before  # nothing is trained for it
    card = card_in(copied)
    looks = [json.loads(line) for line in (copied / "docs/claims/revealed.jsonl").read_text().splitlines()]
    assert [look["dataset"] for look in looks] == ["lines"] and looks[0]["why"] == "to confirm idea"
    assert card["revealed"]["lines"]["looks"] == 1 and "sealed" not in claims.verdicts(card)["M0"]
    test, val = (card["baselines"]["M0"]["confirm"]["lines"][split] for split in ("test", "val"))
    assert test["seeds"] == val["seeds"] and test["idea"] != val["idea"]
    assert all(abs(a - b) < 0.5 for a, b in zip(test["idea"], val["idea"]))  # the same kind of text
    assert "1 look(s) so far" in (copied / "docs/claims/idea.md").read_text()


def test_a_test_loss_is_what_an_evaluation_measures(finished, data):
    """On the val split it is the run's own val loss, to the last bit."""
    run = ablate.Run(next((finished[0] / "out/M0-tiny-lines/idea").glob("*-seed100")))
    assert trial.test_loss(run, np.fromfile(data / "lines/val.bin", np.uint16)) == run.loss


def test_other_code_is_refused_before_any_work(copied, command, capsys, in_process):
    run = next((copied / "out/M0-tiny-lines/baseline").glob("*-seed100")) / "ablate.json"
    asked = json.loads(run.read_text())
    run.write_text(json.dumps(asked | {"source": asked["source"] | {"loop": "another"}}))
    before = stamps(copied / "out")
    assert run_here(*command(copied)) == 2
    assert "was trained by other code than this" in capsys.readouterr().err and stamps(copied / "out") == before


def test_too_little_time_leaves_out_and_says_so(command, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(trial, "run_seconds", lambda *args: 60.0)  # as if each took a minute
    assert run_here(*command(tmp_path), "--budget=20s") == 0  # not even a pair of runs: a card of costs alone
    card = card_in(tmp_path)
    assert len(card["left_out"]) == 4 and not stamps(tmp_path / "out") and card["baselines"]["M0"]["parameters"] == 1
    assert run_here(*command(tmp_path), "--budget=5m") == 0
    card = card_in(tmp_path)
    assert [told.split(" (")[0] for told in card["left_out"]] == [
        "verdict on M0: tune", "verdict on M0: select", "verdict on M0: confirm"]  # fmt: skip
    assert claims.verdicts(card)["M0"] == "undecided: not confirmed"
    assert isinstance(card["baselines"]["M0"]["screen"], float)


def test_a_killed_trial_loses_one_run(command, tmp_path):
    words = [sys.executable, "-m", "lab.trial", *map(str, command(tmp_path))]
    process = subprocess.Popen(words, start_new_session=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(done := [f for f in stamps(tmp_path / "out") if ablate.Run(f.parent).is_done]) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = {path: os.stat(path).st_mtime_ns for path in done}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "Popen", TrainHere)
        assert run_here(*command(tmp_path)) == 0
    assert kept == {path: os.stat(path).st_mtime_ns for path in done}
    assert card_in(tmp_path)["baselines"]["M0"]["confirm"]


def test_costs_of_rows_with_a_decay_of_their_own(command, tmp_path, monkeypatch):
    files, words = ablate.split_words([str(word) for word in command(tmp_path)])
    cfg = configurator.read(words, TrialConfig).build(TrialConfig)
    decays = {"M0": {"baseline": 0.3, "idea": 0.01}}
    made = trial.Trial(cfg, "idea", files[0], "cpu", "float32", 2, decays=decays)
    monkeypatch.setattr(trial, "run_seconds", lambda made, place, row: {"baseline": 2.0, "idea": 3.0}[row])
    select = Stage("select", Place("M0", cfg.rungs, "lines"), (0, 1))
    assert {run.row for run in made.pairs(select.place, select.seeds)} == {"baseline-wd0.3", "idea-wd0.01"}
    assert trial.stage_seconds(made, select) == (2 + 3) * 2 / 2  # two seeds of both rows, two at a time


def test_weight_decay_and_the_ladders_rates_are_tuned(command, copied, in_process, tmp_path_factory):
    """Both rows by as many trials; what was trained before is used, and the confirmed runs have the chosen values."""
    larger = tmp_path_factory.mktemp("files") / "larger.py"
    larger.write_text(RUNG.replace("= 1, 2, 16, 16", "= 1, 2, 32, 16"))
    words = [w if not str(w).startswith("--rungs") else f"{w},{larger}" for w in command(copied)]
    before = stamps(copied / "out")
    assert run_here(*words, "--tune_decay", "--tune_ladder") == 0
    assert before.items() <= stamps(copied / "out").items()
    each = card_in(copied)["baselines"]["M0"]
    decays = {row: tried["weight_decay"] for row, tried in each["tuning"].items()}
    assert len(decays["baseline"]["losses"]) == len(decays["idea"]["losses"]) >= 3
    for row, tried in decays.items():
        assert "0.1" in tried["losses"] and tried["best"] == float(min(tried["losses"], key=tried["losses"].get))
        home = copied / "out/M0-tiny-lines"
        name = row if tried["best"] == 0.1 else f"{row}-wd{tried['best']:g}"
        (run,) = (home / name).glob("*-seed102")
        assert ablate.Run(run).asked["settings"].get("weight_decay", 0.1) == pytest.approx(tried["best"])
        tuned = {ablate.Run(path).lr for path in (copied / "out/M0-larger-lines").glob(f"{row}*/*-seed0")}
        assert len(tuned) >= 3 and each["ladder_rates"]["larger"][row] in tuned
        ladder = (copied / "out/M0-larger-lines" / name).glob(f"lr{each['ladder_rates']['larger'][row]:g}-seed1")
        assert len(list(ladder)) == 1
    text = (copied / "docs/claims/idea.md").read_text()
    assert "weight decay: " in text and "at larger: " in text
