"""What several test files share: a tiny training run and its records, waiting, a little text."""

import json
import os
import random
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import corpus
from data.corpus import DataError

ROOT = Path(train.__file__).resolve().parent
SHARED = ROOT.parent / "shared" / "data"
FIXTURES = ROOT / "tests" / "fixtures"
DRIVER = ROOT / "tests" / "driver.py"
PATIENCE = 600  # seconds until what never comes is a failure: no measure of speed, for a busy machine has its own

# Rows that between them use most of the code
COVERING = {"baseline", "ferope_anchored", "knots_and_rings", "kaufmann_pattern", "fhn_and_softmax", "bio_adaptive"}
COVERING |= {"mfs_l4_regions", "manifold_e7_spectral", "dfa_grape", "mhc_mla", "sdr", "everything_waves"}
# Those that `make check` runs the cheap contracts on; `make test` takes all rows
QUICK = ["baseline", "ferope_anchored", "fhn_and_softmax", "bio_adaptive", "dfa_grape", "mhc_mla"]
every_row = pytest.mark.every_row  # conftest.py makes one test per row of it

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


TINY = {
    "device": "cpu", "dtype": "float32", "compile": False, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
    "batch_size": 4, "gradient_accumulation_steps": 1, "max_iters": 6, "eval_interval": 3, "eval_iters": 2,
    "warmup_iters": 2, "learning_rate": 1e-3,
}  # fmt: skip
TIMING = {"ms", "tokens_per_s", "memory_mb", "mfu"}  # what differs between two equal runs


def flags(data, out, **given):
    """Command line of a tiny run on the data set in folder `data`."""
    values = {"data_dir": data.parent, "dataset": data.name, "out_dir": out} | TINY | given
    return [f"--{k}={v}" for k, v in values.items()]


def run_here(*words):
    """Exit status of train.py, run in this process; random states, threads and signal handlers stay as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that results are compared with
    try:
        with torch.random.fork_rng(devices=[]):
            train.main([str(w) for w in words])
        return 0
    except SystemExit as e:
        return e.code
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command_here(main, *words):
    """Exit status of a lab command's main(), run in this process; what it sets for its runs is taken back."""
    handler, threads = signal.getsignal(signal.SIGTERM), os.environ.get("OMP_NUM_THREADS")
    try:
        main([str(word) for word in words])
        return 0
    except SystemExit as e:
        return e.code
    finally:
        signal.signal(signal.SIGTERM, handler)
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})


class TrainHere:
    """In subprocess.Popen's place: train.py in this process, which saves the seconds that importing torch takes."""

    def __init__(self, command, stdout, **rest):
        assert command[:2] == [sys.executable, str(ROOT / "train.py")]
        with redirect_stdout(stdout):
            self.returncode = run_here(*command[2:])

    def poll(self):
        return self.returncode


def history(out, drop=()):
    """The lines of metrics.jsonl, as strict JSON, without the fields `drop`."""

    def refuse(constant):
        raise AssertionError(f"metrics.jsonl holds {constant}, which is no JSON")

    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x, parse_constant=refuse).items() if k not in drop} for x in lines]


def losses(out):
    return [x["loss"] for x in history(out) if "loss" in x]


def wait_for(condition, every=0.005):
    """Poll until condition() is true, and return what it gave."""
    end = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return result


def same(a, b):
    """Whether two checkpoints' values are equal to the last bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def error_of(capsys):
    """The one line on stderr, without its prefix."""
    err = capsys.readouterr().err.strip()
    assert err.startswith("train.py: error: ") and "\n" not in err, err
    return err.removeprefix("train.py: error: ")


def cached_bpe():
    """Let tiktoken find the GPT-2 files beside the repository, unless the caller has its own place for them."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "tiktoken_cache").is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken_cache")


def gpt2():
    """GPT-2's tokenizer; the test is skipped where its files can be neither found nor downloaded."""
    cached_bpe()
    try:
        return corpus.GPT2()
    except DataError as e:
        pytest.skip(str(e))
