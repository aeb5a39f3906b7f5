"""What several test files share: a small data set, and scripts run as a user runs them.

What imports torch is imported where it is used: the process that hands out tests to workers runs none of them.
"""

import difflib
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from hypothesis import settings

import environment

# CI runs the same examples every time; at a desk, new ones are tried
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--variant", default="", help="only tests of these rows of smoke_test.VARIANTS, comma-separated")


def pytest_unconfigure():
    shutil.rmtree(environment.COMPILED, ignore_errors=True)


def variants(config):
    """The rows that --variant names."""
    return [name.strip() for name in config.getoption("variant").split(",") if name.strip()]


def pytest_configure(config):
    if not variants(config):
        return
    from smoke_test import VARIANTS

    for name in variants(config):
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, 5, 0.4)
            raise pytest.UsageError(f"--variant: no {name!r} in smoke_test.py; near it: {', '.join(near) or 'nothing'}")


def pytest_ignore_collect(collection_path, config):
    """`make check` does not import a file whose tests are all slow: transformers and lm-eval alone take seconds."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") or None


def pytest_generate_tests(metafunc):
    """`@every_row`; `make check` does not even make the tests that it would leave out."""
    if metafunc.definition.get_closest_marker("every_row"):
        from helpers import QUICK
        from smoke_test import VARIANTS

        metafunc.parametrize("name", QUICK if metafunc.config.option.markexpr == "not slow" else VARIANTS)


def pytest_collection_modifyitems(config, items):
    """`--variant=mhc`: keep the tests whose row it is. A script in a process of its own imports torch: seconds."""
    for item in items:
        if "cli" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    if wanted := variants(config):
        kept = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("name") in wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory):
    """A prepared folder DATA_DIR/shakespeare_char: 18,000 characters of few lines in random order, a tenth is val."""
    from data.corpus import build_tokenizer, write_dataset
    from helpers import LINES

    rng = random.Random(0)
    text = "".join(rng.choice(LINES) for _ in range(440))[:18_000]
    train, val = text[:16_200], text[16_200:]
    folder = tmp_path_factory.mktemp("data") / "shakespeare_char"
    write_dataset(folder, train, val, build_tokenizer("char", train, val), folder.name, "tests/conftest.py", "0" * 64)
    return folder


@pytest.fixture(scope="session")
def trained(shakespeare, tmp_path_factory):
    """The folder of a finished tiny run."""
    from helpers import flags, run_here

    out = tmp_path_factory.mktemp("trained")
    assert run_here(*flags(shakespeare, out)) == 0
    return out


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of that folder, to be gone on with or damaged."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture(scope="session")
def cli():
    """cli("train.py", "--key=value", ..., input=None, env={}, cwd=None) -> CompletedProcess, in text.

    Runs with the tests' own Python. The exit status is not checked. With `input` in bytes all streams are bytes.
    """
    from helpers import PATIENCE, ROOT

    def run(script, *args, input=None, env=None, cwd=None, timeout=PATIENCE):
        text = {} if isinstance(input, bytes) else {"text": True, "encoding": "utf-8"}
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            capture_output=True, timeout=timeout, cwd=cwd, **text, **stdin,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | (env or {}),
        )  # fmt: skip

    return run


@pytest.fixture
def start():
    """start(*words, script=train.py): two processes under torchrun. What a failed test leaves running is ended."""
    from helpers import ROOT
    from jobs import TORCHRUN, workers

    running = []

    def run(*words, script=ROOT / "train.py", **env):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen([*TORCHRUN, script, *words], **pipes, env=env))
        return running[-1]

    yield run
    for job in running:
        if job.poll() is None:
            for pid in [*workers(job), job.pid]:
                os.kill(pid, signal.SIGKILL)
            job.wait()


@pytest.fixture
def together(start):
    """together(*words): what a run of two processes in float64 prints, which must end well."""
    from helpers import DRIVER
    from jobs import finish

    def run(*words):
        status, stdout, stderr = finish(start(*words, script=DRIVER, FLOAT64="1"))
        assert status == 0, stderr
        return stdout

    return run
