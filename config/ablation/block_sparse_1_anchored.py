# Own and previous cell, rotary phases from each cell's anchor.
out_dir = "out-ablation/block_sparse_1_anchored"
use_block_sparse = True
neighbor_rings = 1
use_ferope = True
ferope_anchor_relative = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
