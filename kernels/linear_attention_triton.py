"""
`carry` of linear_attention.py on a GPU: a program walks over the chunks of one head with its columns of S in registers.

Everything that does not wait for the state is matrix products of PyTorch before and after; what is left are N steps of
two small products each, which a loop of PyTorch calls would launch one by one. float32, by three products of tensor
cores each ("tf32x3").
TRITON_INTERPRET=1 runs this on a CPU; `python kernels/aot.py` compiles it without a GPU.
"""

import torch
import triton
import triton.language as tl

from kernels.linear_attention import CHUNK


@triton.jit
def tile(x, first, rows, columns, i, j, WIDTH):
    """Rows i and columns j, of `rows` and `columns`, of the matrix (rows, WIDTH) that begins at x + first: 0 beyond."""
    return tl.load(
        x + first + i[:, None] * WIDTH + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0
    )


@triton.jit
def put(x, value, first, rows, columns, i, j, WIDTH):
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(x + first + i[:, None] * WIDTH + j[None, :], value, mask=inside)


@triton.jit
def decay_of(decay, chunk, dk, i, PER_CHANNEL: tl.constexpr):
    """The chunk's decay, (DK, 1)."""
    width = dk if PER_CHANNEL else 1
    return tl.load(decay + chunk * width + i * PER_CHANNEL, mask=i < dk, other=0.0)[:, None]


@triton.jit(do_not_specialize=["N", "length", "dk", "dv"])
def carry_kernel(decay, K, W, U, S, before, written, end, N, length, dk, dv, HAS_W: tl.constexpr,
                 PER_CHANNEL: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(dv, DV)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i, t, j = tl.arange(0, DK), tl.arange(0, L), tl.program_id(0) % blocks * DV + tl.arange(0, DV)
    x = tile(S, row * dk * dv, dk, dv, i, j, dv)
    for n in range(N):
        chunk = row * N + n
        put(before, x, chunk * dk * dv, dk, dv, i, j, dv)
        u = tile(U, chunk * length * dv, length, dv, t, j, dv)
        if HAS_W:
            u -= tl.dot(tile(W, chunk * length * dk, length, dk, t, i, dk), x, input_precision="tf32x3")
        put(written, u, chunk * length * dv, length, dv, t, j, dv)
        k = tile(K, chunk * length * dk, length, dk, t, i, dk)
        x = decay_of(decay, chunk, dk, i, PER_CHANNEL) * x + tl.dot(tl.trans(k), u, input_precision="tf32x3")
    put(end, x, row * dk * dv, dk, dv, i, j, dv)


@triton.jit(do_not_specialize=["N", "length", "dk", "dv"])
def backward_kernel(decay, K, W, g_before, g_written, g_end, after, totals, g_S, N, length, dk, dv, HAS_W: tl.constexpr,
                    PER_CHANNEL: tl.constexpr, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(dv, DV)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i, t, j = tl.arange(0, DK), tl.arange(0, L), tl.program_id(0) % blocks * DV + tl.arange(0, DV)
    g = tile(g_end, row * dk * dv, dk, dv, i, j, dv)
    for m in range(N):
        chunk = row * N + N - 1 - m
        put(after, g, chunk * dk * dv, dk, dv, i, j, dv)
        total = tile(g_written, chunk * length * dv, length, dv, t, j, dv)
        total += tl.dot(tile(K, chunk * length * dk, length, dk, t, i, dk), g, input_precision="tf32x3")
        put(totals, total, chunk * length * dv, length, dv, t, j, dv)
        g = tile(g_before, chunk * dk * dv, dk, dv, i, j, dv) + decay_of(decay, chunk, dk, i, PER_CHANNEL) * g
        if HAS_W:
            w = tile(W, chunk * length * dk, length, dk, t, i, dk)
            g -= tl.dot(tl.trans(w), total, input_precision="tf32x3")
    put(g_S, g, row * dk * dv, dk, dv, i, j, dv)


# ---------------------------------------------------------------------------------------------------------------------
# Launching.

COLUMNS = 16  # how many columns of S one program holds


def warps(dk):
    """So many that no tile spills."""
    return 4 if dk <= 32 else 8


def sizes(length, dk):
    """Tiles of a power of 2, at least the 16 that a product of tiles needs."""
    return {"L": max(16, triton.next_power_of_2(length)), "DK": max(16, triton.next_power_of_2(dk)), "DV": COLUMNS}


def launch(kernel, decay, K, W, tensors, results):
    B, heads, N, length, dk = K.shape
    dv = results[0].size(-1)
    args = [x.contiguous() for x in (decay, K, K if W is None else W, *tensors)]
    flags = {"HAS_W": W is not None, "PER_CHANNEL": decay.size(-2) > 1}
    with torch.cuda.device_of(K):
        kernel[(B * heads * triton.cdiv(dv, COLUMNS),)](
            *args, *results, N, length, dk, dv, **flags, **sizes(length, dk), num_warps=warps(dk), num_stages=1
        )
    return results


def carry(decay, K, W, U, S):
    """See linear_attention.py."""
    (B, heads, N, _, dk), dv = K.shape, U.size(-1)
    results = U.new_empty(B, heads, N, dk, dv), torch.empty_like(U, memory_format=torch.contiguous_format)
    return launch(carry_kernel, decay, K, W, (U, S), (*results, U.new_empty(B, heads, dk, dv)))


def carry_backward(decay, K, W, g_before, g_written, g_end):
    """See linear_attention.py."""
    like = (g_before, g_written, g_end)
    results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)
    return launch(backward_kernel, decay, K, W, like, results)


def aot_rows(full=False):
    """(name, kernel, signature, constexprs, num_warps, num_stages) of what can be launched; see kernels/aot.py."""
    for dk in (16, 32, 64) if full else (32, 64):
        for name, flags in (
            ("gla", {"HAS_W": False, "PER_CHANNEL": True}), ("gdn", {"HAS_W": True, "PER_CHANNEL": False})
        ):  # fmt: skip
            constexprs = flags | sizes(CHUNK, dk)
            for word, kernel in (("forward", carry_kernel), ("backward", backward_kernel)):
                types = dict.fromkeys(("N", "length", "dk", "dv"), "i32") | dict.fromkeys(constexprs, "constexpr")
                signature = {x: types.get(x, "*fp32") for x in kernel.arg_names}
                yield f"{name} {word} dk={dk}", kernel, signature, constexprs, warps(dk), 1
