# Waves and attention with RoPE in turn, and oscillators.
out_dir = "out-search/fhn_alternating_bio"
attn_pattern = "fhn,softmax"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
