"""lab.rungs on made-up records, whose table is worked out by hand."""

import json

import pytest
from scipy import stats

from lab import rungs
from lab.ablate import difference

pytestmark = pytest.mark.slow


def record(row, seed, loss, lr=1e-3, parameters=100, recipe="cpu.py"):
    asked = {"row": row, "learning_rate": lr, "seed": seed, "recipe": ["config/train_shakespeare_char_cpu.py"],
             "settings": {}, "jobs": 1, "machine": "m", "text": "", "flags": []}  # fmt: skip
    facts = {"config": {"max_iters": 4}, "model_args": {}, "parameters": parameters, "git_commit": "abc"}
    evaluations = [{"iter": 4, "val_loss": loss, "tokens": 1}]
    return {"asked": asked, "facts": facts, "evaluations": evaluations, "steps": [{"tokens_per_s": 1.0}]}


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """M0: an idea that gains 0.1. M1: 0.04. M2: 0.02. And one that only M2 knows."""
    monkeypatch.chdir(tmp_path)  # where no runs lie
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    gains = {"ablation": 0.1, "modern": 0.04, "modern-muon": 0.02}
    for level, (name, gain) in enumerate(gains.items()):
        noise = [0.0, 0.01, -0.005]
        lines = [record("baseline", seed, 2 - level / 10 + noise[seed]) for seed in range(3)]
        lines += [record("baseline", 0, 9.0, lr=3e-3)]  # worse: not the tuned rate
        if level == 1:  # on M1 the idea's rate is bracketed
            lines += [record("idea", 0, 9.0, lr=rate) for rate in (3e-3, 3e-4)]
        lines += [record("idea", s, 2 - level / 10 - gain + noise[s] + 0.001 * s, parameters=102) for s in range(3)]
        if level == 2:
            lines += [record("short_conv", seed, 1.9 + noise[seed]) for seed in range(3)]
            lines += [record("late", 0, 1.5)]
            lines += [record(f"conv_{i}", 0, 1.9 + i / 100) for i in range(10)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "docs"


def test_the_table(docs, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# top\n\n<!-- rungs:start -->\nold\n<!-- rungs:end -->\n\nend\n")
    rungs.main([f"--docs={docs}", f"--readme={readme}", "--mix"])
    text = readme.read_text()
    assert text.startswith("# top") and text.endswith("end\n") and "old" not in text
    assert "M0 2.002 (3 seeds, learning rate 0.001)" in text and "M2 1.802" in text
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert lines[0] == ["idea", "on M0", "on M1", "on M2", "survives", "on M2 it is", "parameters"]
    half = stats.t.ppf(0.975, 2) * 0.001 / 3**0.5
    assert ["idea", f"-0.0990 ± {half:.4f}*", f"-0.0390 ± {half:.4f}", f"-0.0190 ± {half:.4f}*", "19%", "better",
            "1.02x"] in lines  # fmt: skip
    assert [line[0] for line in lines[2:]] == [
        "late",
        "idea",
        "convolution over 4 tokens, `short_conv` (control)",
    ]  # best on M2 first
    late, control = lines[2], lines[4]
    assert late[5] == "undecided" and control[5] == "worse" and control[1] == control[4] == ""
    more = (docs / "results.md").read_text()
    assert more.count("rungs:start") == 1 and "Of 10 rows the best 8" in more
    assert "| 0 | 1.9000 |" in more and "| 7 | 1.9700 |" in more and "| 8 |" not in more and "| 0 |" not in text


def test_survival_needs_a_gain():
    gain, nothing = difference({0: 1.0, 1: 1.01}, {0: 2.0, 1: 2.0}), difference({0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0})
    assert rungs.survival({"M0": gain, "M2": nothing}) == "-0%" or rungs.survival({"M0": gain, "M2": nothing}) == "0%"
    assert rungs.survival({"M0": nothing, "M2": gain}) == rungs.survival({"M2": gain}) == ""


def test_verdicts_are_corrected_for_how_many_there_are():
    """One interval that leaves out 0 by little is a result by itself, and none among ten."""
    base = {0: 2.0, 1: 2.01, 2: 1.99}
    close = difference({0: 2.023, 1: 2.03, 2: 2.001}, base)
    assert 0.02 < close.p < 0.05
    assert rungs.verdicts({"a": {"M2": close}}) == {"a": "worse"}
    nothing = difference({0: 2.01, 1: 2.0, 2: 1.99}, base)
    many = {"a": {"M2": close}} | {f"b{i}": {"M2": nothing} for i in range(9)} | {"c": {"M0": close}}
    said = rungs.verdicts(many)
    assert said["a"] == said["b0"] == "no difference" and said["c"] == "undecided"
    three = {name: {"M2": close} for name in "abc"}
    assert rungs.verdicts(three) == dict.fromkeys("abc", "screened: worse")
