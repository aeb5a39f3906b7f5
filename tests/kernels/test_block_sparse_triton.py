"""
The Triton path of block-sparse attention, without a GPU: its numbers under Triton's interpreter, and its machine code.

The interpreter is chosen when the kernels are imported, for the whole process, so groups of checks run in their own:
this file, as a script, with TRITON_INTERPRET=1, the device and the names of checks. tests/test_cuda.py runs them on a
GPU, compiled.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kernels.block_sparse import Route, reference, torch_forward

has_triton = importlib.util.find_spec("triton") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_triton, reason="triton is not installed")]

CHECKS = {}  # name: a function that runs under the interpreter


def interpreted(check):
    CHECKS[check.__name__] = check
    return check


@pytest.mark.parametrize("names", ["softmax per_head", "sigmoid low_precision", "corners contracts", "repeats lists"])
def test_interpreted(cli, names):
    done = cli("tests/kernels/test_block_sparse_triton.py", "cpu", *names.split(), env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Run by the interpreter.


def route_of(lengths, allowed):
    return Route.from_cells(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), allowed)


def related(*shape):
    """A random relation in which the last cell is seen by none and the one before it sees none."""
    allowed = torch.rand(*shape) < 0.6
    allowed[..., :, -1] = False
    allowed[..., -2:-1, :] = False
    return allowed


def run_both(dtype, D, route, activation="softmax", bias=None, row_bias=None, scale=None, B=1, H=2):
    """(results of the Triton path, results of the float64 reference): out, dq, dk, dv and what else there is."""
    from kernels.block_sparse_triton import triton_backward, triton_forward

    T, scale = route.length, D**-0.5 if scale is None else scale
    q, k, v, grad = (torch.randn(B, T, H, D).to(dtype).transpose(1, 2) for _ in range(4))
    rest = route.starts, route.allowed, bias, row_bias, scale, activation
    out, lse = triton_forward(q, k, v, *rest)
    assert out.is_contiguous() and out.dtype == dtype and lse.shape == (B, H, T if activation == "softmax" else 0)
    gradients = triton_backward(grad, q, k, v, out, lse, *rest)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    extra = [None if b is None else b.double().requires_grad_() for b in (bias, row_bias)]
    want = reference(*inputs, route, activation=activation, bias=extra[0], row_bias=extra[1], scale=scale)
    want.backward(grad.double())
    for x, b in zip(gradients[3:], (bias, row_bias)):
        assert x.shape == ((0,) if b is None else b.shape)
    ours = [out, *gradients[:3], *(x for x in gradients[3:] if x.numel())]
    return ours, [want.detach(), *(x.grad for x in (*inputs, *extra) if x is not None)]


def compare(tolerance, *args, **kwargs):
    """Each result within `tolerance` of the reference, relative to the larger of 1 and the reference's maximum."""
    for name, ours, want in zip(("out", "dq", "dk", "dv", "bias", "bias"), *run_both(*args, **kwargs)):
        error = (ours.double() - want).abs().max() / max(1.0, want.abs().max())
        assert error < tolerance, f"{name}: {error:.1e} with {kwargs}"


@interpreted
def softmax():
    compare(1e-5, torch.float32, 16, route_of([40, 3, 1, 30, 20, 6], related(6, 6)))
    compare(1e-5, torch.float32, 32, route_of([20, 7, 38], related(3, 3)), bias=torch.randn(3, 3))
    compare(1e-5, torch.float32, 16, route_of([20, 10, 3], related(3, 3)), bias=torch.randn(2, 3, 3), B=2)
    compare(1e-5, torch.float32, 64, route_of([33], torch.ones(1, 1, dtype=torch.bool)))
    compare(1e-5, torch.float32, 128, route_of([20, 13], torch.ones(2, 2, dtype=torch.bool)), scale=0.3)


@interpreted
def per_head():
    compare(1e-5, torch.float32, 16, route_of([40, 3, 1, 30, 20, 6], related(1, 2, 6, 6)))
    compare(1e-5, torch.float32, 16, route_of([20, 7, 6], related(2, 2, 3, 3)), bias=torch.randn(2, 2, 3, 3), B=2)
    compare(1e-5, torch.float32, 16, route_of([20, 7, 6], related(2, 2, 3, 3)), bias=torch.randn(2, 1, 3, 3), B=2)


@interpreted
def sigmoid():
    route = route_of([40, 3, 1, 15, 6], related(5, 5))
    compare(1e-5, torch.float32, 16, route, activation="sigmoid")
    compare(1e-5, torch.float32, 16, route, activation="sigmoid", row_bias=torch.randn(65), bias=torch.randn(5, 5))
    route = route_of([20, 7, 6], related(2, 2, 3, 3))
    compare(1e-5, torch.float32, 32, route, activation="sigmoid", row_bias=torch.randn(33), B=2)


@interpreted
def low_precision():
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # the interpreter would multiply the bits of a bfloat16 as an integer
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    route = route_of([70, 3, 60, 17], related(4, 4))
    bias = torch.randn(4, 4).bfloat16()
    compare(2e-2, torch.bfloat16, 16, route, bias=bias)
    compare(2e-2, torch.bfloat16, 32, route, activation="sigmoid", row_bias=torch.randn(150).bfloat16())
    compare(3e-3, torch.float16, 16, route)
    with pytest.raises(ValueError, match="must be 16, 32, 64 or 128"):
        compare(1, torch.float64, 16, route)


@interpreted
def corners():
    yes = torch.ones(1, 1, dtype=torch.bool)
    for T in (1, 7, 33, 65, 100):
        compare(1e-5, torch.float32, 16, route_of([T], yes), H=1)
    ours, _ = run_both(torch.float32, 16, route_of([7], ~yes), bias=torch.randn(1, 1))
    assert all((x == 0).all() for x in ours)  # no key for any query
    compare(1e-5, torch.float32, 16, route_of([1] * 12, related(12, 12)), bias=torch.randn(12, 12), H=1)
    compare(1e-4, torch.float32, 16, route_of([40, 25], torch.ones(2, 2, dtype=torch.bool)), scale=30.0, H=1)


@interpreted
def repeats():
    for activation in ("softmax", "sigmoid"):
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            route, row_bias = route_of([20, 7, 13], related(3, 3)), torch.randn(40)
            row_bias = row_bias if activation == "sigmoid" else None
            results.append(run_both(torch.float32, 16, route, activation, torch.randn(3, 3), row_bias, B=2)[0])
        assert all(torch.equal(a, b) for a, b in zip(*results))


@interpreted
def contracts():
    """lse is that of the CPU path, -inf where there is no key; nothing shares memory with anything; row bias alone."""
    from kernels.block_sparse_triton import triton_backward, triton_forward

    q, k, v = torch.randn(3, 2, 2, 33, 16)
    route, bias = route_of([20, 7, 6], related(3, 3)), torch.randn(2, 2, 3, 3)
    rest = route.starts, route.allowed, bias, None, 0.25, "softmax"
    out, lse = triton_forward(q, k, v, *rest)
    torch.testing.assert_close(lse, torch_forward(q, k, v, *rest)[1])
    assert lse[:, :, 20:27].eq(-torch.inf).all() and out[:, :, 20:27].eq(0).all()
    results = [out, lse, *triton_backward(out, q, k, v, out, lse, *rest)]
    owners = [x.untyped_storage().data_ptr() for x in (q, k, v, bias, route.allowed, *results) if x.numel()]
    assert len(set(owners)) == len(owners) - 2  # q, k and v share one
    assert triton_forward(q, k, v, *rest[:2], None, None, 0.25, "sigmoid")[1].shape == (2, 2, 0)


@interpreted
def lists():
    """live_tiles against a dense mask: nothing missing, nothing twice, full only where every pair may talk."""
    from hypothesis import given, settings, strategies as st

    from kernels.block_sparse_triton import Launch

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 2**20), st.sampled_from((4, 8, 16)),
           st.sampled_from((4, 8)), st.booleans(), st.booleans())  # fmt: skip
    def agree(lengths, seed, X, Y, by_key, per_head):
        C, generator = len(lengths), torch.Generator(torch.get_default_device()).manual_seed(seed)
        allowed = torch.rand(*((1, 2) if per_head else ()), C, C, generator=generator) < 0.7
        route = route_of(lengths, allowed)
        T = route.length
        launch = Launch(torch.zeros(1, 2, T, 16), route.starts, route.allowed, None, None, None, 1.0, "softmax")
        tiles, counts = launch.tiles(X, Y, by_key)
        cell = route.cell()
        talk = route.allowed[..., cell[:, None], cell[None, :]].reshape(-1, T, T)
        seen = route.mask().reshape(-1, T, T)
        if by_key:
            talk, seen = talk.mT, seen.mT
        for r, i in ((r, i) for r in range(len(seen)) for i in range(tiles.size(1))):
            n_partial, n_full = counts[r, i].tolist()
            entries = tiles[r, i].tolist()
            partial, full = entries[:n_partial], entries[len(entries) - n_full :]
            for j in range(tiles.size(2)):
                at = (r, slice(i * X, (i + 1) * X), slice(j * Y, (j + 1) * Y))
                query, key = (j * Y + Y, i * X) if by_key else (i * X + X, j * Y)
                live = bool(talk[at].any()) and key < min(query, T)
                whole = seen[at].numel() == X * Y and bool(seen[at].all())
                assert [partial.count(j), full.count(j)] == [live and not whole, whole]
                assert live or not seen[at].any()

    agree()


# ---------------------------------------------------------------------------------------------------------------------
# Compiled.


@pytest.mark.parametrize("words", ["D=64 bfloat16 bias ones", "dkv D=128 bfloat16 sigmoid", "live_tiles"])
def test_compiles_without_spills(cli, words):
    done = cli("kernels/aot.py", f"--kernels={words}", env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["bad"] == 0 and {row["arch"] for row in table["rows"]} == {80, 90}


def test_aot_refuses(cli):
    for flag, words in (("--kernels=nothing", "no kernel has all"), ("--arch=75", "must be among 80, 90")):
        done = cli("kernels/aot.py", flag)
        assert done.returncode == 2 and words in done.stderr


if __name__ == "__main__":
    device, *names = sys.argv[1:]
    torch.set_default_device(device)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in names:
        CHECKS[name]()
