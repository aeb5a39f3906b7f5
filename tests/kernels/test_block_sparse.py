"""The CPU path of block-sparse attention against its dense reference: results, gradients, compilation, memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from helpers import PATIENCE, ROOT
from kernels.block_sparse import Route, block_sparse, block_sparse_attention, block_sparse_backward, reference


def random_route(T, C, heads, density, generator):
    """C cells with random borders and a random relation: (C, C), or (*heads, C, C) if heads is not ()."""
    borders = torch.randperm(T - 1, generator=generator)[: C - 1] + 1  # the first position of each cell but the first
    cell = torch.zeros(T, dtype=torch.long).index_fill_(0, borders, 1).cumsum(0)
    return Route.from_cells(cell, torch.rand(*heads, C, C, generator=generator) < density)


def ring_route(T, size, rings=1):
    """Cells of `size` positions, each of which looks `rings` cells back."""
    cell = torch.arange(T) // size
    c = torch.arange(int(cell[-1]) + 1)
    return Route.from_cells(cell, (c[:, None] - c).abs() <= rings)


def dense_route(T, C):
    cell = torch.arange(T) * C // T
    return Route.from_cells(cell, torch.ones(C, C, dtype=torch.bool))


def qkv(B, H, T, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def output_gradient(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both_ways(function, inputs, route, dtype, seed=1, **kwargs):
    """[out, gradient of each input that is there] of `function` in `dtype`, for a fixed gradient of the output."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    q, k, v, *extra = leaves
    bias, row_bias = (*extra, None, None)[:2]
    out = function(q, k, v, route, bias=bias, row_bias=row_bias, **kwargs)
    grad = output_gradient(out.shape, seed).to(dtype)
    leaves = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients))]


@st.composite
def problems(draw):
    """(inputs q, k, v, bias, row_bias in float64, route, keyword arguments): every kind that the operator takes."""
    B, H, T = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 130))
    C, D = draw(st.integers(1, T)), draw(st.sampled_from([16, 32, 64]))
    heads = draw(st.sampled_from([(), (B, H)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    route = random_route(T, C, heads, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), generator)
    shape = draw(st.sampled_from([None, (C, C), (H, C, C), (B, H, C, C)]))
    row = draw(st.booleans())
    kwargs = {"activation": draw(st.sampled_from(["softmax", "sigmoid"])), "scale": draw(st.sampled_from([None, 0.3]))}
    sizes = [(B, H, T, D)] * 3 + [shape, (T,) if row else None]
    inputs = [None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    return inputs, route, kwargs


# -- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.slow
def test_forward_and_all_gradients(dtype, tolerance):
    @settings(max_examples=120, deadline=None)
    @given(problems())
    def check(problem):
        inputs, route, kwargs = problem
        ours = both_ways(block_sparse_attention, inputs, route, dtype, **kwargs)
        for got, want in zip(ours, both_ways(reference, inputs, route, torch.float64, **kwargs), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)

    check()


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([torch.bfloat16, torch.float16]))
@pytest.mark.slow
def test_half_types(problem, dtype):
    """Within two roundings of float64 on the same rounded inputs, relative to the largest number.

    A bias takes the sum of what its queries' rows give, which cancels: relative to the root of how many those are.
    Queries and keys take A (<dO, v> - <dO, O>), which cancels where A is near 1, and O is rounded: relative to the
    terms of <dO, O>.
    """
    inputs, route, kwargs = problem
    inputs = [None if x is None else x.to(dtype) for x in inputs]
    ours = both_ways(block_sparse_attention, inputs, route, dtype, **kwargs)
    exact = both_ways(reference, inputs, route, torch.float64, **kwargs)
    q, k, out = *inputs[:2], exact[0]
    terms = (out * output_gradient(out.shape)).abs().sum(-1).max() * (kwargs["scale"] or q.size(-1) ** -0.5)
    smallest = [0.1, terms * k.abs().max(), terms * q.abs().max(), 0.1] + 2 * [q[..., 0].numel() ** 0.5]
    for got, want, least in zip(ours, exact, smallest):
        assert got.dtype == dtype
        size = max(want.abs().max(), least)
        assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("kwargs", [{}, {"activation": "sigmoid"}, {"bias": torch.zeros(1, 2, 5, 5)}])
def test_autocast_of_the_caller_changes_nothing(kwargs):
    """The forward runs under bfloat16 autocast and the backward does not: with large scores they must still agree."""
    route, kwargs = dense_route(40, 5), dict(kwargs)
    bias = kwargs.pop("bias", None)
    q, k, v = qkv(1, 2, 40, 16, dtype=torch.bfloat16)
    inputs = [8 * q, 8 * k, v, bias]
    plain = both_ways(block_sparse_attention, inputs, route, torch.bfloat16, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = block_sparse_attention(*leaves, route, bias=bias, **kwargs)
    gradients = torch.autograd.grad(out, leaves, output_gradient(out.shape).to(out.dtype))
    for ours, want in zip([out, *gradients], plain):
        assert torch.equal(ours, want)


@pytest.mark.slow
def test_half_sums_do_not_stall():
    """A key of many small cells: its gradient is summed in float32, where bfloat16 would stop growing."""
    q, k, v = qkv(1, 1, 512, 16, dtype=torch.bfloat16)
    v.requires_grad_()
    route = dense_route(512, 512)
    grads = []
    for function, dtype in ((block_sparse_attention, torch.bfloat16), (reference, torch.float64)):
        out = function(0 * q.to(dtype), k.to(dtype), v.to(dtype), route)
        grads.append(torch.autograd.grad(out.sum(), v)[0].double())
    torch.testing.assert_close(grads[0], grads[1], atol=0, rtol=0.01)
    assert abs(grads[1][0, 0, 0, 0] - sum(1 / n for n in range(1, 513))) < 0.03


def test_dense_relation_is_causal_attention():
    inputs = qkv(2, 3, 97, 32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = F.scaled_dot_product_attention(*leaves, is_causal=True)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    want = [want, *torch.autograd.grad(want, leaves, grad)]
    for C in (1, 5, 97):
        for got, expected in zip(both_ways(block_sparse_attention, inputs, dense_route(97, C), torch.float32), want):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_queries_without_keys_give_zeros(activation, biased):
    allowed = torch.eye(4, dtype=torch.bool)
    allowed[2, 2] = False
    route = Route.from_cells(torch.arange(20) // 5, allowed)
    inputs = [*qkv(1, 2, 20, 16), torch.randn(4, 4) if biased else None]
    results = both_ways(block_sparse_attention, inputs, route, torch.float32, activation=activation)
    assert all(torch.isfinite(x).all() for x in results)
    assert all((x[:, :, 10:15] == 0).all() and (x[:, :, 15:] != 0).any() for x in results[:4])
    if biased:
        assert (results[4][~route.allowed] == 0).all()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**32))
def test_splitting_cells_changes_nothing(T, seed):
    """Cells cut in two that are related as before, both halves to each other, are the same attention."""
    generator = torch.Generator().manual_seed(seed)
    route = random_route(T, int(torch.randint(1, T, (), generator=generator)), (), 0.6, generator)
    C = len(route.starts) - 1
    relation = route.allowed.clone()
    at = int(torch.randint(1, T, (), generator=generator))
    while at in route.starts:
        at = at % (T - 1) + 1
    old = route.cell()
    parent = torch.tensor([*range(int(old[at]) + 1), *range(int(old[at]), C)])
    cell = old + (torch.arange(T) >= at)
    allowed = relation[parent][:, parent]
    inputs = qkv(1, 2, T, 16, seed)
    whole = both_ways(block_sparse_attention, inputs, route, torch.float64)
    for a, b in zip(whole, both_ways(block_sparse_attention, inputs, Route.from_cells(cell, allowed), torch.float64)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_transposed_inputs_and_gradients():
    """Views as attention makes them, and a gradient that is expanded from one number."""
    x = torch.randn(2, 50, 3 * 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    views = [t.view(2, 50, 3, 16).transpose(1, 2) for t in x.split(48, dim=2)]
    assert not any(t.is_contiguous() for t in views)
    route = ring_route(50, 7)
    for options in ({}, {"activation": "sigmoid"}, {"bias": torch.zeros(8, 8, dtype=torch.float64)}):
        got, want = (f(*views, route, **options) for f in (block_sparse_attention, reference))
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        got, want = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (got, want))
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.slow
def test_gradcheck(activation, per_head, biased):
    route = random_route(7, 3, (1, 2) if per_head else (), 0.7, torch.Generator().manual_seed(3))
    extra = [torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)] if biased else []
    inputs = [x.requires_grad_() for x in (*qkv(1, 2, 7, 4, dtype=torch.float64), *extra)]

    def attend(q, k, v, bias=None, row_bias=None):
        return block_sparse_attention(q, k, v, route, activation=activation, bias=bias, row_bias=row_bias)

    if biased and activation == "softmax":
        inputs.pop()  # a row's bias cancels, and gets no gradient at all
    assert torch.autograd.gradcheck(attend, inputs, check_undefined_grad=False)


@pytest.mark.slow
def test_undefined_gradients_are_zeros():
    """What gradcheck tries by default: a backward that is given no gradient at all."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 1, 5, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, ring_route(5, 2)), (q, k, v))


@pytest.mark.parametrize("kwargs", [{}, {"activation": "sigmoid"}, {"bias": torch.ones(7, 7)}])
def test_two_runs_are_equal_to_the_bit(kwargs):
    inputs = [*qkv(2, 2, 90, 32), kwargs.pop("bias", None)]
    one, two = (both_ways(block_sparse_attention, inputs, ring_route(90, 14, 2), torch.float32, **kwargs) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    route, (q, k, v) = ring_route(12, 4), qkv(2, 3, 12, 16)
    with pytest.raises(ValueError, match="agree"):
        block_sparse_attention(q, k[:, :, :11], v, route)
    with pytest.raises(ValueError, match="agree"):
        block_sparse_attention(q, k, v, ring_route(13, 4))
    with pytest.raises(ValueError, match="activation"):
        block_sparse_attention(q, k, v, route, activation="relu")


def test_other_types_are_refused():
    route, (q, k, v) = ring_route(12, 4), qkv(2, 3, 12, 16)
    for inputs in ((q, k.double(), v), (q.long(), k.long(), v.long())):
        with pytest.raises(ValueError, match="type"):
            block_sparse_attention(*inputs, route)


@pytest.mark.parametrize("shape", [(4, 4), (3,), (2, 3, 3), (3, 2, 3, 3)])
def test_biases_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="bias"):
        block_sparse_attention(*qkv(2, 3, 12, 16), ring_route(12, 4), bias=torch.zeros(shape))


@pytest.mark.parametrize("length", [1, 11, 13])
def test_row_biases_of_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="row_bias"):
        block_sparse_attention(
            *qkv(2, 3, 12, 16), ring_route(12, 4), activation="sigmoid", row_bias=torch.zeros(length)
        )


@pytest.mark.parametrize("heads", [(3, 2), (1, 3), (6, 1)])
def test_relations_of_other_heads_are_refused(heads):
    """(3, 2) has as many entries as the (2, 3) that was meant, in another order."""
    route = ring_route(12, 4)
    route = Route(route.starts, route.allowed.expand(*heads, 3, 3))
    with pytest.raises(ValueError, match="allowed"):
        block_sparse_attention(*qkv(2, 3, 12, 16), route)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "row_bias"])
def test_forward_mode_inputs_are_refused(which):
    """An operator without a forward-mode formula would return zero tangents without a word."""
    route = ring_route(12, 4)
    inputs = dict(zip("qkv", qkv(1, 1, 12, 16))) | {"bias": torch.zeros(3, 3), "row_bias": torch.zeros(12)}

    def attend(x):
        return block_sparse_attention(**inputs | {which: x}, route=route, activation="sigmoid")

    tangent = torch.ones_like(inputs[which])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        attend(forward_ad.make_dual(inputs[which], tangent))
    with pytest.raises(NotImplementedError):
        torch.func.jvp(attend, (inputs[which],), (tangent,))


def test_second_derivatives_are_refused():
    q = qkv(1, 1, 12, 16)[0].requires_grad_()
    out = block_sparse_attention(q, q, q, ring_route(12, 4))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


# -- the operators ----------------------------------------------------------------------------------------------------

CASES = {
    "softmax": ({}, ()),
    "sigmoid": ({"activation": "sigmoid", "row_bias": True}, ()),
    "bias": ({"bias": (3, 3)}, ()),
    "bias of each head": ({"bias": (3, 3, 3), "activation": "sigmoid"}, ()),
    "relation of each head": ({"bias": (2, 3, 3, 3)}, (2, 3)),
}


def case(name):
    """(q, k, v, route, keyword arguments) with every floating argument a leaf."""
    kwargs, heads = CASES[name]
    generator = torch.Generator().manual_seed(0)
    route = random_route(20, 3, heads, 0.8, generator)
    kwargs = {"activation": "softmax", "bias": None, "row_bias": None} | kwargs
    if kwargs["bias"] is not None:
        kwargs["bias"] = torch.randn(kwargs["bias"], generator=generator).requires_grad_()
    if kwargs["row_bias"] is not None:
        kwargs["row_bias"] = torch.randn(20, generator=generator).requires_grad_()
    return [x.requires_grad_() for x in qkv(2, 3, 20, 16)], route, kwargs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_opcheck(name):
    (q, k, v), route, kwargs = case(name)
    rest = (list(route.starts), route.allowed, kwargs["bias"], kwargs["row_bias"], 0.25, kwargs["activation"])
    torch.library.opcheck(block_sparse, (q, k, v, *rest))
    out, lse = (x.detach() for x in block_sparse(q, k, v, *rest))
    detached = [x.detach() if torch.is_tensor(x) else x for x in (q, k, v, out, lse, *rest)]
    torch.library.opcheck(block_sparse_backward, (torch.ones_like(out), *detached))


@pytest.mark.slow
def test_compiled_is_eager():
    """One graph each for a few kinds, and again for another length; inductor itself for the plain one."""
    for name in CASES:
        (q, k, v), route, kwargs = case(name)
        leaves = [q, k, v, *(b for b in (kwargs["bias"], kwargs["row_bias"]) if b is not None)]

        def step(q, k, v, bias, row_bias, route=route, activation=kwargs["activation"]):
            out = block_sparse_attention(
                2 * q, k, v, route.first(q.size(2)), activation=activation, bias=bias, row_bias=row_bias
            )
            return out.square().sum()

        torch._dynamo.reset()
        backend = "inductor" if name == "softmax" else "aot_eager"
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        args = (q, k, v, kwargs["bias"], kwargs["row_bias"])
        runs = [args, tuple(x[:, :, :19] for x in args[:3]) + (None, None)]
        for run in runs[: 1 + (name == "softmax")]:
            want, got = step(*run), compiled(*run)
            torch.testing.assert_close(got, want)
            for a, b in zip(*(torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (want, got))):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# -- the route --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_route_by_brute_force(data):
    T = data.draw(st.integers(1, 30))
    C, heads = data.draw(st.integers(1, T)), data.draw(st.sampled_from([(), (2, 3)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    route = random_route(T, C, heads, 0.5, generator)
    cell = [sum(s <= p for s in route.starts) - 1 for p in range(T)]
    assert route.cell().tolist() == cell and route.length == T
    mask = route.mask()
    assert mask.shape == (*heads, T, T)
    for i in range(T):
        for j in range(T):
            want = route.allowed[..., cell[i], cell[j]] if j <= i else torch.tensor(False)
            assert (mask[..., i, j] == want).all()
    assert torch.equal(route.keys_per_query(), mask.sum(-1))
    n = data.draw(st.integers(1, T))
    first, used = route.first(n), cell[n - 1] + 1
    again = Route.from_cells(torch.tensor(cell[:n]), route.allowed[..., :used, :used])
    assert first.starts == again.starts and torch.equal(first.allowed, again.allowed)
    assert torch.equal(first.mask(), mask[..., :n, :n])


def test_relations_to_later_cells_are_dropped():
    route = Route.from_cells(torch.tensor([0, 1, 1]), torch.ones(2, 2, dtype=torch.bool))
    assert route.allowed.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("cell", [[], [1, 2], [0, 2], [0, 1, 0], [0, -1], [-1, 0]])
def test_cells_that_are_no_runs_are_refused(cell):
    with pytest.raises(ValueError, match="runs"):
        Route.from_cells(torch.tensor(cell, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 4), (3,), (2, 3, 3), (1, 1, 1, 3, 3)])
def test_relations_of_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match="C = 3"):
        Route.from_cells(torch.tensor([0, 1, 1, 2]), torch.ones(shape, dtype=torch.bool))


def test_relations_that_are_not_bool_are_refused():
    with pytest.raises(ValueError, match="bool"):
        Route.from_cells(torch.tensor([0, 1]), torch.ones(2, 2))


@pytest.mark.parametrize("T", [-1, 0, 13])
def test_first_of_too_few_or_too_many(T):
    with pytest.raises(ValueError, match="12 positions"):
        ring_route(12, 4).first(T)


# -- memory -----------------------------------------------------------------------------------------------------------


def largest_allocation(function, inputs, route, **kwargs):
    """Bytes that the greediest operator of forward and backward keeps; sees what custom operators call inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        both_ways(function, inputs, route, torch.float32, **kwargs)
    return max(e.self_cpu_memory_usage for e in events.events())


@pytest.mark.parametrize("kwargs", [{}, {"activation": "sigmoid"}, {"bias": torch.zeros(64, 64)}])
@pytest.mark.slow
def test_nothing_is_as_large_as_the_mask(kwargs):
    T = 2048
    inputs = [*qkv(1, 1, T, 16), kwargs.pop("bias", None)]
    assert largest_allocation(block_sparse_attention, inputs, ring_route(T, 32), **kwargs) < T * T / 4  # bytes
    assert largest_allocation(reference, inputs, ring_route(T, 32), **kwargs) >= T * T  # the measure would see one


PEAK = """
import torch
from test_block_sparse import both_ways, qkv, ring_route
from kernels.block_sparse import block_sparse_attention

def high_water():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
peaks = []
both_ways(block_sparse_attention, qkv(1, 8, 256, 64), ring_route(256, 128), torch.float32, **KWARGS)
before = high_water()
for T in (4096, 8192):
    both_ways(block_sparse_attention, qkv(1, 8, T, 64), ring_route(T, 128), torch.float32, **KWARGS)
    peaks.append(high_water() - before)
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark of Linux")
@pytest.mark.parametrize("kwargs", [{}, {"activation": "sigmoid"}])
@pytest.mark.slow
def test_peak_memory_is_linear(kwargs):
    """Twice the length, forward and backward: at most 2.2 times the memory."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    run = subprocess.run(
        [sys.executable, "-c", PEAK.replace("KWARGS", repr(kwargs))],
        capture_output=True, text=True, timeout=PATIENCE, cwd=Path(__file__).parent, env=env,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    short, long = map(int, run.stdout.split())
    assert short > 30_000 and long <= 2.2 * short  # kilobytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "activation, biased", [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)]
)
@pytest.mark.slow
def test_fake_backward_has_the_real_types(dtype, activation, biased):
    """Half types are widened inside; what comes out, empty gradients included, must be as compiled code expects it."""
    q = torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    route = Route.from_cells(torch.arange(12) // 4, torch.ones(3, 3, dtype=torch.bool))
    bias = torch.ones(3, 3) if biased else None
    row_bias = torch.ones(12) if biased and activation == "sigmoid" else None
    rest = (list(route.starts), route.allowed, bias, row_bias, 0.25, activation)
    out, lse = torch.ops.nanochimera.block_sparse(q, q.clone(), q.clone(), *rest)
    torch.library.opcheck(
        torch.ops.nanochimera.block_sparse_backward, (q.clone(), q, q.clone(), q.clone(), out, lse, *rest)
    )
