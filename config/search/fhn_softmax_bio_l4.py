# fhn_softmax_bio with the auto-encoder's losses.
out_dir = "out-search/fhn_softmax_bio_l4"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
add_l4_losses = True
