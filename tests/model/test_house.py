"""How the house is built: the machine first and short, short functions, no question for a mixer's name."""

import ast

import pytest

from helpers import ROOT
from model import MIXERS

MODEL = (ROOT / "model.py").read_text(encoding="utf-8")


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_the_machine_comes_first():
    """Flags, rules, Pass, Block and GPT, in as many lines as the docstring says; then the catalogue."""
    assert "the first 1000 lines are the model" in MODEL
    machine = MODEL.split("# Small parts:")[0]
    assert len(machine.splitlines()) <= 1000
    names = [node.name for node in ast.parse(MODEL).body if isinstance(node, ast.ClassDef)]
    assert names[:5] == ["GPTConfig", "Pass", "DecodingState", "Block", "GPT"]
    assert all(f"\nclass {name}" in machine for name in names[:5])


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "lab").glob("*.py"))], ids=lambda p: p.stem
)
def test_functions_are_short(path):
    assert [f.name for f in functions(path) if f.end_lineno - f.lineno + 1 > 40] == []


def test_forward_is_read_in_one_breath():
    gpt = next(node for node in ast.parse(MODEL).body if isinstance(node, ast.ClassDef) and node.name == "GPT")
    methods = {f.name: f for f in gpt.body if isinstance(f, ast.FunctionDef)}
    for name, most in {"forward": 25, "embed": 35, "trunk": 35, "predict": 35, "objective": 35}.items():
        assert methods[name].end_lineno - methods[name].lineno + 1 <= most, name
    assert sum(isinstance(node, ast.If | ast.IfExp) for node in ast.walk(methods["forward"])) <= 5


def test_nothing_asks_for_a_mixer_by_its_name():
    """A comparison with a mixer's name belongs to that mixer's own section, where it is about its activation."""
    asked = []
    for node in ast.walk(ast.parse(MODEL)):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node)
            names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & set(MIXERS)
            asked += [text] if names and "self.activation" not in text and "fhn_dynamics" not in text else []
    assert asked == []


def test_five_scripts_at_the_top():
    names = {path.name for path in ROOT.glob("*.py")}
    assert names == {"configurator.py", "model.py", "sample.py", "smoke_test.py", "train.py"}
