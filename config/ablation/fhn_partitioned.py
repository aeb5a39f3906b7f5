# Waves whose channels are scaled in groups of balanced stimulus.
out_dir = "out-ablation/fhn_partitioned"
attn_mode = "fhn"
use_fhn_partitioning = True
