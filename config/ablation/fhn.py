# FitzHugh-Nagumo waves in place of attention: two IMEX steps.
out_dir = "out-ablation/fhn"
attn_mode = "fhn"
