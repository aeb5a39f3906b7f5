# Waves, oscillators, each block's output a sum of all so far.
out_dir = "out-search/fhn_bio_mla"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
use_mla = True
