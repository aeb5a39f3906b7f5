# Waves and oscillators, deeper and narrower at equal parameters.
out_dir = "out-search/fhn_bio_6x104"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 6
n_embd = 104
