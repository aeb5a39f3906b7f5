# fhn_softmax_bio on two residual streams that mix freely.
out_dir = "out-search/fhn_softmax_bio_hc"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_mhc = True
hc_mode = "hc"
mhc_streams = 2
