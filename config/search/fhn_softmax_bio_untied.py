# fhn_softmax_bio with an output embedding of its own.
out_dir = "out-search/fhn_softmax_bio_untied"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
tie_weights = False
