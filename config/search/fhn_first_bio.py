# A layer of waves, three of attention with RoPE, and oscillators.
out_dir = "out-search/fhn_first_bio"
attn_pattern = "fhn,softmax,softmax,softmax"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
