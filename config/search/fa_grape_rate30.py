# fa_grape_rate30: GrAPE with one setting changed.
out_dir = "out-search/fa_grape_rate30"
method = "fa"
fa_grape = True
tie_weights = False
log_alignment = True
fa_grape_lr = 0.3
