# Sign symmetry, scaled by the weights' first size.
out_dir = "out-ablation/sign_sym_init"
method = "sign_sym"
sign_sym_scale = "init"
tie_weights = False
log_alignment = True
