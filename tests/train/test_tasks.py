"""Synthetic skills: each generator against a solver that knows only the rules of its task, and as data for train.py."""

import itertools
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.corpus import DataError
from data.dataset import TRAIN, RowDataset, open_dataset
from data.skills import prepare, tasks
from data.skills.tasks import TASKS
from helpers import TIMING, TINY, error_of, flags, history, run_here, same
from model import GPT, load_checkpoint
from train import TrainConfig

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------------------------
# Solvers: a row of tokens in, {position: answer} out. They share nothing with the generators.


def after_last_occurrence(row, is_key=lambda token: True):
    """Each key's successor where it stood before."""
    known, answers = {}, {}
    for t, (token, following) in enumerate(itertools.pairwise(row)):
        if is_key(token):
            if token in known:
                answers[t] = known[token]
            known[token] = following
    return answers


def by_motifs(row):
    """Key motifs are runs of ids below 8, value motifs runs of 8 to 14; 15 pads."""
    runs, t = [], 0
    for kind, group in itertools.groupby(row, lambda token: 2 if token == 15 else int(token >= 8)):
        group = list(group)
        runs, t = runs + [(kind, t, tuple(group))], t + len(group)
    known, answers = {}, {}
    for (kind, start, key), (_, _, value) in itertools.pairwise(runs):
        if kind == 0:
            if key in known:
                answers |= {start + len(key) - 1 + i: token for i, token in enumerate(known[key])}
            known[key] = value
    return answers


def copied(row):
    sign = row.index(15)
    words = [token for token in row[:sign] if token != 14]
    return {len(row) - len(words) + i: word for i, word in enumerate(words)}


def from_the_middle(row):
    return {len(row) // 2 + i: row[i] for i in range(len(row) // 2)}


def from_memory(row):
    """By the map that other rows of the same task show."""
    idx, targets = TASKS["memorisation"](np.random.default_rng(99), 300)
    known = dict(zip(idx[:, ::2].flatten().tolist(), targets[:, 1::2].flatten().tolist()))
    return {t: known[row[t - 1]] for t in range(1, len(row), 2)}


def ones(row):
    return {t: sum(row[: t + 1]) % 2 for t in range(len(row))}


def products(points, sign):
    """By matrices: permutation matrices multiply, and the number is looked up."""
    eye = np.eye(points, dtype=int)
    group = [eye[:, list(p)] for p in itertools.permutations(range(points))]
    group = [m for m in group if round(np.linalg.det(m)) == 1 or not sign]

    def solve(row):
        total, answers = eye, {}
        for t, g in enumerate(row):
            total = total @ group[g]
            answers[t] = next(i for i, m in enumerate(group) if (m == total).all())
        return answers

    return solve


def walked(row):
    assert row[0] == 28 and sorted(row[1:49:2]) == sorted(row[2:49:2]) == list(range(24))
    edges, answers = dict(zip(row[1:49:2], row[2:49:2])), {}
    for t in range(49, len(row), 3):
        word = row[t + 1]
        for _ in range(row[t] - 23):
            word = edges[word]
        answers[t + 1] = word
    return answers


def calculated(row):
    """Prefix expressions from right to left with a stack, as Python's own operators on text."""
    answers, start = {}, 0
    for t, token in enumerate(row):
        if token == 14:  # =
            stack = []
            for part in reversed(row[start:t]):
                if part == 15:
                    continue
                stack.append(str(part) if part < 11 else f"({stack.pop()} {'+-*'[part - 11]} {stack.pop()})")
            answers[t], start = eval(stack.pop()) % 11, t + 2
            assert not stack
    return answers


SOLVERS = {
    "mqar": lambda row: after_last_occurrence(row, lambda token: 0 < token < 4096),
    "in_context_recall": lambda row: after_last_occurrence(row, lambda token: token < 8),
    "fuzzy_recall": by_motifs,
    "noisy_recall": lambda row: after_last_occurrence(row, lambda token: token < 8),
    "selective_copying": copied,
    "compression": from_the_middle,
    "memorisation": from_memory,
    "parity": ones,
    "s3": products(3, False),
    "a5": products(5, True),
    "depo": walked,
    "mano": calculated,
    "far_recall": lambda row: after_last_occurrence(row, lambda token: token < 64),
}
every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_a_solver_is_always_right(name):
    """It answers what is asked, no more and no less."""
    idx, targets = TASKS[name](np.random.default_rng(0), 12)
    assert idx.shape == targets.shape and idx.dtype == targets.dtype == np.int64
    assert idx.min() >= 0 and max(idx.max(), targets.max()) < tasks.vocab_size(name)
    for row, target in zip(idx.tolist(), targets.tolist()):
        assert SOLVERS[name](row) == {t: answer for t, answer in enumerate(target) if answer != -1} != {}


@every_task
def test_rows_are_the_seeds_own(name):
    draws = [TASKS[name](np.random.default_rng(seed), 3) for seed in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(draws[0], draws[1])) and (draws[0][0] != draws[2][0]).any()


@every_task
def test_guessing_is_right_as_often_as_stated(name):
    rng = np.random.default_rng(2)
    idx, targets = TASKS[name](rng, 400 if name == "mqar" else 150)
    asked = targets[targets >= 0]
    answers, floor = np.unique(asked), tasks.floor(name)
    assert len(answers) <= round(1 / floor)
    rights = np.mean(rng.choice(answers, len(asked)) == asked) * len(answers) * floor  # among all that are possible
    assert rights == pytest.approx(floor, abs=4 * np.sqrt(floor / len(asked)) + 1e-4)


def test_what_follows_is_what_is_asked():
    """Where an answer has a place in the text it stands there."""
    for name in ("mqar", "in_context_recall", "fuzzy_recall", "noisy_recall", "depo", "mano", "far_recall"):
        idx, targets = TASKS[name](np.random.default_rng(3), 5)
        asked = targets[:, :-1] >= 0
        assert (idx[:, 1:][asked] == targets[:, :-1][asked]).all() and (targets[:, -1] == -1).all(), name


def test_mqar_asks_soon_rather_than_late():
    """The places of the questions have the probabilities (g + 1)^(a - 1); of one pair, a single draw."""
    _, targets = TASKS["mqar"](np.random.default_rng(0), 4000, vocab_size=64, T=18, n=1)
    found = np.bincount((targets >= 0).argmax(1)[:, None].flatten() // 2 - 1, minlength=8) / 4000
    expected = np.arange(1, 9) ** -0.99
    assert np.abs(found - expected / expected.sum()).max() < 0.03
    idx, _ = TASKS["mqar"](np.random.default_rng(0), 20, T=512, n=64)
    assert all(len(set(row[:128:2])) == len(set(row[1:128:2])) == 64 for row in idx.tolist())


def test_far_recall_is_far():
    """Pairs stand in the first quarter, questions in the last; no word between them is a key or a value."""
    idx, targets = TASKS["far_recall"](np.random.default_rng(0), 32)
    for row, target in zip(idx.tolist(), targets.tolist()):
        given = {row[t]: row[t + 1] for t in range(32) if row[t] < 64}
        asked = [t for t in range(128) if target[t] >= 0]
        assert len(given) == len(asked) == 8 and min(asked) >= 96 and min(row[32:96]) >= 128
        assert {row[t]: target[t] for t in asked} == given and all(64 <= value < 128 for value in given.values())


def test_noise_is_as_frequent_as_asked():
    idx, _ = TASKS["noisy_recall"](np.random.default_rng(0), 200, noise=0.6)
    assert (idx[:, 2:-2:2] >= 16).mean() == pytest.approx(0.6, abs=0.02)
    assert ((idx[:, ::2] >= 16) == (idx[:, 1::2] >= 16)).all()


def test_a5_is_a_group_of_sixty():
    table = tasks.product_table(5, True)
    assert table.shape == (60, 60) and all(sorted(line) == list(range(60)) for line in table.tolist())
    assert (table[0] == np.arange(60)).all() and (table != table.T).any()


WRONG = [
    ("mqar", {"vocab_size": 65}, "must be even"),
    ("mqar", {"n": 33}, "at least 132"),
    ("mqar", {"vocab_size": 16, "n": 8}, "n < vocab_size / 2"),
    ("mqar", {"a": 1.0}, "(0, 1)"),
    ("far_recall", {"T": 100}, "multiple of 8"),
    ("far_recall", {"n": 17}, "n <= T / 8"),
    ("in_context_recall", {"vocab_size": 15}, "even"),
    ("in_context_recall", {"T": 7}, "even"),
    ("noisy_recall", {"vocab_size": 17}, "must be left"),
    ("noisy_recall", {"noise": 1.0}, "[0, 1)"),
    ("fuzzy_recall", {"vocab_size": 17}, "even"),
    ("fuzzy_recall", {"shortest": 4}, "in order"),
    ("fuzzy_recall", {"n": 9, "longest": 1}, "there are 8 motifs"),
    ("fuzzy_recall", {"T": 20}, "at least 54"),
    ("selective_copying", {"n": 128}, "at least 257"),
    ("selective_copying", {"vocab_size": 3}, "at least 4"),
    ("compression", {"T": 31}, "even"),
    ("memorisation", {"vocab_size": 255}, "even"),
    ("parity", {"T": 0}, "at least 1"),
    ("s3", {"T": 0}, "at least 1"),
    ("depo", {"k": 24}, "1 to n - 1"),
    ("depo", {"questions": 0}, "at least 1"),
    ("mano", {"T": 14}, "15 tokens"),
    ("mano", {"modulus": 1}, "at least 2"),
]


@pytest.mark.parametrize("name, setting, told", WRONG)
def test_impossible_settings_are_refused(name, setting, told):
    with pytest.raises(ValueError) as e:
        TASKS[name](np.random.default_rng(0), 2, **setting)
    assert told in str(e.value) and "\n" not in str(e.value)


def test_a_task_names_its_settings():
    assert tasks.setting_of("parity", T=5) == {"T": 5}
    with pytest.raises(ValueError, match="parity has no setting n; it has T"):
        tasks.setting_of("parity", n=5)


# ---------------------------------------------------------------------------------------------------------------------
# As a data set.


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A prepared folder DATA_DIR/skills/mqar of small rows."""
    folder = tmp_path_factory.mktemp("data") / "skills" / "mqar"
    prepare.main(["mqar", "--vocab_size=32", "--T=16", "--n=2", "--rows=50", "--val_rows=9", f"--out_dir={folder}"])
    return folder


def run_flags(rows, out, **given):
    return flags(rows, out, **{"data_dir": rows.parents[1], "dataset": "skills/mqar", **given})


def config_of(rows, **given):
    values = {"data_dir": str(rows.parents[1]), "dataset": "skills/mqar"}
    return TrainConfig(**values | given)


def test_rows_are_read_whole_with_their_own_targets(rows):
    cfg = config_of(rows)
    assert isinstance(open_dataset(cfg), RowDataset)
    data = RowDataset(cfg)
    data.check(16, 32)
    rng = np.random.default_rng(0)
    made = {split: TASKS["mqar"](rng, n, vocab_size=32, T=16, n=2) for split, n in (("train", 50), ("val", 9))}
    config = SimpleNamespace(block_size=16, vocab_size=32)
    starts = data.windows(TRAIN, 3, 200, 16)
    assert set(starts) <= set(range(0, 800, 16)) and len(set(starts)) > 40
    assert (starts == data.windows(TRAIN, 3, 200, 16)).all() and (starts != data.windows(TRAIN, 4, 200, 16)).any()
    x, y = data.batch("train", starts, config, "cpu")
    idx, targets = made["train"]
    assert (x.numpy() == idx[starts // 16]).all() and (y.numpy() == targets[starts // 16]).all()
    shares = [list(data.val_windows(2, config, "cpu", rank, 2)) for rank in (0, 1)]
    assert [len(x) for x, _ in shares[0]] == [2, 2, 1] and [len(x) for x, _ in shares[1]] == [2, 2]
    seen = sorted(row for share in shares for x, _ in share for row in x.tolist())
    assert seen == sorted(made["val"][0].tolist())


def test_training_measures_accuracy_and_takes_its_sizes_from_the_rows(rows, tmp_path):
    given = {k: v for k, v in TINY.items() if k != "block_size"}
    given |= {"data_dir": rows.parents[1], "dataset": "skills/mqar", "out_dir": tmp_path}
    words = [f"--{k}={v}" for k, v in given.items()]
    assert run_here(*words, "--eval_full=True") == 0
    last = [line for line in history(tmp_path) if "val_loss" in line][-1]
    model = GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt_last.pt")).eval()
    assert (model.config.block_size, model.config.vocab_size) == (16, 32) and "val_bpb" not in last
    rng = np.random.default_rng(0)
    TASKS["mqar"](rng, 50, vocab_size=32, T=16, n=2)
    x, y = (torch.from_numpy(part) for part in TASKS["mqar"](rng, 9, vocab_size=32, T=16, n=2))
    with torch.no_grad():
        logits = model(x, y)[0]
    asked = y >= 0
    assert last["val_loss"] == pytest.approx(F.cross_entropy(logits[asked], y[asked]).item(), abs=1e-5)
    assert last["val_accuracy"] == (logits.argmax(-1)[asked] == y[asked]).double().mean().item()


def test_resuming_is_exact(rows, tmp_path):
    assert run_here(*run_flags(rows, tmp_path / "a", max_iters=6)) == 0
    assert run_here(*run_flags(rows, tmp_path / "b", max_iters=3, lr_decay_iters=6)) == 0
    assert run_here(f"--out_dir={tmp_path / 'b'}", "--init_from=resume", "--max_iters=6", "--lr_decay_iters=6") == 0
    assert history(tmp_path / "a", TIMING)[-1] == history(tmp_path / "b", TIMING)[-1]
    a, b = (load_checkpoint(tmp_path / name / "ckpt_last.pt") for name in "ab")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


@pytest.mark.parametrize(
    "given, told",
    [
        ({"block_size": 8}, "rows of 16 tokens, not 8; set --block_size=16"),
        ({"curriculum": "length", "curriculum_iters": 7}, "--curriculum would cut"),
        ({"dataset": "skills/parity"}, "run python data/skills/prepare.py parity --out_dir="),
        ({"sample_interval": 1}, "names the tokenizer 'skills/mqar'"),
    ],
)
def test_train_refuses_in_one_line(rows, tmp_path, given, told, capsys):
    assert run_here(*run_flags(rows, tmp_path, **given)) == 2
    assert told in error_of(capsys)


@pytest.mark.parametrize("damage, told", [
    (lambda f: f.write_bytes(f.read_bytes()[:-4]), "one target per token"),
    (lambda f: f.write_bytes(bytes(4) + f.read_bytes()[4:]), "is not what meta.json was written for"),
    (lambda f: f.unlink(), "train_targets.bin"),
])  # fmt: skip
def test_damaged_targets_are_refused(rows, tmp_path, damage, told):
    folder = tmp_path / "skills" / "mqar"
    shutil.copytree(rows, folder)
    damage(folder / "train_targets.bin")
    with pytest.raises(DataError, match=told):
        RowDataset(config_of(folder))


@pytest.mark.parametrize("words, told", [
    (["mqra"], "expected a task first, one of mqar"),
    (["parity", "--n=3"], "parity has no setting n"),
    (["mqar", "--n=60"], "T of at least 240"),
    (["mqar", "--rows=0"], "rows=0"),
])  # fmt: skip
def test_prepare_refuses_in_one_line(words, told, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main([*words, f"--out_dir={tmp_path / 'x'}"])
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_prepare_knows_every_setting():
    known = {f.name for f in fields(prepare.TaskConfig)}
    assert known == {name for task in TASKS for name in tasks.setting_of(task)}
