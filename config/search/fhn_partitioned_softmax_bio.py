# fhn_softmax_bio, waves partitioned.
out_dir = "out-search/fhn_partitioned_softmax_bio"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_fhn_partitioning = True
