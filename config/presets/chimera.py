# The winner of the search (docs/log.md): on nanoGPT's CPU recipe, with 1.01 times its parameters, the
# lowest loss of what was tried. A gated scan, then two layers of attention with RoPE; oscillators of three times the
# published frequency in place of GELU; three layers of 148 for four of 128.
# python train.py config/train_shakespeare_char_cpu.py config/presets/chimera.py
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-chimera"
n_layer, n_head, n_embd = 3, 2, 148
attn_pattern = "fhn,softmax,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
bio_omega = 3.0
learning_rate = 3e-3
