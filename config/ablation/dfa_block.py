# Direct feedback alignment, one error per block.
out_dir = "out-ablation/dfa_block"
method = "dfa"
dfa_granularity = "block"
tie_weights = False
log_alignment = True
