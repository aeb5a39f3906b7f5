"""
Makes data/openwebtext: 8,013,769 documents, about 9 billion GPT-2 tokens (17 GB), streamed, in constant memory.

Documents are read one after another, tokenised in worker processes and appended to train.bin.tmp and val.bin.tmp, each
followed by the end-of-text id. progress.json records how much is safely on the disk. If a run is killed at any moment,
the next one continues from there and ends with the same bytes as a run that was never killed. --text_file reads a local
file instead.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import hashlib
import json
import multiprocessing
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

import configurator
from configurator import expand
from data import corpus
from data.corpus import DataError
from data.files import is_file
from data.progress import tqdm
from data.reader import kind_of, local_documents

HERE = Path(__file__).resolve().parent
REPOSITORY = "Skylion007/openwebtext"
DOCUMENTS = 8_013_769  # in REPOSITORY: only the progress bar's total
BATCH_CHARACTERS = 1 << 20  # a worker's task ends at so many characters, or at chunk_docs documents
LEARNED_CHARACTERS = 10_000_000  # how much of the text's start a sentencepiece vocabulary is learned from
SPLITS = ("train", "val")


@dataclass
class PrepareConfig:
    text_file: str | None = None  # a local file: .json, .jsonl, .ndjson (field "text"), else a document per paragraph
    tokenizer: str = "gpt2"  # gpt2, byte, or sentencepiece (learned from the first ten million characters)
    vocab_size: int = 8192  # number of ids, for the sentencepiece tokenizer
    val_share: float = 0.0005  # probability of a document to go to the val split
    limit: int | None = None  # stop after so many documents
    num_proc: int = min(os.cpu_count() or 1, 16)  # worker processes; 1: none, tokenise in this one
    chunk_docs: int = 256  # documents that a worker process tokenises at a time: fewer need less memory
    save_every: int = 5000  # documents between two saves of the progress: the most that a kill can lose
    revision: str = "main"  # branch, tag or commit of the Hugging Face repository
    out_dir: str | None = None  # where the data set goes; None: the script's folder
    restart: bool = False  # throw an unfinished run's work away

    def __post_init__(self):
        if self.tokenizer not in ("gpt2", "byte", "sentencepiece"):
            raise ValueError(f"--tokenizer={self.tokenizer}: expected gpt2, byte or sentencepiece")
        if not 0 <= self.val_share <= 1:
            raise ValueError(f"--val_share={self.val_share}: expected 0 to 1")
        for name in ("limit", "num_proc", "chunk_docs", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: expected 1 or more")
        if self.text_file is not None:
            self.text_file = expand(self.text_file)
            if not (os.path.isfile(self.text_file) and os.path.getsize(self.text_file)):
                raise ValueError(f"--text_file={self.text_file}: no such file, or it is empty")

    @property
    def source(self):
        return str(Path(self.text_file).resolve()) if self.text_file else f"{REPOSITORY}@{self.revision}"

    @property
    def settings(self):
        """Everything that changes the result."""
        keep = ("tokenizer", "val_share", "limit", *(["vocab_size"] if self.tokenizer == "sentencepiece" else []))
        return {"source": self.source} | {k: v for k, v in asdict(self).items() if k in keep}


# ---------------------------------------------------------------------------------------------------------------------
# Reading.


def hub_documents(config):
    """Yield the texts of the streaming Hugging Face data set: nothing is downloaded ahead or cached."""
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise DataError("openwebtext needs the package datasets: pip install datasets") from None
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # it would announce each retry
    rows = datasets.load_dataset(REPOSITORY, revision=config.revision, split="train", streaming=True)
    for index, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{config.source}: document {index} has no 'text' string")
        yield row["text"]


def documents(config):
    """Yield the documents' texts, in the source's order; DataError where it cannot be read."""
    from_hub = config.text_file is None
    try:
        texts = hub_documents(config) if from_hub else local_documents(config.text_file)
        for first in islice(texts, 1):
            yield first.lstrip("\ufeff")  # a byte-order mark is no text, even a second one
        yield from texts
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as e:  # network, encoding, JSON; RuntimeError: a loading script
        hint = ""
        if from_hub and "script" in str(e):
            hint = "; try --revision=refs/convert/parquet, Hugging Face's own conversion"
        elif from_hub:
            hint = "; without a network, use --text_file=FILE; what was already written is kept for the next run"
        raise DataError(f"{config.source} cannot be read ({type(e).__name__}: {e}){hint}") from e


def extend(digest, text):
    """The running digest after one more document: sha256 of the digest before, then the text. It can be resumed."""
    return hashlib.sha256(bytes.fromhex(digest) + corpus.utf8(text)).hexdigest()


def batches(texts, digest, most):
    """Yield (list of at most so many documents, the digest after them)."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        digest = extend(digest, text)
        if len(batch) == most or size >= BATCH_CHARACTERS:
            yield batch, digest
            batch, size = [], 0
    if batch:
        yield batch, digest


def skip_done(texts, progress):
    """Read past the documents that an earlier run wrote, checking that they are the same."""
    digest = ""
    for text in islice(texts, progress.documents):
        digest = extend(digest, text)
    if digest != progress.digest:
        raise DataError(f"{progress.settings['source']} changed since the run to resume; start over with --restart")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising.


def encode(tokenizer, batch):
    """[(ids and end-of-text as bytes of the .bin, UTF-8 bytes of the text)] of a list of documents."""
    dtype = corpus.dtype_for(tokenizer.vocab_size)
    return [(np.array([*tokenizer.encode(t), tokenizer.eot], dtype).tobytes(), len(t.encode())) for t in batch]


def serve(connection, name, model):
    """A worker process: sends back each batch's encoding until the pipe is closed. model: sentencepiece's bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    tokenizer = corpus.SentencePiece(model) if model else corpus.build_tokenizer(name)
    try:
        while True:
            connection.send(encode(tokenizer, connection.recv()))
    except (EOFError, OSError):  # the parent has ended, or was killed
        return


class Workers:
    """Processes that take turns, each with a pipe of its own and one batch at a time.

    So batches come back in order, neither side ever waits for the other to read, and when a worker dies its pipe ends.
    In a pool, a worker that dies can leave half a result in the pipe that all share, and all the others wait.
    """

    def __init__(self, config, model=None):
        context, self.turn = multiprocessing.get_context("spawn"), 0  # pyarrow has threads: forking could deadlock
        self.connections, self.processes, self.asked = [], [], [None] * config.num_proc
        for _ in range(config.num_proc):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, config.tokenizer, model), daemon=True)
            process.start()
            theirs.close()  # now the worker's death ends the pipe
            self.connections.append(ours)
            self.processes.append(process)

    def exchange(self, batch=None, digest=None):
        """Hand a batch to the next worker; what it had before, encoded, and its digest, or None."""
        n, self.turn = self.turn, (self.turn + 1) % len(self.asked)
        try:
            done = None if self.asked[n] is None else (self.connections[n].recv(), self.asked[n])
            self.asked[n] = digest
            if batch is not None:
                self.connections[n].send(batch)
        except (EOFError, OSError) as e:
            how = "a worker process died (out of memory?); run again to go on, with a lower --num_proc"
            raise DataError(how) from e
        return done

    def close(self):
        for connection, process in zip(self.connections, self.processes):
            connection.close()
            process.terminate()
        for process in self.processes:
            process.join()


def encoded(batches, config, tokenizer):
    """Yield (encoded documents, digest) in order. One batch per worker is in memory, however slow the disk."""
    if config.num_proc == 1:
        for batch, digest in batches:
            yield encode(tokenizer, batch), digest
        return
    workers = Workers(config, getattr(tokenizer, "model", None))
    try:
        for batch, digest in batches:
            if (done := workers.exchange(batch, digest)) is not None:
                yield done
        for _ in range(config.num_proc):
            if (done := workers.exchange()) is not None:
                yield done
    finally:
        workers.close()


# ---------------------------------------------------------------------------------------------------------------------
# Writing.


@dataclass
class Progress:
    """How much is safely on the disk."""

    settings: dict
    documents: int = 0
    digest: str = ""  # chained over the documents
    bin_bytes: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # UTF-8, without end-of-text
    finished: bool = False  # everything is written; only the renaming may be left

    def save(self, out_dir):
        corpus.replace_file(out_dir / "progress.json", json.dumps(asdict(self), indent=1).encode("ascii"))

    @classmethod
    def load(cls, out_dir, settings, restart):
        """The progress to go on from: that of an unfinished run with the same settings, or a new one."""
        file = out_dir / "progress.json"
        if restart or not is_file(file):
            return cls(settings)
        try:
            progress = cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as e:
            raise DataError(f"{file} is damaged; start over with --restart") from e
        if wrong := progress.wrong_field():
            raise DataError(f"{file} is damaged ({wrong}); start over with --restart")
        changed = [k for k in settings if progress.settings.get(k) != settings[k]]
        if changed:
            told = ", ".join(f"{k}={progress.settings.get(k)}" for k in changed)
            raise DataError(f"{out_dir} holds an unfinished run with {told}; repeat that, or start over with --restart")
        return progress

    def wrong_field(self):
        """What no run can have written, or None."""

        def is_count(value):
            return type(value) is int and value >= 0

        def is_per_split(value):
            return isinstance(value, dict) and value.keys() == set(SPLITS) and all(map(is_count, value.values()))

        digest = "[0-9a-f]{64}" if self.documents else ""
        fine = {
            "settings": isinstance(self.settings, dict),
            "documents": is_count(self.documents),
            "digest": isinstance(self.digest, str) and re.fullmatch(digest, self.digest),
            "bin_bytes": is_per_split(self.bin_bytes),
            "text_bytes": is_per_split(self.text_bytes),
            "finished": type(self.finished) is bool and bool(self.documents or not self.finished),
        }
        return next((name for name, is_fine in fine.items() if not is_fine), None)


def is_val(index, share):
    """Whether document `index` goes to the val split: a stateless coin, so that resuming cannot change it."""
    coin = hashlib.blake2b(str(index).encode(), digest_size=8).digest()
    return int.from_bytes(coin, "big") < share * 2**64


def open_bin(file, size):
    """`file` for appending, cut to the `size` bytes that progress.json records."""
    have = file.stat().st_size if file.exists() else 0
    if have < size:
        raise DataError(f"{file} has {have} bytes, progress.json says {size}; start over with --restart")
    f = open(file, "r+b" if file.exists() else "w+b")
    f.truncate(size)
    f.seek(size)
    return f


def save(progress, bins, out_dir):
    """Flush the bins to the disk, then write progress.json."""
    for f in bins.values():
        f.flush()
        os.fsync(f.fileno())
    progress.save(out_dir)


def progress_bar(config, progress):
    """Documents, or bytes of a plain local file, whose number of documents is not known."""
    quiet = 0.5 if sys.stderr.isatty() else 30  # seconds between two lines
    if config.text_file is None or config.limit:
        return tqdm(total=config.limit or DOCUMENTS, initial=progress.documents, unit=" docs", mininterval=quiet)
    total = None if kind_of(config.text_file)[1] else os.path.getsize(config.text_file)
    done = sum(progress.text_bytes.values())
    return tqdm(total=total, initial=done, unit="B", unit_scale=True, mininterval=quiet)


def tokenizer_of(config, out_dir):
    """The tokenizer; sentencepiece's is learned once and kept beside the unfinished bins."""
    file = out_dir / "tokenizer.model.tmp"
    if config.tokenizer != "sentencepiece":
        return corpus.build_tokenizer(config.tokenizer)  # in this process first: it may have to be downloaded
    if config.restart or not is_file(file):
        texts, size = [], 0
        for text in documents(config):
            texts.append(text)
            size += len(text)
            if size >= LEARNED_CHARACTERS:
                break
        tokenizer = corpus.SentencePiece.train("\n".join(texts)[:LEARNED_CHARACTERS], config.vocab_size)
        corpus.replace_file(file, tokenizer.model)
    return corpus.SentencePiece(file.read_bytes())


def tokenise(config, progress, out_dir, tokenizer):
    """Append all that is left of the source to the temporary bins."""
    stream = documents(config)
    first = list(islice(stream, 1))  # connects: nothing is printed or written before that works
    if not first:
        raise DataError(f"{config.source} holds no documents")
    texts = islice(chain(first, stream), config.limit)
    skip_done(texts, progress)
    saved = progress.documents
    with ExitStack() as stack:
        bins = {s: stack.enter_context(open_bin(out_dir / f"{s}.bin.tmp", progress.bin_bytes[s])) for s in SPLITS}
        bar = stack.enter_context(progress_bar(config, progress))
        for batch, digest in encoded(batches(texts, progress.digest, config.chunk_docs), config, tokenizer):
            for index, (ids, text_bytes) in enumerate(batch, start=progress.documents):
                split = "val" if is_val(index, config.val_share) else "train"
                bins[split].write(ids)
                progress.bin_bytes[split] += len(ids)
                progress.text_bytes[split] += text_bytes
            progress.documents += len(batch)
            progress.digest = digest
            bar.update(len(batch) if bar.unit == " docs" else sum(text_bytes for _, text_bytes in batch))
            if progress.documents - saved >= config.save_every:
                save(progress, bins, out_dir)
                saved = progress.documents
        progress.finished = True
        save(progress, bins, out_dir)


def finish(progress, out_dir, tokenizer):
    """Rename the bins, write meta.json, forget the progress. A kill in between is repaired by doing it again."""
    corpus.begin_replacing(out_dir)
    for split in SPLITS:
        tmp, file = out_dir / f"{split}.bin.tmp", out_dir / f"{split}.bin"
        if tmp.exists():
            os.replace(tmp, file)
        have = file.stat().st_size if file.exists() else 0
        if have != progress.bin_bytes[split]:
            told = f"{file} has {have} bytes, progress.json says {progress.bin_bytes[split]}"
            raise DataError(f"{told}; start over with --restart")
    if model := getattr(tokenizer, "model", None):
        corpus.replace_file(out_dir / "tokenizer.model", model)
    size = np.dtype(corpus.dtype_for(tokenizer.vocab_size)).itemsize
    tokens = {s: progress.bin_bytes[s] // size for s in SPLITS}
    source = progress.settings["source"]
    meta = corpus.make_meta("openwebtext", tokenizer, tokens, progress.text_bytes, source, progress.digest)
    meta = corpus.write_meta(out_dir, meta)
    (out_dir / "progress.json").unlink()
    (out_dir / "tokenizer.model.tmp").unlink(missing_ok=True)
    return meta


def prepare(config, out_dir):
    """The whole preparation into `out_dir`, from wherever an earlier one was stopped."""
    progress = Progress.load(out_dir, config.settings, config.restart)
    if progress.documents:
        print(f"going on after {progress.documents:,} documents (reading past them first)", flush=True)
    tokenizer = tokenizer_of(config, out_dir)
    if not progress.finished:
        tokenise(config, progress, out_dir, tokenizer)
    meta = finish(progress, out_dir, tokenizer)
    print(f"openwebtext: {progress.documents:,} documents of {config.source}")
    print(
        f"train {meta['train_tokens']:,} tokens, val {meta['val_tokens']:,} tokens"
        f" ({meta['tokenizer']}, {meta['vocab_size']:,} ids, {meta['dtype']}) -> {out_dir}"
    )
    if not meta["val_tokens"]:
        print("the val split is empty: prepare again with a larger --val_share to be able to evaluate")


def main():
    stopped = "interrupted; the same command goes on from the last save"
    with configurator.one_line_errors("prepare.py", DataError, OSError, interrupted=stopped):
        config = configurator.read(sys.argv[1:], PrepareConfig, doc=__doc__).build(PrepareConfig)
        out_dir = Path(expand(config.out_dir)) if config.out_dir else HERE
        out_dir.mkdir(parents=True, exist_ok=True)
        with corpus.preparing(out_dir):
            prepare(config, out_dir)


if __name__ == "__main__":
    main()
