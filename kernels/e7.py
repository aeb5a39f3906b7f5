"""
The Lie algebra E7 on its 56 dimensions, in integers, and the solvable half of the group E7(7), applied fast.

E8's 240 roots, the closure of its simple roots under reflection, are graded by their inner product with the highest
root theta: E7 is the 126 orthogonal to it, and the 56 with inner product 1 are the weights of the representation

    E_alpha v_beta = eps(alpha, beta) v_{alpha + beta},   H_h v_beta = (h, beta) v_beta,

eps the bimultiplicative sign of the E8 lattice. Every E_alpha has 12 entries +-1, E_alpha^2 = 0 and E_{-alpha} =
-E_alpha^T. The positive roots fall into 7 commuting sets along A1 < A2 < A3 < A4 < D5 < E6 < E7. With one exponential
per set,

    L(z) = exp(h H) exp(N_1) ... exp(N_7),   N_k = sum of z_alpha E_alpha over set k,   z = (h, z_alpha),

reaches every point of E7(7)/SU(8) once. Weights are ordered along the same chain, so that L is lower triangular.

`e7_coset` builds L, in any float type, as the reference. `e7_apply` computes L v without building L. `e7_lattice_round`
is here too, because it uses the same lattice. Sources: Bourbaki, Groupes et algebres de Lie, chapter 6; Conway &
Sloane 1982.
"""

from functools import cache
from itertools import accumulate

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Roots and weights. In simple-root coordinates all is integer; coefficient 8 is the inner product with theta.

# E8's simple roots after Bourbaki, doubled to be integers
SIMPLE = (
    (1, -1, -1, -1, -1, -1, -1, 1), (2, 2, 0, 0, 0, 0, 0, 0), (-2, 2, 0, 0, 0, 0, 0, 0), (0, -2, 2, 0, 0, 0, 0, 0),
    (0, 0, -2, 2, 0, 0, 0, 0), (0, 0, 0, -2, 2, 0, 0, 0), (0, 0, 0, 0, -2, 2, 0, 0), (0, 0, 0, 0, 0, -2, 2, 0),
)  # fmt: skip
CHAIN = (0, 2, 3, 1, 4, 5, 6)  # the simple root that each group of the chain adds: nodes 1, 3, 4, 2, 5, 6, 7
SETS = (1, 2, 3, 4, 10, 16, 27)  # roots in each set
STAGES = (2, 5, 9, 14, 25, 42, 70)  # dimensions of the chain's cosets: k Cartan coordinates and the first k sets
ENTRIES = (12, 24, 36, 48, 80, 40, 96, 96, 27, 270, 27)  # entries of N_k, by the power at which they act: `e7_hops`


def ints(values):
    return torch.tensor(values, dtype=torch.int64, device="cpu")


@cache
def e8_gram():
    """Inner products of the simple roots, (8, 8): E8's Cartan matrix."""
    return ints(SIMPLE) @ ints(SIMPLE).T // 4


@cache
def e8_levels():
    """Simple-root coordinates of E7's positive roots (63, 8), set after set, and of the 56 weights (56, 8)."""
    gram, found = e8_gram().tolist(), {tuple(row) for row in torch.eye(8, dtype=torch.int64).tolist()}
    fresh = found
    while fresh:  # reflect at each simple root: c_i -> c_i - (root, alpha_i)
        fresh = {
            (*c[:i], c[i] - sum(a * b for a, b in zip(c, gram[i])), *c[i + 1 :]) for c in fresh for i in range(8)
        } - found  # fmt: skip
        found |= fresh
    ordered = sorted(found, key=lambda c: [c[i] for i in reversed(CHAIN)])
    positive = [c for c in ordered if c[7] == 0 and min(c) >= 0]
    return ints(positive), ints([c for c in ordered if c[7] == 1])


def e7_roots():
    """E7's roots in E8's coordinates, doubled to be integers, (126, 8): the 7 sets in turn, then their negatives."""
    positive = e8_levels()[0] @ ints(SIMPLE)
    return torch.cat((positive, -positive))


def e7_weights():
    """The 56 weights in the same coordinates, (56, 8): theta / 2 is their component outside E7."""
    return e8_levels()[1] @ ints(SIMPLE)


def lattice_sign(a, b):
    """eps(a, b) = +-1, linear in both arguments mod 2; a (n, 8), b (m, 8) in simple-root coordinates -> (n, m)."""
    half = e8_gram().triu(1) + torch.eye(8, dtype=torch.int64, device="cpu")  # half + half^T is the Gram matrix
    return 1 - 2 * ((a @ half @ b.T) % 2)


@cache
def e7_representation():
    """The generators E_alpha on the 56, (126, 56, 56) int64, in the order of `e7_roots`. Do not write to it."""
    positive, weights = e8_levels()
    place = {tuple(w): i for i, w in enumerate(weights.tolist())}
    up = torch.zeros(63, 56, 56, dtype=torch.int64, device="cpu")
    alpha, beta = (positive @ e8_gram() @ weights.T == -1).nonzero(as_tuple=True)
    target = ints([place[tuple(w)] for w in (positive[alpha] + weights[beta]).tolist()])
    up[alpha, target, beta] = lattice_sign(positive, weights)[alpha, beta]
    return torch.cat((up, -up.mT))


@cache
def e7_cartan():
    """(h_i, beta) for 7 orthonormal h_i and the 56 weights, (7, 56) float64; h_1..h_k lie in the chain's k-th group.

    Gram-Schmidt along the chain, by the Cholesky factor of its Gram matrix.
    """
    gram, chain = e8_gram().double(), list(CHAIN)
    products = gram[chain] @ e8_levels()[1].T.double()  # (alpha_i, beta)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram[chain][:, chain]), products, upper=False)


@cache
def e7_symplectic():
    """The invariant form, (56, 56) int64: v_beta is paired with v_{theta - beta}, that is i with 55 - i."""
    weights = e8_levels()[1]
    return lattice_sign(weights, weights) * torch.eye(56, dtype=torch.int64, device="cpu").flip(0)


# ---------------------------------------------------------------------------------------------------------------------
# The coset.


def e7_coset(z):
    """L(z) as a matrix, z (..., 70) -> (..., 56, 56), of z's type: dense products, for tests and reference."""
    generators, L = e7_representation().to(z), (z[..., :7] @ e7_cartan().to(z)).exp().diag_embed()
    for end, n in zip(accumulate(SETS), SETS):
        N = torch.einsum("...n,nij->...ij", z[..., 7 + end - n : 7 + end], generators[end - n : end])
        N2 = N @ N / 2
        L = L @ (torch.eye(56).to(z) + N + N2 + N2 @ N / 3)  # N^4 = 0, and N^3 or N^2 = 0 already in smaller sets
    return L


@cache
def e7_hops():
    """The entries of N_k: (3, 756) int64: root in its set (+ n of them where the sign is -1), source, target.

    Sorted by set, then by level. A source's level is how many times N_k can have acted to reach it. One pass over the
    entries, level by level, gives the same as 2 or 3 passes, one per power of N_k.
    """
    hops, first = [], 0
    for n in SETS:
        generators = e7_representation()[first : first + n]
        entry = generators.nonzero().tolist()  # (root, target, source)
        level = [0] * 56
        for _ in range(3):
            for _, target, source in entry:
                level[target] = max(level[target], level[source] + 1)
        for a, target, source in sorted(entry, key=lambda e: (level[e[2]], e[1])):
            hops.append((a + n * int(generators[a, target, source] < 0), source, target))
        first += n
    return ints(hops).T.contiguous()


class Hop(torch.autograd.Function):
    """N v over these entries of N: y[target] += signed[root] v[source]; v and y (56, m, N), signed (2 n, 1, N).

    Backward gathers again: to allocate what autograd would keep takes several times as long as the arithmetic.
    """

    @staticmethod
    def forward(ctx, signed, v, entries):
        root, source, target = entries
        ctx.save_for_backward(signed, v, entries)
        moved = v.index_select(0, source) * signed.index_select(0, root)
        return torch.zeros_like(v).index_add_(0, target, moved)

    @staticmethod
    def backward(ctx, g):
        signed, v, entries = ctx.saved_tensors
        root, source, target = entries
        moved = g.index_select(0, target)
        to_v = torch.zeros_like(v).index_add_(0, source, moved * signed.index_select(0, root))
        to_signed = (moved * v.index_select(0, source)).sum(1, keepdim=True)
        return torch.zeros_like(signed).index_add_(0, root, to_signed), to_v, None


class TokensFirst(torch.autograd.Function):
    """(P, m, N) -> (N, m, P), with a gradient whose rows are long runs of memory again: autograd would pass a view."""

    @staticmethod
    def forward(ctx, x):
        return x.permute(2, 1, 0).contiguous()

    @staticmethod
    def backward(ctx, g):
        return g.permute(2, 1, 0).contiguous()


def e7_apply(z, v, hops, cartan):
    """L(z) v without building L: z (..., 70) and v (m, 56) -> (..., m, 56).

    hops and cartan are `e7_hops()` and `e7_cartan()` on z's device, cartan of its type. The cost per vector is
    729 products of gathered rows and one (56, 27) matrix product. Inside, tokens come last: a row is then contiguous.
    """
    shape, m = z.shape[:-1], len(v)
    h, *sets = z.flatten(0, -2).mT.contiguous().split((7, *SETS))  # (7, N) and (n, N) each
    signed = [torch.cat((n, -n))[:, None] for n in sets]
    one, two, three, four, five, five_2, six, six_2, _, seven_2, seven_3 = hops.split(ENTRIES, dim=1)

    # (1 + N + N^2 / 2 + N^3 / 6) v for set 7: all tokens share v, so N v is linear in z
    root, source, target = hops[:, -sum(ENTRIES[-3:]) :]
    terms = (1 - 2 * (root // 27))[:, None] * v.T[source]  # (324, m)
    N1 = v.new_zeros(56 * 27, m).index_add(0, 27 * target + root % 27, terms).view(56, 27, m)
    N1 = N1.mT @ sets[6]  # (56, m, N)
    N2 = Hop.apply(signed[6], N1, seven_2)
    x = v.T[:, :, None] + N1 + N2 / 2 + Hop.apply(signed[6], N1 / 2 + N2 / 6, seven_3)
    for n, level, level_2 in ((signed[5], six, six_2), (signed[4], five, five_2)):  # (1 + N + N^2 / 2) x
        N1 = Hop.apply(n, x, level)
        x = x + N1 + Hop.apply(n, x + N1 / 2, level_2)
    for n, level in zip(signed[3::-1], (four, three, two, one)):  # (1 + N) x
        x = x + Hop.apply(n, x, level)
    x = (cartan.mT @ h).exp()[:, None] * x
    return TokensFirst.apply(x).unflatten(0, shape)


# ---------------------------------------------------------------------------------------------------------------------
# The lattice: E7 = z / sqrt 2, z integer and mod 2 in the [7, 3, 4] code. Minimum norm 2, 126 nearest neighbours,
# normalised second moment 0.0732306. The nearest point: over the 8 cosets of (2 Z)^7, one rounding each.

# the 8 words: complements of the lines of the Fano plane, {i, i + 1, i + 3} mod 7, and the empty word
CODE = ((0,) * 7, *(tuple(int((j - i) % 7 not in (0, 1, 3)) for j in range(7)) for i in range(7)))


def e7_lattice_round(x):
    """The point of the E7 lattice (minimum norm 2) nearest to x (..., 7); in float32 or better, of x's type and shape.

    Nearest by Euclidean distance up to rounding; a tie goes to the first word and the even number.
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32)) * 2**0.5
    even = 2 * (z / 2).round()
    odd = 2 * ((z - 1) / 2).round() + 1
    more = (z - odd).square() - (z - even).square()  # the extra cost of an odd coordinate
    code = torch.tensor(CODE, dtype=torch.bool, device=x.device)
    word = code[(more[..., None, :] * code).sum(-1).argmin(-1)]  # (..., 7)
    return (torch.where(word, odd, even) / 2**0.5).to(x.dtype)
