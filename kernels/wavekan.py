"""
Sums of wavelets with their own position and width: psi(u), u = (x - t) / s, passed as u = a x + b, a = 1/s, b = -t/s.

`wavelet_bank`: one function per channel, y_i = silu(x_i) + sum_k m_ki psi(a_ki x_i + b_ki). `wavelet_edges`: one
wavelet per edge, y_o = sum_i w_oi psi(a_oi x_i + b_oi), the layer of Wav-KAN. Its (tokens, out, in) tensor is never
stored: both functions compute chunks that fit a CPU core's cache, and the backward pass computes each chunk again from
x.

`bank_reference` and `edges_reference` are the plain formulas, in any float type, to compare with.
"""

import math

import torch
from torch.nn import functional as F

MEX = 2 / (math.sqrt(3) * math.pi**0.25)  # 0.867325: unit energy
RATIO = 2.0  # r, the wide Gaussian's width over the narrow one's
# energy of psi s1: sqrt(pi) (1 + 1/r - 2 sqrt(2 / (1 + r^2))), the terms those of the squares and of the product
DOG = math.pi**-0.25 / math.sqrt(1 + 1 / RATIO - 2 * math.sqrt(2 / (1 + RATIO**2)))  # 1 / s1 = 1.549161: unit energy
WAVELETS = {
    "mex": lambda u: MEX * (1 - u * u) * torch.exp(-u * u / 2),
    "dog": lambda u: DOG * (torch.exp(-u * u / 2) - torch.exp(-u * u / (2 * RATIO**2)) / RATIO),
    "gaus1": lambda u: -u * torch.exp(-u * u / 2),
    "morlet": lambda u: torch.cos(5 * u) * torch.exp(-u * u / 2),
}


def bank_reference(x, m, a, b, kind):
    """x (..., I); m, a, b (K, I). Returns (..., I), differentiable by autograd."""
    return F.silu(x) + (m * WAVELETS[kind](x.unsqueeze(-2) * a + b)).sum(-2)


def edges_reference(x, w, a, b, kind):
    """x (..., I); w, a, b (O, I). Returns (..., O), differentiable by autograd, with O I numbers per token."""
    return (w * WAVELETS[kind](x.unsqueeze(-2) * a + b)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# One chunk, in place. The Gaussian is taken as 2^p with p = -v^2, v = SCALE u, because exp2 is three times as fast as
# exp on a CPU. Except for FACTOR, which the callers multiply into the weights, with k = 2 ln 2:
#   mex: psi = (1 + k p) 2^p, psi' = -k v (psi + 2 2^p)    gaus1: psi = v 2^p, psi' = (1 + k p) 2^p
#   morlet: psi = cos(w v) 2^p, psi' = -w sin(w v) 2^p - k v psi
#   dog: psi = 2^p - 2^(p / r^2) / r, psi' = -k v (psi / r^2 + (1 - 1 / r^2) 2^p)
# All are linear in their Gaussians: given g 2^p for 2^p, and g, they return g psi and g psi'. Derivatives are by v.

SCALE = math.sqrt(0.5 / math.log(2))
SLOPE = 2 * math.log(2)
FACTOR = {"mex": MEX, "dog": DOG, "gaus1": -1 / SCALE, "morlet": 1.0}
OMEGA = 5 / SCALE
CHUNK = {"cpu": 1 << 17, "cuda": 1 << 24}  # numbers per buffer; there are four buffers


def gaussian(x, a, b, v, p, e):
    """v = a x + b, p = -v^2, e = 2^p, written into v, p and e."""
    torch.addcmul(b, x, a, out=v)
    torch.mul(v, v, out=p)
    torch.exp2(p.neg_(), out=e)


def value(kind, v, p, e, out, g=1.0):
    """g psi, written into out, where e is g 2^p."""
    if kind == "mex":
        return torch.addcmul(e, e, p, value=SLOPE, out=out)
    if kind == "dog":  # the wide Gaussian is no multiple of the narrow one: it gets its own g
        return torch.mul(p, RATIO**-2, out=out).exp2_().mul_(g).mul_(-1 / RATIO).add_(e)
    if kind == "gaus1":
        return torch.mul(v, e, out=out)
    return torch.mul(v, OMEGA, out=out).cos_().mul_(e)


def slope(kind, v, p, e, psi):
    """psi' from psi, written over psi; p and e are overwritten."""
    if kind == "mex":
        return psi.add_(e, alpha=2).mul_(v).mul_(-SLOPE)
    if kind == "dog":
        return psi.mul_(RATIO**-2).add_(e, alpha=1 - RATIO**-2).mul_(v).mul_(-SLOPE)
    if kind == "gaus1":
        return torch.addcmul(e, e, p, value=SLOPE, out=psi)
    sine = torch.mul(v, OMEGA, out=p).sin_().mul_(e)
    return psi.mul_(v).mul_(-SLOPE).sub_(sine, alpha=OMEGA)


def sum_dtype(x):
    """The type in which chunks are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def prepared(x, w, a, b, kind):
    """x as rows, w, a and b multiplied by the constants of this file, all in the type of the sums."""
    x, w, a, b = (y.to(sum_dtype(x)) for y in (x, w, a, b))
    return x.reshape(-1, x.size(-1)), w * FACTOR[kind], a * SCALE, b * SCALE


class Buffers:
    """Buffers that every chunk reuses: `views(*shape)` gives them in a chunk's shape."""

    def __init__(self, x, count, size):
        self.flat = x.new_empty(count, size)

    def views(self, *shape):
        return [f[: math.prod(shape)].view(shape) for f in self.flat]


# ---------------------------------------------------------------------------------------------------------------------
# The bank: chunks of rows, one wavelet of all channels after the other.


def bank_chunks(x):
    rows = max(1, CHUNK[x.device.type] // max(1, x.size(1)))
    return [(n, min(n + rows, len(x))) for n in range(0, len(x), rows)], min(rows, len(x)) * x.size(1)


def bank_forward(x, m, a, b, kind):
    shape, dtype = x.shape, x.dtype
    x, m, a, b = prepared(x, m, a, b, kind)
    y = torch.empty_like(x)
    chunks, size = bank_chunks(x)
    buffers = Buffers(x, 3, size)
    for start, end in chunks:
        xc, yc = x[start:end], y[start:end]
        v, p, e = buffers.views(*xc.shape)
        torch.ops.aten.silu.out(xc, out=yc)
        for k in range(len(m)):
            gaussian(xc, a[k], b[k], v, p, e)
            yc.addcmul_(value(kind, v, p, e, out=v), m[k])
    return y.view(shape).to(dtype)


def bank_backward(grad, x, m, a, b, kind):
    shape, dtype = x.shape, x.dtype
    x, m, a, b = prepared(x, m, a, b, kind)
    grad = grad.reshape(x.shape).to(x.dtype)
    ma = m * a
    dx, dm, da, db = torch.empty_like(x), torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    chunks, size = bank_chunks(x)
    buffers = Buffers(x, 4, size)
    for start, end in chunks:
        xc, gc, dxc = x[start:end], grad[start:end], dx[start:end]
        v, p, e, psi = buffers.views(*xc.shape)
        torch.ops.aten.silu_backward.grad_input(gc, xc, grad_input=dxc)
        for k in range(len(m)):
            gaussian(xc, a[k], b[k], v, p, e)
            dm[k] += value(kind, v, p, e.mul_(gc), out=psi, g=gc).sum(0)
            rise = slope(kind, v, p, e, psi)
            dxc.addcmul_(rise, ma[k])
            db[k] += rise.sum(0)
            da[k] += rise.mul_(xc).sum(0)
    return dx.view(shape).to(dtype), dm * FACTOR[kind], da.mul_(m).mul_(SCALE), db.mul_(m).mul_(SCALE)


# ---------------------------------------------------------------------------------------------------------------------
# The edges: chunks of outputs x rows, each (outputs, rows, I).


def edge_chunks(x, outputs):
    """[(first, end) of the outputs, (first, end) of the rows) of each chunk], and the most numbers of one."""
    most = max(1, CHUNK[x.device.type] // max(1, x.size(1)))
    rows = max(1, min(len(x), most))
    outs = max(1, min(outputs, most // rows))
    chunks = [
        (o, min(o + outs, outputs), n, min(n + rows, len(x)))
        for n in range(0, len(x), rows)
        for o in range(0, outputs, outs)
    ]
    return chunks, outs * rows * x.size(1)


def edges_forward(x, w, a, b, kind):
    shape, dtype = x.shape, x.dtype
    x, w, a, b = prepared(x, w, a, b, kind)
    y = x.new_empty(len(x), len(w))
    chunks, size = edge_chunks(x, len(w))
    buffers = Buffers(x, 3, size)
    for o, o_end, n, n_end in chunks:
        wc, ac, bc = (z[o:o_end, None] for z in (w, a, b))  # (outputs, 1, I)
        v, p, e = buffers.views(o_end - o, n_end - n, x.size(1))
        gaussian(x[n:n_end], ac, bc, v, p, e)
        y[n:n_end, o:o_end] = value(kind, v, p, e, out=v).mul_(wc).sum(-1).mT
    return y.view(*shape[:-1], len(w)).to(dtype)


def edges_backward(grad, x, w, a, b, kind):
    shape, dtype = x.shape, x.dtype
    x, w, a, b = prepared(x, w, a, b, kind)
    grad = grad.reshape(len(x), len(w)).to(x.dtype)
    wa = w * a
    dx, dw, da, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    chunks, size = edge_chunks(x, len(w))
    buffers = Buffers(x, 4, size)
    for o, o_end, n, n_end in chunks:
        xc, gc = x[n:n_end], grad[n:n_end, o:o_end].mT.unsqueeze(-1)  # (outputs, rows, 1)
        v, p, e, psi = buffers.views(o_end - o, n_end - n, x.size(1))
        gaussian(xc, a[o:o_end, None], b[o:o_end, None], v, p, e)
        dw[o:o_end] += value(kind, v, p, e.mul_(gc), out=psi, g=gc).sum(1)
        rise = slope(kind, v, p, e, psi)
        for row, weight in zip(rise, wa[o:o_end]):  # one sum over the outputs would read and write more
            dx[n:n_end].addcmul_(row, weight)
        db[o:o_end] += rise.sum(1)
        da[o:o_end] += rise.mul_(xc).sum(1)
    return dx.view(shape).to(dtype), dw * FACTOR[kind], da.mul_(w).mul_(SCALE), db.mul_(w).mul_(SCALE)


# ---------------------------------------------------------------------------------------------------------------------
# The operators.


@torch.library.custom_op("nanochimera::wavelet_bank", mutates_args=())
def bank(x: torch.Tensor, m: torch.Tensor, a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    return bank_forward(x, m, a, b, kind)


@torch.library.custom_op("nanochimera::wavelet_edges", mutates_args=())
def edges(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    return edges_forward(x, w, a, b, kind)


@torch.library.custom_op("nanochimera::wavelet_bank_backward", mutates_args=())
def differentiate_bank(
    grad: torch.Tensor, x: torch.Tensor, m: torch.Tensor, a: torch.Tensor, b: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return bank_backward(grad, x, m, a, b, kind)


@torch.library.custom_op("nanochimera::wavelet_edges_backward", mutates_args=())
def differentiate_edges(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return edges_backward(grad, x, w, a, b, kind)


@bank.register_fake
def _(x, m, a, b, kind):
    return x.new_empty(x.shape)


@edges.register_fake
def _(x, w, a, b, kind):
    return x.new_empty(*x.shape[:-1], w.size(0))


@differentiate_bank.register_fake
@differentiate_edges.register_fake
def _(grad, x, w, a, b, kind):
    return x.new_empty(x.shape), *(w.new_empty(w.shape, dtype=sum_dtype(x)) for _ in range(3))


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def differentiate_with(operator):
    def differentiate(ctx, grad):
        x, *parameters = ctx.saved_tensors
        dx, *gradients = operator(grad, x, *parameters, ctx.kind)
        return dx, *(g.to(p.dtype) for g, p in zip(gradients, parameters)), None

    return differentiate


bank.register_autograd(differentiate_with(differentiate_bank), setup_context=save_for_backward)
edges.register_autograd(differentiate_with(differentiate_edges), setup_context=save_for_backward)


def wavelet_bank(x, m, a, b, kind):
    """silu(x_i) + sum_k m_ki psi(a_ki x_i + b_ki). x (..., I); m, a, b (K, I); kind: a key of WAVELETS.

    Returns (..., I) in x's type; half types are computed in float32. ValueError for arguments that do not fit.
    """
    check(x, m, a, b, kind)
    return bank(x, m, a, b, kind)


def wavelet_edges(x, w, a, b, kind):
    """sum_i w_oi psi(a_oi x_i + b_oi). x (..., I); w, a, b (O, I); kind: a key of WAVELETS.

    Returns (..., O) in x's type; half types are computed in float32. ValueError for arguments that do not fit.
    """
    check(x, w, a, b, kind)
    return edges(x, w, a, b, kind)


def check(x, w, a, b, kind):
    if kind not in WAVELETS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(WAVELETS)}")
    if not (x.is_floating_point() and x.dim() and w.dim() == 2 and w.shape == a.shape == b.shape):
        raise ValueError("x must be floating, (..., I), and the wavelets' weights, a and b of one shape, (n, I)")
    if x.size(-1) != w.size(1):
        raise ValueError(f"x has {x.size(-1)} channels, the wavelets {w.size(1)}")
