# fhn_softmax_bio with heads of 16.
out_dir = "out-search/fhn_softmax_bio_8_heads"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_head = 8
