# Cells of about 16 tokens, rotary phases, regions of two cells that attend to each other. For blocks of 64 and more.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-geometric"
pos_embedding = "none"
use_ferope = True
use_block_sparse = True
anchor_min_gap, anchor_jitter = 12, 8
region_size = 2
region_edges = 1
use_region_feedback = True
