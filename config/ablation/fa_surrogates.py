# Feedback alignment with straight-through GELU and centred, scaled norms.
out_dir = "out-ablation/fa_surrogates"
method = "fa"
ste_gelu = True
ln_mode = "center_scale"
tie_weights = False
log_alignment = True
