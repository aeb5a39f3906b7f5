"""
Linking numbers and Gauss integrals of many pairs of polygons in space.

The Gauss integral of two curves is the signed area that the directions b(t) - a(s) sweep on the unit sphere, over 4 pi:
an integer for closed curves, the linking number, and a real number for open ones. Two straight segments sweep the image
of a parallelogram, two triangles of corners d, e, f with solid angle 2 atan2(V, D), V = det(d, e, f) and
D = |d||e||f| + (d e)|f| + (e f)|d| + (f d)|e|. Both have the same V and together less than 2 pi, so one atan2, of the
product (D1 + iV)(D2 + iV), gives their sum.

Three things make it cheap. By Stokes' theorem, the area's derivative is a sum over its border: 4 (n - 1) arcs instead
of (n - 1)^2 quadrilaterals. The linking numbers of all strands with all strands need no area at all. In a projection
they are half the sum of the crossings' signs, and matrix products in float64 show on which side of a line a point lies
and which of two lines passes in front. Where the linking number of the closed curves is known, the integral of the open
ones is this number minus the part of the closing chords, 2 n - 1 quadrilaterals.
"""

import math

import torch

CHUNK = 1 << 17  # pairs of segments of strand_links at a time: 1 MiB per matrix, so that they stay in the cache
SHARPEST = 1e-4  # limits of the gradient: 1 + cos of the angle that an arc spans is taken to be at least this,
NEAREST = 1e-3  # and a distance at least this part of the pair's mean distance

# ---------------------------------------------------------------------------------------------------------------------
# Gauss integrals by solid angles. Inside, pairs of curves come last, (3, n, N), so that slices are contiguous.


def dot(p, q):
    return torch.addcmul(torch.addcmul(p[0] * q[0], p[1], q[1]), p[2], q[2])


def cross(p, q):
    return torch.stack((p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]))


def half_angles(a, b):
    """Half the solid angle of each pair of segments of chains a (3, n, N), b (3, m, N): (n - 1, m - 1, N).

    Segments that lie in one plane, up to rounding, give 0, and so do segments that meet.
    """
    d = b[:, None] - a[:, :, None]  # (3, n, m, N)
    r = dot(d, d).sqrt()
    down, right = dot(d[:, :-1], d[:, 1:]), dot(d[:, :, :-1], d[:, :, 1:])  # products of neighbours along a, along b
    diagonal = dot(d[:, :-1, :-1], d[:, 1:, 1:])
    ea, eb = a.diff(dim=1), b.diff(dim=1)
    ma, mb = cross(a[:, :-1], ea), cross(b[:, :-1], eb)  # moments: V needs no cross product for each pair
    V = dot(ea[:, :, None], mb[:, None]) + dot(ma[:, :, None], eb[:, None])
    r00, r10, r01, r11 = r[:-1, :-1], r[1:, :-1], r[:-1, 1:], r[1:, 1:]
    D1 = torch.addcmul(torch.addcmul(diagonal * r10, right[1:], r00), torch.addcmul(down[:, :-1], r00, r10), r11)
    D2 = torch.addcmul(torch.addcmul(diagonal * r01, down[:, 1:], r00), torch.addcmul(right[:-1], r00, r01), r11)
    angle = torch.atan2(V * (D1 + D2), torch.addcmul(D1 * D2, V, V, value=-1))
    rounding = 16 * torch.finfo(a.dtype).eps * dot(ea, ea).sqrt()[:, None] * dot(eb, eb).sqrt()
    return angle * (V.abs() > rounding)


def side_by_side(a, b):
    """a (..., n, 3), b (..., m, 3) as (3, n, N) and (3, m, N), the unit of each pair's lengths, the batch's shape.

    In float32 or better. Each pair is measured from a's first vertex, in units of its largest coordinate: products of
    six lengths would leave float32's range at 1e-6 and 1e6.
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (x.to(dtype) for x in (a, b))
    a, b = a - a[..., :1, :], b - a[..., :1, :]
    a, b = (x.expand(*batch, -1, -1).reshape(-1, *x.shape[-2:]).permute(2, 1, 0).contiguous() for x in (a, b))
    unit = torch.maximum(a.abs().amax((0, 1)), b.abs().amax((0, 1)))
    unit = unit + (unit == 0)
    return a / unit, b / unit, unit, batch


class GaussIntegral(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, links):
        ctx.save_for_backward(a, b)
        p, q, _, batch = side_by_side(a, b)
        if links is None:
            return (half_angles(p, q).sum((0, 1)) / (2 * math.pi)).reshape(batch)
        chord_p, chord_q = p[:, [-1, 0]], q[:, [-1, 0]]
        chords = half_angles(chord_p, torch.cat((q, q[:, :1]), 1)).sum((0, 1)) + half_angles(p, chord_q).sum((0, 1))
        return links.to(p.dtype) - (chords / (2 * math.pi)).reshape(batch)

    @staticmethod
    def backward(ctx, grad):
        """When the arc d to e on the border moves, the area grows by (e x d)(dd / |d| + de / |e|) / (|d||e| + d e)."""
        a, b = ctx.saved_tensors
        p, q, unit, batch = side_by_side(a, b)
        i, j = border(a.size(-2), b.size(-2), a.device)
        d = q[:, j] - p[:, i]  # (3, arcs, N)
        r = dot(d, d).sqrt()
        r = torch.maximum(r, (NEAREST * r.mean(0)).clamp(min=torch.finfo(r.dtype).eps))
        e, lengths = d.roll(-1, 1), r * r.roll(-1, 0)
        arc = cross(e, d) / torch.maximum(lengths + dot(d, e), SHARPEST * lengths)
        push = (arc + arc.roll(1, 1)) * (grad.reshape(-1) / (4 * math.pi * unit) / r)
        grads = []
        for x, like, index, sign in ((a, p, i, -1), (b, q, j, 1)):
            g = torch.zeros_like(like).index_add(1, index, push, alpha=sign)
            grads.append(g.permute(2, 1, 0).reshape(*batch, *x.shape[-2:]).sum_to_size(x.shape).to(x.dtype))
        return *grads, None


def border(n, m, device):
    """The vertices of a and of b, in order, around the border of all pairs (n, m): 2 (n - 1) + 2 (m - 1) of each."""
    i, j = torch.arange(n, device=device), torch.arange(m, device=device)
    along_a, along_b = torch.zeros_like(i[1:]), torch.zeros_like(j[1:])
    around_a = torch.cat((i[:-1], along_b + (n - 1), i[1:].flip(0), along_b))
    around_b = torch.cat((along_a, j[:-1], along_a + (m - 1), j[1:].flip(0)))
    return around_a, around_b


def gauss_linking_integrals(a, b, links=None):
    """Gauss integrals of open chains a (..., n, 3) and b (..., m, 3), broadcast: (...), in float32 or better.

    links: the linking numbers (...) of the same curves, closed, if they are known; the same result for less work.
    Differentiable. Gradients are finite everywhere: capped where the end of one chain comes close to the other chain.
    Where the chains pass through each other the value jumps by 1, and the gradient is that of either side.
    """
    return GaussIntegral.apply(a, b, links)


@torch.no_grad()
def linking_numbers(a, b):
    """Linking numbers of closed polygons a (..., n, 3) and b (..., m, 3), broadcast: (...) int64, by float64.

    The closing edge is added to each polygon.
    """
    p, q, _, batch = side_by_side(*(torch.cat((x, x[..., :1, :]), -2).double() for x in (a, b)))
    return (half_angles(p, q).sum((0, 1)) / (2 * math.pi)).round().long().reshape(batch)


# ---------------------------------------------------------------------------------------------------------------------
# Linking numbers of all strands with all strands, by signed crossings. Inside, vertex i of strand c is row i C + c.

# A rotation after which coordinates chosen by hand are in general position.
VIEW = (
    (-0.3526948830889485, -0.9138952049797814, -0.20100217351520328),
    (0.6005878869772093, -0.056364288167503496, -0.7975695938509825),
    (0.7175656830277792, -0.4020181853278949, 0.5687537861030403),
)


def lines(strands):
    """For the segments of closed strands (N, C, n, 3), rows (N, n C, .): first vertex, line in a picture and in space.

    A picture is a projection along one axis: a vertex (x, y, 1) lies left of a line (u, v, w) iff u x + v y + w > 0. A
    line in space is (e, p x e), unit direction and moment; with (q x f, f) of another its product is -det(q - p, e, f),
    the distance of the lines times the sine of their angle. The last value bounds the rounding error of this product.
    """
    view = torch.tensor(VIEW, dtype=torch.float64, device=strands.device)
    p = (strands.double() @ view).transpose(1, 2)  # (N, n, C, 3)
    size = 16 * torch.finfo(torch.promote_types(strands.dtype, torch.float32)).eps * p.abs().amax((1, 3), keepdim=True)
    size, p = size.expand(*p.shape[:3], 1).flatten(1, 2), p.flatten(1, 2)
    e = p.roll(-strands.size(1), 1) - p
    e = e / e.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)
    moment, one = torch.linalg.cross(p, e), torch.ones_like(size)
    flat = torch.stack((-e[..., 1], e[..., 0], moment[..., 2]), -1)
    above, below = torch.cat((e, moment, -size, -one), -1), torch.cat((e, moment, size, one), -1)
    return torch.cat((p[..., :2], one), -1), flat, above, below, torch.cat((moment, e, one, size), -1)


def changes_side(line, vertex, C):
    """Whether each line of a picture separates the ends of each segment of C strands: (N, lines, n C) bool."""
    left = (line @ vertex.mT > 0).unflatten(2, (-1, C))
    return (left ^ left.roll(-1, 2)).flatten(2)


def half_crossings(a, b, C, D, n):
    """Linking numbers of C strands with D others, from their `lines`: (N, C, D) float32, integers."""
    changes = changes_side(a[1], b[0], D)
    crossed = changes & (changes if a is b else changes_side(b[1], a[0], C)).mT  # (N, n C, n D)
    positive, negative = crossed & (a[2] @ b[4].mT > 0), crossed & (a[3] @ b[4].mT < 0)
    signs = positive.to(torch.int8) - negative.to(torch.int8)
    return (signs.view(-1, n, C, n, D).sum(1, dtype=torch.int8).sum(2, dtype=torch.float32) / 2).round()


@torch.no_grad()
def strand_links(strands, others=None):
    """Linking numbers of closed strands (B, H, C, n, 3) with others (B, H, D, n, 3): (B, H, C, D) float32.

    Without `others`, of all strands with each other; the diagonal is 0. Segments that meet count as not crossing, where
    to meet is to come as near as the rounding of their coordinates: equal tokens do make equal vertices. n <= 127.
    """
    B, H, C, n, _ = strands.shape
    D = C if others is None else others.size(2)
    here = lines(strands.flatten(0, 1))
    there = here if others is None else lines(others.flatten(0, 1))
    pairs = max(1, C * n * D * n)
    heads, rows = max(1, CHUNK // pairs), max(1, math.ceil(C * CHUNK / pairs))
    links = strands.new_zeros(B * H, C, D, dtype=torch.float32)
    for s in range(0, B * H, heads):
        a = tuple(x[s : s + heads] for x in here)
        b = a if others is None else tuple(x[s : s + heads] for x in there)
        for c in range(0, C, rows):
            end = D if others is not None else min(C, c + rows)  # the rest is the same, mirrored
            some, before = cells_of(a, C, c, c + rows), cells_of(b, D, 0, end)
            links[s : s + heads, c : c + rows, :end] = half_crossings(some, before, min(rows, C - c), end, n)
    if others is None:
        links = links.tril(-1) + links.tril(-1).mT
    return links.unflatten(0, (B, H))


def cells_of(rows, C, start, end):
    """The `lines` of the strands start .. end - 1 of C."""
    if start == 0 and end >= C:
        return rows
    return tuple(x.unflatten(1, (-1, C))[:, :, start:end].flatten(1, 2) for x in rows)


# ---------------------------------------------------------------------------------------------------------------------
# One pair of curves at a time.


def linking_number(a, b):
    """Linking number of two disjoint closed polygons (n, 3) and (m, 3), the closing edge added: an exact int."""
    return int(linking_numbers(*as_curves(a, b)))


def gauss_linking_integral(a, b):
    """Gauss integral of two open polygonal chains (n, 3) and (m, 3), a float: by the solid angles of their segments."""
    return float(gauss_linking_integrals(*as_curves(a, b)))


def as_curves(*curves):
    """Curves in float64; ValueError for anything else."""
    curves = [torch.as_tensor(x, dtype=torch.float64).detach() for x in curves]
    for x in curves:
        if x.dim() != 2 or x.size(1) != 3 or x.size(0) < 1 or not x.isfinite().all():
            raise ValueError(f"a curve is a finite (n, 3) array of at least one vertex, not {tuple(x.shape)}")
    return curves
