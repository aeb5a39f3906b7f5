"""Cells, Fe-RoPE and the routing graph in the model: definitions by brute force, decoding, and old bugs by name."""

import copy
import pickle
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.profiler import ProfilerActivity, profile

from model import (
    GPT,
    Cells,
    DecodingState,
    FeRoPE,
    GPTConfig,
    anchor_local_offsets,
    build_pd_anchors_1d,
    ferope_ar_rotate,
    load_checkpoint,
    save_checkpoint,
)

SMALL = {"block_size": 64, "vocab_size": 29, "n_layer": 2, "n_head": 2, "n_embd": 32, "pos_embedding": "none"}
CELLS = {"anchor_min_gap": 6, "anchor_jitter": 3}
SPARSE = {"use_block_sparse": True, **CELLS}
ANCHORED = {"use_ferope": True, "ferope_anchor_relative": True, **CELLS}
VARIANTS = {
    "sparse": SPARSE,
    "no rings": {**SPARSE, "neighbor_rings": 0, "share_region_router": False},
    "two rings": {**SPARSE, "neighbor_rings": 2, "pos_embedding": "learned"},
    "anchored": ANCHORED,
    "sparse anchored": ANCHORED | SPARSE | {"anchor_seed": 5},
    "absolute": {"use_ferope": True},
}
variants = pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)


def small(seed=0, **flags):
    """A model in eval mode, its weights ten times as large as at the start, so that attention is not flat."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | flags)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p *= 10 if p.dim() > 1 else 1
    return model


def tokens(B=2, T=64, V=29, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx):
    return model(idx, idx)[0]


def cells_of(model):
    return [m for m in model.modules() if isinstance(m, Cells)]


def near(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def anchors_of(length, min_gap, jitter, seed):
    return build_pd_anchors_1d(length, min_gap, jitter, torch.Generator().manual_seed(seed))


# -- anchors and cells ------------------------------------------------------------------------------------------------

lengths, gaps, jitters, seeds = st.integers(1, 600), st.integers(1, 80), st.integers(0, 80), st.integers(0, 2**32)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(lengths, gaps, jitters, seeds)
def test_anchors_are_a_poisson_disk_set(length, min_gap, jitter, seed):
    anchors, _ = anchors_of(length, min_gap, jitter, seed)
    assert anchors.dtype == torch.int64 and 0 <= anchors[0] <= min(jitter, length - 1) and anchors[-1] < length
    steps = anchors.diff()
    assert ((steps >= min_gap) & (steps <= min_gap + jitter)).all()
    # Nothing is farther than this from an anchor, so with jitter < min_gap no other anchor would fit anywhere.
    distance = (torch.arange(length)[:, None] - anchors).abs().amin(1)
    assert distance.max() <= max(min_gap - 1, jitter)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(lengths, gaps, jitters, seeds)
def test_a_cell_is_what_is_nearest_to_its_anchor(length, min_gap, jitter, seed):
    anchors, cell = anchors_of(length, min_gap, jitter, seed)
    nearest = (torch.arange(length)[:, None] - anchors).abs().argmin(1)  # the first of equals: ties to the left
    assert cell.dtype == torch.int64 and torch.equal(cell, nearest)
    assert cell[0] == 0 and cell[-1] == len(anchors) - 1 and set(cell.diff().tolist()) <= {0, 1}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(lengths, gaps, jitters, seeds)
def test_anchors_depend_on_their_generator_alone(length, min_gap, jitter, seed):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = anchors_of(length, min_gap, jitter, seed)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(one, anchors_of(length, min_gap, jitter, seed)))


def test_other_seeds_give_other_anchors_and_every_gap():
    drawn = [anchors_of(400, 5, 3, seed)[0] for seed in range(40)]
    assert len({tuple(a.tolist()) for a in drawn}) == 40
    assert {int(a[0]) for a in drawn} == {0, 1, 2, 3}
    assert set(torch.cat([a.diff() for a in drawn]).tolist()) == {5, 6, 7, 8}


def test_ties_go_to_the_left():
    anchors, cell = anchors_of(9, 4, 0, 0)
    assert anchors.tolist() == [0, 4, 8] and cell.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_offsets_are_signed():
    anchors, cell = anchors_of(9, 4, 0, 0)
    assert anchor_local_offsets(torch.arange(9), anchors, cell).tolist() == [0, 1, 2, -1, 0, 1, 2, -1, 0]
    assert anchor_local_offsets(torch.tensor([7, 2]), anchors, cell).tolist() == [-1, 2]


# -- Fe-RoPE ----------------------------------------------------------------------------------------------------------


def rope(n_embd=64, n_head=2, **flags):
    return FeRoPE(GPTConfig(n_embd=n_embd, n_head=n_head, **{"use_ferope": True} | flags))


def qk(T=100, hs=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 2, T, hs, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def turned(x, theta):
    """Rotation as multiplication by exp(i theta), in float64: x (..., T, 2m), theta (T, m)."""
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(theta.double()), theta.double())).flatten(-2)


def scores(q, k):
    return q @ k.mT / q.size(-1) ** 0.5


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.slow
def test_log_frequencies_are_standard_rope(base):
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    q, k = qk(T=200)
    ours = rope(rope_base=base)(q, k, torch.arange(200))
    W = base ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    theta = torch.arange(200)[:, None] * W
    for x, got in zip((q, k), ours):
        near(got.double(), turned(x, theta), 1e-4)
        theirs = apply_rotary_pos_emb(x.double().transpose(1, 2), theta.sin()[None], theta.cos()[None]).transpose(1, 2)
        near(got.double(), theirs, 1e-4)


def test_rotation_is_exact_in_float64():
    q, k = qk(dtype=torch.float64)
    theta = torch.randn(100, 16, dtype=torch.float64)
    for x, got in zip((q, k), ferope_ar_rotate(q, k, theta)):
        assert got.dtype == torch.float64
        near(got, turned(x, theta), 1e-13)


@pytest.mark.parametrize("m", [1, 5, 15])
def test_what_does_not_rotate_passes_through(m):
    q, k = qk()
    module = rope(ferope_m=m)
    assert module.W.shape == (m,)
    for x, got in zip((q, k), module(q, k, torch.arange(100))):
        assert torch.equal(got[..., 2 * m :], x[..., 2 * m :])
        near(got[..., : 2 * m].double(), turned(x[..., : 2 * m], torch.arange(100)[:, None] * module.W), 1e-4)


def test_norms_are_kept():
    q, k = qk()
    for x, got in zip((q, k), rope(ferope_freqs="gaussian", anchor_min_gap=3)(q, k, torch.arange(100) - 50)):
        near(got.norm(dim=-1), x.norm(dim=-1), 1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3000), st.sampled_from(["log", "gaussian"]))
def test_scores_depend_on_relative_positions_alone(shift, freqs):
    q, k = qk(T=60, dtype=torch.float64)
    module = rope(ferope_freqs=freqs).double()
    here, there = (scores(*module(q, k, torch.arange(60) + s)) for s in (0, shift))
    near(here, there, 1e-10)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3000), seeds)
def test_a_cell_moved_with_its_content_keeps_its_scores(shift, seed):
    anchors, cell = anchors_of(60, 8, 5, seed)
    q, k = qk(T=60)
    offsets = anchor_local_offsets(torch.arange(60), anchors, cell)
    moved_cell = torch.cat((torch.zeros(shift, dtype=torch.long), cell))
    moved = anchor_local_offsets(torch.arange(60) + shift, anchors + shift, moved_cell)
    assert torch.equal(moved, offsets)
    same_cell = cell[:, None] == cell
    here, there = (scores(*rope()(q, k, delta)) * same_cell for delta in (offsets, moved))
    assert torch.equal(here, there)
    near(here.double(), scores(*rope().double()(*(x.double() for x in (q, k)), torch.arange(60))) * same_cell, 1e-4)


@pytest.mark.parametrize("flags", [{}, {"use_ferope": True}, {"use_ferope": True, "ferope_anchor_relative": True}])
def test_cells_with_the_same_content_say_the_same(flags):
    """Text that repeats with the period of the anchors, cells that see only themselves: one answer for each cell."""
    model = small(use_block_sparse=True, neighbor_rings=0, anchor_min_gap=8, anchor_jitter=0, **flags).double()
    logits = all_logits(model, tokens(T=8).repeat(1, 8))
    for start in (13, 21, 45):
        near(logits[:, start : start + 8], logits[:, 5:13], 1e-9)
    assert (logits[:, 5:13] - logits[:, 4:12]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchor_relative_and_stitches_are_absolute(dtype):
    """Turning a cell's keys by W (a_key - a_query) for each query cell makes its phases absolute again."""
    T = 120
    anchors, cell = anchors_of(T, 11, 7, 2)
    q, k = qk(T=T, dtype=dtype)
    module = rope().to(dtype)
    absolute = scores(*module(q, k, torch.arange(T)))
    near_q, near_k = module(q, k, anchor_local_offsets(torch.arange(T), anchors, cell))
    stitched = torch.empty_like(absolute)
    for c, a_query in enumerate(anchors):
        rows = cell == c
        theta = (anchors[cell] - a_query)[:, None] * module.W
        _, keys = ferope_ar_rotate(near_q, near_k, theta)
        stitched[:, :, rows] = scores(near_q[:, :, rows], keys)
    near(stitched, absolute, 4 * T * torch.finfo(dtype).eps)  # angles of up to T radians, each rounded
    assert (scores(near_q, near_k) - absolute).abs().max() > 0.1  # without the stitches they are not


def rotations(model, idx):
    """((q, k), (turned q, turned k), delta) of the first layer's Fe-RoPE while the model reads idx."""
    seen = []
    handle = model.transformer.h[0].attn.ferope.register_forward_hook(lambda _, x, y: seen.append((x[:2], y, x[2])))
    model(idx)
    handle.remove()
    return seen[0]


def test_angles_are_float32_under_autocast():
    """A bfloat16 angle of 1000 radians would be off by up to 4."""
    model = small(use_ferope=True, block_size=1024)
    W = model.transformer.h[0].attn.ferope.W.double()
    with torch.autocast("cpu", torch.bfloat16):
        before, after, delta = rotations(model, tokens(B=1, T=1010))
    for x, y in zip(before, after):
        assert x.dtype == y.dtype == torch.bfloat16
        want = turned(x, delta[:, None] * W)
        assert ((y.double() - want).abs() <= 2**-8 * want.abs() + 1e-3 * x.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_float32_in_a_half_model(dtype):
    """sample.py --dtype=bfloat16 casts the weights: frequencies of 8 bits would be off by radians at position 1000."""
    model = small(use_ferope=True, block_size=1024)
    W = model.transformer.h[0].attn.ferope.W.double()
    before, after, delta = rotations(model.to(dtype), tokens(B=1, T=1010))
    for x, y in zip(before, after):
        want = turned(x, delta[:, None] * W)
        assert ((y.double() - want).abs() <= 2**-7 * x.abs().max().double()).all()


@pytest.mark.parametrize("flags", [{"use_ferope": True}, ANCHORED, ANCHORED | SPARSE])
@pytest.mark.parametrize("freqs", ["log", "gaussian"])
def test_learnable_frequencies_get_gradients(flags, freqs):
    model = small(**flags, ferope_learnable=True, ferope_freqs=freqs)
    idx = tokens()
    model(idx, idx.roll(-1, 1))[1].backward()
    names = {n for n, p in model.named_parameters() if n.endswith("ferope.W") and (p.grad != 0).all()}
    assert names == {"transformer.h.0.attn.ferope.W", "transformer.h.1.attn.ferope.W"}
    plain = small(**flags, ferope_freqs=freqs)
    assert "transformer.h.0.attn.ferope.W" in dict(plain.named_buffers())


def test_gaussian_frequencies():
    flags = {"n_embd": 16384, "n_head": 2, "ferope_freqs": "gaussian", "anchor_min_gap": 50}
    W = rope(**flags).W * 50
    assert W.shape == (4096,) and abs(W.mean()) < 0.05 and abs(W.std() - 1) < 0.05
    assert torch.equal(W, rope(**flags).W * 50) and not torch.equal(W, rope(**flags, anchor_seed=1).W * 50)


# -- cells in the model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_layers_share_their_cells_or_not(shared):
    one, two = cells_of(small(**SPARSE, share_region_router=shared))
    assert torch.equal(one.cell, two.cell) == torch.equal(one.offset, two.offset) == shared
    again = cells_of(small(**SPARSE | {"anchor_seed": 1338}))[0]
    assert torch.equal(again.cell, two.cell) != shared  # layer l has anchor_seed + l


@pytest.mark.parametrize("rings", [0, 1, 2, 50])
def test_rings_by_brute_force(rings):
    (cells, _) = cells_of(small(**SPARSE | {"neighbor_rings": rings}))
    cell = cells.cell.tolist()
    want = [[j <= i and abs(cell[i] - cell[j]) <= rings for j in range(64)] for i in range(64)]
    assert cells.route.mask().tolist() == want


@pytest.mark.slow
@variants
def test_only_what_the_route_allows_is_read(flags):
    """One layer: a logit changes if and only if a key that its position can reach does."""
    model, idx = small(**flags | {"n_layer": 1}).double(), tokens(B=1)
    logits = all_logits(model, idx)
    mask = cells_of(model)[0].route.mask() if "use_block_sparse" in flags else torch.ones(64, 64).tril().bool()
    changed = idx.repeat(64, 1)
    changed[torch.arange(64), torch.arange(64)] = (idx[0] + 1) % 29  # row j: token j changed
    difference = (all_logits(model, changed) - logits).abs().amax(-1)  # (j, i)
    assert torch.equal((difference > 1e-10).mT, mask)  # other sizes of batch round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("flags", [VARIANTS[n] for n in ("sparse", "no rings", "sparse anchored", "anchored")])
@pytest.mark.parametrize("size", [1, 5, 20, 63])
def test_cropping_slices_the_cells(flags, size, tmp_path):
    model = small(**flags)
    idx = tokens(T=size)
    logits, before = all_logits(model, idx), [c.cell.clone() for c in cells_of(model)]
    model.crop_block_size(size)
    assert all(torch.equal(c.cell, b[:size]) for c, b in zip(cells_of(model), before))
    assert all(c.route.length == len(c.offset) == size for c in cells_of(model))
    near(all_logits(model, idx), logits, 1e-5)
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(T=size + 1))
    args = {f.name: getattr(model.config, f.name) for f in fields(GPTConfig)}
    save_checkpoint(tmp_path / "ckpt.pt", {"model": model.state_dict(), "model_args": args})
    again = GPT.from_checkpoint(load_checkpoint(tmp_path / "ckpt.pt")).eval()
    assert torch.equal(all_logits(again, idx), all_logits(model, idx))


@pytest.mark.parametrize("flags", [SPARSE, ANCHORED, ANCHORED | SPARSE])
def test_loading_other_cells_rebuilds_the_route(flags):
    """A checkpoint's cells hold, whatever this version or seed would draw."""
    saved, model, idx = small(**flags, anchor_seed=1), small(seed=3, **flags, anchor_seed=2), tokens()
    assert cells_of(saved)[0].route.starts != cells_of(model)[0].route.starts
    model.load_state_dict(saved.state_dict(), strict=True)
    assert cells_of(saved)[0].route.starts == cells_of(model)[0].route.starts
    assert torch.equal(all_logits(model, idx), all_logits(saved, idx))


@pytest.mark.slow
@variants
def test_models_can_be_copied_and_pickled(flags):
    """As torch.save(model) and processes that are handed one need."""
    model, idx = small(**flags), tokens()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(all_logits(again, idx), all_logits(model, idx))


# -- bugs of the public original, by name -----------------------------------------------------------------------------


@pytest.mark.slow
@variants
def test_anchors_are_not_redrawn(flags):
    """Not by a forward, its mode, the batch's shape or the global generator."""
    model, idx = small(**flags), tokens()
    logits, buffers = all_logits(model, idx), [b.clone() for b in model.buffers()]
    for seed, mode, T in ((1, True, 64), (2, False, 3), (3, True, 40), (4, False, 64)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        again = all_logits(model.train(mode), idx[:, :T])
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        near(again, logits[:, :T], 1e-5)
    other = small(**flags)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(buffers, GPT(other.config).buffers(), strict=True))


@pytest.mark.slow
@variants
def test_cells_do_not_depend_on_the_length_of_the_batch(flags):
    """No cell is cut or filled otherwise because the text ends in its middle: every prefix says what the text says."""
    model, idx = small(**flags), tokens(B=1)
    logits = all_logits(model, idx)
    for T in range(1, 64):
        near(all_logits(model, idx[:, :T]), logits[:, :T], 1e-5)


def greediest(model, idx):
    """Bytes that the greediest operator of forward and backward keeps; sees what custom operators call inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        model(idx, idx)[1].backward()
    return max(e.self_cpu_memory_usage for e in events.events())


@pytest.mark.slow
def test_no_mask_is_as_large_as_the_text_squared():
    T = 2048
    flags = {"block_size": T, "n_layer": 1, "anchor_min_gap": 32, "anchor_jitter": 8, "use_ferope": True}
    model = small(**flags, ferope_anchor_relative=True, use_block_sparse=True)
    assert greediest(model, tokens(B=1, T=T)) < T * T  # bytes: a bool mask would reach it
    model = small(**flags, ferope_anchor_relative=True)
    model.transformer.h[0].attn.attend = lambda q, k, v, *_: (q @ k.mT).tril() @ v
    assert greediest(model, tokens(B=1, T=T)) >= T * T  # the measure would see one


@pytest.mark.slow
def test_one_unit_of_position():
    """Tokens: neighbours in a cell are W radians apart, absolute or anchored, read at once or stepwise."""
    for flags in ({"use_ferope": True}, ANCHORED):
        model, idx = small(**flags), tokens(B=1)
        (q, _), (turned_q, _), delta = rotations(model, idx)
        assert delta.dtype == torch.int64
        W = model.transformer.h[0].attn.ferope.W
        near(turned_q.double(), turned(q, delta[:, None] * W), 1e-4)
        steps = delta.diff()
        inside = cells_of(model)[0].cell.diff() == 0 if "anchor_min_gap" in flags else torch.ones(63).bool()
        assert (steps[inside] == 1).all()
        state, stepped = DecodingState(), []
        hook = model.transformer.h[0].attn.ferope.register_forward_hook(lambda _, x, y, s=stepped: s.append(x[2]))
        for i in range(64):
            model(idx[:, i : i + 1], state=state)
        hook.remove()
        assert torch.equal(torch.cat(stepped), delta)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [VARIANTS[n] for n in ("sparse", "no rings", "two rings", "sparse anchored")])
@pytest.mark.parametrize("prompt", [1, 10, 37])
@pytest.mark.slow
def test_kept_keys_are_those_that_a_later_query_can_reach(flags, prompt):
    model, idx, state = small(**flags), tokens(), DecodingState()
    model(idx[:, :prompt], state=state)
    for n in range(prompt, 64):
        for block in model.transformer.h:
            store, mask = state.of(block.attn), block.attn.cells.route.mask()
            assert store["k_pos"].tolist() == mask[n:, :n].any(0).nonzero()[:, 0].tolist()
            assert store["n"] == len(store["k_pos"]) <= store["kv"].size(3)
        model(idx[:, n : n + 1], state=state)


@pytest.mark.slow
def test_memory_stays_bounded_over_a_long_text():
    flags = {"block_size": 1024, "n_layer": 1, "use_ferope": True, "anchor_min_gap": 16}
    sizes = {}
    for sparse in (True, False):
        model = small(**flags, anchor_jitter=4, ferope_anchor_relative=True, use_block_sparse=sparse)
        state, sizes[sparse] = DecodingState(), []
        with torch.no_grad():
            for token in tokens(B=1, T=1024).unbind(1):
                model(token[:, None], state=state)
                sizes[sparse].append(state.nbytes())
    assert max(sizes[True]) <= 1.2 * max(sizes[True][:512]) and max(sizes[True]) * 8 < sizes[False][-1]
    assert sizes[False][-1] > 8 * sizes[False][100]


@pytest.mark.slow
@variants
def test_every_chunking_gives_the_full_forward(flags):
    model = small(**flags)
    idx = tokens()
    logits = all_logits(model, idx)

    @settings(max_examples=15, deadline=None)
    @given(st.sets(st.integers(1, 63)))
    def check(cuts):
        state, ends = DecodingState(), [*sorted(cuts), 64]
        for start, end in zip([0, *ends], ends):
            stepped, _ = model(idx[:, start:end], state=state)
            near(stepped[:, 0], logits[:, end - 1], 1e-4)

    with torch.no_grad():
        check()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [VARIANTS[n] for n in ("sparse", "two rings", "anchored", "sparse anchored")])
def test_generation_beyond_the_block_slides_or_goes_on(flags):
    """With a learned position table the last block is what there is; without one, cells go on."""
    model = small(**flags)
    slides = model.config.pos_embedding == "learned"
    idx = tokens(T=60)
    cached, plain = (model.generate(idx, 20, temperature=0, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    if not slides:
        model.extend_block_size(80)
    by_hand = idx
    for _ in range(20):
        by_hand = torch.cat((by_hand, model(by_hand[:, -64:] if slides else by_hand)[0].argmax(-1)), 1)
    assert torch.equal(by_hand, cached)
    if slides:
        long = tokens(T=90)
        ends = [model.generate(x, 3, temperature=0)[:, -3:] for x in (long, long[:, -64:])]
        assert torch.equal(*ends)


# -- what GPTConfig refuses -------------------------------------------------------------------------------------------

ROPE, LONE = {"use_ferope": True}, {}
REFUSED = [
    (LONE, {"neighbor_rings": 2}, "use_block_sparse"),
    (ROPE, {"neighbor_rings": 2}, "use_block_sparse"),
    (LONE, {"ferope_freqs": "gaussian"}, "use_ferope"),
    (LONE, {"ferope_m": 4}, "use_ferope"),
    (LONE, {"ferope_learnable": True}, "use_ferope"),
    (LONE, {"rope_base": 500.0}, "use_ferope"),
    (LONE, {"anchor_min_gap": 8}, "use_block_sparse"),
    (LONE, {"anchor_jitter": 8}, "use_block_sparse"),
    (ROPE, {"anchor_seed": 8}, "use_block_sparse"),
    (ROPE, {"share_region_router": False}, "use_block_sparse"),
    ({"use_block_sparse": True}, {"ferope_m": 4}, "use_ferope"),
    # Random frequencies have a scale and a seed, but no cells and no base.
    (ROPE | {"ferope_freqs": "gaussian"}, {"anchor_jitter": 8}, ""),
    (ROPE | {"ferope_freqs": "gaussian"}, {"share_region_router": False}, ""),
    (ROPE | {"ferope_freqs": "gaussian"}, {"rope_base": 500.0}, ""),
    (ROPE, {"ferope_freqs": "linear"}, "gaussian"),
    (ROPE, {"ferope_m": 17}, "32"),
    (ROPE, {"ferope_m": -1}, ""),
    (ROPE, {"rope_base": 1.0}, ""),
    (ROPE, {"rope_base": float("nan")}, ""),
    ({"use_block_sparse": True}, {"neighbor_rings": -1}, ""),
    ({"use_block_sparse": True}, {"anchor_min_gap": 0}, ""),
    ({"use_block_sparse": True}, {"anchor_jitter": -1}, ""),
]


@pytest.mark.parametrize("base, bad, named", REFUSED, ids=[f"{b} {x}" for b, x, _ in REFUSED])
def test_refused(base, bad, named):
    GPTConfig(n_embd=64, n_head=2, **base)
    with pytest.raises(ValueError) as error:
        GPTConfig(n_embd=64, n_head=2, **base | bad)
    assert next(iter(bad)) in str(error.value) and named in str(error.value)


def test_a_head_of_one_dimension_cannot_rotate():
    with pytest.raises(ValueError, match="ferope"):
        GPTConfig(n_embd=2, n_head=2, use_ferope=True)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 24), st.integers(-2, 14), st.integers(-1, 3), st.integers(-1, 3), st.integers(-1, 3))
def test_what_is_not_refused_runs(head_dim, m, min_gap, jitter, rings):
    flags = {"ferope_m": m, "anchor_min_gap": min_gap, "anchor_jitter": jitter, "neighbor_rings": rings}
    good = head_dim > 1 and 0 <= 2 * m <= head_dim and min_gap > 0 and jitter >= 0 and rings >= 0
    size = {"block_size": 9, "vocab_size": 7, "n_layer": 1, "n_head": 2, "n_embd": 2 * head_dim}
    try:
        config = GPTConfig(**size, **flags, use_ferope=True, ferope_anchor_relative=True, use_block_sparse=True)
    except ValueError:
        assert not good
    else:
        assert good and GPT(config)(tokens(T=9, V=7))[0].isfinite().all()
