"""What several test files share: a small data set, and scripts run as a user runs them."""

import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network

import pytest
from hypothesis import settings

from data.corpus import build_tokenizer, write_dataset

# CI runs the same examples every time; at a desk, new ones are tried
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds until what never comes is a failure: no measure of speed, for a busy machine has its own
SHARED = ROOT.parent / "shared" / "data"

LINES = """\
HAMLET: To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them. To die: to sleep;
No more; and by a sleep to say we end
The heart-ache and the thousand natural shocks
That flesh is heir to, 'tis a consummation
Devoutly to be wish'd. To die, to sleep;
ROMEO: But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.
JULIET: O Romeo, Romeo! wherefore art thou Romeo?
Deny thy father and refuse thy name;
Or, if thou wilt not, be but sworn my love,
And I'll no longer be a Capulet.
""".splitlines(keepends=True)


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory):
    """A prepared folder DATA_DIR/shakespeare_char: 18,000 characters of few lines in random order, a tenth is val."""
    rng = random.Random(0)
    text = "".join(rng.choice(LINES) for _ in range(440))[:18_000]
    train, val = text[:16_200], text[16_200:]
    folder = tmp_path_factory.mktemp("data") / "shakespeare_char"
    write_dataset(folder, train, val, build_tokenizer("char", train, val), folder.name, "tests/conftest.py", "0" * 64)
    return folder


@pytest.fixture(scope="session")
def cli():
    """cli("train.py", "--key=value", ..., input=None, env={}, cwd=None, timeout=PATIENCE) -> CompletedProcess, in text.

    Runs with the tests' own Python. The exit status is not checked. With `input` in bytes all streams are bytes.
    """

    def run(script, *args, input=None, env=None, cwd=None, timeout=PATIENCE):
        text = {} if isinstance(input, bytes) else {"text": True, "encoding": "utf-8"}
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, args)],
            capture_output=True, timeout=timeout, cwd=cwd, **text, **stdin,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | (env or {}),
        )  # fmt: skip

    return run
