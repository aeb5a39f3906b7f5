# Rotary phases from each cell's anchor, dense attention; the position table stays.
out_dir = "out-ablation/ferope_anchored"
use_ferope = True
ferope_anchor_relative = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
