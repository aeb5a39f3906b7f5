# Sign symmetry with random magnitudes.
out_dir = "out-ablation/sign_sym_frozen"
method = "sign_sym"
sign_sym_scale = "frozen_magnitude"
tie_weights = False
log_alignment = True
