# Feedback alignment with a sixteenth of the feedback weights.
out_dir = "out-ablation/fa_sparse"
method = "fa"
fa_init_mode = "sparse"
tie_weights = False
log_alignment = True
