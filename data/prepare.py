"""
Make a data set of a text of your own: a file, or a folder of files.

    python data/prepare.py my.txt  # then: python train.py config/train_shakespeare_char_cpu.py --dataset=my
    python data/prepare.py letters/ --name=letters --tokenizer=gpt2

A file is one text; a .json, .jsonl or .ndjson is a document per row (field "text"); a folder is a document per file, in
the order of their paths, without hidden files and files that are not text. .gz, .bz2, .xz and .zst are read too.
Documents are joined by an empty line. The last tenth of the characters is the val split. The text is held in memory:
for more than half a gigabyte, data/openwebtext/prepare.py --text_file reads in constant memory.
"""

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, from any working directory

import configurator
from configurator import ROOT, ConfigError, check_values, expand
from data.corpus import TOKENIZERS, DataError, build_tokenizer, load_meta, write_dataset
from data.reader import JSON_ENDINGS, characters, kind_of, local_documents

MOST = 500_000_000  # characters
OWN = ROOT / "data" / "own"  # where texts go that --dataset=PATH names


@dataclass
class OwnConfig:
    """What to make of a text."""

    # -- data set -----------------------------------------------------------------------------------------------------
    name: str = ""  # the data set's name, for --dataset; empty = that of the file or folder
    tokenizer: str = "char"  # char, byte, gpt2, or sentencepiece (learned from the train split)
    vocab_size: int = 2048  # number of ids, for the sentencepiece tokenizer
    val_share: float = 0.1  # share of the characters, the last ones, that are the val split
    out_dir: str | None = None  # where it goes; None: data/NAME

    def __post_init__(self):
        check_values(self, {"vocab_size": "[1, inf)", "val_share": "(0, 1)"})
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"--tokenizer={self.tokenizer}: expected one of {', '.join(TOKENIZERS)}")


def whole_text(path):
    """The text of a file that is no JSON."""
    try:
        with fsspec.open(str(path.resolve()), "rb", compression=kind_of(path)[1]) as f:
            return "".join(characters(f, path))
    except (EOFError, ValueError) as e:  # a compressed file cut short; a compression whose package is missing
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path} cannot be read ({type(e).__name__}: {e})") from e


def documents_of(file):
    return local_documents(file) if kind_of(file)[0] in JSON_ENDINGS else [whole_text(file)]


def files_of(folder):
    """The files of a folder, at any depth, by path; nothing whose name begins with a dot."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def read_text(path):
    """(text, names of files that are not text) of a file or folder. DataError if there is none, or too much."""
    path, texts, skipped, size = Path(path), [], [], 0
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    for file in files_of(path) if path.is_dir() else [path]:
        try:
            found = [text for text in documents_of(file) if text.strip()]
        except DataError:
            if not path.is_dir():
                raise
            skipped.append(str(file.relative_to(path)))
            continue
        texts += found
        size += sum(map(len, found))
        if size > MOST:
            big = "python data/openwebtext/prepare.py --text_file=FILE --out_dir=DIR reads in constant memory"
            raise DataError(f"{path}: more than {MOST:,} characters; {big}")
    if not texts:
        raise DataError(f"{path}: there is no text in it")
    return (texts[0] if len(texts) == 1 else "\n\n".join(text.strip("\n") for text in texts)), skipped


def name_of(path):
    """A data set's name from a path: that of the file without its endings, with _ for all but letters and digits."""
    path = Path(path).resolve()
    stem = path.name if path.is_dir() else path.name.split(".")[0]
    return re.sub(r"\W+", "_", stem).strip("_") or "text"


def prepare(path, name="", tokenizer="char", vocab_size=2048, val_share=0.1, out_dir=None):
    """Write the data set; returns (its meta, its folder, names of files that are not text)."""
    text, skipped = read_text(path)
    name = name or name_of(path)
    folder = Path(expand(out_dir)) if out_dir else ROOT / "data" / name
    if not out_dir and (not re.fullmatch(r"[\w.-]+", name) or (folder / "prepare.py").exists()):
        raise ConfigError(f"--name={name}: a new name of letters, digits, _, - and . is needed")
    cut = min(len(text) - 1, int((1 - val_share) * len(text)))  # characters
    train, val = text[:cut], text[cut:]
    built = build_tokenizer(tokenizer, train, val, vocab_size)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return write_dataset(folder, train, val, built, name, str(Path(path).resolve()), sha256), folder, skipped


def prepared(path):
    """The folder of the data set that a text file or folder stands for: made, by characters, if it is not there yet."""
    text, _ = read_text(path)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    folder = OWN / f"{name_of(path)}-{sha256[:12]}"
    meta = load_meta(folder) if folder.is_dir() else {}
    if meta.get("source_sha256") != sha256:
        meta, _, skipped = prepare(path, out_dir=folder)
        print("\n".join(told(meta, folder, skipped)), flush=True)
    return folder


def told(meta, folder, skipped):
    """What was made, in lines."""
    lines = [f"{len(skipped)} files left out, they are not text: {', '.join(skipped[:5])}"] if skipped else []
    splits = ", ".join(f"{split} {meta[f'{split}_tokens']:,} tokens" for split in ("train", "val"))
    return [*lines, f"{splits} ({meta['tokenizer']}, {meta['vocab_size']:,} ids, {meta['dtype']}) -> {folder}"]


def main(argv=None):
    with configurator.one_line_errors("prepare.py", DataError, OSError):
        words = sys.argv[1:] if argv is None else argv
        paths = [word for word in words if not word.startswith("-")]
        flags = [word for word in words if word not in paths] if paths else ["--help"]
        config = configurator.read(flags, OwnConfig, doc=__doc__).build(OwnConfig)
        if len(paths) != 1:
            raise ConfigError(f"{' '.join(paths)}: name one file or folder; --name and the other keys take an =")
        meta, folder, skipped = prepare(expand(paths[0]), **vars(config))
        print("\n".join(told(meta, folder, skipped)))
        dataset = folder.resolve() if config.out_dir else meta["dataset"]
        print(f"next: python train.py config/train_shakespeare_char_cpu.py --dataset={dataset}")


if __name__ == "__main__":
    main()
