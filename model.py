"""
nanoChimera: one GPT, many strange ideas, each behind a flag.

`GPTConfig()` with everything off is GPT-2 as nanoGPT builds it, to the parameter name. Every flag keeps the same
contracts (tests/contracts/): causal, prefix-consistent, batch-independent, decoded incrementally, trained by
gradients that arrive, and measured against the same control.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65))
    logits, loss = model(idx, targets)                # idx, targets (B, T); -1 in targets is ignored
    tokens = model.generate(idx, 100, temperature=0)  # decoding with a cache
    GPTConfig(attn_pattern="fhn,softmax", use_kan=True, pos_embedding="none")  # switch things

How to read it: the first 1000 lines are the model, that is its flags, their rules, what a forward pass carries, `Block`
and `GPT`. The rest is a catalogue, to be opened where a flag leads. Each idea has a section: a rule with its equation,
cost and source, then the code.

    small parts | geometry: cells, Fe-RoPE, knots | token mixers: attention, waves, Kaufmann attention | channel mixers:
    MLP, SwiGLU, WaveKAN, BioMLP | sparse codes, manifolds | residual wiring | heads | learning rules and limits | files

References: nanoGPT (github.com/karpathy/nanoGPT); GPT-2 (Radford et al. 2019).
"""

import json
import math
import re
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn as nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import check_values, documented
from data.checkpoint import CheckpointError, load_checkpoint as load_checkpoint, save_checkpoint as save_checkpoint
from kernels import e7, knots, ramanujan
from kernels.block_sparse import Route, block_sparse_attention, reference
from kernels.e7 import SETS as E7_SETS, e7_apply, e7_cartan, e7_hops, e7_lattice_round
from kernels.engram import CHUNK, SDROperations, context_winners, k_winners, recall, unpack, willshaw
from kernels.fhn import FHN, REST_V, REST_W, FHNDynamics, fhn_bound, fhn_eps_limit, fhn_propagate
from kernels.heads import chunked_cross_entropy, mixture_cross_entropy, mixture_log_probs, sum_dtype
from kernels.hyper import mix, rms_project, sinkhorn, spread
from kernels.knots import gauss_linking_integrals, strand_links
from kernels.linear_attention import LEAST, gdn, gla
from kernels.muon import Muon
from kernels.norm import rms_norm
from kernels.oscillator import oscillate
from kernels.partition import karmarkar_karp
from kernels.ramanujan import ramanujan_table
from kernels.rotor import rotate_pairs, rotation
from kernels.scan import gated_scan
from kernels.short_conv import short_conv as convolve
from kernels.spiking import SCANS, Spike, potentials
from kernels.wavekan import wavelet_bank, wavelet_edges

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: the single source of every model flag. configurator.py reads names, types, defaults and comments here.


@dataclass
class GPTConfig:
    """Everything that shapes the model. ValueError, naming the flag and its value, for what makes no sense."""

    # -- model size ---------------------------------------------------------------------------------------------------
    block_size: int = 1024  # longest context in tokens
    vocab_size: int = 50304  # token ids; train.py takes the data set's (GPT-2's 50257 is padded to a multiple of 64)
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs; 0 for pre-training, 0.1+ to fine-tune
    bias: bool = True  # biases in linear layers and layer norms, as in GPT-2; False is a bit better and faster
    # -- model controls -----------------------------------------------------------------------------------------------
    mlp_act: Literal["gelu", "gelu_tanh", "relu2"] = "gelu"  # exact (nanoGPT) | OpenAI's GPT-2 | squared ReLU
    pos_embedding: Literal["learned", "rope", "none", "ramanujan"] = "learned"  # a table | rotary | - | a fixed table
    norm: Literal["layer", "rms"] = "layer"  # layer norm | RMSNorm without gain
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, whose scores are then scaled by 1.44 / sqrt(hs)
    emb_norm: bool = False  # RMSNorm after the embedding
    zero_init_proj: bool = False  # the output projections of sublayers start at 0
    init_gain: float = 0.0  # g > 0: other matrices in blocks start as N(0, g^2 / n_embd); 0 = as N(0, 0.02^2)
    logit_softcap: float = 0.0  # c > 0: logits c tanh(logits / c), which lie in (-c, c); 0 = off
    short_conv: int = 0  # taps of causal convolutions, one filter per channel, added to their input; 0 = off
    short_conv_at: str = "ac"  # a the token mixer's input, b its q, k and v, c the channel mixer's input, d its units
    token_shift: bool = False  # after the embedding, add a gated copy of the previous token (smear)
    n_kv_head: int = 0  # heads of keys and values, each for a group of query heads; 0 = n_head
    value_embeds: bool = False  # in every other layer, a gated vector per token id is added to the values
    x0_skip: bool = False  # a block reads a x + b x0: x0 the embedding, a and b learned numbers per block
    # -- token mixers -------------------------------------------------------------------------------------------------
    attn_mode: str = "softmax"  # "softmax" | "sigmoid" | "fhn" (waves) | "kaufmann" | "gla", "gdn" (linear attention)
    use_kaufmann_attention: bool = False  # the same as attn_mode="kaufmann"
    kaufmann_resonance: bool = False  # a learned wave of the position, from Ramanujan sums, scales kaufmann's stimulus
    attn_pattern: str = ""  # mixers that layers take in turn, as in "fhn,fhn,softmax"; empty = attn_mode everywhere
    gdn_negative: bool = False  # gdn writes up to twice: a key's share of the memory can change its sign
    sigmoid_bias_mode: Literal["neg_log_n", "neg_log_i", "zero", "learned"] = "neg_log_n"  # n block_size, i keys seen
    # -- channel mixers -----------------------------------------------------------------------------------------------
    use_swiglu: bool = False  # silu(W1 x) * W3 x for the MLP, with as many parameters
    use_kan: bool = False  # learned wavelets in place of the MLP's activation (WaveKAN)
    kan_wavelet: Literal["mex", "dog", "gaus1", "morlet"] = "mex"  # hat | difference, derivative of Gaussians | Morlet
    kan_edges: Literal["shared", "edge"] = "shared"  # wavelets per channel, then a matrix | per edge, published; slow
    kan_bank: int = 2  # wavelets per channel
    kan_match_params: bool = True  # hidden width such that parameters equal the MLP's; False = 4 n_embd
    # -- BioMLP -------------------------------------------------------------------------------------------------------
    use_bio_mlp: bool = False  # channel mixer of oscillators: C -> dendrites -> 4C -> sparse events -> C
    bio_omega: float = 1.0  # frequency in sin(omega x + phi) tanh(x) + baseline; omega starts at it + 0.1 N(0, 1)
    bio_osc_learnable: bool = True  # omega, phi and baseline are parameters; False = they keep their random start
    bio_compartments: int = 0  # K slices of the input, each with its own dendrite; 0 = one linear map, no dendrites
    bio_dendrite_dim: int = 0  # units per compartment; 0 = 4C, as published
    bio_lateral: Literal["concat", "nonlinear", "none"] = "concat"  # soma reads C and LC (published) | C, tanh(LC) | C
    bio_connectivity: Literal["dense", "ring", "none", "sparse"] = "dense"  # L: all | 2 next | self | learned half
    bio_attention_gain: bool = False  # attention's output a at the token scales each compartment by 1 + tanh(W a)
    bio_threshold: float = 0.25  # an event needs a gate above this; 0 = no sparse events
    bio_gate: Literal["full", "diag", "lowrank"] = "full"  # sigmoid(G x), G 4C x 4C (published) | diagonal | rank C / 4
    bio_adaptive_threshold: bool = False  # one threshold per feature, moved towards bio_target_sparsity once per step
    bio_target_sparsity: float = 0.5  # the share of tokens for which a feature should be silent
    bio_plasticity: bool = False  # events also pass a fast Hebbian weight per unit, which decays along the tokens
    bio_spiking: bool = False  # events are spikes of leaky integrate-and-fire units, whose threshold is bio_threshold
    # -- geometric routing --------------------------------------------------------------------------------------------
    use_ferope: bool = False  # rotate queries and keys by their position (RoPE), or by their place in their cell
    ferope_freqs: Literal["log", "gaussian"] = "log"  # rope_base^(-i/m) radians per token | N(0, 1/anchor_min_gap)
    ferope_m: int = 0  # pairs of dimensions that rotate; 0 = all, head_dim // 2
    ferope_learnable: bool = False  # the frequencies are parameters
    ferope_anchor_relative: bool = False  # position counted from the cell's anchor, not from the start of the text
    rope_base: float = 10000.0  # base of the frequencies
    use_block_sparse: bool = False  # attend inside the own and neighbouring cells only; attention weights: no dropout
    neighbor_rings: int = 1  # how many cells back a cell can look
    anchor_min_gap: int = 256  # least number of tokens between anchors; a cell is what lies nearest to its anchor
    anchor_jitter: int = 32  # most tokens that are added to a gap at random
    anchor_seed: int = 1337  # seed of the anchors and of random frequencies
    share_region_router: bool = True  # one set of anchors for all layers; False = layer l has anchor_seed + l
    region_size: int = 0  # consecutive cells that make a region; 0 = no regions
    region_edges: int = 0  # n > 0: with use_block_sparse, a region also sees the n regions 1, 2, 4, ... before it
    use_region_feedback: bool = False  # after attention, add a gated projection of the mean of nearby regions' past
    region_rings: int = 1  # regions at most this far apart are neighbours
    feedback_hops: int = 1  # steps over the graph of neighbours
    region_feedback_edges: str = ""  # also between chosen regions of the block: "0>3,1>3" = region 3 reads 0 and 1
    region_slate_include_prior: bool = True  # the regions' context summary holds a moving average of hidden states
    region_prior_decay: float = 0.9  # decay per token of that average
    region_slate_include_error: bool = False  # and how badly the auto-encoder predicted the token
    # -- knots --------------------------------------------------------------------------------------------------------
    use_knot_attention: bool = False  # also attend to earlier cells whose strands link the last complete cell's
    knot_block: int = 32  # tokens per cell, where nothing else makes cells
    knot_vertices: int = 8  # vertices of the polygon through a cell; 3 or more can link
    knot_threshold: float = 2.0  # least |linking number| that ties two cells: 1 links half of them, 2 an eighth
    knot_k: int = 4  # earlier cells that a cell can be tied to
    knot_learned_threshold: bool = False  # the threshold is a parameter per head, knot_threshold - 0.5 at first
    # -- FitzHugh-Nagumo waves ----------------------------------------------------------------------------------------
    fhn_steps: int = 2  # solver steps per layer; in each, a gated scan carries the stimulus along the tokens
    fhn_dt: float = 0.25  # time of a step, in the equation's units
    fhn_dynamics: Literal["fhn", "linear", "signed"] = "fhn"  # excitable | one gated scan | its decay may be negative
    use_fhn_imex: bool = True  # coupling solved implicitly; False = explicit Euler, which reaches fhn_steps tokens back
    use_fhn_partitioning: bool = False  # channels in groups of balanced stimulus, normalised to a common level
    fhn_partitions: int = 4  # groups
    # -- sparse distributed representations ---------------------------------------------------------------------------
    use_sdr: bool = False  # wte's place: a token is a set of active bits, its embedding the sum of their vectors
    sdr_size: int = 2048  # bits, a multiple of 64
    sdr_active: int = 40  # active bits per token
    sdr_boost: float = 0.1  # in training, the score that an always active bit loses (scores spread by 0.1); 0 = off
    sdr_radius: int = 2  # sites over which the map of bits is smoothed, to add a token's neighbourhood; 0 = no map
    sdr_scales: int = 4  # time constants of the context, 2, 8, 32, ... tokens; 0 = no context
    sdr_rule: Literal["hebb", "delta", "willshaw", "none"] = "hebb"  # memory of what came next; willshaw trains as hebb
    sdr_decay: float = 0.99  # decay per token of the memory's sums
    sdr_value_dim: int = 64  # width of what the memory holds
    sdr_trail: int = 1  # recalls in a row: the word that one brings is the next one's query
    sdr_levels: int = 1  # codes: each above the token's is that of a longer context, with half as many bits
    engram_at: Literal["embedding", "head"] = "embedding"  # where its recall is added: there | before the last norm
    # -- manifolds ----------------------------------------------------------------------------------------------------
    use_manifold: bool = False  # after the embedding, add features of each token's point on a manifold
    manifold_at: Literal["embedding", "blocks"] = "embedding"  # or each block projects its own input, and adds that
    manifold: Literal["sphere", "e7", "rotor"] = "sphere"  # a sphere | the coset E7(7)/SU(8) | rotations in Spin(8)
    manifold_dim: int = 16  # dimensions of the space around the sphere ("e7" has 70 coordinates, "rotor" 28)
    manifold_vectors: int = 1  # learned 56-vectors that the group's element acts on
    geodesic_weight: float = 0.0  # weight of the loss that straightens the path of a text's points; 0 = off
    skip_manifold_spectral: bool = False  # True = points alone; False = also spectral coordinates for queries and keys
    n_eigenvectors: int = 8  # spectral coordinates: eigenvectors of the landmarks' graph
    spectral_landmarks: int = 64  # learned points that make the graph
    spectral_refresh: int = 100  # optimiser steps between eigen-decompositions
    # -- residual wiring ----------------------------------------------------------------------------------------------
    gated_blocks: bool = False  # a learned scalar, 1 at first, on each sublayer's output
    adjacent_possible: float = 0.0  # rho > 0: a sublayer moves a token's x by at most rho |x|; 0 = off
    use_mhc: bool = False  # hyper-connections: several residual streams, mixed by each sublayer
    mhc_streams: int = 4  # residual streams
    mhc_sinkhorn_iters: int = 20  # how often rows and columns are normalised
    hc_mode: Literal["mhc", "hc"] = "mhc"  # how streams mix: doubly stochastic, cannot amplify | unconstrained
    use_mla: bool = False  # layer aggregation (DenseFormer's depth-weighted average), not multi-head latent attention
    mla_mode: Literal["dense", "scalar"] = "dense"  # each block's output a sum of all so far | a mix for the head
    # -- heads --------------------------------------------------------------------------------------------------------
    tie_weights: bool = True  # the output embedding is the token embedding; False = a table of its own
    loss_chunk: int = 0  # tokens whose logits exist at once in training (forward then returns the last ones); 0 = all
    use_mfs_head: bool = False  # multi-facet softmax, a mixture of softmaxes: forward returns log-probabilities
    mfs_K: int = 3  # softmaxes that are mixed
    mfs_P: int = 4  # facets of the first softmax: token v uses facet v mod P
    mfs_layers: int = 3  # top layers that it reads
    mfs_window: int = 2  # positions before the current one that it reads too
    mfs_lowrank_r: int = 0  # rank of the facets' projections; 0 = full
    mfs_slate: bool = False  # without regions it reads the mean of the last slate_window states, not the last state
    add_l4_losses: bool = False  # in training, an auto-encoder of hidden states that also predicts the token after next
    l4_loss_weight: float = 0.1  # weight of its two losses in the objective
    ae_window: int = 8  # hidden states that it encodes
    ae_dim: int = 0  # its bottleneck; 0 = n_embd // 4
    aux_heads: str = ""  # layers, as in "2,4", from whose outputs the head also predicts the next token, in training
    aux_heads_weight: float = 0.1  # weight of each of these losses in the objective
    aux_heads_own: bool = False  # each of these layers has an output matrix of its own, instead of the model's
    slate_window: int = 8  # hidden states whose mean is the context summary, where there are no regions
    # -- learning rules -----------------------------------------------------------------------------------------------
    method: Literal["bp", "fa", "dfa", "sign_sym"] = "bp"  # learning rule: backpropagation | feedback alignment | ...
    frozen_seed: int = 1337  # seed of everything random that is never trained: feedback, codes, subspaces
    fa_init_mode: Literal["gaussian", "orthogonal", "ortho_he", "sparse"] = "gaussian"  # random feedback; He variance
    fa_sparse_k: int = 0  # non-zeros per row; 0 = in / 16
    sign_sym_scale: Literal["mean", "init", "frozen_magnitude"] = "mean"  # signs times mean |W| | first std | random
    dfa_granularity: Literal["sublayer", "block"] = "sublayer"  # each sublayer or each block gets the error by itself
    dfa_feedback: Literal["matrix", "skip"] = "matrix"  # random | control: what the uncut residual stream alone brings
    fa_grape: bool = False  # turn feedback towards the true Jacobian by forward-mode probes
    fa_grape_every: int = 10  # optimiser steps between probes
    fa_grape_n_probe: int = 32  # random vectors per layer (fa), sequences per probe (dfa)
    fa_grape_lr: float = 0.1  # how far a probe turns feedback: 1 = by its own length
    fa_calibrate_every: int = 0  # one step in this many is true backpropagation; 0 = none
    freeze_blocks: int = 0  # how many of the lowest blocks keep their first weights
    freeze_emb: bool = False  # token and position embeddings keep their first weights
    # -- surrogates and limits ----------------------------------------------------------------------------------------
    ste_sigmoid: bool = False  # the backward of sigmoid attention leaves out A (1 - A)
    ste_gelu: bool = False  # the backward leaves out gelu'
    ln_mode: Literal["bp", "ste", "center_scale", "projected"] = "bp"  # backward of norms; "projected" equals "bp"
    fuse_attn_local: bool = False  # softmax and value mix as one function with a local backward; dropout on its output
    mlp_topk: int = 0  # hidden units of an MLP that stay active, the largest by magnitude; 0 = all
    resid_topk: int = 0  # channels of the residual stream that survive a block, the largest by magnitude; 0 = all
    vq_codes: int = 0  # n > 0: after each block, the nearest of n frozen directions, magnitude kept; 0 = off
    vq_per_block: bool = False  # each block has its own n directions; False = all blocks share them
    vq_lattice: Literal["", "e7"] = ""  # off | after each block, groups of 7 channels go to the nearest E7 point
    subspace_rank: int = 0  # n > 0: after each block, a projection onto one frozen n-dimensional subspace; 0 = off
    # -- meta-updates -------------------------------------------------------------------------------------------------
    htm_meta_strength: float = 0.0  # scale a column's update by 1 +- this, by how well it predicts; 0 = off
    htm_meta_decay: float = 0.99  # decay per step of a column's record of success
    htm_meta_target: Literal["lr", "momentum"] = "lr"  # what is scaled: the update | AdamW's first moment

    def __post_init__(self):
        check_values(self, RANGES)  # types, choices, ranges
        self.use_ferope |= self.ferope_anchor_relative  # which is a form of it
        if self.use_mfs_head and self.mfs_layers > self.n_layer:
            warnings.warn(f"mfs_layers={self.mfs_layers}: all n_layer={self.n_layer} are read", stacklevel=3)
            self.mfs_layers = self.n_layer
        if unknown := [name for name in self.mixers if name not in MIXERS]:
            raise ValueError(f"attn_mode, attn_pattern: no mixer {unknown[0]!r}; there are {', '.join(MIXERS)}")
        for name, switch in self.without_switch():
            raise ValueError(f"{name}={getattr(self, name)} does nothing without {switch}: set that too")
        for is_wrong, text in CONFLICTS:
            if is_wrong(self):
                raise ValueError(text.format_map(vars(self) | {"head_dim": self.n_embd // self.n_head}))

    def without_switch(self):
        """Pairs of a flag that was changed and the switch without which it does nothing, which is off."""
        return [(name, switch) for flags, switch, on in NEEDS if not on(self) for name in self.changed(*flags.split())]

    @classmethod
    def idle(cls, values):
        """Those of {flag: value} that do nothing beside the others."""
        config = object.__new__(cls)  # not checked: it may be about to be mended
        vars(config).update({f.name: f.default for f in fields(cls)} | values)
        return [] if set(config.mixers) - set(MIXERS) else [name for name, _ in config.without_switch()]

    def changed(self, *names):
        """Those of these flags that are not at their defaults."""
        return [name for name in names if getattr(self, name) != GPTConfig.__dataclass_fields__[name].default]

    @staticmethod
    def switches():
        """{flag: what it does nothing without}, for --help."""
        pairs = [(name, switch) for flags, switch, _ in NEEDS for name in flags.split()]
        return {name: ", ".join(switch for other, switch in pairs if other == name) for name, _ in pairs}

    @property
    def mixers(self):
        """The token mixers that layers take in turn, as a tuple of names."""
        named = "kaufmann" if self.use_kaufmann_attention else self.attn_pattern or self.attn_mode
        return tuple(name.strip() for name in named.split(","))

    def mixer(self, layer):
        return self.mixers[layer % len(self.mixers)]

    @property
    def channel_mixer(self):
        return next((name for name in CHANNEL_MIXERS if name != "mlp" and getattr(self, f"use_{name}")), "mlp")

    @property
    def head(self):
        """The head's name in HEADS, or "" for the linear one."""
        return next((name for name in HEADS if getattr(self, f"use_{name}_head")), "")

    @property
    def parts(self):
        """The classes that the flags choose: token mixers, the channel mixer, a head."""
        heads = [HEADS[self.head]] if self.head else []
        return [*(MIXERS[name] for name in self.mixers), CHANNEL_MIXERS[self.channel_mixer], *heads]

    def has(self, trait):
        """Whether one of these classes has the attribute `trait` set; one that does not mention it has not."""
        return any(getattr(part, trait, False) for part in self.parts)

    def all_have(self, trait):
        return all(getattr(part, trait, False) for part in self.parts)

    def has_knots(self, layer=None):
        """Whether a layer, or any, chooses its keys by knots."""
        mixers = [MIXERS[name] for name in (self.mixers if layer is None else (self.mixer(layer),))]
        traits = ("has_knots", "takes_knots") if self.use_knot_attention else ("has_knots",)
        return any(getattr(mixer, trait, False) for mixer in mixers for trait in traits)

    @property
    def rotates(self):
        """Whether queries and keys are rotated by their positions."""
        return self.use_ferope or self.pos_embedding == "rope"

    @property
    def has_anchors(self):
        """Whether cells around anchors are drawn."""
        return self.use_block_sparse or self.ferope_anchor_relative or self.use_region_feedback or self.has_region_slate

    @property
    def has_cells(self):
        """Whether positions belong to cells, of which there are only block_size's."""
        return self.has_anchors or self.has_knots()

    @property
    def has_region_slate(self):
        """Whether regions make the context summary that conditions the heads."""
        return bool(self.region_size) and (self.has("reads_context") or self.add_l4_losses)

    @property
    def head_reads_slate(self):
        """Whether the context summary conditions the head, besides the auto-encoder."""
        return self.has("reads_context") and (self.has_region_slate or self.mfs_slate)

    @property
    def has_spectrum(self):
        """Whether spectral coordinates are added to queries and keys."""
        return self.use_manifold and not self.skip_manifold_spectral


# The rules. A new flag brings its rows; tests refuse each idle flag and each end of a range.

RANGES = {  # flags: the interval of their values; nan lies in none
    "block_size vocab_size n_layer n_head n_embd": "[1, inf)",
    "dropout bio_threshold region_prior_decay htm_meta_decay": "[0, 1)",
    "init_gain": "[0, 1000]",
    "logit_softcap short_conv n_kv_head geodesic_weight adjacent_possible": "[0, inf)",
    "bio_omega": "(-inf, inf)",
    "bio_compartments bio_dendrite_dim": "[0, inf)",
    "bio_target_sparsity": "(0, 1)",
    "rope_base": "(1, inf)",
    "ferope_m anchor_jitter neighbor_rings region_size region_edges region_rings": "[0, inf)",
    "kan_bank anchor_min_gap feedback_hops": "[1, inf)",
    "anchor_seed frozen_seed": "[0, 9e18]",
    "knot_vertices": "[3, 127]",
    "knot_block knot_k": "[1, inf)",
    "fhn_steps fhn_partitions": "[1, inf)",
    "fhn_dt": "(0, 2)",
    "sdr_size": "[64, inf)",
    "sdr_active sdr_value_dim": "[1, inf)",
    "sdr_boost sdr_radius sdr_scales": "[0, inf)",
    "sdr_decay": "(0, 1]",
    "sdr_trail": "[1, inf)",
    "sdr_levels": "[1, 6]",
    "manifold_vectors n_eigenvectors spectral_landmarks spectral_refresh": "[1, inf)",
    "manifold_dim mhc_streams": "[2, inf)",
    "mhc_sinkhorn_iters": "[1, inf)",
    "mfs_K mfs_P mfs_layers ae_window slate_window": "[1, inf)",
    "loss_chunk mfs_window mfs_lowrank_r ae_dim": "[0, inf)",
    "knot_threshold l4_loss_weight aux_heads_weight": "(0, inf)",
    "fa_sparse_k fa_calibrate_every freeze_blocks mlp_topk resid_topk vq_codes subspace_rank": "[0, inf)",
    "fa_grape_every fa_grape_n_probe": "[1, inf)",
    "fa_grape_lr": "(0, 1]",
    "htm_meta_strength": "[0, 1]",
}
NEEDS = (  # flags, what they do nothing without, whether it is there
    ("short_conv_at", "short_conv", lambda c: c.short_conv),
    ("value_embeds", "a layer with values (c_attn)", lambda c: c.has("has_values")),
    ("n_kv_head", "a layer of attention", lambda c: c.has("has_scores")),
    # -- token mixers
    ("sigmoid_bias_mode ste_sigmoid", "a sigmoid layer", lambda c: c.has("has_sigmoid")),
    ("kaufmann_resonance", "a kaufmann layer", lambda c: c.has("has_resonance")),
    ("gdn_negative", "a gdn layer", lambda c: c.has("has_delta_rule")),
    ("fuse_attn_local", "a softmax layer", lambda c: c.has("takes_local_backward")),
    # -- channel mixers
    ("mlp_act mlp_topk ste_gelu htm_meta_strength", "the plain MLP", lambda c: c.channel_mixer == "mlp"),
    ("ste_gelu", 'mlp_act="gelu"', lambda c: c.mlp_act == "gelu"),
    ("kan_wavelet kan_edges", "use_kan", lambda c: c.has("has_wavelets")),
    ("kan_bank", 'kan_edges="shared" (and use_kan)', lambda c: c.has("has_wavelets") and c.kan_edges == "shared"),
    ("kan_match_params", "use_kan", lambda c: c.use_kan),
    ("bio_omega bio_osc_learnable bio_compartments bio_threshold", "use_bio_mlp", lambda c: c.use_bio_mlp),
    ("bio_dendrite_dim bio_lateral bio_connectivity bio_attention_gain", "bio_compartments",
     lambda c: c.use_bio_mlp and c.bio_compartments),
    ("bio_connectivity", 'bio_lateral="concat" or "nonlinear"', lambda c: c.bio_lateral != "none"),
    ("bio_gate bio_adaptive_threshold bio_plasticity bio_spiking", "use_bio_mlp and bio_threshold",
     lambda c: c.use_bio_mlp and c.bio_threshold),
    ("bio_gate", "a gate (here neurons spike)", lambda c: not c.bio_spiking),
    ("bio_target_sparsity", "bio_adaptive_threshold", lambda c: c.bio_adaptive_threshold),
    # -- geometric routing
    ("use_ferope use_block_sparse qk_norm", "a layer of attention", lambda c: c.has("has_scores")),
    ("ferope_freqs ferope_m ferope_learnable ferope_anchor_relative", "use_ferope", lambda c: c.use_ferope),
    ("rope_base", 'use_ferope or pos_embedding="rope"', lambda c: c.rotates),
    ("rope_base", 'ferope_freqs="log"', lambda c: c.ferope_freqs == "log"),
    ("neighbor_rings", "use_block_sparse", lambda c: c.use_block_sparse),
    ("anchor_min_gap anchor_seed", "cells (use_block_sparse)", lambda c: c.has_anchors or c.ferope_freqs == "gaussian"),
    ("anchor_jitter share_region_router", "cells (use_block_sparse, for example)", lambda c: c.has_anchors),
    ("region_size", "region_edges, use_region_feedback, use_mfs_head or add_l4_losses",
     lambda c: c.region_edges or c.use_region_feedback or c.has_region_slate),
    ("region_rings feedback_hops region_feedback_edges", "use_region_feedback", lambda c: c.use_region_feedback),
    # -- knots, waves
    ("use_knot_attention", "a softmax or sigmoid layer (kaufmann has knots anyway)", lambda c: c.has("takes_knots")),
    ("knot_block knot_vertices knot_threshold knot_k knot_learned_threshold", "knots", lambda c: c.has_knots()),
    ("knot_block", "cells of their own (here anchors make them)", lambda c: not c.has_anchors),
    ("fhn_steps fhn_dt fhn_dynamics use_fhn_imex use_fhn_partitioning", "an fhn layer", lambda c: c.has("has_waves")),
    ("fhn_partitions", "use_fhn_partitioning", lambda c: c.use_fhn_partitioning),
    ("fhn_steps fhn_dt use_fhn_imex use_fhn_partitioning", 'fhn_dynamics="fhn"', lambda c: c.fhn_dynamics == "fhn"),
    # -- sparse codes, manifolds
    ("sdr_size sdr_active sdr_boost sdr_radius sdr_scales sdr_rule sdr_value_dim", "use_sdr", lambda c: c.use_sdr),
    ("sdr_decay", 'use_sdr, sdr_rule="hebb" or "willshaw"', lambda c: c.use_sdr and c.sdr_rule in ("hebb", "willshaw")),
    ("engram_at sdr_trail sdr_levels", "use_sdr", lambda c: c.use_sdr),
    ("sdr_value_dim engram_at sdr_trail", "a memory (sdr_rule)", lambda c: c.sdr_rule != "none"),
    ("manifold manifold_at geodesic_weight skip_manifold_spectral", "use_manifold", lambda c: c.use_manifold),
    ("manifold_dim", 'use_manifold and manifold="sphere"', lambda c: c.use_manifold and c.manifold == "sphere"),
    ("manifold_vectors", 'manifold="e7" or "rotor"', lambda c: c.use_manifold and c.manifold != "sphere"),
    ("n_eigenvectors spectral_landmarks spectral_refresh", "spectral coordinates", lambda c: c.has_spectrum),
    # -- wiring, heads
    ("mhc_streams mhc_sinkhorn_iters hc_mode", "use_mhc", lambda c: c.use_mhc),
    ("mhc_sinkhorn_iters", 'hc_mode="mhc"', lambda c: c.hc_mode == "mhc"),
    ("mla_mode", "use_mla", lambda c: c.use_mla),
    ("mfs_K mfs_P mfs_layers mfs_window mfs_lowrank_r", "use_mfs_head", lambda c: c.use_mfs_head),
    ("l4_loss_weight ae_window ae_dim", "add_l4_losses", lambda c: c.add_l4_losses),
    ("mfs_slate", "use_mfs_head and region_size=0", lambda c: c.has("reads_context") and not c.region_size),
    ("aux_heads_weight aux_heads_own", "aux_heads", lambda c: c.aux_heads),
    ("slate_window", "add_l4_losses or mfs_slate, and region_size=0",
     lambda c: (c.add_l4_losses or c.mfs_slate) and not c.region_size),
    ("region_slate_include_prior", "region_size and use_mfs_head or add_l4_losses", lambda c: c.has_region_slate),
    ("region_prior_decay", "region_size, region_slate_include_prior",
     lambda c: c.has_region_slate and c.region_slate_include_prior),
    ("region_slate_include_error", "region_size and add_l4_losses", lambda c: c.region_size and c.add_l4_losses),
    # -- learning rules
    ("ln_mode", 'norm="layer"', lambda c: c.norm == "layer"),
    ("fa_init_mode", 'method="fa"', lambda c: c.method == "fa"),
    ("fa_sparse_k", 'fa_init_mode="sparse"', lambda c: c.fa_init_mode == "sparse"),
    ("sign_sym_scale", 'method="sign_sym"', lambda c: c.method == "sign_sym"),
    ("dfa_granularity dfa_feedback", 'method="dfa"', lambda c: c.method == "dfa"),
    ("fa_grape", 'method="fa" or "dfa"', lambda c: c.method in ("fa", "dfa")),
    ("fa_grape", 'dfa_feedback="matrix"', lambda c: c.dfa_feedback == "matrix"),
    ("fa_grape_every fa_grape_n_probe fa_grape_lr", "fa_grape", lambda c: c.fa_grape),
    ("fa_calibrate_every", 'a method other than "bp"', lambda c: c.method != "bp"),
    ("frozen_seed", "method, vq_codes or subspace_rank", lambda c: c.method != "bp" or c.vq_codes or c.subspace_rank),
    ("vq_per_block", "vq_codes", lambda c: c.vq_codes),
    ("htm_meta_decay htm_meta_target", "htm_meta_strength", lambda c: c.htm_meta_strength),
)  # fmt: skip
CONFLICTS = (  # what makes no sense, and what to write instead; {flag} is its value
    (lambda c: c.n_embd % c.n_head, "n_embd={n_embd} is not divisible by n_head={n_head}: change one of them"),
    (lambda c: len(c.changed("attn_mode", "use_kaufmann_attention", "attn_pattern")) > 1,
     "attn_mode={attn_mode}, use_kaufmann_attention={use_kaufmann_attention}, attn_pattern={attn_pattern!r}: all name "
     "token mixers, keep one"),
    (lambda c: len(c.mixers) > c.n_layer,
     "attn_pattern={attn_pattern!r} names more mixers than n_layer={n_layer}: drop some"),
    (lambda c: sum(getattr(c, f"use_{name}") for name in CHANNEL_MIXERS if name != "mlp") > 1,
     "use_kan={use_kan}, use_bio_mlp={use_bio_mlp}, use_swiglu={use_swiglu}: a block has one channel mixer, keep one"),
    (lambda c: c.bio_compartments and (c.bio_compartments - 1) * -(-c.n_embd // c.bio_compartments) >= c.n_embd,
     "bio_compartments={bio_compartments}: each needs a part of n_embd={n_embd}"),
    (lambda c: c.bio_connectivity != "dense" and c.bio_compartments < (4 if c.bio_connectivity == "ring" else 2),
     "bio_connectivity={bio_connectivity!r} is dense for bio_compartments={bio_compartments}: take 2, for a ring 4"),
    (lambda c: c.bio_spiking and c.bio_compartments,
     "bio_spiking integrates the input itself: no bio_compartments={bio_compartments}, somas are too faint to spike"),
    (lambda c: not c.short_conv_at or c.short_conv_at != "".join(x for x in "abcd" if x in c.short_conv_at),
     "short_conv_at={short_conv_at!r}: some of the letters a, b, c, d, in this order"),
    (lambda c: c.short_conv and "b" in c.short_conv_at and not c.has("has_values"),
     "short_conv_at={short_conv_at!r}: no layer has q, k and v: leave out b"),
    (lambda c: c.n_kv_head and (c.n_head % c.n_kv_head or c.has_spectrum or c.htm_meta_strength or c.has("has_knots")),
     "n_kv_head={n_kv_head} must divide n_head={n_head}; no spectral coordinates, no htm_meta_strength, no kaufmann"),
    # -- geometric routing, knots, waves
    (lambda c: c.pos_embedding == "rope" and (c.use_ferope or not c.has("has_scores")),
     'pos_embedding="rope" rotates queries and keys: it needs a layer of attention, and use_ferope=False'),
    (lambda c: 2 * c.ferope_m > c.n_embd // c.n_head or (c.rotates and c.n_embd // c.n_head < 2),
     "ferope_m={ferope_m}: 2 ferope_m must fit into the head's {head_dim} dimensions"),
    (lambda c: c.use_region_feedback and not c.region_size, "use_region_feedback needs regions: set region_size"),
    (lambda c: any(a >= b for a, b in pairs_of(c.region_feedback_edges)),
     "region_feedback_edges={region_feedback_edges}: write FROM>TO with commas, FROM smaller: regions read the past"),
    (lambda c: c.region_edges and not (c.region_size and c.use_block_sparse),
     "region_edges={region_edges} needs region_size and use_block_sparse: set both"),
    (lambda c: c.use_knot_attention and c.has("has_sigmoid") and c.sigmoid_bias_mode == "neg_log_i",
     'sigmoid_bias_mode="neg_log_i" counts keys, knots choose them: take "neg_log_n"'),
    (lambda c: c.use_fhn_partitioning and c.fhn_partitions > c.n_embd,
     "fhn_partitions={fhn_partitions}: there are n_embd={n_embd} channels"),
    (lambda c: c.has("has_waves") and c.fhn_dynamics == "fhn" and fhn_eps_limit(c.fhn_dt, c.fhn_steps) <= FHN["eps"],
     "fhn_dt={fhn_dt} is unstable with fhn_steps={fhn_steps}: lower one of them"),
    # -- sparse codes, manifolds
    (lambda c: c.sdr_size % 64 or c.sdr_active >= c.sdr_size,
     "sdr_size={sdr_size} must be a multiple of 64, sdr_active={sdr_active} below it"),
    (lambda c: c.sdr_trail > 1 and not (c.tie_weights or has_small_vocabulary(c)),
     "sdr_trail={sdr_trail} looks for a word among all: tie_weights=True, or sdr_size of at least 4 vocab_size"),
    (lambda c: c.n_eigenvectors >= c.spectral_landmarks,
     "n_eigenvectors={n_eigenvectors}: must be below spectral_landmarks={spectral_landmarks}"),
    (lambda c: c.has_spectrum and not (c.has("has_scores") or c.has("has_waves")),
     "use_manifold: no layer has scores or waves for spectral coordinates: set skip_manifold_spectral"),
    # -- wiring, heads
    (lambda c: c.use_mfs_head and c.mfs_P > c.vocab_size,
     "mfs_P={mfs_P} must be at most vocab_size={vocab_size}"),
    (lambda c: sum(getattr(c, f"use_{name}_head") for name in HEADS) > 1, "several flags use_NAME_head: keep one"),
    (lambda c: c.aux_heads and not is_ascending(c.aux_heads, c.n_layer),
     "aux_heads={aux_heads!r}: layers below n_layer={n_layer}, counted from 1, in order, without spaces, as in '2,4'"),
    (lambda c: c.use_mla and c.mla_mode == "scalar" and c.n_layer < 2,
     'mla_mode="scalar" mixes layers: n_layer={n_layer} must be at least 2'),
    (lambda c: c.use_mhc and c.changed("resid_topk", "vq_codes", "vq_lattice", "subspace_rank"),
     "use_mhc has several streams; resid_topk, vq_codes, vq_lattice, subspace_rank limit one: leave one of them out"),
    (lambda c: c.logit_softcap and (c.head or c.loss_chunk),
     "logit_softcap={logit_softcap} is for the linear head's whole logits: no other head, loss_chunk=0"),
    # -- learning rules
    (lambda c: c.freeze_blocks and c.zero_init_proj,
     "freeze_blocks={freeze_blocks}: with zero_init_proj frozen blocks would add nothing"),
    (lambda c: (c.method != "bp" or c.freeze_emb) and c.tie_weights,
     "method={method} and freeze_emb={freeze_emb} need tie_weights=False: the head would move the embedding"),
    (lambda c: c.method != "bp" and (c.changed("loss_chunk", "add_l4_losses", "aux_heads", "use_sdr", "use_mhc")
                                     or not c.all_have("takes_learning_rules")),
     "use_kan, use_bio_mlp, use_sdr, use_mhc, kaufmann layers, loss_chunk, use_mfs_head, add_l4_losses, aux_heads "
     'multiply outside of linear layers and need method="bp", not {method}'),
    (lambda c: c.method != "bp" and c.htm_meta_strength, 'htm_meta_strength scales columns: write method="bp"'),
    (lambda c: c.method == "dfa" and (c.has_spectrum or c.use_mla or c.x0_skip),
     "spectral coordinates, use_mla and x0_skip reach around dfa's cuts: set skip_manifold_spectral, leave those out"),
    (lambda c: c.method == "dfa" and c.dfa_granularity == "block" and c.n_layer < 2,
     'dfa_granularity="block" needs two blocks: write dfa_granularity="sublayer" or n_layer=2'),
    (lambda c: c.method == "dfa" and c.fa_grape and (c.has_knots() or not c.all_have("has_forward_mode")
                                                     or c.manifold_at == "blocks"),
     'fa_grape under dfa needs forward mode: softmax or sigmoid in every layer, no knots, no manifold_at="blocks"'),
    (lambda c: c.fa_calibrate_every == 1, 'fa_calibrate_every=1 is backpropagation: write method="bp", or at least 2'),
    (lambda c: c.freeze_blocks > c.n_layer, "freeze_blocks={freeze_blocks}: must be 0 to n_layer={n_layer}"),
    # -- surrogates and limits, meta-updates
    (lambda c: c.fuse_attn_local and (c.use_block_sparse or c.has_knots() or c.has("has_sigmoid")),
     "fuse_attn_local is dense softmax: no use_block_sparse, no knots, no sigmoid"),
    (lambda c: c.ste_sigmoid and c.has_knots(), "ste_sigmoid goes through a dense mask: leave out use_knot_attention"),
    (lambda c: c.mlp_topk >= 4 * c.n_embd or max(c.resid_topk, c.subspace_rank) >= c.n_embd,
     "mlp_topk={mlp_topk}, resid_topk={resid_topk}, subspace_rank={subspace_rank}: must be below the width, or they "
     "keep everything"),
    (lambda c: c.vq_codes == 1, "vq_codes=1 leaves one direction: must be at least 2"),
    (lambda c: c.vq_lattice and c.n_embd % 7,
     "vq_lattice needs groups of 7 channels: n_embd={n_embd} is no multiple of 7"),
    (lambda c: c.htm_meta_strength and 4 * c.n_embd % HTM_GROUP,
     "htm_meta_strength needs hidden units in groups of 64: n_embd={n_embd} must be a multiple of 16"),
    (lambda c: c.htm_meta_strength and not all(getattr(MIXERS[name], "has_columns", False) for name in c.mixers),
     "htm_meta_strength needs mixers with c_attn and c_proj, which {attn_mode} or {attn_pattern!r} has not"),
)  # fmt: skip
GPTConfig.__doc__ = documented(GPTConfig)


# ---------------------------------------------------------------------------------------------------------------------
# One forward pass, and what outlives it.


@dataclass
class Pass:
    """One forward pass: what modules read beside the stream, and what they leave for the loss."""

    idx: torch.Tensor | None = None  # (B, T) token ids
    targets: torch.Tensor | None = None  # (B, T), -1 where there is nothing to predict; None in generation
    state: "DecodingState | None" = None  # the tokens before idx
    training: bool = False
    cut: Callable = lambda x, where: x  # (stream, "sublayer" | "block") -> stream: dfa detaches it there
    on_token_loss: Callable | None = None  # gets each token's loss and the targets, both (B T,), when they are known
    spectrum: torch.Tensor | None = None  # (B, T, n_eigenvectors), added to queries and keys
    retrieved: torch.Tensor | None = None  # (B, T, C), what the memory adds after the blocks
    attended: torch.Tensor | None = None  # (B, T, C), the token mixer's output, if the channel mixer reads it
    weight: torch.Tensor | None = None  # (V, C) output embedding
    cuts: list = field(default_factory=list)  # (B, T, C), the stream wherever it was cut
    hiddens: list = field(default_factory=list)  # (B, T, C) of the top layers, as many as the head reads
    losses: dict = field(default_factory=dict)  # auxiliary losses in training, name: (weight in the objective, value)

    @property
    def past(self):
        """How many tokens came before idx."""
        return tokens_before(self.state)


ALONE = Pass()  # for a token mixer that is called by itself; modules read it and leave nothing there


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


def tokens_before(state):
    return 0 if state is None else state.pos


def store_of(state, module):
    """The module's own dict in `state`; without a state, one that nobody keeps."""
    return {} if state is None else state.of(module)


# ---------------------------------------------------------------------------------------------------------------------
# Block and GPT.


class Block(nn.Module):
    """A token mixer and a channel mixer on the residual stream, with region feedback between them where it is on."""

    def __init__(self, config, layer):
        super().__init__()
        self.manifold, self.spectral = manifold_parts(config, "blocks")
        self.ln_1, self.conv_1 = new_norm(config), short_conv(config, "a", config.n_embd)
        self.attn = MIXERS[config.mixer(layer)](config, layer)
        self.feedback = None
        if config.use_region_feedback:
            self.feedback = RegionFeedback(config, getattr(self.attn, "cells", None) or Cells(config, layer))
        self.ln_2, self.conv_2 = new_norm(config), short_conv(config, "c", config.n_embd)
        self.mlp, self.reads_attention = CHANNEL_MIXERS[config.channel_mixer](config), config.bio_attention_gain
        is_on = (config.manifold_at == "blocks", True, config.use_region_feedback, True)
        wires = [wiring(config, layer, sum(is_on[:i]), sum(is_on)) if on else None for i, on in enumerate(is_on)]
        self.wire_m, self.wire_1, self.wire_f, self.wire_2 = wires

    def forward(self, x, run=ALONE):
        """x, (B, T, C) or streams (B, T, n, C), after all sublayers."""
        if self.manifold is not None:
            x = self.wire_m(x, lambda h: on_manifold(h, self.manifold, self.spectral, run))
        x = self.wire_1(x, lambda h: self.attend(h, run))
        if self.feedback is not None:
            x = self.wire_f(x, lambda h: self.feedback(h, run.state))
        x = run.cut(x, "sublayer")
        return self.wire_2(x, lambda h: self.mlp(through(self.conv_2, self.ln_2(h), run.state), run))

    def attend(self, h, run):
        y = self.attn(through(self.conv_1, self.ln_1(h), run.state), run)
        if self.reads_attention:
            run.attended = y
        return y


class GPT(nn.Module):
    """The model. `losses` holds the last forward's loss components by name, detached (0-d tensors, nats)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.losses = config, {}
        parts = {"wte": SDREmbedding(config) if config.use_sdr else nn.Embedding(config.vocab_size, config.n_embd)}
        if config.pos_embedding == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.pos_embedding == "ramanujan":
            parts["positions"] = RamanujanPositions(config)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = new_norm(config)
        self.transformer = nn.ModuleDict(parts)
        is_computed = config.use_sdr and config.tie_weights  # the output embedding is then no parameter
        self.lm_head = None if is_computed else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights and not config.use_sdr:
            self.transformer.wte.weight = self.lm_head.weight  # Press & Wolf 2017
        self.token_shift = TokenShift(config) if config.token_shift else None
        self.manifold, self.spectral = manifold_parts(config, "embedding")
        self.mla = LayerAggregation(config) if config.use_mla else None
        self.streams = Streams(config, parts["h"])
        self.input_skip = InputSkip(config) if config.x0_skip else None
        for name, head in HEADS.items():
            setattr(self, name, head(config) if name == config.head else None)
        self.ae = SlidingWindowAE(config) if config.add_l4_losses else None
        self.aux = LayerLosses(config) if config.aux_heads else None
        self.slate = context_summary(config, parts["h"])
        self.htm = ColumnMeta(config, parts["h"]) if config.htm_meta_strength else None
        self.dfa = DirectFeedback(config) if config.method == "dfa" else None
        self.grape = Grape(config) if config.fa_grape or config.fa_calibrate_every else None
        self.limits = residual_limits(config)
        if config.method != "bp":
            replace_linears(self, config)
        self.init_weights()

    def init_weights(self):
        """nanoGPT's: N(0, 0.02), smaller where outputs add up in the stream; then what modules ask for themselves."""
        self.apply(self._init_weights)
        init_by_width(self.transformer.h, self.config)
        for module in self.having("init_own"):
            module.init_own()
        for block in self.transformer.h[: self.config.freeze_blocks]:
            block.requires_grad_(False)
        for table in ("wte", "wpe") if self.config.freeze_emb else ():
            if table in self.transformer:
                self.transformer[table].requires_grad_(False)
        for name, p in self.named_parameters():
            if name.endswith(("c_proj.weight", "o_proj.weight")):  # 2 n_layer of these add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
                if self.config.zero_init_proj and name.startswith("transformer.h.") and ".manifold." not in name:
                    nn.init.zeros_(p)  # a manifold's has a gate that starts at 0: both would stay there

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def having(self, name):
        """The modules inside that have an attribute `name`: how variants hook in, see CONTRIBUTING.md."""
        return [module for module in self.modules() if module is not self and hasattr(module, name)]

    @property
    def head(self):  # None for the linear one
        return getattr(self, self.config.head) if self.config.head else None

    @property
    def learning_rules(self):
        """What replaces or scales backpropagation's gradients and so must see each pass."""
        return [rule for rule in (self.dfa, self.grape, self.htm) if rule is not None]

    @property
    def max_positions(self):
        """How many tokens the model can place: block_size, or None where nothing is laid out for so many."""
        placed = self.config.pos_embedding not in ("none", "rope") or self.config.has_cells
        return self.config.block_size if placed else None

    # Forward --------------------------------------------------------------------------------------------------------

    def forward(self, idx, targets=None, state=None, all_logits=False):
        """Logits and loss of a batch of tokens.

        idx (B, T) int64; targets (B, T) int64 with -1 where there is nothing to predict; state: a DecodingState that
        holds the tokens before idx, and is advanced over them. Returns logits (B, T, V) and the loss, a 0-d tensor in
        nats per token; without targets the last position's logits, (B, 1, V), and None; with all_logits in place of
        targets those of every one; in training with loss_chunk the last one's alone. ValueError for too many tokens.
        """
        if all_logits:
            targets = torch.full_like(idx, -1)
        run = Pass(idx, targets, state, self.training)
        if self.max_positions is not None and run.past + idx.size(1) > self.max_positions:
            raise ValueError(f"{run.past + idx.size(1)} tokens, but block_size is {self.max_positions}")
        for rule in self.learning_rules:
            rule.begin(run)
        x = self.trunk(self.embed(run), run)  # (B, T, C)
        logits, loss = self.predict(self.final_norm(x, run), run)
        if state is not None:
            state.pos += idx.size(1)
        return logits, None if all_logits else self.objective(loss, run)

    def embed(self, run):
        """Tokens, positions, points on a manifold: (B, T, C)."""
        if self.config.use_sdr:
            x, run.weight, run.retrieved = self.transformer.wte(run.idx, run.state)
        else:
            x = self.transformer.wte(run.idx)  # (B, T, C)
        if self.lm_head is not None:
            run.weight = self.lm_head.weight  # (V, C)
        if self.config.pos_embedding == "learned":
            x = x + self.transformer.wpe.weight[run.past : run.past + run.idx.size(1)]
        if self.config.pos_embedding == "ramanujan":
            x = x + self.transformer.positions(run.idx.size(1), run.past)
        x = through(self.token_shift, rms_norm(x) if self.config.emb_norm else x, run.state)
        x = self.transformer.drop(x)
        return x if self.manifold is None else x + on_manifold(x, self.manifold, self.spectral, run)

    def trunk(self, x, run):
        """All blocks: (B, T, C) -> (B, T, C)."""
        outputs = [x]  # the embedding and each block's output, for layer aggregation
        n_read = getattr(self.head, "layers_read", 0)
        x = first = self.streams.spread(x)  # (B, T, n, C) under use_mhc
        for layer, block in enumerate(self.transformer.h, 1):
            x = block(x if self.input_skip is None else self.input_skip(x, first, layer - 1), run)
            if self.limits is not None:
                x = self.limits(x, layer - 1)
            if layer < self.config.n_layer:
                x = run.cut(x, "block")
            if self.mla is not None:
                x = self.mla(x, outputs)
            if self.aux is not None:
                self.aux.add_loss(x, layer, self.transformer.ln_f, run)
            if n_read:
                run.hiddens = [*run.hiddens, stream_mean(x)][-n_read:]
        x = stream_mean(x)
        if run.retrieved is not None:
            x = x + run.retrieved
            run.hiddens = [*run.hiddens[:-1], x] if n_read else []
        return x

    def final_norm(self, x, run):
        """The final norm of what is read: (B, T, C), or (B, 1, C) where only the last position's logits are wanted."""
        if run.targets is None and self.head is None and self.slate is None:
            x = x[:, -1:]
        return self.transformer.ln_f(x) if self.dfa is None else self.dfa.final_norm(self.transformer.ln_f, x, run)

    def predict(self, h, run):
        """Logits, and the language-model loss if there are targets, of h (B, T, C): the one place that knows heads."""
        is_chunked = run.targets is not None and run.training and self.config.loss_chunk > 0
        shown = slice(-1, None) if run.targets is None or is_chunked else slice(None)
        context = self.context(h, run)
        if self.head is not None:
            context_of_head = context if self.config.head_reads_slate else None
            logits, chunked = self.head.predict(h, context_of_head, run, shown, is_chunked)
        else:
            logits = F.linear(h[:, shown], run.weight) if self.lm_head is None else self.lm_head(h[:, shown])
            logits, chunked = softcap(logits, self.config.logit_softcap), None
            if is_chunked:
                chunked = chunked_cross_entropy(h, run.weight, run.targets, self.config.loss_chunk, per_token=True)
        loss = None if run.targets is None else language_model_loss(logits, chunked, run)
        if self.ae is not None and run.training and run.targets is not None:
            self.ae.add_losses(h, context, run)
        return logits, loss

    def context(self, h, run):
        """The context summary (B, T, C) of final hidden states h (B, T, C), or None where nothing reads it."""
        if not (self.config.head_reads_slate or (self.ae is not None and run.training and run.targets is not None)):
            return None
        context = self.slate(h, run.state)
        if self.config.region_slate_include_error:
            context = self.slate.with_error(context, self.ae.error(h, context, run.idx, run.weight, run.state))
        return context

    def objective(self, loss, run):
        """The loss plus the weighted auxiliary losses, which exist in training only; all parts in `losses`."""
        if loss is None:
            return None
        self.losses = {"lm": loss.detach()} | {name: value.detach() for name, (_, value) in run.losses.items()}
        for weight, value in run.losses.values():
            loss = loss + weight * value
        return loss

    def measures(self):
        """What modules measured of themselves in the last forward, by name, averaged over them: 0-d tensors."""
        found = {}
        for module in self.having("measured"):
            for name, value in module.measured.items():
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def get_avg_sparsity(self):
        """Mean share of silent units over the layers of sparse events in the last forward, 0-d; None without any."""
        return self.measures().get("sparsity")

    @property
    def returns_log_probs(self):
        """Whether forward's logits are log-probabilities; either way their softmax is the distribution."""
        return self.config.has("returns_log_probs")

    # Text -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
               repetition_window=None, use_cache=True, generator=None, known_ids=None):  # fmt: skip
        """Yield the next token of each sequence, (B, 1) int64, one after another; see `generate` for the settings."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"the prompt must be (B, T) with T >= 1, not {tuple(idx.shape)}")
        check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window)
        training, limit, block_size = self.training, self.max_positions, self.config.block_size
        if limit is not None and self.config.pos_embedding != "learned" and idx.size(1) + max_new_tokens > limit:
            limit = min(idx.size(1) + max_new_tokens, LONGEST * limit)
            self.extend_block_size(limit)  # until the end of this text
        state = DecodingState() if use_cache else None
        self.eval()
        try:
            for _ in range(max_new_tokens):
                if state is None or (limit is not None and idx.size(1) > limit):
                    logits, _ = self(idx if limit is None else idx[:, -limit:])  # a learned position table: slide
                else:
                    logits, _ = self(idx[:, state.pos :], state=state)
                new = next_token(logits[:, -1, :known_ids].float(), idx, temperature, top_k, top_p, min_p,
                                 repetition_penalty, repetition_window, generator)  # fmt: skip
                idx = torch.cat((idx, new), dim=1)
                yield new
        finally:
            self.train(training)
            if self.config.block_size > block_size:  # a learned table is never cut: its parameter would be another one
                self.crop_block_size(block_size)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0,
                 use_cache=True, generator=None, repetition_window=None, known_ids=None):  # fmt: skip
        """The prompts idx (B, T) int64 followed by max_new_tokens sampled tokens: (B, T + max_new_tokens).

        temperature 0 is greedy. top_k, top_p and min_p cut the tail, in that order. repetition_penalty r divides a seen
        token's logit by r if it is positive and multiplies it if negative, before the temperature; repetition_window
        limits "seen" to the last so many tokens. use_cache=False recomputes everything for each token, with the same
        result. Beyond block_size a model with learned positions slides its window, others go on from their state.
        known_ids: so many ids have a meaning, others are not chosen. ValueError for settings out of range.
        """
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window,
                          use_cache, generator, known_ids)  # fmt: skip
        return torch.cat((idx, *new), dim=1)

    # Training -------------------------------------------------------------------------------------------------------

    def num_params(self, non_embedding=True):
        """Number of parameters, by default without tables that only look up: positions, values, an untied wte."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos_embedding == "learned":
            n -= self.transformer.wpe.weight.numel()
        if non_embedding and not self.config.tie_weights and not self.config.use_sdr:
            n -= self.transformer.wte.weight.numel()
        return n - non_embedding * sum(m.table.weight.numel() for m in self.modules() if isinstance(m, ValueEmbedding))

    def flops_per_token(self, T=None):
        """Training FLOPs per token at context T (default block_size): forward, and twice that backward.

        2 per weight of every linear layer, plus what modules add in their own `flops_per_token`.
        """
        T = T or self.config.block_size
        linear = sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        own = sum(m.flops_per_token(T) for m in self.having("flops_per_token"))
        return 3 * (linear + own)

    def estimate_mfu(self, sequences, seconds, peak_flops=312e12):
        """Share of a GPU's peak FLOP/s (an A100's) that training on so many whole sequences in so long used."""
        return sequences * self.config.block_size * self.flops_per_token() / seconds / peak_flops

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=None):
        """AdamW, fused where PyTorch has it; Muon where `muon` is given, the rates of `muon_groups`."""
        fused = device_type in ("cpu", "cuda", "mps")
        if muon is None:
            optimizer = torch.optim.AdamW(adamw_groups(self, weight_decay), learning_rate, betas, fused=fused)
        else:
            optimizer = Muon(muon_groups(self, muon, weight_decay), betas, fused=fused)
        for rule in self.having("attach"):
            rule.attach(optimizer, self)
        for module in self.having("before_step"):  # what was counted is applied once per step
            optimizer.register_step_pre_hook(lambda *_, apply=module.before_step: apply())
        return optimizer

    def set_stage(self, stage):
        """Move to a stage, 0 to 6, of a curriculum along E7's chain; ValueError if no module has stages."""
        if not (modules := self.having("set_stage")):
            raise ValueError('no part of the model has stages: set use_manifold and manifold="e7"')
        for module in modules:
            module.set_stage(stage)

    def alignment(self, *batch):
        """How well feedback agrees with backpropagation, see `alignment`; {} under backpropagation itself."""
        return {} if self.config.method == "bp" else alignment(self, *batch)

    def extend_block_size(self, block_size):
        """Lengthen the context, where no learned table ends it: cells go on from the last anchor, all else stays."""
        if self.config.pos_embedding == "learned":
            raise ValueError(f"block_size={block_size}: a learned position table has no rows beyond it")
        self.config.block_size = block_size
        for module in self.having("grow"):
            module.grow(block_size)

    def crop_block_size(self, block_size):
        """Shorten the context, e.g. of a pre-trained model. ValueError if it would have to grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: must be 1 to {self.config.block_size}, it can only shrink")
        self.config.block_size = block_size
        if self.config.pos_embedding == "learned":
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
        for module in self.having("crop"):
            module.crop(block_size)

    # Checkpoints and Hugging Face -----------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, checkpoint, **overrides):
        """The model in a dict from `load_checkpoint`, nanoGPT's included; overrides replace config fields (dropout).

        CheckpointError if its flags or tensors are not this version's.
        """
        args = checkpoint["model_args"] | overrides
        if unknown := sorted(args.keys() - {f.name for f in fields(GPTConfig)}):
            raise CheckpointError(f"the checkpoint has flags this version does not know: {', '.join(unknown)}")
        try:
            model = cls(check_sizes(GPTConfig(**args), checkpoint["model"]))
            model.load_state_dict(own_projections(checkpoint["model"], model))
        except (ValueError, TypeError, RuntimeError) as e:
            raise CheckpointError(f"the checkpoint does not fit its own flags: {e}") from e
        return model

    @classmethod
    def from_pretrained(cls, name_or_dir, **overrides):
        """A GPT-2 by name, or a Hugging Face directory: `export_hf`'s, or a GPT-2; overrides replace config fields."""
        if is_exported(name_or_dir):
            return cls.from_checkpoint(read_exported(name_or_dir), **overrides)
        args, weights = read_gpt2(name_or_dir)
        model = cls(GPTConfig(**args | overrides))
        model.load_state_dict(own_projections(weights, model))
        return model

    def export_hf(self, directory):
        """Write a Hugging Face directory, as GPT-2 where the model is one; with a run's facts: lab/export.py."""
        from lab.export import export  # it folds this file, which nothing else here needs

        export(self, directory)


# ---------------------------------------------------------------------------------------------------------------------
# Small parts: activations, sums over processes, the key-value cache.


def relu2(x):
    """max(x, 0)^2, of the same shape. Source: Primer, So et al. 2021, arXiv 2109.08668."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": relu2,
}


class RMSNorm(nn.Module):
    def forward(self, x):
        return rms_norm(x)


def new_norm(config):
    """The norm that the flags choose, for vectors (..., C)."""
    return RMSNorm() if config.norm == "rms" else NORMS[config.ln_mode](config.n_embd, bias=config.bias)


def softcap(logits, cap):
    """cap tanh(logits / cap), in float32 or better, or the logits themselves for cap 0. Gemma 2, arXiv 2408.00118."""
    return cap * torch.tanh(logits.to(sum_dtype(logits)) / cap) if cap else logits


def init_by_width(blocks, config):
    """Matrices of linear layers, whose two sides are at least n_embd wide, under init_gain."""
    for module in blocks.modules() if config.init_gain else ():
        if isinstance(module, nn.Linear) and min(module.weight.shape) >= config.n_embd:
            nn.init.normal_(module.weight, std=config.init_gain / math.sqrt(config.n_embd))


class ShortConv(nn.Module):
    """x_t + sum_j w_j x_{t-j}, j < taps, w 0 at first; (B, T, C) -> (B, T, C). Canon layers, arXiv 2512.17351."""

    def __init__(self, channels, taps):
        super().__init__()
        self.taps = taps
        self.w = nn.Parameter(torch.zeros(taps * channels))  # flat: vectors do not decay

    def forward(self, x, state=None):
        w = self.w.view(self.taps, -1).to(x.dtype)
        if state is None or self.taps == 1:
            return convolve(x, w)
        store = state.of(self)
        before = store.get("last", x.new_zeros(x.size(0), self.taps - 1, x.size(2)))
        store["last"] = torch.cat((before, x), 1)[:, 1 - self.taps :].clone()
        return convolve(x, w, before)

    def flops_per_token(self, T):
        return 2 * self.w.numel()


def short_conv(config, place, channels):
    """The convolution at a place of short_conv_at, or None."""
    return ShortConv(channels, config.short_conv) if config.short_conv and place in config.short_conv_at else None


def through(module, x, state=None):
    """What an optional module makes of x; x itself where it is None."""
    return x if module is None else module(x, state)


class TokenShift(nn.Module):
    """x_t + strength sigmoid(w . x_t[:24]) x_{t-1}, strength 0 at first; (B, T, C) -> (B, T, C). As in nanochat."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(min(24, config.n_embd), 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        store = store_of(state, self)
        before = torch.cat((store.get("last", torch.zeros_like(x[:, :1])), x[:, :-1]), 1)
        if state is not None:
            store["last"] = x[:, -1:].clone()
        return x + self.strength * torch.sigmoid(self.gate(x[..., : self.gate.in_features])) * before


class ValueEmbedding(nn.Module):
    """v + 3 sigmoid(W x[:12]) table[idx], one gate per head, for values v (B, T, width). As in nanochat."""

    def __init__(self, config, heads, width):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, width)
        self.gate = nn.Linear(min(12, config.n_embd), heads, bias=False)

    def init_own(self):
        nn.init.normal_(self.table.weight, std=self.table.embedding_dim**-0.5)

    def forward(self, v, x, idx):
        own = self.table(idx).unflatten(-1, (self.gate.out_features, -1))
        gate = 3 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
        return v + (gate[..., None] * own).flatten(-2).to(v.dtype)


def value_embedding(config, layer, heads, width):
    """The layer's ValueEmbedding under value_embeds: in the last layer, and in every other one below; else None."""
    has_one = config.value_embeds and layer % 2 == (config.n_layer - 1) % 2
    return ValueEmbedding(config, heads, width) if has_one else None


class InputSkip(nn.Module):
    """a x + b x0 before block i, x0 the embedding; at first a falls from 1.15 to 1.05, b from 0.2 to 0.05."""

    def __init__(self, config):
        super().__init__()
        depth = torch.arange(config.n_layer) / max(1, config.n_layer - 1)
        self.a, self.b = nn.Parameter(1.15 - 0.1 * depth), nn.Parameter(0.2 - 0.15 * depth)

    def forward(self, x, x0, layer):
        return self.a[layer] * x + self.b[layer] * x0


def has_processes():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(counts):
    """Sum a tensor over processes, in place, where there are several."""
    if has_processes():
        torch.distributed.all_reduce(counts)


def whole(p):
    """A parameter between two passes, put together where FSDP has shared it out: all processes must call it then."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def append_to_cache(store, k, v):
    """Add k, v (B, nh, t, hs) to a layer's store; returns all n so far, (B, nh, n, hs) each.

    A full buffer grows by one part in 32: so many tokens share its copy, and no more than that is spare.
    """
    start = store.get("n", 0)
    n = start + k.size(2)
    if "kv" not in store or n > store["kv"].size(3):
        B, nh, _, hs = k.shape
        grown = k.new_empty(2, B, nh, n + max(16, n // 32), hs)
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
    # as complex numbers: one product in place of four, and fewer copies
    as_complex = q.device.type == "cpu" and not torch.compiler.is_compiling()
    turn = torch.complex(cos, sin) if as_complex else None

    def rotate(x):
        turned, rest = x.split((2 * theta.size(1), x.size(-1) - 2 * theta.size(1)), dim=-1)
        pairs = turned.to(torch.promote_types(x.dtype, theta.dtype)).unflatten(-1, (-1, 2))  # (B, nh, T, m, 2)
        if as_complex:
            pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        else:
            a, b = pairs.unbind(-1)
            pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        turned = pairs.flatten(-2).to(x.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned

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


def is_ascending(layers, n_layer):
    """Whether a text is "2,4": numbers from 1 to n_layer - 1 in ascending order, with commas between them."""
    numbers = [int(n) for n in layers.split(",")] if re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", layers) else [0]
    return numbers[0] > 0 and numbers[-1] < n_layer and all(a < b for a, b in zip(numbers, numbers[1:]))


def pairs_of(edges):
    """[(0, 3), (1, 2)] of "0>3,1>2"; [(0, 0)], which is none, for what is not written so."""
    if not re.fullmatch(r"(\d+>\d+(,\d+>\d+)*)?", edges):
        return [(0, 0)]
    return [tuple(map(int, pair.split(">"))) for pair in edges.split(",") if pair]


def feedback_weights(starts, region_size, rings, hops, edges=()):
    """Weights of the earlier cells in each cell's feedback: (C, C), strictly lower triangular, rows sum to 1 or 0.

    Seen from cell c, a region's value is the mean over the tokens of its complete cells, those before c; one hop
    replaces it by the mean of the values, where there are any, of the regions at most `rings` away and not after c's.
    `edges` (a, b): a cell of region b takes the mean of that and of region a's. ValueError beyond the last region.
    """
    length = torch.tensor(starts, device="cpu").diff().double()
    C = len(length)
    region = torch.arange(C, device="cpu") // region_size
    weights = torch.zeros(C, C, dtype=torch.float64, device="cpu")
    if beyond := [f"{a}>{b}" for a, b in edges if b > int(region[-1])]:
        raise ValueError(f"region_feedback_edges: {beyond[0]}, but the block has {int(region[-1]) + 1} regions")
    for c in range(1, C):
        near = max(0, int(region[c]) - rings * hops)  # no hop reaches further back
        member = (region[:c] == torch.arange(near, int(region[c]) + 1, device="cpu")[:, None]) * length[:c]  # (R, c)
        count = member.sum(1, keepdim=True)
        value, has = member / count.clamp(min=1), (count > 0).double()
        r = torch.arange(len(value), device="cpu")
        neighbour = ((r[:, None] - r[None, :]).abs() <= rings).double()
        for _ in range(hops):
            near = neighbour @ has  # regions with a value among the neighbours
            value, has = neighbour @ value / near.clamp(min=1), (near > 0).double()
        values = [value[-1]] if has[-1] else []
        for a in (a for a, b in edges if b == int(region[c])):
            chosen = (region[:c] == a) * length[:c]
            values.append(chosen / chosen.sum())
        if values:
            weights[c, :c] = sum(values) / len(values) / length[:c]  # applied to the sum over a cell's tokens
    return weights.float()


LONGEST = 64  # blocks: the table of which cells may look at which grows with the square


def update_relation(cells, incompatible_keys):
    """After other cells were loaded: recompute what follows from them."""
    cells.update_relation()


class Cells(nn.Module):
    """The cells of one layer: `cell` and `offset` of each position, (block_size,), and the route they allow."""

    def __init__(self, config, layer):
        super().__init__()
        rings = config.neighbor_rings if config.use_block_sparse else 1
        rings = max(1, rings) if config.has_knots(layer) else rings  # knots are tied by the strand of the cell before
        self.relation = (rings, config.region_size, config.region_edges)
        edges = pairs_of(config.region_feedback_edges)
        graph = (config.region_size, config.region_rings, config.feedback_hops, edges)
        self.graph = graph if config.use_region_feedback else None
        self.gaps, self.block, self.trained = None, config.knot_block, config.block_size
        if config.has_anchors:
            seed = config.anchor_seed + (0 if config.share_region_router else layer)
            self.gaps = config.anchor_min_gap, config.anchor_jitter, seed
            draw = torch.Generator("cpu").manual_seed(seed)
            anchors, cell = build_pd_anchors_1d(config.block_size, config.anchor_min_gap, config.anchor_jitter, draw)
        else:
            anchors = torch.arange(0, config.block_size, config.knot_block, device="cpu")
            cell = torch.arange(config.block_size, device="cpu") // config.knot_block
        self.register_buffer("cell", cell)
        self.register_buffer("offset", anchor_local_offsets(torch.arange(len(cell), device="cpu"), anchors, cell))
        self.register_load_state_dict_post_hook(update_relation)
        self.update_relation()

    def update_relation(self):
        """Work out, from the cells, which may look at which and how much they feed back to each other."""
        cell = self.cell.cpu()
        route = Route.from_cells(cell, region_relation(int(cell[-1]) + 1, *self.relation))
        self.starts = route.starts
        self.register_buffer("allowed", route.allowed.to(self.cell.device), persistent=False)
        self.register_buffer("keys", route.keys_per_query().to(self.cell.device), persistent=False)  # per position
        if self.graph:
            weights = feedback_weights(route.starts, *self.graph).to(self.cell.device)
            self.register_buffer("region_weights", weights, persistent=False)

    @property
    def route(self):
        return Route(self.starts, self.allowed)

    def crop(self, block_size):
        self.trained = min(self.trained, block_size)  # positions, on which a bias by the number of keys is based
        if block_size < len(self.cell):
            self.cell, self.offset = self.cell[:block_size].clone(), self.offset[:block_size].clone()
            self.update_relation()

    def grow(self, block_size):
        """More positions: anchors are drawn on from the last one, with the same gaps."""
        length, cell, offset = len(self.cell), self.cell.cpu(), self.offset.cpu()
        if self.gaps is None:
            new = torch.arange(length, block_size, device="cpu")
            cell, offset = torch.cat((cell, new // self.block)), torch.cat((offset, new % self.block))
        else:
            min_gap, jitter, seed = self.gaps
            draw = torch.Generator("cpu").manual_seed(seed + length)
            anchors = [length - 1 - int(offset[-1])]
            while anchors[-1] < block_size:
                anchors.append(anchors[-1] + min_gap + int(torch.randint(jitter + 1, (), generator=draw, device="cpu")))
            anchors, new = torch.tensor(anchors, device="cpu"), torch.arange(length, block_size, device="cpu")
            after = torch.searchsorted((anchors[:-1] + anchors[1:]) // 2, new)  # 0: still the last cell
            cell, offset = torch.cat((cell, cell[-1] + after)), torch.cat((offset, new - anchors[after]))
        self.cell, self.offset = cell.to(self.cell.device), offset.to(self.offset.device)
        self.update_relation()


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
            self.W = nn.Parameter(W)  # (m,) radians per token
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
        """q, k (B, nh, T, hs) rotated to the positions delta (T,), in tokens."""
        return ferope_ar_rotate(q, k, delta[:, None].to(torch.promote_types(self.W.dtype, torch.float32)) * self.W)


# ---------------------------------------------------------------------------------------------------------------------
# Ramanujan positions: x_t += W r_t, with r_t fixed columns for each prime power q = 2, 3, 4, 5, 7, ..., 23:
#   cos(2 pi t k / q), sin(2 pi t k / q) for the units k <= q / 2 of q, and the Ramanujan sum c_q(t), all of them over
#   sqrt(q phi(q)); c_q(t) = sum of e^(2 pi i t k / q) over all units k = mu(q/g) phi(q) / phi(q/g), g = gcd(t, q).
# t is known from its residues: no two positions below 5,354,228,880 coincide, and a shorter block has the same columns.
# W (C, 124) is all there is to learn. Cost: T 124 C for a sequence, whatever the batch. Ramanujan 1918.


class RamanujanPositions(nn.Module):
    """What to add to the tokens at positions past .. past + T - 1, (T, C); as large as token embeddings, 0.02."""

    def __init__(self, config):
        super().__init__()
        self.register_buffer("table", ramanujan_table(config.block_size), persistent=False)
        self.proj = nn.Linear(self.table.size(1), config.n_embd, bias=False)

    def forward(self, T, past=0):
        return self.proj(self.table[past : past + T])

    def crop(self, block_size):
        self.table = self.table[:block_size].clone()

    def grow(self, block_size):
        self.table = ramanujan_table(block_size).to(self.table)


# ---------------------------------------------------------------------------------------------------------------------
# Knots: cells attend to earlier ones whose strands, closed polygons through 3-D projections of the tokens, link theirs.
#   Lk(a, b) = 1/(4 pi) oint oint det(a', b', a - b) / |a - b|^3 is an integer; of open strands the same integral is a
#   real number with a gradient. Query cell c is represented by strand c - 1, the last complete one. It sees c and c - 1
#   and, of the cells c' <= c - 2 with |Lk(strand c - 1, strand c')| >= threshold, the k most linked, then the latest.
#   strands (B, nh, cells, n, 3); relations and biases (B, nh, query cell, key cell).
# Cost: (T / cell)^2 n^2 sides of lines for all linking numbers (kernels/knots.py), then O(T k) attention.
# Source: Gauss 1833; the gate is ours.


def strand_grid(starts, n, device="cpu"):
    """Where n vertices lie in each cell, at equal parameters from its first token to its last.

    starts: C + 1 ints. Returns (before, after, weight), each (C, n): the positions around a vertex, and after's share.
    """
    starts = torch.tensor(starts, device=device)
    place = torch.arange(n, device=device) * (starts.diff() - 1)[:, None]  # in (n - 1)-ths of a token
    before, part = starts[:-1, None] + place // (n - 1), place % (n - 1)
    return before, before + (part > 0), part / (n - 1)


def strands(points, starts, n):
    """The polygons through n points of each cell of points (B, nh, T, 3): (B, nh, C, n, 3), float32 or better.

    A cell of one token is a point: it links with nothing.
    """
    before, after, weight = strand_grid(starts, n, points.device)
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    low, high = (points.index_select(2, i.flatten()).unflatten(2, i.shape) for i in (before, after))
    return torch.lerp(low, high, weight[..., None].to(points.dtype))


def knot_choice(linking, threshold, k, first=0):
    """The cells that query cells choose by their knots: (index, chosen), int64 and bool, (B, nh, R, min(k, C)).

    linking (B, nh, R, C): |Lk| of the strands before the query cells first .. first + R - 1 with the strands of all C
    cells; threshold: a number, or a tensor that broadcasts. Where fewer than k are linked, chosen is false and the
    index is some other cell.
    """
    R, C = linking.shape[-2:]
    key = torch.arange(C, device=linking.device)
    query = torch.arange(first, first + R, device=linking.device)[:, None]
    linked = (linking >= threshold) & (key <= query - 2)
    rank = torch.where(linked, linking.long() * C + key, -1)  # no two are equal: the order is exact
    rank, index = rank.topk(min(k, C))
    return index, rank >= 0


def scatter_choice(values, index, C):
    """values (B, nh, R, K) at the cells in index, 0 elsewhere: (B, nh, R, C)."""
    return values.new_zeros(*index.shape[:3], C).scatter(-1, index, values)


def gate_bias(integrals, threshold, tau=0.5):
    """log of a gate that is open for the chosen: 0, with the gradient of logsigmoid((|integral| - threshold) / tau).

    integrals (B, nh, R, K); threshold: a tensor that broadcasts, (nh, 1, 1).
    """
    soft = F.logsigmoid((integrals.abs() - threshold) / tau)
    return soft - soft.detach()


class KnotGate(nn.Module):
    """Which cells each head may look at, by the knots of a layer's input, and a bias on the scores between cells."""

    def __init__(self, config, cells):
        super().__init__()
        self.cells, self.n_head, self.vertices, self.k = cells, config.n_head, config.knot_vertices, config.knot_k
        self.threshold = config.knot_threshold
        self.space = nn.Linear(config.n_embd, 3 * config.n_head, bias=False)
        self.pull = nn.Parameter(torch.full((config.n_head, 1, 1), 0.1))  # weight of |integral|
        if config.knot_learned_threshold:
            self.learned = nn.Parameter(torch.full((config.n_head, 1, 1), config.knot_threshold - 0.5))
        else:
            self.learned = None
        self.measured = {"link_density": torch.zeros(())}  # share of the earlier cells that are chosen

    def forward(self, x, state=None):
        """(first, allowed, bias) of the R query cells, from `first` on, that x (B, T, C) lies in: (B, nh, R, cells)."""
        if state is not None:
            return self.extend(x, state)
        starts = self.cells.route.first(x.size(1)).starts
        done = strands(self.points(x), starts, self.vertices)
        links = strand_links(done)
        return 0, *self.tie(done.roll(1, 2), links.roll(1, 2), done, len(starts) - 1)  # row 0 has nothing to choose

    def points(self, x):
        """Tokens (B, T, C) in each head's space, (B, nh, T, 3), in float32 or better under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.space.weight.to(dtype)).unflatten(-1, (self.n_head, 3)).transpose(1, 2)

    def tie(self, own, links, done, C, first=0):
        """(allowed, bias), (B, nh, R, C), of the R query cells from `first` on.

        own (B, nh, R, n, 3): the strand before each; links (B, nh, R, D): its linking numbers with the strands done
        (B, nh, D, n, 3).
        """
        threshold = self.threshold if self.learned is None else self.learned.detach()
        index, chosen = knot_choice(links.abs(), threshold, self.k, first)
        other = done.flatten(3).gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, 3 * self.vertices))
        other = other.view(*index.shape, self.vertices, 3)
        integral = gauss_linking_integrals(own[:, :, :, None], other, links.gather(3, index))
        bias = self.pull * integral.abs()
        if self.learned is not None:
            bias = bias + gate_bias(integral, self.learned)
        rows = slice(first, first + index.size(2))
        if self.training:
            earlier = sum(max(0, c - 1) for c in range(rows.start, rows.stop)) * index.size(0) * index.size(1)
            self.measured["link_density"] = chosen.sum() / max(1, earlier)
        allowed = scatter_choice(chosen, index, C) | self.cells.allowed[rows, :C]
        return allowed, scatter_choice(bias * chosen, index, C)

    def extend(self, x, state):
        """The same in decoding, x (B, T, C) the new tokens: strands of complete cells are kept, and the current row."""
        store, starts = state.of(self), self.cells.starts
        first, last = (bisect_right(starts, p) - 1 for p in (state.pos, state.pos + x.size(1) - 1))
        points = self.points(x)
        if "points" in store:
            points = torch.cat((store["points"], points), 2)  # from the first token of cell `first` on
        end = last + (starts[last + 1] == state.pos + x.size(1))  # cells before it are complete
        done = store.get("done", points.new_zeros(*points.shape[:2], 0, self.vertices, 3))
        if end > first:
            border = [p - starts[first] for p in starts[first : end + 1]]
            done = torch.cat((done, strands(points[:, :, : border[-1]], border, self.vertices)), 2)
            points = points[:, :, border[-1] :]
        if (first, last) != store.get("rows"):
            store["rows"] = first, last
            if last == 0:
                allowed = self.cells.allowed[:1, :1].expand(*points.shape[:2], 1, 1)
                store["allowed"], store["bias"] = allowed, torch.zeros_like(allowed, dtype=points.dtype)
            else:
                own = done[:, :, [max(0, c - 1) for c in range(first, last + 1)]]
                links = strand_links(own, done)
                store["allowed"], store["bias"] = self.tie(own, links, done, last + 1, first)
        store["points"], store["done"] = points, done
        return first, store["allowed"], store["bias"]

    def flops_per_token(self, T):
        """Forward FLOPs: products of widths 3, 3 and 16 over all pairs of segments, and 5 passes."""
        segments = len(self.cells.route.first(T).starts) * self.vertices
        return 2 * (3 + 3 + 16 + 5) * segments**2 * self.n_head / T


# ---------------------------------------------------------------------------------------------------------------------
# Token mixer: causal attention.
#   softmax: y_t = sum_{s <= t} softmax_s(q_t k_s / sqrt(hs)) v_s, per head; x (B, T, C) -> (B, T, C)
#   sigmoid: y_t = sum_{s <= t} sigmoid(q_t k_s / sqrt(hs) + b_t) v_s; with b_t = -log(keys) it starts as their mean
# O(T^2) in training, O(T) per token in decoding, with a state of 2 C numbers per token.
# Sources: Vaswani et al. 2017; sigmoid: Ramapuram et al. 2024, arXiv 2409.04431.


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


def sigmoid_attention(q, k, v, row_bias, mask, bias=0.0, dropout=0.0, ste=None):
    """sigmoid(q k^T / sqrt(hs) + row_bias + bias) v over the keys in mask; q (B, nh, T, hs), k and v (B, nh, n, hs).

    row_bias (T,); mask and bias broadcast to (B, nh, T, n); ste: a SigmoidSTE, whose gradient spares masked keys.
    """
    scores = (q @ k.mT * q.size(-1) ** -0.5 + row_bias[:, None] + bias).to(q.dtype)
    att = scores.sigmoid() * mask if ste is None else ste(scores).masked_fill(~mask, 0.0)
    return F.dropout(att, dropout) @ v


class CausalSelfAttention(nn.Module):
    activation = "softmax"
    has_scores = takes_knots = has_forward_mode = takes_learning_rules = takes_local_backward = True
    has_columns = has_values = True

    def __init__(self, config, layer=0):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.widths = (config.n_embd, *[config.n_embd // config.n_head * self.n_kv_head] * 2)  # q, k, v
        self.parts = {"c_attn": self.widths}
        self.dropout = config.dropout
        self.is_sparse = config.use_block_sparse or config.has_knots(layer)
        self.bias_mode = config.sigmoid_bias_mode
        self.is_split, self.is_local = config.method != "bp", config.fuse_attn_local
        if self.is_split:  # each with its own feedback
            for name, width in zip(("q_proj", "k_proj", "v_proj", "o_proj"), (*self.widths, config.n_embd)):
                setattr(self, name, nn.Linear(config.n_embd, width, bias=config.bias))
        else:
            self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)
            self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.conv = short_conv(config, "b", sum(self.widths))
        self.value_embedding = value_embedding(config, layer, self.n_kv_head, self.widths[-1])
        self.cells = Cells(config, layer) if config.has_cells else None
        self.knots = KnotGate(config, self.cells) if config.has_knots(layer) else None
        self.ferope = FeRoPE(config) if config.rotates else None
        self.qk_norm = config.qk_norm
        self.is_anchored = config.ferope_anchor_relative
        self.block_size = config.block_size
        self.spectral = nn.Linear(config.n_eigenvectors, config.n_embd, bias=False) if config.has_spectrum else None
        self.ste = SigmoidSTE() if config.ste_sigmoid and self.activation == "sigmoid" else None
        if self.activation == "sigmoid" and self.bias_mode == "learned":
            self.sigmoid_bias = nn.Parameter(torch.tensor(-math.log(config.block_size)))

    def forward(self, x, run=ALONE):
        y = self.mix(x, *self.project(x, run), run)
        return self.resid_dropout(self.o_proj(y) if self.is_split else self.c_proj(y))

    def project(self, x, run):
        """Queries (B, T, C), keys and values (B, T, n_kv_head hs) of the layer's input x (B, T, C)."""
        if self.is_split and self.conv is None:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            parts = (self.q_proj, self.k_proj, self.v_proj) if self.is_split else (self.c_attn,)
            qkv = torch.cat([linear(x) for linear in parts], -1)
            q, k, v = through(self.conv, qkv, run.state).split(self.widths, dim=-1)
        return q, k, v if self.value_embedding is None else self.value_embedding(v, x, run.idx)

    def mix(self, x, q, k, v, run):
        """Attention over the values v by queries q and keys k, as `project` makes them of the input x: (B, T, C)."""
        (B, T, C), past, state = x.shape, run.past, run.state
        q, k, v = (t.view(B, T, -1, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        q_pos = torch.arange(past, past + T, device=x.device)
        if self.qk_norm:  # 1.2 each: a score is at most 1.44 sqrt(hs)
            q, k = 1.2 * rms_norm(q), 1.2 * rms_norm(k)
        if self.ferope is not None:
            q, k = self.ferope(q, k, self.cells.offset[past : past + T] if self.is_anchored else q_pos)
        if self.spectral is not None:  # the same shift of both: tokens of one community attract, at any distance
            shift = self.spectral(run.spectrum.to(x.dtype)).view(B, T, self.n_head, -1).transpose(1, 2)
            q, k = q + shift, k + shift
        knots = self.knots(x, state) if self.knots is not None else None
        if state is not None:
            cached = self.append_to_cache(state, k, v)
        if past == 0:
            y = self.attend(q, *self.share(k, v), q_pos, knots)
        else:
            y = self.attend_cached(q, *self.share(*cached[:2]), cached[2], q_pos, knots)
        if state is not None and self.is_sparse and knots is None:
            self.evict(state.of(self), past + T)
        return y.transpose(1, 2).reshape(B, T, C)

    def share(self, k, v):
        """Keys and values (B, n_kv_head, n, hs) as each query head reads them, (B, nh, n, hs). arXiv 2305.13245."""
        group = self.n_head // self.n_kv_head
        return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))

    def row_bias(self, q_pos):
        """What a sigmoid layer adds to the scores of queries at positions q_pos (T,): (T,) float32; softmax: None."""
        if self.activation == "softmax":
            return None
        if self.bias_mode == "zero":
            return q_pos.new_zeros(len(q_pos)).float()
        if self.bias_mode == "learned":
            return self.sigmoid_bias.expand(len(q_pos))
        if self.bias_mode == "neg_log_i":
            return -(self.cells.keys[q_pos] if self.is_sparse else q_pos + 1).float().log()
        most = (
            self.cells.keys[: self.cells.trained].max()
            if self.is_sparse
            else torch.full((), self.block_size, device=q_pos.device)
        )
        if self.knots is not None:
            most = most + self.knots.k * self.cells.cell.bincount().max()
        return -most.float().log().expand(len(q_pos))

    def attend(self, q, k, v, q_pos, knots):
        """Queries, keys and values (B, nh, T, hs) of one text from its start on: (B, nh, T, hs)."""
        row_bias, dropout = self.row_bias(q_pos), self.dropout if self.training else 0.0
        if self.is_sparse and self.ste is None:
            route, bias = self.cells.route.first(q.size(2)), None
            if knots is not None:
                _, allowed, bias = knots
                route = Route(route.starts, allowed)
            attention = reference if has_tangent(q) else block_sparse_attention  # the kernel has no forward mode
            return attention(q, k, v, route, activation=self.activation, bias=bias, row_bias=row_bias)
        if self.activation == "sigmoid":
            return sigmoid_attention(q, k, v, row_bias, self.mask(q_pos, q_pos), dropout=dropout, ste=self.ste)
        if self.is_local and not has_tangent(q):
            return F.dropout(local_attention(q, k, v), dropout)  # its backward cannot drop attention weights
        return causal_attention(q, k, v, dropout)

    def mask(self, q_pos, k_pos):
        """Which keys, at positions k_pos (n,), the queries at positions q_pos (T,) attend to: (T, n) bool."""
        mask = k_pos[None, :] <= q_pos[:, None]
        if self.is_sparse and self.knots is None:
            cell = self.cells.cell
            mask = mask & self.cells.allowed[cell[q_pos][:, None], cell[k_pos][None, :]]
        return mask

    def attend_cached(self, q, k, v, k_pos, q_pos, knots):
        """New queries (B, nh, T, hs), at positions q_pos (T,), over the n cached keys, at positions k_pos (n,)."""
        if q.size(2) == 1 and not self.is_sparse and self.activation == "softmax":
            return F.scaled_dot_product_attention(q, k, v)
        mask, bias = self.mask(q_pos, k_pos), 0.0
        if knots is not None:
            k, v, mask, bias = self.gather_linked_keys(k, v, mask, q_pos, k_pos, *knots)
        if self.activation == "sigmoid":
            return sigmoid_attention(q, k, v, self.row_bias(q_pos), mask, bias)
        if knots is not None:
            mask = torch.where(mask, bias, -math.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def gather_linked_keys(self, k, v, mask, q_pos, k_pos, first, allowed, bias):
        """(k, v, mask, bias) of what knots allow. A single query reads only its cells' keys, whatever n is."""
        cell = self.cells.cell
        if len(q_pos) > 1:
            rows, columns = cell[q_pos][:, None] - first, cell[k_pos][None, :]
            return k, v, mask & allowed[:, :, rows, columns], bias[:, :, rows, columns]
        starts = torch.tensor(self.cells.starts, device=k.device)
        most = int(allowed.sum(-1).max())
        chosen, index = allowed[:, :, 0].to(torch.uint8).topk(most)  # (B, nh, cells that the fullest head has)
        within = torch.arange(int(starts.diff().max()), device=k.device)
        position = starts[index][..., None] + within  # (B, nh, cells, tokens)
        real = (position < starts[index + 1][..., None]) & (position <= q_pos) & chosen.bool()[..., None]
        bias = bias[:, :, 0].gather(2, index)[..., None].expand(position.shape)
        position = position.flatten(2).clamp(max=k.size(2) - 1)[..., None].expand(-1, -1, -1, k.size(3))
        return k.gather(2, position), v.gather(2, position), real.flatten(2)[:, :, None], bias.flatten(2)[:, :, None]

    def append_to_cache(self, state, k, v):
        """Add new keys and values to the layer's cache: all so far, (B, nh, n, hs) each, and their positions (n,)."""
        store, new = state.of(self), torch.arange(state.pos, state.pos + k.size(2), device=k.device)
        k, v = append_to_cache(store, k, v)
        if not self.is_sparse:
            return k, v, torch.arange(k.size(2), device=k.device)
        store["k_pos"] = torch.cat((store["k_pos"], new)) if "k_pos" in store else new
        return k, v, store["k_pos"]

    def evict(self, store, next_position):
        """Drop the keys that no position from next_position on can reach, when a new cell begins there."""
        starts = self.cells.starts
        c = bisect_right(starts, next_position) - 1  # the cell that position is in
        if next_position >= starts[-1] or store.get("cell") == c:
            return
        store["cell"] = c
        keep = self.cells.allowed[c:].any(0)[self.cells.cell[store["k_pos"]]]
        store["kv"] = store["kv"][:, :, :, : store["n"]][:, :, :, keep]
        store["k_pos"], store["n"] = store["k_pos"][keep], int(keep.sum())

    def crop(self, block_size):
        self.block_size = block_size

    def flops_per_token(self, T):
        """Forward FLOPs besides the linear layers: scores and mixing over the average number of keys per query."""
        keys = (T + 1) / 2 if not self.is_sparse else self.cells.keys[:T].float().mean().item()
        if self.knots is not None:  # at most
            keys = min((T + 1) / 2, keys + self.knots.k * T / len(self.cells.route.first(T).starts))
        return 4 * (self.o_proj if self.is_split else self.c_proj).in_features * keys


class SigmoidAttention(CausalSelfAttention):
    activation, has_sigmoid, takes_local_backward = "sigmoid", True, False


# ---------------------------------------------------------------------------------------------------------------------
# Token mixer: FitzHugh-Nagumo waves. Channels are excitable lines, tokens their sites, all at rest before a layer acts.
#   g_t = sigmoid(s q_t k_{t-1} + k_t + bias) lets the past through, I_t = I_max tanh(amplitude v_t / I_max) stimulates,
#   fhn_steps IMEX steps later y_t = (v_t - rest) silu(q_t); x (B, T, C) -> (B, T, C), everything elementwise
# O(T C) in training; in decoding a state of (fhn_steps + 1) C numbers, whatever the position. I_max keeps the explicit
# cubic stable: |v| <= 2 sqrt((1 + dt) / dt) is invariant as long as |I| + |w| stays below `fhn_bound`.
# The linear limit, y = silu(q) times one gated scan of amplitude v, is a gated linear recurrence (cf. Qin et al. 2023).


class BalancedChannelGroups(nn.Module):
    """Channels in groups of balanced stimulus. Counts in forward; groups and gains move every 100 optimiser steps.

    With communities each counts as much as any other, however many of the tokens t belong to it: a channel's level is
    1/K sum_k (sum_t p_tk |I_t| / sum_t p_tk), p_t the softmax of a token's K spectral coordinates.
    """

    def __init__(self, features, groups, communities=0):
        super().__init__()
        self.groups = groups
        self.register_buffer("level", torch.ones(features))  # running mean of |stimulus|
        self.register_buffer("group", torch.arange(features) % groups)
        self.register_buffer("gain", torch.ones(features))  # common level / the group's
        sizes = (communities, features + 1) if communities else (features + 1,)
        self.register_buffer("counted", torch.zeros(sizes))  # sums of |stimulus|, and how many
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, stimulus, spectrum=None):
        """stimulus (B, T, C), each group at the common level; spectrum (B, T, K) where there are communities."""
        if self.training:
            with torch.no_grad():
                size = F.pad(stimulus.detach().float().abs().flatten(0, 1), (0, 1), value=1.0)  # a 1 counts the token
                share = None if spectrum is None else spectrum.detach().float().flatten(0, 1).softmax(-1)
                self.counted += size.sum(0) if share is None else share.mT @ size
        return stimulus * self.gain

    @torch.no_grad()
    def before_step(self):
        """Take in what all processes counted since the last optimiser step."""
        all_reduce(self.counted)
        counts = self.counted.view(-1, self.counted.size(-1))
        level = (counts[:, :-1] / counts[:, -1:].clamp(min=1e-6)).mean(0)
        self.level.copy_(level if self.step == 0 else torch.lerp(self.level, level, 0.01))
        self.counted.zero_()
        if self.step % 100 == 0:
            self.group.copy_(torch.tensor(karmarkar_karp(self.level.double().tolist(), self.groups)))
            members = F.one_hot(self.group, self.groups).to(self.level.dtype)  # (C, groups)
            mean = (self.level @ members) / members.sum(0).clamp(min=1)
            self.gain.copy_((self.level.mean() / mean.clamp(min=1e-6))[self.group].clamp(0.1, 10.0))
        self.step += 1


SpectralPartitioner = BalancedChannelGroups  # as the system that it comes from calls it


class FHNMedium(nn.Module):
    """C excitable lines: a stimulus and what sets its conductance in, the deviation from rest out, all (B, T, C).

    With spectral coordinates s_t (B, T, K), u_t = U s_t joins the gate: g_t = sigmoid(... + u_t u_{t-1}), so that
    neighbouring tokens of one community let more of a wave through. They balance the partitioner too.
    """

    def __init__(self, config, takes_spectrum=False):
        super().__init__()
        C, K = config.n_embd, config.n_eigenvectors if takes_spectrum and config.has_spectrum else 0
        self.spectral = nn.Linear(K, C, bias=False) if K else None
        self.dt, self.steps, self.is_imex = config.fhn_dt, config.fhn_steps, config.use_fhn_imex
        self.is_signed, self.is_scan = config.fhn_dynamics == "signed", config.fhn_dynamics != "fhn"
        self.gate_scale = nn.Parameter(torch.ones(C))
        self.gate_bias = nn.Parameter(torch.zeros(C))
        self.amplitude = nn.Parameter(torch.full((C,), FHN["amplitude"]))
        reach = torch.logspace(0, 1, C, base=config.block_size) * 2  # tokens: 1 + Lambda is what A averages over
        self.log_lambda = nn.Parameter(reach.log())  # log(dt D): Lambda where the gate is 1
        if not self.is_scan:
            self.a = nn.Parameter(torch.full((C,), FHN["a"]))
            self.log_b = nn.Parameter(torch.full((C,), math.log(FHN["b"])))
            self.log_eps = nn.Parameter(torch.full((C,), math.log(FHN["eps"])))
        self.partitioner = BalancedChannelGroups(C, config.fhn_partitions, K) if config.use_fhn_partitioning else None

    def forward(self, stimulus, q, k, state=None, spectrum=None):
        store = store_of(state, self)
        logits = torch.addcmul(k + self.gate_bias, q * self.gate_scale, self.shifted(k, store, "k"))
        if self.spectral is not None:
            u = self.spectral(spectrum.to(k.dtype))
            logits = torch.addcmul(logits, u, self.shifted(u, store, "u"))
        stimulus = self.amplitude * stimulus
        if self.partitioner is not None:
            stimulus = self.partitioner(stimulus, None if self.spectral is None else spectrum)
        y, store["field"] = self.propagate(stimulus, logits, store.get("field"))
        return y

    @staticmethod
    def shifted(x, store, name):
        """x (B, T, C) one token later; `store` keeps the last one under `name`, zeros stand before the first."""
        before = store.get(name, x.new_zeros(x.size(0), 1, x.size(2)))
        store[name] = x[:, -1:].clone()
        return torch.cat((before, x[:, :-1]), 1)

    def decay(self, logits):
        """A (B, T, C) of the one scan: in (0, 1), or (-1, 1) where it is signed; at logits of 0 they are the same."""
        if self.is_signed:
            return torch.tanh(logits + torch.log1p(self.log_lambda.exp()) / 2)
        strength = torch.sigmoid(logits) * self.log_lambda.exp()
        return strength / (1 + strength)

    def propagate(self, stimulus, logits, field):
        """(deviation (B, T, C), field: the state of the last token that the next one needs)."""
        if self.is_scan:
            A = self.decay(logits)
            y = gated_scan(A, (1 - A) * stimulus, field)
            return y, y[:, -1]
        gate, b, (v_max, force) = torch.sigmoid(logits), self.log_b.exp(), fhn_bound(self.dt)
        limit = (0.98 * force + REST_W) / (self.steps * self.dt * (v_max + self.a.abs()))
        eps = torch.minimum(self.log_eps.exp(), limit)
        w_max = -REST_W + self.steps * self.dt * eps * (v_max + self.a.abs()) / (1 + self.dt * eps * b)
        I_max = force - w_max  # (C,)
        stimulus = I_max * torch.tanh(stimulus / I_max)
        D = self.log_lambda.exp() / self.dt
        if self.is_imex:
            return fhn_propagate(stimulus, gate, D, self.a, b, eps, self.dt, self.steps, field)
        dynamics = FHNDynamics(self.a, b, eps)
        v, w = torch.full_like(stimulus, REST_V), torch.full_like(stimulus, REST_W)
        last = []  # the last token's v after each step: the left neighbour of the next token
        for step in range(self.steps):
            before = None if field is None or step == 0 else field[:, step - 1]
            v, w = dynamics.step(v, w, stimulus, self.dt, gate * D, before, imex=False)
            last.append(v[:, -1])
        return v - REST_V, torch.stack(last, 1)

    def flops_per_token(self, T):
        """Forward FLOPs: a dozen for gate and stimulus, and in each step 3 for the scan and 11 for the reaction."""
        return self.gate_bias.numel() * (12 + (3 if self.is_scan else 14 * self.steps))


class FHNAttention(nn.Module):
    has_waves = takes_learning_rules = has_columns = has_values = True

    def __init__(self, config, layer=0):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.parts = {"c_attn": (config.n_embd,) * 3}
        self.conv = short_conv(config, "b", 3 * config.n_embd)
        self.value_embedding = value_embedding(config, layer, config.n_head, config.n_embd)
        self.medium = FHNMedium(config, takes_spectrum=True)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, run=ALONE):
        q, k, v = through(self.conv, self.c_attn(x), run.state).chunk(3, dim=-1)  # (B, T, C)
        if self.value_embedding is not None:
            v = self.value_embedding(v, x, run.idx)
        return self.resid_dropout(self.c_proj(self.medium(v, q, k, run.state, run.spectrum) * F.silu(q)))


# ---------------------------------------------------------------------------------------------------------------------
# Token mixer: Kaufmann attention, Propagate(Topology(q, k) . Landscape(v)). Knot-gated attention over landscape values
# stimulates an excitable medium, which carries it along the tokens:
#   I = attention over the knotted cells of WaveKAN(norm(v)), y = (fhn(I; q, k) - rest) silu(q); (B, T, C) -> (B, T, C)
# Resonance: I_t <- I_t (1 + tanh(g) W r_t), r_t the row of position t in the table above, g a number that starts at 0.
# Cost: that of knots, waves and one C x C WaveKAN layer, and 124 C for a position's W r_t. The decomposition is known
# from public code under this name; the equations are ours.


class Resonance(RamanujanPositions):
    """stimulus (B, T, C) times 1 + tanh(g) W r_t, t = past, past + 1, ...; W r_t has unit variance at first."""

    def __init__(self, config):
        super().__init__(config)
        self.g = nn.Parameter(torch.zeros(()))  # no effect at first; W is not 0, or g would have no gradient

    def init_own(self):
        nn.init.normal_(self.proj.weight)

    def forward(self, stimulus, past=0):
        return stimulus * (1 + torch.tanh(self.g) * super().forward(stimulus.size(1), past))


class KaufmannAttention(CausalSelfAttention):
    has_knots = has_waves = has_wavelets = has_resonance = True
    takes_knots = has_forward_mode = takes_learning_rules = takes_local_backward = False

    def __init__(self, config, layer=0):
        super().__init__(config, layer)
        self.landscape = wavelet_map(config.n_embd, config.n_embd, config)
        self.resonance = Resonance(config) if config.kaufmann_resonance else None
        self.medium = FHNMedium(config)

    def forward(self, x, run=ALONE):
        q, k, v = self.project(x, run)  # (B, T, C)
        landscape = self.landscape(F.layer_norm(v, v.shape[-1:])).to(v.dtype)  # float32 under autocast
        stimulus = self.mix(x, q, k, landscape, run)
        if self.resonance is not None:
            stimulus = self.resonance(stimulus, run.past)
        return self.resid_dropout(self.c_proj(self.medium(stimulus, q, k, run.state) * F.silu(q)))


# ---------------------------------------------------------------------------------------------------------------------
# Token mixers: linear attention whose memory, a matrix S (dk, dv) per head, forgets; the field's recurrent controls.
#   gla: S_t = diag(a_t) S_{t-1} + k_t v_t^T, a_t = sigmoid(W2 W1 x)^(1/16) per key channel, W1 of rank 16
#   gdn: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, a_t = exp(-A softplus(w x + bias)), b_t = sigmoid(w' x),
#        q and k of length 1 after silu, v after silu; A and bias are learned numbers per head
#        gdn_negative: b_t = 2 sigmoid(w' x), so that I - b_t k_t k_t^T has an eigenvalue in (-1, 1), not (0, 1)
#   y = W rms(S_t^T q_t) silu(g_t), q, k of half the width, v and g of the whole: as many parameters as attention
# O(T C hs) in training, by chunks (kernels/linear_attention.py); a state of C hs / 2 numbers in decoding, whatever the
# position. The short convolutions of the published gdn are short_conv at b. arXiv 2312.06635, 2412.06464, 2411.12537.


class GatedLinearAttention(nn.Module):
    takes_learning_rules = has_forward_mode = has_values = True
    RANK = 16

    def __init__(self, config, layer=0):
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        self.hs, self.half = C // config.n_head, max(1, C // config.n_head // 2)
        self.widths = (self.half * config.n_head, self.half * config.n_head, C, C)  # q, k, v, output gate
        self.parts = {"c_attn": self.widths}
        self.c_attn = nn.Linear(C, sum(self.widths), bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.conv = short_conv(config, "b", sum(self.widths[:3]))
        self.value_embedding = value_embedding(config, layer, config.n_head, C)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.add_gates(config)

    def add_gates(self, config):
        self.decay = nn.Sequential(
            nn.Linear(config.n_embd, self.RANK, bias=False), nn.Linear(self.RANK, self.widths[1], bias=True)
        )

    def forward(self, x, run=ALONE):
        qkv, gate = self.c_attn(x).split((sum(self.widths[:3]), self.widths[3]), dim=-1)
        q, k, v = through(self.conv, qkv, run.state).split(self.widths[:3], dim=-1)
        if self.value_embedding is not None:
            v = self.value_embedding(v, x, run.idx)
        y = self.recall(*(self.heads(t) for t in (q, k, v)), x, run.state)
        y = y.transpose(1, 2).flatten(2).to(gate.dtype)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y * F.silu(gate)))

    def heads(self, t):
        """(B, T, width) as (B, nh, T, width / nh)."""
        return t.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def recall(self, q, k, v, x, state):
        """What the memory holds for each query: (B, nh, T, hs), normed; in float32 or better, under autocast too."""
        store = store_of(state, self)
        gates = self.gates(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, *gates = (t.to(sum_dtype(t)) for t in (q, k, v, *gates))
            S = store.get("S", v.new_zeros(*v.shape[:2], self.half, self.hs))
            y, S = self.remember(q, k, v, *gates, S)
            if state is not None:
                store["S"] = S
            return rms_norm(y)

    def gates(self, x):
        """log a (B, nh, T, dk)."""
        return (self.heads(F.logsigmoid(self.decay(x)) / 16).clamp(min=LEAST),)

    def remember(self, q, k, v, log_a, S):
        return gla(q * self.half**-0.5, k, v, log_a, S)

    def flops_per_token(self, T):
        """Forward FLOPs besides the linear layers: within chunks of 16 tokens, and the state's."""
        return 2 * self.n_head * (16 * (self.half + self.hs) + 3 * self.half * self.hs)


class GatedDeltaRule(GatedLinearAttention):
    has_delta_rule = True

    def add_gates(self, config):
        self.most = 2.0 if config.gdn_negative else 1.0
        self.decay = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.write = nn.Linear(config.n_embd, config.n_head, bias=False)
        self.log_A = nn.Parameter(torch.linspace(1, 16, config.n_head).log())
        dt = torch.logspace(-3, -1, config.n_head)  # steps of time, by head, that softplus(bias) gives at first
        self.dt_bias = nn.Parameter(dt.expm1().log())

    def gates(self, x):
        """log a and b, (B, nh, T) each."""
        log_a = self.log_A.exp() * F.logsigmoid(-self.decay(x) - self.dt_bias)  # = -A softplus(...)
        return log_a.mT, self.most * torch.sigmoid(self.write(x)).mT

    def remember(self, q, k, v, log_a, b, S):
        q, k = (F.normalize(F.silu(t), dim=-1) for t in (q, k))
        return gdn(q, k, F.silu(v), log_a, b, S)


# A mixer declares what it can do in class attributes, which GPTConfig reads; what it does not declare it cannot do:
#   has_scores (queries and keys: RoPE, cells, spectra), takes_knots (use_knot_attention), has_knots (always),
#   has_sigmoid, takes_local_backward (fuse_attn_local), has_waves, has_wavelets, has_resonance, has_delta_rule
#   (gdn_negative), has_columns (c_attn and c_proj, for HTM), has_values (short_conv at b, value_embeds),
#   takes_learning_rules (all products are linear layers'), has_forward_mode (GrAPE under dfa)
MIXERS = {
    "softmax": CausalSelfAttention,
    "sigmoid": SigmoidAttention,
    "fhn": FHNAttention,
    "kaufmann": KaufmannAttention,
    "gla": GatedLinearAttention,
    "gdn": GatedDeltaRule,
}


# ---------------------------------------------------------------------------------------------------------------------
# Region feedback: x_t += tanh(gate) proj(sum over c' < c of weights[c, c'] sum_c'), c the cell of t, sum_c' the sum of
# x over cell c'; the gate starts at 0. Only complete cells count, so a token gets no feedback from its own cell.
# O(T C) for the sums and O((T / cell) C^2) for the projection of one vector per cell; decoding keeps one sum per cell.


class RegionFeedback(nn.Module):
    def __init__(self, config, cells):
        super().__init__()
        self.cells = cells
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x, state=None):
        (B, T, C), past = x.shape, tokens_before(state)
        cell = self.cells.cell[past : past + T]
        sums = x.new_zeros(B, len(self.cells.starts) - 1, C)
        if state is not None:
            sums = state.of(self).setdefault("sums", sums)
        sums = sums.index_add(1, cell, x)
        if state is not None:
            state.of(self)["sums"] = sums
        means = self.cells.region_weights.to(x.dtype) @ sums  # (B, cells, C)
        return torch.tanh(self.gate) * self.proj(means)[:, cell]  # (B, T, C)


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixer: the two-layer perceptron, y = W2 act(W1 x), hidden width 4C; (B, T, C) -> (B, T, C).


class MLP(nn.Module):
    takes_learning_rules = has_forward_mode = True

    def __init__(self, config):
        super().__init__()
        self.act = GELUSTE() if config.ste_gelu else ACTIVATIONS[config.mlp_act]
        self.winners = HardTopK(config.mlp_topk) if config.mlp_topk else None
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.conv = short_conv(config, "d", 4 * config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, run=ALONE):
        h = self.act(through(self.conv, self.c_fc(x), run.state))  # (B, T, 4C)
        if self.winners is not None:
            h = self.winners(h)
        return self.dropout(self.c_proj(h))


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixer: SwiGLU, y = W2 (silu(W1 x) * W3 x), W1 and W3 as the halves of c_fc; (B, T, C) -> (B, T, C).
# Hidden width 8C/3, to the nearest multiple of 8: the MLP's parameters and products. Shazeer 2020, arXiv 2002.05202.


def matched_hidden(config, unit, fixed=0):
    """The hidden width, a multiple of 8, for which `fixed` + width * `unit` parameters are as many as the MLP's."""
    C = config.n_embd
    return max(8, 8 * round((8 * C * C + 5 * C * config.bias - fixed) / (8 * unit)))


class SwiGLU(nn.Module):
    takes_learning_rules = has_forward_mode = True

    def __init__(self, config):
        super().__init__()
        C, bias = config.n_embd, config.bias
        hidden = matched_hidden(config, 3 * C + 2 * bias, C * bias)
        self.c_fc = nn.Linear(C, 2 * hidden, bias=bias)
        self.parts = {"c_fc": (hidden, hidden)}
        self.c_proj = nn.Linear(hidden, C, bias=bias)
        self.conv = short_conv(config, "d", 2 * hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, run=ALONE):
        gate, h = through(self.conv, self.c_fc(x), run.state).chunk(2, dim=-1)  # (B, T, hidden) each
        return self.dropout(self.c_proj(F.silu(gate) * h))


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixer: WaveKAN, learned wavelets psi(u), u = (x - t) / s, in place of the activation; (B, T, C) -> (B, T, C).
#   shared: y = W2 f(norm(W1 x)), f_i(h) = silu(h_i) + sum_k m_ki psi((h_i - t_ki) / s_ki), K = kan_bank wavelets per
#     hidden unit: the MLP's matrix products, and K exponentials instead of an error function
#   edge: y_o = sum_i w_oi psi((x_i - t_oi) / s_oi) twice, C -> hidden -> C: the paper's layer, an exponential per edge
# s = WIDTH_MIN + softplus(.) never reaches 0. The norm is over each token's hidden units: a batch norm, as published,
# would mix tokens of the batch. Hot loops: kernels/wavekan.py. Bozorgasl & Chen 2024, arXiv 2405.12832.

WIDTH_MIN = 0.01  # least width of a wavelet, where channels have unit variance


def inverse_softplus(y):
    return math.log(math.expm1(y))


class WaveletMap(nn.Linear):
    """(..., in) -> (..., out): kan_bank wavelets per channel, then a matrix. m, t, s are flat: vectors do not decay."""

    def __init__(self, in_features, out_features, config):
        super().__init__(in_features, out_features, bias=config.bias)
        K, self.kind = config.kan_bank, config.kan_wavelet
        grid = torch.linspace(-1.5, 1.5, K + 2)[1:-1, None]  # where a channel of unit variance is
        self.m = nn.Parameter(0.5 * torch.randn(K * in_features))
        self.t = nn.Parameter((grid + 0.5 * torch.randn(K, in_features)).flatten())
        self.s = nn.Parameter(torch.full((K * in_features,), inverse_softplus(1 - WIDTH_MIN)))

    def forward(self, x):
        m, t, s = (p.view(-1, self.in_features) for p in (self.m, self.t, self.s))  # (K, in)
        a = 1 / (WIDTH_MIN + F.softplus(s))
        return super().forward(wavelet_bank(x, m, a, -t * a, self.kind))

    def flops_per_token(self, T):
        return 8 * self.m.numel()


class WaveletEdges(nn.Module):
    """(..., in) -> (..., out): a wavelet on every edge. t and s are flat: vectors do not decay."""

    def __init__(self, in_features, out_features, config):
        super().__init__()
        self.kind = config.kan_wavelet
        self.weight = nn.Parameter(0.02 * torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if config.bias else None
        self.t = nn.Parameter(torch.randn(out_features * in_features))
        self.s = nn.Parameter(torch.full((out_features * in_features,), inverse_softplus(1 - WIDTH_MIN)))

    def forward(self, x):
        a = 1 / (WIDTH_MIN + F.softplus(self.s.view_as(self.weight)))
        y = wavelet_edges(x, self.weight, a, -self.t.view_as(a) * a, self.kind)
        return y if self.bias is None else y + self.bias

    def flops_per_token(self, T):
        return 8 * self.weight.numel()


def wavelet_map(in_features, out_features, config):
    """One layer of the form that kan_edges names."""
    return (WaveletMap if config.kan_edges == "shared" else WaveletEdges)(in_features, out_features, config)


class WaveKAN(nn.Module):
    has_wavelets = True

    def __init__(self, config):
        super().__init__()
        C, K, bias, hidden = config.n_embd, config.kan_bank, config.bias, 4 * config.n_embd
        shared = config.kan_edges == "shared"
        if config.kan_match_params:
            hidden = matched_hidden(config, (2 * C + 3 * K if shared else 6 * C) + bias, C * bias)
        self.c_fc = nn.Linear(C, hidden, bias=bias) if shared else wavelet_map(C, hidden, config)
        self.c_proj = wavelet_map(hidden, C, config)
        self.conv = short_conv(config, "d", hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, run=ALONE):
        h = through(self.conv, self.c_fc(x), run.state)  # (B, T, hidden)
        return self.dropout(self.c_proj(F.layer_norm(h, h.shape[-1:])))


# ---------------------------------------------------------------------------------------------------------------------
# Channel mixer: BioMLP, (B, T, C) -> dendrites -> h = 4C -> sparse events -> (B, T, C).
#   osc(x) = sin(omega x + phi) tanh(x) + baseline, three parameters per feature: one such unit can compute XOR.
#   Dendrites: x in K slices u_k, C_k = tanh(A_k u_k), osc(S [C; L C]); L (K, K) couples them. Without: osc(W x).
#     bio_attention_gain: C_k (1 + tanh(w_k a)), a the token mixer's output at the token.
#   Events: gate = sigmoid(G x), mask = gate > threshold (its gradient is the gate's), osc(T (mask x)).
#     bio_plasticity: osc(z + alpha p_{t-1} e), e = mask x, z = T e, p_t = lambda p_{t-1} + (1 - lambda) e tanh(z).
#     bio_spiking: the spikes of units whose current is T x (kernels/spiking.py) take the place of all that.
# Parameters, C = width, m = bio_dendrite_dim or h: oscillators alone 8 C^2 as an MLP; S adds 2 K m h, events 2 h^2. The
# oscillator costs 4 to 8 times GELU on a CPU. After dendritic neurons that solve XOR (Gidon et al. 2020, Science 367).


class OscillatingActivation(nn.Module):
    """sin(omega x + phi) tanh(x) + baseline on (..., features); the three are buffers unless bio_osc_learnable."""

    def __init__(self, features, config):
        super().__init__()
        noise = 0.1 * torch.randn(2, features)
        start = {"omega": config.bio_omega + noise[0], "phi": noise[1], "baseline": torch.zeros(features)}
        for name, value in start.items():
            if config.bio_osc_learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        return oscillate(x, self.omega, self.phi, self.baseline)


def lateral_mask(K, connectivity):
    """(K, K) of ones where compartment k reads compartment j, None for all."""
    apart = (torch.arange(K)[:, None] - torch.arange(K)) % K
    reach = {"ring": 1, "none": 0}
    return (torch.minimum(apart, -apart % K) <= reach[connectivity]).float() if connectivity in reach else None


def strongest_half(L):
    """L (K, K) with the K // 2 largest |L_kj| of each row k and zeros; straight-through: the others get gradients."""
    kept = L.detach().abs().topk(max(1, L.size(1) // 2), dim=1).indices
    return straight_through(L, L * torch.zeros_like(L).scatter(1, kept, 1.0))


class DendriticCompartmentLayer(nn.Module):
    """(B, T, C) -> (B, T, 4C): K compartments, each of a slice of the input, and the soma that reads them."""

    def __init__(self, config):
        super().__init__()
        h, K = 4 * config.n_embd, config.bio_compartments
        m = config.bio_dendrite_dim or h
        self.lateral, self.width = config.bio_lateral, -(-config.n_embd // K)  # channels per slice
        self.pad = K * self.width - config.n_embd
        self.A = nn.ModuleList(nn.Linear(self.width, m, bias=config.bias) for _ in range(K))
        self.L = None if self.lateral == "none" else nn.Parameter(0.5 * torch.eye(K) + 0.1 * torch.randn(K, K))
        self.is_sparse = config.bio_connectivity == "sparse"
        self.register_buffer("connected", lateral_mask(K, config.bio_connectivity), persistent=False)
        self.S = nn.Linear(K * m if self.L is None else 2 * K * m, h, bias=config.bias)
        self.osc = OscillatingActivation(h, config)
        self.gain = nn.Linear(config.n_embd, K, bias=False) if config.bio_attention_gain else None
        self.init_own()

    @torch.no_grad()
    def init_own(self):
        if self.gain is not None:
            nn.init.zeros_(self.gain.weight)  # as without it; its gradient is a, not 0

    def coupling(self):
        """L with the connections that are there, (K, K)."""
        if self.is_sparse:
            return strongest_half(self.L)
        return self.L if self.connected is None else self.L * self.connected

    def forward(self, x, attended=None):
        slices = F.pad(x, (0, self.pad)).split(self.width, dim=-1)
        c = torch.cat([A(u) for A, u in zip(self.A, slices)], dim=-1).tanh()  # (B, T, K m)
        if self.gain is not None:
            c = (c.unflatten(-1, (len(self.A), -1)) * (1 + self.gain(attended).tanh()[..., None])).flatten(-2)
        if self.lateral == "nonlinear":
            mixed = (self.coupling() @ c.unflatten(-1, (len(self.A), -1))).tanh()
            c = torch.cat((c, mixed.flatten(-2)), dim=-1)
        return self.osc(F.linear(c, self.soma(), self.S.bias))

    def soma(self):
        """The matrix that reads the compartments. S [C; L C] = (S_1 + S_2 L) C: half the work, and no more power."""
        if self.lateral != "concat":
            return self.S.weight
        S_1, S_2 = self.S.weight.unflatten(1, (2, len(self.A), -1)).unbind(1)  # (h, K, m)
        return (S_1 + self.coupling().mT @ S_2).flatten(1)

    def flops_per_token(self, T):
        """Besides the linear layers: L C, or less, because "concat" never multiplies with half of S."""
        k_m = len(self.A) * self.A[0].out_features
        return {"none": 0, "nonlinear": 2 * len(self.A) * k_m, "concat": -2 * k_m * self.S.out_features}[self.lateral]


class HardGate(torch.autograd.Function):
    """1 where gate > threshold and 0 elsewhere; straight-through: the gradient goes to the gate as it comes."""

    @staticmethod
    def forward(ctx, gate, threshold):
        return (gate > threshold).to(gate.dtype)

    @staticmethod
    def backward(ctx, g):
        return g, None


class Diagonal(nn.Module):
    """A linear map whose matrix is diagonal: weight * x + bias, on (..., features)."""

    def __init__(self, features, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x):
        return self.weight * x if self.bias is None else torch.addcmul(self.bias, self.weight, x)


class HebbianTrace(nn.Module):
    """What a fast weight per unit adds to the drive z (B, T, h) of events e (B, T, h), gain 0 at first.

    p_t = lambda p_{t-1} + (1 - lambda) e_t tanh(z_t) and gain p_{t-1} e_t: z leaves the fast weight out, so that p is
    one gated scan. lambda decays over 2 to 64 tokens at first. State in decoding: p, one number per unit.
    """

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(features))
        self.decay = nn.Parameter(torch.exp(-(0.5 ** torch.linspace(1, 6, features))).logit())

    def forward(self, e, z, state=None):
        (e, wide), store = in_float32(e), store_of(state, self)
        with wide:
            decay = torch.sigmoid(self.decay.to(e.dtype)).expand_as(e)
            first = store.get("p", torch.zeros_like(e[:, 0]))
            p = gated_scan(decay, (1 - decay) * e * z.to(e.dtype).tanh(), first)
            store["p"] = p[:, -1]
            return (self.gain * e * torch.cat((first[:, None], p[:, :-1]), 1)).to(z.dtype)

    def flops_per_token(self, T):
        return 8 * self.gain.numel()


class EventLayer(nn.Module):
    """What both kinds of events share: a matrix, thresholds, counts, and a fast weight.

    measured["sparsity"] is the share of silent units in the last forward. With bio_adaptive_threshold, each feature's
    threshold is a running statistic, not a weight: a step moves it by STEER (bio_target_sparsity - the feature's silent
    share of that step).
    """

    STEER = 0.02

    def __init__(self, features, config):
        super().__init__()
        self.T = nn.Parameter(torch.empty(features, features))  # see `weight`
        self.bias = nn.Parameter(torch.zeros(features)) if config.bias else None
        self.target = config.bio_target_sparsity
        if config.bio_adaptive_threshold:
            self.register_buffer("threshold", torch.full((features,), float(config.bio_threshold)))
            self.register_buffer("counted", torch.zeros(features + 1), persistent=False)  # active, all
        else:
            self.threshold, self.counted = config.bio_threshold, None
        self.measured = {"sparsity": torch.zeros(())}
        self.plastic = HebbianTrace(features) if config.bio_plasticity else None

    @property
    def weight(self):
        """(in, out), so that a silent unit is a row that need not be read; checkpoints call it T."""
        return self.T

    def drive(self, e, z, state):
        """z = T e, and what the fast weights add."""
        return z if self.plastic is None else z + self.plastic(e, z, state)

    def tally(self, mask):
        """Count the active units of mask (B, T, h); the share of silent ones, 0-d."""
        active = mask.detach().flatten(0, -2).sum(0, dtype=torch.float32)  # tokens of each feature
        sparsity = 1 - active.sum() / mask.numel()
        self.measured = {"sparsity": sparsity}
        if self.training and self.counted is not None:
            self.counted += torch.cat((active, active.new_full((1,), mask.numel() / len(active))))
        return sparsity

    @torch.no_grad()
    def before_step(self):
        """Steer the thresholds by what all processes counted since the last optimiser step."""
        if self.counted is None:
            return
        all_reduce(self.counted)
        if self.counted[-1] > 0:
            silent = 1 - self.counted[:-1] / self.counted[-1]
            self.threshold.add_(silent, alpha=-self.STEER).add_(self.STEER * self.target).clamp_(0, 1)
        self.counted.zero_()

    def flops_per_token(self, T):
        return 2 * self.weight.numel()


class SparseEventLayer(EventLayer):
    """(B, T, h) -> (B, T, h): units whose gate is low are silent."""

    T_GAIN, G_GAIN = 3.0, 6.0

    def __init__(self, features, config):
        super().__init__(features, config)
        rank = max(1, features // 16)  # bio_gate="lowrank"
        self.G = {
            "full": lambda: nn.Linear(features, features, bias=config.bias),
            "diag": lambda: Diagonal(features, bias=config.bias),
            "lowrank": lambda: nn.Sequential(
                nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=config.bias)
            ),
        }[config.bio_gate]()
        self.osc = OscillatingActivation(features, config)
        self.init_own()

    @torch.no_grad()
    def init_own(self):
        """Wider than GPT's init: what comes in is an oscillator's small output (about x^2), and gates must differ."""
        maps = [m for m in self.G.modules() if isinstance(m, nn.Linear | Diagonal)]
        for weight in (self.weight, *(m.weight for m in maps)):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        self.weight.mul_(self.T_GAIN)
        maps[-1].weight *= self.G_GAIN

    def forward(self, x, state=None):
        mask = HardGate.apply(torch.sigmoid(self.G(x)), self.threshold)
        sparsity, e = self.tally(mask), mask * x
        is_one_token = x.numel() == x.size(-1) and x.device.type == "cpu"
        if is_one_token and not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and sparsity >= 0.5:
            return self.osc(self.drive(e, self.read_active(x, mask), state))
        return self.osc(self.drive(e, F.linear(e, self.weight.t(), self.bias), state))

    def read_active(self, x, mask):
        """T (mask x) of one token, reading the rows of its active units only."""
        on = mask.flatten().nonzero().flatten()
        weights = x.flatten()[on].to(self.weight.dtype)
        y = F.embedding_bag(on, self.weight, on.new_zeros(1), mode="sum", per_sample_weights=weights)
        return (y if self.bias is None else y + self.bias).to(x.dtype).view_as(x)


class SpikingEventLayer(EventLayer):
    """(B, T, h) -> spikes (B, T, h) of leaky integrate-and-fire units whose current is T x; beta from `leak`."""

    T_GAIN = 12.0  # currents about as large as thresholds: what comes in is an oscillator's small output

    def __init__(self, features, config):
        super().__init__(features, config)
        tau = 2 ** torch.linspace(0, 4, features)  # 1 to 16 tokens
        self.leak = nn.Parameter(torch.exp(-1 / tau).logit())
        self.init_own()

    @torch.no_grad()
    def init_own(self):
        nn.init.normal_(self.weight, std=self.T_GAIN * len(self.weight) ** -0.5)

    def forward(self, x, state=None):
        (e, wide), dtype = in_float32(x), x.dtype  # rounding moves a spike, and a spike is 1
        with wide:
            weight, leak, bias = (None if p is None else p.to(e.dtype) for p in (self.weight, self.leak, self.bias))
            current = self.drive(e, F.linear(e, weight.t(), bias), state)
            v = potentials(current, torch.sigmoid(leak), self.threshold, store_of(state, self))
            spikes = Spike.apply(v, self.threshold).to(dtype)
        self.tally(spikes)
        return spikes

    def flops_per_token(self, T):
        return super().flops_per_token(T) + 8 * SCANS * len(self.weight)


class BioMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        h = 4 * config.n_embd
        self.reads_attention = config.bio_attention_gain
        if config.bio_compartments:
            self.dendrites = DendriticCompartmentLayer(config)
        else:
            c_fc = nn.Linear(config.n_embd, h, bias=config.bias)
            self.dendrites = nn.Sequential(c_fc, OscillatingActivation(h, config))
        self.conv = short_conv(config, "d", h)
        events = SpikingEventLayer if config.bio_spiking else SparseEventLayer
        self.events = events(h, config) if config.bio_threshold else None
        self.c_proj = nn.Linear(h, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, run=ALONE):
        h = self.dendrites(x, run.attended) if self.reads_attention else self.dendrites(x)
        h = through(self.events, through(self.conv, h, run.state), run.state)
        return self.dropout(self.c_proj(h))


# takes_learning_rules, has_forward_mode and has_wavelets mean what they do for token mixers
CHANNEL_MIXERS = {"mlp": MLP, "swiglu": SwiGLU, "kan": WaveKAN, "bio_mlp": BioMLP}  # the flags are use_swiglu, ...


# ---------------------------------------------------------------------------------------------------------------------
# Sparse distributed representations: a token is k = sdr_active of n = sdr_size bits, idx (B, T) -> x (B, T, C).
#   word v:  bits_v = the k largest of scores_v (n), e_v = sum of its bits' vectors / sqrt(k); a map of the bits,
#            smoothed, has k winners of its own, which add to e_v. Straight-through: scores get d e_v / d bits_v
#   context: u_t = lambda u_{t-1} + bits_t at sdr_scales time constants, the k strongest bits of each, projected
#   levels:  code^1_t = bits_t, code^l_t = the k strongest of a leaky union of code^{l-1}; 2^{l-1} bits share a vector
#   memory:  M_t = M_{t-1} "+" key_{t-1} value_t^T, reads key_t M_{t-1}: what came after (kernels/engram.py)
#   trail:   o^1 = key_t M_{t-1}, o^j = bits(the word v of the largest cos(o^{j-1}, value_v)) M_{t-1}
# Parameters (V + C) n. Time: words O(V n C) per step, not per token; context O(T sdr_scales (n + k C)); memory
# O(T n d). Sources: Kanerva 1988; Willshaw 1969; Hawkins & Ahmad 2016 (HTM); De Sousa Webber 2015, arXiv 1511.08855.


def has_small_vocabulary(config):
    """Whether all words are computed at once, and the memory has a row per word instead of one per bit."""
    return config.vocab_size <= 0.25 * config.sdr_size


class Fold(torch.autograd.Function):
    """Sum of active bits' vectors over sqrt(k): active (U, k), vectors (n, C) -> (U, C).

    Straight-through: scores (U, n) get the gradient that bits would, all n of them.
    """

    @staticmethod
    def forward(ctx, scores, active, vectors):
        ctx.save_for_backward(active, vectors)
        ctx.dtype = scores.dtype
        return F.embedding_bag(active, vectors, mode="sum") / math.sqrt(active.size(1))

    @staticmethod
    def backward(ctx, g):
        active, vectors = ctx.saved_tensors
        g = g / math.sqrt(active.size(1))
        d_vectors = torch.zeros_like(vectors).index_add(0, active.flatten(), g.repeat_interleave(active.size(1), 0))
        return (g @ vectors.mT).to(ctx.dtype), None, d_vectors


class SemanticFoldingEncoder(nn.Module):
    """Words to bits and to vectors. HTM boosting: in training, bits that were on too often lose score."""

    DUTY_RATE = 0.01  # weight of an optimiser step in the running mean
    SPREAD = 0.1  # standard deviation of the scores at the start; a step moves them by about the learning rate

    def __init__(self, config):
        super().__init__()
        n, self.k, self.boost = config.sdr_size, config.sdr_active, config.sdr_boost
        self.scores = nn.Parameter(self.SPREAD * torch.randn(config.vocab_size, n))
        self.vectors = nn.Parameter(0.02 * torch.randn(n, config.n_embd))
        self.register_buffer("duty", torch.full((n,), self.k / n))  # share of tokens that a bit is on in
        self.register_buffer("counted", torch.zeros(n + 1))  # tokens that each bit was on in, and all tokens

    def forward(self, words=None):
        """(scores (U, n), active (U, k), vectors (U, C)) of words (U,), or of all of them."""
        scores = self.scores if words is None else self.scores[words]
        favour = self.boost * (self.k / self.duty.numel() - self.duty) if self.training else 0.0
        active = k_winners(scores.detach() + favour, self.k)
        return scores, active, Fold.apply(scores, active, self.vectors)

    @torch.no_grad()
    def count(self, active, slots):
        """Count which bits the tokens slots (B, T), rows of active (U, k), had on."""
        slots = slots.flatten()
        tokens = self.counted.new_zeros(len(active))
        tokens.index_add_(0, slots, torch.ones_like(slots, dtype=tokens.dtype))
        self.counted[:-1].index_add_(0, active.flatten(), tokens.repeat_interleave(self.k))
        self.counted[-1] += slots.numel()

    @torch.no_grad()
    def before_step(self):
        """Take in what all processes counted since the last optimiser step."""
        all_reduce(self.counted)
        self.duty.lerp_(self.counted[:-1] / self.counted[-1].clamp(min=1), self.DUTY_RATE)
        self.counted.zero_()


class SemanticRetina(nn.Module):
    """The bits on a map, a torus, smoothed over sdr_radius sites and made sparse again: neighbours share meaning.

    Binomial weights; an active bit enters with sigmoid(score). Sites count 1 to 1.001 by their index: the neighbours of
    a bit are equals, and which of them win must not depend on the device.
    """

    def __init__(self, config):
        super().__init__()
        self.radius = config.sdr_radius
        height = next(h for h in range(math.isqrt(config.sdr_size), 0, -1) if config.sdr_size % h == 0)
        self.shape = (height, config.sdr_size // height)
        self.gain = nn.Parameter(torch.ones(()))

    def smooth(self, x):
        """x (U, n), averaged over neighbours."""
        x = x.unflatten(-1, self.shape)
        for axis in (-1, -2):
            for _ in range(self.radius):
                x = x / 2 + (x.roll(1, axis) + x.roll(-1, axis)) / 4
        return x.flatten(-2)

    def forward(self, scores, active, vectors):
        """(active (U, k) after smoothing, what it adds to the words' vectors (U, C))."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # in bfloat16, bits would tie
        sites = torch.zeros_like(scores).scatter(-1, active, scores.detach().sigmoid().gather(-1, active))
        smooth = self.smooth(scores + (sites - scores).detach())  # straight-through, to all bits and their neighbours
        active = k_winners(self.without_ties(smooth.detach()), active.size(-1))
        return active, self.gain * Fold.apply(smooth, active, vectors)

    @staticmethod
    def without_ties(x):
        return x * torch.linspace(1, 1.001, x.size(-1), dtype=x.dtype, device=x.device)

    def map(self, active):
        """Bits (.., k) on the map, (.., height, width) of zeros and ones: what to draw."""
        return SDROperations.dense(active, math.prod(self.shape)).unflatten(-1, self.shape)


class ContextEncoder(nn.Module):
    """A summary of the text so far: (B, T, k) bits -> (B, T, C). Scale s decays over 2 4^s tokens."""

    def __init__(self, config):
        super().__init__()
        self.size, self.scales = config.sdr_size, config.sdr_scales
        self.c_proj = nn.Linear(config.sdr_scales * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, keys, vectors, state=None):
        store = store_of(state, self)
        if "field" not in store:
            store["field"] = torch.zeros(len(keys), self.scales, self.size, device=keys.device)
            store["winners"] = torch.arange(keys.size(-1), device=keys.device).repeat(len(keys), self.scales, 1)
        decay = torch.exp(-0.5 * 0.25 ** torch.arange(self.scales, device=keys.device, dtype=torch.float32))
        winners = context_winners(keys, decay, store["field"], store["winners"])  # (B, T, S, k)
        folded = F.embedding_bag(winners.flatten(0, -2), vectors.detach(), mode="sum") / math.sqrt(keys.size(-1))
        return self.c_proj(folded.view(*keys.shape[:2], -1))

    def flops_per_token(self, T):
        """Forward FLOPs of the unions' decay."""
        return self.scales * self.size


class CodeLevels(nn.Module):
    """Codes above the token's, (B, T, k) bits -> (B, T, C): level l remembers 2 4^(l-1) tokens, of codes below it."""

    def __init__(self, config):
        super().__init__()
        self.size, levels = config.sdr_size, range(1, config.sdr_levels)
        self.vectors = nn.ParameterList(0.02 * torch.randn(self.size >> up, config.n_embd) for up in levels)

    def codes(self, keys, state=None):
        """The bits (B, T, k) of each level above the keys' own."""
        store, (B, _, k), out = store_of(state, self), keys.shape, []
        for up in range(1, len(self.vectors) + 1):
            if f"field{up}" not in store:
                store[f"field{up}"] = torch.zeros(B, 1, self.size, device=keys.device)
                store[f"winners{up}"] = torch.arange(k, device=keys.device).repeat(B, 1, 1)
            decay = torch.full((1,), math.exp(-0.5 * 0.25**up), device=keys.device)
            keys = context_winners(keys, decay, store[f"field{up}"], store[f"winners{up}"])[:, :, 0]
            out.append(keys)
        return out

    def forward(self, keys, state=None):
        rows = [code.flatten(0, 1) >> up for up, code in enumerate(self.codes(keys, state), 1)]
        folded = sum(F.embedding_bag(row, vectors, mode="sum") for row, vectors in zip(rows, self.vectors))
        return (folded / math.sqrt(keys.size(-1))).view(*keys.shape[:2], -1)

    def flops_per_token(self, T):
        """Forward FLOPs of the unions' decay."""
        return len(self.vectors) * self.size


class SDREngramMemory(nn.Module):
    """What followed the current bits earlier in the text, (B, T, C). Values are words' vectors, projected.

    "hebb" and "willshaw" read the mean of what followed, with 0 as a prior of weight 1; "delta" what came last. A trail
    goes on from there: the word whose value is nearest to what was read is the next query. The choice has no gradient.
    """

    def __init__(self, config):
        super().__init__()
        self.size, self.rule, self.decay = config.sdr_size, config.sdr_rule, config.sdr_decay
        self.vocab_size = config.vocab_size
        self.has_word_rows = has_small_vocabulary(config)
        self.c_value = nn.Linear(config.n_embd, config.sdr_value_dim, bias=False)  # linear in the sum of bits
        self.c_proj = nn.Linear(config.sdr_value_dim, config.n_embd, bias=config.bias)
        further = range(1, config.sdr_trail)
        self.trail = nn.ModuleList(nn.Linear(config.sdr_value_dim, config.n_embd, bias=False) for _ in further)

    def forward(self, slots, active, words, vectors, state=None):
        """slots (B, T), rows of the words' active (U, k) and vectors `words` (U, C); vectors (n, C) those of bits."""
        store = None if state is None else state.of(self)
        read, kept = self.read(slots, active, words, vectors, store)
        y = self.c_proj(read)
        for c_next in self.trail:
            read, _ = self.read(slots, active, words, vectors, store, self.nearest(read, words))
            y = y + c_next(read)
        if store is not None:
            store.update(kept)
        return y

    def read(self, slots, active, words, vectors, store, queries=None):
        """(reads (B, T, d), what to store) of the words slots (B, T), or of queries in their place."""
        if self.rule == "willshaw" and not self.training:
            return self.recall_bits(active[slots], vectors, store or {}, None if queries is None else active[queries])
        values = self.c_value(words)
        if self.rule != "delta":
            values = torch.cat((values, torch.ones_like(values[:, :1])), 1)
        rule = "delta" if self.rule == "delta" else "hebb"
        o, kept = recall(slots, self.features(active, words.dtype), values, rule, self.decay, store, queries)
        return (o if self.rule == "delta" else o[..., :-1] / (1 + o[..., -1:])).to(words.dtype), kept

    @torch.no_grad()
    def nearest(self, read, words):
        """The word, a row of words (U, C), whose value has the largest cosine with what was read (B, T, d): (B, T)."""
        values, wide = in_float32(self.c_value(words))
        with wide:
            unit = F.normalize(values, dim=-1).mT
            return torch.cat([(part.to(unit.dtype) @ unit).argmax(-1) for part in read.split(CHUNK, dim=1)], 1)

    def features(self, active, dtype):
        """The features of a token: its bits over sqrt(k), or its overlaps with all words. Inner products are equal."""
        k = active.size(1)
        if not self.has_word_rows:
            return lambda slots: 2 * (SDROperations.dense(active[slots], self.size, dtype) / math.sqrt(k),)
        bits = SDROperations.dense(active, self.size)
        overlaps = (bits @ bits.mT / k).to(dtype)
        return lambda slots: (overlaps[slots], F.one_hot(slots, len(active)))

    def recall_bits(self, keys, vectors, store, queries=None):
        """(means (B, T, d) of the values of the bits that the binary memory gives back, what to store)."""
        B, _, k = keys.shape
        M = store["M"].clone() if "M" in store else keys.new_zeros(B, self.size, self.size // 64)
        words = willshaw(keys, store.get("before", keys[:, 0, :0]), M, queries)
        values, means = self.c_value(vectors) / math.sqrt(k), []
        for part in words.split(CHUNK, dim=1):
            bits = unpack(part, self.size).to(values.dtype)
            means.append(bits @ values / (1 + bits.sum(-1, keepdim=True) / k))
        return torch.cat(means, 1), {"M": M, "before": keys[:, -1]}

    def flops_per_token(self, T):
        """Forward FLOPs: pairs within half a chunk, one read and one write; a trail does it again and finds a word."""
        rows = self.vocab_size if self.has_word_rows else self.size
        each = 2 * self.c_value.out_features * (min(T, CHUNK) // 2 + 2 * rows)
        return each + len(self.trail) * (each + 2 * self.c_value.out_features * self.vocab_size)


class SDREmbedding(nn.Module):
    """Takes wte's place: tokens (B, T) -> (x (B, T, C), words, recalled).

    words: their vectors (V, C) for a tied head, else None; recalled: what the memory adds, (B, T, C), where
    engram_at="head", else None, because it is in x.
    """

    def __init__(self, config):
        super().__init__()
        self.vocab_size, self.is_tied = config.vocab_size, config.tie_weights
        self.recalls_late = config.engram_at == "head"
        self.is_small = has_small_vocabulary(config)
        self.encoder = SemanticFoldingEncoder(config)
        self.retina = SemanticRetina(config) if config.sdr_radius else None
        self.context = ContextEncoder(config) if config.sdr_scales else None
        self.levels = CodeLevels(config) if config.sdr_levels > 1 else None
        self.memory = SDREngramMemory(config) if config.sdr_rule != "none" else None

    def forward(self, idx, state=None):
        store = store_of(state, self)
        if self.is_tied or self.is_small:
            words, slots = None, idx
        else:
            words, slots = distinct(idx, self.vocab_size)
        if words is not None or "words" not in store:
            store["words"] = self.look_up(words)
        active, folded, table = store["words"]
        if self.training:
            self.encoder.count(active, slots)
        x = F.embedding(slots, table)
        if self.context is not None:
            x = x + self.context(active[slots], self.encoder.vectors, state)
        if self.levels is not None:
            x = x + self.levels(active[slots], state)
        recalled = None
        if self.memory is not None:
            recalled = self.memory(slots, active, folded, self.encoder.vectors, state)
            x, recalled = (x, recalled) if self.recalls_late else (x + recalled, None)
        return x, table if self.is_tied else None, recalled

    def look_up(self, words=None):
        """(active bits (U, k), their vector (U, C), that and the retina's (U, C)) of words (U,), or of all."""
        scores, active, folded = self.encoder(words)
        if self.retina is None:
            return active, folded, folded
        return active, folded, folded + self.retina(scores, active, self.encoder.vectors)[1]

    def flops_per_token(self, T):
        """Forward FLOPs of a tied head's product; the words' vectors are computed per step, not per token."""
        return 2 * self.vocab_size * self.encoder.vectors.size(1) if self.is_tied else 0


def distinct(idx, vocab_size):
    """(words (U,), slots (B, T)) with words[slots] = idx. U depends on the shape alone: each word once, then zeros."""
    ids, order = idx.flatten().sort()
    slot = F.pad((ids[1:] != ids[:-1]).long(), (1, 0)).cumsum(0)
    words = torch.zeros_like(ids[:vocab_size]).scatter(0, slot, ids)
    return words, torch.empty_like(slot).scatter(0, order, slot).view_as(idx)


# ---------------------------------------------------------------------------------------------------------------------
# Manifolds: token -> point -> features, added back: x + tanh(gate) proj(f(p)), p = point(W ln(x)), the gate 0 at first.
#   "sphere": p = W x / |W x| in manifold_dim dimensions, f = p sqrt(dim).
#   "e7":     p = tanh(W x), 70 coordinates of E7(7)/SU(8); f = L(p) v for learned v in the 56 (kernels/e7.py).
#   "rotor":  p = R in Spin(8), 28 angles; f = R v R^T for learned pairs v of antisymmetric 8 x 8, 28 + 28.
# Once, after the embedding, or by a map of its own in each block, as a sublayer before the token mixer (manifold_at);
# each token by itself: x (B, T, C) -> (B, T, C), O(T C (points + features)).
# Sources: Cremmer & Julia 1979 for the coset and its 56; Clifford rotors as products of plane rotations are classical.

MANIFOLD_COORDINATES = {"e7": 70, "rotor": 28}  # a sphere has as many as it is asked for


def manifold_point(u, manifold):
    """Any coordinates u (..., n) -> a point as numbers (..., P) whose Euclidean distance tells near from far.

    The unit vector on a sphere, 70 coordinates in [-1, 1] for E7 (a chart of all of the coset, tangent to it at 0), the
    64 entries of the rotation for a rotor.
    """
    if manifold == "sphere":
        return F.normalize(u, dim=-1)
    return u.tanh() if manifold == "e7" else rotation(u).flatten(-2)


def path_bending(point, manifold):
    """How far the path of the points (B, T, P) bends away from geodesics: a mean over its inner points, 0-d.

    The squared second difference p_{t-1} - 2 p_t + p_{t+1}, projected on the tangent space at p_t: 0 for equal steps
    along a great circle or a one-parameter rotation, and for straight lines in E7's chart.
    """
    if point.size(1) < 3:
        return 0 * point.sum()
    here, around = point[:, 1:-1], point[:, :-2] + point[:, 2:]
    if manifold == "sphere":
        second = around - (around * here).sum(-1, keepdim=True) * here
    elif manifold == "rotor":
        A = here.unflatten(-1, (8, 8)).mT @ around.unflatten(-1, (8, 8))
        second = (A - A.mT).flatten(-2) / 2
    else:
        second = around - 2 * here
    return second.square().sum(-1).mean()


def in_float32(x):
    """(x in float32 or better, a context in which it stays so): exponentials and distances do not fit in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32)), torch.autocast(x.device.type, enabled=False)


class ManifoldProjection(nn.Module):
    """x (B, T, C) -> what to add to it (B, T, C), and points (B, T, P)."""

    def __init__(self, config):
        super().__init__()
        self.manifold, self.geodesic_weight = config.manifold, config.geodesic_weight
        self.share = 1 / config.n_layer if config.manifold_at == "blocks" else 1.0
        n = MANIFOLD_COORDINATES.get(config.manifold, config.manifold_dim)
        self.ln = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.c_point = nn.Linear(config.n_embd, n, bias=config.bias)
        features = n
        if self.manifold != "sphere":
            features = 56 * config.manifold_vectors
            self.vectors = nn.Parameter(torch.randn(config.manifold_vectors, 56))
        self.c_proj = nn.Linear(features, config.n_embd, bias=config.bias)
        self.gate = nn.Parameter(torch.zeros(()))
        if self.manifold == "e7":
            self.register_buffer("active", torch.ones(70))  # set by the curriculum; a checkpoint keeps it
            self.register_buffer("hops", e7_hops(), persistent=False)
            self.register_buffer("cartan", e7_cartan().float(), persistent=False)

    def set_stage(self, stage):
        """Hold all coset coordinates at 0 but the first E7_STAGES[stage] of the chain. ValueError without a chain."""
        if self.manifold != "e7":
            raise ValueError(f'manifold="{self.manifold}" has no stages: set manifold="e7"')
        k = stage + 1
        self.active.zero_()
        self.active[:k] = 1
        self.active[7 : 7 + sum(E7_SETS[:k])] = 1

    def features(self, point):
        """f(p), (B, T, P) -> (B, T, features), entries of about unit size."""
        if self.manifold == "sphere":
            return point * point.size(-1) ** 0.5
        vectors = self.vectors.to(point.dtype)
        if self.manifold == "e7":
            return e7_apply(point, vectors, self.hops, self.cartan.to(point.dtype)).flatten(-2)
        return rotate_pairs(point, vectors)

    def forward(self, x):
        u, full_precision = in_float32(self.c_point(self.ln(x)))
        with full_precision:
            point = manifold_point(u, self.manifold)
            if self.manifold == "e7":
                point = point * self.active.to(u.dtype)
            f = self.features(point)
        return torch.tanh(self.gate) * self.c_proj(f.to(x.dtype)), point

    def add_losses(self, point, run):
        """In training leave "geodesic", the bending of the path of points (B, T, P), or the blocks' mean."""
        if self.geodesic_weight and run.training and run.targets is not None:
            point, full_precision = in_float32(point)
            with full_precision:
                bending = self.share * path_bending(point, self.manifold)
                so_far = run.losses["geodesic"][1] if "geodesic" in run.losses else 0.0
                run.losses["geodesic"] = (self.geodesic_weight, so_far + bending)

    def flops_per_token(self, T):
        """Forward FLOPs of L(z) v, or of R and R v R^T: 2 per multiply-add."""
        if self.manifold == "sphere":
            return 0
        own, each = {"e7": (0, 729 + 56 * 27), "rotor": (7 * 128, 1024 + 448)}[self.manifold]
        return 2 * (own + each * len(self.vectors))


def on_manifold(x, manifold, spectral, run):
    """What the manifold adds to x (B, T, C); the points' spectral coordinates and losses are left in run."""
    moved, point = manifold(x)
    manifold.add_losses(point, run)
    run.spectrum = None if spectral is None else spectral(point)
    return moved


def manifold_parts(config, place):
    """The projection and the spectral decomposition for one place of manifold_at, None what is off."""
    is_here = config.use_manifold and config.manifold_at == place
    projection = ManifoldProjection(config) if is_here else None
    return projection, SpectralDecomposition(config) if is_here and config.has_spectrum else None


# ---------------------------------------------------------------------------------------------------------------------
# Spectral decomposition: coordinates in which communities of tokens are near, added to queries and keys.
#   S = D^{-1/2} W D^{-1/2}, W_ij = exp(-|y_i - y_j|^2 / 2 s^2) of learned landmarks y on the manifold, D its row sums;
#   S u = lambda u, psi = D^{-1/2} u (eigenvectors of the normalised Laplacian), the constant one left out; then
#   psi(p) = sum_j softmax_j(-|p - y_j|^2 / 2 s^2) psi_j / lambda (Nystrom), which is psi_i at y_i, from p alone.
# O(T (P + n_eigenvectors) landmarks). psi, lambda and s are buffers, renewed every spectral_refresh optimiser steps;
# landmarks learn through the softmax. Sources: Belkin & Niyogi 2003; Williams & Seeger 2001; Bengio et al. 2004.


class SpectralDecomposition(nn.Module):
    """Points (B, T, P) -> spectral coordinates (B, T, n_eigenvectors), of mean square 1 over the landmarks."""

    def __init__(self, config):
        super().__init__()
        self.manifold, self.every = config.manifold, config.spectral_refresh
        n, m = MANIFOLD_COORDINATES.get(config.manifold, config.manifold_dim), config.spectral_landmarks
        self.landmarks = nn.Parameter(torch.randn(m, n) * 0.02 * config.n_embd**0.5)  # where tokens are at first
        # renewed from old landmarks, so a checkpoint must keep them
        self.register_buffer("basis", torch.zeros(m, config.n_eigenvectors))  # psi / lambda
        self.register_buffer("width", torch.ones(()))  # 1 / s^2
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if not self.landmarks.is_meta:  # under --parallel=fsdp only the main process has numbers at first
            self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Decompose the graph of the landmarks as they are now: in float64, on the CPU."""
        y = manifold_point(whole(self.landmarks.detach()).double().cpu(), self.manifold)
        distance = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = (distance + distance.max() * torch.eye(len(y), dtype=y.dtype, device="cpu")).amin(1)
        width = 4 / nearest.mean().clamp(min=1e-12)  # s is half the typical distance to the nearest other landmark
        W = (-distance * width / 2).exp()
        degree = W.sum(1)
        eigenvalues, u = torch.linalg.eigh(W / (degree[:, None] * degree).sqrt())  # ascending
        n = self.basis.size(1)
        psi = (degree.sum() / degree)[:, None].sqrt() * u[:, -n - 1 : -1].flip(1)  # mean square 1, weighted by degree
        basis = psi / eigenvalues[-n - 1 : -1].flip(0).clamp(min=0.05)
        sign = (basis * self.basis.double().cpu()).sum(0).sign()  # a coordinate goes on meaning what it meant
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))[0].sign()
        self.basis.copy_(basis * torch.where(sign == 0, largest, sign))
        self.width.copy_(width)

    def before_step(self):
        """Refresh every `spectral_refresh` optimiser steps, counted across checkpoints; rank 0's result for all."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.refresh()
            for buffer in (self.basis, self.width) if has_processes() else ():
                torch.distributed.broadcast(buffer, 0)

    def forward(self, point):
        p, full_precision = in_float32(point)
        with full_precision:
            y = manifold_point(self.landmarks.to(p.dtype), self.manifold)
            nearness = (p @ y.mT - y.square().sum(-1) / 2) * self.width.to(p.dtype)  # |p|^2 is the same for all
            return nearness.softmax(-1) @ self.basis.to(p.dtype)

    def flops_per_token(self, T):
        """Forward FLOPs: distances to the landmarks, and the sum over them."""
        P = {"sphere": self.landmarks.size(1), "e7": 70, "rotor": 64}[self.manifold]
        return 2 * len(self.landmarks) * (P + self.basis.size(1))


# ---------------------------------------------------------------------------------------------------------------------
# Residual wiring: what a sublayer f reads from the residual stream, and how its output returns.
#   Plain: x + gate f(x). Adjacent possible: x + y min(1, rho |x| / |y|), y = gate f(x).
#   Hyper-connections: n streams x (B, T, n, C), x' = H_res x + H_post f(H_pre x), coefficients of each token made from
#   its streams. "mhc": H_pre = sigmoid, H_post = 2 sigmoid, H_res doubly stochastic by Sinkhorn's iteration, columns
#   last, so that it keeps the streams' mean and never amplifies. "hc": unconstrained.
#   Layer aggregation mixes the layers' outputs, or the means of their streams.
# Cost: n residual streams of activations; per token and sublayer, 2 n^2 (n + 2) C FLOPs for the coefficients
# and 2 n (n + 2) C for mixing. Sources: Xie et al. 2025, arXiv 2512.24880; Zhu et al. 2024, arXiv 2409.19606;
# DenseFormer, Pagliardini et al. 2024, arXiv 2402.02622; scalar mix, Peters et al. 2018, arXiv 1802.05365.


def within_reach(y, x, rho):
    """y min(1, rho |x| / |y|) for steps y from points x, (..., C) each; y itself for rho 0. Finite gradients at 0."""
    if not rho:
        return y
    x_norm, y_norm = (torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=sum_dtype(z)) for z in (x, y))
    is_far = y_norm > rho * x_norm
    share = torch.where(is_far, rho * x_norm / torch.where(is_far, y_norm, 1.0), 1.0)
    return y * share.to(y.dtype)


class Residual(nn.Module):
    """x + f(x), or x + gate f(x) with a learned gate; no further than rho |x| from x."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(())) if config.gated_blocks else None
        self.rho = config.adjacent_possible

    def forward(self, x, f):
        return x + within_reach(f(x) if self.gate is None else self.gate * f(x), x, self.rho)


class HyperConnections(nn.Module):
    """A sublayer f of n streams, number `index` of `sublayers`; `measured`: how far H_res is from doubly stochastic.

    At the start H_pre reads stream index mod n, so that the streams' gradients differ: with equal streams H_res would
    have none, since its rows and columns cannot move their sums. The last H_res of "mhc" would be averaged away.
    """

    def __init__(self, config, index, sublayers):
        super().__init__()
        n, C = config.mhc_streams, config.n_embd
        self.n, self.iters, self.constrained = n, config.mhc_sinkhorn_iters, config.hc_mode == "mhc"
        self.rho = config.adjacent_possible
        self.mixes = index + 1 < sublayers or not self.constrained
        own = torch.arange(n) == index % n
        if self.constrained:
            self.sizes = (n, n, n * n if self.mixes else 0)
            pre = torch.where(own, 0.9, 0.1 / (n - 1)).logit()
            static = (pre, torch.zeros(n), 4 * torch.eye(n).flatten()[: self.sizes[2]])
            self.coefficients = nn.Linear(n * C, sum(self.sizes), bias=False)
        else:  # the same small map for each stream
            self.sizes = (1, 1, n)
            static = (torch.stack((own.float(), torch.ones(n)), 1), torch.eye(n))
            self.coefficients = nn.Linear(C, n + 2, bias=False)
            static = (torch.cat(static, 1).flatten(),)
        self.static = nn.Parameter(torch.cat(static))  # one dimension: weight decay must not pull it to 0
        self.scale = nn.Parameter(torch.full((3 if self.mixes else 2,), 0.01))  # factors of the token-dependent part
        self.gate = nn.Parameter(torch.ones(())) if config.gated_blocks else None
        self.measured = {"row_error": torch.zeros(()), "column_error": torch.zeros(())} if self.mixes else {}
        self.last_res = None  # H_res of each row's last token in the last training step, (B, n, n)

    def forward(self, x, f):
        """x (B, T, n, C) -> the same."""
        B, T, n, C = x.shape
        x = x.flatten(0, 1)
        x, pre, post, res = self.weights(x)
        if self.gate is not None:
            post = post * self.gate
        if self.training and res is not None:
            self.measure(res.detach().unflatten(0, (B, T)))
        h, x = mix(x, pre, res)
        y = within_reach(f(h.view(B, T, C)).flatten(0, 1), h, self.rho)
        return spread(x, y, post, in_place=res is not None).view(B, T, n, C)

    def weights(self, x):
        """x (N, n, C), H_pre (N, n), H_post (N, n), H_res (N, n, n) or None, in float32 or better, for streams x."""
        n = self.n
        scale = torch.cat([s.expand(size) for s, size in zip(self.scale, self.sizes)])
        if not self.constrained:
            z, again = rms_project(x.flatten(0, 1), self.coefficients.weight)
            z = torch.addcmul(self.static.view(n, -1), scale, z.tanh().view(-1, n, n + 2))
            pre, post, res = z.split(self.sizes, 2)
            return again.view_as(x), pre.squeeze(2), post.squeeze(2), res.mT
        z, again = rms_project(x.flatten(1), self.coefficients.weight)
        pre, post, res = torch.addcmul(self.static, scale, z).split(self.sizes, 1)
        if not self.mixes:
            return x, pre.sigmoid(), 2 * post.sigmoid(), None
        return again.view_as(x), pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(res.unflatten(1, (n, n)), self.iters)

    def measure(self, res):
        self.last_res = res[:, -1]
        self.measured["row_error"] = (res.sum(-1) - 1).abs().amax()
        self.measured["column_error"] = (res.sum(-2) - 1).abs().amax()

    def flops_per_token(self, T):
        n, C = self.n, self.coefficients.in_features // (self.n if self.constrained else 1)
        linear = 0 if self.constrained else 2 * (n - 1) * self.coefficients.weight.numel()  # it runs on each stream
        sweeps = 4 * n * n * self.iters if self.constrained and self.mixes else 0
        return linear + sweeps + 2 * n * C * (2 + n * self.mixes)


def composite_gain(wires):
    """The most that all H_res in turn amplify a signal: the largest absolute row sum of their product, 0-d."""
    gain = None
    for wire in wires:
        gain = wire.last_res if gain is None else wire.last_res @ gain
    return gain.abs().sum(-1).amax()


class Streams(nn.Module):
    """How blocks get their residual streams: x (B, T, C) itself, or under use_mhc n copies of it, (B, T, n, C)."""

    def __init__(self, config, blocks):
        super().__init__()
        self.n = config.mhc_streams if config.use_mhc else 0
        wires = [wire for block in blocks for wire in (block.wire_m, block.wire_1, block.wire_f, block.wire_2)]
        self.wires = tuple(wire for wire in wires if isinstance(wire, HyperConnections))  # a tuple registers no modules

    def spread(self, x):
        return x[:, :, None].repeat(1, 1, self.n, 1) if self.n else x

    @property
    def measured(self):
        mixing = [wire for wire in self.wires if wire.last_res is not None]
        return {"composite_gain": composite_gain(mixing)} if mixing else {}


def wiring(config, layer, sublayer, per_block):
    """The wiring of a block's sublayer, 0 the first of `per_block`."""
    if not config.use_mhc:
        return Residual(config)
    return HyperConnections(config, layer * per_block + sublayer, config.n_layer * per_block)


def stream_mean(x):
    """What a head reads: the residual stream x (B, T, C) itself, or the mean (B, T, C) of streams (B, T, n, C)."""
    return x.mean(2) if x.dim() == 4 else x


class LayerAggregation(nn.Module):
    """Two forms, by mla_mode.

    "dense": each block's output becomes a learned sum of all blocks' so far and the embedding, at first itself;
    "scalar": the head reads a softmax mix of all blocks' outputs, at first their mean.
    """

    def __init__(self, config):
        super().__init__()
        n = config.n_layer
        self.dense = config.mla_mode == "dense"
        if self.dense:
            self.weights = nn.ParameterList((torch.arange(k) == k - 1).float() for k in range(2, n + 2))
        else:
            self.weights = nn.ParameterList([torch.zeros(n)])

    def forward(self, x, outputs):
        """What replaces block k's output x, given `outputs`, the embedding and blocks' means; x's mean is appended."""
        mean = stream_mean(x)
        outputs.append(mean)
        if self.dense:
            mixed = sum(w * y for w, y in zip(self.weights[len(outputs) - 2], outputs))
            return mixed if x.dim() == 3 else x + (mixed - mean)[:, :, None]
        if len(outputs) <= len(self.weights[0]):
            return x
        return sum(w * y for w, y in zip(self.weights[0].softmax(0), outputs[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Windows over the past, which end at the current token and are zero before the start; x (B, T, C).


def shift(x, j):
    """x_{t-j}, for 0 <= j <= T."""
    return F.pad(x, (0, 0, j, -j))


def window_sum(x, n):
    """sum_{j < n} x_{t-j}, by doubling: log2 n additions, and no differences of long sums."""
    n = min(n, x.size(1))
    if n == 1:
        return x
    half = window_sum(x, n // 2)
    both = half + shift(half, n // 2)
    return both + shift(x, n - 1) if n % 2 else both


def weighted_window(parts):
    """sum_j y_j[t-j] of n tensors y_j (B, T, D)."""
    total = parts[0]
    for j, part in enumerate(parts[1 : total.size(1)], 1):
        total = total + shift(part, j)
    return total


def with_past(module, state, x, n):
    """x (B, T, C) behind the n tokens before it, or as many as there were, which `state` keeps for `module`."""
    if state is None:
        return x
    store = state.of(module)
    x = torch.cat((store["past"], x), 1) if "past" in store else x
    store["past"] = x[:, max(0, x.size(1) - n) :]
    return x


class WindowLinear(nn.Module):
    """y_t = sum_{j < window} W_j x_{t-j} + bias, (B, T, n_in) -> (B, T, n_out).

    W_j x for all j is one product, and its parts are shifted: cheaper than a copy of x for each place in the window.
    """

    def __init__(self, n_in, n_out, window, bias):
        super().__init__()
        self.window = window
        self.linear = nn.Linear(n_in, window * n_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x, state=None):
        y = with_past(self, state, self.linear(x), self.window - 1)
        y = weighted_window(y.chunk(self.window, -1))[:, -x.size(1) :]
        return y if self.bias is None else y + self.bias


# ---------------------------------------------------------------------------------------------------------------------
# Head: multi-facet softmax. One softmax cannot say everything: where e0 + e1 = e2 + e3, its p0 p1 = p2 p3. A mixture of
# K can; the first of them has P facets, of which token v uses number v mod P.
#   q = gelu(sum_{j <= mfs_window} W_j [x^{n-L+1}; ..; x^n]_{t-j}),  L = mfs_layers top layers
#   f_i = h + A_i [h; q], i = 1 .. P + K - 1, A_i near 0;  prior = softmax(B [h; q]);  p = sum_k prior_k softmax_k
# h is the final norm's output; A_i + [I | 0] is the paper's projection. With regions, or mfs_slate, A_i and B read
# [summary; q].
# Cost: K heads instead of one and (L (mfs_window + 1) + 2 (P + K - 1)) C^2 weights: 21 C^2, where a block has 12 C^2.
# Source: Chang & McCallum, ACL 2022; mixtures of softmaxes: Yang et al. 2018, arXiv 1711.03953.


class MFSHead(nn.Module):
    """Log-probabilities, where a linear head gives logits: their softmax is themselves."""

    reads_context = returns_log_probs = True

    def __init__(self, config):
        super().__init__()
        self.layers_read = config.mfs_layers
        C, self.K, self.chunk, self.size = config.n_embd, config.mfs_K, config.loss_chunk, config.vocab_size
        self.n_facets, self.rank = config.mfs_P + config.mfs_K - 1, config.mfs_lowrank_r
        self.window = WindowLinear(config.mfs_layers * C, C, config.mfs_window + 1, config.bias)
        self.facets = nn.Linear(2 * C, self.n_facets * (self.rank or C), bias=config.bias)
        self.up = nn.Parameter(0.02 * torch.randn(self.n_facets, self.rank, C)) if self.rank else None
        self.prior = nn.Linear(2 * C, self.K, bias=config.bias) if self.K > 1 else None

    def init_own(self):
        """Start at the linear head: facets that are all h, but for a little noise that lets them part."""
        if self.up is None:
            nn.init.normal_(self.facets.weight, std=1e-3)

    def mixture(self, hiddens, h, context=None, state=None):
        """(facets (B, T, P + K - 1, C), log prior (B, T, K)) of the top layers' outputs, a list of (B, T, C), and h."""
        q = F.gelu(self.window(torch.cat(hiddens, -1), state))
        joined = torch.cat((h if context is None else context, q), -1)  # (B, T, 2C)
        facets = self.facets(joined).unflatten(-1, (self.n_facets, -1))
        if self.up is not None:
            facets = torch.einsum("btfr,frc->btfc", facets, self.up)
        prior = h.new_zeros(*h.shape[:2], 1) if self.prior is None else self.prior(joined)
        return facets + h[:, :, None], F.log_softmax(prior, -1, dtype=sum_dtype(prior))

    def log_probs(self, facets, log_prior, weight):
        """log p of every token, (B, T, V), weight (V, C) the output embedding."""
        if not self.chunk or torch.is_grad_enabled():
            return mixture_log_probs(facets, log_prior, weight)
        rows = (x.flatten(0, 1).split(self.chunk) for x in (facets, log_prior))
        return torch.cat([mixture_log_probs(f, p, weight) for f, p in zip(*rows)]).unflatten(0, facets.shape[:2])

    def forward(self, hiddens, h, weight, context=None, state=None):
        return self.log_probs(*self.mixture(hiddens, h, context, state), weight)

    def predict(self, h, context, run, shown, is_chunked):
        """(log-probabilities of the positions `shown`; where it is chunked (mean loss, each token's), else None)."""
        mixture = self.mixture(run.hiddens, h, context, run.state)
        log_probs = self.log_probs(*(part[:, shown] for part in mixture), run.weight)
        return log_probs, self.loss(*mixture, run.weight, run.targets) if is_chunked else None

    def loss(self, facets, log_prior, weight, targets):
        """Mean of -log p(targets) over those that are not -1, and each token's: loss_chunk tokens at a time."""
        facets, log_prior = facets.flatten(0, 1), log_prior.flatten(0, 1)
        loss, each = mixture_cross_entropy(facets, log_prior, weight, targets.flatten(), self.chunk)
        return loss, each.view(targets.shape)

    def flops_per_token(self, T):
        """Forward FLOPs besides linear layers: the K - 1 softmaxes more than lm_head's, and the low-rank facets."""
        C = self.facets.in_features // 2
        return 2 * (self.K - 1) * self.size * C + 2 * self.n_facets * self.rank * C


# A head declares in class attributes whether it reads_context and returns_log_probs, and in `layers_read` of how many
# top layers it wants the outputs in run.hiddens. Its `predict` is as MFSHead's.
HEADS = {  # NAME: class, by the flag use_NAME_head; without one the head is linear
    "mfs": MFSHead,
}


def language_model_loss(logits, chunked, run):
    """Mean cross-entropy in nats per token over run.targets that are not -1; each token's goes to run.on_token_loss.

    From logits (B, T, V), or where the loss was computed in chunks from `chunked`, (mean, each token's).
    """
    targets = run.targets.reshape(-1)
    if chunked is not None:
        loss, each = chunked
    else:
        flat, each = logits.view(-1, logits.size(-1)), None  # log-probabilities are their own softmax
        if run.on_token_loss is not None:
            each = F.cross_entropy(flat.detach(), targets, ignore_index=-1, reduction="none")
        loss = F.cross_entropy(flat, targets, ignore_index=-1)
    if run.on_token_loss is not None:
        run.on_token_loss(each.flatten(), targets)
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Auxiliary heads: the next token from the output x^l (B, T, C) of layers below the last, through the final norm and an
# output matrix, the model's own E or one per layer: -log softmax(E norm(x^l_t))[targets_t], in training only.
# Cost: a linear head more per layer in training, V C parameters if it is the layer's own, nothing in evaluation.
# Deeply supervised nets, Lee et al. 2015, arXiv 1409.5185; on a character transformer's layers, Al-Rfou et al. 2019,
# arXiv 1808.04444.


class LayerLosses(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = [int(layer) for layer in config.aux_heads.split(",")]  # counted from 1
        self.loss_weight, self.chunk, self.cap = config.aux_heads_weight, config.loss_chunk, config.logit_softcap
        self.head_size = config.vocab_size * config.n_embd
        self.own = nn.ModuleDict()  # {layer: its output matrix}
        if config.aux_heads_own:
            heads = (nn.Linear(config.n_embd, config.vocab_size, bias=False) for _ in self.layers)
            self.own.update({str(layer): head for layer, head in zip(self.layers, heads)})

    def add_loss(self, x, layer, norm, run):
        """Leave "aux_LAYER" in run.losses, from that layer's output x, (B, T, C) or streams (B, T, n, C)."""
        if layer not in self.layers or not run.training or run.targets is None:
            return
        h, weight = norm(stream_mean(x)), self.own[str(layer)].weight if self.own else run.weight
        if self.cap:
            logits = softcap(F.linear(h, weight), self.cap)
            loss = F.cross_entropy(logits.flatten(0, 1), run.targets.flatten(), ignore_index=-1)
        else:
            loss = chunked_cross_entropy(h, weight, run.targets, self.chunk)
        run.losses[f"aux_{layer}"] = (self.loss_weight, loss)

    def flops_per_token(self, T):
        """Forward FLOPs in training besides linear layers: a head per layer that has none of its own."""
        return 0 if self.own else 2 * len(self.layers) * self.head_size


# ---------------------------------------------------------------------------------------------------------------------
# Context summaries s_t (B, T, C) of what came before condition the heads; h (B, T, C) is the final norm's output.
#   local:   s_t = mean of the last slate_window h, fewer at the start
#   regions: s_t = proj [mean of h over the complete cells of t's region; running mean of t's cell; prior_t; error_t],
#            prior_t = d prior_{t-1} + (1 - d) h_{t-1}, error_t how badly the auto-encoder below predicted token t
# Cost: O(T C), for regions up to 3 C^2 weights; decoding keeps slate_window vectors, or one sum per cell and the prior.


class ContextSummary(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.window = config.slate_window

    def forward(self, h, state=None):
        T, past = h.size(1), tokens_before(state)
        total = window_sum(with_past(self, state, h, self.window - 1), self.window)[:, -T:]
        count = torch.arange(past + 1, past + T + 1, device=h.device).clamp(max=self.window)
        return total / count[:, None].to(h.dtype)


def complete_cells(starts, region_size):
    """Weights (C, C) that take sums over cells to the mean over the tokens of the complete cells in c's region."""
    c = torch.arange(len(starts) - 1, device=starts.device)
    same = c[:, None] // region_size == c[None, :] // region_size
    length = starts.diff() * (same & (c[None, :] < c[:, None]))  # (C, C) tokens
    return (length > 0) / length.sum(1, keepdim=True).clamp(min=1)


class RegionSummary(nn.Module):
    def __init__(self, config, cells):
        super().__init__()
        self.cells, self.region_size = cells, config.region_size
        self.decay = config.region_prior_decay if config.region_slate_include_prior else None
        self.proj = nn.Linear((2 + config.region_slate_include_prior) * config.n_embd, config.n_embd, bias=config.bias)
        self.c_error = nn.Linear(1, config.n_embd, bias=False) if config.region_slate_include_error else None

    def forward(self, h, state=None):
        """The summary with an error entry of zero."""
        store = store_of(state, self)
        x = h.to(sum_dtype(h))
        parts = [*self.cell_means(x, store, tokens_before(state))]
        if self.decay is not None:
            parts.append(self.prior(x, store))
        return self.proj(torch.cat(parts, -1).to(h.dtype))

    def with_error(self, summary, error):
        """The summary with error (B, T, 1), in nats, in its place: the projection is linear."""
        return summary + self.c_error(error)

    def cell_means(self, x, store, past):
        """Mean of the complete cells of each token's region, running mean of its own cell: (B, T, C) each."""
        B, T, C = x.shape
        starts = torch.tensor(self.cells.starts, device=x.device)
        cell, position = self.cells.cell[past : past + T], torch.arange(past, past + T, device=x.device)
        sums = store.get("sums", x.new_zeros(B, len(starts) - 1, C))
        goes_on = (position != starts[cell]).to(x.dtype)[:, None]  # (T, 1), 0 where a cell begins
        own = gated_scan(goes_on.expand(B, T, C), x, sums[:, cell[:1]][:, 0])
        store["sums"] = sums = sums.index_add(1, cell, x)
        complete = complete_cells(starts, self.region_size).to(x.dtype) @ sums  # (B, cells, C)
        return complete[:, cell], own / (position - starts[cell] + 1)[:, None].to(x.dtype)

    def prior(self, x, store):
        """Exponential moving average of the tokens before each, (B, T, C)."""
        before = store.get("prior", torch.zeros_like(x[:, 0]))
        average = gated_scan(torch.full_like(x, self.decay), (1 - self.decay) * x, before)
        store["prior"] = average[:, -1]
        return torch.cat((before[:, None], average[:, :-1]), 1)


def context_summary(config, blocks):
    """What the flags ask for: regions (over the cells of the last layer that has any), a plain window, or None."""
    if not config.has_region_slate:
        return ContextSummary(config) if config.add_l4_losses or config.mfs_slate else None
    cells = [block.attn.cells for block in blocks if getattr(block.attn, "cells", None) is not None]
    return RegionSummary(config, cells[-1] if cells else Cells(config, config.n_layer - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Auto-encoder, an auxiliary loss after the cortex's layer 4 (L4):
# z_t = gelu(sum_{j < n} W_j h_{t-j} + W_s s_t) (ae_dim), n = ae_window, and from it
#   (a) the window: mean |V_j z_t - norm(h_{t-j})|^2, the target without a gradient;  (b) the token after the next:
#   cross-entropy of targets_{t+1} under the output embedding's softmax(E W z_t), so the head learns to look further.
# (a) is expanded, z^T (V^T V) z - 2 z sum_j V_j^T norm(h_{t-j}) + |window|^2: nothing n C wide is built for a token.
# The loss of token t, predicted at t - 2, is the error signal of the region summary. Cost: in training a second linear
# head and 4 C^2 weights; in evaluation nothing, or with the error signal in an MFS's summary a head's forward.


class SlidingWindowAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.n = config.n_embd, config.ae_window
        D = config.ae_dim or max(1, C // 4)
        self.chunk, self.size, self.loss_weight = config.loss_chunk, config.vocab_size, config.l4_loss_weight
        self.window = WindowLinear(C, D, self.n, config.bias)
        self.c_slate = nn.Linear(C, D, bias=False)
        self.decoder = nn.Linear(D, self.n * C, bias=False)
        self.c_next = nn.Linear(D, C, bias=config.bias)

    def code(self, h, context, state=None):
        return F.gelu(self.window(h, state) + self.c_slate(context))  # (B, T, D)

    def add_losses(self, h, context, run):
        """Leave "l4_reconstruction" and "l4_next" in run.losses; h and context (B, T, C)."""
        reconstruction, ahead = self(h, context, run.targets, run.weight)
        run.losses["l4_reconstruction"] = (self.loss_weight, reconstruction)
        run.losses["l4_next"] = (self.loss_weight, ahead)

    def forward(self, h, context, targets, weight):
        """(reconstruction, next-step loss), 0-d: h, context (B, T, C), targets (B, T), weight (V, C)."""
        z = self.code(h, context)
        after_next = F.pad(targets[:, 1:], (0, 1), value=-1)
        loss = chunked_cross_entropy(self.c_next(z), weight, after_next, self.chunk)
        loss = torch.where((after_next != -1).any(), loss, 0.0)  # a single token has none
        return self.reconstruction(z, h), loss

    def reconstruction(self, z, h):
        """Mean squared error of the decoded window against the normalised states, zeros before the start."""
        target = F.layer_norm(h.detach(), h.shape[-1:])
        V = self.decoder.weight  # (n C, D)
        back = V.unflatten(0, (self.n, -1)).transpose(1, 2).flatten(0, 1)  # (n D, C), V_j^T below each other
        match = weighted_window(F.linear(target, back).chunk(self.n, -1))  # (B, T, D)
        z, match = z.to(sum_dtype(z)), match.to(sum_dtype(z))
        size = window_sum(target.to(z.dtype).square().sum(-1, keepdim=True), self.n)  # (B, T, 1)
        gram = (V.T @ V).to(z.dtype)
        return (size + (z @ gram - 2 * match).mul(z).sum(-1, keepdim=True)).mean() / len(V)

    @torch.no_grad()
    def error(self, h, context, idx, weight, state=None):
        """Loss of each token of idx (B, T) when it was predicted, two tokens before it: (B, T, 1) nats, 0 for t < 2."""
        (B, T, C), past = h.shape, tokens_before(state)
        store = store_of(state, self)
        ahead = self.c_next(self.code(h, context, state))
        ahead = torch.cat((store.get("ahead", ahead.new_zeros(B, 2, C)), ahead), 1)
        store["ahead"] = ahead[:, -2:]
        known = torch.arange(past, past + T, device=idx.device) >= 2
        _, each = chunked_cross_entropy(ahead[:, :T], weight, torch.where(known, idx, -1), self.chunk, per_token=True)
        return each[..., None].to(h.dtype)

    def flops_per_token(self, T):
        """Forward FLOPs besides linear layers: the next-step head."""
        return 2 * self.size * self.c_next.out_features


# ---------------------------------------------------------------------------------------------------------------------
# Learning rules, first part: surrogate gradients. y is computed as always and its parameters get exact gradients, but
# the gradient that reaches the input x follows another rule: y(x.detach()) joined with x by `SurrogateGradient`. All
# learning rules are built on it. It costs no memory of its own, and is switched off by `backprop` (calibration steps
# and diagnostics) and in forward mode (GrAPE), where the layer itself is differentiated.


class SurrogateGradient(torch.autograd.Function):
    """y, unchanged; backward: y gets its gradient g, and x gets rule(g, *saved). `rule` is a function below."""

    @staticmethod
    def forward(y, x, rule, *saved):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, ctx.rule, *saved = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx, g):
        saved = ctx.saved_tensors
        sent = ctx.rule(g, *saved).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return g, sent, None, *(None for _ in saved)


def has_tangent(x):
    """Whether x carries a forward-mode derivative, which kernels and surrogate gradients would lose."""
    return not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None


def uses_backprop(module, x):
    return module.backprop or has_tangent(x)


def set_backprop(model, on):
    """Turn backpropagation on or off everywhere in `model`; forward values stay the same."""
    for module in model.modules():
        if hasattr(module, "backprop"):
            module.backprop = on


@contextmanager
def backpropagation(model):
    """Backpropagation inside the block, whatever the learning rule is outside."""
    before = {module: module.backprop for module in model.modules() if hasattr(module, "backprop")}
    set_backprop(model, True)
    try:
        yield
    finally:
        for module, on in before.items():
            module.backprop = on


def pass_through(g):
    return g


def straight_through(x, y):
    """y, of x's shape, with the gradient of x."""
    return x + (y - x).detach() if has_tangent(x) else SurrogateGradient.apply(y.detach(), x, pass_through)


# ---------------------------------------------------------------------------------------------------------------------
# LocalLinear: y = W x + b; x (..., in) -> (..., out). With gradient g at y, dW = g x^T and db = g are exact; x gets
#   bp, dfa: W^T g        fa: B^T g, B fixed and random        sign_sym: s sign(W)^T g, s = mean |W| or a fixed size
# B has the shape of W. Cost: the matrix products of backpropagation, and one pass over W for sign_sym. Sources:
# Lillicrap et al. 2016 (arXiv 1411.0247), Liao et al. 2016 (1510.05067), Xiao et al. 2019 (1811.03567).

METHODS, FA_INITS, SIGN_SCALES = (
    get_args(GPTConfig.__dataclass_fields__[name].type) for name in ("method", "fa_init_mode", "sign_sym_scale")
)


def feedback_matrix(out_features, in_features, mode, std, sparse_k, generator):
    """Random feedback B (out, in), float32 on the CPU; std is the weights' own.

    "gaussian": N(0, std). "orthogonal": orthonormal rows or columns, whichever are fewer. "ortho_he": the same with
    entries of variance 2 / out (B sums over out gradients). "sparse": sparse_k non-zeros per row (0: in / 16),
    N(0, std) scaled so that the row keeps its variance.
    """
    shape = (out_features, in_features)
    if mode in ("orthogonal", "ortho_he"):
        B = nn.init.orthogonal_(torch.empty(shape, device="cpu"), generator=generator)
        return B * math.sqrt(2 * max(shape) / out_features) if mode == "ortho_he" else B
    B = std * torch.randn(shape, generator=generator, device="cpu")
    if mode == "sparse":
        k = min(sparse_k or max(1, in_features // 16), in_features)
        kept = torch.rand(shape, generator=generator, device="cpu").topk(k, dim=1).indices
        B *= math.sqrt(in_features / k) * torch.zeros(shape, device="cpu").scatter_(1, kept, 1.0)
    return B


def send_fixed(g, B):
    return g @ B.to(g.dtype)


def send_sign(g, W, magnitude):
    return g @ sign_feedback(W, magnitude).to(g.dtype)


def sign_feedback(W, magnitude):
    """sign(W) times a magnitude: a number, a matrix, or by default mean |W|, which is nearest to W."""
    return W.sign() * (W.abs().mean() if magnitude is None else magnitude)


class LocalLinear(nn.Linear):
    """nn.Linear whose input gets its gradient by `method`; with "bp" and "dfa" it is nn.Linear to the last bit.

    init_mode and sparse_k shape B ("fa"), sign_scale the magnitudes ("sign_sym": "mean", "init" or
    "frozen_magnitude"), std is the weights' (default: nn.Linear's own), seed makes B. `feedback`, B or the magnitudes,
    is saved. ValueError for names that do not exist.
    """

    def __init__(self, in_features, out_features, bias=True, method="bp", init_mode="gaussian", sparse_k=0,
                 sign_scale="mean", std=None, seed=0):  # fmt: skip
        super().__init__(in_features, out_features, bias)
        for value, known in ((method, METHODS), (init_mode, FA_INITS), (sign_scale, SIGN_SCALES)):
            if value not in known:
                raise ValueError(f"{value!r}: must be one of {', '.join(known)}")
        self.method, self.backprop = method, False
        std = 1 / math.sqrt(3 * in_features) if std is None else std
        generator, feedback = torch.Generator("cpu").manual_seed(seed), None
        if method == "fa":
            feedback = feedback_matrix(out_features, in_features, init_mode, std, sparse_k, generator)
        elif method == "sign_sym" and sign_scale == "frozen_magnitude":
            feedback = feedback_matrix(out_features, in_features, "gaussian", std, 0, generator).abs()
        elif method == "sign_sym" and sign_scale == "init":
            feedback = torch.tensor(std)
        if method in ("fa", "sign_sym"):
            self.register_buffer("feedback", None if feedback is None else feedback.to(self.weight))

    def forward(self, x):
        if self.method in ("bp", "dfa") or uses_backprop(self, x):
            return super().forward(x)
        y = super().forward(x.detach())
        if self.method == "fa":
            return SurrogateGradient.apply(y, x, send_fixed, self.feedback)
        return SurrogateGradient.apply(y, x, send_sign, self.weight, self.feedback)

    def error_weight(self):
        """What takes the place of W in the backward pass, in its shape."""
        if self.method == "sign_sym":
            return sign_feedback(whole(self.weight.detach()), self.feedback)
        return self.feedback if self.method == "fa" else whole(self.weight.detach())


def replace_linears(module, config, depth=""):
    """Make every nn.Linear inside `module` a LocalLinear by config.method, before the weights are initialised."""
    for name, child in module.named_children():
        path = f"{depth}.{name}" if depth else name
        if type(child) is not nn.Linear:
            replace_linears(child, config, path)
            continue
        std = 0.02 / math.sqrt(2 * config.n_layer) if name in ("c_proj", "o_proj") else 0.02
        linear = LocalLinear(
            child.in_features, child.out_features, child.bias is not None, config.method, config.fa_init_mode,
            config.fa_sparse_k, config.sign_sym_scale, std, seed=config.frozen_seed + zlib.crc32(path.encode()),
        )  # fmt: skip
        setattr(module, name, linear)


def check_sizes(config, weights):
    """`config`; ValueError if the weights are of another depth or width, before a model of any size is built."""
    depth = len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})
    sizes = {"wte": (config.vocab_size, config.n_embd), "wpe": (config.block_size, config.n_embd)}
    tables = {name: weights[f"transformer.{name}.weight"] for name in sizes if f"transformer.{name}.weight" in weights}
    if depth != config.n_layer or any(tuple(table.shape) != sizes[name] for name, table in tables.items()):
        shown = ", ".join(f"{name} {tuple(table.shape)}" for name, table in tables.items())
        raise ValueError(f"n_layer={config.n_layer} and {sizes}, but its weights have {depth} layers, {shown}")
    return config


def own_projections(weights, model):
    """A state dict as `model` has it: c_attn in parts and c_proj as o_proj where it has those, and its own feedback.

    Feedback is the model's if there is none among the weights, as in those of a model trained by backpropagation.
    Waves beside attention that were trained before they had spectral coordinates go on without: U = 0.
    """
    own = model.state_dict()
    late = {name: torch.zeros_like(t) for name, t in own.items() if name.endswith("medium.spectral.weight")}
    has_feedback = any(name.endswith(".feedback") for name in weights)
    split = {} if has_feedback else {name: t for name, t in own.items() if name.endswith(".feedback")}
    split = late | split
    for name, w in weights.items():
        stem, _, kind = name.rpartition(".")
        if f"{stem.rpartition('.')[0]}.q_proj.{kind}" not in own:
            split[name] = w
        elif stem.endswith("attn.c_attn"):
            names = [f"{stem[:-6]}{p}_proj.{kind}" for p in "qkv"]
            split |= {name: part.clone() for name, part in zip(names, w.split([len(own[name]) for name in names]))}
        elif stem.endswith("attn.c_proj"):
            split[f"{stem[:-6]}o_proj.{kind}"] = w
        else:
            split[name] = w
    return split


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser groups. Muon's orthogonal updates are for the weights of linear layers inside blocks whose two sides are at
# least n_embd wide; `parts` of a module names those that are several maps in one, which are orthogonalised apart.
# AdamW, without decay, takes all else: "embedding" (token, position and value tables), "head", and "vectors" (norms,
# biases, gains, gates, banks, coefficients, narrow matrices, everything outside of blocks).


def adamw_groups(model, weight_decay):
    """Groups for AdamW: matrices decay; vectors and scalars (norms, biases, gains) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def muon_groups(model, rates, weight_decay):
    """Groups for `Muon`, each trainable parameter in one; rates: {"matrices", "embedding", "head", "vectors"}."""
    splits = {}
    for module in model.transformer.h.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= model.config.n_embd:
                splits[child.weight] = getattr(module, "parts", {}).get(name, ())
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} | {*model.transformer.wte.parameters()}
    heads = {p for part in (model.lm_head, model.head, model.aux) if part is not None for p in part.parameters()}
    groups = {role: {"role": role, "params": [], "lr": rate, "weight_decay": 0.0} for role, rate in rates.items()}
    for p in model.parameters():
        if p.requires_grad:
            role = "embedding" if p in tables else "head" if p in heads else "matrices" if p in splits else "vectors"
            groups[role]["params"].append(p)
    groups["matrices"] |= {"weight_decay": weight_decay, "splits": [splits[p] for p in groups["matrices"]["params"]]}
    return [group for group in groups.values() if group["params"]]


# ---------------------------------------------------------------------------------------------------------------------
# Activations and norms with surrogate gradients, whose backward leaves something out; z = (x - mean) / sigma.
#   ste_sigmoid, ste_gelu: dx = dy. ln_mode, with g = dy w: "ste" dx = dy, "center_scale" dx = (g - mean g) / sigma,
#   "projected" dx = (g - mean g - z mean(g z)) / sigma, which is the exact gradient: it is here to be compared with.
# Gains and biases of norms get exact gradients in every mode. Straight-through: Bengio et al. 2013, arXiv 1308.3432.


class SigmoidSTE(nn.Module):
    """sigmoid(x), any shape; the backward leaves out y (1 - y)."""

    backprop = False

    def forward(self, x):
        return x.sigmoid() if uses_backprop(self, x) else straight_through(x, x.detach().sigmoid())


class GELUSTE(nn.Module):
    """gelu(x), exact form, any shape; the backward leaves out gelu'(x)."""

    backprop = False

    def forward(self, x):
        return F.gelu(x) if uses_backprop(self, x) else straight_through(x, F.gelu(x.detach()))


class LayerNormSTE(nn.LayerNorm):
    """Layer norm whose gradient passes through unchanged."""

    backprop = False

    def forward(self, x):
        if uses_backprop(self, x):
            return super().forward(x)
        return SurrogateGradient.apply(super().forward(x.detach()), x, pass_through)


def center_scale(g, z, rstd, weight):
    g = g if weight is None else g * weight
    return (g - g.mean(-1, keepdim=True)) * rstd


def project_out(g, z, rstd, weight):
    g = g if weight is None else g * weight
    return (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)) * rstd


class LayerNormCenterScale(LayerNormSTE):
    """Layer norm whose gradient is centred and divided by sigma."""

    rule = staticmethod(center_scale)

    def forward(self, x):
        if uses_backprop(self, x):
            return self.scale_and_shift(F.layer_norm(x, self.normalized_shape, eps=self.eps))
        z, _, rstd = torch.native_layer_norm(x.detach(), self.normalized_shape, None, None, self.eps)
        return SurrogateGradient.apply(self.scale_and_shift(z), x, self.rule, z, rstd, self.weight)

    def scale_and_shift(self, z):
        """By gain and bias, apart from the norm, so that both ways above give the same numbers to the last bit."""
        y = z if self.weight is None else z * self.weight
        return y if self.bias is None else y + self.bias


class LayerNormProjectedSurrogate(LayerNormCenterScale):
    """Layer norm whose gradient loses its components along 1 and z: the exact gradient, written by hand."""

    rule = staticmethod(project_out)


NORMS = {
    "bp": nn.LayerNorm,
    "ste": LayerNormSTE,
    "center_scale": LayerNormCenterScale,
    "projected": LayerNormProjectedSurrogate,
}


# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention with a local backward (fuse_attn_local): A = softmax(S), O = A V, and for a gradient dO,
#   dS = A (<dO, V_j> - <dO, O>), dV = A^T dO: what autograd computes, each row from its own numbers alone.
# O(T^2) with T x T matrices in memory. The second term is FlashAttention's D (Dao et al. 2022, arXiv 2205.14135).


class SoftmaxValueMixLocal(torch.autograd.Function):
    """softmax(S) V; scores S (..., T, n) with -inf for masked keys, V (..., n, hs) -> (..., T, hs)."""

    @staticmethod
    def forward(S, V):
        A = S.softmax(-1)
        return A @ V, A

    @staticmethod
    def setup_context(ctx, inputs, output):
        O, A = output
        ctx.mark_non_differentiable(A)
        ctx.save_for_backward(inputs[1], O, A)

    @staticmethod
    def backward(ctx, dO, _):
        V, O, A = ctx.saved_tensors
        dS = (dO @ V.mT).sub_((dO * O).sum(-1, keepdim=True)).mul_(A)
        return dS, A.mT @ dO


def local_attention(q, k, v):
    """Causal softmax attention, q, k, v (B, nh, T, hs), through SoftmaxValueMixLocal."""
    (B, nh, T, hs), (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
    mask = q.new_full((T, T), -torch.inf).triu(1)
    return SoftmaxValueMixLocal.apply(torch.baddbmm(mask, q, k.mT, alpha=hs**-0.5), v)[0].view(B, nh, T, hs)


# ---------------------------------------------------------------------------------------------------------------------
# Direct feedback alignment: the stream is cut (detached) after every sublayer's or block's output but the last, so a
# segment between cuts learns by itself from the gradient that `BroadcastError` gives to the end of it: e B_l, with e
# (B, T, C) the gradient at the final hidden state and B one random tensor, entries U(-1, 1) / sqrt(C). Gradients inside
# a segment and of the head are exact. dfa_feedback="skip" is the control without B: each cut gets e itself, which is
# what the uncut residual stream alone would bring. Cost: one C x C product per cut; no segment waits for another.
# Sources: Nokland 2016, arXiv 1609.01596; Launay et al. 2020, arXiv 2006.12878.


class BroadcastError(torch.autograd.Function):
    """h (B, T, C), unchanged; its gradient e goes to h as it is, and to cut l as e B[l], or as e where B is None."""

    @staticmethod
    def forward(h, B, *cuts):
        return h.view_as(h)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, B, *cuts = inputs
        ctx.save_for_backward(B)
        ctx.n_cuts = len(cuts)

    @staticmethod
    def backward(ctx, e):
        (B,) = ctx.saved_tensors
        return e, None, *((e @ B[l].to(e.dtype) if B is not None else e) for l in range(ctx.n_cuts))


Join = BroadcastError  # as the system that it comes from calls it


class DirectFeedback(nn.Module):
    """Where a model is cut and the feedback to these cuts, (cuts, C, C), saved; None for the "skip" control."""

    def __init__(self, config):
        super().__init__()
        self.backprop = False
        self.places = ("sublayer", "block") if config.dfa_granularity == "sublayer" else ("block",)
        self.n_cuts = config.n_layer * len(self.places) - 1
        feedback = None
        if config.dfa_feedback == "matrix":
            shape, generator = (self.n_cuts, config.n_embd, config.n_embd), torch.Generator("cpu")
            generator.manual_seed(config.frozen_seed)
            feedback = 2 * torch.rand(shape, generator=generator, device="cpu") - 1
            feedback /= math.sqrt(config.n_embd)
        self.register_buffer("feedback", feedback)

    def begin(self, run):
        if run.targets is not None and not self.backprop:
            run.cuts = []
            run.cut = detach_and_record(run.cuts, self.places)

    def final_norm(self, norm, x, run):
        """norm(x), whose gradient also goes to what was cut in this pass; the control broadcasts the stream's own."""
        if not run.cuts:
            return norm(x)
        if self.feedback is None:
            return norm(BroadcastError.apply(x, None, *run.cuts))
        return BroadcastError.apply(norm(x), self.feedback, *run.cuts)


def detach_and_record(cuts, places):
    """A function that at these places keeps the stream x in the list `cuts` and returns it without its past."""

    def cut(x, where):
        if where not in places:
            return x
        cuts.append(x)
        return x.detach()

    return cut


# ---------------------------------------------------------------------------------------------------------------------
# GrAPE: feedback learns the Jacobian J that it stands for, without W^T. Every fa_grape_every optimiser steps, random
# probes p give M = mean (J p) p^T, whose expectation is J, and B takes one gradient step on 1 - cos(B, M), its columns
# keeping their norms. fa: J p = W p. dfa: J maps cut to final hidden state of the same token, by one forward-mode pass
# for all cuts at once (their probes are independent) over up to n_probe of the step's sequences.
# Cost of a dfa probe: about three forwards of n_probe sequences. Caillon et al. 2026, openreview kasbbmwk3s; the mean
# over probes and the step in units of |B| are ours.


def turn_towards(B, M, rate):
    """One step down 1 - cos(B, M), rate in units of |B|, in place; zeros of B stay, columns keep their norms."""
    norms = B.norm(dim=0)
    M = M * (B != 0)
    B_hat, M_hat = B / B.norm().clamp(min=1e-12), M / M.norm().clamp(min=1e-12)
    turned = B_hat + rate * (M_hat - (B_hat * M_hat).sum() * B_hat)
    B.copy_(turned * (norms / turned.norm(dim=0).clamp(min=1e-12)))


class Grape(nn.Module):
    """GrAPE's clock and probes, and the steps of true backpropagation that fa_calibrate_every asks for.

    Acts once per optimiser step, through hooks. Probes come from a generator seeded by the step, and the sequences from
    a hash, so that every process draws the same and any split of a batch gives the same feedback.
    """

    def __init__(self, config):
        super().__init__()
        self.every = config.fa_grape_every if config.fa_grape else 0
        self.calibrate_every, self.rate = config.fa_calibrate_every, config.fa_grape_lr
        self.n_probe, self.seed, self.step = config.fa_grape_n_probe, config.frozen_seed, 0
        self.is_listening = False
        if self.every and config.method == "dfa":
            generator = torch.Generator("cpu").manual_seed(self.seed)
            factors = torch.randint(1, 2**31, (config.block_size,), generator=generator, device="cpu")
            self.register_buffer("factors", factors, persistent=False)  # for the hash
            tokens = torch.full((self.n_probe, config.block_size), -1, device="cpu")
            self.register_buffer("probe_tokens", tokens, persistent=False)  # a row of -1 is free
            self.is_listening = True

    def get_extra_state(self):
        return torch.tensor(self.step)

    def set_extra_state(self, state):
        self.step = int(state)

    def chosen(self, rows):
        """The n_probe of rows (n, block_size) with the largest hash: from parts' choices follows that of the whole."""
        score = torch.where(rows[:, 0] < 0, -1, (rows * self.factors).sum(1) % (2**31 - 1))
        return rows[score.topk(self.n_probe).indices]

    def begin(self, run):
        if self.is_listening and run.training:
            self.observe(run.idx)

    @torch.no_grad()
    def observe(self, idx):
        """Keep some of the sequences idx (B, T) for the next probe."""
        idx = idx[:, : self.probe_tokens.size(1)]
        idx = F.pad(idx, (0, self.probe_tokens.size(1) - idx.size(1)))
        self.probe_tokens.copy_(self.chosen(torch.cat((self.probe_tokens, idx))))

    def attach(self, optimizer, model):
        """Align feedback before, and count after, each step of `optimizer`."""

        def is_due():
            return self.every > 0 and self.step % self.every == 0

        def prepare():
            self.is_listening = is_due() and model.dfa is not None
            set_backprop(model, self.calibrate_every > 0 and (self.step + 1) % self.calibrate_every == 0)

        @torch.no_grad()
        def pre(optimizer, args, kwargs):
            if is_due():
                generator = torch.Generator("cpu").manual_seed(self.seed + 1 + self.step)
                (self.align_cuts if model.dfa is not None else self.align_layers)(model, generator)

        def post(optimizer, args, kwargs):
            self.step += 1
            prepare()

        prepare()
        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)

    def align_layers(self, model, generator):
        for layer in (m for m in model.modules() if isinstance(m, LocalLinear) and m.method == "fa"):
            p = torch.randn(layer.in_features, self.n_probe, generator=generator, device="cpu").to(layer.weight)
            turn_towards(layer.feedback, (layer.weight @ p) @ p.T, self.rate)

    def align_cuts(self, model, generator):
        tokens = self.probe_tokens
        if has_processes():
            parts = [torch.empty_like(tokens) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, tokens)
            tokens = self.chosen(torch.cat(parts))
        tokens = tokens[tokens[:, 0] >= 0, : model.config.block_size]  # a copy
        self.probe_tokens.fill_(-1)
        for B, M in zip(model.dfa.feedback, cut_jacobians(model, tokens, generator) if len(tokens) else ()):
            turn_towards(B, M, self.rate)


def perturbed_hidden(model, x, run, *nudges):
    """The final hidden state (B, T, C) of embedded tokens x with nudges[l] (B, T, C) added at cut l."""
    nudge = iter(nudges)
    run.cut = lambda x, where: x + next(nudge) if where in model.dfa.places else x
    return model.transformer.ln_f(model.trunk(x, run))


def cut_jacobians(model, tokens, generator):
    """Estimates of the sum over tokens (B, T) of d hidden_t / d cut_lt, (C, C) per cut, up to one common factor."""
    B, T, C = *tokens.shape, model.config.n_embd
    weight = model.lm_head.weight
    probes = [torch.randn(B, T, C, generator=generator, device="cpu").to(weight) for _ in range(model.dfa.n_cuts)]
    training = model.training
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        nudges = tuple(torch.zeros_like(p) for p in probes)  # perturbations, all zero
        with torch.no_grad():
            run = Pass(tokens)
            x = model.embed(run)  # before all cuts, and not all of it has forward mode
        _, Jp = torch.func.jvp(partial(perturbed_hidden, model, x, run), nudges, tuple(probes))
    model.train(training)
    return [Jp.flatten(0, 1).T @ p.flatten(0, 1) for p in probes]


# ---------------------------------------------------------------------------------------------------------------------
# How learning rules are measured: the angle between W and what replaces it in the backward pass (degrees), and, on one
# batch, the cosine between each weight's local gradient and the true one; a layer descends where that is positive.


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def feedback_angles(model):
    """{layer: degrees between W and its feedback} of every layer whose gradients go through something else."""
    local = {n: m for n, m in model.named_modules() if isinstance(m, LocalLinear) and m.method in ("fa", "sign_sym")}
    cosines = {n: cosine(m.error_weight(), whole(m.weight)) for n, m in local.items()}
    return {n: math.degrees(math.acos(max(-1.0, min(1.0, c)))) for n, c in cosines.items()}


def gradient_cosines(model, idx, targets):
    """{layer: cosine between the local gradient of its weight and the true one} on a batch, in evaluation mode."""
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
    training = model.training
    model.eval()
    local = torch.autograd.grad(model(idx, targets)[1], list(weights.values()))
    with backpropagation(model):
        true = torch.autograd.grad(model(idx, targets)[1], list(weights.values()))
    model.train(training)
    return {n: cosine(a, b) for n, a, b in zip(weights, local, true)}


def alignment(model, idx=None, targets=None):
    """What the log shows: mean angle, and with a probe batch the mean cosine and the share of layers that descend."""
    report, angles = {}, feedback_angles(model)
    if angles:
        report = {"angle": sum(angles.values()) / len(angles)} | {f"angle/{n}": a for n, a in angles.items()}
    if idx is not None:
        cosines = gradient_cosines(model, idx, targets)
        report["cosine"] = sum(cosines.values()) / len(cosines)
        report["descends"] = sum(c > 0 for c in cosines.values()) / len(cosines)
        report |= {f"cosine/{n}": c for n, c in cosines.items()}
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Limits on what a vector may hold, (..., C) -> (..., C): k winners by magnitude (also in the MLP), a frozen subspace,
# K directions, lattice points. On the residual stream they follow every block, and all blocks share them. The subspace
# comes last: whatever else is on, the stream lies in it.
# Cost per token: O(C) for winners, 4 r C FLOPs for a subspace, 2 K C for K directions. k winners: Ahmad & Scheinkman
# 2019, arXiv 1903.11257; directions: van den Oord et al. 2017, arXiv 1711.00937, with codes that stay random.


class HardTopK(nn.Module):
    """The k largest magnitudes of x (..., C), exactly k on ties, and 0 elsewhere; gradients pass where values do."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x):
        kept = x.detach().abs().topk(min(self.k, x.size(-1)), dim=-1, sorted=False).indices
        return x * torch.zeros_like(x).scatter_(-1, kept, 1.0)


class FrozenSubspace(nn.Module):
    """x (..., C) projected onto a random r-dimensional subspace; gradients are projected too."""

    def __init__(self, n_embd, rank, seed=0):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        basis = nn.init.orthogonal_(torch.empty(n_embd, rank, device="cpu"), generator=generator)
        self.register_buffer("basis", basis)  # (C, r), orthonormal columns

    def forward(self, x):
        return x @ self.basis.to(x.dtype) @ self.basis.T.to(x.dtype)

    def flops(self):
        return 4 * self.basis.numel()


class VQResidualDir(nn.Module):
    """|x| times the nearest of K frozen unit vectors, x (..., C); the gradient passes unchanged."""

    def __init__(self, n_embd, codes, seed=0):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        codes = torch.randn(codes, n_embd, generator=generator, device="cpu")
        self.register_buffer("codes", F.normalize(codes, dim=1))  # (K, C)

    def forward(self, x):
        codes, v = self.codes.to(x.dtype), x.detach()
        nearest = (v @ codes.T).argmax(-1)
        return straight_through(x, v.norm(dim=-1, keepdim=True) * codes[nearest])

    def flops(self):
        return 2 * self.codes.numel()


class E7Quantizer(nn.Module):
    """scale times the nearest E7 point to x / scale, in groups of 7; straight-through for x, exact for scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.01))  # embeddings start at 0.02 per channel: a few cells wide

    def forward(self, x):
        u = x / self.scale
        point = e7_lattice_round(u.detach().unflatten(-1, (-1, 7))).flatten(-2)
        return straight_through(u, point) * self.scale


class ResidualLimits(nn.ModuleDict):
    """Limits by name, in the order in which they apply; a list has one for each of the blocks."""

    def __init__(self, parts, blocks):
        super().__init__(parts)
        self.blocks = blocks

    def flops_per_token(self, T):
        """Forward FLOPs of all blocks, which share what is no list."""
        each = [part[0] if isinstance(part, nn.ModuleList) else part for part in self.values()]
        return self.blocks * sum(part.flops() for part in each if hasattr(part, "flops"))

    def forward(self, x, block):
        for part in self.values():
            x = part[block](x) if isinstance(part, nn.ModuleList) else part(x)
        return x


def codebooks(config):
    """The directions of all blocks, or a list of each block's; the first block's are those that all would share."""
    seeds = [config.frozen_seed + 1 + block for block in range(config.n_layer if config.vq_per_block else 1)]
    books = [VQResidualDir(config.n_embd, config.vq_codes, seed) for seed in seeds]
    return nn.ModuleList(books) if config.vq_per_block else books[0]


def residual_limits(config):
    """What config puts on the residual stream after each block, or None."""
    parts = {}
    if config.resid_topk:
        parts["topk"] = HardTopK(config.resid_topk)
    if config.vq_codes:
        parts["vq"] = codebooks(config)
    if config.vq_lattice == "e7":
        parts["lattice"] = E7Quantizer()
    if config.subspace_rank:
        parts["subspace"] = FrozenSubspace(config.n_embd, config.subspace_rank, config.frozen_seed)
    return ResidualLimits(parts, config.n_layer) if parts else None


# ---------------------------------------------------------------------------------------------------------------------
# HTM-style meta-updates: columns (attention heads, and groups of 64 hidden units) that predict well learn faster.
#   success_c <- decay success_c + (1 - decay) sum_t a_ct [loss_t < its running mean] / sum_t a_ct, with a_ct >= 0 the
#   activity of column c at token t; c's update is scaled by 1 + strength tanh(z_c), z_c = success_c standardised over
#   the columns. Counted in forward, summed over processes, applied once an optimiser step by hooks on the optimiser.
# Cost: a copy of the columns' weights during the step. After Hawkins & Ahmad 2016 (HTM), where active cells that
# predicted right are reinforced; the rule here is ours. Activity is measured on what goes into each c_proj.

HTM_GROUP = 64  # hidden units of an MLP that make one column


class ColumnMeta(nn.Module):
    def __init__(self, config, blocks):
        super().__init__()
        self.strength, self.decay, self.target = (
            config.htm_meta_strength, config.htm_meta_decay, config.htm_meta_target,
        )  # fmt: skip
        heads, groups = config.n_head, 4 * config.n_embd // HTM_GROUP
        self.sizes = [heads, groups] * config.n_layer
        self.register_buffer("success", torch.full((sum(self.sizes),), 0.5))
        self.register_buffer("mean_loss", torch.tensor(math.log(config.vocab_size)))
        self.register_buffer("counted", torch.zeros(2, sum(self.sizes) + 1))  # sums over tokens: good, all; last: loss
        self.activity = [None] * len(self.sizes)  # (B, T, columns) of each sublayer in the last training forward
        for layer, block in enumerate(blocks):
            block.attn.c_proj.register_forward_pre_hook(partial(self.watch_heads, 2 * layer))
            block.mlp.c_proj.register_forward_pre_hook(partial(self.watch_groups, 2 * layer + 1))

    def watch_heads(self, sublayer, c_proj, inputs):
        """Keep how active each attention head was, by token: the norm of its part of c_proj's input (B, T, C)."""
        if self.training:
            y = inputs[0].detach().float()
            self.activity[sublayer] = y.unflatten(-1, (self.sizes[sublayer], -1)).norm(dim=-1)

    def watch_groups(self, sublayer, c_proj, inputs):
        """Keep how active each group of hidden units was, by token: the mean magnitude of c_proj's input (B, T, 4C)."""
        if self.training:
            self.activity[sublayer] = inputs[0].detach().float().abs().unflatten(-1, (-1, HTM_GROUP)).mean(-1)

    def begin(self, run):
        if run.training and run.targets is not None:
            run.on_token_loss = self.observe

    @torch.no_grad()
    def observe(self, token_loss, targets):
        """Count a micro-batch, whose activity the hooks kept: token_loss and targets (B T,), -1 without a target."""
        activity, known = torch.cat(self.activity, -1).flatten(0, -2), targets != -1
        good = (token_loss < self.mean_loss) & known
        weighted = activity * known[:, None]
        good = torch.cat(((weighted * good[:, None]).sum(0), (token_loss * known).sum()[None]))
        self.counted += torch.stack((good, torch.cat((weighted.sum(0), known.sum()[None]))))

    @torch.no_grad()
    def apply_counts(self):
        """Move the running means by what all processes counted since the last step."""
        all_reduce(self.counted)
        fresh = self.counted[0] / self.counted[1].clamp(min=1e-12)
        fresh = torch.where(self.counted[1] > 0, fresh, torch.cat((self.success, self.mean_loss[None])))
        self.success.lerp_(fresh[:-1], 1 - self.decay)
        self.mean_loss.lerp_(fresh[-1], 1 - self.decay)
        self.counted.zero_()

    def multipliers(self):
        """Each column's factor in [1 - strength, 1 + strength], one tensor per sublayer, attention and MLP in turn."""
        z = (self.success - self.success.mean()) / self.success.std().clamp(min=1e-4)
        factor = 1 + self.strength * torch.tanh(z)
        return factor.split(self.sizes)

    def attach(self, optimizer, model):
        """Scale, from now on, what `optimizer` does to the columns of the model's blocks."""
        before = {}

        def scaled():
            """(parameter, factors that broadcast to it) of everything that belongs to a column."""
            factors = iter(self.multipliers())
            for block in model.transformer.h:
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
                if p in optimizer.state:  # not before its first step, and not where it is frozen
                    beta1 = optimizer.param_groups[0]["betas"][0]  # beta1 times the factor stays below 1
                    optimizer.state[p]["exp_avg"] *= factor.clamp(max=0.999 / beta1)

        @torch.no_grad()
        def post(optimizer, args, kwargs):
            for p, factor in scaled() if self.target == "lr" else ():
                p.copy_(before.pop(p).lerp(p, factor.expand_as(p)))

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the next token from its logits.


def check_sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, repetition_window):
    """Refuse settings out of range with a ValueError that names one; nan is out of every range."""
    good = {
        "max_new_tokens": max_new_tokens >= 0,
        "temperature": temperature == 0 or temperature >= 1e-6,  # below, float32 logits overflow
        "top_k": top_k is None or top_k >= 1,
        "top_p": top_p is None or 0 < top_p <= 1,
        "min_p": min_p is None or 0 <= min_p <= 1,
        "repetition_penalty": 1e-6 <= repetition_penalty <= 1e6,  # nor with a temperature of 1e-6
        "repetition_window": repetition_window is None or repetition_window >= 0,
    }
    ranges = {"temperature": "0 or above 1e-6", "top_k": ">= 1", "top_p": "in (0, 1]", "min_p": "in [0, 1]"}
    ranges |= {"repetition_penalty": "1e-6 to 1e6"}
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
        beyond[:, 0] = False  # however small top_p is
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    probs = logits.softmax(-1)
    if min_p is not None:
        probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
    return torch.multinomial(probs, 1, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's directories: ours, which lab/export.py writes, and GPT-2's. OpenAI's linear maps are Conv1D, (in, out):
# four are transposed on the way in and out.

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}


EXPORTED = "nanochimera"  # model_type in config.json


def is_exported(directory):
    """Whether a directory has a config.json that `export_hf` wrote for a model that is no GPT-2."""
    file = Path(directory, "config.json")
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as e:
        raise ValueError(f"{file}: damaged, {e}") from e
    return isinstance(found, dict) and found.get("model_type") == EXPORTED


def read_exported(directory):
    """The weights and flags in such a directory, as in a checkpoint; needs `safetensors`. ValueError for damage."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    flags = json.loads(Path(directory, "config.json").read_text(encoding="utf-8")).get("flags")
    file = Path(directory, "model.safetensors")
    if not isinstance(flags, dict) or not file.is_file():
        raise ValueError("config.json has no flags" if file.is_file() else "has no model.safetensors")
    try:
        weights = {name.removeprefix("gpt."): value for name, value in load_file(file).items()}
    except (SafetensorError, ValueError) as e:
        raise ValueError(f"{file}: damaged, {e}") from e
    if flags.get("tie_weights") and "transformer.wte.weight" in weights:  # one matrix, written once
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"model": weights, "model_args": flags}


def transpose_conv1d(weights):
    return {k: v.t() if k.endswith(CONV1D) else v for k, v in weights.items()}


def read_gpt2(name_or_dir):
    """(arguments of GPTConfig, state dict) of a GPT-2; needs `transformers`.

    name_or_dir: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or a local Hugging Face directory. ValueError for
    anything that is not plain GPT-2, OSError if it cannot be read or downloaded.
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
    return args, transpose_conv1d(hf.state_dict())


def beyond_gpt2(c):
    """The flags of a GPTConfig that GPT-2 does not have; [] for a plain model."""
    shared = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "loss_chunk")
    plain = GPTConfig(**{name: getattr(c, name) for name in shared})
    flags = [f.name for f in fields(c) if f.name != "mlp_act" and getattr(c, f.name) != getattr(plain, f.name)]
    return flags + ([] if c.mlp_act in HF_ACTIVATIONS else ["mlp_act"])


def write_gpt2(model, directory):
    """Write a plain model as GPT-2 (config.json and safetensors); missing biases as zeros. Needs `transformers`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    if flags := beyond_gpt2(c):
        raise ValueError(f"GPT-2 has no {', '.join(flags)}")
    hf = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function=HF_ACTIVATIONS[c.mlp_act], bos_token_id=None, eos_token_id=None,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
    ))  # fmt: skip
    zeros = {k: torch.zeros_like(v) for k, v in hf.state_dict().items() if k.endswith(".bias")}
    hf.load_state_dict(zeros | transpose_conv1d(model.state_dict()))
    hf.save_pretrained(directory)


# ---------------------------------------------------------------------------------------------------------------------
# Names that others import from here, though the model itself does not use them.

E7_STAGES, e7_roots, e7_representation, e7_coset = e7.STAGES, e7.e7_roots, e7.e7_representation, e7.e7_coset
linking_number, gauss_linking_integral = knots.linking_number, knots.gauss_linking_integral
ramanujan_sum, PRIME_POWERS = ramanujan.ramanujan_sum, ramanujan.PRIME_POWERS
KnotAttention = KnotGate  # as the system that it comes from calls it
