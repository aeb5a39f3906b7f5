"""
Block-sparse causal attention on a GPU: flash-style Triton kernels, with the mathematics and arguments of
`block_sparse.py`.

A program owns a tile of M queries of one batch and head and goes through the tiles of N keys that its cells attend to.
`live_tiles` selects them on the device. A tile pair is dead (in no list), full (every query attends to every key: no
mask) or partial (masked by cell ids and causality). The backward pass uses such lists for dq, transposed lists for dk
and dv, and lists of cells for the bias. Every sum is computed by one program in a fixed order: no atomics, bit-equal
runs.

Scores are kept in bits, log2(e) (scale q k + bias), because the hardware's exponential is exp2. Memory beside inputs
and outputs: two float32 per query, and the lists, 4 bytes per tile pair (1 MiB at T = 32k; if each head has its own
relation, this much for each).

TRITON_INTERPRET=1 runs this on a CPU; `python kernels/aot.py` compiles it without a GPU.
"""

import itertools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# ---------------------------------------------------------------------------------------------------------------------
# The lists of live tiles.


@triton.jit
def live_tiles_kernel(
    cell, sums, tiles, counts, T, C, X: tl.constexpr, Y: tl.constexpr, BY_KEY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Row i of X positions against all rows of Y: partial tiles from the left of tiles[i], full ones from its right."""
    pid = tl.program_id(0).to(tl.int64)
    n_x, n_y = tl.cdiv(T, X), tl.cdiv(T, Y)
    x = (pid % n_x).to(tl.int32) * X  # first position of the row
    x_last = tl.minimum(x + X, T) - 1
    x_cell, x_last_cell = tl.load(cell + x), tl.load(cell + x_last)
    sums += pid // n_x * (C + 1) * (C + 1)
    tiles += pid * n_y
    n_partial, n_full = 0, 0
    for start in range(x // Y if BY_KEY else 0, n_y if BY_KEY else x_last // Y + 1, BLOCK):  # the causal half
        j = start + tl.arange(0, BLOCK)
        y = j * Y
        y_last = tl.minimum(y + Y, T) - 1
        y_cell, y_last_cell = tl.load(cell + y, mask=j < n_y, other=0), tl.load(cell + y_last, mask=j < n_y, other=0)
        if BY_KEY:
            q, q_last, q_cell, q_last_cell = y, y_last, y_cell, y_last_cell
            k, k_last, k_cell, k_last_cell = x, x_last, x_cell, x_last_cell
        else:
            q, q_last, q_cell, q_last_cell = x, x_last, x_cell, x_last_cell
            k, k_last, k_cell, k_last_cell = y, y_last, y_cell, y_last_cell
        upper, lower = q_cell * (C + 1), (q_last_cell + 1) * (C + 1)
        related = tl.load(sums + lower + k_last_cell + 1) - tl.load(sums + lower + k_cell)
        related -= tl.load(sums + upper + k_last_cell + 1) - tl.load(sums + upper + k_cell)  # pairs of cells
        live = (j < n_y) & (related > 0) & (k <= q_last)
        full = (related == (q_last_cell - q_cell + 1) * (k_last_cell - k_cell + 1)) & (k_last <= q)
        full = live & full & (x_last - x == X - 1) & (y_last - y == Y - 1)
        partial = (live & (full == 0)).to(tl.int32)
        full = full.to(tl.int32)
        tl.store(tiles + n_partial + tl.cumsum(partial, 0) - 1, j, mask=partial > 0)
        tl.store(tiles + n_y - n_full - tl.cumsum(full, 0), j, mask=full > 0)
        n_partial += tl.sum(partial, 0)
        n_full += tl.sum(full, 0)
    tl.store(counts + 2 * pid, n_partial)
    tl.store(counts + 2 * pid + 1, n_full)


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels share. Query and key positions come as (M, 1) and (1, N), or the other way round for dk and dv.


@triton.jit
def tile_of(x, rows, T, D: tl.constexpr, CHECK: tl.constexpr):
    """(len(rows), D) of x (T, D); zeros beyond T."""
    at = x + rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(at, mask=rows[:, None] < T, other=0.0) if CHECK else tl.load(at)


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def biased(s, query, key, cell, allowed, bias, T, C, MASKED: tl.constexpr):
    """Scores in bits plus the bias of their pair of cells; -inf where the query does not attend to the key."""
    if MASKED or bias is not None:
        pair = tl.load(cell + query) * C + tl.load(cell + key)  # cell is padded: no check
    if bias is not None:
        s += tl.load(bias + pair)
    if MASKED:
        s = tl.where((key <= query) & (query < T) & (tl.load(allowed + pair) != 0), s, -INF)
    return s


@triton.jit
def shift_of(row, bh, rows, T, SIGMOID: tl.constexpr):
    """The term added to a query's scores, in bits: its bias for sigmoid, -lse for softmax (-inf if no key)."""
    if SIGMOID:
        return tl.load(row + rows, mask=rows < T, other=0.0) * LOG2E
    lse = tl.load(row + bh * T + rows, mask=rows < T, other=-INF)
    return tl.where(lse == -INF, -INF, -lse * LOG2E)


@triton.jit
def weights_of(s, SIGMOID: tl.constexpr):
    """p of shifted scores."""
    return 1 / (1 + tl.exp2(-s)) if SIGMOID else tl.exp2(s)


@triton.jit
def score_gradient(p, dp, delta, SIGMOID: tl.constexpr):
    return p * (1 - p) * dp if SIGMOID else p * (dp - delta)


@triton.jit
def delta_of(delta, bh, rows, T, SIGMOID: tl.constexpr):
    return tl.zeros(rows.shape, tl.float32) if SIGMOID else tl.load(delta + bh * T + rows, mask=rows < T, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Forward.


@triton.jit
def forward_step(
    q, acc, m, l, shift, j, query, k, v, cell, allowed, bias, T, C, scale, D: tl.constexpr, N: tl.constexpr,
    SIGMOID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds one key tile to acc (M, D), and for softmax to the running maximum m and sum l (M,)."""
    key = j * N + tl.arange(0, N)
    s = dot(q, tl.trans(tile_of(k, key, T, D, MASKED))) * (scale * LOG2E)  # (M, N)
    s = biased(s, query[:, None], key[None, :], cell, allowed, bias, T, C, MASKED)
    if SIGMOID:
        p = weights_of(s + shift[:, None], True)
    else:
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == -INF, 0.0, m_new)  # no key so far: exp2(-inf - 0) = 0
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(m - base)
        m, l, acc = m_new, l * decay + tl.sum(p, 1), acc * decay[:, None]
    acc += dot(p.to(v.dtype.element_ty), tile_of(v, key, T, D, MASKED))
    return acc, m, l


@triton.jit
def forward_kernel(
    q, k, v, row, out, lse, cell, allowed, bias, tiles, counts, T, C, H, bias_b, bias_h, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIGMOID: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    n_q, n_k = tl.cdiv(T, M), tl.cdiv(T, N)
    i, bh = tl.program_id(0) % n_q, (tl.program_id(0) // n_q).to(tl.int64)
    q, k, v, out = q + bh * T * D, k + bh * T * D, v + bh * T * D, out + bh * T * D
    if bias is not None:
        bias += bh // H * bias_b + bh % H * bias_h
    relation = bh if PER_HEAD else 0
    allowed += relation * C * C
    tiles += (relation * n_q + i).to(tl.int64) * n_k
    counts += (relation * n_q + i) * 2
    n_partial, n_full = tl.load(counts), tl.load(counts + 1)

    query = i * M + tl.arange(0, M)
    x = tile_of(q, query, T, D, True)
    acc = tl.zeros((M, D), tl.float32)
    m, l, shift = tl.full((M,), -INF, tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    if SIGMOID:
        shift = shift_of(row, bh, query, T, True)
    for n in range(n_partial):
        j = tl.load(tiles + n)
        acc, m, l = forward_step(
            x, acc, m, l, shift, j, query, k, v, cell, allowed, bias, T, C, scale, D, N, SIGMOID, True
        )
    for n in range(n_k - n_full, n_k):
        j = tl.load(tiles + n)
        acc, m, l = forward_step(
            x, acc, m, l, shift, j, query, k, v, cell, allowed, bias, T, C, scale, D, N, SIGMOID, False
        )
    if not SIGMOID:
        tl.store(lse + bh * T + query, (m + tl.log2(l)) / LOG2E, mask=query < T)  # -inf + log2(0) = -inf
        acc /= tl.where(l == 0, 1.0, l)[:, None]
    at = out + query[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=query[:, None] < T)


# ---------------------------------------------------------------------------------------------------------------------
# Backward. With P the weights, dP = dO V^T and delta = rowsum(dO O):
# dS = P (dP - delta) for softmax, P (1 - P) dP for sigmoid; dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q.


@triton.jit
def delta_kernel(out, grad, delta, n, D: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o, g = tile_of(out, rows, n, D, True), tile_of(grad, rows, n, D, True)
    at = delta + rows
    tl.store(at, tl.sum(o.to(at.dtype.element_ty) * g.to(at.dtype.element_ty), 1), mask=rows < n)


@triton.jit
def dq_step(
    q, g, acc, rowsum, shift, delta, j, query, k, v, cell, allowed, bias, T, C, scale, D: tl.constexpr,
    N: tl.constexpr, SIGMOID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key = j * N + tl.arange(0, N)
    x = tile_of(k, key, T, D, MASKED)  # (N, D)
    s = dot(q, tl.trans(x)) * (scale * LOG2E)  # (M, N)
    s = biased(s, query[:, None], key[None, :], cell, allowed, bias, T, C, MASKED)
    p = weights_of(s + shift[:, None], SIGMOID)
    dp = dot(g, tl.trans(tile_of(v, key, T, D, MASKED)))
    ds = score_gradient(p, dp, delta[:, None], SIGMOID)
    return acc + dot(ds.to(x.dtype), x), rowsum + tl.sum(ds, 1)


@triton.jit
def dq_kernel(
    q, k, v, row, grad, delta, dq, total, cell, allowed, bias, tiles, counts, T, C, H, bias_b, bias_h, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIGMOID: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """dq of a query tile, and total (B H, T), the sums of dS over keys.

    For softmax they would be 0 without the rounding of `out`: delta + total is the delta without it.
    """
    n_q, n_k = tl.cdiv(T, M), tl.cdiv(T, N)
    i, bh = tl.program_id(0) % n_q, (tl.program_id(0) // n_q).to(tl.int64)
    q, k, v, grad, dq = q + bh * T * D, k + bh * T * D, v + bh * T * D, grad + bh * T * D, dq + bh * T * D
    if bias is not None:
        bias += bh // H * bias_b + bh % H * bias_h
    relation = bh if PER_HEAD else 0
    allowed += relation * C * C
    tiles += (relation * n_q + i).to(tl.int64) * n_k
    counts += (relation * n_q + i) * 2
    n_partial, n_full = tl.load(counts), tl.load(counts + 1)

    query = i * M + tl.arange(0, M)
    x, g = tile_of(q, query, T, D, True), tile_of(grad, query, T, D, True)
    shift = shift_of(row, bh, query, T, SIGMOID)
    acc, rowsum = tl.zeros((M, D), tl.float32), tl.zeros((M,), tl.float32)
    d = delta_of(delta, bh, query, T, SIGMOID)
    for n in range(n_partial):
        j = tl.load(tiles + n)
        acc, rowsum = dq_step(
            x, g, acc, rowsum, shift, d, j, query, k, v, cell, allowed, bias, T, C, scale, D, N, SIGMOID, True
        )
    for n in range(n_k - n_full, n_k):
        j = tl.load(tiles + n)
        acc, rowsum = dq_step(
            x, g, acc, rowsum, shift, d, j, query, k, v, cell, allowed, bias, T, C, scale, D, N, SIGMOID, False
        )
    tl.store(total + bh * T + query, rowsum, mask=query < T)
    at = dq + query[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=query[:, None] < T)


@triton.jit
def dkv_step(
    x, y, dk, dv, i, key, q, grad, row, delta, bh, cell, allowed, bias, T, C, scale, D: tl.constexpr,
    M: tl.constexpr, SIGMOID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    query = i * M + tl.arange(0, M)
    xq, g = tile_of(q, query, T, D, MASKED), tile_of(grad, query, T, D, MASKED)  # (M, D)
    s = dot(x, tl.trans(xq)) * (scale * LOG2E)  # (N, M)
    s = biased(s, query[None, :], key[:, None], cell, allowed, bias, T, C, MASKED)
    p = weights_of(s + shift_of(row, bh, query, T, SIGMOID)[None, :], SIGMOID)
    dv += dot(p.to(g.dtype), g)
    d = delta_of(delta, bh, query, T, SIGMOID)
    ds = score_gradient(p, dot(y, tl.trans(g)), d[None, :], SIGMOID)
    return dk + dot(ds.to(xq.dtype), xq), dv


@triton.jit
def dkv_kernel(
    q, k, v, row, grad, delta, dk, dv, cell, allowed, bias, tiles, counts, T, C, H, bias_b, bias_h, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIGMOID: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """dk and dv of a key tile, from the query tiles that attend to it."""
    n_q, n_k = tl.cdiv(T, M), tl.cdiv(T, N)
    j, bh = tl.program_id(0) % n_k, (tl.program_id(0) // n_k).to(tl.int64)
    q, k, v, grad = q + bh * T * D, k + bh * T * D, v + bh * T * D, grad + bh * T * D
    dk, dv = dk + bh * T * D, dv + bh * T * D
    if bias is not None:
        bias += bh // H * bias_b + bh % H * bias_h
    relation = bh if PER_HEAD else 0
    allowed += relation * C * C
    tiles += (relation * n_k + j).to(tl.int64) * n_q
    counts += (relation * n_k + j) * 2
    n_partial, n_full = tl.load(counts), tl.load(counts + 1)

    key = j * N + tl.arange(0, N)
    x, y = tile_of(k, key, T, D, True), tile_of(v, key, T, D, True)
    ak, av = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
    for n in tl.range(n_partial, num_stages=1):  # if this were pipelined, the mask would spill registers
        i = tl.load(tiles + n)
        ak, av = dkv_step(
            x, y, ak, av, i, key, q, grad, row, delta, bh, cell, allowed, bias, T, C, scale, D, M, SIGMOID, True
        )
    for n in range(n_q - n_full, n_q):
        i = tl.load(tiles + n)
        ak, av = dkv_step(
            x, y, ak, av, i, key, q, grad, row, delta, bh, cell, allowed, bias, T, C, scale, D, M, SIGMOID, False
        )
    at = key[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + at, (ak * scale).to(dk.dtype.element_ty), mask=key[:, None] < T)
    tl.store(dv + at, av.to(dv.dtype.element_ty), mask=key[:, None] < T)


@triton.jit
def dbias_kernel(
    q, k, v, row, grad, delta, dbias, starts, bias, cells, counts, T, C, H, bias_b, bias_h, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SIGMOID: tl.constexpr, PER_HEAD: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The sums of dS over pairs of cells: one query cell, and every SPLIT-th of the cells that it attends to."""
    c, bh = tl.program_id(0) % C, (tl.program_id(0) // C).to(tl.int64)
    q, k, v, grad = q + bh * T * D, k + bh * T * D, v + bh * T * D, grad + bh * T * D
    bias += bh // H * bias_b + bh % H * bias_h + c.to(tl.int64) * C
    dbias += (bh * C + c) * C
    relation = bh if PER_HEAD else 0
    cells += (relation * C + c) * C
    counts += (relation * C + c) * 2
    first, end = tl.load(starts + c), tl.load(starts + c + 1)
    for n in range(tl.program_id(1), tl.load(counts + 1), SPLIT):
        other = tl.load(cells + C - 1 - n)
        b, k_end = tl.load(bias + other), tl.load(starts + other + 1)
        total = tl.zeros((N,), tl.float32)
        for k0 in range(tl.load(starts + other), k_end, N):
            key = k0 + tl.arange(0, N)
            x, y = tile_of(k, key, T, D, True), tile_of(v, key, T, D, True)
            for q0 in range(first + tl.maximum(k0 - first, 0) // M * M, end, M):
                query = q0 + tl.arange(0, M)
                s = dot(tile_of(q, query, T, D, True), tl.trans(x)) * (scale * LOG2E) + b
                seen = (key[None, :] <= query[:, None]) & (query < end)[:, None] & (key < k_end)[None, :]
                s = tl.where(seen, s + shift_of(row, bh, query, T, SIGMOID)[:, None], -INF)
                dp = dot(tile_of(grad, query, T, D, True), tl.trans(y))
                d = delta_of(delta, bh, query, T, SIGMOID)
                total += tl.sum(score_gradient(weights_of(s, SIGMOID), dp, d[:, None], SIGMOID), 0)
        tl.store(dbias + other, tl.sum(total, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Launching.

SPLIT = 8  # programs that share the bias gradient of a query cell


DIMS = (16, 32, 64, 128)

# kernel: (M, N, num_warps, num_stages) at these D, for 16-bit types and, in the second line, for float32, whose exact
# dots do not use tensor cores: each thread reads whole rows, so tiles are small. kernels/aot.py shows spills, if any.
# At D = 64 the 16-bit ones were timed on an H100, and taken from those without spills (docs/log.md).
TILES = {
    "forward_kernel": (
        (64, 32, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2),
        (32, 32, 8, 1), (16, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1),
    ),
    "dq_kernel": (
        (64, 32, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 2),
        (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1),
    ),
    "dkv_kernel": (
        (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2),
        (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1),
    ),
    "dbias_kernel": (
        (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2),
        (16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1),
    ),
}  # fmt: skip


def meta_of(kernel, D, dtype):
    """Tile sizes and launch options."""
    column = DIMS.index(D) + len(DIMS) * (dtype == torch.float32)
    return dict(zip(("M", "N", "num_warps", "num_stages"), TILES[kernel.__name__][column]))


def live_tiles(cell, sums, T, X, Y, by_key=False):
    """Which tiles of Y keys each tile of X queries attends to (by_key: which Y queries attend to each X keys).

    cell: of each position, (T or more,) int32; sums (R, C + 1, C + 1) int32: 2-D prefix sums of the relation. Returns
    tiles (R, T / X, T / Y) int32, a row's partial ones from its left and full ones from its right, and counts
    (R, T / X, 2) int32 of both.
    """
    R, C = sums.size(0), sums.size(1) - 1
    n_x, n_y = triton.cdiv(T, X), triton.cdiv(T, Y)
    tiles = torch.empty(R, n_x, n_y, dtype=torch.int32, device=cell.device)
    counts = torch.empty(R, n_x, 2, dtype=torch.int32, device=cell.device)
    live_tiles_kernel[(R * n_x,)](cell, sums, tiles, counts, T, C, X, Y, by_key, BLOCK=64)
    return tiles, counts


class Launch:
    """The operator's arguments as the kernels take them, on the device and without waiting for it."""

    def __init__(self, q, starts, allowed, bias, lse, row_bias, scale, activation):
        (self.B, self.H, self.T, self.D), self.C, self.dtype = q.shape, len(starts) - 1, q.dtype
        if self.D not in DIMS or q.dtype not in POINTERS:
            raise ValueError(f"D={self.D}, {q.dtype}: must be 16, 32, 64 or 128, and float32, bfloat16 or float16")
        self.starts = torch.tensor(starts, dtype=torch.int32).to(q.device, non_blocking=True)
        position = torch.arange(triton.cdiv(self.T, 128) * 128, dtype=torch.int32, device=q.device)  # whole tiles
        self.cell = torch.searchsorted(self.starts[1:], position, right=True, out_int32=True).clamp_(max=self.C - 1)
        self.allowed = allowed.contiguous()
        sums = self.allowed.view(-1, self.C, self.C).cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
        self.sums = torch.nn.functional.pad(sums, (1, 0, 1, 0))
        self.bias, steps = None, (0, 0)
        if bias is not None:
            self.bias = (bias.float() * LOG2E.value).contiguous()
            steps = self.bias.expand(self.B, self.H, self.C, self.C).stride()[:2]
        self.row = lse  # (B, H, T); for sigmoid the row bias, (T,)
        if activation == "sigmoid":
            self.row = (q.new_zeros(self.T) if row_bias is None else row_bias).float().contiguous()
        self.shape = (self.T, self.C, self.H, *steps, scale)
        self.flags = {"D": self.D, "SIGMOID": activation == "sigmoid", "PER_HEAD": allowed.dim() == 4}

    def options(self, kernel):
        return self.flags | meta_of(kernel, self.D, self.dtype)

    def tiles(self, X, Y, by_key=False):
        return live_tiles(self.cell, self.sums, self.T, X, Y, by_key)


def triton_forward(q, k, v, starts, allowed, bias, row_bias, scale, activation):
    """(out (B, H, T, D), lse (B, H, T)); see `block_sparse_attention`. lse is empty for sigmoid."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    B, H, T, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, T if activation == "softmax" else 0, dtype=torch.float32)
    with torch.cuda.device_of(q):
        x = Launch(q, starts, allowed, bias, lse, row_bias, scale, activation)
        how = x.options(forward_kernel)
        forward_kernel[(B * H * triton.cdiv(T, how["M"]),)](
            q, k, v, x.row, out, lse, x.cell, x.allowed, x.bias, *x.tiles(how["M"], how["N"]), *x.shape, **how
        )
    return out, lse


def triton_backward(grad, q, k, v, out, lse, starts, allowed, bias, row_bias, scale, activation):
    """Gradients (dq, dk, dv, dbias, drow_bias); the last two are empty where there is no such bias."""
    grad, q, k, v, out, lse = (x.contiguous() for x in (grad, q, k, v, out, lse))
    B, H, T, D = q.shape
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta, total = q.new_empty(B, H, T, dtype=torch.float32), q.new_empty(B, H, T, dtype=torch.float32)
    dbias, drow = q.new_empty(0), q.new_empty(0)
    with torch.cuda.device_of(q):
        x = Launch(q, starts, allowed, bias, lse, row_bias, scale, activation)
        if activation == "softmax":
            delta_kernel[(triton.cdiv(B * H * T, 64),)](out, grad, delta, B * H * T, D, BLOCK=64)
        how = x.options(dq_kernel)
        dq_kernel[(B * H * triton.cdiv(T, how["M"]),)](
            q, k, v, x.row, grad, delta, dq, total, x.cell, x.allowed, x.bias, *x.tiles(how["M"], how["N"]), *x.shape,
            **how,
        )  # fmt: skip
        if activation == "softmax":
            delta += total
        how = x.options(dkv_kernel)
        dkv_kernel[(B * H * triton.cdiv(T, how["N"]),)](
            q, k, v, x.row, grad, delta, dk, dv, x.cell, x.allowed, x.bias,
            *x.tiles(how["N"], how["M"], by_key=True), *x.shape, **how,
        )  # fmt: skip
        if bias is not None:
            # tiles of one cell each are full: a list of the cells that a cell attends to
            cells, counts = live_tiles(torch.arange(x.C, dtype=torch.int32, device=q.device), x.sums, x.C, 1, 1)
            full = q.new_zeros(B, H, x.C, x.C, dtype=torch.float32)
            dbias_kernel[(B * H * x.C, SPLIT)](
                q, k, v, x.row, grad, delta, full, x.starts, x.bias, cells, counts, *x.shape, SPLIT=SPLIT,
                **x.options(dbias_kernel),
            )  # fmt: skip
            dbias = full.sum_to_size(bias.shape)
        if row_bias is not None:
            drow = total.sum((0, 1))
    return dq, dk, dv, dbias, drow


# ---------------------------------------------------------------------------------------------------------------------
# For kernels/aot.py.

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
FLOATS = {"row", "lse", "delta", "total", "dbias", "bias"}
INTS = {"cell", "tiles", "counts", "starts", "cells", "sums"}


def signature_of(kernel, dtype, constexprs):
    """{argument: Triton type} of a kernel for q of `dtype`."""

    def type_of(name):
        if name in constexprs:
            return "constexpr"
        if name in ("T", "C", "H", "n", "bias_b", "bias_h"):
            return "i32"
        if name in INTS:
            return "*i32"
        return {"scale": "fp32", "allowed": "*i1"}.get(name, POINTERS[torch.float32 if name in FLOATS else dtype])

    return {name: type_of(name) for name in kernel.arg_names}


def aot_rows(full=False):
    """(name, kernel, signature, constexprs, num_warps, num_stages) of what can be launched; see kernels/aot.py."""
    dims = (16, 32, 64, 128) if full else (64, 128)
    dtypes = (torch.bfloat16, torch.float32) + ((torch.float16,) if full else ())
    flags = (False, True)

    def row(kernel, words, dtype, constexprs, num_warps=4, num_stages=3):
        name = " ".join((kernel.__name__.removesuffix("_kernel"), *words))
        return name, kernel, signature_of(kernel, dtype, constexprs), constexprs, num_warps, num_stages

    for by_key in flags:
        sizes = {"X": 64, "Y": 64, "BY_KEY": by_key, "BLOCK": 64}
        yield row(live_tiles_kernel, ["by_key"] * by_key, torch.float32, sizes)
    for D, dtype in itertools.product(dims, dtypes):
        words = [f"D={D}", str(dtype).removeprefix("torch.")]
        yield row(delta_kernel, words, dtype, {"D": D, "BLOCK": 64})
        kernels = (forward_kernel, dq_kernel, dkv_kernel, dbias_kernel)
        for kernel, sigmoid, has_bias, per_head in itertools.product(kernels, flags, flags, flags):
            if kernel is dbias_kernel and not has_bias or per_head and not full:
                continue
            constexprs = {"D": D, "SIGMOID": sigmoid, "PER_HEAD": per_head}
            constexprs |= {"SPLIT": SPLIT} if kernel is dbias_kernel else {}
            constexprs |= {} if has_bias else {"bias": None}
            more = ["sigmoid"] * sigmoid + ["bias"] * has_bias + ["per_head"] * per_head
            meta = meta_of(kernel, D, dtype)
            launch = meta.pop("num_warps"), meta.pop("num_stages")
            yield row(kernel, words + more, dtype, constexprs | meta, *launch)
            if D == 64 and dtype == torch.bfloat16 and has_bias and not sigmoid:
                # the launcher makes constants of integers that are 1
                ones = {"T": 1, "C": 1, "H": 1, "bias_b": 1, "bias_h": 1}
                yield row(kernel, [*words, *more, "ones"], dtype, constexprs | meta | ones, *launch)
