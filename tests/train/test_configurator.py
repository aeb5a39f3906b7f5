"""Config files and flags: what users type, what they get, and what they are told when it is wrong."""

import importlib
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st

import configurator
import train
from configurator import ConfigError, check_values, inside, one_line_errors, read
from helpers import PATIENCE, ROOT
from model import GPTConfig
from train import TrainConfig


@dataclass
class Optim:
    # -- optimiser --------------------
    learning_rate: float = 6e-4  # peak learning rate
    min_lr: float = 6e-5  # where the decay ends
    max_iters: int = 1000  # optimiser steps
    top_k: int | None = None  # None keeps every token
    clip: float | None = 1.0  # None clips nothing
    # -- run ----
    compile: bool = True  # torch.compile
    resume: bool = False  # go on from out_dir
    out_dir: str = "out"  # checkpoints go here
    start: str = "\n"  # the prompt
    stop: tuple = ()  # ends a sample
    tags: tuple[str, ...] = ("a", "b")  # for the log


@dataclass
class Model:
    # -- shape ----
    n_layer: int = 12  # blocks
    dropout: float = 0.0  # 0 = none

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError("n_layer must be positive:\nwrite --n_layer=1")


def settings(*words, **kw):
    return read(words, Optim, Model, **kw)


def value(*words):
    """The one value that `words` changed."""
    found = settings(*words)
    (name,) = found.given
    return found.values[name]


@pytest.fixture
def file(tmp_path):
    """file(text) -> path of a config file that holds it."""

    def write(text, name="c.py"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def same(a, b):
    """Equal in value and type; nan equals nan."""
    return type(a) is type(b) and (a == b or (a != a and b != b))


# -- words on the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--learning_rate=1", 1.0),
        ("--learning_rate=1e-3", 1e-3),
        ("--learning_rate -0.5", -0.5),
        ("--learning_rate=inf", math.inf),
        ("--learning_rate=nan", math.nan),
        ("--learning-rate=2", 2.0),
        ("--dropout=0", 0.0),
        ("--max_iters=500", 500),
        ("--max_iters 500", 500),
        ("--max-iters -5", -5),
        ("--max_iters=1e3", 1000),
        ("--max_iters=2.0", 2),
        ("--max_iters=9007199254740993", 2**53 + 1),
        ("--top_k=5", 5),
        ("--top_k None", None),
        ("--top_k=none", None),
        ("--clip=1", 1.0),
        ("--clip=None", None),
        ("--compile", True),
        ("--compile=false", False),
        ("--compile false", False),
        ("--compile False", False),
        ("--compile=0", False),
        ("--resume on", True),
        ("--no-compile", False),
        ("--no_compile", False),
        ("--out_dir=out/x", "out/x"),
        ("--out_dir x.py", "x.py"),
        ("--out_dir=None", "None"),
        ("--out_dir=3", "3"),
        ("--start=a=b", "a=b"),
        ("--start=-", "-"),
        ("--start -", "-"),
        ("--start=", ""),
        ("--start=--compile", "--compile"),
        ("--stop=x", ("x",)),
        ("--stop=x --stop y --stop=", ("x", "y", "")),
        ("--tags=c", ("c",)),  # replaces the default, adds to itself
        ("--max_iters=1 --max_iters=2", 2),
    ],
)
def test_flag(words, expected):
    assert same(value(*words.split(" ")), expected)


def test_a_value_may_hold_anything():
    assert value("--start", "") == ""
    assert value("--start=two words\n and a line") == "two words\n and a line"
    assert value("--start", "a.py b=c") == "a.py b=c"


def test_flag_takes_no_word_that_is_not_a_bool(file):
    found = settings("--resume", file("max_iters = 3"), "--no-compile", "--max_iters=4")
    assert found.values["resume"] is True and found.values["compile"] is False and found.values["max_iters"] == 4


def test_nothing_given_is_the_defaults():
    found = settings()
    assert found.given == set() and found.values == vars(Optim()) | vars(Model())


@pytest.mark.parametrize(
    "words, said",
    [
        ("--learning_rate=fast", "--learning_rate=fast: expected float"),
        ("--learning_rate=", "--learning_rate=: expected float"),
        ("--max_iters=1.5", "--max_iters=1.5: expected int"),
        ("--max_iters=1e-3", "--max_iters=1e-3: expected int"),
        ("--max_iters=1e999", "--max_iters=1e999: expected int"),
        ("--max_iters=nan", "--max_iters=nan: expected int"),
        ("--max_iters=None", "--max_iters=None: expected int"),
        ("--max_iters=true", "--max_iters=true: expected int"),
        ("--max_iters=" + "9" * 5000, "expected int"),
        ("--top_k=few", "--top_k=few: expected int or None"),
        ("--compile=maybe", "--compile=maybe: expected bool"),
        ("--compile=", "--compile=: expected bool"),
        ("--max_iters", "--max_iters: a value is missing (int)"),
        ("--max_iters --compile", "--max_iters: a value is missing (int)"),
        ("--config", "--config: a value is missing"),
        ("--no-max_iters", "unknown key 'no_max_iters'; did you mean max_iters"),
        ("--no-compile=true", "unknown key 'no_compile'; did you mean compile"),
        ("--no-compile false", "false: expected a config file ending in .py"),
        ("--learnin_rate=1", "unknown key 'learnin_rate'; did you mean learning_rate?"),
        ("--n_layers=1", "did you mean n_layer?"),
        ("--zzz=1", "--zzz: unknown key 'zzz'; see --help"),
        ("--", "unknown key ''; see --help"),
        ("-compile", "-compile: flags are written --key=value"),
        ("max_iters=3", "max_iters=3: expected a config file ending in .py, or --key=value"),
        ("no_such.py", "no_such.py: no such config file"),
        ("x" * 5000 + ".py", "no such config file"),
    ],
)
def test_refused_flag(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings(*words.split(" "))


def test_aliases():
    def devices(text):
        raise ConfigError(f"--devices={text}: use torchrun")

    aliases = {"precision": lambda text: {"out_dir": text, "compile": False}, "devices": devices}
    found = settings("--precision", "bf16-mixed", aliases=aliases)
    assert found.values["out_dir"] == "bf16-mixed" and found.given == {"out_dir", "compile"}
    assert settings("--precision=a", "--out_dir=b", aliases=aliases).values["out_dir"] == "b"  # the later one wins
    with pytest.raises(ConfigError, match="--devices=2: use torchrun"):
        settings("--devices=2", aliases=aliases)
    with pytest.raises(ConfigError, match="--precision: a value is missing"):
        settings("--precision", aliases=aliases)


# -- config files -------------------------------------------------------------------------------------------------


def test_files_in_order_then_flags(file):
    a = file("max_iters = 1\nlearning_rate = 1\nout_dir = 'a'", "a.py")
    b = file("max_iters = max_iters + 10\nout_dir = 'b'", "b.py")
    found = settings("--out_dir=flag", a, "--config", b)
    assert found.values["max_iters"] == 11
    assert same(found.values["learning_rate"], 1.0)
    assert found.values["out_dir"] == "flag"
    assert found.given == {"max_iters", "learning_rate", "out_dir"}
    assert settings(b, f"--config={a}").values["max_iters"] == 1


def test_a_file_is_python(file):
    path = file('''
"""Anything that computes a value."""
import math
from math import sqrt as root
_scale = 4
def lr(steps):
    seed, dropout = steps * _scale, 0.9  # a function's own names are not keys
    return 1 / seed
class Box:
    n_layer = 99
learning_rate = lr(root(16))
min_lr = learning_rate / 10
tags = [str(n_layer) for n_layer in range(3)]
max_iters = sum(i for i in range(5)) + math.floor(2.5)
max_iters *= 2
if max_iters > 3:
    n_layer: int = 6
top_k = None
clip, compile = 1, False
''')
    found = settings(path)
    assert found.given == {"learning_rate", "min_lr", "tags", "max_iters", "n_layer", "top_k", "clip", "compile"}
    v = found.values
    assert (v["learning_rate"], v["min_lr"], v["max_iters"], v["n_layer"]) == (1 / 16, 1 / 160, 24, 6)
    assert v["tags"] == ("0", "1", "2") and v["top_k"] is None and v["compile"] is False and same(v["clip"], 1.0)
    assert v["dropout"] == 0.0


def test_a_comprehension_over_a_keys_name_gives_no_key(file):
    assert settings(file("out_dir = '-'.join(str(n_layer) for n_layer in (1, 2))")).given == {"out_dir"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("max_iters = 2.0", 2),
        ("max_iters = int(1e3)", 1000),
        ("dropout = 0", 0.0),
        ("dropout = float('nan')", math.nan),
    ],
)
def test_int_and_float_in_a_file(file, text, expected):
    assert same(value(file(text)), expected)


@pytest.mark.parametrize(
    "text, said",
    [
        ("dropout = 'x'", "--dropout='x': expected float"),
        ("dropout = None", "--dropout=None: expected float"),
        ("dropout = 10 ** 400", "expected float"),
        ("max_iters = 2.5", "--max_iters=2.5: expected int"),
        ("max_iters = True", "--max_iters=True: expected int"),
        ("max_iters = '3'", "--max_iters='3': expected int"),
        ("compile = 1", "--compile=1: expected bool"),
        ("out_dir = 3", "--out_dir=3: expected str"),
        ("top_k = 'all'", "--top_k='all': expected int or None"),
        ("stop = 'x'", "--stop='x': expected str, may be repeated"),
        ("stop = (1, 2)", "--stop=(1, 2): expected str"),
        ("learnin_rate = 1", "unknown key 'learnin_rate'; did you mean learning_rate?"),
        ("for i in range(3):\n    max_iters = i", "unknown key 'i'"),
        ("max_iters = = 3", "SyntaxError: invalid syntax (c.py, line 1)"),
        ("max_iters = (3", "SyntaxError"),
        ("max_iters = 3\0", "null bytes"),
        ("max_iters = nope", "NameError: name 'nope' is not defined"),
        ("max_iters = 1 / 0", "ZeroDivisionError"),
        ("max_iters = {}['a']", "KeyError: 'a'"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("max_iters = open('no_such_file')", "No such file"),
        ("assert max_iters == 3, 'three'", "AssertionError: three"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
    ],
)
def test_refused_file(file, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings(file(text))


def test_refused_file_is_named(file):
    for text in ("nope = 1", "nope", "nope nope", "dropout = 'x'"):
        with pytest.raises(ConfigError, match=r"c\.py(, line 1)?: "):
            settings(file(text))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "c.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        settings(str(tmp_path / "c.py"))
    (tmp_path / "d.py").mkdir()
    with pytest.raises(ConfigError, match="no such config file"):
        settings(str(tmp_path / "d.py"))


def test_files_are_found_beside_configurator_too(file, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    (repository / "config").mkdir(parents=True)
    (repository / "config" / "a.py").write_text("max_iters = 7")
    monkeypatch.setattr(configurator, "ROOT", repository)
    monkeypatch.chdir(tmp_path)
    assert value("config/a.py") == 7
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "a.py").write_text("max_iters = 8")
    assert value("config/a.py") == 8  # the working directory comes first


# -- what is printed ----------------------------------------------------------------------------------------------


def printed(capsys, *words, **kw):
    with pytest.raises(SystemExit) as stopped:
        settings(*words, **kw)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(capsys, word):
    out = printed(capsys, word, "no_such.py", doc="\nThe script's own words.\n")
    assert out.startswith("The script's own words.\n")
    for line in (
        "  --learning_rate=0.0006  (float)  peak learning rate",
        "  --top_k=None  (int or None)  None keeps every token",
        "  --clip=1.0  (float or None)  None clips nothing",
        "  --compile=True  (bool)  torch.compile",
        r"  --start='\n'  (str)  the prompt",
        "  --tags=('a', 'b')  (str, may be repeated)  for the log",
        "  --n_layer=12  (int)  blocks",
    ):
        assert out.count(line + "\n") == 1
    keys = re.findall(r"^  --(\w+)=", out, re.M)
    assert keys == [*vars(Optim()), *vars(Model())]
    assert re.findall(r"^(\w+):$", out, re.M) == ["optimiser", "run", "shape"]
    assert out.index("\noptimiser:") < out.index("--learning_rate") < out.index("\nrun:") < out.index("--compile")


def test_print_config_runs_what_the_run_would_refuse(capsys):
    assert "n_layer = 3\n" in printed(capsys, "--print_config", "--n_layer=3")
    with pytest.raises(ConfigError, match="n_layer must be positive"):
        settings("--print-config", "--n_layer=0")


number = st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.fixed_dictionaries(
    {
        "learning_rate": number,
        "max_iters": st.integers(),
        "top_k": st.none() | st.integers(),
        "clip": st.none() | number,
        "compile": st.booleans(),
        "out_dir": st.text(),
        "start": st.text(st.characters(exclude_categories=[])),  # lone surrogates too: bytes that were not UTF-8
        "tags": st.lists(st.text(), max_size=3).map(tuple),
        "n_layer": st.integers(1, 10**6),
    }
)


@given(values=VALUES)
@example(values={"learning_rate": math.nan, "min_lr": math.inf, "clip": -math.inf})
@pytest.mark.slow
def test_print_config_is_a_config_file(values, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "printed.py"
    defaults = settings()
    with path.open("w", encoding="utf-8") as f, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", f)
        configurator.print_config(configurator.Settings(defaults.keys, defaults.values | values, set(values)))
    again = settings(str(path))
    assert all(same(again.values[k], v) for k, v in (defaults.values | values).items())
    assert again.given == set(values)  # a default that is printed does not become a choice


def test_build():
    found = settings("--n_layer=3", "--compile=no")
    assert found.build(Model, dropout=0.5) == Model(3, 0.5)
    assert found.build(Optim) == Optim(compile=False)
    with pytest.raises(ConfigError, match="n_layer must be positive"):
        found.build(Model, n_layer=0)


# -- no words make it fall over -----------------------------------------------------------------------------------


@given(st.text())
@pytest.mark.slow
def test_any_text_survives(text):
    assert value(f"--start={text}") == text


@given(st.text().filter(lambda t: not t.startswith("--")))
@pytest.mark.slow
def test_any_text_survives_as_a_separate_word(text):
    assert value("--start", text) == text


names = st.sampled_from([*vars(Optim()), "config", "help", "print_config", "no-compile", "no-max_iters", "nope", ""])
texts = st.sampled_from(["", "-", "-1", "1e3", "nan", "true", "None", "a=b", "x.py"]) | st.text(max_size=5)
a_word = st.one_of(
    texts,
    names.map("--{}".format),
    st.builds("--{}={}".format, names, texts),
    st.text(max_size=8).map("--{}".format),
    st.text(max_size=8).map("{}.py".format),
)


@given(st.lists(a_word, max_size=6))
@pytest.mark.slow
def test_any_words_are_accepted_or_refused_in_words(words):
    try:
        found = settings(*words)
    except ConfigError as e:
        assert str(e)
    except SystemExit as e:
        assert e.code == 0
    else:
        assert all(type(v) in found.keys[k].kinds or found.keys[k].is_tuple for k, v in found.values.items())


# -- values that a dataclass checks for itself --------------------------------------------------------------------

RANGES = {"steps limit": "[1, inf)", "rate": "(0, 1]", "scale": "[0, inf]", "seed": "[0, 2^32)"}


@dataclass
class Checked:
    # -- checked ----
    steps: int = 3  # how many
    limit: int | None = None  # at most
    rate: float = 0.5  # step size
    scale: float = 1.0  # may be infinite
    seed: int = 0  # for random numbers
    shift: float = 0.0  # in no interval
    fast: bool = False  # switch
    name: str = ""  # anything
    mode: Literal["a", "b"] = "a"  # first letter | second letter
    kind: Literal["", "x"] | None = None  # none | one | unknown
    tags: tuple[str, ...] = ()  # some

    def __post_init__(self):
        check_values(self, RANGES)


@pytest.mark.parametrize(
    "name, given, stored",
    [
        ("steps", np.int64(3), 3),
        ("steps", np.array(3), 3),
        ("steps", torch.tensor(3), 3),
        ("steps", 2.0, 2),
        ("steps", 2**62, 2**62),
        ("limit", None, None),
        ("limit", np.uint8(4), 4),
        ("rate", 1, 1.0),
        ("rate", np.float64(0.25), 0.25),
        ("rate", torch.tensor(0.25), 0.25),
        ("scale", math.inf, math.inf),
        ("shift", math.nan, math.nan),
        ("seed", 2**32 - 1, 2**32 - 1),
        ("fast", np.bool_(True), True),
        ("fast", torch.tensor(True), True),
        ("name", "3", "3"),
        ("mode", "b", "b"),
        ("kind", None, None),
        ("kind", "", ""),
        ("tags", ["a"], ("a",)),
    ],
)
def test_values_that_fit(name, given, stored):
    assert same(getattr(Checked(**{name: given}), name), stored)


@pytest.mark.parametrize(
    "name, given, said",
    [
        ("steps", 2.5, "steps=2.5: expected int in [1, inf)"),
        ("steps", True, "steps=True: expected int in [1, inf)"),
        ("steps", np.bool_(True), "steps=True: expected int in [1, inf)"),
        ("steps", math.nan, "steps=nan: expected int in [1, inf)"),
        ("steps", math.inf, "steps=inf: expected int in [1, inf)"),
        ("steps", "3", "steps='3': expected int in [1, inf)"),
        ("steps", None, "steps=None: expected int in [1, inf)"),
        ("steps", torch.tensor([3]), "steps=tensor([3]): expected int in [1, inf)"),
        ("steps", 0, "steps=0: must be in [1, inf)"),
        ("limit", "all", "limit='all': expected int in [1, inf) or None"),
        ("limit", 0, "limit=0: must be in [1, inf)"),
        ("rate", math.nan, "rate=nan: must be in (0, 1]"),
        ("rate", math.inf, "rate=inf: must be in (0, 1]"),
        ("rate", 0, "rate=0.0: must be in (0, 1]"),
        ("rate", True, "rate=True: expected float in (0, 1]"),
        ("rate", "0.5", "rate='0.5': expected float in (0, 1]"),
        ("scale", -math.inf, "scale=-inf: must be in [0, inf]"),
        ("seed", 2**32, "seed=4294967296: must be in [0, 2^32)"),
        ("fast", "False", "fast='False': expected bool"),
        ("fast", 1, "fast=1: expected bool"),
        ("name", 3, "name=3: expected str"),
        ("mode", "c", "mode='c': must be one of a, b"),
        ("mode", None, "mode=None: must be one of a, b"),
        ("kind", "y", "kind='y': must be one of '', x"),
        ("tags", "a", "tags='a': expected tuple"),
    ],
)
def test_values_that_do_not_fit(name, given, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        Checked(**{name: given})


def test_intervals():
    assert [inside(x, "[0, 1)") for x in (-1, 0, 0.5, 1, math.nan)] == [False, True, True, False, False]
    assert [inside(x, "(0, inf)") for x in (0, 1e-300, 10**400, math.inf)] == [False, True, True, False]
    assert inside(-math.inf, "[-inf, 0]") and not inside(-math.inf, "(-inf, 0]")


def test_choices_on_the_command_line(capsys):
    assert read(["--mode=b"], Checked).build(Checked).mode == "b"
    with pytest.raises(ConfigError, match="^mode='c': must be one of a, b$"):
        read(["--mode=c"], Checked).build(Checked)
    with pytest.raises(ConfigError, match="^--mode: a value is missing \\(str\\)$"):
        read(["--mode"], Checked)
    with pytest.raises(SystemExit):
        read(["--help"], Checked)
    assert """  --mode='a'  (str)  "a" | "b": first letter | second letter\n""" in capsys.readouterr().out


# -- as a user sees it --------------------------------------------------------------------------------------------

SCRIPT = '''
"""A tiny script."""
import sys
from dataclasses import dataclass
sys.path.insert(0, {root!r})
from configurator import one_line_errors, read

@dataclass
class Tiny:
    # -- tiny ----
    steps: int = 3  # how many
    name: str = "é"  # whose

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError("steps is negative:\\n  write --steps=0")

with one_line_errors("tiny.py", OSError):
    settings = read(sys.argv[1:], Tiny, doc=__doc__)
    tiny = settings.build(Tiny)
    if tiny.name == "gone":
        open("no_such_file")
    print(tiny.steps, tiny.name)
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    (folder / "tiny.py").write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    (folder / "bad.py").write_text("steps = 'x'\n")

    def run(*words):
        command = [sys.executable, str(folder / "tiny.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, timeout=PATIENCE)

    return run


@pytest.mark.parametrize(
    "words, said",
    [
        (["--step=1"], "--step: unknown key 'step'; did you mean steps?"),
        (["--steps=x"], "--steps=x: expected int"),
        (["--steps=-1"], "steps is negative: write --steps=0"),
        (["bad.py"], "bad.py: --steps='x': expected int"),
        (["--name=gone"], "[Errno 2] No such file or directory: 'no_such_file'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, words, said):
    done = script(*words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tiny.py: error: {said}\n")


def test_a_script_that_is_right(script):
    assert script("--steps=4").stdout == "4 é\n"
    done = script("--help")
    assert done.returncode == 0 and "--steps=3  (int)  how many" in done.stdout and done.stderr == ""


def test_one_line_errors_lets_other_errors_through():
    with pytest.raises(KeyError), one_line_errors("x", OSError):
        raise KeyError("a bug is not a user's mistake")


# ---------------------------------------------------------------------------------------------------------------------
# A preset alone, after a recipe, by another's path; switches turned off over it.


def resolved(*words):
    return configurator.read([str(w) for w in words], TrainConfig, GPTConfig)


def test_base_holds_only_for_a_file_that_comes_first(tmp_path):
    (tmp_path / "recipe.py").write_text("batch_size, learning_rate = 3, 0.5\n")
    (tmp_path / "preset.py").write_text(
        f"base({str(tmp_path / 'recipe.py')!r}, init_from='auto', batch_size=4)\n"
        "min_lr = learning_rate / 10\nn_layer = 2\n"
    )
    (tmp_path / "other.py").write_text("learning_rate = 0.25\n")
    alone = resolved(tmp_path / "preset.py")
    names = ("batch_size", "learning_rate", "min_lr", "init_from", "n_layer")
    assert [alone.values[n] for n in names] == [4, 0.5, 0.05, "auto", 2] and alone.given == set(names)
    after = resolved(tmp_path / "other.py", tmp_path / "preset.py")
    assert [after.values[n] for n in names] == [12, 0.25, 0.025, "scratch", 2]
    assert after.given == {"learning_rate", "min_lr", "n_layer"}
    (tmp_path / "preset.py").write_text("base('no_such.py')")
    with pytest.raises(ConfigError, match="no_such"):
        resolved(tmp_path / "preset.py")
    (tmp_path / "preset.py").write_text("base('config/train_gpt2.py', batch=4)")
    with pytest.raises(ConfigError, match="unknown key 'batch'"):
        resolved(tmp_path / "preset.py")


@pytest.mark.parametrize("path", ["neuromanifold_gpt/config/presets/nano.py", "/elsewhere/nano.py", "config/nano.py"])
def test_the_originals_paths_are_found_by_their_last_part(path, capsys):
    assert resolved("--config", path).values == resolved("config/presets/nano.py").values
    assert capsys.readouterr().err == f"{path}: taken for config/presets/nano.py\n"
    with pytest.raises(ConfigError, match=r"no_such\.py: no such config file"):
        resolved("neuromanifold_gpt/config/presets/no_such.py")


def test_a_switch_turned_off_takes_its_flags_along(tmp_path, capsys):
    (tmp_path / "a.py").write_text("use_mfs_head, mfs_K, use_sdr, sdr_size, sdr_rule = True, 5, True, 1024, 'delta'\n")
    (tmp_path / "b.py").write_text("use_sdr = False\n")
    settings = resolved(tmp_path / "a.py", tmp_path / "b.py", "--no-use_mfs_head")
    settings.build(GPTConfig)
    assert settings.given == {"use_mfs_head", "use_sdr"}
    told = capsys.readouterr().err
    assert told.count("\n") == 3 and "mfs_K=5: left out, the command line turns its switch off" in told
    assert f"sdr_size=1024: left out, {tmp_path / 'b.py'} turns" in told
    resolved(tmp_path / "a.py", tmp_path / "b.py", "--no-use_mfs_head")
    assert capsys.readouterr().err == ""  # once is enough
    with pytest.raises(ConfigError, match="mfs_K"):  # what the command line itself says is not dropped
        resolved(tmp_path / "a.py", "--no-use_mfs_head", "--mfs_K=7").build(GPTConfig)
    (tmp_path / "c.py").write_text("sdr_size = 1024\n")  # idle from the start, in a file of its own
    with pytest.raises(ConfigError, match="sdr_size"):
        resolved(tmp_path / "c.py", "--n_layer=2").build(GPTConfig)


def test_other_tools_names_are_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert "--precision" in told and "bf16-mixed" in told and "--devices" in told


def test_anchored_phases_are_fe_rope_and_facets_read_what_layers_there_are():
    assert GPTConfig(ferope_anchor_relative=True, pos_embedding="none").use_ferope
    with pytest.warns(UserWarning, match="mfs_layers=3: all n_layer=2 are read"):
        assert GPTConfig(n_layer=2, use_mfs_head=True).mfs_layers == 2


@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_comes_before_pytorch(name, tmp_path, capsys):
    """In a process where importing torch fails, --help prints what the script itself would print."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    words = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).main(["--help"])
    assert done.stdout == capsys.readouterr().out and done.returncode == 0 and not done.stderr
