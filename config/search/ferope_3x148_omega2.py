# The control of linear_3x148_omega2: attention with RoPE everywhere.
out_dir = "out-search/ferope_3x148_omega2"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 3
n_embd = 148
n_head = 2
bio_omega = 2.0
