"""
Documents of a local file, one after another, in constant memory: plain text (a document per paragraph) or JSON.

Compressed files are opened by fsspec, which comes with PyTorch. Encodings: what a byte-order mark declares, else UTF-8.
"""

import codecs
import io
import json
from itertools import groupby
from pathlib import Path

import fsspec
from fsspec.utils import infer_compression

from data.corpus import DataError, encoding_of

CHUNK = 1 << 20  # bytes
JSON_ENDINGS = {".json", ".jsonl", ".ndjson"}


def characters(f, where):
    """Yield the text of a binary file in pieces, lines ending in \\n; DataError with the offset of what is no text."""
    start = f.read(4)
    encoding, skip = encoding_of(start)
    decoder, newlines = codecs.getincrementaldecoder(encoding)(), io.IncrementalNewlineDecoder(None, translate=True)
    chunk, before = start[skip:], skip
    while True:
        pending = len(decoder.getstate()[0])  # bytes of an unfinished character, which it reads again
        more = f.read(CHUNK)
        try:
            text = decoder.decode(chunk, final=not more)
        except UnicodeDecodeError as e:
            at = before - pending + e.start
            raise DataError(f"{where} cannot be read as {encoding}: {e.reason} at byte {at}") from e
        yield newlines.decode(text, final=not more)
        if not more:
            return
        before += len(chunk)
        chunk = more


def lines_of(pieces):
    """Yield the lines, without their ends, of a text that comes in pieces."""
    parts = []
    for piece in pieces:
        first, *others = piece.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def paragraphs_of(lines):
    """Yield what lies between empty lines."""
    for is_text, group in groupby(lines, key=bool):
        if is_text:
            yield "\n".join(group)


def json_rows(lines, where):
    """Yield the objects of JSON text: one per line, or those of one array, which is read as a whole."""
    lines = enumerate(lines, start=1)
    for number, line in lines:
        if not line.strip():
            continue
        is_array = line.lstrip().startswith("[")
        text = "\n".join([line, *(rest for _, rest in lines)]) if is_array else line
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}, line {number}, cannot be read as JSON: {e}") from e
        yield from rows if is_array else [rows]


def kind_of(path):
    """(ending without that of a compression, the compression or None) of a file's name, in lower case."""
    path = Path(path)
    compression = infer_compression(path.name)
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def local_documents(path):
    """Yield the texts of a file: "text" of each JSON object in .json, .jsonl, .ndjson, else each paragraph.

    DataError for what cannot be read, OSError from the file system.
    """
    ending, compression = kind_of(path)
    try:
        with fsspec.open(str(Path(path).resolve()), "rb", compression=compression) as f:
            lines = lines_of(characters(f, path))
            if ending not in JSON_ENDINGS:
                yield from paragraphs_of(lines)
                return
            for index, row in enumerate(json_rows(lines, path)):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise DataError(f"{path}: document {index} has no 'text' string")
                yield row["text"]
    except (EOFError, ValueError) as e:  # a compressed file cut short; a compression whose package is missing
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path} cannot be read ({type(e).__name__}: {e})") from e
