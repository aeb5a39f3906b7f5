# fa_grape_every1: GrAPE with one setting changed.
out_dir = "out-search/fa_grape_every1"
method = "fa"
fa_grape = True
tie_weights = False
log_alignment = True
fa_grape_every = 1
