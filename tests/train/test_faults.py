"""Generated mistakes and damage: exit 0 or 2, never a traceback, and the message names what is wrong.

The quick tier tries some of each; `make test` tries many. docs/reliability.md says what is promised.
"""

import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import configurator
import sample
import train
from configurator import keys_of
from data import corpus
from data.runs import open_metrics
from helpers import ROOT, flags, history, run_here, same, wait_for
from model import GPT, CheckpointError, GPTConfig, load_checkpoint, save_checkpoint
from sample import SampleConfig
from smoke_test import VARIANTS
from train import TrainConfig

pytestmark = pytest.mark.slow

# hypothesis shrinks and reports; a tier is a number of examples. The folders are shared: each example overwrites them.
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
TIERS = pytest.mark.parametrize("examples", [5, pytest.param(250)])


def tell(main, words):
    """(exit status, stdout, stderr) of a script's main, in this process; any other exception is a fault."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        if main is train.main:
            status = run_here(*words)
        else:
            try:
                main([str(word) for word in words])
                status = 0
            except SystemExit as e:
                status = e.code
    return status, out.getvalue(), err.getvalue()


def last_line(err):
    """The error line, when a script refuses something; its warnings may come before it."""
    lines = err.strip().splitlines()
    assert lines and ": error: " in lines[-1], err
    return lines[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

ODD = ["", "0", "1", "-1", "2", "7", "3.5", "1e-300", "1e300", "nan", "inf", "-inf", "true", "none", "x", "\u65e5",
       "a,b", "=", "99999999999999999999", "0x10", "1_000", " 1", "[]", "None", "softmax,fhn", "-"]  # fmt: skip
TRAIN_KEYS, SAMPLE_KEYS = keys_of(TrainConfig, GPTConfig), keys_of(SampleConfig)
# what decides where files lie and how long a run takes; spectra and codes of any size are a user's to ask for
KEPT = {"out_dir", "data_dir", "dataset", "device", "compile", "max_iters", "curriculum_iters", "init_from", "backend",
        "eval_iters", "tensorboard_log", "wandb_log", "sample_interval"}  # fmt: skip
VALUES = {
    name: ODD + [str(choice) for choice in configurator.choices_of(key.kinds)] + [str(key.default)]
    for name, key in (TRAIN_KEYS | SAMPLE_KEYS).items()
}


def assignments(names, most):
    return st.lists(
        st.sampled_from(sorted(names)).flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(VALUES[n]))),
        max_size=most, unique_by=lambda pair: pair[0],
    )  # fmt: skip


@TIERS
def test_argument_vectors_of_train(examples, shakespeare, tmp_path):
    @settings(max_examples=examples, **QUIET)
    @given(assignments(TRAIN_KEYS.keys() - KEPT, 3))
    def attempt(pairs):
        out = tmp_path / "out"
        words = [*flags(shakespeare, out, max_iters=1), *(f"--{name}={value}" for name, value in pairs)]
        status, _, err = tell(train.main, words)
        assert status in (0, 2), words
        if status == 2:
            line = last_line(err)
            named = [name for name, _ in pairs if name in line] or "not finite" in line or "loss is" in line
            assert named and "Traceback" not in err, (words, line)

    attempt()


@TIERS
def test_argument_vectors_of_sample(examples, trained):
    @settings(max_examples=examples, **QUIET)
    @given(assignments(SAMPLE_KEYS.keys() - {"out_dir", "data_dir", "compile", "device", "init_from"}, 3))
    def attempt(pairs):
        few = [f"--{name}={value}" for name, value in pairs if (name, value) != ("start", "-")]  # - waits for input
        few = [word for word in few if "999999" not in word]  # a text of that length
        status, _, err = tell(sample.main, ["--max_new_tokens=3", f"--out_dir={trained}", *few])
        assert status in (0, 2), few
        if status == 2:
            last_line(err)

    attempt()


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
JUNK = st.one_of(WORDS, WORDS.map("--{}".format), WORDS.map("--n_layer={}".format), WORDS.map("{}.py".format))


@TIERS
def test_words_that_are_no_flags(examples):
    @settings(max_examples=min(100, examples), **QUIET)
    @given(st.lists(JUNK, min_size=1, max_size=3))
    def attempt(words):
        status, _, err = tell(train.main, [*words, "--dataset=no_such_data_set", "--out_dir=no_such_folder/x"])
        assert status in (0, 2)  # 0: --help
        if status == 2:
            assert len(last_line(err)) < 2000

    attempt()


# ---------------------------------------------------------------------------------------------------------------------
# Configurations.

PLAUSIBLE = sorted(set(VARIANTS) - {"curriculum_e7"})
BAD = [None, "x", -1, 0, 2.5, True, math.nan, math.inf, -math.inf, 1e300, 1e-300, [], {}, (), b"x", object(), 10**30]
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 32}


@TIERS
def test_configurations_are_refused_by_name_or_work(examples):
    """A row of the table with one value spoilt: a ValueError that names a flag, or a model with a finite loss."""
    names = list(keys_of(GPTConfig))

    @settings(max_examples=examples, **QUIET)
    @given(st.sampled_from(PLAUSIBLE), st.sampled_from(names), st.sampled_from(BAD))
    def attempt(row, name, value):
        values = SMALL | VARIANTS[row] | {name: value}
        try:
            config = GPTConfig(**values)
        except ValueError as e:
            assert any(flag in str(e) for flag in values), e
            return
        torch.manual_seed(0)
        idx = torch.randint(config.vocab_size, (2, min(16, config.block_size)))
        loss = GPT(config)(idx, idx.roll(-1, 1))[1]
        assert torch.isfinite(loss), (row, name, value)

    attempt()


@TIERS
def test_pairs_of_rows_come_back(examples, tmp_path):
    """Two rows merged: refused, or saved, loaded and written with, to the same logits (contract 12)."""

    @settings(max_examples=examples, **QUIET)
    @given(st.sampled_from(PLAUSIBLE), st.sampled_from(PLAUSIBLE))
    def attempt(one, other):
        try:
            config = GPTConfig(**SMALL | VARIANTS[one] | VARIANTS[other])
        except ValueError:
            return
        torch.manual_seed(0)
        try:
            model = GPT(config)
        except ValueError as e:  # how many regions there are is known when the anchors are drawn
            assert "region_feedback_edges" in str(e)
            return
        idx = torch.randint(config.vocab_size, (2, 12))
        model(idx, idx.roll(-1, 1))[1].backward()
        path = tmp_path / "ckpt.pt"
        save_checkpoint(path, {"model": model.state_dict(), "model_args": vars(config)})
        again = GPT.from_checkpoint(load_checkpoint(path))
        assert torch.equal(model.eval()(idx)[0], again.eval()(idx)[0])
        assert again.generate(idx, 2).shape == (2, 14)

    attempt()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints.


def outcome(path):
    """The checkpoint in a file, or None where it is refused in one line that names the file."""
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return None
    return checkpoint


@pytest.mark.parametrize("flips", [40, pytest.param(400)])
def test_flipped_bytes_are_told_or_change_nothing(flips, trained, tmp_path):
    """Anywhere in the file: what the flip reaches of weights, moments or settings is told."""
    whole, path = (trained / "ckpt_last.pt").read_bytes(), tmp_path / "ckpt.pt"
    path.write_bytes(whole)
    before, rng, told = load_checkpoint(path), random.Random(0), 0
    for _ in range(flips):
        at, flip = rng.randrange(len(whole)), rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        found = outcome(path)
        assert found is None or same(found, before), (at, flip)
        told += found is None
    assert told > 0.6 * flips  # the rest is padding between records


def test_sixty_flipped_bytes_of_weights_and_moments_are_all_told(trained, tmp_path):
    whole, path = (trained / "ckpt_last.pt").read_bytes(), tmp_path / "ckpt.pt"
    rng = random.Random(1)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = [r for r in archive.infolist() if r.file_size]
        starts = {r.filename: whole.index(archive.read(r), r.header_offset) for r in records}
    for _ in range(60):
        record = rng.choice(records)
        at = starts[record.filename] + rng.randrange(record.file_size)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        assert outcome(path) is None, (record.filename, at)


def paths_in(value, path=()):
    """The path of every leaf and container in nested dicts, lists and tuples."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        yield from paths_in(part, (*path, key))


def changed(value, path, new):
    """`value` with what lies at `path` replaced, or left out if `new` is "gone"."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        parts = dict(value)
        if not rest and isinstance(new, str) and new == "gone":
            del parts[key]
        else:
            parts[key] = changed(parts[key], rest, new)
        return parts
    parts = list(value)
    parts[key] = changed(parts[key], rest, new)
    return type(value)(parts)


SUBSTITUTES = ["gone", None, "x", -1, 0, 2.5, True, math.nan, math.inf, 2**40, [], {}, (1, 2), b"x", torch.zeros(3),
               torch.zeros(2, 2, dtype=torch.int64), torch.tensor(1.5), "\u65e5" * 100, {"a": [1]}]  # fmt: skip


@pytest.mark.parametrize("examples", [5, pytest.param(300)])
def test_impossible_contents_of_a_checkpoint(examples, trained, tmp_path):
    """Any value in it replaced by another: train.py and sample.py go on, or refuse it in one line."""
    out = tmp_path / "out"
    out.mkdir()
    whole = load_checkpoint(trained / "ckpt_last.pt")
    everywhere = [path for path in paths_in(whole) if path]
    # as many of each part: weights, moments and settings outnumber the others
    parts = {}
    for path in everywhere:
        parts.setdefault(path[0], []).append(path)
    rng = random.Random(0)
    for _ in range(examples):
        path, new = rng.choice(parts[rng.choice(sorted(parts))]), rng.choice(SUBSTITUTES)
        spoilt = changed(copy.deepcopy(whole), path, new)
        torch.save(spoilt, out / "ckpt_last.pt")
        resume = [f"--out_dir={out}", "--init_from=resume", "--max_iters=7"]
        for main, words in ((train.main, resume), (sample.main, [f"--out_dir={out}", "--max_new_tokens=2"])):
            status, _, err = tell(main, words)
            assert status in (0, 2), (path, new, words)
            if status == 2:
                last_line(err)


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl


@TIERS
def test_damaged_metrics_never_stop_a_resume(examples, tmp_path):
    good = [json.dumps({"iter": i, "loss": 1.5}).encode() + b"\n" for i in range(8)]

    @settings(max_examples=examples, **QUIET)
    @given(st.integers(0, 7), st.binary(max_size=30) | st.sampled_from([b"[" * 5000, b"\x00", b"{}", b"1e999"]))
    def attempt(at, junk):
        junk = junk.replace(b"\n", b"")
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"".join([*good[:at], junk + b"\n", *good[at:]]))
        with redirect_stderr(io.StringIO()) as told:
            open_metrics(path, 6).close()
        assert path.read_bytes() == b"".join(good[:6]) and "damaged" in told.getvalue()

    attempt()


# ---------------------------------------------------------------------------------------------------------------------
# Texts.

TEXTS = {
    "empty": b"", "one": b"a", "two lines": b"a\nb\n", "bom": b"\xef\xbb\xbfto be\n" * 50,
    "crlf": b"to be\r\nor not\r\n" * 50,
    "long line": b"word " * 400_000, "nul": b"a\0b\n" * 100, "cjk": "\u65e5\u672c\u8a9e\n".encode() * 90,
    "emoji": "\U0001f600\U0001f468\u200d\U0001f469\n".encode() * 80, "lone surrogate": b"a\xed\xa0\x80b\n" * 50,
    "latin-1": "na\u00efve\n".encode("latin-1") * 50, "utf-16": ("to be \u65e5\n" * 80).encode("utf-16"),
    "half a character": "\u65e5".encode()[:2], "newlines": b"\n" * 500, "escapes": b"\x1b[31mred\x1b[0m\n" * 60,
}  # fmt: skip


@pytest.mark.parametrize("kind", corpus.TOKENIZERS)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_all_kinds(name, kind, tmp_path, monkeypatch, request):
    """Prepared and readable again, or refused in one line with nothing left behind."""
    if kind == "gpt2":
        try:
            corpus.build_tokenizer("gpt2")
        except corpus.DataError:
            pytest.skip("GPT-2's tokenizer is not here")
    if name == "long line" and kind != "sentencepiece":
        pytest.skip("two megabytes are the same work for the others")
    (tmp_path / "t.txt").write_bytes(TEXTS[name])
    monkeypatch.setenv("TINYSHAKESPEARE", str(tmp_path / "t.txt"))
    out = tmp_path / "d"
    words = ["--source=env", f"--out_dir={out}", f"--tokenizer={kind}", "--vocab_size=262"]
    script = tmp_path / "x" / "prepare.py"

    def main(words):
        corpus.prepare_shakespeare(script, PrepareTokenizer, words)

    status, _, err = tell(main, words)
    assert status in (0, 2)
    if status == 2:
        assert last_line(err).startswith("prepare.py: error: ") and not out.exists()
        return
    meta = corpus.load_meta(out)
    tokenizer = corpus.load_tokenizer(meta, out)
    corpus.check_identity(out, meta)
    text = corpus.decode_text(TEXTS[name], "x")
    ids = np.concatenate([corpus.open_split(out, split, meta) for split in ("train", "val")])
    assert tokenizer.decode(ids.tolist()) == text


@configurator.dataclass
class PrepareTokenizer:
    """The tokenizer that a test asks for."""

    tokenizer: str = "char"  # any


def test_hopeless_texts_are_refused():
    for name in ("empty", "one", "half a character", "latin-1", "lone surrogate"):
        with pytest.raises(corpus.DataError):
            text = corpus.decode_text(TEXTS[name], "x")
            corpus.write_dataset("no_such_folder/x", text, "", corpus.build_tokenizer("char", text), "n", "s", "")
    assert not os.path.exists("no_such_folder")


# ---------------------------------------------------------------------------------------------------------------------
# Kills inside the training loop, where the run saves after every step.


def test_two_hundred_kills_in_the_loop_lose_nothing(shakespeare, tmp_path, monkeypatch):
    """kill -9 at a random moment between two steps or within one, 200 times over; each run goes on from it.

    Both checkpoints always load, the last one never goes back, no metric line is lost or doubled, and the run ends
    where one that was never killed does.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "torch._dynamo"])
    shape = {"n_layer": 1, "n_embd": 16, "eval_interval": 1, "eval_iters": 1, "max_iters": 10**6, "init_from": "auto"}
    shape |= {"decay_lr": False}  # a schedule that does not know where the run ends
    words, rng, reached = flags(shakespeare, tmp_path / "out", **shape), random.Random(0), 0
    out = tmp_path / "out"

    def steps():
        path = out / "ckpt_last.pt"
        return path.stat().st_mtime_ns if path.exists() else 0

    for kill in range(200):
        process = server.Process(target=train.main, args=(words,))
        before = steps()
        process.start()
        for _ in range(rng.randint(1, 4)):
            wait_for(lambda old=before, run=process: steps() != old or not run.is_alive(), every=0.0005)
            before = steps()
        time.sleep(rng.uniform(0, 0.02))
        assert process.is_alive(), f"it ended by itself before kill {kill}"
        process.kill()
        process.join()
        there = {name: load_checkpoint(out / name)["iter_num"] for name in ("ckpt.pt", "ckpt_last.pt")}
        assert there["ckpt_last.pt"] >= reached and there["ckpt.pt"] <= there["ckpt_last.pt"] + 1, (kill, there)
        reached = there["ckpt_last.pt"]
    assert reached > 50  # it got on between them
    assert run_here(f"--out_dir={out}", "--init_from=resume", f"--max_iters={reached + 2}") == 0
    straight = tmp_path / "straight"
    assert run_here(*flags(shakespeare, straight, **shape | {"max_iters": reached + 2})) == 0
    assert [x for x in history(out) if "loss" not in x] == [x for x in history(straight) if "loss" not in x]
    a, b = (load_checkpoint(folder / "ckpt_last.pt") for folder in (out, straight))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


# ---------------------------------------------------------------------------------------------------------------------
# Contract 12: every learning rule with every mixer, head, memory and wiring.

RULES = {"bp": {}, "fa": {"method": "fa"}, "sign_sym": {"method": "sign_sym"}, "dfa": {"method": "dfa"}}
RULES |= {f"{rule}_grape": {"method": rule, "fa_grape": True, "fa_grape_every": 1} for rule in ("fa", "dfa")}
MIXERS = ("softmax", "sigmoid", "fhn", "gla", "gdn", "kaufmann,softmax", "fhn,softmax", "gdn,sigmoid")
HEADS = {"linear": {}, "mfs": {"use_mfs_head": True}, "l4": {"add_l4_losses": True}}
MEMORIES = {"none": {}, "sdr": {"use_sdr": True, "sdr_size": 64, "sdr_active": 4}, "e7": {"use_manifold": True,
            "manifold": "e7", "skip_manifold_spectral": True}, "knots": {"use_knot_attention": True, "knot_block": 4,
            "knot_vertices": 4, "knot_k": 1}}  # fmt: skip
WIRINGS = {"plain": {}, "mhc": {"use_mhc": True}, "mla": {"use_mla": True}, "gated": {"gated_blocks": True}}


@pytest.mark.parametrize("mixers", MIXERS)
@pytest.mark.parametrize("rule", RULES)
def test_whatever_trains_comes_back(rule, mixers, tmp_path):
    """An optimiser step, saved, loaded and gone on with to the same numbers, and written with."""
    accepted = 0
    for head, memory, wiring in itertools.product(HEADS, MEMORIES, WIRINGS):
        pattern = {"attn_pattern": mixers} if "," in mixers else {"attn_mode": mixers}
        flags = SMALL | RULES[rule] | pattern | HEADS[head] | MEMORIES[memory] | WIRINGS[wiring]
        try:
            config = GPTConfig(**flags, tie_weights=False)
        except ValueError:
            continue
        accepted += 1
        torch.manual_seed(0)
        model, path = GPT(config), tmp_path / "ckpt.pt"
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        idx = torch.randint(config.vocab_size, (2, 12))

        def step(model, optimizer, idx=idx):
            loss = model(idx, idx.roll(-1, 1))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step(model, optimizer)
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": vars(config)}
        save_checkpoint(path, content)
        kept = load_checkpoint(path)
        again = GPT.from_checkpoint(kept)
        other = again.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        other.load_state_dict(kept["optimizer"])
        for each in ((model, optimizer), (again, other)):
            torch.manual_seed(1)
            step(*each)
        assert same(model.state_dict(), again.state_dict()), (head, memory, wiring)
        assert again.generate(idx, 2).shape == (2, 14)
    refused = (rule != "bp" and "kaufmann" in mixers) or (rule == "dfa_grape" and "fhn" in mixers)  # as GPTConfig says
    assert bool(accepted) != refused
