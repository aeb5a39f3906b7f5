"""lr_schedule="wsds": one run that gives losses at several horizons, as so many runs of their own would."""

import json
import shutil

import pytest

from helpers import flags, run_here
from model import load_checkpoint
from train import TrainConfig, lr_at, periods, steps_trained

pytestmark = pytest.mark.slow


def config(steps, horizons=3, **given):
    return TrainConfig(
        **{"lr_schedule": "wsds", "max_iters": steps, "wsds_horizons": horizons, "learning_rate": 1.0, "min_lr": 0.0,
           "warmup_iters": 3} | given
    )  # fmt: skip


def walked(cfg):
    """[(steps trained before, is in a decay)] of each step, by walking along the trunk and back."""
    found, trunk = [], 0
    for period in periods(cfg):
        while len(found) < period.branch:
            found.append((trunk, False))
            trunk += 1
        found += [(trunk + i, True) for i in range(period.end - period.branch)]
    return found


@pytest.mark.parametrize("steps, horizons", [(1, 3), (2, 1), (7, 3), (43, 3), (215, 3), (1000, 1), (4321, 5), (12, 16)])
def test_horizons_double_and_the_trunk_has_no_gap(steps, horizons):
    cfg = config(steps, horizons)
    path, found = walked(cfg), [period.horizon for period in periods(cfg)]
    assert len(path) == steps == periods(cfg)[-1].end and len(found) <= horizons
    assert [steps_trained(cfg, step) for step in range(steps)] == [trained for trained, _ in path]
    for period in periods(cfg):
        assert path[period.end - 1][0] + 1 == period.horizon
    for shorter, longer in zip(found, found[1:]):
        assert abs(longer - 2 * shorter) <= 2 + horizons / 2
    if steps > 100:
        assert all(abs((p.end - p.branch) / p.horizon - 0.1) < 0.02 for p in periods(cfg))


def test_rates_are_flat_and_fall_to_the_end_of_each_period():
    cfg = config(215)  # horizons 50, 100, 200
    assert [period.horizon for period in periods(cfg)] == [50, 100, 200]
    decay = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [lr_at(cfg, step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [lr_at(cfg, step) for step in range(44, 52)] == pytest.approx([1.0, *decay, 1.0, 1.0])
    assert [lr_at(cfg, step) for step in (94, 95, 104, 105, 194)] == pytest.approx([1.0, 1.0, 0.1, 1.0, 1.0])
    assert [lr_at(cfg, step) for step in (195, 205, 214, 215, 999)] == pytest.approx([1.0, 0.5, 0.05, 0.0, 0.0])
    assert periods(config(215, decay_lr=False)) == [] == periods(TrainConfig())


def test_a_curriculum_has_one_direction():
    with pytest.raises(ValueError, match="wsds goes back"):
        config(100, curriculum="length", curriculum_iters=50)


def evaluations(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "val_loss" in line]


def losses(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


WSDS = {"lr_schedule": "wsds", "wsds_horizons": 2, "lr_decay_iters": 42, "eval_interval": 100, "dropout": 0.1,
        "n_layer": 1, "n_embd": 16, "min_lr": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def straight(shakespeare, tmp_path_factory):
    """The folder of a run with the horizons 20 and 40."""
    out = tmp_path_factory.mktemp("wsds")
    assert run_here(*flags(shakespeare, out, max_iters=42, **WSDS)) == 0
    return out


def test_a_horizon_is_a_run_of_that_length(straight, shakespeare, tmp_path):
    """To the last bit, dropout included: data, rates and random numbers are those of a run of its own."""
    found = {line["horizon"]: line for line in evaluations(straight) if "horizon" in line}
    assert list(found) == [20, 40] and [line["iter"] for line in found.values()] == [20, 42]
    for horizon, line in found.items():
        assert line["tokens"] == horizon * 4 * 16
        given = {"lr_schedule": "wsd", "wsd_decay_share": 0.1, "max_iters": horizon, "lr_decay_iters": horizon}
        out = tmp_path / str(horizon)
        assert run_here(*flags(shakespeare, out, **(WSDS | given | {"wsds_horizons": 3}))) == 0
        alone = losses(out)
        if horizon == 20:  # random windows of an evaluation are those of its step, which is another one later
            assert evaluations(out)[-1]["val_loss"] == line["val_loss"]
        assert alone == losses(straight)[:18] + losses(straight)[20 if horizon == 40 else 18 :][: horizon - 18]


@pytest.mark.parametrize("stop", [19, *(pytest.param(stop) for stop in (17, 20, 21, 30))])
def test_a_stop_anywhere_changes_nothing(stop, straight, shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path, max_iters=stop, **WSDS)) == 0
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=42") == 0
    assert losses(tmp_path) == losses(straight)
    ends = [load_checkpoint(out / "ckpt_last.pt") for out in (tmp_path, straight)]
    for name, tensor in ends[0]["model"].items():
        assert tensor.equal(ends[1]["model"][name])
    last = [[line for line in evaluations(out) if "horizon" in line] for out in (tmp_path, straight)]
    assert last[0] == last[1]


def test_without_the_trunk_there_is_no_way_back(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path, max_iters=19, **WSDS)) == 0
    (tmp_path / "ckpt_stable.pt").unlink()
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=42") == 2
    assert "ckpt_stable.pt" in capsys.readouterr().err
    shutil.copy(tmp_path / "ckpt_last.pt", tmp_path / "ckpt_stable.pt")  # of another step
    assert run_here(f"--out_dir={tmp_path}", "--init_from=resume", "--max_iters=42") == 2
    assert "expected the run at step 18" in capsys.readouterr().err
