# Norms pass the error centred and divided by sigma.
out_dir = "out-ablation/ln_center_scale"
ln_mode = "center_scale"
