"""
A run as a Hugging Face directory that loads without this checkout: weights, code, tokenizer and model card.

    python -m lab.export --out_dir=OUT --to=DIR

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)  # runs modeling_nanochimera.py

A plain model becomes a GPT-2, which needs no code. Any other becomes the model folded for its flags (lab/specialise.py)
with a wrapper (lab/hf_wrapper.py). `python sample.py --init_from=DIR` and train.py read both. Needs
`pip install transformers safetensors`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import configurator
import sample
from configurator import ROOT, ConfigError
from data.corpus import TOKENIZERS, DataError, SentencePiece, load_tokenizer
from lab import specialise
from model import EXPORTED, GPT, LONGEST, CheckpointError, GPTConfig, beyond_gpt2, write_gpt2

CODE = "modeling_nanochimera"
CLASSES = {"AutoConfig": "NanoChimeraConfig", "AutoModelForCausalLM": "NanoChimeraForCausalLM"}
HEAD = '''"""
nanoChimera folded for the flags in `GPTConfig` below, by `python -m lab.export`; needs PyTorch and transformers.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
"""

from dataclasses import asdict

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
'''


@dataclass
class ExportConfig:
    """What to export, and where to."""

    # -- export -------------------------------------------------------------------------------------------------------
    out_dir: str = "out"  # the run's folder
    checkpoint: str = ""  # a file in out_dir; empty = ckpt.pt (best), else ckpt_last.pt
    data_dir: str = ""  # where the data set lies, for its tokenizer; empty = as in training
    to: str = ""  # the directory to write: a new or an empty one, or one of an earlier export

    def __post_init__(self):
        if not self.to:
            raise ValueError("name the directory to write: --to=DIR")


# ---------------------------------------------------------------------------------------------------------------------
# Weights, code, config.json.


def code_of(config):
    """modeling_nanochimera.py: the folded model, then the wrapper."""
    folded = specialise.text(config, name=CODE).split('"""\n', 2)[2]
    wrapper = (ROOT / "lab" / "hf_wrapper.py").read_text(encoding="utf-8")
    rule = f"\n\n{specialise.RULE}\n# As transformers expects a model.\n\n\n"
    return HEAD + folded + rule + wrapper[wrapper.index("class NanoChimeraConfig") :]


def config_of(model, special):
    """config.json of a folded model; `special`: ids of special tokens."""
    c = model.config
    window = model.max_positions and c.block_size * (1 if c.pos_embedding == "learned" else LONGEST)
    return {
        "architectures": [CLASSES["AutoModelForCausalLM"]], "model_type": EXPORTED,
        "auto_map": {name: f"{CODE}.{target}" for name, target in CLASSES.items()},
        "flags": asdict(c), "window": window, "vocab_size": c.vocab_size, "max_position_embeddings": c.block_size,
        "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "tie_word_embeddings": is_tied(model), "dtype": "float32", **special,
    }  # fmt: skip


def is_tied(model):
    table = getattr(model.transformer.wte, "weight", None)  # sparse codes have none
    return model.lm_head is not None and model.lm_head.weight is table


def weights_of(model):
    """The state dict as safetensors takes it: no two tensors in one memory, a tied matrix once."""
    found = {f"gpt.{name}": value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    if is_tied(model):
        del found["gpt.lm_head.weight"]
    return found


def write_folded(model, directory, special):
    """config.json, model.safetensors and modeling_nanochimera.py; ConfigError if the model cannot be folded."""
    from safetensors.torch import save_file

    code = code_of(model.config)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights_of(model), str(directory / "model.safetensors"), metadata={"format": "pt"})
    (directory / f"{CODE}.py").write_text(code, encoding="utf-8")
    write_json(directory / "config.json", config_of(model, special))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and generation_config.json.


def special_ids(tokenizer):
    """{"eos_token_id", "pad_token_id"} of one of our tokenizers, where it ends texts."""
    if tokenizer is None or tokenizer.eot is None:
        return {}
    return {"eos_token_id": tokenizer.eot, "pad_token_id": tokenizer.eot if tokenizer.name == "gpt2" else 0}


def write_text_files(model, directory, tokenizer, meta):
    """The tokenizer in Hugging Face's format and in ours, and what of the model's ids may be generated."""
    generation = special_ids(tokenizer)
    if tokenizer is not None:
        from data.fast_tokenizers import write_tokenizer

        write_tokenizer(tokenizer, directory, model.config.block_size)
        if "format" in (meta or {}):  # not nanoGPT's
            write_json(directory / "meta.json", meta)
        if isinstance(tokenizer, SentencePiece):
            (directory / "tokenizer.model").write_bytes(tokenizer.model)
        unknown = list(range(tokenizer.vocab_size, model.config.vocab_size))
        generation |= {"suppress_tokens": unknown} if unknown else {}
    write_json(directory / "generation_config.json", generation)


# ---------------------------------------------------------------------------------------------------------------------
# The card.


def facts_of(checkpoint, meta, out_dir):
    """What a checkpoint and its run's run.json and metrics.jsonl tell of the training: {name: words}."""
    out, cfg = Path(out_dir), checkpoint.get("config", {})
    run = json.loads((out / "run.json").read_text(encoding="utf-8")) if (out / "run.json").is_file() else {}
    found = {"data set": data_words(cfg, meta), "trained for": steps_words(checkpoint, cfg)}
    found["validation loss"] = loss_words(checkpoint.get("best_val_loss"), meta)
    found |= last_evaluation(out / "metrics.jsonl", checkpoint.get("iter_num"))
    if run:
        found["trained in"] = f"{run['dtype']} on {run['machine']['gpu'] or run['machine']['cpu']}"
        found["commit"] = run["git_commit"]
        found["versions"] = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    found["recipe"] = ", ".join(f"{k}={cfg[k]}" for k in RECIPE if k in cfg)
    return {name: words for name, words in found.items() if words}


RECIPE = ("optimizer", "learning_rate", "batch_size", "gradient_accumulation_steps", "weight_decay", "beta2", "seed")


def data_words(cfg, meta):
    meta = meta or {"tokenizer": "gpt2", "vocab_size": 50257}
    size = f", {meta['train_tokens']:,} tokens to train on" if "train_tokens" in meta else ""
    return f"{cfg.get('dataset', 'unknown')} (tokenizer {meta['tokenizer']}, {meta['vocab_size']:,} ids{size})"


def steps_words(checkpoint, cfg):
    steps, tokens = checkpoint.get("iter_num"), checkpoint.get("tokens")
    if steps is None:
        return ""
    of = f" of {cfg['max_iters']:,}" if "max_iters" in cfg else ""
    return f"{steps:,}{of} steps" + (f", {tokens:,} tokens" if tokens is not None else "")


def loss_words(loss, meta):
    """A loss in nats per token, and in bits per byte where the data set tells its bytes."""
    if loss is None or not math.isfinite(loss):
        return ""
    loss = float(loss)
    if not (meta or {}).get("val_bytes"):
        return f"{loss:.4f} nats per token"
    bits = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
    return f"{loss:.4f} nats per token, {bits:.4f} bits per byte (the best of the run)"


def last_evaluation(path, step):
    """The losses in metrics.jsonl of the evaluation at `step`, that of the checkpoint."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line.get("iter") == step and "val_loss" in line]
    if not found:
        return {}
    return {"losses at that step": f"train {found[-1]['train_loss']:.4f}, val {found[-1]['val_loss']:.4f}"}


def card(model, name, has_tokenizer, facts):
    """README.md."""
    c, plain = model.config, GPTConfig()
    sizes = ", ".join(f"{n}={getattr(c, n)}" for n in specialise.SIZES)
    flags = [f"`{f.name}={getattr(c, f.name)!r}`" for f in fields(c)
             if f.name not in specialise.SIZES and getattr(c, f.name) != getattr(plain, f.name)]  # fmt: skip
    rows = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}", "sizes": sizes}
    rows |= {"flags": ", ".join(flags) or "none: GPT-2 as nanoGPT builds it"} | facts
    rows |= {"weights are stored in": "float32", "exported with": f"torch {torch.__version__}"}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return CARD.format(name=name, table=table, load=load_words(name, not beyond_gpt2(c), has_tokenizer))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanochimera
---

# {name}

A nanoChimera model: nanoGPT with ideas behind flags. It writes text like that which it was trained on, and
knows nothing else.

| | |
| --- | --- |
{table}

## Load it

{load}
"""

LOAD = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
"""
TEXT = """    tokenizer = AutoTokenizer.from_pretrained("{name}")
    idx = tokenizer("The", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(idx, max_new_tokens=100, do_sample=True)[0]))
"""
TRUST = """
`trust_remote_code` runs modeling_nanochimera.py, which needs nothing but PyTorch and transformers. `generate` is greedy
or samples, and keeps the model's own decoding state. Pad on the right. `labels` are the input ids, -100 where nothing
is to be predicted. To train on, use nanoChimera's `train.py --init_from={name}`, or `model.gpt` with its own
`configure_optimizers`: learning rules and running statistics hang on the optimiser that it makes.
"""


def load_words(name, is_plain, has_tokenizer):
    text = LOAD + (TEXT if has_tokenizer else "") + ("" if is_plain else TRUST)
    return text.format(name=name, trust="" if is_plain else ", trust_remote_code=True").rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


def export(model, directory, tokenizer=None, meta=None, facts=None):
    """Write a model as a Hugging Face directory. ConfigError if it cannot be folded for its flags."""
    directory = Path(directory)
    if beyond_gpt2(model.config):
        write_folded(model, directory, special_ids(tokenizer))
    else:
        write_gpt2(model, directory)
    if beyond_gpt2(model.config) or tokenizer is not None:
        write_text_files(model, directory, tokenizer, meta)
    text = card(model, directory.resolve().name, tokenizer is not None, facts or {})
    (directory / "README.md").write_text(text, encoding="utf-8")


def check_target(to):
    """ConfigError for a directory that holds something else than an export."""
    path = Path(to)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--to={to}: is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not (path / "model.safetensors").is_file():
        raise ConfigError(f"--to={to}: holds other files; name a new directory")


def tokenizer_of(meta, folder):
    """The tokenizer of a data set of text; None for rows of a skill, which are no text."""
    is_text = not meta or meta.get("tokenizer") in TOKENIZERS
    return load_tokenizer(meta, folder) if is_text else None


def run(cfg):
    check_target(cfg.to)
    checkpoint, meta, folder = sample.open_run(cfg)
    model, tokenizer = GPT.from_checkpoint(checkpoint), tokenizer_of(meta, folder)
    export(model, cfg.to, tokenizer, meta, facts_of(checkpoint, meta, cfg.out_dir))
    print(f"{cfg.to}: {', '.join(sorted(path.name for path in Path(cfg.to).iterdir()))}")


def main(argv=None):
    with configurator.one_line_errors("lab.export", CheckpointError, DataError, OSError):
        words = sys.argv[1:] if argv is None else argv
        settings = configurator.read(words, ExportConfig, doc=__doc__).expanded("out_dir", "data_dir", "to")
        try:
            run(settings.build(ExportConfig))
        except ImportError as e:
            raise ConfigError(f"needs the package {e.name}: pip install transformers safetensors") from e


if __name__ == "__main__":
    main()
