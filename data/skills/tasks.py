"""
Synthetic skills: what a token mixer can do and what it cannot, one task each.

A generator is f(rng, rows, **setting) -> (idx, targets), numpy int64 (rows, T): targets[:, t] is the token to predict
after idx[:, :t + 1], -1 where nothing is asked. rng is a numpy Generator, which alone decides what comes out.
ValueError for settings that make no sense. Every answer can be derived from the row, but for memorisation, whose map is
the same in all rows.

    recall       mqar, in_context_recall, fuzzy_recall, noisy_recall, far_recall
    storage      selective_copying, compression, memorisation
    states       parity, s3, a5
    depth        depo, mano

Sources: Arora et al. 2023, arXiv 2312.04927 (mqar); Poli et al. 2024, arXiv 2403.17844 (MAD: the other recalls, and
storage); Merrill et al. 2024, arXiv 2404.08819, and Grazzi et al. 2024, arXiv 2411.12537 (states); Allen-Zhu 2025,
PhysicsLM4 (depth). far_recall is ours.
"""

import inspect
from functools import cache
from itertools import permutations
from math import perm

import numpy as np


def require(condition, text):
    if not condition:
        raise ValueError(text)


def distinct(rng, rows, size, n):
    """n different numbers below `size` for each row, in random order: (rows, n)."""
    return np.stack([rng.choice(size, n, replace=False) for _ in range(rows)])


def nothing_asked(rows, T):
    return np.full((rows, T), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Recall.


def mqar(rng, rows, vocab_size=8192, T=128, n=8, a=0.01):
    """n pairs of a key and its value, then each key once more, followed by its value, which is what is asked.

    Keys lie in the lower half of the vocabulary, values in the upper, 0 is in all other places. The question number g
    after the pairs is asked with probability ~ a (g + 1)^(a - 1), without replacement: soon is likelier than late.
    """
    half, places = vocab_size // 2, T // 2 - n
    require(vocab_size % 2 == 0, f"vocab_size={vocab_size}: must be even, half of it are keys")
    require(1 <= n <= half - 1, f"n={n} pairs need n < vocab_size / 2 = {half}")
    require(n <= places, f"n={n} pairs and questions need T of at least {4 * n}, not {T}")
    require(0 < a < 1, f"a={a}: must lie in (0, 1)")
    keys, values = 1 + distinct(rng, rows, half - 1, n), half + distinct(rng, rows, half, n)
    weights = (a - 1) * np.log(np.arange(1, places + 1)) + rng.gumbel(size=(rows, places))
    asked = 2 * n + 2 * np.argsort(-weights, 1)[:, :n]  # the n largest are draws without replacement
    idx, targets = np.zeros((rows, T), np.int64), nothing_asked(rows, T)
    idx[:, : 2 * n : 2], idx[:, 1 : 2 * n : 2] = keys, values
    np.put_along_axis(idx, asked, keys, 1)
    np.put_along_axis(idx, asked + 1, values, 1)
    np.put_along_axis(targets, asked, values, 1)
    return idx, targets


def far_recall(rng, rows, keys=64, T=128, n=8):
    """n pairs in the first quarter between random words, all asked in the last quarter: at least T / 2 tokens later.

    Vocabulary: keys, as many values, as many other words.
    """
    require(T % 8 == 0, f"T={T}: must be a multiple of 8")
    require(1 <= n <= min(keys, T // 8), f"n={n} pairs need n <= keys={keys} and n <= T / 8 = {T // 8}")
    idx, targets = rng.integers(2 * keys, 3 * keys, (rows, T)), nothing_asked(rows, T)
    cues, values = distinct(rng, rows, keys, n), keys + distinct(rng, rows, keys, n)
    given, asked = (start + 2 * distinct(rng, rows, T // 8, n) for start in (0, 3 * T // 4))
    for at in (given, asked):
        np.put_along_axis(idx, at, cues, 1)
        np.put_along_axis(idx, at + 1, values, 1)
    np.put_along_axis(targets, asked, values, 1)
    return idx, targets


def recall_pairs(rng, keys, T, is_noise):
    """(idx, targets) of slots of a key and its value; is_noise (rows, T / 2) has False first and last.

    The map from keys to values is drawn for each row. A value is asked where its key came before in the row; the last
    slot's key always did. Noise slots are 0, for the caller to fill.
    """
    rows, slots = is_noise.shape
    cues = rng.integers(keys, size=(rows, slots))
    earlier = np.where(is_noise[:, :-1], -1.0, rng.random((rows, slots - 1))).argmax(1)
    cues[:, -1] = np.take_along_axis(cues, earlier[:, None], 1)[:, 0]
    values = np.take_along_axis(keys + rng.integers(keys, size=(rows, keys)), cues, 1)
    seen, every, asked = np.zeros((rows, keys), bool), np.arange(rows), np.zeros((rows, slots), bool)
    for slot in range(slots):
        asked[:, slot] = seen[every, cues[:, slot]] & ~is_noise[:, slot]
        seen[every, cues[:, slot]] |= ~is_noise[:, slot]
    idx, targets = np.empty((rows, T), np.int64), nothing_asked(rows, T)
    idx[:, ::2], idx[:, 1::2] = np.where(is_noise, 0, cues), np.where(is_noise, 0, values)
    targets[:, ::2][asked] = values[asked]
    return idx, targets


def in_context_recall(rng, rows, vocab_size=16, T=128):
    """Pairs of a key and its value all along, a map drawn for each row; asked wherever the key came before."""
    require(vocab_size % 2 == 0 and vocab_size >= 4, f"vocab_size={vocab_size}: must be even, at least 4")
    require(T % 2 == 0 and T >= 4, f"T={T}: must be even, at least 4")
    return recall_pairs(rng, vocab_size // 2, T, np.zeros((rows, T // 2), bool))


def noisy_recall(rng, rows, vocab_size=32, T=128, noise=0.2, noise_words=16):
    """in_context_recall where each pair but the first and last is, with probability `noise`, two of the noise words.

    The last noise_words of the vocabulary are noise.
    """
    keys = (vocab_size - noise_words) // 2
    require(noise_words >= 1 and keys >= 2 and (vocab_size - noise_words) % 2 == 0,
            f"vocab_size={vocab_size} with noise_words={noise_words}: an even number must be left")  # fmt: skip
    require(T % 2 == 0 and T >= 4, f"T={T}: must be even, at least 4")
    require(0 <= noise < 1, f"noise={noise}: must lie in [0, 1)")
    is_noise = rng.random((rows, T // 2)) < noise
    is_noise[:, [0, -1]] = False
    idx, targets = recall_pairs(rng, keys, T, is_noise)
    words = rng.integers(2 * keys, vocab_size, (rows, T))
    return np.where(is_noise.repeat(2, 1), words, idx), targets


def fuzzy_recall(rng, rows, vocab_size=16, T=128, n=8, shortest=1, longest=3):
    """Pairs of motifs: keys and values are `shortest` to `longest` different tokens of their half of the vocabulary.

    A row draws n key motifs, each with a value motif, and repeats them at random; each token of the value is asked
    where the whole key came before. The last id pads on the left.
    """
    half = vocab_size // 2
    require(vocab_size % 2 == 0, f"vocab_size={vocab_size}: must be even, half of it are keys")
    require(
        1 <= shortest <= longest < half, f"shortest={shortest}, longest={longest}: 1 to vocab_size / 2 - 1, in order"
    )
    there = sum(perm(half, length) for length in range(shortest, longest + 1))
    require(1 <= n <= there, f"n={n}: there are {there} motifs")
    least = 2 * longest * (n + 1)  # with n + 1 pairs, at least one of the n comes twice
    require(least <= T, f"T={T}: n={n} motifs need at least {least}, or none comes twice")
    idx, targets = np.full((rows, T), vocab_size - 1), nothing_asked(rows, T)

    def motif(first, size):
        return tuple(first + rng.choice(size, rng.integers(shortest, longest + 1), replace=False))

    for row in range(rows):
        values = {}
        while len(values) < n:
            values.setdefault(motif(0, half), motif(half, half - 1))
        keys, text, asked, seen = list(values), [], [], set()
        while len(text) + len(pair := (key := keys[rng.integers(n)]) + values[key]) <= T:
            text += pair
            asked += [-1] * (len(key) - 1) + list(values[key] if key in seen else [-1] * len(values[key])) + [-1]
            seen.add(key)
        idx[row, T - len(text) :], targets[row, T - len(text) :] = text, asked
    return idx, targets


# ---------------------------------------------------------------------------------------------------------------------
# Storage.


def selective_copying(rng, rows, vocab_size=16, T=256, n=16):
    """n words between blanks (V - 2) at random places, a sign (V - 1), then n blanks, at which the words are asked."""
    require(vocab_size >= 4, f"vocab_size={vocab_size}: must be at least 4")
    require(n >= 1 and 2 * n < T, f"n={n} words and their copy need T of at least {2 * n + 1}, not {T}")
    words, targets = rng.integers(vocab_size - 2, size=(rows, n)), nothing_asked(rows, T)
    idx = np.full((rows, T), vocab_size - 2)
    np.put_along_axis(idx, np.sort(distinct(rng, rows, T - n - 1, n), 1), words, 1)
    idx[:, T - n - 1] = vocab_size - 1
    targets[:, T - n :] = words
    return idx, targets


def compression(rng, rows, vocab_size=16, T=32):
    """T / 2 random words, then T / 2 signs (V - 1), at which they are asked in order.

    MAD reads all words from one position by a decoder of its own. Here the model has its head alone, so attention may
    look the words up: what this compares is what fits into a state, against that state's bytes.
    """
    require(vocab_size >= 3, f"vocab_size={vocab_size}: must be at least 3")
    require(T % 2 == 0 and T >= 2, f"T={T}: must be even")
    words, targets = rng.integers(vocab_size - 1, size=(rows, T // 2)), nothing_asked(rows, T)
    targets[:, T // 2 :] = words
    return np.concatenate((words, np.full_like(words, vocab_size - 1)), 1), targets


def memorisation(rng, rows, vocab_size=256, T=32, map_seed=0):
    """Keys and signs (V - 1) in turn; at a sign the key's value is asked, by a map that all rows share."""
    half = vocab_size // 2
    require(vocab_size % 2 == 0 and vocab_size >= 4, f"vocab_size={vocab_size}: must be even, at least 4")
    require(T % 2 == 0 and T >= 2, f"T={T}: must be even")
    values = np.random.default_rng(map_seed).integers(half, vocab_size - 1, half)
    keys, targets = rng.integers(half, size=(rows, T // 2)), nothing_asked(rows, T)
    idx = np.full((rows, T), vocab_size - 1)
    idx[:, ::2], targets[:, 1::2] = keys, values[keys]
    return idx, targets


# ---------------------------------------------------------------------------------------------------------------------
# States: the product of all that was read, asked at each position.


def parity(rng, rows, T=40):
    """Bits; asked is whether the number of ones so far is odd."""
    require(T >= 1, f"T={T}: must be at least 1")
    idx = rng.integers(2, size=(rows, T))
    return idx, idx.cumsum(1) % 2


def is_even(p):
    return sum(p[i] > p[j] for i in range(len(p)) for j in range(i + 1, len(p))) % 2 == 0


@cache
def product_table(points, only_even):
    """table[g, h] is the number of g h, (g h)(x) = g(h(x)), of permutations numbered in lexicographic order."""
    group = [p for p in permutations(range(points)) if is_even(p) or not only_even]
    number = {p: i for i, p in enumerate(group)}
    return np.array([[number[tuple(g[x] for x in h)] for h in group] for g in group])


def word_problem(rng, rows, T, table):
    require(T >= 1, f"T={T}: must be at least 1")
    idx = rng.integers(len(table), size=(rows, T))
    targets = idx.copy()
    for t in range(1, T):
        targets[:, t] = table[targets[:, t - 1], idx[:, t]]
    return idx, targets


def s3(rng, rows, T=32):
    """The product of permutations of three things, 6 elements: the smallest group that is not commutative."""
    return word_problem(rng, rows, T, product_table(3, False))


def a5(rng, rows, T=32):
    """The product of even permutations of five things, 60 elements: the smallest group that is not solvable."""
    return word_problem(rng, rows, T, product_table(5, True))


# ---------------------------------------------------------------------------------------------------------------------
# Depth: answers that take several steps.


def depo(rng, rows, n=24, k=4, questions=10):
    """A cycle of n words, its edges `x successor(x)` in random order; then questions `hops word answer`, 1 to k hops.

    Ids: words, n + h - 1 for h hops, n + k at the start. T = 1 + 2 n + 3 questions. Asked is the answer.
    """
    require(n >= 2 and 1 <= k < n, f"n={n}, k={k}: k must be 1 to n - 1")
    require(questions >= 1, f"questions={questions}: must be at least 1")
    cycle, order = distinct(rng, rows, n, n), distinct(rng, rows, n, n)
    edges = np.stack((np.take_along_axis(cycle, order, 1), np.take_along_axis(cycle, (order + 1) % n, 1)), 2)
    place, hops = rng.integers(n, size=(rows, questions)), rng.integers(1, k + 1, (rows, questions))
    words, answers = (np.take_along_axis(cycle, at % n, 1) for at in (place, place + hops))
    parts = np.full((rows, 1), n + k), edges.reshape(rows, -1), np.stack((n + hops - 1, words, answers), 2)
    idx = np.concatenate([part.reshape(rows, -1) for part in parts], 1)
    targets = nothing_asked(*idx.shape)
    targets[:, 2 * n + 2 :: 3] = answers
    return idx, targets


def mano(rng, rows, modulus=11, operators=6, T=64):
    """Expressions in prefix notation, 1 to `operators` of + - *, each followed by = and its value modulo `modulus`.

    Ids: the numbers, then + - * =, then what pads on the left. As many expressions as fit; asked are the values.
    """
    require(modulus >= 2 and operators >= 1, f"modulus={modulus}, operators={operators}: at least 2 and 1")
    require(2 * operators + 3 <= T, f"T={T}: an expression may take {2 * operators + 3} tokens")
    idx, targets = np.full((rows, T), modulus + 4), nothing_asked(rows, T)

    def expression(count):
        """(tokens, value) with so many operators."""
        if not count:
            value = int(rng.integers(modulus))
            return [value], value
        sign, left = rng.integers(3), int(rng.integers(count))
        (a, x), (b, y) = expression(left), expression(count - 1 - left)
        return [modulus + int(sign), *a, *b], (x + y, x - y, x * y)[sign] % modulus

    for row in range(rows):
        end = T
        while True:
            tokens, value = expression(int(rng.integers(1, operators + 1)))
            start = end - len(tokens) - 2
            if start < 0:
                break
            idx[row, start:end] = [*tokens, modulus + 3, value]
            targets[row, end - 2], end = value, start
    return idx, targets


TASKS = {
    f.__name__: f
    for f in (mqar, in_context_recall, fuzzy_recall, noisy_recall, selective_copying, compression, memorisation, parity,
              s3, a5, depo, mano, far_recall)
}  # fmt: skip

# functions of a whole setting: how many ids there are, and how many of them an answer can be
VOCABULARIES = {
    "parity": lambda s: 2,
    "s3": lambda s: 6,
    "a5": lambda s: 60,
    "depo": lambda s: s["n"] + s["k"] + 1,
    "mano": lambda s: s["modulus"] + 5,
    "far_recall": lambda s: 3 * s["keys"],
}
GUESSES = {
    "mqar": lambda s: s["vocab_size"] // 2,
    "in_context_recall": lambda s: s["vocab_size"] // 2,
    "fuzzy_recall": lambda s: s["vocab_size"] // 2 - 1,
    "noisy_recall": lambda s: (s["vocab_size"] - s["noise_words"]) // 2,
    "selective_copying": lambda s: s["vocab_size"] - 2,
    "compression": lambda s: s["vocab_size"] - 1,
    "memorisation": lambda s: s["vocab_size"] // 2 - 1,
    "parity": lambda s: 2,
    "s3": lambda s: 6,
    "a5": lambda s: 60,
    "depo": lambda s: s["n"],
    "mano": lambda s: s["modulus"],
    "far_recall": lambda s: s["keys"],
}


def setting_of(name, **given):
    """A task's whole setting, the given values in place of defaults. ValueError for a name that it does not have."""
    known = {
        p.name: p.default for p in inspect.signature(TASKS[name]).parameters.values() if p.name not in ("rng", "rows")
    }
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{name} has no setting {unknown[0]}; it has {', '.join(known)}")
    return known | given


def vocab_size(name, **given):
    """How many token ids a task's rows use."""
    setting = setting_of(name, **given)
    return VOCABULARIES[name](setting) if name in VOCABULARIES else setting["vocab_size"]


def floor(name, **given):
    """The share of questions that a random guess among the possible answers gets right."""
    return 1 / GUESSES[name](setting_of(name, **given))
