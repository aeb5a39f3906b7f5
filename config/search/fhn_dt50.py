# Waves with a step of 0.50.
out_dir = "out-search/fhn_dt50"
attn_mode = "fhn"
fhn_dt = 0.50
