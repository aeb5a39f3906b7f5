"""
Does every variant still work? Seconds, on a CPU, for a human at a terminal.

    python smoke_test.py
    python smoke_test.py --only=baseline,relu2 --device=cuda

Each variant is built small, checked (probabilities sum to 1, causal, cached decoding equals recomputing), trained for a
few steps on one repeated batch and made to write. One row each; exit status 1 if any failed.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback

import math
import sys
import time
from dataclasses import dataclass

import torch

import configurator
from configurator import check_values
from model import GPT, DecodingState, GPTConfig
from train import pick_device

CELLS = {"anchor_min_gap": 5, "anchor_jitter": 3}  # cells that suit a block of 32
SDR = {"sdr_size": 256, "sdr_active": 8}  # bits that suit a vocabulary of 61
LOCAL = {"tie_weights": False}  # other rules than backpropagation need it
KNOTS = {"knot_block": 6, "knot_vertices": 6, "knot_threshold": 1.0, "knot_k": 2}  # and knots that suit such cells
MODERN = {  # a plain block of today
    "norm": "rms",
    "qk_norm": True,
    "pos_embedding": "rope",
    "mlp_act": "relu2",
    "emb_norm": True,
    "zero_init_proj": True,
    "logit_softcap": 15.0,
    "tie_weights": False,
    "bias": False,
}

# Every variant, by the flags that switch it on. tests/contracts/test_contracts.py runs all contracts over this table:
# a new flag is a new row here.
VARIANTS = {
    "baseline": {},
    "no_bias": {"bias": False},
    "gelu_tanh": {"mlp_act": "gelu_tanh"},
    "relu2": {"mlp_act": "relu2"},
    "no_positions": {"pos_embedding": "none"},
    "rope": {"pos_embedding": "rope"},
    "rms": {"norm": "rms"},
    "qk_norm": {"qk_norm": True},
    "emb_norm": {"emb_norm": True},
    "zero_init": {"zero_init_proj": True},
    "init_gain": {"init_gain": 0.6},
    "softcap": {"logit_softcap": 15.0},
    "modern": MODERN,
    "short_conv": {"short_conv": 3, "short_conv_at": "abcd"},
    "short_conv_waves": {"attn_mode": "fhn", "use_swiglu": True, "short_conv": 4, "short_conv_at": "bd"},
    "token_shift": {"token_shift": True},
    "n_kv_head": {"n_kv_head": 1},
    "value_embeds": {"value_embeds": True},
    "x0_skip": {"x0_skip": True},
    "modern_full": {**MODERN, "short_conv": 4, "token_shift": True, "value_embeds": True, "x0_skip": True},
    "ferope": {"use_ferope": True, "pos_embedding": "none"},
    "ferope_partial": {"use_ferope": True, "ferope_m": 3, "ferope_freqs": "gaussian", "anchor_min_gap": 8},
    "ferope_anchored": {"use_ferope": True, "ferope_anchor_relative": True, "ferope_learnable": True, **CELLS},
    "block_sparse": {"use_block_sparse": True, **CELLS},
    "block_sparse_0_rings": {"use_block_sparse": True, "neighbor_rings": 0, "share_region_router": False, **CELLS},
    "region_edges": {"use_block_sparse": True, "region_size": 2, "region_edges": 2, "neighbor_rings": 0, **CELLS},
    "region_feedback": {"use_region_feedback": True, "region_size": 1, "region_rings": 2, "feedback_hops": 2, **CELLS},
    "region_feedback_edges": {
        "use_region_feedback": True,
        "region_size": 1,
        "region_feedback_edges": "0>2,1>3",
        **CELLS,
    },
    "sigmoid": {"attn_mode": "sigmoid"},
    "sigmoid_learned": {"attn_mode": "sigmoid", "sigmoid_bias_mode": "learned", "use_block_sparse": True, **CELLS},
    "sigmoid_neg_log_i": {"attn_mode": "sigmoid", "sigmoid_bias_mode": "neg_log_i", "use_block_sparse": True, **CELLS},
    "sigmoid_zero": {"attn_mode": "sigmoid", "sigmoid_bias_mode": "zero"},
    "knots": {"use_knot_attention": True, **KNOTS},
    "knots_learned": {"use_knot_attention": True, "knot_learned_threshold": True, **KNOTS},
    "knots_and_rings": {
        "use_knot_attention": True,
        "use_block_sparse": True,
        "use_ferope": True,
        "attn_mode": "sigmoid",
        "knot_k": 1,
        "knot_threshold": 1.0,
        **CELLS,
    },
    "fhn": {"attn_mode": "fhn", "pos_embedding": "none"},
    "fhn_4_steps": {"attn_mode": "fhn", "fhn_steps": 4, "fhn_dt": 0.5},
    "fhn_explicit": {"attn_mode": "fhn", "use_fhn_imex": False},
    "fhn_linear": {"attn_mode": "fhn", "fhn_dynamics": "linear"},
    "fhn_signed": {"attn_mode": "fhn", "fhn_dynamics": "signed", "pos_embedding": "none"},
    "fhn_partitioned": {"attn_mode": "fhn", "use_fhn_partitioning": True, "fhn_partitions": 3},
    "fhn_spectral": {
        "attn_mode": "fhn",
        "use_fhn_partitioning": True,
        "fhn_partitions": 3,
        "use_manifold": True,
        "manifold_dim": 4,
        "n_eigenvectors": 3,
        "spectral_landmarks": 8,
    },
    "kaufmann": {"use_kaufmann_attention": True, **KNOTS},
    "kaufmann_resonance": {"use_kaufmann_attention": True, "kaufmann_resonance": True, **KNOTS},
    "kaufmann_pattern": {
        "attn_pattern": "kaufmann,fhn",
        "use_ferope": True,
        "use_block_sparse": True,
        "fhn_dynamics": "linear",
        "knot_threshold": 1.0,
        **CELLS,
    },
    "fhn_and_softmax": {"attn_pattern": "fhn,softmax", "htm_meta_strength": 0.2},
    "gla": {"attn_mode": "gla"},
    "gdn": {"attn_mode": "gdn", "short_conv": 4, "short_conv_at": "b"},
    "gdn_negative": {"attn_mode": "gdn", "gdn_negative": True},
    "gdn_and_softmax": {"attn_pattern": "gdn,softmax", "pos_embedding": "rope", "value_embeds": True},
    "swiglu": {"use_swiglu": True},
    "kan": {"use_kan": True},
    "kan_gaus1": {"use_kan": True, "kan_wavelet": "gaus1", "kan_bank": 1, "kan_match_params": False},
    "kan_dog": {"use_kan": True, "kan_wavelet": "dog"},
    "kan_morlet": {"use_kan": True, "kan_wavelet": "morlet", "bias": False},
    "kan_edge": {"use_kan": True, "kan_edges": "edge"},
    "bio": {"use_bio_mlp": True, "bio_threshold": 0.0},
    "bio_fixed": {"use_bio_mlp": True, "bio_threshold": 0.0, "bio_osc_learnable": False, "bio_omega": 2.0},
    "bio_events": {"use_bio_mlp": True},
    "bio_adaptive": {"use_bio_mlp": True, "bio_gate": "lowrank", "bio_adaptive_threshold": True},
    "bio_dendrites": {"use_bio_mlp": True, "bio_compartments": 3, "bio_gate": "diag", "bio_target_sparsity": 0.5},
    "bio_nonlinear": {
        "use_bio_mlp": True,
        "bio_compartments": 2,
        "bio_dendrite_dim": 24,
        "bio_lateral": "nonlinear",
        "bio_threshold": 0.0,
    },
    "bio_ring": {
        "use_bio_mlp": True,
        "bio_compartments": 5,
        "bio_dendrite_dim": 16,
        "bio_lateral": "nonlinear",
        "bio_connectivity": "ring",
    },
    "bio_self": {
        "use_bio_mlp": True,
        "bio_compartments": 3,
        "bio_lateral": "nonlinear",
        "bio_connectivity": "none",
        "bio_threshold": 0.0,
    },
    "bio_sparse": {"use_bio_mlp": True, "bio_compartments": 4, "bio_dendrite_dim": 16, "bio_connectivity": "sparse"},
    "bio_attention": {"use_bio_mlp": True, "bio_compartments": 2, "bio_dendrite_dim": 24, "bio_attention_gain": True},
    "bio_plastic": {"use_bio_mlp": True, "bio_plasticity": True, "bio_gate": "diag"},
    "bio_spiking": {"use_bio_mlp": True, "bio_spiking": True},
    "bio_spiking_plastic": {
        "use_bio_mlp": True,
        "bio_spiking": True,
        "bio_plasticity": True,
        "bio_adaptive_threshold": True,
    },
    "ramanujan": {"pos_embedding": "ramanujan"},
    "untied": {"tie_weights": False},
    "loss_chunk": {"loss_chunk": 40},
    "mfs": {"use_mfs_head": True, "mfs_layers": 2, "mfs_window": 1},
    "mfs_lowrank": {
        "use_mfs_head": True,
        "mfs_layers": 1,
        "mfs_K": 2,
        "mfs_P": 1,
        "mfs_lowrank_r": 4,
        "loss_chunk": 50,
    },
    "mfs_facets_only": {"use_mfs_head": True, "mfs_layers": 1, "mfs_K": 1, "mfs_P": 4, "tie_weights": False},
    "l4": {"add_l4_losses": True, "ae_window": 3, "ae_dim": 5, "slate_window": 4, "l4_loss_weight": 0.2},
    "l4_regions": {"add_l4_losses": True, "region_size": 2, "region_slate_include_prior": False, **CELLS},
    "mfs_l4": {"use_mfs_head": True, "mfs_layers": 2, "add_l4_losses": True, "loss_chunk": 40},
    "mfs_slate": {"use_mfs_head": True, "mfs_layers": 2, "mfs_slate": True, "slate_window": 5},
    "mfs_slate_l4": {
        "use_mfs_head": True,
        "mfs_layers": 2,
        "mfs_slate": True,
        "add_l4_losses": True,
        "loss_chunk": 40,
    },
    "mfs_regions": {"use_mfs_head": True, "mfs_layers": 2, "region_size": 2, **CELLS},
    "mfs_l4_regions": {
        "use_mfs_head": True,
        "mfs_layers": 2,
        "add_l4_losses": True,
        "region_size": 2,
        "region_slate_include_error": True,
        "loss_chunk": 40,
        "htm_meta_strength": 0.5,
        **CELLS,
    },
    "aux_heads": {"aux_heads": "1"},
    "aux_heads_own": {"aux_heads": "1", "aux_heads_own": True},
    "aux_heads_all": {
        "aux_heads": "1,2",
        "n_layer": 3,
        "aux_heads_weight": 0.3,
        "use_mhc": True,
        "use_mfs_head": True,
        "mfs_layers": 2,
        "loss_chunk": 40,
    },
    "aux_heads_softcap": {"aux_heads": "1", "logit_softcap": 15.0, "use_mla": True},
    "manifold_sphere": {"use_manifold": True, "manifold_dim": 5, "skip_manifold_spectral": True},
    "manifold_e7": {"use_manifold": True, "manifold": "e7", "skip_manifold_spectral": True},
    "manifold_rotor": {
        "use_manifold": True,
        "manifold": "rotor",
        "manifold_vectors": 2,
        "skip_manifold_spectral": True,
    },
    "manifold_geodesic": {"use_manifold": True, "geodesic_weight": 0.1, "skip_manifold_spectral": True},
    "manifold_spectral": {"use_manifold": True, "n_eigenvectors": 4, "spectral_landmarks": 16, "spectral_refresh": 5},
    "manifold_e7_spectral": {
        "use_manifold": True,
        "manifold": "e7",
        "geodesic_weight": 0.1,
        "spectral_landmarks": 12,
        "spectral_refresh": 3,
    },
    "manifold_blocks": {
        "use_manifold": True,
        "manifold_at": "blocks",
        "n_eigenvectors": 4,
        "spectral_landmarks": 16,
        "spectral_refresh": 5,
        "geodesic_weight": 0.1,
    },
    "manifold_blocks_mhc": {
        "use_manifold": True,
        "manifold_at": "blocks",
        "manifold": "e7",
        "skip_manifold_spectral": True,
        "use_mhc": True,
        "gated_blocks": True,
    },
    "fa": {"method": "fa", **LOCAL},
    "fa_orthogonal": {"method": "fa", "fa_init_mode": "orthogonal", "bias": False, **LOCAL},
    "fa_ortho_he": {"method": "fa", "fa_init_mode": "ortho_he", "bias": False, **LOCAL},
    "fa_sparse": {"method": "fa", "fa_init_mode": "sparse", "fa_sparse_k": 4, **LOCAL},
    "fa_grape": {"method": "fa", "fa_grape": True, "fa_grape_every": 2, "fa_calibrate_every": 3, **LOCAL},
    "sign_sym": {"method": "sign_sym", **LOCAL},
    "sign_sym_init": {"method": "sign_sym", "sign_sym_scale": "init", **LOCAL},
    "sign_sym_frozen": {"method": "sign_sym", "sign_sym_scale": "frozen_magnitude", **LOCAL},
    "dfa": {"method": "dfa", **LOCAL},
    "dfa_block": {"method": "dfa", "dfa_granularity": "block", **LOCAL},
    "dfa_skip": {"method": "dfa", "dfa_feedback": "skip", **LOCAL},
    "dfa_grape": {"method": "dfa", "fa_grape": True, "fa_grape_every": 2, "fa_calibrate_every": 3, **LOCAL},
    "dfa_grape_sparse": {
        "method": "dfa",
        "fa_grape": True,
        "fa_grape_every": 2,
        "use_block_sparse": True,
        **CELLS,
        **LOCAL,
    },
    "frozen_blocks": {"freeze_blocks": 1, "freeze_emb": True, **LOCAL},
    "surrogates": {"ste_gelu": True, "attn_mode": "sigmoid", "ste_sigmoid": True},
    "ln_ste": {"ln_mode": "ste", "ste_gelu": True},
    "sigmoid_ste_sparse": {
        "attn_mode": "sigmoid",
        "ste_sigmoid": True,
        "sigmoid_bias_mode": "neg_log_i",
        "use_block_sparse": True,
        **CELLS,
    },
    "center_scale": {"ln_mode": "center_scale"},
    "projected": {"ln_mode": "projected", "bias": False},
    "fuse_attn_local": {"fuse_attn_local": True},
    "topk": {"mlp_topk": 16, "resid_topk": 24},
    "vq_codes": {"vq_codes": 2048},
    "vq_per_block": {"vq_codes": 2048, "vq_per_block": True},
    "limits": {"resid_topk": 28, "vq_codes": 2048, "subspace_rank": 24},
    "vq_lattice": {"vq_lattice": "e7", "n_embd": 28},
    "subspace_rank": {"subspace_rank": 24},
    "local_all": {
        "method": "sign_sym",
        "ste_gelu": True,
        "ln_mode": "center_scale",
        "fuse_attn_local": True,
        "mlp_topk": 32,
        "freeze_emb": True,
        **LOCAL,
    },
    "dfa_surrogates": {
        "method": "dfa",
        "fa_grape": True,
        "ste_gelu": True,
        "ln_mode": "ste",
        "fuse_attn_local": True,
        **LOCAL,
    },
    "gated_blocks": {"gated_blocks": True},
    "adjacent_possible": {"adjacent_possible": 0.3},
    "adjacent_possible_mhc": {"adjacent_possible": 0.2, "use_mhc": True, "gated_blocks": True},
    "mhc": {"use_mhc": True},
    "mhc_2_streams_gated": {"use_mhc": True, "mhc_streams": 2, "mhc_sinkhorn_iters": 5, "gated_blocks": True},
    "hc": {"use_mhc": True, "hc_mode": "hc"},
    "mla": {"use_mla": True},
    "mla_scalar": {"use_mla": True, "mla_mode": "scalar"},
    "mhc_mla": {"use_mhc": True, "use_mla": True},
    "sdr": {"use_sdr": True, **SDR},
    "sdr_delta": {"use_sdr": True, **SDR, "sdr_rule": "delta", "sdr_radius": 0, "pos_embedding": "none"},
    "sdr_willshaw": {"use_sdr": True, **SDR, "sdr_rule": "willshaw", "sdr_value_dim": 16, "sdr_decay": 0.9},
    "sdr_many_words": {"use_sdr": True, **SDR, "sdr_size": 128, "tie_weights": False},
    "sdr_at_head": {"use_sdr": True, **SDR, "engram_at": "head"},
    "sdr_at_mfs_head": {"use_sdr": True, **SDR, "engram_at": "head", "use_mfs_head": True, "mfs_layers": 2},
    "sdr_trail": {"use_sdr": True, **SDR, "sdr_trail": 3},
    "sdr_trail_willshaw": {"use_sdr": True, **SDR, "sdr_rule": "willshaw", "sdr_trail": 2, "engram_at": "head"},
    "sdr_levels": {"use_sdr": True, **SDR, "sdr_levels": 3},
    "sdr_encoder_alone": {"use_sdr": True, **SDR, "sdr_radius": 0, "sdr_scales": 0, "sdr_rule": "none"},
    "chimera": {
        "attn_pattern": "fhn,softmax",
        "fhn_dynamics": "linear",
        "use_ferope": True,
        "pos_embedding": "none",
        "use_bio_mlp": True,
        "bio_threshold": 0.0,
        "bio_omega": 3.0,
    },
    "everything": {
        "pos_embedding": "none",
        "use_ferope": True,
        "use_block_sparse": True,
        "use_manifold": True,
        "manifold": "e7",
        "n_eigenvectors": 4,
        "spectral_landmarks": 16,
        "use_sdr": True,
        **SDR,
        **CELLS,
    },
    "everything_waves": {
        "attn_pattern": "fhn,kaufmann",
        "use_kan": True,
        "use_mhc": True,
        "use_mla": True,
        "use_mfs_head": True,
        "mfs_layers": 2,
        "add_l4_losses": True,
        **KNOTS,
    },
    "htm_lr": {"htm_meta_strength": 0.5, "htm_meta_decay": 0.5},
    "htm_momentum": {"htm_meta_strength": 0.5, "htm_meta_target": "momentum"},
    "geometric": {
        "use_block_sparse": True,
        "use_ferope": True,
        "region_size": 2,
        "region_edges": 1,
        "use_region_feedback": True,
        "pos_embedding": "none",
        **CELLS,
    },
}
SIZE = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32}


@dataclass
class SmokeConfig:
    """What to check and where."""

    # -- smoke test ---------------------------------------------------------------------------------------------------
    only: str = ""  # comma-separated variants; empty = all
    device: str = "cpu"  # "auto" | "cpu" | "cuda" | "mps"
    steps: int = 20  # training steps on the repeated batch

    def __post_init__(self):
        check_values(self, {"steps": "[1, inf)"})


def build(flags, device="cpu", seed=0):
    """A small model with `flags` on, and a batch of tokens (4, block_size) that suits it."""
    torch.manual_seed(seed)
    config = GPTConfig(**SIZE | flags)
    model = GPT(config).to(device)
    return model, torch.randint(config.vocab_size, (4, config.block_size), device=device)


def all_logits(model, idx):
    """Logits of every position, (B, T, V)."""
    return model(idx, idx)[0]


@torch.no_grad()
def faults(model, idx):
    """What is wrong with the model, as a list of faults; empty is good."""
    model.eval()
    found = []
    logits = all_logits(model, idx)
    if not torch.isfinite(logits).all():
        found.append("logits are not finite")
    if (logits.softmax(-1).sum(-1) - 1).abs().max() > 1e-4:
        found.append("probabilities do not sum to 1")
    t = idx.size(1) // 2
    changed = torch.cat((idx[:, :t], (idx[:, t:] + 1) % model.config.vocab_size), 1)
    if (all_logits(model, changed)[:, :t] - logits[:, :t]).abs().max() > 1e-6:
        found.append("sees the future")
    state = DecodingState()
    stepwise = torch.cat([model(idx[:, i : i + 1], state=state)[0] for i in range(idx.size(1))], 1)
    if (stepwise - logits).abs().max() > 1e-4:
        found.append("cached decoding differs")
    text = model.generate(idx[:, :4], 12, temperature=0)
    if not torch.equal(text, model.generate(idx[:, :4], 12, temperature=0, use_cache=False)):
        found.append("cached text differs")
    return found


def train(model, idx, steps):
    """(loss before, loss after, ms per step) of training on one batch, over and over."""
    model.train()
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), idx.device.type)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1], (time.perf_counter() - start) / steps * 1e3


def check(name, cfg, device):
    """Print one row for the variant; True if it passed."""
    model, idx = build(VARIANTS[name], device)
    found = faults(model, idx)
    before, after, ms = train(model, idx, cfg.steps)
    if not (math.isfinite(after) and after < before):
        found.append("does not learn")
    verdict = "ok" if not found else "FAILED: " + ", ".join(found)
    print(f"{name:<24}{model.num_params():>10,}{ms:>10.1f}{before:>10.3f}{after:>10.3f}  {verdict}", flush=True)
    return not found


def main():
    with configurator.one_line_errors("smoke_test.py"):
        cfg = configurator.read(sys.argv[1:], SmokeConfig, doc=__doc__).build(SmokeConfig)
        names = [n.strip() for n in cfg.only.split(",") if n.strip()] or list(VARIANTS)
        if unknown := [n for n in names if n not in VARIANTS]:
            raise configurator.ConfigError(f"--only={cfg.only}: no {unknown[0]!r}; there are {', '.join(VARIANTS)}")
        device, _ = pick_device(cfg.device)
        print(f"{'variant':<24}{'params':>10}{'ms/step':>10}{'loss':>10}{'after':>10}  verdict")
        passed = sum(check(name, cfg, device) for name in names)
        print(f"{passed} passed, {len(names) - passed} failed")
    raise SystemExit(passed < len(names))


if __name__ == "__main__":
    main()
