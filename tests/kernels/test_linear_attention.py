"""Gated linear attention and the gated delta rule in chunks, against their loops in float64."""

import pytest
import torch
from torch.nn import functional as F

from kernels.linear_attention import LEAST, gdn, gdn_reference, gla, gla_reference

LENGTHS = [1, 2, 15, 16, 17, 32, 33, 100]


def inputs(T, kind, dtype=torch.float64, strong=False, dk=5, dv=7):
    """q, k, v, decays and, for gdn, shares; and a state to start from. strong: decays down to the least there are."""
    draw = torch.Generator().manual_seed(T)
    q, k = (torch.randn(2, 3, T, dk, dtype=torch.float64, generator=draw) for _ in range(2))
    v = torch.randn(2, 3, T, dv, dtype=torch.float64, generator=draw)
    S = torch.randn(2, 3, dk, dv, dtype=torch.float64, generator=draw)
    shape = (2, 3, T, dk) if kind == "gla" else (2, 3, T)
    decay = (LEAST if strong else -0.3) * torch.rand(shape, dtype=torch.float64, generator=draw)
    if kind == "gla":
        return [x.to(dtype) for x in (q, k, v, decay, S)]
    beta = torch.rand(2, 3, T, dtype=torch.float64, generator=draw)
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


def test_without_gates_gla_is_linear_attention():
    q, k, v, decay, S = inputs(40, "gla")
    y, _ = gla(q, k, v, 0 * decay, 0 * S)
    wanted = (q @ k.mT).tril() @ v
    assert torch.allclose(y, wanted, atol=1e-10)
