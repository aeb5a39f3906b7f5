"""
Gated linear recurrence along time: h_t = A_t h_{t-1} + b_t for (B, T, C), each channel by itself.

`reference` is the plain loop, in any float type. The CPU path streams fixed-size blocks of time. A block is cut into
chunks of a few positions, and an operation handles one position of all chunks, batch rows and channels at once
(`ChunkedScan`): once up, to the product of A of each chunk and to the value with which the chunk would end after a zero
state; then a scan over these end values, which is the same problem, but smaller (`Level`); then once down, from the
true value before each chunk. This is O(T) work in about 8 log_4(T) operations per block, each large compared with the
cost of its call. The products of A underflow harmlessly: nothing is divided by them, nor is
a logarithm taken, so A may have any sign. On CUDA the operators call
scan_triton.py.
"""

import torch
from torch.autograd.forward_ad import unpack_dual

from kernels import triton_module

BLOCK = 400_000  # elements of a block, over batch rows, time and channels: a few such buffers fit in the last cache
STEP = 64  # blocks are multiples of this many positions, where T allows
CHUNK = 4  # positions
LANES = 5_000  # elements from which an operation takes long compared with its call, about 1.5 us

# ---------------------------------------------------------------------------------------------------------------------
# The reference.


def reference(A, b, h0=None):
    """The same recurrence position by position, differentiable by autograd."""
    h, out = torch.zeros_like(b[:, 0]) if h0 is None else h0, []
    for A_t, b_t in zip(A.unbind(1), b.unbind(1)):
        h = A_t * h + b_t
        out.append(h)
    return torch.stack(out, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The chunked scan.


def chunk_length(n, lanes):
    """Items per chunk in a scan over n items of `lanes` elements; n where a plain loop is as fast."""
    return n if n <= 2 * CHUNK or lanes >= LANES else CHUNK


class Level:
    """An inclusive scan over n items of (B, C) in place, forwards or backwards, in buffers of its own.

    The caller fills `A` and `b` (B, n, C), and `first` or `last` with the incoming value; afterwards b holds the
    states, `before` those before each item, `after` those after it.
    """

    def __init__(self, B, n, C, like):
        L = chunk_length(n, B * C)
        k = -(-n // L)
        m = k * L  # padded with A = 1, b = 0, which changes nothing in either direction
        self.all_A, states = like.new_ones(B, m, C), like.new_zeros(B, m + 2, C)
        self.A, self.b, self.pad = self.all_A[:, :n], states[:, 1 : n + 1], states[:, n + 1 : m + 1]
        self.first, self.last = states[:, 0], states[:, m + 1]
        self.before, self.after = states[:, :n], states[:, 2 : n + 2]
        self.a_at = self.all_A.unflatten(1, (k, L)).unbind(2)
        self.b_at = states[:, 1 : m + 1].unflatten(1, (k, L)).unbind(2)
        self.inner = Level(B, k, C, like) if k > 1 else None
        if k == 1:  # one item after the other: (B, C) each
            self.a_at, self.b_at = ([x[:, 0] for x in xs] for xs in (self.a_at, self.b_at))

    def load(self):
        """To be called when A is filled."""
        if self.inner:
            product(self.a_at, self.inner.A)
            self.inner.load()

    def run(self, backwards=False):
        a, b, inner = self.a_at, self.b_at, self.inner
        if backwards:
            a, b = a[::-1], b[::-1]
        if self.pad.size(1):
            self.pad.zero_()
        if inner:
            fold(a, b, inner.b)
            (inner.last if backwards else inner.first).copy_(self.last if backwards else self.first)
            inner.run(backwards)
            start = inner.after if backwards else inner.before
        else:
            start = self.last if backwards else self.first
        for a_t, b_t in zip(a, b):
            start = b_t.addcmul_(a_t, start)


def product(a, out):
    """out = a[0] a[1] ... of equal tensors."""
    if len(a) == 1:
        return out.copy_(a[0])
    torch.mul(a[0], a[1], out=out)
    for x in a[2:]:
        out.mul_(x)
    return out


def fold(a, b, out):
    """out = the state after the positions a[i], b[i], from zero."""
    if len(a) == 1:
        return out.copy_(b[0])
    torch.addcmul(b[1], a[1], b[0], out=out)
    for x, y in zip(a[2:], b[2:]):
        torch.addcmul(y, x, out, out=out)
    return out


class ChunkedScan:
    """The recurrence over one block (B, T, C), T = k L, whose A several scans in both directions may share.

    `load` the block's A first. The tensors may be any views whose last dimension is contiguous; no two may overlap.
    """

    def __init__(self, B, T, C, like):
        self.L = chunk_length(T, B * C)
        self.inner = Level(B, T // self.L, C, like) if T > self.L else None

    def positions(self, x):
        """One view for each position of a chunk: (B, k, C), or (B, C) where the block is one chunk."""
        return x.unflatten(1, (-1, self.L)).unbind(2) if self.inner else x.unbind(1)

    def load(self, A):
        self.load_backward(A)
        if self.inner:
            product(self.a, self.inner.A)
            self.inner.load()

    def load_backward(self, A):
        """For `backward` where `load_weights(1 - A)` has been called."""
        self.a = self.positions(A)

    def forward(self, b, out, start):
        """out_t = A_t out_{t-1} + b_t from `start` (B, C)."""
        b, out = self.positions(b), self.positions(out)
        if self.inner:
            fold(self.a, b, self.inner.b)
            start = self.carry(start)
        for a_t, b_t, out_t in zip(self.a, b, out):
            start = torch.addcmul(b_t, a_t, start, out=out_t)

    def load_weights(self, m):
        """For `average`: what `load(1 - m)` does without the pass that computes it."""
        self.m = self.positions(m)
        if self.inner:
            A = torch.sub(1, self.m[0], out=self.inner.A)
            for m_t in self.m[1:]:
                A.addcmul_(A, m_t, value=-1)
            self.inner.load()

    def average(self, r, out, start):
        """out_t = out_{t-1} + m_t (r_t - out_{t-1}) from `start` (B, C), with the m of `load_weights`."""
        m, r, out = self.m, self.positions(r), self.positions(out)
        if self.inner:
            torch.mul(m[0], r[0], out=self.inner.b)
            for m_t, r_t in zip(m[1:], r[1:]):
                torch.lerp(self.inner.b, r_t, m_t, out=self.inner.b)
            start = self.carry(start)
        for m_t, r_t, out_t in zip(m, r, out):
            start = torch.lerp(start, r_t, m_t, out=out_t)

    def backward(self, grad, out, end):
        """out_t = grad_t + A_{t+1} out_{t+1}; `end` (B, C): that product for the last t. It becomes A_0 out_0."""
        a, grad, out = self.a[::-1], self.positions(grad)[::-1], self.positions(out)[::-1]
        right = end
        if self.inner:
            e = self.inner.b
            torch.mul(a[0], grad[0], out=e)
            for a_t, grad_t in zip(a[1:], grad[1:]):
                e.add_(grad_t).mul_(a_t)
            right = self.carry(end, backwards=True)
        left = torch.add(grad[0], right, out=out[0])
        for a_t, grad_t, out_t in zip(a, grad[1:], out[1:]):
            left = torch.addcmul(grad_t, a_t, left, out=out_t)
        if self.inner:
            end.copy_(self.inner.b[:, 0])
        else:
            torch.mul(a[-1], left, out=end)

    def carry(self, start, backwards=False):
        """Scan over the chunks: the states before (after) each one."""
        (self.inner.last if backwards else self.inner.first).copy_(start)
        self.inner.run(backwards)
        return self.inner.after if backwards else self.inner.before


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of time.


def block_length(B, C):
    """Positions of one block."""
    return max(STEP, BLOCK // (B * C) // STEP * STEP)


def blocks(T, length):
    """[(first, end)) of each block: full ones, then whole chunks, then what is left."""
    borders = list(range(0, T, length))
    if T % CHUNK and T - borders[-1] > 2 * CHUNK:
        borders.append(T - T % CHUNK)
    return list(zip(borders, [*borders[1:], T]))


class Stage:
    """Blocks of a tensor in the type of the sums, contiguous along C: views where this holds already."""

    def __init__(self, x, length, dtype):
        self.x = x
        ready = x.dtype == dtype and x.stride(2) == 1
        self.buffer = None if ready else x.new_empty(x.size(0), min(length, x.size(1)), x.size(2), dtype=dtype)

    def read(self, s, e):
        block = self.x[:, s:e]
        return block if self.buffer is None else self.buffer[:, : e - s].copy_(block)

    def target(self, s, e):
        """Where to write a block before `write`."""
        return self.x[:, s:e] if self.buffer is None else self.buffer[:, : e - s]

    def write(self, s, e):
        if self.buffer is not None:
            self.x[:, s:e].copy_(self.buffer[:, : e - s])


def sum_dtype(x):
    """The type to compute in: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Scans:
    """One ChunkedScan for each length of block."""

    def __init__(self, B, C, like):
        self.B, self.C, self.like, self.known = B, C, like, {}

    def of(self, T):
        if T not in self.known:
            self.known[T] = ChunkedScan(self.B, T, self.C, self.like)
        return self.known[T]


def torch_forward(A, b, h0):
    """h (B, T, C); see `gated_scan`. Any device."""
    (B, T, C), dtype, length = A.shape, sum_dtype(A), block_length(A.size(0), A.size(2))
    h = torch.empty_like(A, memory_format=torch.contiguous_format)
    coefficients, inputs, states = (Stage(x, length, dtype) for x in (A, b, h))
    carry, scans = h0.to(dtype), Scans(B, C, A.new_empty(0, dtype=dtype))
    for span in blocks(T, length):
        scan, out = scans.of(span[1] - span[0]), states.target(*span)
        scan.load(coefficients.read(*span))
        scan.forward(inputs.read(*span), out, carry)
        carry = out[:, -1].clone()
        states.write(*span)
    return h


def torch_backward(grad, A, h, h0):
    """Gradients (dA, db, dh0); see `gated_scan`. Any device."""
    (B, T, C), dtype, length = A.shape, sum_dtype(A), block_length(A.size(0), A.size(2))
    dA, db = (torch.empty_like(A, memory_format=torch.contiguous_format) for _ in range(2))
    gradients, coefficients, adjoints = (Stage(x, length, dtype) for x in (grad, A, db))
    carry, scans = A.new_zeros(B, C, dtype=dtype), Scans(B, C, A.new_empty(0, dtype=dtype))
    for s, e in reversed(blocks(T, length)):
        scan, out = scans.of(e - s), adjoints.target(s, e)
        scan.load(coefficients.read(s, e))
        scan.backward(gradients.read(s, e), out, carry)
        torch.mul(out[:, 0], h[:, s - 1] if s else h0, out=dA[:, s])
        torch.mul(out[:, 1:], h[:, s : e - 1], out=dA[:, s + 1 : e])
        adjoints.write(s, e)
    return dA, db, carry.to(h0.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The operators.


def import_triton():
    """The CUDA path."""
    return triton_module("scan_triton")


@torch.library.custom_op("nanochimera::gated_scan", mutates_args=())
def scan_op(A: torch.Tensor, b: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
    return (import_triton().triton_forward if A.is_cuda else torch_forward)(A, b, h0)


@scan_op.register_fake
def _(A, b, h0):
    return torch.empty_like(A, memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochimera::gated_scan_backward", mutates_args=())
def scan_backward_op(
    grad: torch.Tensor, A: torch.Tensor, h: torch.Tensor, h0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (import_triton().triton_backward if A.is_cuda else torch_backward)(grad, A, h, h0)


@scan_backward_op.register_fake
def _(grad, A, h, h0):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (A, A, h0))


def save_for_backward(ctx, inputs, output):
    A, _, h0 = inputs
    ctx.save_for_backward(A, output, h0)


def differentiate(ctx, grad):
    return scan_backward_op(grad, *ctx.saved_tensors)


scan_op.register_autograd(differentiate, setup_context=save_for_backward)


def gated_scan(A, b, h0=None):
    """h_t = A_t h_{t-1} + b_t along T, for A and b (B, T, C) of one floating type; h0 (B, C), zeros by default.

    Returns h (B, T, C). Half types are computed in float32. ValueError for arguments that do not fit,
    NotImplementedError for forward-mode inputs, whose tangents would be lost.
    """
    if A.dim() != 3 or 0 in A.shape or A.shape != b.shape or A.dtype != b.dtype or not A.is_floating_point():
        raise ValueError(
            "A and b must agree in shape, (B, T, C) without empty dimensions, and in type, a floating one: "
            f"{tuple(A.shape)} {A.dtype}, {tuple(b.shape)} {b.dtype}"
        )
    B, T, C = A.shape
    if h0 is None:
        h0 = A.new_zeros(B, C)
    if h0.shape != (B, C) or h0.dtype != A.dtype:
        raise ValueError(f"h0 must be {(B, C)} {A.dtype}, not {tuple(h0.shape)} {h0.dtype}")
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (A, b, h0)):
        raise NotImplementedError("gated_scan has no forward-mode derivative: use reference(...)")
    if T == 1 and not A.is_cuda:  # one token of generation: autograd differentiates it
        dtype = sum_dtype(A)
        return torch.addcmul(b[:, 0].to(dtype), A[:, 0].to(dtype), h0.to(dtype))[:, None].to(A.dtype)
    return scan_op(A, b, h0)
