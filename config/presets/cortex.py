# nanoGPT-FE-RoPE: rotary phases by the distance to an anchor, cells around anchors that attend to themselves and to one
# ring of neighbours, regions of two cells with a slate and with feedback from regions before them, a mixture of facets
# softmaxes that reads the slate, and the auto-encoder of hidden states. Plain twin: shakespeare_char_baseline.
# Training takes 4.8 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/cortex.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-cortex"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
pos_embedding = "none"
use_ferope = True
ferope_anchor_relative = True
use_block_sparse = True
neighbor_rings = 1
anchor_min_gap, anchor_jitter = 24, 8
region_size = 2
region_edges = 1
use_region_feedback = True
use_mfs_head = True
mfs_K, mfs_P = 3, 4
add_l4_losses = True
region_slate_include_prior = True
region_slate_include_error = True
