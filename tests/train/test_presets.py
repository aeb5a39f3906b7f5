"""Every preset and every ablation config trains; the sizes that the documents print are true."""

import json
import math
import re

import pytest
import torch

import configurator
import model as model_module
from data.dataset import TokenDataset
from helpers import ROOT, history, run_here
from model import GPT, Cells, GPTConfig, SpectralDecomposition
from train import TrainConfig, Trainer, World, build_model

pytestmark = pytest.mark.slow

RECIPE = "config/train_shakespeare_char_cpu.py"
SIZES = {  # parameters, with 65 characters and with GPT-2's vocabulary
    "nano": (1_435_913, 104_325_385),
    "shakespeare_char": (12_425_749, 63_870_485),
    "small": (87_761_208, 126_344_760),
    "medium": (309_107_840, 360_552_576),
    "cortex": (15_736_710, 35_028_486),
    "localgpt": (10_646_784, 29_938_560),
    "wigglegpt_8gb": (63_766_288, 83_058_064),
    "wigglegpt_v2_8gb": (26_017_536, 45_309_312),
}
LARGE = ("small", "medium", "small_baseline", "medium_baseline")  # never trained here in their own size
PRESETS = {path.stem: path for path in sorted((ROOT / "config/presets").glob("*.py"))}
SMALL = [path for name, path in PRESETS.items() if name not in LARGE]
CONFIGS = SMALL + sorted((ROOT / "config/ablation").glob("*.py"))
SHORT = ("--max_iters=5", "--batch_size=1", "--gradient_accumulation_steps=1", "--block_size=64")


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_trains_for_five_steps(config, shakespeare):
    words = [RECIPE, str(config), *SHORT, f"--data_dir={shakespeare.parent}", "--dtype=float32", "--eval_iters=1"]
    settings = configurator.read(words, TrainConfig, GPTConfig)
    cfg = settings.build(TrainConfig, eval_full=False)
    torch.manual_seed(cfg.seed)
    data = TokenDataset(cfg)
    trainer = Trainer(cfg, build_model(settings, None, data), data, World("cpu", "gloo"), torch.float32)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    losses = [trainer.step()[0].item() for _ in range(cfg.max_iters)]
    assert all(map(math.isfinite, losses)) and math.isfinite(trainer.evaluate()["val_loss"])
    assert trainer.iter_num == 5
    assert any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before))


@pytest.mark.parametrize("name", PRESETS)
def test_trains_from_its_own_file_alone(name, shakespeare, tmp_path, capsys):
    """20 steps, with nothing before the preset but where the data lie; the large ones in a smaller shape."""
    words = [PRESETS[name], f"--data_dir={shakespeare.parent}", "--dataset=shakespeare_char", f"--out_dir={tmp_path}"]
    words += ["--max_iters=20", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1", "--device=cpu"]
    words += ["--eval_interval=20", "--dtype=float32", "--compile=False", "--eval_full=False", "--warmup_iters=1"]
    given = configurator.read([str(PRESETS[name])], TrainConfig, GPTConfig)
    assert given.values["init_from"] == "auto" and given.values["sample_interval"] and given.values["out_dir"] != "out"
    if given.values["n_embd"] > 128 or given.values["block_size"] > 64:
        words += ["--n_layer=3", "--n_head=2", "--n_embd=32", "--block_size=64"]
    words += (
        ["--sample_interval=20", "--curriculum_iters=14"] if given.values["curriculum"] else ["--sample_interval=10"]
    )
    words += ["--lr_decay_iters=none", "--min_lr=none"]
    assert run_here(*words) == 0, capsys.readouterr().err
    losses = [x["val_loss"] for x in history(tmp_path) if "val_loss" in x]
    assert math.isfinite(losses[-1]) and len(losses) == 2
    assert run_here(*words) == 0 and "nothing to do: 20 of max_iters=20" in capsys.readouterr().out


@pytest.mark.parametrize("without", ["no_sdr", "swiglu_for_kan", "softmax_for_fhn"])
def test_the_systems_ablations_by_name(without):
    words = [str(PRESETS["shakespeare_char"]), str(ROOT / f"config/ablation/{without}.py")]
    config = configurator.read(words, TrainConfig, GPTConfig).build(GPTConfig)
    assert not {"no_sdr": config.use_sdr, "swiglu_for_kan": config.use_kan, "softmax_for_fhn": config.has("has_waves")}[
        without
    ]


def build_on_meta(name, monkeypatch, **overrides):
    def cells_on_cpu(*args):  # which cell may look at which is worked out from numbers
        with torch.device("cpu"):
            return Cells(*args)

    monkeypatch.setattr(model_module, "Cells", cells_on_cpu)
    monkeypatch.setattr(SpectralDecomposition, "refresh", lambda self: None)  # eigenvectors of real numbers
    config = configurator.read([str(PRESETS[name])], TrainConfig, GPTConfig).build(GPTConfig, **overrides)
    with torch.device("meta"):
        return GPT(config)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, monkeypatch):
    text = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    line = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1]
    size, block, *counts, memory = (part.strip() for part in line.split("|"))
    for vocabulary, count, said in zip((65, 50304), SIZES[name], counts, strict=True):
        model = build_on_meta(name, monkeypatch, vocab_size=vocabulary)
        assert all(p.is_meta for p in model.parameters())
        assert model.num_params() == count and said == f"{count:,}"
    c = model.config
    assert (size, block) == (f"{c.n_layer} / {c.n_head} / {c.n_embd}", str(c.block_size))
    fixed, batch, kept, whole = re.fullmatch(r"(\S+ .B) \+ (\d+) x (\S+ .B) = (\S+ .B)", memory).groups()
    assert int(batch) == configurator.read([str(PRESETS[name])], TrainConfig, GPTConfig).values["batch_size"]
    data = configurator.read([str(PRESETS[name])], TrainConfig, GPTConfig).values["dataset"]
    model = build_on_meta(name, monkeypatch, vocab_size=65 if data == "shakespeare_char" else 50304)
    assert bytes_of(fixed) == pytest.approx(16 * sum(p.numel() for p in model.parameters()), rel=0.03)
    assert bytes_of(whole) == pytest.approx(bytes_of(fixed) + int(batch) * bytes_of(kept), rel=0.05)


def bytes_of(text):
    number, unit = text.split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]


def test_the_first_chimera_is_the_first_searchs_winner():
    """The preset trains what the measured row trained."""
    records = map(json.loads, (ROOT / "docs/results/ablation.jsonl").read_text(encoding="utf-8").splitlines())
    asked = [record["asked"] for record in records if record["asked"]["row"] == "linear_3x148_omega3"]
    assert len(asked) >= 3
    for run in asked:
        rest = [f"--learning_rate={run['learning_rate']}", f"--seed={run['seed']}", "--eval_full=True"]
        preset = configurator.read([*run["recipe"], "config/ablation/chimera_m0.py", *rest], TrainConfig, GPTConfig)
        defaults = configurator.read([], TrainConfig, GPTConfig).values
        own = {"out_dir": preset.values["out_dir"], "learning_rate": run["learning_rate"]}
        assert preset.values == defaults | run["settings"] | own


def test_chimera_is_the_modern_searchs_winner():
    """The preset is the row of the best mean over three seeds, flags and rates."""
    records = map(json.loads, (ROOT / "docs/results/modern-muon.jsonl").read_text(encoding="utf-8").splitlines())
    means = {}
    for record in records:
        if record["asked"]["row"].startswith("conv_") and record["asked"]["learning_rate"] == 0.009:
            means.setdefault(record["asked"]["row"], []).append(record)
    means = {row: runs for row, runs in means.items() if len(runs) >= 3}
    best = min(means, key=lambda row: sum(run["evaluations"][-1]["val_loss"] for run in means[row]) / len(means[row]))
    words = [
        "config/train_shakespeare_char_cpu.py",
        "config/presets/modern_muon.py",
        *means[best][0]["asked"]["text"].split(),
    ]
    row = configurator.read(words, TrainConfig, GPTConfig).values
    preset = configurator.read(
        ["config/train_shakespeare_char_cpu.py", "config/presets/chimera.py"], TrainConfig, GPTConfig
    )
    assert preset.values == row | {"out_dir": preset.values["out_dir"]}
