"""Records say what made them, and the report refuses each broken rule; its corrections are compared with scipy's."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from configurator import ConfigError
from helpers import ROOT
from lab import ablate, identity, rungs
from lab.ablate import AblateConfig, difference, family, smallest_effect
from model import GPTConfig

pytestmark = pytest.mark.slow


def record(row, seed, loss, lr=1e-3, model="m", loop="l", data="d", dtype="float32"):
    """A committed record; model=None: one from before sources were recorded."""
    source = None if model is None else {"model": model, "of": "its specialised file", "loop": loop}
    asked = {"row": row, "learning_rate": lr, "seed": seed, "recipe": ["config/train_shakespeare_char_cpu.py"],
             "settings": {}, "jobs": 1, "text": "", "flags": [], "source": source}  # fmt: skip
    machine = {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None}
    facts = {
        "config": {"max_iters": 4},
        "model_args": {"n_layer": 1, "n_embd": 12, "vocab_size": 8},
        "parameters": 100,
        "git_commit": "abc",
        "machine": machine,
        "dtype": dtype,
    }
    facts |= {} if data is None else {"data_id": data}
    return {"asked": asked, "facts": facts, "evaluations": [{"iter": 4, "val_loss": loss, "tokens": 1}],
            "steps": [{"tokens_per_s": 1.0}]}  # fmt: skip


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """comparison(records) -> (AblateConfig, runs) of those records alone."""
    monkeypatch.chdir(tmp_path)

    def write(records, **more):
        cfg = AblateConfig(out_dir="out-here", docs=str(tmp_path), learning_rates="1e-3", **more)
        cfg.records.parent.mkdir(exist_ok=True)
        cfg.records.write_text("".join(json.dumps(line) + "\n" for line in records))
        return cfg, ablate.find_runs(cfg)

    return write


BASE = [record("baseline", seed, 2.0 + 0.01 * seed) for seed in range(3)]
IDEA = [record("idea", seed, 1.9 + 0.012 * seed, model="other") for seed in range(3)]


@pytest.mark.parametrize("records, told", [
    (IDEA[:2] + [record("idea", 2, 1.9, model="changed")], "several sources under one name: idea"),
    (IDEA[:2] + [record("idea", 2, 1.9, model="other", loop="changed")], "2 versions of the training loop"),
    ([record("idea", seed, 1.9, loop="another") for seed in range(3)], "2 versions of the training loop"),
    ([record("idea", 0, 1.9, data="another")], "2 versions of the data set"),
    ([record("idea", 0, 1.9, dtype="bfloat16")], r"number formats float32 \(3\), bfloat16 \(1\)"),
    ([record("idea", 0, 1.9, model=None, data=None)], "1 of 4 records do not say what made them"),
])  # fmt: skip
def test_other_sources_are_not_compared(records, told, comparison):
    cfg, runs = comparison(BASE + records)
    with pytest.raises(ConfigError, match=f"{told}.*--mix"):
        ablate.describe(cfg, runs)
    cfg, runs = comparison(BASE + records, mix=True)
    text = ablate.describe(cfg, runs)
    assert re.search(told, text) and "**Mixed sources**" in text


def test_a_comparison_has_one_number_format(comparison, monkeypatch, capsys):
    """That of the finished runs; measured where there are none; and a row that names its own keeps it."""
    cfg, _ = comparison([*BASE, record("idea", 0, 1.9, dtype="bfloat16"), record("old", 0, 1.9, dtype=None)])
    ablate.pick_format(cfg, {})
    assert cfg.dtype == "float32" and "float32, that of 3 finished runs" in capsys.readouterr().out
    cfg, _ = comparison([])
    monkeypatch.setattr(ablate, "pick_dtype", lambda *given: (torch.bfloat16, f"for {given[0]}, {given[3]} tokens"))
    monkeypatch.chdir(ROOT)
    ablate.pick_format(cfg, {"idea": "config/ablation/relu2.py"})
    assert "bfloat16, for auto, 768 tokens" in capsys.readouterr().out
    run = SimpleNamespace(asked={"settings": {}})
    assert ablate.format_flag(cfg, run) == ["--dtype=bfloat16"]
    run.asked["settings"] = {"dtype": "float32"}
    assert ablate.format_flag(cfg, run) == []


def test_rows_of_other_models_are_what_a_comparison_is_for(comparison):
    cfg, runs = comparison(BASE + IDEA)
    text = ablate.describe(cfg, runs)
    assert "Mixed" not in text and "machine a CPU, 2 cores, 1 thread(s), 1 run(s)" in text


def test_pairs_are_of_one_number_format(comparison):
    """Both formats of a baseline are kept; a run is paired with the baseline's run of its seed and its format."""
    base = [record("baseline", s, 2.0 + 0.01 * s, dtype=d) for s in range(3) for d in ("bfloat16", "float32")]
    base[1]["evaluations"][0]["val_loss"] = 2.5  # seed 0 in float32
    idea = [record("idea", s, 1.9 + 0.012 * s, dtype="bfloat16") for s in range(3)]
    cfg, runs = comparison(base + idea, mix=True)
    assert len(runs) == 9 and sum(run.folder.name.endswith("-float32") for run in runs) == 3
    rows = ablate.columns_of(cfg, runs)["lr 0.001"]
    gap = ablate.gaps_of(rows)["idea"]
    assert gap.kind == "paired" and gap.n == 3 and gap.mean == pytest.approx(-0.098)  # nothing of 2.5
    cells = next(cells for cells in ablate.quality(rows) if cells["row"][0] == "baseline")
    assert cells["seeds"][1] == 3
    cfg.records.write_text("".join(json.dumps(run.record()) + "\n" for run in runs))
    again = ablate.find_runs(cfg)
    assert [(run.folder, run.loss) for run in again] == [(run.folder, run.loss) for run in runs]


def test_rungs_refuse_them_too(comparison):
    _, runs = comparison([record("baseline", 0, 2.0, model=None)])
    rows = {"M0": {"baseline": runs}}
    with pytest.raises(ConfigError, match="out-ablation: .*do not say"):
        rungs.mixtures_of(rows, mix=False)
    assert rungs.mixtures_of(rows, mix=True).startswith("M0: **Mixed sources**")


def test_verdicts_need_three_seeds(comparison):
    for n, verdict in ((1, "one seed"), (2, "2 seeds"), (3, "better")):
        losses = {seed: 1.9 + 0.0101 * seed for seed in range(n)}
        table = ablate.quality(ablate.columns_of(*comparison(
            BASE + [record("idea", seed, loss) for seed, loss in losses.items()]))["lr 0.001"])  # fmt: skip
        assert table[0]["row"][0] == "idea" and table[0]["verdict"][0] == verdict
        assert bool(table[0]["Holm p"][0]) == (n == 3)


def test_tuned_is_said_of_bracketed_rates_alone(comparison):
    rates = {0.5e-3: 2.1, 1e-3: 2.0, 2e-3: 2.2}
    idea = [record("idea", 0, loss, lr) for lr, loss in {1e-3: 1.9, 2e-3: 2.0}.items()]
    cfg, runs = comparison([record("baseline", 0, loss, lr) for lr, loss in rates.items()] + idea)
    titles = {title: (remark, table) for title, remark, table in ablate.sections(cfg, runs)}
    remark, table = titles["Loss, tuned"]
    assert {cells["row"][0]: cells["rate"][0] for cells in table} == {"baseline": "tuned", "idea": "unbracketed"}
    assert "*unbracketed*" in remark and "No row has the three seeds" in remark


def test_a_bracket_may_be_of_two_number_formats(comparison):
    """A rate in one format is worse than the best one in another, and both formats of a seed count as one seed."""
    rates = {0.5e-3: (2.1, "float32"), 1e-3: (2.0, "bfloat16"), 2e-3: (2.2, "float32")}
    records = [record("idea", 0, loss, lr, dtype=dtype) for lr, (loss, dtype) in rates.items()]
    _, runs = comparison([*records, record("idea", 0, 2.02, dtype="float32")])
    (found,) = ablate.best_rates(runs).values()
    assert found["is_bracketed"] and found["lr"] == 1e-3 and found["losses"][1e-3] == pytest.approx(2.01)


def test_corrections_of_a_table_are_those_of_its_family():
    rng = np.random.default_rng(0)
    base = dict(enumerate(rng.normal(2, 0.01, 5)))
    shifts = dict(zip("abcdef", (-0.1, -0.02, 0.0, 0.0, 0.05, 0.0)))
    gaps = {r: difference({s: x + shift + rng.normal(0, 0.01) for s, x in base.items()}, base)
            for r, shift in shifts.items()}  # fmt: skip
    gaps["short"] = difference({0: 1.0, 1: 1.0}, base)
    found = family(gaps)
    assert found.keys() == set("abcdef")  # two seeds are in no family
    ps = [gaps[row].p for row in found]
    assert [each["bh"] for each in found.values()] == pytest.approx(stats.false_discovery_control(ps))
    by_hand = sorted(ps)[0] * 6
    assert min(each["holm"] for each in found.values()) == pytest.approx(by_hand)
    assert found["a"]["verdict"] == "better" and found["e"]["verdict"] == "worse"
    assert all(each["holm"] >= each["bh"] for each in found.values())  # it is the stricter one
    for each in found.values():
        assert (each["verdict"] in ("better", "worse")) == (each["holm"] < 0.05)
        assert each["verdict"].startswith("screened") == (each["holm"] >= 0.05 and each["bh"] <= 0.1)
    halves = sorted(gap.half for gap in gaps.values() if gap.n >= 3)
    assert f"{(halves[2] + halves[3]) / 2:.4f} nats" in smallest_effect(gaps)


def test_intervals_are_scipys_for_many_seeds_too():
    """The table that was here before ended at ten degrees of freedom."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, (2, 30))
    interval = stats.ttest_rel(a, b).confidence_interval()
    gap = difference(dict(enumerate(a)), dict(enumerate(b)))
    assert gap.half == pytest.approx((interval.high - interval.low) / 2) and gap.n == 30
    same = difference({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0})
    assert (same.mean, same.half, same.kind) == (-1.0, 0.0, "Welch")


def test_comments_and_docstrings_are_no_code():
    plain = identity.sha256("def f(x):\n    return x + 1\n")
    assert identity.sha256('def f(x):  # adds\n    """Adds."""\n\n    return (x + 1)\n') == plain
    assert identity.sha256("def f(x):\n    return x + 2\n") != plain


def test_a_models_identity_is_of_the_code_that_it_uses(monkeypatch):
    plain = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=65)
    found = identity.source(plain)
    assert found["of"] == "its specialised file" and found["loop"] == identity.source(plain, "muon")["loop"]
    assert identity.source(plain, "muon")["model"] != found["model"]  # the optimiser is part of it

    def refuse(config):
        raise ConfigError("cannot be folded")

    identity.of_config.cache_clear()
    monkeypatch.setattr(identity.specialise, "text", refuse)
    assert identity.source(plain)["of"] == "model.py and kernels/"
    monkeypatch.setattr(identity, "IMPORTED", "another")
    with pytest.raises(ConfigError, match="changed since this command began"):
        identity.source(plain)
    identity.of_config.cache_clear()
