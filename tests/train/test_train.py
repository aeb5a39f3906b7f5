"""train.py as its users meet it: exact resume, data order, schedules, evaluation, logs, mistakes told in one line."""

import importlib.util
import json
import math
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn import functional as F

import train
from data.corpus import DataError, load_meta, open_split
from data.dataset import TRAIN, TokenDataset
from helpers import DRIVER, PATIENCE, ROOT, TIMING, TINY, error_of, flags, history, losses, run_here, same, wait_for
from model import GPT, DecodingState, GPTConfig, load_checkpoint
from train import TrainConfig, lr_at


def world(rank=0, size=1):
    """One of `size` processes, without the processes."""
    return SimpleNamespace(rank=rank, size=size, is_main=rank == 0, device="cpu", control=None, sum=lambda x: x,
                           gather=lambda x: [x])  # fmt: skip


def trainer(data, out, world=world(), **given):  # noqa: B008
    """A Trainer at step 0."""
    settings = train.configurator.read(flags(data, out, **given), TrainConfig, GPTConfig)
    cfg = settings.build(TrainConfig)
    data = TokenDataset(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model = train.build_model(settings, None, data)
        return train.Trainer(cfg, model, data, world, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on.

LONG = {"max_iters": 200, "eval_interval": 25, "dropout": 0.1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def straight(shakespeare, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("straight")
    assert run_here(*flags(shakespeare, out, **LONG)) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.slow
def test_resume_is_exact(number, shakespeare, straight, tmp_path):
    out = tmp_path / "out"
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PAUSE_AT": "120"}  # a late signal still finds it running
    process = subprocess.Popen([sys.executable, DRIVER, *flags(shakespeare, out, **LONG)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=train.os.environ | env)  # fmt: skip
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"iter": 60,' in metrics.read_text())
    process.send_signal(number)
    (out / "go").touch()
    stdout, stderr = process.communicate(timeout=PATIENCE)
    (out / "go").unlink()
    stopped_at = load_checkpoint(out / "ckpt_last.pt")["iter_num"]
    assert 50 <= stopped_at < 200
    if number == signal.SIGKILL:
        again = [f"--out_dir={out}", "--init_from=auto"]
    else:
        assert process.returncode == 0 and stderr.strip() == "stopping after this step; again to quit now"
        assert stopped_at > 60 and f"stopped after {stopped_at} steps" in stdout
        again = [f"--out_dir={out}", "--init_from=resume"]

    assert run_here(*again) == 0
    assert history(out, TIMING) == history(straight, TIMING)
    for name in ("ckpt.pt", "ckpt_last.pt"):
        a, b = load_checkpoint(out / name), load_checkpoint(straight / name)
        for part in ("model", "optimizer", "iter_num", "best_val_loss", "rng", "model_args"):
            assert same(a[part], b[part]), (name, part)


@pytest.mark.slow
def test_the_line_that_says_how_to_resume(shakespeare, tmp_path, monkeypatch, capsys):
    """It can be pasted into a shell, whatever the folder is called."""
    step = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self: (step(self), signal.raise_signal(signal.SIGINT))[0])
    assert run_here(*flags(shakespeare, tmp_path / "my run")) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("stopped after 1 steps")
    python, script, *again = shlex.split(last_line.partition("go on with: ")[2])
    assert [python, script] == ["python", "train.py"]
    monkeypatch.undo()
    assert run_here(*again) == 0
    assert len(losses(tmp_path / "my run")) == 6


@pytest.mark.slow
def test_max_iters_is_the_number_of_optimizer_steps(straight, capsys):
    last = load_checkpoint(straight / "ckpt_last.pt")
    assert last["iter_num"] == 200
    assert {float(s["step"]) for s in last["optimizer"]["state"].values()} == {200.0}
    assert [x["iter"] for x in history(straight) if "loss" in x] == list(range(200))
    assert [x["iter"] for x in history(straight) if "val_loss" in x] == list(range(0, 201, 25))
    before = history(straight, TIMING)
    assert run_here(f"--out_dir={straight}", "--init_from=resume") == 0  # a finished run: nothing is left to do
    assert history(straight, TIMING) == before
    assert same(load_checkpoint(straight / "ckpt_last.pt")["model"], last["model"])


def test_resume_goes_on_to_a_new_max_iters(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path, lr_schedule="constant")) == 0
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=9") == 0
    assert [x["iter"] for x in history(tmp_path) if "loss" in x] == list(range(9))


@pytest.mark.slow
def test_best_val_loss_is_kept(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path)) == 0
    last = torch.load(tmp_path / "ckpt_last.pt", weights_only=True)
    torch.save(last | {"best_val_loss": 0.5}, tmp_path / "ckpt_last.pt")
    best = (tmp_path / "ckpt.pt").read_bytes()
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=9") == 0
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["best_val_loss"] == 0.5
    assert (tmp_path / "ckpt.pt").read_bytes() == best


@pytest.mark.slow
def test_resume_refuses_another_architecture(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path)) == 0
    resume = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=8"]
    for flag in ("--n_layer=3", "--block_size=8", "--bias=False", "--mlp_act=relu2", "--vocab_size=99"):
        capsys.readouterr()
        assert run_here(*resume, flag) == 2
        assert flag in error_of(capsys)
    assert run_here(*resume, "--n_layer=2", "--dropout=0.2") == 0  # the same; and dropout shapes no weight
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["model_args"]["dropout"] == 0.2


@pytest.mark.slow
def test_resume_takes_optimizer_settings_that_are_given(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path)) == 0
    given = ["--weight_decay=0.5", "--beta1=0.8", "--beta2=0.99"]
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=8", *given) == 0
    decays, stays = load_checkpoint(tmp_path / "ckpt_last.pt")["optimizer"]["param_groups"]
    assert decays["weight_decay"] == 0.5 and stays["weight_decay"] == 0.0
    assert tuple(decays["betas"]) == tuple(stays["betas"]) == (0.8, 0.99)


@pytest.mark.slow
def test_init_from_auto_starts_where_there_is_nothing(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path, init_from="auto", max_iters=2)) == 0
    assert run_here(*flags(shakespeare, tmp_path, init_from="auto", max_iters=4)) == 0
    assert [x["iter"] for x in history(tmp_path) if "loss" in x] == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Data order.


def corpus_of(size, seed=0):
    corpus = TokenDataset.__new__(TokenDataset)
    tokens = np.arange(size, dtype=np.uint32)
    corpus.folder, corpus.meta, corpus.splits, corpus.seed = Path("x"), {}, {"train": tokens, "val": tokens}, seed
    return corpus


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2), st.integers(0, 10**7), st.integers(1, 50))
def test_windows_stay_inside(block_size, spare, stream, step, count):
    corpus = corpus_of(block_size + spare)
    starts = corpus.windows(stream, step, count, block_size)
    assert starts.shape == (count,) and starts.min() >= 0 and starts.max() + block_size < block_size + spare
    config = SimpleNamespace(block_size=block_size, vocab_size=block_size + spare)
    x, y = corpus.batch("train", starts, config, "cpu")
    assert x.shape == y.shape == (count, block_size) and torch.equal(y, x + 1)


def test_windows_are_a_function_of_seed_stream_and_step():
    def draw(seed=0, stream=0, step=0):
        return corpus_of(100_000, seed).windows(stream, step, 64, 16)

    np.random.seed(7)
    first = draw()
    np.random.seed(8)
    assert (draw() == first).all()
    assert len({tuple(draw(**{k: v})) for k in ("seed", "stream", "step") for v in range(5)}) == 13
    assert len(set(corpus_of(20).windows(0, 0, 1000, 16))) == 4  # every start there is, the last included


def test_batches_are_the_raw_bins(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path)
    for split in ("train", "val"):
        raw = np.fromfile(shakespeare / f"{split}.bin", np.uint16).astype(int)
        x, y = t.data.batch(split, np.array([0, 5, len(raw) - 17]), t.config, "cpu")
        for row, start in enumerate((0, 5, len(raw) - 17)):
            assert x[row].tolist() == raw[start : start + 16].tolist()
            assert y[row].tolist() == raw[start + 1 : start + 17].tolist()


@pytest.mark.slow
def test_processes_and_micro_steps_share_the_global_batch(shakespeare, tmp_path, monkeypatch):
    drawn = []
    batch = TokenDataset.batch
    monkeypatch.setattr(TokenDataset, "batch", lambda *a: (drawn.extend(a[2]), batch(*a))[1])

    def starts(steps=2, **given):
        """The windows of each of two steps, over all processes in order."""
        by_step = [[] for _ in range(steps)]
        for rank in range(given.pop("processes", 1)):
            t = trainer(shakespeare, tmp_path, world(rank, processes), **given)
            for step in range(steps):
                drawn.clear()
                t.step()
                by_step[step] += drawn
        return by_step

    processes = 1
    whole = starts(batch_size=24)
    assert len(whole[0]) == 24 and whole[0] != whole[1]
    assert starts(batch_size=6, gradient_accumulation_steps=4) == whole
    for processes in (2, 4):
        assert starts(batch_size=6, gradient_accumulation_steps=4, processes=processes) == whole


def test_data_order_does_not_depend_on_evaluation_or_model(shakespeare, tmp_path):
    def at_step_4(**given):
        t = trainer(shakespeare, tmp_path, **given)
        for _ in range(4):
            t.step()
            if given:
                t.evaluate()
        return t.data.windows(TRAIN, t.iter_num, 8, 16).tolist()

    assert at_step_4() == at_step_4(n_layer=1, dropout=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules.


def lrs(*steps, **given):
    cfg = TrainConfig(**{"learning_rate": 1.0, "warmup_iters": 9, "lr_decay_iters": 109, "min_lr": 0.2} | given)
    return [lr_at(cfg, i) for i in steps]


def test_warm_up_and_cosine():
    assert lrs(0, 4, 8) == pytest.approx([0.1, 0.5, 0.9])
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert lrs(9, 34, 59, 109, 110, 10**6) == pytest.approx([1.0, quarter, 0.6, 0.2, 0.2, 0.2])
    assert lrs(0, 50, warmup_iters=0, lr_decay_iters=100) == pytest.approx([1.0, 0.6])


def test_constant_and_no_decay():
    assert lrs(0, 8, 9, 59, 10**6, lr_schedule="constant") == pytest.approx([0.1, 0.9, 1.0, 1.0, 1.0])
    assert lrs(0, 9, 10**6, decay_lr=False) == [1.0, 1.0, 1.0]


def test_warm_up_stable_decay():
    given = {"lr_schedule": "wsd", "lr_decay_iters": 100}
    assert lrs(0, 9, 50, 80, 90, 100, 200, **given) == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    assert lrs(9, 55, 100, wsd_decay_share=0.9, **given) == pytest.approx([1.0, 0.6, 0.2])


def test_the_schedule_ends_with_the_run_by_default():
    given = {"lr_decay_iters": None, "max_iters": 109}
    assert lrs(59, 109, **given) == pytest.approx([0.6, 0.2])
    assert lrs(59, 109, min_lr=None, **given) == pytest.approx([0.55, 0.1])
    assert lrs(5, 10, warmup_iters=5, lr_decay_iters=5) == pytest.approx([0.2, 0.2])  # no room for a decay
    assert TrainConfig().lr_decay_iters is None and TrainConfig().min_lr is None


@pytest.mark.slow
def test_the_schedule_is_what_the_optimizer_gets(straight):
    cfg = TrainConfig(**{k: TINY[k] for k in ("learning_rate", "warmup_iters")}, max_iters=200)
    logged = [x["lr"] for x in history(straight) if "loss" in x]
    assert logged == [lr_at(cfg, i) for i in range(200)]


# ---------------------------------------------------------------------------------------------------------------------
# Muon, and the number format.

MUON = {"optimizer": "muon", "muon_lr": 0.01, "emb_lr": 0.02, "scalar_lr": 0.004, "tie_weights": False}


@pytest.mark.slow
def test_muon_learns_resumes_exactly_and_says_who_gets_what(shakespeare, tmp_path, capsys):
    given = MUON | {"lr_decay_iters": 8, "norm": "rms", "bias": False}
    assert run_here(*flags(shakespeare, tmp_path / "straight", max_iters=8, **given)) == 0
    printed = capsys.readouterr().out.splitlines()[2]
    assert printed.startswith("muon: matrices 8 tensors of 24,576 numbers at 0.01, embedding 2 tensors of ")
    assert " at 0.02, head 1 tensors of " in printed and printed.endswith(" at 0.003")
    assert run_here(*flags(shakespeare, tmp_path / "stopped", max_iters=5, **given)) == 0
    assert run_here(f"--out_dir={tmp_path / 'stopped'}", "--init_from=resume", "--max_iters=8") == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    a, b = (load_checkpoint(tmp_path / out / "ckpt_last.pt") for out in ("stopped", "straight"))
    assert same(a["model"], b["model"]) and same(a["optimizer"]["state"], b["optimizer"]["state"])
    assert losses(tmp_path / "straight")[-1] < losses(tmp_path / "straight")[0]
    cfg = TrainConfig(learning_rate=1e-3, warmup_iters=2, lr_decay_iters=8)
    logged = [x["lr"] for x in history(tmp_path / "straight") if "loss" in x]
    assert logged == pytest.approx([10 * lr_at(cfg, i) for i in range(8)])  # muon_lr's share of learning_rate


@pytest.mark.parametrize(
    "given, words",
    [
        ({"muon_lr": 0.01}, 'muon_lr=0.01 does nothing without optimizer="muon"'),
        ({"optimizer": "muon", "htm_meta_strength": 0.5, "htm_meta_target": "momentum"}, "AdamW's first moment"),
        ({"optimizer": "muon", "emb_lr": 0.0}, "emb_lr=0.0"),
    ],
)
def test_muon_refuses(given, words, shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path, **given)) == 2
    assert words in error_of(capsys)


def formats(monkeypatch, **seconds):
    """Let products take so many seconds per call, by the name of their format."""
    calls = []

    def product_seconds(shapes, tokens, dtype):
        calls.append((train.dtype_name(dtype), tokens, dict(shapes)))
        return seconds[train.dtype_name(dtype)]

    monkeypatch.setattr(train, "product_seconds", product_seconds)
    return calls


def test_the_faster_format_is_taken_and_both_are_told(monkeypatch):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=9))
    calls = formats(monkeypatch, float32=0.01, bfloat16=0.004)
    dtype, why = train.pick_dtype("auto", "cpu", model, 64)
    assert dtype == torch.bfloat16 and "float32 10 ms" in why and "bfloat16 4 ms" in why
    assert {name for name, _, _ in calls} == {"float32", "bfloat16"} and calls[-1][1] == 64
    assert calls[0][2] == {(96, 32): 2, (32, 32): 2, (128, 32): 2, (32, 128): 2}  # the model's own layers
    order = [name for name, tokens, _ in calls if tokens == 64]
    assert order[:4] in (["float32", "bfloat16"] * 2, ["bfloat16", "float32", "float32", "bfloat16"])  # either order
    for slow in (0.009, 0.02, 5.0):  # hardly faster, slower, far slower
        formats(monkeypatch, float32=0.01, bfloat16=slow)
        assert train.pick_dtype("auto", "cpu", model, 64)[0] == torch.float32


def test_a_hopeless_format_is_not_measured_at_length(monkeypatch):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=9))
    calls = formats(monkeypatch, float32=0.01, bfloat16=5.0)
    train.pick_dtype("auto", "cpu", model, 64)
    assert len(calls) == 2


def test_measuring_formats_takes_under_half_a_second_and_no_random_number():
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65))
    before = torch.get_rng_state()
    train.time_formats(model, 768)  # the first call also loads libraries
    start = train.time.perf_counter()
    seconds = train.time_formats(model, 768)
    elapsed = train.time.perf_counter() - start
    assert all(0 < each < 1 for each in seconds.values()) and torch.equal(before, torch.get_rng_state())
    assert elapsed < 0.5 or elapsed < 20 * sum(seconds.values())  # 12 rounds of each on a machine that is busy


@pytest.mark.slow
def test_a_resumed_run_keeps_its_format(shakespeare, tmp_path, monkeypatch, capsys):
    formats(monkeypatch, float32=0.01, bfloat16=0.001)
    assert run_here(*flags(shakespeare, tmp_path, dtype="auto")) == 0
    assert "dtype bfloat16" in capsys.readouterr().out
    formats(monkeypatch, float32=0.001, bfloat16=0.01)
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=8") == 0
    assert "dtype bfloat16" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == "bfloat16"
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=9", "--dtype=auto") == 0  # asked anew
    assert "dtype float32" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.


def cross_entropy(model, tokens, T):
    """Mean loss in float64 over all of `tokens`, in windows of T that do not overlap, one at a time."""
    total = 0.0
    for i in range(0, len(tokens) - 1, T):
        x, y = tokens[i : i + T][: len(tokens) - 1 - i], tokens[i + 1 : i + T + 1]
        logits = model(x[None], y[None])[0][0].double()
        total -= logits.log_softmax(-1).gather(1, y[:, None]).sum().item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("batch_size, block_size", [(4, 16), (5, 13), (1, 8), (200, 16)])
@pytest.mark.slow
def test_eval_full_is_the_cross_entropy_of_the_whole_split(batch_size, block_size, shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path, eval_full=True, batch_size=batch_size, block_size=block_size)
    for p in t.model.parameters():
        p.data.mul_(3)  # far from uniform
    tokens = torch.from_numpy(np.fromfile(shakespeare / "val.bin", np.uint16).astype(np.int64))
    with torch.no_grad():
        by_hand = cross_entropy(t.model.eval(), tokens, block_size)
    assert t.evaluate()["val_loss"] == pytest.approx(by_hand, abs=1e-6)


def test_processes_share_the_whole_split(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path)
    windows = [t.data.val_windows(4, t.config, "cpu", rank, 3) for rank in range(3)]
    targets = sorted(y[y != -1].tolist() for share in windows for _, y in share)
    whole = np.fromfile(shakespeare / "val.bin", np.uint16)[1:].tolist()
    assert sorted(sum(targets, [])) == sorted(whole)


def test_evaluation_is_deterministic(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path, dropout=0.5)
    first, state = t.evaluate(), torch.get_rng_state()
    torch.manual_seed(3)
    assert t.evaluate() == first and t.model.training
    torch.set_rng_state(state)
    t.iter_num = 1
    assert t.evaluate() != first  # other batches
    t.cfg.eval_full = True
    whole = t.evaluate()["val_loss"]
    t.iter_num = 2
    assert t.evaluate()["val_loss"] == whole


@pytest.mark.slow
def test_random_evaluation_estimates_the_whole(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path, eval_iters=100)
    estimate, t.cfg.eval_full = t.evaluate()["val_loss"], True
    assert estimate == pytest.approx(t.evaluate()["val_loss"], abs=0.02)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_teacher_forcing_equals_feeding_prefixes(training, shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path)
    for _ in range(30 * training):
        t.step()
    x, y = t.data.batch("val", np.array([3, 500]), t.config, "cpu")
    model, state = t.model.eval(), DecodingState()
    with torch.no_grad():
        forced = model(x, y)[1].item()
        prefixes = torch.cat([model(x[:, : i + 1])[0] for i in range(16)], dim=1)
        cached = torch.cat([model(x[:, i : i + 1], state=state)[0] for i in range(16)], dim=1)
    for logits in (prefixes, cached):
        assert F.cross_entropy(logits.flatten(0, 1).double(), y.flatten()).item() == pytest.approx(forced, abs=1e-5)


def test_bits_per_byte(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path)
    t.data.meta = t.data.meta | {"val_tokens": 100, "val_bytes": 400}
    results = t.evaluate()
    assert results["val_bpb"] == pytest.approx(results["val_loss"] / 4 / math.log(2))
    t.data.meta = {}  # nanoGPT's own data set does not tell
    assert t.evaluate().keys() == {"train_loss", "val_loss"}


@pytest.mark.slow
def test_eval_only_writes_nothing(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path / "new", eval_only=True)) == 0
    assert not (tmp_path / "new").exists()
    assert run_here(*flags(shakespeare, tmp_path, eval_full=True)) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--eval_only") == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert f"val_loss {history(tmp_path)[-1]['val_loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_always_save_checkpoint_off_saves_only_better_ones(shakespeare, tmp_path):
    """With a learning rate that makes it worse, the checkpoint of the first evaluation stays."""
    given = {"always_save_checkpoint": False, "learning_rate": 0.5, "eval_full": True, "grad_clip": 0}
    assert run_here(*flags(shakespeare, tmp_path, **given)) == 0
    evaluations = [x["val_loss"] for x in history(tmp_path) if "val_loss" in x]
    assert min(evaluations) == evaluations[0]
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["iter_num"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Training.


@pytest.mark.slow
def test_it_learns(shakespeare, tmp_path):
    given = {"n_embd": 64, "block_size": 32, "batch_size": 16, "learning_rate": 5e-3, "max_iters": 150}
    assert run_here(*flags(shakespeare, tmp_path, **given, eval_interval=150, eval_full=True)) == 0
    counts = np.bincount(np.fromfile(shakespeare / "val.bin", np.uint16))
    p = counts[counts > 0] / counts.sum()
    unigram = -(p * np.log(p)).sum()
    first, last = (x["val_loss"] for x in history(tmp_path) if "val_loss" in x)
    assert first == pytest.approx(math.log(load_meta(shakespeare)["vocab_size"]), abs=0.3)
    assert last < unigram - 1.0  # it uses its context


@pytest.mark.parametrize("eval_interval", [1, 100])
@pytest.mark.parametrize("log_interval", [1, 50])
@pytest.mark.slow
def test_a_huge_learning_rate_stops_the_run(eval_interval, log_interval, shakespeare, tmp_path, capsys):
    given = {"learning_rate": 1e30, "warmup_iters": 0, "eval_interval": eval_interval, "log_interval": log_interval}
    assert run_here(*flags(shakespeare, tmp_path, max_iters=20, **given)) == 2
    assert "step 1" in error_of(capsys)
    check_last_good(tmp_path, 0)


def check_last_good(out, iter_num):
    last = load_checkpoint(train.find_checkpoint(out))
    assert last["iter_num"] == iter_num
    assert math.isfinite(last["best_val_loss"])
    model = GPT.from_checkpoint(last).eval()
    assert all(p.isfinite().all() for p in model.parameters())
    idx = torch.zeros(1, 8, dtype=torch.long)
    assert model(idx, idx)[1].isfinite()
    history(out)  # strict JSON


@pytest.mark.parametrize("poisoned_at", [3, 4])  # before and after the last step that an evaluation follows
@pytest.mark.slow
def test_a_poisoned_weight_stops_the_run(poisoned_at, shakespeare, tmp_path, monkeypatch, capsys):
    step = train.Trainer.step

    def poison(self):
        result = step(self)
        if self.iter_num == poisoned_at:
            self.model.lm_head.weight.data[3, 3] = math.nan
        return result

    monkeypatch.setattr(train.Trainer, "step", poison)
    assert run_here(*flags(shakespeare, tmp_path, eval_interval=2, max_iters=20)) == 2
    assert f"step {poisoned_at}" in error_of(capsys)
    check_last_good(tmp_path, 2)
    monkeypatch.undo()
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=6") == 0


@pytest.mark.slow
def test_a_stop_after_a_poisoned_step_keeps_the_last_good_checkpoint(shakespeare, tmp_path, monkeypatch, capsys):
    """The gradient of the last step is no number, and no loss after it was seen."""
    step = train.Trainer.step

    def poison(self):
        if self.iter_num == 2:
            self.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(train.Trainer, "step", poison)
    assert run_here(*flags(shakespeare, tmp_path, eval_interval=2, log_interval=50, max_iters=20)) == 2
    assert "step 2" in error_of(capsys)
    check_last_good(tmp_path, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_reduced_precision(dtype, shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path / "half", dtype=dtype)) == 0
    assert f"dtype {dtype}" in capsys.readouterr().out
    assert run_here(*flags(shakespeare, tmp_path / "full")) == 0
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "full"), abs=0.02)
    assert losses(tmp_path / "half") != losses(tmp_path / "full")
    checkpoint = load_checkpoint(tmp_path / "half" / "ckpt_last.pt")
    assert {v.dtype for v in checkpoint["model"].values()} == {torch.float32}
    assert bool(checkpoint["scaler"]) == (dtype == "float16")


@pytest.mark.slow
def test_loss_scale_survives_a_resume(shakespeare, tmp_path, monkeypatch):
    def scales(*words):
        """The loss scale at each step; it doubles every second step."""
        seen, init = [], torch.amp.GradScaler.__init__
        update = torch.amp.GradScaler.update
        with monkeypatch.context() as m:
            m.setattr(torch.amp.GradScaler, "__init__",
                      lambda self, *a, **k: init(self, *a, growth_interval=2, init_scale=8.0, **k))  # fmt: skip
            m.setattr(torch.amp.GradScaler, "update", lambda self: (seen.append(self.get_scale()), update(self)))
            assert run_here(*words) == 0
        return seen

    straight = scales(*flags(shakespeare, tmp_path / "straight", dtype="float16", max_iters=9))
    assert straight == [8, 8, 16, 16, 32, 32, 64, 64, 128]
    out = tmp_path / "stopped"
    given = {"dtype": "float16", "lr_decay_iters": 9}
    before = scales(*flags(shakespeare, out, **given, max_iters=3))
    assert before + scales(f"--out_dir={out}", "--init_from=resume", "--max_iters=9") == straight
    assert losses(out) == losses(tmp_path / "straight")


@pytest.mark.slow
def test_a_full_precision_run_goes_on_in_half(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path)) == 0
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=8", "--dtype=float16") == 0
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["iter_num"] == 8


@pytest.mark.slow
def test_an_overflow_in_half_is_skipped_and_told_in_json(shakespeare, tmp_path, monkeypatch):
    """A loss scale too large at first: its steps are skipped, the scale falls, and metrics.jsonl stays JSON."""
    init = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__",
                        lambda self, *a, **k: init(self, *a, init_scale=2.0**20, **k))  # fmt: skip
    assert run_here(*flags(shakespeare, tmp_path, dtype="float16", max_iters=12)) == 0
    last = load_checkpoint(tmp_path / "ckpt_last.pt")
    assert last["scaler"]["scale"] < 2.0**20, "no overflow: this test tests nothing"
    assert all(p.isfinite().all() for p in last["model"].values())
    assert len(losses(tmp_path)) == 12


def test_compile(shakespeare, tmp_path, cli):
    given = {"n_layer": 1, "max_iters": 3, "eval_iters": 1, "n_embd": 16}
    assert run_here(*flags(shakespeare, tmp_path / "eager", **given)) == 0
    done = cli("train.py", *flags(shakespeare, tmp_path / "compiled", **given | {"compile": True}))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    GPT.from_checkpoint(load_checkpoint(tmp_path / "compiled" / "ckpt_last.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# What a run tells.


@pytest.mark.slow
def test_metrics(shakespeare, tmp_path):
    given = {"gradient_accumulation_steps": 3, "log_interval": 2, "max_iters": 7}
    assert run_here(*flags(shakespeare, tmp_path, **given)) == 0
    lines = history(tmp_path)
    training, evaluation = ([x for x in lines if key in x] for key in ("loss", "val_loss"))
    assert [x["iter"] for x in training] == [0, 2, 4, 6]
    assert [x["iter"] for x in evaluation] == [0, 3, 6, 7] and load_checkpoint(tmp_path / "ckpt_last.pt")[
        "iter_num"
    ] == 7
    for x in training:
        assert {"iter", "tokens", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "memory_mb"} <= x.keys()
        assert x["tokens"] == (x["iter"] + 1) * 4 * 3 * 16
        assert x["ms"] > 0 and x["grad_norm"] > 0 and x["memory_mb"] > 50
        assert x["tokens_per_s"] == pytest.approx(4 * 3 * 16 / x["ms"] * 1e3)
    for x in evaluation:
        assert x.keys() == {"iter", "tokens", "train_loss", "val_loss", "val_bpb"}
        assert x["tokens"] == x["iter"] * 4 * 3 * 16


def test_run_json(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path, max_iters=1)) == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["config"]["learning_rate"] == 1e-3 and facts["config"]["dataset"] == "shakespeare_char"
    assert facts["model_args"]["n_embd"] == 32
    assert facts["model_args"]["vocab_size"] == load_meta(shakespeare)["vocab_size"]
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["numpy"] == np.__version__
    assert facts["device"] == "cpu" and facts["dtype"] == "float32" and facts["processes"] == 1
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (facts["git_commit"] or "").rstrip("+") == head


@pytest.mark.slow
def test_what_the_terminal_shows(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path)) == 0
    out = capsys.readouterr().out.splitlines()
    assert "parameters" in out[0] and "64 tokens per step" in out[0]
    assert out[1].startswith("device cpu (as asked), dtype float32 (as asked)")
    assert sum(x.startswith("iter ") for x in out) == 6 and sum(x.startswith("step ") for x in out) == 3


@pytest.mark.slow
def test_samples_while_training(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path / "with", sample_interval=2, dropout=0.1)) == 0
    out = capsys.readouterr().out
    assert "sample at step 2" in out and "sample at step 4" in out
    assert len(out.split("a sample at step 4 ---\n")[1].split("\n---")[0]) > 50
    assert run_here(*flags(shakespeare, tmp_path / "without", dropout=0.1)) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")  # a sample disturbs nothing


@pytest.mark.slow
def test_tensorboard(shakespeare, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run_here(*flags(shakespeare, tmp_path, tensorboard_log=True)) == 0
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=8") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "val_loss", "lr"):
        expected = {x["iter"]: x[name] for x in history(tmp_path) if name in x}
        assert {e.step: e.value for e in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)


def test_wandb_offline(shakespeare, tmp_path, cli):
    pytest.importorskip("wandb")
    given = {"wandb_log": True, "wandb_mode": "offline", "wandb_project": "p1", "wandb_run_name": "r1"}
    env = {"WANDB_DIR": "", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    done = cli("train.py", *flags(shakespeare, tmp_path / "out", **given), env=env)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    logged, names = read_wandb(file)
    assert ("p1", "r1") in names
    for name in ("loss", "val_loss"):
        expected = {x["iter"]: x[name] for x in history(tmp_path / "out") if name in x}
        assert {x["_step"]: x[name] for x in logged if name in x} == pytest.approx(expected)


def read_wandb(file):
    """(history rows, (project, name) pairs) of a W&B run file: protobuf records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, rows, names, parts = file.read_bytes(), 7, [], [], b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # a block's end that no record header fits in
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after the checksum
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record, parts = Record.FromString(parts), b""
            if record.HasField("history"):
                items = record.history.item
                rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif record.HasField("run"):
                names.append((record.run.project, record.run.display_name))
    return rows, names


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(package, shakespeare, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    assert run_here(*flags(shakespeare, tmp_path / "out", **{f"{package}_log": True})) == 2
    assert f"pip install {package}" in error_of(capsys)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes: one line, exit status 2, before any long work.


@pytest.mark.parametrize(
    "given, told",
    [
        ({"dataset": "nowhere"}, ["nowhere", "does not exist"]),
        ({"block_size": 1800}, ["val.bin", "1800 tokens", "block_size=1800"]),
        ({"vocab_size": 10}, ["token id", "vocab_size=10"]),
        ({"devices": 4}, ["torchrun", "--nproc_per_node=4"]),
        ({"precision": "foo"}, ["--precision=foo", "bf16-mixed", "fp16-mixed", "fp32"]),
        ({"device": "cuda"}, ["--device=cuda", "cpu"]),
        ({"device": "tpu"}, ["--device=tpu", "cpu"]),
        ({"init_from": "resume"}, ["no checkpoint", "--init_from=scratch"]),
        ({"init_from": "scrach"}, ["scrach"]),
        ({"dtype": "float8"}, ["float8", "bfloat16"]),
        ({"lr_schedule": "linear"}, ["linear", "cosine"]),
        ({"n_head": 3}, ["n_head=3", "n_embd=32"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"eval_interval": 0}, ["eval_interval=0"]),
        ({"learning_rate": "nan"}, ["learning_rate"]),
        ({"learning_rte": 1}, ["learning_rte", "learning_rate"]),
        ({"beta1": 1}, ["beta1=1.0", "[0, 1)"]),
        ({"log_alignment": True}, ["--log_alignment", "method", '"bp"']),
        ({"curriculum": "e7", "curriculum_iters": 7}, ["--curriculum=e7", 'manifold="e7"']),
        ({"curriculum": "length"}, ["curriculum", "curriculum_iters", "set both or neither"]),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_mistakes(given, told, shakespeare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train.Trainer, "step", lambda self: pytest.fail("it began to train"))
    assert run_here(*flags(shakespeare, tmp_path / "out", **given)) == 2
    message = error_of(capsys)
    assert all(part in message for part in told), message
    assert not (tmp_path / "out").exists()


def test_gpt2_without_a_network(shakespeare, tmp_path, cli):
    pytest.importorskip("transformers")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = cli("train.py", *flags(shakespeare, tmp_path / "out", init_from="gpt2"), env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: error: --init_from=gpt2: ")


@pytest.mark.slow
def test_data_without_meta_is_scanned(shakespeare, tmp_path, capsys):
    """nanoGPT's own data sets: uint16, no meta.json. A stray id is told at once, wherever it is."""
    folder = tmp_path / "old"
    folder.mkdir()
    tokens = np.fromfile(shakespeare / "train.bin", np.uint16)
    tokens.tofile(folder / "train.bin")
    tokens.tofile(folder / "val.bin")
    assert run_here(*flags(folder, tmp_path / "out", vocab_size=50)) == 0
    tokens[1234] = 77
    tokens.tofile(folder / "train.bin")
    capsys.readouterr()
    assert run_here(*flags(folder, tmp_path / "out", vocab_size=50)) == 2
    assert "token id 77" in error_of(capsys)


def test_ids_beyond_the_scan_are_refused_when_read(shakespeare, tmp_path):
    t = trainer(shakespeare, tmp_path)
    tokens = np.array(open_split(shakespeare, "val", load_meta(shakespeare)))
    tokens[-1] = 1000  # its last target only
    t.data.splits["val"] = tokens
    with pytest.raises(DataError, match="token id 1000"):
        t.data.batch("val", np.array([0, len(tokens) - 17]), t.config, "cpu")
    with pytest.raises(DataError, match="token id 1000"):
        list(t.data.val_windows(4, t.config, "cpu", 0, 1))


def test_out_dir_in_a_files_place(shakespeare, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert run_here(*flags(shakespeare, tmp_path / out)) == 2
        assert str(tmp_path / out) in error_of(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_too_small(shakespeare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    assert run_here(*flags(shakespeare, tmp_path)) == 2
    assert "free" in error_of(capsys)
    assert not list(tmp_path.glob("ckpt*"))


# ---------------------------------------------------------------------------------------------------------------------
# Configuration.


HELP = """
import sys, numpy, torch, tqdm
before = set(sys.modules)
import train
try:
    train.main(["--help"])
finally:
    print(*{name.partition(".")[0] for name in sys.modules.keys() - before}, file=sys.stderr)
"""


@pytest.mark.slow
def test_help_is_complete_and_quick():
    """Quick: beyond torch, which takes its time, it imports nothing but our own files."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT)
    assert set(done.stderr.split()) - sys.stdlib_module_names == {"configurator", "data", "kernels", "model", "train"}
    assert done.returncode == 0
    for f in (*fields(TrainConfig), *fields(GPTConfig)):
        assert f"  --{f.name}={f.default!r}  (" in done.stdout


@pytest.mark.slow
def test_print_config_reproduces_itself(shakespeare, tmp_path, capsys):
    file = tmp_path / "printed.py"
    words = flags(shakespeare, tmp_path / "out", min_lr=None, lr_schedule="wsd")
    assert run_here(*words, "--print_config") == 0
    printed = capsys.readouterr().out
    file.write_text(printed)
    assert run_here(file, "--print_config") == 0
    assert capsys.readouterr().out == printed
    assert not (tmp_path / "out").exists()
    assert run_here(file) == 0 and run_here(*words, f"--out_dir={tmp_path / 'again'}") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "again")


def test_runs_from_any_directory(shakespeare, tmp_path, cli):
    words = [x for x in flags(shakespeare, "here", max_iters=2) if "learning_rate" not in x]
    done = cli("train.py", "config/train_shakespeare_char_cpu.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / "here" / "ckpt_last.pt")["iter_num"] == 2
    assert not (ROOT / "here").exists()


NANOGPT = {
    "train_shakespeare_char.py": """
out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'  # run on cpu only
# compile = False # do not torch compile the model
""",
    "train_gpt2.py": """
wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "finetune_shakespeare.py": """
import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "eval_gpt2.py": """
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = 'gpt2'
""",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_config_files_are_understood(name, tmp_path, capsys):
    (tmp_path / name).write_text(NANOGPT[name])
    assert run_here(tmp_path / name, "--print_config") == 0
    resolved, wanted = {}, {}
    exec(capsys.readouterr().out, resolved)
    exec(NANOGPT[name], wanted)
    for key in wanted.keys() - {"__builtins__", "time", "wandb_run_name"}:
        assert resolved[key] == wanted[key]


@pytest.mark.slow
def test_nanogpts_config_trains(shakespeare, tmp_path):
    (tmp_path / "c.py").write_text(NANOGPT["train_shakespeare_char.py"])
    words = flags(shakespeare, tmp_path / "out")
    assert run_here(tmp_path / "c.py", *words) == 0
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["config"]["beta2"] == 0.99


@pytest.mark.slow
def test_precision_aliases(shakespeare, tmp_path, capsys):
    words = [x for x in flags(shakespeare, tmp_path, max_iters=1) if "dtype" not in x]
    assert run_here(*words, "--precision", "bf16-mixed", "--devices=1") == 0
    assert "dtype bfloat16" in capsys.readouterr().out


def test_a_training_line_shows_how_many_events_are_silent(capsys):
    log = object.__new__(train.Log)
    log.terminal, log.bar, log.metrics = False, train.tqdm(disable=True), lambda step, values: None
    values = {"loss": 1.5, "ms": 20.0, "tokens_per_s": 3000.0}
    log.training(3, values | {"sparsity": 0.25})
    log.training(4, values)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "iter 3: loss 1.5000, 20.0 ms, 3,000 tokens/s, sparsity 0.2500",
        "iter 4: loss 1.5000, 20.0 ms, 3,000 tokens/s",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Profiles.


@pytest.mark.slow
def test_a_profile_of_some_steps(shakespeare, tmp_path, capsys):
    """The named steps are in the trace, and training is what it is without a profile."""
    assert run_here(*flags(shakespeare, tmp_path / "a", max_iters=4), "--profile=1:3") == 0
    assert f"profile of steps 1 to 2: {tmp_path / 'a/trace.json'}" in capsys.readouterr().out
    events = json.loads((tmp_path / "a/trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 2
    table = (tmp_path / "a/profile.txt").read_text()
    assert "aten::" in table and "Self CPU time total" in table
    assert run_here(*flags(shakespeare, tmp_path / "b", max_iters=4)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert run_here(f"--out_dir={tmp_path / 'a'}", "--init_from=resume", "--max_iters=6") == 0
    assert "profile of" not in capsys.readouterr().out


def test_a_profile_beyond_the_run_is_refused(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path, max_iters=4), "--profile=3:5") == 2
    assert error_of(capsys) == "--profile=3:5: this run trains steps 0 to 3" and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("steps", ["5", "5:5", "a:b", "7:3", "-1:2"])
def test_profiles_of_no_steps(steps):
    with pytest.raises(ValueError, match=f"profile={steps}"):
        TrainConfig(profile=steps)
