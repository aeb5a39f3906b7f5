# Own and previous cell, and a gated mean of the nearby regions' past.
out_dir = "out-ablation/region_feedback"
use_block_sparse = True
use_ferope = True
region_size = 2
use_region_feedback = True
feedback_hops = 2
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
