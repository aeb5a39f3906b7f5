# No position table: order by causality alone.
out_dir = "out-ablation/no_positions"
pos_embedding = "none"
