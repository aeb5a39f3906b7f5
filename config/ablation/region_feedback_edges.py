# Regions as in region_feedback.py, with feedback between chosen ones too: the third reads the first.
out_dir = "out-ablation/region_feedback_edges"
use_block_sparse = True
use_ferope = True
region_size = 1
use_region_feedback = True
region_feedback_edges = "0>2"
anchor_min_gap, anchor_jitter = 12, 6  # cells of about 15: at least three regions of 64 tokens
