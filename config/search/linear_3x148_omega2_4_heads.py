# linear_3x148_omega2 with four heads, of which RoPE turns 36 of 37 dimensions.
out_dir = "out-search/linear_3x148_omega2_4_heads"
attn_pattern = "fhn,softmax,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 3
n_embd = 148
n_head = 4
bio_omega = 2.0
