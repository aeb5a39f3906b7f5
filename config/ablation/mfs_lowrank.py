# The facets' projections of rank 16.
out_dir = "out-ablation/mfs_lowrank"
use_mfs_head = True
mfs_lowrank_r = 16
