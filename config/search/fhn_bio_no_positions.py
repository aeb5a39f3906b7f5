# Waves and oscillators, which need no positions.
out_dir = "out-search/fhn_bio_no_positions"
attn_mode = "fhn"
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
