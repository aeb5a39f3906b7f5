# fhn_softmax_bio with a low-rank mixture of softmaxes for its head.
out_dir = "out-search/fhn_softmax_bio_mfs"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_mfs_head = True
mfs_K = 2
mfs_P = 1
mfs_lowrank_r = 16
