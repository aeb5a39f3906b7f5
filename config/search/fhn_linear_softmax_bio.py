# fhn_softmax_bio with the waves' linear limit.
out_dir = "out-search/fhn_linear_softmax_bio"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
fhn_dynamics = "linear"
