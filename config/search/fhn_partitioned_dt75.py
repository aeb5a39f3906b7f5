# Partitioned waves with a step of 0.75.
out_dir = "out-search/fhn_partitioned_dt75"
attn_mode = "fhn"
use_fhn_partitioning = True
fhn_dt = 0.75
