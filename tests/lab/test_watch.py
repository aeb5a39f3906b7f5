"""python -m lab.watch: curves, table and page of runs, finished, going on or just begun."""

import json
import re

import pytest

from lab import watch

pytestmark = pytest.mark.slow


def run_in(folder, losses, ms=500.0, max_iters=100):
    """A run's files as train.py writes them: every tenth step a training line, and its validation."""
    folder.mkdir(parents=True)
    lines = [{"iter": 0, "tokens": 0, "val_loss": 4.2, "train_loss": 4.2}]
    for i, loss in enumerate(losses, start=1):
        lines.append({"iter": 10 * i - 1, "loss": loss - 0.1, "ms": ms, "tokens_per_s": 1e6 / ms})
        lines.append({"iter": 10 * i, "val_loss": loss, "train_loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + "not json\n" + '{"iter": 99, "val_loss": 0.0')
    (folder / "run.json").write_text(json.dumps({"config": {"max_iters": max_iters}}))
    return folder


def columns(text):
    """The table's lines, split at two spaces or more."""
    return [re.split(r"\s{2,}", line) for line in text.splitlines() if re.search(r"\d / \d|not begun", line)]


@pytest.fixture
def runs(tmp_path):
    run_in(tmp_path / "out/slow/lr1-seed0", [3.0, 2.5, 2.4])
    run_in(tmp_path / "out/fast/lr1-seed0", [2.9, 2.2, 2.3, *[2.25] * 7], ms=100.0)
    return tmp_path / "out"


def test_a_look_at_two_runs(runs, capsys):
    pytest.importorskip("plotext")
    watch.main([str(runs), "--once"])
    text = capsys.readouterr().out
    assert columns(text) == [
        ["a", "fast/lr1-seed0", "100 / 100", "2.1500", "2.2000", "10,000", "0:00"],
        ["b", "slow/lr1-seed0", "30 / 100", "2.3000", "2.4000", "2,000", "0:35"],  # 70 steps of half a second
    ]
    plot = text.split("\n\n")[0]
    assert "val_loss by training step" in plot and plot.count("a") >= 1 and "\033" not in text
    heights = [float(number) for number in re.findall(r"^ *([\d.]+)┤", plot, re.MULTILINE)]
    assert max(heights) == 3.0 and min(heights) == 2.2  # without the untrained model's 4.2


def test_other_metrics_and_both_axes_logarithmic(runs, capsys):
    pytest.importorskip("plotext")
    watch.main([str(runs / "slow/lr1-seed0"), "--once", "--metric=loss", "--log_scale"])
    plot = capsys.readouterr().out
    heights = [float(number) for number in re.findall(r"^ *([\d.]+)┤", plot, re.MULTILINE)]
    ratios = [high / low for high, low in zip(heights, heights[1:])]
    assert heights[0] == 2.9 and heights[-1] == 2.3 and max(ratios) / min(ratios) < 1.01
    watch.main([str(runs), "--once", "--metric=nothing"])
    assert "no curve of nothing yet" in capsys.readouterr().out


def test_the_page_loads_itself_again(runs, capsys, tmp_path):
    pytest.importorskip("plotext")
    page = tmp_path / "watch.html"
    run_in(tmp_path / "out/done", [2.0, 1.9], max_iters=20)
    for folder in ("slow", "fast"):
        (runs / folder / "lr1-seed0" / "run.json").write_text(json.dumps({"config": {"max_iters": 30}}))
    metrics = runs / "fast/lr1-seed0/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:7]))
    watch.main([str(runs), f"--page={page}", "--every=7"])  # all runs are at their last step: one look
    text = page.read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="7">' in text and "viewport" in text
    assert text.count("<tr>") == 4 and "data:image/png;base64," in text and "fast/lr1-seed0" in text
    watch.main([str(runs), f"--page={page}", "--once"])
    assert "refresh" not in page.read_text(encoding="utf-8")


def test_a_run_that_has_just_begun(tmp_path, capsys):
    pytest.importorskip("plotext")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.lock").touch()
    watch.main([str(tmp_path / "out"), "--once"])
    out = capsys.readouterr().out
    assert "no curve of val_loss yet" in out and columns(out) == [["", "out", "not begun"]]


@pytest.mark.parametrize("words, told", [(["nowhere"], "no such folder"), (["."], "no run has written metrics.jsonl")])
def test_wrong_folders_get_one_line(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        watch.main([*words, "--once"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and error.count("\n") == 1
