# Partitioned waves and oscillators.
out_dir = "out-search/fhn_partitioned_bio"
attn_mode = "fhn"
use_fhn_partitioning = True
use_bio_mlp = True
bio_threshold = 0.0
