# Backpropagation with straight-through GELU and centred, scaled norms.
out_dir = "out-ablation/surrogates"
ste_gelu = True
ln_mode = "center_scale"
tie_weights = False
