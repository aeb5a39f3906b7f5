# The waves' linear limit and oscillators.
out_dir = "out-search/fhn_linear_bio"
attn_mode = "fhn"
fhn_dynamics = "linear"
use_bio_mlp = True
bio_threshold = 0.0
