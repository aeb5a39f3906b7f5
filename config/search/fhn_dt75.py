# Waves with a step of 0.75.
out_dir = "out-search/fhn_dt75"
attn_mode = "fhn"
fhn_dt = 0.75
