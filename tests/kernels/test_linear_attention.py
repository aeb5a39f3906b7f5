"""Gated linear attention and the gated delta rule in chunks, against their loops in float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels.linear_attention import (
    LEAST,
    carry,
    carry_backward,
    carry_reference,
    gdn,
    gdn_reference,
    gla,
    gla_reference,
)

LENGTHS = [1, 2, 15, 16, 17, 32, 33, 100]


def inputs(T, kind, dtype=torch.float64, strong=False, dk=5, dv=7, most=1.0):
    """q, k, v, decays and, for gdn, shares below `most`; and a state to start from.

    strong: decays down to the least there are.
    """
    draw = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, 3, T, dk, dtype=torch.float64, generator=draw) for _ in range(2))
    v = torch.randn(2, 3, T, dv, dtype=torch.float64, generator=draw)
    S = torch.randn(2, 3, dk, dv, dtype=torch.float64, generator=draw)
    shape = (2, 3, T, dk) if kind == "gla" else (2, 3, T)
    decay = (LEAST if strong else -0.3) * torch.rand(shape, dtype=torch.float64, generator=draw)
    if kind == "gla":
        return [x.to(dtype) for x in (q, k, v, decay, S)]
    beta = most * torch.rand(2, 3, T, dtype=torch.float64, generator=draw)
    return [x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, decay, beta, S)]


PAIRS = {"gla": (gla, gla_reference), "gdn": (gdn, gdn_reference)}
both = pytest.mark.parametrize("kind", PAIRS)


@both
@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunks_are_the_loop(kind, T, strong):
    fast, slow = PAIRS[kind]
    args = inputs(T, kind, strong=strong)
    for a, b in zip(fast(*args), slow(*args)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    for a, b in zip(fast(*(x.float() for x in args)), slow(*args)):
        assert torch.isfinite(a).all() and torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@both
@pytest.mark.parametrize("T", [1, 33])
def test_gradients(kind, T):
    fast, slow = PAIRS[kind]
    grads = []
    for f in (fast, slow):
        args = [x.requires_grad_() for x in inputs(T, kind)]
        y, S = f(*args)
        grads.append(torch.autograd.grad(y.square().sum() + S.square().sum(), args))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-9) for a, b in zip(*grads))


@both
def test_a_text_in_parts_is_the_text(kind):
    fast, _ = PAIRS[kind]
    *args, S = inputs(50, kind)
    whole, end = fast(*args, S)
    parts = []
    for part in zip(*(x.split((20, 1, 17, 12), 2) for x in args)):
        y, S = fast(*part, S)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-11) and torch.allclose(S, end, atol=1e-11)


def test_without_decay_the_delta_rule_recalls_what_was_last_written():
    """beta = 1 and orthonormal keys: a second value for a key replaces the first."""
    k = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 2]][None, None]
    v = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    _, S = gdn(k, k, v, torch.zeros(1, 1, 4).double(), torch.ones(1, 1, 4).double(), torch.zeros(1, 1, 4, 3).double())
    assert torch.allclose(S[0, 0, :3], v[0, 0, [2, 1, 3]]) and S[0, 0, 3].abs().max() == 0


@pytest.mark.parametrize("T", [1, 17, 100])
def test_shares_up_to_two(T):
    """Chunks are the loop where eigenvalues 1 - beta of the memory's map may be negative, with gradients."""
    results = []
    for f in (gdn, gdn_reference):
        args = [x.requires_grad_() for x in inputs(T, "gdn", most=2.0)]
        y, S = f(*args)
        results.append([y, S, *torch.autograd.grad(y.square().sum() + S.square().sum(), args)])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-9) for a, b in zip(*results))
    for a, b in zip(gdn(*inputs(T, "gdn", torch.float32, most=2.0)), results[1]):
        assert torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_a_share_of_two_counts_parity():
    """beta = 2 and a value of 0 reflects: the sign of what is held for the key is that of the number of ones."""
    x = torch.randint(2, (1, 1, 500), generator=torch.Generator().manual_seed(0)).double()
    k, v = torch.ones(1, 1, 500, 1).double(), torch.zeros(1, 1, 500, 1).double()
    y, _ = gdn(k, k, v, 0 * x, 2 * x, torch.ones(1, 1, 1, 1).double())
    assert torch.allclose(y[..., 0], 1 - 2 * (x.cumsum(2) % 2), atol=1e-9)


def test_without_gates_gla_is_linear_attention():
    q, k, v, decay, S = inputs(40, "gla")
    y, _ = gla(q, k, v, 0 * decay, 0 * S)
    wanted = (q @ k.mT).tril() @ v
    assert torch.allclose(y, wanted, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Triton, without a GPU: under its interpreter, in a process of its own (`python tests/kernels/test_linear_attention.py
# cpu`), and compiled. tests/test_cuda.py runs the same check on a GPU.


def carried(kind, length, dk, dv, N, device="cpu"):
    """Inputs of `carry` and gradients of its results, float32."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(2, 3, *shape, generator=draw).to(device)

    decay = torch.rand(2, 3, N, *((dk, 1) if kind == "gla" else (1, 1)), generator=draw).to(device)
    W = None if kind == "gla" else 0.2 * random(N, length, dk)
    inputs = decay, random(N, length, dk), W, random(N, length, dv), random(dk, dv)
    return inputs, (random(N, dk, dv), random(N, length, dv), random(dk, dv))


def check_triton(device):
    """Both kernels against the loops, for sizes that fill their tiles and for others."""
    from kernels import linear_attention_triton as ours

    for kind in PAIRS:
        for length, dk, dv, N in ((16, 16, 32, 3), (5, 7, 9, 2), (32, 33, 17, 1)):
            (decay, K, W, U, S), grads = carried(kind, length, dk, dv, N, device)
            double = [None if x is None else x.double() for x in (decay, K, W, U, S, *grads)]
            results = ours.carry(decay, K, W, U, S), ours.carry_backward(decay, K, W, *grads)
            wanted = carry_reference(*double[:5]), carry_backward(*double[:3], *double[5:])
            for ours_, theirs in zip(sum(results, ()), sum(wanted, ())):
                error = (ours_.double() - theirs).abs().max() / theirs.abs().max()
                assert error < 1e-5, (kind, length, dk, dv, N, error)
    print("ok")


@pytest.mark.slow
def test_interpreted(cli):
    pytest.importorskip("triton")
    done = cli("tests/kernels/test_linear_attention.py", "cpu", env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_compiles_without_spills():
    pytest.importorskip("triton")
    import triton

    from kernels import aot, linear_attention_triton

    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        for name, *how in linear_attention_triton.aot_rows():
            found = aot.measure(*how, 90)
            assert found["spill"] == 0 and found["shared"] <= aot.SHARED_LIMIT[90], (name, found)


@pytest.mark.slow
@both
@pytest.mark.parametrize("N", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_carry_backward_by_hand(kind, N):
    (decay, K, W, U, S), _ = carried(kind, 4, 3, 5, N)
    inputs = [x.double().requires_grad_() for x in (decay, K, W, U, S) if x is not None]

    def call(*args):
        return carry(*args) if W is not None else carry(*args[:2], None, *args[2:])

    assert torch.autograd.gradcheck(call, inputs)


if __name__ == "__main__":
    check_triton(sys.argv[1])
