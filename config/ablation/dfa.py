# Direct feedback alignment: every sublayer gets the error of the last layer through a random matrix.
out_dir = "out-ablation/dfa"
method = "dfa"
tie_weights = False
log_alignment = True
