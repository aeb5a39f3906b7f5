# The control for knots: own and previous cell, the position table alone.
out_dir = "out-ablation/block_sparse_1_table"
use_block_sparse = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
