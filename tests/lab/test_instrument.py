"""The instrument itself: rows that are the baseline are not called different, and an idea of zeros has no effect."""

import json

import numpy as np
import pytest
import torch
from test_trial import RUNG, run_here
from torch import nn

import train
from data import corpus, domains
from helpers import TrainHere, flags, run_here as train_here
from lab import ablate, claims
from lab.ablate import difference, family

pytestmark = pytest.mark.slow
ROWS, SEEDS = 20, 3


def test_a_against_a(shakespeare, tmp_path):
    """20 rows that are the baseline with other seeds: of 95 % intervals 0 to 3 leave out 0; of corrected ones none."""
    found = []
    for seed in range(SEEDS * (ROWS + 1)):
        out = tmp_path / str(seed)
        assert train_here(*flags(shakespeare, out, seed=seed, max_iters=12, eval_interval=12, n_layer=1)) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([line["val_loss"] for line in lines if "val_loss" in line][-1])
    groups = np.reshape(found, (ROWS + 1, SEEDS))
    base, *rows = [dict(enumerate(group.tolist())) for group in groups]
    gaps = {f"row {i}": difference(row, base) for i, row in enumerate(rows)}
    assert sum(gap.verdict != "" for gap in gaps.values()) <= 3
    assert all(each["verdict"] not in ("better", "worse") for each in family(gaps).values())


class Null(nn.Module):
    """Parameters on a path that is multiplied by 0."""

    def __init__(self, model):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64, 64))
        model.register_forward_hook(lambda module, args, result: (result[0], result[1] + 0 * self.weight.sum()))


def test_an_idea_of_zeros_has_no_effect(tmp_path, monkeypatch):
    """Judged by a whole trial, from screen to card."""
    build = train.build_model

    def with_nothing(settings, *rest):
        model = build(settings, *rest)
        if settings.values["wandb_run_name"] == "null":  # a flag that changes no number
            model.null = Null(model)
        return model

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc de\n"), 400)) for _ in range(60)]
    domains.write_domain(tmp_path / "data/letters", texts, 1e6, "tests/lab/test_instrument.py")
    (tmp_path / "tiny.py").write_text(RUNG)
    monkeypatch.setattr(train, "build_model", with_nothing)
    monkeypatch.setattr(ablate, "Popen", TrainHere)
    assert run_here(
        "null: --wandb_run_name=null", "--baselines=M0", f"--rungs={tmp_path / 'tiny.py'}", "--domains=letters",
        f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", f"--docs={tmp_path}", "--jobs=1",
        "--select_seeds=2", "--confirm_seeds=3", "--budget=1h",
    ) == 0  # fmt: skip
    card = json.loads((tmp_path / "claims/null.json").read_text())
    runs = {row: next((tmp_path / "out/M0-tiny-letters" / row).glob("*-seed100")) for row in ("baseline", "null")}
    sizes = {row: ablate.Run(folder).facts["parameters"] for row, folder in runs.items()}
    assert sizes["null"] == sizes["baseline"] + 64 * 64  # they were there
    assert claims.verdicts(card)["M0"].startswith("no effect above 0.0000 nats")
    assert card["ladder"]["M0"]["verdict"].startswith("undecided")
    assert all(each["m"] == 1 for each in card["ladder"]["M0"]["speedup"].values())


def test_shuffled_text_has_the_same_unigrams_and_nothing_else(tmp_path):
    texts = ["ab" * 200 + str(i) for i in range(40)]
    plain = domains.write_domain(tmp_path / "plain", texts, 1e6, "made up")
    shuffled = domains.write_domain(tmp_path / "x_shuffled", texts, 1e6, "made up", shuffled=True)
    assert plain["train_tokens"] == shuffled["train_tokens"] and plain["test_sha256"] != shuffled["test_sha256"]
    ids = [np.fromfile(tmp_path / name / "train.bin", np.uint16) for name in ("plain", "x_shuffled")]
    end = corpus.Byte.eot
    assert (np.flatnonzero(ids[0] == end) == np.flatnonzero(ids[1] == end)).all()  # within documents
    assert (np.bincount(ids[0]) == np.bincount(ids[1])).all()
    pairs = [np.mean((each[:-1] == ord("a") + 3) & (each[1:] == ord("b") + 3)) for each in ids]
    assert pairs[0] > 0.45 and pairs[1] < 0.3  # "ab" was certain, and is chance now
