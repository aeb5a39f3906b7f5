# Own and previous cell, and the regions of 2 cells that are 1 and 2 regions back.
out_dir = "out-ablation/region_edges"
use_block_sparse = True
use_ferope = True
region_size = 2
region_edges = 2
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
