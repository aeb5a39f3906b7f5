# A learned scalar on each sublayer.
out_dir = "out-ablation/gated_blocks"
gated_blocks = True
