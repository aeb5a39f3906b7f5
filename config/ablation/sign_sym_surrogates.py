# Sign symmetry with straight-through GELU and centred, scaled norms.
out_dir = "out-ablation/sign_sym_surrogates"
method = "sign_sym"
ste_gelu = True
ln_mode = "center_scale"
tie_weights = False
log_alignment = True
