"""A run's folder and what a run goes on from: never lost, never mixed up, every mistake one line."""

import errno
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from configurator import ConfigError
from data import corpus
from data.dataset import TokenDataset
from data.files import is_file, locked
from data.runs import keep_previous, open_metrics
from helpers import DRIVER, PATIENCE, ROOT, error_of, flags, history, run_here, wait_for
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow


def dataset(folder, text, kind="char", val=None):
    """A data set of `text` in a new folder."""
    tokenizer = corpus.build_tokenizer(kind, text, val or text)
    corpus.write_dataset(folder, text, val or text, tokenizer, folder.name, "a test", "")
    return folder


VERSE = "to be or not to be\nthat is the question\n" * 8


def refusal(capsys, *words):
    capsys.readouterr()
    assert run_here(*words) == 2
    return error_of(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Whose data and whose weights.


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, capsys):
    """As many characters, as many tokens, only others; then the same folder prepared again from another text."""
    here, out = dataset(tmp_path / "one", "abcdefgh \n" * 40), tmp_path / "out"
    there = dataset(tmp_path / "two", "stuvwxyz \n" * 40)
    assert run_here(*flags(here, out, max_iters=2)) == 0
    again = [f"--out_dir={out}", "--init_from=resume", "--max_iters=3"]
    before = (out / "ckpt_last.pt").read_bytes()
    told = refusal(capsys, *again, "--dataset=two")
    assert "is not the data" in told and f"--init_from={out} --out_dir=ANOTHER" in told
    dataset(here, "abcdefgh \n" * 39 + "hgfedcba \n")
    assert "is not the data" in refusal(capsys, *again)
    assert (out / "ckpt_last.pt").read_bytes() == before
    dataset(here, "abcdefgh \n" * 40)  # prepared again, from the same text: the same data
    there.rename(tmp_path / "gone")
    here.rename(there)
    assert run_here(*again, "--dataset=two") == 0


def test_a_checkpoint_from_before_data_id_is_compared_by_what_it_knows(run_folder, shakespeare, tmp_path, capsys):
    checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
    del checkpoint["data_id"]
    checkpoint["meta"] = {k: v for k, v in checkpoint["meta"].items() if k not in ("data_id", "checksum")}
    save_checkpoint(run_folder / "ckpt_last.pt", checkpoint)
    other = dataset(tmp_path / "other", VERSE)
    again = [f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=7"]
    assert "is not the data" in refusal(capsys, *again, f"--data_dir={tmp_path}", f"--dataset={other.name}")
    assert run_here(*again) == 0


def test_a_new_run_starts_from_another_runs_weights(trained, shakespeare, tmp_path, capsys):
    """Its weights and shape; best loss, step and data order are new. The text may be another, the tokens may not."""
    chars = corpus.load_meta(shakespeare)["chars"]
    other, out = tmp_path / "other", tmp_path / "new"
    text = "".join(chars[(7 * i) % len(chars)] for i in range(400))
    corpus.write_dataset(other, text, text, corpus.Char(chars), "other", "a test", "")
    words = flags(other, out, init_from=trained, max_iters=0)
    assert run_here(*[w for w in words if "n_layer" not in w]) == 0
    old, new = load_checkpoint(trained / "ckpt.pt"), load_checkpoint(out / "ckpt_last.pt")
    assert all(torch.equal(new["model"][k], v) for k, v in old["model"].items())
    assert new["iter_num"] == 0 and new["tokens"] == 0 and new["best_val_loss"] != old["best_val_loss"]
    verse = dataset(tmp_path / "verse", VERSE)
    told = refusal(capsys, *flags(verse, tmp_path / "x", init_from=trained))
    assert "its tokens are not those" in told and not (tmp_path / "x").exists()


def test_gpt2s_weights_are_for_gpt2s_tokens(shakespeare, tmp_path, capsys):
    told = refusal(capsys, *flags(shakespeare, tmp_path / "out", init_from="gpt2"))
    assert "'char'" in told and "gpt2" in told


def huggingface_folder(folder, vocab_size=300):
    """A tiny GPT-2 with a byte-level BPE of its own, as transformers saves them."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator([VERSE], vocab_size, special_tokens=["<end>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return fast


def test_a_huggingface_folder_writes_with_its_own_tokenizer(tmp_path, shakespeare, capsys):
    own = huggingface_folder(tmp_path / "hf")
    sample.main([f"--init_from={tmp_path / 'hf'}", "--start=to be", "--max_new_tokens=5", "--temperature=0"])
    model = GPT.from_pretrained(str(tmp_path / "hf"))
    idx = torch.tensor([own.encode("to be")])
    expected = own.decode(model.generate(idx, 5, temperature=0, known_ids=len(own))[0])
    assert capsys.readouterr().out.split("\n---")[0].strip() == corpus.visible(expected.replace("<end>", "")).strip()
    assert "its tokens" in refusal(capsys, *flags(shakespeare, tmp_path / "out", init_from=tmp_path / "hf"))
    for file in (tmp_path / "hf").glob("*token*"):
        file.unlink()
    with pytest.raises(SystemExit, match="2"):
        sample.main([f"--init_from={tmp_path / 'hf'}"])
    assert "has no tokenizer" in capsys.readouterr().err


def test_ids_without_a_meaning_are_not_written(tmp_path):
    """vocab_size above the tokenizer's: the head may prefer such ids, sampling must not take them."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50, tie_weights=False))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[10:] = 5.0
    idx = torch.zeros(4, 1, dtype=torch.long)
    assert model.generate(idx, 20)[:, 1:].min() >= 10
    assert model.generate(idx, 20, known_ids=10).max() < 10


# ---------------------------------------------------------------------------------------------------------------------
# Going on: what is kept, what is measured otherwise, what was counted.


def test_the_best_loss_is_forgotten_where_it_is_measured_otherwise(run_folder, capsys):
    checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
    save_checkpoint(run_folder / "ckpt_last.pt", checkpoint | {"best_val_loss": 0.5})
    again = [f"--out_dir={run_folder}", "--init_from=resume"]
    assert run_here(*again, "--max_iters=7") == 0
    assert load_checkpoint(run_folder / "ckpt_last.pt")["best_val_loss"] == 0.5
    capsys.readouterr()
    assert run_here(*again, "--max_iters=8", "--eval_full=True") == 0
    assert "eval_full=True, before False: the best loss so far" in capsys.readouterr().out
    assert load_checkpoint(run_folder / "ckpt_last.pt")["best_val_loss"] > 0.5
    assert load_checkpoint(run_folder / "ckpt.pt")["iter_num"] >= 6


def test_tokens_are_counted_as_seen(shakespeare, tmp_path):
    out = tmp_path / "out"
    assert run_here(*flags(shakespeare, out, max_iters=4)) == 0  # 4 sequences of 16 tokens a step
    again = [f"--out_dir={out}", "--init_from=resume"]
    assert run_here(*again, "--max_iters=6", "--batch_size=8") == 0
    assert run_here(*again, "--max_iters=7", "--gradient_accumulation_steps=2") == 0
    seen = {line["iter"]: line["tokens"] for line in history(out) if "loss" in line}
    assert seen == {0: 64, 1: 128, 2: 192, 3: 256, 4: 384, 5: 512, 6: 768}
    assert load_checkpoint(out / "ckpt_last.pt")["tokens"] == 768
    old = load_checkpoint(out / "ckpt_last.pt")
    del old["tokens"]  # from before it was kept: by its own settings
    save_checkpoint(out / "ckpt_last.pt", old)
    assert run_here(*again, "--max_iters=8", "--batch_size=1") == 0
    assert [x["tokens"] for x in history(out) if x["iter"] == 7 and "loss" in x] == [7 * 256 + 32]


@pytest.mark.parametrize("max_iters", [6, 3])
def test_a_finished_run_says_so(max_iters, run_folder, capsys):
    before = {file.name: file.read_bytes() for file in run_folder.iterdir()}
    assert run_here(f"--out_dir={run_folder}", "--init_from=resume", f"--max_iters={max_iters}") == 0
    assert f"nothing to do: 6 of max_iters={max_iters} steps are done" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run_folder.iterdir()} == before


def test_warm_up_as_long_as_the_decay():
    for schedule in ("cosine", "wsd"):
        cfg = train.TrainConfig(warmup_iters=10, lr_decay_iters=10, learning_rate=1.0, min_lr=0.1, lr_schedule=schedule)
        assert [train.lr_at(cfg, step) for step in (0, 9, 10, 50)] == pytest.approx([1 / 11, 10 / 11, 0.1, 0.1])


def test_nanogpts_own_settings_are_honoured(shakespeare, tmp_path, capsys):
    """Batch, accumulation, rate and length of a nanoGPT checkpoint, unless flags say otherwise; they are told."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=49))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    optimizer.step()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    config = {"batch_size": 2, "gradient_accumulation_steps": 3, "max_iters": 4, "learning_rate": 5e-4, "beta2": 0.99,
              "warmup_iters": 0, "lr_decay_iters": 4, "min_lr": 1e-5, "device": "cuda", "dtype": "float16",
              "out_dir": "elsewhere", "eval_iters": 2, "compile": True, "backend": "nccl"}  # fmt: skip
    nanogpt = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 1, "config": config}
    nanogpt |= {"model_args": {k: asdict(model.config)[k] for k in names}, "best_val_loss": torch.tensor(3.5)}
    out = tmp_path / "out"
    out.mkdir()
    torch.save(nanogpt, out / "ckpt.pt")
    words = [f"--out_dir={out}", "--init_from=resume", f"--data_dir={shakespeare.parent}", "--device=cpu",
             f"--dataset={shakespeare.name}", "--compile=False", "--dtype=float32", "--beta2=0.5"]  # fmt: skip
    assert run_here(*words) == 0
    told = capsys.readouterr().out
    assert "batch_size=2" in told and "learning_rate=0.0005" in told and "beta2" not in told.split("\n")[0]
    kept = load_checkpoint(out / "ckpt_last.pt")
    assert kept["iter_num"] == 4 and kept["config"]["gradient_accumulation_steps"] == 3
    assert kept["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.5)
    assert [x["tokens"] for x in history(out) if "loss" in x] == [192, 288, 384]  # 6 sequences of 16, 3 steps


# ---------------------------------------------------------------------------------------------------------------------
# Damage in what a checkpoint says.


@pytest.mark.parametrize(
    "change, told",
    [
        ({"batch_size": "x"}, "batch_size='x'"), ({"seed": -1}, "seed=-1"), ({"lr_schedule": 3}, "lr_schedule=3"),
        ({"max_iters": math.inf}, "max_iters=inf"), ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"compile": "maybe"}, "compile='maybe'"), ({"dataset": 7}, "dataset=7"),
    ],
)  # fmt: skip
def test_impossible_settings_in_a_checkpoint(change, told, run_folder, capsys):
    checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
    checkpoint["config"] |= change
    save_checkpoint(run_folder / "ckpt_last.pt", checkpoint)
    line = refusal(capsys, f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9")
    assert "ckpt_last.pt" in line and told in line


@pytest.mark.parametrize(
    "change",
    [{"iter_num": math.inf}, {"iter_num": -1}, {"iter_num": "5"}, {"iter_num": None}, {"iter_num": 5.0},
     {"best_val_loss": "low"}, {"best_val_loss": math.nan}, {"best_val_loss": None}, {"meta": [1]}, {"tokens": "x"},
     {"config": None}, {"config": 5}, {"rng": 5}, {"rng": [{}]}, {"optimizer": None}, {"optimizer": {}}],
)  # fmt: skip
def test_impossible_positions_in_a_checkpoint(change, run_folder, capsys):
    save_checkpoint(run_folder / "ckpt_last.pt", load_checkpoint(run_folder / "ckpt_last.pt") | change)
    refusal(capsys, f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9")


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 10**6}, {"n_layer": "2"}, {"attn_mode": 3}, {"vocab_size": 10**9}, {"n_embd": -4}, {"bias": "False"},
     {"block_size": 10**9}, {"bio_omega": math.nan}, {"dropout": math.inf}, {"no_such_flag": 1}],
)  # fmt: skip
def test_impossible_flags_in_a_checkpoint(change, run_folder, capsys):
    checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
    checkpoint["model_args"] |= change
    save_checkpoint(run_folder / "ckpt_last.pt", checkpoint)
    start = time.monotonic()
    refusal(capsys, f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9")
    assert time.monotonic() - start < 30  # not after trying to build a million layers


def test_an_optimiser_state_of_other_shapes_never_reaches_the_kernel(run_folder, capsys):
    """A fused AdamW writes past the end of moments that are too short: the process died of it."""

    def spoil(state, how):
        state[0] |= {
            "shape": {"exp_avg": torch.zeros(3)}, "dtype": {"exp_avg_sq": state[0]["exp_avg_sq"].double()},
            "missing": {"more": state[0].pop("exp_avg") if how == "missing" else None}, "step": {"step": "x"},
            "no tensor": {"exp_avg": 0.0}, "long step": {"step": torch.zeros(5)},
        }[how]  # fmt: skip

    whole = (run_folder / "ckpt_last.pt").read_bytes()
    for how in ("shape", "dtype", "missing", "step", "no tensor", "long step"):
        (run_folder / "ckpt_last.pt").write_bytes(whole)
        checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
        spoil(checkpoint["optimizer"]["state"], how)
        save_checkpoint(run_folder / "ckpt_last.pt", checkpoint)
        told = refusal(capsys, f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9")
        assert "optimiser's state" in told, how


# ---------------------------------------------------------------------------------------------------------------------
# One run, one directory.


def test_two_runs_never_share_a_directory(shakespeare, tmp_path, capsys):
    out, env = tmp_path / "out", {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAUSE_AT": "2"}
    words = [sys.executable, DRIVER, *flags(shakespeare, out)]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    wait_for(lambda: (out / "metrics.jsonl").exists())
    for how in ("scratch", "resume", "auto"):
        told = refusal(capsys, *flags(shakespeare, out, init_from=how))
        assert re.search(rf"process {first.pid} on \S+ is training there", told)
    (out / "go").touch()
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0 and len(history(out)) == 6 + 3
    assert not (out / "run.lock").exists()
    assert run_here(*flags(shakespeare, out, init_from="resume", max_iters=7)) == 0


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    lock = tmp_path / "run.lock"
    code = f"import os, time; from data.files import locked\nwith locked({str(lock)!r}, 'a', 'b'): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert lock.exists()
    with locked(lock, "writing", "wait"):
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(lock, "writing", "wait"):
            pass
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert not lock.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def no_locks(fd):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("data.files.try_lock", no_locks)
    with locked(tmp_path / "run.lock", "writing", "wait"):
        assert "no locks on this file system" in capsys.readouterr().err


def test_earlier_runs_are_kept_however_many(shakespeare, tmp_path, capsys):
    losses = []
    for seed in range(3):
        assert run_here(*flags(shakespeare, tmp_path, seed=seed, max_iters=seed + 1, tensorboard_log=seed == 1)) == 0
        losses.append([x.get("loss") for x in history(tmp_path)])
    assert f"its files are in {tmp_path / 'previous-2'} now" in capsys.readouterr().out
    for seed, folder in enumerate(("previous-1", "previous-2", ".")):
        assert [x.get("loss") for x in history(tmp_path / folder)] == losses[seed]
        assert json.loads((tmp_path / folder / "run.json").read_text())["config"]["seed"] == seed
        for name in ("ckpt.pt", "ckpt_last.pt"):
            assert load_checkpoint(tmp_path / folder / name)["config"]["seed"] == seed
    assert (tmp_path / "previous-2" / "tensorboard").is_dir() and not (tmp_path / "tensorboard").exists()


def test_what_is_not_a_runs_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert keep_previous(tmp_path) is None
    (tmp_path / "previous-1").mkdir()
    (tmp_path / "run.json").write_text("{}")
    assert keep_previous(tmp_path) == tmp_path / "previous-2"
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "previous-1", "previous-2"]


def test_temporaries_of_living_processes_stay(shakespeare, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f"ckpt.pt.{os.getppid()}.tmp", f"ckpt.pt.{ended.pid}.tmp"]
    for name in names:
        (tmp_path / name).write_text("half")
    assert run_here(*flags(shakespeare, tmp_path, max_iters=0)) == 0
    assert [(tmp_path / name).exists() for name in names] == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_damaged_metrics_are_set_aside_and_the_rest_is_kept(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    good = [json.dumps({"iter": i, "loss": 1.0}).encode() for i in range(6)]
    bad = [
        b"\xff\xfe\x00",
        b'{"iter": 2, "lo',
        b"[1, 2]",
        b"null",
        b'{"loss": 1}',
        b'{"iter": "3"}',
        b"[" * 100_000,
        b"",
    ]
    file.write_bytes(b"\n".join([good[0], *bad[:4], good[1], good[2], *bad[4:], good[3], good[5], b'{"iter": 3, "lo']))
    with open_metrics(file, 5) as f:
        f.write("{}\n")
    assert file.read_bytes().splitlines() == [good[0], good[1], good[2], good[3], b"{}"]
    assert (tmp_path / "metrics.jsonl.bak").read_bytes().split(b"\n")[:-1] == bad
    assert "8 damaged line(s)" in capsys.readouterr().err
    open_metrics(file, 0).close()  # a new run has none
    assert file.read_bytes() == b""


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are not finite.


def test_eval_only_with_nan_is_an_error(run_folder, capsys):
    checkpoint = load_checkpoint(run_folder / "ckpt_last.pt")
    checkpoint["model"]["transformer.wte.weight"][0, 0] = math.nan
    save_checkpoint(run_folder / "ckpt_last.pt", checkpoint)
    assert "nan" in refusal(capsys, f"--out_dir={run_folder}", "--init_from=resume", "--eval_only")


@pytest.mark.parametrize("stopped", [False, True])
def test_weights_that_are_not_finite_are_never_saved(stopped, shakespeare, tmp_path, monkeypatch, capsys):
    """The loss of the step was still fine; then an evaluation follows, or SIGTERM."""
    take_step = train.Trainer.step

    def poisoning(self):
        result = take_step(self)
        if self.iter_num == 5:
            with torch.no_grad():
                next(self.model.parameters())[0, 0] = math.inf
            if stopped:
                os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(train.Trainer, "step", poisoning)
    out = tmp_path / "out"
    assert run_here(*flags(shakespeare, out, eval_interval=3 if stopped else 5, max_iters=9)) == 2
    capsys.readouterr()
    kept = load_checkpoint(out / "ckpt_last.pt")
    assert kept["iter_num"] == (3 if stopped else 0)
    assert all(torch.isfinite(w).all() for w in kept["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Processes.


@pytest.mark.parametrize(
    "left, told",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"), ({"RANK": "0"}, "RANK=0 without WORLD_SIZE"),
        ({"LOCAL_RANK": "1"}, "without RANK"), ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        (dict.fromkeys(train.TORCHRUN, "x"), "whole numbers"),
        (dict.fromkeys(train.TORCHRUN, "2"), "RANK must be 0 to"),
    ],
)  # fmt: skip
def test_variables_that_torchrun_did_not_set(left, told, shakespeare, tmp_path, monkeypatch, capsys):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("configurator.RANKS_WAIT", 0)
    assert told in refusal(capsys, *flags(shakespeare, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_address_alone_is_nothing(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert run_here(*flags(shakespeare, tmp_path / "out", max_iters=1)) == 0
    assert history(tmp_path / "out")[-1]["tokens"] == 64  # the whole batch


def test_torchrun_tells_an_error_once(shakespeare, tmp_path):
    words = flags(shakespeare, tmp_path / "out", gradient_accumulation_steps=2, batch_size=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode != 0 and done.stderr.count("train.py: error: ") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Signals.


class Interrupted:
    """A data set whose second batch comes with a Ctrl-C."""

    def __init__(self, data):
        self.data, self.batches = data, 0

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batch(self, *args):
        self.batches += 1
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return self.data.batch(*args)


def test_ctrl_c_is_answered_during_an_evaluation(shakespeare, tmp_path, monkeypatch, capfd):
    sets = []
    monkeypatch.setattr(train, "open_dataset", lambda cfg: sets.append(Interrupted(TokenDataset(cfg))) or sets[0])
    out = tmp_path / "out"
    assert run_here(*flags(shakespeare, out, eval_iters=1000)) == 0
    assert sets[0].batches <= 3  # of the 1000 of each split
    told = capfd.readouterr()
    assert "stopping after this step; again to quit now" in told.err and "stopped after 0 steps" in told.out
    assert load_checkpoint(out / "ckpt_last.pt")["iter_num"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_quits_at_once(number, shakespeare, tmp_path):
    out, env = tmp_path / "out", {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAUSE_AT": "3"}
    words = [sys.executable, DRIVER, *flags(shakespeare, out)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(history(out)) == 5)  # two evaluations, three steps
    process.send_signal(number)
    time.sleep(0.5)  # it waits in a step: nothing else will happen
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number and "Traceback" not in err and "stopped at once" in err
    assert load_checkpoint(out / "ckpt_last.pt")["iter_num"] == 3
    assert run_here(*flags(shakespeare, out, init_from="resume")) == 0  # the lock has gone with it


@pytest.mark.parametrize("writes", [False, True])
def test_a_lost_terminal_saves(shakespeare, tmp_path, writes):
    """Whether or not it writes to the terminal before the signal comes."""
    out, env = tmp_path / "out", {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAUSE_AT": "3"}
    ours, theirs = pty.openpty()
    words = [sys.executable, DRIVER, *flags(shakespeare, out, max_iters=10**6)]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | env)
    os.close(theirs)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(history(out)) == 5)
    os.close(ours)  # from now on, writing to the terminal is an error
    if writes:
        (out / "go").touch()
        wait_for(lambda: process.poll() is not None or len(history(out)) > 10)
    process.send_signal(signal.SIGHUP)
    (out / "go").touch()
    assert process.wait(timeout=PATIENCE) == 0
    assert 0 < load_checkpoint(out / "ckpt_last.pt")["iter_num"] < 10**6


def test_nohup_is_respected(shakespeare, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.SIGHUP not in stop.before
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def heed_ctrl_c():
    """What a shell starts in the background ignores Ctrl-C, and so do its children, this suite's among them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "smoke_test.py", "lab.ablate", "lab.bench", "prepare"])
def test_ctrl_c_during_start_up_is_quiet(script, tmp_path):
    """At any moment: while PyTorch is imported, or afterwards."""
    command = {"lab.ablate": ["-m", "lab.ablate"], "lab.bench": ["-m", "lab.bench", "mlp"],
               "prepare": [ROOT / "data" / "openwebtext" / "prepare.py", f"--out_dir={tmp_path / 'd'}"]}  # fmt: skip
    for seconds in (0.15, 0.5, 1.2):
        process = subprocess.Popen([sys.executable, *command.get(script, [ROOT / script])], cwd=ROOT, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c,
                                   env=os.environ | {
                                       "HF_HUB_OFFLINE": "1", "TIKTOKEN_CACHE_DIR": str(tmp_path)})  # fmt: skip
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in err and process.returncode in (-2, 2, 130), err


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def test_what_cannot_be_encoded_is_replaced(tmp_path, cli):
    """Samples of Chinese and emoji in a run whose stdout knows only Windows' Western characters."""
    data = dataset(tmp_path / "d", "\u65e5\u672c\U0001f600 a\n" * 40)
    env = {"PYTHONIOENCODING": "cp1252"}
    out = tmp_path / "out"
    done = cli("train.py", *flags(data, out, max_iters=4, sample_interval=2), env=env)
    assert done.returncode == 0 and "a sample at step 2" in done.stdout and "Traceback" not in done.stderr
    for more in ((), ("--stream",)):
        done = cli("sample.py", f"--out_dir={out}", "--start=\u65e5", "--max_new_tokens=9", *more, env=env)
        assert done.returncode == 0 and done.stdout.startswith("?"), done.stderr


def test_a_vocabulary_without_newline(tmp_path, capsys):
    data, out = dataset(tmp_path / "d", "ab cab " * 60), tmp_path / "out"
    assert run_here(*flags(data, out, max_iters=4, sample_interval=2)) == 0
    assert "a sample at step 2" in capsys.readouterr().out
    sample.main([f"--out_dir={out}", "--max_new_tokens=5"])
    text = capsys.readouterr().out.split("\n---")[0]
    assert len(text) == 6 and set(text) <= set("ab c")
    with pytest.raises(SystemExit, match="2"):
        sample.main([f"--out_dir={out}", "--start=\n"])
    assert r"'\n'" in capsys.readouterr().err  # this one was typed


def test_escape_sequences_are_shown_not_obeyed(tmp_path, capsys):
    data, out = dataset(tmp_path / "d", "\x1b]0;t\x07\x9b1m\x7f\r" * 60), tmp_path / "out"
    assert run_here(*flags(data, out, max_iters=2, sample_interval=1)) == 0
    words = [f"--out_dir={out}", "--start=\x1b", "--max_new_tokens=40", "--seed=1"]
    sample.main(words)
    sample.main([*words, "--stream"])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown := capsys.readouterr().out)
    assert r"\x1b" in shown
    sample.main([*words, "--raw"])
    assert "\x1b" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Paths, values, trackers.


def test_paths_as_a_shell_would_write_them(shakespeare, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    assert run_here(*flags(shakespeare, "~/out", max_iters=1)) == 0
    assert run_here(*flags(shakespeare, "$RUNS/a", max_iters=1)) == 0
    assert (tmp_path / "out" / "ckpt.pt").exists() and (tmp_path / "runs" / "a" / "ckpt.pt").exists()
    sample.main(["--out_dir=~/out", "--max_new_tokens=1"])
    (tmp_path / "prompt").write_text("HAM")
    sample.main(["--out_dir=$RUNS/a", "--start=FILE:~/prompt", "--max_new_tokens=1"])
    assert capsys.readouterr().out.splitlines()[-2].startswith("HAM")


def test_what_is_no_file_is_told_at_once(run_folder, shakespeare, tmp_path, capsys):
    """A fifo would wait for a writer; a directory and a loop of links are something else: no hang, no traceback."""
    again = [f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9"]
    for name in ("ckpt_last.pt", "metrics.jsonl"):
        whole = (run_folder / name).read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
            (run_folder / name).unlink()
            make(run_folder / name)
            refusal(capsys, *again)
            os.rmdir(run_folder / name) if (run_folder / name).is_dir() else (run_folder / name).unlink()
            (run_folder / name).write_bytes(whole)
    for name in ("meta.json", "train.bin"):
        folder = dataset(tmp_path / "d", VERSE)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refusal(capsys, *flags(folder, tmp_path / "x"))
        (folder / name).unlink()
    with pytest.raises(SystemExit, match="2"):
        os.mkfifo(tmp_path / "prompt")
        sample.main([f"--out_dir={run_folder}", f"--start=FILE:{tmp_path / 'prompt'}"])
    with pytest.raises(OSError, match="directory"):
        is_file(tmp_path)


@pytest.mark.parametrize("key", ["out_dir", "data_dir", "dataset", "init_from"])
def test_very_long_paths(key, shakespeare, tmp_path, capsys):
    refusal(capsys, *[w for w in flags(shakespeare, tmp_path / "out") if key not in w], f"--{key}={'x' * 5000}")
    if key == "out_dir":
        with pytest.raises(SystemExit, match="2"):
            sample.main([f"--out_dir={'x' * 5000}"])


@pytest.mark.parametrize(
    "given, told",
    [
        ({"seed": 2**63}, "seed"), ({"seed": "99999999999999999999"}, "seed"), ({"beta1": 1.0}, "beta1"),
        ({"weight_decay": -0.1}, "weight_decay"), ({"min_lr": -1}, "min_lr"),
        ({"wsd_decay_share": 2}, "wsd_decay_share"),
        ({"wsd_decay_share": 0}, "wsd_decay_share"), ({"lr_decay_iters": 0}, "lr_decay_iters"),
        ({"min_lr": 1}, "at most learning_rate"), ({"n_embd": 2**40}, "bytes"), ({"n_layer": 10**13}, "bytes"),
        ({"batch_size": 10**13}, "bytes"), ({"eval_iters": 10**13}, "memory"), ({"bio_omega": "nan"}, "bio_omega"),
        ({"gradient_accumulation_steps": 10**14}, "memory"),
    ],
)  # fmt: skip
def test_values_without_sense(given, told, shakespeare, tmp_path, capsys):
    assert told in refusal(capsys, *flags(shakespeare, tmp_path / "out", **given))


def test_the_largest_seed(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path / "out", seed=2**63 - 1, max_iters=1)) == 0


class FakeWandb:
    """What train.py uses of wandb."""

    class Error(Exception):
        pass

    def __init__(self, fails=False):
        self.fails, self.given = fails, None

    def init(self, **given):
        self.given = given
        if self.fails:
            raise self.Error("api_key not configured (no-tty).\nCall wandb.login()")
        return self

    def log(self, values, step):
        pass

    def finish(self):
        pass


def test_wandbs_own_variables_are_respected(shakespeare, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    monkeypatch.setattr(train, "check_packages", lambda cfg: None)
    words = ["config/train_shakespeare_char_cpu.py", *flags(shakespeare, tmp_path / "out", wandb_log=True, max_iters=0)]
    assert run_here(*words) == 0
    assert fake.given["mode"] is None and fake.given["project"] == "nanochimera"  # None: wandb reads WANDB_MODE
    assert fake.given["name"] == "train_shakespeare_char_cpu" and fake.given["dir"] == str(tmp_path / "out")
    for name in ("project", "name", "dir"):
        monkeypatch.setenv(f"WANDB_{name.upper()}", f"my-{name}")
    assert run_here(*words) == 0
    assert (fake.given["project"], fake.given["name"], fake.given["dir"]) == ("my-project", "my-name", None)
    assert run_here(*words, "--wandb_project=p", "--wandb_run_name=n", "--wandb_mode=offline") == 0
    assert (fake.given["project"], fake.given["name"], fake.given["mode"]) == ("p", "n", "offline")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=True))
    assert "wandb login" in refusal(capsys, *words)


@pytest.mark.parametrize(
    "text, told",
    [
        ("batch_size = 1\nraise KeyError('x')", "line 2: KeyError"),
        ("\nimport no_such_package", "line 2: ModuleNotFound"),
        ("class Odd(Exception): pass\nraise Odd('x')", "line 2: Odd: x"), ("x =", "line 1: SyntaxError"),
        ("exit()", "SystemExit"), ("def f():\n    return 1 / 0\nf()", "line 2: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_config_files_that_raise(text, told, tmp_path, capsys):
    (tmp_path / "c.py").write_text(text)
    line = refusal(capsys, tmp_path / "c.py")
    assert str(tmp_path / "c.py") in line and told in line


def test_a_config_file_with_a_byte_order_mark(shakespeare, tmp_path):
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfmax_iters = 1\n")
    given = [w for w in flags(shakespeare, tmp_path / "out") if "max_iters" not in w]
    assert run_here(tmp_path / "c.py", *given) == 0
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["config"]["max_iters"] == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
                                   torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])  # fmt: skip
def test_out_of_memory_is_one_line(error, shakespeare, tmp_path, monkeypatch, capsys):
    def too_much(self):
        raise error

    monkeypatch.setattr(train.Trainer, "step", too_much)
    assert "lower batch_size" in refusal(capsys, *flags(shakespeare, tmp_path / "out"))
    assert load_checkpoint(tmp_path / "out" / "ckpt_last.pt")["iter_num"] == 0


def test_other_errors_are_not_called_memory():
    with pytest.raises(RuntimeError, match="shapes"), train.told_when_out_of_memory():
        raise RuntimeError("shapes differ")


def test_saving_refuses_what_cannot_be_read_back(tmp_path):
    path = tmp_path / "ckpt.pt"
    model = GPT(GPTConfig(n_layer=np.int64(1), n_head=1, n_embd=8, block_size=8, vocab_size=5))
    content = {"model": model.state_dict(), "model_args": asdict(model.config), "iter_num": np.int64(3),
               "best_val_loss": np.float32(0.5), "rng": [torch.tensor(1), (np.bool_(True),)]}  # fmt: skip
    save_checkpoint(path, content)
    found = load_checkpoint(path)
    assert found["iter_num"] == 3 and found["best_val_loss"] == 0.5 and found["rng"][1] == (True,)
    before = path.read_bytes()
    for odd in (Path("x"), {1, 2}, np.zeros(3), object(), print):
        with pytest.raises(train.CheckpointError, match=r"\['meta'\]\['x'\] is a"):
            save_checkpoint(path, content | {"meta": {"x": odd}})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA GeForce RTX 3070", 40.6), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("Tesla T4", 65), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2), ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None), ("NVIDIA RTX A6000", None), ("Radeon RX 7900 XTX", None),
    ],
)  # fmt: skip
def test_cards_are_known_by_their_whole_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops("cuda:0") == (tflops and tflops * 1e12)
    assert train.peak_flops("cuda:0", 50) == 50e12 and train.peak_flops("cpu", 50) is None


def test_mfu_is_the_share_of_the_peak():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=11))
    assert model.estimate_mfu(3, 2.0, 1e6) == pytest.approx(3 * 16 * model.flops_per_token() / 2e6)
