# No position table: what causality alone tells about order.
out_dir = "out-ablation/no_positions"
pos_embedding = "none"
