# Feedback alignment with orthonormal feedback.
out_dir = "out-ablation/fa_orthogonal"
method = "fa"
fa_init_mode = "orthogonal"
tie_weights = False
log_alignment = True
