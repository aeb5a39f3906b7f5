# Linear waves and attention in turn; oscillators.
out_dir = "out-search/linear_alternating"
attn_pattern = "fhn,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
