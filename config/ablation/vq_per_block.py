# After each block the nearest of 1024 random directions, other directions in each block.
out_dir = "out-ablation/vq_per_block"
vq_codes = 1024
vq_per_block = True
