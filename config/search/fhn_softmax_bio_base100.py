# fhn_softmax_bio with rotations for a context of 64 tokens.
out_dir = "out-search/fhn_softmax_bio_base100"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
rope_base = 100.0
