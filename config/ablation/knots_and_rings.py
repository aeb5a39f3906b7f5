# Knots over Poisson-disk cells, with a ring, and rotary positions.
out_dir = "out-ablation/knots_and_rings"
use_knot_attention = True
use_block_sparse = True
use_ferope = True
anchor_min_gap, anchor_jitter = 24, 16  # cells of about 32
