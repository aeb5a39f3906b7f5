"""Loss beyond the trained context: by a plain loop over positions, and what has no positions there."""

import pytest
import torch
from torch.nn import functional as F

from data.corpus import load_meta, open_split
from helpers import flags, run_here
from lab import lengths
from model import GPT, load_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("given", [{"pos_embedding": "rope"}, {"pos_embedding": "none", "use_ferope": True,
                                   "use_block_sparse": True, "anchor_min_gap": 5, "anchor_jitter": 3}])  # fmt: skip
def test_losses_by_position(given, shakespeare, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_here(*flags(shakespeare, out, max_iters=3, **given)) == 0
    lengths.main([str(out), "--tokens=300", f"--image={tmp_path / 'x.png'}", "--longest=2"])
    line = capsys.readouterr().out.splitlines()[-1]
    model = GPT.from_checkpoint(load_checkpoint(out / "ckpt.pt")).eval()
    tokens = torch.from_numpy(open_split(shakespeare, "val", load_meta(shakespeare))[:300].astype("int64"))
    model.extend_block_size(32)
    each = []
    for start in range(0, 299 - 31, 32):
        x, y = tokens[start : start + 32][None], tokens[start + 1 : start + 33][None]
        each.append(F.cross_entropy(model(x, y)[0][0], y[0], reduction="none"))
    mean = torch.stack(each).mean(0).detach()
    assert f"{mean.mean():.3f}, {mean[-16:].mean():.3f} |" in line and (tmp_path / "x.png").stat().st_size > 1000


def test_a_learned_table_ends(shakespeare, tmp_path, capsys):
    assert run_here(*flags(shakespeare, tmp_path / "out", max_iters=1)) == 0
    capsys.readouterr()
    lengths.main([str(tmp_path / "out"), "--tokens=300"])
    assert capsys.readouterr().out.splitlines()[0] == "| run | 16: all, last |"
    with pytest.raises(SystemExit, match="2"):
        lengths.main([str(tmp_path)])
