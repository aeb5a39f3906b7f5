"""data/domains.py: whole documents in three splits, and a test split that stays shut until someone says why."""

import hashlib
import json
import random
import re

import numpy as np
import pytest

from data import corpus, domains
from data.corpus import DataError
from data.dataset import TokenDataset
from helpers import ROOT
from train import TrainConfig

pytestmark = pytest.mark.slow


def documents(count=200):
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefgh \n", k=rng.randrange(50, 400))) + str(i) for i in range(count)]


@pytest.fixture
def domain(tmp_path):
    """(folder, meta, texts) of a small domain."""
    texts = documents()
    return tmp_path / "small", domains.write_domain(tmp_path / "small", texts, 1e6, "made up"), texts


def test_documents_are_whole_distinct_and_cut_90_5_5():
    texts = documents()
    splits = domains.cut([*texts, *texts[:50], "", " \n"], 1e6)  # some twice, some empty
    assert sorted(sum(splits.values(), [])) == sorted(texts)
    total = sum(map(len, texts))
    for split in ("val", "test"):
        assert abs(sum(map(len, splits[split])) / total - 0.05) < 0.01
    again = domains.cut(random.Random(1).sample(texts, len(texts)), 1e6)
    assert again == splits  # wherever they came from


def test_the_cap_takes_documents_in_the_order_of_their_sha256():
    texts = documents(40)
    kept = [text for split in domains.cut(texts, 3000).values() for text in split]
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert 2600 < sum(map(len, kept)) <= 3000 and set(order[: len(kept) // 2]) <= set(kept)
    with pytest.raises(DataError, match="three or more"):
        domains.cut(texts[:2], 1e6)
    assert [len(split) for split in domains.cut(texts[:3], 1e6).values()] == [1, 1, 1]


def test_the_splits_hold_all_bytes_once(domain):
    folder, meta, texts = domain
    found = []
    for split in ("train", "val", "test"):
        ids = np.fromfile(folder / f"{split}.bin", np.uint16)
        assert len(ids) == meta[f"{split}_tokens"] == meta[f"{split}_bytes"] + meta["documents"][split]
        found += [corpus.Byte().decode(part[:-1]) for part in np.split(ids, np.flatnonzero(ids == 1) + 1) if len(part)]
    assert sorted(found) == sorted(texts)
    assert corpus.load_meta(folder)["test_sha256"] == meta["test_sha256"]


def test_the_reader_refuses_the_test_split(domain, tmp_path):
    folder, meta, _ = domain
    data = TokenDataset(TrainConfig(dataset=folder.name, data_dir=str(tmp_path)))
    assert set(data.splits) == {"train", "val"}
    with pytest.raises(DataError, match="sealed: only python -m lab.trial --reveal opens it"):
        corpus.open_split(folder, "test", meta)


def test_who_looks_is_written_down(domain, tmp_path):
    folder, meta, _ = domain
    record = tmp_path / "out" / "revealed.jsonl"
    tokens = domains.reveal(folder, meta, record, "to confirm an idea")
    assert tokens.tolist() == np.fromfile(folder / "test.bin", np.uint16).tolist()
    domains.reveal(folder, meta, record, "again")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["why"] for line in lines] == ["to confirm an idea", "again"]
    assert lines[0]["sha256"] == hashlib.sha256((folder / "test.bin").read_bytes()).hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", lines[0]["date"])
    (folder / "test.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match="is not the file that was sealed"):
        domains.reveal(folder, meta, record, "changed")
    (folder / "test.bin").unlink()
    with pytest.raises(DataError, match="no sealed test split"):
        domains.reveal(folder, meta, record, "gone")
    assert len(record.read_text().splitlines()) == 2


def test_nothing_else_opens_it():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("lab/*.py")]
        if re.search(r"\breveal\(|[\"'/]test\.bin", path.read_text(encoding="utf-8"))
    }
    assert users <= {"data/domains.py", "lab/trial.py"}


def test_pinned_packages_alone(tmp_path, monkeypatch, capsys):
    class Package:
        def __init__(self, name, version, files):
            self.metadata, self.version, self.files = {"Name": name}, version, [ROOT / file for file in files]

        def locate_file(self, file):
            return file

    (tmp_path / "latin.py").write_bytes("# \xe9".encode("latin-1"))
    there = [
        Package(
            "torch", domains.pins()["torch"] + "+cpu", ["train.py", "model.py", "README.md", tmp_path / "latin.py"]
        ),
        Package("numpy", "0.1", ["sample.py"]),
        Package("mine", "1.0", ["sample.py"]),
        Package("lm_eval", "0.4.13", ["sample.py"]),  # pinned, but later than the corpus
    ]
    monkeypatch.setattr(domains.importlib.metadata, "distributions", lambda: there)
    texts, source, more = domains.python_files()
    assert sorted(texts) == sorted((ROOT / name).read_text() for name in ("train.py", "model.py"))
    assert source == ".py files of 1 pinned packages" and list(more["packages"]) == ["torch"]
    assert "1 files are not UTF-8" in capsys.readouterr().out
    monkeypatch.setattr(domains.importlib.metadata, "distributions", lambda: there[1:])
    with pytest.raises(DataError, match="none of the packages"):
        domains.python_files()


def test_mistakes_are_one_line(tmp_path, capsys):
    for words, told in ((["--cap_mb=0"], "cap_mb"), ([f"--out_dir={tmp_path}"], "three splits need three or more")):
        with pytest.raises(SystemExit) as e:
            domains.prepare(ROOT / "data/drama/prepare.py", lambda: (["one", "two"], "two", {}), "", words)
        error = capsys.readouterr().err
        assert e.value.code == 2 and told in error and error.count("\n") == 1
