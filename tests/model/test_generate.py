"""Generation: cached decoding equals recomputing, and every sampling rule equals two independent implementations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from model import GPT, DecodingState, GPTConfig, next_token
from smoke_test import VARIANTS

V, BLOCK = 31, 12


def tiny(pos="learned", seed=0):
    """A model whose logits are far apart and depend on everything before, in float64: greedy choices have no ties."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=2, n_embd=16, pos_embedding=pos))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5 if p.dim() == 2 else 0.1)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 16))  # untied, or a token is followed by itself
    return model.double().eval()


def tokens(B, T, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model, idx, n, penalty=1.0):
    """nanoGPT's generate, a row at a time; without a position table nothing is cropped."""
    learned = model.config.pos_embedding == "learned"
    rows = []
    for row in idx.tolist():
        for _ in range(n):
            x = torch.tensor([row[-BLOCK:] if learned else row])
            with torch.no_grad():
                logits = model(x)[0][0, -1].numpy()
            for token in set(row[-6:]):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            row = [*row, int(np.argmax(logits))]
        rows.append(row)
    return torch.tensor(rows)


# -- cached = recomputed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pos", ["learned", "none"])
@pytest.mark.parametrize("B, T", [(1, 1), (3, 5), (2, BLOCK - 1), (1, BLOCK), (2, BLOCK + 1), (2, 3 * BLOCK)])
@pytest.mark.slow
def test_greedy_across_block_size(pos, B, T, use_cache):
    model, idx = tiny(pos), tokens(B, T)
    out = model.generate(idx, 20, temperature=0, use_cache=use_cache)
    assert torch.equal(out, greedy(model, idx, 20)) and out.dtype == torch.int64
    # left alone a random model repeats itself; pushed to vary, a wrong position or a forgotten key shows
    out = model.generate(idx, 20, temperature=0, use_cache=use_cache, repetition_penalty=9.0, repetition_window=6)
    assert torch.equal(out, greedy(model, idx, 20, penalty=9.0))
    assert len(set(out[0, T:].tolist())) > 5


def test_where_the_window_slides_the_two_kinds_differ():
    """Past block_size a position table forgets the first token, a model without one does not."""
    idx = tokens(1, BLOCK + 1)
    changed = idx.clone()
    changed[0, 0] = (idx[0, 0] + 1) % V
    logits = []
    for pos in ("learned", "none"):
        model = tiny(pos)
        model.lm_head.register_forward_hook(lambda m, args, out: logits.append(out))
        model.generate(idx, 1, temperature=0)
        model.generate(changed, 1, temperature=0)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[2], logits[3])


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["learned", "none"]), st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 3))
def test_logits_fed_in_chunks(pos, chunks, B):
    model, state, read = tiny(pos).float(), DecodingState(), 0
    if pos == "learned":
        chunks = [c for i, c in enumerate(chunks) if sum(chunks[: i + 1]) <= BLOCK]
    idx = tokens(B, sum(chunks), seed=len(chunks))
    with torch.no_grad():
        full = model(idx, idx)[0]
        for t in chunks:
            logits, _ = model(idx[:, read : read + t], state=state)
            read += t
            torch.testing.assert_close(logits[:, 0], full[:, read - 1], rtol=0, atol=1e-4)
            assert state.pos == read


@pytest.mark.parametrize("pos, feeds", [("learned", [4] + [1] * (BLOCK - 4) + [BLOCK] * 5), ("none", [4] + [1] * 13)])
def test_a_cached_token_costs_one_position(pos, feeds):
    """What the model is fed: the prompt, then a token at a time, then, where a table ends, whole windows."""
    model, fed = tiny(pos), []
    model.transformer.wte.register_forward_hook(lambda m, args, out: fed.append(args[0].size(1)))
    model.generate(tokens(2, 4), 14, temperature=0)
    assert fed == feeds


def test_sampled_tokens_do_not_depend_on_the_cache():
    model, idx = tiny(), tokens(4, 3)
    a, b = (
        model.generate(idx, 20, top_k=9, generator=torch.Generator().manual_seed(3), use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(a, b)


# -- sampling rules -----------------------------------------------------------------------------------------------


@pytest.fixture
def distribution(monkeypatch):
    """distribution(logits, idx, **rules) -> the probabilities (B, V) that next_token draws from."""

    def of(logits, idx, **rules):
        drawn = []
        with monkeypatch.context() as m:
            draw = torch.multinomial
            m.setattr(torch, "multinomial", lambda probs, *args, **kw: drawn.append(probs) or draw(probs, *args, **kw))
            pick(logits, idx, **rules)
        (probs,) = drawn
        return (probs / probs.sum(-1, keepdim=True)).double().numpy()

    return of


def pick(logits, idx, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
         repetition_window=None, generator=None):  # fmt: skip
    return next_token(logits, idx, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, generator)


def by_hand(logits, idx, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
            repetition_window=None):  # fmt: skip
    """The rules again, in plain Python and float64, a row at a time."""
    rows = []
    for scores, history in zip(logits.double().tolist(), idx.tolist(), strict=True):
        history = history if repetition_window is None else history[max(0, len(history) - repetition_window) :]
        for token in set(history):
            scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        if top_k is not None:
            order = order[:top_k]
        p = np.exp([scores[i] / temperature for i in order])
        if top_p is not None:
            enough = next((n for n in range(1, len(p)) if p[:n].sum() / p.sum() >= top_p), len(p))
            order, p = order[:enough], p[:enough]
        if min_p is not None:
            order, p = zip(*[(i, x) for i, x in zip(order, p, strict=True) if x >= min_p * p[0]], strict=True)
        row = np.zeros(len(scores))
        row[list(order)] = np.array(p) / np.sum(p)
        rows.append(row)
    return np.stack(rows)


def by_transformers(logits, idx, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
                    repetition_window=None):  # fmt: skip
    from transformers import generation as hf

    scores = logits.clone()
    if repetition_penalty != 1:
        seen = idx if repetition_window is None else idx[:, -repetition_window:]
        scores = hf.RepetitionPenaltyLogitsProcessor(repetition_penalty)(seen, scores)
    scores = scores / temperature
    if top_k is not None:
        scores = hf.TopKLogitsWarper(top_k)(idx, scores)
    if top_p is not None:
        scores = hf.TopPLogitsWarper(top_p)(idx, scores)
    if min_p is not None:
        scores = hf.MinPLogitsWarper(min_p)(idx, scores)
    return scores.softmax(-1).double().numpy()


RULES = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": V},
    {"top_k": 10 * V},
    {"top_p": 1e-6},
    {"top_p": 0.4},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 2.0, "repetition_window": 3},
    {"repetition_penalty": 2.0, "repetition_window": 100},
    {"repetition_penalty": 1.3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_window": 5},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.8, "min_p": 0.3},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_rules(distribution, rules, seed):
    logits = 2 * torch.randn(16, V, generator=torch.Generator().manual_seed(seed))
    idx = tokens(16, 9, seed)
    got = distribution(logits, idx, **rules)
    np.testing.assert_allclose(got, by_hand(logits, idx, **rules), atol=1e-5)
    np.testing.assert_allclose(got, by_transformers(logits, idx, **rules), atol=1e-5)


def test_a_window_of_nothing(distribution):
    logits, idx = torch.randn(4, V), tokens(4, 9)
    got = distribution(logits, idx, repetition_penalty=3.0, repetition_window=0)
    np.testing.assert_allclose(got, logits.softmax(-1).double().numpy(), atol=1e-6)


def test_top_p_of_one_keeps_every_token(distribution):
    """Rounding in the sum of a large vocabulary must not cut the tail."""
    logits = 4 * torch.randn(4, 50257, generator=torch.Generator().manual_seed(0))
    assert (distribution(logits, tokens(4, 3), top_p=1.0) > 0).all()


def test_penalty_follows_the_sign():
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert pick(logits, torch.tensor([[0, 0, 0]]), temperature=0, repetition_penalty=2.0) == 1  # 1.5, once, not 3/8
    assert pick(logits, torch.tensor([[0]]), temperature=0, repetition_penalty=1.4) == 0  # 2.14
    logits = torch.tensor([[-3.0, -1.0, -1.5]])
    assert pick(logits, torch.tensor([[1]]), temperature=0, repetition_penalty=2.0) == 2  # -2


def test_logits_are_left_alone():
    logits, idx = torch.randn(4, V), tokens(4, 9)
    before = logits.clone()
    pick(logits, idx, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=2.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "rules",
    [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"repetition_penalty": 1.8}],
    ids=str,
)
def test_frequencies_match_probabilities(rules):
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(5))
    idx, n = torch.tensor([[1, 2]]), 20_000
    expected = n * by_hand(logits, idx, **rules)[0]
    drawn = pick(logits.expand(n, -1), idx.expand(n, -1), generator=torch.Generator().manual_seed(6), **rules)
    assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
    counts = np.bincount(drawn[:, 0].numpy(), minlength=8)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi2 < 26.1  # 7 degrees of freedom at most: exceeded once in 2000 seeds


# -- random generators --------------------------------------------------------------------------------------------


def test_generator_makes_it_reproducible_and_leaves_the_global_one():
    model, idx = tiny(), tokens(2, 4)
    before = torch.get_rng_state()
    a, b, c = (model.generate(idx, 30, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a[0, 4:], a[1, 4:])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_counts():
    model, idx, out = tiny(), tokens(1, 4), []
    for _ in range(2):
        torch.manual_seed(11)
        out.append(model.generate(idx, 30))
    assert torch.equal(*out) and not torch.equal(out[0], model.generate(idx, 30))


def test_greedy_draws_nothing():
    model, before = tiny(), torch.get_rng_state()
    model.generate(tokens(2, 4), 5, temperature=0)
    assert torch.equal(torch.get_rng_state(), before)


# -- modes and arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored(training):
    model = tiny().train(training)
    model.generate(tokens(1, 3), 2)
    assert all(m.training == training for m in model.modules())
    stream = model.stream(tokens(1, 3), 5)
    assert next(stream).shape == (1, 1) and not model.training and torch.is_grad_enabled()
    stream.close()
    assert all(m.training == training for m in model.modules())
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[V]]), 2)  # no such token
    assert model.training == training


def test_no_dropout_and_no_gradients():
    model = tiny().train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.9
    idx = tokens(2, 4)
    assert torch.equal(model.generate(idx, 10, temperature=0), greedy(model.eval(), idx, 10))
    assert not any(new.requires_grad for new in model.stream(idx, 2))


def test_stream_is_generate():
    model, idx = tiny(), tokens(3, 4)
    new = list(model.stream(idx, 15, 0.9, 8, generator=torch.Generator().manual_seed(2)))
    assert [t.shape for t in new] == [(3, 1)] * 15
    out = model.generate(idx, 15, 0.9, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(out, torch.cat((idx, *new), 1))


def test_nothing_to_generate():
    idx = tokens(2, 4)
    assert torch.equal(tiny().generate(idx, 0), idx)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": -0.5},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": 1.5, "repetition_window": -1},
    ],
    ids=str,
)
def test_refused_settings(bad):
    model = tiny().train()
    with pytest.raises(ValueError, match=next(reversed(bad))):  # the message names the setting
        model.generate(tokens(1, 3), 2, **bad)
    assert model.training


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_refused_prompt(shape):
    with pytest.raises(ValueError, match="prompt"):
        tiny().generate(torch.zeros(shape, dtype=torch.int64), 2)


# -- half precision -----------------------------------------------------------------------------------------------


def test_bfloat16_weights():
    model, idx = tiny().bfloat16(), tokens(2, 4)
    out = model.generate(idx, 20, generator=torch.Generator().manual_seed(0))
    assert out.shape == (2, 24) and out.min() >= 0 and out.max() < V
    with torch.autocast("cpu", torch.bfloat16):  # as train.py's samples are written
        assert tiny().float().generate(idx, 20).shape == (2, 24)


GROWING = ["block_sparse", "ferope_anchored", "knots", "knots_and_rings", "region_feedback", "region_edges",
           "mfs_l4_regions"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("positions", ["none", pytest.param("ramanujan", marks=pytest.mark.slow)])
def test_cells_go_on_beyond_the_trained_block(name, positions):
    """Without a learned table: cached and recomputed texts agree, a prefix keeps its logits, nothing else changes."""
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 61}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**size | VARIANTS[name] | {"pos_embedding": positions})).eval()
    for p in model.parameters():
        if p.dim() == 0:
            torch.nn.init.constant_(p, 0.5)  # gates that start at 0
    before = {name: w.clone() for name, w in model.state_dict().items()}
    long = torch.randint(61, (1, 100))
    idx = long[:, :20]
    short, _ = model(idx, idx)
    text = model.generate(idx, 60, temperature=0)
    assert torch.equal(text, model.generate(idx, 60, temperature=0, use_cache=False))
    assert model.config.block_size == 32
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    model.extend_block_size(128)
    torch.testing.assert_close(model(long, long)[0][:, :20], short, rtol=0, atol=1e-5)
    if "anchor_min_gap" in VARIANTS[name]:
        gaps = anchors_of(model).diff()
        assert gaps.min() >= 5 and gaps.max() <= 8  # anchor_min_gap, and anchor_jitter more
    model.crop_block_size(32)
    assert torch.equal(model(idx, idx)[0], short)


def anchors_of(model):
    """The anchors of the first cells that there are: where the offset is 0."""
    cells = next(m for m in model.modules() if hasattr(m, "offset"))
    return (cells.offset == 0).nonzero()[:, 0]


def test_a_learned_table_cannot_grow():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=11))
    with pytest.raises(ValueError, match="learned position table"):
        model.extend_block_size(16)
    assert model.generate(torch.zeros(1, 4, dtype=torch.long), 20).shape == (1, 24)  # its window slides
