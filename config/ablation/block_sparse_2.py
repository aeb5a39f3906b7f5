# A token sees its own cell and the two before it.
out_dir = "out-ablation/block_sparse_2"
use_block_sparse = True
neighbor_rings = 2
use_ferope = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
