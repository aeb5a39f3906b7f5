# Rotary positions in place of the position table.
out_dir = "out-ablation/rope"
pos_embedding = "rope"
