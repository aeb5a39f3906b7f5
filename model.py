"""
nanoChimera: one GPT, many strange ideas, each behind a flag.

`GPTConfig()` with everything off is GPT-2 as nanoGPT builds it, to the parameter name. Every flag keeps the same
contracts (tests/test_contracts.py): causal, prefix-consistent, batch-independent, decoded incrementally, trained by
gradients that arrive, and measured against the same control.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    logits, loss = model(idx, targets)                # idx, targets (B, T); -1 in targets is ignored
    tokens = model.generate(idx, 100, temperature=0)  # cached decoding
    GPTConfig(mlp_act="relu2", pos_embedding="none")  # switch things

References: nanoGPT (github.com/karpathy/nanoGPT); GPT-2 (Radford et al. 2019).
"""

import math
import os
import pickle
from bisect import bisect_right
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernels.block_sparse import Route, block_sparse_attention

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: the single source of every model flag. configurator.py reads names, types, defaults and comments here.


HTM_GROUP = 64  # hidden units of an MLP that make one column


@dataclass
class GPTConfig:
    """Everything that shapes the model. ValueError, naming the flags, for what makes no sense."""

    # -- model size ---------------------------------------------------------------------------------------------------
    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50304  # token ids; train.py takes the data set's (GPT-2's 50257 is padded to a multiple of 64)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs; 0 for pre-training, 0.1+ to fine-tune
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2; False is a bit better and faster
    # -- model controls -----------------------------------------------------------------------------------------------
    mlp_act: str = "gelu"  # "gelu" (exact, nanoGPT) | "gelu_tanh" (OpenAI's GPT-2) | "relu2" (squared ReLU)
    pos_embedding: str = "learned"  # "learned" (a table of block_size rows) | "none" (only causality tells the order)
    # -- geometric routing --------------------------------------------------------------------------------------------
    use_ferope: bool = False  # rotate queries and keys by their position (RoPE), or by their place in their cell
    ferope_freqs: str = "log"  # radians a token: "log" (rope_base^(-i/m), RoPE) | "gaussian" (N(0, 1/anchor_min_gap))
    ferope_m: int = 0  # pairs of dimensions that rotate; 0 = all, head_dim // 2
    ferope_learnable: bool = False  # the frequencies are parameters
    ferope_anchor_relative: bool = False  # position counted from the cell's anchor, not from the start of the text
    rope_base: float = 10000.0  # of "log" frequencies
    use_block_sparse: bool = False  # attend inside the own and neighbouring cells only; attention weights: no dropout
    neighbor_rings: int = 1  # how many cells back a cell can look
    anchor_min_gap: int = 256  # tokens between anchors, at least; a cell is what lies nearest to its anchor
    anchor_jitter: int = 32  # and up to so many more
    anchor_seed: int = 1337  # of the anchors and of random frequencies
    share_region_router: bool = True  # one set of anchors for all layers; False = layer l has anchor_seed + l
    region_size: int = 0  # consecutive cells that make a region; 0 = no regions
    region_edges: int = 0  # of use_block_sparse: a region also looks at the regions 1, 2, 4, ... before it, so many
    use_region_feedback: bool = False  # after attention, add a gated projection of the mean of nearby regions' past
    region_rings: int = 1  # of use_region_feedback: regions this near are neighbours
    feedback_hops: int = 1  # of use_region_feedback: steps over the graph of neighbours
    htm_meta_strength: float = 0.0  # scale a column's update by 1 +- this, by how well it predicts; 0 = off
    htm_meta_decay: float = 0.99  # a step: how long a column's success is remembered
    htm_meta_target: str = "lr"  # what is scaled: "lr" (the update) | "momentum" (AdamW's first moment)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")
        one_of(self, "mlp_act", ACTIVATIONS)
        one_of(self, "pos_embedding", ("learned", "none"))
        one_of(self, "ferope_freqs", ("log", "gaussian"))
        head_dim = self.n_embd // self.n_head
        if not 0 <= 2 * self.ferope_m <= head_dim or (self.use_ferope and head_dim < 2):
            raise ValueError(f"ferope_m={self.ferope_m}: 2 ferope_m must fit into the head's {head_dim} dimensions")
        if self.anchor_min_gap < 1 or self.anchor_jitter < 0 or self.neighbor_rings < 0 or not self.rope_base > 1:
            raise ValueError("anchor_min_gap must be >= 1, anchor_jitter and neighbor_rings >= 0, rope_base > 1")
        if min(self.region_size, self.region_edges, self.region_rings) < 0 or self.feedback_hops < 1:
            raise ValueError("region_size, region_edges and region_rings must be >= 0, feedback_hops >= 1")
        if self.use_region_feedback and not self.region_size:
            raise ValueError("use_region_feedback needs regions: set region_size")
        if self.region_edges and not (self.region_size and self.use_block_sparse):
            raise ValueError("region_edges needs region_size and use_block_sparse: set both")
        self.refuse_idle(
            "use_ferope", self.use_ferope,
            "ferope_freqs", "ferope_m", "ferope_learnable", "ferope_anchor_relative", "rope_base",
        )  # fmt: skip
        self.refuse_idle("use_block_sparse", self.use_block_sparse, "neighbor_rings")
        self.refuse_idle("use_region_feedback", self.use_region_feedback, "region_rings", "feedback_hops")
        self.refuse_idle(
            "region_edges or use_region_feedback", self.region_edges or self.use_region_feedback, "region_size"
        )
        is_random = self.ferope_freqs == "gaussian"
        self.refuse_idle('ferope_freqs="log"', not is_random, "rope_base")
        cells = "cells (use_block_sparse, say)"
        self.refuse_idle(cells, self.has_anchors or is_random, "anchor_min_gap", "anchor_seed")
        self.refuse_idle(cells, self.has_anchors, "anchor_jitter", "share_region_router")
        one_of(self, "htm_meta_target", ("lr", "momentum"))
        self.refuse_idle("htm_meta_strength", self.htm_meta_strength, "htm_meta_decay", "htm_meta_target")
        if not (0 <= self.htm_meta_strength <= 1 and 0 <= self.htm_meta_decay < 1):
            raise ValueError("htm_meta_strength must be in [0, 1], htm_meta_decay in [0, 1)")
        if self.htm_meta_strength and 4 * self.n_embd % HTM_GROUP:
            raise ValueError(f"htm_meta_strength needs hidden units in groups of {HTM_GROUP}: n_embd a multiple of 16")

    def refuse_idle(self, switch, is_on, *names):
        """Refuse flags that were set but do nothing because what they belong to is off."""
        for name in names if not is_on else ():
            if getattr(self, name) != GPTConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)} does nothing without {switch}: set that too")

    @property
    def has_anchors(self):
        """Whether positions belong to cells, of which there are only block_size's."""
        return self.use_block_sparse or self.ferope_anchor_relative or self.use_region_feedback


def one_of(config, name, choices):
    """Refuse a flag whose value is none of `choices`, naming them."""
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}={getattr(config, name)!r}: must be one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------------------
# Small parts: activations and what a model remembers while it decodes.


def relu2(x):
    """max(x, 0)^2, of the same shape. Source: Primer, So et al. 2021, arXiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": relu2,
}


class DecodingState:
    """What a model remembers of the tokens it has read, so that the next one costs a step and not a sequence.

    `pos` is how many tokens were read. `state.of(module)` is a dict that belongs to that module alone, empty at first:
    keys and values, a recurrent field, a window, a running mean. One state serves one batch of sequences.
    """

    def __init__(self):
        self.pos = 0
        self.stores = {}

    def of(self, module):
        return self.stores.setdefault(module, {})

    def nbytes(self):
        """Bytes of all tensors held, spare room of growing buffers included."""
        tensors = [t for store in self.stores.values() for t in store.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)


def append_kv(store, k, v):
    """Add k, v (B, nh, t, hs) to a layer's store; returns all n so far, (B, nh, n, hs) each.

    The buffer doubles when it is full, so a token costs O(1) copies, whatever the length.
    """
    start = store.get("n", 0)
    n = start + k.size(2)
    if "kv" not in store or n > store["kv"].size(3):
        B, nh, _, hs = k.shape
        grown = k.new_empty(2, B, nh, max(64, 2 * n), hs)
        if start:
            grown[..., :start, :] = store["kv"][..., :start, :]
        store["kv"] = grown
    store["kv"][0, :, :, start:n] = k
    store["kv"][1, :, :, start:n] = v
    store["n"] = n
    return store["kv"][0, :, :, :n], store["kv"][1, :, :, :n]


# ---------------------------------------------------------------------------------------------------------------------
# Geometry: cells, and rotary phases measured from their anchors.
#   Anchors are a Poisson-disk sample of the token line, no two nearer than anchor_min_gap; a cell is the run of
#   positions nearest to an anchor. Fe-RoPE turns pair i of a query or key by W_i delta, delta the position, or its
#   offset from the anchor: exact relative phases everywhere, or inside each cell, which is then a frame of its own.
# Cost: the rotation, O(T C). Cells are drawn once for block_size: nothing depends on the length of a batch.
# Sources: RoPE, Su et al. 2021, arXiv 2104.09864; Poisson-disk sampling, Bridson 2007.


def build_pd_anchors_1d(length, min_gap, jitter, generator):
    """A Poisson-disk sample of 0..length-1: (anchors (A,), cell (length,)), int64, on the CPU.

    The first anchor is in [0, jitter], gaps are in {min_gap, ..., min_gap + jitter}; if another fits min_gap after the
    last one, it goes there. cell[p] is the index of the anchor nearest to p, ties to the left. No two anchors are
    nearer than min_gap, and with jitter < min_gap no position is min_gap or more from all of them.
    """

    def draw(most):
        return int(torch.randint(most + 1, (), generator=generator, device="cpu"))

    anchors = [draw(min(jitter, length - 1))]
    while (after := anchors[-1] + min_gap + draw(jitter)) < length:
        anchors.append(after)
    if anchors[-1] + min_gap < length:
        anchors.append(anchors[-1] + min_gap)
    anchors = torch.tensor(anchors, device="cpu")
    borders = (anchors[:-1] + anchors[1:]) // 2  # the last position of each cell
    return anchors, torch.searchsorted(borders, torch.arange(length, device="cpu"))


def anchor_local_offsets(positions, anchors, cell):
    """Signed distance in tokens of each position (T,) from the anchor of its cell, (T,)."""
    return positions - anchors[cell[positions]]


def ferope_ar_rotate(q, k, theta):
    """q and k (B, nh, T, hs) with pair i of each head, dimensions 2i and 2i + 1, turned by theta (T, m) radians.

    Dimensions from 2m on pass through. Computed in float32 or better, returned in the types of q and k.
    """
    cos, sin = theta.cos(), theta.sin()

    def rotate(x):
        turned, rest = x.split((2 * theta.size(1), x.size(-1) - 2 * theta.size(1)), dim=-1)
        a, b = turned.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, theta.dtype)).unbind(-1)  # (B, nh, T, m)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
        return torch.cat((turned, rest), dim=-1)

    return rotate(q), rotate(k)


def region_relation(C, rings, region_size=0, edges=0):
    """Which of C cells may look at which, (C, C) bool: `rings` cells back, and `edges` of 1, 2, 4, ... regions back."""
    c = torch.arange(C, device="cpu")
    back = c[:, None] - c[None, :]
    allowed = (back >= 0) & (back <= rings)
    if edges:
        region = c // region_size
        back = region[:, None] - region[None, :]
        allowed |= torch.isin(back, 2 ** torch.arange(edges, device="cpu"))
    return allowed


def feedback_weights(starts, region_size, rings, hops):
    """What each cell hears of the ones before: (C, C), strictly lower triangular, rows that sum to 1 or 0.

    Seen from cell c, a region's value is the mean over the tokens of its complete cells, those before c; one hop
    replaces it by the mean of the values, where there are any, of the regions at most `rings` away and not after c's.
    """
    length = torch.tensor(starts, device="cpu").diff().double()
    C = len(length)
    region = torch.arange(C, device="cpu") // region_size
    weights = torch.zeros(C, C, dtype=torch.float64, device="cpu")
    for c in range(1, C):
        near = max(0, int(region[c]) - rings * hops)  # no hop reaches further back
        member = (region[:c] == torch.arange(near, int(region[c]) + 1, device="cpu")[:, None]) * length[:c]  # (R, c)
        count = member.sum(1, keepdim=True)
        value, has = member / count.clamp(min=1), (count > 0).double()
        r = torch.arange(len(value), device="cpu")
        neighbour = ((r[:, None] - r[None, :]).abs() <= rings).double()
        for _ in range(hops):
            heard = neighbour @ has
            value, has = neighbour @ value / heard.clamp(min=1), (heard > 0).double()
        weights[c, :c] = value[-1] / length[:c]  # of the sum over a cell's tokens
    return weights.float()


def relate_again(cells, incompatible_keys):
    """After other cells were loaded: what follows from them."""
    cells.relate()


class Cells(nn.Module):
    """The cells of one layer: `cell` and `offset` of each position, (block_size,), and the route they allow."""

    def __init__(self, config, layer):
        super().__init__()
        self.relation = (config.neighbor_rings, config.region_size, config.region_edges)
        self.graph = (
            (config.region_size, config.region_rings, config.feedback_hops) if config.use_region_feedback else None
        )
        seed = config.anchor_seed + (0 if config.share_region_router else layer)
        generator = torch.Generator("cpu").manual_seed(seed)
        anchors, cell = build_pd_anchors_1d(config.block_size, config.anchor_min_gap, config.anchor_jitter, generator)
        self.register_buffer("cell", cell)
        self.register_buffer("offset", anchor_local_offsets(torch.arange(len(cell), device="cpu"), anchors, cell))
        self.register_load_state_dict_post_hook(relate_again)
        self.relate()

    def relate(self):
        """Work out, from the cells, which may look at which and what they hear of each other."""
        cell = self.cell.cpu()
        route = Route.from_cells(cell, region_relation(int(cell[-1]) + 1, *self.relation))
        self.starts = route.starts
        self.register_buffer("allowed", route.allowed.to(self.cell.device), persistent=False)
        if self.graph:
            heard = feedback_weights(route.starts, *self.graph).to(self.cell.device)
            self.register_buffer("heard", heard, persistent=False)

    @property
    def route(self):
        return Route(self.starts, self.allowed)

    def crop(self, block_size):
        self.cell, self.offset = self.cell[:block_size].clone(), self.offset[:block_size].clone()
        self.relate()


class FeRoPE(nn.Module):
    def __init__(self, config):
        super().__init__()
        m = config.ferope_m or config.n_embd // config.n_head // 2
        if config.ferope_freqs == "log":
            W = config.rope_base ** (-torch.arange(m) / m)
        else:
            generator = torch.Generator("cpu").manual_seed(config.anchor_seed)
            W = torch.randn(m, generator=generator, device="cpu") / config.anchor_min_gap
        if config.ferope_learnable:
            self.W = nn.Parameter(W)  # (m,) radians a token
        else:
            self.register_buffer("W", W)

    def _apply(self, fn, recurse=True):
        """Move, but stay in float32 in a half-precision model: at position 1000 bfloat16 is off by radians."""
        W = self.W.detach().clone()
        super()._apply(fn, recurse)
        if self.W.dtype in (torch.bfloat16, torch.float16):
            self.W.data = W.to(self.W.device)
        return self

    def forward(self, q, k, delta):
        """q, k (B, nh, T, hs) turned to delta (T,), in tokens."""
        return ferope_ar_rotate(q, k, delta[:, None].to(torch.promote_types(self.W.dtype, torch.float32)) * self.W)


# ---------------------------------------------------------------------------------------------------------------------
# Token mixer: causal softmax attention.
#   y_t = sum_{s <= t} softmax_s(q_t k_s / sqrt(hs)) v_s, per head; x (B, T, C) -> (B, T, C)
# O(T^2) in training, O(T) a token in decoding, with a state of 2 C numbers a token. Vaswani et al. 2017.


def causal_attention(q, k, v, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v over keys at or before the query; q, k, v and the result (B, nh, T, hs).

    bfloat16 on a CPU takes two batched matmuls for short T: SDPA's flash kernel is slower there (docs/results.md).
    """
    B, nh, T, hs = q.shape
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512:
        mask = q.new_full((T, T), -torch.inf).triu(1)
        att = torch.baddbmm(mask, q.reshape(-1, T, hs), k.reshape(-1, T, hs).mT, alpha=hs**-0.5).softmax(-1)
        return (F.dropout(att, dropout) @ v.reshape(-1, T, hs)).view(B, nh, T, hs)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.dropout, self.is_sparse = config.n_head, config.dropout, config.use_block_sparse
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.cells = Cells(config, layer) if config.has_anchors else None
        self.ferope = FeRoPE(config) if config.use_ferope else None
        self.is_anchored = config.ferope_anchor_relative
        self.activity = torch.zeros(()) if config.htm_meta_strength else None  # how active each head was, by token

    def forward(self, x, state=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in self.c_attn(x).split(C, dim=2))  # (B,nh,T,hs)
        past = 0 if state is None else state.pos
        if self.ferope is not None:
            place = torch.arange(past, past + T, device=x.device)
            q, k = self.ferope(q, k, self.cells.offset[past : past + T] if self.is_anchored else place)
        if state is not None:
            keys, values, place = self.remember(state, k, v)
        y = self.attend(q, k, v) if past == 0 else self.attend_to_memory(q, keys, values, place, past)
        if state is not None and self.is_sparse:
            self.forget(state.of(self), past + T)
        if self.activity is not None and self.training:
            self.activity = y.detach().float().norm(dim=-1).transpose(1, 2)  # (B, T, nh)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def attend(self, q, k, v):
        if self.is_sparse:
            return block_sparse_attention(q, k, v, self.cells.route.first(q.size(2)))
        return causal_attention(q, k, v, self.dropout if self.training else 0.0)

    def attend_to_memory(self, q, k, v, place, past):
        """New queries (B, nh, T, hs) from position `past` on, over the n keys kept, at positions place (n,)."""
        if q.size(2) == 1 and not self.is_sparse:
            return F.scaled_dot_product_attention(q, k, v)
        now = torch.arange(past, past + q.size(2), device=q.device)
        mask = place[None, :] <= now[:, None]  # (T, n)
        if self.is_sparse:
            cell = self.cells.cell
            mask &= self.cells.allowed[cell[now][:, None], cell[place][None, :]]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def remember(self, state, k, v):
        """Add new keys and values to the layer's memory: all of them now, (B, nh, n, hs), and their positions (n,)."""
        store, new = state.of(self), torch.arange(state.pos, state.pos + k.size(2), device=k.device)
        k, v = append_kv(store, k, v)
        if not self.is_sparse:
            return k, v, torch.arange(k.size(2), device=k.device)
        store["place"] = torch.cat((store["place"], new)) if "place" in store else new
        return k, v, store["place"]

    def forget(self, store, next_position):
        """Drop the keys that no position from next_position on can reach, when a new cell begins there."""
        starts = self.cells.starts
        c = bisect_right(starts, next_position) - 1  # the cell that position is in
        if next_position >= starts[-1] or store.get("cell") == c:
            return
        store["cell"] = c
        keep = self.cells.allowed[c:].any(0)[self.cells.cell[store["place"]]]
        store["kv"] = store["kv"][:, :, :, : store["n"]][:, :, :, keep]
        store["place"], store["n"] = store["place"][keep], int(keep.sum())

    def flops_per_token(self, T):
        """Forward FLOPs besides the linear layers: scores and mixing over the keys that a token sees on average."""
        keys = (T + 1) / 2 if not self.is_sparse else self.cells.route.first(T).keys_per_query().float().mean().item()
        return 4 * self.c_proj.in_features * keys


# ---------------------------------------------------------------------------------------------------------------------
# Region feedback: x_t += tanh(gate) proj(sum over c' < c of heard[c, c'] sum_c'), c the cell of t, sum_c' the sum of x
# over cell c'; the gate starts at 0. Only complete cells are heard, so a token hears nothing of its own cell.
# O(T C) for the sums and O((T / cell) C^2) for the projection of one vector a cell; decoding keeps one sum a cell.


class RegionFeedback(nn.Module):
    def __init__(self, config, cells):
        super().__init__()
        self.cells = cells
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        (B, T, C), past = x.shape, 0 if state is None else state.pos
        cell = self.cells.cell[past : past + T]
        sums = x.new_zeros(B, len(self.cells.starts) - 1, C)
        if state is not None:
            sums = state.of(self).setdefault("sums", sums)
        sums = sums.index_add(1, cell, x)
        if state is not None:
            state.of(self)["sums"] = sums
        heard = self.cells.heard.to(x.dtype) @ sums  # (B, cells, C)
        return torch.tanh(self.gate) * self.proj(heard)[:, cell]  # (B, T, C)


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixer: the two-layer perceptron, y = W2 act(W1 x), hidden width 4C; (B, T, C) -> (B, T, C).


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.act = ACTIVATIONS[config.mlp_act]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.activity = torch.zeros(()) if config.htm_meta_strength else None  # how active each group was, by token

    def forward(self, x):
        h = self.act(self.c_fc(x))  # (B, T, 4C)
        if self.activity is not None and self.training:
            self.activity = h.detach().float().abs().unflatten(-1, (-1, HTM_GROUP)).mean(-1)  # (B, T, 4C / 64)
        return self.dropout(self.c_proj(h))


# ---------------------------------------------------------------------------------------------------------------------
# HTM-style meta-updates: columns (attention heads, and groups of 64 hidden units) that predict well learn faster.
#   success_c <- decay success_c + (1 - decay) sum_t a_ct [loss_t < its running mean] / sum_t a_ct, with a_ct >= 0 the
#   activity of column c at token t; c's update is scaled by 1 + strength tanh(z_c), z_c = success_c standardised over
#   the columns. Counted in forward, summed over processes, applied once an optimiser step by hooks on the optimiser.
# Cost: a copy of the columns' weights during the step. After Hawkins & Ahmad 2016 (HTM), where active cells that
# predicted right are reinforced; the rule here is ours.


class ColumnMeta(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.strength, self.decay, self.target = (
            config.htm_meta_strength, config.htm_meta_decay, config.htm_meta_target,
        )  # fmt: skip
        heads, groups = config.n_head, 4 * config.n_embd // HTM_GROUP
        self.sizes = [heads, groups] * config.n_layer
        self.register_buffer("success", torch.full((sum(self.sizes),), 0.5))
        self.register_buffer("mean_loss", torch.tensor(math.log(config.vocab_size)))
        self.register_buffer("counted", torch.zeros(2, sum(self.sizes) + 1))  # sums over tokens: good, all; last: loss

    @torch.no_grad()
    def observe(self, activity, token_loss, seen):
        """Count a micro-batch: activity (N, columns), token_loss (N,), seen (N,) bool, false without a target."""
        good = (token_loss < self.mean_loss) & seen
        weighted = activity * seen[:, None]
        good = torch.cat(((weighted * good[:, None]).sum(0), (token_loss * seen).sum()[None]))
        self.counted += torch.stack((good, torch.cat((weighted.sum(0), seen.sum()[None]))))

    @torch.no_grad()
    def apply_counts(self):
        """Move the running means by what all processes counted since the last step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counted)
        fresh = self.counted[0] / self.counted[1].clamp(min=1e-12)
        fresh = torch.where(self.counted[1] > 0, fresh, torch.cat((self.success, self.mean_loss[None])))
        self.success.lerp_(fresh[:-1], 1 - self.decay)
        self.mean_loss.lerp_(fresh[-1], 1 - self.decay)
        self.counted.zero_()

    def multipliers(self):
        """Each column's factor in [1 - strength, 1 + strength], one tensor a sublayer, attention and MLP in turn."""
        z = (self.success - self.success.mean()) / self.success.std().clamp(min=1e-4)
        factor = 1 + self.strength * torch.tanh(z)
        return factor.split(self.sizes)

    def attach(self, optimizer, blocks):
        """Scale, from now on, what `optimizer` does to the columns of `blocks`."""
        before = {}

        def scaled():
            """(parameter, factors that broadcast to it) of everything that belongs to a column."""
            factors = iter(self.multipliers())
            for block in blocks:
                for linear, back, copies in (
                    (block.attn.c_attn, block.attn.c_proj, 3),
                    (block.mlp.c_fc, block.mlp.c_proj, 1),
                ):
                    factor = next(factors)
                    rows = factor.repeat_interleave(linear.out_features // copies // len(factor)).repeat(copies)
                    yield linear.weight, rows[:, None]
                    if linear.bias is not None:
                        yield linear.bias, rows
                    yield back.weight, rows[: back.in_features]

        @torch.no_grad()
        def pre(optimizer, args, kwargs):
            self.apply_counts()
            if self.target == "lr":
                before.update((p, p.clone()) for p, _ in scaled())
                return
            for p, factor in scaled():
                if "exp_avg" in optimizer.state[p]:  # beta1 times the factor stays below 1: a moment must fade
                    beta1 = optimizer.param_groups[0]["betas"][0]
                    optimizer.state[p]["exp_avg"] *= factor.clamp(max=0.999 / beta1)

        @torch.no_grad()
        def post(optimizer, args, kwargs):
            for p, factor in scaled() if self.target == "lr" else ():
                p.copy_(before.pop(p).lerp(p, factor.expand_as(p)))

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)


# ---------------------------------------------------------------------------------------------------------------------
# Block and GPT.


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.feedback = RegionFeedback(config, self.attn.cells) if config.use_region_feedback else None
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, state=None):
        x = x + self.attn(self.ln_1(x), state)
        if self.feedback is not None:
            x = x + self.feedback(x, state)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model. `losses` holds the last forward's loss components by name, detached (0-d tensors, nats)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.losses = {}
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.pos_embedding == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, Press & Wolf 2017
        self.htm = ColumnMeta(config) if config.htm_meta_strength else None
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 n_layer of these add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def max_positions(self):
        """How many tokens the model can place: block_size, or None where nothing is laid out for so many."""
        placed = self.config.pos_embedding == "learned" or self.config.has_anchors
        return self.config.block_size if placed else None

    def forward(self, idx, targets=None, state=None):
        """Logits and loss of a batch of tokens.

        idx (B, T) int64; targets (B, T) int64 with -1 where there is nothing to predict; state: a DecodingState that
        holds the tokens before idx, and is advanced over them. Returns logits (B, T, V) and the loss, a 0-d tensor in
        nats a token; without targets the logits of the last position, (B, 1, V), and None. ValueError for more tokens
        than the model has positions.
        """
        T, past = idx.size(1), 0 if state is None else state.pos
        if self.max_positions is not None and past + T > self.max_positions:
            raise ValueError(f"{past + T} tokens, but block_size is {self.max_positions}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos_embedding == "learned":
            x = x + self.transformer.wpe.weight[past : past + T]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, state)
        if state is not None:
            state.pos += T
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, -1:])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        if self.htm is not None and self.training:
            activity = torch.cat([a for b in self.transformer.h for a in (b.attn.activity, b.mlp.activity)], -1)
            token_loss = F.cross_entropy(
                logits.detach().flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
            )
            self.htm.observe(activity.flatten(0, 1), token_loss, targets.flatten() != -1)
        self.losses = {"lm": loss.detach()}
        return logits, loss

    # Text -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               repetition_window=None, use_cache=True, generator=None):  # fmt: skip
        """Yield one new token a sequence at a time, (B, 1) int64, after the prompts idx (B, T); see `generate`."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"the prompt must be (B, T) with T >= 1, not {tuple(idx.shape)}")
        check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)
        training, limit = self.training, self.max_positions
        state = DecodingState() if use_cache else None
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if state is None or (limit is not None and idx.size(1) > limit):
                    logits, _ = self(idx if limit is None else idx[:, -limit:])  # a learned position table: slide
                else:
                    logits, _ = self(idx[:, state.pos :], state=state)
                new = next_token(logits[:, -1].float(), idx, temperature, top_k, top_p, min_p, repetition_penalty,
                                 repetition_window, generator)  # fmt: skip
                idx = torch.cat((idx, new), dim=1)
                yield new
        finally:
            self.train(training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
                 use_cache=True, generator=None, repetition_window=None):  # fmt: skip
        """The prompts idx (B, T) int64 followed by max_new_tokens sampled tokens: (B, T + max_new_tokens).

        temperature 0 is greedy. top_k, top_p and min_p cut the tail, in that order. repetition_penalty r divides a seen
        token's logit by r if it is positive and multiplies it if negative, before the temperature; repetition_window
        limits "seen" to the last so many tokens. use_cache=False recomputes everything for each token, with the same
        result. Beyond block_size a model with learned positions slides its window, others go on from their state.
        ValueError for settings out of range.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window,
                          use_cache, generator)  # fmt: skip
        return torch.cat((idx, *new), dim=1)

    # Training -------------------------------------------------------------------------------------------------------

    def num_params(self, non_embedding=True):
        """Number of parameters, position table left out by default as in nanoGPT (token embeddings serve the head)."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos_embedding == "learned":
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T=None):
        """Training FLOPs a token at context T (default block_size): forward, and twice that backward.

        2 a weight of every linear layer, plus what each module says of itself in its own `flops_per_token`.
        """
        T = T or self.config.block_size
        linear = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        own = sum(m.flops_per_token(T) for m in self.modules() if m is not self and hasattr(m, "flops_per_token"))
        return 3 * (linear + own)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where PyTorch has it. Matrices decay; vectors and scalars (norms, biases, gains) do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cpu", "cuda", "mps")
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
        if self.htm is not None:
            self.htm.attach(optimizer, self.transformer.h)
        return optimizer

    def crop_block_size(self, block_size):
        """Shorten the context, e.g. of a pre-trained model. ValueError if it would have to grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: must be 1 to {self.config.block_size}, it can only shrink")
        self.config.block_size = block_size
        if self.config.pos_embedding == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
        for cells in (m for m in self.modules() if isinstance(m, Cells)):
            cells.crop(block_size)

    # Checkpoints and Hugging Face -----------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, checkpoint, **overrides):
        """The model in a dict from `load_checkpoint`, nanoGPT's included; overrides replace config fields (dropout).

        CheckpointError if its flags or tensors are not this version's.
        """
        args = checkpoint["model_args"] | overrides
        unknown = sorted(args.keys() - {f.name for f in fields(GPTConfig)})
        if unknown:
            raise CheckpointError(f"the checkpoint has flags this version does not know: {', '.join(unknown)}")
        try:
            model = cls(GPTConfig(**args))
            model.load_state_dict(checkpoint["model"])
        except (ValueError, TypeError, RuntimeError) as e:
            raise CheckpointError(f"the checkpoint does not fit its own flags: {e}") from e
        return model

    @classmethod
    def from_pretrained(cls, name_or_dir, **overrides):
        """GPT-2 weights: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or a local Hugging Face directory.

        overrides replace config fields (dropout). Needs `transformers`. ValueError for anything that is not plain
        GPT-2, OSError if it cannot be read or downloaded.
        """
        from transformers import GPT2LMHeadModel

        if name_or_dir not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") and not Path(name_or_dir).is_dir():
            raise ValueError(f"{name_or_dir}: neither gpt2, gpt2-medium, gpt2-large, gpt2-xl nor a directory")
        from safetensors import SafetensorError

        try:
            hf, found = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
        except (SafetensorError, RuntimeError) as e:
            raise ValueError(f"{name_or_dir}: its weights are damaged or of other shapes: {e}") from e
        if found["missing_keys"] or found["unexpected_keys"]:  # transformers would fill or drop them without a word
            raise ValueError(f"{name_or_dir}: its tensors do not match its config.json: {found}")
        c = hf.config
        plain = {"model_type": "gpt2", "n_inner": (None, 4 * c.n_embd), "layer_norm_epsilon": 1e-5}
        plain |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
        plain |= {"add_cross_attention": False, "activation_function": tuple(HF_ACTIVATIONS.values())}
        for key, want in plain.items():
            value = getattr(c, key)
            if value not in want if isinstance(want, tuple) else value != want:
                raise ValueError(f"{name_or_dir}: {key}={value!r} is not plain GPT-2 ({want!r})")
        act = next(ours for ours, theirs in HF_ACTIVATIONS.items() if theirs == c.activation_function)
        args = {"block_size": c.n_positions, "vocab_size": c.vocab_size, "mlp_act": act}
        args |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
        model = cls(GPTConfig(**args | overrides))
        model.load_state_dict(transpose_conv1d(hf.state_dict()))
        return model

    def export_hf(self, directory):
        """Write a plain GPT-2 Hugging Face directory (config.json and safetensors); needs `transformers`.

        ValueError if a flag is on that GPT-2 does not have. Missing biases are written as zeros.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        shared = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "mlp_act")
        plain = GPTConfig(**{name: getattr(c, name) for name in shared})
        flags = [f.name for f in fields(c) if getattr(c, f.name) != getattr(plain, f.name)]
        if flags:
            raise ValueError(f"GPT-2 has no {', '.join(flags)}: only a plain model can be exported")
        hf = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            activation_function=HF_ACTIVATIONS[c.mlp_act], bos_token_id=None, eos_token_id=None,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        ))  # fmt: skip
        zeros = {k: torch.zeros_like(v) for k, v in hf.state_dict().items() if k.endswith(".bias")}
        hf.load_state_dict(zeros | transpose_conv1d(self.state_dict()))
        hf.save_pretrained(directory)


def check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window):
    """Refuse settings out of range with a ValueError that names one; nan is out of every range."""
    good = {
        "max_new_tokens": max_new_tokens >= 0,
        "temperature": temperature == 0 or temperature >= 1e-6,  # below, float32 logits overflow
        "top_k": top_k is None or top_k >= 1,
        "top_p": top_p is None or 0 < top_p <= 1,
        "min_p": min_p is None or 0 <= min_p <= 1,
        "repetition_penalty": 0 < repetition_penalty < math.inf,
        "repetition_window": repetition_window is None or repetition_window >= 0,
    }
    ranges = {"temperature": "0 or above 1e-6", "top_k": ">= 1", "top_p": "in (0, 1]", "min_p": "in [0, 1]"}
    for name in (name for name, fine in good.items() if not fine):
        raise ValueError(f"{name} must be {ranges.get(name, 'positive')}")


def next_token(logits, idx, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window, generator):
    """Sample (B, 1) token ids from logits (B, V) after the tokens idx (B, T). See `GPT.generate`."""
    if repetition_penalty != 1.0:
        seen = idx if repetition_window is None else idx[:, max(0, idx.size(1) - repetition_window) :]
        score = logits.gather(1, seen)
        score = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        logits = logits.scatter(1, seen, score)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:  # the fewest tokens whose probabilities reach top_p
        sorted_probs, order = logits.softmax(-1).sort(descending=True)
        beyond = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # reached before this token
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    probs = logits.softmax(-1)
    if min_p is not None:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    return torch.multinomial(probs, 1, generator=generator)


# OpenAI's GPT-2 keeps its linear maps as Conv1D, (in, out): these four are transposed on the way in and out.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}


def transpose_conv1d(weights):
    return {k: v.t() if k.endswith(CONV1D) else v for k, v in weights.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint files: written whole or not at all, read without running what they hold.

CHECKPOINT_FORMAT = 1


# what unpickling bytes that were flipped or cut off can raise
DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or of another version; the message says what to do."""


def save_checkpoint(path, checkpoint):
    """torch.save to `path` so that a kill at any instant leaves the old file or the new one, never half of one.

    CheckpointError if it cannot be written (a full disk, say); the old file is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(checkpoint | {"format": CHECKPOINT_FORMAT}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself reaches the disk only with its directory
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch's zip writer raises its own error on top
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written ({cause.strerror}); an older one is untouched") from e
    finally:
        temporary.unlink(missing_ok=True)


def looks_like_pickle(path):
    """Whether a file starts as pickles do: protocol 2 and later, torch's zip files, or protocol 0's first words."""
    with open(path, "rb") as f:
        start = f.read(2)
    return start == b"PK" or start[:1] in (b"\x80", b"c", b"(")


def named(parts, kind):
    """Whether `parts` is a dict from names to instances of `kind`."""
    return isinstance(parts, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in parts.items())


def load_checkpoint(path, map_location="cpu"):
    """The dict in a checkpoint file of nanoChimera or nanoGPT, with `model` as a clean state dict.

    Read with weights_only=True: tensors and plain values, never code. CheckpointError, one line, for anything else.
    """
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train one first, or set --out_dir") from None
    except pickle.UnpicklingError as e:
        text = str(e)
        if "Unsupported global" in text or "GLOBAL" in text or (looks_like_pickle(path) and "Unsupported" in text):
            raise CheckpointError(f"{path}: holds code, not only tensors; refused, nothing in it was run") from e
        raise CheckpointError(f"{path}: damaged or not a checkpoint; restore a copy or train again") from e
    except DAMAGE as e:
        raise CheckpointError(f"{path}: truncated or damaged; restore a copy or train again") from e
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not (named(parts.get("model"), torch.Tensor) and named(parts.get("model_args"), object)):
        raise CheckpointError(f"{path}: a PyTorch file, but no checkpoint of nanoChimera or nanoGPT")
    version = checkpoint.get("format", 0)  # nanoGPT's own has none
    if version not in range(CHECKPOINT_FORMAT + 1):
        raise CheckpointError(f"{path}: format {version}, but this version reads up to {CHECKPOINT_FORMAT}; update")
    # nanoGPT: torch.compile's prefix, and the causal mask that it keeps as a buffer without flash attention
    weights = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    checkpoint["model"] = {k: v for k, v in weights.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    return checkpoint
