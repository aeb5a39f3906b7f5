"""lab.slices: grams, hits and shares against plain loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.corpus import load_meta, open_split
from helpers import flags, run_here
from lab import slices
from lab.lengths import open_run
from lab.slices import SlicesConfig, bins, codes, counts_in, seen_before, slices_of

pytestmark = pytest.mark.slow


def test_codes_are_equal_for_equal_grams():
    tokens = np.random.default_rng(0).integers(4, size=(2, 40))
    found = codes(tokens, 3, 4)
    grams = [[tuple(row[i : i + 3]) for i in range(38)] for row in tokens]
    assert all((found[a, i] == found[b, j]) == (grams[a][i] == grams[b][j])
               for a in (0, 1) for b in (0, 1) for i in range(38) for j in range(38))  # fmt: skip
    assert codes(tokens[:, :2], 3, 4).shape == (2, 0)


def test_hits_by_a_loop():
    rng = np.random.default_rng(1)
    windows, train = rng.integers(3, size=(5, 21)), rng.integers(3, size=300)
    found = slices_of(windows, train, SlicesConfig(frequent=4), 4, 3)
    text = "".join(map(str, train))
    for row, window in enumerate(windows):
        word = "".join(map(str, window))
        for t in range(20):  # the target at t is word[t + 1]
            gram = word[t - 2 : t + 2] if t >= 2 else None
            hit = gram is not None and gram in word[: t + 1]
            often = hit and sum(text.startswith(gram, i) for i in range(300)) >= 4
            marks = [found[name][row, t] for name in ("recall hits", "frequent hits", "rare hits", "no hits")]
            assert marks == [hit, often, hit and not often, not hit]


def test_counts():
    assert counts_in(np.array([1, 2, 1, 2, 1]), codes(np.array([1, 2, 0]), 2, 3), 2, 3).tolist() == [2, 0]
    assert counts_in(np.array([1]), np.array([5]), 2, 3).tolist() == [0]
    assert seen_before(np.array([[3, 4, 3, 3], [4, 3, 5, 6]])).tolist() == [[False, False, True, True], [False] * 4]


def test_bins_cover_a_window():
    assert list(bins(100)) == ["positions 1 to 8", "positions 9 to 32", "positions 33 to 100"]
    assert list(bins(8).values()) == [slice(0, 8)]


def test_the_table_of_two_runs(shakespeare, trained, tmp_path, capsys):
    """Losses are the model's, slices add up to the whole, and shares of the gain to 1."""
    assert run_here(*flags(shakespeare, tmp_path / "b", max_iters=1)) == 0
    capsys.readouterr()
    slices.main([f"--out_dir={trained}", f"--against={tmp_path / 'b'}", "--tokens=400", "--frequent=100"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    table = {line[0]: line[1:] for line in lines}
    model, data = open_run(trained)
    tokens = torch.from_numpy(open_split(data, "val", load_meta(data))[:400].astype(np.int64))
    losses = []
    for i in range(24):
        window = tokens[16 * i : 16 * i + 17]
        losses.append(F.cross_entropy(model(window[None, :-1], window[None, 1:])[0][0], window[1:], reduction="none"))
    losses = torch.stack(losses)
    assert table["all"][1] == f"{losses.mean():.4f}" and table["positions 1 to 8"][1] == f"{losses[:, :8].mean():.4f}"
    share = {name: [float(cell.strip("%")) for cell in (row[0], row[4])] for name, row in table.items() if row[4]}
    for parts in (["positions 1 to 8", "positions 9 to 16"], ["recall hits", "no hits"]):
        assert np.sum([share[part] for part in parts], 0) == pytest.approx([100, 100], abs=0.25)
    assert table["shuffled windows"][0] == "" and float(table["shuffled windows"][1]) > 0


@pytest.mark.parametrize("words, told", [
    (["--out_dir=nowhere"], "no checkpoint there"),
    (["--gram=1"], "gram=1"),
    (["--gram=12"], "too long for"),
    (["--tokens=10"], "a window takes 17"),
])  # fmt: skip
def test_refuses_in_one_line(words, told, trained, capsys):
    words = words if words[0].startswith("--out_dir") else [f"--out_dir={trained}", *words]
    with pytest.raises(SystemExit, match="2"):
        slices.main(words)
    error = capsys.readouterr().err
    assert error.startswith("lab.slices: error: ") and told in error and error.count("\n") == 1
