"""Checkpoint files: whole after a kill at any instant, refused when they hold code, and clear about what is wrong."""

import errno
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import sample
import train
from data.corpus import load_meta
from helpers import PATIENCE, ROOT, flags, history, losses, run_here, same, wait_for
from model import GPT, CheckpointError, GPTConfig, load_checkpoint, save_checkpoint

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=11)


def a_checkpoint(config=CONFIG):
    """What `Trainer.save` writes, in small."""
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "model_args": asdict(config),
        "config": {"out_dir": "out"},
        "meta": {},
        "iter_num": 1,
        "best_val_loss": 2.5,
        "rng": [train.rng_states()],
    }


def load(path):
    return GPT.from_checkpoint(load_checkpoint(path))


def refusal(path, action=load):
    """The text of the CheckpointError that `action(path)` must raise: one line, naming the file."""
    with pytest.raises(CheckpointError) as caught:
        action(path)
    return str(caught.value)


def exit_line(script, capsys, *words):
    """The one line on stderr of train.py or sample.py, which must end with exit status 2."""
    capsys.readouterr()
    if script == "train.py":
        assert run_here(*words) == 2
    else:
        with pytest.raises(SystemExit) as stop:
            sample.main([str(w) for w in words])
        assert stop.value.code == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"{script}: error: ") and "\n" not in err, err
    return err


# ---------------------------------------------------------------------------------------------------------------------
# kill -9


def kill_after(event, server, words, chance):
    """Start train.py, wait for event(), and a moment more if `chance` is given; then kill -9."""
    process = server.Process(target=train.main, args=(words,))
    process.start()
    try:
        wait_for(lambda: event() or not process.is_alive(), every=0.0005)
        time.sleep(chance.uniform(0, 0.2) if chance else 0)
        assert process.is_alive(), "it ended by itself"
    finally:
        process.kill()
        process.join()


def whole_checkpoints(folder):
    """{name: iter_num} of every checkpoint there is; all of them must load."""
    there = {}
    for path in folder.glob("ckpt*.pt"):
        checkpoint = load_checkpoint(path)
        GPT.from_checkpoint(checkpoint)
        there[path.name] = checkpoint["iter_num"]
    return there


@pytest.mark.slow
def test_kill_9_at_any_instant(shakespeare, tmp_path, monkeypatch):
    """A run that saves all the time is killed over and over and always goes on from a whole checkpoint.

    At any instant from its start on; while it writes, until that has left a half-written file behind three times; and
    after it has saved, so that it gets somewhere. How fast it is, or how busy the machine, decides nothing.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server = multiprocessing.get_context("forkserver")  # a process for each run, but torch is imported only once
    server.set_forkserver_preload(["train", "torch._dynamo"])
    given = {"init_from": "auto", "n_embd": 128, "max_iters": 10**6, "eval_interval": 1, "eval_iters": 1}
    words = flags(shakespeare, tmp_path, **given)
    chance, reached, saved, half_written = random.Random(0), -1, 0, 0

    def being_written():
        return {p.name for p in tmp_path.glob("*.tmp")}

    def versions():
        return {p.stat().st_mtime_ns for p in tmp_path.glob("ckpt_last.pt")}

    for kind in itertools.chain(["start", "write", "save"] * 5, itertools.repeat("write")):
        if kind == "write" and half_written >= 3 and saved == 5:
            break
        left_over, before = being_written(), versions()
        seen = set()
        events = {
            "start": lambda: True,
            "write": lambda: being_written() - left_over,  # noqa: B023
            "save": lambda: seen.update(versions() - before) or len(seen) == 2,  # noqa: B023
        }
        kill_after(events[kind], server, words, None if kind == "write" else chance)
        assert not (kind == "save" and left_over & being_written()), "a killed run's file is still there"
        half_written += bool(being_written() - left_over)
        saved += kind == "save"
        there = whole_checkpoints(tmp_path)
        last = there.get("ckpt_last.pt", there.get("ckpt.pt", -1))
        assert last >= reached + (kind == "save"), f"{there} after {reached}"
        reached = last

    resume = [f"--out_dir={tmp_path}", "--init_from=resume", f"--max_iters={reached + 3}"]
    assert run_here(*resume) == 0
    assert not being_written()
    assert [x["iter"] for x in history(tmp_path) if "loss" in x] == list(range(reached + 3))


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


@contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes, as on a full disk (Python ignores the signal SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_full_disk_leaves_the_old_checkpoint(share, tmp_path):
    path, checkpoint = tmp_path / "ckpt.pt", a_checkpoint()
    save_checkpoint(path, checkpoint)
    old = path.read_bytes()
    with largest_file(int(share * len(old))):
        message = refusal(path, lambda path: save_checkpoint(path, checkpoint | {"iter_num": 2}))
    assert str(path) in message and os.strerror(errno.EFBIG) in message and "\n" not in message
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_folder_that_is_gone(tmp_path):
    message = refusal(tmp_path / "gone" / "ckpt.pt", lambda path: save_checkpoint(path, a_checkpoint()))
    assert "gone" in message and os.strerror(errno.ENOENT) in message


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_any_error_while_writing_leaves_the_old_checkpoint(error, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, a_checkpoint())
    old = path.read_bytes()

    def fail(checkpoint, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(error):
        save_checkpoint(path, a_checkpoint())
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_in_one_line(run_folder):
    old = {p.name: p.read_bytes() for p in run_folder.glob("ckpt*")}
    limit = len(old["ckpt_last.pt"]) // 2
    command = [sys.executable, ROOT / "train.py", f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=9"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"train\.py: error: \S+/ckpt\w*\.pt: cannot be written .*\n", done.stderr), done.stderr
    assert {p.name: p.read_bytes() for p in run_folder.glob("ckpt*")} == old


def test_metrics_survive_a_full_disk_at_resume(tmp_path):
    """They are cut back to the checkpoint's iteration, and must not be lost on the way."""
    metrics = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"iter": i, "loss": 1.5}) + "\n" for i in range(20))
    metrics.write_text(lines)
    with largest_file(10), pytest.raises((OSError, CheckpointError)):
        train.open_metrics(metrics, 10).close()
    train.open_metrics(metrics, 10).close()
    assert metrics.read_text() == "".join(lines.splitlines(keepends=True)[:10])


def test_a_metrics_line_cut_short_by_a_kill(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iter": i, "loss": 1.5}) + "\n" for i in range(5)]
    for cut in range(1, len(lines[3])):
        metrics.write_text("".join(lines[:3]) + lines[3][:cut])
        train.open_metrics(metrics, 3).close()
        assert metrics.read_text() == "".join(lines[:3])


# ---------------------------------------------------------------------------------------------------------------------
# Files with code in them.


class Evil:
    """Its pickle makes a marker file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class Exec(Evil):
    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w')",)


class Harmless:
    """Not dangerous, but no plain value either."""


def write_evil(how, path, marker):
    if how == "alone":
        torch.save(Evil(marker), path)
    elif how == "in model_args":
        torch.save(a_checkpoint() | {"model_args": {"n_layer": Evil(marker)}}, path)
    elif how == "beside the model":
        torch.save(a_checkpoint() | {"extra": Exec(marker)}, path)
    elif how == "old torch format":
        torch.save(a_checkpoint() | {"extra": Evil(marker)}, path, _use_new_zipfile_serialization=False)
    elif how == "a class":
        torch.save(a_checkpoint() | {"config": Harmless()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil(marker)}, protocol=int(how[-1])))


HOWS = ["alone", "in model_args", "beside the model", "old torch format", "a class"]
HOWS += [f"pickle protocol {p}" for p in (0, 2, 4, 5)]


@pytest.mark.parametrize("how", HOWS)
def test_code_is_refused_and_not_run(how, tmp_path):
    path, marker = tmp_path / "ckpt.pt", tmp_path / "marker"
    write_evil(how, path, marker)
    message = refusal(path)
    assert str(path) in message and "\n" not in message
    assert "holds code" in message and "refused" in message
    assert not marker.exists()


def test_the_marker_would_appear(tmp_path):
    """The two pickles above do what they should if they are run."""
    for kind in (Evil, Exec):
        pickle.load(io.BytesIO(pickle.dumps(kind(tmp_path / kind.__name__))))
        assert (tmp_path / kind.__name__).exists()


@pytest.mark.parametrize("script, init_from", [("train.py", "resume"), ("train.py", "auto"), ("sample.py", "resume")])
def test_scripts_refuse_code(script, init_from, tmp_path, capsys):
    write_evil("beside the model", tmp_path / "ckpt.pt", tmp_path / "marker")
    line = exit_line(script, capsys, f"--out_dir={tmp_path}", f"--init_from={init_from}")
    assert "ckpt.pt" in line and "refused" in line
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files.


def try_load(path, content):
    """Whether the file loads; if not, it must say so with a CheckpointError of one line that names it."""
    path.write_bytes(content)
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return False
    try:
        GPT.from_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "ckpt.pt"
    save_checkpoint(path, a_checkpoint())
    return path.read_bytes()


@pytest.mark.slow
def test_truncated_files(content, tmp_path):
    assert try_load(tmp_path / "ckpt.pt", content)
    lengths = {0, 1, 2, 3, 4, 10, 100, len(content) - 1, len(content) - 22, *range(0, len(content), 397)}
    for length in sorted(lengths):
        assert not try_load(tmp_path / "ckpt.pt", content[:length]), length


@pytest.mark.slow
def test_flipped_bytes(content, tmp_path):
    """Half of the changes hit the pickle, where they hurt; its own integrity check is not torch's business."""
    with zipfile.ZipFile(io.BytesIO(content)) as z:
        pickled = next(i for i in z.infolist() if i.filename.endswith("data.pkl"))
    chance, loaded = random.Random(0), 0
    for i in range(500):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 1, 1, 4))):
            inside = pickled.header_offset + chance.randrange(pickled.file_size + 100)
            at = inside if i % 2 else chance.randrange(len(content))
            damaged[at] ^= 1 << chance.randrange(8) if i % 3 else chance.randrange(1, 256)
        loaded += try_load(tmp_path / "ckpt.pt", bytes(damaged))
    assert 0 < loaded < 500  # a flipped weight is not noticed, a flipped name is


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"h", b"To be, or not to be\n" * 50, b"\x80\x02.", b"PK\x03\x04", b"\0" * 4096, b"{}"],
    ids=["empty", "text", "one letter", "long text", "pickle of nothing", "zip magic", "zeros", "json"],
)
def test_files_that_are_no_checkpoints(content, tmp_path):
    assert not try_load(tmp_path / "ckpt.pt", content)


def test_a_text_file_is_not_accused_of_code(tmp_path):
    path = tmp_path / "ckpt.pt"
    for text in ("To be, or not to be\n" * 50, "hello\n", "ROMEO:", '{"model": 1}', "version https://git-lfs\n"):
        path.write_text(text)
        assert "code" not in refusal(path), text


def test_a_directory_or_nothing_in_its_place(tmp_path):
    (tmp_path / "ckpt.pt").mkdir()
    assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt")
    assert "no such checkpoint" in refusal(tmp_path / "none.pt")


def test_a_zip_that_torch_did_not_write(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as z:
        z.writestr("a.txt", "hello")
    assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "pickled", [b"\x80\x02K\x01Q.", b"\x80\x02(K\x01K\x02tQ.", b"\x80\x02}K\x01K\x02s.", b"\x80\x02", b"."]
)
def test_pickles_of_nonsense(pickled, tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w") as z:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            z.writestr(f"archive/{name}", data)
    assert "ckpt.pt" in refusal(tmp_path / "ckpt.pt")


OTHERS = {
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "a state dict": GPT(CONFIG).state_dict(),
    "nothing": {},
    "no weights": {"model": None, "model_args": {}},
    "weights that are a list": {"model": [1], "model_args": {}},
    "weights with numbered names": {"model": {1: torch.zeros(1)}, "model_args": {}},
    "weights that are numbers": a_checkpoint() | {"model": dict.fromkeys(GPT(CONFIG).state_dict(), 1.0)},
    "flags that are a list": a_checkpoint() | {"model_args": [1]},
    "flags that are nothing": a_checkpoint() | {"model_args": None},
    "numbered flags": a_checkpoint() | {"model_args": {1: 2}},
    "text for a number": a_checkpoint() | {"model_args": asdict(CONFIG) | {"n_layer": "2"}},
    "a fraction for a number": a_checkpoint() | {"model_args": asdict(CONFIG) | {"n_layer": 1.5}},
    "a negative number": a_checkpoint() | {"model_args": asdict(CONFIG) | {"n_layer": -1}},
    "a version that is text": a_checkpoint() | {"format": "1"},
    "a version that is nothing": a_checkpoint() | {"format": None},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_torch_files(what, tmp_path):
    torch.save(OTHERS[what], tmp_path / "ckpt.pt")
    refusal(tmp_path / "ckpt.pt")


def test_a_format_from_the_future(tmp_path):
    torch.save(a_checkpoint() | {"format": 99}, tmp_path / "ckpt.pt")
    message = refusal(tmp_path / "ckpt.pt")
    assert "format 99" in message and "update" in message


@pytest.mark.parametrize("written", [0, 1, 2])
def test_the_wavelet_that_was_called_dog_keeps_its_meaning(written, tmp_path):
    """Until format 2 it was the derivative of a Gaussian; now that is "gaus1", and "dog" a Difference of Gaussians."""
    torch.manual_seed(0)
    old = GPT(GPTConfig(**asdict(CONFIG) | {"use_kan": True, "kan_wavelet": "gaus1" if written < 2 else "dog"})).eval()
    args = asdict(old.config) | {"kan_wavelet": "dog"}
    torch.save(
        {"model": old.state_dict(), "model_args": args} | ({"format": written} if written else {}), tmp_path / "ckpt.pt"
    )
    again = GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt")).eval()
    assert again.config == old.config
    idx = torch.arange(6)[None]
    assert torch.equal(again(idx)[0], old(idx)[0])


@pytest.mark.parametrize("other", [{"resid_topk": 4}, {"vq_codes": 8}])
def test_limits_in_another_order_are_refused(other, tmp_path):
    """Until format 2 the subspace came first; such a model would give other logits now."""
    model = GPT(GPTConfig(**asdict(CONFIG) | {"subspace_rank": 4} | other))
    content = {"model": model.state_dict(), "model_args": asdict(model.config)}
    torch.save(content | {"format": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="another order|came before"):
        load_checkpoint(tmp_path / "ckpt.pt")
    torch.save(content | {"format": 2}, tmp_path / "ckpt.pt")
    assert GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt")).config == model.config


def test_unknown_flags_are_named(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", a_checkpoint() | {"model_args": asdict(CONFIG) | {"use_warp": True}})
    assert "use_warp" in refusal(tmp_path / "ckpt.pt")


def test_tensors_that_do_not_fit(tmp_path):
    path, good = tmp_path / "ckpt.pt", a_checkpoint()
    wrong_shape = good["model"] | {"transformer.wpe.weight": torch.zeros(8, 9)}
    missing = {k: v for k, v in good["model"].items() if "ln_f" not in k}
    unexpected = good["model"] | {"transformer.extra": torch.zeros(1)}
    for weights, name in ((wrong_shape, "wpe"), (missing, "ln_f"), (unexpected, "transformer.extra")):
        save_checkpoint(path, good | {"model": weights})
        assert name in refusal(path)


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flags", "directory", "future"])
@pytest.mark.slow
def test_scripts_tell_of_damage_in_one_line(script, damage, run_folder, capsys):
    for path in (run_folder / "ckpt.pt", run_folder / "ckpt_last.pt"):
        good = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(good[:-1000])
        elif damage == "empty":
            path.touch()
        elif damage == "directory":
            path.mkdir()
        else:
            change = {"model_args": {"use_warp": True}} if damage == "flags" else {"format": 99}
            torch.save(torch.load(io.BytesIO(good), weights_only=True) | change, path)
    exit_line(script, capsys, f"--out_dir={run_folder}", "--init_from=resume")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": None},
        {"optimizer": {}},
        {"iter_num": None},
        {"best_val_loss": None},
        {"config": None},
        {"rng": [{}]},
        *({"without": key} for key in ("optimizer", "iter_num", "best_val_loss", "config")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_resume_from_a_checkpoint_with_parts_missing(change, run_folder, capsys):
    path = run_folder / "ckpt_last.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.pop(change.get("without"), None)
    torch.save(checkpoint | {k: v for k, v in change.items() if k != "without"}, path)
    exit_line("train.py", capsys, f"--out_dir={run_folder}", "--init_from=resume", "--max_iters=7")


# ---------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint, and nanoGPT's own.


def test_round_trip(tmp_path):
    path, checkpoint = tmp_path / "ckpt.pt", a_checkpoint()
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.pop("format") == 2
    assert same(loaded, checkpoint)
    model = GPT.from_checkpoint(loaded, dropout=0.3)
    assert model.config == GPTConfig(**asdict(CONFIG) | {"dropout": 0.3})
    assert same(model.state_dict(), checkpoint["model"])
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.slow
def test_what_a_run_saves(trained):
    checkpoint = load_checkpoint(trained / "ckpt_last.pt")
    assert checkpoint["config"]["learning_rate"] == 1e-3 and checkpoint["meta"]["tokenizer"] == "char"
    assert checkpoint["iter_num"] == 6 and checkpoint["best_val_loss"] == history(trained)[-1]["val_loss"]
    assert {
        "model",
        "optimizer",
        "scaler",
        "model_args",
        "config",
        "iter_num",
        "best_val_loss",
        "rng",
        "format",
    } <= set(checkpoint)
    assert len(checkpoint["rng"]) == 1 and {"python", "numpy", "torch"} <= checkpoint["rng"][0].keys()
    assert checkpoint["model"]["lm_head.weight"].dtype == torch.float32


def test_random_states_come_back():
    states = train.rng_states()
    draws = [random.random(), train.np.random.rand(), torch.rand(1).item()]
    train.set_rng_states(torch.load(saved(states), weights_only=True))
    assert [random.random(), train.np.random.rand(), torch.rand(1).item()] == draws


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def nanogpt_checkpoint(vocab_size, steps=5, compiled=True, bias=False):
    """A checkpoint as nanoGPT's train.py writes it: compiled, without flash attention, AdamW's state of some steps."""
    args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": bias, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**args, dropout=0.1))
    decays, stays = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": stays, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(steps):
        idx = torch.randint(vocab_size, (4, 16))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    weights = model.state_dict()
    weights |= {f"transformer.h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
    prefix = "_orig_mod." * compiled
    config = {"out_dir": "out", "dataset": "shakespeare_char", "device": "cuda", "dtype": "bfloat16", "compile": True}
    checkpoint = {
        "model": {prefix + k: v for k, v in weights.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args | {"dropout": 0.1},
        "iter_num": steps,
        "best_val_loss": torch.tensor(3.25),
        "config": config | {"init_from": "scratch", "wandb_log": False, "learning_rate": 1e-3, "max_iters": 5000},
    }
    return model, checkpoint


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_loads_strictly(compiled, bias, tmp_path):
    model, checkpoint = nanogpt_checkpoint(11, compiled=compiled, bias=bias)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    loaded = load(tmp_path / "ckpt.pt")
    assert same(loaded.state_dict(), model.state_dict())
    idx = torch.arange(11)[None]
    assert torch.equal(loaded.eval()(idx, idx)[0], model.eval()(idx, idx)[0])
    del checkpoint["model"]["_orig_mod." * compiled + "transformer.h.1.ln_2.weight"]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "h.1.ln_2.weight" in refusal(tmp_path / "ckpt.pt")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nanogpts_run_goes_on(dtype, shakespeare, tmp_path):
    vocab_size = load_meta(shakespeare)["vocab_size"]
    _, checkpoint = nanogpt_checkpoint(vocab_size)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    words = flags(shakespeare, tmp_path, init_from="resume", max_iters=12, dtype=dtype, always_save_checkpoint=True)
    assert run_here(*words) == 0
    last = load_checkpoint(tmp_path / "ckpt_last.pt")
    assert last["iter_num"] == 12 and last["format"] == 2
    assert {float(s["step"]) for s in last["optimizer"]["state"].values()} == {12.0}
    assert [x["iter"] for x in history(tmp_path) if "loss" in x] == list(range(5, 12))
    assert last["best_val_loss"] == 3.25 or last["best_val_loss"] < 3.25
    assert last["model_args"]["bias"] is False and last["model_args"]["dropout"] == 0.1
    assert losses(tmp_path)[0] < 4.5  # not a new model with a broken head


def test_nanogpts_run_cannot_change_its_shape(shakespeare, tmp_path, capsys):
    _, checkpoint = nanogpt_checkpoint(load_meta(shakespeare)["vocab_size"])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    words = flags(shakespeare, tmp_path, init_from="resume", n_layer=3)
    assert "--n_layer=3" in exit_line("train.py", capsys, *words)
    assert Path(tmp_path / "ckpt.pt").exists()
