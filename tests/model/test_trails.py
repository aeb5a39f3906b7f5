"""Trails of recalls and codes of longer contexts, against loops over tokens and plain matrices in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from model import CodeLevels, DecodingState, GPTConfig, SDREngramMemory, SDROperations, SemanticFoldingEncoder


def config(**flags):
    small = {"vocab_size": 11, "n_embd": 6, "sdr_size": 128, "sdr_active": 7, "sdr_decay": 0.9, "sdr_value_dim": 4}
    return SimpleNamespace(**vars(GPTConfig()) | small | flags)


def parts(seed=0, T=40, **flags):
    """A memory and an encoder in float64, and a text (2, T)."""
    torch.manual_seed(seed)
    cfg = config(**flags)
    memory, encoder = SDREngramMemory(cfg).double(), SemanticFoldingEncoder(cfg).double()
    with torch.no_grad():
        encoder.vectors += 0.3 * torch.randn_like(encoder.vectors)
    return memory, encoder, torch.randint(cfg.vocab_size, (2, T))


def by_hand(memory, encoder, idx, steps):
    """The output of a Hebbian trail, one token, one row and one recall at a time, by the whole matrix of bits."""
    _, active, words = encoder()
    keys = SDROperations.dense(active, 128, torch.float64) / 7**0.5
    values = memory.c_value(words)
    out = torch.zeros(*idx.shape, 6, dtype=torch.float64)
    for b, text in enumerate(idx.tolist()):
        M, weight = torch.zeros(128, 4, dtype=torch.float64), torch.zeros(128, dtype=torch.float64)
        for t, word in enumerate(text):
            query = word
            for step in range(steps):
                o = keys[query] @ M / (1 + keys[query] @ weight)
                out[b, t] += memory.c_proj(o) if step == 0 else memory.trail[step - 1](o)
                query = max(range(len(values)), key=lambda v: torch.cosine_similarity(o, values[v], dim=0).item())
            if t:
                M, weight = 0.9 * M, 0.9 * weight
                M = M + torch.outer(keys[text[t - 1]], values[word])
                weight = weight + keys[text[t - 1]]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"sdr_size": 128, "vocab_size": 40}], ids=("rows_of_words", "rows_of_bits"))
@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_a_trail_is_its_loop(flags, steps):
    memory, encoder, idx = parts(sdr_trail=steps, **flags)
    _, active, words = encoder()
    found = memory(idx, active, words, encoder.vectors)
    late = slice(2, None)  # before, nothing has been stored, and any word is as near
    assert (found - by_hand(memory, encoder, idx, steps))[:, late].abs().max() < 1e-7  # words' overlaps are float32
    state, pieces = DecodingState(), []
    for part in idx.split([5, 1, 1, 30, 3], 1):
        pieces.append(memory(part, active, words, encoder.vectors, state))
    assert (torch.cat(pieces, 1) - found).abs().max() < 1e-12


@pytest.mark.parametrize("rule", ["delta", "willshaw"])
@torch.no_grad()
def test_a_trail_walks_along_a_text(rule):
    """Each word once, then its beginning again: the reads are the next word, the one after it, and so on."""
    torch.manual_seed(0)
    cfg = config(vocab_size=40, sdr_size=512, sdr_active=10, sdr_value_dim=32, n_embd=32, sdr_rule=rule, sdr_trail=3)
    memory, encoder = SDREngramMemory(cfg).double().eval(), SemanticFoldingEncoder(cfg).double().eval()
    _, active, words = encoder()
    idx = torch.cat((torch.randperm(40), torch.zeros(1, dtype=torch.int64)))[None]
    idx[0, -1] = idx[0, 10]
    queries, met = None, []
    for _ in range(4):
        read, _ = memory.read(idx, active, words, encoder.vectors, None, queries)
        queries = memory.nearest(read, words)
        met.append(queries[0, -1].item())
    assert met == idx[0, 11:15].tolist()


def test_willshaw_reads_by_other_keys():
    torch.manual_seed(0)
    memory, encoder, idx = parts(sdr_rule="willshaw", sdr_trail=2)
    memory.eval()
    _, active, _ = encoder()
    other, found = idx.roll(1, 0), []
    for asked in (None, idx, other):
        queries = None if asked is None else active[asked]
        found.append(memory.recall_bits(active[idx], encoder.vectors, {}, queries)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    bits = SDROperations.dense(active, 128, torch.bool)
    M = torch.zeros(128, 128, dtype=torch.bool)
    for t in range(1, idx.size(1) - 1):  # what the last token's read finds
        M |= bits[idx[0, t - 1]][:, None] & bits[idx[0, t]]
    recalled = (M | ~bits[other[0, -1]][:, None]).all(0).double()
    wanted = recalled @ memory.c_value(encoder.vectors) / 7**0.5 / (1 + recalled.sum() / 7)
    assert (found[2][0, -1] - wanted).abs().max() < 1e-12 and recalled.sum() > 0


def test_trails_start_with_the_plain_memory():
    """One recall has no new parameters; the first of several is the same."""
    plain, encoder, idx = parts()
    long, _, _ = parts(sdr_trail=3)
    assert {n for n, _ in long.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        "trail.0.weight",
        "trail.1.weight",
    }
    long.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for c_next in long.trail:
            c_next.weight.zero_()
    _, active, words = encoder()
    assert torch.equal(*(m(idx, active, words, encoder.vectors) for m in (plain, long)))


# Levels -------------------------------------------------------------------------------------------------------------


def codes_by_hand(text, levels, n, k):
    """Each level's sets of bits for a text of sets, by whole unions in float64."""
    out, weight = [], torch.linspace(1, 1.05, n, dtype=torch.float64)
    for up in range(1, levels):
        union, found = torch.zeros(n, dtype=torch.float64), []
        for bits in text:
            union = union * math.exp(-0.5 * 0.25**up)
            union[list(bits)] += weight[list(bits)]
            found.append(set(union.topk(k).indices.tolist()))
        text = found
        out.append(found)
    return out


@pytest.mark.parametrize("levels", [2, 4])
def test_codes_of_longer_contexts(levels):
    torch.manual_seed(0)
    module = CodeLevels(config(sdr_levels=levels)).double()
    keys = torch.stack([torch.randperm(128)[:7] for _ in range(5)])[torch.randint(5, (2, 30))]
    codes = module.codes(keys)
    wanted = [codes_by_hand([set(key.tolist()) for key in row], levels, 128, 7) for row in keys]
    for up, code in enumerate(codes):
        assert [[set(x.tolist()) for x in row] for row in code] == [w[up] for w in wanted]
    y = sum(module.vectors[up - 1][code >> up].sum(-2) for up, code in enumerate(codes, 1)) / 7**0.5
    assert (module(keys) - y).abs().max() < 1e-12
    assert [len(v) for v in module.vectors] == [128 >> up for up in range(1, levels)]
    state = DecodingState()
    pieces = [module(part, state) for part in keys.split([1, 9, 20], 1)]
    assert (torch.cat(pieces, 1) - y).abs().max() < 1e-12


def test_higher_codes_change_more_slowly():
    torch.manual_seed(0)
    module = CodeLevels(config(sdr_levels=3))
    keys = torch.stack([torch.randperm(128)[:7] for _ in range(50)])[torch.randint(50, (1, 400))]
    dense = [SDROperations.dense(code[0], 128) for code in (keys, *module.codes(keys))]
    stays = [(x[1:] * x[:-1]).sum(-1).mean().item() / 7 for x in dense]
    assert stays[0] < stays[1] < stays[2]
