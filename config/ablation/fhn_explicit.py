# Waves by explicit Euler: a layer reaches two tokens back.
out_dir = "out-ablation/fhn_explicit"
attn_mode = "fhn"
use_fhn_imex = False
