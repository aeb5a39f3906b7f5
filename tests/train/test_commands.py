"""Every command in the documents and docstrings is one that its script accepts; the README's are run, made small."""

import ast
import functools
import glob
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest

from helpers import LINES, ROOT

pytestmark = pytest.mark.slow

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "sample", "smoke_test")]
SCRIPTS += sorted([*ROOT.glob("lab/*.py"), *ROOT.glob("data/**/prepare.py"), *ROOT.glob("kernels/*.py")])
PATTERN = re.compile(
    r"`((?:OMP_NUM_THREADS=1 )?(?:python|torchrun) [^`]+)`|^ {4,}((?:python|torchrun) .+)$", re.MULTILINE
)
# what a reader puts in: any will do
ANY = {
    "CONFIG": "config/ablation/relu2.py", "ROW...": "config/ablation/fhn.py", "ROWS": "config/ablation/fhn.py",
    "config/x.py": "config/demo.py", "config/ablation/NAME.py": "config/ablation/fhn.py", "FLAGS": "--mlp_act=relu2",
    "config/presets/NAME.py": "config/presets/waves.py", "CONFIG ...": "config/ablation/relu2.py", "=LR": "=1e-3",
    "=SEED": "=1", "=N": "=2", "RUN_FOLDER": "out", "OUT...": "out", "PATH": "README.md", "TASK": "mqar",
    "RUN": "out", "lab.NAME": "lab.rungs", "SCRIPT": "train.py", "--flag=value": "--mlp_act=relu2",
    "config/ablation/fhn_signed.py ...": "config/ablation/fhn_signed.py", "lab.skills ...": "lab.skills",
    "[--full --kernels=\"...\"]": "--full",
}  # fmt: skip


@functools.cache
def commands():
    """{command: where it stands}, without what a shell does after it."""
    found = {}
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    texts |= {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in SCRIPTS}
    for path, text in texts.items():
        for match in PATTERN.finditer(text):
            command = re.split(r"\s+#\s|\s>\s", match[1] or match[2])[0]
            if not re.fullmatch(r"torchrun --\w+", command):  # one of torchrun's own flags is named
                found.setdefault(" ".join(command.split()), str(path.relative_to(ROOT)))
    return found


def split(command):
    """(module, arguments) of a command, its placeholders filled in and its patterns of files expanded."""
    for word, filled in sorted(ANY.items(), key=lambda item: -len(item[0])):
        command = command.replace(word, filled)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"OMP_NUM_THREADS=1|python", word)]
    if words[0] == "torchrun":
        words = words[[word.endswith(".py") for word in words].index(True) :]
    name, *given = words[1:] if words[0] == "-m" else words
    is_path = name.endswith(".py")
    assert not is_path or (ROOT / name).is_file(), name
    given = [path for word in given for path in (sorted(glob.glob(word, root_dir=ROOT)) if "*" in word else [word])]
    return name.removesuffix(".py").replace("/", ".") if is_path else name, given


def accepted(module, words, monkeypatch):
    """Let a script read its command line, and stop before it does anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *words, "--print_config"])
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stopped:
        main(*[[*words, "--print_config"]] * bool(inspect.signature(main).parameters))
    return stopped.value.code or 0


# pytest's own; argparse's, which tests/kernels runs; and scripts without a main(), which tests/train/test_data.py runs
OTHERS = {"pytest", "kernels.aot"}
OTHERS |= {f"data.{name}.prepare" for name in ("shakespeare_char", "shakespeare", "drama", "code")}


@pytest.mark.parametrize("command", [c for c in commands() if split(c)[0] not in OTHERS])
def test_documented_commands_are_accepted(command, monkeypatch, capsys):
    module, words = split(command)
    if words:
        assert accepted(module, words, monkeypatch) == 0, capsys.readouterr().err
    else:  # the text names the program
        assert callable(importlib.import_module(module).main)


def test_commands_are_found():
    found = commands()
    assert len(found) > 130 and found["python -m lab.rungs --mix"] == "README.md"
    assert split("torchrun --nproc_per_node=8 train.py config/train_gpt2.py") == ("train", ["config/train_gpt2.py"])
    assert len(split("python -m lab.ablate config/ablation/*.py --seeds=3")[1]) > 60


# ---------------------------------------------------------------------------------------------------------------------
# A new user's way through the README's table, on two lines of text and with two steps.

SMALL = ["--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=2", "--eval_interval=2", "--eval_iters=1"]
SMALL += ["--eval_full=False", "--batch_size=2", "--gradient_accumulation_steps=1", "--block_size=16", "--n_layer=2"]
SMALL += ["--n_head=2", "--n_embd=32"]


def run(command, *more, cwd):
    """A README command, with more arguments; its standard output."""
    module, words = split(command)
    assert command in commands(), f"{command}: the README has it no more"
    script = ["-m", module] if module.startswith("lab") else [ROOT / f"{module.replace('.', '/')}.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *script, *words, *more], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_a_walk_through_the_readme(tmp_path, shakespeare):
    (tmp_path / "path/to").mkdir(parents=True)
    for file in ("my.txt", "path/to/my.txt"):
        (tmp_path / file).write_text("".join(LINES) * 8)
    (tmp_path / "config").symlink_to(ROOT / "config")
    data = [f"--data_dir={shakespeare.parent}", f"--dataset={shakespeare.name}"]
    own = f"--out_dir={tmp_path / 'own'}"

    told = run("python data/prepare.py my.txt --tokenizer=byte", f"--out_dir={tmp_path / 'bytes'}", cwd=tmp_path)
    assert "byte" in told
    run("python train.py config/train_shakespeare_char_cpu.py --learning_rate=3e-3", *SMALL, *data, "--out_dir=OUT",
        cwd=tmp_path)  # fmt: skip
    told = run("python train.py --out_dir=OUT --init_from=resume", "--max_iters=4", cwd=tmp_path)
    assert "step 4:" in told
    told = run('python sample.py --out_dir=OUT --start="ROMEO:" --stream', "--max_new_tokens=20", "--num_samples=1",
               f"--data_dir={shakespeare.parent}", cwd=tmp_path)  # fmt: skip
    assert "ROMEO:" in told
    run("python train.py config/train_shakespeare_char_cpu.py --dataset=path/to/my.txt", *SMALL, own, cwd=tmp_path)
    told = run("python train.py config/x.py --cost", *SMALL, *data, cwd=tmp_path)
    assert "parameters" in told and "decoding" in told
    run(
        "python train.py config/x.py --profile=10:15",
        *SMALL,
        *data,
        "--max_iters=16",
        "--out_dir=PROFILED",
        cwd=tmp_path,
    )
    assert list((tmp_path / "PROFILED").glob("*trace*"))
    run("python train.py config/train_shakespeare_char_cpu.py config/ablation/fhn.py", *SMALL, *data, "--out_dir=OUT2",
        "--pos_embedding=none", cwd=tmp_path)  # fmt: skip
    told = run("python -m lab.slices --out_dir=OUT --against=OUT2", "--tokens=64", f"--data_dir={shakespeare.parent}",
               cwd=tmp_path)  # fmt: skip
    assert "shuffled windows" in told
    (tmp_path / "OUT").rename(tmp_path / "out")
    assert "4 / 4" in run("python -m lab.watch out", "--once", cwd=tmp_path)
    told = run("python smoke_test.py", "--only=baseline,relu2", "--steps=3", "--device=cpu", cwd=tmp_path)
    assert "relu2" in told
