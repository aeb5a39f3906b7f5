"""A model as a Hugging Face directory: transformers gets the same numbers and the same text, without this checkout."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import sample
import train
from data.corpus import build_tokenizer, write_dataset
from helpers import LINES, flags, gpt2, run_here
from lab import export
from model import GPT, GPTConfig, load_checkpoint
from smoke_test import VARIANTS, build

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
write_tokenizer = pytest.importorskip("data.fast_tokenizers").write_tokenizer
pytestmark = pytest.mark.slow

TEXT = "".join(LINES)
HARD = "na\u00efve \u2581\u2581 caf\u00e9 \u65e5\u672c \U0001f642 \x00\x07\r\n</s><pad><unk><0x41><|endoftext|>"
HARD += " don't  123\t\tx \n\n  "

ALONE = """
import os
import sys
folder, case = sys.argv[1:]
sys.path = [path for path in sys.path if not os.path.exists(os.path.join(path, "smoke_test.py"))]  # pip install -e
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
given = torch.load(case)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    found = model(given["idx"], labels=given["idx"])
text = model.generate(given["idx"][:, :4], max_new_tokens=40, do_sample=False)
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"model", "kernels", "configurator", "data", "lab"})
torch.save({"logits": found.logits, "loss": found.loss, "text": text, "loaded": loaded}, case)
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """transformers copies the code that it runs to a folder: here, to one of the test's own."""
    from transformers import dynamic_module_utils

    with torch.device("cpu"):  # torch caches its constructors at the first such call; while transformers loads a model,
        torch.zeros(0)  # linspace is one of transformers' own, and cached then, torch.device("meta") would miss torch's
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(tmp_path / "modules")]


def shaken(name):
    """A model of a row, in which every bias and gain counts, and tokens for it."""
    model, idx = build(VARIANTS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval(), idx


@torch.no_grad()
def expected(model, idx):
    """Logits, the loss by Hugging Face's shift, and 40 greedy tokens, beyond the block."""
    logits = model(idx, idx)[0]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    return logits, loss, model.generate(idx[:, :4], 40, temperature=0)


def auto(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how).eval()


@pytest.fixture(scope="session")
def rms(tmp_path_factory):
    """(model with a tied head, tokens, its export): folding takes seconds."""
    model, idx = shaken("rms")
    folder = tmp_path_factory.mktemp("rms") / "hf"
    model.export_hf(folder)
    return model, idx, folder


@pytest.fixture
def exported(rms, tmp_path):
    """A copy of that export, to be damaged."""
    shutil.copytree(rms[2], tmp_path / "hf")
    return tmp_path / "hf"


def same(model, idx, folder):
    """Assert that transformers computes what the model does, and that its weights come back."""
    is_folded = (folder / "modeling_nanochimera.py").exists()
    again = GPT.from_pretrained(folder).state_dict()
    assert again.keys() == model.state_dict().keys() or not is_folded  # GPT-2 has biases, zeros where ours has none
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value) if torch.is_tensor(value) else again[name] == value, name
    logits, loss, text = expected(model, idx)
    other = auto(folder)
    with torch.no_grad():
        found = other(idx, labels=idx)
        last = other(idx, logits_to_keep=1).logits[:, -1]
    for got, want in ((found.logits, logits), (last, logits[:, -1]), (found.loss, loss)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    if is_folded:  # GPT-2's own class computes in another order, and has no window that slides
        assert torch.equal(found.logits, logits)
        assert torch.equal(other.generate(idx[:, :4], max_new_tokens=40, do_sample=False), text)
        assert other.gpt.config.block_size == model.config.block_size


def test_transformers_computes_the_same(rms):
    same(*rms)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_computes_the_same(name, tmp_path):
    model, idx = shaken(name)
    model.export_hf(tmp_path / "hf")
    same(model, idx, tmp_path / "hf")


@pytest.mark.parametrize("name", ["short_conv_waves", "bio_adaptive", "sdr", "ferope_anchored"])
def test_without_the_checkout(name, tmp_path, monkeypatch):
    model, idx = shaken(name)
    model.export_hf(tmp_path / "hf")
    torch.save({"idx": idx}, tmp_path / "case.pt")
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "hf"), str(tmp_path / "case.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found, (logits, loss, text) = torch.load(tmp_path / "case.pt"), expected(model, idx)
    assert found["loaded"] == [] and torch.equal(found["text"], text)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["loss"], loss)


def test_what_the_wrapper_does(tmp_path):
    """Labels, the objective in training, sampling, formats, and what it refuses."""
    model, idx = shaken("short_conv_waves")
    model.export_hf(tmp_path / "hf")
    other = auto(tmp_path / "hf")
    labels = idx.clone()
    labels[:, :20] = -100
    want = F.cross_entropy(model(idx, idx)[0][:, 19:-1].flatten(0, 1), idx[:, 20:].flatten())
    torch.testing.assert_close(other(idx, labels=labels).loss, want)
    assert other(idx, labels=labels, return_dict=False)[0] == other(idx, labels=labels).loss
    other.train()(idx, labels=idx).loss.backward()
    assert all(p.grad is not None for p in other.parameters())
    other.eval()
    torch.manual_seed(0)
    assert other.generate(idx[:2, :3], max_new_tokens=5, do_sample=True, num_return_sequences=2).shape == (4, 8)
    uncached = other.generate(idx[:, :4], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(uncached, model.generate(idx[:, :4], 8, temperature=0))
    mask = torch.ones_like(idx)
    mask[0, 20:] = 0
    assert torch.equal(other(idx, attention_mask=mask).logits, other(idx).logits)
    with pytest.raises(ValueError, match="padding on the left"):
        other(idx, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="only supports"):
        other.generate(idx[:, :4], max_new_tokens=4, num_beams=2)
    half = auto(tmp_path / "hf", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(idx).logits, model.bfloat16()(idx, idx)[0])
    other.save_pretrained(tmp_path / "again")  # what transformers writes can be read here too
    shutil.copy(tmp_path / "hf" / "modeling_nanochimera.py", tmp_path / "again")
    assert torch.equal(auto(tmp_path / "again")(idx).logits, other(idx).logits)
    GPT.from_pretrained(tmp_path / "again")


def test_a_tied_pair_is_written_once(rms):
    model, _, folder = rms
    assert model.lm_head.weight is model.transformer.wte.weight
    names = safetensors.load_file(folder / "model.safetensors").keys()
    assert "gpt.transformer.wte.weight" in names and "gpt.lm_head.weight" not in names
    other = auto(folder)
    assert other.gpt.lm_head.weight is other.gpt.transformer.wte.weight
    again = GPT.from_pretrained(folder, dropout=0.1)
    assert again.lm_head.weight is again.transformer.wte.weight and again.config.dropout == 0.1


# -- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "sentencepiece"])
def test_tokenizers_agree(kind, tmp_path):
    ours = gpt2() if kind == "gpt2" else build_tokenizer(kind, TEXT, HARD, 350)
    write_tokenizer(ours, tmp_path, 32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (ours.vocab_size, ours.eot)
    rng = random.Random(0)
    texts = [TEXT, "", "x", HARD.replace("<pad><unk><0x41>", "")] + [
        "".join(rng.choices(TEXT, k=40)) for _ in range(50)
    ]
    for text in texts:
        if kind == "char":
            text = "".join(c for c in text if c in ours.ids)
        ids = theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ids) == ours.decode(ids) == text
        if kind == "sentencepiece":  # equally likely pieces, of which rounding chooses
            score = [sum(map(ours.sp.get_score, x)) for x in (ids, ours.encode(text))]
            assert score[0] == pytest.approx(score[1], rel=1e-6)
        else:
            assert ids == ours.encode(text)
    hard = theirs.encode(HARD, add_special_tokens=False)  # names of special tokens are text
    assert theirs.decode(hard) == HARD
    assert not {ours.eot} & set(hard)
    if kind == "char":
        with pytest.raises(Exception, match="Missing"):
            theirs.encode("\u0416")


# -- the command --------------------------------------------------------------------------------------------------


def data_of(kind, folder):
    tokenizer = gpt2() if kind == "gpt2" else build_tokenizer(kind, TEXT, TEXT, 350)
    write_dataset(folder, TEXT * 3, TEXT, tokenizer, folder.name, "tests", "0" * 64)
    return tokenizer


def refused(main, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize(
    "kind, given",
    [
        ("char", {}),
        ("char", {"attn_mode": "fhn"}),
        ("byte", {"use_bio_mlp": True}),
        ("sentencepiece", {"pos_embedding": "rope"}),
        ("gpt2", {"use_kan": True, "n_embd": 8}),
    ],
)
def test_a_run_from_end_to_end(kind, given, tmp_path, capsys, monkeypatch):
    """Trained, exported, loaded by transformers, sampled from, trained on."""
    data, out, hf = tmp_path / kind, tmp_path / "out", tmp_path / "hf"
    ours = data_of(kind, data)
    assert run_here(*flags(data, out, **given)) == 0
    export.main([f"--out_dir={out}", f"--to={hf}"])
    checkpoint = load_checkpoint(out / "ckpt.pt")
    shutil.rmtree(data)  # what follows needs the directory alone
    text = (hf / "README.md").read_text()
    run = json.loads((out / "run.json").read_text())
    for fact in (f"| data set | {kind} (tokenizer {kind}, ", f"{checkpoint['best_val_loss']:.4f} nats per token",
                 " of 6 steps, ", run["git_commit"], torch.__version__, "float32 on ", "bits per byte",
                 *(f"{name}={value!r}" for name, value in given.items() if name != "n_embd")):  # fmt: skip
        assert fact in text, fact
    parameters = sum(p.numel() for p in GPT.from_checkpoint(checkpoint).parameters())
    assert f"| parameters | {parameters:,} |" in text and (not given) == ("trust_remote_code" not in text)
    other, tokenizer = auto(hf), transformers.AutoTokenizer.from_pretrained(hf)
    idx = tokenizer("ROMEO: ", return_tensors="pt").input_ids
    assert idx[0].tolist() == ours.encode("ROMEO: ")
    model = GPT.from_checkpoint(checkpoint).eval()
    want = model.generate(idx, 8, temperature=0, known_ids=ours.vocab_size)
    assert torch.equal(other.generate(idx, max_new_tokens=8, do_sample=False), want[:, : idx.size(1) + 8])
    capsys.readouterr()
    words = ["--start=ROMEO: ", "--max_new_tokens=8", "--temperature=0", "--device=cpu", "--raw"]
    sample.main([f"--init_from={hf}", *words])
    assert capsys.readouterr().out.startswith(ours.decode(want[0].tolist()).rstrip())
    data_of(kind, data)
    assert run_here(*flags(data, tmp_path / "more", init_from=hf, max_iters=1, **given)) == 0
    other_data = tmp_path / "other"
    data_of("byte" if kind != "byte" else "char", other_data)
    capsys.readouterr()
    assert run_here(*flags(other_data, tmp_path / "no", init_from=hf)) == 2
    assert "its tokens are not those of" in capsys.readouterr().err


def test_errors_are_one_line(trained, tmp_path, capsys):
    hf = tmp_path / "hf"
    assert "name the directory" in refused(export.main, [f"--out_dir={trained}"], capsys)
    assert "no such checkpoint" in refused(export.main, [f"--out_dir={tmp_path}", f"--to={hf}"], capsys)
    full = tmp_path / "full"
    full.mkdir()
    (full / "README.md").write_text("mine")
    assert "holds other files" in refused(export.main, [f"--out_dir={trained}", f"--to={full}"], capsys)
    assert "is a file" in refused(export.main, [f"--out_dir={trained}", f"--to={full / 'README.md'}"], capsys)
    assert (full / "README.md").read_text() == "mine"
    (full / "ckpt.pt").write_text("no checkpoint")
    assert "lab.export: error: " in refused(export.main, [f"--out_dir={full}", f"--to={hf}"], capsys)


def damage(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "unknown":
        config["flags"]["use_magic"] = True
    if how == "flags":
        del config["flags"]
    if how == "other":
        config["flags"]["n_layer"] = 3
    (folder / "config.json").write_text("{" if how == "json" else json.dumps(config))
    if how == "weights":
        (folder / "model.safetensors").unlink()
    if how == "truncated":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "how, told",
    [
        ("unknown", "flags this version does not know: use_magic"),
        ("flags", "has no flags"),
        ("other", "does not fit its own flags"),
        ("json", "damaged"),
        ("weights", "has no model.safetensors"),
        ("truncated", "damaged"),
    ],
)
def test_a_damaged_directory(how, told, exported, capsys):
    damage(exported, how)
    last = refused(sample.main, [f"--init_from={exported}", "--device=cpu"], capsys)
    assert last.startswith("sample.py: error: ") and told in last and str(exported) in last


def test_what_cannot_be_folded_is_refused(tmp_path, monkeypatch):
    def cannot(*words, **more):
        raise export.ConfigError("cannot be folded: the model would still need 'import scipy'")

    monkeypatch.setattr(export.specialise, "text", cannot)
    with pytest.raises(ValueError, match="cannot be folded"):
        GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=1, n_embd=8, norm="rms")).export_hf(
            tmp_path / "hf"
        )
    assert not (tmp_path / "hf").exists()


def test_a_skill_has_no_text(tmp_path):
    assert export.tokenizer_of({"tokenizer": "skills/mqar", "vocab_size": 64}, tmp_path) is None
    assert train.has_tokenizer(tmp_path) is False
