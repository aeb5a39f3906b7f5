"""
Block-sparse causal attention over cells: out_i = sum_j p_ij v_j over the keys j <= i whose cell is related to i's.

A sequence is cut into cells, contiguous runs of positions, and a relation defines which cell attends to which. Softmax:
p_ij = exp(s_ij - lse_i), s_ij = scale q_i k_j + bias[cell i, cell j]. Sigmoid: p_ij = sigmoid(s_ij + row_bias_i).

`reference` uses a dense mask, in any float type. `torch_forward` and `torch_backward` loop over query cells and never
build a T x T matrix: time and memory are O(T k), with k the number of keys a query can reach. The backward pass is
written by hand, because autograd through slices would write a zero tensor of full length for each cell. On CUDA the
operators call block_sparse_triton.py.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.forward_ad import unpack_dual

from kernels import triton_module

# ---------------------------------------------------------------------------------------------------------------------
# The route: which position attends to which.


@dataclass
class Route:
    """Cell c is the positions starts[c] .. starts[c + 1] - 1; allowed[..., c, c']: whether c attends to c'.

    starts: (C + 1) ints; allowed: (C, C) or (B, H, C, C) bool, true only for c' <= c. Inside a cell attention is causal
    by position.
    """

    starts: tuple
    allowed: torch.Tensor

    @classmethod
    def from_cells(cls, cell, allowed):
        """From each position's cell id (T,) int and the relation (C, C) or (B, H, C, C) bool.

        Ids must count up from 0 in contiguous runs: ValueError otherwise, or if the relation has the wrong size.
        """
        steps = torch.diff(cell)
        if cell.numel() == 0 or cell[0] != 0 or ((steps != 0) & (steps != 1)).any():
            raise ValueError("cell must count up from 0 in contiguous runs")
        C = int(cell[-1]) + 1
        if allowed.dtype != torch.bool or allowed.shape[-2:] != (C, C) or allowed.dim() not in (2, 4):
            raise ValueError(f"allowed must be bool (C, C) or (B, H, C, C) with C = {C}, not {tuple(allowed.shape)}")
        starts = torch.searchsorted(cell.contiguous(), torch.arange(C + 1, device=cell.device)).tolist()
        return cls(tuple(starts), allowed.tril())

    @property
    def length(self):
        return self.starts[-1]

    def first(self, T):
        """The route of the first T positions; only the cell that T cuts changes, it becomes shorter."""
        if self.length == T:
            return self
        if not 0 < T < self.length:
            raise ValueError(f"the route has {self.length} positions, not {T}")
        starts = (*(s for s in self.starts if s < T), T)
        C = len(starts) - 1
        return Route(starts, self.allowed[..., :C, :C])

    def cell(self, device="cpu"):
        """Cell id of each position, (T,) int64."""
        lengths = torch.tensor(self.starts).diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)

    def mask(self):
        """The dense mask, (T, T) or (B, H, T, T) bool: for the reference and for pictures."""
        cell = self.cell(self.allowed.device)
        return self.allowed[..., cell[:, None], cell[None, :]].tril()

    def keys_per_query(self):
        """How many keys each position attends to, (T,) or (B, H, T) int64, without a T x T mask."""
        starts = torch.tensor(self.starts, device=self.allowed.device)
        cell = self.cell(self.allowed.device)
        own = torch.diagonal(self.allowed, dim1=-2, dim2=-1)  # (..., C)
        past = (self.allowed.tril(-1) * starts.diff()).sum(-1)  # whole cells before the query's
        return past[..., cell] + own[..., cell] * (torch.arange(self.length, device=cell.device) - starts[cell] + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The reference.


def reference(q, k, v, route, *, activation="softmax", bias=None, row_bias=None, scale=None):
    """The same attention through a dense mask: O(T^2), any floating type, differentiable by autograd.

    Arguments as in `block_sparse_attention`. A query without keys gives zeros.
    """
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    mask, cell = route.mask(), route.cell(q.device)
    if bias is not None:
        scores = scores + bias[..., cell[:, None], cell[None, :]]
    if row_bias is not None:
        scores = scores + row_bias[:, None]
    if activation == "sigmoid":
        return (scores.sigmoid() * mask) @ v
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(mask.any(-1, keepdim=True), p, 0.0) @ v


# ---------------------------------------------------------------------------------------------------------------------
# The PyTorch path: one query cell after the other, or some short ones together, all batches and heads at once.
#
# On a CPU, plain softmax over a static relation goes through the fused attention kernel twice per cell, once causally
# over the cell itself and once over the keys before it; the two are merged by their log-sum-exp, and its backward,
# given the merged log-sum-exp, returns each part's exact share of the gradient. Everything else (sigmoid, biases, a
# relation for each head and batch) gathers the keys of some cells and multiplies matrices.

fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def past_ranges(starts, allowed, c):
    """[(first, end)) ranges of positions, in order and merged, before cell c that it attends to."""
    ranges = []
    for other in allowed[c, :c].nonzero()[:, 0].tolist():
        if ranges and ranges[-1][1] == starts[other]:
            ranges[-1] = (ranges[-1][0], starts[other + 1])
        else:
            ranges.append((starts[other], starts[other + 1]))
    return ranges


def take(x, ranges):
    """The positions of `ranges` of x (B, H, T, D): a view where they are one range."""
    pieces = [x[:, :, a:b] for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def add_to(x, ranges, y):
    """x[ranges] += y, in place."""
    start = 0
    for a, b in ranges:
        x[:, :, a:b] += y[:, :, start : start + b - a]
        start += b - a


def fused_forward(q, k, v, starts, allowed, scale):
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=sum_dtype(q))
    for c, (s, e) in enumerate(zip(starts, starts[1:])):
        qc, ranges = q[:, :, s:e], past_ranges(starts, allowed, c)
        parts = []
        if allowed[c, c]:
            parts.append(fused(qc, k[:, :, s:e], v[:, :, s:e], 0.0, True, scale=scale))
        if ranges:
            parts.append(fused(qc, take(k, ranges), take(v, ranges), 0.0, False, scale=scale))
        if len(parts) == 2:
            (o1, l1), (o2, l2) = parts
            both = torch.logaddexp(l1, l2)
            share = (l2 - both).exp().unsqueeze(-1)
            parts = [(torch.lerp(o1.to(share.dtype), o2.to(share.dtype), share), both)]
        if parts:
            out[:, :, s:e], lse[:, :, s:e] = parts[0]
    return out, lse


def fused_gradients(grad, q, k, v, out, lse, starts, allowed, scale):
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for c, (s, e) in enumerate(zip(starts, starts[1:])):
        row = (grad[:, :, s:e], q[:, :, s:e])
        end = (out[:, :, s:e], lse[:, :, s:e], 0.0)
        if allowed[c, c]:
            x, y, z = fused_backward(*row, k[:, :, s:e], v[:, :, s:e], *end, True, scale=scale)
            dq[:, :, s:e] += x
            dk[:, :, s:e] += y
            dv[:, :, s:e] += z
        if ranges := past_ranges(starts, allowed, c):
            x, y, z = fused_backward(*row, take(k, ranges), take(v, ranges), *end, False, scale=scale)
            dq[:, :, s:e] += x
            add_to(dk, ranges, y)
            add_to(dv, ranges, z)
    return dq, dk, dv


GROUP = 1 << 19  # scores at a time, of several short cells: fewer calls, and what they read stays in the cache


def groups(starts, allowed, rows):
    """(first, last): cells first .. last - 1, which are computed together for `rows` batches and heads."""
    lengths = torch.tensor(starts, device=allowed.device).diff()
    keys = (allowed * lengths).sum(-1).amax(0).tolist()  # how many each cell reads, in the row where it reads most
    first, widest, longest = 0, 0, 0
    for c, (n, m) in enumerate(zip(lengths.tolist(), keys)):
        widest, longest = max(widest, m), max(longest, n)
        if c > first and (c + 1 - first) * longest * widest * rows > GROUP:
            yield first, c
            first, widest, longest = c, m, n
    yield first, len(keys)


class Gather:
    """Queries and keys of G cells, first .. last - 1, for every batch and head, X = 1 or B H rows.

    query (G, n): positions, in cells shorter than the longest one padded, where `real` (G, n) is false; position and
    cell (X, G, m): where the keys are, padded too; seen (X, G, n, m): the mask.
    """

    def __init__(self, starts, allowed, first, last):
        device = allowed.device
        spans = torch.tensor(starts, device=device)
        cells = self.cells_of(allowed[:, first:last, :last])
        lengths = torch.where(cells >= 0, spans[cells + 1] - spans[cells], 0)
        width = int(lengths.sum(2).max()) if lengths.numel() else 0
        ends = lengths.cumsum(2)
        slot = torch.arange(width, device=device).expand(*cells.shape[:2], width).contiguous()
        which = torch.searchsorted(ends, slot, right=True)  # which of the related cells a slot belongs to
        exists = which < cells.size(2)
        which = which.clamp(max=max(0, cells.size(2) - 1))
        self.cell = cells.gather(2, which).clamp(min=0)
        self.position = (spans[self.cell] + slot - (ends - lengths).gather(2, which)).clamp(max=starts[-1] - 1)
        begin, end = spans[first:last, None], spans[first + 1 : last + 1, None]
        self.span, self.cells = slice(starts[first], starts[last]), slice(first, last)
        query = begin + torch.arange(int((end - begin).max()), device=device)
        self.real, self.query = query < end, query.clamp(max=starts[-1] - 1)
        past = self.position[:, :, None, :] <= self.query[None, :, :, None]
        self.seen = past & exists[:, :, None, :] & self.real[None, :, :, None]

    @staticmethod
    def cells_of(allowed):
        """The cells that are true in each row of (X, G, C), in order, padded with -1: (X, G, most)."""
        count = allowed.sum(2)
        order = torch.argsort(allowed.byte(), dim=2, descending=True, stable=True)[:, :, : int(count.max())]
        return torch.where(torch.arange(order.size(2), device=allowed.device) < count[:, :, None], order, -1)

    def rows_of(self, x):
        """The gathered positions as rows of x.flatten(0, 1), x (B H, T, D): (B H G m,)."""
        first = torch.arange(len(x), device=x.device)[:, None, None] * x.size(1)
        return (self.position + first).flatten()

    def take(self, x):
        """x (B H, T, D) at the gathered positions: (B H, G, m, D)."""
        rows = x.flatten(0, 1).index_select(0, self.rows_of(x))
        return rows.view(len(x), *self.position.shape[1:], x.size(2))

    def add_to(self, x, y):
        """x[gathered positions] += y (B H, G, m, D), in place. Padding carries zeros."""
        x.flatten(0, 1).index_add_(0, self.rows_of(x), y.flatten(0, 2))

    def queries(self, x):
        """x (B H, T, ...) at the cells' positions: (B H, G, n, ...)."""
        return x[:, self.query] if len(self.query) > 1 else x[:, None, self.span]

    def drop_padding(self, x):
        """(B H, G, n, ...) in the order of positions, those of `span`: (B H, length, ...)."""
        return x.flatten(1, 2) if len(self.query) == 1 or self.real.all() else x[:, self.real]


def probabilities(q, k, gather, bias, row_bias, scale, activation, lse=None):
    """(p, lse) of some query cells: p (B H, G, n, m), and its log-sum-exp (B H, G, n, 1), None for sigmoid."""
    scores = gather.queries(q) @ gather.take(k).mT * scale
    if bias is not None:
        bias = bias[:, gather.cells]
        scores = scores + bias.gather(2, gather.cell.expand(len(bias), -1, -1))[:, :, None, :]
    if row_bias is not None:
        scores = scores + row_bias[gather.query][..., None]
    if activation == "sigmoid":
        return scores.sigmoid() * gather.seen, None
    scores = scores.masked_fill(~gather.seen, -math.inf)
    if lse is None:
        lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse.nan_to_num(neginf=0.0)).exp(), lse  # a query without keys: exp(-inf - 0) = 0


def torch_forward(q, k, v, starts, allowed, bias, row_bias, scale, activation):
    """(out (B, H, T, D), lse (B, H, T)); see `block_sparse_attention`. lse is empty for sigmoid. Any device."""
    (B, H, T, _), dtype = q.shape, q.dtype
    q, k, v = widened(q, k, v)
    if is_fused(q, allowed, bias, activation):
        out, lse = fused_forward(q, k, v, starts, allowed, scale)
        return out.to(dtype), lse
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    allowed, bias = flat_relation(allowed, bias, B, H, q.dtype)
    out, lse = torch.empty_like(q), q.new_empty(B * H, T if activation == "softmax" else 0)
    for cells in groups(starts, allowed, B * H):
        gather = Gather(starts, allowed, *cells)
        p, l = probabilities(q, k, gather, bias, row_bias, scale, activation)
        out[:, gather.span] = gather.drop_padding(p @ gather.take(v))
        if l is not None:
            lse[:, gather.span] = gather.drop_padding(l[..., 0])
    return out.unflatten(0, (B, H)).to(dtype), lse.unflatten(0, (B, H))


def torch_backward(grad, q, k, v, out, lse, starts, allowed, bias, row_bias, scale, activation):
    """Gradients (dq, dk, dv, dbias, drow_bias); the last two are empty where there is no such bias. Any device."""
    (B, H, T, _), dtype, bias_shape = q.shape, q.dtype, None if bias is None else bias.shape
    grad, q, k, v, out = widened(grad, q, k, v, out)
    if is_fused(q, allowed, bias, activation):
        gradients = fused_gradients(grad, q, k, v, out, lse, starts, allowed, scale)
        return (*(x.to(dtype) for x in gradients), *(q.new_empty(0, dtype=dtype) for _ in range(2)))
    grad, q, k, v = (x.flatten(0, 1) for x in (grad, q, k, v))
    allowed, bias = flat_relation(allowed, bias, B, H, q.dtype)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dbias = q.new_zeros(0, dtype=dtype) if bias is None else torch.zeros_like(bias)
    drow = q.new_zeros(0, dtype=dtype) if row_bias is None else q.new_zeros(T)
    for cells in groups(starts, allowed, B * H):
        gather = Gather(starts, allowed, *cells)
        known = gather.queries(lse.flatten(0, 1))[..., None] if activation == "softmax" else None
        p, _ = probabilities(q, k, gather, bias, row_bias, scale, activation, known)
        some = gather.queries(grad)
        gather.add_to(dv, p.mT @ some)
        dp = some @ gather.take(v).mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) if activation == "softmax" else p * (1 - p) * dp
        dq[:, gather.span] = gather.drop_padding(ds @ gather.take(k) * scale)
        gather.add_to(dk, ds.mT @ gather.queries(q) * scale)
        if bias is not None:
            dbias[:, gather.cells].scatter_add_(2, gather.cell.expand(B * H, -1, -1), ds.sum(2))
        if row_bias is not None:
            drow[gather.span] = gather.drop_padding(ds.sum((0, 3))[None])[0]
    if bias is not None:
        dbias = dbias.unflatten(0, (B, H)).sum_to_size(bias_shape)
    return (*(x.unflatten(0, (B, H)).to(dtype) for x in (dq, dk, dv)), dbias, drow)


def is_fused(q, allowed, bias, activation):
    """Whether the CPU's fused kernel can compute this."""
    return q.device.type == "cpu" and activation == "softmax" and bias is None and allowed.dim() == 2


def sum_dtype(x):
    """The type in which sums over keys are accumulated: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(*tensors):
    """Contiguous and in `sum_dtype`: the fused kernel is three times as slow in bfloat16 on a CPU without AMX."""
    return tuple(x.to(sum_dtype(x)).contiguous() for x in tensors)


def flat_relation(allowed, bias, B, H, dtype):
    """allowed as (1 or B H, C, C), and bias as (B H, C, C) or None."""
    if bias is not None:
        bias = bias.to(dtype).expand(B, H, *bias.shape[-2:]).flatten(0, 1)
    return allowed.reshape(-1, *allowed.shape[-2:]), bias


# ---------------------------------------------------------------------------------------------------------------------
# The operators.


def import_triton():
    """The CUDA path."""
    return triton_module("block_sparse_triton")


@torch.library.custom_op("nanochimera::block_sparse", mutates_args=())
def block_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], allowed: torch.Tensor,
    bias: torch.Tensor | None, row_bias: torch.Tensor | None, scale: float, activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    forward = import_triton().triton_forward if q.is_cuda else torch_forward
    with torch.autocast(q.device.type, enabled=False):  # the backward runs without autocast and needs this very lse
        return forward(q, k, v, starts, allowed, bias, row_bias, scale, activation)


@block_sparse.register_fake
def _(q, k, v, starts, allowed, bias, row_bias, scale, activation):
    lse = q.new_empty(*q.shape[:2], q.size(2) if activation == "softmax" else 0, dtype=sum_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("nanochimera::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    starts: list[int], allowed: torch.Tensor, bias: torch.Tensor | None, row_bias: torch.Tensor | None, scale: float,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    backward = import_triton().triton_backward if q.is_cuda else torch_backward
    with torch.autocast(q.device.type, enabled=False):
        return backward(grad, q, k, v, out, lse, starts, allowed, bias, row_bias, scale, activation)


@block_sparse_backward.register_fake
def _(grad, q, k, v, out, lse, starts, allowed, bias, row_bias, scale, activation):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    extra = [q.new_empty(0) if b is None else q.new_empty(b.shape, dtype=sum_dtype(q)) for b in (bias, row_bias)]
    return (*like, *extra)


def save_for_backward(ctx, inputs, output):
    q, k, v, ctx.starts, allowed, bias, row_bias, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(q, k, v, *output, allowed, bias, row_bias)
    ctx.set_materialize_grads(False)


def differentiate(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 9
    q, k, v, out, lse, allowed, bias, row_bias = ctx.saved_tensors
    dq, dk, dv, dbias, drow = block_sparse_backward(
        grad, q, k, v, out, lse, ctx.starts, allowed, bias, row_bias, ctx.scale, ctx.activation
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    drow = None if row_bias is None else drow.to(row_bias.dtype)
    return dq, dk, dv, None, None, dbias, drow, None, None


block_sparse.register_autograd(differentiate, setup_context=save_for_backward)


def block_sparse_attention(q, k, v, route, *, activation="softmax", bias=None, row_bias=None, scale=None):
    """Causal attention over the related cells of a route.

    q, k, v (B, H, T, D) of one floating type; route: a Route of T positions; activation "softmax" or "sigmoid" (no
    normalisation over keys); bias: added to the scores of a pair of cells, (C, C), (H, C, C) or (B, H, C, C), with a
    gradient; row_bias (T,): added to each query's scores, with a gradient (softmax ignores it); scale: default
    1 / sqrt(D). Returns (B, H, T, D). A query without keys gives zeros. ValueError for arguments that do not fit,
    NotImplementedError for forward-mode inputs, whose tangents would be lost.
    """
    B, H, T, D = q.shape
    C = len(route.starts) - 1
    if not (k.shape == v.shape == q.shape and k.dtype == v.dtype == q.dtype and q.is_floating_point()):
        raise ValueError("q, k and v must agree in shape, (B, H, T, D), and in type, a floating one")
    if route.length != T or route.allowed.shape not in ((C, C), (B, H, C, C)):
        what = f"{route.length} positions, allowed {tuple(route.allowed.shape)}"
        raise ValueError(f"the route does not agree with q {tuple(q.shape)}: {what}")
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"activation={activation!r}: must be softmax or sigmoid")
    if bias is not None and bias.shape not in ((C, C), (H, C, C), (B, H, C, C)):
        raise ValueError(f"bias is {tuple(bias.shape)}, the route has {C} cells, q is {tuple(q.shape)}")
    if row_bias is not None and row_bias.shape != (T,):
        raise ValueError(f"row_bias is {tuple(row_bias.shape)}, q has {T} positions")
    inputs = [x for x in (q, k, v, bias, row_bias) if x is not None]
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("block_sparse_attention has no forward-mode derivative: use reference(...)")
    if activation == "softmax":
        row_bias = None
    scale = D**-0.5 if scale is None else scale
    return block_sparse(q, k, v, list(route.starts), route.allowed.to(q.device), bias, row_bias, scale, activation)[0]
