"""
Attention with a matrix for its memory, in chunks. S (dk, dv) per head; q, k (B, nh, T, dk), v (B, nh, T, dv).

    gated linear attention:  S_t = diag(a_t) S_{t-1} + k_t v_t^T                          a_t (dk,)
    gated delta rule:        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T  a_t, beta_t numbers, |k_t| = 1
    y_t = S_t^T q_t

`gla_reference` and `gdn_reference` are the plain loops, in any float type. `gla` and `gdn` take a chunk of tokens at
once: within it everything is matrix products; from chunk to chunk `carry` hands the state on, on CUDA by
linear_attention_triton.py. Decays come as logarithms, at least LEAST for gla, whose scaled queries and keys would
overflow below it. All return (y, S after the last token).

Sources: Yang et al. 2024, arXiv 2312.06635 (gla) and arXiv 2412.06464 (gdn).
"""

import torch
from torch.nn import functional as F

from kernels import triton_module
from kernels.autograd import is_plain

CHUNK = 16
LEAST = -5.0  # the least log a of gla: exp(LEAST CHUNK) is a normal float32


def gla_reference(q, k, v, log_a, S):
    out = []
    for t in range(q.size(2)):
        S = log_a[:, :, t].exp()[..., None] * S + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None] @ S)[:, :, 0])
    return torch.stack(out, 2), S


def gdn_reference(q, k, v, log_a, beta, S):
    out = []
    for t in range(q.size(2)):
        S, key, share = log_a[:, :, t].exp()[..., None, None] * S, k[:, :, t, :, None], beta[:, :, t, None, None]
        S = S + share * key * (v[:, :, t, None] - key.mT @ S)
        out.append((q[:, :, t, None] @ S)[:, :, 0])
    return torch.stack(out, 2), S


def chunks(x, length):
    """x (B, nh, T, ...) as (B, nh, n, length, ...), padded with zeros: keys of 0 and log decays of 0 change nothing."""
    missing = -x.size(2) % length
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, missing])
    return x.unflatten(2, (-1, length))


# ---------------------------------------------------------------------------------------------------------------------
# From chunk to chunk: written_n = U_n - W_n S_n, S_{n+1} = decay_n S_n + K_n^T written_n.
# decay (B, nh, n, dk or 1, 1), K and W (B, nh, n, L, dk), U (B, nh, n, L, dv); W None is 0.


def carry_reference(decay, K, W, U, S):
    """(S before each chunk (B, nh, n, dk, dv), written (B, nh, n, L, dv), S at the end)."""
    before, written = [], []
    for n in range(U.size(2)):
        before.append(S)
        written.append(U[:, :, n] if W is None else U[:, :, n] - W[:, :, n] @ S)
        S = decay[:, :, n] * S + K[:, :, n].mT @ written[-1]
    return torch.stack(before, 2), torch.stack(written, 2), S


def gpu():
    return triton_module("linear_attention_triton")


def takes_kernel(K):
    """Whether the Triton kernels run: on CUDA, with heads whose S fits into a program's registers."""
    return K.is_cuda and K.dtype == torch.float32 and K.size(-1) <= 64


class Carry(torch.autograd.Function):
    """The same with a backward by hand: one pass over the chunks in reverse, and the rest for all chunks at once."""

    @staticmethod
    def forward(ctx, decay, K, W, U, S):
        before, written, end = (gpu().carry if takes_kernel(K) else carry_reference)(decay, K, W, U, S)
        ctx.save_for_backward(decay, K, W, before, written)
        return before, written, end

    @staticmethod
    def backward(ctx, g_before, g_written, g_end):
        decay, K, W, before, written = ctx.saved_tensors
        walk = gpu().carry_backward if takes_kernel(K) else carry_backward
        after, g_written, g_S = walk(decay, K, W, g_before, g_written, g_end)
        g_decay = (after * before).sum((-1,) if decay.size(-2) > 1 else (-2, -1), keepdim=True)
        g_W = None if W is None else -g_written @ before.mT
        return g_decay, written @ after.mT, g_W, g_written, g_S


def carry_backward(decay, K, W, g_before, g_written, g):
    """Gradients of the S after each chunk (B, nh, n, dk, dv), of all that was written, and of the first S."""
    after, totals = [], []
    for n in reversed(range(K.size(2))):
        after.append(g)
        totals.append(g_written[:, :, n] + K[:, :, n] @ g)
        g = g_before[:, :, n] + decay[:, :, n] * g
        if W is not None:
            g = g - W[:, :, n].mT @ totals[-1]
    return torch.stack(after[::-1], 2), torch.stack(totals[::-1], 2), g


def carry(decay, K, W, U, S):
    return (Carry.apply if is_plain(decay, K, U, S) else carry_reference)(decay, K, W, U, S)


# ---------------------------------------------------------------------------------------------------------------------
# The two rules.


def gla(q, k, v, log_a, S):
    """(y (B, nh, T, dv), S (B, nh, dk, dv)) from q, k, log_a (B, nh, T, dk), v, and the S before; see above."""
    T = q.size(2)
    length = min(CHUNK, T)
    q, k, v, log_a = (chunks(x, length) for x in (q, k, v, log_a))
    b = log_a.cumsum(3)  # (B, nh, n, length, dk): decay from the chunk's start on
    causal, end = torch.ones(length, length, dtype=torch.bool, device=q.device).tril(), b[..., -1:, :]
    q = q * b.exp()
    scores = (q @ (k * (-b).exp()).mT).masked_fill(~causal, 0.0)
    before, _, S = carry(end.exp().mT, k * (end - b).exp(), None, v, S)
    return (q @ before + scores @ v).flatten(2, 3)[:, :, :T], S


def unit_lower_inverse(M):
    """(I + M)^-1 of strictly lower triangular M (..., n, n)."""
    return (UnitLowerInverse.apply if is_plain(M) else invert)(M)


def invert(M):
    one = torch.eye(M.size(-1), dtype=M.dtype, device=M.device).expand_as(M)
    return torch.linalg.solve_triangular(M, one, upper=False, unitriangular=True)


class UnitLowerInverse(torch.autograd.Function):
    """With a backward of two products in place of two more systems."""

    @staticmethod
    def forward(ctx, M):
        X = invert(M)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx, g):
        (X,) = ctx.saved_tensors
        return -(X.mT @ g @ X.mT).tril(-1)


def gdn(q, k, v, log_a, beta, S):
    """(y (B, nh, T, dv), S (B, nh, dk, dv)) from q, k, v, log_a and beta (B, nh, T), and the S before; see above.

    With g the decay since the chunk's start, each token writes u = beta (v - what the memory holds for k), a linear
    system: (I + M) u = beta v - beta e^g k S, M_ij = beta_i e^(g_i - g_j) k_i k_j for j < i.
    """
    T = q.size(2)
    length = min(CHUNK, T)
    q, k, v, log_a, beta = (chunks(x, length) for x in (q, k, v, log_a, beta))
    g, share = log_a.cumsum(3)[..., None], beta[..., None]  # (B, nh, n, length, 1)
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    decay = (g - g.mT).masked_fill(~causal, -torch.inf).exp()
    inverse = unit_lower_inverse((share * (k @ k.mT) * decay).tril(-1))
    u, w = inverse @ (share * v), inverse @ (share * g.exp() * k)
    end = g[..., -1:, :]
    before, written, S = carry(end.exp(), k * (end - g).exp(), w, u, S)
    y = (q * g.exp()) @ before + ((q @ k.mT) * decay) @ written
    return y.flatten(2, 3)[:, :, :T], S
