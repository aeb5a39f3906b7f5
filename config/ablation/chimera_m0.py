# The winner of the first search, on nanoGPT's own block (docs/log.md): the lowest loss that any combination reached
# there, with 1.01 times the baseline's parameters. One layer of a gated scan, then two layers of attention with RoPE.
# Oscillators, at three times the published frequency, replace GELU. Three layers of 148 channels replace four of 128.
out_dir = "out-ablation/chimera_m0"
n_layer, n_head, n_embd = 3, 2, 148
attn_pattern = "fhn,softmax,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
bio_omega = 3.0
learning_rate = 3e-3
