"""What the documents say about the code is true of the code."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import configurator
import model
from helpers import ROOT
from lab import readme
from model import GPTConfig
from train import TrainConfig

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text(encoding="utf-8")


def helped(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_excerpts_in_the_readme(script):
    excerpt = README.split(f"`python {script} --help`:")[1].split("```")[1].strip("\n").splitlines()
    assert len(excerpt) >= 3 and set(excerpt) <= set(helped(script))


def test_the_readme_is_as_its_command_writes_it():
    assert len(readme.EXCERPT.findall(README)) == 2
    assert readme.EXCERPT.sub(readme.rewrite, README) == README


def test_files_and_links_named_in_the_documents_exist():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md"]
    for path in documents:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"
        for file in re.findall(r"\b(?:config|data|tests|docs|kernels|lab)/[\w/]+\.(?:py|md)\b", text):
            placeholder = re.search(r"NAME|data/mine|config/x\.py", file)
            assert placeholder or (ROOT / file).exists(), f"{path.name}: {file}"


def test_readme_python_runs():
    blocks = re.findall(r"(?:^    .*\n|^\n)+", README.split("## In Python")[1], re.MULTILINE)
    code = "\n".join(line[4:] for line in blocks[0].splitlines())
    assert "GPT(" in ast.unparse(ast.parse(code))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("config", sorted((ROOT / "config").rglob("*.py")), ids=lambda p: p.stem)
def test_every_config_resolves(config):
    settings = configurator.read([str(config)], TrainConfig, GPTConfig)
    settings.build(TrainConfig), settings.build(GPTConfig)


def test_every_flag_of_the_model_is_in_variants_md():
    sizes = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout"}
    text = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    assert [f.name for f in fields(GPTConfig) if f.name not in sizes and f"`{f.name}`" not in text] == []


def test_what_became_of_the_originals_is_there():
    """Every flag, file and module that docs/seeds.md names in its second column exists."""
    text = (ROOT / "docs/seeds.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and line.count(" | ") >= 2]
    assert len(rows) > 90
    keys = configurator.keys_of(TrainConfig, GPTConfig)
    here = " ".join(row[1] for row in rows)
    for words in re.findall(r"`([^`]+)`", here):
        for path in re.findall(r"[\w/]+\.(?:py|md)", words):
            name = path.removeprefix("/")
            assert any((ROOT / folder / name).is_file() for folder in ("", "config/ablation", "docs")), path
        for module in re.findall(r"-m (lab\.\w+)", words):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        if found := re.fullmatch(r"(?:--)?([a-z]\w*_\w+)(=.*)?", words):
            configs = [(ROOT / f"config/{folder}/{found[1]}.py").is_file() for folder in ("presets", "ablation")]
            known = found[1] in keys or found[1] in CHECKED_ELSEWHERE or any(configs)
            assert known or hasattr(model, found[1]), words


CHECKED_ELSEWHERE = {"chunk_docs", "repetition_penalty", "center_scale", "num_params", "init_from"}


def test_the_tour_runs(tmp_path):
    """Its code as one script, with pictures to nowhere; what is stored of its outputs is small."""
    path = ROOT / "docs/tour.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert path.stat().st_size < 150_000 and code.count("%matplotlib inline") == 1
    code = code.replace("%matplotlib inline", "import matplotlib; matplotlib.use('Agg')").replace(
        "steps=250", "steps=50"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "largest change before the last token: 0.0\n" in done.stdout and "refused: " in done.stdout
    kept = "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    assert len(kept.splitlines()) == len(done.stdout.splitlines())  # the stored numbers are of an earlier README
