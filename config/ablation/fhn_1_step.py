# Waves with one solver step: a gated scan of the stimulus, then the cubic never acts on what was carried.
out_dir = "out-ablation/fhn_1_step"
attn_mode = "fhn"
fhn_steps = 1
