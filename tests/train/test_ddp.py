"""torchrun with two gloo processes: the same numbers as one process, and the same manners when it ends badly."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from helpers import ROOT, flags, losses, same, wait_for
from jobs import ENDLESS, FOUR, assert_close, finish, run_alone, weights, workers
from model import GPT, load_checkpoint
from train import find_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(shakespeare, tmp_path_factory):
    """The folder of a run in one process."""
    out = tmp_path_factory.mktemp("alone")
    assert run_alone(*flags(shakespeare, out, **FOUR)) == 0
    return out


@pytest.mark.slow
def test_two_processes_equal_one_under_muon(together, shakespeare, tmp_path):
    given = FOUR | {"optimizer": "muon", "bias": False}
    assert run_alone(*flags(shakespeare, tmp_path / "one", **given)) == 0
    stdout = together(*flags(shakespeare, tmp_path / "two", **given))
    assert "muon: matrices 8 tensors" in stdout
    assert_close(tmp_path / "two", tmp_path / "one")


def test_two_processes_equal_one(together, shakespeare, alone, tmp_path):
    stdout = together(*flags(shakespeare, tmp_path, **FOUR))
    assert len(losses(tmp_path)) == 6
    assert_close(tmp_path, alone)
    assert "2 process(es)" in stdout and "256 tokens per step" in stdout
    assert stdout.count("iter 5:") == stdout.count("step 6:") == stdout.count("parameters") == 1  # one rank speaks
    names = {"ckpt.pt", "ckpt_last.pt", "metrics.jsonl", "run.json"}
    assert {p.name for p in tmp_path.iterdir()} == names
    last = load_checkpoint(tmp_path / "ckpt_last.pt")
    assert last["iter_num"] == 6 and {float(s["step"]) for s in last["optimizer"]["state"].values()} == {6.0}
    assert len(last["rng"]) == 2


def test_two_processes_go_on_where_one_stopped_and_back(together, shakespeare, alone, tmp_path):
    given = FOUR | {"lr_decay_iters": 6, "max_iters": 2}
    assert run_alone(*flags(shakespeare, tmp_path, **given)) == 0
    resume = [f"--out_dir={tmp_path}", "--init_from=resume"]
    together(*resume, "--max_iters=4")
    assert len(load_checkpoint(tmp_path / "ckpt_last.pt")["rng"]) == 2
    assert run_alone(*resume, "--max_iters=6") == 0
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)
    a, b = weights(tmp_path), weights(alone)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-9


def test_resume_of_two_processes_is_exact_with_dropout(together, shakespeare, tmp_path):
    """Each rank goes on with its own random states."""
    given = FOUR | {"dropout": 0.2, "lr_decay_iters": 6}
    together(*flags(shakespeare, tmp_path / "straight", **given))
    together(*flags(shakespeare, tmp_path / "stopped", **given | {"max_iters": 3}))
    together(f"--out_dir={tmp_path / 'stopped'}", "--init_from=resume", "--max_iters=6")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))
    rank_0, rank_1 = load_checkpoint(tmp_path / "stopped" / "ckpt_last.pt")["rng"]
    assert not torch.equal(rank_0["torch"], rank_1["torch"])


def endless(start, data, out):
    """A running job that has passed its first checkpoints, and its workers' pids by rank."""
    process = start(*flags(data, out, **ENDLESS))
    metrics = out / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and '"iter": 25,' in metrics.read_text()))
    by_rank = {rank: pid for pid, rank in workers(process).items()}
    assert process.poll() is None and by_rank.keys() == {0, 1}
    return process, by_rank


@pytest.mark.parametrize(
    "target, number", [("torchrun", signal.SIGTERM), ("torchrun", signal.SIGINT), (1, signal.SIGTERM)]
)
def test_a_signal_saves_and_ends(target, number, start, shakespeare, tmp_path):
    process, by_rank = endless(start, shakespeare, tmp_path)
    os.kill(by_rank.get(target, process.pid), number)
    status, stdout, stderr = finish(process)
    assert "stopped after" in stdout, stderr
    steps = int(re.search(r"stopped after (\d+) steps", stdout)[1])
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["iter_num"] == steps == len(losses(tmp_path))
    if target == 1:  # torchrun reports a signal that it got itself
        assert status == 0, stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_job(rank, start, shakespeare, tmp_path):
    process, by_rank = endless(start, shakespeare, tmp_path)
    os.kill(by_rank[rank], signal.SIGKILL)
    status, _, _ = finish(process)
    assert status != 0
    last = load_checkpoint(find_checkpoint(tmp_path))
    GPT.from_checkpoint(last)
    assert last["iter_num"] >= 20 and last["iter_num"] % 20 == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in by_rank.values())


def test_micro_steps_that_cannot_be_shared_out_are_refused(start, shakespeare, tmp_path):
    status, _, stderr = finish(start(*flags(shakespeare, tmp_path / "out", gradient_accumulation_steps=3)))
    assert status != 0
    errors = [x for x in stderr.splitlines() if "train.py: error:" in x]
    assert errors and all("--gradient_accumulation_steps=3" in x and "2 processes" in x for x in errors)
    assert 'File "' + str(ROOT / "train.py") not in stderr  # no traceback of ours
    assert not (tmp_path / "out" / "ckpt_last.pt").exists()


def test_a_mistake_ends_all_processes(start, shakespeare, tmp_path):
    """Only the main process looks at out_dir; the other one must not wait for it."""
    (tmp_path / "file").write_text("mine")
    status, _, stderr = finish(start(*flags(shakespeare, tmp_path / "file", gradient_accumulation_steps=2)))
    assert status != 0 and "cannot be written" in stderr
