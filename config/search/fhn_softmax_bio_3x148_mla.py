# fhn_softmax_bio_3x148, each block's output a sum of all so far.
out_dir = "out-search/fhn_softmax_bio_3x148_mla"
attn_pattern = "fhn,softmax,softmax"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 3
n_embd = 148
n_head = 2
use_mla = True
