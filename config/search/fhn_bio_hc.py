# Waves, oscillators, two residual streams that mix freely.
out_dir = "out-search/fhn_bio_hc"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
use_mhc = True
hc_mode = "hc"
mhc_streams = 2
