# dfa_grape_rate100: GrAPE with one setting changed.
out_dir = "out-search/dfa_grape_rate100"
method = "dfa"
fa_grape = True
tie_weights = False
log_alignment = True
fa_grape_lr = 1.0
