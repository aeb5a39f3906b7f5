# The control of dfa: the residual stream alone, no matrix.
out_dir = "out-ablation/dfa_skip"
method = "dfa"
dfa_feedback = "skip"
tie_weights = False
log_alignment = True
