# The mixture reads the region's summary, the prior and the auto-encoder's error. Cells of about 32.
out_dir = "out-ablation/mfs_regions"
use_mfs_head = True
add_l4_losses = True
region_size = 2
region_slate_include_error = True
anchor_min_gap, anchor_jitter = 24, 16
