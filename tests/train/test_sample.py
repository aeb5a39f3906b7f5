"""sample.py as a user meets it: prompts, sampling, stopping, streaming, old checkpoints, one-line mistakes."""

import io
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import sample
from data.corpus import Byte
from helpers import LINES
from model import GPT, load_checkpoint

MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32"]
RULE = "---------------\n"


@pytest.fixture(scope="session")
def run(shakespeare, cli, tmp_path_factory):
    """The folder of a run of 20 steps. Its data set is gone."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(shakespeare, folder / "data" / "verse")
    done = cli(
        "train.py", *MODEL, f"--out_dir={folder / 'out'}", f"--data_dir={folder / 'data'}", "--dataset=verse",
        "--max_iters=20", "--eval_interval=20", "--eval_iters=2", "--batch_size=8", "--gradient_accumulation_steps=1",
        "--learning_rate=1e-2", "--warmup_iters=0", "--device=cpu", "--dtype=float32", "--compile=False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shutil.rmtree(folder / "data")
    return folder / "out"


@pytest.fixture
def model(run):
    return GPT.from_checkpoint(load_checkpoint(run / "ckpt.pt")).eval()


@pytest.fixture
def write(run, capsys):
    """write("--key=value", ...) -> (returncode, stdout, stderr) of sample.py on the run, in this process."""

    def call(*words, out_dir=run):
        capsys.readouterr()
        code = 0
        try:
            sample.main([f"--out_dir={out_dir}", "--device=cpu", *words])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return call


@pytest.fixture
def text(write):
    """text("--key=value", ...) -> the one text that sample.py writes, prompt included."""

    def call(*words, **kw):
        done = write(*words, **kw)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout.endswith("\n" + RULE)
        return done.stdout.removesuffix("\n" + RULE)

    return call


@pytest.fixture
def refused(write):
    """refused("--key=value", ...) -> what sample.py says on its one line to a user's mistake."""

    def call(*words, **kw):
        done = write(*words, **kw)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("sample.py: error: ") and done.stderr.count("\n") == 1
        return done.stderr

    return call


def chars(run):
    return load_checkpoint(run / "ckpt.pt")["meta"]["chars"]


# -- prompts ------------------------------------------------------------------------------------------------------


def test_the_command_itself(run, cli, text, tmp_path):
    """From another working directory, the data gone."""
    words = ["--start=ROMEO:", "--max_new_tokens=40", "--seed=5"]
    done = cli("sample.py", f"--out_dir={run}", "--device=cpu", *words, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == text(*words) + "\n" + RULE


@pytest.mark.parametrize("start", ["ROMEO:", "O", "To be, or not\nto be", " "])
def test_start(text, start):
    written = text(f"--start={start}", "--max_new_tokens=30")
    assert written.startswith(start) and len(written) == len(start) + 30


def test_start_with_an_equals_sign_reaches_the_model(refused):
    assert "'='" in refused("--start=a=b")  # Shakespeare has none


def test_start_from_a_file(text, tmp_path):
    (tmp_path / "prompt.txt").write_text("JULIET:\nO Romeo", encoding="utf-8")
    words = ["--max_new_tokens=20", "--temperature=0"]
    assert text(f"--start=FILE:{tmp_path}/prompt.txt", *words) == text("--start=JULIET:\nO Romeo", *words)


def test_start_from_standard_input(text, monkeypatch, run, cli):
    words = ["--max_new_tokens=20", "--temperature=0"]
    expected = text("--start=JULIET:\n", *words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"JULIET:\n")))
    assert text("--start=-", *words) == expected
    done = cli("sample.py", f"--out_dir={run}", "--device=cpu", "--start=-", *words, input="JULIET:\n")
    assert done.stdout == expected + "\n" + RULE


def test_a_prompt_longer_than_the_context(text):
    start = "".join(LINES)[:100]
    assert text(f"--start={start}", "--max_new_tokens=10").startswith(start)


# -- sampling -----------------------------------------------------------------------------------------------------


def test_greedy_is_generate(text, model, run):
    ids = chars(run)
    idx = torch.tensor([[ids.index(c) for c in "HAMLET: "]])
    expected = "".join(ids[i] for i in model.generate(idx, 60, temperature=0)[0])
    assert text("--start=HAMLET: ", "--max_new_tokens=60", "--temperature=0") == expected
    assert text("--start=HAMLET: ", "--max_new_tokens=60", "--temperature=0", "--seed=9") == expected
    assert text("--start=HAMLET: ", "--max_new_tokens=60", "--temperature=0", "--no-use_cache") == expected


def test_every_setting_reaches_generate(text, model, run):
    ids = chars(run)
    idx = torch.tensor([[ids.index(c) for c in "HAMLET"]])
    rules = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    rules["repetition_window"] = 7
    expected = model.generate(idx, 60, generator=torch.Generator().manual_seed(3), **rules)
    written = text("--start=HAMLET", "--max_new_tokens=60", "--seed=3", *(f"--{k}={v}" for k, v in rules.items()))
    assert written == "".join(ids[i] for i in expected[0])


def test_seed(text):
    a, b, c = (text("--start=O", "--max_new_tokens=60", f"--seed={s}", "--top_k=None") for s in (1, 1, 2))
    assert a == b != c


def test_samples_are_a_batch(write, text):
    done = write("--start=ROMEO:", "--num_samples=4", "--max_new_tokens=25")
    *texts, rest = done.stdout.split("\n" + RULE)
    assert rest == "" and len(texts) == len(set(texts)) == 4
    assert all(t.startswith("ROMEO:") and len(t) == 6 + 25 for t in texts)
    greedy = write("--start=ROMEO:", "--num_samples=3", "--max_new_tokens=25", "--temperature=0").stdout
    assert greedy == 3 * (text("--start=ROMEO:", "--max_new_tokens=25", "--temperature=0") + "\n" + RULE)


def test_bfloat16_weights(text):
    assert len(text("--start=O", "--max_new_tokens=30", "--dtype=bfloat16")) == 31


# -- stop strings -------------------------------------------------------------------------------------------------


WORDS = ["--start=O", "--max_new_tokens=80", "--seed=4", "--temperature=1"]


def cut(whole, *stops):
    """What is left of a text whose first character is the prompt."""
    ends = [end for s in stops if (end := whole.find(s, 1)) >= 0]
    return whole[: min(ends)] if ends else whole


def test_stop(text):
    whole = text(*WORDS)
    for stops in [(whole[30:33],), (whole[40:46], whole[20:22]), (whole[1:3],), ("~never~",), ("e",)]:
        assert text(*WORDS, *(f"--stop={s}" for s in stops)) == cut(whole, *stops)
    assert text(*WORDS, f"--stop={whole[0:2]}") == cut(whole, whole[0:2])  # the prompt itself never stops a text


def test_each_text_stops_for_itself(write):
    words = ["--start=O", "--num_samples=5", "--max_new_tokens=60", "--temperature=1"]
    whole = write(*words).stdout.split("\n" + RULE)[:-1]
    stopped = write(*words, "--stop=e").stdout.split("\n" + RULE)[:-1]
    assert stopped == [cut(w, "e") for w in whole] and len({len(s) for s in stopped}) > 1


def test_nothing_is_generated_after_the_last_stop(text, monkeypatch):
    steps = []
    stream = GPT.stream

    def counted(*args, **kw):
        for new in stream(*args, **kw):
            steps.append(new)
            yield new

    monkeypatch.setattr(GPT, "stream", counted)
    stopped = text(*WORDS, "--stop=e")
    assert len(steps) == len(stopped) < 80  # the prompt is one character, and so is the stop


# -- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 9, 80])
def test_stream_prints_the_same_text(write, text, n):
    words = [*WORDS, f"--max_new_tokens={n}"]
    long = text(*WORDS)
    for stops in [(), ("\n",), (long[6:9],), (long[5:13],), ("a stop that never comes",), (long[2:8], long[4:6])]:
        flags = [f"--stop={s}" for s in stops]
        assert write(*words, "--stream", *flags).stdout == text(*words, *flags) + "\n", stops


def test_stream_comes_in_pieces(write, text, monkeypatch):
    """A character is written as soon as it cannot be part of a stop string."""
    whole, pieces = text(*WORDS), []
    monkeypatch.setattr(sample, "print", lambda piece="", **_: pieces.append(piece), raising=False)
    write(*WORDS, "--stream", "--stop=~~~")
    pieces = [p for p in pieces if p]
    start, *grown, rest = pieces
    assert start + "".join(grown) + rest == whole.rstrip("\n")
    assert all(len(p) == 1 for p in grown) and len(rest) == 2


class Scripted:
    """A model that writes what it is told: rows of token ids."""

    config = SimpleNamespace(vocab_size=259)

    def __init__(self, *rows):
        self.rows = rows

    def to(self, *args):
        return self

    def eval(self):
        return self

    def stream(self, idx, n, *rules, known_ids):
        for t in range(n):
            yield torch.tensor([[row[t]] for row in self.rows])


def utf8(text):
    return Byte().encode(text)


@pytest.mark.parametrize("stops", [(), ("!",), ("\u2603x",), ("never",)])
def test_characters_of_several_bytes(write, text, monkeypatch, stops):
    story = "h\u00e9llo \u2603\u2603x \U0001f600!"
    ids = utf8(story)
    monkeypatch.setattr(sample, "load", lambda cfg: (Scripted(ids), Byte()))
    words = ["--start=:", *(f"--stop={s}" for s in stops)]
    for n in range(1, len(ids) + 1):  # it may end inside a character
        whole = cut(":" + bytes(i - 3 for i in ids[:n]).decode("utf-8", errors="replace"), *stops)
        assert text(*words, f"--max_new_tokens={n}") == whole
        assert write(*words, f"--max_new_tokens={n}", "--stream").stdout == whole + "\n"


def test_end_of_text_ends_a_text(write, monkeypatch):
    rows = [utf8("ab") + [Byte.eot] + utf8("cd"), utf8("vwxyz")]
    monkeypatch.setattr(sample, "load", lambda cfg: (Scripted(*rows), Byte()))
    done = write("--start=:", "--num_samples=2", "--max_new_tokens=5")
    assert done.stdout == f":ab\n{RULE}:vwxyz\n{RULE}"


# -- checkpoints --------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_taken_first(text, run, tmp_path):
    words = ["--start=O", "--max_new_tokens=40", "--temperature=0"]
    shutil.copy(run / "ckpt_last.pt", tmp_path / "ckpt_last.pt")
    last = text(*words, out_dir=tmp_path)
    worse = torch.load(run / "ckpt.pt", weights_only=True)
    worse["model"] = {k: torch.zeros_like(v) for k, v in worse["model"].items()}
    torch.save(worse, tmp_path / "ckpt.pt")
    assert text(*words, out_dir=tmp_path) != last
    assert text(*words, "--checkpoint=ckpt_last.pt", out_dir=tmp_path) == last


@pytest.fixture
def nanogpt(run, tmp_path):
    """A checkpoint as nanoGPT writes it with torch.compile and without flash attention."""
    ours = torch.load(run / "ckpt.pt", weights_only=True)
    args = {
        k: ours["model_args"][k] for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    weights = {f"_orig_mod.{k}": v for k, v in ours["model"].items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    config = {"out_dir": "out", "dataset": "verse", "init_from": "scratch", "batch_size": 12, "device": "cuda"}
    torch.save(
        {"model": weights, "optimizer": ours["optimizer"], "model_args": args, "iter_num": 20,
         "best_val_loss": torch.tensor(3.2), "config": config},
        tmp_path / "ckpt.pt",
    )  # fmt: skip
    return tmp_path


def test_nanogpts_checkpoint(text, refused, nanogpt, shakespeare):
    words = ["--start=HAMLET: ", "--max_new_tokens=40", "--temperature=0"]
    data = nanogpt / "data" / "verse"
    shutil.copytree(shakespeare, data)
    assert text(*words, f"--data_dir={data.parent}", out_dir=nanogpt) == text(*words)
    (data / "meta.json").unlink()
    (data / "meta.pkl").write_bytes(b"cos\nsystem\n(S'exit 3'\ntR.")
    assert "it asks for os.system" in refused(*words, f"--data_dir={data.parent}", out_dir=nanogpt)


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_with_code_is_refused_unrun(refused, run, tmp_path):
    torch.save(torch.load(run / "ckpt.pt", weights_only=True) | {"evil": Touch(tmp_path / "hit")}, tmp_path / "ckpt.pt")
    assert "code" in refused(out_dir=tmp_path)
    assert not (tmp_path / "hit").exists()


def spoil(checkpoint, how):
    whole = checkpoint.read_bytes()
    if how == "empty":
        checkpoint.write_bytes(b"")
    elif how == "text":
        checkpoint.write_text("not a checkpoint")
    elif how == "truncated":
        checkpoint.write_bytes(whole[: len(whole) // 2])
    elif how == "list":
        torch.save([1, 2], checkpoint)
    else:
        saved = torch.load(checkpoint, weights_only=True)
        if how == "newer":
            saved["format"] = 99
        elif how == "other width":
            saved["model_args"]["n_embd"] = 64
        elif how == "unknown flag":
            saved["model_args"]["warp_drive"] = True
        torch.save(saved, checkpoint)


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "list", "newer", "other width", "unknown flag"])
def test_refused_checkpoint(refused, run, tmp_path, how):
    shutil.copy(run / "ckpt.pt", tmp_path / "ckpt.pt")
    spoil(tmp_path / "ckpt.pt", how)
    said = refused(out_dir=tmp_path)
    assert {"newer": "format 99", "unknown flag": "warp_drive", "other width": "does not fit"}.get(
        how, "ckpt.pt"
    ) in said


# -- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--start=ROMEO #5"], "not in the vocabulary"),
        (["--start="], "empty"),
        (["--start=FILE:/no/such/file"], "/no/such/file"),
        (["--start=FILE:/"], "cannot be read"),
        (["--checkpoint=other.pt"], "other.pt: no such checkpoint"),
        (["--temperature=-1"], "temperature"),
        (["--temperature=nan"], "temperature"),
        (["--top_p=1.5"], "top_p"),
        (["--top_p=0"], "top_p"),
        (["--top_k=0"], "top_k"),
        (["--min_p=2"], "min_p"),
        (["--repetition_penalty=0"], "repetition_penalty"),
        (["--num_samples=0"], "num_samples=0"),
        (["--max_new_tokens=0"], "max_new_tokens=0"),
        (["--num_samples=2", "--stream"], "num_samples=1"),
        (["--stop="], "stop"),
        (["--dtype=int8"], "dtype"),
        (["--device=tpu"], "--device=tpu"),
        (["--top_kk=3"], "did you mean top_k"),
        (["--init_from=gpt9"], "gpt9"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_mistake(refused, words, said):
    assert said in refused("--start=O", *words)


def test_no_checkpoint(refused, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "ckpt.pt: no such checkpoint" in refused(out_dir=folder)


def test_a_prompt_that_is_not_text(refused, tmp_path, run, cli):
    (tmp_path / "p").write_bytes(b"ROMEO\xff\xfe")
    assert f"FILE:{tmp_path}/p" in refused(f"--start=FILE:{tmp_path}/p")
    done = cli("sample.py", f"--out_dir={run}", "--device=cpu", "--start=-", input=b"ROMEO\xff\xfe")
    assert done.returncode == 2 and b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1


def test_nothing_on_standard_input(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "empty" in refused("--start=-")


def test_mistake_in_a_process_of_its_own(cli, tmp_path):
    done = cli("sample.py", f"--out_dir={tmp_path}", "--device=cpu")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: error: ")


def test_escapes_in_prompts_and_stops(text):
    """A shell passes backslash and n: here they are a newline."""
    assert sample.unescape(r"a\nb\tc\\n\x") == "a\nb\tc\\n\\x"
    assert text(r"--start=HAMLET:\n", "--max_new_tokens=5").startswith("HAMLET:\n")
    assert text("--start=HAMLET: ", "--max_new_tokens=200", r"--stop=\n").count("\n") <= 1


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 258), max_size=40), st.lists(st.sampled_from(["a", "\n\n", "\u00e9"]), max_size=2))
@example(ids=[240, 163], stops=[])  # the beginning of a surrogate, which is two errors and no half character
def test_a_growing_text_is_the_whole_decoded(ids, stops):
    """Token by token, each decoded once: as decoding all of them again after each, broken UTF-8 included."""
    tokenizer, row = Byte(), sample.Growing(Byte(), stops)
    for n, token in enumerate(ids, start=1):
        row.add(token)
        until = ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids[:n] else ids[:n]
        whole = tokenizer.decode(until)
        ends = [whole.find(stop) for stop in stops if stop in whole]
        assert row.text == (whole[: min(ends)] if ends else whole)
        if row.ended:
            break
