# fa_grape_every100: GrAPE with one setting changed.
out_dir = "out-search/fa_grape_every100"
method = "fa"
fa_grape = True
tie_weights = False
log_alignment = True
fa_grape_every = 100
