# Sign symmetry: errors go back through the signs of the weights.
out_dir = "out-ablation/sign_sym"
method = "sign_sym"
tie_weights = False
log_alignment = True
