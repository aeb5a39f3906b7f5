"""Text of one's own: data/prepare.py, --dataset=PATH, and mixtures of data sets."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from data import prepare
from data.corpus import DataError, build_tokenizer, load_meta, load_tokenizer, open_split, write_dataset
from data.dataset import TRAIN, VAL_LOSS, Mixture, TokenDataset, open_dataset, shares_of
from helpers import error_of, flags, gpt2, losses, run_here
from train import TrainConfig

pytestmark = pytest.mark.slow

A, B = build_tokenizer("byte").encode("ab")
VERSE = "So shaken as we are, so wan with care,\nFind we a time for frighted peace to pant.\n"


def text_of(folder):
    """What a data set's two splits decode to."""
    meta = load_meta(folder)
    ids = [token for split in ("train", "val") for token in open_split(folder, split, meta).tolist()]
    return load_tokenizer(meta, folder).decode(ids)


def make(out, *words):
    prepare.main([*map(str, words), f"--out_dir={out}"])
    return out


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2"])
def test_a_file_becomes_a_data_set(tokenizer, tmp_path, capsys):
    if tokenizer == "gpt2":
        gpt2()
    (tmp_path / "my text.txt").write_text(VERSE * 20 + "é")
    out = make(tmp_path / "out", tmp_path / "my text.txt", f"--tokenizer={tokenizer}")
    assert text_of(out) == VERSE * 20 + "é"
    meta = load_meta(out)
    assert meta["dataset"] == "my_text" and meta["val_bytes"] == pytest.approx(0.1 * len(VERSE) * 20, abs=3)
    assert f"--dataset={out}" in capsys.readouterr().out


def test_files_of_a_folder_are_documents(tmp_path, capsys):
    folder = tmp_path / "letters"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "2.txt").write_text("second\n")
    (folder / "1.md").write_bytes(b"\xef\xbb\xbffirst\r\nline")
    (folder / ".hidden").write_text("no")
    (folder / "c.jsonl").write_text('{"text": "third"}\n{"text": "fourth"}\n')
    with gzip.open(folder / "d.txt.gz", "wt") as f:
        f.write("fifth")
    (folder / "z.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    out = make(tmp_path / "out", folder, "--val_share=0.2")
    assert text_of(out) == "first\nline\n\nsecond\n\nthird\n\nfourth\n\nfifth"
    assert "1 files left out, they are not text: z.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["empty"], "empty: there is no text in it"),
        (["bad.txt"], "bad.txt cannot be read as utf-8"),
        (["rows.jsonl"], "document 0 has no 'text' string"),
        (["cut.gz"], "cut.gz cannot be read"),
        (["a.txt", "b.txt"], "a.txt b.txt: name one file or folder"),
        (["a.txt", "--tokenizer=word"], "--tokenizer=word: expected one of"),
        (["a.txt", "--val_share=1"], "val_share=1"),
        (["a.txt", "--name=../x"], "--name=../x: a new name"),
        (["a.txt", "--name=openwebtext"], "--name=openwebtext: a new name"),
        (["a.txt", "--tokenizer=sentencepiece", "--vocab_size=100"], "at least 260 ids"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(VERSE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "rows.jsonl").write_text('{"body": 1}\n')
    (tmp_path / "cut.gz").write_bytes(gzip.compress(VERSE.encode())[:20])
    with pytest.raises(SystemExit, match="2"):
        prepare.main(words)
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and said in error and error.count("\n") == 1


def test_too_much_text_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MOST", 100)
    (tmp_path / "a.txt").write_text(VERSE * 2)
    with pytest.raises(DataError, match="constant memory"):
        prepare.read_text(tmp_path / "a.txt")


def test_a_path_is_prepared_once_and_comes_back(tmp_path, monkeypatch, capsys):
    """--dataset=FILE makes a data set of that very text; a changed text makes another, and a resume keeps its own."""
    monkeypatch.setattr(prepare, "OWN", tmp_path / "own")
    file, tiny = tmp_path / "mine.txt", flags(tmp_path, tmp_path / "out")
    file.write_text(VERSE * 30)
    words = [w for w in tiny if not w.startswith(("--dataset", "--data_dir"))]
    assert run_here(*words, f"--dataset={file}") == 0
    assert "-> " + str(tmp_path / "own" / "mine-") in capsys.readouterr().out
    before = losses(tmp_path / "out")
    assert run_here(*words, f"--dataset={file}", f"--out_dir={tmp_path / 'again'}") == 0
    assert " -> " not in capsys.readouterr().out and losses(tmp_path / "again") == before
    file.write_text(VERSE * 31)
    assert run_here(f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--max_iters=30") == 0
    assert len(list((tmp_path / "own").iterdir())) == 1
    assert run_here(*words, f"--dataset={file}", f"--out_dir={tmp_path / 'new'}") == 0
    assert len(list((tmp_path / "own").iterdir())) == 2


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two data sets by bytes: a of "a" alone, b of "b"."""
    folder = tmp_path_factory.mktemp("sets")
    for name, size in (("a", 4000), ("b", 1000)):
        texts = name * size, name * (size // 5)
        write_dataset(folder / name, *texts, build_tokenizer("byte"), name, "test", "0" * 64)
    return folder


def settings(pair, dataset):
    return TrainConfig(dataset=dataset, data_dir=str(pair), seed=3)


def test_windows_are_mixed_by_weight_and_stay_inside_a_text(pair):
    data, config = open_dataset(settings(pair, "a:0.6,b:0.2")), SimpleNamespace(block_size=16, vocab_size=300)
    assert isinstance(data, Mixture) and data.meta["train_tokens"] == 5000 and data.meta["val_bytes"] == 1000
    starts = data.windows(TRAIN, 7, 4000, 16)
    x, y = data.batch("train", starts, config, "cpu")
    assert torch.equal(x, y) and (x == x[:, :1]).all()  # no window crosses from one text into the other
    share = (x[:, 0] == A).float().mean().item()
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)
    assert np.array_equal(starts, data.windows(TRAIN, 7, 4000, 16))  # a function of seed and step
    assert not np.array_equal(starts, data.windows(VAL_LOSS, 7, 4000, 16))


def test_all_of_both_val_splits_is_read_once(pair):
    data, config = open_dataset(settings(pair, "a:1,b:1")), SimpleNamespace(block_size=16, vocab_size=300)
    found = [y[y != -1] for x, y in data.val_windows(4, config, "cpu", 0, 1)]
    counts = torch.cat(found).bincount(minlength=99)
    assert counts[A] == 799 and counts[B] == 199


def test_a_mixture_trains_and_resumes(pair, tmp_path):
    words = flags(pair / "a", tmp_path / "out", dataset="a:0.5,b:0.5", max_iters=4)
    assert run_here(*words) == 0
    assert run_here(*flags(pair / "a", tmp_path / "half", dataset="a:0.5,b:0.5", max_iters=2, lr_decay_iters=4)) == 0
    assert run_here(f"--out_dir={tmp_path / 'half'}", "--init_from=resume", "--max_iters=4") == 0
    assert losses(tmp_path / "out")[-1] == losses(tmp_path / "half")[-1]


@pytest.mark.parametrize("dataset, said", [("a:1,a:2", "each name once"), ("a:0,b:1", "weight above 0"),
                                           ("a:1,text:1", "text is not text in the tokens of a"),
                                           ("a:1,nowhere:1", "nowhere")])  # fmt: skip
def test_mixtures_that_make_no_sense(dataset, said, pair, tmp_path, capsys):
    if not (pair / "text").exists():
        write_dataset(pair / "text", "ab" * 200, "ab" * 50, build_tokenizer("char", "ab"), "text", "test", "0" * 64)
    assert run_here(*flags(pair / "a", tmp_path, dataset=dataset)) == 2
    assert said in error_of(capsys)


def test_names_that_are_no_mixture():
    assert shares_of("shakespeare_char") == shares_of("a:b") == shares_of("a:0.5,b") == {}
    assert shares_of("a:0.7, b:0.3") == {"a": 0.7, "b": 0.3}


def test_one_part_is_that_data_set(pair):
    """A mixture of one part reads the same val windows as the part itself."""
    one, plain = open_dataset(settings(pair, "a:1")), TokenDataset(settings(pair, "a"))
    config = SimpleNamespace(block_size=16, vocab_size=300)
    for (x, y), (u, v) in zip(one.val_windows(4, config, "cpu", 0, 1), plain.val_windows(4, config, "cpu", 0, 1)):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert json.dumps(one.meta["val_tokens"]) == json.dumps(plain.meta["val_tokens"])


def test_only_the_main_process_prepares(tmp_path, monkeypatch):
    """The others get its answer: two that prepared one folder would be in each other's way."""
    monkeypatch.setattr(prepare, "OWN", tmp_path / "own")
    (tmp_path / "mine.txt").write_text(VERSE)
    cfg = TrainConfig(dataset=str(tmp_path / "mine.txt"))
    other = SimpleNamespace(is_main=False, of_main=lambda value: value or "the main one's")
    assert train.own_text(cfg, other) == "the main one's" and not (tmp_path / "own").exists()
    folder = train.own_text(cfg, SimpleNamespace(is_main=True, of_main=lambda value: value))
    assert text_of(folder) == VERSE
    named = TrainConfig(dataset=next((tmp_path / "own").iterdir()).name, data_dir=str(tmp_path / "own"))
    assert train.own_text(named, other) == named.dataset  # a data set's name stays
