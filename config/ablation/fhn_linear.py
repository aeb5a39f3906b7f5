# The control for waves: no cubic, no recovery, one gated scan.
out_dir = "out-ablation/fhn_linear"
attn_mode = "fhn"
fhn_dynamics = "linear"
