# Feedback alignment whose feedback learns the layers' Jacobians by forward probes.
out_dir = "out-ablation/fa_grape"
method = "fa"
fa_grape = True
tie_weights = False
log_alignment = True
