# Output projections start at 0.
out_dir = "out-ablation/zero_init"
zero_init_proj = True
