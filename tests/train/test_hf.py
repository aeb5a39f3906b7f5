"""GPT-2 in Hugging Face's format: read it, write it, train and sample from it, and refuse what is not GPT-2."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch

import sample
import train
from helpers import SHARED
from model import GPT, GPTConfig, write_gpt2

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SMALL = {"vocab_size": 64, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}


def random_gpt2(**config):
    """A Hugging Face GPT-2 in which every bias and gain counts."""
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL | {"bos_token_id": None, "eos_token_id": None} | config)
    ).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return hf


@pytest.fixture
def gpt2(tmp_path):
    """(model, its folder)"""
    hf = random_gpt2()
    hf.save_pretrained(tmp_path / "gpt2")
    assert (tmp_path / "gpt2" / "model.safetensors").is_file()
    return hf, str(tmp_path / "gpt2")


def tokens(V=64):
    return torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, idx):
    return model(idx).logits if isinstance(model, transformers.GPT2LMHeadModel) else model.eval()(idx, idx)[0]


# -- reading ------------------------------------------------------------------------------------------------------


def test_from_pretrained(gpt2):
    hf, folder = gpt2
    model = GPT.from_pretrained(folder)
    assert model.config == GPTConfig(
        block_size=16, vocab_size=64, n_layer=2, n_head=3, n_embd=12, mlp_act="gelu_tanh", bias=True, dropout=0.0
    )
    assert logits(hf, tokens()).std() > 0.1
    torch.testing.assert_close(logits(model, tokens()), logits(hf, tokens()), rtol=0, atol=1e-4)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert GPT.from_pretrained(folder, dropout=0.3).config.dropout == 0.3


@pytest.mark.parametrize("theirs, ours", [("gelu", "gelu"), ("relu2", "relu2")])
def test_activations(tmp_path, theirs, ours):
    hf = random_gpt2(activation_function=theirs)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert model.config.mlp_act == ours
    torch.testing.assert_close(logits(model, tokens()), logits(hf, tokens()), rtol=0, atol=1e-4)


def test_half_precision_weights_become_float32(tmp_path):
    random_gpt2().bfloat16().save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wte = safetensors.load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]
    assert wte.dtype == torch.bfloat16 and torch.equal(model.transformer.wte.weight, wte.float())


@pytest.mark.parametrize(
    "config, named",
    [
        ({"n_inner": 20}, "n_inner=20"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_not_plain_gpt2_is_refused(tmp_path, config, named):
    random_gpt2(**config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        GPT.from_pretrained(str(tmp_path))


def test_the_usual_inner_width_may_be_written_out(tmp_path):
    random_gpt2(n_inner=48).save_pretrained(tmp_path)
    assert GPT.from_pretrained(str(tmp_path)).config.n_embd == 12


def test_another_model_type_is_refused(tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=12, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt_neox"):
        GPT.from_pretrained(str(tmp_path))


def test_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gpt5: neither gpt2, gpt2-medium, gpt2-large, gpt2-xl nor a directory"):
        GPT.from_pretrained("gpt5")
    with pytest.raises(OSError):
        GPT.from_pretrained(str(tmp_path))  # nothing in it


def spoil(folder, how):
    """Damage a saved model."""
    file = os.path.join(folder, "model.safetensors")
    weights = safetensors.load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    if how == "truncated":
        with open(file, "r+b") as f:
            f.truncate(os.path.getsize(file) // 2)
        return
    if how == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:, :7].clone()
    safetensors.save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["truncated", "missing", "misshapen"])
def test_damaged_weights_are_refused(gpt2, how):
    """transformers fills a missing tensor with random numbers: nobody would notice."""
    spoil(gpt2[1], how)
    with pytest.raises((ValueError, OSError)):
        GPT.from_pretrained(gpt2[1])


# -- writing ------------------------------------------------------------------------------------------------------


def random_model(**flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=3, n_embd=12, **flags))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


@pytest.mark.parametrize(
    "flags",
    [{}, {"bias": False}, {"mlp_act": "gelu_tanh"}, {"mlp_act": "relu2", "bias": False}, {"dropout": 0.2}],
    ids=str,
)
def test_export(tmp_path, flags):
    model = random_model(**flags)
    model.export_hf(str(tmp_path))
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(hf, tokens()), logits(model, tokens()), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert config["resid_pdrop"] == config["attn_pdrop"] == config["embd_pdrop"] == flags.get("dropout", 0.0)
    again = GPT.from_pretrained(str(tmp_path), dropout=model.config.dropout).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.pop(name), weight), name
    assert not any(w.any() for w in again.values())  # biases that it does not have are zeros
    assert bool(again) == ("bias" in flags)


def test_round_trip_of_the_config(tmp_path):
    model = random_model(mlp_act="gelu_tanh", dropout=0.1)
    model.export_hf(str(tmp_path))
    assert GPT.from_pretrained(str(tmp_path), dropout=0.1).config == model.config


def test_what_gpt2_lacks_is_written_with_its_own_code(tmp_path):
    model = random_model(pos_embedding="none")
    with pytest.raises(ValueError, match="pos_embedding"):
        write_gpt2(model, tmp_path / "x")
    model.export_hf(tmp_path)  # tests/lab/test_export.py: what it is worth
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "nanochimera" and config["flags"]["pos_embedding"] == "none"


# -- train.py and sample.py ---------------------------------------------------------------------------------------


def test_train_from_a_folder(gpt2, shakespeare, tmp_path, cli):
    hf, folder = gpt2
    out = tmp_path / "out"
    done = cli(
        "train.py", f"--init_from={folder}", f"--data_dir={shakespeare.parent}", f"--dataset={shakespeare.name}",
        f"--out_dir={out}", "--max_iters=2", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_iters=1",
        "--block_size=8", "--dropout=0.1", "--learning_rate=1e-6", "--device=cpu", "--dtype=float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(out / "ckpt_last.pt", weights_only=True)
    assert checkpoint["iter_num"] == 2
    args = {"block_size": 8, "vocab_size": 64, "mlp_act": "gelu_tanh", "dropout": 0.1, "bias": True, "n_layer": 2}
    assert checkpoint["model_args"].items() >= args.items()
    start = hf.state_dict()["transformer.h.1.mlp.c_fc.weight"].T
    trained = checkpoint["model"]["transformer.h.1.mlp.c_fc.weight"]
    assert 0 < (trained - start).abs().max() < 1e-4  # two tiny steps away from the weights it began with


def words(shakespeare, script, init_from, tmp_path):
    data = ["--max_iters=1", f"--data_dir={shakespeare.parent}", f"--dataset={shakespeare.name}"]
    return [script, f"--init_from={init_from}", "--device=cpu", *(data if script == "train.py" else []),
            f"--out_dir={tmp_path / 'out'}"]  # fmt: skip


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_gpt2_without_a_network(script, shakespeare, tmp_path, cli):
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    data = tmp_path / "bpe"  # GPT-2's weights are refused for other tokens before anything is asked of a network
    data.mkdir()
    for split in ("train", "val"):
        np.arange(2000, dtype=np.uint16).tofile(data / f"{split}.bin")
    done = cli(*words(data, script, "gpt2", tmp_path), env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{script}: error: --init_from=gpt2: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(capsys):
    """refused(main, words) -> the last line of a script that ends with exit status 2, run in this process."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    precision = torch.get_float32_matmul_precision()

    def run(main, words):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        return capsys.readouterr().err.splitlines()[-1]

    yield run
    torch.set_float32_matmul_precision(precision)
    for n, handler in handlers.items():
        signal.signal(n, handler)


@pytest.mark.parametrize("how", ["truncated", "misshapen"])
def test_damaged_weights_on_the_command_line(gpt2, how, shakespeare, tmp_path, refused):
    spoil(gpt2[1], how)
    for main, script in ((train.main, "train.py"), (sample.main, "sample.py")):
        last = refused(main, words(shakespeare, script, gpt2[1], tmp_path)[1:])
        assert last.startswith(f"{script}: error: --init_from={gpt2[1]}: ")


@pytest.mark.parametrize(
    "flag", ["--block_size=0", "--block_size=-1", "--block_size=17", "--n_layer=3", "--bias=False"]
)
def test_flags_that_contradict_the_weights(gpt2, flag, shakespeare, tmp_path, refused):
    last = refused(train.main, [*words(shakespeare, "train.py", gpt2[1], tmp_path)[1:], flag])
    assert last.startswith("train.py: error: ") and flag.split("=")[0][2:] in last


@pytest.fixture
def bpe(monkeypatch):
    """The real GPT-2 tokenizer, from the caller's cache or the one beside the repository."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        if not (SHARED / "tiktoken_cache").is_dir():
            pytest.skip("no GPT-2 tokenizer: set TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))


def test_sample_from_a_folder(bpe, tmp_path, cli):
    random_gpt2(vocab_size=50257, n_embd=6).save_pretrained(tmp_path)
    done = cli("sample.py", f"--init_from={tmp_path}", "--start=To be, or", "--max_new_tokens=20", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("To be, or") and done.stdout.endswith("\n---------------\n")
    assert "has no tokenizer, its 50257 ids are taken for GPT-2's" in done.stderr
    assert len(done.stdout) > 50
    assert "Traceback" not in done.stderr


def test_weights_without_a_tokenizer(gpt2, refused):
    last = refused(sample.main, [f"--init_from={gpt2[1]}", "--start=To be", "--device=cpu"])
    assert "has no tokenizer" in last


def test_without_transformers(gpt2, monkeypatch, shakespeare, tmp_path, refused):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    for main, script in ((train.main, "train.py"), (sample.main, "sample.py")):
        last = refused(main, words(shakespeare, script, gpt2[1], tmp_path)[1:])
        assert "pip install transformers safetensors" in last
