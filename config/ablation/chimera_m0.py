# The winner of the first search, on nanoGPT's own block (docs/log.md): with 1.01 times its parameters the lowest loss
# of what was tried there. A gated scan, then two layers of attention with RoPE; oscillators of three times the
# published frequency in place of GELU; three layers of 148 for four of 128.
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
