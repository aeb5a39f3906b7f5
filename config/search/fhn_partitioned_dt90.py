# Partitioned waves with a step of 0.90.
out_dir = "out-search/fhn_partitioned_dt90"
attn_mode = "fhn"
use_fhn_partitioning = True
fhn_dt = 0.90
