"""
Write text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:\\n" --max_new_tokens=300
    python sample.py --init_from=gpt2 --start="The answer is" --temperature=0 --stream
    cat prompt.txt | python sample.py --start=- --stop="\\n\\n"

In --start and --stop, \\n is a newline, \\t a tab and \\\\ a backslash, since a shell passes them as they are.
"""

import signal

import configurator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback
    configurator.help_before_imports("sample.py", {"sample.py": ["SampleConfig"]})

import codecs
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import ROOT, ConfigError, check_values, expand
from data.corpus import (
    GPT2,
    GPT2_NAMES,
    REPLACEMENT,
    DataError,
    HuggingFace,
    build_tokenizer,
    decode_text,
    first_ids,
    has_tokenizer,
    load_meta,
    load_tokenizer,
    visible,
)
from data.dataset import shares_of
from data.files import is_file
from data.runs import find_checkpoint
from model import GPT, CheckpointError, load_checkpoint
from train import pick_device, pick_dtype, told_when_out_of_memory

UNKNOWN = REPLACEMENT.encode()
RANGES = {"num_samples max_new_tokens": "[1, 2^63)", "seed": "[0, 2^63)"}


@dataclass
class SampleConfig:
    """What to write with; ValueError for values that make no sense."""

    # -- model --------------------------------------------------------------------------------------------------------
    init_from: str = "resume"  # "resume" (the checkpoint in out_dir) | "gpt2*" | a Hugging Face folder, ours too
    out_dir: str = "out"  # the run's folder
    checkpoint: str = ""  # a file in out_dir; empty = ckpt.pt (best), else ckpt_last.pt
    data_dir: str = ""  # where the data set lies, for its tokenizer; empty = as in training
    # -- text ---------------------------------------------------------------------------------------------------------
    start: str = "\n"  # the prompt, \n for a newline; "FILE:path" reads a file, "-" standard input
    num_samples: int = 1  # texts, generated as one batch
    max_new_tokens: int = 500  # tokens per text
    stop: tuple[str, ...] = ()  # end a text before whichever of these strings is complete first
    stream: bool = False  # print while writing (one sample)
    raw: bool = False  # print control characters as they are; False = as escapes, which no terminal obeys
    # -- sampling -----------------------------------------------------------------------------------------------------
    temperature: float = 0.8  # 1 = the model's own probabilities, below 1: sharper, 0 = greedy
    top_k: int | None = 200  # keep the k likeliest tokens
    top_p: float | None = None  # keep the fewest tokens that reach this probability
    min_p: float | None = None  # drop tokens below this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1: tokens seen before become less likely
    repetition_window: int | None = None  # how many tokens back "seen" reaches; None = all
    seed: int = 1337  # for the sampling
    # -- system -------------------------------------------------------------------------------------------------------
    device: str = "auto"  # "auto" | "cpu" | "cuda" | "cuda:1" | "mps"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # the weights are cast to it
    compile: bool = False  # torch.compile; seldom pays for a few samples
    use_cache: bool = True  # keep keys, values and states; False recomputes everything for each token

    def __post_init__(self):
        check_values(self, RANGES)
        if self.stream and self.num_samples > 1:
            raise ValueError("stream=True prints one text as it grows: use num_samples=1")
        if "" in self.stop:
            raise ValueError("stop='': an empty string would end every text at once")


def tokenizer_of(name_or_dir, vocab_size):
    """The tokenizer of pre-trained weights: the folder's own, or GPT-2's by name or (told) by size; else DataError."""
    if meta := load_meta(name_or_dir):  # lab.export wrote this directory
        return load_tokenizer(meta, name_or_dir)
    if has_tokenizer(name_or_dir):
        return HuggingFace(name_or_dir)
    if name_or_dir not in GPT2_NAMES:
        if vocab_size != GPT2.vocab_size:
            raise DataError(f"{name_or_dir}: has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        print(f"{name_or_dir}: has no tokenizer, its {vocab_size} ids are taken for GPT-2's", file=sys.stderr)
    return build_tokenizer("gpt2")


def load(cfg):
    """(model, tokenizer) of a run or of a pre-trained GPT-2."""
    if cfg.init_from != "resume":
        try:
            model = GPT.from_pretrained(cfg.init_from)
            return model, tokenizer_of(cfg.init_from, model.config.vocab_size)
        except ImportError:
            raise ConfigError("pre-trained models need transformers: pip install transformers safetensors") from None
        except DataError:
            raise
        except (ValueError, OSError) as e:
            raise ConfigError(f"--init_from={cfg.init_from}: {e}") from e
    checkpoint, meta, folder = open_run(cfg)
    return GPT.from_checkpoint(checkpoint), load_tokenizer(meta, folder)


def open_run(cfg):
    """(checkpoint, meta of its data, folder of its data) of the run that cfg names: out_dir, checkpoint, data_dir."""
    path = Path(cfg.out_dir) / cfg.checkpoint if cfg.checkpoint else find_checkpoint(cfg.out_dir, best=True)
    checkpoint = load_checkpoint(path or Path(cfg.out_dir) / "ckpt.pt")
    trained = checkpoint.get("config", {})  # nanoGPT's has one too, but no meta
    dataset, data_dir = (trained.get(name) or "" for name in ("dataset", "data_dir")) if trained else ("", "")
    dataset = next(iter(shares_of(str(dataset))), str(dataset))  # all parts of a mixture have the same tokenizer
    folder = Path(cfg.data_dir or str(data_dir) or ROOT / "data") / dataset
    meta = checkpoint.get("meta") or load_meta(folder)
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path}: damaged, its meta is a {type(meta).__name__}")
    return checkpoint, meta, folder


def prompt(start):
    """The text that --start stands for."""
    if start != "-" and not start.startswith("FILE:"):
        return unescape(start)
    try:
        if start != "-" and not is_file(expand(start[5:])):
            raise FileNotFoundError("there is no such file")
        data = sys.stdin.buffer.read() if start == "-" else Path(expand(start[5:])).read_bytes()
        return decode_text(data, f"--start={start}:")  # as the corpora are read
    except OSError as e:
        raise ConfigError(f"--start={start}: cannot be read ({e})") from e


def unescape(text):
    """`text` with \\n, \\t and \\\\ replaced by newline, tab and backslash."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


class Growing:
    """A text that grows by token ids, each decoded once; it ends before whichever stop string is complete first."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ids = tokenizer, stops, []
        self.pieces = getattr(tokenizer, "pieces", None)  # the bytes of each id, where ids are bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.whole, self.text, self.ended = "", "", False  # whole characters; and what may be shown

    def add(self, token):
        """One more id; nothing after the end."""
        if self.ended:
            return
        if token == self.tokenizer.eot:
            self.ended = True
            return
        before = len(self.whole)
        if self.tokenizer.name == "char":
            self.whole += self.tokenizer.decode([token])
        elif self.pieces is None:  # another's: what an id stands for may depend on those before it
            self.ids.append(token)
            self.whole = self.tokenizer.decode(self.ids)
        else:
            self.whole += self.decoder.decode(self.pieces[token] if token < len(self.pieces) else UNKNOWN)
        unfinished = self.decoder.getstate()[0].decode("utf-8", "replace")  # half a character, or no beginning of one
        longest = max(map(len, self.stops), default=0)
        ends = [i for i in (self.whole.find(s, max(0, before - longest)) for s in self.stops) if i >= 0]
        self.ended = bool(ends)
        self.text = self.whole[: min(ends)] if ends else self.whole + unfinished


def grow(model, tokenizer, idx, cfg):
    """Yield the texts so far, one per row of idx (B, T), after every token, until all ended or max_new_tokens.

    A text ends before its first stop string, or at the tokenizer's end-of-text token.
    """
    rows = [Growing(tokenizer, cfg.stop) for _ in idx]
    generator = torch.Generator(idx.device).manual_seed(cfg.seed)
    for tokens in model.stream(
        idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty,
        cfg.repetition_window, cfg.use_cache, generator, known_ids=tokenizer.vocab_size,
    ):  # fmt: skip
        for row, token in zip(rows, tokens[:, 0].tolist()):
            row.add(token)
        yield [row.text for row in rows]
        if all(row.ended for row in rows):
            return


def print_growing(start, texts, stops, shown_as):
    """Print a text as it grows, holding back what may yet become a stop string or is half a character."""
    print(shown_as(start), end="", flush=True)
    hold, shown, text = max((len(s) for s in stops), default=1) - 1, 0, ""
    for (text,) in texts:
        end = max(shown, len(text.rstrip("\ufffd")) - hold)
        print(shown_as(text[shown:end]), end="", flush=True)
        shown = end
    print(shown_as(text[shown:]))


def prompt_ids(text, is_given, tokenizer, vocab_size):
    """The prompt's token ids; what nobody typed is a newline where there is one, else some other token."""
    ids = tokenizer.encode(text) if is_given else first_ids(tokenizer)
    if not ids:
        raise ConfigError("--start is empty: a model needs at least one token to go on from")
    if max(ids) >= vocab_size:
        raise ConfigError(f"--start has token id {max(ids)}, beyond the model's vocab_size={vocab_size}")
    return ids


def run(settings):
    settings = settings.expanded("out_dir", "data_dir", "init_from", "checkpoint")
    cfg = settings.build(SampleConfig)
    cfg.stop = tuple(map(unescape, cfg.stop))
    device, _ = pick_device(cfg.device)
    text, is_given = prompt(cfg.start), "start" in settings.given
    model, tokenizer = load(cfg)
    model = model.to(device, pick_dtype(cfg.dtype, device, model)[0]).eval()
    ids = prompt_ids(text, is_given, tokenizer, model.config.vocab_size)
    if cfg.compile:
        model.compile()
    start, shown_as = text if is_given else tokenizer.decode(ids), str if cfg.raw else visible
    idx = torch.tensor(ids, device=device).repeat(cfg.num_samples, 1)
    try:
        texts = grow(model, tokenizer, idx, cfg)
        if cfg.stream:
            return print_growing(start, texts, cfg.stop, shown_as)
        *_, last = texts
    except ValueError as e:
        raise ConfigError(str(e)) from e
    for grown in last:
        print(shown_as(start + grown))
        print("---------------")


def main(argv=None):
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `sample.py | head` ends quietly
    with configurator.one_line_errors("sample.py", DataError, CheckpointError, OSError), told_when_out_of_memory():
        run(configurator.read(sys.argv[1:] if argv is None else argv, SampleConfig, doc=__doc__))


if __name__ == "__main__":
    main()
