# Feedback alignment: errors go back through fixed random weights.
out_dir = "out-ablation/fa"
method = "fa"
tie_weights = False
log_alignment = True
