"""E7 in integers, its coset and lattice, manifolds and spectral coordinates, against brute force and other packages."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import FIXTURES
from kernels.e7 import e7_symplectic, e7_weights, e8_gram, e8_levels, lattice_sign
from model import (
    E7_SETS,
    E7_STAGES,
    ManifoldProjection,
    Pass,
    SpectralDecomposition,
    e7_apply,
    e7_cartan,
    e7_coset,
    e7_hops,
    e7_lattice_round,
    e7_representation,
    e7_roots,
    manifold_point,
    path_bending,
    rotation,
)
from train import curriculum, tokens_before

OTHERS = json.loads((FIXTURES / "e7.json").read_text())  # what other packages say: tests/fixtures/make_e7.py
MANIFOLDS = ("sphere", "e7", "rotor")
E, ROOTS, WEIGHTS = e7_representation(), e7_roots(), e7_weights()
OMEGA = e7_symplectic()
CARTAN = torch.stack([(h * 2).diag().double() for h in e7_cartan() / 2])  # (7, 56, 56)


def config(manifold="sphere", **flags):
    defaults = {"n_embd": 16, "bias": True, "manifold_dim": 6, "manifold_vectors": 2, "geodesic_weight": 0.1,
                "n_eigenvectors": 4, "spectral_landmarks": 12, "spectral_refresh": 3}  # fmt: skip
    return SimpleNamespace(**{"manifold_at": "embedding"} | defaults | flags, manifold=manifold)


def uniform(*shape, dtype=torch.float64, seed=0, most=1.0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1) * most


def commutator(a, b):
    return a @ b - b @ a


# Roots and generators -----------------------------------------------------------------------------------------------


def test_roots_are_e7():
    """126 roots of one length, closed under reflection, of rank 7, all orthogonal to the weights' common part theta."""
    assert ROOTS.shape == (126, 8) and len(ROOTS.unique(dim=0)) == 126 and ROOTS.dtype == torch.int64
    inner = ROOTS @ ROOTS.T // 4
    assert (inner.diagonal() == 2).all() and torch.linalg.matrix_rank(ROOTS.double()) == 7
    counts = torch.bincount(inner[0] + 2)
    assert counts.tolist() == [1, 32, 60, 32, 1]  # a root of E7 sees 32 at 60 degrees
    reflected = ROOTS[:, None] - inner[:, :, None] * ROOTS[None]
    assert len(torch.cat((ROOTS, reflected.flatten(0, 1))).unique(dim=0)) == 126
    assert torch.equal(ROOTS[63:], -ROOTS[:63])
    theta = WEIGHTS[0] + WEIGHTS[-1]
    assert WEIGHTS.shape == (56, 8) and not (ROOTS @ theta).any() and (WEIGHTS @ theta == 4).all()


def test_roots_are_those_of_mutation_game():
    """The same roots in simple-root coordinates, once its seven nodes are matched with ours by the diagram."""
    theirs = torch.tensor(OTHERS["roots"])
    ours = torch.cat((e8_levels()[0], -e8_levels()[0]))[:, :7]
    assert len(theirs) == 126
    path, side = [0, 2, 3, 4, 5, 6], 1  # Bourbaki's nodes 1, 3, 4, 5, 6, 7 and 2
    orders = ([*path, side], [*path[::-1], side])
    assert any(set(map(tuple, theirs.tolist())) == set(map(tuple, ours[:, order].tolist())) for order in orders)


def test_sign_is_bimultiplicative_and_antisymmetric_enough():
    roots = torch.cat((e8_levels()[0], e8_levels()[1]))
    a, b, c = roots[::7], roots[::5], roots[::11]
    total = (b[:, None] + c[None]).flatten(0, 1)
    both = (lattice_sign(a, b)[:, :, None] * lattice_sign(a, c)[:, None]).flatten(1)
    assert torch.equal(lattice_sign(a, total), both)
    assert torch.equal(lattice_sign(total, a), (lattice_sign(b, a)[:, None] * lattice_sign(c, a)[None]).flatten(0, 1))
    assert (lattice_sign(roots, roots).diagonal() == -1).all()  # (-1)^{(a, a) / 2}


def test_generators():
    assert ((E != 0).sum((1, 2)) == 12).all() and E.abs().max() == 1 and not (E @ E).any()
    assert torch.equal(E[63:], -E[:63].mT)


@pytest.mark.slow
def test_commutators_close():
    """[E_a, E_b] = eps E_{a+b}, or minus the coroot of a where b = -a, or 0: of every fifth root with all."""
    place = {tuple(r): i for i, r in enumerate(ROOTS.tolist())}
    simple = torch.cat((e8_levels()[0], -e8_levels()[0]))
    sign = lattice_sign(simple, simple)
    products = E.double()  # exact: entries are small integers
    for i in range(0, 126, 5):
        C = products[i] @ products - products @ products[i]
        for j in range(126):
            k = place.get(tuple((ROOTS[i] + ROOTS[j]).tolist()))
            if k is not None:
                assert torch.equal(C[j], sign[i, j] * products[k])
            elif (i - j) % 126 == 63:
                assert torch.equal(C[j], -(WEIGHTS @ ROOTS[i] // 4).diag().double())
            else:
                assert not C[j].any()


def test_dimension_is_133_of_which_63_are_compact():
    basis = torch.cat((E.double(), CARTAN)).flatten(1)
    assert torch.linalg.matrix_rank(basis) == 133
    matrices = basis.view(-1, 56, 56)
    assert torch.linalg.matrix_rank((matrices - matrices.mT).flatten(1)) == 63  # su(8)
    assert torch.linalg.matrix_rank((matrices + matrices.mT).flatten(1)) == 70


def test_algebra_is_that_of_dhl_mm():
    """As many structure constants as that package has, in a basis of simple coroots, and a Killing form like its."""
    other = OTHERS["algebra"]
    basis = torch.cat((E.double(), CARTAN))
    ours = torch.linalg.eigvalsh(torch.einsum("aij,bji->ab", basis, basis)) > 0
    assert other["dim"] == 133 and other["n_roots"] == 126 and ours.sum() == other["positive"] == 70  # the split form
    pairs = sum(int(((ROOTS @ r // 4) == -1).sum()) for r in ROOTS)  # [E_a, E_b] = +-E_{a+b}
    positive = e8_levels()[0][:, :7]
    heights = (positive != 0).sum(), (positive @ e8_gram()[:7, :7] != 0).sum()  # coroots; [h_i, E_a] and [E_a, h_i]
    assert other["n_structure_constants"] == pairs + 2 * heights[0] + 4 * heights[1]


def test_jacobi():
    a, b, c = (torch.cat((E.double(), CARTAN))[uniform(133, seed=s).argsort()] for s in (1, 2, 3))
    total = sum(commutator(x, commutator(y, z)) for x, y, z in ((a, b, c), (b, c, a), (c, a, b)))
    assert total.abs().max() < 1e-12  # true of matrices: what it tests is that products of these are exact
    adjoint = torch.einsum("aij,bji->ab", torch.cat((E.double(), CARTAN)), torch.cat((E.double(), CARTAN)))
    assert torch.linalg.matrix_rank(adjoint) == 133  # semisimple


def test_symplectic_form_is_invariant_and_the_only_one():
    assert torch.equal(OMEGA, -OMEGA.T) and (OMEGA.abs().sum(0) == 1).all()
    assert not (E.mT @ OMEGA + OMEGA @ E).any()
    # weights must cancel, so a form can only pair i with 55 - i: 56 unknowns, and E_a^T F + F E_a = 0 links them
    linked = torch.zeros(56, 56, dtype=torch.bool)  # F_i = 0 or not together: one component is one dimension
    for target, source in (E[:63] != 0).any(0).nonzero().tolist():
        linked[source, target] = linked[target, source] = True
    assert (torch.linalg.matrix_power(linked.double() + torch.eye(56), 56) > 0).all()


def e8_bracket(levels):
    """The signs of [e_a, e_b] = eps e_{a+b}, and the place of each root."""
    place = {tuple(r): i for i, r in enumerate(levels.tolist())}
    return place, lattice_sign(levels, levels)


def quartic(x):
    """Cartan's invariant of x (..., 56), up to a factor: the moment map Omega(x, T_a x), squared in the Killing form.

    Root vectors pair with their negatives, (E_a, E_-a) = -12 / 12, and the orthonormal Cartan elements with themselves.
    """
    omega, up, down = OMEGA.to(x), E[:63].to(x), E[63:].to(x)
    moment = torch.einsum("...i,aij,...j->...a", x, omega @ up, x) * torch.einsum(
        "...i,aij,...j->...a", x, omega @ down, x
    )
    cartan = torch.einsum("...i,aij,...j->...a", x, omega @ CARTAN.to(x), x)
    return cartan.square().sum(-1) - 2 * moment.sum(-1)


def quartic_of_e8(x):
    """The same from E8 alone: (ad x)^4 takes e_{-theta} to a multiple of e_theta; x (56,)."""
    positive, weights = e8_levels()
    theta = (weights[:1] + weights[-1:])[0]
    levels = torch.cat((-theta[None], weights - theta, positive, -positive, weights, theta[None]))
    place, sign = e8_bracket(levels)
    lowest, first = 0, 1 + 56 + 126
    state, cartan = torch.zeros(240, dtype=x.dtype), torch.zeros(8, dtype=x.dtype)  # a root vector each, and h
    state[lowest] = 1
    pairing = (levels @ e8_gram()).to(x)  # (root, h) for h in simple-coroot coordinates
    for _ in range(4):
        new, new_cartan = torch.zeros_like(state), torch.zeros_like(cartan)
        for b in range(56):
            i = first + b
            new[i] -= x[b] * (pairing[i] @ cartan)  # [e_i, h] = -(i, h) e_i
            for j in state.nonzero()[:, 0].tolist():
                total = tuple((levels[i] + levels[j]).tolist())
                if total in place:
                    new[place[total]] += x[b] * sign[i, j] * state[j]
                elif not any(total):
                    new_cartan -= x[b] * state[j] * levels[i].to(x)  # eps(a, a) = -1
        state, cartan = new, new_cartan
    return state[-1]


@pytest.mark.slow
def test_quartic_invariant():
    """Kept by every generator, zero on a highest-weight orbit, and E8's own (ad x)^4 up to one factor."""
    x = uniform(3, 56, seed=4).requires_grad_()
    (grad,) = torch.autograd.grad(quartic(x).sum(), x)
    moved = torch.einsum("bi,aij,bj->ba", grad, torch.cat((E.double(), CARTAN)), x)
    assert moved.abs().max() < 1e-10 * grad.norm() and quartic(x).abs().min() > 1e-2
    assert quartic(torch.eye(56, dtype=torch.float64)).abs().max() < 1e-12
    ratio = torch.stack([quartic_of_e8(row) for row in x.detach()]) / quartic(x).detach()
    assert (ratio / ratio[0] - 1).abs().max() < 1e-9


# The coset ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_seven_sets():
    """Sizes, commuting, the powers that vanish, and that set k with its chain spans the roots of the k-th group."""
    assert E7_SETS == (1, 2, 3, 4, 10, 16, 27) and E7_STAGES == (2, 5, 9, 14, 25, 42, 70)
    first, last_power = 0, []
    for n in E7_SETS:
        part = E[first : first + n]
        assert not (part[:, None] @ part[None] - part[None] @ part[:, None]).any()
        N = torch.einsum("n,nij->ij", torch.arange(1, n + 1), part)
        power = next(p for p in range(1, 9) if not torch.linalg.matrix_power(N.double(), p).any())
        last_power.append(power)
        first += n
        closed = ROOTS[:first]
        inner = {tuple(r) for r in torch.cat((closed, -closed)).tolist()}
        sums = (closed[:, None] - closed[None]).flatten(0, 1)
        assert all(tuple(s) in inner for s in sums.tolist() if sum(v * v for v in s) == 8)
    assert last_power == [2, 2, 2, 2, 3, 3, 4]


def test_cartan_is_orthonormal_and_follows_the_chain():
    inner = e7_cartan() @ e7_cartan().T / 12  # the trace form on the 56 is 12 times the roots' form
    assert (inner - torch.eye(7)).abs().max() < 1e-12
    simple = [0, 1, 3, 6, 10, 20, 36]
    highest = [(E[first].double() @ CARTAN - CARTAN @ E[first].double()).abs().amax((1, 2)) for first in simple]
    for k, touched in enumerate(
        highest
    ):  # the root that group k adds commutes with the Cartan elements of later groups
        assert touched[k] > 0.1 and (touched[k + 1 :] < 1e-12).all()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 99))
def test_apply_is_the_matrix(shape, m, seed):
    z, v = uniform(*shape, 70, seed=seed), uniform(m, 56, seed=seed + 1)
    wanted = torch.einsum("...ij,mj->...mi", e7_coset(z), v)
    assert (e7_apply(z, v, e7_hops(), e7_cartan()) - wanted).abs().max() < 1e-11


def test_coset_is_the_exponentials():
    """Against torch.matrix_exp of the sums, factor by factor."""
    z = uniform(70, seed=3)
    L, first = torch.linalg.matrix_exp(torch.einsum("n,nij->ij", z[:7], CARTAN)), 0
    for n in E7_SETS:
        N = torch.einsum("n,nij->ij", z[7 + first : 7 + first + n], E[first : first + n].double())
        L, first = L @ torch.linalg.matrix_exp(N), first + n
    assert (L - e7_coset(z)).abs().max() < 1e-11 and not e7_coset(z).triu(1).any()


def test_apply_gradients():
    z, v = uniform(2, 70).requires_grad_(), uniform(2, 56, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, v: e7_apply(z, v, e7_hops(), e7_cartan()), (z, v), fast_mode=True)
    (grad,) = torch.autograd.grad(e7_apply(z, v, e7_hops(), e7_cartan()).sin().sum(), z)
    (wanted,) = torch.autograd.grad(torch.einsum("...ij,mj->...mi", e7_coset(z), v).sin().sum(), z)
    assert (grad - wanted).abs().max() < 1e-9


def unlike_omega(L):
    """The largest entry of L^T omega L - omega, in units of what is multiplied: rounding of 56 terms of that size."""
    omega = OMEGA.to(L.dtype)
    return (L.mT @ omega @ L - omega).abs().max() / (L.mT.abs() @ omega.abs() @ L.abs()).max()


def test_group_elements_in_float32():
    """Symplectic and quartic to 1e-5 of what is multiplied, for random |z_i| <= 1 and in the corner of ones."""
    z = uniform(100, 70, dtype=torch.float32)
    hops, cartan = e7_hops(), e7_cartan().float()
    L = e7_apply(z, torch.eye(56), hops, cartan).mT
    assert unlike_omega(L) < 1e-5
    x = uniform(56, dtype=torch.float32, seed=5)
    moved = e7_apply(z[:20], x[None], hops, cartan)[:, 0].double()
    scale = moved.norm(dim=-1) ** 4  # what cancels
    assert ((quartic(moved) - quartic(x.double())).abs() / scale).max() < 1e-5
    assert unlike_omega(e7_coset(torch.ones(70))) < 1e-5
    exact = e7_coset(torch.ones(70, dtype=torch.float64))
    assert (exact.mT @ OMEGA.double() @ exact - OMEGA).abs().max() < 1e-9


def distance(L, K):
    """|log(M_L^-1 M_K)|, M = L^T L: of SU(8) L and SU(8) K."""
    ratio = K @ torch.linalg.inv(L)
    return torch.linalg.eigvalsh(ratio.mT @ ratio).log().square().sum(-1).sqrt()


def test_distance_is_that_of_a_symmetric_space():
    a, b, c = e7_coset(uniform(3, 70, most=0.5))
    one = torch.eye(56, dtype=torch.float64)
    compact = torch.linalg.matrix_exp(torch.einsum("n,nij->ij", uniform(63, seed=8), (E[:63] + E[63:]).double()))
    assert (compact @ compact.T - one).abs().max() < 1e-12
    assert distance(a, compact @ a) < 1e-6 and abs(distance(a, b) - distance(b, a)) < 1e-9  # a point, symmetric
    assert abs(distance(a @ c, b @ c) - distance(a, b)) < 1e-9  # the group moves points without stretching
    assert distance(a, c) < distance(a, b) + distance(b, c)
    H = torch.einsum("n,nij->ij", uniform(70, seed=9)[:63], (E[:63] - E[63:]).double()) / 9
    steps = [distance(one, torch.linalg.matrix_exp(t * H)) for t in (0.5, 1.0, 2.0)]
    assert abs(steps[0] - steps[1] / 2) < 1e-9 and abs(steps[2] - 2 * steps[1]) < 1e-9  # a geodesic
    assert abs(steps[1] - 2 * H.norm()) < 1e-9
    logs = torch.linalg.eigvalsh(a.T @ a).log()
    assert (logs + logs.flip(0)).abs().max() < 1e-9  # symplectic: eigenvalues come as pairs r, 1 / r


def test_stages_are_subgroups():
    """The product of two elements of a stage lies in that stage: its last coordinates stay 0."""
    for k, dims in enumerate(E7_STAGES[:-1], 1):
        module = ManifoldProjection(config("e7"))
        module.set_stage(k - 1)
        assert module.active.sum() == dims
        a, b = e7_coset(uniform(2, 70, seed=k) * module.active)
        out = E[sum(E7_SETS[:k]) : 63].double()  # generators beyond: no component of log(a b) along them
        moved = a @ b
        nothing = (out != 0).any(0) & ~(E[: sum(E7_SETS[:k])] != 0).any(0)
        inside = torch.linalg.matrix_power((E[: sum(E7_SETS[:k])] != 0).any(0).double() + torch.eye(56), 56) > 0
        assert nothing.any() and moved[~inside].abs().max() < 1e-12


# The lattice --------------------------------------------------------------------------------------------------------


def test_lattice_is_e7():
    """126 nearest neighbours at norm 2 that span the E7 roots' Gram matrix; closed under addition; points are fixed."""
    z = torch.cartesian_prod(*[torch.arange(-2, 3)] * 7).double() / 2**0.5
    short = z[((z * 2**0.5).square().sum(-1) <= 4)]
    fixed = short[(e7_lattice_round(short) - short).abs().amax(-1) < 1e-9]
    norms = fixed.square().sum(-1).round().long().bincount()
    assert norms.tolist() == [1, 0, 126]
    roots = fixed[fixed.square().sum(-1) > 1]
    inner = (roots @ roots.T).round()
    assert inner[0].long().add(2).bincount().tolist() == [1, 32, 60, 32, 1]
    sums = (roots[:, None] + roots[None]).flatten(0, 1)
    assert (e7_lattice_round(sums) - sums).abs().max() < 1e-9
    x = uniform(200, 7, most=3.0)
    q = e7_lattice_round(x)
    others = (q[:, None] + roots[None] - x[:, None]).square().sum(-1)  # Voronoi cell: no neighbour is nearer
    assert ((q - x).square().sum(-1)[:, None] <= others + 1e-12).all()


@pytest.mark.slow
def test_second_moment():
    """0.0732306 after Conway & Sloane, by Monte Carlo over a period (sqrt 2)^7; volume of a cell sqrt 2."""
    x = torch.rand(400_000, 7, generator=torch.Generator().manual_seed(0)) * 2**0.5
    error = (x - e7_lattice_round(x)).square().sum(-1).double() / 7 / 2 ** (1 / 7)
    assert abs(error.mean() - 0.0732306) < 4 * error.std() / len(x) ** 0.5 < 2e-4


def test_lattice_agrees_with_fpylll():
    assert OTHERS["rank"] == 7 and len(OTHERS["nearest"]) == 40
    for x, wanted in OTHERS["nearest"]:  # in thousandths of sqrt(2) E7
        got = e7_lattice_round(torch.tensor(x).double() / 1000 / 2**0.5) * 2**0.5 * 1000
        assert (got - torch.tensor(wanted)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lattice_keeps_type_and_shape(dtype):
    x = uniform(2, 3, 7, most=5.0).to(dtype)
    q = e7_lattice_round(x)
    assert q.dtype == dtype and q.shape == x.shape
    assert (e7_lattice_round(x[1, 2]) == q[1, 2]).all()


# Manifolds ----------------------------------------------------------------------------------------------------------


def test_rotor_acts_as_its_spinors_do():
    """R e_k = the rotor's sandwich of gamma_k, with 16 x 16 gamma matrices made here from Pauli matrices."""
    X, Y, Z, one = (torch.tensor(m, dtype=torch.complex128) for m in (
        [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]], [[1, 0], [0, 1]]))  # fmt: skip
    gammas = []
    for n in range(4):
        for P in (X, Y):
            g = torch.ones(1, 1, dtype=torch.complex128)
            for factor in [Z] * n + [P] + [one] * (3 - n):
                g = torch.kron(g, factor)
            gammas.append(g)
    angles, spinor = uniform(28, most=3.0), torch.eye(16, dtype=torch.complex128)
    for r in range(7):
        for n, (i, j) in enumerate([(7, r), *(((r + k) % 7, (r - k) % 7) for k in (1, 2, 3))]):
            half = angles[4 * r + n] / 2
            rotor = half.cos() * torch.eye(16, dtype=torch.float64) + half.sin() * gammas[j] @ gammas[i]
            spinor = rotor @ spinor
    R = rotation(angles[None])[0]
    for k in range(8):
        image = sum(R[i, k] * gammas[i] for i in range(8))
        assert (spinor @ gammas[k] @ spinor.conj().T - image).abs().max() < 1e-12
    assert (R @ R.T - torch.eye(8)).abs().max() < 1e-12 and abs(torch.linalg.det(R) - 1) < 1e-12


def test_rotor_features_are_the_rotated_matrices():
    module = ManifoldProjection(config("rotor")).double()
    u = uniform(2, 3, 28)
    X, (i, j) = torch.zeros(4, 8, 8, dtype=torch.float64), torch.triu_indices(8, 8, 1)
    X[:, i, j] = module.vectors.detach().view(4, 28)
    R = rotation(u)[:, :, None]
    wanted = (R @ (X - X.mT) @ R.mT)[..., i, j].flatten(-2)
    assert (module.features(manifold_point(u, "rotor")) - wanted).abs().max() < 1e-12


def test_bend_is_zero_on_geodesics_only():
    t = torch.linspace(0, 1.5, 7, dtype=torch.float64)[:, None]
    circle = torch.cat((t.cos(), t.sin(), 0 * t), 1)[None]
    plane = torch.zeros(7, 28, dtype=torch.float64)
    plane[:, 5] = t[:, 0]
    line = (t * uniform(70))[None] / 2
    paths = {"sphere": circle, "rotor": manifold_point(plane, "rotor")[None], "e7": line}
    for manifold, path in paths.items():
        assert path_bending(path, manifold) < 1e-20
        assert path_bending(path[:, [0, 1, 2, 2, 4, 5]], manifold) > 1e-3  # a stop on the way
        assert path_bending(path[:, :2], manifold) == 0
    small = torch.stack((t.cos() / 2, t.sin() / 2, 0 * t + 0.75**0.5), 1)[None, :, :, 0]
    assert path_bending(small, "sphere") > 1e-4  # a small circle is no geodesic


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projection(manifold, dtype):
    """Shapes, types, nothing at the gate's start, points where they belong, tokens on their own, gradients."""
    torch.manual_seed(0)
    module, x = ManifoldProjection(config(manifold)).to(dtype), uniform(3, 9, 16).to(dtype)
    y, point = module(x)
    assert y.shape == x.shape and y.dtype == dtype and not y.any()
    P = {"sphere": 6, "e7": 70, "rotor": 64}[manifold]
    assert point.shape == (3, 9, P) and point.dtype == torch.promote_types(dtype, torch.float32)
    if manifold == "sphere":
        assert (point.norm(dim=-1) - 1).abs().max() < 1e-5
    with torch.no_grad():
        module.gate.fill_(0.5)
    y, point = module(x)
    run = Pass(targets=x, training=True)
    module.add_losses(point, run)
    weight, bending = run.losses["geodesic"]
    assert weight == 0.1 and bending.shape == ()
    (y.float().square().sum() + bending).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    again, _ = module.eval()(torch.cat((x[:, :4], -x[:, 4:]), 1))
    assert torch.equal(again[:, :4], y[:, :4]) and not torch.equal(again[:, 4:], y[:, 4:])
    assert (module(x[1:2, 3:4])[0] - y[1:2, 3:4]).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_autocast_leaves_the_points_alone(manifold):
    torch.manual_seed(0)
    module, x = ManifoldProjection(config(manifold)).eval(), uniform(2, 5, 16, dtype=torch.float32)
    u = module.c_point(module.ln(x))
    with torch.autocast("cpu", torch.bfloat16):
        point = module(x)[1]
    assert point.dtype == torch.float32 and (point - manifold_point(u, manifold)).abs().max() < 0.02


@pytest.mark.slow
def test_compiles_forward_and_backward():
    for manifold in ("e7",):  # the others are in the table of variants
        torch.manual_seed(0)
        module, spectral = ManifoldProjection(config(manifold)), SpectralDecomposition(config(manifold))
        module.gate.data.fill_(0.5)
        x = uniform(2, 6, 16, dtype=torch.float32)

        def f(x, module=module, spectral=spectral):
            y, point = module(x)
            return y.sum() + path_bending(point, module.manifold) + spectral(point).square().sum()

        torch._dynamo.reset()
        params = [*module.parameters(), *spectral.parameters()]
        grads = [torch.autograd.grad(g(x), params) for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))]
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(*grads))


# Spectra ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_coordinates_at_the_landmarks_are_the_eigenvectors(manifold):
    """Nystrom is exact there: (I - D^-1 W) psi = (1 - lambda) psi, W by hand, and psi is orthonormal by degree."""
    torch.manual_seed(1)
    spectral = SpectralDecomposition(config(manifold)).double()
    spectral.refresh()
    y = manifold_point(spectral.landmarks.detach(), manifold)
    psi = spectral(y).detach()
    W = torch.exp(-(y[:, None] - y[None]).square().sum(-1) * spectral.width / 2)
    P = W / W.sum(1, keepdim=True)
    mu = 1 - torch.linalg.eigvals(P).real.sort(descending=True).values
    assert mu[0].abs() < 1e-9 and (psi - P @ psi - psi * mu[1:5]).abs().max() < 1e-6
    weight = W.sum(1) / W.sum()
    assert ((psi.T * weight) @ psi - torch.eye(4)).abs().max() < 1e-6 and (weight @ psi).abs().max() < 1e-6


def test_two_communities_are_told_apart():
    """Landmarks in two clusters: the first coordinate has one sign in each, of points that are no landmarks too."""
    spectral = SpectralDecomposition(config(n_eigenvectors=1))
    torch.manual_seed(0)
    centres = torch.eye(6)[:2].repeat_interleave(6, 0)
    with torch.no_grad():
        spectral.landmarks.copy_(centres + 0.2 * torch.randn(12, 6))
    spectral.refresh()
    new = spectral(manifold_point(centres + 0.2 * torch.randn(12, 6), "sphere"))[:, 0].sign()
    assert (new[:6] == new[0]).all() and (new[6:] == -new[0]).all()


def test_refresh_is_counted_deterministic_and_keeps_signs():
    torch.manual_seed(0)
    spectral = SpectralDecomposition(config())
    optimizer = torch.optim.SGD(spectral.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: spectral.before_step())
    before, changed = spectral.basis.clone(), []
    for _ in range(6):
        spectral(manifold_point(uniform(1, 5, 6, dtype=torch.float32), "sphere")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed.append(not torch.equal(before, spectral.basis))
        assert ((before * spectral.basis).sum(0) >= 0).all()
        before = spectral.basis.clone()
    assert changed == [False, False, True, False, False, True]
    twin = SpectralDecomposition(config())
    twin.load_state_dict(spectral.state_dict())
    assert int(twin.steps) == 6
    twin.refresh(), spectral.refresh()
    assert torch.equal(twin.basis, spectral.basis)


@given(st.integers(2, 40), st.integers(1, 6), st.sampled_from(MANIFOLDS))
@settings(max_examples=15, deadline=None)
def test_spectral_coordinates_stay_finite(landmarks, n, manifold):
    """Any sizes, landmarks that all coincide, points far away."""
    spectral = SpectralDecomposition(
        config(manifold, spectral_landmarks=landmarks, n_eigenvectors=min(n, landmarks - 1))
    )
    with torch.no_grad():
        spectral.landmarks.copy_(spectral.landmarks[:1].expand_as(spectral.landmarks).clone())
    spectral.refresh()
    P = {"sphere": 6, "e7": 70, "rotor": 64}[manifold]
    assert torch.isfinite(spectral(uniform(2, 3, P, dtype=torch.float32, most=100.0))).all()


# Curriculum ---------------------------------------------------------------------------------------------------------


def test_curriculum_stages():
    seen = [curriculum(i, 256, 700, "e7") for i in range(0, 800, 100)]
    assert [stage for _, stage in seen] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [T for T, _ in seen] == [16, 25, 40, 64, 102, 161, 256, 256]
    assert curriculum(99, 256, 700, "e7") == seen[0] and curriculum(10**9, 256, 700, "e7") == (256, 6)
    assert [curriculum(i, 256, 700, "length") for i in range(0, 800, 100)] == seen
    assert curriculum(0, 256, 700, "") == (256, 6) == curriculum(0, 256, 0, "e7")


@given(st.integers(0, 60), st.integers(1, 300), st.integers(0, 40), st.sampled_from(["", "e7", "length"]))
def test_tokens_are_counted(iteration, block_size, iters, kind):
    wanted = sum(4 * curriculum(i, block_size, iters, kind)[0] for i in range(iteration))
    assert tokens_before(iteration, 4, block_size, iters, kind) == wanted
    lengths = [curriculum(i, block_size, iters, kind) for i in range(iteration)]
    assert lengths == sorted(lengths) and all(1 <= T <= block_size for T, _ in lengths)
