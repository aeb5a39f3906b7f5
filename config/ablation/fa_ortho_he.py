# Feedback alignment with orthogonal feedback of He's variance.
out_dir = "out-ablation/fa_ortho_he"
method = "fa"
fa_init_mode = "ortho_he"
tie_weights = False
log_alignment = True
