# A token sees its own cell only.
out_dir = "out-ablation/block_sparse_0"
use_block_sparse = True
neighbor_rings = 0
use_ferope = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
