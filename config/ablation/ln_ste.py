# Norms pass the error as it is.
out_dir = "out-ablation/ln_ste"
ln_mode = "ste"
