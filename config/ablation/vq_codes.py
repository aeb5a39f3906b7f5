# After each block the nearest of 1024 random directions.
out_dir = "out-ablation/vq_codes"
vq_codes = 1024
