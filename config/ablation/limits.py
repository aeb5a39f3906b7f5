# After each block: 64 of 128 channels, the nearest of 1024 random directions, a subspace of 64 dimensions.
out_dir = "out-ablation/limits"
resid_topk = 64
vq_codes = 1024
subspace_rank = 64
