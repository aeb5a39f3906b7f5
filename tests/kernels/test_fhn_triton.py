"""
The Triton paths of the gated scan and of the FitzHugh-Nagumo waves, without a GPU: their numbers under Triton's
interpreter, the bytes they touch, and their machine code.

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

from kernels import fhn, scan

has_triton = importlib.util.find_spec("triton") is not None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_triton, reason="triton is not installed")]

CHECKS = {}  # name: a function that runs under the interpreter


def interpreted(check):
    CHECKS[check.__name__] = check
    return check


@pytest.mark.parametrize(
    "names",
    [
        "scans scan_contracts",
        "spans span_traffic",
        "waves_in_spans wave_span_traffic",
        "one_step two_steps",
        "more_steps",
        "low_precision limits",
        "split traffic contracts",
    ],
)
def test_interpreted(cli, names):
    done = cli("tests/kernels/test_fhn_triton.py", "cpu", *names.split(), env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# Run by the interpreter.


TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # for results of this type


def agree(named, what, looser=1):
    """Each (ours, want) within the tolerance, relative to the larger of 1 and the greatest value."""
    for name, (ours, want) in named.items():
        assert ours.shape == want.shape, (name, what)
        error = (ours.double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error < looser * TOLERANCE[ours.dtype], f"{name}: {error:.1e} with {what}"  # a nan fails as well


def check_scan(B, T, C, dtype=torch.float32, looser=1, least=0, span=None):
    """least: the lowest decay, -1 for decays of either sign; span: positions per program."""
    from kernels.scan_triton import triton_backward, triton_forward

    A = (least + (1 - least) * torch.rand(B, T, C)).to(dtype)
    b, grad = torch.randn(B, T, C).to(dtype), torch.randn(B, T, C).to(dtype)
    h0 = torch.randn(B, C).to(dtype)
    inputs = [x.double().requires_grad_() for x in (A, b, h0)]
    want = scan.reference(*inputs)
    want.backward(grad.double())
    h = triton_forward(A, b, h0, span)
    assert h.dtype == dtype
    gradients = triton_backward(grad, A, h, h0, span)
    named = {"h": (h, want.detach())}
    named |= {name: (ours, x.grad) for name, ours, x in zip(("dA", "db", "dh0"), gradients, inputs)}
    agree(named, (B, T, C, dtype, span), looser)


@interpreted
def scans():
    for shape in ((2, 1, 5), (1, 2, 1), (1, 31, 9), (1, 32, 8), (1, 33, 1), (2, 65, 5), (1, 200, 5), (1, 64, 33)):
        check_scan(*shape)
    check_scan(2, 65, 5, least=-1)
    check_scan(1, 70, 5, torch.bfloat16, looser=2)  # the backward reads a rounded h
    check_scan(1, 70, 5, torch.float16, looser=2)


@interpreted
def spans():
    """Time cut among programs: the same numbers, and where time is cut."""
    from kernels.scan_triton import CHUNK, span_length, triton_forward

    for shape, span in (((2, 65, 5), 32), ((1, 129, 9), 64), ((1, 40, 3), 64)):
        check_scan(*shape, least=-1, span=span)
    check_scan(1, 70, 5, torch.bfloat16, looser=2, span=32)
    A, b, h0 = torch.rand(1, 1100, 1), torch.randn(1, 1100, 1), torch.randn(1, 1)  # more spans than positions per chunk
    want = scan.reference(A.double(), b.double(), h0.double())
    agree({"h": (triton_forward(A, b, h0, 32), want)}, "35 spans")
    for (B, T, C), programs in (((1, 32768, 384), 2000), ((1, 2048, 64), 100), ((8, 4096, 128), 2000)):
        span = span_length(B, T, C, 132)  # a few texts: enough programs, none of them short
        assert span % CHUNK == 0 and span >= 4 * CHUNK and -(-T // span) * B * -(-C // 8) >= programs
    for B, T, C in ((64, 256, 384), (1, 200, 384), (1, 32768, 16896), (30, 8192, 384)):
        assert span_length(B, T, C, 132) == -(-T // CHUNK) * CHUNK  # enough without, or too short


@interpreted
def span_traffic():
    """The bytes are what bytes_moved says, and two runs are equal."""
    from kernels.scan_triton import bytes_moved, span_length, triton_backward, triton_forward

    A, b, h0, grad = torch.rand(2, 70, 5), torch.randn(2, 70, 5), torch.randn(2, 5), torch.randn(2, 70, 5)
    for dtype in (torch.float32, torch.bfloat16):
        a, x, first, g = (y.to(dtype) for y in (A, b, h0, grad))
        h, moved = traffic_of(triton_forward, a, x, first, 32)
        assert moved == bytes_moved(2, 70, 5, dtype.itemsize, span=32) > bytes_moved(2, 70, 5, dtype.itemsize)
        gradients, moved = traffic_of(triton_backward, g, a, h, first, 32)
        assert moved == bytes_moved(2, 70, 5, dtype.itemsize, backward=True, span=32)
        assert torch.equal(h, triton_forward(a, x, first, 32))
        assert all(torch.equal(y, z) for y, z in zip(gradients, triton_backward(g, a, h, first, 32)))
    for shape, backward, share in (((1, 32768, 384), False, 5 / 3), ((1, 32768, 384), True, 7 / 5)):
        span, floor = span_length(*shape, 132), bytes_moved(*shape, backward=backward)
        assert share < bytes_moved(*shape, backward=backward, span=span) / floor < share + 0.02


@interpreted
def scan_contracts():
    """Any strides; equal runs; no result shares memory; the traffic is what bytes_moved says."""
    from kernels.scan_triton import bytes_moved, triton_backward, triton_forward

    A, b, h0 = torch.rand(40, 2, 5).transpose(0, 1), torch.randn(2, 5, 40).mT, torch.randn(5, 2).T
    grad = torch.randn(1, 1, 5).expand(2, 40, 5)
    h, moved = traffic_of(triton_forward, A, b, h0)
    assert moved == bytes_moved(2, 40, 5)
    gradients, moved = traffic_of(triton_backward, grad, A, h, h0)
    assert moved == bytes_moved(2, 40, 5, backward=True)
    dense = [x.contiguous() for x in (grad, A, h, h0)]
    assert all(torch.equal(x, y) for x, y in zip(gradients, triton_backward(*dense)))
    assert len({x.untyped_storage().data_ptr() for x in (h, *gradients)}) == 4
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        triton_forward(A.double(), b.double(), h0.double())


def medium(B, T, C, dtype=torch.float32, coupling=200.0):
    """(stimulus, conductance, D, a, b, eps), with memories from a site to hundreds."""
    stimulus, conductance = torch.randn(B, T, C).to(dtype), torch.rand(B, T, C).to(dtype)
    D = torch.logspace(-1, torch.tensor(coupling).log10().item(), C)
    a, b, eps = (x * (0.7 + 0.6 * torch.rand(C)) for x in (0.7, 0.8, 0.08))
    return stimulus, conductance, D, a, b, eps


NAMES = ("d_stimulus", "d_conductance", "dD", "da", "db", "deps")


def check(B, T, C, steps, dtype=torch.float32, dt=0.5, with_state=True, coupling=200.0, looser=1, span=None):
    from kernels.fhn_triton import saved, triton_backward, triton_forward

    inputs, grad = medium(B, T, C, dtype, coupling), torch.randn(B, T, C).to(dtype)
    state = fhn.REST_V + 0.5 * torch.randn(B, steps, C) if with_state else None
    deviation, new_state, carries = triton_forward(*inputs, dt, steps, state, span)
    empty = saved(B, T, C, steps, deviation)
    assert carries.shape == empty.shape and carries.dtype == empty.dtype and deviation.dtype == dtype
    gradients = triton_backward(grad, *inputs, dt, steps, carries, span)
    exact = [x.double().requires_grad_() for x in inputs]
    want, last = fhn.reference(*exact, dt, steps, None if state is None else state.double())
    want.backward(grad.double())
    named = {"deviation": (deviation, want.detach()), "state": (new_state, last)}
    for name, ours, x in zip(NAMES, gradients, exact):
        assert ours.dtype == (dtype if x.dim() == 3 else torch.float32)
        named[name] = ours, torch.zeros_like(x) if x.grad is None else x.grad
    agree(named, (B, T, C, steps, dtype, span), looser)


@interpreted
def one_step():
    for T, C in ((1, 5), (2, 1), (63, 5), (64, 1), (65, 9)):
        check(1, T, C, 1)


@interpreted
def two_steps():
    for T, C in ((1, 1), (2, 5), (33, 8), (63, 1), (64, 5), (65, 33)):
        check(1, T, C, 2)
    check(2, 40, 3, 2, with_state=False)
    check(1, 200, 5, 2)


@interpreted
def more_steps():
    for T, C, steps in ((1, 5, 4), (65, 5, 4), (64, 1, 3), (34, 3, 8)):
        check(2 if T == 1 else 1, T, C, steps)
    check(1, 200, 1, 4)


@interpreted
def waves_in_spans():
    """Time cut among programs: the same numbers."""
    for B, T, C, steps, span in ((1, 65, 5, 1, 32), (2, 40, 3, 2, 32), (1, 65, 3, 3, 64)):
        check(B, T, C, steps, span=span)


@interpreted
def wave_span_traffic():
    """The bytes are what bytes_moved says, and two runs are equal."""
    from kernels.fhn_triton import bytes_moved, triton_backward, triton_forward

    for B, T, C, steps, dtype in ((2, 33, 3, 1, torch.float32), (1, 65, 5, 3, torch.bfloat16)):
        inputs = medium(B, T, C, dtype)
        shape = B, T, C, steps, dtype.itemsize
        (out, _, carries), moved = traffic_of(triton_forward, *inputs, 0.5, steps, None, 32)
        assert moved == bytes_moved(*shape, span=32) > bytes_moved(*shape)
        gradients, moved = traffic_of(triton_backward, out, *inputs, 0.5, steps, carries, 32)
        assert moved == bytes_moved(*shape, backward=True, span=32)
        assert all(map(torch.equal, gradients, triton_backward(out, *inputs, 0.5, steps, carries, 32)))
    for backward, passes in ((False, 7 / 3), (True, 10 / 5)):
        floor = 32768 * 384 * 4 * (5 if backward else 3)
        assert passes < bytes_moved(1, 32768, 384, 2, backward=backward, span=256) / floor < passes + 0.1


@interpreted
def low_precision():
    check(1, 65, 5, 2, torch.bfloat16)
    check(1, 33, 5, 4, torch.bfloat16)
    check(1, 2, 5, 1, torch.bfloat16)
    check(1, 40, 5, 2, torch.float16)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        check(1, 2, 5, 1, torch.float64)


@interpreted
def limits():
    """Nearly total coupling; none at all, where every site is alone; and a constant stays one."""
    from kernels.fhn_triton import triton_backward, triton_forward

    check(1, 70, 3, 2, coupling=1e5, looser=10)
    stimulus, conductance, *rest = medium(1, 12, 5)
    alone, _, carries = triton_forward(stimulus, conductance * 0, *rest, 0.5, 2, None)
    each = triton_forward(stimulus.mT.reshape(-1, 1, 1).expand(-1, 1, 5), torch.zeros(60, 1, 5), *rest, 0.5, 2, None)[0]
    torch.testing.assert_close(alone, each.view(5, 12, 5).diagonal(dim1=0, dim2=2)[None])
    gradients = triton_backward(torch.ones_like(alone), stimulus, conductance * 0, *rest, 0.5, 2, carries)
    assert all(x.isfinite().all() for x in gradients) and gradients[1].abs().max() > 0
    rest[1].fill_(0.7)
    rest[2].fill_(0.8)
    silent, state, _ = triton_forward(stimulus * 0, conductance, *rest, 0.5, 3, None)
    assert silent.abs().max() < 1e-6 and (state - fhn.REST_V).abs().max() < 1e-6


@interpreted
def split():
    """A sequence in parts, each with the state that the last one left."""
    from kernels.fhn_triton import triton_forward

    stimulus, conductance, *rest = medium(1, 75, 5)
    whole, end, _ = triton_forward(stimulus, conductance, *rest, 0.5, 2, None)
    for sizes in ((32, 43), (1, 73, 1)):
        state, parts = None, []
        for I, g in zip(stimulus.split(sizes, 1), conductance.split(sizes, 1)):
            part, state, _ = triton_forward(I, g, *rest, 0.5, 2, state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-6)
        torch.testing.assert_close(state, end, rtol=0, atol=2e-6)


def traffic_of(function, *args):
    """(result, bytes loaded and stored by its kernels), where the lanes of an instruction share what they share."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    moved, load, store = [], Builder.create_masked_load, Builder.create_masked_store

    def count(ptrs, mask):
        element = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        moved.append(element * len(np.unique(ptrs.data[mask.data.astype(bool)])))

    def create_masked_load(self, ptrs, mask, *rest):
        count(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        count(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    try:
        return function(*args), sum(moved)
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store


@interpreted
def traffic():
    """Stimulus and conductance are loaded once and the result stored once, whatever `steps` is."""
    from kernels.fhn_triton import bytes_moved, triton_backward, triton_forward

    for B, T, C, steps, dtype in ((1, 70, 9, 1, torch.float32), (2, 33, 3, 3, torch.bfloat16)):
        inputs = medium(B, T, C, dtype)
        (out, _, carries), moved = traffic_of(triton_forward, *inputs, 0.5, steps, None)
        assert moved == bytes_moved(B, T, C, steps, dtype.itemsize)
        _, moved = traffic_of(triton_backward, out, *inputs, 0.5, steps, carries)
        assert moved == bytes_moved(B, T, C, steps, dtype.itemsize, backward=True)
    for size, backward, share in ((4, False, 0.03), (2, False, 0.05), (4, True, 0.02), (2, True, 0.03)):
        floor = 8 * 1024 * 384 * size * (5 if backward else 3)
        assert floor < bytes_moved(8, 1024, 384, 2, size, backward) < (1 + share) * floor


@interpreted
def contracts():
    """Any strides; equal runs; no result shares memory with another; parameters of another type."""
    from kernels.fhn_triton import triton_backward, triton_forward

    stimulus, conductance = torch.randn(2, 5, 40).mT, torch.rand(40, 2, 5).transpose(0, 1)
    _, _, *rest = medium(2, 1, 5)
    rest = [x.bfloat16() for x in rest]
    state = fhn.REST_V + torch.rand(5, 2, 2).permute(1, 2, 0)
    results = []
    for I, g in ((stimulus, conductance), (stimulus.contiguous(), conductance.contiguous())):
        forward = triton_forward(I, g, *rest, 0.5, 2, state)
        grad = torch.ones(1, 1, 1).expand(2, 40, 5)
        results.append([*forward, *triton_backward(grad, I, g, *rest, 0.5, 2, forward[2])])
    assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(*results))
    assert len({x.untyped_storage().data_ptr() for x in results[0]}) == 9
    want = fhn.torch_forward(stimulus, conductance, *rest, 0.5, 2, state)[:2]
    torch.testing.assert_close(results[0][:2], list(want), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled.


@pytest.mark.parametrize("words", ["scan bfloat16", "fhn float32 steps=2", "fhn backward bfloat16 steps=4"])
def test_compiles_without_spills(cli, words):
    done = cli("kernels/aot.py", f"--kernels={words}", env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["bad"] == 0 and {row["arch"] for row in table["rows"]} == {80, 90}
    assert all(row["shared"] == 0 for row in table["rows"])  # one warp, whose lanes need none


if __name__ == "__main__":
    device, *names = sys.argv[1:]
    torch.set_default_device(device)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in names:
        CHECKS[name]()
