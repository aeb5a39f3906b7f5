# Direct feedback alignment: every sublayer hears of the last error through a random matrix.
out_dir = "out-ablation/dfa"
method = "dfa"
tie_weights = False
log_alignment = True
