"""Regions by brute force: what a cell may look at, and what it hears of the regions before it."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from model import GPT, GPTConfig, feedback_weights, region_relation
from smoke_test import CELLS, SIZE

SHAPES = {"C": st.integers(1, 14), "rings": st.integers(0, 3), "region_size": st.integers(1, 4)}


@pytest.mark.slow
@settings(deadline=None)
@given(**SHAPES, edges=st.integers(0, 4))
def test_relation(C, rings, region_size, edges):
    allowed = region_relation(C, rings, region_size, edges)
    for c in range(C):
        for other in range(C):
            back = c // region_size - other // region_size
            assert allowed[c, other] == (0 <= c - other <= rings or back in [2**i for i in range(edges)])


def heard_by(c, x, starts, region_size, rings, hops):
    """F_c of docs/variants.md, from the tokens x (T,), one region and one hop at a time."""
    last = c // region_size
    values = {}
    for r in range(last + 1):
        cells = [k for k in range(r * region_size, (r + 1) * region_size) if k < c]
        if cells:
            values[r] = torch.cat([x[starts[k] : starts[k + 1]] for k in cells]).mean()
    for _ in range(hops):
        near = {r: [values[n] for n in values if abs(n - r) <= rings] for r in range(last + 1)}
        values = {r: torch.stack(found).mean() for r, found in near.items() if found}
    return values.get(last, torch.zeros((), dtype=x.dtype))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(**SHAPES, hops=st.integers(1, 3), seed=st.integers(0, 9))
def test_feedback(C, rings, region_size, hops, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = (0, *torch.randint(1, 6, (C,), generator=generator).cumsum(0).tolist())
    x = torch.randn(starts[-1], generator=generator, dtype=torch.float64)
    weights = feedback_weights(starts, region_size, rings, hops)
    sums = torch.stack([x[a:b].sum() for a, b in zip(starts, starts[1:])])
    wanted = torch.stack([heard_by(c, x, starts, region_size, rings, hops) for c in range(C)])
    assert not weights.triu().any()  # nothing of the own, unfinished cell
    assert torch.allclose(weights.double() @ sums, wanted, atol=1e-5)


def test_chosen_regions_feed_back():
    """Regions of one cell, 3, 2, 4 and 1 tokens long, no rings: each token by a plain mean over positions."""
    starts, x = (0, 3, 5, 9, 10), torch.randn(10, dtype=torch.float64)
    weights = feedback_weights(starts, 1, 1, 1, [(0, 2), (0, 3), (1, 3)])
    sums = torch.stack([x[a:b].sum() for a, b in zip(starts, starts[1:])])
    means = [x[a:b].mean() for a, b in zip(starts, starts[1:])]
    near = [None, means[0], means[1], means[2]]  # the mean of complete regions at distance 1 or less
    wanted = [0 * means[0], near[1], (near[2] + means[0]) / 2, (near[3] + means[0] + means[1]) / 3]
    assert torch.allclose(weights.double() @ sums, torch.stack(wanted), atol=1e-6)
    with pytest.raises(ValueError, match="0>4, but the block has 4 regions"):
        feedback_weights(starts, 1, 1, 1, [(0, 4)])
    for edges in ("3>1", "1>1", "a>b", "0>1,", "0-1"):
        with pytest.raises(ValueError, match="regions read the past"):
            GPTConfig(use_region_feedback=True, region_size=1, region_feedback_edges=edges)


def test_feedback_starts_silent_and_then_speaks():
    flags = {"use_region_feedback": True, "region_size": 2, **CELLS}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZE | flags)).eval()
    idx = torch.randint(61, (2, 32))
    with torch.no_grad():
        silent = model(idx, idx)[0]
        for block in model.transformer.h:
            block.feedback.proj.weight.mul_(3)
        assert torch.equal(model(idx, idx)[0], silent)  # tanh(gate) is 0
        for block in model.transformer.h:
            block.feedback.gate.fill_(1.0)
        loud = model(idx, idx)[0]
    first = model.transformer.h[0].attn.cells.starts[1]
    assert torch.equal(loud[:, :first], silent[:, :first])  # the first cell has nothing before it
    assert (loud[:, first:] - silent[:, first:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"use_region_feedback": True}, "region_size"),
        ({"region_edges": 1, "use_block_sparse": True}, "region_size"),
        ({"region_edges": 1, "region_size": 2}, "use_block_sparse"),
        ({"region_size": 2}, "region_edges"),
        ({"region_rings": 2}, "use_region_feedback"),
        ({"feedback_hops": 2}, "use_region_feedback"),
        ({"use_region_feedback": True, "region_size": 2, "feedback_hops": 0}, "feedback_hops"),
    ],
)
def test_refusals(flags, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**flags)
