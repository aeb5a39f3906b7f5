"""What an installation leaves behind and what it needs; the model in Python, in torch.export and in ONNX."""

import json
import pydoc
import subprocess
import sys
import zipfile
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from helpers import ROOT, flags
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow

BARE = """
import runpy, sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {root!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MISSING = ["tqdm", "tiktoken", "triton", "sentencepiece", "scipy", "matplotlib", "transformers", "safetensors"]


def bare(*words, missing=MISSING):
    """A script run where only torch and numpy are installed, as far as it can tell."""
    code = BARE.format(missing=missing, root=str(ROOT))
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("mixer", ["softmax", "fhn"])
def test_torch_and_numpy_are_enough_for_a_model_of_characters(mixer, shakespeare, tmp_path):
    position = "none" if mixer == "fhn" else "learned"
    words = flags(shakespeare, tmp_path, attn_mode=mixer, pos_embedding=position)
    done = bare(ROOT / "train.py", *words)
    assert done.returncode == 0 and "step 6: train_loss" in done.stdout, done.stderr
    done = bare(ROOT / "sample.py", f"--out_dir={tmp_path}", f"--data_dir={shakespeare.parent}", "--max_new_tokens=5",
                "--num_samples=1", "--device=cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_missing_tokenizer_is_one_line(tmp_path):
    (tmp_path / "own.txt").write_text("To be, or not to be. " * 50)
    words = [tmp_path / "own.txt", "--tokenizer=gpt2", f"--out_dir={tmp_path / 'own'}"]
    done = bare(ROOT / "data/prepare.py", *words)
    assert done.returncode == 2 and "pip install tiktoken" in done.stderr and done.stderr.count("\n") == 1


def test_the_installed_package_has_no_modules(tmp_path):
    """`pip install .` brings dependencies: names such as model, train and data stay out of site-packages."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    source = tmp_path / "checkout"
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{ROOT}", source], check=True)
    (source / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run([*pip, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert {name.split("/")[0] for name in files.namelist()} == {"nanochimera-0.1.0.dist-info"}


def test_an_editable_installation_puts_the_checkout_on_the_path(tmp_path):
    try:
        url = json.loads(distribution("nanochimera").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        pytest.skip("not installed")
    if not url.get("dir_info", {}).get("editable") or url["url"] != ROOT.as_uri():
        pytest.skip("this checkout is not what is installed")
    code = "import sys; print(*[path for path in sys.path if path])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) in done.stdout.split()


def test_help_in_python_shows_flags_and_their_meanings():
    text = pydoc.plain(pydoc.render_doc(GPTConfig))
    for field in fields(GPTConfig):
        assert f"--{field.name}=" in text
    assert "longest context in tokens" in text and "[needs" in text


LENGTH = torch.export.Dim("T", min=3, max=64)
EXPORTED = [
    {},
    {"norm": "rms", "qk_norm": True, "pos_embedding": "rope", "mlp_act": "relu2", "short_conv": 4},
    {"attn_mode": "fhn", "pos_embedding": "none"},
    {"attn_mode": "fhn", "pos_embedding": "none", "fhn_dynamics": "linear"},
]


def small(given):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=32, **given)).eval()


def texts(model):
    """Inputs of several lengths with the model's own logits."""
    for T in (3, 17, 64):
        idx = torch.randint(65, (2, T), generator=torch.Generator().manual_seed(T))
        with torch.no_grad():
            yield idx, model(idx)[0]


@pytest.mark.parametrize("given", EXPORTED, ids=lambda given: "-".join(map(str, given.values())) or "plain")
def test_torch_export_with_any_length(given):
    model = small(given)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.zeros(2, 16, dtype=torch.long),), dynamic_shapes={"idx": {1: LENGTH}}
        )
    for idx, logits in texts(model):
        torch.testing.assert_close(program.module()(idx)[0], logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", EXPORTED[:2], ids=["plain", "modern"])
def test_onnx_with_any_length(given, tmp_path):
    """Waves have none: ONNX knows no operator for their scan (docs/troubleshooting.md)."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = small(given)
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 16, dtype=torch.long),),
            dynamic_shapes={"idx": {1: LENGTH}},
            dynamo=True,
            verbose=False,
        )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for idx, logits in texts(model):
        (got,) = session.run(None, {session.get_inputs()[0].name: idx.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), logits, rtol=0, atol=1e-5)
