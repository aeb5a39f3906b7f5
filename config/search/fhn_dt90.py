# Waves with a step of 0.90.
out_dir = "out-search/fhn_dt90"
attn_mode = "fhn"
fhn_dt = 0.90
