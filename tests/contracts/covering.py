"""
A covering array: few configurations in which every pair of values of every two flags occurs that GPTConfig accepts.

    PYTHONPATH=. python tests/contracts/covering.py  # makes covering.jsonl again, the table that test_covering.py runs

Faults live in pairs that nobody thought of. Rows are grown greedily and with a seed: from a pair that no row has yet,
by whatever flag adds most new pairs, as long as GPTConfig accepts the row. It is the only judge of what goes together.
"""

import json
import random
from dataclasses import fields
from itertools import combinations, product
from pathlib import Path
from typing import get_args

import numpy as np

from model import GPTConfig
from smoke_test import SIZE, VARIANTS

# The values of a flag besides its default: numbers that suit SIZE, mixers; every choice and both bools follow below
VALUES = {
    "dropout": [0.1],
    "region_feedback_edges": ["0>1"],
    "attn_mode": ["sigmoid", "fhn", "kaufmann", "gla", "gdn"],
    "attn_pattern": ["fhn,softmax", "kaufmann,sigmoid"],
    "short_conv": [3],
    "short_conv_at": ["abcd"],
    "n_kv_head": [1],
    "kan_bank": [1],
    "bio_omega": [2.0],
    "bio_compartments": [2, 4],
    "bio_dendrite_dim": [24],
    "bio_threshold": [0.0],
    "bio_target_sparsity": [0.3],
    "ferope_m": [3],
    "rope_base": [500.0],
    "neighbor_rings": [0],
    "anchor_seed": [7],
    "region_size": [2],
    "region_edges": [2],
    "region_rings": [2],
    "feedback_hops": [2],
    "region_prior_decay": [0.5],
    "knot_vertices": [6],
    "knot_k": [2],
    "fhn_steps": [4],
    "fhn_dt": [0.5],
    "fhn_partitions": [3],
    "sdr_size": [256],
    "sdr_active": [8],
    "sdr_boost": [0.0],
    "sdr_radius": [0],
    "sdr_scales": [0],
    "sdr_decay": [0.9],
    "sdr_value_dim": [16],
    "sdr_trail": [2],
    "sdr_levels": [3],
    "manifold_dim": [5],
    "manifold_vectors": [2],
    "geodesic_weight": [0.1],
    "n_eigenvectors": [4],
    "spectral_landmarks": [16],
    "spectral_refresh": [3],
    "adjacent_possible": [0.3],
    "mhc_streams": [2],
    "mhc_sinkhorn_iters": [5],
    "loss_chunk": [40],
    "mfs_K": [2],
    "mfs_P": [1],
    "mfs_layers": [1, 2],
    "mfs_window": [1],
    "mfs_lowrank_r": [4],
    "l4_loss_weight": [0.2],
    "aux_heads": ["1"],
    "aux_heads_weight": [0.3],
    "ae_window": [3],
    "ae_dim": [5],
    "slate_window": [4],
    "frozen_seed": [7],
    "fa_sparse_k": [4],
    "fa_grape_every": [2],
    "fa_grape_n_probe": [8],
    "fa_grape_lr": [0.5],
    "fa_calibrate_every": [3],
    "freeze_blocks": [1],
    "mlp_topk": [16],
    "resid_topk": [24],
    "vq_codes": [2048],
    "subspace_rank": [24],
    "htm_meta_strength": [0.5],
    "htm_meta_decay": [0.5],
}
DEFAULTS = {f.name: f.default for f in fields(GPTConfig)}
CELL_SIZES = ("anchor_min_gap", "anchor_jitter", "knot_block", "knot_threshold")  # what `fitted` sets
VALUES |= {name: [not default] for name, default in DEFAULTS.items() if isinstance(default, bool)}
CHOICES = {f.name: [choice for choice in get_args(f.type) if choice != f.default] for f in fields(GPTConfig)}
VALUES |= {name: choices for name, choices in CHOICES.items() if choices}

# What switches a flag on: other flags, with alternatives. Whose flag is not here stands for itself.
FACETS = [{"use_mfs_head": True, "mfs_layers": n} for n in (2, 1)]
HEADS = [FACETS[0], {"add_l4_losses": True}]
SLATES = [head | {"region_size": 2} for head in HEADS]
CELLS = [{"use_block_sparse": True}, {"use_ferope": True, "ferope_anchor_relative": True}]
KNOTS = [{"use_knot_attention": True}, {"attn_mode": "kaufmann"}, {"attn_pattern": "kaufmann,sigmoid"}]
WAVES = [{"attn_mode": "fhn"}, {"attn_mode": "kaufmann"}, {"attn_pattern": "fhn,softmax"}]
SIGMOID = [{"attn_mode": "sigmoid"}, {"attn_pattern": "kaufmann,sigmoid"}]
UNTIED, BIO, SDR = {"tie_weights": False}, {"use_bio_mlp": True}, {"use_sdr": True}
GRAPE = [{"method": rule, "fa_grape": True, **UNTIED} for rule in ("fa", "dfa")]
NOT_BP = [{"method": rule, **UNTIED} for rule in ("fa", "sign_sym", "dfa")]
WAVELETS = [{"use_kan": True}, {"attn_mode": "kaufmann"}, {"attn_pattern": "kaufmann,sigmoid"}]
ON = {
    "vq_per_block": [{"vq_codes": 2048}],
    "short_conv_at": [{"short_conv": 3}],
    "kaufmann_resonance": KNOTS[1:],
    "sigmoid_bias_mode ste_sigmoid": SIGMOID,
    "kan_wavelet kan_edges kan_bank": WAVELETS,
    "kan_match_params": [{"use_kan": True}],
    "bio_omega bio_osc_learnable bio_compartments bio_threshold bio_gate bio_adaptive_threshold": [BIO],
    "bio_plasticity bio_spiking": [BIO],
    "bio_dendrite_dim bio_lateral bio_attention_gain": [{**BIO, "bio_compartments": 2}],
    "bio_connectivity": [{**BIO, "bio_compartments": 4}],
    "bio_target_sparsity": [{**BIO, "bio_adaptive_threshold": True}],
    "ferope_freqs ferope_m ferope_learnable ferope_anchor_relative rope_base": [{"use_ferope": True}],
    "neighbor_rings": [{"use_block_sparse": True}],
    "anchor_seed": [*CELLS, {"use_ferope": True, "ferope_freqs": "gaussian"}, *SLATES],
    "share_region_router": [*CELLS, *SLATES],
    "region_size": [*HEADS, {"use_region_feedback": True}],
    "region_edges": [{"use_block_sparse": True, "region_size": 2}],
    "use_region_feedback": [{"region_size": 2}],
    "region_rings feedback_hops": [{"use_region_feedback": True, "region_size": 2}],
    "region_feedback_edges": [{"use_region_feedback": True, "region_size": 2}],
    "region_slate_include_prior region_prior_decay": SLATES,
    "region_slate_include_error": [{"add_l4_losses": True, "region_size": 2}],
    "knot_vertices knot_k knot_learned_threshold": KNOTS,
    "fhn_steps fhn_dt fhn_dynamics use_fhn_imex use_fhn_partitioning": WAVES,
    "fhn_partitions": [w | {"use_fhn_partitioning": True} for w in WAVES],
    "sdr_size sdr_boost sdr_radius sdr_scales sdr_rule sdr_decay sdr_value_dim": [SDR],
    "sdr_active engram_at sdr_trail sdr_levels": [SDR],
    "manifold manifold_at manifold_dim geodesic_weight skip_manifold_spectral": [{"use_manifold": True}],
    "manifold_vectors": [{"use_manifold": True, "manifold": kind} for kind in ("e7", "rotor")],
    "n_eigenvectors spectral_landmarks spectral_refresh": [{"use_manifold": True}],
    "use_manifold": [{}, {"skip_manifold_spectral": True}],
    "mhc_streams mhc_sinkhorn_iters hc_mode": [{"use_mhc": True}],
    "mla_mode": [{"use_mla": True}],
    "mfs_K mfs_P mfs_layers mfs_window mfs_lowrank_r use_mfs_head": FACETS,
    "l4_loss_weight ae_window ae_dim": [{"add_l4_losses": True}],
    "mfs_slate": FACETS,
    "aux_heads_weight aux_heads_own": [{"aux_heads": "1"}],
    "slate_window": [{"add_l4_losses": True}, FACETS[0] | {"mfs_slate": True}],
    "method freeze_emb": [UNTIED],
    "frozen_seed": [{"vq_codes": 2048}, {"subspace_rank": 24}, *NOT_BP],
    "fa_init_mode": [{"method": "fa", **UNTIED}],
    "fa_sparse_k": [{"method": "fa", "fa_init_mode": "sparse", **UNTIED}],
    "sign_sym_scale": [{"method": "sign_sym", **UNTIED}],
    "dfa_granularity dfa_feedback": [{"method": "dfa", **UNTIED}],
    "fa_grape fa_grape_every fa_grape_n_probe fa_grape_lr": GRAPE,
    "fa_calibrate_every": NOT_BP,
    "vq_lattice": [{"n_embd": 28}, {"n_embd": 112}],  # groups of 7 channels; 112 for columns of 16 besides
    "htm_meta_strength": [{}, {"n_embd": 112}],
    "htm_meta_decay htm_meta_target": [{"htm_meta_strength": 0.5}],
}  # fmt: skip
ON = {flag: switches for names, switches in ON.items() for flag in names.split()}
for row in VARIANTS.values():  # a flag that is in no table above takes value and switches from the rows that set it
    for flag in row.keys() - VALUES.keys() - set(CELL_SIZES) - SIZE.keys():
        VALUES[flag] = [row[flag]]
        ON[flag] = [{name: value for name, value in row.items() if name != flag}]

LEVELS = [(flag, value) for flag in VALUES for value in (DEFAULTS[flag], *VALUES[flag])]
NUMBER = {level: i for i, level in enumerate(LEVELS)}
OTHERS = [level for level in LEVELS if level[1] != DEFAULTS[level[0]]]


def fitted(flags):
    """The flags with cells and knots that suit a block of SIZE, or None where GPTConfig refuses them.

    The defaults make one cell and seldom tie two.
    """
    try:
        config = GPTConfig(**SIZE | flags)
    except ValueError:
        return None
    sizes = {"knot_threshold": 1.0} if config.has_knots() else {}
    if config.has_anchors:
        sizes |= {"anchor_min_gap": 5, "anchor_jitter": 3}
    elif config.has_knots():
        sizes |= {"knot_block": 6}
    if config.ferope_freqs == "gaussian":
        sizes |= {"anchor_min_gap": 5}
    return flags | sizes


def joined(*parts):
    """The union of flags, or None where they contradict each other."""
    flags = {}
    for part in parts:
        if any(flags.get(name, value) != value for name, value in part.items()):
            return None
        flags |= part
    return flags


def ways(flag, value):
    """The sets of flags that hold this value and what it needs, each set as small as it can be."""
    if value == DEFAULTS[flag]:
        return [{flag: value}]
    parts = (joined(on, {flag: value}) for on in ON.get(flag, [{}]))
    return [part for part in parts if part is not None]


def holding(row, *levels):
    """The row with these values added and what they need, in each way that GPTConfig accepts."""
    for parts in product(*(ways(*level) for level in levels)):
        flags = joined({k: v for k, v in row.items() if k not in CELL_SIZES}, *parts)
        if flags is not None and (flags := fitted(flags)) is not None:
            yield flags


def levels_of(row):
    return np.array([NUMBER[flag, row.get(flag, DEFAULTS[flag])] for flag in VALUES])


def coverable():
    """A symmetric matrix (levels, levels): the pairs that some accepted configuration holds."""
    found = np.zeros((len(LEVELS), len(LEVELS)), bool)
    for a, b in combinations(LEVELS, 2):
        if a[0] != b[0] and next(holding({}, a, b), None) is not None:
            found[NUMBER[a], NUMBER[b]] = found[NUMBER[b], NUMBER[a]] = True
    return found


def grow(row, missing, rng):
    """The row with flag after flag added in random order, where that adds pairs which are still missing."""

    def gain(row):
        at = levels_of(row)
        return missing[np.ix_(at, at)].sum()

    order, best = OTHERS[:], gain(row)
    rng.shuffle(order)
    for level in order:
        if level[0] in row or not missing[NUMBER[level]].any():
            continue
        for flags in holding(row, level):
            if (now := gain(flags)) > best:
                row, best = flags, now
                break
    return row


def rows(seed=1, tries=4):
    """Flags of each row, the values at their defaults left out."""
    rng, missing, found = random.Random(seed), coverable(), []
    while missing.any():
        a = int(missing.sum(1).argmax())
        b = int(np.flatnonzero(missing[a])[0])
        starts = list(holding({}, LEVELS[a], LEVELS[b]))
        grown = [grow(rng.choice(starts), missing, rng) for _ in range(tries)]
        row = max(grown, key=lambda r: missing[np.ix_(levels_of(r), levels_of(r))].sum())
        at = levels_of(row)
        missing[np.ix_(at, at)] = False
        found.append({flag: value for flag, value in row.items() if value != DEFAULTS[flag]})
    return found


TABLE = Path(__file__).with_name("covering.jsonl")


def table():
    return [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    TABLE.write_text("".join(f"{json.dumps(row)}\n" for row in rows()), encoding="utf-8")
