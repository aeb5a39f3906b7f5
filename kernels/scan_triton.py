"""
The gated recurrence h_t = A_t h_{t-1} + b_t on a GPU: Triton kernels, with the mathematics and arguments of `scan.py`.

A program is one warp. It owns a batch row, N channels and a span of time, and goes over the span once, chunk by chunk.
A chunk is W neighbouring segments of L positions: each of the warp's 32 lanes has one segment of one channel, its L
positions as a tuple of L tiles (W, N), so nearly all of a scan is plain arithmetic on registers. Only the W ends pass
from lane to lane, by shuffles: no shared memory, no barrier, no atomics, bit-equal runs. The next chunk is loaded while
this one is solved. fhn_triton.py is built from the same parts.

A batch that fills the GPU has one span, all of time. A few long texts would leave most of the GPU idle, so that time is
cut into `span_length` positions for each program, and three kernels run: `ends_kernel` reduces every span to the
product of its A and to the state with which it would end after a zero state; the forward kernel scans these, which is
the same problem, but smaller; then each span starts from the true state before it. No program waits for another, so
that the result does not depend on the order in which they run.

Bytes: with one span, forward and backward load each input once and store each result once. The least possible (the
floor) is 3 B T C elements forward and 5 backward; only one row exceeds it, 1 part in 3 T or in 5 T. Cut time loads two
inputs once more, 5/3 and 7/5 of the floor, from the L2 cache where they fit. `bytes_moved` counts everything. 16-bit
rows of N = 8 channels are half a sector of 32 bytes, whose other half the neighbouring program should find in the L2
cache.

TRITON_INTERPRET=1 runs this on a CPU; `python kernels/aot.py` compiles it without a GPU.
"""

import torch
import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------------
# What the kernels share. "Rows" are tuples of L tiles (W, N): tile i holds position i of every segment.


@triton.jit
def compose(a1, b1, a2, b2):
    """x -> a x + b for two spans of time, the first one first."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def scan(A, b, carry, L: tl.constexpr, REVERSE: tl.constexpr = False):
    """x_t = A_t x_{t-1} + b_t over a chunk: (rows of x, rows of the x before each, the last x).

    REVERSE: x_t = A_t x_{t+1} + b_t. Carry and last x are (W, N), the same for all segments.
    """
    W: tl.constexpr = carry.shape[0]
    segment = tl.broadcast_to(tl.arange(0, W)[:, None], carry.shape)
    if REVERSE:
        A, b = A[::-1], b[::-1]
    decay, x = A[0], b[0]
    for i in tl.static_range(1, L):
        decay, x = compose(decay, x, A[i], b[i])
    first = segment == (W - 1 if REVERSE else 0)
    decay, x = tl.associative_scan((decay, tl.where(first, x + decay * carry, x)), 0, compose, REVERSE)
    last = tl.gather(x, tl.full(carry.shape, 0 if REVERSE else W - 1, tl.int32), 0)
    neighbour = tl.minimum(segment + 1, W - 1) if REVERSE else tl.maximum(segment - 1, 0)
    x = tl.where(first, carry, tl.gather(x, neighbour, 0))
    values, befores = (), ()
    for i in tl.static_range(L):  # once more, now with the value that enters the segment
        befores = befores + (x,)
        x = A[i] * x + b[i]
        values = values + (x,)
    if REVERSE:
        values, befores = values[::-1], befores[::-1]
    return values, befores, last


@triton.jit
def reduced(A, b, W: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr = False):
    """(product of A, the last x after a zero state) of `scan` over a chunk; (W, N), the same for all segments."""
    if REVERSE:
        A, b = A[::-1], b[::-1]
    decay, x = A[0], b[0]
    for i in tl.static_range(1, L):
        decay, x = compose(decay, x, A[i], b[i])
    decay, x = tl.associative_scan((decay, x), 0, compose, REVERSE)
    last = tl.full(x.shape, 0 if REVERSE else W - 1, tl.int32)
    return tl.gather(decay, last, 0), tl.gather(x, last, 0)


@triton.jit
def place(C, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    """This program's batch row (int64), its channels (1, N), and the first position (W, 1) of each segment."""
    blocks = tl.cdiv(C, N)
    row, channel = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * N + tl.arange(0, N)
    return row, channel[None, :], tl.arange(0, W)[:, None] * L


@triton.jit
def span_of(T, span):
    """This program's first position and the one after its last; `span` is a multiple of the chunk."""
    first = tl.program_id(1) * span
    return first, tl.minimum(first + span, T)


@triton.jit
def chunk_at(start, stop, row, channel, site, T, C):
    """Where the segments of the chunk at `start` begin in (B, T, C), and how many of their rows are before `stop`;
    (W, N) both.

    A negative start means no chunk. The callers move `start` by a minimum or a choice: with a plain sum LLVM would keep
    a pointer for each row of each tensor in registers.
    """
    at = row * T * C + tl.cast(start, tl.int64) * C + site * C + channel
    return at, tl.where((channel < C) & (start >= 0), stop - start - site, 0)


@triton.jit
def chunk_before(start, first, CHUNK: tl.constexpr):
    """Where the chunk before that at `start` begins; -1 if the span begins at `start`."""
    return tl.where(start - CHUNK < first, -1, start - CHUNK)


@triton.jit
def rows_of(x, at, left, C, L: tl.constexpr):
    """L rows of x in float32; 0 where there is none."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (tl.load(x + (at + i * C), mask=i < left, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def put(x, rows, at, left, C, L: tl.constexpr):
    for i in tl.static_range(L):
        tl.store(x + (at + i * C), rows[i].to(x.dtype.element_ty), mask=i < left)


@triton.jit
def put_map(decays, ends, decay, end, rank, row, channel, site, C):
    """Store what this span does to the state that enters it, x -> decay x + end: (B, spans, C) each.

    `rank` is the span's number in the order in which the scan visits them.
    """
    at = (row * tl.num_programs(1) + rank) * C + channel + tl.zeros(decay.shape, tl.int32)
    tl.store(decays + at, decay, mask=(channel < C) & (site == 0))
    tl.store(ends + at, end, mask=(channel < C) & (site == 0))


@triton.jit
def passing(A, left, L: tl.constexpr):
    """A, and 1 where there is no position: with b = 0 the incoming value passes through."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (tl.where(i < left, A[i], 1.0),)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Forward.


@triton.jit(do_not_specialize=["T", "C", "span"])
def forward_kernel(A, b, h0, entering, h, T, C, span, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    row, channel, site = place(C, L, W, N)
    first, stop = span_of(T, span)
    carry = entering_state(h0, entering, tl.program_id(1), row, channel, C, W, N)
    start = first
    at, left = chunk_at(start, stop, row, channel, site, T, C)
    a_rows, b_rows = rows_of(A, at, left, C, L), rows_of(b, at, left, C, L)
    for _ in range(tl.cdiv(stop - first, L * W)):
        start = tl.minimum(start + L * W, stop)
        next_at, next_left = chunk_at(start, stop, row, channel, site, T, C)
        next_a, next_b = rows_of(A, next_at, next_left, C, L), rows_of(b, next_at, next_left, C, L)
        x, befores, carry = scan(passing(a_rows, left, L), b_rows, carry, L)
        put(h, x, at, left, C, L)
        a_rows, b_rows, at, left = next_a, next_b, next_at, next_left


@triton.jit
def entering_state(h0, entering, rank, row, channel, C, W: tl.constexpr, N: tl.constexpr):
    """The state before this span, in float32: h0 (B, C), or what the span before it left in `entering` (B, spans, C).

    `rank` is the span's number in the order in which the scan visits them.
    """
    line, known = channel + tl.zeros((W, N), tl.int32), channel < C
    x = tl.load(h0 + (row * C + line), mask=known & (rank == 0), other=0.0).to(tl.float32)
    at = (row * tl.num_programs(1) + rank - 1) * C + line
    return x + tl.load(entering + at, mask=known & (rank > 0), other=0.0)


@triton.jit(do_not_specialize=["T", "C", "span"])
def ends_kernel(
    A, x, decays, ends, T, C, span, REVERSE: tl.constexpr, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr
):
    """The map of each span: of h with x = b, or with REVERSE of z (below) with x = grad."""
    row, channel, site = place(C, L, W, N)
    first, stop = span_of(T, span)
    decay, end = tl.full((W, N), 1.0, tl.float32), tl.zeros((W, N), tl.float32)
    start = first
    at, left = chunk_at(start, stop, row, channel, site, T, C)
    a_rows, x_rows = rows_of(A, at, left, C, L), rows_of(x, at, left, C, L)
    for _ in range(tl.cdiv(stop - first, L * W)):
        start = tl.minimum(start + L * W, stop)
        next_at, next_left = chunk_at(start, stop, row, channel, site, T, C)
        next_a, next_x = rows_of(A, next_at, next_left, C, L), rows_of(x, next_at, next_left, C, L)
        b_rows = products(a_rows, x_rows, L) if REVERSE else x_rows
        decays_too, end_too = reduced(passing(a_rows, left, L), b_rows, W, L, REVERSE)
        if REVERSE:
            decay, end = compose(decays_too, end_too, decay, end)
        else:
            decay, end = compose(decay, end, decays_too, end_too)
        a_rows, x_rows, left = next_a, next_x, next_left
    rank = tl.num_programs(1) - 1 - tl.program_id(1) if REVERSE else tl.program_id(1)
    put_map(decays, ends, decay, end, rank, row, channel, site, C)


# ---------------------------------------------------------------------------------------------------------------------
# Backward. With y_t = grad_t + A_{t+1} y_{t+1}: db = y and dA_t = y_t h_{t-1}. The scan runs over z_t = A_t y_t, that
# is A_t z_{t+1} + A_t grad_t, so that no A of a neighbour is needed: y_t = grad_t + z_{t+1}, and dh0 = z_0.


@triton.jit
def products(x, y, L: tl.constexpr):
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (x[i] * y[i],)
    return rows


@triton.jit
def sums(x, y, L: tl.constexpr):
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (x[i] + y[i],)
    return rows


@triton.jit
def earlier_rows_of(h, h0, start, row, channel, site, at, left, C, L: tl.constexpr):
    """The rows of h one position earlier."""
    rows, zero = (), tl.zeros(at.shape, tl.float32)
    first = (left > 0) & (start + site == 0)
    initial = tl.load(h0 + (row * C + channel + zero.to(tl.int32)), mask=first, other=0.0).to(tl.float32)
    for i in tl.static_range(L):
        x = tl.load(h + (at + (i - 1) * C), mask=(i < left) & (start + site + i > 0), other=0.0).to(tl.float32)
        rows = rows + (x + initial if i == 0 else x,)
    return rows


@triton.jit(do_not_specialize=["T", "C", "span"])
def backward_kernel(
    grad, A, h, h0, entering, dA, db, dh0, T, C, span, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr
):
    row, channel, site = place(C, L, W, N)
    first, stop = span_of(T, span)
    rank = tl.num_programs(1) - 1 - tl.program_id(1)
    at = (row * tl.num_programs(1) + rank - 1) * C + channel + tl.zeros((W, N), tl.int32)
    carry = tl.load(entering + at, mask=(channel < C) & (rank > 0), other=0.0)
    start = first + (tl.cdiv(stop - first, L * W) - 1) * (L * W)
    at, left = chunk_at(start, stop, row, channel, site, T, C)
    g_rows, a_rows = rows_of(grad, at, left, C, L), rows_of(A, at, left, C, L)
    before = earlier_rows_of(h, h0, start, row, channel, site, at, left, C, L)
    for _ in range(tl.cdiv(stop - first, L * W)):
        start = chunk_before(start, first, L * W)
        next_at, next_left = chunk_at(start, stop, row, channel, site, T, C)
        next_g, next_a = rows_of(grad, next_at, next_left, C, L), rows_of(A, next_at, next_left, C, L)
        next_before = earlier_rows_of(h, h0, start, row, channel, site, next_at, next_left, C, L)
        z, after, carry = scan(passing(a_rows, left, L), products(a_rows, g_rows, L), carry, L, True)
        y = sums(g_rows, after, L)
        put(db, y, at, left, C, L)
        put(dA, products(y, before, L), at, left, C, L)
        g_rows, a_rows, before, at, left = next_g, next_a, next_before, next_at, next_left
    out = dh0 + (row * C + channel + tl.zeros((W, N), tl.int32))
    tl.store(out, carry.to(dh0.dtype.element_ty), mask=(channel < C) & (site == 0) & (first == 0))


# ---------------------------------------------------------------------------------------------------------------------
# Launching.

CHUNK = 32  # positions
SIZES = {"L": 8, "W": 4, "N": 8}  # W N = 32 lanes, L W = CHUNK
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
WARPS = 16  # programs per multiprocessor that spans should give; chosen, not yet measured on a GPU
SHORTEST = 4 * CHUNK  # least number of positions in a span; chosen, not yet measured on a GPU


def check_dtypes(*tensors):
    for x in tensors:
        if x.dtype not in POINTERS:
            raise ValueError(f"{x.dtype}: must be float32, bfloat16 or float16")


def programs(B, C, sizes=SIZES):
    """How many programs go over time side by side."""
    return B * triton.cdiv(C, sizes["N"])


def span_length(B, T, C, processors, passes=1):
    """Positions of a span, a multiple of CHUNK, on a GPU of so many multiprocessors; `passes` over the inputs come
    before the last one.

    All of T (rounded up) where as many spans as there are passes fill the GPU: the passes would take what they win.
    """
    spans = min(triton.cdiv(processors * WARPS, programs(B, C)), T // SHORTEST)
    return triton.cdiv(triton.cdiv(T, spans if spans > passes + 1 else 1), CHUNK) * CHUNK


def processors_of(x):
    """Multiprocessors of the tensor's GPU; those of an H100 for the interpreter's CPU tensors."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def launch(kernel, shape, args, sizes, span=None):
    """Runs `kernel` for (B, T, C): a program for each batch row, N channels and, with `span`, that many positions."""
    B, T, C = shape
    span = span or triton.cdiv(T, CHUNK) * CHUNK
    with torch.cuda.device_of(args[0]):
        kernel[(programs(B, C, sizes), triton.cdiv(T, span))](*args, T, C, span, **sizes, num_warps=1, num_stages=1)


def states_between(A, x, initial, span, reverse=False):
    """The state that leaves each span (B, spans, C), float32, in the order of the scan; a stand-in for one span."""
    B, T, C = A.shape
    spans = triton.cdiv(T, span)
    decays, ends, states = A.new_empty(3, B, spans, C, dtype=torch.float32)
    if spans > 1:
        launch(ends_kernel, A.shape, (A, x, decays, ends), {"REVERSE": reverse, **SIZES}, span)
        scan_spans(decays, ends, initial.float(), states)
    return states


def scan_spans(decays, ends, initial, states):
    """states (B, spans, C): what leaves each span, from its map x -> decay x + end and the first x (B, C)."""
    launch(forward_kernel, ends.shape, (decays, ends, initial, states, states), SIZES)


def triton_forward(A, b, h0, span=None):
    """h (B, T, C); see `gated_scan`. `span`: positions, a multiple of CHUNK, for each program; chosen by default."""
    check_dtypes(A, b, h0)
    A, b, h0 = A.contiguous(), b.contiguous(), h0.contiguous()
    span = span or span_length(*A.shape, processors_of(A))
    h = torch.empty_like(A)
    launch(forward_kernel, A.shape, (A, b, h0, states_between(A, b, h0, span), h), SIZES, span)
    return h


def triton_backward(grad, A, h, h0, span=None):
    """Gradients (dA, db, dh0); see `gated_scan` and `triton_forward`."""
    check_dtypes(grad, A, h, h0)
    grad, A, h, h0 = (x.contiguous() for x in (grad, A, h, h0))
    span = span or span_length(*A.shape, processors_of(A))
    dA, db, dh0 = torch.empty_like(A), torch.empty_like(A), torch.empty_like(h0)
    entering = states_between(A, grad, torch.zeros_like(h0), span, reverse=True)
    launch(backward_kernel, A.shape, (grad, A, h, h0, entering, dA, db, dh0), SIZES, span)
    return dA, db, dh0


def bytes_moved(B, T, C, element_size=4, backward=False, span=None):
    """What the kernels load and store: each tensor of B T C once, the floor, and h0 or its gradient. Cut into spans,
    two of the tensors once more, and in float32 for each span its map and the state before it, stored and loaded.
    """
    spans = triton.cdiv(T, span or T)
    again = element_size * 2 * T + 24 * spans if spans > 1 else 0
    return B * C * (element_size * ((5 if backward else 3) * T + 1) + again)


# ---------------------------------------------------------------------------------------------------------------------
# For kernels/aot.py.


def aot_row(name, kernel, dtype, constexprs, floats=(), scalars=()):
    """A row for a kernel whose pointers are to `dtype`, except `floats`, to float32; `scalars` are float32 values."""
    types = dict.fromkeys(("T", "C", "span"), "i32") | dict.fromkeys(floats, "*fp32") | dict.fromkeys(scalars, "fp32")
    types |= dict.fromkeys(constexprs, "constexpr")
    return name, kernel, {x: types.get(x, POINTERS[dtype]) for x in kernel.arg_names}, constexprs, 1, 1


def aot_rows(full=False):
    """(name, kernel, signature, constexprs, num_warps, num_stages) of what can be launched; see kernels/aot.py."""
    for dtype in POINTERS if full else (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for word, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
            yield aot_row(f"scan {word} {name}", kernel, dtype, SIZES, ("entering",))
        for word, reverse in (("forward", False), ("backward", True)):
            sizes = {"REVERSE": reverse, **SIZES}
            yield aot_row(f"scan ends {word} {name}", ends_kernel, dtype, sizes, ("decays", "ends"))
