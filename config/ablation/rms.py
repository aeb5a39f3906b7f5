# RMSNorm without gain in place of layer norm.
out_dir = "out-ablation/rms"
norm = "rms"
