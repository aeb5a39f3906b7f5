"""--parallel=fsdp with two gloo processes: the numbers of one process, and checkpoints that either goes on from."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
from configurator import ConfigError
from helpers import PATIENCE, ROOT, flags, losses, run_here, same, wait_for
from jobs import ENDLESS, FOUR, TORCHRUN, assert_close, finish, run_alone, weights, workers
from kernels import sharding
from lab.cost import size_of
from model import GPT, GPTConfig, load_checkpoint
from smoke_test import VARIANTS
from train import TrainConfig, check_memory_savers

pytestmark = pytest.mark.slow

SHARED = FOUR | {"parallel": "fsdp", "eval_iters": 3}  # an odd number: two batches and one
REFUSED = [name for name, row in VARIANTS.items() if row.get("htm_meta_strength") or row.get("fa_grape")]
ROWS = [name for name in VARIANTS if name not in REFUSED]
TEN = ["baseline", "untied", "modern", "fhn", "bio_adaptive", "mhc", "sdr", "manifold_spectral", "dfa", "everything"]


def run_rows(optimizer, names):
    """{row: (difference of losses and norms, of weights and buffers, format)} of two processes and one."""
    command = [*TORCHRUN, ROOT / "tests" / "fsdp_rows.py", optimizer, *names]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: (float(a), float(b), dtype) for name, a, b, dtype in lines}


@pytest.mark.parametrize("part", range(4))
def test_two_processes_equal_one_in_every_row(part):
    names = ROWS[part::4]
    found = run_rows("adamw", names)
    assert list(found) == names
    for name, (a, b, dtype) in found.items():
        # float64: only the order of sums differs; feedback under fa is made in float32
        most = 1e-8 if dtype == "torch.float64" else 1e-5
        assert max(a, b) < most, name


def test_two_processes_equal_one_under_muon_in_several_rows():
    """Matrices are put together on one process each, made orthogonal there, and handed out again."""
    for name, (a, b, _) in run_rows("muon", TEN).items():
        assert max(a, b) < 1e-9, name


@pytest.mark.parametrize("given", [{}, {"optimizer": "muon"}, {"token_shift": True, "tie_weights": False}])
def test_a_run_of_two_processes_equals_one(given, together, shakespeare, tmp_path):
    """Training, clipping, evaluation, best and last checkpoint: all of train.py."""
    given = SHARED | {"grad_clip": 0.2} | given
    assert run_alone(*flags(shakespeare, tmp_path / "one", **given)) == 0
    stdout = together(*flags(shakespeare, tmp_path / "two", **given))
    assert_close(tmp_path / "two", tmp_path / "one")
    assert "2 process(es), each with a part of the weights (fsdp)" in stdout
    assert stdout.count("iter 5:") == stdout.count("step 6:") == 1
    files = [{p.name for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert files[0] == files[1] >= {"ckpt.pt", "ckpt_last.pt"}
    one, two = (load_checkpoint(tmp_path / folder / "ckpt_last.pt") for folder in ("one", "two"))
    assert one.keys() == two.keys() and one["model"].keys() == two["model"].keys()
    shapes = [{n: {k: v.shape for k, v in s.items()} for n, s in c["optimizer"]["state"].items()} for c in (one, two)]
    assert shapes[0] == shapes[1]


@pytest.mark.xdist_group("compiled")  # one worker's folder of compiled code serves both
@pytest.mark.parametrize("parallel, n_layer", [("ddp", 1), ("fsdp", 10)])
def test_with_activation_checkpointing_and_compiled(parallel, n_layer, together, shakespeare, tmp_path):
    """Ten layers: under fsdp blocks share their compiled code, of which torch.compile keeps eight versions."""
    given = SHARED | {"n_layer": n_layer, "max_iters": 2, "eval_interval": 2, "parallel": parallel}
    assert run_alone(*flags(shakespeare, tmp_path / "one", **given)) == 0
    together(*flags(shakespeare, tmp_path / "two", **given, activation_checkpointing=True))
    assert_close(tmp_path / "two", tmp_path / "one")
    together(*flags(shakespeare, tmp_path / "compiled", **given | {"activation_checkpointing": True, "compile": True}))
    assert_close(tmp_path / "compiled", tmp_path / "one")


def test_resume_is_exact_with_dropout(together, shakespeare, tmp_path, monkeypatch):
    given = SHARED | {"dropout": 0.2, "lr_decay_iters": 6}
    monkeypatch.setenv("FLOAT64", "")
    together(*flags(shakespeare, tmp_path / "straight", **given))
    together(*flags(shakespeare, tmp_path / "stopped", **given | {"max_iters": 3}))
    together(f"--out_dir={tmp_path / 'stopped'}", "--init_from=resume", "--max_iters=6")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))


@pytest.mark.parametrize("given", [{}, {"optimizer": "muon", "gated_blocks": True}])
def test_one_process_ddp_and_fsdp_go_on_from_each_other(given, together, shakespeare, tmp_path):
    given = FOUR | given | {"lr_decay_iters": 8, "max_iters": 8, "eval_interval": 2}
    assert run_alone(*flags(shakespeare, tmp_path / "one", **given)) == 0
    resume = [f"--out_dir={tmp_path / 'many'}", "--init_from=resume"]
    assert run_alone(*flags(shakespeare, tmp_path / "many", **given | {"max_iters": 2})) == 0
    together(*resume, "--max_iters=4", "--parallel=fsdp")
    together(*resume, "--max_iters=6", "--parallel=ddp")
    together(*resume, "--max_iters=7", "--parallel=fsdp")
    assert run_alone(*resume, "--max_iters=8") == 0  # its checkpoint says fsdp, one process has nothing to share out
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
    a, b = weights(tmp_path / "many"), weights(tmp_path / "one")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-9


def test_samples_while_training_and_from_the_checkpoint(together, shakespeare, tmp_path, capsys, monkeypatch):
    stdout = together(*flags(shakespeare, tmp_path, **SHARED, sample_interval=2))
    assert stdout.count("--- a sample at step") == 2
    sample.main([f"--out_dir={tmp_path}", "--num_samples=1", "--max_new_tokens=20", "--device=cpu"])
    assert capsys.readouterr().out


def test_wsds_goes_back_to_its_trunk(together, shakespeare, tmp_path):
    given = SHARED | {"lr_schedule": "wsds", "wsds_horizons": 2, "max_iters": 12, "warmup_iters": 1}
    assert run_alone(*flags(shakespeare, tmp_path / "one", **given)) == 0
    together(*flags(shakespeare, tmp_path / "two", **given))
    assert_close(tmp_path / "two", tmp_path / "one")


def test_a_signal_saves_and_ends(start, shakespeare, tmp_path):
    """Whichever process gets it, and also in the middle of an evaluation, all stop at the same step."""
    data, out = shakespeare, tmp_path
    process = start(*flags(data, out, **ENDLESS | {"parallel": "fsdp", "eval_interval": 5}))
    by_rank = wait_for_ranks(process, out)
    os.kill(by_rank[1], signal.SIGTERM)
    status, stdout, stderr = finish(process)
    assert status == 0 and "stopped after" in stdout, stderr
    assert load_checkpoint(out / "ckpt_last.pt")["iter_num"] == len(losses(out))


def wait_for_ranks(process, out):
    metrics = out / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and '"iter": 7,' in metrics.read_text()))
    assert process.poll() is None
    return {rank: pid for pid, rank in workers(process).items()}


def test_a_process_that_is_killed_is_started_again(shakespeare, tmp_path):
    """torchrun --max_restarts with --init_from=auto: the run goes on from its last checkpoint, by itself."""
    words = flags(shakespeare, tmp_path, **SHARED | {"max_iters": 200, "eval_interval": 10, "init_from": "auto"})
    command = [*TORCHRUN, "--max_restarts=2", ROOT / "train.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(command, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"} | fresh)
    try:
        by_rank = wait_for_checkpoint(process, tmp_path)
        os.kill(by_rank[1], signal.SIGKILL)
        stdout, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, stdout
    assert load_checkpoint(tmp_path / "ckpt_last.pt")["iter_num"] == 200 == len(losses(tmp_path))


def test_restarts_that_may_hang_are_refused(shakespeare, tmp_path):
    command = [*TORCHRUN, "--max_restarts=1", ROOT / "train.py", *flags(shakespeare, tmp_path, **SHARED)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "error: --max_restarts=1" in done.stderr
    assert "start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr


def wait_for_checkpoint(process, out):
    wait_for(lambda: process.poll() is not None or (out / "ckpt_last.pt").exists())
    assert process.poll() is None
    return {rank: pid for pid, rank in workers(process).items()}


def test_one_process_under_torchrun_is_a_world_of_one(shakespeare, tmp_path):
    assert run_here(*flags(shakespeare, tmp_path / "one", **FOUR)) == 0
    words = flags(shakespeare, tmp_path / "shared", **FOUR, parallel="fsdp")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", ROOT / "train.py"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "shared")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "shared"), abs=1e-6)


def test_without_torchrun_there_is_nothing_to_share_out(shakespeare, tmp_path, capsys):
    """And so the run is that of one process, to the last bit, and says so."""
    assert run_here(*flags(shakespeare, tmp_path / "ddp")) == 0
    assert "fsdp" not in capsys.readouterr().out
    assert run_here(*flags(shakespeare, tmp_path / "fsdp", parallel="fsdp")) == 0
    assert "1 process(es), so fsdp has nothing to share out" in capsys.readouterr().out
    assert same(weights(tmp_path / "ddp"), weights(tmp_path / "fsdp"))


@pytest.mark.parametrize(
    "flags_, cfg, dtype, told",
    [
        ({"htm_meta_strength": 0.5}, {}, torch.float32, "htm_meta_strength"),
        (VARIANTS["fa_grape"], {}, torch.float32, "fa_grape"),
        (VARIANTS["dfa_grape"], {}, torch.float32, "fa_grape"),
        (VARIANTS["dfa"], {"log_alignment": True}, torch.float32, "log_alignment"),
        ({}, {}, torch.float16, "float16"),
    ],
)
def test_what_is_refused(flags_, cfg, dtype, told):
    model = GPT(GPTConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65} | flags_))
    cfg = TrainConfig(parallel="fsdp", **cfg)
    check_memory_savers(cfg, model, dtype, SimpleNamespace(device="cpu", control=None))  # as one process
    with pytest.raises(ConfigError, match=told):
        check_memory_savers(cfg, model, dtype, SimpleNamespace(device="cpu", control="a group"))


def test_a_refusal_is_one_line_and_status_2(start, shakespeare, tmp_path):
    _, _, stderr = finish(start(*flags(shakespeare, tmp_path, **SHARED, htm_meta_strength=0.5)))
    errors = [x for x in stderr.splitlines() if "train.py: error:" in x]
    assert errors and all("--parallel=fsdp" in x and "htm_meta_strength" in x for x in errors)
    assert "exitcode  : 2" in stderr and 'File "' + str(ROOT / "train.py") not in stderr


def test_weightless_models_hold_buffers_alone():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 65}
    for name, row in VARIANTS.items():
        with sharding.weightless():
            empty = GPT(GPTConfig(**sizes | row))
        assert all(p.is_meta for p in empty.parameters()), name
    full = GPT(GPTConfig(**sizes))
    assert not any(p.is_meta for p in full.parameters())  # the hook is gone
    assert empty.num_params() == GPT(empty.config).num_params()


README = (ROOT / "README.md").read_text(encoding="utf-8").split("## On a GPU, on many")[1].split("\n## ")[0]


def test_the_readmes_bytes_per_parameter(tmp_path):
    """As lab/cost measures them, and DDP's own record of its buckets; AdamW's count of steps is left out."""
    table = [re.split(r"\s*\|\s*", line)[1:-1] for line in README.splitlines() if line.startswith("| DDP,")]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = [bytes_per_parameter(muon) for muon in (None, {"matrices": 1, "embedding": 1, "head": 1, "vectors": 1})]
    finally:
        torch.distributed.destroy_process_group()
    for (_, *row), sizes in zip(table, found, strict=True):
        assert [int(n) for n in row[:5]] == [*sizes, sum(sizes)]
        assert row[5:] == [f"{gigabytes / sum(sizes):.1f}B" for gigabytes in (24, 80)]


def bytes_per_parameter(muon):
    """Weights, gradients, DDP's buckets and optimiser state of the matrices in blocks, per number."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", muon)
    for _ in range(2):  # buckets are laid out anew after the first
        ddp(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))[1].backward()
        optimizer.step()
    buckets = sum(map(int, ddp._get_ddp_logging_data()["bucket_sizes"].split(",")))
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    count = sum(p.numel() for p in matrices)
    state = size_of(t for p in matrices for k, t in optimizer.state[p].items() if k != "step")
    sizes = size_of(matrices), size_of(p.grad for p in matrices), state
    weights_, grads, state = (size / count for size in sizes)
    return [weights_, grads, buckets / sum(p.numel() for p in model.parameters()), state]


def readme_commands(start_):
    """Indented commands of the README's section that begin so, with lines that go on joined."""
    text = README.replace("\\\n        ", "")
    return [line.strip() for line in text.splitlines() if line.startswith(f"    {start_}")]


def on_this_machine(command, data, out):
    """A command of the README for one process per machine, with sizes for a test."""
    small = " ".join(map(str, flags(data, out, **FOUR | {"max_iters": 2, "eval_interval": 2})))
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=1").replace("10.0.0.1", "127.0.0.1")
    return (
        command.replace("1234", PORT).replace("29500", PORT).replace("train.py", str(ROOT / "train.py")) + f" {small}"
    )


PORT = str(20_000 + os.getpid() % 10_000)


def run_shell(commands, **env):
    """Run commands of bash side by side; all must end well."""
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen(["bash", "-c", c], env=os.environ | env, cwd=ROOT, **pipes) for c in commands]
    for job in jobs:
        stdout, _ = job.communicate(timeout=PATIENCE)
        assert job.returncode == 0, stdout


def test_the_readmes_commands_for_several_machines(shakespeare, tmp_path):
    """On one machine, which plays all of them; NCCL and CUDA are left out, for want of GPUs."""
    two = [c for c in readme_commands("torchrun") if "--nnodes=2" in c]
    assert len(two) == 2
    run_shell([on_this_machine(c, shakespeare, tmp_path / "two") for c in two])
    assert load_checkpoint(tmp_path / "two" / "ckpt_last.pt")["iter_num"] == 2
    (shared,) = [c for c in readme_commands("torchrun") if "--parallel=fsdp" in c]
    run_shell([on_this_machine(shared, shakespeare, tmp_path / "shared").replace("node=1", "node=2")])
    assert load_checkpoint(tmp_path / "shared" / "ckpt_last.pt")["iter_num"] == 2


def test_the_readmes_slurm_script(shakespeare, tmp_path):
    """With an srun that starts the command twice, as on two nodes, and an scontrol that knows this host alone."""
    script = README.split("    #!/bin/bash\n")[1].split("\n\n")[0].replace("\\\n", "")
    lines = [line.strip() for line in script.splitlines()]
    lines[-1] = on_this_machine(re.sub(r"\s+", " ", lines[-1]), shakespeare, tmp_path / "out")
    for name, text in {"srun": '"$@" & "$@" & wait -n && wait -n', "scontrol": "echo 127.0.0.1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    run_shell(["\n".join(lines)], PATH=path, **slurm)
    assert load_checkpoint(tmp_path / "out" / "ckpt_last.pt")["iter_num"] == 2
