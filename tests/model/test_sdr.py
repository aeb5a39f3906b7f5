"""Sparse distributed representations against counting, sets, plain loops, and recurrences of fla-core (a fixture)."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers import FIXTURES
from kernels.engram import context_winners, k_winners, recall, reference, unpack, willshaw, willshaw_reference
from model import (
    ContextEncoder,
    DecodingState,
    Fold,
    GPTConfig,
    SDREmbedding,
    SDREngramMemory,
    SDROperations,
    SemanticFoldingEncoder,
    SemanticRetina,
    distinct,
)

FLA = json.loads((FIXTURES / "fla.json").read_text())
RULES = ("hebb", "delta", "willshaw")
few = settings(max_examples=30, deadline=None)


def config(**flags):
    defaults = {"vocab_size": 11, "n_embd": 6, "bias": True, "tie_weights": True, "sdr_size": 128, "sdr_active": 7,
                "sdr_boost": 0.02, "sdr_radius": 2, "sdr_scales": 3, "sdr_rule": "hebb", "sdr_decay": 0.9,
                "sdr_value_dim": 4}  # fmt: skip
    return SimpleNamespace(**vars(GPTConfig()) | defaults | flags)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_sets(count, n, k, seed=0):
    return torch.rand(count, n, generator=seeded(seed)).topk(k).indices


def as_sets(active):
    return [set(row.tolist()) for row in active.flatten(0, -2)]


def largest(x):
    return x.abs().max().item()


# Operations ---------------------------------------------------------------------------------------------------------


@few
@given(n=st.integers(2, 150), data=st.data())
def test_operations_are_those_of_sets(n, data):
    k = data.draw(st.integers(1, n))
    active = random_sets(6, n, k, data.draw(st.integers(0, 9)))
    words, sets = SDROperations.pack(active, n), as_sets(active)
    assert words.shape == (6, -(-n // 64))
    a, b = words[:3], words[3:]
    assert SDROperations.overlap(a, b).tolist() == [len(x & y) for x, y in zip(sets, sets[3:])]
    assert SDROperations.hamming(a, b).tolist() == [len(x ^ y) for x, y in zip(sets, sets[3:])]
    shared, union = SDROperations.intersection(words), SDROperations.union(active, n)
    assert set(unpack(shared, n).nonzero()[:, 0].tolist()) == set.intersection(*sets)
    assert set(unpack(union, n).nonzero()[:, 0].tolist()) == set.union(*sets)
    assert torch.equal(SDROperations.threshold(SDROperations.dense(active, n), 1), words)
    m = data.draw(st.integers(0, min(k, n - k)))
    noisy = SDROperations.pack(SDROperations.noise(active, n, m, seeded()), n)
    assert (SDROperations.overlap(noisy, words) == k - m).all() and (SDROperations.count(noisy) == k).all()
    part = as_sets(SDROperations.subsample(active, max(m, 1), seeded()))
    assert all(x <= y and len(x) == max(m, 1) for x, y in zip(part, sets))


@few
@given(rows=st.integers(1, 5), groups=st.integers(1, 40), extra=st.integers(0, 15), data=st.data())
def test_winners_are_the_largest(rows, groups, extra, data):
    n = 16 * groups + extra
    k = data.draw(st.integers(1, n))
    x = torch.randn(rows, n, generator=seeded(), dtype=torch.float64)
    assert as_sets(k_winners(x, k)) == as_sets(x.topk(k).indices)


@pytest.mark.slow
def test_false_matches_follow_the_hypergeometric_tail():
    from scipy import stats  # here, in a slow test: importing it takes a second

    n, k, count = 256, 20, 250
    words = SDROperations.pack(random_sets(2 * count, n, k), n)
    overlap = SDROperations.overlap(words[:count, None], words[None, count:]).flatten()  # 62,500 pairs
    for theta in range(1, 7):
        expected = stats.hypergeom.sf(theta - 1, n, k, k)
        found = (overlap >= theta).double().mean().item()
        assert abs(found - expected) < 0.03 * expected + 5 * math.sqrt(expected / count**2)


@pytest.mark.parametrize("M", [1, 10, 60])
def test_union_density(M):
    n, k, trials = 1024, 20, 50
    sets = random_sets(trials * M, n, k).view(trials, M, k)
    density = SDROperations.count(SDROperations.union(sets, n)).double().mean().item() / n
    assert density == pytest.approx(1 - (1 - k / n) ** M, rel=0.01)


def test_capacity_is_every_choice():
    words = SDROperations.pack(k_winners(torch.rand(3000, 8, generator=seeded()), 3), 8)
    assert len(words.unique()) == math.comb(8, 3)


# Words --------------------------------------------------------------------------------------------------------------


def test_embedding_is_the_sum_of_active_vectors_and_its_gradient_reaches_all_bits():
    U, n, k, C = 5, 64, 6, 3
    scores, vectors, g = (torch.randn(s, generator=seeded(i), dtype=torch.float64) for i, s in
                          enumerate(((U, n), (n, C), (U, C))))  # fmt: skip
    scores.requires_grad_(), vectors.requires_grad_()
    active = k_winners(scores.detach(), k)
    bits = SDROperations.dense(active, n, torch.float64).requires_grad_()
    dense = bits @ vectors / k**0.5  # what it must equal, gradients of the bits included
    wanted = torch.autograd.grad(dense, (bits, vectors), g)
    out = Fold.apply(scores, active, vectors)
    found = torch.autograd.grad(out, (scores, vectors), g)
    assert largest(out - dense) < 1e-12
    assert all(largest(a - b) < 1e-12 for a, b in zip(found, wanted)) and (found[0] != 0).all()


@pytest.mark.parametrize("flags", [{}, {"vocab_size": 60, "tie_weights": False}])
def test_gradients_are_summed_per_word(flags):
    """The score gradients of a batch with repetitions are those of its words, weighted by the summed errors."""
    cfg = config(**flags, sdr_radius=0, sdr_scales=0, sdr_rule="none")
    m = SDREmbedding(cfg).double()
    idx = torch.tensor([[3, 3, 1, 3], [1, 7, 3, 0]])
    g = torch.randn(2, 4, 6, generator=seeded(), dtype=torch.float64)
    (m(idx)[0] * g).sum().backward()
    errors = torch.zeros(cfg.vocab_size, 6, dtype=torch.float64).index_add(0, idx.flatten(), g.flatten(0, 1))
    assert largest(m.encoder.scores.grad - errors @ m.encoder.vectors.detach().T / 7**0.5) < 1e-12


@few
@given(V=st.integers(1, 40), B=st.integers(1, 4), T=st.integers(1, 12), seed=st.integers(0, 99))
def test_distinct_words(V, B, T, seed):
    idx = torch.randint(V, (B, T), generator=seeded(seed))
    words, slots = distinct(idx, V)
    assert torch.equal(words[slots], idx) and len(words) == min(V, B * T)
    assert len(slots.unique()) == len(idx.unique())


def test_boosting_counts_tokens_once_a_step_and_only_in_training():
    m = SDREmbedding(config(sdr_boost=50.0))
    idx = torch.tensor([[2, 2, 2, 5]])
    favourite = m.encoder()[1][2]
    m(idx), m(idx)
    assert m.encoder.counted[-1] == 8 and m.encoder.counted[:-1].sum() == 8 * 7
    assert (m.encoder.counted[favourite] >= 6).all() and (m.encoder.duty == 7 / 128).all()
    m.encoder.before_step()
    assert torch.allclose(m.encoder.duty[favourite], torch.tensor(0.99 * 7 / 128 + 0.01 * 0.75), atol=0.0026)
    assert m.encoder.duty.mean().item() == pytest.approx(7 / 128) and not m.encoder.counted.any()
    m.encoder.duty.lerp_((favourite[:, None] == torch.arange(128)).any(0).float(), 0.5)
    trained = m.encoder()[1]
    assert not torch.equal(trained[2].sort().values, favourite.sort().values)
    m.eval()
    m(idx)
    assert torch.equal(m.encoder()[1][2].sort().values, favourite.sort().values) and not m.encoder.counted.any()


@pytest.mark.slow
def test_boosting_spreads_the_load():
    """A few frequent words: with boosting the most used bit is on less often."""
    spread = {}
    for boost in (0.0, 2.0):
        torch.manual_seed(0)
        encoder, slots = SemanticFoldingEncoder(config(sdr_boost=boost)), torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
        for _ in range(200):
            encoder.count(encoder()[1], slots)
            encoder.before_step()
        spread[boost] = encoder.duty.max().item()
    assert spread[2.0] < 0.5 * spread[0.0]


# The map ------------------------------------------------------------------------------------------------------------


def test_retina_smooths_on_a_torus():
    retina = SemanticRetina(config(sdr_size=192, sdr_radius=2))
    H, W = retina.shape
    assert (H, W) == (12, 16)
    x = torch.randn(3, H * W, generator=seeded(), dtype=torch.float64)
    kernel = torch.tensor([1.0, 4, 6, 4, 1], dtype=torch.float64) / 16
    padded = torch.nn.functional.pad(x.view(3, 1, H, W), (2, 2, 2, 2), mode="circular")
    wanted = torch.nn.functional.conv2d(padded, torch.outer(kernel, kernel)[None, None])
    assert largest(retina.smooth(x) - wanted.flatten(1)) < 1e-12
    corner = retina.smooth(torch.eye(H * W, dtype=torch.float64)[:1])
    assert corner.sum().item() == pytest.approx(1) and corner[0, -1] > 0  # around the edges


def test_retina_prefers_clusters():
    """Eight bits side by side and eight alone: the winners lie in and around the cluster."""
    retina = SemanticRetina(config(sdr_size=1024))
    rows, columns = torch.arange(3, 3 + 3).repeat_interleave(3)[:8], torch.arange(10, 13).repeat(3)[:8]
    lonely = torch.tensor([17 * 32 + 4 * i for i in range(8)])
    active = torch.cat((rows * 32 + columns, lonely))[None]
    winners, added = retina(torch.zeros(1, 1024), active, torch.ones(1024, 5))
    drawn = retina.map(winners)[0]
    assert drawn.sum() == 16 and drawn[2:7, 9:14].sum() == 16
    assert torch.allclose(added, torch.full((1, 5), 16 / 4.0))


def test_retina_has_no_ties():
    """Neighbours of a bit are as strong as each other; yet it is never chance, or the device, who wins."""
    encoder, retina = SemanticFoldingEncoder(config(sdr_size=256)), SemanticRetina(config(sdr_size=256))
    tied = 0
    for k in range(2, 20):
        active = k_winners(encoder.scores.detach(), k)
        smooth = retina.smooth(SDROperations.dense(active, 256))
        tied += (smooth.topk(k + 1).values.diff()[:, -1] == 0).sum()
        strength = retina.without_ties(smooth).topk(k + 1)
        assert strength.values.diff()[:, -1].max() < -1e-8
        won = retina(encoder.scores.detach(), active, encoder.vectors)[0]
        assert won.shape == (len(active), k)
    assert tied > 10  # without the slope


def test_retina_gradients_reach_neighbours():
    retina = SemanticRetina(config(sdr_size=256)).double()
    scores = torch.randn(2, 256, generator=seeded(), dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(256, 3, generator=seeded(1), dtype=torch.float64)
    active = k_winners(scores.detach(), 9)
    retina(scores, active, vectors)[1].sum().backward()
    wanted = retina.smooth(vectors.sum(1)[None] / 3).expand(2, -1)  # smoothing is its own transpose
    assert largest(scores.grad - wanted) < 1e-12


# Context ------------------------------------------------------------------------------------------------------------


@few
@given(B=st.integers(1, 3), T=st.integers(1, 40), k=st.integers(1, 9), seed=st.integers(0, 99), cut=st.integers(0, 40))
def test_context_is_the_strongest_of_leaky_unions(B, T, k, seed, cut):
    n, decay = 64, torch.tensor([0.5, 0.9, 0.99])
    keys = random_sets(7, n, k, seed)[torch.randint(7, (B, T), generator=seeded(seed))]
    field, strongest = torch.zeros(B, 3, n), torch.arange(k).repeat(B, 3, 1)
    parts = [context_winners(part, decay, field, strongest) for part in keys.split([min(cut, T), T - min(cut, T)], 1)
             if part.size(1)]  # fmt: skip
    found = torch.cat(parts, 1)
    u, weight = torch.zeros(B, 3, n, dtype=torch.float64), torch.linspace(1, 1.05, n, dtype=torch.float64)
    for t in range(T):
        u = decay[:, None].double() * u + (SDROperations.dense(keys[:, t], n, torch.float64) * weight)[:, None]
        won = u.gather(-1, found[:, t])
        assert (won.sort().values - u.topk(k).values.sort().values).abs().max() < 1e-4
        assert all(len(s) == k for s in as_sets(found[:, t]))
    assert largest(field - u) < 1e-4


def test_scales_of_the_context_differ():
    """An early topic stays in the slow scales and leaves the fast one."""
    encoder = ContextEncoder(config(sdr_scales=3))
    topic, later = random_sets(2, 128, 7)
    keys = torch.stack([topic] * 30 + [later] * 5)[None]
    state = DecodingState()
    encoder(keys, torch.randn(128, 6), state)
    kept = [len(set(topic.tolist()) & s) for s in as_sets(state.of(encoder)["winners"])]
    assert kept[0] <= 1 < kept[2] == 7


# Memory -------------------------------------------------------------------------------------------------------------


def rows_of(active, n):
    """A features function with a row a bit."""
    return lambda slots: 2 * (SDROperations.dense(active[slots], n, torch.float64) / active.size(1) ** 0.5,)


def word_rows(active, n):
    bits = SDROperations.dense(active, n, torch.float64)
    overlaps = bits @ bits.T / active.size(1)
    return lambda slots: (overlaps[slots], torch.nn.functional.one_hot(slots, len(active)))


@pytest.mark.parametrize("features", [rows_of, word_rows])
@pytest.mark.parametrize("name", ["hebb", "decayed", "delta"])
def test_memory_against_fla(name, features):
    active, ids = torch.tensor(FLA["active"]), torch.tensor([FLA["ids"]])
    values = torch.tensor(FLA["values"], dtype=torch.float64)
    rule, decay = ("delta", 1.0) if name == "delta" else ("hebb", FLA["decay"] if name == "decayed" else 1.0)
    found = recall(ids, features(active, FLA["n"]), values, rule, decay)[0][0]
    assert largest(found - torch.tensor(FLA["reads"][name])) < 1e-5


@pytest.mark.parametrize("features", [rows_of, word_rows])
@pytest.mark.parametrize("rule", ["hebb", "delta"])
def test_chunks_equal_the_loop(rule, features):
    """Reads and gradients over three chunks, and in pieces with a store."""
    B, T, n, k, words = 2, 150, 64, 5, 9
    active, ids = random_sets(words, n, k), torch.randint(words, (B, T), generator=seeded())
    values = torch.randn(words, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    q = rows_of(active, n)(ids)[0]
    w = torch.cat((torch.zeros_like(q[:, :1]), q[:, :-1]), 1)
    wanted = reference(q, w, w, values[ids], rule, 0.9)
    found = recall(ids, features(active, n), values, rule, 0.9)[0]
    assert largest(found - wanted) < 1e-10
    g = torch.randn(wanted.shape, generator=seeded(1), dtype=torch.float64)
    grads = [torch.autograd.grad(o, values, g)[0] for o in (found, wanted)]
    assert largest(grads[0] - grads[1]) < 1e-9
    store, parts = {}, []
    for part in ids.split([70, 1, 1, 64, 14], 1):
        o, kept = recall(part, features(active, n), values, rule, 0.9, store)
        store.update(kept)
        parts.append(o)
    assert largest(torch.cat(parts, 1) - wanted) < 1e-10


def test_orthogonal_keys_recall_exactly():
    n, k = 64, 4
    active = torch.arange(n).view(n // k, k)
    values = torch.randn(16, 5, generator=seeded(), dtype=torch.float64)
    ids = torch.tensor([[3, 8, 1, 3, 9, 4, 8, 3, 9, 3]])  # 3 -> 8, 9, 9; 8 -> 1, 3; 9 -> 4, 3
    delta = recall(ids, rows_of(active, n), values, "delta")[0][0]
    hebb = recall(ids, rows_of(active, n), values, "hebb")[0][0]
    for t, last, followers in ((3, 8, [8]), (6, 1, [1]), (7, 9, [8, 9]), (8, 4, [4]), (9, 9, [8, 9, 9])):
        assert largest(delta[t] - values[last]) < 1e-12
        assert largest(hebb[t] - values[followers].sum(0)) < 1e-12
    assert largest(delta[:3]) < 1e-12
    bits = willshaw_reference(active[ids], n)[0]
    assert set(bits[7].nonzero()[:, 0].tolist()) == set(active[8].tolist()) | set(active[9].tolist())


@few
@given(B=st.integers(1, 3), T=st.integers(1, 20), k=st.integers(1, 12), cut=st.integers(0, 20), seed=st.integers(0, 9))
def test_willshaw_is_the_boolean_matrix(B, T, k, cut, seed):
    n = 64
    keys = random_sets(5, n, k, seed)[torch.randint(5, (B, T), generator=seeded(seed))]
    memory, before, parts = torch.zeros(B, n, 1, dtype=torch.int64), keys[:, 0, :0], []
    for part in (p for p in keys.split([min(cut, T), T - min(cut, T)], 1) if p.size(1)):
        parts.append(willshaw(part, before, memory))
        before = part[:, -1]
    assert torch.equal(unpack(torch.cat(parts, 1), n), willshaw_reference(keys, n))


@pytest.mark.slow
def test_willshaw_load_curve():
    """After M pairs of random sets a cell is on with p = 1 - (1 - (k / n)^2)^M. A bit that should not come back does
    if each cell of the cue shares one of the c pairs that stored it, c binomial: E[(1 - (1 - k / n)^c)^k]."""
    from scipy import stats

    n, k, T, B = 256, 8, 1100, 4
    keys = random_sets(B * T, n, k).view(B, T, k)
    memory = torch.zeros(B, n, n // 64, dtype=torch.int64)
    willshaw(keys, keys[:, 0, :0], memory)
    loads = []
    for M in (300, 600, T - 1):
        part = torch.zeros_like(memory)
        willshaw(keys[:, : M + 1], keys[:, 0, :0], part)
        p = 1 - (1 - (k / n) ** 2) ** M
        assert unpack(part, n).double().mean().item() == pytest.approx(p, rel=0.02)
        cue, stored = keys[:, :200], SDROperations.dense(keys[:, 1:201], n, torch.bool)
        row = torch.arange(B)[:, None, None]
        bits = unpack(SDROperations.intersection(part[row, cue]), n)
        assert (bits | ~stored).all()  # what was stored always comes back
        loads.append((bits & ~stored).double().sum(-1).mean().item())
        c = range(M)
        chance = sum(stats.binom.pmf(c, M - 1, k / n) * (1 - (1 - k / n) ** torch.tensor(c).numpy()) ** k)
        assert loads[-1] == pytest.approx((n - k) * chance, rel=0.15, abs=0.02)
    assert loads[0] < 0.1 and loads[2] > 5


def test_willshaw_evaluates_what_hebb_trained():
    """Distinct words, each seen once before: both rules read the same mean, up to the other bits that come back."""
    torch.manual_seed(0)
    ids = torch.arange(8).repeat(2)[None]
    cfg = config(sdr_size=1024, sdr_active=10, sdr_decay=1.0, sdr_rule="willshaw")
    memory, encoder = SDREngramMemory(cfg).double(), SemanticFoldingEncoder(cfg).double()
    _, active, words = encoder()
    hebb, binary = memory(ids, active, words, encoder.vectors), memory.eval()(ids, active, words, encoder.vectors)
    assert largest(hebb - memory.c_proj.bias) > 1e-4
    assert largest((hebb - binary)[:, 9:]) < 0.2 * largest((hebb - memory.c_proj.bias)[:, 9:])


# The module as a whole ----------------------------------------------------------------------------------------------

CASES = [
    {},
    {"sdr_rule": "delta", "sdr_radius": 0},
    {"sdr_rule": "willshaw"},
    {"vocab_size": 40, "tie_weights": False},
    {"vocab_size": 40, "sdr_rule": "delta"},
    {"sdr_scales": 0, "sdr_rule": "none"},
]


@pytest.fixture(params=CASES, ids=lambda flags: ",".join(map(str, flags.values())) or "all")
def case(request):
    torch.manual_seed(0)
    cfg = config(**request.param)
    return SDREmbedding(cfg).double(), torch.randint(cfg.vocab_size, (2, 80), generator=seeded())


@pytest.mark.slow
def test_contracts(case):
    """Causal to the last bit, the same for prefixes and for single rows, and in pieces."""
    m, idx = case
    for model in (m.eval(), m.float()):
        x = model(idx)[0]
        changed = idx.clone()
        changed[:, 30:] = (idx[:, 30:] + 1) % m.vocab_size
        assert torch.equal(model(changed)[0][:, :30], x[:, :30]) and not torch.equal(model(changed)[0], x)
        assert largest(model(idx[:, :33])[0] - x[:, :33]) < 1e-6
        assert largest(model(idx[:1])[0] - x[:1]) < 1e-6
        state, parts = DecodingState(), []
        for part in idx.split([5, 1, 1, 70, 3], 1):
            parts.append(model(part, state)[0])
        assert largest(torch.cat(parts, 1) - x) < 1e-6


def test_every_parameter_gets_a_gradient(case):
    m, idx = case
    x, table, _ = m(idx)
    (x.square().sum() + (0 if table is None else table.square().sum())).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters())


@pytest.mark.parametrize("case", CASES[2:4], indirect=True, ids=("words_tied", "words_distinct"))
@pytest.mark.slow
def test_compiles_to_one_graph(case):
    m, idx = case
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (m, compiled):
        m.zero_grad()
        f(idx)[0].square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
    assert all(largest(a - b) < 1e-9 for a, b in zip(*grads))


@pytest.mark.slow
def test_works_in_bfloat16(case):
    m, idx = case
    wanted = m.eval()(idx)[0]
    m.bfloat16()
    x = m(idx)[0]
    assert x.dtype == torch.bfloat16 and torch.isfinite(x).all()
    m.double()
    assert largest(x.double() - m(idx)[0]) < 0.1 * largest(wanted)


def test_state_does_not_grow():
    for rule in RULES:
        m, state = SDREmbedding(config(sdr_rule=rule)).eval(), DecodingState()
        m(torch.zeros(1, 1, dtype=torch.int64), state)
        size = state.nbytes()
        m(torch.zeros(1, 50, dtype=torch.int64), state)
        assert state.nbytes() == size > 0
