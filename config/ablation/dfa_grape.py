# Direct feedback alignment whose matrices learn the taps' Jacobians by forward probes.
out_dir = "out-ablation/dfa_grape"
method = "dfa"
fa_grape = True
tie_weights = False
log_alignment = True
