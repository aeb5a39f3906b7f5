"""
Associative memories along a sequence, and leaky unions of its past, over sparse binary keys.

The memory is read before it is written: o_t = q_t M_{t-1}, then with the key w_t of the token before and the value v_t
    "hebb":  M_t = decay M_{t-1} + w_t v_t^T
    "delta": M_t = M_{t-1} + w_t (v_t - p_t M_{t-1})^T, p_t the features that read what w_t wrote
    "willshaw": M_t = M_{t-1} or w_t v_t^T over bits; o_t = the bits that all active rows of M_{t-1} share.
`reference` is the plain loop. `recall` computes the first two in chunks: inside a chunk, all pairs at once (for "delta"
a triangular system); between chunks, the state M (B, F, d). So the time is O(T). A features function gives the rows q
and w. They are the keys' bits, or, with a small vocabulary and F = V, the overlaps of token t with every token (to
read) and its one-hot vector (to write), with the same results. Values get a gradient, bits do not. The two custom
operators work on bits only and have no derivative.
"""

import torch
from torch.nn import functional as F

CHUNK = 64  # tokens whose pairs are taken at once
GROUP = 16  # bits per group; `k_winners` takes the maximum of each group first

# ---------------------------------------------------------------------------------------------------------------------
# The reference.


def reference(q, w, p, v, rule="hebb", decay=1.0):
    """Reads (B, T, d) of "hebb" or "delta", token by token; q, w, p (B, T, F), v (B, T, d)."""
    M, out = v.new_zeros(q.size(0), q.size(2), v.size(2)), []
    for t in range(q.size(1)):
        out.append(torch.einsum("bf,bfd->bd", q[:, t], M))
        error = v[:, t] - torch.einsum("bf,bfd->bd", p[:, t], M) if rule == "delta" else v[:, t]
        M = (M if rule == "delta" else decay * M) + w[:, t, :, None] * error[:, None]
    return torch.stack(out, 1)


def willshaw_reference(keys, n):
    """Bits (B, T, n) bool recalled by a plain boolean matrix; keys (B, T, k), key t - 1 is stored with key t."""
    bits = torch.zeros(*keys.shape[:2], n, dtype=torch.bool).scatter_(-1, keys, True)
    M, out = torch.zeros(len(keys), n, n, dtype=torch.bool), []
    for t in range(keys.size(1)):
        out.append((M | ~bits[:, t, :, None]).all(1))
        if t:
            M |= bits[:, t - 1, :, None] & bits[:, t, None]
    return torch.stack(out, 1)


# ---------------------------------------------------------------------------------------------------------------------
# "hebb" and "delta" in chunks.


def recall(ids, features, values, rule="hebb", decay=1.0, store=None, queries=None):
    """(reads (B, T, d), what to store) of tokens ids (B, T), whose values are rows of `values` (U, d); float32 or more.

    features(ids) -> (q, w), (B, T, F) each. store: a dict with the memory of the tokens before. queries (B, T): tokens
    to read with in place of ids, which are written all the same.
    """
    B, T = ids.shape
    keeps, store = store is not None, store or {}
    M, before, out = store.get("M"), store.get("before"), []
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, T, CHUNK):
            now = ids[:, start : start + CHUNK]
            q, w = (x.to(values.dtype) for x in features(now))
            asked = q if queries is None else features(queries[:, start : start + CHUNK])[0].to(values.dtype)
            v = F.embedding(now, values)
            first = (torch.zeros_like(q[:, :1]), torch.zeros_like(q[:, :1])) if before is None else before
            p, w_before = (torch.cat((a, b[:, :-1]), 1) for a, b in zip(first, (q, w)))
            o, M = chunk(asked, w_before, p, v, M, rule, decay, keeps or start + CHUNK < T)
            before = (q[:, -1:], w[:, -1:])
            out.append(o)
    return torch.cat(out, 1), {"M": M, "before": before} if keeps else None


def chunk(q, w, p, v, M, rule, decay, keeps):
    """(reads (B, L, d), the memory after the chunk); M = None is an empty memory; keeps = False returns None."""
    scores = (q @ w.mT).tril(-1)  # read i of write j < i
    if rule == "delta":
        if M is not None:
            v = v - p @ M
        v = torch.linalg.solve_triangular((p @ w.mT).tril(-1), v, upper=False, unitriangular=True)
        o = scores @ v if M is None else scores @ v + q @ M
        return o, (w.mT @ v if M is None else M + w.mT @ v) if keeps else None
    L = q.size(1)
    i = torch.arange(L, device=q.device, dtype=q.dtype)
    o = (scores * decay ** (i[:, None] - i - 1).clamp(min=0)) @ v
    if M is not None:
        o = o + decay ** i[:, None] * (q @ M)
    if not keeps:
        return o, None
    written = w.mT @ (decay ** (L - 1 - i)[:, None] * v)
    return o, written if M is None else decay**L * M + written


# ---------------------------------------------------------------------------------------------------------------------
# Bits: winners, "willshaw", leaky unions.


def k_winners(x, k):
    """Indices (.., k) of the k largest of (.., n), in no order: all are in the k groups with the largest maxima."""
    n = x.size(-1)
    if n % GROUP or n // GROUP <= k:
        return x.topk(k, sorted=False).indices
    groups = x.unflatten(-1, (-1, GROUP)).amax(-1).topk(k, sorted=False).indices
    among = (groups[..., None] * GROUP + torch.arange(GROUP, device=x.device)).flatten(-2)
    return among.gather(-1, x.gather(-1, among).topk(k, sorted=False).indices)


def pack(active, n):
    """Sets of active bits (.., k) of n as words of 64 bits, (.., ceil(n / 64)) int64."""
    words = active.new_zeros(*active.shape[:-1], -(-n // 64))
    return words.scatter_add_(-1, active // 64, torch.ones_like(active) << active % 64)


def unpack(words, n):
    """(.., n) bool of packed sets (.., ceil(n / 64))."""
    return (words[..., None] >> torch.arange(64, device=words.device) & 1).bool().flatten(-2)[..., :n]


def intersect(words):
    """The bits that all packed sets (.., m, W) have in common, (.., W)."""
    while (m := words.size(-2)) > 1:
        half = words[..., : m // 2, :] & words[..., m // 2 : m // 2 * 2, :]
        words = torch.cat((half, words[..., m - 1 :, :]), -2) if m % 2 else half
    return words[..., 0, :]


@torch.library.custom_op("nanochimera::willshaw", mutates_args=("memory",))
def willshaw(
    keys: torch.Tensor, before: torch.Tensor, memory: torch.Tensor, queries: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed bits recalled by keys (B, T, k), or by queries (B, T, k), (B, T, n / 64) int64.

    memory (B, n, n / 64) int64 is updated; before (B, k), the key that came before, or (B, 0).
    """
    row, n, out = torch.arange(len(keys), device=keys.device)[:, None], memory.size(1), []
    asked = keys if queries is None else queries
    for key, query, code in zip(keys.unbind(1), asked.unbind(1), pack(keys, n).unbind(1)):
        out.append(intersect(memory[row, query]))
        memory[row, before] |= code[:, None]
        before = key
    return torch.stack(out, 1)


@willshaw.register_fake
def _(keys, before, memory, queries=None):
    return keys.new_empty(*keys.shape[:2], memory.size(2))


@torch.library.custom_op("nanochimera::context_winners", mutates_args=("field", "strongest"))
def context_winners(
    keys: torch.Tensor, decay: torch.Tensor, field: torch.Tensor, strongest: torch.Tensor
) -> torch.Tensor:
    """The k strongest bits (B, T, S, k) of leaky unions u_t = decay u_{t-1} + bits_t, keys (B, T, k), decay (S,).

    field (B, S, n) is u and strongest (B, S, k) its winners, any bits at the start where u = 0; both are updated.
    Decay keeps the order of the bits, so only the earlier winners and the new bits can win: 2 k candidates, not n. It
    goes token by token, so the result does not depend on how a sequence is split into calls. Bits count 1 to 1.05 by
    their index, to break ties.
    """
    B, S, n = field.shape
    k, winners, out = keys.size(2), strongest, []
    weight = torch.linspace(1, 1.05, n, device=field.device, dtype=field.dtype)[keys]  # (B, T, k)
    for key, count in zip(keys.unbind(1), weight.unbind(1)):
        key = key[:, None].expand(B, S, k)
        field.mul_(decay[:, None]).scatter_add_(-1, key, count[:, None].expand(B, S, k))
        held = field.gather(-1, winners)
        new = field.scatter_(-1, winners, -1.0).gather(-1, key)  # -1: the bit is already among the winners
        field.scatter_(-1, winners, held)
        best = torch.cat((held, new), -1).topk(k, sorted=False).indices
        winners = torch.cat((winners, key), -1).gather(-1, best)
        out.append(winners)
    strongest.copy_(winners)
    return torch.stack(out, 1)


@context_winners.register_fake
def _(keys, decay, field, strongest):
    return keys.new_empty(*keys.shape[:2], decay.size(0), keys.size(2))


# ---------------------------------------------------------------------------------------------------------------------
# Algebra of sets of bits.


class SDROperations:
    """Sets of active bits, as index tensors (.., k) int64 without repeats, or packed, (.., ceil(n / 64)) int64."""

    winners = staticmethod(k_winners)
    pack = staticmethod(pack)
    unpack = staticmethod(unpack)
    intersection = staticmethod(intersect)

    @staticmethod
    def dense(active, n, dtype=torch.float32):
        """(.., n) of zeros and ones."""
        return torch.zeros(*active.shape[:-1], n, dtype=dtype, device=active.device).scatter_(-1, active, 1)

    @staticmethod
    def union(active, n):
        """Packed union of the sets (.., m, k), (.., ceil(n / 64))."""
        return pack_bool(SDROperations.dense(active, n, torch.bool).any(-2))

    @staticmethod
    def threshold(x, least):
        """Packed set of the bits of x (.., n) that are at least `least`."""
        return pack_bool(x >= least)

    @staticmethod
    def count(words):
        """How many bits of packed sets (.., W) are on, (..)."""
        return unpack(words, 64 * words.size(-1)).sum(-1)

    @staticmethod
    def overlap(a, b):
        """How many bits packed sets a and b have in common, broadcast."""
        return SDROperations.count(a & b)

    @staticmethod
    def hamming(a, b):
        """How many bits packed sets a and b differ in, broadcast."""
        return SDROperations.count(a ^ b)

    @staticmethod
    def subsample(active, m, generator=None):
        """m of the k active bits of each set (.., k), (.., m)."""
        order = torch.rand(active.shape, generator=generator, device=active.device)
        return active.gather(-1, order.topk(m, sorted=False).indices)

    @staticmethod
    def noise(active, n, m, generator=None):
        """The sets (.., k) with m of their bits moved to bits that were off."""
        order = torch.rand(*active.shape[:-1], n, generator=generator, device=active.device).scatter(-1, active, -1.0)
        kept = SDROperations.subsample(active, active.size(-1) - m, generator)
        return torch.cat((kept, order.topk(m, sorted=False).indices), -1)


def pack_bool(bits):
    """Packed set (.., ceil(n / 64)) of bits (.., n) bool."""
    bits = F.pad(bits, (0, -bits.size(-1) % 64)).unflatten(-1, (-1, 64)).long()
    return (bits << torch.arange(64, device=bits.device)).sum(-1)
