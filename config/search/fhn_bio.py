# Waves and oscillators.
out_dir = "out-search/fhn_bio"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
