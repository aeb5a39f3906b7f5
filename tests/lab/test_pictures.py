"""lab.pictures: each picture from a tiny trained model, and what can be known of it beforehand."""

import json

import pytest
import torch

from helpers import ROOT, run_here as train_here
from lab import pictures
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")
TINY = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --max_iters=2 --eval_interval=1 --eval_iters=1 --batch_size=2"
)
SMALL_CELLS = ["--anchor_min_gap=4", "--anchor_jitter=2"]
MORE = {"region_edges": [*SMALL_CELLS, "--region_size=2"], "knots": ["--knot_block=4"], "sdr": ["--sdr_size=256"]}


@pytest.fixture
def train(shakespeare, tmp_path):
    """train(row) -> the folder of a run of that row's config."""

    def run(row):
        file = next((ROOT / "config").glob(f"*/{row}.py"))
        recipe = ROOT / "config/train_shakespeare_char_cpu.py"
        words = [*TINY.split(), "--eval_full=False", "--log_interval=1", *MORE.get(row, [])]
        where = [f"--data_dir={shakespeare.parent}", f"--dataset={shakespeare.name}", f"--out_dir={tmp_path / row}"]
        assert train_here(str(recipe), str(file), *words, *where) == 0
        return tmp_path / row

    return run


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures(name, train):
    rows, draw = pictures.PICTURES[name]
    assert pictures.png(draw(train(rows[0]))).startswith(b"\x89PNG")


def test_a_picture_by_its_command(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = train("fhn")
    pictures.main(["waves", str(folder)])
    assert (tmp_path / "waves.png").read_bytes().startswith(b"\x89PNG") and "wrote waves.png" in capsys.readouterr().out
    for words, said in ((["knots", str(folder)], "no KnotGate"), (["wave"], "expected routing or waves"),
                        (["waves"], "name the folder"), (["waves", "nowhere"], "nowhere")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            pictures.main(words)
        error = capsys.readouterr().err
        assert error.startswith("lab.pictures: error: ") and said in error and error.count("\n") == 1


def test_alignment(train):
    rows, draw = pictures.COMPARISONS["alignment"]
    folders = {row: train(row) for row in rows[:3]}
    figure = draw(folders)
    last = {row: json.loads(text.read_text().splitlines()[-1]) for row, text in
            ((row, folder / "metrics.jsonl") for row, folder in folders.items())}  # fmt: skip
    said = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert said[1] == [f"{row} {last[row]['cosine']:.2f}" for row in rows[:3]]
    assert len(said[0]) == 2  # dfa's matrices stand for no layer's weights
    assert pictures.png(figure).startswith(b"\x89PNG")


def test_sparsity_over_training(train):
    rows, draw = pictures.COMPARISONS["sparsity"]
    folder = train(rows[0])
    axes = draw({rows[0]: folder, "no events": train("fhn")}).axes[0]
    course = pictures.logged(folder, "sparsity")
    assert axes.lines[0].get_xydata().tolist() == [list(point) for point in course] and len(axes.lines) == 1
    assert all(0 <= share <= 1 for _, share in course)
    bands = [tuple(band.get_paths()[0].vertices[:, 1][[0, 1]]) for band in axes.collections]
    assert [tuple(sorted(set(band))) for band in bands] == [(0.6, 0.7), (0.13, 0.3)]


def test_coxeter_plane():
    """Seven rings of 18 roots: E7's Coxeter number is 18, and it turns every root with the ring."""
    places = pictures.coxeter_plane()
    radii = places.norm(dim=1).sort().values.view(7, 18)
    assert torch.allclose(radii, radii[:, :1].expand(-1, 18))
    assert (radii[1:, 0] - radii[:-1, 0] > 1e-3).all()
    angle = torch.tensor(2 * torch.pi / 18)
    turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
    distance = torch.cdist(places @ turn.T, places).amin(1)
    assert distance.max() < 1e-6


@pytest.mark.parametrize("rule", ["hebb", "delta", "willshaw"])
def test_recall_under_noise(rule):
    """All of a few pairs by clean cues, chance by moved ones, and less with every bit between, nearly."""
    torch.manual_seed(0)
    flags = {"use_sdr": True, "sdr_size": 1024, "sdr_active": 20, "sdr_rule": rule, "vocab_size": 61}
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, **flags)).eval()
    found = [
        sum(pictures.recall_under_noise(model.transformer.wte, 10, m, seed) for seed in range(20)) / 20
        for m in (0, 5, 10, 15, 20)
    ]
    assert found[0] > 0.99 and found[-1] < 0.2 and found[1] <= found[0] and found[-1] <= found[-2]
