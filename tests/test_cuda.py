"""
On a GPU: the Triton kernels compiled, every variant against the CPU's float32, and the scripts. Skipped without one.

    python -m pytest tests/test_cuda.py -n 4
"""

import copy
import json

import pytest
import torch

from configurator import ROOT
from kernels import fhn, scan
from kernels.block_sparse import Route, block_sparse_attention
from smoke_test import VARIANTS, build

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.mark.parametrize(
    "script, names",
    [
        ("tests/kernels/test_block_sparse_triton.py", "softmax per_head sigmoid"),
        ("tests/kernels/test_block_sparse_triton.py", "low_precision corners contracts repeats lists"),
        ("tests/kernels/test_fhn_triton.py", "scans spans one_step two_steps more_steps waves_in_spans"),
        ("tests/kernels/test_fhn_triton.py", "low_precision limits split contracts"),
        ("tests/kernels/test_linear_attention.py", ""),
    ],
)
def test_kernels_compiled(cli, script, names):
    """The checks that run interpreted without a GPU, against float64."""
    done = cli(script, "cuda", *names.split(), env={"TRITON_INTERPRET": "0"}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("T", [1000, 4096])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_long_attention(T, dtype, tolerance):
    """Many tiles: the operator and its gradients against the same in float64 on the GPU, by its dense mask."""
    torch.manual_seed(0)
    cell = torch.arange(T) // 96
    distance = torch.arange(int(cell[-1]) + 1)
    distance = distance[:, None] - distance[None, :]
    route = Route.from_cells(cell, (distance >= 0) & (distance <= 2))
    q, k, v, grad = torch.randn(4, 2, 3, T, 64, device="cuda").to(dtype)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*inputs, route)
    ours = [out, *torch.autograd.grad(out, inputs, grad)]
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    scores = (exact[0] @ exact[1].mT * 64**-0.5).masked_fill(~route.mask().cuda(), -torch.inf)
    want = scores.softmax(-1) @ exact[2]
    for x, y in zip(ours, [want, *torch.autograd.grad(want, exact, grad.double())]):
        assert (x.double() - y).abs().max() < tolerance * y.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_long_scan_and_waves(dtype, tolerance):
    torch.manual_seed(0)
    gate, x, grad = torch.rand(2, 3000, 130), torch.randn(2, 3000, 130), torch.randn(2, 3000, 130)
    D = torch.logspace(-1, 2, 130)
    rest = [D, *(torch.full((130,), c) for c in (0.7, 0.8, 0.08))]
    for ours, reference, inputs in (
        (scan.gated_scan, scan.reference, [gate, x]),
        (
            lambda *i: fhn.fhn_propagate(*i, dt=0.5, steps=2)[0],
            lambda *i: fhn.reference(*i, 0.5, 2)[0],
            [x, gate, *rest],
        ),
    ):
        here = [(i.to(dtype) if i.dim() > 2 else i).cuda().requires_grad_() for i in inputs]
        exact = [i.detach().cpu().double().requires_grad_() for i in here]
        got, want = ours(*here), reference(*exact)
        results = [got, *torch.autograd.grad(got, here, grad.cuda().to(dtype))]
        for a, b in zip(results, [want, *torch.autograd.grad(want, exact, grad.to(dtype).double())]):
            assert (a.cpu().double() - b).abs().max() < tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_like_the_cpu(name):
    """Logits, loss and gradients of each variant, float32 on both."""
    model, idx = build(VARIANTS[name])
    twin = copy.deepcopy(model).cuda()
    model.eval(), twin.eval()
    (logits, loss), (on_gpu, its_loss) = model(idx, idx), twin(idx.cuda(), idx.cuda())
    assert (logits - on_gpu.cpu()).abs().max() < 1e-4 * logits.abs().max().clamp(min=1)
    loss.backward(), its_loss.backward()
    ours = {n: p.grad for n, p in twin.named_parameters()}
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for n, p in model.named_parameters():
        assert (p.grad is None) == (ours[n] is None), n
        if p.grad is not None:
            assert (p.grad - ours[n].cpu()).abs().max() < 1e-3 * largest, n


COMPILED = (
    "baseline block_sparse fhn fhn_and_softmax knots kaufmann bio kan mhc sdr manifold_e7 mfs fa chimera everything"
)


@pytest.mark.parametrize("name", COMPILED.split())
def test_bfloat16_compiled(name):
    """torch.compile under bfloat16 autocast: finite, and close to float32."""
    model, idx = build(VARIANTS[name], "cuda")
    torch._dynamo.reset()
    want = model(idx, idx)[1].item()
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.compile(model)(idx, idx)[1]
    loss.backward()
    assert abs(loss.item() - want) < 0.05 * max(1, abs(want))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_smoke(cli):
    done = cli("smoke_test.py", "--device=cuda", timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("flags", ["", "--attn_mode=fhn", "--use_knot_attention=True", "--use_bio_mlp=True"])
def test_train_resume_sample(cli, shakespeare, tmp_path, flags):
    """Compiled bfloat16 training as `python train.py` picks it on a GPU, interrupted, gone on with, sampled from."""
    words = ["config/train_shakespeare_char_cpu.py", f"--data_dir={shakespeare.parent}", f"--out_dir={tmp_path}",
             "--device=auto", "--compile=True", "--eval_iters=2", "--eval_full=False", *flags.split()]  # fmt: skip
    for steps, more in ((20, []), (40, ["--init_from=resume"])):
        done = cli(ROOT / "train.py", *words, f"--max_iters={steps}", "--eval_interval=20", *more, timeout=600)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "run.json").read_text())["device"].startswith("cuda")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if line.get("val_loss") is not None]
    assert losses[-1] < losses[0] - 0.5
    done = cli(ROOT / "sample.py", f"--out_dir={tmp_path}", "--num_samples=1", "--max_new_tokens=40", timeout=300)
    assert done.returncode == 0 and len(done.stdout) > 40, done.stderr[-2000:]
