# fhn_softmax_bio, each block's output a sum of all so far.
out_dir = "out-search/fhn_softmax_bio_mla"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_mla = True
