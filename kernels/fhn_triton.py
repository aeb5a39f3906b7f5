"""
FitzHugh-Nagumo waves on a GPU: all steps of `fhn.py` in one Triton kernel forward and one backward.

Programs, chunks and rows are those of scan_triton.py: one warp goes over time once and keeps, for each step, the value
that enters the next chunk. All steps of a chunk run in registers. With deviations x = v - V, u = w - U from rest, at
which V - V^3 / 3 = U, a step is

    r = x + dt (I - u + (1 - V^2) x - V x^2 - x^3 / 3)          x'_t = A_t x'_{t-1} + (1 - A_t) r_t
    u' = (u + dt eps (x' + V + a - b U)) / (1 + dt eps b)

and no precision is lost by cancellation against the rest point. `carries` holds the x that enter each chunk. The
backward pass goes from the last chunk to the first, recomputes the x of a chunk from them, and solves the adjoint of
each step by a reverse scan; u is stepped back in place, which is possible because its equation is linear. Each program
sums the gradients of the parameters of its channels; PyTorch adds up the batch rows, in a fixed order.

A few long texts are cut into spans of time, as scan_triton.py does. The scan of a step needs the deviations of the
steps before it, so that each step has a launch of its own, which solves those and reduces its own scan to a map of each
span, and a scan over these maps; only the last launch, with the states before each span at hand, stores results.

Bytes: with one span, stimulus and conductance are loaded once and the result stored once, whatever `steps` is: 3 B T C
elements, the least possible (the floor); backward 5. `bytes_moved` counts everything. What exceeds the floor is mainly
the carries, steps / 32 of a float32 per site, forward and backward: for 2 steps 2% of the floor in float32 and 4% in 16
bits (backward 1.3% and 2.5%). Cut time loads the inputs once more for each step: for 2 steps 7/3 and 10/5 of the floor,
less what the L2 cache holds.

TRITON_INTERPRET=1 runs this on a CPU; `python kernels/aot.py` compiles it without a GPU.
"""

import torch
import triton
import triton.language as tl

from kernels.fhn_rest import REST_V, REST_W
from kernels.scan_triton import (
    CHUNK,
    POINTERS,
    aot_row,
    check_dtypes,
    chunk_at,
    chunk_before,
    compose,
    launch,
    place,
    processors_of,
    products,
    put,
    put_map,
    reduced,
    rows_of,
    scan,
    scan_spans,
    span_length,
    span_of,
    sums,
)

# ---------------------------------------------------------------------------------------------------------------------
# What the kernels share: the parts of a step, on rows. V and U are the rest point.


@triton.jit
def parameters(D, a, b, eps, channel, C):
    known = channel < C
    D, a = tl.load(D + channel, mask=known, other=0.0), tl.load(a + channel, mask=known, other=0.0)
    return D, a, tl.load(b + channel, mask=known, other=0.0), tl.load(eps + channel, mask=known, other=0.0)


@triton.jit
def couplings(g, left, D, dt, L: tl.constexpr):
    """A; 1 where there is no site, so that the incoming value passes through."""
    rows = ()
    for i in tl.static_range(L):
        x = dt * D * g[i]
        rows = rows + (tl.where(i < left, x / (1 + x), 1.0),)
    return rows


@triton.jit
def drives(A, x, u, I, dt, V, L: tl.constexpr):
    """(1 - A) r."""
    rows = ()
    for i in tl.static_range(L):
        r = x[i] + dt * (I[i] - u[i] + x[i] * (1 - V * V - x[i] * (V + x[i] * (1 / 3))))
        rows = rows + ((1 - A[i]) * r,)
    return rows


@triton.jit
def recovered(u, x, slow, grow, pull, L: tl.constexpr):
    """u after a step that led to x: slow = dt eps, grow = 1 + dt eps b, pull = V + a - b U."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + ((u[i] + slow * (x[i] + pull)) * (1 / grow),)
    return rows


@triton.jit
def unrecovered(u, x, slow, grow, pull, L: tl.constexpr):
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (u[i] * grow - slow * (x[i] + pull),)
    return rows


@triton.jit
def solved_before(entering, s, rank, row, channel, C, W: tl.constexpr, N: tl.constexpr):
    """What enters this span in the scan of step `s`, of entering (steps, B, spans, C); 0 if nothing came before.

    `rank` is the span's number in the order in which the scan visits them.
    """
    rows = tl.num_programs(0) // tl.cdiv(C, N)
    at = ((s * rows + row) * tl.num_programs(1) + rank - 1) * C + channel + tl.zeros((W, N), tl.int32)
    return tl.load(entering + at, mask=(channel < C) & (rank > 0), other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Forward. SOLVED steps; if that is not all of them, nothing but the map of each span in the next step's scan.


@triton.jit(do_not_specialize=["T", "C", "span"])
def forward_kernel(
    stimulus, conductance, deviation, state, new_state, carries, entering, decays, ends, D, a, b, eps, dt, V, U,
    T, C, span, SOLVED: tl.constexpr, STEPS: tl.constexpr, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, channel, site = place(C, L, W, N)
    first, stop = span_of(T, span)
    rank = tl.program_id(1)
    D, a, b, eps = parameters(D, a, b, eps, channel, C)
    slow, grow, pull = dt * eps, 1 + dt * eps * b, V + a - b * U
    owner = (channel < C) & (site == 0)  # one of the lanes that hold the same values
    line = channel + tl.zeros((W, N), tl.int32)
    state, new_state = state + row * STEPS * C + line, new_state + row * STEPS * C + line
    carries += (row * tl.cdiv(T, L * W) + first // (L * W)) * STEPS * C + line
    carry = ()
    for s in tl.static_range(SOLVED):
        initial = tl.load(state + s * C, mask=(channel < C) & (rank == 0), other=V) - V
        carry = carry + (initial + solved_before(entering, s, rank, row, channel, C, W, N),)
    decay, last = tl.full((W, N), 1.0, tl.float32), tl.zeros((W, N), tl.float32)
    start = first
    at, left = chunk_at(start, stop, row, channel, site, T, C)
    I, g = rows_of(stimulus, at, left, C, L), rows_of(conductance, at, left, C, L)
    for _ in range(tl.cdiv(stop - first, L * W)):
        start = tl.minimum(start + L * W, stop)
        next_at, next_left = chunk_at(start, stop, row, channel, site, T, C)
        next_I, next_g = rows_of(stimulus, next_at, next_left, C, L), rows_of(conductance, next_at, next_left, C, L)
        A = couplings(g, left, D, dt, L)
        x, u, new = (tl.zeros((W, N), tl.float32),) * L, (tl.zeros((W, N), tl.float32),) * L, ()
        for s in tl.static_range(SOLVED):
            if SOLVED == STEPS:
                tl.store(carries + s * C, carry[s], mask=owner)
            x, befores, end = scan(A, drives(A, x, u, I, dt, V, L), carry[s], L)
            u, new = recovered(u, x, slow, grow, pull, L), new + (end,)
        if SOLVED == STEPS:
            put(deviation, x, at, left, C, L)
        else:
            by, to = reduced(A, drives(A, x, u, I, dt, V, L), W, L)
            decay, last = compose(decay, last, by, to)
        carry = new
        carries += STEPS * C
        I, g, at, left = next_I, next_g, next_at, next_left
    if SOLVED == STEPS:
        for s in tl.static_range(STEPS):
            tl.store(new_state + s * C, carry[s] + V, mask=owner & (stop == T))
    else:
        put_map(decays, ends, decay, last, rank, row, channel, site, C)


# ---------------------------------------------------------------------------------------------------------------------
# Backward. y is the gradient of a site's x' as accumulated by the scan (scan_triton.py), gx and gu are those of x and u
# after the step. With L_t = dt D g_t: dr = (1 - A) y and dL = dr (x'_{t-1} - x'_t), which no division needs. SOLVED
# steps, the last one first; if that is not all of them, nothing but the map of each span in the next scan.


@triton.jit
def drive_gradients(A, gx, after, L: tl.constexpr):
    """dr."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + ((1 - A[i]) * (gx[i] + after[i]),)
    return rows


@triton.jit
def coupling_gradients(gL, gr, before, x, L: tl.constexpr):
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (gL[i] + gr[i] * (before[i] - x[i]),)
    return rows


@triton.jit
def recovery_gradients(gu, gr, dt, grow, L: tl.constexpr):
    """The gradient of u + dt eps (x + V + a - b U), from those of the u that it becomes: by the next r, and later."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + ((gu[i] - dt * gr[i]) * (1 / grow),)
    return rows


@triton.jit
def state_gradients(gr, gu, x, dt, slow, V, L: tl.constexpr):
    """gx of the step before."""
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (gr[i] * (1 + dt * (1 - V * V - x[i] * (2 * V + x[i]))) + slow * gu[i],)
    return rows


@triton.jit
def scaled(x, by, L: tl.constexpr):
    rows = ()
    for i in tl.static_range(L):
        rows = rows + (x[i] * by,)
    return rows


@triton.jit
def total(x, L: tl.constexpr):
    y = x[0]
    for i in tl.static_range(1, L):
        y += x[i]
    return y


@triton.jit
def entering_chunk(carries, start, channel, C, COUNT: tl.constexpr):
    """For each of the first COUNT steps, the x that enters the chunk at `start`."""
    xs = ()
    for s in tl.static_range(COUNT):
        xs = xs + (tl.load(carries + s * C, mask=(channel < C) & (start >= 0), other=0.0),)
    return xs


@triton.jit(do_not_specialize=["T", "C", "span"])
def backward_kernel(
    grad, stimulus, conductance, carries, entering, decays, ends, d_stimulus, d_conductance, partial, D, a, b, eps,
    dt, V, U, T, C, span, SOLVED: tl.constexpr, STEPS: tl.constexpr, L: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row, channel, site = place(C, L, W, N)
    first, stop = span_of(T, span)
    rank = tl.num_programs(1) - 1 - tl.program_id(1)
    D, a, b, eps = parameters(D, a, b, eps, channel, C)
    slow, grow, pull = dt * eps, 1 + dt * eps * b, V + a - b * U
    RECALLED: tl.constexpr = STEPS if SOLVED == STEPS else STEPS - 1 if SOLVED > 0 else 0  # steps computed again
    zero = tl.zeros((W, N), tl.float32)
    sum_D, sum_p, sum_px, sum_pu, carry = zero, zero, zero, zero, ()
    for s in tl.static_range(SOLVED):  # that of the last step first
        carry = carry + (solved_before(entering, s, rank, row, channel, C, W, N),)
    decay, last = tl.full((W, N), 1.0, tl.float32), zero
    start = first + (tl.cdiv(stop - first, L * W) - 1) * (L * W)
    carries += (row * tl.cdiv(T, L * W) + start // (L * W)) * STEPS * C + channel + tl.zeros((W, N), tl.int32)
    at, left = chunk_at(start, stop, row, channel, site, T, C)
    I = rows_of(stimulus, at, left, C, L) if RECALLED > 0 else (zero,) * L
    g, gx = rows_of(conductance, at, left, C, L), rows_of(grad, at, left, C, L)
    enters = entering_chunk(carries, start, channel, C, RECALLED)
    for _ in range(tl.cdiv(stop - first, L * W)):
        start = chunk_before(start, first, L * W)
        carries -= STEPS * C
        next_at, next_left = chunk_at(start, stop, row, channel, site, T, C)
        next_I = rows_of(stimulus, next_at, next_left, C, L) if RECALLED > 0 else (zero,) * L
        next_g, next_gx = rows_of(conductance, next_at, next_left, C, L), rows_of(grad, next_at, next_left, C, L)
        next_enters = entering_chunk(carries, start, channel, C, RECALLED)
        A = couplings(g, left, D, dt, L)
        x, u, states, befores = (zero,) * L, (zero,) * L, ((zero,) * L,), ()
        for s in tl.static_range(RECALLED):
            if s > 0:
                u = recovered(u, x, slow, grow, pull, L)
            x, before, end = scan(A, drives(A, x, u, I, dt, V, L), enters[s], L)
            states, befores = states + (x,), befores + (before,)
        gL, gI, gu, new = (zero,) * L, (zero,) * L, (zero,) * L, ()
        for s in tl.static_range(STEPS - 1, STEPS - 1 - SOLVED, -1):
            z, after, end = scan(A, products(A, gx, L), carry[STEPS - 1 - s], L, True)
            gr, new = drive_gradients(A, gx, after, L), new + (end,)
            if SOLVED == STEPS:
                gL, gI = coupling_gradients(gL, gr, befores[s], states[s + 1], L), sums(gI, gr, L)
            if s > 0:
                gu = recovery_gradients(gu, gr, dt, grow, L)
                gx = state_gradients(gr, gu, states[s], dt, slow, V, L)
                sum_p += total(gu, L)
                sum_px += total(products(gu, states[s], L), L)
                sum_pu += total(products(gu, u, L), L)
                if s > 1:
                    u = unrecovered(u, states[s], slow, grow, pull, L)
        carry = new
        if SOLVED == STEPS:
            sum_D += total(products(gL, g, L), L)
            put(d_stimulus, scaled(gI, dt, L), at, left, C, L)
            put(d_conductance, scaled(gL, dt * D, L), at, left, C, L)
        else:
            by, to = reduced(A, products(A, gx, L), W, L, True)
            decay, last = compose(decay, last, by, to)
        I, g, gx, enters, at, left = next_I, next_g, next_gx, next_enters, next_at, next_left
    if SOLVED == STEPS:
        p, px, pu = tl.sum(sum_p, 0)[None, :], tl.sum(sum_px, 0)[None, :], tl.sum(sum_pu, 0)[None, :]
        partial += (row * tl.num_programs(1) + tl.program_id(1)) * 4 * C + channel
        tl.store(partial, tl.sum(sum_D, 0)[None, :] * dt, mask=channel < C)
        tl.store(partial + C, slow * p, mask=channel < C)
        tl.store(partial + 2 * C, -slow * (pu + U * p), mask=channel < C)
        tl.store(partial + 3 * C, dt * (px + pull * p - b * pu), mask=channel < C)
    else:
        put_map(decays, ends, decay, last, rank, row, channel, site, C)


# ---------------------------------------------------------------------------------------------------------------------
# Launching.


def sizes_of(kernel, steps):
    """The backward keeps the rows of all steps: more steps, shorter rows. Up to 8 steps nothing spills."""
    L = 8 if kernel is forward_kernel or steps <= 2 else 4 if steps <= 7 else 2
    return {"STEPS": steps, "L": L, "W": CHUNK // L, "N": L}  # W N = 32 lanes


def saved(B, T, C, steps, like):
    """An empty `carries`."""
    return like.new_empty(B, triton.cdiv(T, CHUNK), steps, C, dtype=torch.float32)


def propagate(kernel, shape, before, after, initial, steps, span):
    """Launches `kernel` once, or if `span` cuts time, a step at a time; `initial` (steps, B, C): what enters each scan
    at its first span, the scans in the kernel's order. `before` and `after` are its arguments around `entering`,
    `decays` and `ends`.
    """
    B, T, C = shape
    sizes = sizes_of(kernel, steps)
    maps = initial.new_empty(2 + steps, B, triton.cdiv(T, span), C)
    decays, ends, entering = maps[0], maps[1], maps[2:]
    for solved in range(steps) if maps.size(2) > 1 else ():
        args = *before, entering, decays, ends, *after
        launch(kernel, shape, args, {"SOLVED": solved, **sizes}, span)
        scan_spans(decays, ends, initial[solved], entering[solved])
    launch(kernel, shape, (*before, entering, decays, ends, *after), {"SOLVED": steps, **sizes}, span)


def triton_forward(stimulus, conductance, D, a, b, eps, dt, steps, state, span=None):
    """(deviation (B, T, C), new_state (B, steps, C), carries (B, T / 32, steps, C)); see `fhn_propagate`.

    `span`: positions, a multiple of CHUNK, for each program; chosen by default.
    """
    check_dtypes(stimulus, conductance)
    stimulus, conductance = stimulus.contiguous(), conductance.contiguous()
    parameters = [x.float().contiguous() for x in (D, a, b, eps)]
    B, T, C = stimulus.shape
    span = span or span_length(B, T, C, processors_of(stimulus), steps)
    deviation, carries = torch.empty_like(stimulus), saved(B, T, C, steps, stimulus)
    new_state = stimulus.new_empty(B, steps, C, dtype=torch.float32)
    state = torch.full_like(new_state, REST_V) if state is None else state.float().contiguous()
    before, after = (stimulus, conductance, deviation, state, new_state, carries), (*parameters, dt, REST_V, REST_W)
    initial = (state - REST_V).transpose(0, 1).contiguous()
    propagate(forward_kernel, (B, T, C), before, after, initial, steps, span)
    return deviation, new_state, carries


def triton_backward(grad, stimulus, conductance, D, a, b, eps, dt, steps, carries, span=None):
    """(d_stimulus, d_conductance, dD, da, db, deps), those of the parameters in float32; see `fhn_propagate`."""
    check_dtypes(grad, stimulus, conductance)
    grad, stimulus, conductance, carries = (x.contiguous() for x in (grad, stimulus, conductance, carries))
    parameters = [x.float().contiguous() for x in (D, a, b, eps)]
    B, T, C = stimulus.shape
    span = span or span_length(B, T, C, processors_of(stimulus), steps)
    d_stimulus, d_conductance = torch.empty_like(stimulus), torch.empty_like(conductance)
    partial = stimulus.new_empty(B, triton.cdiv(T, span), 4, C, dtype=torch.float32)
    before, after = (grad, stimulus, conductance, carries), (d_stimulus, d_conductance, partial, *parameters)
    initial = carries.new_zeros(steps, B, C)
    propagate(backward_kernel, (B, T, C), before, (*after, dt, REST_V, REST_W), initial, steps, span)
    return d_stimulus, d_conductance, *(x.clone() for x in partial.sum((0, 1)))


def bytes_moved(B, T, C, steps, element_size=4, backward=False, span=None):
    """What the kernels load and store. The floor is the first term: each tensor of size B T C once."""
    chunks, spans = triton.cdiv(T, CHUNK), triton.cdiv(T, span or T)
    elements = (5 if backward else 3) * T
    rows = chunks * steps + (8 if backward else 2 * steps + 4)  # carries; partial or states; parameters
    if spans > 1:
        rows += (8 if backward else 4 + steps) * (spans - 1) + (steps * (spans - 1) if backward else 0)
        for solved in range(steps):  # parameters, what enters, the maps stored; the maps loaded, one state, all states
            rows += 4 * spans + solved * (spans - 1 if backward else spans) + 2 * spans + 3 * spans + 1
            rows += chunks * (steps - 1) if backward and solved else 0
            elements += (3 if backward and solved else 2) * T
    return B * C * (elements * element_size + 4 * rows)


# ---------------------------------------------------------------------------------------------------------------------
# For kernels/aot.py.


def aot_rows(full=False):
    """(name, kernel, signature, constexprs, num_warps, num_stages) of what can be launched; see kernels/aot.py."""
    floats = ("state", "new_state", "carries", "entering", "decays", "ends", "partial", "D", "a", "b", "eps")
    for steps in range(1, 9) if full else (1, 2, 4):
        for dtype in POINTERS if full else (torch.float32, torch.bfloat16):
            for word, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
                for solved in (steps, *range(steps)) if full or steps == 2 else (steps,):
                    name = f"fhn {word} {str(dtype).removeprefix('torch.')} steps={steps}"
                    name += "" if solved == steps else f" solved={solved}"
                    sizes = {"SOLVED": solved, **sizes_of(kernel, steps)}
                    yield aot_row(name, kernel, dtype, sizes, floats, ("dt", "V", "U"))
