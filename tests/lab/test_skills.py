"""lab.skills: small trainings from end to end, and scores, table and lengths worked out by hand."""

import json
import signal

import numpy as np
import pytest
import torch

from data.skills.tasks import TASKS
from helpers import TrainHere
from lab import ablate, skills
from lab.skills import SkillsConfig, right_beyond, scores_of, skill_of, table, words_without_positions
from model import GPT, DecodingState, GPTConfig

pytestmark = pytest.mark.slow

PARITY = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 8, "vocab_size": 2, "bias": False}


def record(row, seed, accuracy, longer=None, task="parity", size=100, quick=False):
    return {"task": task, "row": row, "seed": seed, "accuracy": accuracy, "loss": 1.0, "longer": longer or {},
            "setting": {"T": 40}, "state_bytes": size, "floor": 0.5, "quick": quick, "block": skills.BLOCK}  # fmt: skip


RECORDS = [
    record("waves", 0, 1.0, {"64": 0.5}),
    record("waves", 1, 0.8, {"64": 0.7}),
    record("softmax", 0, 0.6, {"64": None}, size=400),
    record("softmax", 0, 0.95, task="s3", size=400),
]


def test_scores_and_the_table():
    scores, floors = scores_of(RECORDS)
    assert scores == {
        "parity": {"waves": [1.0, 0.8], "softmax": [0.6]},
        "parity, 40 to 64": {"waves": [0.5, 0.7]},
        "s3": {"softmax": [0.95]},
    }
    assert floors == dict.fromkeys(scores, 0.5)
    lines = [[text for text, _ in line.values()] for line in table(RECORDS)]
    assert lines == [
        ["random guess", "0.500", "0.500", "0.500"],
        ["waves", "0.900 (1/2)", "0.600 (0/2)", ""],
        ["softmax", "0.600", "", "0.950"],
    ]


def test_pictures_have_a_dot_per_seed_and_name_the_front():
    figure = skills.profile(RECORDS)
    dots = [sum(len(line.get_xdata()) for line in axes.lines[1:]) for axes in figure.axes]
    assert dots == [3, 2, 1] and [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["waves", "softmax"]
    panels = [axes for axes in skills.against_state(RECORDS).axes if axes.get_title()]
    colours = {line.get_xdata()[0]: line.get_color() for line in panels[0].lines}
    assert colours == {100: "tab:red", 400: "grey"}  # waves are smaller and better


@pytest.mark.parametrize("given", [{"pos_embedding": "rope"}, {"attn_mode": "fhn", "pos_embedding": "none"}])
def test_beyond_the_trained_length(given):
    """The share of right answers after position 8 of rows of 12, by decoding."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**PARITY, **given)).eval()
    found = right_beyond(model, "parity", {}, 12)
    idx, targets = TASKS["parity"](np.random.default_rng((1, 12)), skills.TEXTS, T=12)
    idx, targets, state = torch.from_numpy(idx), torch.from_numpy(targets), DecodingState()
    logits = [model(tokens, state=state)[0] for tokens in idx.split(1, 1)]
    right = torch.cat(logits, 1).argmax(-1) == targets
    assert found == pytest.approx(right[:, 8:].double().mean().item()) and model.config.block_size == 8


def test_a_learned_table_has_nothing_beyond():
    assert right_beyond(GPT(GPTConfig(**PARITY)).eval(), "parity", {}, 12) is None


def test_state_bytes_grow_with_attention_alone():
    sizes = {}
    for name, given in {"softmax": {}, "waves": {"attn_mode": "fhn"}}.items():
        sizes[name] = [skills.decoding_bytes(GPT(GPTConfig(**PARITY | {"block_size": T}, **given)), T) for T in (8, 64)]
    near, far = sizes["softmax"]
    assert far > near >= 2 * 4 * 16 * 8 and far >= 2 * 4 * 16 * 64 and sizes["waves"][0] == sizes["waves"][1]


def test_rows_without_attention_get_no_positions():
    without = " --pos_embedding=none --qk_norm=False"
    assert words_without_positions("--attn_mode=fhn") == "--attn_mode=fhn" + without
    assert words_without_positions("config/ablation/gdn.py") == "config/ablation/gdn.py" + without
    own = "--attn_mode=gla --pos_embedding=ramanujan"
    assert words_without_positions(own) == own + " --qk_norm=False"
    for config in ("config/ablation/rope.py", "--attn_pattern=fhn,softmax"):
        assert words_without_positions(config) == config


def test_quick_is_smaller():
    assert skill_of(SkillsConfig(), "mqar").setting == {"vocab_size": 512}
    small = skill_of(SkillsConfig(quick=True, max_iters=7), "mqar")
    assert (small.steps, small.width, len(small.rates)) == (7, 64, 1) and small.setting["vocab_size"] < 512
    assert (SkillsConfig().seeds, SkillsConfig(quick=True).seeds, SkillsConfig(quick=True, seeds=2).seeds) == (3, 1, 2)


@pytest.mark.parametrize("words, told", [
    (["--tasks=mqra", "--report"], "no 'mqra'; there are mqar, "),
    (["--quick"], "name the config files"),
    (["no.py"], "no such config file"),
    (["config/ablation/rope.py", "--seeds=0"], "seeds=0"),
    (["--report", "--out_dir=/nowhere", "--docs=/nowhere"], "no finished run, and no record"),
])  # fmt: skip
def test_refuses_in_one_line(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        skills.main(words)
    error = capsys.readouterr().err
    assert error.startswith("lab.skills: error: ") and told in error and error.count("\n") == 1


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(ablate, "Popen", TrainHere)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_from_end_to_end(in_process, tmp_path, monkeypatch, capsys):
    """Rates with seed 0, the other seeds at the best one; the next call trains nothing; then the report."""
    monkeypatch.setitem(skills.SKILLS, "parity", skills.Skill(16, 1, 1, 4, rates=(1e-3, 1e-2), longer=(48,)))
    out, docs = tmp_path / "out", tmp_path / "docs"
    words = ["waves: --attn_mode=fhn", "config/ablation/rope.py", "--tasks=parity", "--seeds=2", "--max_iters=4"]
    words += [f"--out_dir={out}", f"--docs={docs}", "--jobs=1"]
    with pytest.raises(SystemExit, match="0"):
        skills.main(words)
    assert (
        len(list(out.glob("parity/*/lr*-seed0/ckpt.pt"))) == 4
        and len(list(out.glob("parity/*/lr*-seed1/ckpt.pt"))) == 2
    )
    assert "parity, 40 to 48" in capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in ("metrics.jsonl", "train.bin")}
    with pytest.raises(SystemExit, match="0"):
        skills.main(words)
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    docs.joinpath("results").mkdir(parents=True)
    older = [record("waves", 7, 0.25), record("waves", 0, 0.25), record("old", 0, 0.5, quick=True)]
    older += [record("other_block", 0, 0.5) | {"block": None}]  # kept, and in no table with these
    docs.joinpath("results/skills.jsonl").write_text("".join(json.dumps(r) + "\n" for r in older))
    with pytest.raises(SystemExit, match="0"):
        skills.main(["--report", *words[2:]])
    found = [json.loads(line) for line in docs.joinpath("results/skills.jsonl").read_text().splitlines()]
    assert [(r["quick"], r["row"], r["seed"]) for r in found] == [
        (False, "other_block", 0), (False, "rope", 0),
        (False, "rope", 1), (False, "waves", 0), (False, "waves", 1), (False, "waves", 7),
        (True, "old", 0)]  # fmt: skip
    new = found[3]
    lines = [
        json.loads(line)
        for line in (out / f"parity/waves/lr{new['lr']:g}-seed0/metrics.jsonl").read_text().splitlines()
    ]
    assert new["accuracy"] == [x["val_accuracy"] for x in lines if "val_accuracy" in x][-1] != 0.25
    assert (
        new["steps"] == 4
        and new["flags"] == "--attn_mode=fhn --pos_embedding=none --qk_norm=False"
        and new["state_bytes"] > 0
    )
    text = docs.joinpath("results.md").read_text()
    assert (
        "| waves |" in text
        and "| old |" not in text
        and "other_block" not in text
        and "![skills-profile](img/skills-profile.png)" in text
    )
    assert all(docs.joinpath(f"img/skills-{name}.png").stat().st_size > 1000 for name in ("profile", "state"))


def test_a_failed_row_is_told(in_process, tmp_path, capsys):
    words = ["bad: --n_kv_head=3", "--quick", "--tasks=parity", "--max_iters=2", f"--out_dir={tmp_path}", "--jobs=1"]
    with pytest.raises(SystemExit, match="1"):
        skills.main(words)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"failed: {tmp_path}/parity/bad/")
