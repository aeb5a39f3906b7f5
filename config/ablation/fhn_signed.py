# One gated scan whose decay may be negative: it can flip a state, as counting parity needs.
out_dir = "out-ablation/fhn_signed"
attn_mode = "fhn"
fhn_dynamics = "signed"
