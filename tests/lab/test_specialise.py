"""One idea in one file: the same logits, loss and text to the last bit, without this checkout on the path."""

import ast
import hashlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

from helpers import COVERING, ROOT
from lab import folding, specialise
from model import GPTConfig
from smoke_test import SIZE, VARIANTS, build

pytestmark = pytest.mark.slow

ROWS = sorted(COVERING | {"short_conv_waves", "knots"})
COMPARE = """
import importlib
import sys
import torch

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    sys.modules.pop("specialised", None)
    torch.manual_seed(2)
    specialised = importlib.import_module("specialised")
    given = torch.load(f"{folder}/case.pt")
    first = {name: x.clone() for name, x in specialised.GPT().state_dict().items() if torch.is_tensor(x)}
    model = specialised.GPT()
    model.load_state_dict(given["model"])
    torch.manual_seed(3)
    trained = model(given["idx"], given["idx"])
    model.eval()
    logits, loss = model(given["idx"], given["idx"])
    text = model.generate(given["idx"][:, :4], 12, temperature=0)
    found = {"logits": logits, "loss": loss, "trained": trained[1], "text": text, "names": list(first)}
    loaded = {name.split(".")[0] for name in sys.modules}
    found["modules"] = sorted(loaded & {"model", "kernels", "configurator", "data"})
    torch.save(found, f"{folder}/found.pt")
"""


PROGRAMS = [ROOT / "model.py", ROOT / "lab" / "folding.py", ROOT / "kernels" / "muon.py"]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_walk_and_transformer_do_what_pythons_do(path):
    """All nodes but contexts and operators; names that change, statements that go, and such that become two."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    left_out = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    assert set(folding.walk(tree)) == {node for node in ast.walk(tree) if not isinstance(node, left_out)}

    def changed(kind):
        class Changed(kind):
            def visit_Name(self, node):
                return ast.Name(node.id + "_", node.ctx)

            def visit_Expr(self, node):
                return None

            def visit_Return(self, node):
                return [ast.Pass(), self.generic_visit(node)]

        return ast.dump(Changed().visit(ast.parse(text)))

    assert changed(folding.Transformer) == changed(ast.NodeTransformer) != ast.dump(tree)


def text_of(flags, **how):
    return specialise.text(GPTConfig(**SIZE | flags), **how)


def run_alone(folder, script, *words):
    """Run a script in a process that knows no checkout."""
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{script}", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part", range(2))
def test_computes_the_same(part, tmp_path):
    """To the last bit: importing torch takes longer than comparing, so one process takes several rows."""
    cases = {name: build(VARIANTS[name]) for name in ROWS[part::2]}
    for name, (model, idx) in cases.items():
        (tmp_path / name).mkdir()
        text = specialise.text(model.config)
        (tmp_path / name / "specialised.py").write_text(text, encoding="utf-8")
        torch.save({"model": model.state_dict(), "idx": idx}, tmp_path / name / "case.pt")
        imports = {line.split()[1].split(".")[0] for line in text.splitlines() if re.match("import |from ", line)}
        assert imports <= {"torch", *sys.stdlib_module_names}, name
    run_alone(tmp_path, COMPARE, *(str(tmp_path / name) for name in cases))
    for name, (model, idx) in cases.items():
        found = torch.load(tmp_path / name / "found.pt")
        torch.manual_seed(3)
        assert torch.equal(model(idx, idx)[1], found["trained"]), name
        model.eval()
        logits, loss = model(idx, idx)
        assert torch.equal(logits, found["logits"]) and torch.equal(loss, found["loss"]), name
        assert torch.equal(model.generate(idx[:, :4], 12, temperature=0), found["text"]), name
        assert found["names"] == [name for name, x in model.state_dict().items() if torch.is_tensor(x)]
        assert found["modules"] == []


@pytest.mark.parametrize("name", ["baseline", "short_conv_waves", "knots"])
def test_only_what_the_row_needs_is_there(name):
    text = text_of(VARIANTS[name])
    assert max(map(len, text.splitlines())) <= 160 and "config." not in text.split('"""')[2].replace("self.config.", "")
    if name == "baseline":
        assert len(text.splitlines()) <= 350
        for gone in ("knots", "CHANNEL_MIXERS", "getattr(", "if False"):
            assert gone not in text


def test_the_loop_of_the_docstring_runs(tmp_path):
    text = text_of(VARIANTS["baseline"])
    (tmp_path / "specialised.py").write_text(text, encoding="utf-8")
    loop = re.sub("^    ", "", text.split('"""')[1].split("\n\n", 1)[1], flags=re.M)
    assert len(loop.strip().splitlines()) <= 20
    out = run_alone(tmp_path, loop.replace("2000", "3"))
    assert re.match(r"0 4\.\d+\n", out)


def test_a_config_file_in_one_command(tmp_path, capsys):
    words = ["config/presets/waves.py", f"--out={tmp_path / 'waves.py'}", "--vocab_size=65"]
    specialise.main(words)
    assert capsys.readouterr().out == ""
    text = (tmp_path / "waves.py").read_text(encoding="utf-8")
    assert "from waves import GPT" in text and "class FHNAttention" in text
    script = "import waves, torch\nprint(waves.GPT()(torch.zeros(1, 5, dtype=torch.long))[0].shape)"
    assert run_alone(tmp_path, script) == "torch.Size([1, 1, 65])\n"


def test_kernels_by_reference(capsys):
    specialise.main(["--kernels=reference", "--attn_mode=gla", "--block_size=32", "--n_layer=1"])
    out = capsys.readouterr().out
    assert "from kernels.linear_attention import" in out and "class Carry" not in out


@pytest.mark.parametrize(
    "words", ["--use_kann", "--kernels=all", "--n_head=5", "--out=/nowhere/x.py", "--out=a-b.py", "none.py"]
)
def test_errors_are_one_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        specialise.main([*shlex.split(words), "--n_layer=1"])
    assert capsys.readouterr().err.count("\n") == 1


def test_identity_is_the_hash_of_the_file():
    config = GPTConfig(**SIZE)
    assert specialise.identity(config) == hashlib.sha256(specialise.text(config).encode()).hexdigest()


def test_only_what_a_row_uses_counts(monkeypatch, tmp_path):
    """A change of the wavelets is none of the baseline's business."""
    path = tmp_path / "model.py"
    code = (ROOT / "model.py").read_text(encoding="utf-8")
    path.write_text(code.replace("WIDTH_MIN = 0.01", "WIDTH_MIN = 0.02"), encoding="utf-8")
    rows = {name: GPTConfig(**SIZE | VARIANTS[name]) for name in ("baseline", "kan")}
    before = {name: specialise.identity(config) for name, config in rows.items()}
    specialise.pickled_module.cache_clear()
    place = specialise.path_of
    monkeypatch.setattr(specialise, "path_of", lambda module: path if module == "model" else place(module))
    after = {name: specialise.identity(config) for name, config in rows.items()}
    specialise.pickled_module.cache_clear()
    assert before["baseline"] == after["baseline"] and before["kan"] != after["kan"]


def test_the_chimera_is_short(tmp_path):
    specialise.main(["config/presets/chimera.py", f"--out={tmp_path / 'chimera.py'}"])
    assert len((tmp_path / "chimera.py").read_text(encoding="utf-8").splitlines()) <= 650
