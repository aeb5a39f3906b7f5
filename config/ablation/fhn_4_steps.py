# Waves with four solver steps.
out_dir = "out-ablation/fhn_4_steps"
attn_mode = "fhn"
fhn_steps = 4
