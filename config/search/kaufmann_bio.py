# Kaufmann attention with RoPE, and oscillators.
out_dir = "out-search/kaufmann_bio"
attn_mode = "kaufmann"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
